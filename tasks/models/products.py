"""Products with a frozen weight, x W' + bias and dy W, as each kind of weight is multiplied fastest."""

from typing import Any

import torch
from torch.nn.functional import linear

Tensor = torch.Tensor


class Product:
    """A weight W (outputs, inputs) as it is. `x` and `dy` have shape (rows, inputs) and (rows, outputs)."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias
        self.outputs = len(weight)

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """Return the product, plus what is to be `added` to it."""
        y = linear(x, self.weight, self.bias)
        return y if added is None else y.add_(added)

    def backward(self, dy: Tensor) -> Tensor:
        return torch.mm(dy, self.weight)


class Nf4Product(Product):
    """W of several 4-bit layers end to end, made anew each time: a few percent of the time, an eighth of the memory."""

    def __init__(self, layers: list[Any], bias: Tensor | None) -> None:
        self.layers, self.bias = layers, bias
        self.outputs = sum(layer.out_features for layer in layers)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        from bitsandbytes.functional import dequantize_4bit

        parts = [dequantize_4bit(x.weight.data, x.weight.quant_state).to(x.compute_dtype) for x in self.layers]
        return torch.cat(parts) if len(parts) > 1 else parts[0]


class ArrangedProduct(Product):
    """W as oneDNN wants it, once for each direction: it would be rearranged at every call. Twice the memory."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        arrange = torch.ops.mkldnn._reorder_linear_weight
        self.onward, self.back = arrange(weight, None), arrange(weight.t().contiguous(), None)
        self.bias = bias
        self.outputs = len(weight)

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        y = torch.ops.mkldnn._linear_pointwise(x, self.onward, self.bias, "none", [], "")
        return y if added is None else y.add_(added)

    def backward(self, dy: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(dy.contiguous(), self.back, None, "none", [], "")


def can_arrange() -> bool:
    """Return whether oneDNN multiplies bfloat16 here, and torch has the operations that its compiler uses for it."""
    ops = torch.ops.mkldnn
    return (
        bool(ops._is_mkldnn_bf16_supported())
        and hasattr(ops, "_linear_pointwise")
        and hasattr(ops, "_reorder_linear_weight")
    )


class ArrangedLinear(torch.nn.Module):
    """A linear layer whose weight is kept as oneDNN wants it, and in no other form: for reading alone."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.arranged = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), None)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.arranged, self.bias, "none", [], "")  # type: ignore[no-any-return]


def arrange_linears(model: torch.nn.Module) -> None:
    """Replace a model's plain linear layers, on a CPU, by those that oneDNN computes: in float32, with few rows, in
    less than half the time."""
    if can_arrange():
        for name, module in list(model.named_modules()):
            if type(module) is torch.nn.Linear:
                model.set_submodule(name, ArrangedLinear(module))


def frozen_head(model: Any) -> Product | None:
    """Return the vocabulary projection where it is a frozen plain one, else None."""
    head = model.get_output_embeddings()
    special = ("final_logit_softcapping", "logits_scaling", "logit_scale")
    if type(head) is not torch.nn.Linear or head.bias is not None or head.weight.requires_grad:
        return None
    return None if any(getattr(model.config, name, None) for name in special) else Product(head.weight)
