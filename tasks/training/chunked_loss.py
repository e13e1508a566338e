"""Cross-entropy with the vocabulary projection in chunks: the logits of all positions are never in memory at once.

The gradient is formed while a chunk's logits are at hand, so that the backward pass has nothing left to recompute.
"""

from typing import Any

import torch
from torch.nn.functional import linear, softmax

CHUNK_ROWS = 128  # x 49,152 words in float32 are 25 MB


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        needs_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if needs_gradient else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), CHUNK_ROWS):
            part = slice(start, start + CHUNK_ROWS)
            target = labels[part, None]
            logits = linear(hidden[part], head)
            most, place = logits.max(-1, keepdim=True)
            shares = softmax(logits, -1, dtype=torch.float32)
            # log of the sum of all exponentials, by the likeliest word: its share is never too small for a logarithm.
            norm = most.float() - shares.gather(1, place).log()
            total += (norm - logits.gather(1, target).float()).sum()
            if gradient is not None:  # the shares, less the label's one
                shares.scatter_add_(1, target, torch.full_like(target, -1, dtype=shares.dtype))
                torch.mm(shares.to(hidden.dtype), head, out=gradient[part])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.saved_tensors[0] * gradients[0], None, None


def chunked_loss(hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the summed cross-entropy in nats of `labels` (rows,) by the logits `hidden` (rows, size) @ `head`
    (words, size) transposed. `head` gets no gradient: it is for a frozen projection without bias."""
    result = _ChunkedLoss.apply(hidden, head, labels)
    assert isinstance(result, torch.Tensor)
    return result
