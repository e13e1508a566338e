"""A LoRA adapter as a GGUF file, for a base that llama.cpp has already.

llama.cpp adds alpha / rank times B A, with one alpha for all layers. What PEFT scales by (rsLoRA's root of the rank, a
rank or alpha of a layer's own) and the strength that ships are multiplied into B, so that this gives the same.
"""

import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig

from tasks.core.errors import ExportError
from tasks.models.base import read_tensor_names

PREFIX, A, B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def write_adapter(
    base: Path,
    adapter: Path,
    merged: Path,
    converted: Path,
    out: Path,
    strength: float = 1.0,
    trust_remote_code: bool = False,
) -> None:
    """Write PEFT's LoRA folder `adapter` as a GGUF adapter with matrices in F16.

    `merged` is the folder of the base with it and `converted` the same in GGUF, unquantised: what became of each
    layer's name and of the order of its rows is found there, and so is the base's. Raises ExportError for what
    llama.cpp's adapters cannot hold."""
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    weights = load_file(adapter / "adapter_model.safetensors")
    layers = sorted(name.removesuffix(A).removeprefix(PREFIX) for name in weights if name.endswith(A))
    others = sorted(weights.keys() - {PREFIX + layer + half for layer in layers for half in (A, B)})
    config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code).get_text_config()
    if others:
        raise _refusal(f"this adapter has {others[0].removeprefix(PREFIX)}, which is no LoRA of a linear layer")
    if config.tie_word_embeddings and "lm_head" in layers:
        raise _refusal("this adapter changes lm_head, whose weights are the embedding's too in this base")
    architecture, names = read_tensor_names(converted)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(converted).tensors}
    before = _shards(merged)
    writer = gguf.GGUFWriter(out, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, settings["r"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    for layer in layers:
        a, b = (weights[PREFIX + layer + half].float() for half in (A, B))
        name = names.get_name(f"{layer}.weight", (".weight",))
        shard = before.get(f"{layer}.weight")
        order = None
        if name in tensors and shard:
            with safe_open(shard, "pt") as file:
                order = row_order(file.get_tensor(f"{layer}.weight"), tensors[name])
        if order is None:
            raise _refusal(f"the converter changed more of {layer} than its name and the order of its rows")
        scale = scale_of(layer, len(a), settings) * strength * len(a) / settings["r"]
        writer.add_tensor(f"{name}.lora_a", a.half().numpy())
        writer.add_tensor(f"{name}.lora_b", (b * scale).half().numpy()[order])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def scale_of(layer: str, rank: int, settings: dict[str, Any]) -> float:
    """Return what PEFT multiplies B A by in a layer, by its adapter_config.json."""
    alphas = settings.get("alpha_pattern") or {}
    alpha = alphas.get(get_pattern_key(list(alphas), layer), settings["lora_alpha"])
    return float(alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank))


def row_order(weight: torch.Tensor, tensor: Any) -> NDArray[np.int64] | None:
    """Return which row of `weight` each row of its tensor in GGUF is; None where these are not its rows."""
    ours = weight.to(TYPES[tensor.tensor_type.name]).contiguous().view(torch.uint8).numpy()
    theirs = np.ascontiguousarray(tensor.data).view(np.uint8).reshape(len(tensor.data), -1)
    if ours.shape != theirs.shape:
        return None
    if np.array_equal(ours, theirs):
        return np.arange(len(ours))
    places: dict[bytes, list[int]] = {}
    for place in reversed(range(len(ours))):
        places.setdefault(ours[place].tobytes(), []).append(place)
    order = []
    for row in theirs:
        left = places.get(row.tobytes())
        if not left:
            return None
        order.append(left.pop())
    return np.array(order)


def _shards(folder: Path) -> dict[str, Path]:
    """Return the safetensors file of each weight in a Hugging Face folder."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def _refusal(why: str) -> ExportError:
    return ExportError(
        f"No GGUF adapter can be written: {why}, and llama.cpp's adapters cannot hold it. "
        "Set export.adapter_gguf=false; the GGUF files of the merged model hold it all."
    )
