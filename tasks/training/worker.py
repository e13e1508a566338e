"""Training in a process of its own: its memory comes back whole, and a crash is an error with a sentence.

`run_training` starts `python -m tasks.training.worker JOB.json` and reads its standard output, a JSON object a line:
points as they come, then the record's fields or an error. What libraries print goes to standard error, and to a file.
"""

import contextlib
import ctypes
import fcntl
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tasks.core import errors
from tasks.core.config import TrainConfig
from tasks.core.errors import ForgetlessError
from tasks.core.hardware import device_class
from tasks.core.records import TrainPoint
from tasks.core.settings import training_settings
from tasks.training.shared import SharedCheckpoints

OnStep = Callable[[int, int, TrainPoint], None]
ENDING_SECONDS = 120  # for the step at work and its checkpoint
DYING_SECONDS = 10.0  # that the memory of a killed process takes to be freed, and its lock with it
LOG_LINES = 5
LEAST_PACK_TOKENS = 64
PR_SET_PDEATHSIG = 1
JOB, LOG, LOCK, OUTGOING = "job.json", "log.txt", "lock", "outgoing"


def run_training(
    places: dict[str, str | None],
    config: TrainConfig,
    on_step: OnStep,
    trust_remote_code: bool,
    trackers: dict[str, Any] | None = None,
    shared: SharedCheckpoints | None = None,
) -> dict[str, Any]:
    """Return AdapterRef's fields of a training in its own process; `places` are trainer.Places' folders as text, and
    `trackers` the arguments of open_trackers but for the names. Killed for its memory, it goes on with half the pack.
    Where its checkpoints are `shared`, it goes on from those of other machines, and they from its.

    Raises the error that the training raised, or ForgetlessError where its process died or another one trains with the
    same checkpoints."""
    folder = Path(str(places["checkpoints"]))
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(_locked(folder))
        if shared:
            shared.fetch(folder)
            places = places | {"outgoing": str(stack.enter_context(shared.uploading(folder / OUTGOING)))}
        notes: list[str] = []
        packs = config.pack_tokens
        while True:
            job = {
                "places": places,
                "config": config.model_dump(mode="json"),
                "pack_tokens": packs,
                "trust_remote_code": trust_remote_code,
                "trackers": trackers,
            }
            (folder / JOB).write_text(json.dumps(job), encoding="utf-8")
            code, end = _run(folder, on_step, lock, config.processes)
            if "fields" in end:
                fields: dict[str, Any] = end["fields"]
                return {**fields, "notes": [*notes, *fields["notes"]]}
            if "error" in end:
                kind = getattr(errors, end["kind"], ForgetlessError)
                raise kind(end["error"])
            if code == -signal.SIGKILL and packs > LEAST_PACK_TOKENS:
                packs //= 2
                notes.append(f"The system ended the training for its memory: it went on with packs of {packs} tokens.")
                continue
            raise ForgetlessError(_describe_end(code, folder))


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """Yield the handle of a folder's lock, which whoever has it keeps until it ends, however it ends. The lease of the
    stage has one training at a time, but for a process that was paused: its training may still be at work."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a") as file:
        last_try = time.monotonic() + DYING_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > last_try:
                    raise ForgetlessError(
                        f"Another process, paused perhaps, still trains with the checkpoints in {folder}. Let it "
                        "finish or end it (`fuser` on the file `lock` there names it), then run the same command again."
                    ) from None
                time.sleep(0.2)
            except OSError:  # a file system without locks
                break
        yield file.fileno()


def _run(folder: Path, on_step: OnStep, lock: int, processes: int) -> tuple[int, dict[str, Any]]:
    """Return the exit code of training processes (of the first that failed) and the last object that the leading one
    wrote that is no point. They hold the lock too."""
    end: dict[str, Any] = {}
    command = [sys.executable, "-m", "tasks.training.worker", str(folder / JOB)]
    environments = [_environment() | more for more in _ranks(processes)]
    with (folder / LOG).open("w", encoding="utf-8") as log, contextlib.ExitStack() as stack:
        start = functools.partial(subprocess.Popen, command, stderr=log, text=True, pass_fds=[lock])
        process = start(stdout=subprocess.PIPE, env=environments[0])
        followers = [start(stdout=subprocess.DEVNULL, env=environment) for environment in environments[1:]]
        for follower in followers:
            stack.callback(follower.wait)
            stack.callback(follower.kill)  # the leading one has ended, and nothing of theirs is kept
            threading.Thread(target=_end_with, args=(follower, process), daemon=True).start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                found = json.loads(line)
                if "point" in found:
                    on_step(found["step"], found["steps"], TrainPoint(**found["point"]))
                else:
                    end = found
            code = process.wait()
            failed = [follower.returncode for follower in followers if follower.poll()]
            code = failed[0] if failed and not end else code
        except BaseException:  # also a cancelled flow: the child leaves a checkpoint
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(ENDING_SECONDS)
            process.kill()
            raise
    return code, end


def _ranks(processes: int) -> list[dict[str, str]]:
    """Return what tells each of several processes which it is, and how to find the others."""
    if processes == 1:
        return [{}]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if device_class() == "cpu":
        shared["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // processes))
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def _end_with(follower: "subprocess.Popen[str]", leader: "subprocess.Popen[str]") -> None:
    """End the leading process when another fails: it would wait for that one."""
    if follower.wait() != 0:
        leader.kill()


def _environment() -> dict[str, str]:
    """Return this process's environment, in which the child finds this project whatever folder it is started in, and
    libraries keep little of what they compile."""
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | training_settings() | {"PYTHONPATH": os.pathsep.join(paths)}


def _describe_end(code: int, folder: Path) -> str:
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
    said = " | ".join(line.strip() for line in lines[-LOG_LINES:] if line.strip())
    return (
        f"The training process ended with {how}{f', after: {said}' if said else ''}. Its log is {folder / LOG}. The "
        "same command goes on from the last checkpoint."
    )


# --- the child --------------------------------------------------------------------------------------------------------


def _end_with_parent() -> None:
    """Let the system end this process when the one that started it dies: two must never write to one checkpoint."""
    parent = os.getppid()
    with contextlib.suppress(OSError, AttributeError):  # Linux's; elsewhere the closed pipe ends it at the next step
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died just before
        sys.exit(1)


def main(path: str) -> int:
    """Train what a job file asks for, telling of it on standard output."""
    _end_with_parent()
    told = os.fdopen(os.dup(1), "w", encoding="utf-8")  # what libraries print must not come between
    os.dup2(2, 1)
    lock = threading.Lock()

    def tell(**what: Any) -> None:
        with lock:
            told.write(json.dumps(what) + "\n")
            told.flush()

    from tasks.core.settings import quiet_libraries

    quiet_libraries()
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    config = TrainConfig(**job["config"])
    follows = int(os.environ.get("RANK", 0)) > 0  # of several processes: what it tells, nobody reads
    from tasks.training.trackers import open_trackers
    from tasks.training.trainer import Interrupted, Places, train_adapter

    folders: dict[str, Any] = {name: Path(place) if place else None for name, place in job["places"].items()}
    places = Places(**folders)
    try:
        with contextlib.ExitStack() as stack:
            log: Callable[[TrainPoint], None] = lambda _: None  # noqa: E731
            if config.report_to and not follows:
                where = {**job["trackers"], "folder": Path(job["trackers"]["folder"])}
                log = stack.enter_context(open_trackers(list(config.report_to), **where))

            def on_step(step: int, steps: int, point: TrainPoint) -> None:
                log(point)
                tell(step=step, steps=steps, point=point.model_dump())

            fields = train_adapter(places, config, on_step, job["trust_remote_code"], job["pack_tokens"])
        tell(fields=fields)
    except Interrupted:
        return 0 if follows else 128 + signal.SIGTERM  # a follower that fails ends the leading one
    except ForgetlessError as error:
        tell(error=str(error), kind=type(error).__name__)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
