"""What a run would do, found without torch or Prefect: stages reused or computed, and what the items can detect."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from tasks.core.config import EvalConfig, ModelConfig, Recipe, SourceConfig, TaskConfig
from tasks.core.errors import ConfigError, DataError, ForgetlessError, ModelError
from tasks.core.licences import check_use
from tasks.core.manifest import find_start, shipped_part
from tasks.core.paired import detectable_change
from tasks.core.records import (
    QUANTISING,
    AdapterRef,
    ArtifactRecord,
    BaseRef,
    DataReport,
    DatasetRef,
    ForgettingReport,
    GgufRef,
    LicenceRef,
    MergeChoice,
    ModelRef,
    ProofRef,
    ReplayRef,
    ScoreSheet,
    TokensRef,
)
from tasks.core.retry import is_out_of_reach
from tasks.core.stages import (
    Stage,
    adapter_stage,
    base_stage,
    comparison_stage,
    dataset_stage,
    gguf_stage,
    items_stage,
    merge_choice_stage,
    merged_stage,
    proof_stage,
    replay_stage,
    scores_stage,
    tokens_stage,
    validation_stage,
)
from tasks.core.store import Store, find_artifact
from tasks.data.sources import (
    all_sources,
    content_identity,
    is_hub_id,
    list_licences,
    prompts_digest,
    read_files,
    resolve_entry,
)
from tasks.evaluation.hub_data import missing_tasks
from tasks.evaluation.questions import read_questions
from tasks.evaluation.suite import suite_digest
from tasks.evaluation.vllm_backend import check_vllm
from tasks.models.base import BaseSource, check_max_tokens, locate_base
from tasks.models.hub import is_hub_reached
from tasks.training.trackers import check_trackers

Found = TypeVar("Found", bound=ArtifactRecord)
Located = TypeVar("Located")
# A pair of models in our runs disagrees on about one item in ten; what is detectable follows from it.
EXPECTED_DISCORDANCE = 0.1
MODEL_STAGES = {"base", "tokens", "before", "train", "after", "merge", "gguf", "proof"}


@dataclass(frozen=True)
class PlannedStage:
    stage: str
    action: str
    """reuse, compute, or always (done in every run)"""
    uri: str | None = None


@dataclass(frozen=True)
class Detectable:
    """What a retention capability can show: `detectable` is the smallest budget that its items can show kept with 80 %
    power, in points, at a discordance of 0.1. None for bits per byte, whose spread is known only afterwards."""

    capability: str
    items: int | None
    budget: float
    unit: str
    detectable: float | None


def plan_run(recipe: Recipe, store: Store, *, offline_ok: bool = False) -> dict[str, Any]:
    """Return the plan as plain values. Raises the same errors as the run would, before anything starts, and what cannot
    be had all at once; but with `offline_ok`, a base or data set that is neither here nor in reach is noted, and what
    needs it is to be computed."""
    stages: list[PlannedStage] = []
    notes: list[str] = []
    problems: list[ForgetlessError] = []

    def locate(work: Callable[[], Located]) -> Located | None:
        try:
            return work()
        except (ModelError, DataError) as error:
            if offline_ok and is_out_of_reach(error):
                notes.append(f"{error} Until then it cannot be known what the store already has for it.")
            else:
                problems.append(error)
            return None

    def look(name: str, stage: Stage | None, record_type: type[Found]) -> Found | None:
        found = find_artifact(store, stage, record_type) if stage else None
        stages.append(PlannedStage(name, "reuse" if found else "compute", found.artifact.uri if found else None))
        return found

    source = locate(lambda: locate_base(recipe.model, weights=False, store=store))
    digests = [locate(lambda source=one: content_identity(source, store)) for one in all_sources(recipe.data)]  # type: ignore[misc]
    sources = None if None in digests else [str(one) for one in digests]
    suite = suite_digest(recipe.eval)
    licences = list_licences(recipe.data, store) if sources or not problems else []
    if source or recipe.model.license:
        licences.insert(0, base_licence(recipe.model, source.license if source else None))
    notes += check_use(recipe.export.use, licences)
    if recipe.eval.backend == "vllm" and not offline_ok:
        check_vllm()
    trust = recipe.model.trust_remote_code
    items = items_stage(suite).key
    dataset = look("dataset", dataset_stage(recipe.data, sources, items) if sources else None, DatasetRef)
    look("validate", validation_stage(recipe.data, dataset) if dataset else None, DataReport)
    base = look("base", base_stage(recipe.model, source.content) if source else None, BaseRef)
    if base:
        check_max_tokens(base, recipe.train.max_tokens)
    tokens = look("tokens", _tokens_stage(recipe, store, dataset, base, items) if dataset and base else None, TokensRef)
    start = find_start(store, recipe.train, base)
    known = base if start or recipe.train.start_from is None else None  # what it goes on from is not in the store yet
    before = look("before", scores_stage(recipe.eval, suite, known, start, trust) if known else None, ScoreSheet)
    check_trackers(recipe.train.report_to)
    training = adapter_stage(recipe.train, known, tokens, start) if known and tokens else None
    adapter = look("train", training, AdapterRef)
    adapter = shipped_part(adapter, recipe.export) if adapter else None
    if adapter and adapter.method in QUANTISING:
        assert base and tokens
        choice = find_artifact(store, merge_choice_stage(base, adapter, tokens), MergeChoice)
        adapter = adapter.model_copy(update={"onto": choice.onto}) if choice else None
    after = look(
        "after", scores_stage(recipe.eval, suite, base, adapter, trust) if base and adapter else None, ScoreSheet
    )
    look("compare", comparison_stage(recipe.eval, before, after) if before and after else None, ForgettingReport)
    merged = look("merge", merged_stage(base, adapter) if base and adapter else None, ModelRef)
    ready = None
    if base and adapter and merged and tokens:
        ready = gguf_stage(recipe.export, base, adapter, merged, tokens)
    gguf = look("gguf", ready, GgufRef)
    look("proof", proof_stage(gguf, merged, tokens) if gguf and merged and tokens else None, ProofRef)
    if not offline_ok:
        computed = {s.stage for s in stages if s.action == "compute"}
        rows = [one for one, digest in zip(all_sources(recipe.data), digests, strict=True) if digest]
        problems += _find_missing(recipe, store, source, rows, computed)
    _refuse(problems)
    stages += [PlannedStage("ollama", "always"), PlannedStage("publish", "always")]
    return {
        "recipe": recipe.name,
        "store": store.url,
        "base": str(source.path) if source else None,
        "stages": [asdict(s) for s in stages],
        "detectable": [asdict(d) for d in _detectable(recipe.eval)],
        "notes": notes,
    }


def _refuse(problems: list[ForgetlessError]) -> None:
    """Raise one error with all problems, if there are any, and the way out where something cannot be reached."""
    lines = list(dict.fromkeys(str(problem) for problem in problems))
    if any(is_out_of_reach(problem) for problem in problems):
        lines.append("forgetless fetch RECIPE, where there is a network, brings it into the store.")
    if problems:
        kinds = {type(problem) for problem in problems}
        raise (kinds.pop() if len(kinds) == 1 else ConfigError)("\n".join(lines))


def _find_missing(
    recipe: Recipe, store: Store, base: BaseSource | None, sources: list[SourceConfig], computed: set[str]
) -> Iterator[ForgetlessError]:
    """Yield what the stages to be computed would not find where the Hub cannot be reached: weights or rows of which the
    commit alone is known, and what lm-eval's own tasks load. `base` and `sources` are those that were located."""
    work: list[Callable[[], object]] = []
    if base and base.kind == "hub" and computed & MODEL_STAGES:
        work.append(lambda: locate_base(recipe.model, store=store))
    for source in sources if "dataset" in computed else []:
        if is_hub_id(resolve_entry(source)[0].path):
            work.append(lambda source=source: next(read_files(source, store), None))  # type: ignore[misc]
    for attempt in [] if not work or is_hub_reached() else work:
        try:
            attempt()
        except (ModelError, DataError) as error:
            yield error
    if computed & {"dataset", "before", "after"}:
        yield from missing_tasks(recipe.eval, store)


def base_licence(config: ModelConfig, stated: str | None) -> LicenceRef:
    """Return the licence of a base: the recipe's, or as `stated` with the base."""
    is_local, is_packaged = Path(config.base).is_absolute(), config.base.startswith("package:")
    return LicenceRef(
        what="base",
        key="model.license",
        name=Path(config.base).name if is_local else config.base,
        license=config.license or stated,
        is_hub=not (is_local or is_packaged),
    )


def _tokens_stage(recipe: Recipe, store: Store, dataset: DatasetRef, base: BaseRef, items: str) -> Stage | None:
    """Return what the tokenised rows depend on, None where the base's own answers among them are not made yet."""
    replay, answered = recipe.data.replay, None
    if replay and replay.prompts:
        stage = replay_stage(replay, prompts_digest(replay), base, dataset, items)
        answered = find_artifact(store, stage, ReplayRef)
        if answered is None:
            return None
    return tokens_stage(dataset, answered, base, recipe.train.max_tokens, recipe.data.min_rows)


def _detectable(config: EvalConfig) -> list[Detectable]:
    result = []
    for capability in config.capabilities:
        if capability.role != "retention":
            continue
        counts = [_count_items(t) for t in capability.tasks]
        items = None if None in counts else sum(min(c or 0, config.limit or c or 0) for c in counts)
        accuracy = capability.measure in ("acc", "acc_norm", "exact_match", "refused", "stopped") and items
        smallest = round(detectable_change(items, EXPECTED_DISCORDANCE), 2) if accuracy and items else None
        result.append(Detectable(capability.name, items, capability.accepted_loss, capability.unit, smallest))
    return result


def _count_items(task: TaskConfig) -> int | None:
    if task.questions:
        return len(read_questions(Path(task.questions)))
    if not task.file:
        return None
    with Path(task.file).open("rb") as file:
        return sum(1 for line in file if line.strip())
