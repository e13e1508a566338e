"""The scoring backend as one of lm-eval's own models: `forgetless lm-eval --model forgetless`."""

from pathlib import Path
from typing import Any

from lm_eval.api.registry import register_model
from transformers import AutoTokenizer

from tasks.core.errors import ConfigError
from tasks.core.hardware import device_class
from tasks.evaluation.prefix_lm import SharedPrefixLM
from tasks.models.load import load_shipped, pick_dtype


@register_model("forgetless")
class ForgetlessLM(SharedPrefixLM):
    """`pretrained` is a folder or a Hub id, `peft` an adapter's folder, `method` how that was trained, `row_tokens` of
    a forward pass. lm-eval's batch sizes do nothing here."""

    def __init__(
        self,
        pretrained: str,
        dtype: str = "auto",
        peft: str | None = None,
        method: str = "lora",
        device: str | None = None,
        row_tokens: int | None = None,
        trust_remote_code: bool = False,
        batch_size: Any = None,
        max_batch_size: Any = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise ConfigError(
                f"--model forgetless has no {', '.join(unknown)}; it takes pretrained, dtype, peft, method, device, "
                "row_tokens and trust_remote_code."
            )
        where: Any = pretrained  # a Hub id is no path, but transformers takes either
        model = load_shipped(
            where,
            Path(peft) if peft else None,
            method,
            pick_dtype(str(dtype)),
            device if device == "cpu" or (device and device_class() == "cuda") else device_class(),  # it says cuda:0
            trust_remote_code,
        )
        tokenizer = AutoTokenizer.from_pretrained(pretrained, trust_remote_code=trust_remote_code)
        super().__init__(model, tokenizer, row_tokens, lambda done, total: None)
