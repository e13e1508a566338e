"""The quickstart's model on real data that others published: training rows as they are, evaluation as lm-eval tasks."""

import json
from pathlib import Path

import pytest
import yaml

from flows.cli import main
from tasks.core.config import RECIPES
from tasks.core.manifest import read_manifest
from tasks.core.store import FileStore
from tests.conftest import DATA

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"no data folder at {DATA}; set FORGETLESS_DATA"),
]

TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{text}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
target_delimiter: "{delimiter}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1}}
"""


def rows(name: str) -> list[dict]:
    return [
        json.loads(line) for line in (DATA / "eval" / name).read_text(encoding="utf-8").splitlines() if line.strip()
    ]


@pytest.fixture
def real_recipe(tmp_path: Path) -> Path:
    """PIQA, ARC-easy and XCOPA-zh as lm-eval task files beside a recipe that uses them."""
    labels = (DATA / "eval" / "piqa_valid_labels.lst").read_text().split()
    because = {"cause": "因为", "effect": "所以"}
    sets = {
        "piqa": (
            "Question: {{goal}}\\nAnswer:",
            " ",
            [
                {"goal": r["goal"], "choices": [r["sol1"], r["sol2"]], "gold": int(g)}
                for r, g in zip(rows("piqa_valid.jsonl"), labels, strict=True)
            ],
        ),
        "arc_easy": ("{{query}}\\nAnswer:", " ", rows("arc_easy.jsonl")),
        "xcopa_zh": (
            "{{premise}}",
            "",
            [
                {
                    "premise": r["premise"].rstrip("。") + because[r["question"]],
                    "choices": [r["choice1"], r["choice2"]],
                    "gold": r["label"],
                }
                for r in rows("xcopa_zh_test.jsonl")
            ],
        ),
    }
    for name, (text, delimiter, items) in sets.items():
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(i, ensure_ascii=False) + "\n" for i in items), encoding="utf-8")
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, file=file, text=text, delimiter=delimiter))
    base = yaml.safe_load((RECIPES / "quickstart.yaml").read_text())
    recipe = {
        "name": "real",
        "model": base["model"],
        "data": {"sources": str(DATA / "sft_zh" / "cdb_extra_terms.json")},
        "train": {**base["train"], "max_steps": 2, "max_tokens": 1024, "pack_tokens": 1024},
        "eval": {
            "task_folders": ["."],
            "limit": 100,
            "capabilities": [
                {"name": "chinese", "role": "target", "measure": "acc", "tasks": ["xcopa_zh"]},
                {"name": "english", "role": "retention", "measure": "acc", "budget": 5, "tasks": ["piqa", "arc_easy"]},
            ],
        },
        "export": {"quantisations": ["f16", "q4_k_m"], "serve": "q4_k_m"},
    }
    path = tmp_path / "real.yaml"
    path.write_text(yaml.safe_dump(recipe, allow_unicode=True))
    return path


def test_real_evaluation_tasks_end_to_end(real_recipe: Path, tmp_path: Path, prefect_server: None) -> None:
    store = FileStore(tmp_path / "store")
    assert main(["run", str(real_recipe), "--store", str(store.root), "--json", "--debug"]) == 0
    manifest = read_manifest(store, "latest")
    chinese, english = manifest.report.capabilities
    assert {t.task: t.n for t in manifest.before.tasks} == {"xcopa_zh": 100, "piqa": 100, "arc_easy": 100}
    assert {t.task: t.chance for t in manifest.before.tasks} == {"xcopa_zh": 0.5, "piqa": 0.5, "arc_easy": 0.25}
    assert (chinese.n, english.n) == (100, 200)
    assert english.before > 0.45, "the base does these well above chance"
    assert {d.name for d in manifest.report.tasks} == {"piqa", "arc_easy"}
    assert manifest.dataset.read == 152


def test_the_quickstart_on_a_real_training_file(tmp_path: Path, prefect_server: None) -> None:
    store = FileStore(tmp_path / "store")
    rows_file = str(DATA / "sft_zh" / "oaast_sft_zh.json")
    options = ["--set", "train.max_steps=4", "--set", "eval.limit=40", "--set", "train.max_tokens=384"]
    assert main(["run", "quickstart", "--data", rows_file, *options, "--store", str(store.root), "--json"]) == 0
    manifest = read_manifest(store, "latest")
    assert (
        manifest.dataset.read == 689 == sum(manifest.dataset.rows.values()) + sum(manifest.dataset.quarantined.values())
    )
    assert manifest.report.capabilities[0].status == "gained"
