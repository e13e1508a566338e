"""The store: the same promises on a folder and on an S3 server over HTTP."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tasks.core.digest import content_digest
from tasks.core.errors import StoreError
from tasks.core.records import ModelRef
from tasks.core.s3 import S3Store
from tasks.core.settings import Settings, read_settings
from tasks.core.stages import Stage
from tasks.core.store import FileStore, Store, check_writable, find_artifact, open_store, stored

STAGE = Stage("merged", 1, ["abc"], {"dtype": "float32"})


def make(folder: Path) -> dict[str, str]:
    (folder / "sub").mkdir()
    (folder / "model.bin").write_bytes(b"weights")
    (folder / "sub" / "notes.txt").write_text("hello")
    return {"dtype": "float32"}


def test_an_artifact_is_made_once_and_found_again(any_store: Store) -> None:
    first = stored(any_store, STAGE, ModelRef, make)
    again = stored(any_store, STAGE, ModelRef, lambda folder: pytest.fail("made twice"))
    assert not first.artifact.reused
    assert again.artifact.reused
    assert again.artifact.content == first.artifact.content
    assert again.dtype == "float32"
    folder = any_store.local_folder(again.artifact)
    assert (folder / "model.bin").read_bytes() == b"weights"
    assert (folder / "sub" / "notes.txt").read_text() == "hello"
    assert again.artifact.size_bytes == len(b"weights") + len("hello")


def test_a_failed_stage_leaves_nothing_that_looks_whole(any_store: Store) -> None:
    def fail(folder: Path) -> dict[str, str]:
        (folder / "half").write_text("half")
        raise RuntimeError("killed here")

    with pytest.raises(RuntimeError):
        stored(any_store, STAGE, ModelRef, fail)
    assert find_artifact(any_store, STAGE, ModelRef) is None
    assert stored(any_store, STAGE, ModelRef, make).dtype == "float32"


def test_a_folder_without_its_marker_is_made_anew(store: FileStore) -> None:
    partial = store.root / "artifacts" / "merged" / STAGE.key
    partial.mkdir(parents=True)
    (partial / "model.bin").write_bytes(b"par")
    record = stored(store, STAGE, ModelRef, make)
    assert (store.local_folder(record.artifact) / "model.bin").read_bytes() == b"weights"


def test_a_damaged_marker_is_said_with_what_to_do(any_store: Store) -> None:
    stored(any_store, STAGE, ModelRef, make)
    any_store.write_bytes(f"artifacts/merged/{STAGE.key}/_artifact.json", b"{}")
    with pytest.raises(StoreError, match="Delete that folder to make it anew"):
        find_artifact(any_store, STAGE, ModelRef)


def test_small_objects_and_folders_are_listed(any_store: Store) -> None:
    assert any_store.read_bytes("runs/a/manifest.json") is None
    any_store.write_bytes("runs/a/manifest.json", b"1")
    any_store.write_bytes("runs/b/manifest.json", b"2")
    any_store.write_bytes("runs/a/manifest.json", b"3")
    assert any_store.read_bytes("runs/a/manifest.json") == b"3"
    assert any_store.list_folders("runs") == ["a", "b"]
    assert any_store.list_folders("nothing") == []
    check_writable(any_store)


def test_of_two_writers_one_creates(any_store: Store) -> None:
    assert any_store.create_bytes("registry/a/1.json", b"first")
    assert not any_store.create_bytes("registry/a/1.json", b"second")
    assert any_store.create_bytes("registry/a/1.json", b"first"), "one's own"
    assert any_store.read_bytes("registry/a/1.json") == b"first"


def test_of_many_writers_at_once_one_creates(any_store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        for place in range(5):
            won = list(pool.map(lambda i, p=place: any_store.create_bytes(f"a/{p}", b"%d" % i), range(8)))
            assert sum(won) == 1
            assert any_store.read_bytes(f"a/{place}") == b"%d" % won.index(True)


def test_files_are_listed_with_the_stores_time_and_deleted(any_store: Store) -> None:
    before = any_store.clock()
    for path in ("a/1", "a/b/2", "ab/3"):
        any_store.write_bytes(path, path.encode())
    found = sorted(any_store.list_files("a"), key=lambda file: file.path)
    assert [(file.path, file.size) for file in found] == [("a/1", 3), ("a/b/2", 5)]
    assert all(before - 2 <= file.written <= any_store.clock() + 2 for file in found)
    assert len(list(any_store.list_files(""))) == 3
    any_store.delete("a/1")
    assert [file.path for file in any_store.list_files("a")] == ["a/b/2"]
    any_store.delete("a")
    any_store.delete("a")
    assert [file.path for file in any_store.list_files("")] == ["ab/3"]


def test_wrong_bytes_from_s3_are_detected(any_store: Store) -> None:
    if not isinstance(any_store, S3Store):
        pytest.skip("a folder is read in place; only downloads are verified")
    record = stored(any_store, STAGE, ModelRef, make)
    any_store.write_bytes(f"{any_store.files_path(record.artifact)}/model.bin", b"tampered")
    with pytest.raises(StoreError, match="other bytes than were written"):
        any_store.local_folder(record.artifact)


def test_a_missing_bucket_is_one_sentence(any_store: Store, tmp_path: Path) -> None:
    if not isinstance(any_store, S3Store):
        pytest.skip("buckets are S3's")
    with pytest.raises(StoreError, match="Check AWS_ENDPOINT_URL_S3"):
        check_writable(S3Store("no-such-bucket", "", tmp_path))


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("not a folder")
    with pytest.raises(StoreError, match="Could not write work/probe"):
        check_writable(FileStore(blocker / "store"))


def test_a_full_disk_is_one_sentence(store: FileStore) -> None:
    import errno

    def full(folder: Path) -> dict[str, str]:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(StoreError, match="the disk is full. Free some space, or choose another place with --store"):
        stored(store, STAGE, ModelRef, full)


def test_paths_cannot_leave_the_store(store: FileStore) -> None:
    with pytest.raises(StoreError, match="leaves the store"):
        store.write_bytes("../outside", b"x")


def rewrite_marker(store: Store, change: Callable[[dict[str, Any]], None]) -> ModelRef:
    """Return an artifact whose marker somebody else has changed since it was found."""
    record = stored(store, STAGE, ModelRef, make)
    path = f"artifacts/{STAGE.kind}/{STAGE.key}/_artifact.json"
    marker = json.loads(store.read_bytes(path) or b"")
    change(marker)
    store.write_bytes(path, json.dumps(marker).encode())
    return record


NAMES = [
    "../x",
    "../../../x",
    "/etc/x",
    "a/../../x",
    "..",
    ".",
    "",
    "a//b",
    "a\\..\\b",
    "x\n",
    "a\x00b",
    "/tmp/{place}",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_marker_writes_nothing_outside_the_cache(name: str, s3_store: S3Store, tmp_path: Path) -> None:
    store = s3_store
    name = name.replace("/tmp/{place}", str(tmp_path / "outside"))
    with contextlib.suppress(StoreError):  # a name that the test's server does not take
        store.write_bytes(f"{store.files_path(stored(store, STAGE, ModelRef, make).artifact)}/{name}", b"evil")

    def change(marker: dict[str, Any]) -> None:
        marker["files"] = {name: {"sha256": hashlib.sha256(b"evil").hexdigest(), "size": 4}}
        marker["artifact"]["content"] = content_digest({name: hashlib.sha256(b"evil").hexdigest()})

    record = rewrite_marker(store, change)
    found = find_artifact(store, STAGE, ModelRef)
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(StoreError, match="names a file outside its folder, .*: do not trust that store."):
        store.local_folder(found.artifact)
    with pytest.raises(StoreError, match="is not in the store any more"):
        store.local_folder(record.artifact)  # what was computed from it keeps its digest
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "change",
    [
        lambda marker: marker["files"]["model.bin"].update(size=-1),
        lambda marker: marker["files"]["model.bin"].update(size="7"),
        lambda marker: marker["files"]["model.bin"].update(sha256="0" * 64),
        lambda marker: marker["files"].pop("model.bin"),
        lambda marker: marker.update(files=["model.bin"]),
        lambda marker: marker.pop("files"),
        lambda marker: marker["files"].update({"more.bin": {"sha256": "0" * 64, "size": 1}}),
    ],
)
def test_a_marker_that_lies_is_refused(s3_store: S3Store, change: Callable[[dict[str, Any]], None]) -> None:
    record = rewrite_marker(s3_store, change)
    with pytest.raises(StoreError, match="cannot be read .* Delete that folder to make it anew"):
        s3_store.local_folder(record.artifact)


@pytest.mark.parametrize("field", ["kind", "key", "content"])
@pytest.mark.parametrize("name", ["..", "../x", "/etc", "a/b", "", ".x"])
def test_an_artifact_is_named_by_parts_of_a_path(any_store: Store, field: str, name: str) -> None:
    rewrite_marker(any_store, lambda marker: marker["artifact"].update({field: name}))
    with pytest.raises(StoreError, match="cannot be read .* Delete that folder to make it anew"):
        find_artifact(any_store, STAGE, ModelRef)


def test_a_link_in_a_folder_store_leads_nowhere(store: FileStore, tmp_path: Path) -> None:
    record = stored(store, STAGE, ModelRef, make)
    secret = tmp_path / "secret"
    secret.write_text("private")
    folder = store.local_folder(record.artifact)
    (folder / "model.bin").unlink()
    (folder / "model.bin").symlink_to(secret)
    with pytest.raises(StoreError, match="holds a link, .*model.bin, and might lead anywhere"):
        store.local_folder(record.artifact)
    (store.root / "runs").symlink_to(tmp_path)
    for act in (store.read_bytes, store.delete, lambda path: list(store.stream(path))):
        with pytest.raises(StoreError, match="leaves the store"):
            act("runs/secret")
    assert secret.read_text() == "private"


def test_keys_depend_on_content_and_settings_not_on_names() -> None:
    assert STAGE.key == Stage("merged", 1, ["abc"], {"dtype": "float32"}).key
    others = [
        Stage("gguf", 1, ["abc"], {"dtype": "float32"}),
        Stage("merged", 2, ["abc"], {"dtype": "float32"}),
        Stage("merged", 1, ["abd"], {"dtype": "float32"}),
        Stage("merged", 1, ["abc"], {"dtype": "bfloat16"}),
    ]
    assert len({STAGE.key, *(s.key for s in others)}) == 5


def test_store_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGETLESS_STORE", str(tmp_path / "a b"))
    assert isinstance(open_store(read_settings()), FileStore)
    assert open_store(read_settings()).url == (tmp_path / "a b").as_uri()
    with pytest.raises(StoreError, match="is not a store"):
        open_store(Settings("ftp://x/y", tmp_path, ""))


def test_the_marker_lists_every_file_with_its_sha256(store: FileStore) -> None:
    record = stored(store, STAGE, ModelRef, make)
    marker = json.loads((store.local_folder(record.artifact) / "_artifact.json").read_text())
    assert set(marker["files"]) == {"model.bin", "sub/notes.txt"}
    assert all(len(f["sha256"]) == 64 for f in marker["files"].values())
