"""Deltas and the verdict: two score sheets of the same items, compared item by item.

The statistics are in tasks.core.paired; here items are paired, sheets that must not be compared are refused, and
tasks at chance are set aside ("it cannot forget what it does not know")."""

import math
from collections.abc import Sequence
from typing import Any

from tasks.core.config import LOWER_IS_BETTER, CapabilityConfig, EvalConfig
from tasks.core.errors import ComparisonError
from tasks.core.manifest import RunManifest
from tasks.core.paired import (
    PairedChange,
    Retention,
    Target,
    accuracy_change,
    judge,
    mean_change,
    ratio_change,
)
from tasks.core.records import Delta, ItemScore, RunComparison, ScoreSheet, TaskScore
from tasks.core.store import Store

Pairs = list[tuple[ItemScore, ItemScore]]
ITEMS = "items.jsonl"
UNCOMPARED = ("name", "description")


def compare_scores(
    config: EvalConfig,
    before: ScoreSheet,
    before_items: Sequence[ItemScore],
    after: ScoreSheet,
    after_items: Sequence[ItemScore],
) -> dict[str, Any]:
    """Return ForgettingReport's fields: after minus before per capability and per task, and the verdict, signed so
    that negative always means forgetting. Raises ComparisonError if the sheets are not about the same thing."""
    _check_settings(before, after)
    pairs = pair_items(before_items, after_items)
    chance = {score.task: score for score in before.tasks}
    targets: list[Target] = []
    retentions: list[Retention] = []
    drafts: dict[str, tuple[CapabilityConfig, Pairs, PairedChange, bool]] = {}
    for capability in config.capabilities:
        # A whole task may be set aside, never single items: choosing items by the base's answers would bias the delta.
        known = [t.name for t in capability.tasks if not _at_chance(capability, chance[t.name])]
        counts = capability.role == "target" or bool(known)
        names = [t.name for t in capability.tasks] if capability.role == "target" or not known else known
        chosen = [pair for name in names for pair in pairs[name]]
        change = measure_change(capability, chosen, config.seed)
        drafts[capability.name] = (capability, chosen, change, counts)
        if capability.role == "target":
            targets.append(Target(capability.name, change, primary=capability.name == config.primary))
        elif counts:
            retentions.append(Retention(capability.name, change, capability.accepted_loss))
    verdict = judge(targets, retentions)
    findings = {finding.name: finding for finding in verdict.findings}
    capabilities = []
    tasks = []
    for name, (capability, chosen, change, counts) in drafts.items():
        finding = findings.get(name)
        capabilities.append(
            describe(
                name,
                capability,
                chosen,
                change,
                status=finding.status if finding else "at chance",
                counts=counts,
                primary=name == config.primary,
                items_needed=finding.items_needed if finding else None,
                tasks=sorted({before_item.task for before_item, _ in chosen}),
            )
        )
        for task in capability.tasks:
            if len(capability.tasks) > 1:
                change = measure_change(capability, pairs[task.name], config.seed)
                at_chance = capability.role == "retention" and _at_chance(capability, chance[task.name])
                status = "at chance" if at_chance else plain_status(capability, change)
                tasks.append(
                    describe(
                        task.name, capability, pairs[task.name], change, status=status, counts=False, primary=False
                    )
                )
    return {
        "capabilities": [d.model_dump() for d in capabilities],
        "tasks": [d.model_dump() for d in tasks],
        "verdict": verdict.outcome,
        "reason": verdict.reason,
    }


def compare_runs(store: Store, first: RunManifest, second: RunManifest) -> RunComparison:
    """Return what a run's adapter does better or worse than that of `first`, in the capabilities of `first` whose tasks
    both were scored on. Raises ComparisonError where there are none, or their items are not the same."""
    for run in (first, second):
        if run.after is None:
            raise ComparisonError(f"Run {run.run_id} was not scored after its training: it is {run.status}.")
    assert first.after and second.after
    scored = {score.task for score in second.after.tasks}
    shared = [c for c in first.recipe.eval.capabilities if {t.name for t in c.tasks} <= scored]
    if not shared:
        raise ComparisonError(f"{second.run_id} against {first.run_id}: they have no capability with the same tasks.")
    evaluation = first.recipe.eval.model_copy(update={"capabilities": shared})
    names = {t.name for c in shared for t in c.tasks}
    sheets = [_only(names, sheet, read_items(store, sheet)) for sheet in (first.after, second.after)]
    try:
        fields = compare_scores(evaluation, *sheets[0], *sheets[1])
    except ComparisonError as error:
        raise ComparisonError(f"{second.run_id} against {first.run_id}: {error}") from None
    settings = [_flat({k: v for k, v in run.settings.items() if k not in UNCOMPARED}) for run in (first, second)]
    changed = {
        key: (settings[0].get(key), settings[1].get(key))
        for key in sorted({*settings[0], *settings[1]})
        if settings[0].get(key) != settings[1].get(key)
    }
    return RunComparison(first=first.run_id, second=second.run_id, changed=changed, **fields)


def _only(names: set[str], sheet: ScoreSheet, items: list[ItemScore]) -> tuple[ScoreSheet, list[ItemScore]]:
    """Return the scores and items of these tasks alone, in the order of their names."""
    kept = [score for score in sheet.tasks if score.task in names]
    chosen = sorted((item for item in items if item.task in names), key=lambda item: item.task)
    return sheet.model_copy(update={"tasks": kept}), chosen


def read_items(store: Store, sheet: ScoreSheet) -> list[ItemScore]:
    lines = (store.local_folder(sheet.artifact) / ITEMS).read_text(encoding="utf-8").split("\n")
    return [ItemScore.model_validate_json(line) for line in lines if line]


def _flat(node: Any, before: str = "") -> dict[str, str]:
    """Return what is in nested settings, each under its whole name, as text."""
    if isinstance(node, dict) and node:
        return {k: v for name, value in node.items() for k, v in _flat(value, f"{before}{name}.").items()}
    return {before.removesuffix("."): str(node)}


def _check_settings(before: ScoreSheet, after: ScoreSheet) -> None:
    for name in sorted({*before.settings, *after.settings}):
        if before.settings.get(name) != after.settings.get(name):
            raise ComparisonError(
                f"The two score sheets differ in {name}: {before.settings.get(name)} before, "
                f"{after.settings.get(name)} after. Score both with the same settings."
            )
    versions = {s.task: s.version for s in before.tasks}
    for score in after.tasks:
        if versions.get(score.task) != score.version:
            raise ComparisonError(
                f"Task {score.task} was scored in version {versions.get(score.task)} before and {score.version} after. "
                "Score the base again."
            )


def pair_items(before: Sequence[ItemScore], after: Sequence[ItemScore]) -> dict[str, Pairs]:
    """Return the items of each task side by side, matched by document; the prompts must be equal too."""
    if len(before) != len(after):
        raise ComparisonError(f"The score sheets have {len(before)} and {len(after)} items. Score the base again.")
    result: dict[str, Pairs] = {}
    for a, b in zip(before, after, strict=True):
        if (a.task, a.doc) != (b.task, b.doc):
            raise ComparisonError(f"Task {a.task} was scored on other items or in another order. Score the base again.")
        if a.prompt != b.prompt:
            raise ComparisonError(f"Task {a.task} was scored with another prompt. Score the base again.")
        result.setdefault(a.task, []).append((a, b))
    return result


def measure_change(capability: CapabilityConfig, pairs: Pairs, seed: int) -> PairedChange:
    field = "nll" if capability.measure == "bits_per_byte" else capability.measure
    before, after = _values(pairs, field, capability.measure)
    if capability.measure in LOWER_IS_BETTER and field != "nll":
        before, after = ([1 - v for v in column] for column in (before, after))
    clusters = _clusters(pairs)
    try:
        if capability.measure == "bits_per_byte":
            return ratio_change(before, after, clusters=clusters, seed=seed)
        if any(value not in (0, 1) for value in (*before, *after)):  # F1, or TruthfulQA's MC2, give shares
            return mean_change([100 * v for v in before], [100 * v for v in after], clusters=clusters, unit="points")
        return accuracy_change(before, after, clusters=clusters)
    except ValueError as error:
        raise ComparisonError(f"{capability.name}: {error} Score more items.") from None


def _values(pairs: Pairs, field: str, measure: str) -> tuple[list[float], list[float]]:
    columns: tuple[list[float], list[float]] = ([], [])
    for pair in pairs:
        for column, item in zip(columns, pair, strict=True):
            value = getattr(item, field)
            if value is None:
                raise ComparisonError(
                    f"Task {item.task} gives no {measure}. Choose another eval measure for its capability."
                )
            column.append(value)
    return columns


def _clusters(pairs: Pairs) -> list[str] | None:
    """Return each item's cluster (subject or conversation), or None where every item stands alone."""
    names = [f"{a.task}/{a.cluster if a.cluster is not None else a.doc}" for a, _ in pairs]
    return names if 1 < len(set(names)) < len(names) else None


def _at_chance(capability: CapabilityConfig, score: TaskScore) -> bool:
    """Return whether a base that only guesses would do as well (one-sided, 5 %, normal approximation)."""
    value = getattr(score, capability.measure, None)
    chance = 0.0 if capability.measure == "exact_match" else score.chance  # nobody guesses a number that is asked for
    if capability.measure == "bits_per_byte" or chance is None or value is None:
        return False
    return bool(value <= chance + 1.645 * math.sqrt(chance * (1 - chance) / score.n))


def plain_status(capability: CapabilityConfig, change: PairedChange) -> str:
    """Return the status of one task of several: it informs, and claims nothing, so it is not corrected."""
    low, high = change.interval.low, change.interval.high
    if capability.role == "target":
        return "gained" if low > 0 else "lost" if high < 0 else "unclear"
    budget = capability.accepted_loss
    return "kept" if low > -budget else "forgot" if high < -budget else "inconclusive"


def describe(
    name: str,
    capability: CapabilityConfig,
    pairs: Pairs,
    change: PairedChange,
    *,
    status: str,
    counts: bool,
    primary: bool,
    items_needed: int | None = None,
    tasks: list[str] | None = None,
) -> Delta:
    fields: dict[str, Any] = {}
    if capability.measure == "bits_per_byte":
        size = sum(a.size_bytes or 0 for a, _ in pairs) * math.log(2)
        tokens = sum(a.tokens or 0 for a, _ in pairs)
        nll = [sum(pair[i].nll or 0.0 for pair in pairs) for i in (0, 1)]
        before, after = nll[0] / size, nll[1] / size
        fields["perplexity_ratio"] = math.exp((nll[1] - nll[0]) / tokens) if tokens else None
    else:
        columns = _values(pairs, capability.measure, capability.measure)
        before, after = (sum(column) / len(column) for column in columns)
        if len(pairs) > 1 and all(item.margin is not None for pair in pairs for item in pair):
            margins = _values(pairs, "margin", "margin")
            margin = mean_change(*margins, clusters=_clusters(pairs))
            fields |= {
                "margin_delta": margin.delta,
                "margin_low": margin.interval.low,
                "margin_high": margin.interval.high,
            }
    return Delta(
        name=name,
        role=capability.role,
        measure=capability.measure,
        unit=capability.unit,
        before=before,
        after=after,
        delta=change.delta,
        low=change.interval.low,
        high=change.interval.high,
        n=len(pairs),
        clusters=change.clusters,
        primary=primary,
        budget=capability.accepted_loss if capability.role == "retention" else None,
        status=status,  # type: ignore[arg-type]  # checked by the record itself
        counts=counts,
        lost_items=change.lost,
        gained_items=change.gained,
        mcnemar_p=change.mcnemar_p,
        items_to_settle=items_needed,
        tasks=tasks or [],
        **fields,
    )
