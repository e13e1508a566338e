"""lm-eval's own tasks over local files: its prompts, answers and scores, the rows as their publishers distribute them.

A benchmark says where lm-eval describes it and how its files become the rows of the Hub's data set.
"""

import csv
import difflib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from tasks.core.config import TaskConfig
from tasks.core.errors import ConfigError

LETTERS = "ABCD"
Rows = list[dict[str, Any]]
Splits = dict[str, Rows]


@dataclass(frozen=True)
class Benchmark:
    """`folder` of lm-eval's descriptions and their file names; `read(path, subject)` gives the splits of a subject, or
    with None as the subject those of the whole."""

    folder: str
    files: str
    read: Callable[[Path, str | None], Splits]
    forms: str
    has_subjects: bool = False


# --- readers ----------------------------------------------------------------------------------------------------------


def _csv(path: Path, columns: list[str] | None = None) -> Rows:
    if not path.is_file():
        return []
    with path.open(encoding="utf-8-sig", newline="") as file:
        return [dict(row) for row in csv.DictReader(file, fieldnames=columns)]


def _jsonl(path: Path) -> Rows:
    text = path.read_text(encoding="utf-8-sig") if path.is_file() else ""
    if text.lstrip().startswith("["):
        found: Rows = json.loads(text)
        return found
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def _mmlu(path: Path, subject: str | None) -> Splits:
    columns = ["question", *LETTERS, "answer"]

    def row(found: dict[str, Any]) -> dict[str, Any]:
        choices = [found[letter] for letter in LETTERS]
        answer = found["answer"]
        return {
            "question": found["question"],
            "choices": choices,
            "answer": LETTERS.index(answer) if answer in list(LETTERS) else len(LETTERS),  # refused below
        }

    return {
        split: [row(r) for r in _csv(path / split / f"{subject}_{split}.csv", columns)] for split in ("test", "dev")
    }


def _ceval(path: Path, subject: str | None) -> Splits:
    return {split: _csv(path / split / f"{subject}_{split}.csv") for split in ("val", "dev")}


def _cmmlu(path: Path, subject: str | None) -> Splits:
    return {split: _csv(path / split / f"{subject}.csv") for split in ("test", "dev")}


def _split_files(*splits: str) -> Callable[[Path, str | None], Splits]:
    """Return a reader of a folder with a JSON Lines file a split, or of one file, which is the first split's."""

    def read(path: Path, _: str | None) -> Splits:
        if path.is_file():
            return {splits[0]: _jsonl(path)}
        found: Splits = {}
        for split in splits:
            files = sorted(p for p in path.glob(f"*{split}*") if p.suffix in (".jsonl", ".json"))
            found[split] = [row for file in files for row in _jsonl(file)]
        return found

    return read


def _piqa(path: Path, _: str | None) -> Splits:
    file = path if path.is_file() else next(iter(sorted(path.glob("*valid*.jsonl"))), path / "valid.jsonl")
    rows = _jsonl(file)
    if rows and "label" not in rows[0]:
        labels = next(iter(sorted(file.parent.glob(f"{file.stem}*label*.lst"))), file.with_name("valid-labels.lst"))
        if not labels.is_file():
            raise ConfigError(f"eval task piqa: {file} has no labels, nor is there {labels}. Put it beside the rows.")
        gold = labels.read_text(encoding="utf-8").split()
        rows = [{**row, "label": int(label)} for row, label in zip(rows, gold, strict=True)]
    return {"validation": rows}


def _truthfulqa(path: Path, _: str | None) -> Splits:
    def targets(found: dict[str, int]) -> dict[str, Any]:
        right_first = sorted(found.items(), key=lambda entry: -entry[1])
        return {"choices": [text for text, _ in right_first], "labels": [label for _, label in right_first]}

    rows = _jsonl(path if path.is_file() else path / "mc_task.json")
    names = ("mc1_targets", "mc2_targets")
    return {"validation": [{"question": r["question"], **{n: targets(r[n]) for n in names}} for r in rows]}


BENCHMARKS = {
    "mmlu": Benchmark(
        "mmlu/default",
        "mmlu_*.yaml",
        _mmlu,
        "a folder with test/SUBJECT_test.csv and dev/SUBJECT_dev.csv, without a header",
        True,
    ),
    "ceval-valid": Benchmark(
        "ceval", "ceval-valid_*.yaml", _ceval, "a folder with val/SUBJECT_val.csv and dev/SUBJECT_dev.csv", True
    ),
    "cmmlu": Benchmark("cmmlu", "cmmlu_*.yaml", _cmmlu, "a folder with test/SUBJECT.csv and dev/SUBJECT.csv", True),
    "gsm8k": Benchmark(
        "gsm8k", "gsm8k.yaml", _split_files("test", "train"), "a folder with test.jsonl and train.jsonl, or a test file"
    ),
    "hellaswag": Benchmark("hellaswag", "hellaswag.yaml", _split_files("validation", "train"), "JSON Lines"),
    "piqa": Benchmark("piqa", "piqa.yaml", _piqa, "JSON Lines, with its labels inside or in a .lst file beside it"),
    "arc_easy": Benchmark("arc", "arc_easy.yaml", _split_files("test", "train"), "JSON Lines"),
    "arc_challenge": Benchmark("arc", "arc_challenge.yaml", _split_files("test", "train"), "JSON Lines"),
    "winogrande": Benchmark("winogrande", "default.yaml", _split_files("validation", "train"), "JSON Lines"),
    "xcopa_zh": Benchmark("xcopa", "default_zh.yaml", _split_files("test", "validation"), "JSON Lines"),
    "belebele_zho_Hans": Benchmark("belebele", "belebele_zho_Hans.yaml", _split_files("test"), "JSON Lines"),
    "truthfulqa_mc1": Benchmark("truthfulqa", "truthfulqa_mc1.yaml", _truthfulqa, "mc_task.json"),
    "truthfulqa_mc2": Benchmark("truthfulqa", "truthfulqa_mc2.yaml", _truthfulqa, "mc_task.json"),
}


# --- tasks ------------------------------------------------------------------------------------------------------------


def check_rows(task: TaskConfig) -> list[str]:
    """Return what is wrong with a benchmark over local rows, found without loading lm-eval: a name or subject that it
    does not know, and subjects of which there are no rows."""
    benchmark = BENCHMARKS.get(task.name)
    if benchmark is None:
        return [
            f"eval task {task.name}: it cannot be read from local rows; those that can are {', '.join(BENCHMARKS)}. "
            "Give other tasks as choices, texts or conversations, or as a folder of lm-eval tasks."
        ]
    path = Path(str(task.rows))
    if not benchmark_files(task):
        return [f"eval task {task.name}: there are no rows in {path}. Correct its path in the recipe."]
    known = _subjects(task, benchmark)
    problems = []
    for subject in task.subjects:
        if subject not in known:
            near = difflib.get_close_matches(subject, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            problems.append(f"eval task {task.name}: it has no subject {subject!r}{hint}")
        elif not next(iter(benchmark.read(path, subject).values())):  # the split that is scored comes first
            problems.append(_no_rows(task, benchmark, subject))
    return problems


def build_benchmark(task: TaskConfig) -> list[Any]:
    """Return lm-eval's task objects of a benchmark over local rows that `check_rows` has passed: one, or one a subject.
    Raises ConfigError for files that hold no rows, and more examples than there are."""
    benchmark = BENCHMARKS[task.name]
    path = Path(str(task.rows))
    found = []
    for subject, config in _descriptions(task, benchmark):
        splits = {name: rows for name, rows in benchmark.read(path, subject).items() if rows}
        tested = next((config[key] for key in ("test_split", "validation_split") if config.get(key)), "test")
        if tested not in splits:
            if benchmark.has_subjects and not task.subjects:
                continue  # a part of the subjects is a benchmark too
            raise ConfigError(_no_rows(task, benchmark, subject))
        found.append(_build(task, config, splits, tested))
    if not found:
        raise ConfigError(_no_rows(task, benchmark, None))
    return found


def _no_rows(task: TaskConfig, benchmark: Benchmark, subject: str | None) -> str:
    what = f" of {subject}" if subject else ""
    return f"eval task {task.name}: {task.rows} has no rows{what} to score. Expected {benchmark.forms}."


def _descriptions(task: TaskConfig, benchmark: Benchmark) -> Iterator[tuple[str | None, dict[str, Any]]]:
    """Yield each subject with lm-eval's description of it; None and the only one where there are no subjects."""
    from lm_eval.tasks._yaml_loader import load_yaml

    if not benchmark.has_subjects:
        yield None, load_yaml(_folder(benchmark) / benchmark.files)
        return
    for subject, path in _subjects(task, benchmark).items():
        if not task.subjects or subject in task.subjects:
            yield subject, load_yaml(path)


def _folder(benchmark: Benchmark) -> Path:
    spec = util.find_spec("lm_eval.tasks")
    assert spec and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / benchmark.folder


def _subjects(task: TaskConfig, benchmark: Benchmark) -> dict[str, Path]:
    """Return lm-eval's description of each subject of a benchmark that has subjects."""
    files = sorted(_folder(benchmark).glob(benchmark.files)) if benchmark.has_subjects else []
    return {re.sub(f"^{re.escape(task.name)}_", "", p.stem): p for p in files}


def _build(task: TaskConfig, config: dict[str, Any], splits: Splits, tested: str) -> Any:
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    shots = task.shots if task.shots is not None else config.get("num_fewshot") or 0
    examples = splits.get(config.get("fewshot_split") or config.get("training_split") or tested, [])
    if shots > len(examples):
        raise ConfigError(
            f"eval task {config['task']}: {shots} examples are wanted before each question, and there are "
            f"{len(examples)}. Lower its shots, or add the rows they come from."
        )
    kept = {k: v for k, v in config.items() if k not in ("dataset_path", "dataset_name", "tag", "task_alias")}
    kept |= {"num_fewshot": shots, "custom_dataset": lambda **_: {k: Dataset.from_list(v) for k, v in splits.items()}}
    for key in ("training_split", "validation_split", "test_split", "fewshot_split"):
        if kept.get(key) and kept[key] not in splits:
            kept[key] = None
    number = 1  # building the task reads the first row
    try:
        built = ConfigurableTask(config=kept)
        docs = built.eval_docs
        for number in range(1, len(docs) + 1):
            if not _has_answer(built, docs[number - 1]):
                raise ValueError("its answer is none of its choices")
    except (KeyError, IndexError, TypeError, ValueError, SyntaxError, TemplateError) as error:
        raise ConfigError(
            f"eval task {config['task']}: row {number} of those that are scored in {task.rows} has not the columns or "
            f"the answer that lm-eval reads ({type(error).__name__}: {error}). Correct or remove it; expected "
            f"{BENCHMARKS[task.name].forms}."
        ) from None
    return built


def _has_answer(task: Any, doc: dict[str, Any]) -> bool:
    if task.OUTPUT_TYPE != "multiple_choice":
        return True
    choices = task.doc_to_choice(doc)
    found = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    return all(
        0 <= one < len(choices) if isinstance(one, int) else one in choices
        for one in (found if isinstance(found, list) else [found])
    )


def benchmark_files(task: TaskConfig) -> dict[str, Path]:
    """Return the files that may hold a benchmark's rows, by their place in it: splits have files of one name."""
    path = Path(str(task.rows))
    if path.is_file():
        return {p.name: p for p in (path, *path.parent.glob(f"{path.stem}*.lst"))}
    found = (p for p in path.rglob("*") if p.suffix in (".csv", ".json", ".jsonl", ".lst"))
    return {p.relative_to(path).as_posix(): p for p in found}
