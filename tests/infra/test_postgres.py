"""The services as systemd would start them, on a real PostgreSQL: the units' own commands and settings, run here."""

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PASSWORD = "a test's database password"
LOGIN = "team:a test's log-in"
BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BINARIES, reason="no PostgreSQL server here: apt-get install postgresql"),
]
FLOW = """
import time
from pathlib import Path
from prefect import flow

@flow
def greet(seconds: int = 0, marker: str = ""):
    try:
        if marker:
            Path(marker).write_text("at work")
        time.sleep(seconds)
    finally:
        if marker:  # it takes as long as a checkpoint
            time.sleep(3)
            Path(marker).write_text("checkpoint")
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(met: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < deadline, what
        time.sleep(0.3)


def unit(name: str) -> tuple[list[str], dict[str, str]]:
    """A unit's command and its Environment= lines, with this clone and this Python in place of the installed ones."""
    text = (ROOT / "infra" / "systemd" / name).read_text()
    text = (
        text.replace("%i", "cpu")
        .replace("/opt/forgetless/.venv/bin", str(Path(sys.executable).parent))
        .replace("/opt/forgetless", str(ROOT))
    )
    (command,) = re.findall(r"^ExecStart=(.+)$", text, re.M)
    return ["sh", "-c", f"exec {command.replace('$$', '$')}"], dict(re.findall(r"^Environment=(\w+)=(.*)$", text, re.M))


@pytest.fixture(scope="module")
def postgres() -> Iterator[int]:
    """The port of a new PostgreSQL with the role and database `prefect`, and passwords asked for."""
    folder = Path(tempfile.mkdtemp(prefix="forgetless-postgres-"))
    root = os.geteuid() == 0
    as_owner = ["runuser", "-u", "postgres", "--"] if root else []
    if root:
        shutil.chown(folder, "postgres")
    (folder / "password").write_text(PASSWORD)
    (folder / "password").chmod(0o644)
    port = free_port()

    def run(*words: str) -> None:
        done = subprocess.run([*as_owner, *words], cwd=folder, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    data, tools = str(folder / "data"), BINARIES[-1]
    run(str(tools / "initdb"), "-D", data, "-U", "prefect", "-A", "scram-sha-256", f"--pwfile={folder / 'password'}")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
    run(str(tools / "pg_ctl"), "-D", data, "-w", "-l", str(folder / "log"), "-o", options, "start")
    try:
        query(port, "CREATE DATABASE prefect", database="postgres")
        yield port
    finally:
        run(str(tools / "pg_ctl"), "-D", data, "-w", "-m", "immediate", "stop")
        shutil.rmtree(folder)


def query(port: int, sql: str, database: str = "prefect") -> str:
    done = subprocess.run(
        ["psql", "-h", "127.0.0.1", "-p", str(port), "-U", "prefect", "-d", database, "-Atc", sql],
        env=os.environ | {"PGPASSWORD": PASSWORD},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_services_run_on_postgresql(postgres: int, tmp_path: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    base = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    secrets = {"POSTGRES_PASSWORD": PASSWORD, "PREFECT_API_AUTH_STRING": LOGIN}  # what /etc/forgetless/env holds
    here = {"PREFECT_HOME": str(tmp_path / "prefect"), "PREFECT_API_URL": url, "FORGETLESS_HOME": str(tmp_path)}
    log = (tmp_path / "log").open("w")

    def start(name: str, **more: str) -> subprocess.Popen[bytes]:
        command, environment = unit(name)
        return subprocess.Popen(
            command,
            cwd=tmp_path,
            env=base | environment | secrets | here | more,
            stdout=log,
            stderr=log,
        )

    def start_server() -> subprocess.Popen[bytes]:
        server = start(
            "forgetless-server.service",
            PREFECT_SERVER_DATABASE_PORT=str(postgres),
            PREFECT_SERVER_API_PORT=str(port),
            PREFECT_SERVER_API_AUTH_STRING="",  # the unit's own command sets it
        )

        def ready() -> bool:
            assert server.poll() is None, (tmp_path / "log").read_text()[-2000:]
            try:
                return httpx.get(f"{url}/ready", timeout=10).status_code == 200
            except httpx.HTTPError:
                return False

        wait_until(ready, 180, "the server did not start")
        return server

    def prefect(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "prefect", "--no-prompt", *words],
            cwd=tmp_path,
            env=base | secrets | here,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    (tmp_path / "greeting.py").write_text(FLOW)
    work = [{"name": "cpu", "entrypoint": "greeting.py:greet", "work_pool": {"name": "cpu"}}]
    pull = [{"prefect.deployments.steps.set_working_directory": {"directory": str(tmp_path)}}]
    (tmp_path / "prefect.yaml").write_text(yaml.safe_dump({"name": "t", "pull": pull, "deployments": work}))
    processes = [server := start_server()]
    try:
        assert httpx.get(f"{url}/work_pools/cpu").status_code == 401  # nobody without the log-in
        assert httpx.get(f"{url}/work_pools/cpu", auth=tuple(LOGIN.split(":", 1))).status_code == 404
        assert query(postgres, "SELECT count(*) FROM pg_extension WHERE extname = 'pg_trgm'") == "1"
        version = query(postgres, "SELECT version_num FROM alembic_version")
        prefect("work-pool", "create", "cpu", "--type", "process")
        prefect("deploy", "--all")
        processes.append(worker := start("forgetless-worker@.service"))
        prefect("deployment", "run", "greet/cpu", "--watch")
        assert query(postgres, "SELECT state_type FROM flow_run") == "COMPLETED"

        marker = tmp_path / "marker"
        prefect("deployment", "run", "greet/cpu", "-p", "seconds=300", "-p", f"marker={marker}")
        wait_until(marker.exists, 120, "the run did not start")
        worker.terminate()  # as KillMode=mixed does it
        worker.wait(timeout=120)
        assert marker.read_text() == "checkpoint"

        server.terminate()
        server.wait(timeout=60)
        processes.append(start_server())
        assert query(postgres, "SELECT version_num FROM alembic_version") == version
        assert query(postgres, "SELECT count(*) FROM flow_run") == "2"
        states = query(postgres, "SELECT state_type FROM flow_run ORDER BY created").split()
        assert states == ["COMPLETED", "CRASHED"]  # by itself: nobody has to find it missing
        said = (tmp_path / "log").read_text()
        assert PASSWORD not in said and LOGIN not in said
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
                process.wait(timeout=60)
        log.close()
