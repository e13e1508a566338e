"""Chat templates: the named ones for bases that ship none, and token ids with the assistant's turns marked.

Marks come from rendering a conversation's prefixes, not from token ids: a model may pad with its end-of-turn token
(SmolLM2 does), and masking by id would then hide every stop from the loss.
"""

import functools
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from tasks.core.errors import ModelError

Message = dict[str, str]

# Each ends an assistant's turn with eos_token, so that the end of a turn is learned.
NAMED_TEMPLATES = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
        "{{ eos_token if m['role'] == 'assistant' else '<|im_end|>' }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama2": (
        "{% set ns = namespace(system='') %}{% for m in messages %}"
        "{% if m['role'] == 'system' %}{% set ns.system = '<<SYS>>\\n' + m['content'] + '\\n<</SYS>>\\n\\n' %}"
        "{% elif m['role'] == 'user' %}{{ bos_token }}[INST] {{ ns.system }}{{ m['content'] }} [/INST]"
        "{% set ns.system = '' %}"
        "{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
    ),
    "alpaca": (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}\n\n"
        "{% elif m['role'] == 'user' %}### Instruction:\n{{ m['content'] }}\n\n"
        "{% else %}### Response:\n{{ m['content'] }}{{ eos_token }}\n\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}### Response:\n{% endif %}"
    ),
    "vicuna": (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }} "
        "{% elif m['role'] == 'user' %}USER: {{ m['content'] }} "
        "{% else %}ASSISTANT: {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    ),
}


@dataclass(frozen=True)
class Example:
    """One training or scoring sequence: `ids`, and for each id whether the assistant wrote it (so: is learned)."""

    ids: list[int]
    supervised: list[bool]


def apply_named_template(tokenizer: Any, name: str, base: str) -> None:
    """Give `tokenizer` the named template, or check that it has its own where `name` is auto. Raises ModelError."""
    if name != "auto":
        template = NAMED_TEMPLATES[name]
        if adds_bos(tokenizer) and "bos_token" not in template:  # a server adds it too, so it must be there in training
            template = "{{ bos_token }}" + template
        tokenizer.chat_template = template
    elif not tokenizer.chat_template:
        raise ModelError(
            f"The base model {base} ships no chat template. Name one with model.template "
            f"(--set model.template=...): {', '.join(NAMED_TEMPLATES)}."
        )
    else:
        own = tokenizer.chat_template
        for template in own.values() if isinstance(own, dict) else [own]:
            check_template(template, base)


@functools.cache
def check_template(template: str, base: str) -> None:
    """Raise ModelError for a chat template that takes too long, too much memory or writes too much for conversations of
    a few words. It is a program of whoever made the model, and the sandbox that it runs in has no such limits."""
    probe = [sys.executable, "-I", str(Path(__file__).with_name("template_probe.py"))]
    try:
        ended = subprocess.run(probe, input=template.encode(), capture_output=True, timeout=120, check=False).returncode
    except subprocess.TimeoutExpired:
        ended = -1
    if ended:
        what = "takes more memory or writes more than any needs" if ended > 0 else "did not come to an end"
        raise ModelError(
            f"The chat template of {base} {what} for a conversation of a few words: it is broken or hostile. "
            f"Name another with model.template (--set model.template=...): {', '.join(NAMED_TEMPLATES)}."
        )


def adds_bos(tokenizer: Any) -> bool:
    """Return whether the tokenizer begins every text with its BOS by itself, as a server does then."""
    return tokenizer.bos_token_id is not None and tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id


def render(tokenizer: Any, messages: list[Message], answer_next: bool = False) -> str:
    """Return the conversation as the text the model sees; with `answer_next`, up to where the assistant would write."""
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer_next)
    except (
        Exception
    ) as error:  # Gemma's refuses a system turn, others two turns of one role; broken ones raise anything
        roles = ", ".join(message["role"] for message in messages)
        said = error if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
        raise ModelError(f"The base's chat template refuses a conversation of {roles}: {said}") from None
    assert isinstance(text, str)
    return text


def encode_conversation(tokenizer: Any, messages: list[Message]) -> list[Example]:
    """Return the conversation as one Example with every assistant turn supervised, its end of turn included.

    Where the template renders earlier turns differently once later ones follow (Qwen3 drops past reasoning), one
    Example per assistant turn comes back instead, each supervising its last turn only."""
    whole = render(tokenizer, messages)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = render(tokenizer, messages[:i], answer_next=True)
            answered = render(tokenizer, messages[: i + 1])
            if not answered.startswith(prompt):
                raise ModelError(
                    "The chat template cannot be masked: rendering a conversation with its answer does not begin with "
                    "the prompt for that answer. Choose another with model.template."
                )
            spans.append((len(prompt), len(answered), answered))
    if all(whole.startswith(answered) for _, _, answered in spans):
        return [_encode(tokenizer, whole, [(start, end) for start, end, _ in spans])]
    return [_encode(tokenizer, answered, [(start, end)]) for start, end, answered in spans]


def _encode(tokenizer: Any, text: str, spans: list[tuple[int, int]]) -> Example:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    # A token that only overlaps an answer counts too: some tokenizers put a prompt's last space into its first word.
    supervised = [any(a < end and b > start for start, end in spans) for a, b in encoded["offset_mapping"]]
    return Example(list(encoded["input_ids"]), supervised)


def default_system(tokenizer: Any) -> str | None:
    """Return the system prompt that the template adds by itself where a conversation has none, or None.

    Found by putting a known system prompt in its place: what differs is the default. Servers that guess a template
    from its shape (Ollama does) drop it, so it is shipped explicitly."""
    mark = "\x00system\x00"
    user = {"role": "user", "content": "x"}
    try:
        given = render(tokenizer, [{"role": "system", "content": mark}, user])
    except ModelError:
        return None
    own = render(tokenizer, [user])
    head, found, tail = given.partition(mark)
    if not found or not own.startswith(head) or not own.endswith(tail) or len(own) <= len(head) + len(tail):
        return None
    return own[len(head) : len(own) - len(tail)]
