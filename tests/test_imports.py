"""Start-up stays fast: what deploys, helps and shows imports neither torch nor what belongs to a stage."""

import subprocess
import sys
import time

import pytest

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
