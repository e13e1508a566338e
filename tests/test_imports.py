"""Start-up stays fast: what deploys, helps and shows imports neither torch nor what belongs to a stage."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [p for folder in ("flows", "tasks", "dashboards") for p in sorted((ROOT / folder).rglob("*.py"))]
HEAVY = ("torch", "transformers", "peft", "lm_eval", "great_expectations", "bitsandbytes", "datasets", "llama_cpp")


@pytest.mark.parametrize(
    ("modules", "forbidden"),
    [
        ("flows.cli", (*HEAVY, "prefect", "pydantic", "rich", "numpy")),
        ("flows.plan, flows.screen, flows.doctor", (*HEAVY, "prefect")),
        ("flows.finetune", HEAVY),
        ("dashboards.results, dashboards.charts", (*HEAVY, "prefect")),
        ("tasks.core.config, tasks.core.manifest, tasks.core.store, tasks.core.paired", (*HEAVY, "prefect", "boto3")),
    ],
)
def test_importing_it_does_not_import(modules: str, forbidden: tuple[str, ...]) -> None:
    code = f"import sys\nimport {modules}\nprint(*[m for m in {forbidden!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def test_help_answers_at_once() -> None:
    started = time.monotonic()
    result = subprocess.run([sys.executable, "-m", "flows.cli", "--help"], capture_output=True, text=True, check=True)
    assert "prove what it gained and what it forgot" in result.stdout
    assert time.monotonic() - started < 5, "half a second on an idle machine; the bound only catches a heavy import"


def imported(path: Path, at_the_top_only: bool) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if at_the_top_only else ast.walk(tree)
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_prefect_stays_in_flows_and_steps_and_heavy_libraries_in_functions(path: Path) -> None:
    place = path.relative_to(ROOT).as_posix()
    if not place.startswith("flows/") and path.name not in ("steps.py", "policy.py"):
        assert "prefect" not in imported(path, at_the_top_only=False)
    if path.name in ("steps.py", "policy.py") or place.startswith(("flows/", "dashboards/", "tasks/core/")):
        assert not imported(path, at_the_top_only=True) & set(HEAVY)
