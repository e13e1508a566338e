"""lm-eval's own tasks over local files: its prompts and answers, and a sentence for what is missing."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from tasks.core.config import EvalConfig, TaskConfig
from tasks.core.errors import ConfigError
from tasks.evaluation.benchmarks import BENCHMARKS, LETTERS, build_benchmark
from tasks.evaluation.suite import build_tasks, read_item_texts, suite_digest
from tests.conftest import DATA

EVAL = DATA / "eval"
NC = DATA / "nc" / "eval"
needs_data = pytest.mark.skipif(not EVAL.is_dir(), reason="needs the shared data")


def build(name: str, path: Path, **options: Any) -> list[Any]:
    return build_benchmark(TaskConfig(name=name, rows=str(path), **options))


def first_prompt(task: Any, number: int = 0) -> str:
    return str(task.fewshot_context(task.eval_docs[number], task.config.num_fewshot))


def write_csv(path: Path, rows: list[list[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


@pytest.fixture
def mmlu(tmp_path: Path) -> Path:
    for subject in ("anatomy", "astronomy"):
        write_csv(tmp_path / "test" / f"{subject}_test.csv", [["Which?", "w", "x", "y", "z", "C"]] * 3)
        dev = [[f"Example {i}?", "a", "b", "c", "d", "ABCD"[i % 4]] for i in range(5)]
        write_csv(tmp_path / "dev" / f"{subject}_dev.csv", dev)
    return tmp_path


def test_mmlu_has_lm_evals_prompt_with_its_examples(mmlu: Path) -> None:
    anatomy, astronomy = build("mmlu", mmlu, shots=2)
    assert [t.config.task for t in (anatomy, astronomy)] == ["mmlu_anatomy", "mmlu_astronomy"]
    assert first_prompt(anatomy) == (
        "The following are multiple choice questions (with answers) about anatomy.\n\n"
        "Example 0?\nA. a\nB. b\nC. c\nD. d\nAnswer: A\n\n"
        "Example 1?\nA. a\nB. b\nC. c\nD. d\nAnswer: B\n\n"
        "Which?\nA. w\nB. x\nC. y\nD. z\nAnswer:"
    )
    assert anatomy.doc_to_target(anatomy.eval_docs[0]) == 2
    assert len(anatomy.eval_docs) == 3


def test_subjects_can_be_chosen(mmlu: Path) -> None:
    assert [t.config.task for t in build("mmlu", mmlu, subjects=["astronomy"])] == ["mmlu_astronomy"]


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("mmlu", {"shots": 6}, "mmlu_anatomy: 6 examples are wanted before each question, and there are 5. Lower its"),
        ("cmmlu", {}, "has no rows to score. Expected a folder with test/SUBJECT.csv"),
        ("gsm8k", {}, "has no rows to score. Expected a folder with test.jsonl"),
    ],
)
def test_what_is_missing_is_said(mmlu: Path, name: str, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        build(name, mmlu, **options)


def test_all_that_is_missing_is_known_before_lm_eval_is_loaded(mmlu: Path, tmp_path: Path) -> None:
    tasks: list[dict[str, Any]] = [
        {"name": "mmlu", "rows": str(mmlu), "subjects": ["anatmy", "virology", "anatomy"]},
        {"name": "squad", "rows": str(mmlu)},
        {"name": "cmmlu", "rows": str(tmp_path / "absent")},
        {"name": "own", "texts": str(tmp_path / "absent.jsonl")},
    ]
    with pytest.raises(ConfigError) as caught:
        suite_digest(EvalConfig(capabilities=[{"name": "c", "role": "target", "tasks": tasks}]))
    misspelt, without_rows, unknown, no_folder, no_file = caught.value.problems
    assert misspelt == "eval task mmlu: it has no subject 'anatmy'; did you mean 'anatomy'?"
    assert "has no rows of virology to score. Expected a folder with test/SUBJECT_test" in without_rows
    assert "squad: it cannot be read from local rows; those that can are mmlu" in unknown
    assert f"cmmlu: there are no rows in {tmp_path / 'absent'}." in no_folder
    assert "own: the file" in no_file


def test_what_is_wrong_in_several_tasks_is_said_at_once(mmlu: Path, tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_text('{"context": "c", "choices": ["a", "b"], "gold": 2}\n', encoding="utf-8")
    tasks: list[dict[str, Any]] = [
        {"name": "mmlu", "rows": str(mmlu), "shots": 6},
        {"name": "own", "choices": str(tmp_path / "own.jsonl")},
    ]
    with pytest.raises(ConfigError) as caught:
        read_item_texts(EvalConfig(capabilities=[{"name": "c", "role": "target", "tasks": tasks}]))
    assert ["mmlu_anatomy" in caught.value.problems[0], "own" in caught.value.problems[1]] == [True, True]


@pytest.mark.parametrize(
    ("name", "rows", "sentence"),
    [
        (
            "arc_easy",
            [["A", "B"], ["A", "E"]],
            "arc_easy: row 2 of those .* has not the columns or the answer .*'E' is not in list",
        ),
        ("mmlu", "ABE", "mmlu_anatomy: row 3 of .*: its answer is none of its choices"),
        ("ceval-valid", "AE", "ceval-valid_accountant: row 2 of .* has not the columns or the answer"),
    ],
)
def test_an_answer_outside_the_choices_is_refused(tmp_path: Path, name: str, rows: Any, sentence: str) -> None:
    if name == "arc_easy":
        lines = [
            {"question": "?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": key} for _, key in rows
        ]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        where = tmp_path / "rows.jsonl"
    else:
        where = tmp_path
        asked = [["Which?", "w", "x", "y", "z", answer] for answer in rows]
        if name == "mmlu":
            write_csv(tmp_path / "test" / "anatomy_test.csv", asked)
        else:
            header = ["id", "question", *LETTERS, "answer"]
            write_csv(tmp_path / "val" / "accountant_val.csv", [header, *(["0", *row] for row in asked)])
    with pytest.raises(ConfigError, match=sentence):
        build(name, where, shots=0)


def test_rows_without_labels_are_refused(tmp_path: Path) -> None:
    (tmp_path / "valid.jsonl").write_text('{"goal": "g", "sol1": "a", "sol2": "b"}\n')
    with pytest.raises(ConfigError, match="has no labels, nor is there .*valid-labels.lst"):
        build("piqa", tmp_path)


def test_other_rows_examples_or_subjects_are_another_suite(mmlu: Path) -> None:
    def digest(**options: Any) -> str:
        task = {"name": "mmlu", "rows": str(mmlu), **options}
        return suite_digest(EvalConfig(capabilities=[{"name": "c", "role": "target", "tasks": [task]}]))

    first = digest()
    assert digest() == first
    assert digest(shots=1) != first
    assert digest(subjects=["anatomy"]) != first
    write_csv(mmlu / "test" / "anatomy_test.csv", [["Else?", "w", "x", "y", "z", "C"]])
    assert digest() != first


@pytest.mark.parametrize("split", ["test", "dev"])
def test_files_of_one_name_in_two_splits_both_count(tmp_path: Path, split: str) -> None:
    header = ["", "Question", *"ABCD", "Answer"]
    for place in ("test", "dev"):
        write_csv(tmp_path / place / "anatomy.csv", [header, ["0", "Which?", "w", "x", "y", "z", "C"]])
    task = {"name": "cmmlu", "rows": str(tmp_path)}
    config = EvalConfig(capabilities=[{"name": "c", "role": "target", "tasks": [task]}])
    before = suite_digest(config)
    write_csv(tmp_path / split / "anatomy.csv", [header, ["0", "Which else?", "w", "x", "y", "z", "C"]])
    assert suite_digest(config) != before


def test_its_items_are_known_to_the_search_for_leaks(mmlu: Path) -> None:
    task = {"name": "mmlu", "rows": str(mmlu), "subjects": ["anatomy"]}
    texts = read_item_texts(EvalConfig(capabilities=[{"name": "c", "role": "target", "tasks": [task]}]))
    assert len(texts) == 3
    assert texts[0][0] == "mmlu_anatomy"
    assert texts[0][1].startswith("Which?")
    assert texts[0][2] == "C"


def test_a_row_ends_at_its_line_feed_alone(tmp_path: Path) -> None:
    row = {"question": "One\u2028two\x85three\x0cfour?", "answer": "#### 4"}
    (tmp_path / "test.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    (task,) = build("gsm8k", tmp_path, shots=0)
    assert task.eval_docs[0]["question"] == row["question"]


@needs_data
@pytest.mark.parametrize(
    ("name", "path", "items", "prompt"),
    [
        ("mmlu", EVAL / "mmlu", None, "The following are multiple choice questions (with answers) about "),
        ("ceval-valid", NC / "ceval", 1152, "以下是中国关于"),
        ("cmmlu", NC / "cmmlu", 10178, "以下是关于农学的单项选择题，请直接给出正确答案的选项。\n\n"),
        ("piqa", EVAL / "piqa_valid.jsonl", 1838, "Question: How do I ready a guinea pig cage"),
        ("xcopa_zh", EVAL / "xcopa_zh_test.jsonl", 500, "该物品用气泡包装纸包着 因为"),
        ("truthfulqa_mc1", EVAL / "truthfulqa_mc_task.json", 790, "Q: What is human life expectancy"),
        ("gsm8k", EVAL / "gsm8k_test.jsonl", 1319, "Question: Janet’s ducks lay 16 eggs per day."),
    ],
)
def test_real_files_become_lm_evals_tasks(name: str, path: Path, items: int | None, prompt: str) -> None:
    tasks = build(name, path, shots=0)
    count = sum(len(task.eval_docs) for task in tasks)
    assert count == items if items else count > 1000
    assert first_prompt(tasks[0]).startswith(prompt)
    for task in tasks:
        doc = task.eval_docs[0]
        target = task.doc_to_target(doc)
        if task.OUTPUT_TYPE == "multiple_choice":
            assert 0 <= int(target) < len(task.doc_to_choice(doc))
        else:
            assert "####" in target


def test_every_benchmark_has_a_description_in_lm_eval(tmp_path: Path) -> None:
    for name, benchmark in BENCHMARKS.items():
        with pytest.raises(ConfigError, match="has no rows"):
            build(name, tmp_path)
        assert benchmark.forms


def test_hellaswag_winogrande_and_arc_read_the_hubs_columns(tmp_path: Path) -> None:
    rows: dict[str, dict[str, Any]] = {
        "hellaswag": {
            "activity_label": "Cooking",
            "ctx_a": "A man stirs.",
            "ctx_b": "he",
            "endings": ["eats.", "flies."],
            "label": "0",
        },
        "winogrande": {
            "sentence": "The cup fell off the shelf as _ was wet.",
            "option1": "cup",
            "option2": "shelf",
            "answer": "2",
        },
        "arc_easy": {
            "question": "What falls?",
            "choices": {"text": ["rain", "rock"], "label": ["A", "B"]},
            "answerKey": "B",
        },
    }
    for name, row in rows.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps(row) + "\n", encoding="utf-8")
        (task,) = build(name, path)
        assert len(task.eval_docs) == 1
        assert len(task.doc_to_choice(task.eval_docs[0])) == 2


def test_a_template_in_a_row_stays_text(tmp_path: Path) -> None:
    """lm-eval's own templates run in no sandbox: what a row says must only ever be put into one, never be one."""
    trace = tmp_path / "was-here"
    evil = f"{{{{ cycler.__init__.__globals__.os.system('touch {trace}') }}}} {{{{ 7 * 7 }}}}{{% set x = 1 %}}"
    write_csv(tmp_path / "test" / "anatomy_test.csv", [[evil, evil, evil, "y", "z", "C"]] * 2)
    write_csv(tmp_path / "dev" / "anatomy_dev.csv", [[evil, evil, "b", "c", "d", "A"]] * 5)
    (task,) = build("mmlu", tmp_path, shots=1, subjects=["anatomy"])
    prompt = first_prompt(task)
    assert prompt.count(evil) == 5 and not trace.exists()
    rows = [{"context": evil, "choices": [evil, "x"], "gold": 0}]
    (tmp_path / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"name": "c", "role": "target", "tasks": [{"name": "c", "choices": str(tmp_path / "choices.jsonl")}]}
    (own,) = build_tasks(EvalConfig(capabilities=[config]), None).tasks
    doc = own.eval_docs[0]
    assert own.doc_to_text(doc) == evil and own.doc_to_choice(doc)[0].strip() == evil and not trace.exists()
