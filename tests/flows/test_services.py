"""Who can reach what is started here: every listening socket is on this machine's loopback, seen in /proc."""

import contextlib
import ipaddress
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.conftest import ROOT


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def family(root: int) -> set[int]:
    """Return a process and all that descend from it."""
    parents: dict[int, int] = {}
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(place.name)] = int((place / "stat").read_text().rpartition(")")[2].split()[1])
    found = {root}
    while more := {process for process, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def listening(processes: set[int]) -> dict[int, set[str]]:
    """Return the addresses that processes listen at, by port."""
    inodes = set()
    for process in processes:
        with contextlib.suppress(OSError):
            for handle in Path(f"/proc/{process}/fd").iterdir():
                with contextlib.suppress(OSError):
                    inodes.add(os.readlink(handle).removeprefix("socket:[").removesuffix("]"))
    found: dict[int, set[str]] = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A" and rest[5] in inodes:
                raw, port = local.split(":")
                words = [bytes.fromhex(raw[at : at + 8])[::-1] for at in range(0, len(raw), 8)]
                found.setdefault(int(port, 16), set()).add(str(ipaddress.ip_address(b"".join(words))))
    return found


def is_private(found: dict[int, set[str]]) -> bool:
    return all(ipaddress.ip_address(address).is_loopback for addresses in found.values() for address in addresses)


def test_a_socket_that_is_open_to_all_is_seen() -> None:
    with socket.socket() as open_to_all, socket.socket() as closed:
        for sock, host in ((open_to_all, "0.0.0.0"), (closed, "127.0.0.1")):
            sock.bind((host, 0))
            sock.listen()
        found = listening({os.getpid()})
        assert found[open_to_all.getsockname()[1]] == {"0.0.0.0"}
        assert found[closed.getsockname()[1]] == {"127.0.0.1"}
        assert not is_private(found)


@contextlib.contextmanager
def started(command: list[str], log: Path, **more: str) -> Iterator[subprocess.Popen[bytes]]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**kept, **more}, stdout=file, stderr=file, start_new_session=True
        )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def wait(process: subprocess.Popen[bytes], ready: Callable[[], bool], log: Path, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text(errors="replace")[-2000:]
        time.sleep(0.3)


def answers(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(url).status_code == 200
    return False


def test_the_dashboard_is_for_this_machine_alone(tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log"
    command = [sys.executable, "-m", "flows.cli", "dashboard", "--port", str(port), "--store", str(tmp_path / "store")]
    with started(command, log, STREAMLIT_SERVER_ADDRESS="0.0.0.0") as process:
        wait(process, lambda: answers(f"http://127.0.0.1:{port}/_stcore/health"), log)
        found = listening(family(process.pid))
    assert found[port] == {"127.0.0.1"} and is_private(found)


def test_a_runs_own_prefect_server_is_for_this_machine_alone(prefect_server: None) -> None:
    from prefect.settings import PREFECT_API_URL

    port = httpx.URL(PREFECT_API_URL.value()).port
    found = listening(family(os.getpid()))
    assert port in found and found[port] == {"127.0.0.1"}
    assert is_private(found)


@pytest.mark.slow
def test_server_and_worker_are_for_this_machine_alone(tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log"
    more = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_API_PORT": str(port),
        "FORGETLESS_STORE": str(tmp_path / "store"),
    }
    with started(["infra/up.sh"], log, **more) as process:
        wait(process, lambda: "Worker" in log.read_text(errors="replace"), log)
        found = listening(family(process.pid))
    assert found[port] == {"127.0.0.1"} and is_private(found)


def test_a_dask_cluster_on_this_machine_is_for_it_alone() -> None:
    pytest.importorskip("prefect_dask")
    from flows.prepare_data import dask_runner

    with dask_runner("local"):
        assert is_private(listening(family(os.getpid())))
