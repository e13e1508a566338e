"""Training as a Prefect task, its progress live in the Prefect UI and in the store."""

import shutil
import time
from pathlib import Path
from typing import Any

from prefect import task
from prefect.artifacts import create_progress_artifact, update_progress_artifact

from tasks.core.config import CombineConfig, ModelConfig, TrainConfig
from tasks.core.errors import PrunedError
from tasks.core.hardware import resolve_dtype
from tasks.core.manifest import LiveCurve
from tasks.core.progress import report_progress
from tasks.core.records import AdapterRef, BaseRef, CombinedPart, CombinedRef, TokensRef, TrainedRef, TrainPoint
from tasks.core.settings import read_settings
from tasks.core.stages import adapter_stage, combined_stage
from tasks.core.store import open_store, stored
from tasks.core.sweep import watch_rivals
from tasks.policy import STAGE_OPTIONS
from tasks.training.shared import SharedCheckpoints

SHOWN_SECONDS = 10.0
"""Between updates in the Prefect UI and of the live curve: each is a request to a server."""


@task(name="train-adapter", **STAGE_OPTIONS)
def train_adapter(
    model: ModelConfig,
    train: TrainConfig,
    base: BaseRef,
    tokens: TokensRef,
    start: TrainedRef | None,
    store_url: str,
    run_id: str | None = None,
) -> AdapterRef:
    """Return the trained adapter, which goes on from `start`; its weights and training curve are in the store. `run_id`
    is the run whose live curve this is. Raises PrunedError for a trial that falls behind its sweep's others."""
    store = open_store(read_settings(store_url))
    stage = adapter_stage(train, base, tokens, start)
    checkpoints = store.kept_folder(f"training-{stage.key}")
    shared = None if store.shares_kept_folders else SharedCheckpoints(store, stage, run_id)

    def make(folder: Path) -> dict[str, Any]:
        from tasks.models.base import open_base
        from tasks.training.worker import run_training

        report_progress("train", 0, 0, "loading the model")
        progress: Any = create_progress_artifact(
            0.0, key="training", description="Training, percent of optimizer steps"
        )
        live = LiveCurve(store, run_id) if run_id else None
        check_rivals = watch_rivals(store, run_id)
        shown = 0.0

        def on_step(step: int, steps: int, point: TrainPoint) -> None:
            nonlocal shown
            report_progress("train", step, steps, f"loss {point.loss:.3f}")
            if live:
                live.points.append(point)
            if step == steps or time.monotonic() - shown > SHOWN_SECONDS:
                shown = time.monotonic()
                update_progress_artifact(artifact_id=progress, progress=100 * step / steps)
                if live:
                    live.write()
            if point.validation_loss is not None:
                try:
                    check_rivals(step, steps, point.validation_loss)
                except PrunedError:
                    if live:
                        live.write()  # others are compared with it too
                    raise

        places = {
            "base": str(open_base(store, base, model)),
            "tokens": str(store.local_folder(tokens.artifact)),
            "out": str(folder),
            "checkpoints": str(checkpoints),
            "start_from": str(store.local_folder(start.artifact)) if start else None,
        }
        trackers = {
            "run_name": run_id or stage.key[:12],
            "settings": train.model_dump(mode="json"),
            "folder": str(store.kept_folder("trackers")),
        }
        fields = run_training(places, train, on_step, model.trust_remote_code, trackers, shared)
        return {**fields, "dropped_too_long": tokens.too_long["train"]}

    record = stored(store, stage, AdapterRef, make)
    if shared:
        shared.forget()
    shutil.rmtree(checkpoints, ignore_errors=True)
    return record


@task(name="combine-adapters", **STAGE_OPTIONS)
def combine_adapters(
    model: ModelConfig, config: CombineConfig, base: BaseRef, parts: list[CombinedPart], store_url: str
) -> CombinedRef:
    """Return what the runs' adapters become together: an adapter, or in sequence a whole model."""
    store = open_store(read_settings(store_url))
    in_sequence = config.method == "sequence"

    def make(folder: Path) -> dict[str, Any]:
        from tasks.models.base import open_base
        from tasks.models.load import free_memory, pick_dtype
        from tasks.training import combine

        where, trust = open_base(store, base, model), model.trust_remote_code
        shares = [(part.folder(store.local_folder(part.artifact)), part.share) for part in parts]
        report_progress("combine", 0, 0, f"{len(parts)} adapters")
        rank = None
        if in_sequence:
            combine.merge_in_sequence(where, shares, parts[0].method, pick_dtype(resolve_dtype("auto")), folder, trust)
        else:
            rank = combine.combine_adapters(where, shares, config, folder, trust)
        free_memory()
        method = "full" if in_sequence else parts[0].method
        made = {"method": method, "by": config.method, "rank": rank}
        return {**made, "parts": [part.model_dump() for part in parts]}

    combined = stored(store, combined_stage(config, base, parts), CombinedRef, make)
    return combined.model_copy(update={"parts": parts})  # other runs may have the same adapters
