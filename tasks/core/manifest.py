"""The run manifest: the only contract between a run and those who look at it. Versioned, rewritten after each stage."""

import itertools
import json
import re
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tasks.core.config import CombineConfig, ExportConfig, Recipe, TrainConfig
from tasks.core.digest import canonical_json, content_digest, file_sha256
from tasks.core.errors import ConfigError, ForgetlessError, StoreError, one_line
from tasks.core.records import (
    AdapterRef,
    ArtifactRef,
    BaseRef,
    CombinedRef,
    DataReport,
    DatasetRef,
    ForgettingReport,
    GgufRef,
    LicenceRef,
    MergeChoice,
    ModelRef,
    OllamaRef,
    ProofRef,
    ScoreSheet,
    TokensRef,
    TrainedRef,
    TrainPoint,
)
from tasks.core.stages import Stage
from tasks.core.store import Store, find_artifact, stored

VERSION = 1
RUN_ID = r"^[a-z0-9][a-z0-9._-]*$"
STAGES = (
    *("dataset", "validate", "base", "tokens", "before", "train", "after"),
    *("compare", "merge", "gguf", "proof", "ollama", "publish"),
)
COMBINED_STAGES = ("base", "before", "combine", *STAGES[STAGES.index("after") :])
# Each entry turns a manifest of version N (a plain dict) into one of version N + 1.
UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}

Status = Literal["pending", "running", "computed", "reused", "skipped", "failed"]


class StageState(BaseModel):
    status: Status = "pending"
    seconds: float | None = None
    uri: str | None = None
    note: str = ""


class RunManifest(BaseModel):
    model_config = ConfigDict(extra="ignore")

    version: int = VERSION
    run_id: str = Field(pattern=RUN_ID)
    recipe: Recipe
    combine: CombineConfig | None = None
    """Where the run combines others in place of training; data and train of its recipe are then the first one's."""
    sweep: str | None = None
    """The sweep whose trial the run is: it ends before the merge."""
    status: Literal["running", "completed", "failed"] = "running"
    started: datetime
    finished: datetime | None = None
    error: str | None = None
    flow_run_id: str | None = None
    stages: dict[str, StageState] = {}
    base: BaseRef | None = None
    dataset: DatasetRef | None = None
    data_report: DataReport | None = None
    tokens: TokensRef | None = None
    before: ScoreSheet | None = None
    adapter: AdapterRef | CombinedRef | None = Field(None, union_mode="left_to_right")
    after: ScoreSheet | None = None
    report: ForgettingReport | None = None
    merged: ModelRef | None = None
    merge_choice: MergeChoice | None = None
    gguf: GgufRef | None = None
    proof: ProofRef | None = None
    served: ForgettingReport | None = None
    """The file that is served against the base, both in llama.cpp (eval.on_gguf)."""
    ollama: OllamaRef | None = None
    registry_version: int | None = None
    """Of the model recipe.registry_name in the registry."""
    card: ArtifactRef | None = None
    licences: list[LicenceRef] = []
    """Of the base, then of the data."""
    notes: list[str] = []
    """What a reader of the run should know that belongs to no stage: uses that a licence does not allow."""
    environment: dict[str, str] = {}
    """Library versions, Python, machine: recorded, never part of a key."""

    @property
    def stage_names(self) -> tuple[str, ...]:
        return COMBINED_STAGES if self.combine else STAGES

    @property
    def judged(self) -> ForgettingReport | None:
        """The report whose verdict is the run's: on the served file where that is rejected, else on the model."""
        return self.served if self.served and self.served.verdict == "reject" else self.report

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the run's result: its recipe, with what it combines in the place of data and training."""
        if self.combine is None:
            return self.recipe.model_dump(mode="json", exclude={"placement"})
        recipe = self.recipe.model_dump(mode="json", exclude={"data", "train", "placement"})
        return {**recipe, "combine": self.combine.model_dump(mode="json")}

    @property
    def seconds(self) -> float | None:
        return (self.finished - self.started).total_seconds() if self.finished else None


def new_run_id(name: str, now: datetime | None = None) -> str:
    """Return `name` with the time in UTC to the millisecond: sorts by time, names a folder."""
    return f"{name}-{(now or datetime.now(UTC)).strftime('%Y%m%d-%H%M%S-%f')[:-3]}"


def manifest_path(run_id: str) -> str:
    if not re.fullmatch(RUN_ID, run_id):
        raise ForgetlessError(f"{run_id!r} is not a run's name: expected lower-case letters, digits, dots and dashes.")
    return f"runs/{run_id}/manifest.json"


def run_stage(run_id: str) -> Stage:
    """Return what a run at work holds the lease of, so that it is not deleted meanwhile."""
    return Stage("run", 1, [run_id], {})


def write_manifest(store: Store, manifest: RunManifest) -> None:
    store.write_bytes(manifest_path(manifest.run_id), canonical_json(manifest.model_dump(mode="json")))


def read_manifest(store: Store, run_id: str) -> RunManifest:
    """Return a run's manifest, upgraded to today's version. `latest` is the newest run.
    Raises ForgetlessError if there is none, StoreError if it cannot be read."""
    if run_id == "latest":
        begun = reversed(run_ids(store))  # one that has just begun may have no manifest yet
        run_id = next((name for name in begun if store.read_bytes(manifest_path(name)) is not None), "")
        if not run_id:
            raise ForgetlessError(f"There are no runs in {store.url} yet. Start one with: forgetless run quickstart")
    data = store.read_bytes(manifest_path(run_id))
    if data is None:
        raise ForgetlessError(f"There is no run {run_id!r} in {store.url}. List them with: forgetless runs")
    return parse_manifest(data, run_id)


def parse_manifest(data: bytes, run_id: str) -> RunManifest:
    try:
        raw = json.loads(data)
        if raw["version"] > VERSION:
            raise StoreError(
                f"Run {run_id} was written by a newer version (manifest {raw['version']}, this reads {VERSION}). "
                "Upgrade forgetless to read it."
            )
        while raw["version"] < VERSION:
            raw = UPGRADES[raw["version"]](raw)
        return RunManifest.model_validate(raw)
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"The manifest of run {run_id} cannot be read: {one_line(error)}") from None


def run_ids(store: Store) -> list[str]:
    """Return the names of all runs, oldest first."""
    return sorted(store.list_folders("runs"), key=lambda run_id: run_id.rsplit("-", 3)[1:])


def find_start(store: Store, train: TrainConfig, base: BaseRef | None, bring: bool = False) -> TrainedRef | None:
    """Return what a training goes on from: what a run of this store made, or a folder of PEFT's, which is first brought
    into the store where `bring` says so. None where there is nothing to go on from, or not yet. Raises ConfigError,
    also where it was made for another base."""
    if train.start_from is None:
        return None
    folder = Path(train.start_from)
    if not folder.is_absolute():
        run = read_manifest(store, train.start_from)
        adapter = run.adapter
        if adapter is None:
            raise ConfigError(
                f"train.start_from: run {train.start_from} made no adapter. List the runs with: forgetless runs"
            )
        if base and run.base and run.base.artifact.content != base.artifact.content:
            raise ConfigError(
                f"train.start_from: run {train.start_from} trained {called(run.base)}, and the base here is "
                f"{called(base)}. An adapter fits no other base."
            )
        return adapter.model_copy(update={"strength": 1.0, "step": None})  # training goes on from all of it
    settings = "config.json" if train.method == "full" else "adapter_config.json"
    if not (folder / settings).is_file() or not list(folder.glob("*.safetensors")):
        raise ConfigError(
            f"train.start_from {folder}: expected a folder with {settings} and safetensors, as PEFT has it, or the "
            "name of a run."
        )
    made_for = _json(folder / settings).get("base_model_name_or_path")
    is_id = all(re.fullmatch(r"[\w-]+/[\w.-]+", str(name)) for name in (made_for, base.source if base else None))
    if base and is_id and made_for != base.source:
        raise ConfigError(
            f"train.start_from {folder}: it was made for {made_for}, and the base here is {called(base)}. An adapter "
            "fits no other base."
        )
    files = [*folder.glob("*.safetensors"), *folder.glob("*.json")]
    stage = Stage("start", 1, [content_digest({p.name: file_sha256(p) for p in files})], {"method": train.method})

    def copy(target: Path) -> dict[str, Any]:
        for path in files:
            shutil.copy2(path, target)
        return {"method": train.method}

    return stored(store, stage, TrainedRef, copy) if bring else find_artifact(store, stage, TrainedRef)


def shipped_part(adapter: AdapterRef, export: ExportConfig) -> AdapterRef:
    """Return the part of an adapter that is scored and shipped. Raises ConfigError for a step that was not kept."""
    if export.step is not None and export.step not in adapter.snapshots:
        kept = ", ".join(map(str, adapter.snapshots)) or "none (set train.snapshots)"
        raise ConfigError(f"export.step: the adapter of step {export.step} was not kept; kept are {kept}.")
    return adapter.model_copy(update={"strength": export.strength, "step": export.step})


def called(base: BaseRef) -> str:
    """Return a base's name with its revision."""
    return base.source + (f" at {base.revision}" if base.revision else "")


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON ({error}).") from None
    return found if isinstance(found, dict) else {}


class LiveCurve:
    """The training curve of a run at work, in numbered files: S3 cannot append to one."""

    def __init__(self, store: Store, run_id: str) -> None:
        self.store, self.folder = store, manifest_path(run_id).removesuffix("manifest.json") + "curve"
        self.points: list[TrainPoint] = []
        self.number = 0

    def write(self) -> None:
        """Write the points since the last time."""
        if self.points:
            lines = "".join(point.model_dump_json() + "\n" for point in self.points)
            self.store.write_bytes(f"{self.folder}/{self.number:06}.jsonl", lines.encode())
            self.points, self.number = [], self.number + 1

    def read(self) -> list[TrainPoint]:
        """Return all points written so far, of a step the newest, in the order of steps."""
        found: dict[int, TrainPoint] = {}
        for number in itertools.count():
            data = self.store.read_bytes(f"{self.folder}/{number:06}.jsonl")
            if data is None:
                return [found[step] for step in sorted(found)]
            found |= {p.step: p for p in map(TrainPoint.model_validate_json, data.splitlines())}
        raise AssertionError
