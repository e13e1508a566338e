"""Several adapters as one, by PEFT's add_weighted_adapter; or merged into their base one after the other.

What fits together is checked before (`tasks.core.combination`)."""

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch.nn.functional import pad
from transformers import AutoConfig, AutoModelForCausalLM

from tasks.core.combination import read_ranks
from tasks.core.config import CombineConfig
from tasks.core.errors import ConfigError
from tasks.models.load import load_shipped, merge_adapter
from tasks.training.methods import WEIGHTS, write_adapter, write_whole

NAME = "combined"


def combine_adapters(
    base: Path, shares: list[tuple[Path, float]], config: CombineConfig, out: Path, trust_remote_code: bool
) -> int:
    """Write to `out` the LoRA that `config.method` makes of the adapters in the folders, each times its share, and
    return its rank. Raises ConfigError where PEFT cannot.

    The same call gives the same bytes: dare leaves out entries by config.seed. A linear of shares s, scales c and
    factors A, B is (sum of sqrt(s c) B) (sum of sqrt(s c) A), which also multiplies factors of different adapters; cat
    is the sum of s c B A."""
    model = _weightless(base, trust_remote_code)
    names = [f"part_{i}" for i in range(len(shares))]  # a number alone would be taken for a layer's
    tuned: Any = None
    for name, (folder, _) in zip(names, shares, strict=True):
        settings = LoraConfig.from_pretrained(str(folder))
        if isinstance(settings.target_modules, str):  # PEFT joins no pattern with a list
            settings.target_modules = set(read_ranks(folder))
        if tuned is None:
            tuned = PeftModel(model, settings, name)
        else:
            tuned.add_adapter(name, settings)
        set_peft_model_state_dict(tuned, load_file(folder / WEIGHTS), name)
    # Each layer's scale goes into the factors; with the first's rsLoRA PEFT (0.21) would scale the result once more.
    tuned.peft_config[names[0]].use_rslora = False
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The density .* no pruning will be performed")
        torch.manual_seed(config.seed)
        try:
            tuned.add_weighted_adapter(
                names,
                [share for _, share in shares],
                NAME,
                combination_type=config.method,
                svd_rank=config.rank,
                svd_full_matrices=False,
                density=config.kept_share,
            )
        except ValueError as error:
            raise ConfigError(f"PEFT cannot combine these adapters by {config.method}: {error}") from None
    settings = tuned.peft_config[NAME]
    weights = get_peft_model_state_dict(tuned, adapter_name=NAME, save_embedding_layers=False)
    write_adapter({n: _padded(n, w, settings.r) for n, w in weights.items()}, settings.to_dict(), out)
    return int(settings.r)


def _weightless(base: Path, trust_remote_code: bool) -> Any:
    """Return the base with its shapes and no memory for its weights: each is one number, seen everywhere."""
    settings = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings, trust_remote_code=trust_remote_code, dtype=torch.float32)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(torch.zeros(()).expand(parameter.shape), requires_grad=False))
    return model


def _padded(name: str, factor: torch.Tensor, rank: int) -> torch.Tensor:
    """Return A of shape (rank, inputs) or B of shape (outputs, rank), with zeros where PEFT left it of a lower rank
    than its settings say: a layer smaller than the rank, or one that a rank pattern made so."""
    is_a = ".lora_A." in name or ".lora_embedding_A" in name
    missing = rank - factor.shape[0 if is_a else 1]
    return pad(factor, (0, 0, 0, missing) if is_a else (0, missing))


def merge_in_sequence(
    base: Path,
    shares: list[tuple[Path, float]],
    method: str,
    dtype: torch.dtype,
    out: Path,
    trust_remote_code: bool,
) -> None:
    """Write to `out` the whole model that adapters make which are merged into the base one after the other, each its
    share of the way. For qlora and int8 it begins at the base as they were trained on it, dequantised.

    Merges are in float32 and rounded to `dtype` once, at the end."""
    model = load_shipped(base, None, method, dtype, "cpu", trust_remote_code).float()
    for folder, share in shares:
        begun = {}
        if share != 1:  # else no second copy of the weights is needed
            begun = {name: w.clone() for name, w in model.named_parameters(remove_duplicate=False)}
        model = merge_adapter(model, folder)
        with torch.no_grad():
            for name, weight in model.named_parameters() if begun else ():
                weight.copy_(begun[name].lerp(weight, share))
    write_whole(model, dtype, base, out)
