"""Score a model: the base alone, or the base with an adapter as it will be shipped."""

from prefect import flow

from tasks.core.config import EvalConfig, ModelConfig
from tasks.core.records import BaseRef, ScoreSheet, TrainedRef
from tasks.core.settings import read_settings
from tasks.core.store import find_artifact, open_store
from tasks.evaluation.steps import score_model as score_model_task
from tasks.evaluation.steps import score_model_stage


@flow(name="score-model", flow_run_name="score-{moment}", persist_result=False)
def score_model_flow(
    model: ModelConfig,
    evaluation: EvalConfig,
    base: BaseRef,
    adapter: TrainedRef | None,
    store_url: str,
    moment: str = "before",
) -> ScoreSheet:
    """Return the scores of a model on every task of the evaluation."""
    return score_model_task(model, evaluation, base, adapter, store_url, moment)


def score_model(
    model: ModelConfig, evaluation: EvalConfig, base: BaseRef, adapter: TrainedRef | None, store_url: str, moment: str
) -> ScoreSheet:
    """Return the scores of a model. What is in the store already needs no subflow, which costs seconds to start."""
    stage = score_model_stage(model, evaluation, base, adapter)
    done = find_artifact(open_store(read_settings(store_url)), stage, ScoreSheet)
    return (score_model_task if done else score_model_flow)(model, evaluation, base, adapter, store_url, moment)
