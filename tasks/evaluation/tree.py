"""Texts as a tree of tokens: what neighbours in a sorted list share is one run of tokens, computed once.

A row is a tree that goes through the model at once. It can go on from the row before: from the first tokens of that
row's last text, whose keys and values were kept.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from tasks.models.cpu_attention import Stretch, attend
from tasks.models.encode import common_start

LEAST_KEPT = 16  # tokens: fewer cost less to compute again than their keys and values to keep
Tensor = torch.Tensor
KeysAndValues = dict[int, tuple[Tensor, Tensor]]
"""By layer: each (key heads, tokens, size)."""


@dataclass(frozen=True)
class Text:
    """Tokens of which those from `read` on are read: what comes after each of them is scored."""

    index: int
    tokens: list[int]
    read: int


class TokenTree:
    """A row: texts in sorted order, all beginning with `base`, which is not computed in it."""

    def __init__(self, base: Sequence[int] = ()) -> None:
        self.base = len(base)
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.stretches: list[Stretch] = []
        self.paths: list[tuple[Text, list[int]]] = []
        """Each text, and where its tokens after the base are in the row."""
        self.keep = 0
        """How many first tokens of the last text the next row goes on from."""
        self._last: Sequence[int] = base
        self._path: list[int] = []

    def count_new(self, tokens: Sequence[int]) -> int:
        """Return how many tokens `add` would add."""
        return len(tokens) - common_start(tokens, self._last)

    def takes(self, text: Text, budget: int) -> bool:
        """Return whether a text belongs into this row of at most about `budget` tokens."""
        if common_start(text.tokens, self._last) < self.base or text.read < self.base:
            return False
        # A single text may be longer than a row; what shares its beginning still joins it.
        return len(self.tokens) + self.count_new(text.tokens) <= max(budget, 2 * (len(text.tokens) - self.base))

    def add(self, text: Text) -> None:
        path = self._path[: common_start(text.tokens, self._last) - self.base]
        first, new = len(self.tokens), text.tokens[self.base + len(path) :]
        if new:
            self.stretches.append(Stretch(first, first + len(new), _spans(path)))
            self.positions += range(self.base + len(path), len(text.tokens))
            self.tokens += new
        self._path = path + list(range(first, len(self.tokens)))
        self._last = text.tokens
        self.paths.append((text, self._path))

    def mask(self) -> Tensor:
        """Return the attention mask of shape (1, 1, tokens, tokens): a token sees itself and what it goes on from."""
        mask = torch.zeros((len(self.tokens), len(self.tokens)), dtype=torch.bool)
        for stretch in self.stretches:
            rows = slice(stretch.first, stretch.last)
            mask[rows, rows] = torch.ones(stretch.last - stretch.first, stretch.last - stretch.first).tril().bool()
            for start, end in stretch.spans:
                mask[rows, start:end] = True
        return mask[None, None]

    @property
    def kept_path(self) -> list[int]:
        return self._path[: max(0, self.keep - self.base)]


def _spans(path: list[int]) -> tuple[tuple[int, int], ...]:
    """Return places in a row as stretches without a gap."""
    edges = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(path)) if b != a + 1), len(path)]
    return tuple((path[a], path[b - 1] + 1) for a, b in pairwise(edges) if b > a)


def make_rows(texts: Sequence[Text], budget: int, goes_on: bool) -> Iterator[TokenTree]:
    """Yield sorted texts in rows of at most about `budget` tokens; each `goes_on` from the one before where it can."""
    row = TokenTree()
    for text in texts:
        if row.paths and not row.takes(text, budget):
            shared = min(common_start(text.tokens, row.paths[-1][0].tokens), text.read) if goes_on else 0
            row.keep = shared if shared >= LEAST_KEPT else 0
            yield row
            row = TokenTree(text.tokens[: row.keep])
        row.add(text)
    if row.paths:
        yield row


def split_evenly(texts: Sequence[Text], parts: int) -> list[Sequence[Text]]:
    """Return sorted texts in `parts` stretches of about as many new tokens each."""
    costs = [len(texts[0].tokens) if texts else 0]
    costs += [len(b.tokens) - common_start(a.tokens, b.tokens) + 1 for a, b in pairwise(texts)]
    total, done, edges = sum(costs), 0, [0]
    for i, cost in enumerate(costs):
        if len(edges) < parts and done >= total * len(edges) / parts:
            edges.append(i)
        done += cost
    return [part for a, b in pairwise([*edges, len(texts)]) if (part := texts[a:b])]


def find_needed(rows: Iterable[tuple[int, bool]]) -> list[bool]:
    """Return which rows of a chain are computed. A row is given as how many first tokens it goes on from, and whether
    its results are known; one that is known is needed where it computed what an unknown one goes on from."""
    found, kept = [], 0
    for base, is_known in reversed(list(rows)):
        found.append(not is_known or kept > base)
        kept = base if found[-1] else kept
    return found[::-1]


class TreePlan:
    """Attention of a row, over the `past` that it goes on from; keeps what the next row goes on from."""

    def __init__(self, row: TokenTree, past: KeysAndValues) -> None:
        self.row, self.past = row, past
        self.kept: KeysAndValues = {}
        self.path = torch.tensor(row.kept_path, dtype=torch.long)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        base, keep = self.row.base, self.row.keep
        past = tuple(x[:, :base] for x in self.past[layer]) if base else None
        if keep:
            own = (x.index_select(1, self.path) for x in (key, value))
            before = (x[:, :keep] for x in past) if past else (key[:, :0], value[:, :0])
            self.kept[layer] = tuple(torch.cat(both, 1) for both in zip(before, own, strict=True))  # type: ignore[assignment]
        return attend(query, key, value, self.row.stretches, scale, past)[0]  # type: ignore[arg-type]
