"""The importance matrix: how much each input of a layer matters, so that quantising errs where it costs least.

What llama.cpp's own tool measures, in torch: the mean of the squared inputs of every linear layer inside the blocks of
the merged model, over rows of its training data. Layers that are no modules (fused experts) are not measured.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from transformers.pytorch_utils import Conv1D

from tasks.core.hardware import device_class
from tasks.models.base import read_tensor_names
from tasks.models.encode import read_examples
from tasks.models.load import free_memory, load_model, pick_dtype

CHUNKS, CHUNK_TOKENS, SEED = 64, 512, 0


@dataclass(frozen=True)
class ImportanceMatrix:
    """`squares` are sums of squared inputs, float32 (inputs,), over `counts` tokens, both by name in GGUF."""

    squares: dict[str, NDArray[np.float32]]
    counts: dict[str, int]
    tokens: int
    seconds: float


def measure_importance(
    model: Path, converted: Path, rows: Path, dtype: str, trust_remote_code: bool = False
) -> ImportanceMatrix:
    """Return the matrix of the Hugging Face folder `model`, which `converted` is in GGUF, over at most CHUNKS times
    CHUNK_TOKENS tokens of the sequences at `rows`, drawn by a fixed seed."""
    started = time.monotonic()
    _, names = read_tensor_names(converted)
    device = device_class()
    loaded = load_model(model, pick_dtype(dtype), device, trust_remote_code=trust_remote_code)
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}
    seen: list[torch.Tensor] = []  # the last input and its squares: layers side by side share both

    def watch(name: str, module: torch.nn.Module) -> None:
        def add(_: Any, arguments: tuple[torch.Tensor, ...]) -> None:
            inputs = arguments[0]
            if not seen or seen[0] is not inputs:
                seen[:] = inputs, inputs.flatten(0, -2).float().square().sum(0).double()
            sums[name] = sums[name] + seen[1] if name in sums else seen[1]
            counts[name] = counts.get(name, 0) + inputs[..., 0].numel()

        module.register_forward_pre_hook(add)

    for path, module in loaded.named_modules():
        name = names.get_name(f"{path}.weight", (".weight",))
        if name and name.startswith("blk.") and isinstance(module, torch.nn.Linear | Conv1D):
            watch(name, module)
    tokens = 0
    with torch.no_grad():
        for ids, positions in draw_chunks(rows):
            # Rows stay apart: positions that begin again are what transformers tells packed rows by.
            loaded.base_model(
                input_ids=torch.from_numpy(ids).to(device)[None],
                position_ids=torch.from_numpy(positions).to(device)[None],
                use_cache=False,
            )
            tokens += len(ids)
    del loaded
    free_memory()
    squares = {name: total.to("cpu", torch.float32).numpy() for name, total in sums.items()}
    return ImportanceMatrix(squares, counts, tokens, time.monotonic() - started)


def draw_chunks(rows: Path) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Return chunks of CHUNK_TOKENS tokens (the last may be shorter) of rows in a random order, laid end to end, each
    with its tokens' positions in their rows."""
    examples = read_examples(rows)
    ids: list[NDArray[np.int64]] = []
    positions: list[NDArray[np.int64]] = []
    wanted = CHUNKS * CHUNK_TOKENS
    for row in np.random.default_rng(SEED).permutation(len(examples)):
        if wanted <= 0:
            break
        start, stop = examples.starts[row : row + 2]
        ids.append(examples.ids[start : min(stop, start + wanted)].astype(np.int64))
        positions.append(np.arange(len(ids[-1])))
        wanted -= len(ids[-1])
    edges = range(CHUNK_TOKENS, sum(map(len, ids)), CHUNK_TOKENS)
    cut = (np.split(np.concatenate(parts), edges) for parts in (ids, positions))
    return list(zip(*cut, strict=True))


def write_importance(matrix: ImportanceMatrix, out: Path) -> None:
    """Write the matrix as llama.cpp's tools read it (their format in GGUF)."""
    writer = gguf.GGUFWriter(out, "")
    writer.add_type(gguf.GGUFType.IMATRIX)
    writer.add_array(gguf.Keys.IMatrix.DATASETS, ["training rows"])
    writer.add_uint32(gguf.Keys.IMatrix.CHUNK_COUNT, -(-matrix.tokens // CHUNK_TOKENS))
    writer.add_uint32(gguf.Keys.IMatrix.CHUNK_SIZE, CHUNK_TOKENS)
    for name in sorted(matrix.squares):
        writer.add_tensor(f"{name}.in_sum2", matrix.squares[name][None])
        writer.add_tensor(f"{name}.counts", np.array([[matrix.counts[name]]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
