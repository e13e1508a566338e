"""Runs whose adapters are to become one: found in the store, checked against each other, with what the new run is.

Everything that can be wrong with the request is said here, from the runs' manifests and the adapters' settings and
shapes; no weight is read. `tasks.training.combine` does the work."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.core.config import (
    CombineConfig,
    Recipe,
    combined_recipe,
    join_evaluations,
    load_combination,
    load_suites,
)
from tasks.core.errors import ConfigError
from tasks.core.manifest import RunManifest, called, read_manifest
from tasks.core.records import BaseRef, CombinedPart, LicenceRef, TokensRef
from tasks.core.store import Store

ANY_RANK = ("cat", "svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
TRAINED_ON = {"qlora": "4 bits", "int8": "8 bits"}  # all others: the base as it is


@dataclass(frozen=True)
class Combination:
    """`recipe` is that of the new run, `base` what all parts were trained on."""

    config: CombineConfig
    recipe: Recipe
    base: BaseRef
    parts: list[CombinedPart]
    tokens: TokensRef
    """The first run's rows, on which the export is proven."""
    licences: list[LicenceRef]
    notes: list[str]


def read_combination(
    store: Store, config: CombineConfig, suites: Sequence[str] = (), name: str | None = None
) -> Combination:
    """Return what becomes of runs that are combined, scored on `suites` or else on all that the runs were scored on.
    Raises ConfigError where they cannot be combined, with every reason found."""
    runs = [read_manifest(store, run) for run in config.runs]
    names = [run.run_id for run in runs]
    config = load_combination({**config.model_dump(), "runs": names})  # latest may be one that is named already
    parts = _find_parts(runs, config)
    base = _common_base(runs)
    if config.method != "sequence":
        _check_adapters(store, config, parts)
    evaluation = load_suites(list(suites)) if suites else join_evaluations({r.run_id: r.recipe.eval for r in runs})
    described = " and ".join(f"{part.weight:g} of {part.run}" for part in parts)
    how = "Merged in sequence" if config.method == "sequence" else f"Combined by {config.method}"
    recipe = combined_recipe(
        runs[0].recipe, name or f"{runs[0].recipe.name}-combined", f"{how}: {described}.", evaluation
    )
    notes = [
        f"Run {run.run_id} went on from {run.recipe.train.start_from}: what that one learned counts twice."
        for run in runs
        if not run.combine and run.recipe.train.start_from in names
    ]
    if config.method == "sequence" and recipe.export.adapter_gguf:
        recipe = recipe.model_copy(update={"export": recipe.export.model_copy(update={"adapter_gguf": False})})
        notes.append("Adapters merged in sequence are no adapter: no GGUF file of one is written.")
    tokens = runs[0].tokens
    assert tokens  # it has an adapter
    licences = list({(x.what, x.name): x for run in runs for x in run.licences}.values())
    return Combination(config, recipe, base, parts, tokens, licences, notes)


def _find_parts(runs: list[RunManifest], config: CombineConfig) -> list[CombinedPart]:
    parts, problems = [], []
    for run, weight in zip(runs, config.weights or [1.0] * len(runs), strict=True):
        if run.adapter is None:
            problems.append(f"Run {run.run_id} made no adapter: it is {run.status}. Run its recipe again.")
        elif run.adapter.unmerged:
            problems.append(f"Run {run.run_id} cannot be combined: its virtual tokens are no weights to add.")
        elif run.adapter.method == "full":
            problems.append(f"Run {run.run_id} cannot be combined: it is a whole model and no adapter to one.")
        elif run.adapter.method == "oft" and config.method != "sequence":
            problems.append(
                f"Run {run.run_id} cannot be combined by {config.method}: method oft rotates, and only LoRA's "
                "adapters add up. Use --sequence."
            )
        else:
            facts = run.adapter.model_dump(include={"artifact", "method", "strength", "step"})
            parts.append(CombinedPart(run=run.run_id, weight=weight, **facts))
    if problems:
        raise ConfigError(problems)
    trained_on = {TRAINED_ON.get(part.method, "the base as it is"): part for part in parts}
    if len(trained_on) > 1:
        told = ", ".join(f"{part.run} on {what} ({part.method})" for what, part in trained_on.items())
        raise ConfigError(
            f"These runs were trained on different weights of their base: {told}. Combine runs of one kind; the "
            "others can be trained again with its train.method."
        )
    return parts


def _common_base(runs: list[RunManifest]) -> BaseRef:
    """Return the base of all runs. Raises ConfigError where two differ in it, or in their chat template."""
    (first, base), *others = [(run.run_id, run.base) for run in runs if run.base]
    for run, other in others:
        if other.artifact.content != base.artifact.content:
            changed = ", which was changed between them" if called(other) == called(base) else ""
            raise ConfigError(
                f"Run {first} trained {called(base)}, and run {run} trained {called(other)}{changed}. Adapters of "
                "different bases cannot be combined."
            )
        if other.template != base.template:
            raise ConfigError(
                f"Run {first} was trained with model.template {base.template}, and run {run} with {other.template}. "
                "What is combined reads one: train both with the same."
            )
    return base


def _check_adapters(store: Store, config: CombineConfig, parts: list[CombinedPart]) -> None:
    """Raise ConfigError unless PEFT combines these adapters by this method into what they are."""
    folders = {part.run: part.folder(store.local_folder(part.artifact)) for part in parts}
    problems = []
    for run, folder in folders.items():
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        for name, what in (("use_dora", "DoRA's magnitudes"), ("modules_to_save", "modules trained whole")):
            if settings.get(name):
                problems.append(
                    f"Run {run} cannot be combined by {config.method}: it has {what}, which do not add up. "
                    "Use --sequence."
                )
    ranks = {run: read_ranks(folder) for run, folder in folders.items()}
    if not problems and config.method not in ANY_RANK:
        problems += _unequal_ranks(config.method, ranks)
    if problems:
        raise ConfigError(problems)


def _unequal_ranks(method: str, ranks: dict[str, dict[str, int]]) -> list[str]:
    (first, expected), *others = ranks.items()
    for run, found in others:
        shared = sorted(expected.keys() & found.keys())
        differing = next((m for m in shared if expected[m] != found[m]), None)
        if differing:
            told = f"{differing} has rank {expected[differing]} in run {first} and {found[differing]} in run {run}"
        elif max(expected.values()) != max(found.values()):
            told = f"run {first} has ranks up to {max(expected.values())}, run {run} up to {max(found.values())}"
        else:
            continue
        more = "cat or svd" if method == "linear" else f"{method}_svd, cat or svd"
        return [f"Method {method} needs adapters of equal rank, and {told}. Use --method {more}."]
    return []


def read_ranks(folder: Path) -> dict[str, int]:
    """Return the rank of each module that a LoRA adapter changes, by its name in the base."""
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", framework="numpy") as file:
        shapes: dict[str, Any] = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    found = {}
    for name, shape in shapes.items():
        module, is_a, _ = name.removeprefix("base_model.model.").partition(".lora_A.")
        if not is_a:
            module, is_a, _ = name.removeprefix("base_model.model.").partition(".lora_embedding_A")
        if is_a:
            found[module] = int(shape[0])
    return found
