"""The shipped model: the adapter merged into its base, saved as safetensors."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from tasks.export.distributions import (
    compare_distributions,
    next_log_probabilities,
    record_distributions,
    row_probes,
)
from tasks.models.load import dtype_name, load_model, load_shipped
from tasks.models.tokenizer import load_tokenizer, save_tokenizer

SHARD = "5GB"


def compare_merges(
    base: Path,
    adapter: Path,
    method: str,
    dtype: torch.dtype,
    device: str,
    tokens: Path,
    scratch: Path,
    on_progress: Callable[[int, int], None],
    trust_remote_code: bool,
) -> dict[str, Any]:
    """Return MergeChoice's fields: how near the model as trained, adapter on quantised base, is to its adapter merged
    into the quantised weights made plain again, and into those that they were made from."""
    plain = load_model(
        base, dtype, device, nf4=method == "qlora", int8=method == "int8", trust_remote_code=trust_remote_code
    )
    trained = PeftModel.from_pretrained(plain, str(adapter)).eval()
    recorded = record_distributions(trained, row_probes(tokens), scratch, on_progress)
    del trained, plain
    found = {}
    for onto, merged_as in (("quantised", method), ("full", "lora")):
        merged = load_shipped(base, adapter, merged_as, dtype, device, trust_remote_code)
        found[onto] = compare_distributions(recorded, partial(next_log_probabilities, merged))
        del merged
    return {
        "onto": min(found, key=lambda onto: found[onto].divergence),
        "divergence": {onto: likeness.divergence for onto, likeness in found.items()},
        "agreement": {onto: likeness.agreement for onto, likeness in found.items()},
        "places": found["full"].places,
    }


def write_merged(
    base: Path,
    adapter: Path | None,
    method: str,
    template: str,
    dtype: torch.dtype,
    out: Path,
    trust_remote_code: bool,
    strength: float = 1.0,
) -> dict[str, Any]:
    """Write the merged model and its tokenizer to `out` as a Hugging Face folder and return ModelRef's fields; with no
    adapter the base as the method trains on it.

    On the CPU: the merged weights must be those that were scored, and a GPU may be busy or too small."""
    model = load_shipped(base, adapter, method, dtype, "cpu", trust_remote_code, strength)
    model.save_pretrained(out, max_shard_size=SHARD)
    save_tokenizer(load_tokenizer(base, template, trust_remote_code), out)
    suit_older_readers(out)
    return {"dtype": dtype_name(dtype)}


def suit_older_readers(folder: Path) -> None:
    """Say in a model's folder what transformers 5 says elsewhere: before it, readers (transformers 4, and servers that
    convert) look for the chat template, the base of the rotary embedding and the precision in these places."""
    tokenizer = _read_json(folder / "tokenizer_config.json")
    if tokenizer:
        for name in ("backend", "is_local", "local_files_only"):
            tokenizer.pop(name, None)
        if tokenizer.get("tokenizer_class") == "TokenizersBackend":
            tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
        if (template := folder / "chat_template.jinja").is_file():
            tokenizer["chat_template"] = template.read_text(encoding="utf-8")
        _write_json(folder / "tokenizer_config.json", tokenizer)
    config = _read_json(folder / "config.json")
    if config:
        rope = config.get("rope_parameters") or {}
        if "rope_theta" in rope:
            config["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
        if "dtype" in config:
            config["torch_dtype"] = config["dtype"]
        _write_json(folder / "config.json", config)


def _read_json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
