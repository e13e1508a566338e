"""The rows that the data benchmark measures with: distinct, always the same, with near duplicates that are known."""

import json
from pathlib import Path

import pytest

from tasks.core.config import DataConfig
from tasks.data.prepare import prepare_dataset
from tests.bench.data import judge_quarantine
from tests.bench.rows import write_rows
from tests.conftest import DATA


@pytest.fixture
def data() -> Path:
    if not (DATA / "sft_zh").is_dir():
        pytest.skip(f"{DATA} is absent; FORGETLESS_DATA names the folder of the shared data")
    return DATA


def test_fewer_rows_are_the_first_of_more(data: Path, tmp_path: Path) -> None:
    near = write_rows(data, 1000, tmp_path / "more.jsonl")
    assert write_rows(data, 400, tmp_path / "less.jsonl") == [line for line in near if line <= 400]
    more = (tmp_path / "more.jsonl").read_text(encoding="utf-8").splitlines()
    assert (tmp_path / "less.jsonl").read_text(encoding="utf-8").splitlines() == more[:400]
    assert len(set(more)) == 1000
    assert 10 <= len(near) <= 35
    assert 250 <= sum(len("".join(json.loads(row).values())) for row in more) / 1000 <= 450


def test_the_near_duplicates_are_found_and_no_other_row_is_one(data: Path, tmp_path: Path) -> None:
    near = write_rows(data, 3000, tmp_path / "rows.jsonl")
    fields = prepare_dataset(DataConfig(sources=[str(tmp_path / "rows.jsonl")]), tmp_path / "out")
    judged = judge_quarantine(tmp_path / "out" / "quarantine.jsonl", near, 3000)
    assert judged["recall"] >= 0.95
    assert judged["survival"] >= 0.99
    assert fields["read"] == 3000
