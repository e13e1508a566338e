"""Two workers of one pool that share nothing but a bucket: one goes on where the other was killed, and of two equal
runs at once each stage is computed by one of them.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tasks.core.manifest import RunManifest, read_manifest, run_ids
from tasks.core.s3 import S3Store
from tasks.core.store import read_marker
from tests.conftest import ROOT
from tests.flows.servers import Server, prefect_server
from tests.flows.test_finetune import recipe  # noqa: F401 (a fixture)

SHORTENED = {
    "tiny": ["train.epochs=30", "train.checkpoint_minutes=0", "train.snapshots=1"],
    "quickstart": ["train.max_steps=20", "train.checkpoint_minutes=0", "train.snapshots=1", "eval.limit=16"],
}
STAGES = ("dataset", "base", "tokens", "before", "train", "after", "merge", "gguf", "proof")
RECORDS = ("dataset", "base", "before", "adapter", "after", "merged", "gguf")


@pytest.fixture
def bucket(aws: None, tmp_path: Path) -> S3Store:
    store = S3Store(f"b{abs(hash(tmp_path)) % 10**9}", "team", tmp_path / "watcher")
    store.client.create_bucket(Bucket=store.bucket)
    return store


@contextlib.contextmanager
def machine(name: str, folder: Path, server: Server) -> Iterator[subprocess.Popen]:
    """Let a worker with home, cache and working folder of its own take one run at a time."""
    own = folder / name
    own.mkdir()
    places = {"HOME": str(own), "FORGETLESS_CACHE": str(own / "cache"), "PREFECT_HOME": str(own / "prefect")}
    worker = server.worker("cpu", name, "--limit", "1", folder=own, **places)
    try:
        yield worker
    finally:
        worker.terminate()
        worker.wait(timeout=60)


def kill_with_children(process: int) -> None:
    """Take a machine away: nothing of it has a moment left."""
    os.kill(process, signal.SIGSTOP)
    with contextlib.suppress(FileNotFoundError):
        for thread in Path(f"/proc/{process}/task").iterdir():
            for child in (thread / "children").read_text().split():
                kill_with_children(int(child))
    os.kill(process, signal.SIGKILL)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, log: Path) -> None:
    """Wait for what comes about while a process is there."""
    end = time.monotonic() + 1200
    while not condition():
        assert time.monotonic() < end and process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.1)


def checkpoints(store: S3Store) -> list[int]:
    names = [n for n in store.list_folders("artifacts/checkpoint") if read_marker(store, "checkpoint", n)]
    return sorted(int(name.partition("-")[2]) for name in names if name.count("-") == 1)


def digests(manifest: RunManifest) -> dict[str, str]:
    return {name: getattr(manifest, name).artifact.content for name in RECORDS}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_run_that_was_terminated_goes_on_on_another_machine(
    recipe: Path,  # noqa: F811
    bucket: S3Store,
    tmp_path: Path,
) -> None:
    settings = [word for text in ("train.epochs=30", "train.checkpoint_minutes=60") for word in ("--set", text)]
    command = [sys.executable, "-m", "flows.cli", "run", str(recipe), *settings, "--store"]

    def environment(name: str) -> dict[str, str]:
        home = tmp_path / name
        home.mkdir()
        own = {"HOME": str(home), "PREFECT_HOME": str(home / "prefect"), "FORGETLESS_CACHE": str(home / "cache")}
        more = {"PYTHONPATH": str(ROOT), "OLLAMA_HOST": "127.0.0.1:9"}
        return {**os.environ, **own, **more, "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "600"}

    log = tmp_path / "first.log"
    with log.open("w") as file:
        first = subprocess.Popen([*command, bucket.url], env=environment("first"), stderr=file)
    try:
        wait_for(lambda: any("/curve/" in file.path for file in bucket.list_files("runs")), first, log)
        first.send_signal(signal.SIGTERM)
        first.wait(timeout=300)
    finally:
        first.kill()
    said = log.read_text()
    assert first.returncode == 143, said
    assert said.endswith("forgetless: Terminated. What finished is kept: the same command goes on from there.\n")
    (there,) = checkpoints(bucket)
    assert not list(bucket.list_files("leases"))
    subprocess.run([*command, bucket.url], env=environment("second"), check=True)
    found = read_manifest(bucket, "latest")
    assert found.stages["train"].note == f"continued from step {there}"
    assert 0 < there < found.adapter.steps
    assert bucket.list_folders("artifacts/checkpoint") == []
    whole = S3Store(bucket.bucket, "whole", bucket.cache)
    subprocess.run([*command, whole.url], env=environment("third"), check=True)
    assert digests(found) == digests(read_manifest(whole, "latest"))


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", ["tiny", "quickstart"])
def test_two_workers_share_nothing_but_the_bucket(
    recipe: Path,  # noqa: F811
    bucket: S3Store,
    tmp_path: Path,
    name: str,
) -> None:
    words = ["deployment", "run", "finetune/cpu", "-p", f"overrides={json.dumps(SHORTENED[name])}"]
    words += ["-p", f"recipe={recipe if name == 'tiny' else name}"]
    together = S3Store(bucket.bucket, "together", bucket.cache)
    with prefect_server(tmp_path, FORGETLESS_STORE=bucket.url) as server:
        prefect = server.prefect
        prefect("work-pool", "create", "cpu", "--type", "process")
        prefect("deploy", "--all")
        with machine("first", tmp_path, server) as worker:
            prefect(*words)
            wait_for(lambda: len(checkpoints(bucket)) > 0, worker, tmp_path / "first.log")
            kill_with_children(worker.pid)
        (killed,) = run_ids(bucket)
        there = checkpoints(bucket)
        assert read_manifest(bucket, killed).stages["train"].status == "running"
        with machine("second", tmp_path, server):
            prefect(*words, "--watch")
            finished = read_manifest(bucket, "latest")
            assert finished.run_id != killed
            assert finished.status == "completed"
            assert finished.stages["train"].note == f"continued from step {there[-1]}"
            assert finished.adapter.resumed == [there[-1]]
            assert {finished.stages[name].status for name in ("dataset", "base", "tokens", "before")} == {"reused"}
            assert checkpoints(bucket) == []
            with machine("third", tmp_path, server):
                with ThreadPoolExecutor() as pool:
                    both = [pool.submit(prefect, *words, "-p", f"store={together.url}", "--watch") for _ in range(2)]
                for one in both:
                    one.result()
    first, second = (read_manifest(together, run) for run in run_ids(together))
    assert (first.status, second.status) == ("completed", "completed")
    for stage in STAGES:
        assert sorted((first.stages[stage].status, second.stages[stage].status)) == ["computed", "reused"], stage
    assert digests(first) == digests(second) == digests(finished)
    assert checkpoints(together) == []
    assert not list(together.list_files("leases"))
    for worker in ("second", "third"):
        assert list((tmp_path / worker / "cache" / "artifacts").iterdir()), "both took part"
