"""Training in several processes of one machine, one per GPU: each has its share of every step's conversations, and the
gradients are summed, so that the step is the same however many there are.

Which of them a process is stands in RANK and WORLD_SIZE, as torchrun and accelerate have it too.
"""

import os
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from tasks.models.template import Example

WAIT = timedelta(hours=2)  # for a process that compiles, or whose packs no longer fit


class Team:
    """`rank` is this process's number, of `size`. Every method is called by all of them alike."""

    def __init__(self, device: str) -> None:
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = device
        if self.size > 1:
            if device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=WAIT)

    @property
    def leads(self) -> bool:
        """Whether this is the one that writes and tells."""
        return self.rank == 0

    def leave(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()

    def share(self, examples: list[Example]) -> list[Example]:
        """Return this process's part of some examples, of which all have about as many tokens."""
        if self.size == 1:
            return examples
        sizes, mine = [0] * self.size, []
        for number in sorted(range(len(examples)), key=lambda n: -len(examples[n].ids)):  # the longest first: evenest
            emptiest = sizes.index(min(sizes))
            sizes[emptiest] += len(examples[number].ids)
            mine += [number] if emptiest == self.rank else []
        return [examples[number] for number in sorted(mine)]

    def total(self, *numbers: float) -> list[float]:
        """Return the sums of all processes' numbers."""
        if self.size == 1:
            return list(numbers)
        found = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(found)
        sums: list[float] = found.tolist()
        return sums

    def any(self, flag: bool) -> bool:
        return self.total(float(flag))[0] > 0

    def add_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Leave the sum of all processes' gradients in each; none where no process has one."""
        if self.size == 1:
            return
        used = self.total(*(float(p.grad is not None) for p in parameters))
        for parameter, count in zip(parameters, used, strict=True):
            if count:
                grad = torch.zeros_like(parameter, dtype=torch.float32) if parameter.grad is None else parameter.grad
                dist.all_reduce(grad)
                parameter.grad = grad
