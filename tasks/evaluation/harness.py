"""Scoring through lm-eval's Python API: one model in memory, every task of a suite, a record for every item."""

import contextlib
import io
import logging
import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from lm_eval import evaluator

from tasks.core.config import EvalConfig
from tasks.core.errors import ConfigError, ForgetlessError
from tasks.core.records import ItemScore, TaskScore
from tasks.evaluation.prefix_lm import SharedPrefixLM
from tasks.evaluation.suite import build_tasks

# What lm-eval asks git and pip about this machine takes seconds and prints; the manifest records the environment.
evaluator.get_git_commit_hash = lambda: None
evaluator.add_env_info = lambda storage: None
for _name in ("lm_eval", "lm-eval", "datasets"):
    logging.getLogger(_name).setLevel(logging.ERROR)


def score_model(
    model: Any, tokenizer: Any, config: EvalConfig, on_progress: Callable[[int, int], None]
) -> tuple[list[TaskScore], list[ItemScore]]:
    """Return the scores of every task in `config`, and one record per item. Deterministic for the same model.

    Raises ConfigError for unknown tasks, ForgetlessError where a task's data cannot be had."""
    suite = build_tasks(config, tokenizer)
    backend = SharedPrefixLM(model, tokenizer, config.batch_tokens, on_progress)
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
    scores: list[TaskScore] = []
    items: list[ItemScore] = []
    for name in (t.name for c in config.capabilities for t in c.tasks):
        leaves = suite.leaves.get(name) or _leaves(name, results)
        task_items = [
            _item(name, leaf, sample, tokenizer)
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
        bits_per_byte=nll / math.log(2) / size if size else None,
        token_perplexity=math.exp(nll / tokens) if tokens else None,
        chance=chance,
        version=version,
    )


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


def _item(task: str, leaf: str, sample: dict[str, Any], tokenizer: Any) -> ItemScore:
    doc = sample["doc"]
    cluster = doc.get("cluster") if isinstance(doc, dict) else None
    fields: dict[str, Any] = {
        "task": task,
        "doc": sample["doc_hash"],
        "prompt": sample["prompt_hash"],
        "cluster": str(cluster) if cluster is not None else leaf if leaf != task else None,
        **{name: float(sample[name]) for name in ("acc", "acc_norm", "exact_match") if name in sample},
    }
    responses = [r[0] for r in sample["resps"]]
    if "acc" in fields and len(responses) > 1 and isinstance(responses[0], tuple | list):
        scores = [float(r[0]) for r in responses]
        gold = int(sample["target"]) if str(sample["target"]).isdigit() else None
        if gold is not None and gold < len(scores):
            fields["margin"] = scores[gold] - max(s for i, s in enumerate(scores) if i != gold)
    elif len(responses) == 1 and not isinstance(responses[0], str):
        value = responses[0]
        text = str(sample["arguments"][0][-1])
        fields |= {
            "nll": -float(value[0] if isinstance(value, tuple | list) else value),
            "size_bytes": len(text.encode()),
            "tokens": len(tokenizer(text, add_special_tokens=False)["input_ids"]),
        }
    return ItemScore(**fields)
