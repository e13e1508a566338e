"""Progress of the stage at work, for whoever watches in this process (the command line's bars)."""

import contextlib
import threading
from collections.abc import Callable, Iterator

Listener = Callable[[str, int, int, str], None]
_listeners: list[Listener] = []
_aside = threading.local()


@contextlib.contextmanager
def watch_progress(listener: Listener) -> Iterator[None]:
    """Call `listener(stage, done, total, note)` within; total 0 means unknown, done -1 that the stage ended."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


@contextlib.contextmanager
def unreported() -> Iterator[None]:
    """Keep to itself what this thread does within: it is not the stage at work."""
    _aside.depth = getattr(_aside, "depth", 0) + 1
    try:
        yield
    finally:
        _aside.depth -= 1


def report_progress(stage: str, done: int, total: int, note: str = "") -> None:
    """Tell how far a stage is; "" is the one at work, whichever that is."""
    for listener in _listeners if not getattr(_aside, "depth", 0) else ():
        listener(stage, done, total, note)
