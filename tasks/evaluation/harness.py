"""Scoring through lm-eval's Python API: one model in memory, every task of a suite, a record for every item."""

import contextlib
import io
import logging
import math
import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from lm_eval import evaluator

from tasks.core.config import EvalConfig
from tasks.core.errors import ConfigError, ForgetlessError
from tasks.core.records import ItemScore, TaskScore
from tasks.evaluation.generation import corpus_measures, measure_answer
from tasks.evaluation.suite import build_tasks

SHOWN, LONGEST = 300, 4000  # characters of a question or a choice, and of a written answer, that an item keeps

# What lm-eval asks git and pip about this machine takes seconds and prints; the manifest records the environment.
evaluator.get_git_commit_hash = lambda: None
evaluator.add_env_info = lambda storage: None
for _name in ("lm_eval", "lm-eval", "datasets"):
    logging.getLogger(_name).setLevel(logging.ERROR)


def score_model(backend: Any, tokenizer: Any, config: EvalConfig) -> tuple[list[TaskScore], list[ItemScore]]:
    """Return the scores of every task in `config`, and one record per item, of a model of lm-eval's (a SharedPrefixLM).
    Deterministic for the same model.

    Raises ConfigError for unknown tasks, ForgetlessError where a task's data cannot be had."""
    suite = build_tasks(config, tokenizer)
    try:
        # lm-eval prints what its own command line would show, bars included; ours stand on the stream they began with.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            results = evaluator.simple_evaluate(
                model=backend,
                tasks=suite.tasks,
                task_manager=suite.manager,
                limit=config.limit,
                bootstrap_iters=0,
                log_samples=True,
                random_seed=config.seed,
                numpy_random_seed=config.seed,
                torch_random_seed=config.seed,
                fewshot_random_seed=config.seed,
            )
    except (ConnectionError, FileNotFoundError) as error:
        raise ForgetlessError(
            f"An evaluation task's data cannot be had: {str(error).splitlines()[0]}. Go online once, or use task files."
        ) from error
    assert results is not None
    unfinished = getattr(backend, "unfinished", None)
    scores: list[TaskScore] = []
    items: list[ItemScore] = []
    for name in (t.name for c in config.capabilities for t in c.tasks):
        leaves = suite.leaves.get(name) or _leaves(name, results)
        task_items = [
            _item(name, leaf, sample, tokenizer, unfinished)
            for leaf in leaves
            for sample in _one_filter(results["samples"].get(leaf, []))
        ]
        if not task_items:
            raise ConfigError(f"eval task {name}: it has no items to score. Check its split and eval.limit.")
        chances = [
            1 / len(sample["arguments"])
            for leaf in leaves
            for sample in _one_filter(results["samples"].get(leaf, []))
            if task_items[0].acc is not None and len(sample["arguments"]) > 1
        ]
        version = ",".join(str(results["versions"].get(leaf)) for leaf in leaves)
        scores.append(summarise(name, task_items, sum(chances) / len(chances) if chances else None, version))
        items += task_items
    return scores, items


def summarise(name: str, items: list[ItemScore], chance: float | None, version: str) -> TaskScore:
    """Return a task's scores from its items."""

    def mean(field: str) -> float | None:
        values = [v for item in items if (v := getattr(item, field)) is not None]
        return sum(values) / len(values) if values else None

    acc = mean("acc")
    nll = sum(item.nll or 0.0 for item in items)
    size = sum(item.size_bytes or 0 for item in items)
    tokens = sum(item.tokens or 0 for item in items)
    return TaskScore(
        task=name,
        n=len(items),
        acc=acc,
        acc_stderr=None if acc is None else math.sqrt(acc * (1 - acc) / max(1, len(items) - 1)),
        acc_norm=mean("acc_norm"),
        exact_match=mean("exact_match"),
        ece=calibration_error(items),
        generated=_generated(items, mean),
        bits_per_byte=nll / math.log(2) / size if size else None,
        token_perplexity=math.exp(nll / tokens) if tokens else None,
        chance=chance,
        version=version,
    )


def calibration_error(items: list[ItemScore], bins: int = 10) -> float | None:
    """Return the expected calibration error: over bins of equal width, how far confidence is from accuracy, weighted by
    the items in each. None where no item has a confidence."""
    found: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for item in items:
        if item.confidence is not None and item.acc is not None:
            found[min(bins - 1, int(item.confidence * bins))].append((item.confidence, item.acc))
    total = sum(map(len, found.values()))
    gaps = (abs(sum(c for c, _ in part) - sum(a for _, a in part)) for part in found.values())
    return sum(gaps) / total if total else None


def _generated(items: list[ItemScore], mean: Callable[[str], float | None]) -> dict[str, float]:
    written = [item for item in items if item.length is not None]
    if not written:
        return {}
    names = ("f1", "rouge_l", "repetition", "other_language", "refused", "stopped", "length")
    corpus = corpus_measures([item.answered or "" for item in written], [item.expected or "" for item in written])
    return {name: value for name in names if (value := mean(name)) is not None} | corpus


def _leaves(name: str, results: Any) -> list[str]:
    """Return the tasks that a name stands for: itself, or all below a group."""
    below = results.get("group_subtasks", {}).get(name)
    return [leaf for child in below for leaf in _leaves(child, results)] if below else [name]


def _one_filter(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the samples of a task's first filter (GSM8K logs each item once per filter)."""
    by_filter: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for sample in samples:
        by_filter[sample["filter"]].append(sample)
    return next(iter(by_filter.values()), [])


def _item(task: str, leaf: str, sample: dict[str, Any], tokenizer: Any, unfinished: set[str] | None) -> ItemScore:
    doc = sample["doc"] if isinstance(sample["doc"], dict) else {}
    cluster = doc.get("cluster")
    prompt = str(sample["arguments"][0][0])
    fields: dict[str, Any] = {
        "task": task,
        "doc": sample["doc_hash"],
        "prompt": sample["prompt_hash"],
        "cluster": str(cluster) if cluster is not None else leaf if leaf != task else None,
        "question": str(doc["question"])[:SHOWN] if isinstance(doc.get("question"), str) else prompt[-SHOWN:],
        **{name: float(sample[name]) for name in ("acc", "acc_norm", "exact_match") if name in sample},
    }
    responses = [r[0] for r in sample["resps"]]
    if "acc" in fields and len(responses) > 1 and isinstance(responses[0], tuple | list):
        scores = [float(r[0]) for r in responses]
        best = scores.index(max(scores))
        choices = [str(arguments[-1]).strip() for arguments in sample["arguments"]]
        fields |= {
            "confidence": 1 / sum(math.exp(score - scores[best]) for score in scores),
            "answered": choices[best][:SHOWN],
        }
        gold = int(sample["target"]) if re.fullmatch(r"-?\d+", str(sample["target"])) else None
        if gold is not None:
            if not 0 <= gold < len(scores):  # lm-eval only warns, and counts it as answered wrongly
                raise ConfigError(
                    f"eval task {leaf}: the answer {gold} is none of the {len(scores)} choices (counted from 0) of its "
                    f"item {fields['question'][-80:]!r}. Correct or remove it."
                )
            fields["margin"] = scores[gold] - max(s for i, s in enumerate(scores) if i != gold)
            fields["expected"] = choices[gold][:SHOWN]
    elif len(responses) == 1 and isinstance(responses[0], str):
        answer, expected = responses[0], str(sample["target"])
        fields |= {"answered": answer[:LONGEST], "expected": expected[:LONGEST]}
        if isinstance(doc.get("answer"), str) and "context" in doc:  # a file of ours: lm-eval's tasks have their own
            fields |= measure_answer(answer, expected, fields["question"])
            fields["stopped"] = None if unfinished is None else float(prompt not in unfinished)
    elif len(responses) == 1:
        value = responses[0]
        text = str(sample["arguments"][0][-1])
        fields |= {
            "nll": -float(value[0] if isinstance(value, tuple | list) else value),
            "size_bytes": len(text.encode()),
            "tokens": len(tokenizer(text, add_special_tokens=False)["input_ids"]),
            "expected": text[:SHOWN],
        }
    return ItemScore(**fields)
