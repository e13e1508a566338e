"""Duplicates: which conversations repeat an earlier one, word for word or nearly.

A conversation is reduced to a sketch of 128 small hashes of its 4-letter grams; two sketches agree in as many places as
the gram sets overlap (Jaccard). Bands of six find the candidates (at a similarity of 0.8 all but 0.2 % of the pairs),
whole sketches confirm them. What is held in memory is 8 bytes per row and band.

Sketches: Dahlgaard, Knudsen, Thorup: Fast Similarity Sketching, FOCS 2017. Bands: Leskovec, Rajaraman, Ullman: Mining
of Massive Datasets, chapter 3.4.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from tasks.data.grams import Hashes, WindowHashes, read_letters_in_batches

GRAM_LETTERS = 4
BINS, BAND_BINS = 128, 6
BANDS = BINS // BAND_BINS
LAST_BINS = 32
SKETCH_BYTES = BINS + LAST_BINS
LEAST_LAST_AGREEMENT = 0.6  # of 32 bins, so it varies by 0.09
ROUNDS = 12
EMPTY = np.uint64(2**64 - 1)
STEP = 0xD1342543DE82EF95  # odd: every round sees other hashes
LEAST_LETTERS = 40  # shorter ones may differ in one figure and mean another sum: compared word for word alone
PAIRS_AT_ONCE = 1 << 16


def sketch_conversations(conversations: list[list[str]]) -> tuple[NDArray[np.uint8], Hashes]:
    """Return the sketches, shape (rows, SKETCH_BYTES), and the keys of their bands, shape (BANDS, rows): EMPTY for a
    conversation too short to compare.

    Of several turns, the last has a sketch of its own: what grew out of one beginning in two ways is not the same."""
    whole, keys = _sketch_texts(["\n".join(turns) for turns in conversations])
    last, _ = _sketch_texts([turns[-1] if len(turns) > 2 else "" for turns in conversations])
    return np.concatenate([whole, last[:, :LAST_BINS]], axis=1), keys


def _sketch_texts(texts: list[str]) -> tuple[NDArray[np.uint8], Hashes]:
    sketches = np.empty((len(texts), BINS), np.uint8)
    keys = np.empty((BANDS, len(texts)), np.uint64)
    for part, letters in read_letters_in_batches(texts):
        full = _full_sketches(*WindowHashes(letters).windows(GRAM_LETTERS), len(letters.lengths))
        sketches[part] = full.astype(np.uint8)
        keys[:, part] = _band_keys(full)
        keys[:, part][:, letters.lengths < LEAST_LETTERS] = EMPTY
    return sketches, keys


def _full_sketches(grams: Hashes, text: NDArray[np.int64], texts: int) -> Hashes:
    """Return sketches of 64-bit values, shape (texts, BINS).

    Round by round each gram falls into one bin, until none is empty; a long text is done in one round, a short one
    meets all its grams often. The round is in a value's top bits, so an earlier round's value always wins."""
    sketches = np.full((texts, BINS), EMPTY)
    flat = sketches.reshape(-1)
    for number in range(ROUNDS):
        values = _rehash(grams, number)
        bins = (values >> np.uint64(57)).astype(np.int64)  # 7 bits: 128 bins
        values = (values & np.uint64((1 << 56) - 1)) | np.uint64(number << 56)
        np.minimum.at(flat, text * BINS + bins, values)
        unfinished = (sketches == EMPTY).any(axis=1)[text]
        if not unfinished.any():
            return sketches
        grams, text = grams[unfinished], text[unfinished]
    starts = np.flatnonzero(np.diff(text, prepend=-1))  # texts of few grams: every gram into every bin
    rows = text[starts]
    for column in range(BINS):
        values = _rehash(grams, ROUNDS + column)
        least = np.minimum.reduceat(values & np.uint64((1 << 56) - 1), starts) | np.uint64(ROUNDS << 56)
        sketches[rows, column] = np.minimum(sketches[rows, column], least)
    return sketches


def _rehash(grams: Hashes, number: int) -> Hashes:
    """Return another hash of hashes: multiply and shift is enough for what is mixed already."""
    values = (grams ^ np.uint64((number + 1) * STEP % 2**64)) * np.uint64(0x9FB21C651E98DF25)
    values ^= values >> np.uint64(32)
    return values


def _band_keys(sketches: Hashes) -> Hashes:
    bands = sketches[:, : BANDS * BAND_BINS].reshape(len(sketches), BANDS, BAND_BINS)
    keys = np.zeros(bands.shape[:2], np.uint64)
    for place in range(bands.shape[2]):
        keys = (keys ^ bands[:, :, place]) * np.uint64(0x9FB21C651E98DF25)
        keys ^= keys >> np.uint64(32)
    return keys.T


def find_duplicates(digests: NDArray[np.uint64]) -> dict[int, int]:
    """Return, for each row whose digest (shape (rows, 2)) came before, the row where it came first."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: of equal ones, the earliest row first
    ordered = digests[order]
    repeats = np.flatnonzero((ordered[1:] == ordered[:-1]).all(axis=1)) + 1
    found: dict[int, int] = {}
    for at in repeats.tolist():
        earlier, later = int(order[at - 1]), int(order[at])
        found[later] = found.get(earlier, earlier)
    return found


def find_near_duplicates(
    keys: Callable[[int], Hashes],
    sketches: Callable[[NDArray[np.int64]], NDArray[np.uint8]],
    threshold: float,
    dropped: dict[int, int],
) -> dict[int, int]:
    """Return, for each row that is as similar as `threshold` to an earlier one that stays, that earlier row.

    `keys(band)` gives that band's key of every row, `sketches(rows)` the sketches of some. Rows in `dropped` are left
    out. A row is compared with the first and the one before it of each of its bands."""
    pairs = np.empty(0, np.int64)
    rows = 0
    for band in range(BANDS):
        values = keys(band)
        rows = len(values)
        pairs = np.union1d(pairs, _pairs_of(values, rows))
    earlier, later = pairs // max(1, rows), pairs % max(1, rows)
    similar = np.zeros(len(pairs), bool)
    for start in range(0, len(pairs), PAIRS_AT_ONCE):
        part = slice(start, start + PAIRS_AT_ONCE)
        agree = sketches(earlier[part]) == sketches(later[part])
        # Two unequal hashes agree in their last 8 bits once in 256 times.
        similar[part] = agree[:, :BINS].mean(axis=1) >= threshold + (1 - threshold) / 256
        similar[part] &= agree[:, BINS:].mean(axis=1) >= LEAST_LAST_AGREEMENT
    found: dict[int, int] = {}
    earlier, later = earlier[similar], later[similar]
    order = np.lexsort((earlier, later))
    for first, second in zip(earlier[order].tolist(), later[order].tolist(), strict=True):
        if first not in found and second not in found and first not in dropped and second not in dropped:
            found[second] = first
    return found


def _pairs_of(keys: Hashes, rows: int) -> NDArray[np.int64]:
    """Return the candidate pairs of one band, each as earlier x rows + later."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    same = np.concatenate([[False], (ordered[1:] == ordered[:-1]) & (ordered[1:] != EMPTY)])
    later = np.flatnonzero(same)
    first = np.maximum.accumulate(np.where(same, 0, np.arange(rows)))[later]
    candidates = np.concatenate([order[first], order[later - 1]]) * rows
    return np.unique(candidates + np.concatenate([order[later], order[later]]))
