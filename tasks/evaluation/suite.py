"""The tasks of an evaluation, as lm-eval understands them: its own by name, and files of plain shapes.

A file task is an lm-eval ConfigurableTask over rows read here, so scoring, few-shot and logging stay lm-eval's."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from tasks.core.config import EvalConfig, TaskConfig
from tasks.core.digest import content_digest, file_sha256
from tasks.core.errors import ConfigError
from tasks.evaluation.benchmarks import benchmark_files, build_benchmark, check_rows
from tasks.evaluation.questions import read_questions
from tasks.models.template import render

TASK_FILES = {"", ".yaml", ".yml", ".py", ".jinja"}  # lm-eval's shared templates have no suffix
DATA_FILE = re.compile(r"[^\s'\"{}\[\],:]+\.(?:jsonl?|csv|tsv|parquet|txt)\b")


def suite_digest(config: EvalConfig) -> str:
    """Return what identifies the items and prompts of a suite: the content of its files, the names of the others.
    Raises ConfigError for a file that is absent."""
    files: dict[str, str] = {}
    problems = []
    for task in (t for c in config.capabilities for t in c.tasks):
        if task.rows:
            problems += check_rows(task)
            asked: dict[str, Any] = task.model_dump(mode="json", include={"shots", "subjects"})
            asked |= {
                "files": {place: file_sha256(p) for place, p in benchmark_files(task).items()},
                "lm-eval": metadata.version("lm-eval"),
            }
            files[f"rows:{task.name}"] = content_digest(asked)
        elif task.file is None:
            files[f"name:{task.name}"] = task.name
        elif Path(task.file).is_file():
            files[f"file:{task.name}"] = file_sha256(Path(task.file))
            if task.answers or task.questions:
                files[f"longest:{task.name}"] = str(task.max_answer_tokens)
        else:
            problems.append(
                f"eval task {task.name}: the file {task.file} is not there. Correct its path in the recipe."
            )
    if config.builtin_tasks:
        files["lm-eval"] = metadata.version("lm-eval")
    for number, folder in enumerate(map(Path, config.task_folders)):
        if not folder.is_dir():
            problems.append(f"eval.task_folders: {folder} is not a folder. Correct its path in the recipe.")
            continue
        for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix in TASK_FILES):
            files[f"{number}/{path.relative_to(folder).as_posix()}"] = file_sha256(path)
            for name in DATA_FILE.findall(path.read_text(encoding="utf-8")):
                if Path(name).is_file():  # lm-eval reads data_files relative to where the run was started
                    files[name] = file_sha256(Path(name))
    if problems:
        raise ConfigError(problems)
    return content_digest(files)


def named_tasks(config: EvalConfig) -> list[str]:
    """Return the names of the tasks that lm-eval describes and loads itself."""
    return [t.name for c in config.capabilities for t in c.tasks if t.file is None and not t.rows]


@dataclass(frozen=True)
class Suite:
    """What lm_eval.simple_evaluate takes: `tasks` and the TaskManager that knows those named; `leaves` are the tasks of
    each benchmark over local rows."""

    tasks: list[Any]
    manager: Any
    leaves: dict[str, list[str]]


def build_tasks(config: EvalConfig, tokenizer: Any) -> Suite:
    """Return the tasks of a suite. Raises ConfigError for names that are not known and rows of the wrong shape."""
    wanted = [t for c in config.capabilities for t in c.tasks]
    named = named_tasks(config)
    local = [t for t in wanted if t.file is not None or t.rows]
    built = _of_each(local, lambda t: build_benchmark(t) if t.rows else [_file_task(t, tokenizer)])
    found = [*named, *(part for parts in built for part in parts)]
    leaves = {
        t.name: [str(part.config.task) for part in parts] for t, parts in zip(local, built, strict=True) if t.rows
    }
    return Suite(found, _known_tasks(config, named), leaves)


def _of_each(tasks: list[TaskConfig], work: Callable[[TaskConfig], list[Any]]) -> list[list[Any]]:
    """Return what `work` makes of each task. Raises one ConfigError with what is wrong with any of them."""
    made, problems = [], []
    for task in tasks:
        try:
            made.append(work(task))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return made


def _known_tasks(config: EvalConfig, named: list[str]) -> Any:
    """Return lm-eval's TaskManager, which knows all of the named tasks. Raises ConfigError."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(
        include_path=config.task_folders or None, include_defaults=config.builtin_tasks, verbosity="ERROR"
    )
    unknown = [name for name in named if name not in manager.all_tasks]
    if unknown:
        where = ", ".join(config.task_folders) or "no task_folders"
        raise ConfigError(
            [
                f"eval task {name}: unknown (looked in {where}"
                f"{'' if config.builtin_tasks else '; set eval.builtin_tasks: true for lm-eval tasks of that name'})."
                for name in unknown
            ]
        )
    return manager


def read_item_texts(config: EvalConfig) -> list[tuple[str, str, str]]:
    """Return the task, question and right answer of every item of a suite, without a tokenizer."""
    tasks = [t for c in config.capabilities for t in c.tasks]
    local = [t for t in tasks if t.file or t.rows]
    texts = [text for found in _of_each(local, _local_item_texts) for text in found]
    named = named_tasks(config)
    return [*texts, *_named_item_texts(config, named)] if named else texts


def _local_item_texts(task: TaskConfig) -> list[tuple[str, str, str]]:
    if task.rows:
        return [text for part in build_benchmark(task) for text in _item_texts(str(part.config.task), part)]
    if task.questions:
        return [(task.name, q.question, q.answer) for q in read_questions(Path(task.questions))]
    rows = _read_jsonl(Path(str(task.file)))
    try:
        return [(task.name, *_question_and_answer(task, row)) for row in rows]
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise _wrong_shape(task, error) from None


def kept_texts(config: EvalConfig) -> dict[str, list[str]]:
    """Return the texts of the tasks whose language modelling is to be kept."""
    tasks = [t for c in config.capabilities if c.role == "retention" for t in c.tasks if t.texts]
    return {t.name: [str(row.get("text", "")) for row in _read_jsonl(Path(str(t.texts)))] for t in tasks}


def _question_and_answer(task: TaskConfig, row: dict[str, Any]) -> tuple[str, str]:
    if task.conversations or task.answers:
        question, *rest = [m["content"] for m in row["messages"] if m["role"] != "system"]
        return question, "\n".join(rest)
    return ("", row["text"]) if task.texts else (row["context"], row["choices"][row["gold"]])


def load_named(
    config: EvalConfig, names: list[str], say: Callable[[str], None]
) -> Iterator[tuple[str, Exception | None]]:
    """Load lm-eval's own tasks, and yield the name of each with what went wrong, or None. Raises ConfigError."""
    from lm_eval.tasks import get_task_dict

    manager = _known_tasks(config, names)
    for name in names:
        say(f"Loading the task {name}")
        try:
            get_task_dict([name], manager)
        except Exception as error:  # lm-eval's, datasets' and evaluate's, and any of a task's own code
            yield name, error
        else:
            yield name, None


def _named_item_texts(config: EvalConfig, names: list[str]) -> list[tuple[str, str, str]]:
    from lm_eval.tasks import get_task_dict

    texts: list[tuple[str, str, str]] = []

    def visit(tasks: dict[Any, Any]) -> None:
        for name, task in tasks.items():
            if isinstance(task, dict):
                visit(task)
            else:
                texts.extend(_item_texts(str(name), task))

    visit(get_task_dict(names, _known_tasks(config, names)))
    return texts


def _item_texts(name: str, task: Any) -> list[tuple[str, str, str]]:
    texts = []
    for doc in task.eval_docs:
        question, answer = task.doc_to_text(doc), task.doc_to_target(doc)
        if task.OUTPUT_TYPE == "multiple_choice" and str(answer).isdigit():
            answer = task.doc_to_choice(doc)[int(answer)]
        texts.append((name, str(question), str(answer)))
    return texts


def _file_task(task: TaskConfig, tokenizer: Any) -> Any:
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    assert task.file is not None
    shapes: dict[str, dict[str, Any]] = {
        "conversations": {
            "output_type": "loglikelihood",
            "doc_to_text": "{{context}}",
            "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}],
        },
        "texts": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
        "choices": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{context}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "gold",
            "metric_list": [
                {"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")
            ],
        },
        "answers": {  # what is measured of them is in generation.py
            "output_type": "generate_until",
            "doc_to_text": "{{context}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": task.max_answer_tokens},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        },
    }
    rows = [] if task.questions else _read_jsonl(Path(task.file))
    try:
        if task.conversations:
            shape, docs = "conversations", _answer_docs(rows, tokenizer)
        elif task.texts:
            shape, docs = "texts", [{"text": row["text"]} for row in rows]
        elif task.choices:
            shape, docs = "choices", [_choice_doc(row) for row in rows]
        elif task.answers:
            shape, docs = "answers", _last_answers(rows, tokenizer)
        else:
            shape, docs = _question_docs(task, tokenizer)
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise _wrong_shape(task, error) from None
    if not docs:
        raise ConfigError(f"eval task {task.name}: {task.file} has no rows, so there is nothing to score.")
    dataset = Dataset.from_list(docs)
    return ConfigurableTask(
        config={
            "task": task.name,
            "custom_dataset": lambda **_: {"test": dataset},
            "test_split": "test",
            "target_delimiter": "",
            "metadata": {"version": 1},
            **shapes[shape],
        }
    )


def _wrong_shape(task: TaskConfig, error: Exception) -> ConfigError:
    return ConfigError(
        f"eval task {task.name}: a row of {task.file} has not the expected shape ({error!r}). Expected "
        "conversations and answers: {messages}, texts: {text}, choices: {context, choices, gold}."
    )


def _answer_docs(rows: list[dict[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
    """Return one document per assistant turn: the prompt as the chat template renders it, and the answer's text."""
    docs = []
    for number, row in enumerate(rows):
        messages = row["messages"]
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                context = render(tokenizer, messages[:i], answer_next=True)
                rest = render(tokenizer, messages[: i + 1])[len(context) :]
                end = rest.index(message["content"].strip()) + len(message["content"].strip())
                docs.append({"context": context, "answer": rest[:end], "cluster": str(number)})
    return docs


def _last_answers(rows: list[dict[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
    """Return one document per conversation: all before its last answer as the chat template renders it, and that."""
    last: dict[str, dict[str, Any]] = {}
    for doc in _answer_docs(rows, tokenizer):
        last[doc["cluster"]] = doc
    return [{"context": d["context"], "answer": d["answer"], "question": _asked(rows[int(n)])} for n, d in last.items()]


def _asked(row: dict[str, Any]) -> str:
    return next((str(m["content"]) for m in reversed(row["messages"]) if m["role"] == "user"), "")


def _question_docs(task: TaskConfig, tokenizer: Any) -> tuple[str, list[dict[str, Any]]]:
    """Return the shape and the documents of a question set, each question as the chat template asks it."""
    found = read_questions(Path(str(task.questions)))
    with_choices = [q for q in found if q.choices]
    if with_choices and len(with_choices) < len(found):
        raise ConfigError(
            f"eval task {task.name}: {task.questions} mixes {len(with_choices)} questions with choices and "
            f"{len(found) - len(with_choices)} open ones, which have no measure in common. Make two files of it."
        )
    docs = []
    for q in found:
        messages = [{"role": "system", "content": q.system}] if q.system else []
        messages.append({"role": "user", "content": q.question})
        doc = {"context": render(tokenizer, messages, answer_next=True), "cluster": q.subject, "question": q.question}
        docs.append(doc | ({"choices": q.choices, "gold": q.gold} if q.choices else {"answer": q.answer}))
    return "choices" if with_choices else "answers", docs


def _choice_doc(row: dict[str, Any]) -> dict[str, Any]:
    context, choices, gold = row["context"], row["choices"], row["gold"]
    if not 0 <= gold < len(choices):
        raise ValueError(f"gold {gold} is outside the {len(choices)} choices")
    # Words are set apart by a space; Chinese is not.
    space = " " if context and context[-1].isascii() and not context[-1].isspace() else ""
    return {"context": context, "choices": [space + c for c in choices], "gold": gold, "cluster": row.get("cluster")}


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except ValueError as error:
                    raise ConfigError(f"{path}:{number}: not valid JSON ({error}).") from None
    return rows
