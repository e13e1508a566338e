"""The registration of a run: recorded with what was proven, done once, taken back, promoted, pushed."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.core.config import ExportConfig
from tasks.core.errors import ConfigError, ExportError, StoreError
from tasks.core.records import ArtifactRef, BaseRef, GgufRef, ModelRef, OllamaRef
from tasks.core.stages import Stage
from tasks.core.store import FileStore, put_artifact
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


def test_a_promoted_version_gets_the_alias(exported: Exported, ollama: RecordedOllama) -> None:
    done = exported.register()
    for tag, alias in (("promoted", "shop:promoted"), ("latest", "shop:latest")):
        assert promote(ExportConfig(ollama_alias=tag), done).alias == alias
        assert ollama.models[alias] == ollama.models[done.name]
    assert promote(ExportConfig(ollama_alias=None), done) == done
    absent = OllamaRef(name="shop:1", url="", registered=False)
    assert promote(ExportConfig(), absent) == absent
    ollama.pin("POST", "/api/copy", "108-copy-missing")
    ollama.models.pop("shop:latest")
    with pytest.raises(ExportError):
        promote(ExportConfig(ollama_alias="latest"), done)
    assert "shop:latest" not in ollama.models


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
