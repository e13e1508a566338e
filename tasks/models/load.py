"""Models in memory: loaded in the precision this device does well, quantised for training, merged as shipped."""

import contextlib
import ctypes
import gc
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GgufConfig

from tasks.core.config import ModelConfig
from tasks.core.errors import ModelError
from tasks.core.hardware import resolve_dtype
from tasks.models.tokenizer import load_tokenizer, parse_gguf_once
from tasks.models.virtual_tokens import VirtualTokens

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
warnings.filterwarnings("ignore", message=r".*is_gradient_checkpointing.*")
gc.freeze()  # a million objects of the libraries, which stay: looking through them took 0.3 s at every collection


def pick_dtype(wanted: str) -> torch.dtype:
    """Return the torch type of a precision by name; auto is what this device does well."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[resolve_dtype(wanted)]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dequantise_gguf(path: Path, folder: Path) -> None:
    """Write a GGUF file's model and tokenizer as a Hugging Face folder in float32, which holds every value exactly."""
    try:
        with parse_gguf_once():
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            model: Any = AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
            )
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        raise ModelError(f"{path} cannot be read as a GGUF model: {str(error).splitlines()[0]}") from error
    # Else save_pretrained writes a config that asks for the GGUF quantiser again.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def describe_model(folder: Path, config: ModelConfig) -> dict[str, Any]:
    """Return the parameter count and context length, read without loading weights; checks the chat template."""
    load_tokenizer(folder, config.template.value, config.trust_remote_code)
    model_config = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=config.trust_remote_code)
    return {"parameters": model.num_parameters(), "max_tokens": int(model_config.max_position_embeddings)}


def load_model(
    folder: Path,
    dtype: torch.dtype,
    device: str,
    nf4: bool = False,
    trust_remote_code: bool = False,
    int8: bool = False,
) -> Any:
    """Return the model in `dtype`, in eval mode; its linear layers with `nf4` in 4-bit NF4 with double quantisation,
    with `int8` in 8 bits (LLM.int8, arXiv 2208.07339)."""
    options: dict[str, Any] = {}
    if int8:
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    if nf4:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        device_map={"": device},
        trust_remote_code=trust_remote_code,
        use_safetensors=True,
        **options,
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes would repack the weights at the first evaluation for a kernel that has no gradient.
            module.support_avx512bf16_for_cpu = False
        if hasattr(module, "init_8bit_state"):
            # Else the first forward does it; two threads in it at once can lose the scales and quantise again.
            module.init_8bit_state()
    return model.eval()


def load_shipped(
    folder: Path,
    adapter: Path | None,
    method: str,
    dtype: torch.dtype,
    device: str,
    trust_remote_code: bool = False,
    strength: float = 1.0,
) -> Any:
    """Return the model exactly as it will be shipped: the adapter merged, for qlora and int8 into the *dequantised*
    base; for full the trained weights; for prefix and prompt, which cannot be merged, base and adapter. With another
    `strength` than 1 every weight stands that far on its way from the base to the trained one.

    Merging into the 16-bit base instead would ship a model that was never trained (NF4: mean KL 1.4 against 0.001).
    With int8 it hardly matters (0.09 against 0.08; back into int8 0.5): LLM.int8 also rounds what goes into a layer,
    which no weights can repeat."""
    if adapter is not None and strength != 1:
        plain = load_shipped(folder, None, method, dtype, "cpu", trust_remote_code)
        model = load_shipped(folder, adapter, method, dtype, "cpu", trust_remote_code)
        begun = dict(plain.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.copy_(begun[name].float().lerp(weight.float(), strength))
        return model.to(device)
    # On the CPU first, also where a GPU scores it: the merge then writes these very weights again.
    if method == "full" and adapter is not None:
        return load_model(adapter, dtype, "cpu", trust_remote_code=trust_remote_code).to(device)
    quantised = {"nf4": method == "qlora", "int8": method == "int8"}
    model = load_model(folder, dtype, "cpu", trust_remote_code=trust_remote_code, **quantised)
    if any(quantised.values()):
        dequantise(model, dtype)
    if adapter is None:
        return model.to(device)
    if not (adapter / "adapter_model.safetensors").is_file():  # PEFT would take a pickle instead
        raise ModelError(f"{adapter} has no adapter_model.safetensors; nothing else is read as an adapter.")
    settings = PeftConfig.from_pretrained(str(adapter))
    if settings.is_prompt_learning:
        tuned: Any = VirtualTokens(model, settings)
        tuned.load_adapter(str(adapter), "default")
    else:
        tuned = merge_adapter(model, adapter)
    return tuned.eval().to(device)


def merge_adapter(model: Any, adapter: Path) -> Any:
    """Return the model with an adapter merged into its weights, which change in place."""
    tuned = PeftModel.from_pretrained(model, str(adapter))
    untie_embeddings(tuned)
    return tuned.merge_and_unload(safe_merge=True)


def untie_embeddings(model: Any) -> None:
    """Give a PEFT model's output layer weights of its own where it shares them with its input and one was trained:
    merging would change both, and a saved model would lose one."""
    base = model.get_base_model()
    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    if not base.config.get_text_config().tie_word_embeddings or not any(
        isinstance(end, BaseTunerLayer | AuxiliaryTrainingWrapper) for end in ends
    ):
        return
    output = ends[1]
    for inner in ("original_module", "base_layer"):
        output = getattr(output, inner, output)
    output.weight = torch.nn.Parameter(output.weight.detach().clone(), requires_grad=False)
    for config in (base.config, base.config.get_text_config()):
        config.tie_word_embeddings = False
    base.all_tied_weights_keys = {}


def dequantise(model: Any, dtype: torch.dtype) -> None:
    """Replace, in place, every 4- and 8-bit layer by a plain one that holds the values it was trained with."""
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    layers: list[tuple[str, Any]] = list(model.named_modules())
    for name, module in layers:
        if isinstance(module, Linear4bit):
            packed: Any = module.weight
            weight = dequantize_4bit(packed.data, packed.quant_state).to(dtype)
        elif isinstance(module, Linear8bitLt):
            state: Any = module.state
            weight = int8_vectorwise_dequant(state.CB, state.SCB).to(dtype)
        else:
            continue
        plain = torch.nn.Linear(module.in_features, module.out_features, bias=False, dtype=dtype, device=weight.device)
        plain.weight = torch.nn.Parameter(weight, requires_grad=False)
        plain.bias = module.bias
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, plain)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized, model.is_loaded_in_4bit, model.is_loaded_in_8bit = None, False, False, False


def free_memory() -> None:
    """Give back what a finished stage held, so that the next one starts from an empty machine."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    else:
        with contextlib.suppress(OSError, AttributeError):  # glibc only; elsewhere the allocator decides
            ctypes.CDLL("libc.so.6").malloc_trim(0)
