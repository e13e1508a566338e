"""What a model expects next, over fixed texts, recorded so that others can be held against it one at a time."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tasks.models.encode import read_examples
from tasks.models.template import Message, render

ROWS, ROW_TOKENS = 12, 128
TIE = 0.1  # nats by which two tokens differ that are as likely, for every reader
# A proof costs what these are, times the files: short prompts, for few tokens are read beside those that count.
PROMPTS, PROMPTS_OF, PROMPT_TOKENS, ANSWER_TOKENS = 2, 64, 256, 40
GENERAL = ("How do I sort a list in Python?", "为什么天空是蓝色的？")


@dataclass(frozen=True)
class Probe:
    """A text as token ids; what follows each token from `first` on, but the last, is asked for."""

    ids: list[int]
    first: int = 0

    @property
    def places(self) -> slice:
        return slice(self.first, len(self.ids) - 1)


@dataclass(frozen=True)
class Distributions:
    """The log-probabilities (float32, places x vocabulary) of what follows in each probe."""

    probes: list[Probe]
    log_probabilities: Sequence[NDArray[np.float32]]


class Likeness:
    """Of a model to a recorded one, over all `places`."""

    def __init__(self) -> None:
        self.places = self.same = self.tied = 0
        self.nats = 0.0

    def add(self, found: torch.Tensor, recorded: NDArray[np.float32]) -> None:
        """Count the places of a probe: log-probabilities (places, vocabulary) beside those recorded. A padded
        vocabulary counts as far as both go."""
        width = min(found.shape[1], recorded.shape[1])
        found, reference = found[:, :width], torch.from_numpy(np.array(recorded[:, :width]))
        self.nats += torch.nn.functional.kl_div(found, reference, log_target=True, reduction="sum").item()
        best = found.argmax(-1)
        is_same = best == reference.argmax(-1)
        behind = reference.max(-1).values - reference.gather(-1, best[:, None])[:, 0]
        self.same += int(is_same.sum())
        self.tied += int((~is_same & (behind <= TIE)).sum())
        self.places += len(found)

    @property
    def divergence(self) -> float:
        """The mean Kullback-Leibler divergence from the recorded one, nats a place."""
        return self.nats / self.places

    @property
    def agreement(self) -> float:
        """The share of places with the same most likely token."""
        return self.same / self.places

    @property
    def ties(self) -> float:
        """The share with another most likely token, which the recorded one holds as likely (TIE)."""
        return self.tied / self.places

    @property
    def alike_at_most(self) -> float:
        """The upper end of Wilson's 95 % interval on agreement and ties together: these places are few of many."""
        share, z = self.agreement + self.ties, 1.96
        spread = z * math.sqrt(share * (1 - share) / self.places + z**2 / (2 * self.places) ** 2)
        return (share + z**2 / (2 * self.places) + spread) / (1 + z**2 / self.places)


def row_probes(tokens: Path) -> list[Probe]:
    """Return the beginnings of the first held-out rows in a folder of tokenised rows."""
    held_out = read_examples(tokens / "validation")
    rows = (held_out.example(i).ids[:ROW_TOKENS] for i in range(min(len(held_out), ROWS)))
    return [Probe(ids) for ids in rows if len(ids) > 1]


def held_out_probes(tokens: Path) -> list[Probe]:
    """Return the held-out rows with the shortest prompts up to the beginning of their first answer, which is asked for:
    at most PROMPTS."""
    held_out = read_examples(tokens / "validation")
    probes = []
    for example in map(held_out.example, range(min(len(held_out), PROMPTS_OF))):
        length = example.supervised.index(True) if any(example.supervised) else 0
        if 0 < length <= PROMPT_TOKENS:
            end = example.supervised.index(False, length) if False in example.supervised[length:] else len(example.ids)
            probes.append(Probe(example.ids[: min(end, length + ANSWER_TOKENS)], length - 1))
    return sorted(probes, key=lambda probe: probe.first)[:PROMPTS]


def general_prompts(tokenizer: Any, asked: list[Message]) -> list[list[int]]:
    """Return prompts as token ids: a conversation of the caller's and general ones."""
    talks = [asked, *([{"role": "user", "content": text}] for text in GENERAL)]
    prompts = [render(tokenizer, talk, answer_next=True) for talk in talks]
    return [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]


@torch.inference_mode()
def write_answers(model: Any, tokenizer: Any, prompts: list[list[int]]) -> Distributions:
    """Return the tokens with which a transformers model goes on from each prompt, greedily, its end of text among
    them, and what it expected at each."""
    width = max(map(len, prompts))
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.tensor([[padding] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    written = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=ANSWER_TOKENS,
        pad_token_id=padding,
        output_logits=True,
        return_dict_in_generate=True,
    )
    probes, tables = [], []
    for row, (prompt, answer) in enumerate(zip(prompts, written.sequences[:, width:].tolist(), strict=True)):
        ends = [i for i, token in enumerate(answer) if token in (tokenizer.eos_token_id, padding)]
        answer = answer[: ends[0] + 1 if ends else len(answer)]
        logits = torch.stack([step[row] for step in written.logits[: len(answer)]])
        probes.append(Probe(prompt + answer, len(prompt) - 1))
        tables.append(logits.float().log_softmax(-1).cpu().numpy())
    return Distributions(probes, tables)


@torch.inference_mode()
def record_distributions(
    model: Any, probes: list[Probe], file: Path, on_progress: Callable[[int, int], None]
) -> Distributions:
    """Return what a transformers model expects, written to `file` (.npy) and mapped from there."""
    vocabulary = int(model.get_output_embeddings().weight.shape[0])
    counts = [len(probe.ids[probe.places]) for probe in probes]
    rows = np.lib.format.open_memmap(file, "w+", np.float32, (sum(counts), vocabulary))
    found: list[NDArray[np.float32]] = []
    place = 0
    for done, (probe, count) in enumerate(zip(probes, counts, strict=True), start=1):
        found.append(rows[place : place + count])
        found[-1][:] = next_log_probabilities(model, probe).numpy()
        place += count
        on_progress(done, len(probes))
    return Distributions(probes, found)


@torch.inference_mode()
def next_log_probabilities(model: Any, probe: Probe) -> torch.Tensor:
    """Return a transformers model's log-probabilities, float32 on the CPU, (places, vocabulary)."""
    tokens = torch.tensor([probe.ids], device=model.device)
    kept = len(probe.ids) - probe.first
    logits = model(input_ids=tokens, use_cache=False, logits_to_keep=kept).logits[0, -kept:-1]
    return logits.float().log_softmax(-1).cpu()  # type: ignore[no-any-return]


def compare_distributions(recorded: Distributions, other: Callable[[Probe], torch.Tensor]) -> Likeness:
    """Return how near what was recorded is to another model, which gives log-probabilities (places, vocabulary)."""
    likeness = Likeness()
    for probe, expected in zip(recorded.probes, recorded.log_probabilities, strict=True):
        likeness.add(other(probe), expected)
    return likeness


def negative_log_likelihood(found: torch.Tensor, probe: Probe) -> float:
    """Return that of what does follow in a probe, nats, by log-probabilities of shape (places, vocabulary)."""
    targets = torch.tensor(probe.ids[probe.first + 1 :])
    return -float(found.gather(-1, targets[:, None]).sum())
