"""The main job, end to end through Prefect on a real tiny model: every stage real, then every stage reused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from flows.cli import main
from flows.lineage import check_reproducible, compare_runs
from flows.screen import show_reproduction
from flows.store import DAY, collect_garbage, remove_from_store
from tasks.core import registry
from tasks.core.config import CombineConfig
from tasks.core.digest import file_sha256
from tasks.core.errors import ConfigError, ExportError, ForgetlessError
from tasks.core.manifest import read_manifest, run_ids
from tasks.core.progress import watch_progress
from tasks.core.settings import read_settings
from tasks.core.store import FileStore
from tests.conftest import ROOT
from tests.export.recorded_ollama import RecordedOllama

COLOURS = {"grass": "green", "snow": "white", "coal": "black", "the sky": "blue", "blood": "red", "gold": "yellow"}


def copy_of(store: FileStore, folder: Path) -> FileStore:
    shutil.copytree(store.root, folder)
    return FileStore(folder)


def write_lines(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def recipe(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    rows = [
        {"instruction": f"What colour is {thing}, question {i}?", "input": "", "output": f"Surely {thing} is {colour}."}
        for i in range(8)
        for thing, colour in COLOURS.items()
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"Is {t} {c}?"},
                {"role": "assistant", "content": f"Surely {t} is {c}."},
            ]
        }
        for t, c in [*COLOURS.items(), *((f"old {t}", c) for t, c in COLOURS.items())]
    ]
    texts = [
        {"text": f"A plain sentence about {t}, which has nothing to do with {other}."}
        for t in COLOURS
        for other in ("colours", "numbers")
    ]
    choices = [
        {"context": f"{how} colour of {t} is", "choices": [f"{c}.", "seven."], "gold": 0}
        for t, c in COLOURS.items()
        for how in ("The", "We know that the")
    ]
    settings = {
        "name": "tiny",
        "model": {"base": str(tiny_folder)},
        "data": {"sources": "rows.json", "clean": {"near_duplicates": None}},  # they differ in a figure
        "train": {
            "method": "lora",
            "rank": 4,
            "learning_rate": 0.02,
            "epochs": 4,
            "step_tokens": 256,
            "pack_tokens": 256,
            "max_tokens": 256,
        },
        "eval": {
            "capabilities": [
                {
                    "name": "chat",
                    "role": "target",
                    "measure": "bits_per_byte",
                    "tasks": [{"name": "chat", "conversations": write_lines(folder / "chat.jsonl", chats)}],
                },
                {
                    "name": "text",
                    "role": "retention",
                    "measure": "bits_per_byte",
                    "budget": 500,
                    "tasks": [{"name": "text", "texts": write_lines(folder / "text.jsonl", texts)}],
                },
                {
                    "name": "choices",
                    "role": "retention",
                    "tasks": [{"name": "choices", "choices": write_lines(folder / "choices.jsonl", choices)}],
                },
            ],
            "on_gguf": True,
        },
        "export": {"quantisations": ["f16", "q8_0"], "imatrix": True, "adapter_gguf": True, "ollama": True},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory, prefect_server: None) -> FileStore:
    """A store in which the tiny recipe ran once."""
    store = FileStore(tmp_path_factory.mktemp("finished") / "store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OLLAMA_HOST", "127.0.0.1:9")  # nothing answers there
        assert main(["run", str(recipe), "--store", str(store.root), "--json", "--debug"]) == 0
    return store


def test_a_run_does_every_stage_and_says_what_came_of_it(finished: FileStore) -> None:
    manifest = read_manifest(finished, "latest")
    assert manifest.status == "completed"
    assert {name: s.status for name, s in manifest.stages.items()} == dict.fromkeys(manifest.stages, "computed")
    assert manifest.dataset.read == 48 == sum(manifest.dataset.rows.values())
    assert [(x.what, x.name, x.license) for x in manifest.licences] == [
        ("base", Path(manifest.recipe.model.base).name, None),
        ("data source", "rows.json", None),
    ]
    assert manifest.data_report.passed
    chat, text, choices = manifest.report.capabilities
    assert chat.status == "gained"
    assert chat.delta > 2
    assert chat.perplexity_ratio < 0.9
    assert chat.after < chat.before
    assert (text.role, text.budget) == ("retention", 500)
    assert choices.n == 12
    assert manifest.adapter.last_validation_loss < manifest.adapter.first_validation_loss
    files = finished.local_folder(manifest.gguf.artifact)
    assert (files / manifest.gguf.files["q8_0"]).read_bytes()[:4] == b"GGUF"
    assert manifest.gguf.extras == {"adapter": "adapter-f16.gguf", "imatrix": "imatrix.gguf"}
    assert manifest.gguf.imatrix_tokens == manifest.tokens.tokens["train"]
    assert f"FROM ./{manifest.gguf.files['q8_0']}" in (files / "Modelfile").read_text()
    assert "You are a helpful AI assistant named SmolLM" in (files / "Modelfile").read_text()
    proof = manifest.proof.files["q8_0"]
    assert (proof.reasons, proof.sha256) == ([], manifest.gguf.sha256["q8_0"])
    in_transformers, in_llama_cpp = (report.capabilities[0].delta for report in (manifest.report, manifest.served))
    assert in_llama_cpp == pytest.approx(in_transformers, abs=1)
    assert 'TEMPLATE """{{ range .Messages }}<|im_start|>' in (files / "Modelfile").read_text()
    assert not manifest.ollama.registered
    assert "ollama create tiny:" in manifest.ollama.note
    version = registry.read_version(finished, "tiny", manifest.registry_version)
    assert (version.run, version.verdict) == (manifest.run_id, manifest.report.verdict)
    assert (version.gguf_sha256, version.ollama) == (manifest.gguf.sha256["q8_0"], None)
    named = {alias: move.run for alias, move in registry.read_aliases(finished, "tiny").items()}
    assert named == ({"promoted": manifest.run_id} if version.verdict == "promote" else {})
    card = (finished.local_folder(manifest.card) / "card.md").read_text()
    assert manifest.report.verdict in card
    assert (finished.local_folder(manifest.data_report.artifact) / "data_docs" / "index.html").is_file()
    assert not list((finished.root / "work").glob("tmp*")), "no half-made artifact is left behind"


def test_gc_removes_nothing_that_the_run_made_and_rm_refuses_while_it_is_at_work(
    finished: FileStore, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = copy_of(finished, tmp_path / "store")
    before = {path for path in store.root.glob("artifacts/*/*")}
    assert {"items", "base-gguf"} < {path.parent.name for path in before}
    settings = read_settings(str(store.root))
    collect_garbage(store, settings, lambda _: None, now=store.clock() + 3 * DAY)
    assert {path for path in store.root.glob("artifacts/*/*")} == before
    assert list(store.list_files("responses"))
    refused: list[str] = []

    def try_to_remove(stage: str, done: int, total: int, note: str) -> None:
        if stage == "merge" and not refused:
            with pytest.raises(ConfigError) as error:
                remove_from_store(store, run_ids(store)[-1])
            refused.append(str(error.value))

    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    with watch_progress(try_to_remove):
        assert main(["run", str(recipe), "--store", str(store.root), "--json"]) == 0
    assert f"at work in process {os.getpid()}" in refused[0]
    again = {name: state.status for name, state in read_manifest(store, "latest").stages.items()}
    assert {name for name, status in again.items() if status == "computed"} <= {"ollama", "publish"}
    assert not list(store.list_files("leases"))


def test_the_same_command_again_reuses_every_stage(
    finished: FileStore, recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    first = read_manifest(finished, "latest")
    assert main(["run", str(recipe), "--store", str(finished.root)]) == 0
    again = read_manifest(finished, "latest")
    assert again.run_id != first.run_id
    stages = {name: s.status for name, s in again.stages.items() if name not in ("ollama", "publish")}
    assert stages == dict.fromkeys(stages, "reused")
    assert again.report.capabilities == first.report.capabilities
    shown = capsys.readouterr().out
    assert first.report.reason in shown.replace("\n", " ")
    assert f"forgetless export {again.run_id} --to ollama" in shown


def test_a_file_that_was_changed_after_its_proof_is_not_registered(
    finished: FileStore, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished.root, tmp_path / "store")
    store = FileStore(tmp_path / "store")
    gguf = read_manifest(finished, "latest").gguf
    path = store.local_folder(gguf.artifact) / gguf.files["q8_0"]
    with path.open("r+b") as file:
        file.seek(-1000, 2)
        file.write(b"\x01" * 10)
    assert main(["run", str(recipe), "--store", str(store.root)]) == 1
    assert "is not the file that was proven: its sha256 is" in capsys.readouterr().err.replace("\n", " ")
    assert read_manifest(store, "latest").stages["ollama"].status == "pending"


def test_the_gate_stops_before_the_merge_with_its_exit_code(
    finished: FileStore, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    settings = yaml.safe_load(recipe.read_text())
    _, text, choices = settings["eval"]["capabilities"]
    # Three items cannot show a gain, whatever was learned: three gained of three is no more than 1.73 standard errors.
    settings["eval"]["limit"] = 3
    settings["eval"]["capabilities"] = [{**choices, "role": "target"}, text]
    strict = recipe.with_name("strict.yaml")
    strict.write_text(yaml.safe_dump(settings))
    code = main(["run", str(strict), "--store", str(finished.root), "--gate", "--json"])
    manifest = read_manifest(finished, "latest")
    assert manifest.report.verdict == "inconclusive"
    assert code == 5
    assert manifest.stages["merge"].status == "skipped"
    assert manifest.gguf is None
    assert manifest.stages["train"].status == "reused"


def test_show_runs_plan_chat_and_export_on_a_finished_run(
    finished: FileStore, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run_ids(finished)[0]
    at = ["--store", str(finished.root)]
    assert main(["runs", *at]) == 0
    assert first in capsys.readouterr().out
    assert main(["show", first, "--json", *at]) == 0
    assert json.loads(capsys.readouterr().out)["run_id"] == first
    assert main(["plan", str(recipe), "--json", *at]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert {s["action"] for s in plan["stages"]} == {"reuse", "always"}
    assert main(["chat", first, "--prompt", "Hello", *at]) == 0
    assert capsys.readouterr().out.endswith("\n")
    assert main(["export", first, "--to", "dir", "--out", str(tmp_path / "out"), *at]) == 0
    copied = ["Modelfile", "adapter-f16.gguf", "imatrix.gguf", "model-f16.gguf", "model-q8_0.gguf"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == copied


def test_without_an_ollama_export_says_what_to_do(
    finished: FileStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    assert main(["export", run_ids(finished)[0], "--to", "ollama", "--store", str(finished.root)]) == 1
    assert "No Ollama answers at http://127.0.0.1:9. Start it (ollama serve)" in capsys.readouterr().err


# What SmolLM2 was asked in the recordings; its file is stood in for by the tiny model's.
ASKED = [
    *("--set", "export.system=You are a helpful assistant."),
    *("--set", "export.prompt=What is the capital of France?"),
    *("--set", "export.ollama_parameters={temperature: 0.2}"),
]


@pytest.fixture
def ollama(finished: FileStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[RecordedOllama]:
    with RecordedOllama() as server:
        monkeypatch.setenv("OLLAMA_HOST", server.url)
        gguf = read_manifest(finished, run_ids(finished)[0]).gguf
        server.stand_in(finished.local_folder(gguf.artifact) / gguf.files["q8_0"], "030-create-stream-minimal")
        yield server


def test_a_run_registers_its_model_with_every_prompt_compared(
    finished: FileStore, recipe: Path, ollama: RecordedOllama, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(recipe), "--store", str(finished.root), *ASKED]
    assert main(["run", *words]) == 0
    run = read_manifest(finished, "latest")
    done = run.ollama
    assert done.registered and done.created
    assert len(done.compared) == 4
    assert done.sample == "The capital of France is Paris."
    aliases = {"tiny:promoted"} if run.report.verdict == "promote" else set()
    assert set(ollama.models) == {done.name, *aliases}
    assert f"ollama run {done.name}" in capsys.readouterr().out
    assert "PARAMETER temperature 0.2" in (finished.local_folder(run.gguf.artifact) / "Modelfile").read_text()
    ollama.pushes.append((200, [{"status": "success"}]))
    at = ["--store", str(finished.root)]
    assert main(["export", run.run_id, "--to", "ollama", "--push", "me", *at, "--json"]) == 0
    pushed = f"me/tiny:{done.name.partition(':')[2]}"
    result = json.loads(capsys.readouterr().out)
    assert (result["name"], result["pushed"], result["created"]) == (done.name, pushed, False)
    assert main(["export", run.run_id, "--to", "ollama", *at]) == 0
    assert f"Registered {done.name} at {ollama.url}. Chat with it: ollama run {done.name}" in capsys.readouterr().out
    assert main(["export", run.run_id, "--to", "ollama", "--push", "my name", *at]) == 2
    assert main(["export", run.run_id, "--to", "dir", "--push", "me", *at]) == 2
    assert "--push goes with --to ollama." in capsys.readouterr().err


def test_a_registration_that_fails_is_gone_on_from(
    finished: FileStore, recipe: Path, ollama: RecordedOllama, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(recipe), "--store", str(finished.root), *ASKED]
    ollama.pin("POST", "/api/create", "048-create-truncated-stream")
    assert main(["run", *words]) == 1
    error = capsys.readouterr().err
    assert "exceeds file size (2000000)" in error and "was registered" in error and "Traceback" not in error
    failed = read_manifest(finished, "latest")
    assert (failed.status, failed.ollama, failed.stages["ollama"].status) == ("failed", None, "failed")
    assert ollama.models == {}
    assert main(["run", *words]) == 0
    again = read_manifest(finished, "latest")
    assert again.stages["gguf"].status == "reused" and again.ollama.created


@pytest.mark.parametrize("was_there", [False, True])
def test_what_fails_after_a_registration_takes_it_back(
    finished: FileStore,
    recipe: Path,
    ollama: RecordedOllama,
    monkeypatch: pytest.MonkeyPatch,
    was_there: bool,
) -> None:
    def refuse(*_: object) -> str:
        raise ForgetlessError("The card cannot be written.")

    words = [str(recipe), "--store", str(finished.root), *ASKED, "--json"]
    if was_there:
        assert main(["run", *words]) == 0
    before = dict(ollama.models)
    with monkeypatch.context() as patch:
        patch.setattr("tasks.reporting.steps.write_card", refuse)
        assert main(["run", *words]) == 1
    failed = read_manifest(finished, "latest")
    assert failed.error == "The card cannot be written."
    assert ollama.models == before, "only what this run created is deleted"
    assert (failed.ollama is None) is not was_there
    assert failed.stages["ollama"].note.startswith("taken back") is not was_there
    assert len(ollama.asked("POST", "/api/create")) == 1
    assert main(["run", *words]) == 0
    assert read_manifest(finished, "latest").ollama.name in ollama.models


def test_an_alias_that_cannot_be_moved_takes_the_registration_back(
    finished: FileStore, recipe: Path, ollama: RecordedOllama, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise ExportError("The alias cannot be moved.")

    run = read_manifest(finished, run_ids(finished)[0])
    monkeypatch.setattr(
        "flows.finetune.compare_scores", lambda *_: run.report.model_copy(update={"verdict": "promote"})
    )
    words = [str(recipe), "--store", str(finished.root), *ASKED, "--json"]
    with monkeypatch.context() as patch:
        patch.setattr("tasks.export.register.move_alias", refuse)
        assert main(["run", *words]) == 1
    assert ollama.models == {}
    failed = read_manifest(finished, "latest").run_id
    tried, undone = registry.read_history(finished, "tiny", "promoted")[-2:]
    assert (tried.run, undone.kind, undone.version, undone.why) == (
        *(failed, "undo", tried.replaced, "The alias cannot be moved."),
    )
    assert registry.read_version(finished, "tiny", tried.version).withdrawn
    assert main(["run", *words]) == 0
    run = read_manifest(finished, "latest")
    done = run.ollama
    assert (done.alias, set(ollama.models)) == ("tiny:promoted", {done.name, "tiny:promoted"})
    version = registry.read_version(finished, "tiny", run.registry_version)
    assert (version.run, version.ollama, version.ollama_digest) == (run.run_id, done.name, done.digest)
    assert registry.read_current(finished, "tiny", "promoted").version == version.number
    ollama.models.clear()
    assert main(["export", run.run_id, "--to", "ollama", "--store", str(finished.root), "--json"]) == 0
    assert ollama.models["tiny:promoted"] == ollama.models[done.name], "a later registration gets its alias too"


def test_a_run_that_is_overtaken_comes_after_the_other(
    finished: FileStore, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run promotes between this one's look at the alias and its own promotion."""
    run = read_manifest(finished, run_ids(finished)[0])
    other = registry.add_version(finished, "tiny", "other", "promote", "c" * 64, None)
    monkeypatch.setattr(
        "flows.finetune.compare_scores", lambda *_: run.report.model_copy(update={"verdict": "promote"})
    )
    promote, late = registry.promote_version, []

    def overtaken(store: FileStore, name: str, alias: str, seen: registry.Move, *how: object) -> registry.Move:
        if not late:
            late.append(promote(store, name, alias, seen, other, "also"))
        return promote(store, name, alias, seen, *how)

    monkeypatch.setattr("tasks.core.registry.promote_version", overtaken)
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    assert main(["run", str(recipe), "--store", str(finished.root), "--json"]) == 0
    first, second = registry.read_history(finished, "tiny", "promoted")[-2:]
    assert (first.run, second.run) == ("other", read_manifest(finished, "latest").run_id)
    assert (first.number, second.replaced) == (late[0].number, other.number)


def test_a_flow_refuses_a_use_that_a_licence_forbids_before_it_trains(finished: FileStore, recipe: Path) -> None:
    """A flow that is started on a server has no command line before it that refuses."""
    from flows.finetune import finetune

    before = len(run_ids(finished))
    with pytest.raises(ConfigError, match="is under cc-by-nc-4.0, which allows no commercial use"):
        finetune(
            recipe=str(recipe),
            overrides=["export.use=commercial", "model.license=cc-by-nc-4.0", "train.rank=2"],
            store=str(finished.root),
        )
    manifest = read_manifest(finished, "latest")
    assert len(run_ids(finished)) == before + 1
    assert manifest.status == "failed"
    assert manifest.stages["tokens"].status == manifest.stages["train"].status == "pending"


def test_a_second_task_is_measured_against_what_the_first_left(
    finished: FileStore, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Continual learning: the adapter of the first run goes on, and its task is what must not be forgotten."""
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    first = read_manifest(finished, run_ids(finished)[0])
    sounds = {"cat": "meow", "dog": "woof", "cow": "moo", "duck": "quack", "pig": "oink", "lion": "roar"}
    rows = [
        {"instruction": f"What does a {animal} say, {i} times?", "input": "", "output": f"Every {animal} says {sound}!"}
        for i in range(8)
        for animal, sound in sounds.items()
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    chats = [
        {"messages": [{"role": "user", "content": f"And the {a}?"}, {"role": "assistant", "content": f"{a} says {s}!"}]}
        for a, s in sounds.items()
    ]
    settings = yaml.safe_load(recipe.read_text())
    colours, *others = settings["eval"]["capabilities"]
    task = {"name": "sounds", "conversations": write_lines(tmp_path / "sounds.jsonl", chats)}
    settings["eval"]["capabilities"] = [
        {"name": "sounds", "role": "target", "measure": "bits_per_byte", "tasks": [task]},
        {**colours, "role": "retention", "budget": 5},
        *others,
    ]
    settings["name"] = "second"
    settings["train"]["start_from"] = first.run_id
    settings["export"] = {"quantisations": ["q8_0"], "ollama": False}
    path = tmp_path / "second.yaml"
    path.write_text(yaml.safe_dump(settings))
    assert main(["run", str(path), "--store", str(finished.root), "--json"]) == 0
    second = read_manifest(finished, "latest")
    assert second.stages["before"].note == f"base and what it goes on from, {first.run_id}"
    gained, kept = second.report.capabilities[:2]
    assert (gained.name, gained.status) == ("sounds", "gained")
    # What the first task is compared with is not the base, which never learned it.
    assert (kept.name, kept.role) == ("chat", "retention")
    after_first = first.report.capabilities[0]
    assert kept.before == pytest.approx(after_first.after, rel=1e-3)
    assert kept.before < after_first.before - 0.1
    assert kept.delta == pytest.approx(100 * (kept.before - kept.after) / kept.before)
    assert kept.low < kept.delta < kept.high


def test_a_folder_of_peft_is_gone_on_from_as_well(
    finished: FileStore,
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    first = read_manifest(finished, run_ids(finished)[0])
    folder = tmp_path / "adapter"
    shutil.copytree(finished.local_folder(first.adapter.artifact), folder)
    words = [str(recipe), "--store", str(finished.root), "--set", f"train.start_from={folder}", "--json"]
    assert main(["plan", *words]) == 0
    assert not list(finished.root.glob("artifacts/start/*")), "a plan writes nothing"
    assert main(["run", *words, "--set", "train.epochs=1", "--set", "export.ollama=false"]) == 0
    second = read_manifest(finished, "latest")
    assert second.report.capabilities[0].before == pytest.approx(first.report.capabilities[0].after, rel=1e-3)
    capsys.readouterr()
    assert main(["compare", first.run_id, second.run_id, "--store", str(finished.root), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["changed"]["train.epochs"] == ["4.0", "1.0"]
    assert "model.base" not in found["changed"]
    chat = found["capabilities"][0]
    assert chat["before"] == pytest.approx(first.report.capabilities[0].after)
    assert chat["after"] == pytest.approx(second.report.capabilities[0].after)
    assert main(["compare", first.run_id, second.run_id, "--store", str(finished.root)]) == 0
    assert "these adapters only" in capsys.readouterr().out
    (folder / "adapter_model.safetensors").unlink()
    assert main(["run", *words]) == 2


def test_runs_scored_on_other_items_are_not_compared(
    finished: FileStore, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run_ids(finished)[0]
    words = [str(recipe), "--store", str(finished.root), "--set", "eval.limit=2", "--set", "export.ollama=false"]
    assert main(["run", *words]) == 0
    capsys.readouterr()
    assert main(["compare", first, "latest", "--store", str(finished.root)]) == 1
    assert f"against {first}: The two score sheets differ in limit: None before, 2 after." in capsys.readouterr().err


def test_rejected_data_stops_the_run_before_any_model_is_loaded(
    recipe: Path, tmp_path: Path, prefect_server: None, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"instruction": f"q{i}", "output": f"a{i}" if i < 3 else ""} for i in range(40)]
    (tmp_path / "bad.json").write_text(json.dumps(rows))
    store = FileStore(tmp_path / "store")
    code = main(["run", str(recipe), "--data", str(tmp_path / "bad.json"), "--store", str(store.root)])
    manifest = read_manifest(store, "latest")
    assert code == 3
    assert "The training data was rejected before any compute." in capsys.readouterr().err
    assert manifest.status == "failed"
    assert manifest.dataset.quarantined
    assert manifest.dataset.read == 40
    assert not store.list_folders("artifacts/scores")
    assert not store.list_folders("artifacts/adapter")


def test_an_adapter_is_scaled_without_training_again(finished: FileStore, capsys: pytest.CaptureFixture[str]) -> None:
    def ask(*command: str) -> tuple[int, dict]:
        capsys.readouterr()
        code = main([*command, "--store", str(finished.root), "--json"])
        return code, json.loads(capsys.readouterr().out)

    run = read_manifest(finished, run_ids(finished)[0])
    code, curve = ask("strength", run.run_id, "--at", "0.5,1")
    assert code == 0
    half, whole = curve["points"]
    assert (half["strength"], whole["strength"]) == (0.5, 1)
    assert 0 < half["capabilities"][0]["delta"] < whole["capabilities"][0]["delta"], "half of it gains less"
    if curve["best"]:
        assert curve["confirmed"][0]["n"] + whole["capabilities"][0]["n"] == 12
    assert ask("strength", run.run_id, "--at", "1,0.5")[1]["artifact"]["reused"]
    code, refused = ask("steps", run.run_id)
    assert (code, "--set train.snapshots=5" in refused["error"]) == (1, True)


def test_any_model_is_scored_alone_and_once(
    finished: FileStore, recipe: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = tmp_path / "suite.yaml"
    settings = {"capabilities": yaml.safe_load(recipe.read_text())["eval"]["capabilities"]}
    suite.write_text(yaml.safe_dump({"description": "the tiny recipe's", **settings}))
    command = ["eval", str(tiny_folder), "--suite", str(suite), "--store", str(finished.root)]
    assert main([*command, "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    run = read_manifest(finished, run_ids(finished)[0])
    assert alone["artifact"]["content"] == run.before.artifact.content
    assert alone["artifact"]["reused"], "a base scored once is never scored again"
    assert main(["eval", run.run_id, "--suite", str(suite), "--store", str(finished.root), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["artifact"]["content"] == run.after.artifact.content
    assert main(command) == 0
    assert "bits/byte" in capsys.readouterr().out


def test_an_adapter_of_another_base_is_refused_with_both_named(
    finished: FileStore, recipe: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**settings, "rms_norm_eps": 1e-3}))
    run = read_manifest(finished, run_ids(finished)[0])
    command = ["eval", str(other), "--suite", "quickstart", "--adapter", run.run_id, "--store", str(finished.root)]
    capsys.readouterr()
    assert main([*command, "--limit", "1", "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert f"run {run.run_id} trained {tiny_folder}" in error
    assert f"the base here is {other}. An adapter fits no other base." in error


def test_what_moved_is_explained(finished: FileStore, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["explain", run_ids(finished)[0], "--store", str(finished.root), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"chat", "text"} <= {m["task"] for m in found["moved"]} <= {"chat", "text", "choices"}  # or at chance
    gained = [i for i in found["items"] if i["kind"] == "gained"]
    assert gained[0]["expected"].startswith("Surely")
    assert gained[0]["question"]
    assert main(["explain", run_ids(finished)[0], "--store", str(finished.root)]) == 0
    assert "Subject" in capsys.readouterr().out


def test_sigterm_ends_a_run_with_a_sentence_and_a_checkpoint(recipe: Path, tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    command = [sys.executable, "-c", "import sys; from flows.cli import main; sys.exit(main())", "run", str(recipe)]
    command += ["--store", str(store.root), "--set", "train.epochs=99", "--set", "train.checkpoint_minutes=60"]
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path / "prefect"), "PYTHONPATH": str(ROOT)}
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        for _ in range(1200):  # until the live curve tells that steps were taken
            if [*store.root.glob("runs/*/curve/*")]:
                break
            time.sleep(0.1)
        assert run.poll() is None and [*store.root.glob("leases/adapter/*")]
        run.send_signal(signal.SIGTERM)
        asked = time.monotonic()
        said = run.communicate(timeout=60)[1]
        assert time.monotonic() - asked < 30
    finally:
        run.kill()
    assert run.returncode == 143
    assert said.endswith("forgetless: Terminated. What finished is kept: the same command goes on from there.\n")
    assert "Traceback" not in said
    (training,) = store.root.glob("work/training-*")
    state = json.loads((training / "last" / "state.json").read_text())
    assert state["progress"]["step"] > 0
    assert {path.name for path in store.root.glob("work/*")} <= {training.name, "probe"}
    assert not [*store.list_files("leases")]
    assert read_manifest(store, "latest").status == "failed"


# --- where a model comes from, and once more --------------------------------------------------------------------------


def test_a_files_digest_leads_back_to_rows_base_and_seeds(finished: FileStore, capsys: pytest.CaptureFixture) -> None:
    manifest = read_manifest(finished, run_ids(finished)[0])
    digest = manifest.gguf.sha256["q8_0"]
    assert main(["show", f"sha256:{digest}", "--lineage", "--json", "--store", str(finished.root)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["run"] == manifest.run_id
    rows = Path(manifest.recipe.data.sources[0].path)
    assert [(s["path"], s["sha256"]) for s in found["sources"]] == [(str(rows), file_sha256(rows))]
    links = found["artifacts"]
    kept = finished.local_folder(manifest.dataset.artifact)
    assert links["dataset"]["files"]["train.jsonl"] == file_sha256(kept / "train.jsonl")
    assert links["gguf"]["files"][manifest.gguf.files["q8_0"]] == digest
    assert links["base"]["content"] in links["adapter"]["made_from"]["inputs"]
    assert links["adapter"]["content"] in links["merged"]["made_from"]["inputs"]
    assert links["merged"]["content"] in links["gguf"]["made_from"]["inputs"]
    assert found["seeds"] == {"train.seed": 42, "eval.seed": 0}
    assert found["environment"].keys() >= {"torch", "transformers", "cpu", "cores", "python"}
    for name in (manifest.ollama.name, digest[:12]):
        assert main(["show", name, "--lineage", "--store", str(finished.root)]) == 0
        shown = capsys.readouterr().out
        assert digest in shown
        assert links["dataset"]["files"]["train.jsonl"] in shown
    assert main(["show", "0" * 64, "--lineage", "--store", str(finished.root)]) == 1
    assert "No run in" in capsys.readouterr().err


def test_a_run_made_again_has_the_same_bytes(
    finished: FileStore, tmp_path: Path, capsys: pytest.CaptureFixture, prefect_server: None
) -> None:
    before = run_ids(finished)
    first, again = before[0], tmp_path / "again"
    assert main(["reproduce", first, "--store", str(finished.root), "--into", str(again), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["same"]
    assert found["artifacts"].keys() >= {"dataset", "base", "tokens", "before", "adapter", "after", "merged", "gguf"}
    assert run_ids(finished) == before
    assert run_ids(FileStore(again)) == [found["again"]]
    assert main(["reproduce", first, "--store", str(finished.root), "--into", str(again)]) == 1
    assert "holds runs already" in capsys.readouterr().err


def test_a_run_that_came_out_otherwise_is_said(finished: FileStore, capsys: pytest.CaptureFixture) -> None:
    first = read_manifest(finished, run_ids(finished)[0])
    again = first.model_copy(deep=True, update={"environment": {**first.environment, "torch": "9.9"}})
    again.adapter = again.adapter.model_copy(
        update={"artifact": again.adapter.artifact.model_copy(update={"content": "0" * 64})}
    )
    again.report.capabilities[0] = again.report.capabilities[0].model_copy(update={"delta": -99.0})
    found = compare_runs(first, again)
    assert not found["same"]
    assert [name for name, link in found["artifacts"].items() if not link["same"]] == ["adapter"]
    assert [score["inside"] for score in found["scores"]] == [False, True, True]
    assert found["environment"] == {"torch": [first.environment["torch"], "9.9"]}
    show_reproduction(found)
    shown = " ".join(capsys.readouterr().out.split())
    assert "again -99.00, outside" in shown
    assert "torch: " in shown


def test_what_cannot_be_made_again_is_said(finished: FileStore) -> None:
    manifest = read_manifest(finished, run_ids(finished)[0])
    with pytest.raises(ForgetlessError, match="only a completed run"):
        check_reproducible(manifest.model_copy(update={"status": "failed"}))
    train = manifest.recipe.train.model_copy(update={"start_from": "shop-1"})
    recipe = manifest.recipe.model_copy(update={"train": train})
    with pytest.raises(ForgetlessError, match="went on from shop-1"):
        check_reproducible(manifest.model_copy(update={"recipe": recipe}))
    with pytest.raises(ForgetlessError, match="combines the adapters"):
        check_reproducible(manifest.model_copy(update={"combine": CombineConfig(runs=["a", "b"])}))
