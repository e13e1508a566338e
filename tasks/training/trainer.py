"""Training an adapter: LoRA or QLoRA on packed conversations, loss on the assistant's turns alone.

The whole story is in `train_adapter`; it knows nothing of the store, of Prefect or of scoring.
"""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy

from tasks.core.config import TrainConfig
from tasks.core.errors import ConfigError, ForgetlessError
from tasks.core.hardware import device_class
from tasks.core.records import TrainPoint
from tasks.models.encode import Examples, read_examples
from tasks.models.load import dtype_name, free_memory, load_model, pick_dtype
from tasks.models.parallel import map_parallel
from tasks.models.template import Example
from tasks.training.packing import Pack, pack_examples, plan_steps

OnStep = Callable[[int, int, TrainPoint], None]


def train_adapter(
    base: Path, tokens: Path, config: TrainConfig, out: Path, on_step: OnStep, trust_remote_code: bool
) -> dict[str, Any]:
    """Train an adapter on the sequences in `tokens`, write it to `out` in PEFT's format and return AdapterRef's fields.

    `on_step(step, steps, point)` is called after every optimizer step. Losses are in nats per supervised token.
    Raises ForgetlessError where the loss stops being a number."""
    started = time.monotonic()
    device = device_class()
    dtype = pick_dtype(config.dtype)
    examples, held_out = (_examples(read_examples(tokens / split)) for split in ("train", "validation"))
    steps = plan_steps(examples, config.pack_tokens, config.step_tokens, config.epochs, config.max_steps, config.seed)
    validation = pack_examples(held_out, config.pack_tokens)

    torch.manual_seed(config.seed)  # LoRA's A matrices and dropout
    model = load_model(base, dtype, device, nf4=config.method == "qlora", trust_remote_code=trust_remote_code)
    model = add_adapter(model, config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)

    # Threads would draw their dropout from one generator in any order, and the run could not be repeated.
    side_by_side = map if config.lora_dropout else map_parallel

    def gradients_of(pack: Pack) -> tuple[float, tuple[torch.Tensor, ...]]:
        loss = summed_loss(model, pack, device)
        return loss.item(), torch.autograd.grad(scaler.scale(loss), parameters)

    curve = [TrainPoint(step=0, validation_loss=mean_loss(model, validation, device))]
    every = config.validate_every or max(1, math.ceil(len(steps) / 10))
    seen = supervised = 0
    for number, packs in enumerate(steps, start=1):
        began = time.monotonic()
        rate = config.learning_rate * schedule(number, len(steps), config.schedule, config.warmup_share)
        for group in optimizer.param_groups:
            group["lr"] = rate
        labels = sum(pack.supervised for pack in packs)
        model.train()
        loss = 0.0
        for part, gradients in side_by_side(gradients_of, packs):
            # Divided by the whole step's labels: the same gradient however the step is cut into packs.
            loss += part / max(1, labels)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                gradient = gradient / max(1, labels)
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        scaler.unscale_(optimizer)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm))
        if not math.isfinite(loss) or not (math.isfinite(norm) or scaler.is_enabled()):
            raise ForgetlessError(
                f"Training stopped at step {number} of {len(steps)}: the loss is {loss}. Lower train.learning_rate "
                f"(now {config.learning_rate:g}) and run again."
            )
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if device == "cpu":  # packs of ever other lengths fragment its heap, which else grows by 0.3 GB a step
            free_memory()
        step_tokens = sum(pack.tokens for pack in packs)
        seen, supervised = seen + step_tokens, supervised + labels
        seconds = time.monotonic() - began
        due = number % every == 0 or number == len(steps)
        point = TrainPoint(
            step=number,
            loss=loss,
            learning_rate=rate,
            grad_norm=norm if math.isfinite(norm) else None,  # float16 overflows while its scale is found
            tokens_per_second=step_tokens / seconds,
            validation_loss=mean_loss(model, validation, device) if due else None,
        )
        curve.append(point)
        on_step(number, len(steps), point)

    model.save_pretrained(out, safe_serialization=True)
    # What differs from run to run or machine to machine stays out of the files: equal trainings have equal digests.
    (out / "curve.jsonl").write_text(
        "".join(p.model_dump_json(exclude={"tokens_per_second"}) + "\n" for p in curve), encoding="utf-8"
    )
    settings = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = None
    (out / "adapter_config.json").write_text(json.dumps(settings, indent=1, sort_keys=True), encoding="utf-8")
    (out / "README.md").unlink(missing_ok=True)  # PEFT's empty card; the run's own card says what this is
    return {
        "method": config.method,
        "trainable_parameters": sum(p.numel() for p in parameters),
        "steps": len(steps),
        "tokens": seen,
        "supervised_tokens": supervised,
        "seconds": time.monotonic() - started,
        "dtype": dtype_name(dtype),
        "first_validation_loss": curve[0].validation_loss,
        "last_validation_loss": curve[-1].validation_loss,
        "curve": [p.model_dump() for p in curve],
    }


def add_adapter(model: Any, config: TrainConfig) -> Any:
    """Return the model with an untrained LoRA adapter. Raises ConfigError where target_modules match nothing."""
    settings = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.target_modules,
        task_type="CAUSAL_LM",
    )
    try:
        # PEFT keeps the adapter in float32 under a bfloat16 base: in bfloat16 the last, small updates would vanish.
        return get_peft_model(model, settings)
    except ValueError as error:
        if "arget modules" not in str(error):
            raise
        names = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)})
        raise ConfigError(
            f"train.target_modules {config.target_modules!r} match nothing in this model. "
            f"Its linear layers are: {', '.join(names)}; all-linear takes them all."
        ) from None


def summed_loss(model: Any, pack: Pack, device: str) -> torch.Tensor:
    """Return the cross-entropy of a pack's labels, summed, in nats."""
    # No attention mask and no cache: positions that restart at 0 then keep the examples apart on any attention.
    logits = model(
        input_ids=pack.ids.to(device),
        position_ids=pack.positions.to(device),
        use_cache=False,
        logits_to_keep=pack.kept.to(device),
    ).logits
    return cross_entropy(logits[0].float(), pack.labels.to(device), reduction="sum")


def mean_loss(model: Any, packs: list[Pack], device: str) -> float:
    """Return the mean loss per supervised token, without dropout."""
    model.eval()
    total = sum(map_parallel(lambda pack: _loss_without_graph(model, pack, device), packs))
    return total / max(1, sum(pack.supervised for pack in packs))


@torch.no_grad()  # per thread: a worker does not inherit it
def _loss_without_graph(model: Any, pack: Pack, device: str) -> float:
    return summed_loss(model, pack, device).item()


def schedule(step: int, steps: int, name: str, warmup_share: float) -> float:
    """Return the share of the full learning rate at `step` (from 1): linear warm-up, then down to zero or constant."""
    warmup = math.ceil(warmup_share * steps)
    if step <= warmup:
        return step / warmup
    if name == "constant":
        return 1.0
    done = (step - warmup - 1) / max(1, steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * done)) if name == "cosine" else 1 - done


def _examples(found: Examples) -> list[Example]:
    """Return the sequences one by one, each as often as an epoch sees it."""
    return [found.example(i) for i in range(len(found)) for _ in range(found.times[i])]
