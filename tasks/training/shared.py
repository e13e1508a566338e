"""Checkpoints in a store over a network, so that a training goes on where another machine stopped.

A thread uploads what the training leaves in a folder, beside the training, which waits for nothing. Each checkpoint is
an artifact, so it is whole or not there and its bytes are checked; the store keeps the newest KEPT of a training, until
its adapter is there. Two writers, where one was paused, do each other no harm: what is behind is removed.
"""

import contextlib
import json
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks.core.errors import StoreError
from tasks.core.progress import report_progress, unreported
from tasks.core.records import SNAPSHOTS, ArtifactRef, CheckpointRef
from tasks.core.retry import WrongBytes, error_code
from tasks.core.stages import Stage, checkpoint_stage
from tasks.core.store import Store, find_artifact, put_artifact, read_marker

KEPT = 2
LAST = "last"  # the folder of the last checkpoint in a training's folder
POLL_SECONDS = 1.0
AGAIN_SECONDS = 30.0
"""Between tries of an upload that failed though each of its requests was tried several times."""
UPLOAD_SECONDS = 120
"""That a training which was ended waits for its last checkpoint to reach the store."""
PLACE, TAKEN = "artifacts/checkpoint", "taken-"


class SharedCheckpoints:
    """The checkpoints of a training in the store; `run` is the run that they are written for."""

    def __init__(self, store: Store, training: Stage, run: str | None) -> None:
        self.store, self.training, self.run = store, training, run
        self.ended = threading.Event()
        self.is_finished = self.has_failed = False
        self.thread: threading.Thread | None = None

    # --- down ---

    def fetch(self, folder: Path) -> None:
        """Bring the newest whole checkpoint of the store into a training's folder, unless the one there is as far.
        Raises StoreError where the store cannot be read."""
        here = _read_step(folder)
        for step in sorted(self._steps(), reverse=True):
            if step <= here:
                return
            try:
                if record := self._find(f"{step:06}"):
                    report_progress("train", 0, 0, f"fetching the checkpoint of step {step}")
                    self._bring(record, folder)
                    return
            except StoreError as error:
                if not _is_damage(error):
                    raise
                _tell(f"passing over the checkpoint of step {step}: {error}")
                self.store.delete(f"{PLACE}/{self.training.key}-{step:06}")

    def _bring(self, record: CheckpointRef, folder: Path) -> None:
        wanted = {**record.parts, LAST: record.artifact}  # the last one last: without it there is no checkpoint
        for ref in wanted.values():  # all are whole in the cache before anything here is touched
            self.store.local_folder(ref)
        for path in (folder / LAST, folder / f"{LAST}.old", folder / SNAPSHOTS, *folder.glob("best-*")):
            shutil.rmtree(path, ignore_errors=True)
        for name, ref in wanted.items():
            (folder / name).parent.mkdir(exist_ok=True)
            self.store.local_folder(ref).rename(folder / name)  # out of the cache: the disk holds it once

    # --- up ---

    @contextlib.contextmanager
    def uploading(self, folder: Path) -> Iterator[Path]:
        """Yield `folder`, in which whatever is left as a folder named by its step is uploaded and removed. Where this
        ends by an exception, what waits then is uploaded first, for at most UPLOAD_SECONDS."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        self.thread = threading.Thread(target=self._upload, args=(folder,), name="checkpoints", daemon=True)
        self.thread.start()
        try:
            yield folder
            self.is_finished = True
        finally:
            self.ended.set()
            if not self.is_finished:
                self.thread.join(UPLOAD_SECONDS)
                if self.thread.is_alive():
                    _tell(f"the last checkpoint did not reach {self.store.url} within {UPLOAD_SECONDS} s.")

    def _upload(self, folder: Path) -> None:
        with unreported():
            while not self.is_finished:
                is_last = self.ended.is_set()
                place = _take(folder)
                if place is None and is_last:
                    return
                if place is None:
                    self.ended.wait(POLL_SECONDS)
                    continue
                while not self._has_put(place) and not self.ended.is_set() and not _find_waiting(folder):
                    self.ended.wait(AGAIN_SECONDS)

    def _has_put(self, place: Path) -> bool:
        """Bring a checkpoint into the store and return True; False where that fails, which is told once."""
        step = place.name.removeprefix(TAKEN)
        try:
            folders = sorted((*place.glob("best-*"), *place.glob(f"{SNAPSHOTS}/*")))
            parts = {f.relative_to(place).as_posix(): f for f in folders}
            stored = {name: self._put(name, part).artifact for name, part in parts.items()}
            self._put(step, place / LAST, stored)
            self._trim()
        except (StoreError, OSError) as error:
            if not self.has_failed:
                _tell(f"the checkpoint of step {int(step)} is on this machine alone, for now: {error}")
            self.has_failed = True
            return False
        self.has_failed = False
        return True

    def _put(self, name: str, folder: Path, parts: dict[str, ArtifactRef] | None = None) -> CheckpointRef:
        fields: dict[str, Any] = {"run": self.run, "parts": parts or {}}
        return self._find(name) or put_artifact(self.store, self._stage(name), folder, CheckpointRef, fields)

    def _trim(self) -> None:
        """Delete all but the newest whole checkpoints; those too where the adapter is there, because this process was
        paused and another one finished."""
        names = self._names()
        if read_marker(self.store, self.training.kind, self.training.key) is not None:
            return self._delete(names)
        whole: list[CheckpointRef] = []
        for step in sorted(self._steps(), reverse=True):
            if len(whole) < KEPT and (record := self._find(f"{step:06}")):
                whole.append(record)
        kept = {ref.key for record in whole for ref in (record.artifact, *record.parts.values())}
        newest = _step_of(whole[0].artifact.key) if whole else 0  # what is beyond is another writer's, on its way
        self._delete([name for name in names if name not in kept and _step_of(name) <= newest])

    def forget(self) -> None:
        """Delete the training's checkpoints from the store, as its adapter is there."""
        if self.thread:
            self.thread.join()
        with contextlib.suppress(StoreError):  # `forgetless store gc` removes them too
            self._delete(self._names())

    # --- in the store ---

    def _stage(self, name: str) -> Stage:
        return checkpoint_stage(self.training, name.replace("/", "-"))

    def _find(self, name: str) -> CheckpointRef | None:
        return find_artifact(self.store, self._stage(name), CheckpointRef)

    def _names(self) -> list[str]:
        return [name for name in self.store.list_folders(PLACE) if name.startswith(f"{self.training.key}-")]

    def _steps(self) -> list[int]:
        """Return the steps of which there is a checkpoint, or half of one."""
        return [_step_of(name) for name in self._names() if name.count("-") == 1]

    def _delete(self, names: list[str]) -> None:
        for name in names:
            self.store.delete(f"{PLACE}/{name}")


def _step_of(name: str) -> int:
    return int(name.rpartition("-")[2])


def _read_step(folder: Path) -> int:
    """Return the step of the last checkpoint in a training's folder; -1 where there is none that can be read."""
    from safetensors import SafetensorError, safe_open

    for place in (folder / LAST, folder / f"{LAST}.old"):
        try:
            with safe_open(place / "state.safetensors", "np"):  # sees a file that was cut short
                return int(json.loads((place / "state.json").read_bytes())["progress"]["step"])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            continue
    return -1


def _find_waiting(folder: Path) -> list[Path]:
    return sorted(folder.glob("[0-9]*"))


def _take(folder: Path) -> Path | None:
    """Return a folder that was left, renamed so that the training cannot take it back; the one taken before goes."""
    for former in folder.glob(f"{TAKEN}*"):
        shutil.rmtree(former, ignore_errors=True)
    for waiting in _find_waiting(folder):
        with contextlib.suppress(FileNotFoundError):  # a newer one is taking its place
            return waiting.rename(folder / f"{TAKEN}{waiting.name}")
    return None


def _is_damage(error: StoreError) -> bool:
    """Return whether what was asked for is not in the store as it was written; else the store cannot be read now."""
    cause = error.__cause__
    return cause is None or isinstance(cause, WrongBytes) or error_code(cause)[0] in (404, 416)


def _tell(what: str) -> None:
    print(f"forgetless: {what}", file=sys.stderr)
