"""What of an adapter to ship: scaled without training again, or from a step on the way, the best inside the budgets.

Half of the items chooses, the other half judges what was chosen: the best of many on the items that chose it would
otherwise owe part of its gain to luck."""

from collections.abc import Sequence
from hashlib import sha256
from typing import Any

from tasks.core.config import EvalConfig
from tasks.core.errors import ComparisonError
from tasks.core.records import Delta, ItemScore, ScoreSheet, ShippingPoint, TrainedRef
from tasks.evaluation.forgetting import compare_scores

Items = Sequence[ItemScore]
Scored = tuple[TrainedRef, ScoreSheet, Items]
CHOOSES, CONFIRMS = 0, 1


def choose_shipping(
    config: EvalConfig, before: ScoreSheet, before_items: Items, scored: Sequence[Scored]
) -> dict[str, Any]:
    """Return ShippingCurve's fields. Raises ComparisonError for sheets that are not about the same items, or for
    too few."""

    def compare(entry: Scored, half: int) -> dict[str, Any]:
        return compare_half(config, before, before_items, *entry[1:], half)

    points = []
    for entry in scored:
        found = compare(entry, CHOOSES)
        points.append(
            ShippingPoint(
                strength=entry[0].strength,
                step=entry[0].step,
                capabilities=found["capabilities"],
                verdict=found["verdict"],
            )
        )
    good = [
        i for i, p in enumerate(points) if _gain(config, p) > 0 and all(_is_inside(delta) for delta in p.capabilities)
    ]
    fields: dict[str, Any] = {"points": [p.model_dump() for p in points], "best": None, "verdict": "reject"}
    if not good:
        return fields | {
            "reason": "None of them gains anything inside every budget: train more gently, or with replay."
        }
    best = max(good, key=lambda i: _gain(config, points[i]))
    confirmed = compare(scored[best], CONFIRMS)
    return fields | {
        "best": points[best].model_dump(),
        "confirmed": confirmed["capabilities"],
        "verdict": confirmed["verdict"],
        "reason": confirmed["reason"],
    }


def compare_half(
    config: EvalConfig, before: ScoreSheet, before_items: Items, after: ScoreSheet, after_items: Items, half: int
) -> dict[str, Any]:
    """Return ForgettingReport's fields on one half of the items. Raises ComparisonError."""
    for task in (score.task for score in before.tasks):
        if not any(item.task == task and _half(item) == half for item in before_items):
            raise ComparisonError(
                f"Half of the items chooses and half confirms, and one half has none of {task}. Score more items."
            )
    return compare_scores(config, before, half_of(before_items, half), after, half_of(after_items, half))


def half_of(items: Items, half: int) -> list[ItemScore]:
    """Return one half of the items, the same ones whatever the model."""
    return [item for item in items if _half(item) == half]


def _half(item: ItemScore) -> int:
    # Turns of a conversation stay together. A subject does not: a benchmark may have few of them.
    name = item.cluster if item.cluster is not None and item.nll is not None else item.doc
    return sha256(f"{item.task}/{name}".encode()).digest()[0] & 1


def _is_inside(delta: Delta) -> bool:
    """Return whether a capability kept its budget, as far as half of the items can tell."""
    if delta.role == "target" or not delta.counts:
        return True
    return delta.status != "forgot" and delta.delta >= -(delta.budget or 0)


def _gain(config: EvalConfig, point: ShippingPoint) -> float:
    return sum(config.weights.get(delta.name, 0) * delta.delta for delta in point.capabilities)
