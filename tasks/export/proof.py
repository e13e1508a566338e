"""Proof that a GGUF file is the model that was measured: its tokens, template, ends and next words beside the merged
model's, in float32 where memory allows."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tasks.core.digest import file_sha256
from tasks.core.errors import ExportError, ModelError
from tasks.core.hardware import memory_bytes
from tasks.core.records import FileProof
from tasks.export.distributions import (
    Distributions,
    Likeness,
    Probe,
    general_prompts,
    held_out_probes,
    negative_log_likelihood,
    next_log_probabilities,
    write_answers,
)
from tasks.models.llama import LlamaReader, quiet_llama
from tasks.models.load import dtype_name, load_model
from tasks.models.products import arrange_linears
from tasks.models.template import Message, render
from tasks.models.tokenizer import load_tokenizer

# With which a file passes: the least share of an answer's places with the same most likely token, or one that the
# merged model holds as likely (a model that learned little has many), and the largest mean divergence (nats). F16 and
# BF16 hold what the merged model holds; others lose what their bits lose. What loses more than such files is broken.
# Some 150 places are a sample: a share fails where the upper end of its 95 % interval does.
LIMITS = {
    "f32": (0.99, 0.01),
    "f16": (0.99, 0.01),
    "bf16": (0.99, 0.01),
    "q8_0": (0.97, 0.02),
    "q6_k": (0.94, 0.05),
    "q5": (0.90, 0.1),
    "q4": (0.80, 0.3),
    "iq4": (0.80, 0.3),
}
LOOSEST = (0.5, 1.5)  # three bits and fewer
# What tokenizers differ on: scripts, emoji, code, runs of spaces.
TOKEN_PROBES = (
    "Hello, world! It's 3.14, or 1,000,000?\n\n\tdef f(x):\r\n        return x  # 缩进  ",
    "你好，世界！《红楼梦》第１回。繁體字與简体字，日本語のテキスト、한국어 문장。",
    "🙂👨‍👩‍👧🇨🇳 𠀀𪚥 naïve café Привет мир! שלום مرحبا हिन्दी ไทย",
    "  leading and trailing   \n\n\n   leading, and    inner\tspaces \u3000\xa0\u200b",
    "we'll I'M they'VE 'twas ''' ___ a_b-c.d/e\\f {{name}} $x^2$ `code` <b>bold</b>",
    "SELECT * FROM t WHERE a >= 1; -- 注释\nfor (int i = 0; i < n; ++i) { s += x[i]; }",
    "2024年1月15日 13:05, ￥1,299.00 (含税)，电话：010-12345678",
)


@dataclass(frozen=True)
class Recorded:
    """What the merged model expects in its own answers to held-out and general prompts, and the answers that held-out
    rows have, with its perplexity on them (None where no row's prompt is short enough)."""

    tokenizer: Any
    answers: Distributions
    held_out: list[Probe]
    perplexity: float | None
    precision: str
    answer: str
    """To `asked`, greedily."""


def record_merged(merged: Path, tokens: Path, asked: list[Message]) -> Recorded:
    """Return what the merged model expects."""
    size = sum(path.stat().st_size for path in merged.glob("*.safetensors"))
    in_float32 = 3 * size < (memory_bytes() or 0)  # the weights are 16 bits each: twice their size, and some room
    model = load_model(merged, torch.float32 if in_float32 else torch.bfloat16, "cpu")
    arrange_linears(model)
    tokenizer = load_tokenizer(merged, "auto")
    held_out = held_out_probes(tokens)
    prompts = general_prompts(tokenizer, asked)
    answers = write_answers(model, tokenizer, prompts + [probe.ids[: probe.first + 1] for probe in held_out])
    answer = answers.probes[0].ids[len(prompts[0]) :]
    nats = sum(negative_log_likelihood(next_log_probabilities(model, probe), probe) for probe in held_out)
    places = sum(len(probe.ids[probe.places]) for probe in held_out)
    return Recorded(
        tokenizer,
        answers,
        held_out,
        math.exp(nats / places) if places else None,
        dtype_name(model.dtype),
        tokenizer.decode(answer, skip_special_tokens=True).strip(),
    )


def prove_file(path: Path, quantisation: str, recorded: Recorded) -> FileProof:
    """Return what a GGUF file gives beside the merged model, and each reason for which it is not that model. Raises
    ExportError where llama.cpp cannot load it."""
    tokenizer = recorded.tokenizer
    longest = max(len(probe.ids) for probe in recorded.answers.probes + recorded.held_out)
    with quiet_llama():
        try:
            reader = LlamaReader(path, longest, torch.get_num_threads())
        except ModelError as error:
            raise ExportError(str(error)) from error

        def log_probabilities(probe: Probe) -> torch.Tensor:
            found = [logits.copy() for _, logits in reader.read(probe.ids[:-1], probe.first)]
            return torch.from_numpy(np.stack(found)).log_softmax(-1)

        try:
            found, perplexity = _read_likeness(recorded, log_probabilities)
            other = _first_other_tokens(reader.model, tokenizer)
            ends = reader.ends(_end_of_turn(tokenizer))
            template = reader.model.metadata.get("tokenizer.chat_template")
            eos = int(reader.model.metadata.get("tokenizer.ggml.eos_token_id", -1))
        finally:
            reader.close()
    least, most = next((limits for name, limits in LIMITS.items() if quantisation.startswith(name)), LOOSEST)
    same_template = template is not None and template.strip() == str(tokenizer.chat_template).strip()
    checks = [
        (other is None, f"{other!r} becomes other tokens than in the Hugging Face tokenizer"),
        (same_template, "its chat template is not the tokenizer's"),
        (
            eos == tokenizer.eos_token_id,
            f"its end-of-text token is {eos}, and the tokenizer's is {tokenizer.eos_token_id}",
        ),
        (ends, "the token that ends an answer in the template does not end generation"),
        (  # stated so that a NaN fails
            found.alike_at_most >= least,
            f"its most likely token is the merged model's, or as likely to it, at {found.agreement + found.ties:.1%} "
            f"of {found.places} places in answers (of all at most {found.alike_at_most:.1%}), under {least:.0%}",
        ),
        (
            found.divergence <= most,
            f"its mean divergence from the merged model is {found.divergence:.4f} nats, over {most:g}",
        ),
    ]
    return FileProof(
        sha256=file_sha256(path),
        size_bytes=path.stat().st_size,
        probes=len(TOKEN_PROBES),
        same_tokens=other is None,
        same_template=same_template,
        ends_answers=ends and eos == tokenizer.eos_token_id,
        places=found.places,
        agreement=found.agreement,
        ties=found.ties,
        least_agreement=least,
        divergence=found.divergence,
        most_divergence=most,
        perplexity=perplexity,
        merged_perplexity=recorded.perplexity,
        reasons=[reason for holds, reason in checks if not holds],
    )


def _read_likeness(recorded: Recorded, model: Callable[[Probe], torch.Tensor]) -> tuple[Likeness, float | None]:
    """Return how near a model is to the merged one in its answers, and its perplexity on the held-out ones; texts that
    begin alike are read one after another."""
    likeness, nats, places = Likeness(), 0.0, 0
    answers = zip(recorded.answers.probes, recorded.answers.log_probabilities, strict=True)
    pairs = [*answers, *((probe, None) for probe in recorded.held_out)]
    for probe, expected in sorted(pairs, key=lambda pair: pair[0].ids):
        found = model(probe)
        if expected is not None:
            likeness.add(found, expected)
        else:
            nats += negative_log_likelihood(found, probe)
            places += len(found)
    return likeness, math.exp(nats / places) if places else None


def _first_other_tokens(model: Any, tokenizer: Any) -> str | None:
    """Return the first probe that llama.cpp splits into other tokens than the tokenizer when it is asked and answered
    in a conversation; None where there is none."""
    for probe in TOKEN_PROBES:
        chat = render(tokenizer, [{"role": "user", "content": probe}, {"role": "assistant", "content": probe}])
        expected = tokenizer(chat, add_special_tokens=False)["input_ids"]
        if model.tokenize(chat.encode(), add_bos=False, special=True) != expected:
            return probe
    return None


def _end_of_turn(tokenizer: Any) -> int:
    """Return the token that the template puts after an answer."""
    answered = render(tokenizer, [{"role": "user", "content": "x"}, {"role": "assistant", "content": "yes"}])
    after = tokenizer(answered.rpartition("yes")[2], add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return int(next((i for i in after if i in special), tokenizer.eos_token_id))
