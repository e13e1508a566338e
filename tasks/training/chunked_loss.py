"""Cross-entropy with the vocabulary projection in chunks: the logits of all positions are never in memory at once.

The gradient is formed while a chunk's logits are at hand, so that the backward pass has nothing left to recompute.
"""

from typing import Any

import torch
from torch.nn.functional import softmax

from tasks.models.products import Product

CHUNK_BYTES = 64 << 20  # of logits in the compute type
WIDE_ROWS = 16  # are in float32 at a time: x 49,152 words 3 MB, which stays in a cache of its own


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: Product, labels: torch.Tensor) -> torch.Tensor:
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        most = max(1, CHUNK_BYTES // (hidden.element_size() * head.outputs))
        chunks = max(1, -(-len(hidden) // most))  # of even size: a few rows alone cost as much as many
        rows = max(1, -(-len(hidden) // chunks))
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = head.forward(hidden[part])
            for few, target in zip(logits.split(WIDE_ROWS), labels[part, None].split(WIDE_ROWS), strict=True):
                shares = softmax(few, -1, dtype=torch.float32)
                # log of the sum of all exponentials, by the likeliest word: its share is never too small for a log.
                norm = few.amax(-1, keepdim=True).float() - shares.amax(-1, keepdim=True).log()
                total += (norm - few.gather(1, target).float()).sum()
                # The gradient of the logits, in their place: the shares, less the label's one.
                few.copy_(shares.scatter_add_(1, target, torch.full_like(target, -1, dtype=shares.dtype)))
            if gradient is not None:
                gradient[part] = head.backward(logits)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.saved_tensors[0] * gradients[0], None, None


def chunked_loss(hidden: torch.Tensor, head: Product, labels: torch.Tensor) -> torch.Tensor:
    """Return the summed cross-entropy in nats of `labels` (rows,) by the logits that the vocabulary projection `head`
    makes of `hidden` (rows, size)."""
    result = _ChunkedLoss.apply(hidden, head, labels)
    assert isinstance(result, torch.Tensor)
    return result
