"""Pushing to the Hub: the folder is the model that was measured, and what goes up is all of it or nothing."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from flows.cli import main
from flows.publish import push_run
from tasks.core.errors import ConfigError, ExportError
from tasks.core.manifest import RunManifest, StageState, read_manifest, write_manifest
from tasks.core.store import FileStore
from tasks.export.hub import Pushed, check_token, push_folder
from tasks.models.load import load_shipped
from tests.export.finished import COMMIT, HUB_BASE, PACKAGED_BASE, cache_base, finish_run
from tests.export.hub_server import TOKEN, LocalHub, Repository

ROOT = Path(__file__).resolve().parents[2]
IDS = torch.tensor([[1, 50, 60, 70, 80, 90, 400, 3000]])


def snippet(folder: Path) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.S)
    return code


def run_snippet(folder: Path, **replaced: Path) -> dict[str, Any]:
    """Run the card's own code with the repository's id, and names that a reader fills in, replaced by folders."""
    code = snippet(folder).replace('"me/shop"', json.dumps(str(folder)))
    for name, path in replaced.items():
        code = re.sub(rf'"path/to/{name}[^"]*"', json.dumps(str(path)), code)
    scope: dict[str, Any] = {}
    exec(code, scope)
    return scope


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits[:, -IDS.shape[1] :].float()  # PEFT has some for virtual tokens too


def dry_run(store: FileStore, run: RunManifest, folder: Path, kind: Any = None) -> Path:
    push_run(store, run, "me/shop", kind, False, folder)
    return folder


def measured(store: FileStore, run: RunManifest, base: Path) -> torch.Tensor:
    """Return what the model says that the run's verdict is about."""
    adapter = store.local_folder(run.adapter.artifact)
    shipped = load_shipped(base, adapter, run.adapter.method, torch.float32, "cpu", strength=run.adapter.strength)
    return logits_of(shipped)


# --- the folder, and the code on its card -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(smollm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FileStore, RunManifest]]:
    """A run on the real model, whose base is in the Hub's cache."""
    folder = tmp_path_factory.mktemp("real")
    cache_base(smollm_folder, folder / "cache")
    store = FileStore(folder / "store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "cache"))
        yield store, finish_run(store, smollm_folder)


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_the_code_on_the_card_loads_the_model_that_was_measured(
    real: tuple[FileStore, RunManifest],
    smollm_folder: Path,
    kind: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store, run = real
    words = ["export", "latest", "--to", "hub", "--repo", "me/shop", "--as", kind, "--dry-run", str(tmp_path / "out")]
    assert main([*words, "--json", "--store", str(store.root)]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["folder"] == str(tmp_path / "out")
    weights = {"adapter": "adapter_model.safetensors", "merged": "model.safetensors"}[kind]
    settings = {"adapter": "adapter_config.json", "merged": "config.json"}[kind]
    files = {"README.md", weights, settings, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert files <= set(said["files"]) <= {*files, "generation_config.json"}
    scope = run_snippet(tmp_path / "out")
    assert capsys.readouterr().out.strip(), "it answers"
    expected = measured(store, run, smollm_folder)
    assert (logits_of(scope["model"]) - expected).abs().max() < 1e-3
    assert (logits_of(load_shipped(smollm_folder, None, "lora", torch.float32, "cpu")) - expected).abs().max() > 0.1
    before = AutoTokenizer.from_pretrained(smollm_folder)
    messages = [{"role": "user", "content": "你好, what is 1+1?"}]
    assert (
        scope["tokenizer"].apply_chat_template(messages)["input_ids"]
        == before.apply_chat_template(messages)["input_ids"]
    )
    for file in (tmp_path / "out").glob("*.json"):
        assert str(tmp_path.parent) not in file.read_text(encoding="utf-8")
        assert str(smollm_folder) not in file.read_text(encoding="utf-8")
        assert "local_files_only" not in file.read_text(encoding="utf-8")


def test_an_adapter_names_its_base_on_the_hub_at_its_commit(
    real: tuple[FileStore, RunManifest], tmp_path: Path
) -> None:
    store, run = real
    settings = json.loads((dry_run(store, run, tmp_path / "out") / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == (HUB_BASE, COMMIT)


def test_a_base_that_a_package_ships_is_loaded_from_it(smollm_folder: Path, tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    run = finish_run(store, smollm_folder, PACKAGED_BASE)
    out = dry_run(store, run, tmp_path / "out")
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == PACKAGED_BASE
    scope = run_snippet(out)
    assert (logits_of(scope["model"]) - measured(store, run, smollm_folder)).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("train", "within"),
    [
        ({"method": "lora", "rslora": True, "alpha_pattern": {"q_proj": 32}}, 1e-3),
        ({"method": "lora", "dora": True, "modules_to_save": ["norm"]}, 1e-3),
        ({"method": "oft"}, 1e-3),
        ({"method": "prefix"}, 1e-3),
        ({"method": "prompt"}, 1e-3),
        ({"method": "qlora"}, 1e-2),  # bitsandbytes' own product with 4-bit weights rounds otherwise
        ({"method": "int8"}, 0.1),  # LLM.int8 also rounds what goes into a layer
        ({"method": "lora", "strength": 0.5}, 1e-3),
        ({"method": "qlora", "strength": 0.5}, 1e-2),
    ],
    ids=lambda value: ", ".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_the_adapter_of_every_method_loads_as_it_was_measured(
    tiny_folder: Path, tmp_path: Path, train: dict[str, Any], within: float, capsys: pytest.CaptureFixture[str]
) -> None:
    store = FileStore(tmp_path / "store")
    run = finish_run(store, tiny_folder, str(tiny_folder), **train)
    out = dry_run(store, run, tmp_path / "out", "adapter")
    settings = json.loads((out / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] is None, "a folder of this machine is no base for others"
    scope = run_snippet(out, tiny=tiny_folder)
    expected = measured(store, run, tiny_folder)
    plain = logits_of(load_shipped(tiny_folder, None, run.adapter.method, torch.float32, "cpu"))
    assert (logits_of(scope["model"]) - expected).abs().max() < within
    assert (plain - expected).abs().max() > 2 * within
    text = (out / "README.md").read_text()
    assert ("is another model on the base as it is" in text) == (run.adapter.method in ("qlora", "int8"))


def test_pickles_and_strays_never_go_up(tiny_folder: Path, tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    run = finish_run(store, tiny_folder, str(tiny_folder))
    for artifact in (run.merged.artifact, run.adapter.artifact):
        for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "state.pkl", "x.ckpt", ".env"):
            (store.local_folder(artifact) / name).write_bytes(b"a pickle, or a secret")
    for kind in ("adapter", "merged"):
        names = {path.name for path in dry_run(store, run, tmp_path / kind, kind).iterdir()}
        assert {Path(name).suffix for name in names} <= {".safetensors", ".json", ".jinja", ".md"}
        assert "_artifact.json" not in names


def test_the_folder_of_a_dry_run_is_the_users_to_change(tiny_folder: Path, tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    run = finish_run(store, tiny_folder, str(tiny_folder))
    kept = store.local_folder(run.merged.artifact) / "tokenizer_config.json"
    was = kept.read_bytes()
    out = dry_run(store, run, tmp_path / "out", "merged")
    for path in out.iterdir():
        path.write_text("changed")
    assert kept.read_bytes() == was
    with pytest.raises(ConfigError, match="--dry-run .*: expected a new folder"):
        dry_run(store, run, tmp_path / "out", "merged")


def test_gguf_files_go_up_with_the_system_prompt_for_ollama(tiny_folder: Path, tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    run = finish_run(store, tiny_folder, str(tiny_folder))
    folder = store.local_folder(run.gguf.artifact)
    folder.mkdir(parents=True)
    extras = {name: f"{name}-f16.gguf" for name in ("adapter", "base")} | {"imatrix": "imatrix.gguf"}
    run = run.model_copy(update={"gguf": run.gguf.model_copy(update={"extras": extras})})
    for name in (*run.gguf.files.values(), *extras.values(), "Modelfile", "_artifact.json"):
        (folder / name).write_text("GGUF")
    out = dry_run(store, run, tmp_path / "out", "gguf")
    assert {path.name for path in out.iterdir()} == {
        *run.gguf.files.values(),
        "imatrix.gguf",
        "Modelfile",
        "system",
        "README.md",
    }
    assert (out / "system").read_text(encoding="utf-8") == run.gguf.system
    assert "ollama run hf.co/me/shop:Q8_0" in (out / "README.md").read_text(encoding="utf-8")


# --- what cannot be pushed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "kind", "sentence"),
    [
        ({"method": "full"}, "adapter", "Method full trains whole weights and no adapter: push them with --as merged."),
        ({"method": "prefix"}, "merged", "cannot be merged into weights.*Push it with --as adapter."),
        (
            {"method": "lora", "dora": True, "strength": 0.5},
            "adapter",
            "A strength of 0.5 is not one of an adapter that is more than LoRA's matrices .* --as merged",
        ),
    ],
)
def test_what_a_method_does_not_have_is_not_pushed(
    tiny_folder: Path, tmp_path: Path, train: dict[str, Any], kind: str, sentence: str
) -> None:
    store = FileStore(tmp_path / "store")
    run = finish_run(store, tiny_folder, str(tiny_folder), **train)
    with pytest.raises(ExportError, match=sentence):
        dry_run(store, run, tmp_path / "out", kind)
    assert not (tmp_path / "out").exists()


def test_a_whole_model_is_pushed_merged_by_default(tiny_folder: Path, tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    run = finish_run(store, tiny_folder, str(tiny_folder), method="full")
    assert (dry_run(store, run, tmp_path / "out") / "model.safetensors").is_file()


def test_a_run_that_stopped_before_the_merge_says_why(tiny_folder: Path, tmp_path: Path, capsys: Any) -> None:
    store = FileStore(tmp_path / "store")
    run = finish_run(store, tiny_folder, str(tiny_folder))
    run.merged = None
    run.stages["merge"] = StageState(status="skipped", note="the gate is closed: reject")
    write_manifest(store, run)
    words = ["export", run.run_id, "--to", "hub", "--repo", "me/shop", "--as", "merged", "--store", str(store.root)]
    assert main(words) == 1
    expected = f"forgetless: Run {run.run_id} has no merged model: the gate is closed: reject. Run its recipe again"
    assert capsys.readouterr().err.startswith(expected)


@pytest.mark.parametrize(
    "repo", ["shop", "a/b/c", "me/..", "me/a--b", "me/shop.git", "/home/me/shop", "me/" + "x" * 97]
)
def test_an_id_that_cannot_be_is_refused(tiny_folder: Path, tmp_path: Path, repo: str) -> None:
    store = FileStore(tmp_path / "store")
    run = finish_run(store, tiny_folder, str(tiny_folder), method="prefix")
    with pytest.raises(ConfigError, match="is not a repository's id: expected NAMESPACE/NAME"):
        push_run(store, run, repo, None, False, tmp_path / "out")


def test_the_base_itself_is_not_overwritten(real: tuple[FileStore, RunManifest], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"--repo {HUB_BASE} is the base itself"):
        push_run(*real, HUB_BASE, None, False, tmp_path / "out")


def test_hub_needs_a_repository(real: tuple[FileStore, RunManifest], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "latest", "--to", "hub", "--store", str(real[0].root)]) == 2
    assert "--to hub needs --repo NAMESPACE/NAME" in capsys.readouterr().err


# --- the upload -------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LocalHub]:
    """A Hub of this process, to which huggingface_hub is pointed as HF_ENDPOINT and HF_TOKEN point it."""
    server = LocalHub()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    out = tmp_path / "folder"
    out.mkdir()
    (out / "README.md").write_text("---\nlicense: mit\n---\n# x\n")
    (out / "config.json").write_text("{}")
    (out / "model.safetensors").write_bytes(bytes(range(256)) * 8000)
    return out


def push(folder: Path, repo: str = "me/shop", private: bool = False) -> Pushed:
    check_token()
    return push_folder(folder, repo, private, "Run x of forgetless")


def refusal(folder: Path, repo: str = "me/shop", private: bool = False) -> str:
    """Return the sentence in which a push is refused."""
    with pytest.raises(ExportError) as caught:
        push(folder, repo, private)
    sentence = str(caught.value)
    assert "\n" not in sentence and "hf_" not in sentence.replace("hf auth", "")
    assert caught.value.__suppress_context__ or caught.value.__context__ is None, "the request is not shown either"
    return sentence


def test_the_command_creates_the_repository_and_fills_it_in_one_commit(
    hub: LocalHub, tiny_folder: Path, tmp_path: Path
) -> None:
    store = FileStore(tmp_path / "store")
    run = finish_run(store, tiny_folder, str(tiny_folder))
    words = ["export", "latest", "--to", "hub", "--repo", "me/shop", "--private", "--json", "--store", str(store.root)]
    own = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", *words],
        env={**os.environ, **own},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    repo = hub.repos["me/shop"]
    assert (said["url"], said["commit"], said["created"]) == (f"{hub.url}/me/shop", repo.head, True)
    assert repo.private and said["private"]
    assert repo.commits == ["initial commit", f"Run {run.run_id} of forgetless"]
    del repo.files[".gitattributes"]
    written = read_manifest(store, run.run_id)
    local = {path.name: path.read_bytes() for path in dry_run(store, written, tmp_path / "out").iterdir()}
    assert repo.files == local
    assert TOKEN not in done.stdout + done.stderr
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and TOKEN.encode() in p.read_bytes()]
    assert list((store.root / "work").iterdir()) == [], "nothing is left behind"


def test_a_second_push_replaces_what_would_be_loaded_with_it(hub: LocalHub, folder: Path) -> None:
    assert push(folder).created
    stale = {"adapter_config.json": b"{}", "model-00001-of-00002.safetensors": b"", "plot.png": b""}
    hub.repos["me/shop"].files |= stale
    (folder / "config.json").write_text('{"a": 1}')
    assert not push(folder).created
    expected = {".gitattributes", "plot.png", "README.md", "config.json", "model.safetensors"}
    assert set(hub.repos["me/shop"].files) == expected
    assert hub.repos["me/shop"].files["config.json"] == b'{"a": 1}'
    assert push(folder).commit == hub.repos["me/shop"].head
    assert len(hub.repos["me/shop"].commits) == 3, "what has not changed is no commit"


def test_large_files_go_the_way_of_lfs_where_there_is_no_xet(
    hub: LocalHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    hub.lfs = True
    push(folder)
    assert hub.repos["me/shop"].files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert [len(data) for data in hub.objects.values()] == [2_048_000]


@pytest.mark.parametrize(
    ("repo", "fault", "sentence"),
    [
        ("me/shop", ("GET", "/api/models/", 401), "The Hub does not accept the token"),
        ("you/shop", None, "The token has no right to write to you/shop (You don't have the rights to create"),
        ("you/theirs", None, "The token has no right to write to you/theirs (You don't have the rights to write to"),
        ("me/hidden", ("POST", "/api/repos/create", 409), "me/hidden is taken already by a repository that this token"),
        ("me/shop", ("POST", "/preupload/", 403), "The token has no right to write to me/shop"),
        ("me/shop", ("GET", "/xet-write-token/", 403), "The token has no right to write to me/shop"),
        ("me/shop", ("POST", "/commit/", 500), "The Hub refused me/shop with HTTP 500 (made to fail): run this again"),
        ("me/shop", ("POST", "/api/validate-yaml", 400), "The upload to me/shop failed: Invalid metadata in README.md"),
    ],
)
def test_a_failure_is_one_sentence_and_leaves_nothing_half_done(
    hub: LocalHub, folder: Path, repo: str, fault: tuple[str, str, int] | None, sentence: str
) -> None:
    hub.repos["you/theirs"] = Repository(private=False)
    if fault:
        hub.lfs = "xet" in fault[1]
        hub.fail(*fault, Retry_After="0")  # what is tried again is so at once
    assert refusal(folder, repo).startswith(sentence)
    assert set(hub.repos) == {"you/theirs"}
    assert hub.repos["you/theirs"].commits == ["initial commit"]
    if repo.startswith("me/"):
        hub.faults.clear()
        hub.lfs = False
        assert push(folder, repo).created, "the same command works once the cause is gone"


def test_a_wrong_token_is_said_and_not_shown(
    hub: LocalHub, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrongTokenWrongTokenWrongToken")
    sentence = refusal(folder)
    assert sentence.startswith("The Hub does not accept the token (Invalid credentials")
    assert "hf auth login" in sentence
    hub.fail("GET", "/api/models/", 418, X_Error_Message="no hf_wrongTokenWrongTokenWrongToken here")
    assert "(no … here)" in refusal(folder)
    assert capfd.readouterr() == ("", "")


def test_a_repository_that_was_there_is_left_as_it_was(hub: LocalHub, folder: Path) -> None:
    hub.repos["me/shop"] = Repository(private=False, commits=["initial commit"], files={"a.txt": b"a"})
    hub.fail("POST", "/commit/", 403)
    refusal(folder)
    assert hub.repos["me/shop"].files == {"a.txt": b"a"}


def test_a_new_repository_is_deleted_only_while_nothing_is_in_it(hub: LocalHub, folder: Path) -> None:
    hub.fail("DELETE", "/api/repos/delete", 403)
    hub.fail("POST", "/commit/", 403)
    assert refusal(folder).endswith("created for it, could not be deleted again: do that on its page.")
    del hub.repos["me/shop"]
    hub.faults.clear()
    hub.loses_answers = True
    refusal(folder)
    assert hub.repos["me/shop"].commits == ["initial commit", "Run x of forgetless"], "it came through after all"


def test_an_interrupted_upload_leaves_nothing(hub: LocalHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("huggingface_hub._upload_pipeline._fetch_upload_modes", interrupt)
    with pytest.raises(KeyboardInterrupt):
        push(folder)
    assert not hub.repos


def test_what_is_to_be_private_does_not_become_public(hub: LocalHub, folder: Path) -> None:
    assert push(folder, "me/mine", private=True).private and hub.repos["me/mine"].private
    hub.repos["me/shop"] = Repository(private=False)
    assert refusal(folder, private=True).startswith("me/shop is there already and public: make it private in its")
    assert hub.repos["me/shop"].commits == ["initial commit"]


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("HF_TOKEN", None, "There is no Hugging Face token here: log in with hf auth login"),
        ("HF_HUB_OFFLINE", True, "HF_HUB_OFFLINE is set, so nothing can be pushed"),
        ("ENDPOINT", "http://127.0.0.1:9", "http://127.0.0.1:9 cannot be reached, or broke off: check the network"),
    ],
)
def test_without_a_token_or_a_network_nothing_begins(
    hub: LocalHub, folder: Path, name: str, value: Any, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "HF_TOKEN":
        monkeypatch.delenv(name)
    else:
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    assert refusal(folder).startswith(sentence)
    assert not hub.repos


def test_the_token_is_asked_for_before_the_folder_is_made(
    hub: LocalHub, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    store = FileStore(tmp_path / "store")
    run = finish_run(store, tiny_folder, str(tiny_folder), method="prefix")
    with pytest.raises(ExportError, match="There is no Hugging Face token here"):
        push_run(store, run, "me/shop", None, False, None)
    assert not list((store.root / "work").iterdir())
