"""Checkpoints: everything a training needs to go on where it stopped, as safetensors and JSON.

A checkpoint is written beside the last one and takes its name when it is whole, so a kill at any moment leaves one that
can be read. Equal settings go on to the same adapter, bit for bit with the same libraries, CPU model and threads.
"""

import contextlib
import functools
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tasks.core.errors import StoreError
from tasks.core.records import SNAPSHOTS
from tasks.training.shared import LAST

MOMENTS = 2  # that Adam holds of each parameter


@dataclass
class Progress:
    """How far a training is: what is not a tensor of its state."""

    step: int = 0
    seen_tokens: int = 0
    supervised_tokens: int = 0
    seconds: float = 0.0
    curve: list[dict[str, Any]] = field(default_factory=list)
    best_step: int = 0
    best_loss: float = float("inf")
    waits: int = 0
    """Validations since the best one."""
    pack_tokens: int = 0
    checkpointed_activations: bool = False
    notes: list[str] = field(default_factory=list)
    resumed: list[int] = field(default_factory=list)
    """Steps from whose checkpoints it went on."""
    machine: str = ""
    """What it was trained on, as far as the last bits depend on it."""


def name_best(step: int) -> str:
    return f"best-{step:06}"


def check_space(folder: Path, parameters: list[torch.nn.Parameter], keeps_best: bool, leaves: bool) -> None:
    """Raise StoreError unless the checkpoints of a training have room on the disk: the last and the one to take its
    place, the same of the best, and what is on its way to the store."""
    folder.mkdir(parents=True, exist_ok=True)
    needed = (2 + leaves) * (1 + keeps_best) * (1 + MOMENTS) * sum(p.nbytes for p in parameters)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise StoreError(
            f"The checkpoints of this training need {needed / 2**30:.1f} GiB, and {folder} has {free / 2**30:.1f} GiB "
            "free. Free some space, or choose another place with --store."
        )


def save_checkpoint(
    folder: Path, name: str, parameters: list[torch.nn.Parameter], optimizer: Any, scaler: Any, progress: Progress
) -> None:
    """Write a checkpoint as `folder`/`name`; a former one of that name stays until this is whole. Raises StoreError."""
    with _written(folder, folder / f"{name}.new", progress):
        _save(folder, name, parameters, optimizer, scaler, progress)


@contextlib.contextmanager
def _written(folder: Path, new: Path, progress: Progress) -> Iterator[None]:
    """Raise StoreError where what is written within does not come about, and leave nothing of it in `new`."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors has its own for a full disk
        shutil.rmtree(new, ignore_errors=True)
        raise StoreError(
            f"The checkpoint of step {progress.step} could not be written to {folder}: {error}. Free some space; the "
            "same command goes on from the checkpoint before it."
        ) from None


def _save(
    folder: Path, name: str, parameters: list[torch.nn.Parameter], optimizer: Any, scaler: Any, progress: Progress
) -> None:
    new = folder / f"{name}.new"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    tensors = {f"parameter.{i}": p.detach().cpu().contiguous() for i, p in enumerate(parameters)}
    numbers: dict[str, Any] = {}
    for label, value in _flat(optimizer.state_dict()["state"]):
        if isinstance(value, torch.Tensor):
            tensors[f"optimizer.{label}"] = value.detach().cpu().contiguous()
        else:
            numbers[label] = value
    tensors["random"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    save_file(tensors, new / "state.safetensors")
    state = {"progress": asdict(progress), "optimizer": numbers, "scaler": scaler.state_dict()}
    (new / "state.json").write_text(json.dumps(state), encoding="utf-8")
    old = folder / f"{name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if (folder / name).exists():
        (folder / name).rename(old)
    new.rename(folder / name)
    shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(
    folder: Path, name: str, parameters: list[torch.nn.Parameter], optimizer: Any, scaler: Any
) -> Progress | None:
    """Bring parameters, optimizer and random numbers to where a checkpoint was; None where there is none to read."""
    for place in (folder / name, folder / f"{name}.old"):
        try:
            tensors = load_file(place / "state.safetensors")
            state = json.loads((place / "state.json").read_text(encoding="utf-8"))
        except (OSError, SafetensorError, ValueError):
            continue
        load_parameters(tensors, parameters)
        entries: dict[str, Any] = {}
        for label, value in (*tensors.items(), *((f"optimizer.{k}", v) for k, v in state["optimizer"].items())):
            kind, *path = label.split(".")
            if kind == "optimizer":
                place_in = functools.reduce(lambda node, key: node.setdefault(key, {}), path[:-1], entries)
                place_in[path[-1]] = value
        by_number = {int(index): entry for index, entry in entries.items()}
        optimizer.load_state_dict({**optimizer.state_dict(), "state": by_number})
        scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(tensors["random"])
        if "random.cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["random.cuda"])
        return Progress(**state["progress"])
    return None


def _flat(node: dict[Any, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what is in nested dictionaries, each with its path; bitsandbytes nests the state of its 8-bit numbers."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


@torch.no_grad()
def load_parameters(tensors: dict[str, torch.Tensor], parameters: list[torch.nn.Parameter]) -> None:
    for i, parameter in enumerate(parameters):
        parameter.copy_(tensors[f"parameter.{i}"])


def load_best(folder: Path, step: int, parameters: list[torch.nn.Parameter]) -> None:
    """Bring the parameters to where the best checkpoint was."""
    load_parameters(load_file(folder / name_best(step) / "state.safetensors"), parameters)


def drop_others(folder: Path, progress: Progress) -> None:
    """Remove what does not belong to the last checkpoint: other best ones, and kept adapters of later steps, which a
    killed process left."""
    later = (path for path in (folder / SNAPSHOTS).glob("*") if int(path.name) > progress.step)
    for path in (*folder.glob("best-*"), *later):
        if path.name != name_best(progress.best_step):
            shutil.rmtree(path, ignore_errors=True)


def leave_copy(folder: Path, outgoing: Path, progress: Progress) -> None:
    """Leave all of the last checkpoint as `outgoing`/STEP, in hard links, for whoever takes it away by renaming it; one
    that waits there still is given up. Raises StoreError."""
    new, old = outgoing / "new", outgoing / "old"
    with _written(folder, new, progress):
        shutil.rmtree(new, ignore_errors=True)
        for path in (folder / LAST, folder / name_best(progress.best_step), *(folder / SNAPSHOTS).glob("*")):
            if path.is_dir():
                shutil.copytree(path, new / path.relative_to(folder), copy_function=_link)
        for waiting in outgoing.glob("[0-9]*"):
            shutil.rmtree(old, ignore_errors=True)
            with contextlib.suppress(FileNotFoundError):  # taken just now
                waiting.rename(old)
        new.rename(outgoing / f"{progress.step:06}")
        shutil.rmtree(old, ignore_errors=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a disk without links
        shutil.copyfile(source, target)
