"""What one model gained and lost against another on the same items: intervals, one-sided p-values and the verdict.

Everything is paired by item and signed after minus before, so a negative delta always means forgetting. Levels are
fractions (0.95), deltas are in points, percent or nats as each function says. It reads no files, knows no tasks or
score sheets, and does not choose items: the caller hands in aligned arrays. Intervals speak about other items (or
clusters), not about other training seeds.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special  # not scipy.stats: importing it takes longer than a whole `plan`

Floats = NDArray[np.float64]

FAMILY_LEVEL = 0.05  # of all "forgot" and "lost" claims of one verdict together, one-sided, after Holm
GAIN_LEVEL = 0.025  # one-sided, as the low end of a 95 % interval is
MIN_BOOTSTRAP_UNITS = 5  # fewer have under 126 distinct resamples, and 1 in 64 or more repeats one unit throughout
CHUNK_CELLS = 1_000_000  # resampling counts held at a time: about 30 MB


@dataclass(frozen=True)
class Interval:
    """A confidence interval, in the unit of what it is about."""

    low: float
    high: float


class _Test(Protocol):
    """One way to test a delta; a change makes only the claims that each of its tests supports."""

    def interval(self, level: float) -> Interval: ...
    def p_below(self, x: float) -> float: ...
    def p_above(self, x: float) -> float: ...


@dataclass(frozen=True)
class PairedChange:
    """A measured change with its uncertainty; made by accuracy_change, ratio_change or mean_change.

    `delta`, `interval` and the arguments of the p-values share `unit`. `variance` is n times the sampling variance of
    delta (unit squared, clustering included). `lost`, `gained` and `mcnemar_p` (descriptive: it ignores clusters) exist
    for 0/1 scores alone.
    """

    delta: float
    interval: Interval
    unit: str
    n: int
    clusters: int | None
    level: float
    variance: float
    lost: int | None = None
    gained: int | None = None
    mcnemar_p: float | None = None
    scale: float = field(default=1.0, repr=False)  # unit per natural unit: 100 for points and percent
    tests: tuple[_Test, ...] = field(default=(), repr=False, compare=False)

    def p_below(self, x: float) -> float:
        """Return the one-sided p-value of H0: true delta >= x against delta < x; small means "worse than x"."""
        return max(test.p_below(x / self.scale) for test in self.tests)

    def p_above(self, x: float) -> float:
        """Return the one-sided p-value of H0: true delta <= x against delta > x; small means "better than x"."""
        return max(test.p_above(x / self.scale) for test in self.tests)


# The three kinds of measure


def accuracy_change(
    before: ArrayLike, after: ArrayLike, clusters: Sequence[Hashable] | None = None, level: float = 0.95
) -> PairedChange:
    """Return the change of a 0/1 score in points (100 x difference of proportions), paired by item.

    Without clusters: Tango's score interval, with the end nearer to no change moved out where flips are so few that the
    normal curve is too narrow (see _Score). By enumeration it covers 94.6 % or more for 60 to 1,000 items that lose up
    to 5 points and flip in up to 30 %. With clusters (at least 2): the wider of a t interval on cluster totals and
    Tango's with its variance scaled by the design effect (Rao and Scott, Biometrics 48 (1992) 577-585) and the quantile
    of t with K-1 degrees. Either alone fails: t is [0, 0] when nothing flips and says "kept" too often when a few
    clusters hold most of the losses; Tango's claims a loss too often when few items flip.
    Raises ValueError unless both arrays hold 0 and 1 only, have one length above 0, and are finite.
    """
    b, a = _paired(before, after)
    if not (np.isin(b, (0, 1)).all() and np.isin(a, (0, 1)).all()):
        raise ValueError("Expected scores of 0 and 1 only. Use mean_change for scores in between.")
    n, lost, gained = len(b), int(np.sum(b > a)), int(np.sum(a > b))
    discordant = (lost + gained) / n - ((gained - lost) / n) ** 2  # variance of one item's change
    score, tests, k = _Score(lost, gained, n, deskew=True), [], None
    if clusters is not None:
        differences, sizes = _cluster_totals(clusters, a - b, np.ones(n))
        k = len(sizes)
        t = _jackknife_t(differences, sizes)
        design_effect = max(1.0, n * t.se**2 / discordant) if discordant > 0 else 1.0
        score, tests = _Score(lost, gained, n, design_effect, k - 1), [t]
    variance = score.design_effect * discordant
    return _change(score.delta, [score, *tests], "points", 100, n, k, level, variance, lost, gained)


def ratio_change(
    nll_before: ArrayLike,
    nll_after: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    level: float = 0.95,
    seed: int = 0,
    replicates: int = 10_000,
) -> PairedChange:
    """Return the change of bits per byte in percent: 100 x (1 - sum(nll_after) / sum(nll_before)), positive if better.

    One entry per document: its summed negative log-likelihood, in any unit, as the unit and the bytes (the same before
    and after) cancel. `clusters` names the source of each document where documents come in groups. See
    bootstrap_ratio_interval for the method.
    Raises ValueError unless there are two documents (clusters), none is negative or not finite, and the sum before is
    above 0.
    """
    b, a = _paired(nll_before, nll_after)
    if min(b.min(), a.min()) < 0 or b.sum() <= 0:
        raise ValueError("A negative log-likelihood must not be below 0, nor all of them before be 0. Check the sign.")
    n, k = len(b), None
    if clusters is not None:
        a, b = _cluster_totals(clusters, a, b)
        k = len(b)
    t = _jackknife_t(b - a, b)
    tests: list[_Test] = [t]
    if len(b) >= MIN_BOOTSTRAP_UNITS and t.se > 0:
        tests.append(_bootstrap_t(b - a, b, replicates, seed))
    return _change(t.delta, tests, "%", 100, n, k, level, n * t.se**2)


def mean_change(
    before: ArrayLike,
    after: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    level: float = 0.95,
    unit: str = "nats",
) -> PairedChange:
    """Return the mean change of a number per item, such as the log-probability margin in nats, by Student's t.

    `unit` names what the numbers are in; they are not rescaled. With clusters, t has K-1 degrees on cluster totals.
    Raises ValueError unless there are two items (clusters) and all are finite.
    """
    b, a = _paired(before, after)
    differences, sizes, k = a - b, np.ones(len(b)), None
    if clusters is not None:
        differences, sizes = _cluster_totals(clusters, differences, sizes)
        k = len(sizes)
    t = _jackknife_t(differences, sizes)
    return _change(t.delta, [t], unit, 1, len(b), k, level, len(b) * t.se**2)


# The intervals alone


def tango_interval(lost: int, gained: int, n: int, level: float = 0.95) -> Interval:
    """Return the score interval for (gained - lost) / n, a difference of paired proportions in [-1, 1].

    Tango, Statistics in Medicine 17 (1998) 891-908. Without a flip it is +-z^2 / (n + z^2), never [0, 0].
    Raises ValueError for n = 0, negative counts, or more flips than items.
    """
    return _Score(lost, gained, n).interval(level)


def cluster_t_interval(differences: ArrayLike, clusters: Sequence[Hashable], level: float = 0.95) -> Interval:
    """Return the t interval, K-1 degrees, for the item-weighted mean of `differences`, in their unit.

    The mean is a ratio of cluster totals, sum(d_k) / sum(n_k). Its variance is the linearised one with each cluster's
    residual divided by 1 - n_k / n, which is to leave out one cluster at a time (CR3: Bell and McCaffrey 2002); with
    equal sizes that is the usual t on cluster means, with unequal ones it keeps the coverage that plain linearisation
    loses. It is [0, 0] when nothing changes: for 0/1 scores use accuracy_change. Raises ValueError below 2 clusters.
    """
    d = _finite(differences)
    return _jackknife_t(*_cluster_totals(clusters, d, np.ones(len(d)))).interval(level)


def mean_change_interval(differences: ArrayLike, level: float = 0.95) -> Interval:
    """Return Student's t interval for the mean of `differences`, in their unit. Raises ValueError below 2 items."""
    d = _finite(differences)
    return _jackknife_t(d, np.ones(len(d))).interval(level)


def bootstrap_ratio_interval(
    before: ArrayLike,
    after: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    level: float = 0.95,
    replicates: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Return the interval, in percent, for 100 x (1 - sum(after) / sum(before)): the wider of bootstrap-t and t.

    Bootstrap-t (Efron 1982; Hall 1988: second-order correct) over documents, or over clusters when given, because a few
    long documents with large losses skew the ratio towards "kept". Simulated on 60 documents, lengths lognormal(0.8)
    and losses gamma(1/4): P(low end above the truth), nominally 2.5 %, is 7 % by bootstrap-t, 10 % by BCa, 14 % by t.
    The jackknife t interval is the floor: with few units and even losses resampling is too narrow. Below
    MIN_BOOTSTRAP_UNITS units it is t alone. No change anywhere gives Interval(0, 0). Weights are not needed: bits per
    byte weighs documents by their bytes, as the sums do. Raises as ratio_change.
    """
    return ratio_change(before, after, clusters, level, seed, replicates).interval


# Tests


def mcnemar_exact(lost: int, gained: int) -> float:
    """Return McNemar's exact two-sided p-value: twice the smaller tail of lost + gained fair coins, at most 1."""
    return min(1.0, 2 * float(special.bdtr(min(lost, gained), lost + gained, 0.5)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's (1979) adjusted p-values in the order given: compare each with the family level itself."""
    adjusted = [1.0] * len(p_values)
    floor = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = floor
    return adjusted


# The verdict


@dataclass(frozen=True)
class Target:
    """A capability the training is meant to raise. Exactly one target of a run is primary."""

    name: str
    change: PairedChange
    primary: bool = False


@dataclass(frozen=True)
class Retention:
    """A capability that must stay: `budget` is the accepted loss, above 0, in the unit of its change."""

    name: str
    change: PairedChange
    budget: float


@dataclass(frozen=True)
class Finding:
    """What was found about one capability.

    `p_value` is Holm-adjusted, of the claim against it (forgot, lost). `items_needed` is set for an inconclusive
    retention.
    """

    name: str
    status: Literal["gained", "lost", "unclear", "kept", "forgot", "inconclusive"]
    p_value: float
    items_needed: int | None = None


@dataclass(frozen=True)
class Verdict:
    """The outcome of a run, one sentence that says why, and a finding per target and then per retention, in order."""

    outcome: Literal["promote", "reject", "inconclusive"]
    reason: str
    findings: tuple[Finding, ...]


def judge(targets: Sequence[Target], retentions: Sequence[Retention]) -> Verdict:
    """Return promote (primary target gained and all kept), reject (something forgot or lost) or inconclusive.

    kept: the interval's low end lies above -budget; all kept needs no correction (intersection-union: Berger 1982), so
    P(promote | one capability at its budget) <= 2.5 %. gained: the low end lies above 0 for the primary target; the
    other targets are Holm-corrected among themselves at 2.5 %. forgot and lost: one-sided p-values, Holm-corrected over
    all of them together at 5 %, so P(reject | all inside) <= 5 %. Without a target, or without a retention, nothing can
    be promoted.
    Raises ValueError for targets of which not exactly one is primary, a budget not above 0, or a level under 0.95.
    """
    if targets and sum(t.primary for t in targets) != 1:
        raise ValueError(f"Expected exactly one primary target, found {sum(t.primary for t in targets)}.")
    entries: list[Target | Retention] = [*targets, *retentions]
    for entry in entries:
        if entry.change.level < 0.95:
            raise ValueError(f"{entry.name}: a verdict needs 95 % intervals, found {100 * entry.change.level:g} %.")
    for r in retentions:
        _check_budget(r.budget, r.name)

    against = holm([t.change.p_below(0) for t in targets] + [r.change.p_below(-r.budget) for r in retentions])
    others = iter(holm([t.change.p_above(0) for t in targets if not t.primary]))
    findings = []
    for target, p in zip(targets, against, strict=False):
        gained = target.change.interval.low > 0 if target.primary else next(others) <= GAIN_LEVEL
        findings.append(Finding(target.name, "gained" if gained else "lost" if p <= FAMILY_LEVEL else "unclear", p))
    for retention, p in zip(retentions, against[len(targets) :], strict=True):
        if retention.change.interval.low > -retention.budget:
            findings.append(Finding(retention.name, "kept", p))
        elif p <= FAMILY_LEVEL:
            findings.append(Finding(retention.name, "forgot", p))
        else:
            needed = items_to_settle(retention.change, retention.budget)
            more = needed if needed > retention.change.n else None
            findings.append(Finding(retention.name, "inconclusive", p, more))
    return _conclude(targets, retentions, tuple(findings))


# Planning


def items_to_settle(change: PairedChange, budget: float, power: float = 0.8) -> int:
    """Return how many items show "kept" with probability `power` if nothing truly changes.

    Flips (variance) are taken as observed. 0/1 scores: the sample size of Tango's test (Nam, Biometrics 53 (1997)
    1422-1430), times the design effect of the clusters; no flip at all in n items counts as 3 / n of flips, the 95 %
    upper bound. Others: that of the t test (Guenther 1981). With clusters it means more clusters of the same sizes.
    Raises ValueError for a budget not above 0.
    """
    _check_budget(budget, "items_to_settle")
    z, z_power = _z(change.level), float(special.ndtri(power))
    accepted, variance = budget / change.scale, change.variance / change.scale**2
    if change.lost is None or change.gained is None:
        return math.ceil((z + z_power) ** 2 * variance / accepted**2 + z**2 / 2)
    flips = min(1.0, ((change.lost + change.gained) or 3) / change.n)
    spread = flips - (change.delta / change.scale) ** 2
    design_effect = max(1.0, variance / spread) if change.clusters and variance > 0 else 1.0
    return math.ceil(design_effect * (_planning_sum(flips, min(accepted, 1.0), z, z_power) / accepted) ** 2)


def detectable_change(n: int, discordance: float, power: float = 0.8, level: float = 0.95) -> float:
    """Return the smallest budget, in points, that n items can show kept with probability `power` at no true change.

    Losses smaller than this go unseen. `discordance` is the expected share of items that flip, in
    [0, 1]. The inverse of items_to_settle. Raises ValueError for n < 1 or a discordance outside [0, 1].
    """
    if n < 1 or not 0 <= discordance <= 1:
        raise ValueError(f"Expected n >= 1 and a discordance in [0, 1], found n={n}, discordance={discordance}.")
    z, z_power = _z(level), float(special.ndtri(power))

    def shortfall(budget: float) -> float:
        return budget * math.sqrt(n) - _planning_sum(discordance, budget, z, z_power)

    # At a budget near 0 without flips both terms vanish; 1e-9 keeps the root z^2 / (n + z^2) and not that one.
    return 100.0 if shortfall(1.0) <= 0 else 100 * float(optimize.brentq(shortfall, 1e-9, 1.0))


# How it is done


@dataclass(frozen=True)
class _Score:
    """Tango's score test for paired 0/1 outcomes; deltas are proportions in [-1, 1].

    `deskew` moves a quantile q out to q + skewness / 6 x (q^2 - 1) where that is further out (Cornish and Fisher; Laud,
    Pharmaceutical Statistics 16 (2017) 334-348). Where few losses are expected more of them turn up by chance than the
    normal curve says: 200 items that lose 2 % exceed Tango's upper end in 5 % of samples, not in 2.5 %.
    """

    lost: int
    gained: int
    n: int
    design_effect: float = 1.0
    df: float = math.inf
    deskew: bool = False

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError("An interval needs at least one item that was scored both before and after, found none.")
        if min(self.lost, self.gained) < 0 or self.lost + self.gained > self.n:
            raise ValueError(f"Expected flips within {self.n} items, found {self.lost} lost and {self.gained} gained.")

    @property
    def delta(self) -> float:
        return (self.gained - self.lost) / self.n

    def _null_moments(self, x: float) -> tuple[float, float]:
        """Return the standard error of delta, and its skewness / 6 times that error, if the true delta were x."""
        p_lost, variance = _null_fit(self.lost, self.gained, self.n, x)
        if variance <= 0:
            return 0.0, 0.0
        p_gained = p_lost + x
        third = p_gained * (1 - x) ** 3 - p_lost * (1 + x) ** 3 - (1 - p_gained - p_lost) * x**3
        shift = third / (6 * variance * self.n) if self.deskew else 0.0
        # What clusters add grows with the square of the flips. A sample that met few losing clusters has few flips and
        # little spread together, and would call itself kept.
        excess = 0.0
        if self.design_effect > 1:
            observed = (self.lost + self.gained) / self.n - self.delta**2
            excess = (self.design_effect - 1) * max(1.0, variance / observed)
        return math.sqrt(variance * (1 + excess) / self.n), shift

    def interval(self, level: float) -> Interval:
        q = _t_quantile(level, self.df)

        def distance(x: float, side: int) -> float:
            error, shift = self._null_moments(x)
            return self.delta - x - side * (q * error + max(0.0, side * shift) * max(0.0, q * q - 1))

        # At delta itself the error is 0 when all items agree, a root that is not the end of the interval: start beside.
        near_low, near_high = self.delta - 1e-12, self.delta + 1e-12
        return Interval(
            float(optimize.brentq(distance, -1, near_low, args=(1,))) if near_low > -1 else -1.0,
            float(optimize.brentq(distance, near_high, 1, args=(-1,))) if near_high < 1 else 1.0,
        )

    def p_below(self, x: float) -> float:
        if not -1 < x < 1:
            return float(x <= -1)
        error, shift = self._null_moments(x)
        t = (self.delta - x) / error if error > 0 else 0.0
        if t < -1 and shift < 0:  # solve q + a (q^2 - 1) = |t| for q, as the interval does
            a = -shift / error
            t = -(math.sqrt(1 + 4 * a * (a - t)) - 1) / (2 * a)
        return _t_cdf(t, self.df)

    def p_above(self, x: float) -> float:
        return _Score(self.gained, self.lost, self.n, self.design_effect, self.df, self.deskew).p_below(-x)


def _null_fit(lost: float, gained: float, n: float, delta: float) -> tuple[float, float]:
    """Return the likeliest share lost and the variance of one item's change if the truth were `delta` (Tango 1998)."""
    b = (2 * n - gained + lost) * delta - lost - gained
    p_lost = (math.sqrt(max(0.0, b * b + 8 * n * lost * delta * (1 - delta))) - b) / (4 * n)
    return p_lost, max(0.0, 2 * p_lost + delta * (1 - delta))


@dataclass(frozen=True)
class _StudentT:
    """delta +- t x se; without any spread, delta is taken as known."""

    delta: float
    se: float
    df: int

    def interval(self, level: float) -> Interval:
        half = _t_quantile(level, self.df) * self.se
        return Interval(self.delta - half, self.delta + half)

    def p_below(self, x: float) -> float:
        return _t_cdf((self.delta - x) / self.se, self.df) if self.se > 0 else float(self.delta >= x)

    def p_above(self, x: float) -> float:
        return _t_cdf((x - self.delta) / self.se, self.df) if self.se > 0 else float(self.delta <= x)


@dataclass(frozen=True, eq=False)
class _BootstrapT:
    """As _StudentT, with the sorted resampled values of (delta* - delta) / se* in place of t's distribution."""

    delta: float
    se: float
    pivots: Floats

    def interval(self, level: float) -> Interval:
        tail = max(1, math.floor((len(self.pivots) + 1) * (1 - level) / 2))
        return Interval(
            self.delta - self.se * float(self.pivots[-tail]), self.delta - self.se * float(self.pivots[tail - 1])
        )

    def p_below(self, x: float) -> float:
        return float(1 + np.sum(self.pivots <= (self.delta - x) / self.se)) / (len(self.pivots) + 1)

    def p_above(self, x: float) -> float:
        return float(1 + np.sum(self.pivots >= (self.delta - x) / self.se)) / (len(self.pivots) + 1)


def _jackknife_t(parts: Floats, wholes: Floats) -> _StudentT:
    """Return sum(parts) / sum(wholes) over independent units, its leave-one-unit-out error, and K-1 degrees."""
    k = len(parts)
    if k < 2:
        raise ValueError(f"A spread needs at least 2 units (items, documents or clusters), found {k}.")
    delta = float(parts.sum() / wholes.sum())
    share = np.minimum(wholes / wholes.sum(), 1 - 1e-9)
    left_out = (parts - delta * wholes) / (1 - share)
    return _StudentT(delta, math.sqrt((k - 1) / k * float(left_out @ left_out)) / float(wholes.sum()), k - 1)


def _bootstrap_t(parts: Floats, wholes: Floats, replicates: int, seed: int) -> _BootstrapT:
    """Return sum(parts) / sum(wholes), not the same in every unit, with its resampled studentised distribution."""
    k = len(parts)
    delta = float(parts.sum() / wholes.sum())
    e = parts - delta * wholes  # from here on the estimate is 0, so that small changes do not drown in rounding
    moments = np.stack([e, wholes, e * e, e * wholes, wholes * wholes], axis=1)
    spread = float(e @ e)
    rng = np.random.default_rng(seed)
    chunks = []
    rows = max(1, CHUNK_CELLS // k)
    for start in range(0, replicates, rows):
        size = min(rows, replicates - start)
        drawn = rng.integers(0, k, (size, k)) + k * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * k).reshape(size, k).astype(np.float64)
        sum_e, sum_w, ee, ew, ww = (counts @ moments).T
        shift = sum_e / np.where(sum_w > 0, sum_w, np.nan)
        variance = ee - 2 * shift * ew + shift**2 * ww
        # A resample without spread (one unit throughout, or none that changed) counts as far out as any with spread.
        with np.errstate(divide="ignore", invalid="ignore"):
            t = np.where(variance > 1e-9 * spread, sum_e / np.sqrt(np.abs(variance)), np.sign(sum_e) * np.inf)
        chunks.append(t)
    pivots = np.concatenate(chunks) * math.sqrt((k - 1) / k)
    furthest = np.max(np.abs(pivots[np.isfinite(pivots)]), initial=0.0)
    pivots = np.clip(np.nan_to_num(pivots, nan=0.0, posinf=furthest, neginf=-furthest), -furthest, furthest)
    se = math.sqrt(k / (k - 1) * spread) / float(wholes.sum())
    return _BootstrapT(delta, se, np.sort(pivots))


def _change(
    delta: float,
    tests: Sequence[_Test],
    unit: str,
    scale: float,
    n: int,
    clusters: int | None,
    level: float,
    variance: float,
    lost: int | None = None,
    gained: int | None = None,
) -> PairedChange:
    """Return the change whose interval is the widest its tests ask for, all multiplied by `scale` into `unit`."""
    ends = [test.interval(level) for test in tests]
    interval = Interval(scale * min(e.low for e in ends), scale * max(e.high for e in ends))
    p = None if lost is None or gained is None else mcnemar_exact(lost, gained)
    return PairedChange(
        scale * delta, interval, unit, n, clusters, level, scale**2 * variance, lost, gained, p, scale, tuple(tests)
    )


def _conclude(targets: Sequence[Target], retentions: Sequence[Retention], findings: tuple[Finding, ...]) -> Verdict:
    """Return the verdict that follows from the findings, with its sentence."""
    named: list[Target | Retention] = [*targets, *retentions]
    entries = list(zip(named, findings, strict=True))
    bad = [_describe(entry) for entry, finding in entries if finding.status in ("forgot", "lost")]
    if bad:
        return Verdict("reject", f"Reject: {'; '.join(bad)}.", findings)
    missing = [what for what, given in (("target", targets), ("retention capability", retentions)) if not given]
    open_ = [f"no {what} was measured" for what in missing]
    for entry, finding in entries:
        if isinstance(entry, Target) and entry.primary and finding.status != "gained":
            open_.append(f"{_describe(entry)}, so no gain is shown")
        elif isinstance(entry, Retention) and finding.status == "inconclusive":
            n = entry.change.n
            remedy = "the loss is too close to the budget to call, and more items alone may not settle it"
            if finding.items_needed:
                remedy = f"about {finding.items_needed} items, not {n}, would settle it if nothing truly changed"
            open_.append(f"{_describe(entry)}: {remedy}")
    if open_:
        return Verdict("inconclusive", f"Inconclusive: {'; '.join(open_)}.", findings)
    primary = next(t for t in targets if t.primary)
    kept = f"all {len(retentions)} retention capabilities" if len(retentions) > 1 else retentions[0].name
    return Verdict("promote", f"Promote: {_describe(primary)}, and {kept} stayed within budget.", findings)


def _describe(entry: Target | Retention) -> str:
    c = entry.change
    unit = " %" if c.unit == "%" else f" {c.unit}"
    budget = f" against a budget of {entry.budget:g}{unit}" if isinstance(entry, Retention) else ""
    interval = f"{100 * c.level:g} % interval {c.interval.low:+.2f} to {c.interval.high:+.2f}"
    return f"{entry.name} changed by {c.delta:+.2f}{unit} ({interval}){budget}"


def _planning_sum(flips: float, budget: float, z: float, z_power: float) -> float:
    """Return z x (item sd if the loss were the budget) + z_power x (item sd if nothing changed), as proportions."""
    return z * math.sqrt(_null_fit(flips / 2, flips / 2, 1, -budget)[1]) + z_power * math.sqrt(flips)


def _paired(before: ArrayLike, after: ArrayLike) -> tuple[Floats, Floats]:
    b, a = _finite(before), _finite(after)
    if len(b) != len(a):
        raise ValueError(f"Before and after must be scores of the same items, found {len(b)} and {len(a)}.")
    return b, a


def _finite(values: ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0 or not np.isfinite(array).all():
        raise ValueError(f"Expected at least one finite number, in one dimension, found shape {array.shape}.")
    return array


def _cluster_totals(clusters: Sequence[Hashable], *columns: Floats) -> tuple[Floats, ...]:
    """Return each column summed per cluster. Raises ValueError for a missing name, or fewer than 2 clusters."""
    if len(clusters) != len(columns[0]):
        raise ValueError(f"Expected one cluster name per item, found {len(clusters)} for {len(columns[0])} items.")
    number: dict[Hashable, int] = {}
    index = np.array([number.setdefault(name, len(number)) for name in clusters])
    if len(number) < 2:
        raise ValueError("Expected at least 2 clusters, found 1. Pass clusters=None to treat its items as independent.")
    return tuple(np.bincount(index, weights=column).astype(np.float64) for column in columns)


def _check_budget(budget: float, name: str) -> None:
    if not 0 < budget < math.inf:
        raise ValueError(f"{name}: a budget is the accepted loss and must be above 0, found {budget}.")


def _z(level: float) -> float:
    return _t_quantile(level, math.inf)


@lru_cache(maxsize=1024)
def _t_quantile(level: float, df: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"A level is a fraction such as 0.95, found {level}.")
    p = (1 + level) / 2
    return float(special.ndtri(p) if math.isinf(df) else special.stdtrit(df, p))


def _t_cdf(t: float, df: float) -> float:
    return float(special.ndtr(t) if math.isinf(df) else special.stdtr(df, t))
