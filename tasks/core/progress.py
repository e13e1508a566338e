"""Progress of the stage at work, for whoever watches in this process (the command line's bars)."""

from collections.abc import Callable

Listener = Callable[[str, int, int, str], None]
_listeners: list[Listener] = []


def watch_progress(listener: Listener) -> None:
    """Call `listener(stage, done, total, note)` from now on; total 0 means unknown, done -1 that the stage ended."""
    _listeners.append(listener)


def report_progress(stage: str, done: int, total: int, note: str = "") -> None:
    for listener in _listeners:
        listener(stage, done, total, note)
