"""Score a model, here or on a deployment: the base alone, or the base with an adapter as it will be shipped."""

from prefect import flow

from flows.dispatch import handing_over, run_on
from tasks.core.config import EvalConfig, ModelConfig
from tasks.core.records import QUANTISING, BaseRef, MergeChoice, ScoreSheet, TokensRef, TrainedRef
from tasks.core.settings import read_settings
from tasks.core.store import find_artifact, open_store
from tasks.evaluation.steps import score_model as score_model_task
from tasks.evaluation.steps import score_model_stage
from tasks.export.steps import choose_merge


class Scored(ScoreSheet):
    """Scores, and what an adapter trained on a quantised base was merged into for them."""

    choice: MergeChoice | None = None


@flow(name="score-model", flow_run_name="score-{moment}", persist_result=False)
def score_model_flow(
    model: ModelConfig,
    evaluation: EvalConfig,
    base: BaseRef,
    adapter: TrainedRef | None,
    store_url: str,
    moment: str = "before",
    tokens: TokensRef | None = None,
) -> Scored:
    """Return the scores of a model on every task of the evaluation. With `tokens`, the rows it was trained on, it is
    decided first what an adapter trained on a quantised base is merged into."""

    def work() -> Scored:
        chosen, choice = _choose(model, base, adapter, tokens, store_url)
        sheet = score_model_task(model, evaluation, base, chosen, store_url, moment)
        return Scored(**sheet.model_dump(), choice=choice)

    return handing_over(store_url, work)


def score_model(
    model: ModelConfig,
    evaluation: EvalConfig,
    base: BaseRef,
    adapter: TrainedRef | None,
    store_url: str,
    moment: str,
    tokens: TokensRef | None = None,
    on: str | None = None,
) -> Scored:
    """Return the scores of a model, as score_model_flow does, made `on` a deployment or here. What is in the store
    already needs no subflow, which costs seconds to start."""
    store = open_store(read_settings(store_url))
    if on:  # whose device is not known here, so neither is the key of its scores
        asked = {"model": model, "evaluation": evaluation, "base": base, "adapter": adapter, "tokens": tokens}
        return run_on(on, {**asked, "store_url": store_url, "moment": moment}, Scored, store, moment)
    adapter, choice = _choose(model, base, adapter, tokens, store_url)
    done = find_artifact(store, score_model_stage(model, evaluation, base, adapter), ScoreSheet)
    sheet = (score_model_task if done else score_model_flow)(model, evaluation, base, adapter, store_url, moment)
    return Scored(**{**sheet.model_dump(), "choice": choice})


def _choose(
    model: ModelConfig, base: BaseRef, adapter: TrainedRef | None, tokens: TokensRef | None, store_url: str
) -> tuple[TrainedRef | None, MergeChoice | None]:
    """Return an adapter as it will be merged, and why; as it is where nothing has to be decided."""
    if adapter is None or tokens is None or adapter.method not in QUANTISING:
        return adapter, None
    choice = choose_merge(model, base, adapter, tokens, store_url)
    return adapter.model_copy(update={"onto": choice.onto}), choice
