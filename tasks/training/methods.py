"""What is trained, by method: the base opened with its adapter, its parameters in groups, its files when done.

The loop around it is the trainer's. Merging and scoring what was trained is `tasks.models.load.load_shipped`.
"""

import contextlib
import difflib
import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    OFTConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.tuners.oft import OFTLayer
from peft.utils.other import ModulesToSaveWrapper, get_pattern_key
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D
from transformers.utils import is_flash_attn_2_available

from tasks.core.config import TrainConfig
from tasks.core.errors import ConfigError
from tasks.models.load import dtype_name, load_model, pick_dtype
from tasks.models.virtual_tokens import VirtualTokens

SETTINGS = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "chat_template*"),
    *("*.model", "*.tiktoken", "*.py"),
)
KINDS = {"oft": "OFT", "prefix": "PREFIX_TUNING", "prompt": "PROMPT_TUNING"}  # all others are LORA to PEFT
# What PEFT calls a setting: what a recipe calls it. An adapter that is trained on must agree in each.
SHAPE = {
    "r": "rank",
    "lora_alpha": "alpha",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "use_dora": "dora",
    "use_rslora": "rslora",
    "oft_block_size": "rank",
    "num_virtual_tokens": "virtual_tokens",
}

# --- opening ----------------------------------------------------------------------------------------------------------


def open_trainable(
    base: Path,
    config: TrainConfig,
    dtype: torch.dtype,
    device: str,
    trust_remote_code: bool,
    start_from: Path | None,
) -> Any:
    """Return the base with its untrained adapter, or with the adapter in `start_from`; for method full the base itself.

    What is trained is float32 whatever `dtype` the rest computes in: in bfloat16 the last, small updates would vanish.
    Seeds torch with config.seed. Raises ConfigError where config, base and `start_from` do not fit each other."""
    torch.manual_seed(config.seed)
    if config.method == "full":
        return _open_whole(base, dtype, device, trust_remote_code, start_from)
    quantised = {"nf4": config.method == "qlora", "int8": config.method == "int8"}
    model = load_model(base, dtype, device, trust_remote_code=trust_remote_code, **quantised)
    if device == "cuda" and config.fast_layers == "auto" and config.method not in ("prefix", "prompt"):
        _use_gpu_kernels(model, dtype)
    model = add_adapter(model, config)
    if start_from is not None:
        _resume(model, start_from)
    return model


def _use_gpu_kernels(model: Any, dtype: torch.dtype) -> None:
    """Let FlashAttention and Liger's kernels do what they can of this model, where they are installed. Both keep packed
    conversations apart by their positions. The loss stays ours: it reads the decoder's output."""
    if is_flash_attn_2_available() and dtype != torch.float32:
        with contextlib.suppress(ValueError, ImportError):  # not every model has it
            model.set_attn_implementation("flash_attention_2")
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model, fused_linear_cross_entropy=False)


def _open_whole(base: Path, dtype: torch.dtype, device: str, trust_remote_code: bool, start_from: Path | None) -> Any:
    if start_from is not None:
        if not (start_from / "config.json").is_file():
            raise ConfigError(
                f"train.start_from: {start_from} is not a whole model (it has no config.json), as method full needs. "
                "Name a folder that method full wrote, or the method of the adapter."
            )
        expected, found = (_shapes(folder, trust_remote_code) for folder in (base, start_from))
        if differing := sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n)):
            name = differing[0]
            raise ConfigError(
                f"train.start_from: {start_from} is another architecture than the base: {len(differing)} weights "
                f"differ, first {name}: {_shape(found.get(name))} there, {_shape(expected.get(name))} in the base. "
                "Set model.base to the model it was trained from."
            )
    model = load_model(start_from or base, torch.float32, device, trust_remote_code=trust_remote_code)
    model.requires_grad_(True)
    if dtype != torch.float32:
        model.forward = _in_precision(model.forward, device, dtype)
    return model


def _shapes(folder: Path, trust_remote_code: bool) -> dict[str, tuple[int, ...]]:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def _shape(shape: tuple[int, ...] | None) -> str:
    return " x ".join(map(str, shape)) if shape is not None else "absent"


def _in_precision(forward: Callable[..., Any], device: str, dtype: torch.dtype) -> Callable[..., Any]:
    """Return `forward` of float32 weights with its matrix products in `dtype`."""

    def run(*args: Any, **options: Any) -> Any:
        # Without autocast's cache: it is shared among threads, and packs run side by side.
        with torch.autocast(device.partition(":")[0], dtype, cache_enabled=False):
            return forward(*args, **options)

    return run


# --- adapters ---------------------------------------------------------------------------------------------------------


def add_adapter(model: Any, config: TrainConfig) -> Any:
    """Return the model with an untrained adapter. Raises ConfigError where names in the config match nothing in it."""
    if config.method in ("prefix", "prompt"):
        return _add_virtual_tokens(model, config)
    names = [name for name, _ in model.named_modules()]
    problems = _unmatched_targets(model, config.target_modules)
    whole = {name: [n for n in names if n == name or n.endswith(f".{name}")] for name in config.modules_to_save}
    for name in (name for name, found in whole.items() if not found):
        problems.append(f"train.modules_to_save {name!r} matches nothing in this model.{_hint([name], names)}")
    exact = [n for found in whole.values() for n in found]  # PEFT would take every module whose name ends so
    if packed := [n for n in exact if any(_is_quantised(p) for p in model.get_submodule(n).parameters())]:
        problems.append(
            f"train.modules_to_save {', '.join(packed)}: {config.method} holds these in few bits, which cannot be "
            "trained whole. Leave them to the adapter, or set train.method=lora."
        )
    if problems:
        raise ConfigError(problems)
    settings: Any = (
        OFTConfig(oft_block_size=config.rank, target_modules=config.target_modules, task_type="CAUSAL_LM")
        if config.method == "oft"
        else LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.lora_dropout,
            target_modules=config.target_modules,
            rank_pattern=dict(config.rank_pattern),
            alpha_pattern=dict(config.alpha_pattern),
            use_dora=config.dora,
            use_rslora=config.rslora,
            init_lora_weights="gaussian" if config.init == "gaussian" else True,
            task_type="CAUSAL_LM",
        )
    )
    settings.modules_to_save = exact or None
    try:
        tuned = get_peft_model(model, settings)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ConfigError(
            f"train.method {config.method} with train.target_modules {config.target_modules!r} does not fit this "
            f"model: {str(error).splitlines()[0]} Name other modules, or another method."
        ) from None
    _check_layers(tuned, config)
    for wrapper in (m for m in tuned.modules() if isinstance(m, ModulesToSaveWrapper)):
        _train_in_float32(wrapper.modules_to_save["default"], model.dtype, str(model.device))
    if config.init in ("pissa", "olora"):
        tuned.began_with = _move_into_adapter(tuned, config.init)
    return tuned


def _is_quantised(parameter: torch.nn.Parameter) -> bool:
    return not parameter.is_floating_point()


def _unmatched_targets(model: Any, targets: str | list[str]) -> list[str]:
    if targets == "all-linear":
        return []
    names = [name for name, _ in model.named_modules()]
    if isinstance(targets, str):
        try:
            found = any(re.fullmatch(targets, name) for name in names)
        except re.error as error:
            return [f"train.target_modules {targets!r} is not a valid regular expression: {error}. A list takes names."]
        missing = [] if found else [targets]
    else:
        missing = [t for t in targets if not any(n == t or n.endswith(f".{t}") for n in names)]
    if not missing:
        return []
    linear = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D)})
    return [
        f"train.target_modules {targets if isinstance(targets, str) else missing!r} match nothing in this model. "
        f"Its linear layers are: {', '.join(linear)}; all-linear takes them all.{_hint(missing, linear)}"
    ]


def _hint(missing: list[str], names: list[str]) -> str:
    ends = sorted({name.rpartition(".")[2] for name in names})
    near = sorted({n for name in missing for n in difflib.get_close_matches(name.rpartition(".")[2], ends, 2)})
    return f" Did you mean [{', '.join(near)}]?" if near else ""


def _check_layers(tuned: Any, config: TrainConfig) -> None:
    """Raise ConfigError where ranks fit no layer, or patterns match none."""
    layers = {n.removeprefix("base_model.model."): m for n, m in tuned.named_modules()}
    problems = []
    for option in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, option):
            adapted = [n for n, m in layers.items() if isinstance(m, LoraLayer)]
            if not any(get_pattern_key([key], n) == key for n in adapted):
                problems.append(
                    f"train.{option} {key!r} matches none of the adapter's layers.{_hint([key], adapted)} "
                    "Name the end of a module that train.target_modules takes."
                )
    for name, layer in layers.items():
        if isinstance(layer, OFTLayer) and layer.oft_block_size["default"] != config.rank:
            problems.append(
                f"train.rank {config.rank} is the side of the rotated blocks with method oft and must divide a layer's "
                f"inputs: {name} has {layer.in_features}. {layer.oft_block_size['default']} would fit it."
            )
        elif isinstance(layer, LoraLayer) and config.init in ("pissa", "olora"):
            most = min(int(layer.in_features or 0), int(layer.out_features or 0))
            # PEFT decomposes a transposed layer (GPT-2's Conv1D) as if it were not, for OLoRA.
            transposed = config.init == "olora" and getattr(layer, "fan_in_fan_out", False)
            if layer.r["default"] > most or transposed or "default" not in layer.lora_A:
                problems.append(
                    f"train.init {config.init} does not fit {name}: it needs a linear layer and a rank of at most "
                    f"{most}, found {type(layer.get_base_layer()).__name__} and {layer.r['default']}. "
                    "Set train.init=default."
                )
    if problems:
        raise ConfigError(problems[0])  # all layers of a kind would say the same


def _train_in_float32(module: Any, dtype: torch.dtype, device: str) -> None:
    """Let a module that is trained whole keep float32 weights, and compute and answer in `dtype` as before."""
    if dtype == torch.float32:
        return
    module.float()
    module.forward = _in_precision(module.forward, device, dtype)
    module.register_forward_hook(lambda m, args, out: out.to(dtype) if isinstance(out, torch.Tensor) else out)


def _move_into_adapter(tuned: Any, init: str) -> dict[str, torch.Tensor]:
    """Start LoRA from the base's own directions, take these out of the base, and return the matrices it starts with.

    PiSSA (arXiv 2404.02948): the largest singular ones, by a randomised decomposition, seconds instead of minutes for
    a large layer. OLoRA (arXiv 2406.01775): the first of a QR decomposition."""
    for layer in (m for m in tuned.modules() if isinstance(m, LoraLayer)):
        if init == "pissa":
            layer.pissa_init("default", "pissa_niter_16")
        else:
            layer.olora_init("default")
    weights = get_peft_model_state_dict(tuned, save_embedding_layers=False)
    return {name: w.detach().clone() for name, w in weights.items() if ".lora_A." in name or ".lora_B." in name}


def _add_virtual_tokens(model: Any, config: TrainConfig) -> Any:
    text = model.config.get_text_config()
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    limits = [getattr(text, "max_position_embeddings", None), window]
    if (most := min((limit for limit in limits if limit), default=None)) is not None:
        wanted = config.virtual_tokens + config.max_tokens
        if wanted > most:
            raise ConfigError(
                f"train.virtual_tokens ({config.virtual_tokens}) and train.max_tokens ({config.max_tokens}) make "
                f"{wanted} tokens, and this model sees {most} at most. Lower one of them."
            )
    sizes: dict[str, Any] = {"num_virtual_tokens": config.virtual_tokens, "task_type": "CAUSAL_LM"}
    # Words of the model's own: a random vector is far from every word, and training spends its steps coming back.
    words = torch.randint(text.vocab_size, (1, config.virtual_tokens), device=model.device)
    if config.method == "prompt":
        tuned: Any = VirtualTokens(model, PromptTuningConfig(**sizes))
        start = model.get_input_embeddings()(words)[0]
    else:
        tuned = VirtualTokens(model, PrefixTuningConfig(**sizes))
        with torch.no_grad():
            cache = model(input_ids=words, use_cache=True, logits_to_keep=1).past_key_values
        try:
            states = torch.stack([state[0] for layer in cache.layers for state in (layer.keys, layer.values)])
            start = states.permute(2, 0, 1, 3).flatten(1)  # (2 x layers, heads, tokens, size) as PEFT lays them out
        except (AttributeError, RuntimeError, TypeError):
            start = torch.empty(0)
    table = tuned.prompt_encoder["default"].embedding.weight
    if start.shape != table.shape:
        raise ConfigError(
            f"train.method {config.method} does not fit this model: its layers do not all keep keys and values of one "
            "shape. Use lora, or prompt."
        )
    table.data.copy_(start)
    model.requires_grad_(False)
    return tuned


def _resume(model: Any, folder: Path) -> None:
    """Load an adapter's weights into the untrained one of the same shape. Raises ConfigError where they differ."""
    where = f"train.start_from: {folder}"
    if not (folder / SETTINGS).is_file() or not (folder / WEIGHTS).is_file():
        what = (
            "it is a whole model: name it as model.base, or set train.method=full"
            if (folder / "config.json").is_file()
            else "name the folder that PEFT's save_pretrained wrote, or a run"
        )
        raise ConfigError(f"{where} is no adapter ({SETTINGS} and {WEIGHTS} are expected there); {what}.")
    found = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    wanted = model.peft_config["default"].to_dict()
    if found.get("peft_type") != wanted["peft_type"]:
        methods = [k for k, v in KINDS.items() if v == found.get("peft_type")] or ["lora, qlora or int8"]
        known = found.get("peft_type") in {*KINDS.values(), "LORA"}
        raise ConfigError(
            f"{where} is {found.get('peft_type')}, which does not go on as {wanted['peft_type'].value}. "
            + (f"Set train.method={methods[0]}." if known else "It is of a kind that cannot be trained here.")
        )
    differing = [key for key in SHAPE if key in wanted and key in found and found[key] != wanted[key]]
    if differing:
        raise ConfigError(
            [
                f"{where} has {SHAPE[key]} {found[key]!r}, and the recipe {wanted[key]!r}. "
                f"Set train.{SHAPE[key]}={json.dumps(found[key])}."
                for key in differing
            ]
        )
    weights = load_file(folder / WEIGHTS)
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    if differing := sorted(n for n in weights.keys() & expected.keys() if weights[n].shape != expected[n].shape):
        name = differing[0]
        raise ConfigError(
            f"{where} was made for another base: {len(differing)} of its weights have another shape, first {name}: "
            f"{_shape(tuple(weights[name].shape))} there, {_shape(tuple(expected[name].shape))} here. "
            "Set model.base to the model it was trained on."
        )
    if differing := sorted(weights.keys() ^ expected.keys()):
        name = differing[0]
        raise ConfigError(
            f"{where} adapts other layers than the recipe: {len(differing)} weights are only in one of both, first "
            f"{name} (only in the {'adapter' if name in weights else 'recipe'}). Set train.target_modules="
            f"{json.dumps(found.get('target_modules'))} and train.modules_to_save="
            f"{json.dumps(found.get('modules_to_save') or [])}, and model.base to the model it was trained on."
        )
    set_peft_model_state_dict(model, weights)


# --- training ---------------------------------------------------------------------------------------------------------


def parameter_groups(model: Any, config: TrainConfig) -> list[dict[str, Any]]:
    """Return what is trained as groups of params, lr_scale (times the learning rate) and weight_decay, in the model's
    order.

    LoRA+ (arXiv 2402.12354): B learns lora_plus_ratio times as fast as A. Vectors (norms, biases, DoRA's magnitudes) do
    not decay."""
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = config.lora_plus_ratio if ".lora_B." in name else 1.0
            decay = config.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((scale, decay), []).append(parameter)
    return [{"params": found, "lr_scale": s, "weight_decay": d} for (s, d), found in groups.items()]


# --- saving -----------------------------------------------------------------------------------------------------------


def save_trained(model: Any, config: TrainConfig, base: Path, out: Path) -> None:
    """Write PEFT's files to `out`, or for method full the whole model in the precision it was trained in.

    Equal trainings give equal bytes: no path, date or order of a set is in them. An adapter that took weights out of
    the base (pissa, olora) is written as a plain LoRA of twice the rank for the base as it was."""
    out.mkdir(parents=True, exist_ok=True)
    if config.method == "full":
        write_whole(model, pick_dtype(config.dtype), base, out)
        return
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    settings = model.peft_config["default"].to_dict()
    if began_with := getattr(model, "began_with", None):
        weights, settings = _as_plain_lora(model, weights, began_with, settings)
    write_adapter(weights, settings, out)


def write_whole(model: Any, dtype: torch.dtype, base: Path, out: Path) -> None:
    """Write a model's weights in `dtype`, its config and its base's tokenizer to `out`."""
    shared: dict[int, torch.Tensor] = {}  # tied weights stay one tensor
    for weight in model.state_dict().values():
        shared.setdefault(weight.data_ptr(), weight.to(dtype) if weight.is_floating_point() else weight)
    state = {name: shared[weight.data_ptr()] for name, weight in model.state_dict().items()}
    model.save_pretrained(out, state_dict=state)
    found = json.loads((out / "config.json").read_text(encoding="utf-8")) | {"dtype": dtype_name(dtype)}
    (out / "config.json").write_text(json.dumps(found, indent=2, sort_keys=True), encoding="utf-8")
    for file in sorted({f for pattern in TOKENIZER_FILES for f in base.glob(pattern) if f.is_file()}):
        shutil.copyfile(file, out / file.name)


def write_adapter(weights: dict[str, torch.Tensor], settings: dict[str, Any], out: Path) -> None:
    """Write an adapter's weights and settings to `out` as PEFT reads them."""
    settings |= {"base_model_name_or_path": None, "inference_mode": True}
    settings = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
    (out / SETTINGS).write_text(json.dumps(settings, indent=1, sort_keys=True), encoding="utf-8")
    own = {name: w.detach().to("cpu", copy=True).contiguous() for name, w in weights.items()}
    save_file(own, out / WEIGHTS, metadata={"format": "pt"})


def _as_plain_lora(
    model: Any, weights: dict[str, torch.Tensor], began_with: dict[str, torch.Tensor], settings: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return weights and settings of the LoRA that gives on the whole base what this one gives on its rest.

    The rest is W - s B0 A0, so W + s (B A - B0 A0) is the trained layer: [B, -B0] times [A; A0], twice the rank. The
    scale s goes into B, and alpha is the rank: rank and alpha patterns and rsLoRA need no sums of their own."""
    result = dict(weights)
    for name, layer in ((n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer)):
        a, b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        result[a] = torch.cat([weights[a], began_with[a]])
        result[b] = torch.cat([weights[b], -began_with[b]], 1) * layer.scaling["default"]
    ranks = {key: 2 * rank for key, rank in settings["rank_pattern"].items()}
    rank = 2 * settings["r"]
    return result, settings | {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "use_rslora": False,
    }
