"""Scoring and comparing as Prefect tasks."""

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from prefect import task

from tasks.core.config import EvalConfig, ModelConfig
from tasks.core.digest import canonical_json
from tasks.core.progress import report_progress
from tasks.core.records import BaseRef, FileRef, ForgettingReport, ItemsRef, ScoreSheet, ShippingCurve, TrainedRef
from tasks.core.settings import read_settings
from tasks.core.stages import (
    Stage,
    comparison_stage,
    file_scores_stage,
    items_stage,
    precision,
    responses_stage,
    scores_stage,
    shipping_stage,
)
from tasks.core.store import open_store, stored
from tasks.policy import STAGE_OPTIONS


@task(name="list-evaluation-items", **STAGE_OPTIONS)
def list_evaluation_items(evaluation: EvalConfig, store_url: str) -> ItemsRef:
    """Return the texts of all evaluation items, which no training row may hold."""
    from tasks.evaluation.suite import suite_digest

    def make(folder: Path) -> dict[str, Any]:
        from tasks.evaluation.forgetting import ITEMS
        from tasks.evaluation.hub_data import hub_data
        from tasks.evaluation.suite import read_item_texts

        with hub_data(store):
            texts = read_item_texts(evaluation)
        lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in texts)
        (folder / ITEMS).write_text(lines, encoding="utf-8")
        return {"items": len(texts)}

    store = open_store(read_settings(store_url))
    return stored(store, items_stage(suite_digest(evaluation)), ItemsRef, make)


@task(name="score-model", task_run_name="score-{moment}", **STAGE_OPTIONS)
def score_model(
    model: ModelConfig, evaluation: EvalConfig, base: BaseRef, adapter: TrainedRef | None, store_url: str, moment: str
) -> ScoreSheet:
    """Return the scores of the base, or of base and adapter as they will be shipped; items are in the store.

    `moment` (before, after) only names the progress shown."""
    store = open_store(read_settings(store_url))
    stage = score_model_stage(model, evaluation, base, adapter)

    def make(folder: Path) -> dict[str, Any]:
        from tasks.evaluation.divergence import base_divergence, with_divergence
        from tasks.evaluation.forgetting import ITEMS
        from tasks.evaluation.harness import score_model as score
        from tasks.evaluation.hub_data import hub_data
        from tasks.evaluation.prefix_lm import SharedPrefixLM
        from tasks.evaluation.responses import Responses
        from tasks.evaluation.suite import kept_texts
        from tasks.evaluation.vllm_backend import open_vllm
        from tasks.models.base import open_base
        from tasks.models.load import free_memory, load_shipped, pick_dtype
        from tasks.models.tokenizer import load_tokenizer

        started = time.monotonic()
        responses = Responses(store, responses_stage(evaluation, base, adapter, model.trust_remote_code).key)
        report_progress(moment, 0, 0, "loading the model")
        where = open_base(store, base, model)
        weights = adapter.folder(store.local_folder(adapter.artifact)) if adapter else None
        method = adapter.merges_as if adapter else "lora"
        more = (method, pick_dtype("auto"), precision()["device"], model.trust_remote_code)
        loaded = load_shipped(where, weights, *more, strength=adapter.strength if adapter else 1.0)
        tokenizer = load_tokenizer(where, base.template, model.trust_remote_code)
        drift = {}
        is_merged = adapter is not None and method not in ("prefix", "prompt")
        if is_merged and (kept := kept_texts(evaluation)):  # before the scorer takes the model over
            report_progress(moment, 0, 0, "drift from the base")
            plain = load_shipped(where, None, *more)
            drift = {name: base_divergence(plain, loaded, tokenizer, texts) for name, texts in kept.items()}
            del plain
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:

            def say(done: int, total: int) -> None:
                report_progress(moment, done, total)

            if evaluation.backend == "vllm":
                backend = open_vllm(loaded, tokenizer, Path(scratch))
            else:
                backend = SharedPrefixLM(loaded, tokenizer, evaluation.batch_tokens, say)
            responses.attach(backend)
            with hub_data(store):
                tasks, items = score(backend, tokenizer, evaluation)
        responses.write(stage.key)
        (folder / ITEMS).write_text("".join(item.model_dump_json() + "\n" for item in items), encoding="utf-8")
        del loaded, backend  # the backend holds the model too
        free_memory()
        settings = {
            **precision(),
            **{name: str(getattr(evaluation, name)) for name in ("limit", "seed", "batch_tokens", "backend")},
        }
        tasks = [with_divergence(t, drift[t.task]) if t.task in drift else t for t in tasks]
        return {"tasks": [t.model_dump() for t in tasks], "settings": settings, "seconds": time.monotonic() - started}

    return stored(store, stage, ScoreSheet, make)


@task(name="score-file", task_run_name="score-{file.name}", **STAGE_OPTIONS)
def score_file(model: ModelConfig, evaluation: EvalConfig, base: BaseRef, file: FileRef, store_url: str) -> ScoreSheet:
    """Return the scores of a GGUF file in llama.cpp, with the tokenizer and template of its base."""
    from tasks.evaluation.suite import suite_digest

    store = open_store(read_settings(store_url))
    stage = file_scores_stage(evaluation, suite_digest(evaluation), file, base)

    def make(folder: Path) -> dict[str, Any]:
        from tasks.evaluation.forgetting import ITEMS
        from tasks.evaluation.gguf_backend import GgufLM
        from tasks.evaluation.harness import score_model as score
        from tasks.evaluation.hub_data import hub_data
        from tasks.evaluation.responses import Responses
        from tasks.models.base import open_base
        from tasks.models.tokenizer import load_tokenizer

        started = time.monotonic()
        tokenizer = load_tokenizer(open_base(store, base, model), base.template, model.trust_remote_code)
        responses = Responses(store, stage.key)
        path = store.local_folder(file.artifact) / file.name
        backend = GgufLM(
            path,
            tokenizer,
            base.max_tokens,
            os.cpu_count() or 1,
            lambda done, total: report_progress("served", done, total),
        )
        try:
            responses.attach(backend)
            with hub_data(store):
                tasks, items = score(backend, tokenizer, evaluation)
        finally:
            backend.close()
        responses.write(stage.key)
        (folder / ITEMS).write_text("".join(item.model_dump_json() + "\n" for item in items), encoding="utf-8")
        settings = {name: str(getattr(evaluation, name)) for name in ("limit", "seed")}
        settings |= {"backend": "llama.cpp", "version": stage.section["version"], "device": stage.section["device"]}
        return {"tasks": [t.model_dump() for t in tasks], "settings": settings, "seconds": time.monotonic() - started}

    return stored(store, stage, ScoreSheet, make)


def score_model_stage(model: ModelConfig, evaluation: EvalConfig, base: BaseRef, adapter: TrainedRef | None) -> Stage:
    """Return what the scores of a model depend on."""
    from tasks.evaluation.suite import suite_digest

    return scores_stage(evaluation, suite_digest(evaluation), base, adapter, model.trust_remote_code)


@task(name="compare-scores", **STAGE_OPTIONS)
def compare_scores(
    evaluation: EvalConfig, before: ScoreSheet, after: ScoreSheet, store_url: str, half: int | None = None
) -> ForgettingReport:
    """Return the deltas with their intervals, and the verdict: on all items, or on the half that chooses (0) or
    confirms (1)."""
    store = open_store(read_settings(store_url))

    def make(folder: Path) -> dict[str, Any]:
        from tasks.evaluation.forgetting import compare_scores as compare
        from tasks.evaluation.forgetting import read_items
        from tasks.evaluation.shipping import compare_half

        sheets = (before, read_items(store, before), after, read_items(store, after))
        fields = compare(evaluation, *sheets) if half is None else compare_half(evaluation, *sheets, half)
        (folder / "report.json").write_bytes(canonical_json(fields))
        return fields

    return stored(store, comparison_stage(evaluation, before, after, half), ForgettingReport, make)


@task(name="choose-shipping", **STAGE_OPTIONS)
def choose_shipping(
    evaluation: EvalConfig, before: ScoreSheet, scored: list[tuple[TrainedRef, ScoreSheet]], store_url: str
) -> ShippingCurve:
    """Return what an adapter changes at each strength or step, and which is the best inside the budgets."""
    store = open_store(read_settings(store_url))

    def make(folder: Path) -> dict[str, Any]:
        from tasks.evaluation.forgetting import read_items
        from tasks.evaluation.shipping import choose_shipping as choose

        sheets = [(adapter, sheet, read_items(store, sheet)) for adapter, sheet in scored]
        fields = choose(evaluation, before, read_items(store, before), sheets)
        (folder / "curve.json").write_bytes(canonical_json(fields))
        return fields

    return stored(store, shipping_stage(evaluation, before, scored), ShippingCurve, make)
