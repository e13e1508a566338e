"""Scoring by vLLM, through lm-eval's own class for it. Written for a GPU and never run by us."""

from importlib import util
from pathlib import Path
from typing import Any

from tasks.core.errors import ConfigError
from tasks.core.hardware import device_class
from tasks.models.tokenizer import save_tokenizer

MEMORY_SHARE = 0.85  # of the GPU


def check_vllm() -> None:
    """Raise ConfigError where vLLM cannot score here."""
    missing = [
        what
        for what, there in (("a GPU", device_class() == "cuda"), ("the package vllm", util.find_spec("vllm")))
        if not there
    ]
    if missing:
        raise ConfigError(f"eval.backend: vllm needs {' and '.join(missing)}, absent here. Leave the key out.")


def open_vllm(model: Any, tokenizer: Any, folder: Path) -> Any:
    """Return lm-eval's vLLM model of merged weights, which are written to `folder` for it."""
    from lm_eval.models.vllm_causallms import VLLM

    check_vllm()
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    model.to("cpu")
    return VLLM(
        pretrained=str(folder),
        dtype=str(model.dtype).removeprefix("torch."),
        batch_size="auto",
        gpu_memory_utilization=MEMORY_SHARE,
    )
