"""Training an adapter on packed conversations, with the loss on the assistant's turns alone.

The whole story is in `train_adapter`: it resumes, watches the validation loss, survives a lack of memory and stops when
it should. It knows nothing of the store, of Prefect or of scoring, and runs in a process of its own (worker.py).
"""

import contextlib
import json
import math
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from tasks.core.config import TrainConfig
from tasks.core.errors import DataError, ForgetlessError
from tasks.core.hardware import describe_machine, device_class, memory_bytes
from tasks.core.records import SNAPSHOTS, TrainPoint
from tasks.models.cpu_attention import PackPlan
from tasks.models.encode import Examples, read_examples
from tasks.models.load import dtype_name, free_memory, pick_dtype
from tasks.models.parallel import map_parallel
from tasks.models.products import frozen_head
from tasks.models.template import Example
from tasks.models.tokenizer import load_tokenizer
from tasks.training.checkpoints import (
    Progress,
    check_space,
    drop_others,
    leave_copy,
    load_best,
    load_checkpoint,
    name_best,
    save_checkpoint,
)
from tasks.training.chunked_loss import chunked_loss
from tasks.training.curve import explain_onset, find_onset, runs_away
from tasks.training.methods import open_trainable, parameter_groups, save_trained
from tasks.training.packing import Pack, count_labels, make_pack, pack_examples, plan_steps
from tasks.training.shared import LAST
from tasks.training.team import Team

OnStep = Callable[[int, int, TrainPoint], None]
RETENTION_TEXTS = 64
CHECKED_ROWS = 2
EQUAL_LOSS = {torch.float32: 1e-3}  # nats a token; in 16 bits the sums of another order differ by more
EQUAL_LOSS_16 = 0.05
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory")
DECAY_SHARE = 0.2  # of the steps, at the end of wsd


class Interrupted(Exception):
    """The process was asked to end; a checkpoint was written."""


@dataclass(frozen=True)
class Places:
    """Folders of a training: the base, the token sequences, where the adapter goes, where checkpoints are kept, the
    adapter to go on from, and where a copy of each checkpoint is left for whoever brings it to the store."""

    base: Path
    tokens: Path
    out: Path
    checkpoints: Path
    start_from: Path | None = None
    outgoing: Path | None = None


def train_adapter(
    places: Places,
    config: TrainConfig,
    on_step: OnStep,
    trust_remote_code: bool,
    pack_tokens: int | None = None,
) -> dict[str, Any]:
    """Train on the sequences in `places.tokens`, write the adapter to `places.out` and return AdapterRef's fields.

    `on_step(step, steps, point)` is called after every optimizer step. Losses are in nats per supervised token. Goes on
    from a checkpoint where there is one. `pack_tokens` are at most config.pack_tokens: less where those took too much
    memory before. Raises ForgetlessError where the loss is no number, or worse than guessing."""
    began = time.monotonic()
    device = device_class()
    team = Team(device)
    dtype = pick_dtype(config.dtype)
    examples, held_out = (_examples(read_examples(places.tokens / split)) for split in ("train", "validation"))
    retention = _read_texts(places.base, config, trust_remote_code)
    steps = plan_steps(examples, config.step_tokens, config.epochs, config.max_steps, config.seed)

    model = open_trainable(places.base, config, dtype, device, trust_remote_code, places.start_from)
    run = _Run(model, config, device, dtype, team, check=held_out if _is_neutral(config) else [])
    groups = parameter_groups(model, config)
    parameters = [p for group in groups for p in group["params"]]
    check_space(places.checkpoints, parameters, bool(config.early_stopping), bool(places.outgoing))
    optimizer = _optimizer(groups, config)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)

    progress = load_checkpoint(places.checkpoints, LAST, parameters, optimizer, scaler)
    if progress is None:
        progress = Progress(pack_tokens=config.pack_tokens)
    else:
        progress.notes.append(_describe_resumption(progress, len(steps), _machine()))
        progress.resumed.append(progress.step)
    progress.machine = _machine()
    if team.leads:
        drop_others(places.checkpoints, progress)
    progress.pack_tokens = min(progress.pack_tokens, pack_tokens or config.pack_tokens)
    run.refresh()
    run.follow(progress)
    every = config.validate_every or max(1, math.ceil(len(steps) / 10))
    curve = [TrainPoint(**point) for point in progress.curve]
    ended = "finished"
    snapshots = places.checkpoints / SNAPSHOTS  # until the end, so that a resumed training has them all
    kept = {len(steps) * i // (config.snapshots + 1) for i in range(1, config.snapshots + 1)} - {0, len(steps)}
    spent, saved = progress.seconds, time.monotonic()

    def validate(point: TrainPoint) -> TrainPoint:
        losses = {"validation_loss": run.mean_loss(held_out)}
        if retention:
            losses["retention_loss"] = run.mean_loss(retention)
        return point.model_copy(update=losses)

    def save(name: str) -> None:
        if not team.leads:
            return
        progress.curve = [point.model_dump() for point in curve]
        progress.seconds = spent + time.monotonic() - began
        save_checkpoint(places.checkpoints, name, parameters, optimizer, scaler, progress)
        if name == LAST:
            drop_others(places.checkpoints, progress)
            if places.outgoing:
                leave_copy(places.checkpoints, places.outgoing, progress)

    if not curve:
        curve.append(validate(TrainPoint(step=0)))
        progress.best_loss = curve[0].validation_loss or math.inf
    with _ending_softly() as asked_to_end:
        for number in range(progress.step + 1, len(steps) + 1):
            started = time.monotonic()
            rate = config.learning_rate * schedule(number, len(steps), config.schedule, config.warmup_share)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["lr_scale"]
            if team.size > 1 and config.lora_dropout:  # or all would drop the same
                torch.manual_seed((config.seed * 1_000_003 + number) * team.size + team.rank)
            loss, tokens, labels = run.accumulate(steps[number - 1], parameters, scaler)
            scaler.unscale_(optimizer)
            norm = float(torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm))
            is_number = math.isfinite(loss) and (math.isfinite(norm) or scaler.is_enabled())
            losses = [point.loss for point in curve[1:] if point.loss is not None]
            if not is_number or runs_away([*losses, loss], run.words):
                what = f"the loss is {loss:.3g}, worse than guessing" if is_number else f"the loss is {loss}"
                raise ForgetlessError(
                    f"Training stopped at step {number} of {len(steps)}: {what}. The last good checkpoint, of step "
                    f"{progress.step}, is in {places.checkpoints}. Lower train.learning_rate (now "
                    f"{config.learning_rate:g}) and run again."
                )
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            run.refresh()
            progress.seen_tokens += tokens
            progress.supervised_tokens += labels
            point = TrainPoint(
                step=number,
                loss=loss,
                learning_rate=rate,
                grad_norm=norm if math.isfinite(norm) else None,  # float16 overflows while its scale is found
                tokens_per_second=tokens / (time.monotonic() - started),
                memory_mib=_peak_mib(device),
            )
            progress.step = number
            late = config.max_minutes is not None and spent + time.monotonic() - began > 60 * config.max_minutes
            late, ends = team.any(late), team.any(asked_to_end())
            if number % every == 0 or number == len(steps) or late:
                point = validate(point)
            curve.append(point)
            on_step(number, len(steps), point)
            if point.validation_loss is not None:
                if point.validation_loss < progress.best_loss:
                    progress.best_loss, progress.best_step, progress.waits = point.validation_loss, number, 0
                    if config.early_stopping:
                        save(name_best(number))
                else:
                    progress.waits += 1
            if number in kept and team.leads:
                save_trained(model, config, places.base, snapshots / f"{number:06}")
            if late:
                ended = "time limit"
            elif config.early_stopping and progress.waits >= config.early_stopping:
                ended = "early stopping"
            if ends or time.monotonic() - saved > 60 * config.checkpoint_minutes:
                save(LAST)
                saved = time.monotonic()
            if ends:
                raise Interrupted
            if ended != "finished":
                break

    team.leave()
    if not team.leads:
        return {}
    shipped = progress.step
    if config.early_stopping and progress.best_step and progress.best_step != progress.step:
        load_best(places.checkpoints, progress.best_step, parameters)
        shipped = progress.best_step
    model.eval()
    save_trained(model, config, places.base, places.out)
    if snapshots.is_dir():
        shutil.copytree(snapshots, places.out / SNAPSHOTS)
    # What differs from run to run or machine to machine stays out of the files: equal trainings have equal digests.
    told = {"tokens_per_second", "memory_mib"}
    (places.out / "curve.jsonl").write_text(
        "".join(p.model_dump_json(exclude=told) + "\n" for p in curve), encoding="utf-8"
    )
    onset = explain_onset(curve, shipped)
    checked = [p for p in curve if p.validation_loss is not None]
    return {
        "method": config.method,
        "trainable_parameters": sum(p.numel() for p in parameters),
        "steps": progress.step,
        "tokens": progress.seen_tokens,
        "supervised_tokens": progress.supervised_tokens,
        "seconds": spent + time.monotonic() - began,
        "dtype": dtype_name(dtype),
        "first_validation_loss": checked[0].validation_loss,
        "last_validation_loss": checked[-1].validation_loss,
        "curve": [p.model_dump() for p in curve],
        "ended": ended,
        "best_step": progress.best_step,
        "onset": find_onset(curve),
        "snapshots": sorted(int(folder.name) for folder in snapshots.glob("*")),
        "resumed": progress.resumed,
        "notes": [*progress.notes, *([onset] if onset else [])],
    }


# --- one step ---------------------------------------------------------------------------------------------------------


class _Run:
    """A model on its device with the way its losses are computed there, and how much of a step fits into memory."""

    def __init__(
        self, model: Any, config: TrainConfig, device: str, dtype: torch.dtype, team: Team, check: list[Example]
    ) -> None:
        self.model, self.config, self.device, self.dtype, self.team = model, config, device, dtype, team
        self.base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.head = frozen_head(self.base)
        self.words = int(self.base.get_output_embeddings().weight.shape[0])
        self.is_virtual = config.method in ("prefix", "prompt")
        self.layers: Any = None
        self.lanes = torch.get_num_threads() if device == "cpu" else 1
        self.progress = Progress(pack_tokens=config.pack_tokens)
        expected = self._untrained_loss(check) if check else None
        if device == "cpu" and config.method in ("lora", "qlora") and config.fast_layers == "auto":
            from tasks.models.cpu_layers import CpuLayers

            self.layers = CpuLayers(self.base, self.head.weight if self.head else None)
            self.head = self.layers.head or self.head
        if expected is not None:
            self._check(expected, check)

    @torch.no_grad()
    def _untrained_loss(self, examples: list[Example]) -> float:
        """Return the base's own mean loss on the first examples, each alone, by the library's layers."""
        self.model.eval()
        packs = [make_pack([e]) for e in examples[:CHECKED_ROWS]]
        with self.model.disable_adapter():
            total = sum(self._plain_loss(pack).item() for pack in packs)
        return total / max(1, sum(pack.supervised for pack in packs))

    def _check(self, expected: float, examples: list[Example]) -> None:
        found = self.mean_loss(examples[:CHECKED_ROWS])
        if abs(found - expected) > EQUAL_LOSS.get(self.dtype, EQUAL_LOSS_16):
            advice = "Set train.fast_layers=off" if self.layers else "Choose another train.method"
            raise ForgetlessError(
                f"Before the first step the adapter must change nothing, but the loss is {found:.4f}; the base's is "
                f"{expected:.4f}. {advice}, and report this model."
            )

    def follow(self, progress: Progress) -> None:
        """Take the size of packs from, and note changes in, a training's progress."""
        self.progress = progress
        wanted = self.config.activation_checkpointing
        short = wanted == "auto" and not self.is_virtual and self._is_short_of_memory()
        if wanted == "on" or short or progress.checkpointed_activations:
            self._checkpoint_activations()

    def _is_short_of_memory(self) -> bool:
        """Return whether activations would take more than half of what memory there is. Kept are, per token and layer,
        about 14 times the hidden size and 4 times the inner one, in the compute type."""
        config = self.base.config
        hidden = int(getattr(config, "hidden_size", 0))
        inner = int(getattr(config, "intermediate_size", 4 * hidden) or 4 * hidden)
        layers = int(getattr(config, "num_hidden_layers", 0))
        size = torch.finfo(self.dtype).bits // 8
        wanted = self.lanes * self.progress.pack_tokens * layers * (14 * hidden + 4 * inner) * size
        free = torch.cuda.mem_get_info()[0] if self.device == "cuda" else memory_bytes() or math.inf
        return wanted > free / 2

    def _checkpoint_activations(self) -> None:
        self.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.progress.checkpointed_activations = True

    def accumulate(
        self, examples: list[Example], parameters: list[torch.nn.Parameter], scaler: Any
    ) -> tuple[float, int, int]:
        """Leave a step's gradients, per label of the whole step, in `parameters`; return its mean loss, its tokens and
        its labels. Where memory runs out, smaller packs make up the same step."""
        self.model.train()
        labels = max(1, sum(count_labels(example) for example in examples))
        mine = self.team.share(examples)
        loss = None
        while loss is None:
            try:
                loss = self._accumulate(mine, labels, parameters, scaler)
            except (RuntimeError, MemoryError) as error:
                if not isinstance(error, MemoryError) and not any(w in str(error).lower() for w in OUT_OF_MEMORY):
                    raise
                self._take_less_memory(mine, parameters)
        self.team.add_gradients(parameters)
        return self.team.total(loss)[0], sum(len(example.ids) for example in examples), labels

    def _take_less_memory(self, examples: list[Example], parameters: list[torch.nn.Parameter]) -> None:
        for parameter in parameters:
            parameter.grad = None
        free_memory()
        longest = max(len(e.ids) for e in examples)
        half = max(longest, self.progress.pack_tokens // 2)
        if half < self.progress.pack_tokens:
            self.progress.pack_tokens = half
            note = (
                f"Memory ran out at step {self.progress.step + 1}: packs of {half} tokens from there, steps unchanged."
            )
        elif self.lanes > 1:
            self.lanes = 1
            note = f"Memory ran out at step {self.progress.step + 1}: one pack at a time from there."
        elif not self.progress.checkpointed_activations and not self.is_virtual:
            self._checkpoint_activations()
            note = f"Memory ran out at step {self.progress.step + 1}: activations are recomputed from there."
        else:
            raise ForgetlessError(
                f"A conversation of {longest} tokens alone does not fit into memory. Lower train.max_tokens, or choose "
                "train.method=qlora or a smaller base."
            )
        self.progress.notes.append(note)

    def _accumulate(
        self, examples: list[Example], labels: int, parameters: list[torch.nn.Parameter], scaler: Any
    ) -> float:
        packs = self._packs(examples)

        def gradients_of(pack: Pack) -> tuple[float, tuple[torch.Tensor | None, ...]]:
            loss = self.loss(pack)
            return loss.item(), torch.autograd.grad(scaler.scale(loss), parameters, allow_unused=True)

        total = 0.0
        # Threads would draw their dropout from one generator in any order, and the run could not be repeated.
        side_by_side = self.lanes > 1 and not self.config.lora_dropout
        for part, gradients in (map_parallel if side_by_side else map)(gradients_of, packs):
            total += part / labels
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:  # per label of the whole step: the same however it is cut into packs
                    share = gradient.float() / labels
                    parameter.grad = share if parameter.grad is None else parameter.grad.add_(share)
        return total

    def _packs(self, examples: list[Example]) -> list[Pack]:
        shares = bool(self.layers and self.layers.shares_prefix)
        return pack_examples(examples, self.progress.pack_tokens, shares, self.lanes)

    def loss(self, pack: Pack) -> torch.Tensor:
        """Return the cross-entropy of a pack's labels, summed, in nats."""
        if self.head is None or self.is_virtual:
            return self._plain_loss(pack)
        options = {"plan": PackPlan(pack.starts)} if self.layers and self.layers.shares_prefix else {}
        # No attention mask and no cache: positions that restart then keep the examples apart on any attention.
        hidden = self.base.get_decoder()(
            input_ids=pack.ids.to(self.device),
            position_ids=pack.positions.to(self.device),
            use_cache=False,
            **options,
        ).last_hidden_state
        return chunked_loss(hidden[0, pack.kept.to(self.device)], self.head, pack.labels.to(self.device))

    def _plain_loss(self, pack: Pack) -> torch.Tensor:
        logits = self.model(
            input_ids=pack.ids.to(self.device),
            position_ids=pack.positions.to(self.device),
            use_cache=False,
            logits_to_keep=pack.kept.to(self.device),
        ).logits
        return cross_entropy(logits[0].float(), pack.labels.to(self.device), reduction="sum")

    def mean_loss(self, examples: list[Example]) -> float:
        """Return the mean loss per supervised token, without dropout."""
        self.model.eval()
        packs = self._packs(self.team.share(examples))
        loss = sum(map_parallel(self._loss_without_graph, packs))
        total, labels = self.team.total(loss, sum(pack.supervised for pack in packs))
        return total / max(1, labels)

    @torch.no_grad()  # per thread: a worker does not inherit it
    def _loss_without_graph(self, pack: Pack) -> float:
        return self.loss(pack).item()

    def refresh(self) -> None:
        if self.layers:
            self.layers.refresh()


def _is_neutral(config: TrainConfig) -> bool:
    """Return whether the adapter changes nothing before its first step, and can be switched off to see so."""
    return (
        config.method in ("lora", "qlora", "int8", "oft")
        and config.init in ("default", "gaussian")
        and not (config.start_from or config.modules_to_save)
    )


def _optimizer(groups: list[dict[str, Any]], config: TrainConfig) -> Any:
    settings = [{**group, "lr": config.learning_rate * group["lr_scale"]} for group in groups]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(settings)
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

    return (PagedAdamW8bit if config.optimizer == "paged_adamw_8bit" else AdamW8bit)(settings)


def schedule(step: int, steps: int, name: str, warmup_share: float) -> float:
    """Return the share of the full learning rate at `step` (from 1): linear warm-up, then as the schedule has it."""
    warmup = math.ceil(warmup_share * steps)
    if step <= warmup:
        return step / warmup
    if name == "constant":
        return 1.0
    if name == "wsd":  # Hu et al.: MiniCPM, 2024
        decay = max(1, math.ceil(DECAY_SHARE * steps))
        return min(1.0, (steps - step + 1) / decay)
    done = (step - warmup - 1) / max(1, steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * done)) if name == "cosine" else 1 - done


# --- what it needs ----------------------------------------------------------------------------------------------------


def _examples(found: Examples) -> list[Example]:
    """Return the sequences one by one, each as often as an epoch sees it."""
    return [found.example(i) for i in range(len(found)) for _ in range(found.times[i])]


def _read_texts(base: Path, config: TrainConfig, trust_remote_code: bool) -> list[Example]:
    """Return the first texts of train.retention_texts, every token but the first supervised. Raises DataError."""
    if config.retention_texts is None:
        return []
    tokenizer = load_tokenizer(base, None, trust_remote_code)
    texts: list[Example] = []
    number = 0
    try:
        with open(config.retention_texts, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):  # noqa: B007 (named in the error)
                ids = tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"][: config.max_tokens]
                texts += [Example(ids, [True] * len(ids))] if len(ids) > 1 else []
                if len(texts) == RETENTION_TEXTS:
                    break
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"train.retention_texts {config.retention_texts}:{number}: expected JSON Lines with a text each, found "
            f"{type(error).__name__}: {error}. Mend the file, or leave the key out."
        ) from None
    if not texts:
        raise DataError(f"train.retention_texts {config.retention_texts}: expected texts, found none.")
    return texts


def _machine() -> str:
    """Return what the last bits of a training depend on besides its libraries."""
    found = describe_machine()
    return found.get("gpu") or f"{found['cpu']} with {torch.get_num_threads()} threads"


def _describe_resumption(progress: Progress, steps: int, machine: str) -> str:
    said = f"Resumed at step {progress.step} of {steps}"
    if progress.machine == machine:
        return f"{said}."
    return (
        f"{said} on another machine ({machine}; before {progress.machine}): the adapter is the same bit for bit on one "
        "CPU model and number of threads only."
    )


def _peak_mib(device: str) -> int:
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated() >> 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


@contextlib.contextmanager
def _ending_softly() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether SIGTERM came: the step at work is finished first, and a checkpoint written."""
    asked = False

    def note(*_: Any) -> None:
        nonlocal asked
        asked = True

    former = signal.signal(signal.SIGTERM, note)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGTERM, former)
