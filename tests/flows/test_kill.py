"""Killed anywhere, the same command ends with the same bytes and repeats nothing that was finished."""

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from flows.store import verify_artifacts
from tasks.core.digest import file_sha256
from tasks.core.errors import ForgetlessError
from tasks.core.manifest import RunManifest, read_manifest, run_ids
from tasks.core.s3 import S3Store
from tasks.core.store import MARKER, FileStore
from tests.conftest import ROOT
from tests.flows.test_finetune import recipe  # noqa: F401 (a fixture)

BY_WRITES, BY_TIME = 20, 12
IN_A_BUCKET = ("dataset", "validate", "base", "tokens", "before", "train", "merge", "gguf")
THROUGH_THE_FLOW = ("dataset", "tokens", "before", "train", "after", "merge", "gguf", "publish")


def run_stages(recipe_file: Path, store: Path | str, point: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Return how a process of tests.flows.killed ended, and what it said."""
    from prefect.settings import PREFECT_API_URL

    command = [sys.executable, "-m", "tests.flows.killed", str(recipe_file), str(store), json.dumps(point)]
    environment = {**os.environ, "PREFECT_API_URL": PREFECT_API_URL.value(), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=900)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines, done.stderr[-3000:]
    return done.returncode, json.loads(lines[-1])


def finished(root: Path) -> dict[str, str]:
    """Return the content of every whole artifact in a store, by kind and key, after a check of every file."""
    found = {}
    for path in sorted(root.glob(f"artifacts/*/*/{MARKER}")):
        marker = json.loads(path.read_bytes())
        for name, facts in marker["files"].items():
            assert file_sha256(path.parent / name) == facts["sha256"], path.parent / name
        found[f"{marker['artifact']['kind']}/{marker['artifact']['key']}"] = marker["artifact"]["content"]
    return found


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_stages_killed_anywhere_end_with_the_same_bytes(
    recipe: Path,  # noqa: F811
    tmp_path: Path,
    prefect_server: None,
) -> None:
    code, whole = run_stages(recipe, tmp_path / "whole", {})
    assert code == 0
    writes, seconds = whole["writes"], whole["seconds"]
    points: list[dict[str, float]] = [{"writes": 1 + i * writes // BY_WRITES} for i in range(BY_WRITES)]
    points += [{"writes": before + 2} for before in whole["began"].values()]  # early in each stage
    points += [{"seconds": seconds * (i + 0.5) / BY_TIME} for i in range(BY_TIME)]
    stages = []
    for number, point in enumerate(points):
        root = tmp_path / f"store-{number}"
        code, said = run_stages(recipe, root, point)
        if code == 0:  # it came too late: neither writes nor seconds are the same twice
            continue
        assert code == -signal.SIGKILL
        before = finished(root)
        code, again = run_stages(recipe, root, {})
        assert code == 0
        assert again["digests"] == whole["digests"]
        after = finished(root)
        assert {name: after[name] for name in before} == before
        assert not set(again["made"].values()) & before.keys(), "a finished stage is not repeated"
        stages.append(said["stage"])
        print(f"| {point} | {said['stage']} | {', '.join(again['made'])} | equal |")
        shutil.rmtree(root)
    assert len(stages) >= len(points) - 2
    assert set(stages) >= {"dataset", "tokens", "before", "train", "after", "merge", "gguf"}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_stages_killed_between_requests_to_a_bucket_end_with_the_same_bytes(
    recipe: Path,  # noqa: F811
    tmp_path: Path,
    prefect_server: None,
    aws: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FORGETLESS_CACHE", str(tmp_path / "whole"))
    S3Store("killed", "", tmp_path).client.create_bucket(Bucket="killed")
    code, whole = run_stages(recipe, "s3://killed/whole", {})
    assert code == 0
    monkeypatch.setenv("FORGETLESS_CACHE", str(tmp_path / "cache"))
    store = S3Store("killed", "often", tmp_path / "cache")
    began = [*whole["began"].items(), ("", whole["writes"])]
    stages = [
        (name, next_one - first) for (name, first), (_, next_one) in itertools.pairwise(began) if name in IN_A_BUCKET
    ]
    markers: dict[str, Any] = {}
    for number, (stage, writes) in enumerate(stages):  # each goes on where the one before was killed
        point = 1 + number * (writes - 1) // len(stages)  # from the lease to what comes after the marker
        code, said = run_stages(recipe, "s3://killed/often", {"stage": stage, "writes": point})
        assert (code, said["stage"]) == (-signal.SIGKILL, stage)
        found = {file.path: file for file in store.list_files("artifacts") if file.path.endswith(MARKER)}
        print(f"| {stage} | request {point} of {writes} | {len(found) - len(markers)} finished before |", flush=True)
        assert markers.items() <= found.items(), "a finished stage is not repeated"
        markers = found
    code, again = run_stages(recipe, "s3://killed/often", {})
    assert code == 0
    assert again["digests"] == whole["digests"]
    assert not {f"artifacts/{name}/{MARKER}" for name in again["made"].values()} & markers.keys()
    assert not verify_artifacts(store, None, lambda _: None)["problems"]
    assert not list(store.list_files("leases"))
    print(f"| then | {', '.join(again['made'])} | digests equal |")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_runs_killed_in_any_stage_go_on_by_the_same_command(recipe: Path, tmp_path: Path) -> None:  # noqa: F811
    root, killed = tmp_path / "store", []
    command = [sys.executable, "-m", "flows.cli", "run", str(recipe), "--store", str(root), "--json"]
    environment = {**os.environ, "OLLAMA_HOST": "127.0.0.1:9", "PYTHONPATH": str(ROOT)}
    store = FileStore(root)
    for stage in THROUGH_THE_FLOW:
        known = set(run_ids(store))
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        manifest = wait_for(store, known, stage, process)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        killed.append((stage, manifest.stages[stage].status))
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    manifest = RunManifest.model_validate_json(done.stdout.splitlines()[-1])
    assert manifest.status == "completed"
    assert killed == [(stage, "running") for stage in THROUGH_THE_FLOW]
    assert [name for name, state in manifest.stages.items() if state.status == "reused"][:8] == list(
        ("dataset", "validate", "base", "tokens", "before", "train", "after", "compare")
    )


def wait_for(store: FileStore, known: set[str], stage: str, process: subprocess.Popen) -> RunManifest:
    """Return the manifest of a new run as soon as it is in a stage."""
    end = time.monotonic() + 300
    while time.monotonic() < end and process.poll() is None:
        for run_id in set(run_ids(store)) - known:
            with contextlib.suppress(ForgetlessError):  # it has just begun
                manifest = read_manifest(store, run_id)
                if stage in manifest.stages and manifest.stages[stage].status == "running":
                    return manifest
        time.sleep(0.02)
    raise AssertionError(f"{stage} was not reached")
