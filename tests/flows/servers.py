"""A real Prefect server and real process workers, each in a process of its own."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

from tasks.core.manifest import RunManifest, read_manifest, run_ids
from tasks.core.store import Store
from tests.conftest import ROOT


class Server:
    """`environment` is what its workers and commands get; a worker may have more of its own."""

    def __init__(self, folder: Path, **environment: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder, self.url = folder, f"http://127.0.0.1:{self.port}/api"
        self.processes: list[subprocess.Popen[bytes]] = []
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")},
            "PREFECT_HOME": str(folder / "prefect"),
            "PREFECT_API_URL": self.url,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "FORGETLESS_HOME": str(ROOT),
            "PYTHONPATH": str(ROOT),
            "OLLAMA_HOST": "127.0.0.1:9",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            **environment,
        }

    def start(self, *words: str, name: str, folder: Path = ROOT, **environment: str) -> subprocess.Popen[bytes]:
        """Start `python WORDS` in a session of its own, its output in a file `name`.log."""
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, *words],
                cwd=folder,
                env=self.environment | environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def worker(
        self, pool: str, name: str | None = None, *words: str, folder: Path = ROOT, **environment: str
    ) -> subprocess.Popen[bytes]:
        name = name or f"worker-{pool}"
        command = ["-m", "prefect", "worker", "start", "--pool", pool, "--name", name, *words]
        return self.start(*command, name=name, folder=folder, **environment)

    def run(self, *words: str, code: int = 0) -> str:
        """Return what `python WORDS` prints, after it ended with `code`."""
        done = subprocess.run(
            [sys.executable, *words],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=1800,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    def prefect(self, *words: str, code: int = 0) -> str:
        return self.run("-m", "prefect", "--no-prompt", *words, code=code)

    def ask(self, path: str, **body: Any) -> Any:
        return httpx.post(f"{self.url}/{path}", json=body, timeout=30).raise_for_status().json()


@contextlib.contextmanager
def prefect_server(folder: Path, **environment: str) -> Iterator[Server]:
    """Yield a server that answers; it and all that was started with it end with the block."""
    server = Server(folder, **environment)
    server.start("-m", "prefect", "server", "start", "--port", str(server.port), name="server")
    try:
        deadline = time.monotonic() + 180
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{server.url}/health").status_code == 200:
                    break
            assert time.monotonic() < deadline, (folder / "server.log").read_text()
            time.sleep(0.5)
        yield server
    finally:
        for process in reversed(server.processes):
            if process.poll() is None:
                process.terminate()
        for process in server.processes:
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()


def read_run(server: Server, flow_run: str) -> dict[str, Any]:
    (found,) = server.ask("flow_runs/filter", flow_runs={"id": {"any_": [flow_run]}})
    return found


def wait(until: Callable[[], Any], seconds: float = 600) -> Any:
    """Return the first true answer of `until`."""
    deadline = time.monotonic() + seconds
    while not (found := until()):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    return found


def ended(server: Server, flow_run: str, state: str) -> dict[str, Any]:
    final = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
    found = wait(lambda: (run := read_run(server, flow_run))["state_type"] in final and run)
    assert found["state_type"] == state, found["state"]
    return found


def of_run(store: Store, flow_run: str) -> RunManifest:
    manifests = (read_manifest(store, run_id) for run_id in run_ids(store))
    return next(manifest for manifest in manifests if manifest.flow_run_id == flow_run)
