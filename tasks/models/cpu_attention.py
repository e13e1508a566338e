"""Attention on a CPU, over what each stretch of tokens may see: a tile of rows at a time, heads that share keys as one.

A pass holds several stretches end to end: packed conversations over a shared prefix, or the branches of a tree of
texts. The library's own CPU kernel takes three times as long for the gradient of a short stretch as five products do.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import softmax
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

NAME = "forgetless"
TILE_ROWS = 128  # a tile sees no column beyond its last row, so half of a long stretch's scores are never made
KEPT_WIDTH = 512  # 9 heads of 512 columns in bfloat16 are 9 kB a token and layer, nearly as much as all else kept
Tensor = torch.Tensor
Plan = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]
"""Attention of a layer (its number) for query (heads, tokens, size), key, value (key heads, tokens, size) and a scale:
(tokens, heads, size)."""


@dataclass(frozen=True)
class Stretch:
    """Tokens `first` to `last` of a pass, which see each other up to themselves, and before that some `spans`."""

    first: int
    last: int
    spans: tuple[tuple[int, int], ...] = ()

    @property
    def before(self) -> int:
        return sum(end - start for start, end in self.spans)

    @property
    def width(self) -> int:
        return self.before + self.last - self.first

    def take(self, states: Tensor) -> Tensor:
        """Return what this stretch sees of `states` (heads, tokens, size), as (heads, width, size)."""
        own = states[:, self.first : self.last]
        return torch.cat([*(states[:, start:end] for start, end in self.spans), own], 1) if self.spans else own

    def add(self, whole: Tensor, part: Tensor) -> None:
        """Add `part` (heads, width, size) to where `take` took it from: what several see adds up."""
        place = 0
        for start, end in (*self.spans, (self.first, self.last)):
            whole[:, start:end] += part[:, place : place + end - start]
            place += end - start

    def tiles(self) -> Iterator[tuple[slice, int]]:
        """Yield some rows at a time, and how many columns they see at most."""
        for first in range(self.first, self.last, TILE_ROWS):
            last = min(first + TILE_ROWS, self.last)
            yield slice(first, last), self.before + last - self.first


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    stretches: Sequence[Stretch],
    scale: float,
    past: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Return the attention of `query` (heads, tokens, size) over `key` and `value` (key heads, tokens, size), shape
    (tokens, heads, size), and the probabilities to keep for the gradient. All see the keys and values of `past`."""
    heads, tokens, size = query.shape
    out = query.new_empty(tokens, heads, size)
    kept = []
    for stretch in stretches:
        keys, values = stretch.take(key), stretch.take(value)
        if past is not None:
            keys, values = (torch.cat(both, 1) for both in zip(past, (keys, values), strict=True))
        keys = _centred(keys, scale)
        more = keys.shape[1] - stretch.width
        for rows, seen in stretch.tiles():
            weights = _probabilities(_by_key(query, rows, key), keys[:, : more + seen], rows.stop - rows.start)
            out[rows] = torch.bmm(weights, values[:, : more + seen]).view(heads, -1, size).transpose(0, 1)
            kept += [weights] if stretch.width <= KEPT_WIDTH else []
    return out, kept


def attention_gradients(
    states: tuple[Tensor, Tensor, Tensor],
    kept: list[Tensor],
    d_out: Tensor,
    stretches: Sequence[Stretch],
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
    for stretch in stretches:
        keys, values = _centred(stretch.take(key), scale), stretch.take(value)
        d_keys, d_values = (torch.zeros(keys.shape) for _ in range(2))
        for rows, seen in stretch.tiles():
            own, d_mixed = _by_key(query, rows, key), _by_key(d_out, rows, key)
            if stretch.width <= KEPT_WIDTH:
                weights = next(waiting)
            else:
                weights = _probabilities(own, keys[:, :seen], rows.stop - rows.start)
            d_values[:, :seen] += torch.bmm(weights.transpose(1, 2), d_mixed)
            d_weights = torch.bmm(d_mixed, values[:, :seen].transpose(1, 2))
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            d_query[:, rows] = torch.bmm(d_scores, keys[:, :seen]).view(heads, -1, size)
            d_keys[:, :seen] += torch.bmm(d_scores.transpose(1, 2), own)
        stretch.add(key_sum, d_keys.mul_(scale))
        stretch.add(value_sum, d_values)
    d_key.copy_(key_sum)
    d_value.copy_(value_sum)


def _by_key(states: Tensor, rows: slice, key: Tensor) -> Tensor:
    """Return some rows of `states` (heads, tokens, size) as (key heads, heads of each x rows, size)."""
    return states[:, rows].reshape(len(key), -1, states.shape[-1])


def _centred(keys: Tensor, scale: float) -> Tensor:
    """Return the keys less their mean, scaled. Softmax does not see it, but scores are the more exact."""
    wide = keys.float()
    return (wide - wide.mean(1, keepdim=True)).mul_(scale).to(keys.dtype)


@functools.lru_cache(maxsize=TILE_ROWS)
def _later(rows: int, dtype: torch.dtype) -> Tensor:
    """Return what hides the later ones of some rows from the earlier."""
    return torch.full((rows, rows), float("-inf"), dtype=dtype).triu_(1)


def _probabilities(query: Tensor, keys: Tensor, rows: int) -> Tensor:
    """Return attention probabilities, shape (key heads, heads of each x rows, columns). The last columns are the rows
    themselves, which do not see the later ones among them."""
    scores = torch.bmm(query, keys.transpose(1, 2))
    by_head = scores.view(-1, rows, scores.shape[-1])
    by_head[..., -rows:] += _later(rows, scores.dtype)
    return softmax(scores, -1)


# --- for layers of the library's own ----------------------------------------------------------------------------------


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, pack: "PackPlan", scale: float) -> Tensor:
        out, kept = attend(query, key, value, pack.stretches, scale)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.pack, ctx.scale = pack, scale
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, *kept = ctx.saved_tensors
        found = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        attention_gradients((query, key, value), kept, gradients[0], ctx.pack.stretches, ctx.scale, found)
        return *found, None, None


class PackPlan:
    """A pack's conversations: what they share comes first, then each from one of `starts` to the next."""

    def __init__(self, starts: list[int]) -> None:
        shared = (0, starts[0])
        self.stretches = [Stretch(*shared)] if starts[0] else []
        self.stretches += [Stretch(*edges, (shared,) if starts[0] else ()) for edges in pairwise(starts)]

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        return _Attention.apply(query, key, value, self, scale)  # type: ignore[return-value]


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    plan: Plan | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    assert plan is not None, "every pass says what its tokens see"
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    return plan(int(module.layer_idx), query[0], key[0], value[0], scale)[None], None  # type: ignore[arg-type]


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
