"""Two real runs of a tiny model combined, end to end: a run of its own that every other command knows."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from flows.cli import main
from tasks.core.combination import read_combination
from tasks.core.config import load_combination
from tasks.core.errors import ConfigError
from tasks.core.manifest import RunManifest, read_manifest, run_ids, write_manifest
from tasks.core.records import CombinedRef
from tasks.core.store import FileStore
from tasks.models.load import load_model, load_shipped
from tests.flows.test_finetune import finished, recipe, write_lines  # noqa: F401 - fixtures

SOUNDS = {"cat": "meow", "dog": "woof", "cow": "moo", "duck": "quack", "pig": "oink", "lion": "roar"}


@pytest.fixture(scope="module")
def both(
    finished: FileStore,  # noqa: F811
    recipe: Path,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[FileStore, str, str]:
    """A store with a run that learned colours, and one that learned sounds and measures them."""
    folder = tmp_path_factory.mktemp("sounds")
    rows = [
        {"instruction": f"What does a {animal} say, {i} times?", "input": "", "output": f"Every {animal} says {sound}!"}
        for i in range(8)
        for animal, sound in SOUNDS.items()
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    chats = [
        {"messages": [{"role": "user", "content": f"{how} {a}?"}, {"role": "assistant", "content": f"{a} says {s}!"}]}
        for a, s in SOUNDS.items()
        for how in ("And the", "The")
    ]
    settings = yaml.safe_load(recipe.read_text())
    task = {"name": "sounds", "conversations": write_lines(folder / "sounds.jsonl", chats)}
    _, *retained = settings["eval"]["capabilities"]
    settings["eval"]["capabilities"] = [
        {"name": "sounds", "role": "target", "measure": "bits_per_byte", "tasks": [task]},
        *retained,
    ]
    settings |= {"name": "sounds", "data": {**settings["data"], "sources": "rows.json"}}
    settings["train"]["rank"] = 2
    path = folder / "sounds.yaml"
    path.write_text(yaml.safe_dump(settings))
    words = ["--store", str(finished.root), "--json", "--set", "export.ollama=false"]
    assert main(["run", str(path), *words, "--debug"]) == 0
    colours, sounds = run_ids(finished)
    return finished, colours, sounds


@pytest.fixture(scope="module")
def combined(both: tuple[FileStore, str, str]) -> RunManifest:
    store, colours, sounds = both
    words = ["--weights", "0.7,0.5", "--name", "zoo", "--store", str(store.root), "--json", "--debug"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OLLAMA_HOST", "127.0.0.1:9")  # nothing answers there
        assert main(["combine", colours, sounds, *words]) == 0
    return read_manifest(store, "latest")


def test_the_combined_run_does_every_stage_and_is_judged_on_all_the_runs_measure(
    both: tuple[FileStore, str, str], combined: RunManifest
) -> None:
    store, colours, sounds = both
    assert combined.run_id.startswith("zoo-")
    assert combined.status == "completed"
    expected = ["base", "before", "combine", "after", "compare", "merge", "gguf", "proof", "ollama", "publish"]
    assert list(combined.stage_names) == expected
    assert {name: s.status for name, s in combined.stages.items()} == {
        **dict.fromkeys([*expected, "served"], "computed"),
        "base": "reused",
    }
    deltas = {d.name: d for d in combined.report.capabilities}
    assert list(deltas) == ["chat", "text", "choices", "sounds"]
    alone = {d.name: d for run in (colours, sounds) for d in read_manifest(store, run).report.capabilities}
    for name in ("chat", "sounds"):
        assert deltas[name].role == "target"
        assert deltas[name].status == "gained"
        assert deltas[name].before == pytest.approx(alone[name].before, rel=1e-4), "the same base"
    assert deltas["chat"].primary
    adapter = combined.adapter
    assert isinstance(adapter, CombinedRef)
    assert (adapter.method, adapter.by, adapter.rank) == ("lora", "cat", 6)
    assert [(part.run, part.weight) for part in adapter.parts] == [(colours, 0.7), (sounds, 0.5)]
    assert "ollama create zoo:" in combined.ollama.note
    card = (store.local_folder(combined.card) / "card.md").read_text()
    assert "Combined by cat: 0.7 of" in card.replace("\\", "")
    assert "Validation loss" not in card
    assert combined.report.verdict in card


def test_its_merged_weights_are_the_weighted_sum(
    both: tuple[FileStore, str, str],
    combined: RunManifest,
    tiny_folder: Path,
) -> None:
    store, colours, sounds = both
    merged = load_model(store.local_folder(combined.merged.artifact), torch.float32, "cpu")
    plain = dict(load_model(tiny_folder, torch.float32, "cpu").named_parameters())
    total = {name: weight.detach().clone() for name, weight in plain.items()}
    for run, share in ((colours, 0.7), (sounds, 0.5)):
        folder = store.local_folder(read_manifest(store, run).adapter.artifact)
        for name, weight in load_shipped(tiny_folder, folder, "lora", torch.float32, "cpu").named_parameters():
            total[name] += share * (weight.detach() - plain[name].detach())
    tolerance = 1e-5 if combined.merged.dtype == "float32" else 1e-2
    assert max((total[name] - plain[name]).abs().max().item() for name in total) > 10 * tolerance
    for name, weight in merged.named_parameters():
        torch.testing.assert_close(weight.detach(), total[name], atol=tolerance, rtol=tolerance)


def test_the_same_command_again_reuses_every_stage(
    both: tuple[FileStore, str, str],
    combined: RunManifest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store, colours, sounds = both
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    assert main(["combine", colours, sounds, "--weights", "0.7,0.5", "--name", "zoo", "--store", str(store.root)]) == 0
    again = read_manifest(store, "latest")
    assert again.run_id != combined.run_id
    stages = {name: s.status for name, s in again.stages.items() if name not in ("ollama", "publish")}
    assert stages == dict.fromkeys(stages, "reused")
    assert again.report.capabilities == combined.report.capabilities
    shown = capsys.readouterr().out
    assert f"Combined by cat: 0.7 of {colours} and 0.5 of {sounds}." in shown
    assert combined.report.reason in shown.replace("\n", " ")


def test_other_commands_know_it(
    both: tuple[FileStore, str, str], combined: RunManifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, colours, sounds = both
    name, at = combined.run_id, ["--store", str(store.root)]

    def ask(*words: str) -> dict:
        capsys.readouterr()
        assert main([*words, "--json", *at]) == 0
        return json.loads(capsys.readouterr().out)

    assert ask("show", name)["combine"]["runs"] == [colours, sounds]
    assert name in [run["run_id"] for run in ask("runs")]
    assert {m["task"] for m in ask("explain", name)["moved"]} >= {"chat", "sounds"}
    against_first, against_second = (ask("compare", run, name)[0] for run in (colours, sounds))
    assert [d["name"] for d in against_first["capabilities"]] == ["chat", "text", "choices"]
    assert [d["name"] for d in against_second["capabilities"]] == ["sounds", "text", "choices"]
    assert against_first["changed"]["combine.method"] == [None, "cat"]
    assert against_first["changed"]["train.rank"] == ["4", None]
    half, whole = ask("strength", name, "--at", "0.5,1")["points"]
    assert 0 < half["capabilities"][0]["delta"] < whole["capabilities"][0]["delta"]
    capsys.readouterr()
    assert main(["steps", name, *at]) == 1
    assert f"Run {name} combines others, so it has no steps." in capsys.readouterr().err
    assert main(["chat", name, "--prompt", "Hello", *at]) == 0
    assert main(["export", name, "--to", "dir", "--out", str(tmp_path / "out"), *at]) == 0
    assert (tmp_path / "out" / "Modelfile").is_file()


def test_in_sequence_on_a_suite_the_base_is_not_scored_again(
    both: tuple[FileStore, str, str],
    recipe: Path,  # noqa: F811
    tmp_path: Path,
    tiny_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store, colours, sounds = both
    suite = tmp_path / "suite.yaml"
    suite.write_text(yaml.safe_dump({"capabilities": yaml.safe_load(recipe.read_text())["eval"]["capabilities"]}))
    words = [sounds, colours, "--sequence", "--weights", "1,0.5", "--suite", str(suite), "--gate"]
    code = main(["combine", *words, "--store", str(store.root)])
    run = read_manifest(store, "latest")
    assert code == {"promote": 0, "reject": 4, "inconclusive": 5}[run.report.verdict]
    assert (run.gguf is None) == (run.report.verdict != "promote")
    assert run.stages["before"].status == "reused"
    assert run.stages["combine"].status == "computed"
    assert (run.adapter.method, run.adapter.by, run.adapter.rank) == ("full", "sequence", None)
    assert run.recipe.name == "sounds-combined"
    assert f"Merged in sequence: 1 of {sounds} and 0.5 of {colours}." in capsys.readouterr().out
    made = store.local_folder(run.adapter.artifact)
    found = dict(load_model(made, torch.float32, "cpu").named_parameters())
    folders = [store.local_folder(read_manifest(store, r).adapter.artifact) for r in (sounds, colours)]
    first, second, plain = (
        dict(load_shipped(tiny_folder, folder, "lora", torch.float32, "cpu").named_parameters())
        for folder in (*folders, None)
    )
    for name, weight in found.items():
        expected = first[name] + 0.5 * (second[name] - plain[name])
        torch.testing.assert_close(weight, expected, atol=1e-2, rtol=1e-2)
    with pytest.raises(ConfigError, match=f"Run {run.run_id} cannot be combined: it is a whole model"):
        read_combination(store, load_combination({"runs": [run.run_id, colours]}))


def test_what_is_combined_can_be_combined_again(both: tuple[FileStore, str, str], combined: RunManifest) -> None:
    store, colours, _ = both
    found = read_combination(store, load_combination({"runs": [combined.run_id, colours], "method": "svd"}))
    assert [part.method for part in found.parts] == ["lora", "lora"]
    assert found.recipe.name == "zoo-combined"


def test_a_base_that_was_changed_since_stops_the_run(
    both: tuple[FileStore, str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    store, *runs = both
    for name in runs:
        run = read_manifest(store, name)
        artifact = run.base.artifact.model_copy(update={"content": "0" * 64})
        changed = {"run_id": f"changed-{name}", "base": run.base.model_copy(update={"artifact": artifact})}
        write_manifest(store, run.model_copy(update=changed))
    assert main(["combine", *(f"changed-{name}" for name in runs), "--store", str(store.root)]) == 2
    assert "is not what the runs trained any more: it was changed." in capsys.readouterr().err
    assert read_manifest(store, "latest").status == "failed"
