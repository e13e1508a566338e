"""What each stage's result depends on: kind, version, the content of its inputs, the settings that matter.

Kept apart from the stages themselves so that `plan` can say what is reused without torch or Prefect. A version goes up
when the stage's code would give other bytes for the same inputs."""

from dataclasses import dataclass
from typing import Any

from tasks.core.config import DataConfig, EvalConfig, ExportConfig, ModelConfig, TrainConfig
from tasks.core.digest import stage_key
from tasks.core.hardware import device_class, resolve_dtype
from tasks.core.records import AdapterRef, BaseRef, DatasetRef, ModelRef, ScoreSheet


@dataclass(frozen=True)
class Stage:
    kind: str
    version: int
    inputs: list[str]
    section: dict[str, Any]

    @property
    def key(self) -> str:
        return stage_key(self.kind, self.version, self.inputs, self.section)


def base_stage(config: ModelConfig, content: str) -> Stage:
    section = config.model_dump(mode="json", include={"template", "trust_remote_code"})
    return Stage("base", 1, [content], section)


def dataset_stage(config: DataConfig, sources: list[str]) -> Stage:
    """`sources` are the content digests of the source files, so a path is not in the key."""
    section = config.model_dump(mode="json", include={"validation_share", "max_chars"})
    options = [s.model_dump(mode="json", include={"format", "subset", "split", "max_rows"}) for s in config.sources]
    return Stage("dataset", 1, sources, {**section, "sources": options})


def validation_stage(config: DataConfig, dataset: DatasetRef) -> Stage:
    section = config.model_dump(mode="json", include={"min_rows", "max_quarantined_share", "max_chars"})
    return Stage("validation", 1, [dataset.artifact.content], section)


def scores_stage(
    config: EvalConfig, suite: str, base: BaseRef, adapter: AdapterRef | None, trust_remote_code: bool
) -> Stage:
    """`suite` identifies the items and prompts. Precision and device class are in the key: they alone flip items."""
    section = {
        **config.model_dump(mode="json", include={"limit", "seed", "builtin_tasks", "batch_tokens"}),
        "tasks": [t.name for c in config.capabilities for t in c.tasks],
        "template": base.template,
        "method": adapter.method if adapter else None,
        "trust_remote_code": trust_remote_code,
        **precision(),
    }
    return Stage("scores", 1, [base.artifact.content, adapter.artifact.content if adapter else "", suite], section)


def precision() -> dict[str, str]:
    """Return what scoring computes in here; sheets that differ in it are never compared."""
    return {"dtype": resolve_dtype("auto"), "device": device_class()}


def adapter_stage(config: TrainConfig, base: BaseRef, dataset: DatasetRef) -> Stage:
    section = {
        **config.model_dump(mode="json"),
        "dtype": resolve_dtype(config.dtype),
        "device": device_class(),
        "template": base.template,
    }
    return Stage("adapter", 1, [base.artifact.content, dataset.artifact.content], section)


def comparison_stage(config: EvalConfig, before: ScoreSheet, after: ScoreSheet) -> Stage:
    capabilities = [
        {**c.model_dump(mode="json", exclude={"tasks"}), "tasks": [t.name for t in c.tasks]}
        for c in config.capabilities
    ]
    section = {"capabilities": capabilities, "seed": config.seed}
    return Stage("comparison", 1, [before.artifact.content, after.artifact.content], section)


def merged_stage(base: BaseRef, adapter: AdapterRef) -> Stage:
    section = {"method": adapter.method, "template": base.template, "dtype": resolve_dtype("auto")}
    return Stage("merged", 1, [base.artifact.content, adapter.artifact.content], section)


def gguf_stage(config: ExportConfig, merged: ModelRef) -> Stage:
    section = config.model_dump(mode="json", include={"quantisations", "serve", "system", "prompt"})
    return Stage("gguf", 1, [merged.artifact.content], section)
