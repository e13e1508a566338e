"""Attention of packed conversations on a CPU: each over a shared prefix and itself, a tile of rows at a time.

The library's own CPU kernel takes three times as long for the gradient of a short conversation as five products do.
Heads that share keys are done as one; probabilities are kept for the gradient where conversations are short.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import softmax
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

NAME = "forgetless_packed"
TILE_ROWS = 128  # a tile sees no column beyond its last row, so half of a long conversation's scores are never made
KEPT_WIDTH = 512  # 9 heads of 512 columns in bfloat16 are 9 kB a token and layer, nearly as much as all else kept
Tensor = torch.Tensor


def attend(query: Tensor, key: Tensor, value: Tensor, starts: list[int], scale: float) -> tuple[Tensor, list[Tensor]]:
    """Return the attention of `query` (heads, tokens, size) over `key` and `value` (key heads, tokens, size), shape
    (tokens, heads, size), and the probabilities to keep for the gradient. `starts` are a pack's."""
    heads, tokens, size = query.shape
    out = query.new_empty(tokens, heads, size)
    kept = []
    for talk in _conversations(starts):
        keys, values = _centred(talk.take(key), scale), talk.take(value)
        for rows, seen in talk.tiles():
            weights = _probabilities(_by_key(query, rows, key), keys[:, :seen], rows.stop - rows.start)
            out[rows] = torch.bmm(weights, values[:, :seen]).view(heads, -1, size).transpose(0, 1)
            kept += [weights] if talk.width <= KEPT_WIDTH else []
    return out, kept


def attention_gradients(
    states: tuple[Tensor, Tensor, Tensor],
    kept: list[Tensor],
    d_out: Tensor,
    starts: list[int],
    scale: float,
    out: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Write into `out` the gradients of `attend`'s query, key and value (`states`) by that of its result, `d_out`
    (tokens, heads, size)."""
    query, key, value = states
    heads, tokens, size = query.shape
    d_query, d_key, d_value = out
    waiting = iter(kept)
    d_out = d_out.transpose(0, 1)
    key_sum, value_sum = (torch.zeros(len(key), tokens, size) for _ in range(2))
    for talk in _conversations(starts):
        keys, values = _centred(talk.take(key), scale), talk.take(value)
        d_keys, d_values = (torch.zeros(keys.shape) for _ in range(2))
        for rows, seen in talk.tiles():
            own, d_mixed = _by_key(query, rows, key), _by_key(d_out, rows, key)
            if talk.width <= KEPT_WIDTH:
                weights = next(waiting)
            else:
                weights = _probabilities(own, keys[:, :seen], rows.stop - rows.start)
            d_values[:, :seen] += torch.bmm(weights.transpose(1, 2), d_mixed)
            d_weights = torch.bmm(d_mixed, values[:, :seen].transpose(1, 2))
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            d_query[:, rows] = torch.bmm(d_scores, keys[:, :seen]).view(heads, -1, size)
            d_keys[:, :seen] += torch.bmm(d_scores.transpose(1, 2), own)
        talk.add(key_sum, d_keys.mul_(scale))
        talk.add(value_sum, d_values)
    d_key.copy_(key_sum)
    d_value.copy_(value_sum)


@dataclass(frozen=True)
class _Conversation:
    """Rows `first` to `last` of a pack; they see the rows before `prefix` too."""

    prefix: int
    first: int
    last: int

    @property
    def width(self) -> int:
        return self.prefix + self.last - self.first

    def take(self, states: Tensor) -> Tensor:
        """Return what this conversation sees of `states` (heads, tokens, size), as (heads, width, size)."""
        own = states[:, self.first : self.last]
        return torch.cat([states[:, : self.prefix], own], 1) if self.prefix else own

    def add(self, whole: Tensor, part: Tensor) -> None:
        """Add `part` (heads, width, size) to where `take` took it from: the prefix is seen by all, so parts add up."""
        whole[:, : self.prefix] += part[:, : self.prefix]
        whole[:, self.first : self.last] += part[:, self.prefix :]

    def tiles(self) -> Iterator[tuple[slice, int]]:
        """Yield some rows at a time, and how many columns they see at most."""
        for first in range(self.first, self.last, TILE_ROWS):
            last = min(first + TILE_ROWS, self.last)
            yield slice(first, last), self.prefix + last - self.first


def _conversations(starts: list[int]) -> list[_Conversation]:
    prefix = [_Conversation(0, 0, starts[0])] if starts[0] else []
    return prefix + [_Conversation(starts[0], *edges) for edges in pairwise(starts)]


def _by_key(states: Tensor, rows: slice, key: Tensor) -> Tensor:
    """Return some rows of `states` (heads, tokens, size) as (key heads, heads of each x rows, size)."""
    return states[:, rows].reshape(len(key), -1, states.shape[-1])


def _centred(keys: Tensor, scale: float) -> Tensor:
    """Return the keys less their mean, scaled. Softmax does not see it, but scores are the more exact."""
    wide = keys.float()
    return (wide - wide.mean(1, keepdim=True)).mul_(scale).to(keys.dtype)


def _probabilities(query: Tensor, keys: Tensor, rows: int) -> Tensor:
    """Return attention probabilities, shape (key heads, heads of each x rows, columns). The last columns are the rows
    themselves, which do not see the later ones among them."""
    scores = torch.bmm(query, keys.transpose(1, 2))
    by_head = scores.view(-1, rows, scores.shape[-1])
    by_head[..., -rows:] += torch.full((rows, rows), float("-inf"), dtype=scores.dtype).triu_(1)
    return softmax(scores, -1)


# --- for layers of the library's own ----------------------------------------------------------------------------------


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, starts: list[int], scale: float) -> Tensor:
        out, kept = attend(query[0], key[0], value[0], starts, scale)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.starts, ctx.scale = starts, scale
        return out[None]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, *kept = ctx.saved_tensors
        d_query, d_key, d_value = (torch.empty_like(x) for x in (query, key, value))
        states, out = (query[0], key[0], value[0]), (d_query[0], d_key[0], d_value[0])
        attention_gradients(states, kept, gradients[0][0], ctx.starts, ctx.scale, out)
        return d_query, d_key, d_value, None, None


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    starts: list[int] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    assert starts is not None, "packs say where their conversations begin"
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    return _Attention.apply(query, key, value, starts, scale), None  # type: ignore[return-value]


AttentionInterface.register(NAME, _attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, lambda *_, **__: None)


def can_attend(model: Any) -> bool:
    """Return whether the model's attention is the plain one that this module has: causal over all that came before."""
    config = model.config
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    special = [
        window,
        *(
            getattr(config, name, None)
            for name in ("attn_logit_softcapping", "attention_chunk_size", "attention_dropout")
        ),
    ]
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return not any(special) and kinds == {"full_attention"} and bool(model._supports_attention_backend)
