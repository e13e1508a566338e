"""llama.cpp without its chatter: what it logs is collected, and shown only where something fails."""

import contextlib
import ctypes
from collections.abc import Iterator

import llama_cpp


@contextlib.contextmanager
def quiet_llama() -> Iterator[list[str]]:
    """Yield a list that collects llama.cpp's log lines instead of the screen."""
    lines: list[str] = []

    def collect(level: int, text: bytes, data: ctypes.c_void_p) -> None:
        line = text.decode("utf-8", "replace").strip()
        if line:
            lines.append(line)

    callback = llama_cpp.llama_log_callback(collect)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    _kept_alive.append(callback)  # llama.cpp keeps the pointer after we return
    try:
        yield lines
    finally:
        del _kept_alive[:-1]


_kept_alive: list[object] = []
