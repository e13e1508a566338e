"""Published and independently computed values, and simulated error rates of what a verdict promises."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from scipy import optimize, stats

from tasks.core import paired
from tasks.core.paired import (
    Interval,
    PairedChange,
    Retention,
    Target,
    accuracy_change,
    bootstrap_ratio_interval,
    cluster_t_interval,
    detectable_change,
    holm,
    items_to_settle,
    judge,
    mcnemar_exact,
    mean_change,
    mean_change_interval,
    ratio_change,
    tango_interval,
)

SIMULATIONS = 2_000


def at_most(rate: float) -> float:
    """Return what a simulated share may reach when its true value is `rate`: 2.6 Monte Carlo errors, 1 in 200."""
    return rate + 2.6 * math.sqrt(rate * (1 - rate) / SIMULATIONS)


def flips(lost: int, gained: int, n: int) -> PairedChange:
    before, after = np.zeros(n), np.zeros(n)
    before[:lost] = 1
    after[lost : lost + gained] = 1
    return accuracy_change(before, after)


SURE_GAIN = Target("chinese", flips(0, 40, 100), primary=True)


# Tango's interval and McNemar's test


def likelihood_score_interval(lost: int, gained: int, n: int, level: float) -> Interval:
    """Return the score interval from a numerical maximum of the multinomial likelihood; shares no formula with ours."""

    def distance(x: float) -> float:
        def loss(p_lost: float) -> float:
            cells = (p_lost, p_lost + x, 1 - 2 * p_lost - x)
            counts = (lost, gained, n - lost - gained)
            return -sum(k * math.log(max(p, 1e-300)) for k, p in zip(counts, cells, strict=True) if k)

        least, largest = max(0.0, -x), (1 - x) / 2
        p = optimize.minimize_scalar(loss, bounds=(least, largest), method="bounded", options={"xatol": 1e-13}).x
        return float((gained - lost - n * x) / math.sqrt(n * (2 * p + x - x * x)))

    z, delta = stats.norm.ppf((1 + level) / 2), (gained - lost) / n
    return Interval(
        optimize.brentq(lambda x: distance(x) - z, -0.9999, delta - 1e-6),
        optimize.brentq(lambda x: distance(x) + z, delta + 1e-6, 0.9999),
    )


def test_tango_interval_gives_the_published_values() -> None:
    # Fagerland, Lydersen and Laake, Statistics in Medicine 33 (2014) 2850-2875: airway hyper-responsiveness, 1 1 7 12.
    interval = tango_interval(lost=7, gained=1, n=21)
    assert (round(interval.low, 3), round(interval.high, 3)) == (-0.517, -0.026)


@pytest.mark.parametrize("level", [0.9, 0.95])
@pytest.mark.parametrize(
    ("lost", "gained", "n"), [(9, 5, 50), (16, 6, 161), (0, 4, 60), (3, 0, 200), (0, 0, 60), (41, 44, 1000)]
)
def test_tango_interval_inverts_the_score_test(lost: int, gained: int, n: int, level: float) -> None:
    ours, theirs = tango_interval(lost, gained, n, level), likelihood_score_interval(lost, gained, n, level)
    assert ours.low == pytest.approx(theirs.low, abs=1e-5)
    assert ours.high == pytest.approx(theirs.high, abs=1e-5)


def test_no_flips_is_not_certainty() -> None:
    z2 = stats.norm.ppf(0.975) ** 2
    for n in (1, 60, 100_000):
        interval = tango_interval(0, 0, n)
        assert interval.high == pytest.approx(z2 / (n + z2))
        assert interval.low == pytest.approx(-interval.high)


def test_tango_interval_at_the_ends_of_the_scale() -> None:
    all_lost, all_gained = tango_interval(60, 0, 60), tango_interval(0, 60, 60)
    assert all_lost.low == -1
    assert -0.9 < all_lost.high < -0.85
    assert all_gained.low == pytest.approx(-all_lost.high)
    assert all_gained.high == 1


@pytest.mark.parametrize(
    ("counts", "message"), [((0, 0, 0), "at least one item"), ((3, 3, 5), "within 5 items"), ((-1, 0, 5), "-1 lost")]
)
def test_impossible_counts_are_named(counts: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tango_interval(*counts)


def outcomes(n: int, p_lost: float, p_gained: float) -> Iterator[tuple[int, int, float]]:
    """Yield (lost, gained, probability) of all but 1e-6 of what can happen."""
    for lost in range(int(stats.binom.isf(1e-7, n, p_lost)) + 1):
        p, rest = stats.binom.pmf(lost, n, p_lost), p_gained / (1 - p_lost)
        if p > 1e-9:
            for gained in range(int(stats.binom.isf(1e-7, n - lost, rest)) + 1):
                yield lost, gained, float(p * stats.binom.pmf(gained, n - lost, rest))


@pytest.mark.parametrize("n", [60, 200, pytest.param(1000, marks=pytest.mark.slow)])
def test_accuracy_interval_covers_by_enumeration(n: int) -> None:
    misses = []
    for discordance in (0.01, 0.02, 0.05, 0.1):
        for share_lost in (0.5, 0.75, 1.0):
            p_lost, p_gained = discordance * share_lost, discordance * (1 - share_lost)
            false_kept = false_forgot = 0.0
            for lost, gained, p in outcomes(n, p_lost, p_gained):
                interval = paired._Score(lost, gained, n, deskew=True).interval(0.95)
                false_kept += p * (interval.low > p_gained - p_lost)
                false_forgot += p * (interval.high < p_gained - p_lost)
            assert false_kept < 0.027
            misses.append(false_kept + false_forgot)
    # Counts are whole numbers, so a score interval meets 2.5 and 5 % to within 0.2 and 0.4 points, not at every point.
    assert max(misses) < 0.054
    assert np.mean(misses) < 0.05


def test_few_flips_do_not_claim_a_loss_by_skewness() -> None:
    n, loss = 200, 0.02
    tango = sum(p for lost, gained, p in outcomes(n, loss, 0) if tango_interval(lost, gained, n).high < -loss)
    ours = sum(p for lost, gained, p in outcomes(n, loss, 0) if flips(lost, gained, n).interval.high < -100 * loss)
    assert ours < 0.025 < 0.049 < tango


@pytest.mark.parametrize("lost", [4, 30, 60])
def test_p_values_agree_with_the_interval(lost: int) -> None:
    change = flips(lost, 8, 200)
    clustered = accuracy_change(np.arange(200) < lost, np.arange(200) > 190, clusters=[i % 7 for i in range(200)])
    for c in (change, clustered):
        assert c.p_above(c.interval.low) == pytest.approx(0.025, rel=1e-4)
        assert c.p_below(c.interval.high) == pytest.approx(0.025, rel=1e-4)


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (0, 5), (7, 1), (6, 5), (40, 61)])
def test_mcnemar_is_the_exact_binomial_test(lost: int, gained: int) -> None:
    expected = stats.binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    assert mcnemar_exact(lost, gained) == pytest.approx(expected)


# t, the bootstrap and Holm


def test_mean_change_is_the_paired_t_test() -> None:
    rng = np.random.default_rng(1)
    before = rng.normal(size=40)
    after = before + rng.normal(0.1, 0.5, 40)
    expected = stats.ttest_rel(after, before)
    change, low_high = mean_change(before, after), expected.confidence_interval(0.95)
    assert (change.interval.low, change.interval.high) == pytest.approx((low_high.low, low_high.high))
    assert change.interval == mean_change_interval(after - before)
    assert 2 * min(change.p_below(0), change.p_above(0)) == pytest.approx(expected.pvalue)


def test_clusters_of_equal_size_are_a_t_test_on_their_means() -> None:
    differences = np.random.default_rng(2).normal(size=(7, 10))
    interval = cluster_t_interval(differences.ravel(), [name for name in "abcdefg" for _ in range(10)])
    expected = stats.ttest_1samp(differences.mean(1), 0).confidence_interval(0.95)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))


def test_clusters_of_unequal_size_are_left_out_one_by_one() -> None:
    rng = np.random.default_rng(3)
    clusters = np.repeat(np.arange(6), [2, 3, 5, 8, 13, 21])
    d = rng.normal(size=len(clusters))
    left_out = np.array([d[clusters != k].mean() for k in range(6)])
    se = math.sqrt(5 / 6 * np.sum((left_out - d.mean()) ** 2))
    interval = cluster_t_interval(d, list(clusters))
    assert interval.high - interval.low == pytest.approx(2 * stats.t.ppf(0.975, 5) * se)


def test_ratio_change_is_signed_so_that_worse_is_negative() -> None:
    rng = np.random.default_rng(4)
    before = rng.lognormal(6, 0.5, 80)
    change = ratio_change(before, before * rng.normal(1.02, 0.01, 80))
    assert change.delta == pytest.approx(-2, abs=0.3)
    assert change.interval.low < change.delta < change.interval.high < 0
    assert change.p_below(0) < 0.001 < 0.999 < change.p_above(0)


def test_bootstrap_is_seeded_and_reacts_to_skew() -> None:
    rng = np.random.default_rng(5)
    before = rng.lognormal(6, 0.5, 60)
    after = before * (1 + 0.02 * rng.gamma(0.25, 4, 60))
    interval = bootstrap_ratio_interval(before, after)
    assert interval == bootstrap_ratio_interval(before, after)
    assert interval != bootstrap_ratio_interval(before, after, seed=1)
    delta = ratio_change(before, after).delta
    assert delta - interval.low > 1.2 * (interval.high - delta)


def test_bootstrap_agrees_across_chunks_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(6)
    before = rng.lognormal(6, 0.5, 60)
    after = before * rng.normal(1, 0.01, 60)
    whole = bootstrap_ratio_interval(before, after)
    monkeypatch.setattr(paired, "CHUNK_CELLS", 60 * 7)
    chunked = bootstrap_ratio_interval(before, after)
    assert (chunked.low, chunked.high) == pytest.approx((whole.low, whole.high), abs=0.02)


def test_an_adapter_that_changes_nothing() -> None:
    nll = np.random.default_rng(7).lognormal(6, 0.5, 50)
    assert bootstrap_ratio_interval(nll, nll) == Interval(0, 0)
    change = ratio_change(nll, nll)
    assert (change.p_below(0), change.p_below(-1), change.p_above(-1)) == (1, 1, 0)
    assert judge([SURE_GAIN], [Retention("english", change, 1.0)]).outcome == "promote"


def test_one_changed_document_keeps_the_interval_finite() -> None:
    before = np.full(50, 100.0)
    after = before.copy()
    after[3] = 130
    interval = bootstrap_ratio_interval(before, after)
    assert -5 < interval.low < -0.6 < interval.high < 5


def test_holm() -> None:
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    p_values = [0.04, 0.001, 0.03, 0.2, 0.03, 0.9]
    assert holm(p_values) == pytest.approx(list(multitest.multipletests(p_values, method="holm")[1]))


def test_holm_keeps_the_order_it_was_given() -> None:
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([]) == []


# Inputs


def test_accuracy_change_reports_points_and_flips() -> None:
    change = flips(lost=12, gained=2, n=50)
    interval = tango_interval(12, 2, 50)
    assert (change.delta, change.lost, change.gained, change.n, change.clusters) == (-20, 12, 2, 50, None)
    assert change.interval.low == 100 * interval.low
    assert 100 * interval.high <= change.interval.high < 0
    assert change.mcnemar_p == pytest.approx(stats.binomtest(2, 14).pvalue)
    assert change.p_below(0) < 0.01 < change.p_below(-20)
    assert change.p_above(-40) < 0.01 < change.p_above(-20)


def test_no_flips_in_clusters_is_not_certainty() -> None:
    change = accuracy_change(np.ones(100), np.ones(100), clusters=list(range(5)) * 20)
    assert change.clusters == 5
    assert change.interval.low < 100 * tango_interval(0, 0, 100).low


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: accuracy_change([], []), "at least one finite number"),
        (lambda: accuracy_change([0, 1], [0]), "same items, found 2 and 1"),
        (lambda: accuracy_change([0, 0.5], [0, 1]), "Use mean_change"),
        (lambda: accuracy_change([0, 1], [0, float("nan")]), "finite"),
        (lambda: accuracy_change([0, 1], [0, 1], clusters=["a", "a"]), "at least 2 clusters"),
        (lambda: accuracy_change([0, 1], [0, 1], clusters=["a"]), "one cluster name per item"),
        (lambda: accuracy_change([0, 1], [0, 1], level=95), "fraction such as 0.95"),
        (lambda: ratio_change([5.0], [5.0]), "at least 2 units"),
        (lambda: ratio_change([5.0, -1.0], [5.0, 1.0]), "must not be below 0"),
        (lambda: items_to_settle(SURE_GAIN.change, 0), "must be above 0"),
        (lambda: detectable_change(0, 0.1), "n >= 1"),
    ],
)
def test_wrong_input_is_explained(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# The verdict


def test_promote_says_what_was_gained() -> None:
    verdict = judge([SURE_GAIN], [Retention("english", flips(3, 4, 400), 5.0)])
    assert verdict.outcome == "promote"
    assert [f.status for f in verdict.findings] == ["gained", "kept"]
    assert verdict.reason.startswith("Promote: chinese changed by +40.00 points (95 % interval ")
    assert verdict.reason.endswith("and english stayed within budget.")


def test_reject_names_only_what_was_forgotten() -> None:
    retentions = [Retention("english", flips(3, 4, 400), 5.0), Retention("code", flips(80, 5, 400), 5.0)]
    verdict = judge([SURE_GAIN], retentions)
    assert verdict.outcome == "reject"
    assert [f.status for f in verdict.findings] == ["gained", "kept", "forgot"]
    assert "code changed by -18.75 points" in verdict.reason
    assert "against a budget of 5 points" in verdict.reason
    assert "english" not in verdict.reason


def test_a_lost_target_is_rejected() -> None:
    verdict = judge([Target("chinese", flips(40, 0, 100), True)], [Retention("english", flips(3, 4, 400), 5.0)])
    assert (verdict.outcome, verdict.findings[0].status) == ("reject", "lost")


def test_inconclusive_says_how_many_items_would_settle_it() -> None:
    retention = Retention("english", flips(3, 3, 60), 5.0)
    verdict = judge([SURE_GAIN], [retention])
    needed = items_to_settle(retention.change, 5.0)
    assert verdict.outcome == "inconclusive"
    assert verdict.findings[1].items_needed == needed > 60
    assert f"about {needed} items, not 60, would settle it if nothing truly changed" in verdict.reason


def test_more_items_are_not_asked_for_when_the_loss_is_at_the_budget() -> None:
    verdict = judge([SURE_GAIN], [Retention("english", flips(50, 0, 1000), 5.0)])
    assert (verdict.outcome, verdict.findings[1].items_needed) == ("inconclusive", None)
    assert "too close to the budget" in verdict.reason


def test_nothing_is_promoted_without_a_gain_or_without_retention() -> None:
    kept = Retention("english", flips(0, 0, 400), 5.0)
    assert judge([Target("chinese", flips(5, 6, 100), True)], [kept]).reason.endswith("so no gain is shown.")
    assert judge([], [kept]).reason == "Inconclusive: no target was measured."
    assert judge([SURE_GAIN], []).reason == "Inconclusive: no retention capability was measured."


def test_secondary_gains_are_corrected_for_their_number() -> None:
    barely = flips(2, 11, 200)  # one-sided p about 0.01: one claim of this size holds, four do not
    others = [Target(f"other {i}", barely) for i in range(4)]
    statuses = [f.status for f in judge([SURE_GAIN, *others], []).findings]
    assert statuses == ["gained", *["unclear"] * 4]
    assert judge([SURE_GAIN, others[0]], []).findings[1].status == "gained"


@pytest.mark.parametrize(
    ("targets", "retentions", "message"),
    [
        ([Target("a", SURE_GAIN.change)], [], "exactly one primary target, found 0"),
        ([SURE_GAIN, SURE_GAIN], [], "found 2"),
        ([SURE_GAIN], [Retention("b", SURE_GAIN.change, -3)], "b: a budget is the accepted loss"),
        ([Target("a", accuracy_change([0, 1], [1, 1], level=0.9), True)], [], "found 90 %"),
    ],
)
def test_judge_refuses(targets: list[Target], retentions: list[Retention], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        judge(targets, retentions)


# Planning


@pytest.mark.parametrize(("lost", "gained"), [(5, 5), (20, 20), (1, 1)])
@pytest.mark.parametrize("budget", [3.0, 5.0])
def test_items_to_settle_gives_the_power_it_promises(lost: int, gained: int, budget: float) -> None:
    needed = items_to_settle(flips(lost, gained, 400), budget)
    each = lost / 400
    kept = sum(p for lo, g, p in outcomes(needed, each, each) if tango_interval(lo, g, needed).low > -budget / 100)
    assert 0.77 < kept < 0.93


def test_no_flips_are_planned_by_the_rule_of_three() -> None:
    assert items_to_settle(flips(0, 0, 400), 5.0) == items_to_settle(flips(1, 2, 400), 5.0)


def test_items_to_settle_for_bits_per_byte() -> None:
    rng = np.random.default_rng(8)
    before = rng.lognormal(6, 0.3, 200)
    change = ratio_change(before, before * rng.normal(1, 0.05, 200))
    expected = (1.96 + 0.842) ** 2 * (5**2 * np.mean(before**2) / np.mean(before) ** 2)
    assert items_to_settle(change, 1.0) == pytest.approx(expected, rel=0.15)


def test_detectable_change_is_the_inverse_of_items_to_settle() -> None:
    change = flips(10, 10, 400)
    assert detectable_change(items_to_settle(change, 4.0), 0.05) == pytest.approx(4.0, abs=0.02)
    z2 = stats.norm.ppf(0.975) ** 2
    assert detectable_change(60, 0.0) == pytest.approx(100 * z2 / (60 + z2))
    # DESIGN: 200 items of which 10 % flip have a standard error of 2.2 points.
    assert detectable_change(200, 0.1) > 1.96 * 2.2


# Simulated error rates


def clustered_flips(
    rng: np.random.Generator, k: int, size: int, discordance: float, delta: float, spread: float, uneven: bool
) -> PairedChange:
    """Return the change of k subjects whose rates of loss and of gain vary by `spread` (coefficient of variation)."""
    weights = rng.lognormal(0, 0.8, k) if uneven else np.ones(k)
    sizes = np.maximum(2, np.round(weights / weights.mean() * size)).astype(int)
    shape = 1 / spread**2
    p_lost = np.minimum(0.5, (discordance - delta) / 2 * rng.gamma(shape, 1 / shape, k))
    p_gained = np.minimum(0.4, (discordance + delta) / 2 * rng.gamma(shape, 1 / shape, k))
    clusters = np.repeat(np.arange(k), sizes)
    u = rng.random(len(clusters))
    lost = u < p_lost[clusters]
    gained = ~lost & (u < (p_lost + p_gained)[clusters])
    return accuracy_change(lost, gained, clusters.tolist())


def documents(rng: np.random.Generator, n: int, delta: float, kind: str, uneven: float = 0.3) -> PairedChange:
    """Return the change in percent of n documents that differ in length (log sd `uneven`) and in change."""
    before = rng.lognormal(6, uneven, n) * rng.normal(0.9, 0.1, n)
    # "even": sd 3 percent about delta; "skewed": all lose, by a gamma of coefficient of variation 0.5; "rare": of 1.
    shape = {"skewed": 4.0, "rare": 1.0}.get(kind)
    change = rng.normal(delta, 3, n) if shape is None else delta * rng.gamma(shape, 1 / shape, n)
    return ratio_change(before, before * (1 - change / 100), seed=int(rng.integers(2**31)), replicates=400)


def simulate(make: Callable[[np.random.Generator], PairedChange], truth: float) -> tuple[float, float]:
    """Return the share of intervals that miss `truth`, and of runs promoted with the budget exactly there."""
    misses = promoted = 0
    for i in range(SIMULATIONS):
        change = make(np.random.default_rng([11, i]))
        misses += not change.interval.low <= truth <= change.interval.high
        promoted += judge([SURE_GAIN], [Retention("r", change, -truth)]).outcome == "promote"
    return misses / SIMULATIONS, promoted / SIMULATIONS


@pytest.mark.parametrize(("k", "size"), [(5, 40), (16, 25), (57, 10)])
def test_clustered_intervals_cover_and_do_not_promote_at_the_budget(k: int, size: int) -> None:
    missed, promoted = simulate(lambda rng: clustered_flips(rng, k, size, 0.1, -0.05, 0.4, False), -5.0)
    assert missed <= at_most(0.05)
    assert promoted <= at_most(0.025)


@pytest.mark.parametrize(("n", "kind"), [(60, "even"), (100, "skewed")])
def test_bits_per_byte_intervals_cover_and_do_not_promote_at_the_budget(n: int, kind: str) -> None:
    missed, promoted = simulate(lambda rng: documents(rng, n, -3.0, kind), -3.0)
    assert missed <= at_most(0.05)
    assert promoted <= at_most(0.025)


def rejections(n: int, discordance: float, docs: int, loss: float, seed: int = 12) -> float:
    """Return the share of runs rejected with an unchanged target and retentions that truly lost `loss` budgets."""
    rejected = 0
    for i in range(SIMULATIONS):
        rng = np.random.default_rng([seed, i])
        lost, gained, _ = rng.multinomial(n, [discordance / 2, discordance / 2, 1 - discordance])
        p_lost = (discordance + 0.05 * loss) / 2
        kept_lost, kept_gained, _ = rng.multinomial(n, [p_lost, discordance - p_lost, 1 - discordance])
        retentions = [
            Retention("accuracy", flips(kept_lost, kept_gained, n), 5.0),
            Retention("bits per byte", documents(rng, docs, -3.0 * loss, "even"), 3.0),
        ]
        rejected += judge([Target("t", flips(lost, gained, n), True)], retentions).outcome == "reject"
    return rejected / SIMULATIONS


def test_no_change_is_rejected_in_at_most_five_percent() -> None:
    assert rejections(n=200, discordance=0.05, docs=60, loss=0.0) <= at_most(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("loss", [0.0, 1.0])
@pytest.mark.parametrize("discordance", [0.05, 0.1])
@pytest.mark.parametrize("n", [60, 200, 1000])
def test_rejections_inside_and_at_the_budget(n: int, discordance: float, loss: float) -> None:
    assert rejections(n, discordance, 100, loss) <= at_most(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("spread", [0.1, 0.4])
@pytest.mark.parametrize("discordance", [0.02, 0.05, 0.1])
@pytest.mark.parametrize(("k", "size"), [(5, 12), (5, 200), (16, 12), (16, 60), (57, 10), (57, 40)])
def test_clustered_grid(k: int, size: int, discordance: float, spread: float, uneven: bool) -> None:
    delta = -0.5 * discordance
    missed, promoted = simulate(
        lambda rng: clustered_flips(rng, k, size, discordance, delta, spread, uneven), 100 * delta
    )
    assert missed <= at_most(0.05)
    assert promoted <= at_most(0.025)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["even", "skewed"])
@pytest.mark.parametrize("n", [30, 60, 100, 200])
def test_bits_per_byte_grid(n: int, kind: str) -> None:
    missed, promoted = simulate(lambda rng: documents(rng, n, -3.0, kind), -3.0)
    assert missed <= at_most(0.05)
    assert promoted <= at_most(0.025)
