"""Train an adapter on validated data, here or on a deployment."""

from prefect import flow

from flows.dispatch import handing_over, run_on
from tasks.core.config import ModelConfig, TrainConfig
from tasks.core.records import AdapterRef, BaseRef, TokensRef, TrainedRef
from tasks.core.settings import read_settings
from tasks.core.stages import adapter_stage
from tasks.core.store import find_artifact, open_store
from tasks.training.steps import train_adapter as train_adapter_task


@flow(name="train-adapter", flow_run_name="train-{train.method}-r{train.rank}", persist_result=False)
def train_adapter_flow(
    model: ModelConfig,
    train: TrainConfig,
    base: BaseRef,
    tokens: TokensRef,
    start: TrainedRef | None,
    store_url: str,
    run_id: str | None = None,
) -> AdapterRef:
    """Return the trained adapter."""
    return handing_over(store_url, lambda: train_adapter_task(model, train, base, tokens, start, store_url, run_id))


def train_adapter(
    model: ModelConfig,
    train: TrainConfig,
    base: BaseRef,
    tokens: TokensRef,
    start: TrainedRef | None,
    store_url: str,
    run_id: str | None = None,
    on: str | None = None,
) -> AdapterRef:
    """Return the trained adapter, made `on` a deployment or here. What is in the store already needs no subflow, which
    costs seconds to start."""
    store = open_store(read_settings(store_url))
    if on:  # whose device is not known here, so neither is the adapter's key
        asked = {"model": model, "train": train, "base": base, "tokens": tokens, "start": start}
        return run_on(on, {**asked, "store_url": store_url, "run_id": run_id}, AdapterRef, store, "train")
    done = find_artifact(store, adapter_stage(train, base, tokens, start), AdapterRef)
    return (train_adapter_task if done else train_adapter_flow)(model, train, base, tokens, start, store_url, run_id)
