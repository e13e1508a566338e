"""What moved and what to change: each rule on a few items, and any mix of measures without a failure."""

import random
from typing import Any

import pytest

from tasks.core.config import Recipe
from tasks.core.errors import ComparisonError
from tasks.core.records import (
    AdapterRef,
    ArtifactRef,
    CombinedPart,
    CombinedRef,
    Delta,
    ForgettingReport,
    ItemScore,
    TrainPoint,
)
from tasks.evaluation.explain import Explanation, explain

ARTIFACT = ArtifactRef(kind="x", key="k", uri="file:///x", content="c", size_bytes=1)
TARGET = {"name": "chat", "role": "target", "measure": "bits_per_byte", "tasks": ["zh"]}
ENGLISH = {"name": "english", "role": "retention", "measure": "acc", "budget": 5, "tasks": ["en"]}
TEXT = {"name": "text", "role": "retention", "measure": "bits_per_byte", "budget": 1, "tasks": ["passages"]}
QUIET = {"method": "lora", "rank": 8, "learning_rate": 2e-4, "target_modules": ["q_proj"]}  # nothing to object to
REPLAY = {"share": 0.2, "prompts": "prompts.txt"}


def recipe(
    train: dict[str, Any] | None = None, replay: dict[str, Any] | None = None, limit: int | None = None, **changes: Any
) -> Recipe:
    return Recipe(
        name="r",
        model={"base": "owner/name"},
        data={"sources": ["rows.jsonl"], "replay": replay},
        train={**QUIET, **(train or {})},
        eval={"capabilities": [TARGET, ENGLISH, TEXT], "limit": limit, **changes},
    )


def delta(name: str, status: str, change: float = 0.0, **fields: Any) -> Delta:
    capability = {c["name"]: c for c in (TARGET, ENGLISH, TEXT)}[name]
    return Delta(
        **{
            "name": name,
            "role": capability["role"],
            "measure": capability["measure"],
            "unit": "%" if capability["measure"] == "bits_per_byte" else "points",
            "before": 0.5,
            "after": 0.5,
            "delta": change,
            "low": change - 1,
            "high": change + 1,
            "n": 100,
            "primary": name == "chat",
            "budget": capability.get("budget"),
            "status": status,
            **fields,
        }
    )


def adapter(validation: list[float], train: list[float] | None = None, **fields: Any) -> AdapterRef:
    """A training of ten steps to a validation, with its losses."""
    curve = [TrainPoint(step=10 * i, validation_loss=v) for i, v in enumerate(validation)]
    curve += [TrainPoint(step=i + 1, loss=v) for i, v in enumerate(train or [])]
    return AdapterRef(
        **{
            "artifact": ARTIFACT,
            "method": "lora",
            "trainable_parameters": 1234,
            "steps": 10 * (len(validation) - 1),
            "tokens": 1,
            "supervised_tokens": 1,
            "dropped_too_long": 0,
            "seconds": 1,
            "dtype": "float32",
            "first_validation_loss": validation[0],
            "last_validation_loss": validation[-1],
            "curve": sorted(curve, key=lambda p: p.step),
            **fields,
        }
    )


def report(*deltas: Delta, verdict: str = "reject") -> dict[str, Any]:
    return {"capabilities": [d.model_dump() for d in deltas], "tasks": [], "verdict": verdict, "reason": ""}


def advise(
    recipe: Recipe, *deltas: Delta, adapter: AdapterRef | None = None, verdict: str = "reject"
) -> list[tuple[str, str]]:
    """Return advice as (what, why)."""
    advice = explain(recipe, [], [], report(*deltas, verdict=verdict), adapter).advice
    assert len({a.what for a in advice}) == len(advice)
    return [(a.what, a.why) for a in advice]


def whats(*args: Any, **kwargs: Any) -> str:
    return "\n".join(what for what, _ in advise(*args, **kwargs))


FORGOT = delta("english", "forgot", -8)
UNCLEAR = delta("chat", "unclear", 0.5)
GAINED = delta("chat", "gained", 20)
FALLING, FLAT, RISING = [3.0, 2.5, 2.0], [3.0, 2.5, 2.5], [3.0, 2.0, 2.4]


# What to do


def test_forgetting_without_replay_asks_for_replay_and_a_weaker_adapter() -> None:
    first, second = advise(recipe(), GAINED, FORGOT, adapter=adapter(FLAT))
    assert first[0].startswith("Set data.replay.share=0.1, with data.replay.sources")
    assert "english changed by -8.00 points (95 % interval -9.00 to -7.00) against a budget of 5 points" in first[1]
    assert second[0] == "Run `forgetless strength RUN` and set export.strength to its best, now 1."


def test_replay_that_is_there_is_raised_up_to_half() -> None:
    assert "Set data.replay.share=0.4, now 0.2." in whats(recipe(replay=REPLAY), GAINED, FORGOT)
    assert "Set data.replay.share=0.1, now 0." in whats(recipe(replay={**REPLAY, "share": 0}), GAINED, FORGOT)
    assert "replay" not in whats(recipe(replay={**REPLAY, "share": 0.5}), GAINED, FORGOT)


@pytest.mark.parametrize(
    ("method", "rate", "advised"),
    [
        ("lora", 1.5e-3, "0.0005"),
        ("lora", 9e-4, None),
        ("qlora", 6e-4, "0.0002"),
        ("full", 6e-5, "2e-05"),
        ("prefix", 0.1, None),
    ],
)
def test_a_high_learning_rate_is_lowered_to_a_third(method: str, rate: float, advised: str | None) -> None:
    said = whats(recipe({"method": method, "learning_rate": rate}), GAINED, FORGOT)
    assert (f"Set train.learning_rate={advised}, now {rate:g}." in said) == (advised is not None)
    assert ("learning_rate" in said) == (advised is not None)


def test_a_rising_validation_loss_comes_first_and_asks_for_less_training() -> None:
    learned = adapter(RISING, onset=10)
    what, why = advise(recipe({"epochs": 4}), GAINED, FORGOT, adapter=learned)[0]
    assert what == "Set train.early_stopping=2, or train.epochs=2."
    assert why == (
        "The validation loss was lowest at step 10 (2.000) and rose to 2.400 by step 20: the rows are learned by heart."
    )
    assert advise(recipe({"epochs": 1}), GAINED, FORGOT, adapter=learned)[0][0] == "Set train.early_stopping=2."
    assert "Set train.early_stopping=2." in whats(recipe({"max_steps": 20}), UNCLEAR, adapter=learned)
    assert "early_stopping" not in whats(recipe({"early_stopping": 3}), GAINED, FORGOT, adapter=learned)
    assert "early_stopping" not in whats(recipe(), GAINED, FORGOT, adapter=adapter(FLAT))


def test_a_validation_loss_that_only_rose_asks_for_a_lower_rate() -> None:
    what, why = advise(recipe({"learning_rate": 9e-4}), UNCLEAR, adapter=adapter([2.0, 2.2, 2.5]))[0]
    assert what == "Set train.learning_rate=0.0003, now 0.0009."
    assert "never fell below where it began, 2.000, and ended at 2.500" in why


def test_size_is_the_last_resort_and_keeps_the_scale() -> None:
    big = recipe({"rank": 64, "alpha": 128, "target_modules": "all-linear"}, REPLAY)
    said = advise(big, GAINED, FORGOT, adapter=adapter(FLAT))
    assert said[-2][0] == "Set train.rank=16 and train.alpha=32."
    assert "(1,234 weights)" in said[-2][1]
    assert said[-1][0].startswith("Set train.target_modules=[q_proj, k_proj, v_proj, o_proj]")
    assert "rank" not in whats(recipe(), GAINED, FORGOT)


def combined(by: str) -> CombinedRef:
    parts = [CombinedPart(artifact=ARTIFACT, method="lora", run=run, weight=1) for run in ("a", "b")]
    return CombinedRef(artifact=ARTIFACT, method="lora", by=by, parts=parts)


def test_a_combination_is_advised_on_its_weights_and_never_on_training() -> None:
    hot = recipe({"learning_rate": 9e-3, "rank": 64, "target_modules": "all-linear"})
    weak = delta("chat", "unclear", -0.5)
    first, second, third = advise(hot, weak, FORGOT, adapter=combined("linear"))
    assert first[0] == "Combine again with --method cat."
    assert "linear also multiplies factors of different adapters" in first[1]
    assert second[0] == "Run `forgetless strength RUN`, and combine again with every weight times its best."
    assert third[0] == "Combine again with a larger weight for the run that taught chat."
    assert third[1].endswith("with the weights 1 of a, 1 of b.")
    assert len(advise(hot, weak, FORGOT, adapter=combined("cat"))) == 2
    assert advise(hot, GAINED, adapter=combined("linear"), verdict="promote") == []


def test_full_training_is_told_of_lora_and_virtual_tokens_not_of_strength() -> None:
    assert "Set train.method=lora." in whats(recipe({"method": "full", "learning_rate": 1e-5}), GAINED, FORGOT)
    assert "strength" not in whats(recipe({"method": "prompt"}), GAINED, FORGOT)


def test_too_few_items_ask_for_more() -> None:
    few = delta("english", "inconclusive", -4.5, items_to_settle=900)
    ((what, why),) = advise(recipe(), GAINED, few, verdict="inconclusive")
    assert what == "Add items or tasks to english in eval.capabilities, to about 900 items."
    assert "about 900 items, not 100, would settle it if nothing truly changed" in why
    text = delta("text", "inconclusive", items_to_settle=1000)
    ((what, why),) = advise(recipe(limit=50), GAINED, few, text, verdict="inconclusive")
    assert what == "Set eval.limit=500, now 50.", "one limit for all: that of the capability which lacks most"
    assert why.startswith("text")


def test_a_loss_too_close_to_call_asks_for_a_weaker_adapter_not_for_items() -> None:
    ((what, why),) = advise(recipe(), GAINED, delta("english", "inconclusive", -5), verdict="inconclusive")
    assert "export.strength" in what
    assert why.startswith("english changed by -5.00 points")


def test_no_gain_with_a_falling_loss_asks_for_more_training() -> None:
    said = advise(recipe({"epochs": 0.5}), UNCLEAR, adapter=adapter(FALLING), verdict="inconclusive")
    assert said[0][0] == "Set train.epochs=1, now 0.5."
    assert "still fell at the end, 2.500 to 2.000, and chat changed by +0.50 %" in said[0][1]
    assert said[-1][0] == "Set train.learning_rate=0.0004, now 0.0002."
    assert "Set train.max_steps=40, now 20." in whats(recipe({"max_steps": 20}), UNCLEAR, adapter=adapter(FALLING))
    late = adapter(FALLING, ended="time limit")
    assert "Set train.max_minutes=3, now 1.5." in whats(recipe({"max_minutes": 1.5}), UNCLEAR, adapter=late)
    assert "epochs" not in whats(recipe({"epochs": 100}), UNCLEAR, adapter=adapter(FALLING))
    assert "epochs" not in whats(recipe(), GAINED, adapter=adapter(FALLING))


def test_what_forgot_is_not_told_to_train_more() -> None:
    said = whats(recipe(), UNCLEAR, FORGOT, adapter=adapter(FALLING, [2.0] * 16))
    assert "epochs" not in said
    assert "rank" not in said
    assert "learning_rate" not in said
    assert "data.replay" in said


def test_a_training_loss_that_stands_asks_for_rank() -> None:
    stands = adapter(FLAT, [3.0] * 8 + [2.0] * 8)
    assert "Set train.rank=16 and train.alpha=64." in whats(recipe(), UNCLEAR, adapter=stands)
    assert "rank" not in whats(recipe({"rank": 32}), UNCLEAR, adapter=stands)
    assert "rank" not in whats(recipe(), UNCLEAR, adapter=adapter(FLAT, [3.0 - 0.1 * i for i in range(16)]))


def test_a_gain_that_may_be_chance_asks_for_items_unless_it_is_next_to_none() -> None:
    ((what, _),) = advise(recipe(), UNCLEAR, verdict="inconclusive")
    assert what == "Add items or tasks to chat in eval.capabilities, to about 817 items."  # 100 x (2.8 / 1.96 x 2)^2
    assert advise(recipe(), delta("chat", "unclear", 0.01), verdict="inconclusive") == []
    assert advise(recipe(), delta("chat", "unclear", -0.5), verdict="inconclusive") == []


def test_a_task_at_chance_asks_for_an_easier_one() -> None:
    said = advise(recipe(), GAINED, delta("english", "at chance", counts=False), verdict="inconclusive")
    assert said[-1][0] == "Choose easier tasks for english in eval.capabilities."
    assert "0.500, no better than a guess: it cannot forget what it does not know" in said[-1][1]


def test_a_promoted_run_hears_at_most_what_is_closest_to_its_budget() -> None:
    near = delta("text", "kept", 0.2)  # low end -0.8 of 1
    ((what, why),) = advise(recipe(), GAINED, delta("english", "kept"), near, verdict="promote")
    assert what.startswith("Watch text first")
    assert "80 % of it" in why
    assert advise(recipe(), GAINED, delta("english", "kept"), verdict="promote") == []


def test_equal_keys_are_advised_once() -> None:
    said = advise(recipe({"learning_rate": 3e-3}), GAINED, FORGOT, adapter=adapter([2.0, 2.2, 2.5]))
    assert [what for what, _ in said if "learning_rate" in what] == ["Set train.learning_rate=0.001, now 0.003."]
    both = advise(recipe(), GAINED, FORGOT, delta("text", "forgot", -4))
    assert all("english" in why and "text" in why for _, why in both)


# What moved


def choices(right: list[bool], task: str = "en", cluster: str | None = None, margin: float = 1.0) -> list[ItemScore]:
    return [
        ItemScore(
            task=task,
            doc=f"{cluster}{i}",
            prompt="p",
            cluster=cluster,
            acc=float(r),
            margin=margin * (1 + i) * (1 if r else -1),
            question=f"Question {i}?",
            expected="yes",
            answered="yes" if r else "no",
        )
        for i, r in enumerate(right)
    ]


def texts(nll: list[float], task: str = "zh", cluster: str | None = None) -> list[ItemScore]:
    return [
        ItemScore(task=task, doc=f"d{i}", prompt="p", cluster=cluster, nll=v, size_bytes=100, question=f"Text {i}")
        for i, v in enumerate(nll)
    ]


def look(before: list[ItemScore], after: list[ItemScore], *deltas: Delta, **changes: Any) -> Explanation:
    return explain(recipe(**changes), before, after, report(*(deltas or (GAINED, FORGOT))), None)


def test_tasks_are_sorted_by_change_with_intervals() -> None:
    seen = look(
        texts([100.0 + i for i in range(10)]) + choices([True] * 20),
        texts([80.0 + i for i in range(10)]) + choices([True] * 15 + [False] * 5),
    )
    english, chat = seen.moved
    assert (english.task, english.subject, english.unit, english.n) == ("en", None, "points", 20)
    assert (english.before, english.after, english.delta) == (1, 0.75, pytest.approx(-25))
    assert (english.lost_items, english.gained_items) == (5, 0)
    assert english.low is not None and english.high is not None and english.low < -25 < english.high
    assert chat.delta == pytest.approx(100 * 200 / 1045)
    assert chat.before > chat.after
    assert chat.lost_items is None
    assert seen.note == ""


def test_subjects_of_five_items_are_shown_at_most_ten_and_called_descriptive() -> None:
    before, after = [], []
    for number in range(14):
        before += choices([True] * 10, cluster=f"s{number:02}")
        after += choices([i >= number for i in range(10)], cluster=f"s{number:02}")
    before += choices([True] * 4, cluster="small")
    after += choices([False] * 4, cluster="small")
    seen = look(before, after)
    assert [m.subject for m in seen.moved] == ["s10", "s11", "s12", "s13", *(f"s{n:02}" for n in range(9, 3, -1))]
    assert "14 subjects and tasks, 10 shown" in seen.note
    assert "descriptive, not corrected" in seen.note


def test_one_subject_is_its_task_and_few_items_have_no_interval() -> None:
    (moved,) = look(choices([True] * 4, cluster="one"), choices([False] * 4, cluster="one")).moved
    assert (moved.subject, moved.n, moved.delta) == (None, 4, -100)
    assert (moved.low, moved.high) == (None, None)
    assert look(texts([100.0]), texts([90.0])).moved == []


def test_conversations_are_not_subjects() -> None:
    chat = {**TARGET, "tasks": [{"name": "zh", "conversations": "zh.jsonl"}]}
    before = texts([100.0] * 6, cluster="0") + texts([100.0] * 6, cluster="1")
    after = texts([90.0] * 6, cluster="0") + texts([80.0] * 6, cluster="1")
    seen = look(before, after, capabilities=[chat])
    assert [m.subject for m in seen.moved] == [None]
    assert {i.subject for i in seen.items} == {None}


def test_items_lost_and_gained_are_those_with_the_largest_change() -> None:
    before = texts([100.0, 100, 100, 100]) + choices([True] * 8 + [False])
    after = texts([90.0, 70, 101, 80]) + choices([False] * 7 + [True] * 2)
    seen = look(before, after)
    gained = [i for i in seen.items if i.kind == "gained"]
    lost = [i for i in seen.items if i.kind == "lost"]
    assert [(i.question, i.change) for i in gained] == [("Text 1", 30), ("Text 3", 20), ("Text 0", 10)]
    assert [i.question for i in lost] == [f"Question {n}?" for n in (6, 5, 4, 3, 2)]
    assert (lost[0].expected, lost[0].before, lost[0].after, lost[0].change) == ("yes", "yes", "no", -14)


def test_lost_texts_go_by_log_likelihood() -> None:
    seen = look(texts([100.0, 100, 100], "passages"), texts([101.0, 130, 90], "passages"), delta("text", "forgot", -7))
    assert [(i.question, i.change) for i in seen.items] == [("Text 1", -30), ("Text 0", -1)]


def test_a_measure_of_which_less_is_better_turns_round() -> None:
    before, after = ([ItemScore(task="en", doc=str(i), prompt="p", refused=r) for i in range(9)] for r in (0.0, 1.0))
    seen = look(before, after, capabilities=[TARGET, {**ENGLISH, "measure": "refused"}])
    assert (seen.moved[0].delta, seen.moved[0].lost_items) == (-100, 9)
    assert [i.kind for i in seen.items] == ["lost"] * 5


def test_tasks_at_chance_are_left_out() -> None:
    hidden = look(choices([True] * 9), choices([False] * 9), delta("english", "at chance", counts=False))
    assert (hidden.moved, hidden.items) == ([], [])
    part = delta("english", "forgot", -9, tasks=["en"])
    english = {**ENGLISH, "tasks": ["en", "hard"]}
    before, after = (choices([r] * 9) + choices([r] * 9, "hard") for r in (True, False))
    assert [m.task for m in look(before, after, part, capabilities=[TARGET, english]).moved] == ["en"]


def test_other_items_are_refused() -> None:
    with pytest.raises(ComparisonError, match="Score the base again"):
        look(choices([True] * 5), choices([True] * 4))


def test_a_report_is_as_good_as_its_fields() -> None:
    before, after = choices([True] * 9), choices([False] * 9)
    fields = report(GAINED, FORGOT)
    whole = explain(recipe(), before, after, ForgettingReport(artifact=ARTIFACT, **fields), None)
    assert whole == explain(recipe(), before, after, fields, None)


@pytest.mark.parametrize("seed", range(60))
def test_any_mix_of_measures_and_missing_fields_is_explained(seed: int) -> None:
    rng = random.Random(seed)

    def maybe(value: Any, share: float = 0.3) -> Any:
        return None if rng.random() < share else value

    def item(task: str, i: int, cluster: str | None) -> ItemScore:
        return ItemScore(
            task=task,
            doc=str(i),
            prompt="p",
            cluster=cluster,
            acc=maybe(rng.choice([0.0, 1.0, rng.random()])),
            acc_norm=maybe(float(rng.random() < 0.5)),
            exact_match=maybe(float(rng.random() < 0.5)),
            f1=maybe(rng.random()),
            refused=maybe(float(rng.random() < 0.5)),
            margin=maybe(rng.uniform(-5, 5), rng.choice([0, 0.3])),
            nll=maybe(rng.choice([0.0, rng.uniform(0, 200)])),
            size_bytes=maybe(rng.randrange(0, 100)),
            tokens=maybe(rng.randrange(10, 50)),
            question=maybe("q"),
        )

    names = ["zh", "en", "passages"]
    plan = [(rng.choice(names), i, maybe(rng.choice("abc"))) for i in range(rng.choice([0, 1, 3, 40]))]
    before, after = ([item(*one) for one in plan] for _ in range(2))
    capabilities = [
        {**c, "measure": rng.choice(["acc", "acc_norm", "exact_match", "bits_per_byte", "f1", "refused"])}
        for c in (TARGET, ENGLISH, TEXT)
    ]
    statuses = {
        "target": ["gained", "lost", "unclear"],
        "retention": ["kept", "forgot", "inconclusive", "at chance"],
    }
    deltas = [
        delta(
            c["name"],
            rng.choice(statuses[c["role"]]),
            rng.uniform(-9, 9),
            n=rng.randrange(1, 50),
            items_to_settle=maybe(rng.randrange(1, 5000)),
            counts=rng.random() < 0.8,
            tasks=rng.choice([[], c["tasks"], ["gone"]]),
        )
        for c in capabilities
        if rng.random() < 0.9
    ]
    losses = [rng.uniform(0, 4) for _ in range(rng.randrange(1, 12))]
    method = rng.choice(["lora", "qlora", "int8", "oft", "prefix", "prompt", "full"])
    train = {
        "method": method,
        "rank": rng.choice([2, 16, 64]),
        "learning_rate": rng.choice([0, 1e-5, 1e-3]),
        "target_modules": rng.choice(["all-linear", ["q_proj"]]),
        "max_steps": maybe(10),
        "max_minutes": maybe(1),
        "early_stopping": maybe(2),
    }
    trained = adapter(losses, maybe(losses * 3), ended=rng.choice(["finished", "early stopping", "time limit"]))
    seen = explain(
        recipe(train, maybe(REPLAY), maybe(20), capabilities=capabilities),
        before,
        after,
        report(*deltas, verdict=rng.choice(["promote", "reject", "inconclusive"])),
        maybe(rng.choice([trained, trained.model_copy(update={"curve": []})])),
    )
    assert len(seen.moved) <= 10
    assert len(seen.items) <= 13
    assert len({a.what for a in seen.advice}) == len(seen.advice)
    assert Explanation.model_validate_json(seen.model_dump_json()) == seen
