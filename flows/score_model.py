"""Score a model: the base alone, or the base with an adapter as it will be shipped."""

from prefect import flow

from tasks.core.config import EvalConfig, ModelConfig
from tasks.core.records import AdapterRef, BaseRef, ScoreSheet
from tasks.evaluation.steps import score_model as score_model_task


@flow(name="score-model", flow_run_name="score-{moment}", persist_result=False)
def score_model(
    model: ModelConfig,
    evaluation: EvalConfig,
    base: BaseRef,
    adapter: AdapterRef | None,
    store_url: str,
    moment: str = "before",
) -> ScoreSheet:
    """Return the scores of a model on every task of the evaluation."""
    return score_model_task(model, evaluation, base, adapter, store_url, moment)
