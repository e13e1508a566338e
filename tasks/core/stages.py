"""What each stage's result depends on: kind, version, the content of its inputs, the settings that matter.

Kept apart from the stages themselves so that `plan` can say what is reused without torch or Prefect. A version goes up
when the stage's code would give other bytes for the same inputs."""

from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from tasks.core.config import (
    CombineConfig,
    DataConfig,
    EvalConfig,
    ExportConfig,
    ModelConfig,
    ReplayConfig,
    TrainConfig,
)
from tasks.core.digest import file_sha256, stage_key
from tasks.core.hardware import device_class, resolve_dtype
from tasks.core.records import (
    BaseRef,
    CombinedPart,
    DatasetRef,
    FileRef,
    GgufRef,
    ModelRef,
    ReplayRef,
    ScoreSheet,
    TokensRef,
    TrainedRef,
)


@dataclass(frozen=True)
class Stage:
    kind: str
    version: int
    inputs: list[str]
    section: dict[str, Any]
    named: str | None = None
    """The key in place of a digest, for what is looked for by how its key begins."""

    @property
    def key(self) -> str:
        return self.named or stage_key(self.kind, self.version, self.inputs, self.section)


def base_stage(config: ModelConfig, content: str) -> Stage:
    section = config.model_dump(mode="json", include={"template", "trust_remote_code"})
    return Stage("base", 1, [content], section)


def items_stage(suite: str) -> Stage:
    return Stage("items", 1, [suite], {})


def dataset_stage(config: DataConfig, sources: list[str], suite: str) -> Stage:
    """`sources` are the content digests of the source files, so a path is not in the key; `suite` identifies the
    evaluation items that no row may hold."""
    section = config.model_dump(mode="json", include={"validation_share", "max_chars", "fill", "clean", "leakage"})
    all_sources = [*config.sources, *(config.replay.sources if config.replay else [])]
    options = [s.model_dump(mode="json", exclude={"path", "revision", "license"}) for s in all_sources]
    share = config.replay.share if config.replay and config.replay.sources else None
    items = [suite] if config.leakage == "quarantine" else []
    return Stage("dataset", 2, [*sources, *items], {**section, "sources": options, "replay": share})


def replay_stage(config: ReplayConfig, prompts: str, base: BaseRef, dataset: DatasetRef, items: str) -> Stage:
    """`prompts` is the content of the prompts' file; as many rows are wanted as make up the share of all."""
    wanted = round(config.share / (1 - config.share) * dataset.rows["train"])
    section = {"wanted": wanted, "max_new_tokens": config.max_new_tokens, "template": base.template, **precision()}
    return Stage("replay", 1, [prompts, base.artifact.content, items], section)


def tokens_stage(dataset: DatasetRef, replay: ReplayRef | None, base: BaseRef, max_tokens: int, min_rows: int) -> Stage:
    section = {"template": base.template, "max_tokens": max_tokens, "min_rows": min_rows}
    replayed = [replay.artifact.content] if replay else []
    return Stage("tokens", 1, [dataset.artifact.content, base.artifact.content, *replayed], section)


def validation_stage(config: DataConfig, dataset: DatasetRef) -> Stage:
    section = config.model_dump(mode="json", include={"min_rows", "max_quarantined_share", "max_chars"})
    return Stage("validation", 2, [dataset.artifact.content], section)


def scores_stage(
    config: EvalConfig, suite: str, base: BaseRef, adapter: TrainedRef | None, trust_remote_code: bool
) -> Stage:
    """`suite` identifies the items and prompts."""
    model = responses_stage(config, base, adapter, trust_remote_code)
    asked = config.model_dump(mode="json", include={"limit", "seed", "builtin_tasks"})
    asked["tasks"] = [t.name for c in config.capabilities for t in c.tasks]
    return Stage("scores", 2, [*model.inputs, suite], model.section | asked)


def file_scores_stage(config: EvalConfig, suite: str, file: FileRef, base: BaseRef) -> Stage:
    section = {
        **config.model_dump(mode="json", include={"limit", "seed", "builtin_tasks"}),
        "tasks": [t.name for c in config.capabilities for t in c.tasks],
        "template": base.template,
        "backend": "llama.cpp",
        "version": metadata.version("llama-cpp-python"),
        "device": device_class(),
    }
    return Stage("scores", 2, [file.sha256, base.artifact.content, suite], section)


def base_file_stage(base: BaseRef) -> Stage:
    return Stage("base-gguf", 2, [base.artifact.content], {"template": base.template})


def responses_stage(config: EvalConfig, base: BaseRef, adapter: TrainedRef | None, trust_remote_code: bool) -> Stage:
    """What a model answers, whatever it is asked. Precision and device class are in it: they alone flip items."""
    section = {
        **config.model_dump(mode="json", include={"batch_tokens", "backend"}),
        "template": base.template,
        "method": adapter.method if adapter else None,
        "trust_remote_code": trust_remote_code,
        **precision(),
        **_part(adapter),
    }
    return Stage("responses", 1, [base.artifact.content, adapter.artifact.content if adapter else ""], section)


def _part(adapter: TrainedRef | None) -> dict[str, float | str]:
    if adapter is None:
        return {}
    return (
        ({"strength": adapter.strength} if adapter.strength != 1 else {})
        | ({"step": adapter.step} if adapter.step is not None else {})
        | ({"onto": adapter.onto} if adapter.merges_as != adapter.method else {})
    )


def precision() -> dict[str, str]:
    """Return what scoring computes in here; sheets that differ in it are never compared."""
    return {"dtype": resolve_dtype("auto"), "device": device_class()}


NOT_IN_AN_ADAPTER = {"max_tokens", "retention_texts", "checkpoint_minutes", "report_to", "start_from"}
"""Settings of training that change no byte of the adapter, or that count by their content."""


def adapter_stage(config: TrainConfig, base: BaseRef, tokens: TokensRef, start: TrainedRef | None = None) -> Stage:
    """`start` is what training goes on from."""
    section = {
        **config.model_dump(mode="json", exclude=NOT_IN_AN_ADAPTER),
        "dtype": resolve_dtype(config.dtype),
        "device": device_class(),
    }
    watched = Path(config.retention_texts) if config.retention_texts else None
    more = [file_sha256(watched)] if watched and watched.is_file() else []
    begun = [start.artifact.content] if start else []
    return Stage("adapter", 4, [base.artifact.content, tokens.digest, *begun, *more], section)


def checkpoint_stage(training: Stage, part: str) -> Stage:
    """Part of an unfinished training: `000120` is all but what `best-000100` and `snapshots-000040` hold of it. What
    comes first under such a name counts: its bytes depend on the machine and the time."""
    return Stage("checkpoint", 1, [training.key], {"part": part}, named=f"{training.key}-{part}")


def combined_stage(config: CombineConfig, base: BaseRef, parts: list[CombinedPart]) -> Stage:
    section = {
        **config.model_dump(mode="json", include={"method", "rank", "seed"}),
        "density": config.kept_share,
        "parts": [{"method": part.method, "share": part.share, "step": part.step} for part in parts],
        "dtype": resolve_dtype("auto") if config.method == "sequence" else None,
    }
    return Stage("combined", 1, [base.artifact.content, *(part.artifact.content for part in parts)], section)


def comparison_stage(config: EvalConfig, before: ScoreSheet, after: ScoreSheet, half: int | None = None) -> Stage:
    section = _judged(config) | ({} if half is None else {"half": half})
    return Stage("comparison", 1, [before.artifact.content, after.artifact.content], section)


def _judged(config: EvalConfig) -> dict[str, Any]:
    capabilities = [
        {**c.model_dump(mode="json", exclude={"tasks"}), "tasks": [t.name for t in c.tasks]}
        for c in config.capabilities
    ]
    return {"capabilities": capabilities, "seed": config.seed}


def shipping_stage(config: EvalConfig, before: ScoreSheet, scored: list[tuple[TrainedRef, ScoreSheet]]) -> Stage:
    contents = [before.artifact.content, *(sheet.artifact.content for _, sheet in scored)]
    return Stage("shipping", 1, contents, {**_judged(config), "parts": [_part(adapter) for adapter, _ in scored]})


def merge_choice_stage(base: BaseRef, adapter: TrainedRef, tokens: TokensRef) -> Stage:
    section = {"method": adapter.method, "dtype": resolve_dtype("auto"), "device": device_class(), **_part(adapter)}
    return Stage("merge-choice", 1, [base.artifact.content, adapter.artifact.content, tokens.digest], section)


def merged_stage(base: BaseRef, adapter: TrainedRef) -> Stage:
    section: dict[str, Any] = {"method": adapter.method, "template": base.template, "dtype": resolve_dtype("auto")}
    section |= _part(adapter)
    return Stage("merged", 1, [base.artifact.content, adapter.artifact.content], section)


def gguf_stage(config: ExportConfig, base: BaseRef, adapter: TrainedRef, merged: ModelRef, tokens: TokensRef) -> Stage:
    """The Modelfile beside the files names the base's licence and Ollama's parameters."""
    included = {"quantisations", "serve", "system", "prompt", "ollama_parameters"}
    section = {**config.model_dump(mode="json", include=included), "license": base.license}
    inputs = [merged.artifact.content]
    if config.imatrix:
        inputs.append(tokens.digest)
        section["imatrix"] = True
    if config.adapter_gguf:
        inputs.append(adapter.artifact.content)
        section |= {"adapter_gguf": True, "method": adapter.method, **_part(adapter)}
    return Stage("gguf", 3, inputs, section)


def proof_stage(gguf: GgufRef, merged: ModelRef, tokens: TokensRef) -> Stage:
    section = {"sha256": {name: gguf.sha256[name] for name in gguf.files}}
    return Stage("proof", 2, [merged.artifact.content, tokens.digest], section)
