"""Greedy generation of many texts at once on a CPU: what their prompts share is computed once and seen by all.

Every step is one pass with a token of each text that is not done; what a text has of its own is its cache.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tasks.evaluation.tree import KeysAndValues
from tasks.models.cpu_attention import Stretch, attend
from tasks.models.encode import common_start
from tasks.models.products import Product

PREFILL_TOKENS = 768
Tensor = torch.Tensor


@torch.inference_mode()
def generate(
    decoder: Any,
    head: Product,
    prompts: Sequence[list[int]],
    most: int,
    is_done: Callable[[list[int]], bool],
    penalty: float = 1.0,
) -> list[list[int]]:
    """Return the tokens that greedy decoding puts after each prompt, at most `most`, up to and with the one that
    `is_done` stops at. `penalty` is Keskar et al.'s for tokens that are in the text already (1 is none)."""
    # sorted: all others lie between
    shared = min(common_start(prompts[0], prompts[-1]), *(len(p) - 1 for p in prompts))
    past = _read(decoder, prompts[0][:shared])
    plan = _Steps(past, [len(p) - shared for p in prompts], most)
    hidden = plan.fill(decoder, [p[shared:] for p in prompts], shared)
    found: list[list[int]] = [[] for _ in prompts]
    live = list(range(len(prompts)))
    seen = torch.zeros(len(prompts), head.outputs, dtype=torch.bool) if penalty != 1 else None
    for number, prompt in enumerate(prompts if seen is not None else ()):
        seen[number, prompt] = True  # type: ignore[index]
    for step in range(most):
        logits = head.forward(hidden).float()
        if seen is not None:
            logits = torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
        chosen = logits.argmax(-1)
        going_on = []
        for place, token in enumerate(chosen.tolist()):
            found[live[place]].append(token)
            if not is_done(found[live[place]]):
                going_on.append(place)
        if not going_on or step == most - 1:
            break
        if len(going_on) < len(live):
            kept = torch.tensor(going_on)
            plan.select(kept)
            chosen = chosen[kept]
            seen = seen[kept] if seen is not None else None
            live = [live[place] for place in going_on]
        if seen is not None:
            seen[torch.arange(len(chosen)), chosen] = True
        positions = plan.lengths + shared
        hidden = decoder(
            input_ids=chosen[None], position_ids=positions[None], use_cache=False, plan=plan
        ).last_hidden_state[0]
        plan.lengths += 1
    return found


def _read(decoder: Any, tokens: list[int]) -> KeysAndValues:
    """Return the keys and values of one text, read piece by piece."""
    past: KeysAndValues = {}
    for first in range(0, len(tokens), PREFILL_TOKENS):
        piece = tokens[first : first + PREFILL_TOKENS]

        def read(layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
            before = past.get(layer)
            past[layer] = (
                tuple(torch.cat(both, 1) for both in zip(before, (key, value), strict=True))  # type: ignore[assignment]
                if before
                else (key.clone(), value.clone())
            )
            return attend(query, key, value, [Stretch(0, key.shape[1])], scale, before)[0]

        positions = torch.arange(first, first + len(piece))
        decoder(input_ids=torch.tensor([piece]), position_ids=positions[None], use_cache=False, plan=read)
    return past


class _Steps:
    """Attention of one token of each text: over the `past` that all see, and the text's own tokens before it."""

    def __init__(self, past: KeysAndValues, own: list[int], most: int) -> None:
        self.past = past
        self.lengths = torch.tensor(own)
        self.room = max(own) + most
        self.own: dict[int, tuple[Tensor, Tensor]] = {}
        """By layer: keys and values, each (texts, key heads, room, size)."""

    def fill(self, decoder: Any, texts: list[list[int]], shared: int) -> Tensor:
        """Read the texts' own tokens, and return the hidden state of each one's last, shape (texts, size)."""
        hidden = []
        first = 0
        while first < len(texts):
            count, total = 0, 0
            while first + count < len(texts) and (not count or total + len(texts[first + count]) <= PREFILL_TOKENS):
                total += len(texts[first + count])
                count += 1
            hidden.append(self._fill(decoder, texts, first, first + count, shared))
            first += count
        return torch.cat(hidden)

    def _fill(self, decoder: Any, texts: list[list[int]], first: int, last: int, shared: int) -> Tensor:
        stretches, place = [], 0
        for text in texts[first:last]:
            stretches.append(Stretch(place, place + len(text)))
            place += len(text)

        def read(layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
            if layer not in self.own:
                shape = (len(texts), key.shape[0], self.room, key.shape[2])
                self.own[layer] = (key.new_zeros(shape), key.new_zeros(shape))
            for number, stretch in enumerate(stretches, first):
                for cache, states in zip(self.own[layer], (key, value), strict=True):
                    cache[number, :, : stretch.last - stretch.first] = states[:, stretch.first : stretch.last]
            return attend(query, key, value, stretches, scale, self.past.get(layer))[0]

        ids = torch.tensor([[token for text in texts[first:last] for token in text]])
        positions = torch.cat([torch.arange(shared, shared + len(text)) for text in texts[first:last]])
        found = decoder(input_ids=ids, position_ids=positions[None], use_cache=False, plan=read).last_hidden_state[0]
        return found[[stretch.last - 1 for stretch in stretches]]

    def select(self, kept: Tensor) -> None:
        self.lengths = self.lengths[kept]
        self.own = {layer: (keys[kept], values[kept]) for layer, (keys, values) in self.own.items()}

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        heads, count, size = query.shape
        keys, values = self.own[layer]
        texts = torch.arange(count)
        keys[texts, :, self.lengths], values[texts, :, self.lengths] = key.transpose(0, 1), value.transpose(0, 1)
        width = int(self.lengths.max()) + 1
        # (texts, key heads, heads of each, size)
        asked = query.transpose(0, 1).reshape(count, len(key), -1, size)
        scores = torch.matmul(asked, keys[:, :, :width].transpose(-1, -2)).float()
        scores.masked_fill_((torch.arange(width) > self.lengths[:, None])[:, None, None], float("-inf"))
        before = self.past.get(layer)
        more = 0
        if before is not None:
            more = before[0].shape[1]
            together = asked.transpose(0, 1).reshape(len(key), -1, size)
            shared = torch.bmm(together, before[0].transpose(1, 2)).float()
            shared = shared.view(len(key), count, -1, more).transpose(0, 1)
            scores = torch.cat([shared, scores], -1)
        weights = torch.softmax(scores.mul_(scale), -1).to(query.dtype)
        out = torch.matmul(weights[..., more:], values[:, :, :width])
        if before is not None:
            together = weights[..., :more].transpose(0, 1).reshape(len(key), -1, more)
            out += torch.bmm(together, before[1]).view(len(key), count, -1, size).transpose(0, 1)
        return out.reshape(count, heads, size)
