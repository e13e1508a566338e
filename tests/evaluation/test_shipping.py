"""Half of the items chooses what of an adapter ships, the other half judges it."""

import numpy as np
import pytest

from tasks.core.config import EvalConfig
from tasks.core.errors import ComparisonError
from tasks.core.records import ArtifactRef, ItemScore, ScoreSheet, TrainedRef
from tasks.evaluation.harness import summarise
from tasks.evaluation.shipping import CHOOSES, CONFIRMS, choose_shipping, half_of

CONFIG = EvalConfig(
    capabilities=[
        {"name": "chat", "role": "target", "measure": "bits_per_byte", "tasks": ["zh"]},
        {"name": "text", "role": "retention", "measure": "bits_per_byte", "budget": 2, "tasks": ["en"]},
    ]
)
ARTIFACT = ArtifactRef(kind="scores", key="k", uri="file:///x", content="c", size_bytes=1)
NOISE = np.random.default_rng(1)
BASE = {task: NOISE.uniform(80, 120, 200) for task in ("zh", "en")}


TWO_TARGETS = {
    "capabilities": [
        {"name": "chat", "role": "target", "measure": "bits_per_byte", "tasks": ["zh"]},
        {"name": "poems", "role": "target", "measure": "bits_per_byte", "weight": 3, "tasks": ["en"]},
    ]
}


def scored(zh: float, en: float) -> tuple[ScoreSheet, list[ItemScore]]:
    """Return items whose nats are so many times the base's, give or take half a percent."""
    items = [
        ItemScore(task=task, doc=f"{task}{i}", prompt=f"p{i}", nll=v * by, size_bytes=100, tokens=50)
        for task, factor in (("zh", zh), ("en", en))
        for i, (v, by) in enumerate(zip(BASE[task], factor * NOISE.normal(1, 0.005, 200), strict=True))
    ]
    tasks = [summarise(t, [i for i in items if i.task == t], None, "1") for t in ("zh", "en")]
    return ScoreSheet(artifact=ARTIFACT, tasks=tasks, settings={}, seconds=1), items


def adapter(strength: float) -> TrainedRef:
    return TrainedRef(artifact=ARTIFACT, method="lora", strength=strength)


def choose(*curve: tuple[float, float, float], config: EvalConfig = CONFIG) -> dict:
    entries = [(adapter(strength), *scored(zh, en)) for strength, zh, en in curve]
    return choose_shipping(config, *scored(1, 1), entries)


def test_the_largest_gain_inside_every_budget_is_chosen_and_confirmed_on_other_items() -> None:
    found = choose((0.25, 0.95, 1.0), (0.5, 0.9, 1.005), (1.0, 0.8, 1.06))
    assert found["best"]["strength"] == 0.5
    assert [p["verdict"] for p in found["points"]] == ["promote", "promote", "reject"]
    assert found["verdict"] == "promote"
    chosen_on = found["points"][1]["capabilities"][0]["n"]
    assert chosen_on + found["confirmed"][0]["n"] == 200
    assert 70 < chosen_on < 130


def test_what_counts_is_the_weighted_gain_of_the_targets() -> None:
    curve = ((0.5, 0.9, 0.9), (1.0, 0.8, 0.95))
    assert choose(*curve, config=EvalConfig(**TWO_TARGETS))["best"]["strength"] == 0.5
    poems_left_out = [TWO_TARGETS["capabilities"][0], TWO_TARGETS["capabilities"][1] | {"weight": 0}]
    assert choose(*curve, config=EvalConfig(capabilities=poems_left_out))["best"]["strength"] == 1.0


def test_where_no_strength_is_inside_none_is_chosen() -> None:
    found = choose((0.5, 0.9, 1.05), (1.0, 0.8, 1.1))
    assert (found["best"], found["verdict"]) == (None, "reject")
    assert "None of them gains anything inside every budget" in found["reason"]
    assert choose((1.0, 1.01, 1.0))["best"] is None, "inside its budgets, but it gains nothing"


def test_halves_are_the_same_for_every_model_and_keep_conversations_whole() -> None:
    items = [ItemScore(task="zh", doc=f"d{i}", prompt="p", nll=1.0, cluster=str(i // 3)) for i in range(300)]
    choosing, confirming = half_of(items, CHOOSES), half_of(items, CONFIRMS)
    assert len(choosing) + len(confirming) == 300
    assert not {i.cluster for i in choosing} & {i.cluster for i in confirming}
    subjects = [ItemScore(task="mmlu", doc=f"d{i}", prompt="p", acc=1.0, cluster="law") for i in range(300)]
    assert half_of(subjects, CHOOSES), "one subject alone has both halves"
    assert half_of(subjects, CONFIRMS)


def test_too_few_items_for_two_halves_are_said() -> None:
    sheet, items = scored(1, 1)
    few = [i for i in items if i.task == "zh"] + [i for i in items if i.task == "en"][:1]
    with pytest.raises(ComparisonError, match="Score more items"):
        choose_shipping(CONFIG, sheet, few, [(adapter(0.5), sheet, few)])
