"""Training in its own process: the same adapter, its errors as they are, and a crash told in a sentence."""

import fcntl
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tasks.core.config import TrainConfig
from tasks.core.errors import ConfigError, ForgetlessError
from tasks.core.records import TrainPoint
from tasks.training import worker
from tasks.training.worker import run_training
from tests.training.test_trainer import config, train


def places(base: Path, tokens_: Path, out: Path) -> dict[str, str | None]:
    out.mkdir(exist_ok=True)
    folders = {"base": base, "tokens": tokens_, "out": out, "checkpoints": out.with_name("checkpoints")}
    return {name: str(path) for name, path in folders.items()} | {"start_from": None}


def run(where: dict[str, str | None], settings: TrainConfig, on_step: Any = None) -> dict[str, Any]:
    return run_training(where, settings, on_step or (lambda *_: None), False)


def test_it_is_the_same_training(tiny_folder: Path, tokens: Path, tmp_path: Path) -> None:
    seen: list[TrainPoint] = []
    where = places(tiny_folder, tokens, tmp_path / "out")
    fields = run(where, config(epochs=1), lambda step, steps, point: seen.append(point))
    assert [p.step for p in seen] == list(range(1, fields["steps"] + 1))
    _, points = train(tiny_folder, tokens, tmp_path / "here", config(epochs=1))
    assert [p.loss for p in seen] == pytest.approx([p.loss for p in points], abs=1e-4)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_its_errors_are_ours(tiny_folder: Path, tokens: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="match nothing in this model"):
        run(places(tiny_folder, tokens, tmp_path / "out"), config(target_modules=["query"]))


def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """Let another program stand in for the training process; it finds the job's path as its last argument."""
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{program}' \"$3\"\n", encoding="utf-8")
    path.chmod(0o755)
    monkeypatch.setattr(worker.sys, "executable", str(path))


def test_a_crash_is_told_with_what_was_said_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, monkeypatch, 'import os, sys; print("bad luck", file=sys.stderr); sys.stderr.flush(); os.abort()')
    with pytest.raises(ForgetlessError, match=r"ended with signal SIGABRT, after: bad luck. Its log is .*log.txt"):
        run(places(tmp_path, tmp_path, tmp_path / "out"), config())


def test_a_process_killed_for_its_memory_is_started_with_half_the_pack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"notes": ["Resumed at step 3 of 9."]}
    program = (
        "import json, os, sys; job = json.load(open(sys.argv[1])); "
        'os.kill(os.getpid(), 9) if job["pack_tokens"] > 64 else '
        f"print(json.dumps(dict(fields={json.dumps(fields)})))"
    )
    fake(tmp_path, monkeypatch, program)
    found = run(places(tmp_path, tmp_path, tmp_path / "out"), config())
    assert found["notes"] == [
        "The system ended the training for its memory: it went on with packs of 128 tokens.",
        "The system ended the training for its memory: it went on with packs of 64 tokens.",
        "Resumed at step 3 of 9.",
    ]


def test_a_training_that_is_asked_to_end_leaves_a_checkpoint(
    tiny_folder: Path,
    tokens: Path,
    tmp_path: Path,
) -> None:
    where = places(tiny_folder, tokens, tmp_path / "out")

    class Cancelled(BaseException):
        pass

    def on_step(step: int, steps: int, point: TrainPoint) -> None:
        if step == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        run(where, config(), on_step)
    state = json.loads((tmp_path / "checkpoints" / "last" / "state.json").read_text())
    assert state["progress"]["step"] >= 2
    fields = run(where, config())
    assert f"Resumed at step {state['progress']['step']}" in fields["notes"][0]
    (tmp_path / "other").mkdir()
    run(places(tiny_folder, tokens, tmp_path / "other" / "whole"), config())
    broken, whole = ((tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("out", "other/whole"))
    assert broken == whole


@pytest.mark.skipif(sys.platform != "linux", reason="a process that outlives its parent is ended by Linux")
def test_a_training_dies_with_the_process_that_started_it(tiny_folder: Path, tokens: Path, tmp_path: Path) -> None:
    where = places(tiny_folder, tokens, tmp_path / "out")
    program = (
        "import json, sys; from tasks.core.config import TrainConfig; from tasks.training.worker import run_training; "
        "where, config = json.loads(sys.argv[1]); "
        "run_training(where, TrainConfig(**config), lambda *_: print('step', flush=True), False)"
    )
    job = json.dumps([where, config(epochs=99, checkpoint_minutes=0).model_dump(mode="json")])
    parent = subprocess.Popen([sys.executable, "-c", program, job], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    for _ in range(3):  # a step is told before its checkpoint is written
        assert parent.stdout.readline() == "step\n"
    (child,) = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    parent.kill()
    parent.wait()
    for _ in range(100):
        if not Path(f"/proc/{child}").exists() or "\nState:\tZ" in Path(f"/proc/{child}/status").read_text():
            break
        time.sleep(0.1)
    else:
        pytest.fail("the training went on without its parent")
    fields = run(where, config(epochs=99, checkpoint_minutes=0, max_minutes=0.0001))
    assert "Resumed at step" in fields["notes"][0]


def test_two_trainings_never_share_their_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "DYING_SECONDS", 0.5)
    where = places(tmp_path, tmp_path, tmp_path / "out")
    (tmp_path / "checkpoints").mkdir()
    with (tmp_path / "checkpoints" / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ForgetlessError, match="Another process, paused perhaps, still trains with the checkpoints"):
            run(where, config())


def test_the_training_itself_keeps_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        'import json, os; names = [os.path.realpath(file.path) for file in os.scandir("/proc/self/fd")]; '
        'print(json.dumps(dict(fields=dict(notes=[name for name in names if name.endswith("/lock")]))))'
    )
    fake(tmp_path, monkeypatch, program)
    found = run(places(tmp_path, tmp_path, tmp_path / "out"), config())
    assert found["notes"] == [str(tmp_path / "checkpoints" / "lock")]
