"""Fetching and validating the training data as Prefect tasks."""

from pathlib import Path
from typing import Any

from prefect import task

from tasks.core.config import DataConfig
from tasks.core.errors import DataError
from tasks.core.progress import report_progress
from tasks.core.records import DataReport, DatasetRef
from tasks.core.settings import read_settings
from tasks.core.stages import dataset_stage, validation_stage
from tasks.core.store import open_store, stored
from tasks.policy import STAGE_OPTIONS


@task(name="fetch-dataset", **STAGE_OPTIONS)
def fetch_dataset(data: DataConfig, store_url: str) -> DatasetRef:
    """Return the training rows, read, canonical, split and counted. Raises DataError for what cannot be read."""
    from tasks.data.split import prepare_dataset, source_digests

    return stored(
        open_store(read_settings(store_url)),
        dataset_stage(data, source_digests(data)),
        DatasetRef,
        lambda folder: prepare_dataset(data, folder, lambda done: report_progress("dataset", done, 0)),
    )


@task(name="validate-dataset", **STAGE_OPTIONS)
def validate_dataset(data: DataConfig, dataset: DatasetRef, store_url: str) -> DataReport:
    """Return the Great Expectations report; report.json and Data Docs are in the store, whatever the outcome."""
    store = open_store(read_settings(store_url))

    def make(folder: Path) -> dict[str, Any]:
        from tasks.data.expectations import validate_rows

        passed, checks = validate_rows(store.local_folder(dataset.artifact), dataset, data, folder)
        return {"passed": passed, "checks": [check.model_dump() for check in checks]}

    return stored(store, validation_stage(data, dataset), DataReport, make)


def require_valid(report: DataReport) -> None:
    """Raise DataError, naming every critical expectation that failed."""
    failed = [f"{c.expectation}: {c.observed}" for c in report.checks if c.severity == "critical" and not c.passed]
    if failed:
        raise DataError(
            "The training data was rejected before any compute. "
            + "; ".join(failed)
            + f". The report and Data Docs are in {report.artifact.uri}."
        )
