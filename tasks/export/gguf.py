"""GGUF: converted by llama.cpp's own converter, quantised and tried by llama.cpp itself.

llama.cpp's messages are kept and shown only where it fails."""

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.core.errors import ExportError
from tasks.models.llama import quiet_llama

if TYPE_CHECKING:
    from tasks.export.imatrix import ImportanceMatrix


@dataclass(frozen=True)
class Sample:
    """What a model answered, and whether it ended its turn itself rather than at the token limit."""

    text: str
    stopped: bool


def pick_source(quantisations: list[str], dtype: str) -> str:
    """Return which of f32, f16 and bf16 all other files are made from, for merged weights in `dtype`: of those asked
    for the one that keeps most of them, else the one of 16 bits that does."""
    order = ["f32", "bf16", "f16"] if dtype == "bfloat16" else ["f32", "f16", "bf16"]
    return next((found for found in order if found in quantisations), order[1])


def convert_to_gguf(model: Path, out: Path, kind: str = "f16", trust_remote_code: bool = False) -> None:
    """Write the Hugging Face folder `model` as a GGUF file, in f32, f16 or bf16 as `kind` says. Raises ExportError
    with the converter's words."""
    from tasks.export.converter import convert

    try:
        convert(model, out, kind, trust_remote_code)
    except Exception as error:  # the converter's own, of any kind, each for a model that it does not know
        out.unlink(missing_ok=True)
        why = f"{type(error).__name__}: {error}".removeprefix("NotImplementedError: ").rstrip(".")
        raise ExportError(
            f"Converting the merged model to GGUF failed: {why}. "
            "The merged safetensors are in the store; llama.cpp may not know this architecture or tokenizer."
        ) from error


def quantise_gguf(source: Path, out: Path, quantisation: str, matrix: "ImportanceMatrix | None" = None) -> None:
    """Write `source`, in f32, f16 or bf16, as `out` in a quantisation by its name in the config. Raises ExportError."""
    import llama_cpp

    number = f"LLAMA_FTYPE_{'ALL' if quantisation == 'f32' else 'MOSTLY'}_{quantisation.upper()}"
    if not hasattr(llama_cpp, number):
        raise ExportError(f"This version of llama-cpp-python does not know {quantisation}. Update it.")
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, number)
    means = {name: squares / matrix.counts[name] for name, squares in matrix.squares.items()} if matrix else {}
    entries = (llama_cpp.llama_model_imatrix_data * (len(means) + 1))()  # the last has no name: the end
    for entry, (name, mean) in zip(entries, means.items(), strict=False):
        entry.name, entry.size = name.encode(), mean.size
        entry.data = mean.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    if means:
        parameters.imatrix = entries
    with quiet_llama() as messages:
        code = llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(parameters))
    if code != 0 or not out.is_file():
        out.unlink(missing_ok=True)
        why = messages[-1].rpartition("failed to quantize: ")[2].rstrip(".!") if messages else f"code {code}"
        raise ExportError(f"Quantising {source.name} to {quantisation} failed: {why}.")


def generate_sample(path: Path, prompt: str, system: str | None, max_tokens: int = 48) -> Sample:
    """Return the model's greedy answer to `prompt`, rendered by the GGUF's own chat template."""
    import llama_cpp

    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    with quiet_llama() as notes:
        try:
            model = llama_cpp.Llama(str(path), n_ctx=2048, verbose=False)
            answer = model.create_chat_completion(messages=messages, temperature=0.0, seed=0, max_tokens=max_tokens)  # type: ignore[arg-type]
        except (ValueError, RuntimeError, OSError) as error:
            raise ExportError(f"{path.name} cannot be run: {error} {notes[-1] if notes else ''}".strip()) from error
    choice = answer["choices"][0]  # type: ignore[index]
    model.close()
    return Sample(str(choice["message"]["content"] or "").strip(), choice["finish_reason"] == "stop")
