"""Every command and recipe that the READMEs show is one that the program takes."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from flows.cli import _parser
from tasks.core.config import DataConfig, ExportConfig, Recipe, TaskConfig
from tasks.core.licences import find_licence

ROOT = Path(__file__).resolve().parents[1]
READMES = ("README.md", "README.zh-CN.md")


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.S)


def commands(name: str) -> list[str]:
    text = (ROOT / name).read_text(encoding="utf-8")
    inline = re.findall(r"`(forgetless [^`]+)`", text)
    shell = [line for block in blocks(name, "(?:sh|bash|console|shell)") for line in block.splitlines()]
    fenced = [m.group(1) for line in shell if (m := re.match(r"(?:\$ )?(forgetless .+)", line))]
    return [re.sub(r"\s+#.*$", "", c) for c in inline + fenced]


@pytest.mark.parametrize("name", READMES)
def test_every_command_shown_is_understood(name: str) -> None:
    shown = [
        c for c in commands(name) if "..." not in c and "…" not in c and " lm-eval " not in c
    ]  # lm-eval reads those
    assert len(shown) >= 5
    for command in shown:
        words = shlex.split(command.replace("[", "").replace("]", ""))[1:]
        arguments = _parser().parse_args(words)
        assert callable(arguments.command), command


@pytest.mark.parametrize("name", READMES)
def test_every_recipe_shown_is_valid(name: str) -> None:
    recipes = [yaml.safe_load(b) for b in blocks(name, "yaml")]
    recipes = [r for r in recipes if isinstance(r, dict) and "model" in r]
    assert recipes
    for recipe in recipes:
        assert Recipe.model_validate(recipe).name == recipe["name"]


@pytest.mark.parametrize("name", READMES)
def test_the_licences_shown_are_sections_of_a_recipe(name: str) -> None:
    (shown,) = (yaml.safe_load(b) for b in blocks(name, "yaml") if "\nexport:" in b)
    assert ExportConfig.model_validate(shown["export"]).use == "commercial"
    assert find_licence(DataConfig.model_validate(shown["data"]).sources[0].license).kind == "share-alike"


@pytest.mark.parametrize("name", READMES)
def test_every_benchmark_and_its_form_are_shown(name: str) -> None:
    from tasks.evaluation.benchmarks import BENCHMARKS

    text = (ROOT / name).read_text(encoding="utf-8")
    (shown,) = (b for b in blocks(name, "yaml") if b.startswith("tasks:"))
    (task,) = yaml.safe_load(shown)["tasks"]
    assert TaskConfig.model_validate(task).name in BENCHMARKS
    for benchmark in BENCHMARKS:
        assert f"`{benchmark}`" in text


def test_make_targets_shown_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for name in READMES:
        for target in re.findall(r"`make ([a-z-]+)", (ROOT / name).read_text(encoding="utf-8")):
            assert re.search(rf"^{target}:", makefile, re.M), target


@pytest.mark.parametrize("name", READMES)
def test_the_export_settings_shown_are_valid(name: str) -> None:
    (shown,) = (b for b in blocks(name, "yaml") if b.startswith("export:"))
    settings = yaml.safe_load(shown)["export"]
    assert ExportConfig.model_validate(settings).model_fields_set == settings.keys()
