"""Preparation: training and validation rows on disk, and every row that was refused, with its reason.

Shards are cleaned on their own, side by side; what takes a view over all of them (duplicates, the split, replay) works
on a few numbers per row, so that a million rows need no more memory than their shards. Rows keep the order of their
files, the same on every machine, in which a person can follow a line back to its source; training shuffles by its own
seed. Which split a row falls into depends on its first question alone.
"""

import bisect
import contextlib
import functools
import itertools
import json
import os
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.core.cache import locked_folder
from tasks.core.config import DataConfig
from tasks.core.digest import sha256
from tasks.core.processes import map_processes
from tasks.core.store import Store
from tasks.data.duplicates import BANDS, SKETCH_BYTES, find_duplicates, find_near_duplicates
from tasks.data.formats import Rejected, excerpt
from tasks.data.leakage import ItemIndex
from tasks.data.shards import (
    CleanShard,
    Origin,
    clean_shard,
    cut_shards,
    get_shard,
    put_shard,
    rejected_line,
    write_shard,
)
from tasks.data.sources import read_files, source_name

SPLITS = ("train", "validation")

OnProgress = Callable[[int], None]
"""Called with the number of rows cleaned so far."""
Job = tuple[bytes, Origin]
RunShards = Callable[[Iterator[Job], DataConfig, ItemIndex | None], Iterator[CleanShard]]
"""Cleans shards, wherever that is done, and yields them in their order."""


def clean_here(jobs: Iterator[Job], config: DataConfig, items: ItemIndex | None) -> Iterator[CleanShard]:
    """Yield the jobs' shards, cleaned by a process per core."""
    return map_processes(_clean_job, jobs, config, items)


def _clean_job(job: Job, config: DataConfig, items: ItemIndex | None) -> CleanShard:
    return clean_shard(*job, config, items)


def prepare_dataset(
    config: DataConfig,
    folder: Path,
    items: ItemIndex | None = None,
    on_progress: OnProgress = lambda _: None,
    run_shards: RunShards = clean_here,
    kept: Path | None = None,
    store: Store | None = None,
) -> dict[str, Any]:
    """Write train.jsonl, validation.jsonl and quarantine.jsonl into `folder`, and return a DatasetRef's fields. Shards
    that are cleaned stay in the folder `kept`, from which the same preparation goes on; who is done removes it. `store`
    may have what cannot be reached.

    Of two kept rows or more, each split gets at least one. Raises DataError."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if kept is None or not stack.enter_context(locked_folder(kept)):  # another process is at it
            kept = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder, prefix="shards-")))
        table = _Table(kept)
        for path, shard, origin, is_replay in _cleaned_shards(config, items, run_shards, kept, store):
            table.add(path, shard, origin, is_replay)
            on_progress(table.read)
        repeats = table.drop_repeats(config)
        held_out = split_questions(table.questions, table.kept & ~table.replay, config.validation_share)
        unused = table.drop_unused_replay(config.replay.share, held_out) if config.replay else 0
        counts = table.write(folder, held_out, repeats)
    return {
        **counts,
        "read": table.read,
        "unused": unused,
        "quarantined": dict(sorted(table.quarantined.items())),
        "repaired": table.count_repaired(),
        "formats": table.count_formats(),
        "sources": [source_name(source) for source in config.sources],
    }


@dataclass
class _Cut:
    """A shard that was cut: the file that it has when it is cleaned, what that is cleaned from, whether it is there."""

    path: Path
    job: str
    origin: Origin
    is_replay: bool
    is_there: bool


def _cleaned_shards(
    config: DataConfig, items: ItemIndex | None, run_shards: RunShards, folder: Path, store: Store | None
) -> Iterator[tuple[Path, CleanShard, Origin, bool]]:
    """Yield the shards in their order, each with its file in `folder`; those that are there are not cleaned again."""
    cut: deque[_Cut] = deque()
    numbers = itertools.count()

    def jobs() -> Iterator[Job]:
        replay = config.replay.sources if config.replay else []
        for is_replay, source in (*((False, s) for s in config.sources), *((True, s) for s in replay)):
            for file in read_files(source, store):
                origin = Origin(file.name, file.format, file.source)
                for records in cut_shards(file):
                    data, path = write_shard(records), folder / f"shard-{next(numbers)}"
                    job = sha256(data)
                    is_there = path.exists() and get_shard(path, job) is not None
                    cut.append(_Cut(path, job, origin, is_replay, is_there))
                    if not is_there:
                        yield data, origin

    def found() -> Iterator[tuple[Path, CleanShard, Origin, bool]]:
        while cut and cut[0].is_there:
            first = cut.popleft()
            shard = get_shard(first.path, first.job)
            assert shard is not None, "it was whole when it was cut"
            yield first.path, shard, first.origin, first.is_replay

    for shard in run_shards(jobs(), config, items):
        yield from found()
        first = cut.popleft()
        put_shard(first.path, shard, first.job)
        yield first.path, shard, first.origin, first.is_replay
    yield from found()


def split_questions(questions: NDArray[np.uint64], kept: NDArray[np.bool_], share: float) -> NDArray[np.bool_]:
    """Return which rows are held out: those of `share` of all questions, given as 64-bit numbers, and never none or all
    of the `kept` rows where there are two. If all are one question's, the last row alone is held out: then one question
    is in both splits, and validation says so."""
    held_out = (questions.astype(np.float64) < share * 2.0**64) & kept
    rows = np.flatnonzero(kept)
    if len(rows) < 2 or 0 < held_out.sum() < len(rows):
        return held_out
    all_held_out = bool(held_out.any())
    nearest = questions[rows].max() if all_held_out else questions[rows].min()
    moved = rows[questions[rows] == nearest]
    if len(moved) == len(rows):
        moved = rows[:-1] if all_held_out else rows[-1:]
    held_out[moved] = not all_held_out
    return held_out


@dataclass
class _Shard:
    """`rows` is a file that begins with the shard's rows, `count` of them."""

    origin: Origin
    rows: Path
    rejected: bytes
    first: int
    count: int


class _Table:
    """All shards of a data set: their text on disk, a few numbers per row in memory."""

    def __init__(self, scratch: Path) -> None:
        self.shards: list[_Shard] = []
        self.read = 0
        self.quarantined: Counter[str] = Counter()
        self._repairs: list[tuple[tuple[str, ...], NDArray[np.int64]]] = []
        self._parts: dict[str, list[Any]] = {name: [] for name in ("digests", "questions", "lines", "replay")}
        self.keys = (scratch / "keys").open("w+b")
        self.sketches = (scratch / "sketches").open("w+b")

    def add(self, path: Path, shard: CleanShard, origin: Origin, is_replay: bool) -> None:
        first = self.shards[-1].first + self.shards[-1].count if self.shards else 0
        self.shards.append(_Shard(origin, path, shard.rejected, first, len(shard.lines)))
        self.read += shard.read
        self.quarantined.update(shard.quarantined)
        self._repairs += [(steps, first + numbers) for steps, numbers in shard.repairs.items()]
        for name in ("digests", "questions", "lines"):
            self._parts[name].append(getattr(shard, name))
        self._parts["replay"].append(np.full(len(shard.lines), is_replay))
        self.keys.write(shard.keys.tobytes())
        self.sketches.write(shard.sketches.tobytes())

    @functools.cached_property
    def digests(self) -> NDArray[np.uint64]:
        return np.concatenate([np.empty((0, 2), np.uint64), *self._parts.pop("digests")])

    @functools.cached_property
    def questions(self) -> NDArray[np.uint64]:
        return np.concatenate([np.empty(0, np.uint64), *self._parts.pop("questions")])

    @functools.cached_property
    def replay(self) -> NDArray[np.bool_]:
        return np.concatenate([np.empty(0, bool), *self._parts.pop("replay")])

    @functools.cached_property
    def kept(self) -> NDArray[np.bool_]:
        return np.ones(len(self.questions), bool)

    def drop_repeats(self, config: DataConfig) -> dict[int, tuple[str, int]]:
        """Take rows that repeat an earlier one out of `kept`, and return them with the reason and the earlier row."""
        exact = find_duplicates(self.digests) if config.clean.duplicates else {}
        near: dict[int, int] = {}
        if config.clean.near_duplicates and len(self.questions):
            near = find_near_duplicates(self._keys, self._sketches, config.clean.near_duplicates, exact)
        repeats = {row: ("duplicate", earlier) for row, earlier in exact.items()}
        repeats |= {row: ("near_duplicate", earlier) for row, earlier in near.items()}
        self.kept[list(repeats)] = False
        self.quarantined.update(reason for reason, _ in repeats.values())
        return repeats

    def drop_unused_replay(self, share: float, held_out: NDArray[np.bool_]) -> int:
        """Take replay rows out of `kept` until they make up `share` of all training rows; return how many. Those with
        the smallest digests stay, so a larger share only adds rows."""
        wanted = round(share / (1 - share) * int((self.kept & ~self.replay & ~held_out).sum()))
        rows = np.flatnonzero(self.kept & self.replay)
        unused = rows[np.argsort(self.digests[rows, 0], kind="stable")][wanted:]
        self.kept[unused] = False
        return len(unused)

    def _keys(self, band: int) -> NDArray[np.uint64]:
        """Return a band's key of every row: a stretch of each shard's (BANDS, rows) array in the file of all."""
        parts = [np.empty(0, np.uint64)]
        for shard in self.shards:
            self.keys.seek(8 * (BANDS * shard.first + band * shard.count))
            parts.append(np.frombuffer(self.keys.read(8 * shard.count), np.uint64))
        return np.concatenate(parts)

    def _sketches(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        self.sketches.flush()
        number = self.sketches.fileno()
        read = b"".join(os.pread(number, SKETCH_BYTES, SKETCH_BYTES * row) for row in rows.tolist())
        return np.frombuffer(read, np.uint8).reshape(-1, SKETCH_BYTES)

    def count_repaired(self) -> dict[str, int]:
        """Return the kept rows by what was mended in them."""
        counts: Counter[str] = Counter()
        for steps, rows in self._repairs:
            counts.update(dict.fromkeys(steps, int(self.kept[rows].sum())))
        return dict(sorted((+counts).items()))

    def count_formats(self) -> dict[str, int]:
        counts: Counter[str] = Counter()
        for shard in self.shards:
            counts[shard.origin.format] += int(self.kept[shard.first : shard.first + shard.count].sum())
        return dict(sorted((+counts).items()))

    def place(self, row: int) -> str:
        """Return where a row came from, as file:line."""
        at = bisect.bisect_right(self.shards, row, key=lambda shard: shard.first) - 1
        shard = self.shards[at]
        return f"{shard.origin.name}:{self._parts['lines'][at][row - shard.first]}"

    def write(
        self, folder: Path, held_out: NDArray[np.bool_], repeats: dict[int, tuple[str, int]]
    ) -> dict[str, dict[str, int]]:
        """Write the splits and the quarantine, and return the counts of rows by split and of replay rows by source."""
        rows: Counter[str] = Counter()
        replay: Counter[str] = Counter()
        with contextlib.ExitStack() as files:
            splits = [files.enter_context((folder / f"{split}.jsonl").open("wb")) for split in SPLITS]
            quarantine = files.enter_context((folder / "quarantine.jsonl").open("wb"))
            for shard in self.shards:
                quarantine.write(shard.rejected)
                with shard.rows.open("rb") as lines:
                    for row, line in enumerate(itertools.islice(lines, shard.count), shard.first):
                        if self.kept[row]:
                            split = int(held_out[row])
                            rows[SPLITS[split]] += 1
                            replay[shard.origin.name] += int(self.replay[row])
                            splits[split].write(line)
                        elif row in repeats:
                            quarantine.write(self._refusal(line, *repeats[row]))
        return {"rows": {split: rows[split] for split in SPLITS}, "replay": dict(+replay)}

    def _refusal(self, line: bytes, reason: str, earlier: int) -> bytes:
        row = json.loads(line)
        what = "The same" if reason == "duplicate" else "Nearly the same"
        detail = f"{what} text came before, at {self.place(earlier)}."
        return rejected_line(Rejected(row["source"], row["line"], reason, detail, excerpt(row["messages"]))).encode()
