"""Points, the front and what matters, against brute force and cases worked out by hand."""

import math
import random

import pytest

from tasks.core.records import Delta
from tasks.core.sweep import (
    Axis,
    Estimate,
    SweepTrial,
    choose_best,
    importance_of,
    losing_to,
    measure_points,
    over_seeds,
    pareto_front,
    share_between,
)


def delta(name: str, value: float, half: float = 0.5, budget: float | None = None, **more: object) -> Delta:
    unit = {"measure": "bits_per_byte", "unit": "%", "before": 1.0, "after": 1.0, "n": 50}
    role = {"role": "target", "status": "gained"} if budget is None else {"role": "retention", "status": "kept"}
    bounds = {"delta": value, "low": value - half, "high": value + half, "budget": budget}
    return Delta.model_validate({"name": name, **unit, **role, **bounds, **more})


def trial(number: int, gain: float, *losses: float, seed: int = 1, half: float = 0.5, **values: object) -> SweepTrial:
    """Return a completed trial: percent gained, and lost of each capability, with budgets of 2 % and 4 %."""
    lost = [delta(f"text{i}", -loss, half, budget=2.0 * (i + 1)) for i, loss in enumerate(losses)]
    deltas = [delta("chat", gain, half, primary=True), *lost]
    return SweepTrial(number=number, values=values, seed=seed, status="completed", deltas=deltas)


@pytest.mark.parametrize("seed", range(30))
def test_the_front_is_what_brute_force_finds(seed: int) -> None:
    chance = random.Random(seed)
    points = [(chance.randint(0, 8) / 2, chance.randint(0, 8) / 4) for _ in range(chance.randint(0, 40))]  # with ties

    def dominated(i: int) -> bool:
        gain, lost = points[i]
        return any(g >= gain and f <= lost and (g, f) != (gain, lost) for g, f in points)

    assert pareto_front(points) == {i for i in range(len(points)) if not dominated(i)}


def test_a_point_is_its_primary_gain_against_its_worst_share_of_a_budget() -> None:
    first, second = measure_points([trial(1, 10, 1, 3, rank=4), trial(2, 5, 0.5, -1, rank=8)])
    assert (first.gain, first.worst) == (Estimate(value=10, low=9.5, high=10.5), "text1")
    assert first.forgetting == Estimate(value=0.75, low=0.625, high=0.875)
    assert (second.worst, second.forgetting.value) == ("text0", 0.25)
    assert [p.on_front for p in (first, second)] == [True, True]


def test_what_does_not_count_and_what_did_not_finish_is_left_out() -> None:
    at_chance = trial(1, 10, 1, rank=4)
    at_chance.deltas[1] = delta("text0", -9, budget=2, counts=False)
    failed = trial(2, 20, 0, rank=8).model_copy(update={"status": "failed"})
    (point,) = measure_points([at_chance, failed])
    assert (point.worst, point.forgetting.value, point.is_inside) == ("", 0, True)


def test_seeds_are_one_point_whose_interval_holds_items_and_seeds() -> None:
    gains = (9.0, 10.0, 12.0)
    (point,) = measure_points([trial(i, gain, 1, seed=i, rank=4) for i, gain in enumerate(gains, 1)])
    mean = sum(gains) / 3
    spread = math.sqrt(sum((gain - mean) ** 2 for gain in gains) / 2)
    half = math.hypot(0.5, 4.302653 * spread / math.sqrt(3))  # Student's t with 2 degrees of freedom
    assert (point.trials, point.gain.value) == ([1, 2, 3], pytest.approx(mean))
    assert point.gain.high - mean == pytest.approx(half, rel=1e-6) == mean - point.gain.low
    same = [Estimate(value=1, low=0, high=3)] * 3
    assert over_seeds(same) == same[0], "seeds that agree add nothing"


def test_the_best_gains_most_inside_every_budget() -> None:
    points = measure_points(
        [trial(1, 30, 2.5, 0, rank=64), trial(2, 20, 1.9, 0, rank=8), trial(3, 20, 1.0, 0, rank=4), trial(4, -1, 0, 0)]
    )
    assert choose_best(points) == 2, "of two equal gains the one that forgets less"
    assert [p.on_front for p in points] == [True, False, True, True]
    assert choose_best([points[0], points[3]]) is None, "one beyond a budget, one without a gain"
    assert choose_best([]) is None


def test_strengths_are_points_of_their_own() -> None:
    whole = trial(1, 10, 3, 0, rank=8)
    half = trial(2, 6, 1, 0, rank=8).model_copy(update={"strength": 0.5})
    assert [(p.strength, p.is_inside) for p in measure_points([whole, half])] == [(None, False), (0.5, True)]


def test_importance_is_the_share_of_variance_between_values() -> None:
    assert share_between([0, 0, 1, 1], [1, 3, 5, 7]) == pytest.approx(16 / 20)
    assert share_between([0, 1], [2, 2]) == 0
    chance = random.Random(5)
    trials = [
        trial(i, 3 * math.log10(rate) + chance.gauss(0, 0.1), rank / 8, 0, rank=rank, rate=rate)
        for i, (rank, rate) in enumerate((chance.choice((4, 8, 16)), 10 ** chance.uniform(-4, -2)) for _ in range(30))
    ]
    axes = [Axis(key="rank", values=[4, 8, 16]), Axis(key="rate", low=1e-4, high=1e-2, log=True)]
    rank, rate = importance_of(axes, measure_points(trials))
    assert (rank.key, rank.forgetting, rank.is_reliable) == ("rank", pytest.approx(1), True)
    assert rate.gain > 0.7 > 0.3 > rank.gain
    assert rank.chance == pytest.approx(2 / 29)
    few = importance_of(axes, measure_points(trials[:6]))
    assert not any(i.is_reliable for i in few)
    assert importance_of(axes, measure_points(trials[:2])) == []


def test_a_training_loses_where_it_is_clearly_above_the_median_at_its_step() -> None:
    rivals = [[(0, 3.0), (10, 2.0), (20, 1.0)], [(0, 3.0), (20, 1.4)], [(0, 3.0), (10, 2.4), (20, 1.2)]]
    assert losing_to(20, 2.11, rivals) == 1.2, "the median learned 1.8 nats, and this less than half of that"
    assert losing_to(20, 2.09, rivals) is None
    assert losing_to(10, 2.65, rivals) == pytest.approx(2.2), "the second is at 2.2 halfway"
    assert losing_to(20, 9.0, rivals[:2]) is None, "two are no field to be compared with"
    assert losing_to(30, 9.0, rivals) is None, "none came so far"
    flat = [[(0, 3.0), (20, 3.0)]] * 3
    assert losing_to(20, 3.02, flat) is None, "where nobody learns, noise decides nothing"
    assert losing_to(20, 3.04, flat) == 3.0
