"""What is kept on this machine: the cache is for its user alone, and nothing is for everyone to write."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.cli import main
from tasks.core.cache import make_cache
from tasks.core.records import ModelRef
from tasks.core.s3 import S3Store
from tasks.core.stages import Stage
from tasks.core.store import FileStore, stored
from tasks.data.downloads import fetch, list_remote


@pytest.fixture(params=[0o022, 0o002, 0o000])
def mask(request: pytest.FixtureRequest) -> Iterator[int]:
    former = os.umask(request.param)
    yield request.param
    os.umask(former)


def rights(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def make(folder: Path) -> dict[str, str]:
    (folder / "sub").mkdir()
    (folder / "sub" / "model.bin").write_bytes(b"weights")
    return {"dtype": "float32"}


def test_the_cache_is_for_its_user_alone(
    mask: int, s3_store: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = stored(s3_store, Stage("merged", 1, ["abc"], {}), ModelRef, make)
    s3_store.local_folder(record.artifact)
    assert rights(tmp_path / "cache") == 0o700
    monkeypatch.setenv("FORGETLESS_CACHE", str(tmp_path / "other" / "cache"))
    s3_store.client.put_object(Bucket=s3_store.bucket, Key="a.json", Body=b"ok")
    path = fetch(list_remote(f"s3://{s3_store.bucket}/a.json")[0])
    assert path.read_bytes() == b"ok" and rights(path) == 0o600
    assert rights(tmp_path / "other" / "cache") == 0o700


def test_a_cache_that_is_there_stays_as_its_user_made_it(tmp_path: Path) -> None:
    tmp_path.chmod(0o750)
    assert rights(make_cache(tmp_path)) == 0o750


def test_no_command_leaves_what_everyone_may_write(
    mask: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a?", "response": "b"}\n' * 3)
    (tmp_path / "rows.jsonl").chmod(0o600)
    main(["doctor", "--store", str(tmp_path / "store")])
    main(["data", "check", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out")])
    main(["data", "convert", str(tmp_path / "rows.jsonl"), "--to", "messages", "--out", str(tmp_path / "out.jsonl")])
    store = FileStore(tmp_path / "store")
    stored(store, Stage("merged", 1, ["abc"], {}), ModelRef, make)
    made = [p for folder in ("store", "out") for p in (tmp_path / folder).rglob("*")] + [tmp_path / "out.jsonl"]
    assert len(made) > 8
    for path in made:
        assert not rights(path) & stat.S_IWOTH, f"{path} {rights(path):o}"
        if mask == 0o002 and path.is_dir() and path.parent.name == "artifacts":
            assert rights(path) & stat.S_IWGRP  # a group that shares a store may write into it
