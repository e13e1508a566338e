"""Decoder layers for training an adapter and for scoring on a CPU: the same numbers with fewer and larger operations.

Libraries write their layers for GPUs, where small operations cost little and each keeps what its gradient needs. Here a
whole layer is one operation: it keeps a third less, LoRA's matrices of sibling projections are one, and weights stay
arranged for the products. Layers that are not recognised, or give other numbers when tried out, stay as they are.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import silu
from transformers.activations import SiLUActivation

from tasks.core.hardware import memory_bytes
from tasks.models import cpu_attention
from tasks.models.cpu_attention import PackPlan, Plan, attend, attention_gradients
from tasks.models.products import ArrangedProduct, Nf4Product, Product, can_arrange

ARRANGED_SHARE = 0.05  # of the machine's memory may the base's linear weights take for a second copy
PROBE_TOKENS = 4
Tensor = torch.Tensor

# --- projections ------------------------------------------------------------------------------------------------------


class _Projection:
    """Linear layers that read the same input, as one, each with LoRA or without: y = x W' + (x A') B', A stacked and B
    block-diagonal. `a` (ranks, inputs) and `b` (outputs, ranks; scaled) are copies in the compute type, which `refresh`
    brings up to date with the layers' float32 parameters."""

    def __init__(self, layers: list[Any]) -> None:
        bases = [getattr(layer, "base_layer", layer) for layer in layers]
        self.sizes = [base.out_features for base in bases]
        self.loras = [layer if layer is not base else None for layer, base in zip(layers, bases, strict=True)]
        self.ranks = [layer.r["default"] if layer else 0 for layer in self.loras]
        self.parameters = [m["default"].weight for x in self.loras if x for m in (x.lora_A, x.lora_B)]
        is_nf4 = hasattr(bases[0].weight, "quant_state")
        dtype = bases[0].compute_dtype if is_nf4 else bases[0].weight.dtype
        self.a = torch.empty(sum(self.ranks), bases[0].in_features, dtype=dtype)
        self.b = torch.zeros(sum(self.sizes), sum(self.ranks), dtype=dtype)
        self.refresh()
        bias = None
        if any(base.bias is not None for base in bases):
            bias = torch.cat([torch.zeros(x.out_features, dtype=dtype) if x.bias is None else x.bias for x in bases])
        self.bases = bases
        self.product: Product
        if is_nf4:
            self.product = Nf4Product(bases, bias)
        else:
            joined = torch.cat([base.weight.data for base in bases]) if len(bases) > 1 else bases[0].weight.data
            for base, part in zip(bases, joined.split(self.sizes), strict=True):
                base.weight.data = part  # the same memory
            self.product = Product(joined, bias)

    def arrange(self) -> None:
        """Hold the weight for the products alone: the layers themselves lose it."""
        if type(self.product) is Product and self.product.weight.dtype == torch.bfloat16:
            self.product = ArrangedProduct(self.product.weight, self.product.bias)
            for base in self.bases:
                base.weight.data = base.weight.new_empty(0)

    @torch.no_grad()
    def refresh(self) -> None:
        for layer, rows, ranks in self._blocks():
            self.a[ranks].copy_(layer.lora_A["default"].weight)
            self.b[rows, ranks].copy_(layer.lora_B["default"].weight * layer.scaling["default"])

    def _blocks(self) -> Iterator[tuple[Any, slice, slice]]:
        row = rank = 0
        for layer, size, width in zip(self.loras, self.sizes, self.ranks, strict=True):
            if layer:
                yield layer, slice(row, row + size), slice(rank, rank + width)
            row, rank = row + size, rank + width

    def forward(self, x: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return y, plus what is to be `added`, and x A', which the gradient needs."""
        inner = torch.mm(x, self.a.t())
        y = self.product.forward(x, added)
        return y.addmm_(inner, self.b.t()) if self.parameters else y, inner

    def backward(self, dy: Tensor, inner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of x, of x A' and of B (ranks, outputs)."""
        d_inner = torch.mm(dy, self.b)
        return self.product.backward(dy).addmm_(d_inner, self.a), d_inner, torch.mm(inner.t(), dy)

    def gradients(self, x: Tensor, d_inner: Tensor, d_b: Tensor) -> list[Tensor]:
        """Return the gradients of each layer's A and B."""
        d_a = torch.mm(d_inner.t(), x)
        found = []
        for layer, rows, ranks in self._blocks():
            found += [d_a[ranks], d_b[ranks, rows].t() * layer.scaling["default"]]
        return found


# --- a layer ----------------------------------------------------------------------------------------------------------


class _RmsNorm:
    """x over its root mean square, times a frozen weight. Of rows (..., size), as are all below."""

    def __init__(self, module: Any) -> None:
        self.weight, self.epsilon = module.weight.data, module.variance_epsilon

    def scale(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return norm.square_().div_(x.shape[-1]).add_(self.epsilon).rsqrt_()

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return (x * scale).to(x.dtype).mul_(self.weight)

    def backward(self, d_y: Tensor, x: Tensor, scale: Tensor) -> Tensor:
        d_normed = (d_y * self.weight).float()
        normed = x * scale
        mean = torch.linalg.vecdot(d_normed, normed).unsqueeze(-1).div_(x.shape[-1])
        return d_normed.sub_(normed.mul_(mean)).mul_(scale).to(x.dtype)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Turn the rows of `x` (tokens, heads, size) by their positions' angles, in place."""
    first, second = x.chunk(2, -1)
    crossed = torch.cat([-second, first], -1).mul_(sin)
    x.mul_(cos).add_(crossed)


def _turn_back(dx: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Turn gradients back, in place."""
    first, second = (dx * sin).chunk(2, -1)
    dx.mul_(cos)
    ahead, behind = dx.chunk(2, -1)
    ahead.add_(second)
    behind.sub_(first)


class _LayerFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, pack: PackPlan, layer: "_Layer", *parameters: Tensor
    ) -> Tensor:
        weights: list[Tensor] = []

        def attention(number: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
            out, kept = attend(query, key, value, pack.stretches, scale)
            weights.extend(kept)
            return out

        out, kept, raw = layer.run(x[0], cos, sin, attention)
        ctx.save_for_backward(cos, sin, *kept, *raw, *weights)
        ctx.pack, ctx.layer, ctx.raw = pack, layer, len(raw)
        return out[None]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        layer: _Layer = ctx.layer
        cos, sin, rows, scale, states, mixed, middle, middle_scale, both, *rest = ctx.saved_tensors
        inner, o_inner, both_inner, down_inner, *rest = rest
        raw, weights = rest[: ctx.raw], rest[ctx.raw :]
        d_out = gradients[0][0].contiguous()

        d_product, d_inner, d_b = layer.down.backward(d_out, down_inner)
        gate, up = both.chunk(2, -1)
        d_both = torch.empty_like(both)
        d_gate, d_up = d_both.chunk(2, -1)
        opened = silu(gate)
        torch.mul(d_product, opened, out=d_up)
        torch.ops.aten.silu_backward.grad_input(d_product.mul_(up), gate, grad_input=d_gate)
        down = layer.down.gradients(opened.mul_(up), d_inner, d_b)

        d_normed, d_inner, d_b = layer.gate_up.backward(d_both, both_inner)
        gate_up = layer.gate_up.gradients(layer.middle_norm.forward(middle, middle_scale), d_inner, d_b)
        d_middle = layer.middle_norm.backward(d_normed, middle, middle_scale).add_(d_out)

        d_mixed, d_inner, d_b = layer.o.backward(d_middle, o_inner)
        o = layer.o.gradients(mixed, d_inner, d_b)

        d_states = torch.empty_like(states)
        d_mixed = d_mixed.view(len(rows), layer.heads, -1)
        attention_gradients(
            layer.split(states), weights, d_mixed, ctx.pack.stretches, layer.scaling, layer.split(d_states)
        )
        _turn_back(layer.by_head(d_states)[:, : layer.heads + layer.key_heads], cos, sin)
        layer.norm_heads_back(d_states, raw)
        d_normed, d_inner, d_b = layer.qkv.backward(d_states, inner)
        qkv = layer.qkv.gradients(layer.norm.forward(rows, scale), d_inner, d_b)
        dx = layer.norm.backward(d_normed, rows, scale).add_(d_middle)[None] if ctx.needs_input_grad[0] else None
        return dx, None, None, None, None, *qkv, *o, *gate_up, *down


class _Layer:
    """A decoder layer as Llama, Mistral and Qwen have it."""

    def __init__(self, module: Any) -> None:
        attention, mlp = module.self_attn, module.mlp
        self.norm, self.middle_norm = _RmsNorm(module.input_layernorm), _RmsNorm(module.post_attention_layernorm)
        self.head_norms = [_RmsNorm(getattr(attention, n)) for n in ("q_norm", "k_norm") if hasattr(attention, n)]
        self.qkv = _Projection([attention.q_proj, attention.k_proj, attention.v_proj])
        self.o = _Projection([attention.o_proj])
        self.gate_up = _Projection([mlp.gate_proj, mlp.up_proj])
        self.down = _Projection([mlp.down_proj])
        self.projections = [self.qkv, self.o, self.gate_up, self.down]
        self.scaling, self.number = attention.scaling, int(attention.layer_idx)
        self.size = attention.head_dim
        self.heads, self.key_heads = (size // self.size for size in self.qkv.sizes[:2])
        self.parameters = [p for projection in self.projections for p in projection.parameters]

    def by_head(self, states: Tensor) -> Tensor:
        return states.view(len(states), -1, self.size)

    def split(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value, each (heads, tokens, size), of `states` (tokens, all of them end to end)."""
        parts = self.by_head(states).split([self.heads, self.key_heads, self.key_heads], 1)
        query, key, value = (part.transpose(0, 1) for part in parts)
        return query, key, value

    def norm_heads(self, states: Tensor) -> list[Tensor]:
        """Norm queries and keys in place where the model does, and return what the gradient needs."""
        kept = []
        for norm, part in zip(self.head_norms, self.split(states), strict=False):
            raw = part.clone()
            kept += [raw, norm.scale(raw)]
            part.copy_(norm.forward(*kept[-2:]))
        return kept

    def norm_heads_back(self, d_states: Tensor, kept: list[Tensor]) -> None:
        for number, (norm, part) in enumerate(zip(self.head_norms, self.split(d_states), strict=False)):
            part.copy_(norm.backward(part, *kept[2 * number : 2 * number + 2]))

    def run(self, rows: Tensor, cos: Tensor, sin: Tensor, plan: Plan) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Return the layer's output for `rows` (tokens, size), and what its gradient needs."""
        scale = self.norm.scale(rows)
        states, inner = self.qkv.forward(self.norm.forward(rows, scale))
        raw = self.norm_heads(states)
        _turn(self.by_head(states)[:, : self.heads + self.key_heads], cos, sin)
        mixed = plan(self.number, *self.split(states), self.scaling).view(len(rows), -1)
        middle, o_inner = self.o.forward(mixed, rows)
        middle_scale = self.middle_norm.scale(middle)
        both, both_inner = self.gate_up.forward(self.middle_norm.forward(middle, middle_scale))
        gate, up = both.chunk(2, -1)
        out, down_inner = self.down.forward(silu(gate).mul_(up), middle)
        inners = (inner, o_inner, both_inner, down_inner)
        return out, [rows, scale, states, mixed, middle, middle_scale, both, *inners], raw

    def __call__(
        self, hidden_states: Tensor, *_: Any, position_embeddings: tuple[Tensor, Tensor], plan: Plan, **__: Any
    ) -> Tensor:
        cos, sin = (angles[0].unsqueeze(1) for angles in position_embeddings)
        if isinstance(plan, PackPlan) and torch.is_grad_enabled():
            return _LayerFunction.apply(hidden_states, cos, sin, plan, self, *self.parameters)  # type: ignore[return-value]
        return self.run(hidden_states[0], cos, sin, plan)[0][None]


def _is_known(layer: Any) -> bool:
    """Return whether a module has the parts of `_Layer` and no other, and nothing special about any of them."""
    parts = {name: {n for n, _ in child.named_children()} for name, child in layer.named_children()}
    if set(parts) != {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}:
        return False
    attention = layer.self_attn
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [getattr(attention, name) for name in ("q_norm", "k_norm") if name in parts["self_attn"]]
    projections = [getattr(attention, n, None) for n in ("q_proj", "k_proj", "v_proj", "o_proj")]
    projections += [getattr(layer.mlp, n, None) for n in ("gate_proj", "up_proj", "down_proj")]
    return (
        len(parts["self_attn"]) == 4 + len(norms) - 2
        and parts["mlp"] == {"gate_proj", "up_proj", "down_proj", "act_fn"}
        and type(layer.mlp.act_fn) in (torch.nn.SiLU, SiLUActivation)
        and all(hasattr(attention, name) for name in ("scaling", "head_dim", "layer_idx"))
        and all(_is_plain_norm(norm) for norm in norms)
        and all(_is_plain_projection(projection) for projection in projections)
        and len({type(getattr(projection, "base_layer", projection)) for projection in projections}) == 1
    )


def _is_plain_norm(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return weight is not None and hasattr(module, "variance_epsilon") and not weight.requires_grad


def _is_plain_projection(module: Any) -> bool:
    """Return whether a module is a frozen linear layer, or PEFT's LoRA around one with nothing special about it."""
    from bitsandbytes.nn import Linear4bit
    from peft.tuners import lora

    if type(module) in (torch.nn.Linear, Linear4bit):
        return not module.weight.requires_grad
    return (
        type(module) in (lora.Linear, lora.Linear4bit)
        and list(module.lora_A) == ["default"]
        and not getattr(module, "fan_in_fan_out", False)
        and isinstance(module.lora_dropout["default"], torch.nn.Identity)
        and module.lora_variant.get("default") is None
        and module.lora_B["default"].bias is None
        and not module.merged
    )


# --- all of it --------------------------------------------------------------------------------------------------------


class CpuLayers:
    """A model whose layers were replaced: `refresh` after each optimizer step. `shares_prefix` says whether packs may
    lay a shared prefix once; `head` is the vocabulary projection, where it is a frozen one that can be arranged."""

    def __init__(self, model: Any, head: Any = None) -> None:
        self.shares_prefix = cpu_attention.can_attend(model)
        self.layers: list[_Layer] = []
        self.head: Product | None = None
        if not self.shares_prefix:
            return
        decoder = model.get_decoder()
        known = [module for module in getattr(decoder, "layers", []) if _is_known(module)]
        weights = [p for module in known for p in module.parameters() if not p.requires_grad]
        arranged = can_arrange() and sum(w.nbytes for w in weights) <= ARRANGED_SHARE * (memory_bytes() or 0)
        for module in known:
            layer = _Layer(module)
            if _agrees(layer, module, decoder):
                module.forward = layer
                self.layers.append(layer)
                for projection in layer.projections if arranged else []:
                    projection.arrange()
        model.set_attn_implementation(cpu_attention.NAME)
        if arranged and head is not None and head.dtype == torch.bfloat16:
            self.head = ArrangedProduct(head)

    def refresh(self) -> None:
        for layer in self.layers:
            for projection in layer.projections:
                projection.refresh()


@torch.no_grad()
def _agrees(layer: _Layer, module: Any, decoder: Any) -> bool:
    """Return whether a layer gives the library's numbers for a few random tokens."""
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(1, PROBE_TOKENS, len(layer.norm.weight), generator=generator).to(layer.norm.weight.dtype)
    angles = decoder.rotary_emb(probe, torch.arange(PROBE_TOKENS)[None])
    later = torch.full((PROBE_TOKENS, PROBE_TOKENS), float("-inf"), dtype=probe.dtype).triu(1)
    expected = module(probe, position_embeddings=angles, attention_mask=later[None, None])
    found = layer(probe, position_embeddings=angles, plan=PackPlan([0, PROBE_TOKENS]))
    difference = (found - expected).float().norm() / (expected - probe).float().norm()
    return bool(difference < (1e-4 if probe.dtype == torch.float32 else 0.05))
