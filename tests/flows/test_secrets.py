"""Whole runs with a secret in every place that can hold one: none of them turns up in what a run leaves or says."""

import base64
import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import pytest
import yaml

from flows.cli import main
from tasks.core.manifest import read_manifest
from tasks.core.s3 import S3Store
from tests.conftest import ROOT
from tests.flows.test_finetune import recipe  # noqa: F401 - the tiny recipe is the fixture's

SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "PlantedAwsSecretKey0123456789abcdefghijk",
    "AWS_SESSION_TOKEN": "PlantedAwsSessionToken0001",
    "HF_TOKEN": "hf_PlantedHubToken0002",
    "WANDB_API_KEY": "planted0wandb0key0003" + "0" * 19,
    "SWANLAB_API_KEY": "PlantedSwanlabKey0004",
    "MLFLOW_TRACKING_PASSWORD": "PlantedMlflowPassword0005",
    "PREFECT_API_KEY": "pnu_PlantedPrefectKey0006",
    "PREFECT_API_AUTH_STRING": "",  # set to something, it would lock the run's own server
}
USER, PASSWORD, TOKEN = "planted-user-0007", "PlantedUrlPassword0008", "PlantedSignature0009"
OLLAMA_PASSWORD = "PlantedOllamaPassword0010"
PLANTED = [*filter(None, SECRETS.values()), PASSWORD, TOKEN, OLLAMA_PASSWORD]
PLANTED += [base64.b64encode(f"{USER}:{p}".encode()).decode().rstrip("=") for p in (PASSWORD, OLLAMA_PASSWORD)]


def leaks(data: bytes | str) -> list[str]:
    """Return the planted secrets that occur in some bytes, also as UTF-16 and with letters escaped."""
    found = data.encode() if isinstance(data, str) else data
    return [secret for secret in PLANTED if secret.encode() in found or secret.encode("utf-16-le") in found]


def test_the_search_finds_what_is_there() -> None:
    for secret in PLANTED:
        assert leaks(f"x{secret}x") and leaks(json.dumps({"a": secret})) and leaks(secret.encode("utf-16-le"))
    assert not leaks("nothing")


class Rows:
    """A server that gives rows to who signs with user, password and token, the first `most` times."""

    def __init__(self, rows: bytes) -> None:
        self.most, self.asked = 10**9, 0
        gate = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                gate.asked += 1
                wanted = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
                known = self.headers.get("Authorization") == wanted and TOKEN in self.path
                self.send_response(200 if known and gate.asked <= gate.most else 403)
                self.send_header("Content-Length", str(len(rows)))
                self.end_headers()
                self.wfile.write(rows)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.place = f"127.0.0.1:{self.server.server_port}/rows.json"
        self.address = f"http://{USER}:{PASSWORD}@{self.place}?X-Amz-Signature={TOKEN}&token={TOKEN}"


@pytest.fixture
def rows(recipe: Path) -> Iterator[Rows]:  # noqa: F811
    server = Rows((recipe.parent / "rows.json").read_bytes())
    yield server
    server.server.shutdown()


def watch_commands(session: int, seen: set[bytes], ended: threading.Event) -> None:
    """Collect the command lines of every process of a session, and what each was told in files named there."""
    while not ended.wait(0.05):
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if int((process / "stat").read_text().rpartition(")")[2].split()[3]) == session:
                    seen.add((process / "cmdline").read_bytes())
            except (OSError, ValueError, IndexError):
                continue


def run_cli(arguments: list[str], environment: dict[str, str], folder: Path) -> tuple[int, str, set[bytes]]:
    """Return the exit code of a command in a process of its own, what it printed, and all command lines meanwhile."""
    command = [sys.executable, "-m", "flows.cli", *arguments]
    seen: set[bytes] = set()
    ended = threading.Event()
    with (folder / "printed.txt").open("wb") as file:
        process = subprocess.Popen(
            command, env=environment, cwd=folder, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        watcher = threading.Thread(target=watch_commands, args=(process.pid, seen, ended))
        watcher.start()
        code = process.wait(450)
        ended.set()
        watcher.join()
    return code, (folder / "printed.txt").read_text(errors="replace"), seen


def read_all(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield str(path.relative_to(folder)), path.read_bytes()


def read_database(path: Path) -> dict[str, str]:
    """Return what Prefect's database has, as text by table."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        tables = [name for (name,) in database.execute("select name from sqlite_master where type = 'table'")]
        return {table: str(database.execute(f'select * from "{table}"').fetchall()) for table in tables}


@pytest.mark.slow
def test_a_run_keeps_and_tells_no_secret(
    recipe: Path,  # noqa: F811
    rows: Rows,
    s3_endpoint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = yaml.safe_load(recipe.read_text())
    settings["data"]["sources"] = rows.address
    settings["export"]["imatrix"] = settings["export"]["adapter_gguf"] = settings["eval"]["on_gguf"] = False
    for capability in settings["eval"]["capabilities"]:
        for task in capability["tasks"]:
            task.update({k: str(recipe.parent / v) for k, v in task.items() if k != "name"})
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "tiny.yaml").write_text(yaml.safe_dump(settings))
    working = tmp_path / "working"
    working.mkdir()
    environment = {
        **SECRETS,
        "PYTHONPATH": str(ROOT),
        "AWS_ENDPOINT_URL_S3": s3_endpoint,
        "AWS_ACCESS_KEY_ID": "AKIAPLANTED",
        "AWS_DEFAULT_REGION": "us-east-1",
        "FORGETLESS_STORE": "s3://secrets/team",
        "FORGETLESS_CACHE": str(tmp_path / "cache"),
        "OLLAMA_HOST": f"http://{USER}:{OLLAMA_PASSWORD}@127.0.0.1:9",  # nothing answers there
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_LOGGING_TO_API_ENABLED": "true",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    }
    environment.pop("PREFECT_API_AUTH_STRING")
    for name, value in environment.items():
        if not name.startswith("PREFECT_"):  # those of this process are the test server's
            monkeypatch.setenv(name, value)
    boto3.client("s3", endpoint_url=s3_endpoint).create_bucket(Bucket="secrets")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    own = str(tmp_path / "own" / "tiny.yaml")

    code, printed, commands = run_cli(["run", own, "--debug"], inherited | environment, working)
    assert code == 0, printed
    assert rows.asked >= 2
    assert not leaks(printed)
    assert any(b"tasks.training.worker" in command for command in commands)
    assert not leaks(b"\n".join(commands))

    # A run that fails in the midst: the address stops working after the plan has read it.
    rows.most = rows.asked + 1
    override = f"data.sources=[{{path: '{rows.address}&more=1'}}]"
    code, failed, commands = run_cli(["run", own, "--set", override, "--debug"], inherited | environment, working)
    assert code != 0 and "the server does not let you read it (403" in failed
    assert not leaks(failed)
    assert not leaks(b"\n".join(c for c in commands if b"--set" not in c))  # what the user typed is the user's
    rows.most = 10**9

    store = S3Store("secrets", "team", tmp_path / "cache")
    listed = list(store.list_files(""))
    assert {file.path.split("/")[0] for file in listed} >= {"runs", "artifacts", "registry"}
    assert sorted(read_manifest(store, r).status for r in store.list_folders("runs")) == ["completed", "failed"]
    for file in listed:
        assert not leaks(file.path) and not leaks(b"".join(store.stream(file.path))), file.path
    manifest = next(m for r in store.list_folders("runs") if (m := read_manifest(store, r)).status == "completed")
    assert manifest.recipe.data.sources[0].path == f"http://{rows.place}"
    assert manifest.ollama.url == "http://127.0.0.1:9"
    assert len(list((tmp_path / "cache" / "downloads").iterdir())) == 2
    for folder in (tmp_path / "cache", tmp_path / "prefect", working):
        for name, data in read_all(folder):
            assert not leaks(name) and not leaks(data), f"{folder.name}/{name}"
    kept = read_database(tmp_path / "prefect" / "prefect.db")
    assert not leaks("".join(kept.values()))
    assert manifest.run_id in kept["flow_run"] and rows.place in kept["flow_run"]  # parameters
    assert "does not let you read it" in kept["flow_run_state"]
    assert "does not let you read it" in kept["log"]
    assert manifest.run_id in kept["artifact"]

    capsys.readouterr()
    for arguments in (
        ["plan", own],
        ["plan", own, "--json", "--set", override],
        ["show", manifest.run_id],
        ["show", manifest.run_id, "--json"],
        ["show", manifest.run_id, "--lineage"],
        ["runs", "--json"],
        ["doctor", "--json"],
        ["doctor"],
        ["store", "ls", "--json"],
        ["store", "du"],
        ["registry", "tiny", "--json"],
        ["chat", "ollama:tiny", "--prompt", "x"],
        ["export", manifest.run_id, "--to", "ollama", "--json"],
        ["export", manifest.run_id, "--to", "dir", "--out", str(tmp_path / "out")],
        ["export", manifest.run_id, "--to", "hub", "--repo", "me/tiny", "--dry-run", str(tmp_path / "hub")],
        ["data", "check", rows.address],
        ["data", "check", rows.address + "0", "--json", "--out", str(tmp_path / "check")],
        ["data", "show", rows.address, "--json"],
        ["data", "check", rows.address.replace(PASSWORD, f"{PASSWORD}wrong")],
        ["data", "check", rows.address.replace("rows.json", "rows.exe")],
        ["data", "check", f"s3://key:{PASSWORD}@bucket/rows.json"],
        ["plan", own, "--set", f"data.sources=[{rows.address}", "--set", f"train.rank={rows.address}"],
        ["plan", own, "--set", f"model.base={rows.address}"],
        ["runs", "--store", f"s3://key:{PASSWORD}@bucket/prefix"],
        ["runs", "--bogus", rows.address],
        ["runs", rows.address],
    ):
        main(arguments) if "--bogus" not in arguments and arguments[1:] != [rows.address] else _wrong_usage(arguments)
        said = capsys.readouterr()
        assert said.out or said.err, arguments
        assert not leaks(said.out + said.err), arguments
    for folder in (tmp_path / "out", tmp_path / "hub", tmp_path / "check"):
        found = dict(read_all(folder))
        assert found
        for name, data in found.items():
            assert not leaks(data), name


def _wrong_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
