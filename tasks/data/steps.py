"""Fetching and validating the training data as Prefect tasks."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import task
from prefect.artifacts import create_link_artifact

from tasks.core.cache import remove_unheld
from tasks.core.config import DataConfig, ModelConfig, ReplayConfig
from tasks.core.errors import DataError
from tasks.core.hardware import device_class
from tasks.core.progress import report_progress
from tasks.core.records import BaseRef, DataReport, DatasetRef, ItemsRef, ReplayRef, TokensRef
from tasks.core.settings import read_settings
from tasks.core.stages import Stage, dataset_stage, replay_stage, tokens_stage, validation_stage
from tasks.core.store import Store, open_store, stored
from tasks.policy import STAGE_OPTIONS

if TYPE_CHECKING:
    from tasks.data.prepare import RunShards


@task(name="fetch-dataset", **STAGE_OPTIONS)
def fetch_dataset(data: DataConfig, items: ItemsRef, store_url: str) -> DatasetRef:
    """Return the training rows, read, cleaned, split and counted. Raises DataError for what cannot be read."""
    return store_dataset(data, items, store_url)


def store_dataset(
    data: DataConfig, items: ItemsRef, store_url: str, run_shards: "RunShards | None" = None
) -> DatasetRef:
    """As fetch_dataset; `run_shards` cleans the shards elsewhere than in processes of this machine."""
    store = open_store(read_settings(store_url))
    stage = dataset_stage_of(data, items, store)
    kept = store.kept_folder(f"dataset-{stage.key}")

    def make(folder: Path) -> dict[str, Any]:
        from tasks.data.leakage import read_items
        from tasks.data.prepare import clean_here, prepare_dataset

        index = read_items(store.local_folder(items.artifact)) if data.leakage == "quarantine" else None

        def say(done: int) -> None:
            report_progress("dataset", done, 0)

        return prepare_dataset(data, folder, index, say, run_shards or clean_here, kept, store)

    dataset = stored(store, stage, DatasetRef, make)
    remove_unheld(kept)
    return dataset


def dataset_stage_of(data: DataConfig, items: ItemsRef, store: Store) -> Stage:
    """Return what the training rows depend on. Raises DataError where a source is not there."""
    from tasks.data.sources import source_digests

    return dataset_stage(data, source_digests(data, store), items.artifact.key)


@task(name="validate-dataset", **STAGE_OPTIONS)
def validate_dataset(data: DataConfig, dataset: DatasetRef, store_url: str) -> DataReport:
    """Return the Great Expectations report; report.json and Data Docs are in the store, whatever the outcome."""
    store = open_store(read_settings(store_url))

    def make(folder: Path) -> dict[str, Any]:
        from tasks.data.expectations import validate_rows

        passed, checks = validate_rows(store.local_folder(dataset.artifact), dataset, data, folder)
        return {"passed": passed, "checks": [check.model_dump() for check in checks]}

    report = stored(store, validation_stage(data, dataset), DataReport, make)
    create_link_artifact(
        f"{report.artifact.uri}/data_docs/index.html", key="data-docs", description="Great Expectations on the rows"
    )
    return report


@task(name="generate-replay", **STAGE_OPTIONS)
def generate_replay(
    model: ModelConfig, base: BaseRef, replay: ReplayConfig, dataset: DatasetRef, items: ItemsRef, store_url: str
) -> ReplayRef:
    """Return rows that the base itself answers to the recipe's prompts. Raises DataError where these are not there."""
    from tasks.data.sources import prompts_digest

    store = open_store(read_settings(store_url))
    stage = replay_stage(replay, prompts_digest(replay), base, dataset, items.artifact.key)

    def make(folder: Path) -> dict[str, Any]:
        from tasks.data.leakage import read_items
        from tasks.data.replay import answer_prompts, read_prompts
        from tasks.models.base import open_base
        from tasks.models.load import free_memory, load_model, pick_dtype
        from tasks.models.tokenizer import load_tokenizer

        where = open_base(store, base, model)
        index = read_items(store.local_folder(items.artifact))
        prompts = read_prompts(Path(str(replay.prompts)))
        wanted = stage.section["wanted"]
        loaded = load_model(where, pick_dtype("auto"), device_class(), trust_remote_code=model.trust_remote_code)
        tokenizer = load_tokenizer(where, base.template, model.trust_remote_code)
        rows = 0
        with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
            for row in answer_prompts(
                *(loaded, tokenizer, prompts, wanted, replay.max_new_tokens, index),
                lambda done: report_progress("tokens", done, wanted, "replay: the base answers"),
            ):
                rows += 1
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        del loaded
        free_memory()
        return {"rows": rows, "prompts": len(prompts)}

    return stored(store, stage, ReplayRef, make)


@task(name="tokenise-dataset", **STAGE_OPTIONS)
def tokenise_dataset(
    model: ModelConfig,
    base: BaseRef,
    data: DataConfig,
    dataset: DatasetRef,
    replay: ReplayRef | None,
    max_tokens: int,
    store_url: str,
) -> TokensRef:
    """Return both splits as the token sequences that training reads, with the report on them and a coloured sample.
    Raises ConfigError where `max_tokens` are more than the base reads."""
    from tasks.models.base import check_max_tokens

    check_max_tokens(base, max_tokens)
    store = open_store(read_settings(store_url))

    def make(folder: Path) -> dict[str, Any]:
        from tasks.data.tokens import tokenise_dataset as tokenise
        from tasks.models.base import open_base

        place = open_base(store, base, model)
        rows = store.local_folder(dataset.artifact)
        replayed = store.local_folder(replay.artifact) / "rows.jsonl" if replay else None
        fields = tokenise(rows, dataset, place, base.template, max_tokens, data.min_rows, folder, replayed)
        return {**fields, "replayed": replay.rows if replay else 0}

    tokens = stored(store, tokens_stage(dataset, replay, base, max_tokens, data.min_rows), TokensRef, make)
    for page, key, what in (
        ("data_docs/index.html", "token-docs", "Great Expectations on the tokenised rows"),
        ("sample.html", "sample", "Ten rows as they are learned, the learned tokens coloured"),
    ):
        create_link_artifact(f"{tokens.artifact.uri}/{page}", key=key, description=what)
    return tokens


def require_valid(report: DataReport) -> None:
    """Raise DataError, naming every critical expectation that failed."""
    failed = [f"{c.expectation}: {c.observed}" for c in report.checks if c.severity == "critical" and not c.passed]
    if failed:
        raise DataError(
            "The training data was rejected before any compute. "
            + "; ".join(failed)
            + f". The report and Data Docs are in {report.artifact.uri}."
        )
