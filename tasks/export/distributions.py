"""What a model expects next, over fixed texts, kept on disk so that others can be held against it one at a time."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tasks.models.encode import read_examples
from tasks.models.template import render

ROWS, ROW_TOKENS = 12, 128
TIE = 0.1  # nats by which two tokens differ that are as likely, for every reader
PROMPTS, PROMPT_TOKENS, ANSWER_TOKENS = 12, 256, 48
GENERAL = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "How do I sort a list in Python?",
    "你好，请介绍一下你自己。",
    "请告诉我怎么做西红柿炒鸡蛋。",
    "为什么天空是蓝色的？",
)


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
    """The log-probabilities (float32, places x vocabulary, mapped from a file) of what follows in each probe, and the
    perplexity of what does follow."""

    probes: list[Probe]
    log_probabilities: list[NDArray[np.float32]]
    perplexity: float


@dataclass(frozen=True)
class Likeness:
    """Of another model, over all `places`: the mean divergence from it of the recorded one (nats), the share with the
    same most likely token, the share with another that the recorded one holds as likely (TIE), and its perplexity."""

    places: int
    divergence: float
    agreement: float
    ties: float
    perplexity: float


def row_probes(tokens: Path) -> list[Probe]:
    """Return the beginnings of the first held-out rows in a folder of tokenised rows."""
    held_out = read_examples(tokens / "validation")
    rows = (held_out.example(i).ids[:ROW_TOKENS] for i in range(min(len(held_out), ROWS)))
    return [Probe(ids) for ids in rows if len(ids) > 1]


def answer_probes(model: Any, tokenizer: Any, tokens: Path) -> list[Probe]:
    """Return what a transformers model answers, greedily, to held-out prompts and to general ones; its end counts."""
    held_out = read_examples(tokens / "validation")
    prompts = []
    for example in map(held_out.example, range(min(len(held_out), PROMPTS))):
        prompt = example.ids[: example.supervised.index(True)] if any(example.supervised) else []
        if 0 < len(prompt) <= PROMPT_TOKENS:
            prompts.append(prompt)
    asked = [render(tokenizer, [{"role": "user", "content": text}], answer_next=True) for text in GENERAL]
    prompts += [tokenizer(text, add_special_tokens=False)["input_ids"] for text in asked]
    answers = write_answers(model, tokenizer, prompts)
    return [Probe(prompt + answer, len(prompt) - 1) for prompt, answer in zip(prompts, answers, strict=True)]


@torch.inference_mode()
def write_answers(model: Any, tokenizer: Any, prompts: list[list[int]]) -> list[list[int]]:
    """Return the tokens with which a transformers model goes on, greedily, its end of text among them."""
    width = max(map(len, prompts))
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.tensor([[padding] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    written = model.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=ANSWER_TOKENS, pad_token_id=padding
    )
    answers = []
    for row in written[:, width:].tolist():
        ends = [i for i, token in enumerate(row) if token in (tokenizer.eos_token_id, padding)]
        answers.append(row[: ends[0] + 1 if ends else len(row)])
    return answers


@torch.inference_mode()
def record_distributions(
    model: Any, probes: list[Probe], file: Path, on_progress: Callable[[int, int], None]
) -> Distributions:
    """Return what a transformers model expects, written to `file` (.npy)."""
    vocabulary = int(model.get_output_embeddings().weight.shape[0])
    counts = [len(probe.ids[probe.places]) for probe in probes]
    rows = np.lib.format.open_memmap(file, "w+", np.float32, (sum(counts), vocabulary))
    found: list[NDArray[np.float32]] = []
    nll, place = 0.0, 0
    for done, (probe, count) in enumerate(zip(probes, counts, strict=True), start=1):
        log_probabilities = next_log_probabilities(model, probe)
        nll -= _of_targets(log_probabilities, probe)
        found.append(rows[place : place + count])
        found[-1][:] = log_probabilities.numpy()
        place += count
        on_progress(done, len(probes))
    return Distributions(probes, found, math.exp(nll / place))


@torch.inference_mode()
def next_log_probabilities(model: Any, probe: Probe) -> torch.Tensor:
    """Return a transformers model's log-probabilities, float32 on the CPU, (places, vocabulary)."""
    tokens = torch.tensor([probe.ids], device=model.device)
    return model(input_ids=tokens, use_cache=False).logits[0, probe.places].float().log_softmax(-1).cpu()  # type: ignore[no-any-return]


def compare_distributions(recorded: Distributions, other: Callable[[Probe], torch.Tensor]) -> Likeness:
    """Return how near what was recorded is to another model, which gives log-probabilities (places, vocabulary). A
    padded vocabulary counts as far as both go."""
    divergence, nll, same, ties, places = 0.0, 0.0, 0, 0, 0
    for probe, expected in zip(recorded.probes, recorded.log_probabilities, strict=True):
        found = other(probe)
        width = min(found.shape[1], expected.shape[1])
        found, reference = found[:, :width], torch.from_numpy(np.array(expected[:, :width]))
        divergence += torch.nn.functional.kl_div(found, reference, log_target=True, reduction="sum").item()
        best = found.argmax(-1)
        is_same = best == reference.argmax(-1)
        behind = reference.max(-1).values - reference.gather(-1, best[:, None])[:, 0]
        same += int(is_same.sum())
        ties += int((~is_same & (behind <= TIE)).sum())
        nll -= _of_targets(found, probe)
        places += len(found)
    return Likeness(places, divergence / places, same / places, ties / places, math.exp(nll / places))


def _of_targets(log_probabilities: torch.Tensor, probe: Probe) -> float:
    targets = torch.tensor(probe.ids[probe.first + 1 :])
    return float(log_probabilities.gather(-1, targets[:, None]).sum())
