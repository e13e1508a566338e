"""The shipped model: the adapter merged into its base, saved as safetensors."""

from pathlib import Path
from typing import Any

import torch

from tasks.models.load import dtype_name, load_shipped
from tasks.models.tokenizer import load_tokenizer


def write_merged(
    base: Path,
    adapter: Path,
    method: str,
    template: str,
    dtype: torch.dtype,
    out: Path,
    trust_remote_code: bool,
    strength: float = 1.0,
) -> dict[str, Any]:
    """Write the merged model and its tokenizer to `out` as a Hugging Face folder and return ModelRef's fields.

    On the CPU: the merged weights must be those that were scored, and a GPU may be busy or too small."""
    model = load_shipped(base, adapter, method, dtype, "cpu", trust_remote_code, strength)
    model.save_pretrained(out, safe_serialization=True)
    load_tokenizer(base, template, trust_remote_code).save_pretrained(out)
    return {"dtype": dtype_name(dtype)}
