"""Leases: of several processes that want the same artifact, one makes it and the others wait for it.

A lease is a small object `leases/<kind>/<key>.<number>` that its holder created where there was none, with a heartbeat
beside it that a thread renews. After STALE_SECONDS without a sign of life, by the store's clock, another process takes
over under the next number; at once where the holder was a process of this machine that is no more. A lease saves work,
it does not guard bytes: a holder that was paused for longer goes on beside its successor, and the store keeps what is
committed first.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.core.errors import StoreError

if TYPE_CHECKING:
    from tasks.core.stages import Stage
    from tasks.core.store import Store, StoredFile

STALE_SECONDS = 30.0
BEAT_SECONDS = 5.0
POLL_SECONDS = 2.0


@contextlib.contextmanager
def hold_lease(store: "Store", stage: "Stage") -> Iterator[None]:
    """Hold the lease of a stage's artifact within; first wait while another process holds it, and say for whom."""
    lease = Lease(store, stage)
    ended = threading.Event()
    beats = threading.Thread(target=lease.beat, args=(ended,), name="lease", daemon=True)
    try:
        lease.take()
        beats.start()
        yield
    finally:
        ended.set()
        if beats.ident:
            beats.join(BEAT_SECONDS)
        with contextlib.suppress(StoreError):  # what cannot be deleted goes stale
            lease.release()


class Lease:
    """The lease of a stage's artifact, for one holder.

    Number 1 is created, not looked for: without others a lease costs two requests. Who takes over leaves number 1 there
    until the end, so that nobody else creates it meanwhile."""

    def __init__(self, store: "Store", stage: "Stage") -> None:
        self.store, self.kind = store, stage.kind
        self.folder, self.name = f"leases/{stage.kind}", stage.key
        holder = {"host": socket.gethostname(), "process": os.getpid(), "token": uuid.uuid4().hex}
        holder |= {"started": _started(os.getpid()), "space": _space()}
        self.mine = json.dumps(holder).encode()
        self.path: str | None = None
        """Where the holder's own is, from before it is created."""
        self.is_taken = False
        self.dead: list[StoredFile] = []
        """What former holders left, the first number's first."""
        self.has_beaten = self.was_late = False

    def take(self) -> None:
        """Return when the lease is this holder's."""
        found: dict[int, list[StoredFile]] = {}
        told = ""
        while True:
            number = max(found) + 1 if 1 in found else 1
            self.path = f"{self.folder}/{self.name}.{number}"
            self.is_taken = self.store.create_bytes(self.path, self.mine)
            if self.is_taken:
                self.dead = [file for number in sorted(found) for file in found[number]]
                if number == 1 or self._find().get(1, [])[:1] == found[1][:1]:
                    return
                self.dead = []  # released just before, so that another may have number 1
                self.release()
            self.path, self.is_taken = None, False
            while (found := self._find()) and (alive := self._alive(found)):
                if alive[0].path != told:
                    self._tell(alive)
                told = alive[0].path
                time.sleep(POLL_SECONDS)

    def holder(self) -> dict[str, Any] | None:
        """Return who holds the lease at present: `host` and `process`."""
        alive = self._alive(self._find())
        return self._read(alive) if alive else None

    def beat(self, ended: threading.Event) -> None:
        """Give signs of life until `ended`, or until a process that took over has ended."""
        assert self.path
        last = time.monotonic()
        while not ended.wait(BEAT_SECONDS):
            with contextlib.suppress(StoreError):  # a network that comes back within STALE_SECONDS loses nothing
                if self.store.read_bytes(self.path) != self.mine:
                    self.was_late = True
                    return
                self.has_beaten = True
                self.store.write_bytes(f"{self.path}.beat", self.mine)
                self.was_late |= time.monotonic() - last > STALE_SECONDS
                last = time.monotonic()
        self.was_late |= time.monotonic() - last > STALE_SECONDS

    def release(self) -> None:
        """Delete what this holder has of the lease, former holders' first: the heartbeat before what it belongs to, as
        it alone would look like a holder."""
        if self.path is None:
            return
        if (self.was_late or not self.is_taken) and (there := self.store.read_bytes(self.path)) != self.mine:
            if there is None and self.has_beaten:  # a last sign of life, after all was deleted
                self.store.delete_file(f"{self.path}.beat")
            return
        gone = sorted((file.path for file in self.dead), key=lambda path: not path.endswith(".beat"))
        gone += [f"{self.path}.beat"] if self.has_beaten else []
        if self.was_late and max(self._find(), default=0) > int(self.path.rpartition(".")[2]):
            gone = gone[len(self.dead) :]  # who took over deletes the rest
        else:
            gone.append(self.path)
        for path in gone:
            self.store.delete_file(path)

    def _find(self) -> dict[int, list["StoredFile"]]:
        """Return the files of every number: a holder's own, then its heartbeat."""
        found = defaultdict(list)
        for file in sorted(self.store.list_files(self.folder), key=lambda file: file.path):
            key, _, rest = file.path.removeprefix(f"{self.folder}/").partition(".")
            if key == self.name:
                found[int(rest.removesuffix(".beat"))].append(file)
        return found

    def _alive(self, found: dict[int, list["StoredFile"]]) -> list["StoredFile"]:
        """Return the files of a holder that lives, the last number's first; none where all are dead."""
        return next((found[number] for number in sorted(found, reverse=True) if self._is_alive(found[number])), [])

    def _is_alive(self, files: list["StoredFile"]) -> bool:
        holder = self._read(files)
        if holder.get("space") and holder["space"] == _space() and _started(holder["process"]) != holder["started"]:
            return False  # it was killed on this very machine
        return self.store.clock() - max(file.written for file in files) < STALE_SECONDS

    def _read(self, files: list["StoredFile"]) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.store.read_bytes(files[0].path) or b"{}")
        return found

    def _tell(self, files: list["StoredFile"]) -> None:
        """Say on standard error for which other process this one waits."""
        holder = self._read(files)
        if holder.get("space") and (holder["space"], holder["process"]) == (_space(), os.getpid()):
            return  # another thread of this process, which says itself what it does
        since = datetime.fromtimestamp(files[0].written).astimezone()
        print(
            f"forgetless: process {holder.get('process', '?')} on {holder.get('host', '?')} has been making this "
            f"{self.kind} artifact since {since:%H:%M:%S}: waiting for it, or for {STALE_SECONDS:.0f} s without a sign "
            "of life.",
            file=sys.stderr,
        )


def _space() -> str | None:
    """Return what the process ids of this boot and container belong to; None where that is not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return None


def _started(process: int) -> str | None:
    """Return when a process was started, in ticks since the boot; None where there is none."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]  # a zombie holds nothing any more
