"""The automations of infra/automations on a bootstrapped server: what starts a run, what is told, what goes on."""

import json
import os
import signal
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml

from tasks.core.manifest import read_manifest, run_ids
from tasks.core.store import FileStore
from tests.flows.servers import Server, ended, of_run, prefect_server, wait
from tests.flows.test_finetune import recipe  # noqa: F401 - the tiny recipe is the fixture's

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
LOST = 200  # seconds: heartbeats every 30, lost after 120 without one, and the server's own rounds


@pytest.fixture(scope="module")
def told() -> Iterator[tuple[str, list[dict[str, str]]]]:
    """An address for notifications, and what came there."""
    received: list[dict[str, str]] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/hook-of-the-team", received
    server.shutdown()


@pytest.fixture(scope="module")
def server(told: tuple[str, list], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("automations")
    with prefect_server(folder, FORGETLESS_STORE=str(folder / "store"), FORGETLESS_NOTIFY=told[0]) as server:
        shown = server.run("infra/bootstrap.py")
        assert "left out" not in shown and told[0] not in shown
        server.worker("cpu")
        yield server


def start(server: Server, deployment: str, **parameters: Any) -> str:
    """Return the id of a new run of a deployment."""
    asked = [word for name, value in parameters.items() for word in ("-p", f"{name}={json.dumps(value)}")]
    shown = server.prefect("deployment", "run", deployment, *asked)
    return next(word for line in shown.splitlines() if "UUID" in line for word in line.split() if word.count("-") == 4)


def runs_of(server: Server, flow: str) -> list[dict[str, Any]]:
    return server.ask("flow_runs/filter", flows={"name": {"any_": [flow]}}, sort="EXPECTED_START_TIME_ASC")


def test_new_data_starts_a_run(server: Server, recipe: Path, tmp_path: Path) -> None:  # noqa: F811
    settings = yaml.safe_load(recipe.read_text())
    rows = tmp_path / "rows"
    rows.mkdir()
    given = json.loads((recipe.parent / "rows.json").read_text())
    (rows / "first.json").write_text(json.dumps(given[:40]))
    settings["data"]["sources"] = str(rows)
    mine = recipe.with_name("watched.yaml")
    mine.write_text(yaml.safe_dump(settings))
    known = len(runs_of(server, "finetune"))
    for _ in range(2):  # the first time there is nothing to compare with, the second time nothing changed
        ended(server, start(server, "watch/cpu", recipe=str(mine), overrides=["train.rank=2"]), "COMPLETED")
    assert len(runs_of(server, "finetune")) == known
    (rows / "second.json").write_text(json.dumps(given[40:]))
    ended(server, start(server, "watch/cpu", recipe=str(mine), overrides=["train.rank=2"]), "COMPLETED")
    started = wait(lambda: runs_of(server, "finetune")[known:], 120)
    assert [run["parameters"]["recipe"] for run in started] == [str(mine)]
    assert started[0]["parameters"]["overrides"] == ["train.rank=2"]
    ended(server, started[0]["id"], "COMPLETED")
    assert of_run(FileStore(server.folder / "store"), started[0]["id"]).dataset.read == len(given)


def test_a_rejected_adapter_and_a_failed_run_are_told(
    server: Server,
    told: tuple[str, list[dict[str, str]]],
    recipe: Path,  # noqa: F811
) -> None:
    settings = yaml.safe_load(recipe.read_text())
    settings["eval"]["capabilities"][1]["budget"] = 0.0001
    strict = recipe.with_name("strict.yaml")
    strict.write_text(yaml.safe_dump(settings))
    run = start(server, "finetune/cpu", recipe=str(strict), gate=True)
    ended(server, run, "COMPLETED")
    manifest = of_run(FileStore(server.folder / "store"), run)
    assert manifest.report.verdict == "reject"
    note = wait(lambda: [n for n in told[1] if "rejected" in n["subject"]], 120)[0]
    assert manifest.run_id in note["subject"] and "| text (bits/byte) | retention |" in note["text"]
    failed = ended(server, start(server, "finetune/cpu", recipe="no-such-recipe"), "FAILED")
    note = wait(lambda: [n for n in told[1] if failed["name"] in n["subject"]], 120)[0]
    assert "There is no recipe 'no-such-recipe'" in note["text"] and f"/runs/flow-run/{failed['id']}" in note["text"]


def test_a_promoted_model_is_checked_and_damage_is_told(
    server: Server,
    told: tuple[str, list[dict[str, str]]],
    recipe: Path,  # noqa: F811
) -> None:
    store = FileStore(server.folder / "store")
    done = start(server, "finetune/cpu", recipe=str(recipe))
    ended(server, done, "COMPLETED")
    manifest = of_run(store, done)
    assert manifest.report.verdict == "promote"
    checked = wait(lambda: [r for r in runs_of(server, "regression") if r["parameters"]["name"] == "tiny"], 120)[0]
    ended(server, checked["id"], "COMPLETED")
    adapter = store.local_folder(manifest.adapter.artifact) / "adapter_model.safetensors"
    data = bytearray(adapter.read_bytes())
    data[-1] ^= 1
    adapter.write_bytes(bytes(data))
    again = ended(server, start(server, "regression/cpu", name="tiny"), "FAILED")
    assert "adapter_model.safetensors is damaged" in again["state"]["message"]
    note = wait(lambda: [n for n in told[1] if "regressed" in n["subject"]], 120)[0]
    assert "tiny:promoted is not what was promoted" in note["text"]
    store.delete(f"artifacts/adapter/{manifest.adapter.artifact.key}")


def test_a_lost_machines_run_goes_on_at_another(server: Server, recipe: Path) -> None:  # noqa: F811
    store = FileStore(server.folder / "store")
    server.prefect(
        "work-pool", "create", "away", "--type", "process", "--base-job-template", "infra/pools/process.json"
    )
    machine = server.worker("away")
    long = ["train.epochs=60", "train.learning_rate=0.001", "train.checkpoint_minutes=0.01", "train.seed=12"]
    server.prefect("deploy", "flows.finetune.finetune", "-n", "away", "-p", "away", "-t", "forgetless", "-t", "resumes")
    run = start(server, "finetune/away", recipe=str(recipe), overrides=long)
    wait(lambda: list(store.root.glob("work/training-*/last/state.safetensors")))
    first = of_run(store, run).run_id
    os.killpg(machine.pid, signal.SIGSTOP)  # a machine that is gone says nothing, not even that its processes ended
    pid = server.ask("flow_runs/filter", flow_runs={"id": {"any_": [run]}})[0]["infrastructure_pid"]
    os.kill(int(pid.rpartition(":")[2]), signal.SIGKILL)
    server.worker("away", name="another")
    final = wait(
        lambda: (r := server.ask("flow_runs/filter", flow_runs={"id": {"any_": [run]}})[0])["run_count"] > 1 and r, LOST
    )
    assert final["run_count"] == 2
    ended(server, run, "COMPLETED")
    os.killpg(machine.pid, signal.SIGKILL)
    manifest = of_run(store, run)
    assert manifest.run_id == first and manifest.status == "completed"
    assert [r for r in run_ids(store) if read_manifest(store, r).flow_run_id == run] == [first]
