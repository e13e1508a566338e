"""Publishing a run: the card in the store, and Prefect artifacts for those who look there."""

from pathlib import Path
from typing import Any

from prefect import task
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact

from tasks.core.digest import sha256
from tasks.core.manifest import RunManifest
from tasks.core.records import ArtifactRecord, ArtifactRef
from tasks.core.settings import read_settings
from tasks.core.stages import Stage
from tasks.core.store import open_store, stored
from tasks.policy import ONCE_OPTIONS
from tasks.reporting.cards import delta_cells, write_card


@task(name="publish-run", **ONCE_OPTIONS)
def publish_run(manifest: RunManifest, store_url: str) -> ArtifactRef:
    """Return the run's card in the store, and show it, its deltas and its artifacts in the Prefect UI."""
    text = write_card(manifest)

    def make(folder: Path) -> dict[str, Any]:
        (folder / "card.md").write_text(text, encoding="utf-8")
        return {}

    card = stored(
        open_store(read_settings(store_url)), Stage("card", 1, [sha256(text.encode())], {}), ArtifactRecord, make
    )
    create_markdown_artifact(text, key="model-card", description=f"Card of run {manifest.run_id}")
    if manifest.report:
        names = ("capability", "role", "before", "after", "delta", "interval", "budget", "status")
        rows = [dict(zip(names, delta_cells(d), strict=True)) for d in manifest.report.capabilities]
        create_table_artifact(rows, key="deltas", description=manifest.report.reason)
    for name in ("adapter", "merged", "gguf"):
        record = getattr(manifest, name)
        if record is not None:
            create_link_artifact(record.artifact.uri, key=name, description=f"{name} of the run")
    return card.artifact
