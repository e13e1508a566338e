"""Shipped recipes: each plans without a network, says its seeds, and asks for no more than its items can show."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from flows.cli import main
from tasks.core.config import RECIPES, load_recipe, shipped_recipes

HUB = [name for name in shipped_recipes() if name != "quickstart"]


@pytest.fixture
def _no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing downloaded before, and nothing that could be downloaded now, whatever this machine has."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("FORGETLESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")


@pytest.mark.usefixtures("_no_network")
@pytest.mark.parametrize("name", shipped_recipes())
def test_every_recipe_plans_offline(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", name, "--json", "--store", str(tmp_path / "store")]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert {s["action"] for s in plan["stages"][:-2]} == {"compute"}
    assert len(plan["stages"]) == 13
    assert len(plan["notes"]) == (2 if name in HUB else 0)
    assert all("cannot be reached" in n and n.endswith("what the store already has for it.") for n in plan["notes"])


@pytest.mark.usefixtures("_no_network")
def test_what_is_here_is_planned_as_ever(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A base out of reach says nothing of the data set, and the screen shows the note."""
    store = str(tmp_path / "store")
    words = ["plan", "quickstart", "--store", store, "--set", "model.base=owner/name"]
    assert main([*words, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["base"] is None
    assert [n.partition(" is ")[0] for n in plan["notes"]] == ["The base model owner/name"]
    assert plan["detectable"][1]["items"] == 600
    assert main(words) == 0
    assert "Note: The base model owner/name is not in the local cache" in capsys.readouterr().out


def test_a_plan_downloads_no_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / ("c0ffee" + "0" * 34)
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    asked = []

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert main(["plan", "quickstart", "--set", "model.base=owner/name", "--json", "--store", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["base"] == str(folder)
    assert asked
    assert not any("safetensors" in pattern for patterns in asked for pattern in patterns)


@pytest.mark.usefixtures("_no_network")
def test_a_run_still_refuses_what_is_out_of_reach(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "quickstart", "--data", "owner/name", "--store", str(tmp_path / "store")]) == 3
    assert "not downloaded and the Hub cannot be reached" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "status", "refusal", "code", "message"),
    [
        ("--set model.base=me/gated", 403, "GatedRepo", 2, "The base model me/gated is gated: accept its licence"),
        ("--set model.base=me/typo", 404, "RepoNotFound", 2, "The base model me/typo is not on the Hub"),
        ("--data me/gated", 403, "GatedRepo", 3, "Hub data set me/gated is gated."),
        ("--data me/typo", 404, "RepoNotFound", 3, "There is no file, folder or Hub data set me/typo"),
    ],
)
def test_a_wrong_or_gated_id_is_an_error_online(
    words: str, status: int, refusal: str, code: int, message: str, tmp_path: Path
) -> None:
    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", refusal)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", "plan", "quickstart", *words.split()],
        env={**environment, "HF_HOME": str(tmp_path), "FORGETLESS_STORE": str(tmp_path / "store")},
        capture_output=True,
        text=True,
        check=False,
    )
    server.shutdown()
    assert done.returncode == code
    assert done.stderr.startswith(f"forgetless: {message}")


@pytest.mark.parametrize("name", HUB)
def test_seeds_are_said_and_limits_leave_enough_to_decide(name: str) -> None:
    text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
    raw, recipe = yaml.safe_load(text), load_recipe(name)
    assert (raw["train"]["seed"], raw["eval"]["seed"]) == (recipe.train.seed, recipe.eval.seed)
    header = text.partition("\nname:")[0]
    assert f"train.seed {recipe.train.seed} and eval.seed {recipe.eval.seed}" in header
    assert all(word in header for word in ("not measured", "Licences:", "GPU of"))
    assert recipe.eval.limit is None or recipe.eval.limit >= 400  # 5 points need about 350 items, one in ten changing


def test_every_task_is_one_that_lm_eval_has() -> None:
    from importlib import util

    from lm_eval.tasks import TaskManager

    root = Path(next(iter(util.find_spec("lm_eval").submodule_search_locations))) / "tasks"
    named = {t.name for r in HUB for c in load_recipe(r).eval.capabilities for t in c.tasks if not t.file}
    folders = [str(root / name.partition("-")[0]) for name in sorted(named)]  # all of lm-eval takes 15 s to index
    assert named and named <= set(TaskManager(include_path=folders, include_defaults=False).all_tasks)
