"""One writer: real processes that want the same artifact at the same time, on a folder and on an S3 server."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.core import lease
from tasks.core.digest import content_digest, file_sha256
from tasks.core.lease import Lease, _space, hold_lease
from tasks.core.records import ModelRef
from tasks.core.s3 import S3Store
from tasks.core.stages import Stage
from tasks.core.store import PROBE, FileStore, Store, find_artifact, stored

ROOT = Path(__file__).resolve().parents[2]
STAGE = Stage("merged", 1, ["abc"], {})
STALE_SECONDS = 3.0
PROGRAM = f"""
import os, signal, sys, time
from tasks.core import lease, s3, store as stores
from tasks.core.records import ModelRef
from tasks.core.settings import read_settings
from tasks.core.stages import Stage

text, seconds, how = sys.argv[1], float(sys.argv[2]), sys.argv[3]
lease.STALE_SECONDS, lease.BEAT_SECONDS, lease.POLL_SECONDS = {STALE_SECONDS}, 0.3, 0.1
if how == "patient":
    lease.STALE_SECONDS = 600
if how == "elsewhere":
    lease._space = lambda: None
if how.startswith("clock"):
    machine, off = time.time, float(how.removeprefix("clock"))
    time.time = lambda: machine() + off
store = stores.open_store(read_settings())

def make(folder):
    print("making", flush=True)
    (folder / "first.bin").write_text(text)
    (folder / "second.bin").write_text(text * 2)
    time.sleep(seconds)
    if how == "fail":
        sys.exit("the stage failed")
    if how == "pause":  # the very moment before the artifact is committed
        pause(stores, "_empty_partial")
        pause(s3.S3Store, "create_bytes")
    return {{"dtype": "float32"}}

def pause(where, name):
    former = getattr(where, name)
    def paused(*given):
        os.kill(os.getpid(), signal.SIGSTOP)
        return former(*given)
    setattr(where, name, paused)

print(stores.stored(store, Stage("merged", 1, ["abc"], {{}}), ModelRef, make).model_dump_json())
"""


class Processes:
    """Starts processes on one store, and ends those that a test left."""

    def __init__(self, store: Store, folder: Path) -> None:
        places = {"FORGETLESS_STORE": store.url, "FORGETLESS_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
        self.environment = {**os.environ, **places}
        self.started: list[subprocess.Popen[str]] = []

    def start(self, text: str = "weights", seconds: float = 0.0, how: str = "") -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", PROGRAM, text, str(seconds), how]
        pipe = subprocess.PIPE
        self.started.append(subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=self.environment))
        return self.started[-1]

    def start_holder(self, text: str = "weights", seconds: float = 0.0, how: str = "") -> "subprocess.Popen[str]":
        """Start one and return it when it is making the artifact."""
        process = self.start(text, seconds, how)
        assert process.stdout and process.stdout.readline() == "making\n"
        return process


def finish(process: "subprocess.Popen[str]") -> tuple[ModelRef, bool, str]:
    """Return the record of a process, whether it made the artifact, and what it said on standard error."""
    out, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    return ModelRef.model_validate_json(out.splitlines()[-1]), out.startswith("making\n"), said


def wait_for_stop(process: "subprocess.Popen[str]") -> None:
    for _ in range(200):
        if Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T":
            return
        time.sleep(0.05)
    pytest.fail("the process did not stop")


def check_whole(store: Store, record: ModelRef) -> None:
    """Fail unless the store has one artifact, whose bytes are those of the record, and nothing of a lease."""
    stored_one = find_artifact(store, STAGE, ModelRef)
    assert stored_one and stored_one.artifact.content == record.artifact.content
    folder = store.local_folder(record.artifact)
    files = {name: file_sha256(folder / name) for name in ("first.bin", "second.bin")}
    assert content_digest(files) == record.artifact.content
    place = store.files_path(record.artifact)
    expected = {f"{place}/first.bin", f"{place}/second.bin", f"artifacts/merged/{STAGE.key}/_artifact.json"}
    assert {file.path for file in store.list_files("")} - {PROBE} == expected


def check_comes_late(processes: Processes, paused: "subprocess.Popen[str]", store: Store) -> None:
    """Fail unless a successor makes the artifact, and the process that was paused returns the successor's."""
    record, made, _ = finish(processes.start("its successor"))
    assert made
    paused.send_signal(signal.SIGCONT)
    late, _, _ = finish(paused)
    assert late.artifact.content == record.artifact.content
    check_whole(store, record)


def check_taken_over(processes: Processes, store: Store, how: str) -> tuple[str, float]:
    """Fail unless the next process makes the artifact of one that was killed; return what it said, and its seconds."""
    started = time.monotonic()
    record, made, said = finish(processes.start(how=how))
    seconds = time.monotonic() - started
    assert made
    for litter in [*store.list_files("work"), *store.list_partial()]:  # of the one that was killed
        store.delete(litter.path)
    check_whole(store, record)
    return said, seconds


@pytest.fixture
def processes(any_store: Store, tmp_path: Path) -> Iterator[Processes]:
    found = Processes(any_store, tmp_path)
    yield found
    for process in found.started:
        process.kill()
        process.communicate()


def test_of_processes_at_once_one_computes_and_all_get_its_record(processes: Processes, any_store: Store) -> None:
    found = [finish(process) for process in [processes.start(seconds=STALE_SECONDS + 1) for _ in range(3)]]
    assert sorted(made for _, made, _ in found) == [False, False, True]
    assert len({record.artifact.content for record, _, _ in found}) == 1
    assert sorted(record.artifact.reused for record, _, _ in found) == [False, True, True]
    check_whole(any_store, found[0][0])


def test_who_waits_says_for_whom(processes: Processes) -> None:
    holder = processes.start_holder(seconds=10)
    _, made, said = finish(processes.start())
    assert not made
    assert f"process {holder.pid} on {os.uname().nodename} has been making this merged artifact since " in said
    assert said.count("\n") == 1


def test_a_killed_holder_is_taken_over_when_its_lease_is_stale(processes: Processes, any_store: Store) -> None:
    holder = processes.start_holder(seconds=60)
    time.sleep(1)  # some heartbeats
    holder.kill()
    said, seconds = check_taken_over(processes, any_store, "elsewhere")
    assert f"process {holder.pid} on" in said
    assert seconds > STALE_SECONDS - 2  # S3 tells time in whole seconds


def test_a_holder_that_was_killed_on_this_machine_is_taken_over_at_once(processes: Processes, any_store: Store) -> None:
    holder = processes.start_holder(seconds=60, how="patient")
    holder.kill()
    holder.wait()
    said, seconds = check_taken_over(processes, any_store, "patient")
    assert not said, "nobody was waited for"
    assert seconds < 60


def test_a_holder_that_was_paused_beyond_its_lease_does_no_harm(processes: Processes, any_store: Store) -> None:
    holder = processes.start_holder("before the pause", seconds=1)
    holder.send_signal(signal.SIGSTOP)
    check_comes_late(processes, holder, any_store)


def test_a_holder_paused_just_before_it_commits_does_no_harm(processes: Processes, any_store: Store) -> None:
    holder = processes.start_holder("before the pause", how="pause")
    wait_for_stop(holder)
    check_comes_late(processes, holder, any_store)


def test_a_paused_holder_that_comes_back_first_is_who_counts(processes: Processes, any_store: Store) -> None:
    holder = processes.start_holder("before the pause", how="pause")
    wait_for_stop(holder)
    successor = processes.start_holder("its successor", how="pause")
    wait_for_stop(successor)
    holder.send_signal(signal.SIGCONT)
    record, _, _ = finish(holder)
    successor.send_signal(signal.SIGCONT)
    late, _, _ = finish(successor)
    assert not record.artifact.reused
    assert late.artifact.reused and late.artifact.content == record.artifact.content
    check_whole(any_store, record)


def test_a_holder_that_fails_releases_at_once(processes: Processes, any_store: Store) -> None:
    holder = processes.start_holder(seconds=2, how="fail")
    record, made, _ = finish(processes.start(how="patient"))
    assert made
    assert "the stage failed" in holder.communicate()[1]
    check_whole(any_store, record)


def test_ctrl_c_leaves_no_lease(processes: Processes, any_store: Store) -> None:
    holder = processes.start_holder(seconds=60)
    time.sleep(1)
    assert {Path(file.path).suffix for file in any_store.list_files("leases")} == {".1", ".beat"}
    holder.send_signal(signal.SIGINT)
    holder.communicate(timeout=20)
    assert {file.path for file in any_store.list_files("")} <= {PROBE}


@pytest.mark.parametrize("off", [86400, -86400])
def test_only_the_stores_clock_counts(processes: Processes, any_store: Store, off: int) -> None:
    holder = processes.start_holder(seconds=STALE_SECONDS + 1, how=f"clock{-off}")
    _, made, _ = finish(processes.start(how=f"clock{off}"))
    assert not made, "a holder that is alive was taken over"
    finish(holder)


def test_a_dead_holders_lease_is_judged_by_the_stores_clock(processes: Processes, any_store: Store) -> None:
    any_store.create_bytes(f"leases/merged/{STAGE.key}.1", json.dumps({"host": "gone", "process": 1}).encode())
    time.sleep(STALE_SECONDS + 1)
    started = time.monotonic()
    record, made, said = finish(processes.start(how="clock-86400"))
    assert made and not said, "it waited, though the lease was stale"
    assert time.monotonic() - started < 15
    check_whole(any_store, record)


def test_an_old_heartbeat_is_stale_whatever_this_process_saw(store: FileStore) -> None:
    for name in ("1", "1.beat"):
        path = f"leases/merged/{STAGE.key}.{name}"
        store.write_bytes(path, b"{}")
        os.utime(store.root / path, (0, time.time() - lease.STALE_SECONDS - 1))
    with hold_lease(store, STAGE):
        assert {Path(file.path).name.removeprefix(STAGE.key) for file in store.list_files("leases")} == {
            ".1",
            ".1.beat",
            ".2",
        }, "who takes over leaves number 1 there: nobody else can create it"
    assert not [*store.list_files("leases")]


def test_who_takes_over_what_was_released_meanwhile_begins_anew(any_store: Store) -> None:
    """Between looking and creating number 2, its first taker has done its work and another holds number 1."""
    dead = json.dumps({"host": "gone", "process": 1, "space": _space(), "started": "0"}).encode()
    path = f"leases/merged/{STAGE.key}.1"
    any_store.create_bytes(path, dead)
    slow, other = Lease(any_store, STAGE), Lease(any_store, STAGE)
    create, tries = any_store.create_bytes, []

    def create_late(where: str, data: bytes) -> bool:
        tries.append(Path(where).suffix)
        if where.endswith(".2") and data == slow.mine:
            any_store.delete_file(path)
            time.sleep(1.1)  # S3 tells time in whole seconds
            other.take()
        return create(where, data)

    any_store.create_bytes = create_late  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease, "POLL_SECONDS", 0.1)
        told: list[str] = []
        patch.setattr(Lease, "_tell", lambda self, files: (told.append(files[0].path), other.release()))
        slow.take()
    assert tries == [".1", ".2", ".1", ".1"], "slow, slow, other, slow again"
    assert told == [path]
    slow.release()
    assert {file.path for file in any_store.list_files("")} <= {PROBE}


def test_a_holder_that_was_late_leaves_number_1_to_who_took_over(any_store: Store) -> None:
    late, successor = Lease(any_store, STAGE), Lease(any_store, STAGE)
    late.take()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease, "STALE_SECONDS", -10.0)
        successor.take()
    late.was_late = True
    late.release()
    assert Lease(any_store, STAGE).holder() == json.loads(successor.mine)
    assert not any_store.create_bytes(f"leases/merged/{STAGE.key}.1", b"a third")
    successor.release()
    assert {file.path for file in any_store.list_files("")} <= {PROBE}


def test_a_lease_costs_little(any_store: Store) -> None:
    def make(folder: Path) -> dict[str, str]:
        (folder / "first.bin").write_text("weights")
        return {"dtype": "float32"}

    with hold_lease(any_store, STAGE):  # what loads once
        pass
    if isinstance(any_store, S3Store):
        asked: list[str] = []
        any_store.client.meta.events.register("before-send.s3", lambda request, **_: asked.append(request.method))
        with hold_lease(any_store, STAGE):
            pass
        assert asked == ["PUT", "DELETE"]
    else:
        started = time.monotonic()
        for number in range(20):
            stored(any_store, Stage("merged", number, [], {}), ModelRef, make)
        assert (time.monotonic() - started) / 20 < 0.2
