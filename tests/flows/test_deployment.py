"""`prefect deploy --all` and `prefect deployment run` on a real server with a real process worker."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from tasks.core.manifest import read_manifest
from tasks.core.store import FileStore
from tests.flows.test_finetune import recipe  # noqa: F401 - the tiny recipe is the fixture's

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def test_a_deployed_run_goes_through_a_worker(recipe: Path, tmp_path: Path) -> None:  # noqa: F811
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    store = FileStore(tmp_path / "store")
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")},
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_API_URL": url,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "FORGETLESS_STORE": str(store.root),
        "OLLAMA_HOST": "127.0.0.1:9",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }

    def prefect(*words: str) -> str:
        result = subprocess.run(
            [sys.executable, "-m", "prefect", "--no-prompt", *words],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    log = (tmp_path / "server.log").open("w")
    server = subprocess.Popen(
        [sys.executable, "-m", "prefect", "server", "start", "--port", str(port)],
        env=environment,
        stdout=log,
        stderr=log,
    )
    worker = None
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(1)
        prefect("work-pool", "create", "cpu", "--type", "process")
        deployed = prefect("deploy", "--all")
        assert "finetune/cpu" in deployed and "combine/cpu" in deployed
        worker = subprocess.Popen(
            [sys.executable, "-m", "prefect", "worker", "start", "--pool", "cpu"],
            env=environment,
            stdout=log,
            stderr=log,
        )
        shown = prefect("deployment", "run", "finetune/cpu", "-p", f"recipe={recipe}", "--watch")
        assert "Completed" in shown or "completed" in shown
        manifest = read_manifest(store, "latest")
        assert manifest.status == "completed"
        assert manifest.report.verdict in {"promote", "reject", "inconclusive"}
        assert manifest.flow_run_id
        again = ["-p", f"recipe={recipe}", "-p", 'overrides=["train.rank=2", "train.seed=7"]']
        prefect("deployment", "run", "finetune/cpu", *again, "--watch")
        combination = json.dumps({"runs": [manifest.run_id, "latest"], "weights": [0.5, 0.5]})
        asked = ["-p", f"combination={combination}", "-p", "name=mixed"]
        prefect("deployment", "run", "combine/cpu", *asked, "--watch")
        combined = read_manifest(store, "latest")
        assert combined.run_id.startswith("mixed-")
        assert combined.status == "completed"
        assert combined.stages["before"].status == "reused"
        assert combined.adapter.rank == 6
    finally:
        for process in (worker, server):
            if process is not None:
                process.terminate()
                process.wait(timeout=60)
        log.close()
