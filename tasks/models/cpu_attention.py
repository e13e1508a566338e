"""Attention on a CPU, over what each stretch of tokens may see: a tile of rows at a time, heads that share keys as one.

A pass holds several stretches end to end: packed conversations over a shared prefix, or the branches of a tree of
texts. The library's own CPU kernel takes three times as long for the gradient of a short stretch as five products do.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import pad, softmax
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

NAME = "forgetless"
TILE_ROWS = 128  # a tile sees no column beyond its last row, so half of a long stretch's scores are never made
STEP = 32  # columns: what a vector holds. Softmax takes twice as long where some are left over
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

    def take(self, states: Tensor, columns: int, past: Tensor | None = None) -> Tensor:
        """Return what this stretch sees of `past` and `states` (heads, tokens, size), as (heads, columns, size): filled
        up with what follows, which none of its rows sees."""
        parts = [] if past is None else [past]
        parts += [states[:, start:end] for start, end in self.spans]
        own = states[:, self.first : self.first + columns - sum(part.shape[1] for part in parts)]
        return torch.cat([*parts, own], 1) if parts else own

    def add(self, whole: Tensor, part: Tensor) -> None:
        """Add `part` (..., width, size) to where `take` took it from: what several see adds up."""
        place = 0
        for start, end in (*self.spans, (self.first, self.last)):
            whole[:, start:end] += part[:, place : place + end - start]
            place += end - start

    def tiles(self, past: int = 0) -> list[tuple[int, int, int, int]]:
        """Return some rows at a time, as the first, how many, how many to make of them, and how many columns they see
        at most. Both are filled up where they are many, so that stretches of like lengths are products of the same
        shapes, for which there is code already."""
        step = STEP if self.last - self.first >= 2 * STEP else 1
        shift = past + self.before - self.first  # from a row to its own column
        first, found = self.first, []
        while first < self.last:
            end = ((first + shift) // TILE_ROWS + 1) * TILE_ROWS
            last = min(end - shift, self.last)
            seen = min(end, -(-(last + shift) // step) * step)
            found.append((first, last - first, seen - shift - first, seen))
            first = last
        return found


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    stretches: Sequence[Stretch],
    scale: float,
    past: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Return the attention of `query` (heads, tokens, size) over `key` and `value` (key heads, tokens, size), shape
    (tokens, heads, size), and the probabilities to keep for the gradient. All see the keys and values of `past`. The
    stretches follow each other without a gap."""
    heads, tokens, size = query.shape
    mean = key.mean(1, keepdim=True, dtype=torch.float32)
    rows, keys, values = _rows(query, len(key)), _centred(_filled(key), mean, scale), _filled(value)
    old_keys, old_values = (None, None) if past is None else (_centred(past[0], mean, scale), past[1])
    before = 0 if past is None else past[0].shape[1]
    out = torch.empty_like(rows)
    kept = []
    for stretch in stretches:
        tiles = stretch.tiles(before)
        columns = tiles[-1][-1]
        own_keys, own_values = stretch.take(keys, columns, old_keys), stretch.take(values, columns, old_values)
        for first, count, made, seen in tiles:
            weights = _probabilities(_tile(rows, first, made), own_keys[:, :seen], made)
            if count < made:
                weights[:, count * out.shape[2] :] = 0  # nothing comes of the rows that fill up, nor goes back to them
            mixed = torch.bmm(weights, own_values[:, :seen])
            out[:, first : first + made] = mixed.view(len(key), made, -1, size)
            kept += [weights] if stretch.width <= KEPT_WIDTH else []
    return out[:, :tokens].transpose(0, 1).reshape(tokens, heads, size), kept


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
    tokens, size = query.shape[1:]
    d_query, d_key, d_value = out
    waiting = iter(kept)
    rows, d_mixed = _rows(query, len(key)), _rows(d_out.transpose(0, 1), len(key))
    keys = _centred(_filled(key), key.mean(1, keepdim=True, dtype=torch.float32), scale)
    values = _filled(value)
    d_rows = torch.empty_like(rows)
    key_sum, value_sum = (torch.zeros(len(key), tokens, size) for _ in range(2))
    for stretch in stretches:
        tiles = stretch.tiles()
        own_keys, own_values = (stretch.take(x, tiles[-1][-1]) for x in (keys, values))
        d_keys, d_values = (torch.zeros(own_keys.shape) for _ in range(2))
        for first, count, made, seen in tiles:
            own, d_own = _tile(rows, first, made), _tile(d_mixed, first, made)
            if stretch.width <= KEPT_WIDTH:
                weights = next(waiting)
            else:
                weights = _probabilities(own, own_keys[:, :seen], made)
                weights[:, count * rows.shape[2] :] = 0
            d_values[:, :seen] += torch.bmm(weights.transpose(1, 2), d_own)
            d_weights = torch.bmm(d_own, own_values[:, :seen].transpose(1, 2))
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            d_rows[:, first : first + made] = torch.bmm(d_scores, own_keys[:, :seen]).view(len(key), made, -1, size)
            d_keys[:, :seen] += torch.bmm(d_scores.transpose(1, 2), own)
        stretch.add(key_sum, d_keys)
        stretch.add(value_sum, d_values)
    d_query.unflatten(0, (len(key), -1)).copy_(d_rows[:, :tokens].transpose(1, 2))
    d_key.copy_(key_sum.mul_(scale))
    d_value.copy_(value_sum)


def _filled(states: Tensor) -> Tensor:
    """Return `states` (heads, tokens, size) with a step of zeros behind them."""
    return pad(states, (0, 0, 0, STEP))


def _rows(states: Tensor, key_heads: int) -> Tensor:
    """Return `states` (heads, tokens, size) as (key heads, tokens, heads of each, size), a step of zeros behind."""
    heads, tokens, size = states.shape
    rows = states.new_empty(key_heads, tokens + STEP, heads // key_heads, size)
    rows[:, :tokens] = states.unflatten(0, (key_heads, -1)).transpose(1, 2)
    rows[:, tokens:] = 0
    return rows


def _tile(rows: Tensor, first: int, count: int) -> Tensor:
    """Return some of `_rows` as (key heads, each of them for each head, size)."""
    return rows[:, first : first + count].flatten(1, 2)


def _centred(keys: Tensor, mean: Tensor, scale: float) -> Tensor:
    """Return keys less their mean, scaled. Softmax does not see it, but scores are the more exact."""
    return (keys.float() - mean).mul_(scale).to(keys.dtype)


@functools.lru_cache(maxsize=TILE_ROWS)
def _later(rows: int, heads: int, dtype: torch.dtype) -> Tensor:
    """Return what hides the later ones of some rows from the earlier, (rows of each head, rows)."""
    return torch.full((rows, rows), float("-inf"), dtype=dtype).triu_(1).repeat_interleave(heads, 0)


def _probabilities(query: Tensor, keys: Tensor, rows: int) -> Tensor:
    """Return attention probabilities, shape (key heads, rows of each head, columns). The last columns are the rows
    themselves, which do not see the later ones among them."""
    scores = torch.bmm(query, keys.transpose(1, 2))
    scores[..., -rows:] += _later(rows, query.shape[1] // rows, scores.dtype)
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
