"""Is what was promoted still what was promoted? Its bytes, its name in Ollama, and its scores, measured anew.

A model's scores can change with libraries, drivers and machines while its bytes stay. Everything the store would answer
from memory is therefore left out: base and adapter go into a store of their own, where they are scored again.
"""

import shutil
from pathlib import Path
from typing import NoReturn

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from flows.events import announce
from flows.registry import ALIAS
from flows.score_model import score_model
from flows.store import verify_artifacts
from tasks.core import registry
from tasks.core.errors import ForgetlessError
from tasks.core.manifest import RunManifest, read_manifest
from tasks.core.records import ArtifactRef, ForgettingReport
from tasks.core.registry import Version
from tasks.core.settings import quiet_libraries, read_settings
from tasks.core.store import MARKER, FileStore, Store, open_store
from tasks.evaluation.steps import compare_scores
from tasks.reporting.cards import delta_table

quiet_libraries()


@flow(name="regression", flow_run_name="regression-{name}", persist_result=False)
def check_regression(name: str, alias: str = ALIAS, store: str | None = None) -> ForgettingReport:
    """Return how a promoted model's scores of now differ from those it was promoted for. Raises ForgetlessError, after
    forgetless.model.regressed was announced, where it forgot, or where its files or its name in Ollama changed.

    Args:
        name: The model's name in the registry.
        alias: The alias whose version is checked.
        store: Folder or s3://bucket/prefix; empty for the worker's own (FORGETLESS_STORE).
    """
    place = open_store(read_settings(store))
    move = registry.read_current(place, name, alias)
    if move is None or move.version is None:
        raise ForgetlessError(f"No version of {name!r} is {alias} in {place.url}. Promote one: forgetless promote RUN")
    version = registry.read_version(place, name, move.version)
    manifest = read_manifest(place, version.run)
    problems = [*_changed_files(place, manifest), *_changed_in_ollama(name, alias, version)]
    if problems:
        _report(name, alias, version, problems, "")
    report = _score_again(place, manifest)
    text = f"{name}:{alias}, run {version.run}\n\n{delta_table(report.capabilities)}"
    create_markdown_artifact(text, key="regression", description=f"Scores of {name}:{alias} against its promotion's")
    problems = [f"{d.name} {d.status}: {d.delta:+.2f} {d.unit}" for d in report.capabilities if _is_worse(d.status)]
    if problems:
        _report(name, alias, version, problems, text)
    return report


def _report(name: str, alias: str, version: Version, problems: list[str], text: str) -> NoReturn:
    what = f"{name}:{alias} is not what was promoted: {'; '.join(problems)}."
    announce("model.regressed", f"model.{name}", name=name, alias=alias, run=version.run, text=f"{what}\n{text}")
    raise ForgetlessError(f"{what} Go back with: forgetless rollback {name}")


def _is_worse(status: str) -> bool:
    return status in ("forgot", "lost")


def _changed_files(store: Store, manifest: RunManifest) -> list[str]:
    found = verify_artifacts(store, manifest.run_id, lambda _: None)["problems"]
    return [f"{p['artifact']}/{p['file']} is {p['problem']}" for p in found]


def _changed_in_ollama(name: str, alias: str, version: Version) -> list[str]:
    """Return what an Ollama that this machine reaches has under the alias, where it is not the version's model."""
    from tasks.export.ollama import is_reachable, read_digest

    url = read_settings().ollama_url
    if version.ollama_digest is None or is_reachable(url) is None:
        return []
    found = read_digest(url, f"{name}:{alias}")
    return (
        [] if found == version.ollama_digest else [f"in Ollama it is {found or 'absent'}, not {version.ollama_digest}"]
    )


def _score_again(store: Store, manifest: RunManifest) -> ForgettingReport:
    """Return the recorded scores of a run's model against those of now, from a store that knows neither."""
    base, adapter, recorded = manifest.base, manifest.adapter, manifest.after
    assert base and adapter and recorded  # a version has them
    recipe = manifest.recipe
    with store.work_folder() as folder:
        own = FileStore(folder / "store")
        for record in (base, adapter, recorded):
            _copy(store, own, record.artifact, folder / "copy")
        now = score_model(recipe.model, recipe.eval, base, adapter, own.url, "again")
        return compare_scores(recipe.eval, recorded, now, own.url)


def _copy(store: Store, own: FileStore, ref: ArtifactRef, scratch: Path) -> None:
    marker = store.read_bytes(f"artifacts/{ref.kind}/{ref.key}/{MARKER}")
    assert marker is not None  # verified before
    shutil.copytree(store.local_folder(ref), scratch)
    own.upload(scratch, ref, marker)
