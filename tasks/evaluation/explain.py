"""What moved, subject by subject and item by item, and which setting of the recipe to change.

Subjects and items are shown because they moved most, so their figures describe and prove nothing: only the verdict is
corrected. Advice comes from fixed rules on this run's own figures and is never more than one sentence a setting.
Nothing is read, scored or trained here."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from tasks.core.config import LOWER_IS_BETTER, CapabilityConfig, EvalConfig, Recipe, TaskConfig, TrainConfig
from tasks.core.errors import ComparisonError
from tasks.core.manifest import RunManifest
from tasks.core.records import AdapterRef, CombinedRef, Delta, ForgettingReport, ItemScore, Record
from tasks.core.store import Store
from tasks.evaluation.forgetting import Pairs, describe, measure_change, pair_items, plain_status, read_items

MOST_MOVED = 10
MOST_LOST = 5  # of each retention capability
MOST_GAINED = 3  # of each target
SUBJECT_ITEMS = 5  # fewer are no subject to speak of, and get no interval

NOISE = 0.01  # of a loss: less is the noise of a few hundred held-out tokens
HIGH_RATES = {"lora": 1e-3, "qlora": 5e-4, "int8": 5e-4, "full": 5e-5}  # from here on a rate is high for its method
HIGH_RANK = 32
LORA = ("lora", "qlora", "int8")
WORTHWHILE = 20  # a target that needs more than this many times its items shows no gain worth the scoring


class Moved(Record):
    """A task, or a subject of one, before and after. `delta`, `low` and `high` (95 %) are points or percent as `unit`
    says, negative for forgetting; `before` and `after` are fractions, or bits for bits_per_byte. No interval below 5
    items; no count of gained and lost items but for 0/1 scores."""

    task: str
    subject: str | None = None
    role: Literal["target", "retention"]
    unit: str
    before: float
    after: float
    delta: float
    n: int
    low: float | None = None
    high: float | None = None
    gained_items: int | None = None
    lost_items: int | None = None


class MovedItem(Record):
    """One item and what each model answered; `change` is that of its margin, or of its log-likelihood for
    bits_per_byte (nats, negative for forgetting)."""

    task: str
    subject: str | None = None
    question: str | None = None
    expected: str | None = None
    before: str | None = None
    after: str | None = None
    kind: Literal["lost", "gained"]
    change: float | None = None


class Advice(Record):
    """`what` to change, with the recipe's key and a value, and `why`: the figures of this run that say so."""

    what: str
    why: str


class Explanation(Record):
    moved: list[Moved]
    """Largest change first, at most ten."""
    note: str = ""
    """How to read `moved` where it is a choice among many subjects."""
    items: list[MovedItem]
    advice: list[Advice]
    """What this run's figures show directly comes first."""


def explain(
    recipe: Recipe,
    before: Sequence[ItemScore],
    after: Sequence[ItemScore],
    report: ForgettingReport | dict[str, Any],
    adapter: AdapterRef | CombinedRef | None,
) -> Explanation:
    """Return what moved between two scorings of the same items and what to do about it, given the report on them (or
    its fields). Deterministic. Raises ComparisonError if the items are not the same; items without the measure of
    their capability are left out, as are tasks at chance."""
    fields = report if isinstance(report, dict) else report.model_dump()
    deltas = [Delta.model_validate(d) for d in fields["capabilities"]]
    pairs = pair_items(before, after)
    chosen: list[tuple[CapabilityConfig, dict[str, Pairs]]] = []
    counted = {d.name: d for d in deltas if d.counts}
    for capability in recipe.eval.capabilities:
        delta = counted.get(capability.name)
        if delta is not None:
            names = [t.name for t in capability.tasks if t.name in delta.tasks or not delta.tasks]
            chosen.append((capability, {name: _measured(capability, pairs.get(name, [])) for name in names}))
    moved, note = _most_moved(recipe.eval, chosen)
    items = [item for capability, tasks in chosen for item in _moved_items(capability, tasks)]
    return Explanation(moved=moved, note=note, items=items, advice=_advise(recipe, deltas, fields["verdict"], adapter))


def explain_run(store: Store, run: RunManifest) -> Explanation:
    """Return what moved in a run. Raises ComparisonError where it was not scored before and after."""
    if run.before is None or run.after is None or run.report is None:
        raise ComparisonError(f"Run {run.run_id} has no scores before and after: it is {run.status}. Run it again.")
    before, after = (read_items(store, sheet) for sheet in (run.before, run.after))
    return explain(run.recipe, before, after, run.report, run.adapter)


# What moved


def _measured(capability: CapabilityConfig, pairs: Pairs) -> Pairs:
    return [
        pair
        for pair in pairs
        if all(_is_number(_value(capability, item)) for item in pair)
        and (capability.measure != "bits_per_byte" or pair[0].size_bytes)
    ]


def _value(capability: CapabilityConfig, item: ItemScore) -> float | None:
    """Return an item's score, the higher the better."""
    value: float | None = getattr(item, "nll" if capability.measure == "bits_per_byte" else capability.measure)
    return -value if value is not None and capability.measure in LOWER_IS_BETTER else value


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _most_moved(config: EvalConfig, chosen: list[tuple[CapabilityConfig, dict[str, Pairs]]]) -> tuple[list[Moved], str]:
    """Return the groups of items that moved most, and what must be said if there are many to choose from."""
    moved = []
    for capability, tasks in chosen:
        for task in capability.tasks:
            for subject, group in _subjects(task, tasks.get(task.name, [])).items():
                try:
                    change = measure_change(capability, group, config.seed)
                except ComparisonError:  # a single document has no spread: it says nothing of its task
                    continue
                status = plain_status(capability, change)
                delta = describe(task.name, capability, group, change, status=status, counts=False, primary=False)
                fields = delta.model_dump(include=set(Moved.model_fields))
                if delta.n < SUBJECT_ITEMS:
                    fields |= {"low": None, "high": None}
                moved.append(Moved(task=task.name, subject=subject, **fields))
    moved.sort(key=lambda m: (-abs(m.delta), m.task, m.subject or ""))
    subjects = sum(m.subject is not None for m in moved)
    note = (
        f"{len(moved)} subjects and tasks, {min(len(moved), MOST_MOVED)} shown: the intervals are descriptive, not "
        "corrected for the choice, and the largest of many changes are partly chance."
    )
    return moved[:MOST_MOVED], note if subjects else ""


def _subjects(task: TaskConfig, pairs: Pairs) -> dict[str | None, Pairs]:
    """Return a task's items by subject where it has several of enough items, else all under None. The clusters of
    conversations are the conversations, which are no subjects."""
    groups: dict[str | None, Pairs] = {}
    for pair in pairs:
        groups.setdefault(pair[0].cluster, []).append(pair)
    named: dict[str | None, Pairs] = {k: g for k, g in groups.items() if k is not None and len(g) >= SUBJECT_ITEMS}
    return named if len(named) > 1 and not task.conversations else {None: pairs}


def _moved_items(capability: CapabilityConfig, tasks: dict[str, Pairs]) -> list[MovedItem]:
    """Return the items of a retention capability that lost most, or of a target that gained most: by nats where the
    items have them, then by score."""
    conversations = [task.name for task in capability.tasks if task.conversations]
    sign = 1 if capability.role == "retention" else -1
    ranked = []
    for a, b in (pair for group in tasks.values() for pair in group):
        difference = (_value(capability, b) or 0.0) - (_value(capability, a) or 0.0)
        change = difference if capability.measure == "bits_per_byte" else _margin_change(a, b)
        if sign * difference < 0:
            ranked.append((sign * (change or 0.0), sign * difference, a.task, a.doc, a, b, change))
    ranked.sort(key=lambda r: r[:4])
    return [
        MovedItem(
            task=a.task,
            subject=None if a.task in conversations else a.cluster,
            question=a.question,
            expected=a.expected,
            before=a.answered,
            after=b.answered,
            kind="lost" if sign > 0 else "gained",
            change=change,
        )
        for *_, a, b, change in ranked[: MOST_LOST if sign > 0 else MOST_GAINED]
    ]


def _margin_change(before: ItemScore, after: ItemScore) -> float | None:
    if before.margin is None or after.margin is None or not math.isfinite(after.margin - before.margin):
        return None
    return after.margin - before.margin


# What to do


class _Rule(NamedTuple):
    """A piece of advice on `key`, of which a run gets one. `rank`: 0 where this run's figures show the cause, 1 where
    a setting is out of the ordinary, 2 where it is known to help whatever the run."""

    rank: int
    key: str
    what: str
    why: str


def _advise(
    recipe: Recipe, deltas: list[Delta], verdict: str, adapter: AdapterRef | CombinedRef | None
) -> list[Advice]:
    forgot = [d for d in deltas if d.status == "forgot"]
    if isinstance(adapter, CombinedRef):
        weak = [d for d in deltas if d.role == "target" and d.status in ("lost", "unclear")]
        few = _on_few_items(recipe.eval, [d for d in deltas if d.status == "inconclusive" or d in weak])
        return _in_order([*_on_combination(adapter, forgot, weak), *few, *_on_chance(deltas)])
    weak = [d for d in deltas if d.role == "target" and (d.status == "lost" or (d.primary and d.status == "unclear"))]
    rules = [
        *(_on_validation(recipe.train, adapter) if adapter and (forgot or weak) else ()),
        # What teaches more also forgets more: a run that forgot is not told to.
        *(_on_little_gain(recipe.train, adapter, weak) if adapter and weak and not forgot else ()),
        *(_on_forgetting(recipe, forgot) if forgot else ()),
        *_on_few_items(recipe.eval, [d for d in deltas if d.status == "inconclusive" or d in weak]),
        *_on_strength(recipe, forgot or [d for d in deltas if d.status == "inconclusive" and not d.items_to_settle]),
        *(_on_size(recipe.train, forgot, adapter) if forgot else ()),
        *_on_chance(deltas),
        *(_on_budgets(deltas) if verdict == "promote" else ()),
    ]
    return _in_order(rules)


def _in_order(rules: list[_Rule]) -> list[Advice]:
    first: dict[str, _Rule] = {}
    for rule in sorted(rules, key=lambda r: r.rank):  # stable: of equal rank as they stand above
        first.setdefault(rule.key, rule)
    return [Advice(what=rule.what, why=rule.why) for rule in first.values()]


def _on_combination(combined: CombinedRef, forgot: list[Delta], weak: list[Delta]) -> Iterator[_Rule]:
    """Yield what to do with the weights and the method of a combination: nothing was trained."""
    if combined.by == "linear" and (forgot or weak):
        why = f"{_all_told([*forgot, *weak])}, and linear also multiplies factors of different adapters: cat does not."
        yield _Rule(1, "method", "Combine again with --method cat.", why)
    if forgot:
        what = "Run `forgetless strength RUN`, and combine again with every weight times its best."
        yield _Rule(
            2, "weights", what, f"{_all_told(forgot)}: smaller weights forget less, and training is not needed."
        )
    for d in weak:
        what = f"Combine again with a larger weight for the run that taught {d.name}."
        yield _Rule(2, f"weight {d.name}", what, f"{_told(d)} with the weights {_weights(combined)}.")


def _weights(combined: CombinedRef) -> str:
    return ", ".join(f"{part.weight:g} of {part.run}" for part in combined.parts)


def _on_validation(train: TrainConfig, adapter: AdapterRef) -> Iterator[_Rule]:
    """Yield what to do about a validation loss that rose, unless the best step shipped anyway."""
    losses = [(p.validation_loss, p.step) for p in adapter.curve if p.validation_loss is not None]
    if not losses or not _rose([loss for loss, _ in losses]):
        return
    (lowest, step), (last, last_step) = min(losses), losses[-1]
    if step == losses[0][1]:
        what = f"Set train.learning_rate={train.learning_rate / 3:.1g}, now {train.learning_rate:g}."
        why = f"The validation loss never fell below where it began, {lowest:.3f}, and ended at {last:.3f}."
        yield _Rule(0, "train.learning_rate", what, why)
    elif not train.early_stopping:
        epochs = max(0.1, round(train.epochs * step / last_step, 1))
        whole = train.epochs > 1 and not train.max_steps and adapter.ended == "finished"
        fewer = f", or train.epochs={epochs:g}" if whole else ""
        why = f"The validation loss was lowest at step {step} ({lowest:.3f}) and rose to {last:.3f} by step {last_step}"
        learned = ": the rows are learned by heart." if adapter.onset is not None else "."
        yield _Rule(0, "train.early_stopping", f"Set train.early_stopping=2{fewer}.", why + learned)


def _rose(losses: list[float]) -> bool:
    return losses[-1] > min(losses) * (1 + NOISE)


def _on_little_gain(train: TrainConfig, adapter: AdapterRef, weak: list[Delta]) -> Iterator[_Rule]:
    """Yield how to teach more: longer where the validation loss still fell, with more rank where training stood."""
    losses = [p.validation_loss for p in adapter.curve if p.validation_loss is not None]
    if len(losses) > 2 and losses[-1] < losses[-2] * (1 - NOISE) and losses[-1] == min(losses):
        why = f"The validation loss still fell at the end, {losses[-2]:.3f} to {losses[-1]:.3f}, and {_told(weak[0])}."
        if adapter.ended == "time limit" and train.max_minutes:
            key, value = "train.max_minutes", 2 * train.max_minutes
        elif train.max_steps and adapter.steps >= train.max_steps:
            key, value = "train.max_steps", 2 * train.max_steps
        else:
            key, value = "train.epochs", min(100.0, 2 * train.epochs)
        now = getattr(train, key.removeprefix("train."))
        if value > now:
            yield _Rule(0, key, f"Set {key}={value:.10g}, now {now:.10g}.", why)
        if 0 < 2 * train.learning_rate < HIGH_RATES.get(train.method, 0):
            what = f"Set train.learning_rate={2 * train.learning_rate:g}, now {train.learning_rate:g}."
            yield _Rule(1, "train.learning_rate", what, f"{why} That is not high for {train.method}.")
    steps = [p.loss for p in adapter.curve if p.loss is not None]
    quarter = len(steps) // 4
    if quarter < 2 or train.method not in LORA or train.rank >= HIGH_RANK or (losses and _rose(losses)):
        return
    earlier, later = (sum(part) / quarter for part in (steps[-2 * quarter : -quarter], steps[-quarter:]))
    if abs(earlier - later) < NOISE * earlier:
        what = f"Set train.rank={2 * train.rank} and train.alpha={2 * train.alpha}."
        why = f"The training loss stood still in the last half, {earlier:.3f} to {later:.3f}, and {_told(weak[0])}."
        yield _Rule(1, "train.rank", what, why)


def _on_forgetting(recipe: Recipe, forgot: list[Delta]) -> Iterator[_Rule]:
    """Yield what in the recipe is known to make a model forget (Biderman et al., arXiv 2405.09673; replay: Scialom et
    al., arXiv 2205.12393)."""
    train, replay, told = recipe.train, recipe.data.replay, _all_told(forgot)
    if train.learning_rate >= HIGH_RATES.get(train.method, math.inf):
        what = f"Set train.learning_rate={train.learning_rate / 3:.1g}, now {train.learning_rate:g}."
        why = f"{told}, and {train.learning_rate:g} is a high learning rate for {train.method}."
        yield _Rule(1, "train.learning_rate", what, why)
    if replay is None:
        what = (
            "Set data.replay.share=0.1, with data.replay.sources (rows of what it forgot) or data.replay.prompts "
            "(prompts that the base itself answers)."
        )
        yield _Rule(1, "data.replay", what, f"{told}, and nothing of the base's own tasks was replayed.")
    elif replay.share < 0.5:
        what = f"Set data.replay.share={min(0.5, 2 * replay.share or 0.1):g}, now {replay.share:g}."
        yield _Rule(1, "data.replay", what, f"{told}, although {100 * replay.share:g} % of the rows were replay.")
    if train.method == "full":
        yield _Rule(1, "train.method", "Set train.method=lora.", f"{told}, and all weights were trained.")


def _on_strength(recipe: Recipe, lost: list[Delta]) -> Iterator[_Rule]:
    if lost and recipe.train.method not in ("prefix", "prompt"):  # their virtual tokens cannot be scaled
        what = f"Run `forgetless strength RUN` and set export.strength to its best, now {recipe.export.strength:g}."
        why = f"{_all_told(lost)}: a weaker adapter forgets less, and to see how much gain it keeps trains nothing."
        yield _Rule(2, "export.strength", what, why)


def _on_size(train: TrainConfig, forgot: list[Delta], adapter: AdapterRef | None) -> Iterator[_Rule]:
    size = f" ({adapter.trainable_parameters:,} weights)" if adapter else ""
    if train.method in LORA and train.rank > HIGH_RANK:
        what = f"Set train.rank=16 and train.alpha={max(1, round(train.alpha * 16 / train.rank))}."
        yield _Rule(2, "train.rank", what, f"{_all_told(forgot)}, and rank {train.rank}{size} is more than most need.")
    if train.method in (*LORA, "oft") and train.target_modules == "all-linear":
        what = "Set train.target_modules=[q_proj, k_proj, v_proj, o_proj], or what attention is called in this model."
        why = f"{_all_told(forgot)}, and every linear layer was trained{size}: attention alone learns and forgets less."
        yield _Rule(2, "train.target_modules", what, why)


def _on_few_items(config: EvalConfig, open_: list[Delta]) -> Iterator[_Rule]:
    """Yield how many items would settle what is open, the shortest of items first."""
    wanted = {d.name: n for d in open_ if (n := _items_wanted(d)) is not None and n > d.n}
    for d in sorted((d for d in open_ if d.name in wanted), key=lambda d: -wanted[d.name] / d.n):
        n = wanted[d.name]
        why = f"{_told(d)}: about {n:,} items, not {d.n:,}, would settle it"
        why += " if nothing truly changed." if d.role == "retention" else " if that is the true gain."
        if config.limit is not None and d.n >= config.limit:
            what = f"Set eval.limit={math.ceil(config.limit * n / d.n)}, now {config.limit}."
            yield _Rule(0, "eval.limit", what, why)
        else:
            what = f"Add items or tasks to {d.name} in eval.capabilities, to about {n:,} items."
            yield _Rule(0, f"eval.capabilities {d.name}", what, why)


def _items_wanted(d: Delta) -> int | None:
    """Return how many items settle a capability: as reported, or for a target those with which the gain seen would be
    significant in four of five runs: n x ((1.96 + 0.84) / 1.96 x half the interval / gain)^2."""
    if d.items_to_settle or d.role == "retention" or d.delta <= 0 or d.low > 0:
        return d.items_to_settle
    n = d.n * ((1.96 + 0.84) / 1.96 * (d.high - d.low) / 2 / d.delta) ** 2
    return math.ceil(n) if n <= WORTHWHILE * d.n else None


def _on_chance(deltas: list[Delta]) -> Iterator[_Rule]:
    for d in deltas:
        if d.status == "at chance":
            what = f"Choose easier tasks for {d.name} in eval.capabilities."
            why = f"The base scored {d.before:.3f}, no better than a guess: it cannot forget what it does not know."
            yield _Rule(2, f"eval.capabilities {d.name}", what, why)


def _on_budgets(deltas: list[Delta]) -> Iterator[_Rule]:
    """Yield the capability that is closest to its budget, if it used up half of it or more."""
    used = {d.name: -d.low / d.budget for d in deltas if d.status == "kept" and d.budget}
    closest = max((d for d in deltas if d.name in used), key=lambda d: used[d.name], default=None)
    if closest and used[closest.name] >= 0.5:
        what = f"Watch {closest.name} first if you raise train.epochs or train.learning_rate."
        why = f"{_told(closest)}: it may have used up {100 * used[closest.name]:.0f} % of it, more than any other."
        yield _Rule(2, f"eval.capabilities {closest.name}", what, why)


def _told(d: Delta) -> str:
    unit = " %" if d.unit == "%" else f" {d.unit}"
    budget = f" against a budget of {d.budget:g}{unit}" if d.budget else ""
    return f"{d.name} changed by {d.delta:+.2f}{unit} (95 % interval {d.low:+.2f} to {d.high:+.2f}){budget}"


def _all_told(deltas: list[Delta]) -> str:
    return "; ".join(_told(d) for d in deltas)
