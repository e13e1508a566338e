"""Stages on deployments of their own: workers of several pools, with folders of their own, that share only a bucket."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.core.s3 import S3Store
from tests.flows.servers import Server, ended, of_run, prefect_server, read_run, wait
from tests.flows.test_finetune import recipe  # noqa: F401 - the tiny recipe is the fixture's

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
PLACED = ["placement.score=score-model/gpu", "placement.train=train-adapter/gpu", "placement.package=package-model/cpu"]


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory, s3_endpoint: str) -> Iterator[tuple[Server, S3Store]]:
    """A bootstrapped server with a worker on each pool."""
    folder = tmp_path_factory.mktemp("team")
    aws = {
        "AWS_ENDPOINT_URL_S3": s3_endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with (
        pytest.MonkeyPatch.context() as patch,
        prefect_server(
            folder, FORGETLESS_STORE="s3://placed/team", FORGETLESS_CACHE=str(folder / "mine"), **aws
        ) as server,
    ):
        for name, value in aws.items():
            patch.setenv(name, value)
        first = server.run("infra/bootstrap.py")
        assert "bucket       placed" in first and "created" in first and "unchanged" not in first
        again = server.run("infra/bootstrap.py").splitlines()
        assert all("unchanged" in line or "left out" in line for line in again), again
        for pool in ("cpu", "gpu", "memory"):
            server.worker(pool, FORGETLESS_CACHE=str(folder / f"cache-{pool}"), HOME=str(folder / f"home-{pool}"))
        yield server, S3Store("placed", "team", folder / "seen")


def start_run(server: Server, recipe_file: Path, *overrides: str) -> str:
    """Return the id of a new run of finetune/cpu."""
    asked = ["-p", f"recipe={recipe_file}", "-p", f"overrides={json.dumps([*PLACED, *overrides])}"]
    shown = server.prefect("deployment", "run", "finetune/cpu", *asked)
    return next(word for line in shown.splitlines() if "UUID" in line for word in line.split() if word.count("-") == 4)


def children(server: Server, flow_run: str) -> list[dict[str, Any]]:
    return server.ask("flow_runs/filter", flow_runs={"parent_flow_run_id": {"any_": [flow_run]}}, sort="START_TIME_ASC")


def checkpoints(server: Server) -> list[Path]:
    return list((server.folder / "cache-gpu").rglob("training-*/last/state.safetensors"))


def test_a_run_places_its_stages_on_other_workers(team: tuple[Server, S3Store], recipe: Path) -> None:  # noqa: F811
    server, store = team
    flow_run = start_run(server, recipe, "train.method=qlora")
    ended(server, flow_run, "COMPLETED")
    manifest = of_run(store, flow_run)
    assert manifest.status == "completed"
    assert manifest.merge_choice and manifest.proof and manifest.merged
    placed = [(run["name"].partition("-")[0], run["work_pool_name"]) for run in children(server, flow_run)]
    assert placed == [("score", "gpu"), ("train", "gpu"), ("score", "gpu"), (placed[3][0], "memory")]
    assert not store.list_folders("handoffs") and not list(store.list_files("handoffs"))
    again = start_run(server, recipe, "train.method=qlora")
    ended(server, again, "COMPLETED")
    repeated = of_run(store, again)
    made = {name for name, stage in repeated.stages.items() if stage.status != "reused"}
    assert made == {"ollama", "publish"}  # what every run does
    assert repeated.gguf.sha256 == manifest.gguf.sha256


def test_a_childs_error_is_the_runs_own(team: tuple[Server, S3Store], recipe: Path) -> None:  # noqa: F811
    server, store = team
    flow_run = start_run(server, recipe, "train.target_modules=[query]")
    run = ended(server, flow_run, "FAILED")
    manifest = of_run(store, flow_run)
    assert manifest.stages["train"].status == "failed"
    assert "train-adapter/gpu said so: http" in manifest.error
    assert "match nothing in this model" in manifest.error and "match nothing" in run["state"]["message"]


def test_cancelling_a_run_cancels_its_child_which_leaves_a_checkpoint(
    team: tuple[Server, S3Store],
    recipe: Path,  # noqa: F811
) -> None:
    server, store = team
    long = ["train.epochs=90", "train.learning_rate=0.001", "train.checkpoint_minutes=0.01"]
    flow_run = start_run(server, recipe, *long)
    wait(lambda: len(children(server, flow_run)) > 1 and list(store.list_files("runs")))
    child = wait(lambda: next((c for c in children(server, flow_run) if c["name"].startswith("train")), None))
    wait(lambda: read_run(server, child["id"])["state_type"] == "RUNNING")
    wait(lambda: checkpoints(server))
    server.prefect("flow-run", "cancel", flow_run)
    ended(server, flow_run, "CANCELLED")
    ended(server, child["id"], "CANCELLED")
    assert checkpoints(server)


def test_a_lost_child_is_started_again_and_goes_on(team: tuple[Server, S3Store], recipe: Path) -> None:  # noqa: F811
    server, store = team
    long = ["train.epochs=60", "train.learning_rate=0.001", "train.checkpoint_minutes=0.01", "train.seed=11"]
    flow_run = start_run(server, recipe, *long)
    child = wait(lambda: next((c for c in children(server, flow_run) if c["name"].startswith("train")), None))
    others = set(checkpoints(server))
    wait(lambda: set(checkpoints(server)) - others)
    pid = wait(lambda: read_run(server, child["id"])["infrastructure_pid"])
    os.kill(int(pid.rpartition(":")[2]), signal.SIGKILL)
    ended(server, flow_run, "COMPLETED")
    trained = [c for c in children(server, flow_run) if c["name"].startswith("train")]
    assert [c["state_type"] for c in trained] == ["CRASHED", "COMPLETED"]
    manifest = of_run(store, flow_run)
    assert manifest.stages["train"].note.startswith("continued from step ")
    assert 0 < manifest.adapter.resumed[0] < manifest.adapter.steps


def test_absent_deployments_are_named_before_anything_starts(
    team: tuple[Server, S3Store],
    recipe: Path,  # noqa: F811
) -> None:
    server, _ = team
    overrides = ["--set", "placement.train=train-adapter/tpu", "--set", "placement.score=finetune/cpu"]
    shown = server.run("-m", "flows.cli", "run", str(recipe), *overrides, "--json", code=2)
    error = json.loads(shown.splitlines()[-1])["error"]
    assert "placement.score: expected a deployment of score-model, found 'finetune/cpu'." in error
    assert "there is no deployment train-adapter/tpu" in error and "it has train-adapter/gpu" in error


def test_a_pool_without_a_worker_is_said(
    team: tuple[Server, S3Store],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows import dispatch

    server, _ = team
    server.prefect("work-pool", "create", "idle", "--type", "process")
    server.prefect("deploy", "flows.watch.watch", "-n", "idle", "-p", "idle")
    shown: list[str] = []
    with temporary_settings({PREFECT_API_URL: server.url}), get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name("watch/idle")
        run = client.create_flow_run_from_deployment(deployment.id)
        monkeypatch.setattr(dispatch, "NO_WORKER_SECONDS", -1.0)
        monkeypatch.setattr(dispatch, "POLL_SECONDS", 0.1)
        monkeypatch.setattr(dispatch, "report_progress", lambda *words: shown.append(words[3]))

        class Enough(Exception):
            pass

        def stop(_: float) -> None:
            if shown:
                raise Enough

        monkeypatch.setattr(dispatch.time, "sleep", stop)
        with pytest.raises(Enough):
            dispatch._wait(client, "watch/idle", run, "train")
    assert shown == ["no worker polls the work pool idle. Start one: prefect worker start --pool idle"]
