"""A sweep's record, and what follows from its trials: points of gain against forgetting, the front, what matters.

The record is the only contract between a sweep and those who look at it. All of a point is measured on the half of the
items that chooses; the other half judges what was chosen. Intervals are of 95 %.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from datetime import datetime
from statistics import fmean, median, variance
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from tasks.core.config import Recipe, SweepConfig
from tasks.core.digest import canonical_json
from tasks.core.errors import ForgetlessError, PrunedError, StoreError
from tasks.core.manifest import RUN_ID, manifest_path, parse_manifest
from tasks.core.paired import mean_change_interval
from tasks.core.records import Delta, Record
from tasks.core.store import Store

VERSION = 1
PRUNE_FROM = 1 / 3  # of the steps: before, the warm-up decides
PRUNE_RIVALS = 3
PRUNE_SHARE = 0.5  # of what the median trial has learned by the same step
PRUNE_NOISE = 0.01  # of the median's loss: less is the noise of a few hundred held-out tokens
FEW_POINTS = 5  # a group of an axis, on average: fewer say little of what matters


class Axis(BaseModel):
    """A key that a sweep varies: over values, or from low to high (`whole` numbers, uniform in the logarithm)."""

    key: str
    values: list[Any] = []
    low: float | None = None
    high: float | None = None
    log: bool = False
    whole: bool = False

    @property
    def size(self) -> float:
        """How many values it has."""
        if self.values:
            return len(self.values)
        return int(self.high or 0) - int(self.low or 0) + 1 if self.whole else math.inf


class Estimate(Record):
    value: float
    low: float
    high: float


class SweepTrial(BaseModel):
    """One run of a sweep, or with `strength` its adapter scaled: `deltas` are those of the half that chooses."""

    number: int
    values: dict[str, Any]
    seed: int
    strength: float | None = None
    status: Literal["pending", "running", "completed", "pruned", "failed"] = "pending"
    run: str | None = None
    error: str | None = None
    seconds: float | None = None
    curve: list[tuple[int, float]] = []
    """Optimizer steps with their validation losses."""
    deltas: list[Delta] = []


class SweepPoint(Record):
    """Settings with what they gain and forget: the means over the seeds' trials, which `trials` numbers."""

    values: dict[str, Any]
    strength: float | None
    trials: list[int]
    gain: Estimate
    """Of the primary target, in its unit."""
    forgetting: Estimate
    """The loss of the retention capability `worst` as a share of its budget: above 1 is beyond it, below 0 a gain."""
    worst: str
    is_inside: bool
    on_front: bool = False


class Difference(Record):
    """What the adapters of a point of the front do otherwise than those of the best, on the half that judges."""

    point: int
    name: str
    unit: str
    delta: Estimate

    @property
    def is_noise(self) -> bool:
        return self.delta.low <= 0 <= self.delta.high


class Importance(Record):
    """Shares of the variance between points that lie between the values of a key (eta squared of a one-way analysis);
    `chance` is what a key without any effect gets on average."""

    key: str
    gain: float
    forgetting: float
    chance: float
    is_reliable: bool


class Sweep(BaseModel):
    model_config = ConfigDict(extra="ignore")

    version: int = VERSION
    sweep_id: str
    recipe: Recipe
    search: SweepConfig
    axes: list[Axis]
    status: Literal["running", "completed", "failed"] = "running"
    started: datetime
    finished: datetime | None = None
    flow_run_id: str | None = None
    error: str | None = None
    trials: list[SweepTrial] = []
    points: list[SweepPoint] = []
    best: int | None = None
    """The point with the largest gain inside every budget; None where there is none."""
    run: str | None = None
    """The run of the best whose adapter is judged."""
    confirmed: list[Delta] = []
    """What that adapter changes on the other half of the items."""
    verdict: Literal["promote", "reject", "inconclusive"] | None = None
    reason: str = ""
    differences: list[Difference] = []
    importance: list[Importance] = []
    command: str = ""
    """Makes the best run again, with its export; everything before is reused."""

    @property
    def unit(self) -> str:
        """Of the gain."""
        return next(c.unit for c in self.recipe.eval.capabilities if c.name == self.recipe.eval.primary)

    @property
    def scope(self) -> str:
        """What the intervals speak of."""
        if self.search.seeds == 1:
            return "other items, not other seeds: with one seed a point, these adapters only (--seeds 3 tells more)"
        return f"other items and other seeds ({self.search.seeds} a point)"


def sweep_path(sweep_id: str) -> str:
    if not re.fullmatch(RUN_ID, sweep_id):
        raise ForgetlessError(f"{sweep_id!r} is not a sweep's name.")
    return f"sweeps/{sweep_id}.json"


def write_sweep(store: Store, sweep: Sweep) -> None:
    store.write_bytes(sweep_path(sweep.sweep_id), canonical_json(sweep.model_dump(mode="json")))


def read_sweep(store: Store, sweep_id: str) -> Sweep | None:
    """Return a sweep's record, or None where there is none. Raises StoreError if it cannot be read."""
    data = store.read_bytes(sweep_path(sweep_id))
    if data is None:
        return None
    try:
        raw = json.loads(data)
        if raw["version"] > VERSION:
            raise StoreError(f"Sweep {sweep_id} was written by a newer version. Upgrade forgetless to read it.")
        return Sweep.model_validate(raw)
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"The record of sweep {sweep_id} cannot be read: {error}") from None


def sweep_ids(store: Store) -> list[str]:
    """Return the names of all sweeps, the last written first."""
    files = sorted(store.list_files("sweeps"), key=lambda file: file.written, reverse=True)
    names = (file.path.rpartition("/")[2] for file in files)
    return [name.removesuffix(".json") for name in names if name.endswith(".json") and not name.startswith(".")]


# --- gain and forgetting ----------------------------------------------------------------------------------------------


def measure_points(trials: Sequence[SweepTrial]) -> list[SweepPoint]:
    """Return a point for all settings with a completed trial, in the order of their first ones, those of the front
    marked. Where retention has nothing that counts, forgetting is 0."""
    groups: dict[bytes, list[SweepTrial]] = {}
    for trial in trials:
        if trial.status == "completed":
            groups.setdefault(canonical_json([trial.values, trial.strength]), []).append(trial)
    points = [_measure_point(group) for group in groups.values()]
    front = pareto_front([(point.gain.value, point.forgetting.value) for point in points])
    return [point.model_copy(update={"on_front": number in front}) for number, point in enumerate(points)]


def _measure_point(trials: Sequence[SweepTrial]) -> SweepPoint:
    gain = over_seeds([_estimate(delta) for trial in trials for delta in trial.deltas if delta.primary])
    losses: dict[str, list[Estimate]] = {}
    for delta in (delta for trial in trials for delta in trial.deltas):
        if delta.role == "retention" and delta.counts and delta.budget:
            share = Estimate(
                value=0 - delta.delta / delta.budget,
                low=0 - delta.high / delta.budget,
                high=0 - delta.low / delta.budget,
            )
            losses.setdefault(delta.name, []).append(share)
    shares = {name: over_seeds(found) for name, found in losses.items()} or {"": Estimate(value=0, low=0, high=0)}
    worst = max(shares, key=lambda name: shares[name].value)
    return SweepPoint(
        values=trials[0].values,
        strength=trials[0].strength,
        trials=[trial.number for trial in trials],
        gain=gain,
        forgetting=shares[worst],
        worst=worst,
        is_inside=shares[worst].value <= 1,
    )


def _estimate(delta: Delta) -> Estimate:
    return Estimate(value=delta.delta, low=delta.low, high=delta.high)


def over_seeds(estimates: Sequence[Estimate]) -> Estimate:
    """Return the mean of what several seeds gave on the same items. Its half-widths are the roots of the sums of two
    squares: the seeds' mean half-width, as the items do not change from seed to seed, and that of Student's t over the
    seeds. One seed's estimate stays as it is: it speaks of one adapter."""
    if len(estimates) == 1:
        return estimates[0]
    mean = fmean(e.value for e in estimates)
    seeds = mean_change_interval([e.value for e in estimates]).high - mean
    low = math.hypot(fmean(e.value - e.low for e in estimates), seeds)
    high = math.hypot(fmean(e.high - e.value for e in estimates), seeds)
    return Estimate(value=mean, low=mean - low, high=mean + high)


def pareto_front(points: Sequence[tuple[float, float]]) -> set[int]:
    """Return the numbers of the points (gain, forgetting) than which none gains at least as much and forgets at most as
    much without being equal to it."""
    front: set[int] = set()
    least, at = math.inf, math.inf
    for number in sorted(range(len(points)), key=lambda i: (-points[i][0], points[i][1])):
        gain, forgetting = points[number]
        if forgetting < least or (forgetting == least and gain == at):
            front.add(number)
            least, at = forgetting, gain
    return front


def choose_best(points: Sequence[SweepPoint]) -> int | None:
    """Return the number of the point that gains most inside every budget (of equal ones the one that forgets least);
    None where none gains anything."""
    good = [i for i, point in enumerate(points) if point.is_inside and point.gain.value > 0]
    return max(good, key=lambda i: (points[i].gain.value, -points[i].forgetting.value), default=None)


def importance_of(axes: Sequence[Axis], points: Sequence[SweepPoint]) -> list[Importance]:
    """Return what each key matters for gain and forgetting among the trained points, the most important first; nothing
    for fewer than three points. Ranges with many values are compared by thirds of the points."""
    trained = [point for point in points if point.strength is None]
    if len(trained) < 3:
        return []
    found = []
    for axis in axes:
        groups = _groups([point.values[axis.key] for point in trained])
        number = len(set(groups))
        gain, forgetting = (
            share_between(groups, values)
            for values in ([p.gain.value for p in trained], [p.forgetting.value for p in trained])
        )
        chance = (number - 1) / (len(trained) - 1)
        reliable = number > 1 and len(trained) >= FEW_POINTS * number
        found.append(Importance(key=axis.key, gain=gain, forgetting=forgetting, chance=chance, is_reliable=reliable))
    return sorted(found, key=lambda i: -max(i.gain, i.forgetting))


def share_between(groups: Sequence[int], values: Sequence[float]) -> float:
    """Return the share of the sum of squares of `values` that lies between their groups, 0 where all are equal."""
    mean = fmean(values)
    total = variance(values) * (len(values) - 1)
    by_group: dict[int, list[float]] = {}
    for group, value in zip(groups, values, strict=True):
        by_group.setdefault(group, []).append(value)
    between = sum(len(found) * (fmean(found) - mean) ** 2 for found in by_group.values())
    return min(1.0, between / total) if total else 0.0


def _groups(values: Sequence[Any]) -> list[int]:
    """Return a group for each value: one for each that differs, or thirds by rank of numbers that mostly differ."""
    distinct = sorted({canonical_json(value) for value in values})
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    if not numbers or len(distinct) <= max(3, len(values) // 3):
        return [distinct.index(canonical_json(value)) for value in values]
    rank = {value: sum(other < value for other in values) for value in values}
    return [min(2, 3 * rank[value] // len(values)) for value in values]


def describe_values(of: SweepTrial | SweepPoint) -> str:
    """Return settings in words, each key by its last part."""
    words = [f"{key.rpartition('.')[2]} {value}" for key, value in sorted(of.values.items())]
    words += [f"seed {of.seed}"] if isinstance(of, SweepTrial) else []
    return ", ".join([*words, *([] if of.strength is None else [f"strength {of.strength:g}"])])


# --- pruning ----------------------------------------------------------------------------------------------------------


def losing_to(step: int, loss: float, rivals: Sequence[Sequence[tuple[int, float]]]) -> float | None:
    """Return the median of the other trainings' validation losses at a step, between whose validations lines are drawn,
    where a loss is clearly above it: it fell since step 0 by less than PRUNE_SHARE of what the median did, beyond
    noise. None where it is not, or fewer than PRUNE_RIVALS others came so far."""
    known = [curve for curve in rivals if curve and curve[-1][0] >= step]
    if len(known) < PRUNE_RIVALS:
        return None
    middle = median(_loss_at(step, curve) for curve in known)
    start = max(curve[0][1] for curve in known)
    accepted = max((1 - PRUNE_SHARE) * (start - middle), PRUNE_NOISE * middle)
    return middle if loss > middle + accepted else None


def _loss_at(step: int, curve: Sequence[tuple[int, float]]) -> float:
    before = max((p for p in curve if p[0] <= step), default=curve[0])
    after = min((p for p in curve if p[0] >= step), default=curve[-1])
    share = (step - before[0]) / (after[0] - before[0]) if after[0] > before[0] else 0
    return before[1] + share * (after[1] - before[1])


def watch_rivals(store: Store, run_id: str | None) -> Callable[[int, int, float], None]:
    """Return a check of a training's validation losses, `check(step, steps, loss)`, which raises PrunedError where the
    run is a trial of a sweep that prunes and falls behind the others as the sweep's record has them by then."""
    data = store.read_bytes(manifest_path(run_id)) if run_id else None
    name = parse_manifest(data, run_id or "").sweep if data else None
    first = read_sweep(store, name) if name else None

    def check(step: int, steps: int, loss: float) -> None:
        if first is None or not first.search.prune or not PRUNE_FROM <= step / steps < 1:
            return
        sweep = read_sweep(store, first.sweep_id) or first
        rivals = [trial.curve for trial in sweep.trials if trial.run != run_id]
        middle = losing_to(step, loss, rivals)
        if middle is not None:
            raise PrunedError(
                f"Pruned at step {step} of {steps}: the validation loss is {loss:.3f}, and {middle:.3f} is the median "
                f"of the sweep's others. Its checkpoint is kept: the run's own command goes on from there."
            )

    return check
