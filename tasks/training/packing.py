"""Packed sequences: conversations end to end without padding, what they begin with in common laid down once.

A pack is one forward pass. Its conversations do not see each other; each sees the shared prefix (most data sets begin
every row with one system prompt) and itself. Which conversations make up an optimizer step does not depend on how many
fit into a pack, so that less memory never means another batch.
"""

import random
from dataclasses import dataclass

import torch

from tasks.models.template import Example

LEAST_PREFIX = 8  # tokens: below, the bookkeeping costs more than it saves


@dataclass(frozen=True)
class Pack:
    """`ids` and `positions` have shape (1, tokens): first the shared prefix, then what each conversation has of its
    own, beginning at the `starts` (the last of which is the end). `kept` are the places whose next token is supervised,
    `labels` those tokens: the vocabulary projection and the loss are computed there alone. A place can be kept for more
    than one label: the prefix's last is, where conversations go on with an answer at once."""

    ids: torch.Tensor
    positions: torch.Tensor
    starts: list[int]
    kept: torch.Tensor
    labels: torch.Tensor
    examples: int
    tokens: int
    """Of all its conversations: the shared prefix counts for each."""

    @property
    def prefix(self) -> int:
        return self.starts[0]

    @property
    def supervised(self) -> int:
        return self.labels.numel()


def make_pack(examples: list[Example], share_prefix: bool = False) -> Pack:
    """Return examples as one pack; without `share_prefix` positions alone keep them apart, as any attention can."""
    prefix = common_prefix(examples) if share_prefix else 0
    ids, positions, starts = examples[0].ids[:prefix], list(range(prefix)), [prefix]
    kept: list[int] = []
    labels: list[int] = []
    for example in examples:
        shift = len(ids) - prefix
        ids = ids + example.ids[prefix:]
        positions += range(prefix, len(example.ids))
        # The first token of an example is never a label: nothing comes before it.
        places = [p for p, learned in enumerate(example.supervised) if learned and p > 0]
        kept += [p - 1 if p <= prefix else p - 1 + shift for p in places]
        labels += [example.ids[p] for p in places]
        starts.append(len(ids))
    return Pack(
        torch.tensor(ids)[None],
        torch.tensor(positions)[None],
        starts,
        torch.tensor(kept, dtype=torch.long),
        torch.tensor(labels, dtype=torch.long),
        len(examples),
        sum(len(e.ids) for e in examples),
    )


def count_labels(example: Example) -> int:
    """Return how many of an example's tokens are learned: never the first, before which nothing comes."""
    return sum(example.supervised[1:])


def common_prefix(examples: list[Example]) -> int:
    """Return how many first tokens all examples share, none of them supervised; 0 where it is not worth it."""
    if len(examples) < 2:
        return 0
    first, last = min(e.ids for e in examples), max(e.ids for e in examples)  # in order: all others lie between them
    most = min(min(len(e.ids) - 1, e.supervised.index(True) if True in e.supervised else 0) for e in examples)
    length = next((i for i in range(most) if first[i] != last[i]), most)
    return length if length >= LEAST_PREFIX else 0


def pack_examples(examples: list[Example], pack_tokens: int, share_prefix: bool = False, lanes: int = 1) -> list[Pack]:
    """Return the examples in packs of at most `pack_tokens` tokens each (one that is longer has a pack of its own), of
    even size and as many as `lanes` divide, so that no lane waits."""
    if not examples:
        return []
    shared = common_prefix(examples) if share_prefix else 0
    total = shared + sum(len(e.ids) - shared for e in examples)
    fewest = max(1, -(-total // pack_tokens))
    wanted = min(len(examples), -(-fewest // lanes) * lanes)
    while True:
        bins: list[list[int]] = [[] for _ in range(wanted)]
        sizes = [shared] * wanted
        for number in sorted(range(len(examples)), key=lambda n: -len(examples[n].ids)):  # the longest first: evenest
            emptiest = sizes.index(min(sizes))
            bins[emptiest].append(number)
            sizes[emptiest] += len(examples[number].ids) - shared
        if wanted == len(examples) or all(
            size <= pack_tokens or len(numbers) == 1 for size, numbers in zip(sizes, bins, strict=True)
        ):
            return [make_pack([examples[n] for n in sorted(numbers)], share_prefix) for numbers in bins if numbers]
        wanted = min(len(examples), wanted + lanes)


def plan_steps(
    examples: list[Example], step_tokens: int, epochs: float, max_steps: int | None, seed: int
) -> list[list[Example]]:
    """Return the examples of every optimizer step: each epoch in an order drawn from `seed`, a step as many as make up
    about `step_tokens`. A broken epoch ends after its share of the examples."""
    steps: list[list[Example]] = []
    for epoch in range(-int(-epochs // 1)):
        order = list(examples)
        random.Random(f"{seed}:{epoch}").shuffle(order)
        share = min(1.0, epochs - epoch)
        order = order[: max(1, round(share * len(order)))]
        total = sum(len(e.ids) for e in order)
        count = max(1, round(total / step_tokens))  # of equal size, so that no small step is left over at the end
        parts: dict[int, list[Example]] = {}
        done = 0
        for example in order:
            parts.setdefault((2 * done + len(example.ids)) * count // (2 * total), []).append(example)
            done += len(example.ids)
        steps += parts.values()
    return steps[:max_steps]
