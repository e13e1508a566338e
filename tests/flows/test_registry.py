"""promote, rollback and registry as a user has them: on a folder and in a bucket, with an Ollama and without."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.cli import main
from tasks.core import registry
from tasks.core.manifest import RunManifest, write_manifest
from tasks.core.records import OllamaRef
from tasks.core.store import FileStore, Store
from tests.dashboards import manifests as made
from tests.export.recorded_ollama import RecordedOllama

ROOT = Path(__file__).resolve().parents[2]
RECORDED = ("smol-min:latest", "mk-smollm2:latest", "smol-full:v1")  # models of different digests
Command = Callable[..., Any]


def run_id(number: int) -> str:
    return f"shop-20261120-21000{number}-000"


def add_run(store: Store, number: int, run: RunManifest | None = None, **changes: Any) -> RunManifest:
    """Write the manifest of a finished run of the recipe `shop`, whose served file has a sha256 of its own."""
    run = run or made.promoted()
    gguf = run.gguf and run.gguf.model_copy(update={"sha256": {**run.gguf.sha256, "q8_0": str(number) * 64}})
    fields = {"run_id": run_id(number), "recipe": made.recipe("shop"), "gguf": gguf, "ollama": None, **changes}
    run = run.model_copy(update=fields)
    write_manifest(store, run)
    return run


@pytest.fixture
def call(any_store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Return a function that runs a command on the store and returns its JSON."""
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")

    def command(*words: str, code: int = 0) -> Any:
        assert main([*words, "--store", any_store.url, "--json"]) == code
        return json.loads(capsys.readouterr().out)

    return command


@pytest.fixture
def ollama(call: Command, any_store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[RecordedOllama]:
    """An Ollama that has the models of three runs, which registered them."""
    with RecordedOllama() as server:
        monkeypatch.setenv("OLLAMA_HOST", server.url)
        for number, recorded in enumerate(RECORDED, 1):
            name = f"shop:{str(number) * 8}"
            server.models[name] = recorded
            done = OllamaRef(name=name, url=server.url, registered=True, digest=server.digest(recorded))
            add_run(any_store, number, ollama=done)
        yield server


def test_runs_are_promoted_and_rolled_back_with_the_whole_history(any_store: Store, call: Command) -> None:
    for number in (1, 2, 3):
        add_run(any_store, number)
        done = call("promote", run_id(number))
        assert (done["name"], done["alias"], done["version"]) == ("shop", "promoted", number)
        assert done["why"].startswith("Promote: zh-answers changed by +24.90 %")
        assert done["note"] == "No Ollama answers at http://127.0.0.1:9, so no name was moved there."
    assert call("promote", "latest") == done, "again is the same"
    assert call("promote", run_id(1), "--alias", "staging")["alias"] == "staging"
    back = call("rollback", "shop")
    assert (back["kind"], back["version"], back["run"], back["replaced"]) == ("rollback", 2, run_id(2), 3)
    assert call("rollback", "shop")["version"] == 1
    error = call("rollback", "shop", code=1)["error"]
    assert (
        error == "shop:promoted names version 1; no version was before. See its history with: forgetless registry shop"
    )
    (model,) = call("registry")
    assert {alias: move["version"] for alias, move in model["aliases"].items()} == {"promoted": 1, "staging": 1}
    found = call("registry", "shop")
    assert [(v["number"], v["run"], v["verdict"]) for v in found["versions"]] == [
        (n, run_id(n), "promote") for n in (1, 2, 3)
    ]
    assert [v["gguf_sha256"] for v in found["versions"]] == [str(n) * 64 for n in (1, 2, 3)]
    moves = found["aliases"]["promoted"]
    assert [(m["kind"], m["version"], m["replaced"]) for m in moves] == [
        ("promote", 1, None),
        ("promote", 2, 1),
        ("promote", 3, 2),
        ("rollback", 2, 3),
        ("rollback", 1, 2),
    ]


@pytest.mark.parametrize("made_run", [made.rejected, made.inconclusive])
def test_without_the_verdict_it_takes_a_reason(any_store: Store, call: Command, made_run: Any) -> None:
    run = add_run(any_store, 1, made_run().model_copy(update={"gguf": made.promoted().gguf}))
    verdict = run.report.verdict
    error = call("promote", run_id(1), code=1)["error"]
    assert error.startswith(f"Run {run_id(1)} is not promoted: its verdict is {verdict} (")
    assert error.endswith("say why with --force WHY; who and why are recorded.")
    assert registry.read_names(any_store) == [], "what is refused is not even added"
    assert call("promote", run_id(1), "--force", " ", code=2)["error"].startswith("--force needs the reason")
    done = call("promote", run_id(1), "--force", "the customer accepts it")
    assert (done["kind"], done["why"]) == ("force", "the customer accepts it")
    assert "@" in done["who"]
    (version,) = registry.read_versions(any_store, "shop")
    assert version.verdict == verdict


def test_a_served_file_that_is_rejected_counts(any_store: Store, call: Command) -> None:
    add_run(any_store, 1, served=made.rejected().report)
    assert "its verdict is reject" in call("promote", run_id(1), code=1)["error"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gguf": None}, f"Run {run_id(1)} has no exported model: it is completed. Finish it first"),
        ({"status": "failed"}, f"Run {run_id(1)} is failed, so it is no version. Run its recipe again."),
    ],
)
def test_what_is_not_finished_is_refused_also_by_force(
    any_store: Store, call: Command, changes: dict[str, Any], message: str
) -> None:
    add_run(any_store, 1, **changes)
    assert call("promote", run_id(1), "--force", "now", code=1)["error"].startswith(message)
    assert registry.read_names(any_store) == []


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["promote", "nothing"], 1, "There is no run 'nothing' in "),
        (["promote", run_id(1), "--alias", "../x"], 2, "'../x' is not an alias: expected at most 80"),
        (["rollback", "other"], 1, "There is no model 'other' in the registry of "),
        (["rollback", "../shop"], 2, "'../shop' is not a model's name: expected [namespace/]model"),
        (["rollback", "shop", "--alias", "a/b"], 2, "'a/b' is not an alias"),
        (["rollback", "shop"], 1, "shop:promoted names no version, so there is none before."),
        (["registry", "shop:promoted"], 2, "'shop:promoted' is not a model's name"),
        (["registry", "other"], 1, "There is no model 'other' in the registry of "),
    ],
)
def test_a_mistake_is_one_sentence(any_store: Store, call: Command, words: list[str], code: int, message: str) -> None:
    add_run(any_store, 1)
    call("promote", run_id(1), "--alias", "staging")
    assert call(*words, code=code)["error"].startswith(message)


def test_ollama_follows_a_promotion_and_a_rollback(any_store: Store, call: Command, ollama: RecordedOllama) -> None:
    for number, recorded in enumerate(RECORDED, 1):
        assert call("promote", run_id(number))["ollama"] == "shop:promoted"
        assert ollama.models["shop:promoted"] == recorded
    assert call("rollback", "shop")["ollama"] == "shop:promoted"
    assert ollama.models["shop:promoted"] == RECORDED[1]
    (first, *_) = call("registry", "shop")["versions"]
    assert (first["ollama"], first["ollama_digest"]) == ("shop:11111111", ollama.digest(RECORDED[0]))


@pytest.mark.parametrize("words", [("promote", run_id(3)), ("rollback", "shop")])
def test_what_ollama_refuses_is_undone_in_the_registry(
    any_store: Store, call: Command, ollama: RecordedOllama, words: tuple[str, ...]
) -> None:
    for number in (1, 2):
        call("promote", run_id(number))
    before = dict(ollama.models)
    ollama.pin("POST", "/api/copy", "108-copy-missing")
    error = call(*words, code=1)["error"]
    assert "could not copy" in error
    assert error.endswith(f"shop:promoted names version 2 (run {run_id(2)}) as before.")
    assert ollama.models == before
    *_, tried, undone = call("registry", "shop")["aliases"]["promoted"]
    assert (tried["kind"], undone["kind"], undone["version"]) == (words[0], "undo", 2)
    assert "could not copy" in undone["why"]
    assert call("rollback", "shop")["version"] == 1, "an undone move is not gone back to"
    assert ollama.models["shop:promoted"] == RECORDED[0]


def promote_at_once(store: Store, numbers: range) -> list[tuple[int, str]]:
    """Return the exit codes and errors of whole processes of the command line that promote at the same time."""
    words = [sys.executable, "-m", "flows.cli", "promote"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [*words, run_id(number), "--store", store.url],
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for number in numbers
    ]
    return [(process.returncode, error) for process in processes for _, error in [process.communicate(timeout=120)]]


def test_of_commands_at_once_those_that_lose_name_the_winner(any_store: Store, call: Command) -> None:
    numbers = range(1, 7)
    for number in numbers:
        add_run(any_store, number)
    ends = promote_at_once(any_store, numbers)
    moves = registry.read_history(any_store, "shop", "promoted")
    assert [m.replaced for m in moves] == [None, *(m.version for m in moves[:-1])]
    assert sorted(m.run for m in moves) == [run_id(n) for n, (code, _) in zip(numbers, ends, strict=True) if code == 0]
    assert all("at the same time (promote), so it was not moved here." in error for code, error in ends if code)
    assert len(registry.read_versions(any_store, "shop")) == len(numbers)


def test_ollama_agrees_with_the_registry_after_promotions_at_once(
    any_store: Store, call: Command, ollama: RecordedOllama
) -> None:
    ends = promote_at_once(any_store, range(1, 4))
    assert any(code == 0 for code, _ in ends)
    current = registry.read_current(any_store, "shop", "promoted")
    assert ollama.models["shop:promoted"] == RECORDED[int(current.run[-5]) - 1]


def test_what_the_terminal_shows(store: FileStore, capsys: pytest.CaptureFixture[str]) -> None:
    at = ("--store", str(store.root))
    assert main(["registry", *at]) == 0
    assert "The registry has no model yet" in capsys.readouterr().out
    for number in (1, 2):
        add_run(store, number)
        assert main(["promote", run_id(number), *at]) == 0
    assert f"shop:promoted is version 2 (run {run_id(2)}), before version 1." in capsys.readouterr().out
    assert main(["registry", *at]) == 0
    shown = capsys.readouterr().out
    assert "shop" in shown and "promoted" in shown and run_id(2) in shown
    registry.withdraw_version(store, "shop", registry.read_version(store, "shop", 1))
    assert main(["registry", "shop", *at]) == 0
    shown = capsys.readouterr().out
    assert "withdrawn: the run failed" in shown and "22222222" in shown and "shop:promoted" in shown
