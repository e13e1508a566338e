"""Faster layers for adapter training on a CPU: the same numbers with fewer and larger operations.

Libraries write their layers for GPUs, where small operations cost little. Here LoRA's matrices of sibling layers are
one, attention runs conversation by conversation over a shared prefix, and what can be recomputed is not kept. Whatever
is not recognised, or gives other numbers when it is tried out, stays as it is.
"""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import linear, silu, softmax
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from tasks.core.hardware import memory_bytes

ATTENTION = "forgetless_packed"
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
TILE_ROWS = 128  # a tile sees no column beyond its last row, so half of a long conversation's scores are never made
ARRANGED_SHARE = 0.05  # of the machine's memory may the base's linear weights take for a second copy
KEPT_WIDTH = 512  # 9 heads of 512 columns in bfloat16 are 9 kB a token and layer, as much as all else that is kept
Tensor = torch.Tensor

# --- attention --------------------------------------------------------------------------------------------------------


class _PackedAttention(torch.autograd.Function):
    """Causal attention within each conversation, and from each to the shared prefix, a tile of rows at a time. Heads
    that share keys are done as one; probabilities are kept for the gradient where conversations are short."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, starts: list[int], scale: float) -> Tensor:
        _, heads, tokens, size = query.shape
        out = query.new_empty(1, tokens, heads, size)
        kept = []
        for talk in _conversations(starts):
            keys, values = _centred(talk.take(key), scale), talk.take(value)
            for rows, seen in talk.tiles():
                weights = _probabilities(_by_key(query, rows, key), keys[:, :seen], rows.stop - rows.start)
                out[0, rows] = torch.bmm(weights, values[:, :seen]).view(heads, -1, size).transpose(0, 1)
                kept += [weights] if talk.width <= KEPT_WIDTH else []
        ctx.save_for_backward(query, key, value, out, *kept)
        ctx.starts, ctx.scale = starts, scale
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, out, *kept = ctx.saved_tensors
        _, heads, tokens, size = query.shape
        waiting = iter(kept)
        d_out = gradients[0].transpose(1, 2)
        mean = (gradients[0] * out).sum(-1, dtype=torch.float32).transpose(1, 2).unsqueeze(-1)
        d_query = query.new_empty(1, tokens, heads, size)
        d_key, d_value = (torch.zeros(key.shape[1], tokens, size) for _ in range(2))
        for talk in _conversations(ctx.starts):
            keys, values = _centred(talk.take(key), ctx.scale), talk.take(value)
            d_keys, d_values = (torch.zeros(keys.shape) for _ in range(2))
            for rows, seen in talk.tiles():
                own, d_mixed = _by_key(query, rows, key), _by_key(d_out, rows, key)
                weights = (
                    next(waiting)
                    if kept and talk.width <= KEPT_WIDTH
                    else _probabilities(own, keys[:, :seen], rows.stop - rows.start)
                )
                d_values[:, :seen] += torch.bmm(weights.transpose(1, 2), d_mixed)
                d_weights = torch.bmm(d_mixed, values[:, :seen].transpose(1, 2)).float()
                d_scores = d_weights.sub_(_by_key(mean, rows, key)).mul_(weights).to(query.dtype)
                d_query[0, rows] = torch.bmm(d_scores, keys[:, :seen]).view(heads, -1, size).transpose(0, 1)
                d_keys[:, :seen] += torch.bmm(d_scores.transpose(1, 2), own)
            talk.add(d_key, d_keys.mul_(ctx.scale))
            talk.add(d_value, d_values)
        by_token = (d.transpose(0, 1).to(query.dtype)[None].transpose(1, 2) for d in (d_key, d_value))
        return d_query.transpose(1, 2), *by_token, None, None  # type: ignore[return-value]


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
        """Return what this conversation sees of `states` (1, heads, tokens, size), as (heads, width, size)."""
        own = states[0, :, self.first : self.last]
        return torch.cat([states[0, :, : self.prefix], own], 1) if self.prefix else own

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
    """Return some rows of `states` (1, heads, tokens, size) as (key heads, heads of each x rows, size)."""
    return states[0, :, rows].reshape(key.shape[1], -1, states.shape[-1])


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
    return softmax(scores, -1, dtype=torch.float32).to(query.dtype)


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
    return _PackedAttention.apply(query, key, value, starts, scale), None  # type: ignore[return-value]


AttentionInterface.register(ATTENTION, _attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, lambda *_, **__: None)

# --- LoRA -------------------------------------------------------------------------------------------------------------


class _Product:
    """x W' + bias, and dy W, of a frozen W: that of several linear layers end to end."""

    def __init__(self, layers: list[Any]) -> None:
        biases = [layer.bias for layer in layers]
        self.bias = torch.cat([bias.data for bias in biases]) if biases[0] is not None else None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight(), self.bias)

    def backward(self, dy: Tensor) -> Tensor:
        return torch.mm(dy, self.weight())

    def weight(self) -> Tensor:
        raise NotImplementedError


class _PlainProduct(_Product):
    def __init__(self, layers: list[Any]) -> None:
        super().__init__(layers)
        self.joined = torch.cat([layer.weight.data for layer in layers])
        for layer, part in zip(layers, self.joined.split([len(layer.weight) for layer in layers]), strict=True):
            layer.weight.data = part  # the same memory

    def weight(self) -> Tensor:
        return self.joined


class _Nf4Product(_Product):
    """W is made from 4 bits each time: a few percent of the time, an eighth of the memory."""

    def __init__(self, layers: list[Any]) -> None:
        super().__init__(layers)
        self.layers = layers

    def weight(self) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        parts = [dequantize_4bit(x.weight.data, x.weight.quant_state).to(x.compute_dtype) for x in self.layers]
        return torch.cat(parts) if len(parts) > 1 else parts[0]


class _ArrangedProduct(_Product):
    """W as oneDNN wants it, once for each direction: it would be rearranged at every call. Twice the memory."""

    def __init__(self, layers: list[Any]) -> None:
        super().__init__(layers)
        joined = torch.cat([layer.weight.data for layer in layers])
        arrange = torch.ops.mkldnn._reorder_linear_weight
        self.onward, self.back = arrange(joined, None), arrange(joined.t().contiguous(), None)
        for layer in layers:
            layer.weight.data = joined.new_empty(0)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.onward, self.bias, "none", [], "")

    def backward(self, dy: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(dy.contiguous(), self.back, None, "none", [], "")


class _LoraForward(torch.autograd.Function):
    """y = x W' + (x A') B', with A and B those of several layers that read the same x: A stacked, B block-diagonal."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: "_LoraGroup", *parameters: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        inner = torch.mm(rows, group.a.t())
        y = group.product.forward(rows)
        y.addmm_(inner, group.b.t())
        ctx.save_for_backward(rows, inner)
        ctx.group, ctx.shape = group, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, inner = ctx.saved_tensors
        group: _LoraGroup = ctx.group
        dy = gradients[0].reshape(len(rows), -1)
        d_inner = torch.mm(dy, group.b)
        d_b = torch.mm(inner.t(), dy)
        d_a = torch.mm(d_inner.t(), rows)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = group.product.backward(dy).addmm_(d_inner, group.a).view(ctx.shape)
        return dx, None, *group.split_gradients(d_a, d_b)


class _LoraGroup:
    """LoRA layers that read the same input, as one. `a` (ranks, inputs) and `b` (outputs, ranks; scaled) are copies in
    the compute type, which `refresh` brings up to date with the layers' float32 parameters."""

    def __init__(self, layers: list[Any], arranged: bool) -> None:
        bases = [layer.base_layer for layer in layers]
        is_nf4 = hasattr(bases[0].weight, "quant_state")
        dtype = bases[0].compute_dtype if is_nf4 else bases[0].weight.dtype
        self.layers = layers
        self.sizes = [base.out_features for base in bases]
        self.ranks = [layer.r["default"] for layer in layers]
        self.parameters = [m["default"].weight for layer in layers for m in (layer.lora_A, layer.lora_B)]
        self.a = torch.empty(sum(self.ranks), bases[0].in_features, dtype=dtype)
        self.b = torch.zeros(sum(self.sizes), sum(self.ranks), dtype=dtype)
        self.refresh()
        kind = _Nf4Product if is_nf4 else _ArrangedProduct if arranged else _PlainProduct
        self.product: _Product = kind(bases)
        self.waiting = threading.local()  # packs run side by side
        for number, layer in enumerate(layers):
            layer.forward = self._member(number)

    @torch.no_grad()
    def refresh(self) -> None:
        row = rank = 0
        for layer, size, width in zip(self.layers, self.sizes, self.ranks, strict=True):
            self.a[rank : rank + width].copy_(layer.lora_A["default"].weight)
            b = self.b[row : row + size, rank : rank + width]
            b.copy_(layer.lora_B["default"].weight * layer.scaling["default"])
            row, rank = row + size, rank + width

    def split_gradients(self, d_a: Tensor, d_b: Tensor) -> Iterator[Tensor]:
        """Yield the gradients of each layer's A and B; `d_b` has shape (ranks, outputs)."""
        row = rank = 0
        for layer, size, width in zip(self.layers, self.sizes, self.ranks, strict=True):
            yield d_a[rank : rank + width]
            yield d_b[rank : rank + width, row : row + size].t() * layer.scaling["default"]
            row, rank = row + size, rank + width

    def _member(self, number: int) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            """Return this layer's part of what the group makes of `x`. Siblings are asked one after another, the first
            for all."""
            if number == 0:
                self.waiting.parts = self(x).split(self.sizes, -1)
            part: Tensor = self.waiting.parts[number]
            if number == len(self.sizes) - 1:
                self.waiting.parts = None
            return part

        return forward

    def __call__(self, x: Tensor) -> Tensor:
        return _LoraForward.apply(x, self, *self.parameters)  # type: ignore[return-value]


def _is_plain_lora(module: Any) -> bool:
    """Return whether a module is PEFT's LoRA around a linear layer with one adapter and nothing special about it."""
    from peft.tuners.lora import Linear, Linear4bit

    return (
        type(module) in (Linear, Linear4bit)
        and list(module.lora_A) == ["default"]
        and not getattr(module, "fan_in_fan_out", False)
        and isinstance(module.lora_dropout["default"], torch.nn.Identity)
        and module.lora_variant.get("default") is None
        and module.lora_B["default"].bias is None
        and not module.merged
    )


def _find_groups(model: torch.nn.Module) -> Iterator[list[Any]]:
    for parent in model.modules():
        children = {name: child for name, child in parent.named_children() if _is_plain_lora(child)}
        for names in SIBLINGS:
            if all(name in children for name in names):
                yield [children.pop(name) for name in names]
        yield from ([child] for child in children.values())


# --- element by element -----------------------------------------------------------------------------------------------


class _SwiGlu(torch.autograd.Function):
    """silu(gate) x up of both end to end; silu is computed again for the gradient, not kept."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        gate, up = both.chunk(2, -1)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (both,) = ctx.saved_tensors
        gate, up = both.chunk(2, -1)
        d_both = torch.empty_like(both)
        d_gate, d_up = d_both.chunk(2, -1)
        torch.mul(gradients[0], silu(gate), out=d_up)
        torch.ops.aten.silu_backward.grad_input(gradients[0] * up, gate, grad_input=d_gate)
        return d_both


class _RmsNorm(torch.autograd.Function):
    """x over its root mean square, times a frozen weight; of what happens between only the root is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        d_normed = (gradients[0] * weight).float()
        normed = x * scale
        mean = torch.linalg.vecdot(d_normed, normed).unsqueeze(-1).div_(x.shape[-1])
        return d_normed.sub_(normed.mul_(mean)).mul_(scale).to(x.dtype), None, None


def _replace_elementwise(model: torch.nn.Module, groups: dict[int, _LoraGroup]) -> None:
    """Let norms and gated layers run as above where a trial gives the same numbers."""
    for module in model.modules():
        weight, epsilon = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
        if (
            weight is not None
            and epsilon is not None
            and type(module).__name__.endswith("RMSNorm")
            and not weight.requires_grad
        ):
            _try(module, lambda x, w=weight, e=epsilon: _RmsNorm.apply(x, w, e), weight)  # type: ignore[misc]
        group = groups.get(id(getattr(module, "gate_proj", None)))
        if group is not None and len(group.layers) == 2 and hasattr(module, "down_proj"):
            _try(module, lambda x, g=group, m=module: m.down_proj(_SwiGlu.apply(g(x))), group.a)  # type: ignore[misc]


@torch.no_grad()
def _try(module: torch.nn.Module, forward: Callable[[Tensor], Tensor], like: Tensor) -> None:
    probe = torch.randn(1, 4, like.shape[-1], generator=torch.Generator().manual_seed(0)).to(like.dtype)
    tolerance = 1e-5 if like.dtype == torch.float32 else 0.02
    if torch.allclose(module(probe), forward(probe), rtol=tolerance, atol=tolerance):
        module.forward = forward  # type: ignore[method-assign]


# --- all of it --------------------------------------------------------------------------------------------------------


class CpuLayers:
    """A model whose layers were replaced: `refresh` after each optimizer step."""

    def __init__(self, model: Any) -> None:
        found = list(_find_groups(model))
        weights = [layer.base_layer.weight for layers in found for layer in layers]
        arranged = _can_arrange() and sum(w.nbytes for w in weights) <= ARRANGED_SHARE * (memory_bytes() or 0)
        self.groups = [
            _LoraGroup(layers, arranged and layers[0].base_layer.weight.dtype == torch.bfloat16) for layers in found
        ]
        _replace_elementwise(model, {id(layer): group for group in self.groups for layer in group.layers})
        self.shares_prefix = _can_attend(model)
        if self.shares_prefix:
            model.set_attn_implementation(ATTENTION)

    def refresh(self) -> None:
        for group in self.groups:
            group.refresh()


def _can_arrange() -> bool:
    """Return whether oneDNN multiplies bfloat16 here, and torch has the operations that its compiler uses for it."""
    ops = torch.ops.mkldnn
    return (
        bool(ops._is_mkldnn_bf16_supported())
        and hasattr(ops, "_linear_pointwise")
        and hasattr(ops, "_reorder_linear_weight")
    )


def _can_attend(model: Any) -> bool:
    """Return whether the model's attention is the plain one that this module has: causal over all that came before."""
    config = model.config
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    special = [window, *(getattr(config, name, None) for name in ("attn_logit_softcapping", "attention_chunk_size"))]
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return not any(special) and kinds == {"full_attention"} and bool(model._supports_attention_backend)
