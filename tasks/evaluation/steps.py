"""Scoring and comparing as Prefect tasks."""

import json
import time
from pathlib import Path
from typing import Any

from prefect import task

from tasks.core.config import EvalConfig, ModelConfig
from tasks.core.digest import canonical_json
from tasks.core.progress import report_progress
from tasks.core.records import BaseRef, ForgettingReport, ItemsRef, ScoreSheet, TrainedRef
from tasks.core.settings import read_settings
from tasks.core.stages import Stage, comparison_stage, items_stage, precision, scores_stage
from tasks.core.store import open_store, stored
from tasks.policy import STAGE_OPTIONS


@task(name="list-evaluation-items", **STAGE_OPTIONS)
def list_evaluation_items(evaluation: EvalConfig, store_url: str) -> ItemsRef:
    """Return the texts of all evaluation items, which no training row may hold."""
    from tasks.evaluation.suite import suite_digest

    def make(folder: Path) -> dict[str, Any]:
        from tasks.evaluation.forgetting import ITEMS
        from tasks.evaluation.suite import read_item_texts

        texts = read_item_texts(evaluation)
        lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in texts)
        (folder / ITEMS).write_text(lines, encoding="utf-8")
        return {"items": len(texts)}

    return stored(open_store(read_settings(store_url)), items_stage(suite_digest(evaluation)), ItemsRef, make)


@task(name="score-model", task_run_name="score-{moment}", **STAGE_OPTIONS)
def score_model(
    model: ModelConfig, evaluation: EvalConfig, base: BaseRef, adapter: TrainedRef | None, store_url: str, moment: str
) -> ScoreSheet:
    """Return the scores of the base, or of base and adapter as they will be shipped; items are in the store.

    `moment` (before, after) only names the progress shown."""
    store = open_store(read_settings(store_url))
    stage = score_model_stage(model, evaluation, base, adapter)

    def make(folder: Path) -> dict[str, Any]:
        from tasks.evaluation.forgetting import ITEMS
        from tasks.evaluation.harness import score_model as score
        from tasks.models.base import open_base
        from tasks.models.load import free_memory, load_shipped, pick_dtype
        from tasks.models.tokenizer import load_tokenizer

        started = time.monotonic()
        report_progress(moment, 0, 0, "loading the model")
        where = open_base(store, base, model)
        weights = store.local_folder(adapter.artifact) if adapter else None
        loaded = load_shipped(
            where,
            weights,
            adapter.method if adapter else "lora",
            pick_dtype("auto"),
            precision()["device"],
            model.trust_remote_code,
        )
        tokenizer = load_tokenizer(where, base.template, model.trust_remote_code)
        tasks, items = score(loaded, tokenizer, evaluation, lambda done, total: report_progress(moment, done, total))
        (folder / ITEMS).write_text("".join(item.model_dump_json() + "\n" for item in items), encoding="utf-8")
        del loaded
        free_memory()
        settings = {
            **precision(),
            **{name: str(getattr(evaluation, name)) for name in ("limit", "seed", "batch_tokens")},
        }
        return {"tasks": [t.model_dump() for t in tasks], "settings": settings, "seconds": time.monotonic() - started}

    return stored(store, stage, ScoreSheet, make)


def score_model_stage(model: ModelConfig, evaluation: EvalConfig, base: BaseRef, adapter: TrainedRef | None) -> Stage:
    """Return what the scores of a model depend on."""
    from tasks.evaluation.suite import suite_digest

    return scores_stage(evaluation, suite_digest(evaluation), base, adapter, model.trust_remote_code)


@task(name="compare-scores", **STAGE_OPTIONS)
def compare_scores(evaluation: EvalConfig, before: ScoreSheet, after: ScoreSheet, store_url: str) -> ForgettingReport:
    """Return the deltas with their intervals, and the verdict."""
    store = open_store(read_settings(store_url))

    def make(folder: Path) -> dict[str, Any]:
        from tasks.evaluation.forgetting import compare_scores as compare
        from tasks.evaluation.forgetting import read_items

        fields = compare(evaluation, before, read_items(store, before), after, read_items(store, after))
        (folder / "report.json").write_bytes(canonical_json(fields))
        return fields

    return stored(store, comparison_stage(evaluation, before, after), ForgettingReport, make)
