"""Leakage: training rows that hold evaluation items, found by shared stretches of letters.

An item leaks into a row that has half of its stretches (10 letters where it is Chinese, 32 elsewhere, about six words)
or has its question, or all of it, as a turn. Stretches that more than three items share ("which of the
following is correct") identify none of them and do not count.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tasks.data.grams import Hashes, WindowHashes, read_letters, read_letters_in_batches

WIDTHS = (10, 32)  # Chinese, other scripts
CHINESE_SHARE = 0.3
MOST_OWNERS = 3
LEAST_SHARE = 0.5
LEAST_LETTERS = 6  # "who are you" in a few languages is no leak
SLOTS_PER_GRAM = 8  # of the first look: a gram that is no item's passes it once in eight


@dataclass(frozen=True)
class ItemIndex:
    """What identifies evaluation items: for each width the sorted hashes of stretches with the item each is from, how
    many of its stretches make an item leak, and the sorted hashes of whole questions and items. `names`
    are the tasks of the items."""

    names: list[str]
    grams: tuple[Hashes, ...]
    owners: tuple[NDArray[np.int32], ...]
    needed: NDArray[np.int32]
    whole: Hashes
    whole_owners: NDArray[np.int32]
    seen: tuple[NDArray[np.bool_], ...]


def read_items(folder: Path) -> ItemIndex:
    """Return the index of the items in `folder`/items.jsonl, one [task, question, answer] a line."""
    with (folder / "items.jsonl").open(encoding="utf-8") as lines:
        return index_items([(task, question, answer) for task, question, answer in map(json.loads, lines)])


def index_items(items: list[tuple[str, str, str]]) -> ItemIndex:
    """Return the index of evaluation items, each given as its task's name, its question and the right answer."""
    texts = [f"{question}\n{answer}" for _, question, answer in items]
    letters = read_letters(texts)
    hashes = WindowHashes(letters)
    ideographs = np.concatenate([[0], np.cumsum((letters.codes >= 0x3400) & (letters.codes <= 0x9FFF))])
    share = (ideographs[letters.starts[1:]] - ideographs[letters.starts[:-1]]) / np.maximum(letters.lengths, 1)
    chinese = share > CHINESE_SHARE
    grams, owners, seen = [], [], []
    needed = np.zeros(len(texts), np.int64)
    for width, its_kind in zip(WIDTHS, (chinese, ~chinese), strict=True):
        windows, text = hashes.windows(width)
        mine = its_kind[text]
        pairs = np.unique(np.stack([windows[mine], text[mine].astype(np.uint64)]), axis=1)
        _, inverse, counts = np.unique(pairs[0], return_inverse=True, return_counts=True)
        telling = counts[inverse] <= MOST_OWNERS
        grams.append(pairs[0][telling])
        owners.append(pairs[1][telling].astype(np.int32))
        needed += np.bincount(owners[-1], minlength=len(texts))
        seen.append(_first_look(grams[-1]))
    whole, owner = zip(*map(_whole, ([q for _, q, _ in items], texts)), strict=True)
    order = np.argsort(np.concatenate(whole), kind="stable")
    return ItemIndex(
        [name for name, _, _ in items],
        tuple(grams),
        tuple(owners),
        np.ceil(needed * LEAST_SHARE).astype(np.int32),
        np.concatenate(whole)[order],
        np.concatenate(owner)[order],
        tuple(seen),
    )


def _whole(texts: list[str]) -> tuple[Hashes, NDArray[np.int32]]:
    """Return the hash of each text that is long enough to tell, and which text it is."""
    letters = read_letters(texts)
    telling = np.flatnonzero(letters.lengths >= LEAST_LETTERS)
    return WindowHashes(letters).between(letters.starts[telling], letters.starts[telling + 1]), telling.astype(np.int32)


def _first_look(grams: Hashes) -> NDArray[np.bool_]:
    """Return a table in which the place of every gram (its low bits) is set: most letters of most rows stop here."""
    table = np.zeros(1 << max(10, (SLOTS_PER_GRAM * len(grams)).bit_length()), bool)
    table[grams & np.uint64(len(table) - 1)] = True
    return table


def find_leaks(rows: list[list[str]], index: ItemIndex) -> NDArray[np.int32]:
    """Return for each row, given as its turns, the number of an item that leaked into it, or -1."""
    leaked = np.full(len(rows), -1, np.int32)
    turns = [turn for row in rows for turn in row]
    row_of = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    for part, letters in read_letters_in_batches(turns):
        hashes = WindowHashes(letters)
        whole = hashes.between(letters.starts[:-1], letters.starts[1:])
        if len(index.whole):
            at = np.minimum(np.searchsorted(index.whole, whole), len(index.whole) - 1)
            equal = np.flatnonzero((index.whole[at] == whole) & (letters.lengths >= LEAST_LETTERS))
            leaked[row_of[part][equal]] = index.whole_owners[at[equal]]
        for width, grams, owners, seen in zip(WIDTHS, index.grams, index.owners, index.seen, strict=True):
            windows, turn = hashes.windows(width)
            known = np.flatnonzero(seen[windows & np.uint64(len(seen) - 1)])
            _count_hits(windows[known], row_of[part][turn[known]], grams, owners, index.needed, leaked)
    return leaked


def _count_hits(
    windows: Hashes,
    rows: NDArray[np.int64],
    grams: Hashes,
    owners: NDArray[np.int32],
    needed: NDArray[np.int32],
    leaked: NDArray[np.int32],
) -> None:
    """Note in `leaked` the rows that hold enough different stretches of one item."""
    if not len(grams):
        return
    known = grams[np.minimum(np.searchsorted(grams, windows), len(grams) - 1)] == windows
    unique = np.unique(np.stack([windows[known], rows[known].astype(np.uint64)]), axis=1)
    low, high = (np.searchsorted(grams, unique[0], side) for side in ("left", "right"))
    counts = high - low  # a stretch has up to MOST_OWNERS items
    hit_rows = np.repeat(unique[1].astype(np.int64), counts)
    places = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(low, counts)
    pairs, hits = np.unique(hit_rows * len(needed) + owners[places], return_counts=True)
    items = pairs % max(1, len(needed))
    enough = hits >= needed[items]
    leaked[pairs[enough] // max(1, len(needed))] = items[enough]
