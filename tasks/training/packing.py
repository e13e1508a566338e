"""Packed sequences: conversations laid end to end without padding, kept apart by positions that restart at 0."""

import random
from dataclasses import dataclass

import torch

from tasks.models.template import Example


@dataclass(frozen=True)
class Pack:
    """`ids` and `positions` have shape (1, tokens). `kept` are the positions whose next token is supervised, `labels`
    those next tokens: the vocabulary projection and the loss are computed there and nowhere else."""

    ids: torch.Tensor
    positions: torch.Tensor
    kept: torch.Tensor
    labels: torch.Tensor
    examples: int

    @property
    def tokens(self) -> int:
        return self.ids.numel()

    @property
    def supervised(self) -> int:
        return self.labels.numel()


def make_pack(examples: list[Example]) -> Pack:
    ids = torch.tensor([i for e in examples for i in e.ids])
    positions = torch.tensor([p for e in examples for p in range(len(e.ids))])
    # The first token of an example is never a label: its predecessor in the pack belongs to another conversation.
    is_label = torch.tensor([s and p > 0 for e in examples for p, s in enumerate(e.supervised)])
    labelled = is_label.nonzero()[:, 0]
    return Pack(ids[None], positions[None], labelled - 1, ids[labelled], len(examples))


def pack_examples(examples: list[Example], pack_tokens: int) -> list[Pack]:
    """Return the examples in their order, as many to a pack as fit into `pack_tokens`."""
    packs: list[Pack] = []
    current: list[Example] = []
    for example in examples:
        if current and sum(len(e.ids) for e in current) + len(example.ids) > pack_tokens:
            packs.append(make_pack(current))
            current = []
        current.append(example)
    return [*packs, make_pack(current)] if current else packs


def plan_steps(
    examples: list[Example], pack_tokens: int, step_tokens: int, epochs: float, max_steps: int | None, seed: int
) -> list[list[Pack]]:
    """Return the packs of every optimizer step: each epoch in its own order drawn from `seed`, a step as many whole
    packs as make up `step_tokens`. A broken epoch ends after its share of the examples."""
    steps: list[list[Pack]] = []
    for epoch in range(-int(-epochs // 1)):
        order = list(examples)
        random.Random(f"{seed}:{epoch}").shuffle(order)
        share = min(1.0, epochs - epoch)
        packs = pack_examples(order[: max(1, round(share * len(order)))], pack_tokens)
        step: list[Pack] = []
        for pack in packs:
            step.append(pack)
            if sum(p.tokens for p in step) + pack_tokens / 2 > step_tokens:
                steps.append(step)
                step = []
        if step:
            steps.append(step)
    return steps[:max_steps]
