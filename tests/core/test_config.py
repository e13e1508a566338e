"""Recipes: every shipped one parses; every error is reported at once, with the nearest valid key."""

from pathlib import Path

import pytest

from tasks.core.config import RECIPES, load_recipe, load_suites, shipped_recipes, shipped_suites
from tasks.core.errors import ConfigError

MINIMAL = """
name: mini
model: {base: owner/name}
data: {sources: rows.jsonl}
eval:
  capabilities:
    - {name: gain, role: target, tasks: [{name: t, choices: t.jsonl}]}
"""


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


MIXED_UNITS = """    - {name: chat, role: target, weight: 1, measure: bits_per_byte, tasks: [{name: zh, texts: t}]}
"""


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_parses_and_its_files_exist(name: str) -> None:
    recipe = load_recipe(name)
    files = [t.file for c in recipe.eval.capabilities for t in c.tasks if t.file]
    assert recipe.name == name
    assert all(Path(file).is_file() for file in files)
    local = [Path(s.path) for s in recipe.data.sources if Path(s.path).is_absolute()]  # others: the Hub, an address
    assert all(path.is_file() for path in local)


def test_paths_are_relative_to_the_recipe_and_ids_stay_ids(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL))
    assert recipe.model.base == "owner/name"
    assert recipe.data.sources[0].path == str(tmp_path / "rows.jsonl")
    assert recipe.eval.capabilities[0].tasks[0].choices == str(tmp_path / "t.jsonl")


def test_data_on_the_command_line_is_relative_to_where_the_user_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe("quickstart", data="mine.json").data.sources[0].path == str(tmp_path / "mine.json")


def test_overrides_reach_nested_keys() -> None:
    recipe = load_recipe("quickstart", ["train.rank=4", "train.learning_rate=2e-4", "data.sources.path=x"][:2])
    assert recipe.train.rank == 4
    assert recipe.train.learning_rate == pytest.approx(2e-4)


def test_all_problems_are_reported_at_once_with_the_nearest_key() -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("quickstart", ["train.learning_rat=1e-4", "train.rank=0", "eval.limit=none-of-it", "nonsense"])
    text = str(caught.value)
    assert "train.learning_rat: unknown key; did you mean 'learning_rate'?" in text
    assert "train.rank: input should be greater than or equal to 1, found 0." in text
    assert "eval.limit" in text
    assert "--set 'nonsense': expected section.key=value" in text
    assert len(caught.value.problems) == 4


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'quickstart'"):
        load_recipe("quikstart")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [", "recipe.yaml:1:8: not valid YAML"),
        ("- a\n- b\n", "a recipe is a mapping with name, model, data and eval; found a list"),
        (MINIMAL + "train: {max_tokens: 4096}", "max_tokens (4096) must not exceed pack_tokens (2048)"),
        (MINIMAL.replace("role: target", "role: retention"), "at least one capability needs role: target"),
        (MINIMAL.replace("role: target", "role: target, budget: 3"), "only a retention capability has a budget"),
        (MINIMAL.replace("role: target", "role: retention, weight: 1"), "has a budget to keep and no weight"),
        (MINIMAL + MIXED_UNITS, "gains in % and in points, which cannot be added: give those measured unlike"),
        (MINIMAL.replace("data: {sources: rows.jsonl}", ""), "data: required, but missing."),
        (MINIMAL + "export: {serve: q6_k}", "serve: q6_k is not among quantisations"),
        (
            MINIMAL + "export: {ollama_parameters: {temprature: 1, num_ctx: 2k, stop: []}}",
            "export.ollama_parameters: it would fail in Ollama: "
            "Ollama has no parameter 'temprature'; did you mean temperature? "
            "Ollama's parameter 'num_ctx' must be a whole number; found '2k'. "
            "Ollama's parameter 'stop' must be texts that are not empty; found [].",
        ),
        (MINIMAL + "export: {ollama_name: a:b}", "export.ollama_name: expected [namespace/]model, of at most 80"),
        (MINIMAL + "export: {ollama_alias: Cloud}", "expected a tag other than cloud, local and 8 hexadecimal digits"),
        (
            MINIMAL + "export: {ollama_alias: deadbeef}",
            "expected a tag other than cloud, local and 8 hexadecimal digits",
        ),
    ],
)
def test_a_wrong_recipe_gets_a_sentence(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(write(tmp_path, text))
    assert message in str(caught.value)


def test_the_recipes_folder_is_the_one_that_is_shipped() -> None:
    assert (RECIPES / "quickstart.yaml").is_file()


def test_suites_come_before_a_recipes_own_capabilities(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "capabilities: [{name: shop, role: target, tasks: [{name: q, questions: q.md}]}]\nbuiltin_tasks: true\n"
        "task_folders: [evals]\n"
    )
    recipe = tmp_path / "r.yaml"
    recipe.write_text(MINIMAL.replace("eval:", "eval:\n  task_folders: [own]\n  suites: [mine.yaml, english]"))
    config = load_recipe(str(recipe)).eval
    assert [c.name for c in config.capabilities][:2] == ["shop", "english_knowledge"]
    assert config.capabilities[0].tasks[0].questions == str(tmp_path / "q.md"), "relative to the suite"
    assert config.builtin_tasks
    assert config.task_folders == [str(tmp_path / "own"), str(tmp_path / "evals")], "a suite's are added"
    assert len(config.capabilities) > 5, "the recipe's own come after them"


@pytest.mark.parametrize("name", shipped_suites())
def test_every_shipped_suite_is_valid(name: str) -> None:
    tasks = [t for c in load_suites([name]).capabilities for t in c.tasks]
    assert all(Path(t.file).is_file() for t in tasks if t.file)
    assert all(t.file or load_suites([name]).builtin_tasks for t in tasks)


def test_rows_of_benchmarks_are_found_by_name(tmp_path: Path) -> None:
    for place in ("a/ceval/val", "a/cmmlu", "b/mmlu/test"):
        (tmp_path / place).mkdir(parents=True)
    for file in ("b/xcopa_zh_test.jsonl", "b/xcopa_zh_test_labels.jsonl", "b/belebele_zho_Hans.jsonl"):
        (tmp_path / file).write_text("")
    folders = f"eval.rows=[{tmp_path / 'a'}, {tmp_path / 'b'}]"
    found = {t.name: t.rows for c in load_suites(["chinese"], [folders]).capabilities for t in c.tasks}
    assert found == {
        "ceval-valid": str(tmp_path / "a" / "ceval"),
        "cmmlu": str(tmp_path / "a" / "cmmlu"),
        "xcopa_zh": str(tmp_path / "b" / "xcopa_zh_test.jsonl"),
        "belebele_zho_Hans": str(tmp_path / "b" / "belebele_zho_Hans.jsonl"),
    }
    with pytest.raises(ConfigError) as caught:
        load_suites(["english"], [folders])
    assert f"nothing in {tmp_path / 'a'}, {tmp_path / 'b'} is named gsm8k: put its rows there." in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "a suite is a mapping with capabilities; found a list"),
        ("capabilties: []", "unknown key 'capabilties'; a suite has capabilities, task_folders"),
    ],
)
def test_a_wrong_suite_is_said(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_suites([str(tmp_path / "s.yaml")])
    with pytest.raises(ConfigError, match="There is no suite 'chinse'; did you mean 'chinese'"):
        load_suites(["chinse"])
