"""The registration of a run: recorded with what was proven, done once, taken back, promoted, pushed."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.core import registry
from tasks.core.config import ExportConfig
from tasks.core.errors import ConfigError, ExportError, StoreError
from tasks.core.records import ArtifactRef, BaseRef, GgufRef, ModelRef, OllamaRef
from tasks.core.registry import Version
from tasks.core.stages import Stage
from tasks.core.store import FileStore, put_artifact
from tasks.export.ollama import move_alias
from tasks.export.register import name_to_push, promote, push, register, take_back
from tasks.models.tokenizer import load_tokenizer
from tests.export.recorded_ollama import RecordedOllama

SMOLLM2 = "030-create-stream-minimal"  # asked PROMPT with SYSTEM in 096
PROMPT = "What is the capital of France?"
SYSTEM = "You are a helpful assistant."
PARIS = "The capital of France is Paris."


@pytest.fixture
def ollama(monkeypatch: pytest.MonkeyPatch) -> Iterator[RecordedOllama]:
    with RecordedOllama() as server:
        monkeypatch.setenv("OLLAMA_HOST", server.url.replace("http://", "http://me:secret@"))
        yield server


class Exported:
    """A run that was exported: a file that stands for SmolLM2's, and its tokenizer."""

    def __init__(self, store: FileStore, ollama: RecordedOllama, tokenizer: Any) -> None:
        self.store = store
        with store.work_folder() as folder:
            tokenizer.save_pretrained(folder)
            self.merged = put_artifact(store, Stage("merged", 1, [], {}), folder, ModelRef, {"dtype": "float32"})
        with store.work_folder() as folder:
            file = folder / "model-q8_0.gguf"
            file.write_bytes(b"GGUF" + bytes(range(256)))
            self.sha256 = ollama.stand_in(file, SMOLLM2)
            fields = {
                "files": {"q8_0": file.name},
                "sha256": {"q8_0": self.sha256},
                "sizes_bytes": {"q8_0": 260},
                "modelfile": "Modelfile",
                "system": SYSTEM,
                "prompt": PROMPT,
                "sample": "The capital of France is Lyon.",
                "stopped": True,
            }
            self.gguf = put_artifact(store, Stage("gguf", 1, [], {}), folder, GgufRef, fields)
        self.base = BaseRef(
            artifact=ArtifactRef(kind="base", key="k", uri="u", content="c", size_bytes=1),
            source="me/base",
            revision=None,
            license="apache-2.0",
            template="auto",
            parameters=1,
            max_tokens=8192,
        )

    def register(self, expected: str | None = None, **settings: Any) -> OllamaRef:
        config = ExportConfig(quantisations=["q8_0"], **settings)
        return register(config, self.gguf, self.merged, self.base, "shop", self.store, expected)


@pytest.fixture
def exported(store: FileStore, ollama: RecordedOllama, smollm_folder: Path) -> Exported:
    return Exported(store, ollama, load_tokenizer(smollm_folder, "auto"))


def test_a_registration_is_recorded_with_what_was_proven(exported: Exported, ollama: RecordedOllama) -> None:
    done = exported.register(ollama_parameters={"temperature": 0.3, "stop": "<|im_end|>"})
    name = f"shop:{exported.sha256[:8]}"
    assert done == OllamaRef(
        name=name,
        url=ollama.url,  # without the password
        registered=True,
        created=True,
        digest=done.digest,
        compared=[
            "one turn",
            "one turn with a system prompt",
            "several turns",
            "several turns with a system prompt",
        ],
        sample=PARIS,
        same_start=len("The capital of France is "),
        same_as="llama.cpp",
    )
    assert list(ollama.models) == [name]
    (created,) = ollama.asked("POST", "/api/create")
    assert created["system"] == SYSTEM and created["license"] == "apache-2.0"
    assert created["parameters"] == {"temperature": 0.3, "stop": ["<|im_end|>"]}
    asked = ollama.asked("POST", "/api/chat")[-1]
    assert asked["options"]["num_predict"] == 192 and asked["options"]["repeat_penalty"] == 1.0
    assert "secret" not in "".join(p.read_text() for p in (exported.store.root / "registry").rglob("*.json"))


def test_hugging_faces_answer_is_what_counts_where_it_is_known(exported: Exported) -> None:
    done = exported.register(expected=f"{PARIS} It is large.")
    assert (done.same_start, done.same_as) == (len(PARIS), "Hugging Face")


def test_the_same_content_is_registered_once(exported: Exported, ollama: RecordedOllama) -> None:
    first = exported.register()
    ollama.requests.clear()
    again = exported.register()
    assert again == first.model_copy(update={"created": False})
    assert {path for _, path, _ in ollama.requests} == {"/api/version", "/api/tags"}


def test_other_parameters_are_another_model_of_the_same_name(exported: Exported, ollama: RecordedOllama) -> None:
    first = exported.register()
    second = exported.register(ollama_parameters={"num_ctx": 4096})
    assert second.digest != first.digest and not second.created
    assert list(ollama.models) == [first.name]
    take_back(second)  # it was there before
    assert list(ollama.models) == [first.name]
    take_back(first)
    assert ollama.models == {}


def test_what_an_older_ollama_cannot_show_is_noted(exported: Exported, ollama: RecordedOllama) -> None:
    ollama.pin("GET", "/api/version", "003-version", replace={"0.32.15": "0.6.1"}, after=1)
    ollama.pin("POST", "/api/chat", "096-chat-nostream")
    done = exported.register()
    assert done.compared == []
    assert done.note == "Its prompts were not compared: Ollama 0.6.1 does not show them."


def test_a_store_that_fails_after_it_takes_the_model_back(
    exported: Exported, ollama: RecordedOllama, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str, data: bytes) -> None:
        raise StoreError("The disk is full.")

    monkeypatch.setattr(exported.store, "write_bytes", refuse)
    with pytest.raises(StoreError):
        exported.register()
    assert ollama.models == {}


def add(exported: Exported, run: str, done: OllamaRef | None = None) -> Version:
    """Add a run that exported the file to the registry, as registered in Ollama where it was."""
    return registry.add_version(exported.store, "shop", run, "promote", exported.sha256, done)


def add_another(exported: Exported) -> Version:
    """Add a run with another file, as registered in Ollama."""
    there = OllamaRef(name="shop:cccccccc", url="", registered=True, digest="d")
    return registry.add_version(exported.store, "shop", "b", "promote", "c" * 64, there)


def test_a_promoted_version_gets_the_alias_in_both(exported: Exported, ollama: RecordedOllama) -> None:
    done = exported.register()
    version = add(exported, "a", done)
    for alias in ("promoted", "latest"):
        move, moved = promote(exported.store, "shop", alias, version, "gained")
        assert (move.version, move.replaced, moved) == (1, None, (f"shop:{alias}", ""))
        assert ollama.models[f"shop:{alias}"] == ollama.models[done.name]
    copies = len(ollama.asked("POST", "/api/copy"))
    assert promote(exported.store, "shop", "latest", version, "again")[0] == move
    assert len(registry.read_history(exported.store, "shop", "latest")) == 1
    assert len(ollama.asked("POST", "/api/copy")) == copies, "Ollama has it already"
    ollama.models.pop("shop:latest")
    assert promote(exported.store, "shop", "latest", version, "again")[1].alias == "shop:latest"
    assert ollama.models["shop:latest"] == ollama.models[done.name], "what was missing there is made up for"


def test_an_alias_that_ollama_cannot_move_is_moved_nowhere(exported: Exported, ollama: RecordedOllama) -> None:
    version = add(exported, "a", exported.register())
    before = dict(ollama.models)
    ollama.pin("POST", "/api/copy", "108-copy-missing")
    with pytest.raises(ExportError, match=r"could not copy .* shop:promoted names no version as before\.$"):
        promote(exported.store, "shop", "promoted", version, "gained")
    assert ollama.models == before
    moves = registry.read_history(exported.store, "shop", "promoted")
    assert [(m.kind, m.version, m.replaced) for m in moves] == [("promote", 1, None), ("undo", None, 1)]
    assert "could not copy" in moves[1].why
    assert promote(exported.store, "shop", "promoted", version, "gained")[1].alias == "shop:promoted"


def test_an_ollama_that_lost_the_model_or_is_gone_undoes_the_promotion(
    exported: Exported, ollama: RecordedOllama, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = exported.register()
    version = add(exported, "a", done)
    ollama.models.clear()
    with pytest.raises(ExportError, match=f"has no {done.name}, .* Register it: forgetless export a --to ollama"):
        promote(exported.store, "shop", "promoted", version, "gained")
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    with pytest.raises(ExportError, match=f"No Ollama answers at http://127.0.0.1:9, where {done.name} would get"):
        promote(exported.store, "shop", "promoted", version, "gained")
    moves = registry.read_history(exported.store, "shop", "promoted")
    assert [m.kind for m in moves] == ["promote", "undo"] * 2


def test_an_interrupt_undoes_both(exported: Exported, ollama: RecordedOllama, monkeypatch: pytest.MonkeyPatch) -> None:
    done = exported.register()
    promote(exported.store, "shop", "promoted", add(exported, "a", done), "gained")
    later = add_another(exported)
    ollama.models["shop:cccccccc"] = "mk-smollm2:latest"

    def interrupted(url: str, name: str, alias: str) -> str:
        left = move_alias(url, name, alias)
        if name == "shop:cccccccc":
            raise KeyboardInterrupt
        return left

    monkeypatch.setattr("tasks.export.register.move_alias", interrupted)
    with pytest.raises(KeyboardInterrupt):
        promote(exported.store, "shop", "promoted", later, "gained")
    last = registry.read_history(exported.store, "shop", "promoted")[-1]
    assert (last.kind, last.version, last.why) == ("undo", 1, "KeyboardInterrupt")
    assert ollama.models["shop:promoted"] == ollama.models[done.name]


def test_a_version_that_is_not_in_ollama_is_promoted_in_the_registry(
    exported: Exported, ollama: RecordedOllama, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = add(exported, "a")
    move, moved = promote(exported.store, "shop", "promoted", version, "gained")
    assert (move.version, moved.alias, ollama.models) == (1, None, {})
    assert moved.note == (
        "It is not in Ollama, where shop:promoted stays what it is. Register it: forgetless export a --to ollama"
    )
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    note = promote(exported.store, "shop", "staging", version, "gained")[1].note
    assert note == "No Ollama answers at http://127.0.0.1:9, so no name was moved there."


def test_a_registry_that_cannot_be_written_leaves_ollama_alone(
    exported: Exported, ollama: RecordedOllama, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str, data: bytes) -> bool:
        raise StoreError("The disk is full.")

    version = add(exported, "a", exported.register())
    before = dict(ollama.models)
    monkeypatch.setattr(exported.store, "create_bytes", refuse)
    with pytest.raises(StoreError, match="The disk is full"):
        promote(exported.store, "shop", "promoted", version, "gained")
    assert ollama.models == before


def test_a_promotion_that_another_overtakes_leaves_ollama_with_the_others(
    exported: Exported, ollama: RecordedOllama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other promotes while Ollama's alias is moved here, and had moved it before: it is moved on to the other's."""
    done = exported.register()
    version = add(exported, "a", done)
    later = add_another(exported)
    ollama.models["shop:cccccccc"] = "mk-smollm2:latest"

    def overtaken(url: str, name: str, alias: str) -> str:
        seen = registry.read_current(exported.store, "shop", "promoted")
        if seen.version == 1:
            registry.promote_version(exported.store, "shop", "promoted", seen, later, "also")
        return move_alias(url, name, alias)

    monkeypatch.setattr("tasks.export.register.move_alias", overtaken)
    promote(exported.store, "shop", "promoted", version, "gained")
    assert registry.read_current(exported.store, "shop", "promoted").version == 2
    assert ollama.models["shop:promoted"] == ollama.models["shop:cccccccc"] != ollama.models[done.name]


def test_without_an_ollama_the_command_for_it_is_given(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    done = exported.register()
    assert not done.registered and not done.created
    assert done.note.endswith(f"&& ollama create shop:{exported.sha256[:8]} -f Modelfile")


@pytest.mark.parametrize(
    ("name", "target", "expected"),
    [
        (None, "me", "me/shop:{}"),
        (None, "me/better", "me/better:{}"),
        (None, "me/better:v1", "me/better:v1"),
        (None, "localhost:5000/me/better", "localhost:5000/me/better:{}"),
        ("team/shop2", "me", "me/shop2:{}"),
    ],
)
def test_names_to_push(exported: Exported, name: str | None, target: str, expected: str) -> None:
    found = name_to_push(ExportConfig(ollama_name=name), exported.gguf, "shop", target)
    assert found == expected.format(exported.sha256[:8])


@pytest.mark.parametrize("target", ["my name", "a.b", "me/x:cloud", "-me", "", "me/"])
def test_names_that_cannot_be_pushed(exported: Exported, target: str) -> None:
    with pytest.raises(ConfigError, match="^--push .* Expected NAMESPACE or NAMESPACE/NAME.$"):
        name_to_push(ExportConfig(), exported.gguf, "shop", target)


def test_a_registered_model_is_pushed(exported: Exported, ollama: RecordedOllama) -> None:
    done = exported.register()
    ollama.pushes.append((200, [{"status": "success"}]))
    push(done, "me/shop:v1")
    assert json.dumps(ollama.asked("POST", "/api/push")) == '[{"model": "me/shop:v1", "stream": true}]'
