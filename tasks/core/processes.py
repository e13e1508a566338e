"""Work over many jobs by a process per core, in order and with few of them in memory at once."""

import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")
CHUNK_BYTES = 1 << 20  # half a second of tokenising, so no core waits long at the end; its tokens take 50 MB then
START_SECONDS = 1.0


def map_processes(function: Callable[..., Result], jobs: Iterable[Job], *common: Any) -> Iterator[Result]:
    """Yield `function(job, *common)` of each job, in their order. What takes a second is done here, which is as long as
    processes take to start; only the rest is worth them. `function` is a module's own, and what it takes and returns
    can be pickled."""
    started = time.monotonic()
    coming = iter(jobs)
    for job in coming:
        yield function(job, *common)
        if time.monotonic() - started > START_SECONDS:
            break
    rest = next(coming, None)
    if rest is None:
        return
    workers = len(os.sched_getaffinity(0))
    spawn = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    with ProcessPoolExecutor(workers, spawn, _remember, (function, common)) as pool:
        waiting: deque[Future[Result]] = deque()
        for job in chain([rest], coming):
            waiting.append(pool.submit(_call, job))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


_remembered: list[Any] = []


def _remember(*what: Any) -> None:
    """Keep what all jobs share, which then crosses to a process once."""
    # Every core has a process: threads of the tokenizer in each would only take turns (and cost a third of the speed).
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _remembered[:] = what


def _call(job: Any) -> Any:
    function, common = _remembered
    return function(job, *common)


def read_chunks(path: Path) -> Iterator[bytes]:
    """Yield a file of lines in pieces of whole lines, about 1 MB each."""
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk + file.readline()
