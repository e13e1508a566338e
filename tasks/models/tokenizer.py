"""Tokenizers with a chat template, loaded without the model.

transformers' AutoTokenizer imports torch, which takes seconds: processes that only encode are sent a loaded tokenizer.
"""

import contextlib
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf

from tasks.core.errors import ModelError
from tasks.models.template import apply_named_template


def load_tokenizer(folder: Path, template: str | None, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer with a chat template, or as it is where `template` is None. Raises ModelError where there
    is no template, or no tokenizer."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:  # its words for files that are absent or odd
        raise ModelError(f"{folder} has no tokenizer that can be read: {str(error).splitlines()[0]}") from error
    if not tokenizer.is_fast:
        raise ModelError(f"The tokenizer in {folder} has no fast version, which label masks need (character offsets).")
    if template is not None:
        apply_named_template(tokenizer, template, str(folder))
    return tokenizer


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer as a Hugging Face folder. transformers 5 forgets `legacy`, by which Llama's puts a space after
    every special token or after none: read again, it gave other ids."""
    tokenizer.save_pretrained(folder)
    if (legacy := getattr(tokenizer, "legacy", None)) is not None:
        path = folder / "tokenizer_config.json"
        settings = json.loads(path.read_text(encoding="utf-8")) | {"legacy": legacy}
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def parse_gguf_once() -> Iterator[None]:
    """Let transformers parse a GGUF file's header once: it does so three times (4 s each for 49,152 tokens), and makes
    the same table of tensor names anew for every module (another 5 s)."""
    names = ("GGUFReader", "get_tensor_name_map")
    originals = {name: getattr(gguf, name) for name in names}
    for name, original in originals.items():
        setattr(gguf, name, functools.cache(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(gguf, name, original)


def write_gguf_tokenizer(path: Path, folder: Path) -> None:
    """Write a GGUF file's tokenizer as a Hugging Face folder, its weights unread. Raises ModelError."""
    from transformers import AutoTokenizer

    try:
        with parse_gguf_once():
            AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)
    except (ValueError, KeyError, IndexError, OSError, RuntimeError) as error:
        raise ModelError(f"{path} cannot be read as a GGUF model: {str(error).splitlines()[0]}") from error
