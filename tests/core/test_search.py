"""What a sweep tries is settled by its seed and results, and every problem of every trial is said before it starts."""

import json
import math
import sys
from pathlib import Path

import pytest
import yaml

from tasks.core.config import SweepConfig, load_search
from tasks.core.errors import ConfigError
from tasks.core.search import as_overrides, draw_point, plan_search, propose_point, read_axes, sweep_id

RATE = "train.learning_rate=1e-4:1e-2:log"


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    settings = {
        "name": "tiny",
        "model": {"base": "owner/name"},
        "data": {"sources": "rows.json"},
        "train": {"method": "lora"},
        "eval": {"capabilities": [{"name": "chat", "role": "target", "tasks": ["piqa"]}]},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def search(**given: object) -> SweepConfig:
    return load_search(given)


def test_a_grid_is_every_combination_of_its_values_as_yaml_reads_them(recipe: str) -> None:
    asked = search(
        grid=["train.rank=4,8", "train.learning_rate=2e-4, 1e-3", "train.target_modules=all-linear,[q_proj]"]
    )
    found = plan_search(recipe, [], None, asked)
    assert len(found.known) == 8
    first = {"train.rank": 4, "train.learning_rate": 2e-4, "train.target_modules": "all-linear"}
    assert found.known[0] == first
    assert found.known[-1]["train.target_modules"] == ["q_proj"]
    assert as_overrides(first) == ["train.learning_rate=0.0002", "train.rank=4", 'train.target_modules="all-linear"']


def test_random_settings_lie_in_their_ranges_and_follow_from_the_seed_alone(recipe: str) -> None:
    asked = search(random=[RATE, "train.rank=4:16"], grid=["train.dora=true,false"], trials=40)
    known = plan_search(recipe, [], None, asked).known
    assert known == plan_search(recipe, [], None, asked).known
    assert known[:10] == plan_search(recipe, [], None, asked.model_copy(update={"trials": 10})).known
    assert known != plan_search(recipe, [], None, asked.model_copy(update={"seed": 1})).known
    assert len({json.dumps(values) for values in known}) == 40
    rates = [values["train.learning_rate"] for values in known]
    assert all(1e-4 <= rate <= 1e-2 for rate in rates)
    assert 10 < sum(rate < 1e-3 for rate in rates) < 30, "uniform in the logarithm: half of them below its middle"
    ranks = {values["train.rank"] for values in known}
    assert ranks <= set(range(4, 17)) and all(isinstance(rank, int) for rank in ranks)
    assert {values["train.dora"] for values in known} == {True, False}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"grid": ["train.rnk=4,8"]}, ["tiny.yaml: train.rnk: unknown key; did you mean 'rank'?"]),
        (
            {"grid": ["train.rank=0,8,5000", "train.lora_dropout=0,2"]},
            [
                "train.rank: input should be greater than or equal to 1, found 0.",
                "train.rank: input should be less than or equal to 1024, found 5000.",
                "train.lora_dropout: input should be less than 1, found 2.",
            ],
        ),
        ({"grid": ["train.method=lora,oft", "train.dora=true,false"]}, ["dora: only for method lora, qlora or int8"]),
        (
            {"random": ["train.learning_rate=0.5:2"], "optuna": True, "trials": 5},
            ["train.learning_rate: input should be less than 1, found 2.0."],
        ),
        ({"grid": ["train.rank"]}, ["--grid 'train.rank': expected key=value,value, such as train.rank=4,8."]),
        (
            {"random": ["train.rank=8:4", "train.alpha=0:4:log"], "trials": 2},
            ["--random 'train.rank=8:4': expected key=low:high", "--random 'train.alpha=0:4:log': expected"],
        ),
        ({"grid": ["train.rank=4", "train.rank=8"]}, ["train.rank is named twice"]),
        (
            {"grid": ["eval.limit=3,4", "model.base=a/b,c/d", "export.ollama=true,false"]},
            ["eval.limit: a sweep cannot vary it", "make a sweep for each", "export.ollama: a sweep cannot vary it"],
        ),
        ({"grid": ["train.seed=1,2"], "seeds": 3}, ["train.seed: --seeds varies it already."]),
        ({"grid": ["data.sources=a.json,b.json"], "prune": True}, ["data.sources: --prune compares validation losses"]),
        ({"grid": ["train.rank=4,8"], "optuna": True, "trials": 3}, ["only 2 settings to try, not 3"]),
        ({"grid": ["train.method=lora,prefix"], "strengths": [0.5]}, ["train.method prefix changes none"]),
    ],
)
def test_every_problem_is_said_before_anything_starts(recipe: str, given: dict, told: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        plan_search(recipe, [], None, search(**given))
    assert [sentence for sentence in told if sentence not in str(raised.value)] == []
    assert len(raised.value.problems) == len(set(raised.value.problems))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "expected a key to try"),
        ({"random": [RATE]}, "random and optuna need trials"),
        ({"grid": ["train.rank=4"], "trials": 2}, "a grid tries all its settings"),
        ({"grid": ["train.rank=4"], "strengths": [3]}, "strengths.0"),
    ],
)
def test_what_does_not_go_together_is_said(given: dict, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        search(**given)


def test_optuna_is_missed_before_anything_starts(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"not installed: pip install 'forgetless\[sweep\]'"):
        plan_search(recipe, [], None, search(random=[RATE], optuna=True, trials=2))


def test_scales_of_the_adapter_may_be_swept(recipe: str) -> None:
    assert len(plan_search(recipe, [], None, search(grid=["export.strength=0.5,1"])).known) == 2


def test_a_sweep_keeps_its_name_when_it_goes_on_and_changes_it_with_what_it_reads(recipe: str) -> None:
    def name(contents: list[str], overrides: list[str], **given: object) -> str:
        asked = search(random=[RATE], **{"trials": 4, **given})
        return sweep_id(plan_search(recipe, overrides, None, asked), asked, contents)

    first = name(["c"], [])
    assert first.startswith("tiny-") and first == name(["c"], [], trials=9, seeds=3, strengths=[0.5])
    others = {name(["d"], []), name(["c"], ["train.rank=2"]), name(["c"], [], seed=1), name(["c"], [], optuna=True)}
    assert len({first, *others}) == 5


def test_optuna_proposes_the_same_after_the_same_results_and_moves_to_what_is_better() -> None:
    axes = read_axes(
        search(random=[RATE, "train.rank=4:64:log"], grid=["train.target_modules=all-linear,[q]"], trials=1)
    )

    def result(values: dict) -> tuple[dict, float, float]:
        distance = abs(math.log10(values["train.learning_rate"]) + 2.2)
        return values, -distance, distance

    done: list = []
    for number in range(24):
        done.append(result(propose_point(axes, 3, number, done)))
    resumed: list = done[:9]
    for number in range(9, 24):
        resumed.append(result(propose_point(axes, 3, number, resumed)))
    assert resumed == done
    assert {json.dumps(values["train.target_modules"]) for values, _, _ in done} == {'"all-linear"', '["q"]'}
    drawn = [result(draw_point(axes, f"x{number}")) for number in range(200)]
    modelled = [distance for _, _, distance in done[8:]]
    by_chance = [distance for _, _, distance in drawn]
    assert sum(modelled) / len(modelled) < 0.6 * sum(by_chance) / len(by_chance)
