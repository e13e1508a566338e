"""The rows are the same bytes whoever cleans them: this process, a process per core, or a Dask cluster."""

import json
import os
from pathlib import Path

import pytest

from flows.prepare_data import dask_runner, prepare_data
from tasks.core.config import DataConfig, EvalConfig
from tasks.core.errors import ConfigError
from tasks.core.store import FileStore
from tasks.evaluation.steps import list_evaluation_items

ROWS = 600


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    rows = [{"prompt": f"第{i}题：{i} 乘 {i} 等于多少？", "response": f"等于 {i * i}。"} for i in range(ROWS)]
    rows += [*rows[:5], {"prompt": "空", "response": ""}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(sources=[str(tmp_path / "rows.jsonl")])


@pytest.fixture
def evaluation(tmp_path: Path) -> EvalConfig:
    (tmp_path / "choices.jsonl").write_text(
        json.dumps({"context": "第7题：7 乘 7 等于多少？", "choices": ["49", "48"], "gold": 0}) + "\n"
    )
    task = {"name": "sums", "choices": str(tmp_path / "choices.jsonl")}
    return EvalConfig(capabilities=[{"name": "sums", "role": "target", "tasks": [task]}])


def test_a_dask_cluster_gives_the_same_rows(
    data: DataConfig, evaluation: EvalConfig, tmp_path: Path, prefect_server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("prefect_dask")
    monkeypatch.setenv("FORGETLESS_DASK", "local")
    environment = dict(os.environ)
    monkeypatch.setattr("tasks.data.shards.SHARD_ROWS", 100)
    found = []
    for name, address in (("here", ""), ("dask", "local")):
        monkeypatch.setenv("FORGETLESS_DASK", address)
        store = FileStore(tmp_path / name)
        items = list_evaluation_items(evaluation, store.url)
        found.append(prepare_data(data, items, store.url))
    here, cluster = found
    assert here.artifact.content == cluster.artifact.content
    assert here.quarantined == cluster.quarantined == {"duplicate": 5, "empty_answer": 1, "leaked": 1}
    assert here.read == ROWS + 6 == sum(here.rows.values()) + 7
    assert prepare_data(data, items, store.url).artifact.reused
    assert dict(os.environ) == environment, "a training after it has all its threads"


def test_a_cluster_without_its_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "prefect_dask", None)
    with pytest.raises(ConfigError, match="pip install prefect-dask"):
        dask_runner("local")
