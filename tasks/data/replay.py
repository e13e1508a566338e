"""Self-replay: what the base itself answers to anchor prompts, learned again beside the new rows so that it stays.

Needs no data of the base's own training. Answers are greedy, so they are what the base would say; nothing is taken from
another model. Source: Scialom, Chakrabarty, Muresan: Fine-tuned Language Models are Continual Learners, EMNLP 2022 (for
replay); Yang et al.: Self-Distillation Bridges Distribution Gap, ACL 2024 (for the model's own answers).
"""

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from tasks.core.errors import DataError
from tasks.data.leakage import ItemIndex, find_leaks
from tasks.models.template import Message, render

PROMPT_KEYS = ("prompt", "instruction", "question", "text")
BATCH = 8


def read_prompts(path: Path) -> list[list[Message]]:
    """Return the prompts of a file, each as the conversation up to its answer: JSON Lines (prompt, instruction,
    question or text; or messages up to the last question) or a prompt per line. Raises DataError."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the prompts of data.replay cannot be read: {error}. Expected a text file.") from None
    prompts = [_prompt(line.strip(), f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise DataError(f"{path}: expected prompts for data.replay, found none. Write one per line.")
    return prompts


def _prompt(line: str, where: str) -> list[Message]:
    if not line.startswith("{"):
        return [{"role": "user", "content": line}]
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not valid JSON: {error}. Write a prompt per line, or an object.") from None
    messages = row.get("messages")
    if isinstance(messages, list) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages):
        asked = [{"role": m["role"], "content": str(m["content"])} for m in messages]
        while asked and asked[-1]["role"] != "user":
            del asked[-1]
        if asked:
            return asked
    text = next((row[key] for key in PROMPT_KEYS if isinstance(row.get(key), str) and row[key].strip()), None)
    if text is None:
        raise DataError(f"{where}: expected a prompt ({', '.join(PROMPT_KEYS)} or messages), found {', '.join(row)}.")
    return [{"role": "user", "content": text}]


def answer_prompts(
    model: Any,
    tokenizer: Any,
    prompts: list[list[Message]],
    wanted: int,
    max_new_tokens: int,
    items: ItemIndex | None,
    on_progress: Callable[[int], None],
) -> Iterator[dict[str, Any]]:
    """Yield at most `wanted` rows of prompts with the model's own greedy answers, as tasks.data.prepare writes rows.

    Prompts that hold an evaluation item and answers that are empty or not ended within `max_new_tokens` are left out:
    a cut-off answer would teach the model not to stop."""
    leaks = find_leaks([[m["content"] for m in p] for p in prompts], items) if items else [-1] * len(prompts)
    numbered = iter([(n, p) for n, (p, leak) in enumerate(zip(prompts, leaks, strict=True), 1) if leak < 0])
    found = 0
    while found < wanted and (batch := list(islice(numbered, min(BATCH, wanted - found)))):
        answers = _answers(model, tokenizer, [prompt for _, prompt in batch], max_new_tokens)
        for (number, prompt), answer in zip(batch, answers, strict=True):
            if answer:
                found += 1
                messages = [*prompt, {"role": "assistant", "content": answer}]
                yield {"messages": messages, "source": "self-replay", "line": number}
        on_progress(found)


@torch.no_grad()
def _answers(model: Any, tokenizer: Any, prompts: list[list[Message]], max_new_tokens: int) -> list[str | None]:
    """Return the greedy answer to each prompt, None where it did not end."""
    ids = [
        tokenizer(render(tokenizer, prompt, answer_next=True), add_special_tokens=False)["input_ids"]
        for prompt in prompts
    ]
    width = max(map(len, ids))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    padded = torch.tensor([[pad] * (width - len(i)) + i for i in ids], device=model.device)
    mask = torch.tensor([[0] * (width - len(i)) + [1] * len(i) for i in ids], device=model.device)
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends]) | {tokenizer.eos_token_id}
    written = model.generate(
        input_ids=padded,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=pad,
    )[:, width:].tolist()
    answers: list[str | None] = []
    for tokens in written:
        stop = next((at for at, token in enumerate(tokens) if token in ends), None)
        said = tokenizer.decode(tokens[:stop], skip_special_tokens=True).strip()
        answers.append(said if said and stop is not None else None)
    return answers
