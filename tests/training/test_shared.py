"""A training that goes on elsewhere: machines that share nothing but a bucket, on an S3 server over HTTP."""

import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks.core.config import TrainConfig
from tasks.core.errors import StoreError
from tasks.core.progress import watch_progress
from tasks.core.records import CheckpointRef, ModelRef, TrainPoint
from tasks.core.s3 import S3Store
from tasks.core.stages import Stage, checkpoint_stage
from tasks.core.store import find_artifact, put_artifact, stored
from tasks.training import shared, trainer
from tasks.training.checkpoints import Progress, leave_copy, save_checkpoint
from tasks.training.shared import KEPT, SharedCheckpoints
from tasks.training.trainer import OnStep, Places, train_adapter
from tests.core.faulty_s3 import FaultyS3
from tests.training.test_trainer import BEST_OF, Stop, config, train

STAGE = Stage("adapter", 1, ["rows", "base"], {})
FILES = ("adapter_model.safetensors", "adapter_config.json", "curve.jsonl")
BUCKET = "trainings"
QUIET: OnStep = lambda *_: None  # noqa: E731
# Kills itself when the second checkpoint is in the store. The training stands still while one is on its way, so that it
# has not ended before.
PROGRAM = """
import json, os, signal, sys, time
from pathlib import Path
from tasks.core.config import TrainConfig
from tasks.core.s3 import S3Store
from tasks.core.stages import Stage
from tasks.training import shared
from tasks.training.worker import run_training

shared.POLL_SECONDS = 0.02
cache, places, config, bucket = json.loads(sys.argv[1])
store, outgoing = S3Store(bucket, "p", Path(cache)), Path(places["checkpoints"]) / "outgoing"

def on_step(step, steps, point):
    if step == 1:
        return
    (child,) = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    os.kill(int(child), signal.SIGSTOP)
    while shared._find_waiting(outgoing):
        time.sleep(0.01)
    places = [f"{shared.PLACE}/{name}/_artifact.json" for name in store.list_folders(shared.PLACE)]
    if len([place for place in places if store.read_bytes(place)]) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    os.kill(int(child), signal.SIGCONT)

stage = Stage("adapter", 1, ["rows", "base"], {})
run_training(places, TrainConfig(**config), on_step, False, None, shared.SharedCheckpoints(store, stage, "demo"))
"""


@pytest.fixture(autouse=True)
def bucket(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx

    httpx.post(f"{s3_endpoint}/moto-api/reset")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3_endpoint)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr(shared, "POLL_SECONDS", 3600)  # what was left last is uploaded at the end, and no other
    S3Store(BUCKET, "", Path()).client.create_bucket(Bucket=BUCKET)


class Machine:
    """Folders of its own, and the bucket."""

    def __init__(self, root: Path, base: Path, tokens: Path) -> None:
        self.cache, self.out = root / "cache", root / "out"
        self.out.mkdir(parents=True)
        self.store = S3Store(BUCKET, "p", self.cache)
        self.checkpoints = self.store.kept_folder("training")
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self.shared = SharedCheckpoints(self.store, STAGE, "demo")
        self.base, self.tokens = base, tokens

    def places(self) -> dict[str, str | None]:
        folders = {"base": self.base, "tokens": self.tokens, "out": self.out, "checkpoints": self.checkpoints}
        return {name: str(path) for name, path in folders.items()} | {"start_from": None}

    def train_until(self, step: int, settings: TrainConfig) -> None:
        """Train, and end as a machine that is taken away after its last checkpoint reached the store."""

        def on_step(number: int, steps: int, point: TrainPoint) -> None:
            if number == step + 1:
                raise Stop

        again = SharedCheckpoints(self.store, STAGE, "demo")
        with contextlib.suppress(Stop), again.uploading(self.checkpoints / "outgoing") as outgoing:
            places = Places(self.base, self.tokens, self.out, self.checkpoints, outgoing=outgoing)
            train_adapter(places, settings, on_step, False)
            pytest.fail("it ended before")

    def finish(self, settings: TrainConfig) -> dict[str, Any]:
        self.shared.fetch(self.checkpoints)
        return train_adapter(Places(self.base, self.tokens, self.out, self.checkpoints), settings, QUIET, False)


@pytest.fixture
def machine(tiny_folder: Path, tokens: Path, tmp_path: Path) -> Callable[[str], Machine]:
    return lambda name: Machine(tmp_path / name, tiny_folder, tokens)


def checkpoints_of(store: S3Store) -> list[int]:
    """Return the steps of the whole checkpoints in the store."""
    names = [name.removeprefix(f"{STAGE.key}-") for name in store.list_folders(shared.PLACE)]
    found = [n for n in names if n.isdigit() and find_artifact(store, checkpoint_stage(STAGE, n), CheckpointRef)]
    return sorted(map(int, found))


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def check_same(out: Path, whole: Path) -> None:
    for name in FILES:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_training_that_was_killed_goes_on_on_another_machine(
    machine: Callable[[str], Machine], tmp_path: Path
) -> None:
    settings = config(checkpoint_minutes=0, epochs=6)
    first, second = machine("first"), machine("second")
    job = json.dumps([str(first.cache), first.places(), settings.model_dump(mode="json"), BUCKET])
    ended = subprocess.run([sys.executable, "-c", PROGRAM, job], check=False, capture_output=True, text=True)
    assert ended.returncode == -9, ended.stderr
    shutil.rmtree(first.cache)
    there = checkpoints_of(second.store)
    found = second.finish(settings)
    whole, _ = train(first.base, first.tokens, tmp_path / "whole", settings)
    assert len(there) == 2
    assert found["resumed"] == [there[-1]]
    assert found["steps"] == whole["steps"] > there[-1]
    assert f"Resumed at step {there[-1]} of {whole['steps']}." in found["notes"]
    check_same(second.out, tmp_path / "whole")
    second.shared.forget()
    assert second.store.list_folders(shared.PLACE) == []


@pytest.mark.parametrize("changes", [{"method": "qlora"}, {"snapshots": 2, "lora_dropout": 0.1}])
def test_all_of_a_training_moves(machine: Callable[[str], Machine], tmp_path: Path, changes: dict[str, Any]) -> None:
    settings = config(checkpoint_minutes=0, **changes)
    first, second = machine("first"), machine("second")
    first.train_until(5, settings)
    found = second.finish(settings)
    whole, _ = train(first.base, first.tokens, tmp_path / "whole", settings)
    assert found["resumed"] == [5]
    assert found["snapshots"] == whole["snapshots"]
    for path in tmp_path.glob("whole/**/*.safetensors"):
        assert path.read_bytes() == (second.out / path.relative_to(tmp_path / "whole")).read_bytes(), path
    check_same(second.out, tmp_path / "whole")


def test_the_best_step_moves_too(machine: Callable[[str], Machine], tmp_path: Path) -> None:
    settings = config(**BEST_OF, validate_every=1, early_stopping=2, snapshots=99, checkpoint_minutes=0)
    first, second = machine("first"), machine("second")
    whole, _ = train(first.base, first.tokens, tmp_path / "whole", settings)
    best = whole["best_step"]
    assert whole["ended"] == "early stopping"
    first.train_until(best + 1, settings)
    found = second.finish(settings)
    assert (found["resumed"], found["best_step"], found["ended"]) == ([best + 1], best, "early stopping")
    assert found["snapshots"] == whole["snapshots"] != []
    check_same(second.out, tmp_path / "whole")


@pytest.mark.parametrize(
    "fate", ["damaged", "cut short", "half uploaded", "a part is missing", "damaged marker", "a part elsewhere"]
)
def test_what_is_not_whole_is_passed_over(
    machine: Callable[[str], Machine],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    fate: str,
) -> None:
    monkeypatch.setattr("tasks.core.retry.time.sleep", lambda _: None)  # what stays wrong is asked for four times
    settings = config(checkpoint_minutes=0, snapshots=99)
    first, second = machine("first"), machine("second")
    for step in (3, 5):
        first.train_until(step, settings)
    assert checkpoints_of(first.store) == [3, 5]
    newest = checkpoint_stage(STAGE, "000005")
    record = find_artifact(first.store, newest, CheckpointRef)
    place, marker = first.store.files_path(record.artifact), f"artifacts/checkpoint/{newest.key}/_artifact.json"
    data = first.store.read_bytes(f"{place}/state.safetensors")
    if fate == "half uploaded":
        first.store.delete(marker)
    elif fate == "damaged marker":
        first.store.write_bytes(marker, b"{")
    elif fate == "a part elsewhere":
        found = json.loads(first.store.read_bytes(marker))
        found["record"]["parts"] = {"../escaped": found["record"]["parts"]["snapshots/000004"]}
        first.store.write_bytes(marker, json.dumps(found).encode())
    elif fate == "a part is missing":
        later = record.parts["snapshots/000005"]
        first.store.delete(f"{first.store.files_path(later)}/adapter_model.safetensors")
    else:
        wrong = data[:-1] + bytes([data[-1] ^ 1]) if fate == "damaged" else data[:-1]
        first.store.write_bytes(f"{place}/state.safetensors", wrong)
    found = second.finish(settings)
    assert found["resumed"] == [3]
    told = "passing over the checkpoint of step 5: " in capsys.readouterr().err
    assert told is (fate != "half uploaded")
    assert (second.out / FILES[0]).is_file()


def test_whichever_is_further_counts(machine: Callable[[str], Machine], capsys: pytest.CaptureFixture[str]) -> None:
    settings = config(checkpoint_minutes=0)
    first, second = machine("first"), machine("second")
    first.train_until(3, settings)
    second.train_until(2, settings)
    second.shared.fetch(second.checkpoints)
    assert shared._read_step(second.checkpoints) == 3
    second.train_until(4, settings)
    first.shared.fetch(first.checkpoints)
    assert shared._read_step(first.checkpoints) == 4
    state = first.checkpoints / "last" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1])  # as after a power cut
    first.shared.fetch(first.checkpoints)
    assert shared._read_step(first.checkpoints) == 4
    kept = {path: path.stat().st_ino for path in first.checkpoints.glob("last/*")}
    first.shared.fetch(first.checkpoints)
    assert {path: path.stat().st_ino for path in first.checkpoints.glob("last/*")} == kept, "it is there already"


def test_the_newest_are_kept_with_what_belongs_to_them(machine: Callable[[str], Machine]) -> None:
    settings = config(checkpoint_minutes=0, snapshots=99, epochs=3)
    first = machine("first")
    for step in range(1, 6):
        first.train_until(step, settings)
        assert checkpoints_of(first.store) == list(range(1, step + 1))[-KEPT:]
    names = {name.removeprefix(f"{STAGE.key}-") for name in first.store.list_folders(shared.PLACE)}
    record = find_artifact(first.store, checkpoint_stage(STAGE, "000005"), CheckpointRef)
    assert names == {"000004", "000005", *(name.replace("/", "-") for name in record.parts)}
    assert record.parts.keys() == {f"snapshots/{step:06}" for step in range(1, 6)}


def test_a_checkpoint_is_uploaded_as_it_was_left(tmp_path: Path) -> None:
    import torch

    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer, scaler = torch.optim.AdamW([parameter]), torch.amp.GradScaler("cpu", enabled=False)
    outgoing = tmp_path / "outgoing"
    outgoing.mkdir()
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, "last", [parameter], optimizer, scaler, Progress(step=step))
        leave_copy(tmp_path, outgoing, Progress(step=step))
        if step == 1:
            taken = shared._take(outgoing)
    assert [path.name for path in sorted(outgoing.iterdir())] == ["000003", "taken-000001"], "one waits"
    assert taken is not None
    for path, step in ((taken, 1), (outgoing / "000003", 3)):
        assert json.loads((path / "last" / "state.json").read_text())["progress"]["step"] == step
    assert (outgoing / "000003" / "last" / "state.safetensors").samefile(tmp_path / "last" / "state.safetensors")


def test_a_store_that_fails_never_ends_the_training(
    machine: Callable[[str], Machine],
    tmp_path: Path,
    s3_endpoint: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    proxy = FaultyS3(s3_endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
    monkeypatch.setattr(shared, "AGAIN_SECONDS", 0.05)
    monkeypatch.setattr(shared, "POLL_SECONDS", 0.05)
    settings = config(checkpoint_minutes=0)
    first = machine("first")
    proxy.code = "AccessDenied"

    def on_step(step: int, steps: int, point: TrainPoint) -> None:
        if step == 4:
            wait_for(lambda: first.shared.has_failed)
            proxy.code = ""
        if step == steps:
            wait_for(lambda: checkpoints_of(first.store))

    with first.shared.uploading(first.checkpoints / "outgoing") as outgoing:
        places = Places(first.base, first.tokens, first.out, first.checkpoints, outgoing=outgoing)
        train_adapter(places, settings, on_step, False)
    said = capsys.readouterr().err
    assert said.count("is on this machine alone, for now: ") == said.count("\n") == 1
    assert "AccessDenied" in said
    train(first.base, first.tokens, tmp_path / "whole", settings)
    check_same(first.out, tmp_path / "whole")
    proxy.server.shutdown()


def test_a_store_that_cannot_be_read_is_no_reason_to_begin_anew(
    machine: Callable[[str], Machine], s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine("first").train_until(3, config(checkpoint_minutes=0))
    proxy = FaultyS3(s3_endpoint)
    proxy.code = "AccessDenied"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
    with pytest.raises(StoreError, match="the store denies it"):
        machine("second").finish(config(checkpoint_minutes=0))
    proxy.server.shutdown()


def test_one_that_was_paused_leaves_nothing_behind_a_finished_training(machine: Callable[[str], Machine]) -> None:
    settings = config(checkpoint_minutes=0)
    first, second = machine("first"), machine("second")
    first.train_until(3, settings)
    stored(second.store, STAGE, ModelRef, lambda folder: {"dtype": "float32"})
    second.shared.forget()
    assert second.store.list_folders(shared.PLACE) == []
    first.train_until(4, settings)  # it woke up, and knows nothing of it
    assert second.store.list_folders(shared.PLACE) == []


def test_one_that_was_paused_takes_nothing_from_who_is_further(machine: Callable[[str], Machine]) -> None:
    settings = config(checkpoint_minutes=0, snapshots=99)
    first, second = machine("first"), machine("second")
    first.train_until(2, settings)
    for step in (4, 5):
        second.shared.fetch(second.checkpoints)
        second.train_until(step, settings)
    before = second.store.list_folders(shared.PLACE)
    first.train_until(3, settings)
    assert checkpoints_of(second.store) == [4, 5]
    assert second.store.list_folders(shared.PLACE) == before


def test_another_cpu_is_told(machine: Callable[[str], Machine], monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(checkpoint_minutes=0)
    first, second = machine("first"), machine("second")
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_machine", lambda: "an older CPU with 64 threads")
        first.train_until(3, settings)
    found = second.finish(settings)
    (note,) = (note for note in found["notes"] if note.startswith("Resumed at step 3 of"))
    assert "on another machine" in note
    assert "before an older CPU with 64 threads" in note
    assert "on one CPU model and number of threads only" in note


def test_uploads_are_not_told_as_progress_of_the_training(tmp_path: Path) -> None:
    store = S3Store(BUCKET, "p", tmp_path / "cache")
    outgoing, told = tmp_path / "outgoing", []
    with watch_progress(lambda *what: told.append(what)):
        sharing = SharedCheckpoints(store, STAGE, None)
        with contextlib.suppress(Stop), sharing.uploading(outgoing):
            big = outgoing / "new" / "last"
            big.mkdir(parents=True)
            (big / "state.safetensors").write_bytes(bytes(9 << 20))
            (outgoing / "new").rename(outgoing / "000007")
            raise Stop
        assert checkpoints_of(store) == [7]
        assert told == []
        (tmp_path / "made").mkdir()
        (tmp_path / "made" / "weights").write_bytes(bytes(9 << 20))
        put_artifact(store, Stage("merged", 1, [], {}), tmp_path / "made", ModelRef, {"dtype": "float32"})
        assert told
