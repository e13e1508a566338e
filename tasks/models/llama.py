"""llama.cpp as token ids in and logits out, without its chatter: what it logs is collected, and shown only where
something fails."""

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from tasks.core.errors import ModelError
from tasks.models.encode import common_start

BATCH = 512  # tokens of a pass


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


class LlamaReader:
    """A GGUF file that is asked for its logits. What a text shares with the one before it is not computed again.

    Raises ModelError where llama.cpp cannot load the file."""

    def __init__(self, file: Path, longest: int, threads: int) -> None:
        with quiet_llama() as notes:
            try:
                options = {"n_ctx": longest, "n_batch": BATCH, "n_threads": threads, "n_threads_batch": threads}
                self.model = llama_cpp.Llama(str(file), verbose=False, **options)  # type: ignore[arg-type]
            except (ValueError, RuntimeError, OSError) as error:
                raise ModelError(
                    f"{file.name} cannot be loaded: {error} {notes[-1] if notes else ''}".strip()
                ) from error
        self.context: Any = self.model.ctx
        self.memory: Any = llama_cpp.llama_get_memory(self.context)
        self.vocabulary = llama_cpp.llama_model_get_vocab(self.model.model)
        self.width = llama_cpp.llama_vocab_n_tokens(self.vocabulary)
        self.batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self.past: list[int] = []
        self.branch: tuple[int, NDArray[np.float32]] | None = None
        """The first place that was read of the last text, and its logits: choices branch there."""

    def close(self) -> None:
        llama_cpp.llama_batch_free(self.batch)
        self.model.close()

    def read(self, tokens: Sequence[int], first: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Yield the logits, (vocabulary,), at each place from `first` on: views that the next pass overwrites."""
        asked = first
        kept, branches = find_kept(self.past, self.branch[0] if self.branch else None, tokens, first)
        if branches and self.branch:
            yield self.branch
            first += 1
        llama_cpp.llama_memory_seq_rm(self.memory, 0, kept, -1)
        self.past = list(tokens[:kept])
        for start in range(kept, len(tokens), BATCH):
            part = tokens[start : start + BATCH]
            self.batch.n_tokens = len(part)
            for i, token in enumerate(part):
                self.batch.token[i], self.batch.pos[i] = token, start + i
                self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, 0
                self.batch.logits[i] = start + i >= first
            if code := llama_cpp.llama_decode(self.context, self.batch):
                raise ModelError(f"llama.cpp could not read a text of {len(tokens)} tokens (code {code}).")
            self.past += part
            for i in range(max(0, first - start), len(part)):
                pointer = llama_cpp.llama_get_logits_ith(self.context, i)
                logits = np.ctypeslib.as_array(pointer, (self.width,))
                if start + i == asked:
                    self.branch = asked, logits.copy()
                yield start + i, logits

    def skip(self, tokens: Sequence[int], first: int) -> None:
        """Go past a text as if it had been read, where nothing that it would compute is needed after it."""
        kept, branches = find_kept(self.past, self.branch[0] if self.branch else None, tokens, first)
        llama_cpp.llama_memory_seq_rm(self.memory, 0, kept, -1)
        self.past = list(tokens)
        if not branches:
            self.branch = first, np.empty(0, np.float32)

    def forget(self) -> None:
        """Compute the next text whole."""
        self.past, self.branch = [], None

    def ends(self, token: int) -> bool:
        """Return whether generation stops at a token."""
        return bool(llama_cpp.llama_vocab_is_eog(self.vocabulary, token))


def find_kept(past: Sequence[int], branch: int | None, tokens: Sequence[int], first: int) -> tuple[int, bool]:
    """Return how many first tokens of a text, read from `first` on, are not computed again after the text `past`, and
    whether the logits at `first` are those where `past` branched."""
    kept = common_start(past, tokens)
    if first >= kept:
        return kept, False
    # What is read must be computed again, unless it is where the text before began.
    return (min(kept, first + 1), True) if branch == first else (first, False)
