"""What conversations look like when they reach the model, to be compared with what a server makes of them, and Go
templates (Ollama's language) that render as the named chat templates do.

Not here: asking a server. The Go templates were compared with the tokenizer's rendering by the tests' interpreter and
never by a live Ollama; the registration compares again, with the one it registers in."""

import copy
import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from tasks.core.errors import ModelError
from tasks.models.template import NAMED_TEMPLATES, Message, adds_bos, apply_named_template, render

USER = {"role": "user", "content": "Hello"}
SYSTEM = {"role": "system", "content": "SYS"}
# Markup, another script and a line end: what a template language may escape or trim.
CONVERSATIONS = {
    "one turn": [USER],
    "several turns": [
        USER,
        {"role": "assistant", "content": '你好！ 1 < 2 && "a"'},
        {"role": "user", "content": "Say it\nin two lines."},
    ],
}

# BOS and EOS stand for the tokenizer's own; FIRST is false where the server's tokenizer puts the first BOS itself.
# A model's end of turn is EOS, as in training.
GO_TEMPLATES = {
    "chatml": (
        "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}"
        '{{ if eq .Role "assistant" }}EOS{{ else }}<|im_end|>{{ end }}\n{{ end }}<|im_start|>assistant\n'
    ),
    "llama2": (
        '{{ $system := "" }}{{ $bos := FIRST }}{{ range .Messages }}'
        '{{ if eq .Role "system" }}{{ $system = .Content }}'
        '{{ else if eq .Role "user" }}{{ if $bos }}BOS{{ end }}{{ $bos = true }}[INST] '
        "{{ if $system }}<<SYS>>\n{{ $system }}\n<</SYS>>\n\n{{ end }}{{ .Content }} [/INST]"
        '{{ $system = "" }}{{ else }} {{ .Content }} EOS{{ end }}{{ end }}'
    ),
    "alpaca": (
        '{{ range .Messages }}{{ if eq .Role "system" }}{{ .Content }}\n\n'
        '{{ else if eq .Role "user" }}### Instruction:\n{{ .Content }}\n\n'
        "{{ else }}### Response:\n{{ .Content }}EOS\n\n{{ end }}{{ end }}### Response:\n"
    ),
    "vicuna": (
        '{{ range .Messages }}{{ if eq .Role "system" }}{{ .Content }} '
        '{{ else if eq .Role "user" }}USER: {{ .Content }} '
        "{{ else }}ASSISTANT: {{ .Content }}EOS{{ end }}{{ end }}ASSISTANT:"
    ),
}


@dataclass(frozen=True)
class PromptCase:
    """A conversation as it is sent to a chat server, and the prompts the model may get for it: first the tokenizer's
    own, then the same on the day before and after where it renders the date, and each without the BOS that the
    server's tokenizer puts there."""

    name: str
    messages: list[Message]
    prompts: list[str]


def prompt_cases(tokenizer: Any, system: str | None) -> list[PromptCase]:
    """Return what one turn and several, with a system prompt and without, must look like. `system` is the model's
    own, which counts where a conversation has none. Raises ModelError where the template refuses such a conversation;
    one that knows no system prompt at all has no cases with it."""
    cases = []
    for name, turns in CONVERSATIONS.items():
        own = [{"role": "system", "content": system}, *turns] if system else turns
        cases.append(PromptCase(name, turns, _prompts(tokenizer, render(tokenizer, own, answer_next=True))))
        try:
            text = render(tokenizer, [SYSTEM, *turns], answer_next=True)
        except ModelError:
            continue
        cases.append(PromptCase(f"{name} with a system prompt", [SYSTEM, *turns], _prompts(tokenizer, text)))
    return cases


def _prompts(tokenizer: Any, text: str) -> list[str]:
    texts = [text]
    now = datetime.now()
    for form in re.findall(r"strftime_now\(\s*['\"]([^'\"]+)['\"]", str(tokenizer.chat_template)):
        for days in (-1, 1):  # the server may be in another time zone, or asked after midnight
            texts.append(text.replace(now.strftime(form), (now + timedelta(days)).strftime(form)))
    if adds_bos(tokenizer):
        texts += [t.removeprefix(tokenizer.bos_token) for t in texts]
    return list(dict.fromkeys(texts))


def go_templates(tokenizer: Any, system: str | None) -> list[str | None]:
    """Return what to give Ollama as template, in the order to try; None leaves the choice to it. A named template's
    own comes first; a base's own template is left to Ollama, then tried with the named one that renders the same."""
    expected = prompt_cases(tokenizer, system)
    for name in NAMED_TEMPLATES:
        named = copy.copy(tokenizer)
        apply_named_template(named, name, name)
        if prompt_cases(named, system) == expected:
            go = _go_template(named, name)
            return [go] if named.chat_template == tokenizer.chat_template else [None, go]
    return [None]


def _go_template(tokenizer: Any, name: str) -> str:
    first = "false" if adds_bos(tokenizer) else "true"
    values = {"BOS": tokenizer.bos_token or "", "EOS": tokenizer.eos_token or "", "FIRST": first}
    return re.sub(r"\b(BOS|EOS|FIRST)\b", lambda match: values[match[0]], GO_TEMPLATES[name])
