"""Independent pieces of work side by side on a CPU's cores, each on one thread.

A small model's operations are too short to share among cores one by one: two packs at once on two cores train 1.8 times
as fast as one after the other on both (256 tokens, 135M parameters), and every piece is bit-for-bit deterministic."""

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from tasks.core.hardware import device_class

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_parallel(
    work: Callable[[Item], Result], items: Iterable[Item], ended: threading.Event | None = None
) -> Iterator[Result]:
    """Yield `work` of each item, in order: at once on the cores of a CPU, one after the other on a GPU. An interrupt
    waits for the work that has begun; `ended` is set then, for long work to return early."""
    cores = torch.get_num_threads()
    if device_class() != "cpu" or cores == 1:
        yield from map(work, items)
        return
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            try:
                yield from pool.map(work, items)
            except BaseException:
                if ended:
                    ended.set()
                raise
    finally:
        torch.set_num_threads(cores)
