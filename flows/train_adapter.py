"""Train an adapter on validated data."""

from prefect import flow

from tasks.core.config import ModelConfig, TrainConfig
from tasks.core.records import AdapterRef, BaseRef, DatasetRef
from tasks.training.steps import train_adapter as train_adapter_task


@flow(name="train-adapter", flow_run_name="train-{train.method}-r{train.rank}", persist_result=False)
def train_adapter(
    model: ModelConfig, train: TrainConfig, base: BaseRef, dataset: DatasetRef, store_url: str
) -> AdapterRef:
    """Return the trained adapter."""
    return train_adapter_task(model, train, base, dataset, store_url)
