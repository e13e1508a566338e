"""The base model as a Prefect task."""

from prefect import task

from tasks.core.config import ModelConfig
from tasks.core.records import BaseRef
from tasks.core.settings import read_settings
from tasks.core.stages import base_stage
from tasks.core.store import open_store, stored
from tasks.policy import STAGE_OPTIONS


@task(name="prepare-base", **STAGE_OPTIONS)
def prepare_base(config: ModelConfig, store_url: str) -> BaseRef:
    """Return the base model as a record; its files are in the store, or stay where the Hub cache has them."""
    from tasks.models.base import locate_base, write_base

    store = open_store(read_settings(store_url))
    source = locate_base(config, store=store)
    base = stored(
        store,
        base_stage(config, source.content),
        BaseRef,
        lambda folder: write_base(source, config, folder),
    )
    return base.model_copy(update={"license": source.license})  # as its card has it now: it is in no key
