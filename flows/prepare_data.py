"""Clean the training rows shard by shard as Prefect tasks, on whatever the flow's task runner stands for.

Worth it where one machine is not enough: `FORGETLESS_DASK` names a Dask scheduler (tcp://host:8786), or `local` for a
cluster on this machine. Without it the rows are cleaned by a process per core, with no task per shard.
"""

import os
from collections import deque
from collections.abc import Iterator
from typing import Any

from prefect import flow, task
from prefect.futures import PrefectFuture

from tasks.core.config import DataConfig, Recipe
from tasks.core.errors import ConfigError
from tasks.core.records import BaseRef, DatasetRef, ItemsRef, TokensRef
from tasks.core.settings import read_settings
from tasks.core.store import find_artifact, open_store
from tasks.data.steps import dataset_stage_of, fetch_dataset, generate_replay, store_dataset, tokenise_dataset
from tasks.policy import STAGE_OPTIONS

SHARDS_AT_ONCE = 64


@task(name="clean-shard", **STAGE_OPTIONS)
def clean_one_shard(data: bytes, origin: Any, config: DataConfig, items: Any) -> Any:
    """Return a cleaned shard; a shard whose worker died is cleaned by another."""
    from tasks.data.shards import clean_shard

    return clean_shard(data, origin, config, items)


@flow(name="prepare-data", persist_result=False)
def prepare_data_flow(data: DataConfig, items: ItemsRef, store_url: str) -> DatasetRef:
    """Return the training rows, cleaned by this flow's task runner."""

    def submit(jobs: Iterator[Any], config: DataConfig, index: Any) -> Iterator[Any]:
        clean: Any = clean_one_shard.submit
        waiting: deque[PrefectFuture[Any]] = deque()
        for job in jobs:
            waiting.append(clean(*job, config, index))
            if len(waiting) >= SHARDS_AT_ONCE:  # so many and no more are in memory
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    return store_dataset(data, items, store_url, submit)


def prepare_data(data: DataConfig, items: ItemsRef, store_url: str) -> DatasetRef:
    """Return the training rows, cleaned here or on the Dask cluster that `FORGETLESS_DASK` names."""
    settings = read_settings(store_url)
    store = open_store(settings)
    if not settings.dask or find_artifact(store, dataset_stage_of(data, items, store), DatasetRef):
        return fetch_dataset(data, items, store_url)
    before = dict(os.environ)
    try:
        return prepare_data_flow.with_options(task_runner=dask_runner(settings.dask))(data, items, store_url)
    finally:  # Dask says in here that its workers have a thread each, and what trains later would hear it
        os.environ.clear()
        os.environ.update(before)


def tokenise_data(recipe: Recipe, base: BaseRef, dataset: DatasetRef, items: ItemsRef, store_url: str) -> TokensRef:
    """Return the rows as training reads them; among them the base's own answers where the recipe has replay prompts."""
    replay = recipe.data.replay
    answered = (
        generate_replay(recipe.model, base, replay, dataset, items, store_url) if replay and replay.prompts else None
    )
    return tokenise_dataset(recipe.model, base, recipe.data, dataset, answered, recipe.train.max_tokens, store_url)


def dask_runner(address: str) -> Any:
    """Return the task runner of a Dask scheduler's address, or of a cluster on this machine. Raises ConfigError."""
    try:
        from prefect_dask import DaskTaskRunner
    except ImportError:
        raise ConfigError(
            "FORGETLESS_DASK is set, but prefect-dask is not installed. Install it: pip install prefect-dask"
        ) from None
    if address == "local":
        return DaskTaskRunner(cluster_kwargs={"threads_per_worker": 1, "dashboard_address": None})
    return DaskTaskRunner(address=address)
