"""Tokenizers with a chat template, loaded without the model.

transformers' AutoTokenizer imports torch, which takes seconds: processes that only encode are sent a loaded tokenizer.
"""

from pathlib import Path
from typing import Any

from tasks.core.errors import ModelError
from tasks.models.template import apply_named_template


def load_tokenizer(folder: Path, template: str, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer with a chat template. Raises ModelError where there is none."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if not tokenizer.is_fast:
        raise ModelError(f"The tokenizer in {folder} has no fast version, which label masks need (character offsets).")
    apply_named_template(tokenizer, template, str(folder))
    return tokenizer
