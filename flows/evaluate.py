"""Score any model on any suite, without training: a base alone, or with an adapter of a run or a folder."""

from typing import Literal

from prefect import flow

from flows.score_model import score_model
from tasks.core.config import EvalConfig, ModelConfig, TrainConfig
from tasks.core.manifest import find_start
from tasks.core.records import ScoreSheet
from tasks.core.settings import quiet_libraries, read_settings
from tasks.core.store import open_store
from tasks.models.steps import prepare_base

quiet_libraries()


@flow(name="evaluate", persist_result=False)
def evaluate(
    model: ModelConfig,
    evaluation: EvalConfig,
    adapter: str | None = None,
    method: Literal["lora", "qlora", "int8", "full"] = "lora",
    store: str | None = None,
) -> ScoreSheet:
    """Return the scores of a base, or of a base with what a run made or a folder of PEFT's holds. `method` is how a
    folder's adapter was trained; of a run it is known."""
    settings = read_settings(store)
    base = prepare_base(model, settings.store_url)
    tuned = find_start(open_store(settings), TrainConfig(start_from=adapter, method=method), base, bring=True)
    return score_model(model, evaluation, base, tuned, settings.store_url, "scores")
