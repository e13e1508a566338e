"""Deltas and verdicts from score sheets; sheets that must not be compared are refused."""

import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.core.config import EvalConfig, Recipe
from tasks.core.errors import ComparisonError
from tasks.core.manifest import RunManifest
from tasks.core.records import ArtifactRef, ItemScore, ScoreSheet
from tasks.core.stages import Stage
from tasks.core.store import FileStore, put_artifact, stored
from tasks.evaluation.forgetting import ITEMS, compare_runs, compare_scores, read_items
from tasks.evaluation.harness import summarise

ARTIFACT = ArtifactRef(kind="scores", key="k", uri="file:///x", content="c", size_bytes=1)
CONFIG = EvalConfig(
    capabilities=[
        {"name": "chat", "role": "target", "measure": "bits_per_byte", "tasks": ["zh"]},
        {"name": "english", "role": "retention", "measure": "acc", "budget": 5, "tasks": ["en"]},
    ]
)


def text_items(nll: list[float]) -> list[ItemScore]:
    return [
        ItemScore(task="zh", doc=f"d{i}", prompt=f"p{i}", nll=v, size_bytes=100, tokens=50) for i, v in enumerate(nll)
    ]


def choice_items(right: list[bool]) -> list[ItemScore]:
    return [
        ItemScore(task="en", doc=f"d{i}", prompt=f"p{i}", acc=float(r), margin=1.0 if r else -1.0)
        for i, r in enumerate(right)
    ]


def sheet(items: list[ItemScore], **settings: str) -> ScoreSheet:
    names = list(dict.fromkeys(i.task for i in items))
    scores = [summarise(n, [i for i in items if i.task == n], 0.5 if n == "en" else None, "1") for n in names]
    return ScoreSheet(artifact=ARTIFACT, tasks=scores, settings={"dtype": "float32", **settings}, seconds=1)


def compare(before: list[ItemScore], after: list[ItemScore], config: EvalConfig = CONFIG) -> dict:
    return compare_scores(config, sheet(before), before, sheet(after), after)


NLL = [float(v) for v in np.random.default_rng(0).uniform(80, 120, 80)]
RIGHT = [i % 10 != 0 for i in range(600)]


def test_a_gain_without_forgetting_is_promoted() -> None:
    result = compare(text_items(NLL) + choice_items(RIGHT), text_items([v * 0.7 for v in NLL]) + choice_items(RIGHT))
    chat, english = result["capabilities"]
    assert result["verdict"] == "promote"
    assert chat["delta"] == pytest.approx(30)
    assert chat["status"] == "gained"
    assert chat["perplexity_ratio"] == pytest.approx(math.exp(-0.3 * sum(NLL) / (50 * 80)))
    assert english["delta"] == 0
    assert english["low"] < 0 < english["high"], "no flip in 600 items is not certainty"
    assert (english["status"], english["lost_items"], english["gained_items"]) == ("kept", 0, 0)


def test_forgetting_is_negative_and_rejects() -> None:
    after = [r and i % 6 != 1 for i, r in enumerate(RIGHT)]
    result = compare(text_items(NLL) + choice_items(RIGHT), text_items([v * 0.7 for v in NLL]) + choice_items(after))
    english = result["capabilities"][1]
    assert english["delta"] == pytest.approx(100 * (sum(after) - sum(RIGHT)) / 600)
    assert english["delta"] < -5
    assert (english["status"], result["verdict"]) == ("forgot", "reject")
    assert english["margin_delta"] < 0
    assert "english" in result["reason"]


def test_too_few_items_are_inconclusive_and_say_how_many_settle_it() -> None:
    before, after = [True] * 40, [True] * 38 + [False] * 2
    result = compare(text_items(NLL) + choice_items(before), text_items([v * 0.7 for v in NLL]) + choice_items(after))
    assert result["verdict"] == "inconclusive"
    assert result["capabilities"][1]["items_to_settle"] > 40


def test_a_retention_task_at_chance_is_shown_but_does_not_count() -> None:
    guess = [i % 2 == 0 for i in range(600)]
    config = EvalConfig(
        capabilities=[
            *CONFIG.model_dump()["capabilities"],
            {"name": "hard", "role": "retention", "measure": "acc", "tasks": ["hard"]},
        ]
    )

    def hard(right: list[bool]) -> list[ItemScore]:
        return [i.model_copy(update={"task": "hard"}) for i in choice_items(right)]

    before = text_items(NLL) + choice_items(RIGHT) + hard(guess)
    after = text_items([v * 0.7 for v in NLL]) + choice_items(RIGHT) + hard([False] * 600)
    sheets = []
    for items in (before, after):
        one = sheet(items)
        tasks = [t.model_copy(update={"chance": 0.5}) if t.task == "hard" else t for t in one.tasks]
        sheets.append(one.model_copy(update={"tasks": tasks}))
    result = compare_scores(config, sheets[0], before, sheets[1], after)
    assert [(c["name"], c["status"], c["counts"]) for c in result["capabilities"]][-1] == ("hard", "at chance", False)
    assert result["verdict"] == "promote"


def test_other_items_prompts_settings_or_versions_are_refused() -> None:
    items = text_items(NLL) + choice_items(RIGHT)
    with pytest.raises(ComparisonError, match="differ in dtype: float32 before, bfloat16 after"):
        compare_scores(CONFIG, sheet(items), items, sheet(items, dtype="bfloat16"), items)
    other = [items[0].model_copy(update={"doc": "x"}), *items[1:]]
    with pytest.raises(ComparisonError, match="other items or in another order"):
        compare(items, other)
    with pytest.raises(ComparisonError, match="another prompt"):
        compare(items, [items[0].model_copy(update={"prompt": "x"}), *items[1:]])
    with pytest.raises(ComparisonError, match="680 and 679 items"):
        compare(items, items[1:])
    newer = sheet(items).model_copy(
        update={"tasks": [t.model_copy(update={"version": "2"}) for t in sheet(items).tasks]}
    )
    with pytest.raises(ComparisonError, match="version 1 before and 2 after"):
        compare_scores(CONFIG, sheet(items), items, newer, items)


def test_runs_are_compared_in_the_capabilities_whose_tasks_both_have(store: FileStore) -> None:
    def run(name: str, items: list[ItemScore], capabilities: list[dict[str, Any]]) -> RunManifest:
        with store.work_folder() as folder:
            (folder / ITEMS).write_text("".join(item.model_dump_json() + "\n" for item in items))
            fields = sheet(items).model_dump(exclude={"artifact"})
            after = put_artifact(store, Stage("scores", 1, [name], {}), folder, ScoreSheet, fields)
        recipe = {"name": name, "model": {"base": "owner/base"}, "data": {"sources": ["rows.jsonl"]}}
        recipe = Recipe.model_validate({**recipe, "eval": {"capabilities": capabilities}})
        return RunManifest(run_id=name, recipe=recipe, started=datetime(2026, 11, 20, tzinfo=UTC), after=after)

    chat, english = (c.model_dump() for c in CONFIG.capabilities)
    both = run("both", text_items(NLL) + choice_items(RIGHT), [chat, english])
    other = run("other", choice_items(RIGHT[::-1]) + text_items([v * 0.9 for v in NLL]), [chat, english])
    assert [d.name for d in compare_runs(store, both, other).capabilities] == ["chat", "english"], "in whatever order"
    wider = other.model_copy(
        update={"recipe": run("w", choice_items(RIGHT), [chat, {**english, "tasks": ["en", "x"]}]).recipe}
    )
    assert [d.name for d in compare_runs(store, wider, both).capabilities] == ["chat"], "x was not scored"
    alone = run("alone", text_items([v * 0.7 for v in NLL]), [chat])
    found = compare_runs(store, both, alone)
    assert [(d.name, round(d.delta)) for d in found.capabilities] == [("chat", 30)]
    assert [d.name for d in compare_runs(store, alone, both).capabilities] == ["chat"]
    with pytest.raises(ComparisonError, match="alone against words: they have no capability with the same tasks"):
        compare_runs(store, run("words", choice_items(RIGHT), [{**english, "role": "target", "budget": None}]), alone)


def test_a_measure_that_a_task_does_not_give_is_said() -> None:
    config = EvalConfig(capabilities=[{"name": "chat", "role": "target", "measure": "acc", "tasks": ["zh"]}])
    with pytest.raises(ComparisonError, match="Task zh gives no acc"):
        compare(text_items(NLL), text_items(NLL), config)


def test_a_base_that_solves_nothing_cannot_forget_it() -> None:
    config = EvalConfig(
        capabilities=[
            {"name": "chat", "role": "target", "measure": "bits_per_byte", "tasks": ["zh"]},
            {"name": "sums", "role": "retention", "measure": "exact_match", "budget": 5, "tasks": ["gsm"]},
        ]
    )

    def solved(count: int) -> list[ItemScore]:
        return [ItemScore(task="gsm", doc=f"g{i}", prompt=f"g{i}", exact_match=float(i < count)) for i in range(60)]

    after = text_items([v * 0.7 for v in NLL])
    never = compare(text_items(NLL) + solved(0), after + solved(0), config)
    assert (never["capabilities"][1]["status"], never["capabilities"][1]["counts"]) == ("at chance", False)
    some = compare(text_items(NLL) + solved(30), after + solved(10), config)
    assert (some["capabilities"][1]["status"], some["verdict"]) == ("forgot", "reject")


def test_items_with_every_kind_of_line_end_are_read_back(store: FileStore) -> None:
    question = "One\u2028two\u2029three\x85four\x0bfive\x0csix\x1cseven\nand eight"
    item = ItemScore(task="t", doc="d", prompt="p", acc=1.0, question=question)

    def make(folder: Path) -> dict[str, Any]:
        (folder / ITEMS).write_text(f"{item.model_dump_json()}\n" * 2, encoding="utf-8")
        return {"tasks": [], "settings": {}, "seconds": 1.0}

    sheet = stored(store, Stage("scores", 1, [], {}), ScoreSheet, make)
    assert read_items(store, sheet) == [item, item]
