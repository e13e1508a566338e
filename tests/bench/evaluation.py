"""Scoring against lm-eval's own backend: python -m tests.bench.evaluation [--json FILE].

The same tasks, items, prompts and model, each backend and precision in a process of its own, one after another; lm-eval
at the batch size that was fastest for each task. Method and figures are in EVALUATION.md.
"""

import argparse
import csv
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from tasks.core.hardware import describe_machine
from tasks.core.settings import library_settings
from tests.bench.data import SHARED
from tests.bench.training import run, write_model

ITEMS, GENERATED, SHOTS, SEED = 200, 20, 8, 42
SUBJECTS = 5
LETTERS = "ABCD"
# lm-eval's fastest batch, tried 1 to 32 on a machine of this kind; and how many times as fast ours must be
BATCH = {"hellaswag": 16, "piqa": 8, "arc_easy": 16, "xcopa_zh": 32, "mmlu": 8, "text_zh": 32, "gsm8k": 8}
LEAST = {"hellaswag": 1.8, "piqa": 1.8, "arc_easy": 3, "xcopa_zh": 1.8, "mmlu": 5, "text_zh": 1.8, "gsm8k": 4}
LEAST_IN_ALL = 3.0
WHOLE = "loading to scores"
EQUAL, EQUAL_SHARE = (
    1e-4,
    1e-5,
)  # nats of a continuation in float32, or this share of its log-likelihood if that is more


# --- tasks ------------------------------------------------------------------------------------------------------------


def write_tasks(data: Path, work: Path) -> None:
    """Write every task's rows and its lm-eval description into `work`."""
    folder = data / "eval"
    labels = (folder / "piqa_valid_labels.lst").read_text(encoding="utf-8").split()
    joint = {"cause": "因为", "effect": "所以"}
    hellaswag = json.loads((folder / "hellaswag_abstainqa_dev.json").read_text(encoding="utf-8"))["dev"]
    rows: dict[str, list[dict[str, Any]]] = {
        "hellaswag": _pick(
            {"text": r["question"], "choices": [r["choices"][k] for k in LETTERS], "gold": LETTERS.index(r["answer"])}
            for r in hellaswag
        ),
        "piqa": _pick(
            {"text": f"Question: {r['goal']}\nAnswer:", "choices": [r["sol1"], r["sol2"]], "gold": int(gold)}
            for r, gold in zip(_lines(folder / "piqa_valid.jsonl"), labels, strict=True)
        ),
        "arc_easy": _pick(
            {"text": f"{r['query']}\nAnswer:", "choices": r["choices"], "gold": r["gold"]}
            for r in _lines(folder / "arc_easy.jsonl")
        ),
        "xcopa_zh": _pick(
            {
                "text": r["premise"].rstrip("。") + joint[r["question"]],
                "choices": [r["choice1"], r["choice2"]],
                "gold": r["label"],
            }
            for r in _lines(folder / "xcopa_zh_test.jsonl")
        ),
        "mmlu": _mmlu(folder / "mmlu"),
        "text_zh": _pick({"text": r["text"]} for r in _lines(folder / "ud_gsdsimp_zh_dev.jsonl")),
        "gsm8k": _gsm8k(_lines(folder / "gsm8k_test.jsonl")),
    }
    for name, found in rows.items():
        path = work / f"{name}.jsonl"
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in found), encoding="utf-8")
        described = _describe(name) | {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}}
        described |= {"task": name, "test_split": "test", "metadata": {"version": 1}}
        (work / f"{name}.yaml").write_text(yaml.safe_dump(described), encoding="utf-8")


def _describe(name: str) -> dict[str, Any]:
    if name == "text_zh":
        metrics = [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}]
        return {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": metrics,
        }
    if name == "gsm8k":
        return {
            "output_type": "generate_until",
            "doc_to_text": "{{text}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["Question:"], "do_sample": False, "max_gen_toks": 64},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        }
    metrics = [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")]
    return {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "target_delimiter": "" if name == "xcopa_zh" else " ",
        "metric_list": metrics,
    }


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _pick(rows: Iterable[dict[str, Any]], count: int = ITEMS) -> list[dict[str, Any]]:
    found = list(rows)
    random.Random(SEED).shuffle(found)
    return found[:count]


def _mmlu(folder: Path) -> list[dict[str, Any]]:
    """Return 40 questions of each of five subjects, after five with their answers."""

    def read(split: str, subject: str) -> list[list[str]]:
        with (folder / split / f"{subject}_{split}.csv").open(encoding="utf-8", newline="") as file:
            return list(csv.reader(file))

    def ask(row: list[str]) -> str:
        return row[0] + "".join(f"\n{k}. {c}" for k, c in zip(LETTERS, row[1:5], strict=True)) + "\nAnswer:"

    rows = []
    names = sorted(p.name.removesuffix("_test.csv") for p in (folder / "test").glob("*_test.csv"))
    for subject in [name for name in names if (folder / "dev" / f"{name}_dev.csv").is_file()][:SUBJECTS]:
        head = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        head += "".join(f"{ask(row)} {row[5]}\n\n" for row in read("dev", subject)[:5])
        asked = [
            {"text": head + ask(r), "choices": list(LETTERS), "gold": LETTERS.index(r[5])}
            for r in read("test", subject)
        ]
        rows += _pick(asked, ITEMS // SUBJECTS)
    return rows


def _gsm8k(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    head = "".join(f"Question: {r['question']}\nAnswer: {r['answer']}\n\n" for r in rows[-SHOTS:])
    return [{"text": f"{head}Question: {r['question']}\nAnswer:", "answer": r["answer"]} for r in rows[:GENERATED]]


# --- the two backends, each in a process of its own -------------------------------------------------------------------


def score(kind: str, precision: str, base: Path, work: Path) -> dict[str, Any]:
    """Return, by task, the seconds inside a backend and what it answered to every request."""
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from tasks.evaluation.prefix_lm import SharedPrefixLM
    from tasks.models.load import load_model
    from tasks.models.tokenizer import load_tokenizer

    began = time.monotonic()
    torch.set_num_threads(os.cpu_count() or 1)
    model = load_model(base, getattr(torch, precision), "cpu")
    tokenizer = load_tokenizer(base, "auto")
    if kind == "ours":
        backend: Any = SharedPrefixLM(model, tokenizer, None, lambda done, total: None)
    else:
        backend = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)
    spent = 0.0

    def timed(work: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal spent
            started = time.monotonic()
            try:
                return work(*arguments, **options)
            finally:
                spent += time.monotonic() - started

        return call

    for name in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        setattr(backend, name, timed(getattr(backend, name)))
    manager = TaskManager(include_path=str(work), include_defaults=False)
    found = {}
    for task in BATCH:
        if kind != "ours":
            backend.batch_size_per_gpu = BATCH[task]
        spent = 0.0
        result = simple_evaluate(
            model=backend,
            tasks=[task],
            task_manager=manager,
            bootstrap_iters=0,
            log_samples=True,
            random_seed=0,
            numpy_random_seed=0,
            torch_random_seed=0,
            fewshot_random_seed=0,
        )
        responses = [[r[0] for r in sample["resps"]] for sample in result["samples"][task]]
        answers = [
            [r if isinstance(r, str) else float(r[0] if isinstance(r, list | tuple) else r) for r in item]
            for item in responses
        ]
        scores = {k: v for k, v in result["results"][task].items() if isinstance(v, float)}
        found[task] = {"seconds": spent, "answers": answers, "scores": scores}
    return found | {WHOLE: {"seconds": time.monotonic() - began}}


# --- all of it --------------------------------------------------------------------------------------------------------


def judge(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the ratios of time, how equal the answers are, and whether all hold."""
    ours, theirs = runs["ours bfloat16"], runs["lm-eval bfloat16"]
    ratios = {task: theirs[task]["seconds"] / ours[task]["seconds"] for task in BATCH}
    ratios["all"] = sum(theirs[t]["seconds"] for t in BATCH) / sum(ours[t]["seconds"] for t in BATCH)
    ratios[WHOLE] = theirs[WHOLE]["seconds"] / ours[WHOLE]["seconds"]
    exact, library = runs["ours float32"], runs["lm-eval float32"]
    equal = {
        task: {
            "largest_difference": largest_difference(exact[task]["answers"], library[task]["answers"]),
            "other_likelihoods": count_unequal(exact[task]["answers"], library[task]["answers"]),
            "other_choices": count_differing(exact[task]["answers"], library[task]["answers"]),
            "other_choices_in_bfloat16": count_differing(ours[task]["answers"], library[task]["answers"]),
            "lm_evals_in_bfloat16": count_differing(theirs[task]["answers"], library[task]["answers"]),
        }
        for task in BATCH
    }
    holds = all(ratios[task] >= least for task, least in LEAST.items()) and ratios["all"] >= LEAST_IN_ALL
    holds &= ratios[WHOLE] >= LEAST_IN_ALL
    holds &= all(e["other_likelihoods"] == e["other_choices"] == 0 for e in equal.values())
    ours_off = sum(e["other_choices_in_bfloat16"] for e in equal.values())
    holds &= ours_off <= sum(e["lm_evals_in_bfloat16"] for e in equal.values())
    return {
        "ratios": ratios,
        "equality": equal,
        "holds": holds,
        "at_least": LEAST | {"all": LEAST_IN_ALL, WHOLE: LEAST_IN_ALL},
    }


def _pairs(ours: list[list[Any]], theirs: list[list[Any]]) -> list[tuple[float, float]]:
    pairs = [(a, b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)]
    return [pair for pair in pairs if not isinstance(pair[0], str)]


def largest_difference(ours: list[list[Any]], theirs: list[list[Any]]) -> float:
    return max((abs(a - b) for a, b in _pairs(ours, theirs)), default=0.0)


def count_unequal(ours: list[list[Any]], theirs: list[list[Any]]) -> int:
    return sum(abs(a - b) > max(EQUAL, EQUAL_SHARE * abs(b)) for a, b in _pairs(ours, theirs))


def count_differing(ours: list[list[Any]], theirs: list[list[Any]]) -> int:
    """Return how many items have another answer: another best choice, or another text."""

    def answer(item: list[Any]) -> Any:
        return item[0] if isinstance(item[0], str) else item.index(max(item))

    return sum(answer(a) != answer(b) for a, b in zip(ours, theirs, strict=True))


def table(found: dict[str, Any]) -> str:
    lines = [
        "| task | lm-eval s | ours s | times as fast | at least | largest difference in fp32 "
        "| other answers: fp32, bf16, lm-eval's bf16 |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    runs = found["runs"]
    for task in BATCH:
        e = found["equality"][task]
        seconds = [f"{runs[f'{kind} bfloat16'][task]['seconds']:.1f}" for kind in ("lm-eval", "ours")]
        lines.append(
            f"| {task} | {seconds[0]} | {seconds[1]} "
            f"| {found['ratios'][task]:.2f} | {LEAST[task]:g} | {e['largest_difference']:.1e} "
            f"| {e['other_choices']}, {e['other_choices_in_bfloat16']}, {e['lm_evals_in_bfloat16']} |"
        )
    lines.append(f"| all | | | {found['ratios']['all']:.2f} | {LEAST_IN_ALL:g} | | |")
    whole = [f"{runs[f'{kind} bfloat16'][WHOLE]['seconds']:.1f}" for kind in ("lm-eval", "ours")]
    lines.append(f"| {WHOLE} | {whole[0]} | {whole[1]} | {found['ratios'][WHOLE]:.2f} | {LEAST_IN_ALL:g} | | |")
    lines.append("")
    lines.append("Peak MiB: " + ", ".join(f"{name} {entry['peak_mib']:,}" for name, entry in runs.items()))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=SHARED, help="the folder of the shared data")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--part", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        kind, precision, base, work = options.part
        print(json.dumps(score(kind, precision, Path(base), Path(work))))
        return
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        work = Path(scratch)
        write_model(work / "base")
        write_tasks(options.data, work)
        runs = {}
        for precision in ("bfloat16", "float32"):
            for kind in ("ours", "lm-eval"):
                name = f"{kind} {precision}"
                print(name, file=sys.stderr)
                command = [sys.executable, "-m", "tests.bench.evaluation", "--part", kind, precision]
                settings = library_settings() if kind == "ours" else {"TOKENIZERS_PARALLELISM": "false"}
                runs[name] = run([*command, work / "base", work], work / f"{kind}.log", **settings)
    found = {"runs": runs, "machine": {"cpu": describe_machine()["cpu"]}} | judge(runs)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
