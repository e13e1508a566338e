"""Training as a Prefect task, its progress live in the Prefect UI."""

from pathlib import Path
from typing import Any

from prefect import task
from prefect.artifacts import create_progress_artifact, update_progress_artifact

from tasks.core.config import ModelConfig, TrainConfig
from tasks.core.progress import report_progress
from tasks.core.records import AdapterRef, BaseRef, TokensRef, TrainPoint
from tasks.core.settings import read_settings
from tasks.core.stages import adapter_stage
from tasks.core.store import open_store, stored
from tasks.policy import STAGE_OPTIONS


@task(name="train-adapter", **STAGE_OPTIONS)
def train_adapter(
    model: ModelConfig, train: TrainConfig, base: BaseRef, tokens: TokensRef, store_url: str
) -> AdapterRef:
    """Return the trained adapter; its weights and training curve are in the store."""
    store = open_store(read_settings(store_url))

    def make(folder: Path) -> dict[str, Any]:
        from tasks.models.base import open_base
        from tasks.models.load import free_memory
        from tasks.training.trainer import train_adapter as fit

        report_progress("train", 0, 0, "loading the model")
        progress: Any = create_progress_artifact(
            0.0, key="training", description="Training, percent of optimizer steps"
        )

        def on_step(step: int, steps: int, point: TrainPoint) -> None:
            report_progress("train", step, steps, f"loss {point.loss:.3f}")
            # A handful of updates is enough to watch, and each is a request to the server.
            if step == steps or step % max(1, steps // 20) == 0:
                update_progress_artifact(artifact_id=progress, progress=100 * step / steps)

        fields = fit(
            open_base(store, base, model),
            store.local_folder(tokens.artifact),
            train,
            folder,
            on_step,
            model.trust_remote_code,
        )
        free_memory()
        return {**fields, "dropped_too_long": tokens.too_long["train"]}

    return stored(store, adapter_stage(train, base, tokens), AdapterRef, make)
