"""Faults that somebody must mend: a clear end, nothing half that is taken for whole, and the same call goes on then."""

import subprocess
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from flows.store import verify_artifacts
from tasks.core import lease
from tasks.core.errors import StoreError
from tasks.core.records import ArtifactRef, ModelRef
from tasks.core.s3 import MIB, S3Store
from tasks.core.store import MARKER, FileStore, Store, find_artifact, stored
from tests.core import test_s3
from tests.core.faulty_s3 import FaultyS3
from tests.core.test_s3 import SIZE, STAGE, proxy  # noqa: F401 (a fixture)


def mount(folder: Path, options: str) -> None:
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a disk of its own cannot be mounted here: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MiB; `mount(disk, "remount,...")` changes it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount(folder, "size=4m")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def write_plainly(file: Path) -> None:
    file.write_bytes(b"weights!" * (MIB // 2))


def write_safetensors(file: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"a": torch.arange(MIB // 2, dtype=torch.float64)}, file)


def write_numpy(file: Path) -> None:
    import numpy

    with file.open("wb") as target:
        numpy.arange(MIB // 2, dtype="<f8").tofile(target)


def check_nothing_half(store: Store) -> None:
    """Fail unless the artifact is not there, and nothing of it is taken for whole."""
    assert find_artifact(store, STAGE, ModelRef) is None
    assert not [file for file in store.list_files("artifacts") if file.path.endswith(MARKER)]
    assert not verify_artifacts(store, None, lambda _: None)["problems"]


def check_goes_on(store: Store, make: Callable[[Path], dict[str, str]] = test_s3.make) -> ArtifactRef:
    ref = stored(store, STAGE, ModelRef, make).artifact
    assert not ref.reused
    assert not verify_artifacts(store, None, lambda _: None)["problems"]
    assert not list(store.list_files("leases"))
    return ref


@pytest.mark.parametrize("write", [write_plainly, write_safetensors, write_numpy])
def test_a_disk_that_fills_while_a_stage_writes(disk: Path, write: Callable[[Path], None]) -> None:
    store = FileStore(disk / "store")
    (disk / "other").write_bytes(b"x" * MIB)

    def make(folder: Path) -> dict[str, str]:
        write(folder / "model.bin")
        return {"dtype": "float32"}

    with pytest.raises(StoreError, match="Could not write the merged artifact to .* the disk is full. Free some space"):
        stored(store, STAGE, ModelRef, make)
    check_nothing_half(store)
    assert not list((store.root / "work").iterdir())
    mount(disk, "remount,size=32m")
    check_goes_on(store, make)


def test_a_disk_that_fills_while_a_checkpoint_is_written(disk: Path) -> None:
    import torch

    from tasks.training.checkpoints import Progress, load_checkpoint, save_checkpoint

    weights = torch.nn.Parameter(torch.zeros(MIB // 4))  # 1 MiB
    optimizer, scaler = torch.optim.SGD([weights]), torch.amp.GradScaler("cpu", enabled=False)
    save_checkpoint(disk / "c", "last", [weights], optimizer, scaler, Progress(step=1))
    (disk / "other").write_bytes(b"x" * (5 * MIB // 2))
    weights.data += 2
    with pytest.raises(StoreError, match="checkpoint of step 2 could not be written to .* goes on from the checkpoint"):
        save_checkpoint(disk / "c", "last", [weights], optimizer, scaler, Progress(step=2))
    progress = load_checkpoint(disk / "c", "last", [weights], optimizer, scaler)
    assert progress and progress.step == 1
    assert weights.abs().max() == 0
    (disk / "other").unlink()
    save_checkpoint(disk / "c", "last", [weights], optimizer, scaler, Progress(step=2))
    assert (found := load_checkpoint(disk / "c", "last", [weights], optimizer, scaler)) and found.step == 2


def test_a_disk_that_fills_while_the_cache_is_filled(proxy: FaultyS3, disk: Path, tmp_path: Path) -> None:  # noqa: F811
    ref = check_goes_on(S3Store("bucket", "p", tmp_path / "other"))
    mount(disk, "remount,size=40m")
    store = S3Store("bucket", "p", disk / "cache")
    with pytest.raises(StoreError, match="Could not keep .* in the cache .* the disk is full"):
        store.local_folder(ref)
    assert not (disk / "cache" / "artifacts").exists()
    mount(disk, "remount,size=80m")
    proxy.fetched = 0
    assert (store.local_folder(ref) / "model.bin").stat().st_size == SIZE
    assert proxy.fetched < SIZE - 24 * MIB, "what was fetched is kept"


def test_a_read_only_folder(disk: Path) -> None:
    store = FileStore(disk / "store")

    def make(folder: Path) -> dict[str, str]:
        (folder / "first").write_bytes(b"1")
        mount(disk, "remount,ro")
        (folder / "second").write_bytes(b"2")
        return {"dtype": "float32"}

    with pytest.raises(StoreError, match="the file system is read-only. Choose another place with --store"):
        stored(store, STAGE, ModelRef, make)
    check_nothing_half(store)
    with pytest.raises(StoreError, match="Could not write .* read-only"):
        stored(store, STAGE, ModelRef, make)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease, "STALE_SECONDS", 0.1)  # this very process left it
        mount(disk, "remount,rw")
        check_goes_on(store, lambda folder: (folder / "first").write_bytes(b"1") and {"dtype": "float32"})


def revoke(proxy: FaultyS3, patch: pytest.MonkeyPatch) -> None:  # noqa: F811
    proxy.code = "ExpiredToken"


def set_clock(proxy: FaultyS3, patch: pytest.MonkeyPatch) -> None:  # noqa: F811
    from botocore import auth

    now = auth.get_current_datetime
    patch.setattr(auth, "get_current_datetime", lambda *given: now(*given) + timedelta(hours=1))


def delete_bucket(proxy: FaultyS3, patch: pytest.MonkeyPatch) -> None:  # noqa: F811
    httpx.post(f"{proxy.url}/moto-api/reset")


def stop_server(proxy: FaultyS3, patch: pytest.MonkeyPatch) -> None:  # noqa: F811
    proxy.stop()


@pytest.mark.parametrize(
    ("break_it", "sentence"),
    [
        (revoke, "the store denies it .ExpiredToken.. Check that the credentials .* are still valid"),
        (set_clock, "this machine's clock differs too much from the store's"),
        (delete_bucket, "there is no bucket bucket. Create it"),
        (stop_server, "cannot be reached, or broke off. Check AWS_ENDPOINT_URL_S3"),
    ],
)
@pytest.mark.parametrize("when", ["in the stage", "in the upload"])
def test_a_bucket_that_is_lost_in_the_midst_of_a_run(
    proxy: FaultyS3,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    break_it: Callable[[FaultyS3, pytest.MonkeyPatch], None],
    sentence: str,
    when: str,
) -> None:
    monkeypatch.setattr(lease, "STALE_SECONDS", 1.0)  # this very process left it
    monkeypatch.setattr(lease, "POLL_SECONDS", 0.1)
    store, upstream = S3Store("bucket", "p", tmp_path), proxy.target
    with pytest.MonkeyPatch.context() as patch:
        broken = SimpleNamespace(yet=False)

        def break_once(**_: object) -> None:
            if not broken.yet:
                broken.yet = True
                break_it(proxy, patch)

        def make(folder: Path) -> dict[str, str]:
            if when == "in the stage":
                break_once()
            return test_s3.make(folder)

        if when == "in the upload":
            store.client.meta.events.register("before-sign.s3.UploadPart", break_once)
        with pytest.raises(StoreError, match=sentence):
            stored(store, STAGE, ModelRef, make)
        assert broken.yet
    proxy.code = ""
    mended = FaultyS3(f"http://{upstream}")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", mended.url)
    store = S3Store("bucket", "p", tmp_path)
    if break_it is delete_bucket:
        store.client.create_bucket(Bucket="bucket")
    check_nothing_half(store)
    ref = check_goes_on(store)
    assert (store.local_folder(ref) / "model.bin").stat().st_size == SIZE
    mended.server.shutdown()
