"""Texts as arrays of letters, and hashes of every stretch of them: what near duplicates and leakage are found by.

Whole shards at a time, in numpy: a loop over characters in Python would cost more than all other preparation. Case,
white space and punctuation do not count, so a comma more does not make another text.
"""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so it has an inverse modulo 2^64
INVERSE = np.uint64(pow(int(BASE), -1, 1 << 64))
BATCH_LETTERS = 1 << 20  # 8 MB per array of hashes, of which about ten live at once


@dataclass(frozen=True)
class Letters:
    """The letters and digits of several texts, end to end: text i is codes[starts[i]:starts[i + 1]]."""

    codes: NDArray[np.uint32]
    starts: NDArray[np.int64]

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.starts)


@functools.cache
def _letter_table() -> NDArray[np.uint32]:
    """Return, by code point of the basic plane, the lower-case letter or digit it counts as, 0 for everything else."""
    table = np.zeros(1 << 16, np.uint32)
    for code in range(1 << 16):
        if (letter := chr(code)).isalnum():
            table[code] = ord(letter.lower()[0])
    return table


def read_letters(texts: list[str]) -> Letters:
    """Return the letters of `texts`. Characters beyond the basic plane (rare ideographs, emoji) all count."""
    codes = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)
    letters = _letter_table()[np.minimum(codes, 0xFFFF)]
    letters = np.where(codes > 0xFFFF, codes, letters)
    kept = letters != 0
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(kept)])
    ends = np.cumsum([0, *map(len, texts)])
    return Letters(letters[kept], before[ends])


def read_letters_in_batches(texts: list[str]) -> Iterator[tuple[slice, Letters]]:
    """Yield the letters of as many texts at a time as have about BATCH_LETTERS characters, and which texts they are."""
    ends = np.cumsum([0, *map(len, texts)])
    edges = np.searchsorted(ends, np.arange(0, ends[-1], BATCH_LETTERS))
    for start, stop in itertools.pairwise(np.unique([0, *edges, len(texts)])):
        part = slice(int(start), int(stop))
        yield part, read_letters(texts[part])


def mix(values: Hashes) -> Hashes:
    """Return `values` with every bit depending on every other (the finaliser of MurmurHash3, by Austin Appleby)."""
    values = values ^ (values >> np.uint64(33))
    values *= np.uint64(0xFF51AFD7ED558CCD)
    values ^= values >> np.uint64(33)
    values *= np.uint64(0xC4CEB9FE1A85EC53)
    values ^= values >> np.uint64(33)
    return values


class WindowHashes:
    """Hashes of any stretch of some letters, each in a handful of operations whatever its length.

    With prefix sums S[i] of code x BASE^i modulo 2^64, a stretch's hash is (S[end] - S[start]) x BASE^-start."""

    def __init__(self, letters: Letters) -> None:
        size = len(letters.codes)
        codes = mix(letters.codes.astype(np.uint64))
        self.letters = letters
        self.inverses = _powers(INVERSE, size + 1)
        self.sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(codes * _powers(BASE, size), dtype=np.uint64)])

    def between(self, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> Hashes:
        return mix((self.sums[ends] - self.sums[starts]) * self.inverses[starts])

    def windows(self, width: int) -> tuple[Hashes, NDArray[np.int64]]:
        """Return the hash of every window of `width` letters that lies within one text, and which text."""
        counts = np.maximum(self.letters.lengths - width + 1, 0)
        text = np.repeat(np.arange(len(counts)), counts)
        first = np.repeat(self.letters.starts[:-1] - (np.cumsum(counts) - counts), counts)
        starts = first + np.arange(len(text))
        return self.between(starts, starts + width), text


@functools.lru_cache(maxsize=4)
def _powers_up_to(base: int, size: int) -> Hashes:
    return np.concatenate([np.ones(1, np.uint64), np.cumprod(np.full(size, base, np.uint64), dtype=np.uint64)])


def _powers(base: np.uint64, size: int) -> Hashes:
    """Return base^0 to base^(size - 1) modulo 2^64."""
    return _powers_up_to(int(base), 1 << max(10, (size - 1).bit_length()))[:size]
