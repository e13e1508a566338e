"""What Ollama takes as a model's name and parameters, so that a recipe is checked long before a server is asked."""

import difflib
import math
import re
from collections.abc import Mapping
from typing import Any

# Ollama's own options and their types. The server checks neither: a wrong type is stored, and then every request to the
# model fails with HTTP 500.
PARAMETERS: dict[str, type] = {
    "draft_num_predict": int,
    "frequency_penalty": float,
    "main_gpu": int,
    "min_p": float,
    "num_batch": int,
    "num_ctx": int,
    "num_gpu": int,
    "num_keep": int,
    "num_predict": int,
    "num_thread": int,
    "presence_penalty": float,
    "repeat_last_n": int,
    "repeat_penalty": float,
    "seed": int,
    "stop": list,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "typical_p": float,
    "use_mmap": bool,
}
_EXPECTED = {int: "a whole number", float: "a number", bool: "true or false", list: "a text or a list of texts"}

_HOST = r"\w[\w.:-]{0,349}"
_NAMESPACE = r"\w[\w-]{0,79}"
_PART = r"\w[\w.-]{0,79}"
_NAME = re.compile(rf"(?:(?:{_HOST}/)?{_NAMESPACE}/)?{_PART}(?::(?P<tag>{_PART}))?", re.ASCII)


def name_problem(name: str) -> str | None:
    """Return why Ollama does not take `name` for a model ([[host/]namespace/]model[:tag]), or None where it does."""
    match = _NAME.fullmatch(name)
    if match is None:
        return (
            f"Ollama refuses the model name {name!r}: expected [namespace/]model[:tag], each part at most 80 ASCII "
            "letters, digits, '_', '-' and '.' (no '.' in the namespace) and not starting with '-' or '.'."
        )
    tag = (match["tag"] or "").lower()
    if tag in ("cloud", "local") or tag.endswith("-cloud"):
        # Newer versions cut these off when a model is used: x:cloud is asked for at ollama.com, x:local is x:latest.
        return (
            f"The model name {name!r} cannot be used: Ollama keeps the tags cloud, local and those ending in -cloud "
            "for itself."
        )
    return None


def is_alias(tag: str) -> bool:
    """Return whether `tag` can be an alias: Ollama takes it for a tag, and it is no version's, 8 hexadecimal digits."""
    if not re.fullmatch(_PART, tag, re.ASCII):
        return False
    return name_problem(f"model:{tag}") is None and not re.fullmatch("[0-9a-f]{8}", tag.lower())


def parameter_problems(parameters: Mapping[str, Any]) -> list[str]:
    """Return a sentence for every unknown name, with the nearest known ones, and every value of the wrong type."""
    problems = []
    for name, value in parameters.items():
        kind = PARAMETERS.get(name)
        if kind is None:
            near = difflib.get_close_matches(name, PARAMETERS, 3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"it knows {', '.join(PARAMETERS)}."
            problems.append(f"Ollama has no parameter {name!r}; {hint}")
        elif kind is list and isinstance(value, str | list):
            texts = [value] if isinstance(value, str) else value
            if not texts or not all(isinstance(text, str) and text for text in texts):
                problems.append(f"Ollama's parameter {name!r} must be texts that are not empty; found {value!r}.")
        elif not _is_number(value, kind):
            problems.append(f"Ollama's parameter {name!r} must be {_EXPECTED[kind]}; found {value!r}.")
    return problems


def _is_number(value: Any, kind: type) -> bool:
    """Return whether `value` is of `kind` (int, float or bool). Python counts a bool as an int, Ollama does not."""
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    if kind is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, int) and kind is int
