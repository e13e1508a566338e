"""The prompt that the model gets from Ollama is the one it was trained with, byte for byte, or it is not registered."""

import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from tasks.core.errors import ExportError, ModelError
from tasks.export.ollama import Registered, register_model
from tasks.export.prompts import PromptCase, go_templates, prompt_cases
from tasks.models.template import NAMED_TEMPLATES, apply_named_template, default_system, render
from tasks.models.tokenizer import load_tokenizer
from tests.export.go_template import render_go
from tests.export.recorded_ollama import RecordedOllama, full_name

PROMPT = "What is the capital of France?"
SMOLLM2 = "030-create-stream-minimal"
FOUR_CASES = (
    "one turn",
    "one turn with a system prompt",
    "several turns",
    "several turns with a system prompt",
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA31 = (
    "{% set system = '' %}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set messages = messages[1:] %}{% endif %}{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\n"
    "Cutting Knowledge Date: December 2023\nToday Date: {{ strftime_now('%d %b %Y') }}\n\n{{ system }}<|eot_id|>"
    "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
RECORDED_DAY = "22 Nov 2026"


@pytest.fixture
def ollama() -> Iterator[RecordedOllama]:
    with RecordedOllama() as server:
        yield server


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + bytes(range(256)) * 8)
    return path


@pytest.fixture
def tokenizer(smollm_folder: Path) -> Any:
    return load_tokenizer(smollm_folder, "auto")


def adding_bos(tokenizer: Any) -> Any:
    """Let a tokenizer begin every text with a BOS of its own, as Llama's do."""
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def register(ollama: RecordedOllama, gguf: Path, exchange: str, tokenizer: Any, **settings: Any) -> Registered:
    """Register `gguf` in place of the file of a recorded create, its answer being the recorded one of another."""
    system = default_system(tokenizer)
    settings = {
        "system": system,
        "parameters": {},
        "templates": go_templates(tokenizer, system),
        "cases": prompt_cases(tokenizer, system),
        "prompt": PROMPT,
        **settings,
    }
    if "answer_after" in settings:
        ollama.pin("POST", "/api/chat", "080g-template-notemplate-chat-real", after=settings.pop("answer_after"))
    return register_model(ollama.url, "demo", gguf, ollama.stand_in(gguf, exchange), **settings)


def recorded_renderings(ollama: RecordedOllama) -> list[tuple[str, str, list[dict[str, str]], str]]:
    """Return exchange, model, conversation and prompt of every recorded rendering of a chat."""
    return [
        (e.name, e.request["model"], e.request["messages"], e.body["_debug_info"]["rendered_template"])
        for e in ollama.exchanges.values()
        if e.path == "/api/chat" and e.request.get("_debug_render_only")
    ]


# Against the recordings


def test_the_interpreter_renders_every_recorded_go_template_as_ollama_did(ollama: RecordedOllama) -> None:
    shown = {
        e.request["model"]: e.body
        for e in ollama.exchanges.values()
        if e.path == "/api/show" and e.status == 200 and "env" not in e.name
        if ".Messages" in e.body.get("modelfile", "")
    }
    names = []
    for name, model, messages, prompt in recorded_renderings(ollama):
        if model in shown and ("tools" not in shown[model]["capabilities"] or "go-template-env" in name):
            template = re.search(r'^TEMPLATE "(.*?)"$', shown[model]["modelfile"], re.S | re.M)
            assert template and render_go(template[1], messages) == prompt, name
            names.append(name[:4])
    assert names == ["081c", "081d", "084c", "084d", "087c", "131-", "143-", "145-"]


def test_the_tokenizers_prompts_are_the_recorded_ones(ollama: RecordedOllama, tokenizer: Any) -> None:
    templates = {
        "tmpl-notemplate": NAMED_TEMPLATES["chatml"],
        "tmpl-chatml": NAMED_TEMPLATES["chatml"],
        "tmpl-qwen25tmpl": ollama.exchanges["082b-template-qwen25tmpl-show"].body["template"],
        "tmpl-qwen3tmpl": ollama.exchanges["083b-template-qwen3tmpl-show"].body["template"],
        "tmpl-llama31tmpl": LLAMA31,
    }
    compared = []
    for name, model, messages, prompt in recorded_renderings(ollama):
        if model in templates and "env" not in name:
            tokenizer.chat_template = templates[model]
            today = datetime.now().strftime("%d %b %Y")
            assert render(tokenizer, messages, answer_next=True) == prompt.replace(RECORDED_DAY, today), name
            compared.append(name[:4])
    assert compared == ["080c", "080d", "081c", "081d", "082c", "082d", "083c", "083d", "085c", "085d"]


def test_smollm2_keeps_its_default_system_prompt(ollama: RecordedOllama, gguf: Path, tokenizer: Any) -> None:
    done = register(ollama, gguf, SMOLLM2, tokenizer, answer_after=4)
    assert done.compared == FOUR_CASES
    assert done.template is None, "what Ollama chose by itself renders the same"
    (created,) = ollama.asked("POST", "/api/create")
    assert created["system"] == "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert "template" not in created
    sent = [body["messages"] for body in ollama.asked("POST", "/api/chat") if body.get("_debug_render_only")]
    assert [[m["role"][0] for m in messages] for messages in sent] == [list(r) for r in ("u", "su", "uau", "suau")]


def test_a_default_system_prompt_that_ollama_drops_is_refused(
    ollama: RecordedOllama, gguf: Path, tokenizer: Any
) -> None:
    with pytest.raises(ExportError) as error:
        register(ollama, gguf, SMOLLM2, tokenizer, system=None, templates=[None])
    assert str(error.value) == (
        f"Ollama at {ollama.url} would send the model another prompt than it was trained with: for one turn expected "
        r"'<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained …', "
        r"found '<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n'. "
        "Update Ollama, start it without OLLAMA_GO_TEMPLATE, or serve the GGUF with llama.cpp's llama-server, which "
        "uses the template in the file; then run `forgetless export RUN --to ollama` again. "
        "No model 'demo' was registered. "
        "The uploaded file stays with Ollama until it is restarted: a next try need not send it again."
    )
    assert ollama.models == {}


@pytest.mark.parametrize("model", ["qwen25tmpl", "qwen3tmpl"])
def test_a_base_with_tools_is_served_with_its_own_template(
    ollama: RecordedOllama, gguf: Path, tokenizer: Any, model: str
) -> None:
    number = {"qwen25tmpl": "082", "qwen3tmpl": "083"}[model]
    tokenizer.chat_template = ollama.exchanges[f"{number}b-template-{model}-show"].body["template"]
    cases = [c for c in prompt_cases(tokenizer, None) if c.name.startswith("one turn")]  # several were not recorded
    done = register(
        ollama, gguf, f"{number}a-template-{model}-create", tokenizer, system=None, cases=cases, answer_after=2
    )
    assert done.compared == FOUR_CASES[:2]


@pytest.mark.parametrize("days", [-1, 0, 1, 2])
def test_a_prompt_with_the_date_may_be_of_the_neighbouring_days(
    ollama: RecordedOllama, gguf: Path, tokenizer: Any, days: int
) -> None:
    from datetime import timedelta

    tokenizer.chat_template = LLAMA31
    day = (datetime.now() + timedelta(days)).strftime("%d %b %Y")
    for exchange in ("085d-template-llama31tmpl-chat-nosys", "085c-template-llama31tmpl-chat"):
        ollama.pin("POST", "/api/chat", exchange, replace={RECORDED_DAY: day})
    settings = {"cases": prompt_cases(tokenizer, None)[:2], "templates": [None], "answer_after": 0}
    if days < 2:
        assert register(ollama, gguf, "085a-template-llama31tmpl-create", tokenizer, **settings).compared
    else:
        with pytest.raises(ExportError, match=f"found '….*Today Date: {day}"):
            register(ollama, gguf, "085a-template-llama31tmpl-create", tokenizer, **settings)


def test_a_server_that_was_told_to_ignore_the_models_template_is_found_out(
    ollama: RecordedOllama, gguf: Path, tokenizer: Any
) -> None:
    tokenizer.chat_template = LLAMA31
    ollama.pin("POST", "/api/chat", "145-go-template-env-llama31-auto")
    with pytest.raises(ExportError, match="start it without OLLAMA_GO_TEMPLATE"):
        register(ollama, gguf, "085a-template-llama31tmpl-create", tokenizer, templates=[None])
    assert ollama.models == {}


@pytest.mark.parametrize("server_adds_it", [True, False])
def test_a_bos_may_be_left_to_the_servers_tokenizer(
    ollama: RecordedOllama, gguf: Path, tokenizer: Any, server_adds_it: bool
) -> None:
    tokenizer = adding_bos(tokenizer) if server_adds_it else tokenizer
    tokenizer.chat_template = LLAMA3
    exchange = "084a-template-llama30tmpl-create"
    if server_adds_it:
        assert register(ollama, gguf, exchange, tokenizer, answer_after=4).compared == FOUR_CASES
    else:
        with pytest.raises(ExportError, match=r"expected '<\|im_start\|><\|start_header_id\|>"):
            register(ollama, gguf, exchange, tokenizer)
        assert ollama.models == {}


# Go templates


@pytest.mark.parametrize("name", NAMED_TEMPLATES)
@pytest.mark.parametrize("server_adds_bos", [False, True])
@pytest.mark.parametrize("system", [None, "Be kind."])
def test_our_go_templates_render_as_the_named_ones(
    tokenizer: Any, name: str, server_adds_bos: bool, system: str | None
) -> None:
    if server_adds_bos:
        tokenizer = adding_bos(tokenizer)
    apply_named_template(tokenizer, name, "base")
    (template,) = go_templates(tokenizer, system)
    assert template is not None
    for case in prompt_cases(tokenizer, system):
        own = [] if case.messages[0]["role"] == "system" or not system else [{"role": "system", "content": system}]
        rendered = render_go(template, [*own, *case.messages])
        assert (tokenizer.bos_token if server_adds_bos else "") + rendered == case.prompts[0], case.name


@pytest.mark.parametrize("name", NAMED_TEMPLATES)
def test_a_named_template_is_given_and_obeyed(ollama: RecordedOllama, gguf: Path, tokenizer: Any, name: str) -> None:
    apply_named_template(tokenizer, name, "base")
    done = register(ollama, gguf, SMOLLM2, tokenizer, answer_after=4)
    (created,) = ollama.asked("POST", "/api/create")
    assert created["template"] == done.template == go_templates(tokenizer, None)[0]
    assert done.compared == FOUR_CASES
    assert list(ollama.models) == ["demo:latest"]


def test_a_base_that_ollama_guesses_wrong_gets_the_template_like_its_own(
    ollama: RecordedOllama, gguf: Path, tokenizer: Any
) -> None:
    tokenizer.chat_template = re.sub(r"\bm\b", "turn", NAMED_TEMPLATES["alpaca"])  # other words, the same prompts
    done = register(ollama, gguf, SMOLLM2, tokenizer, answer_after=5)
    first, second = ollama.asked("POST", "/api/create")
    assert "template" not in first and second["template"] == done.template
    assert done.compared == FOUR_CASES
    assert list(ollama.models) == ["demo:latest"]


def test_a_go_template_that_is_ignored_helps_nobody(ollama: RecordedOllama, gguf: Path, tokenizer: Any) -> None:
    apply_named_template(tokenizer, "alpaca", "base")
    exchange = "087a-override-marker-qwen25-create"  # a GGUF whose own template supports tools
    with pytest.raises(ExportError, match=r"expected '### Instruction:\\nHello.*found '<\|im_start\|>system"):
        register(ollama, gguf, exchange, tokenizer)
    assert len(ollama.asked("POST", "/api/create")) == 1
    assert ollama.models == {}


def test_an_older_ollama_that_shows_no_prompt_is_believed(ollama: RecordedOllama, gguf: Path, tokenizer: Any) -> None:
    ollama.pin("POST", "/api/chat", "080g-template-notemplate-chat-real")  # it answers what it should only render
    done = register(ollama, gguf, SMOLLM2, tokenizer, answer_after=0)
    assert done.compared is None
    assert list(ollama.models) == ["demo:latest"]


def test_half_an_answer_is_no_rendering(ollama: RecordedOllama, gguf: Path, tokenizer: Any) -> None:
    shown = {'"rendered_template"': '"another_key"'}
    ollama.pin("POST", "/api/chat", "131-chat-nosystem-smol", replace=shown)
    with pytest.raises(ExportError, match="expected a rendered template, found"):
        register(ollama, gguf, SMOLLM2, tokenizer)
    assert ollama.models == {}


def test_a_template_that_knows_no_system_prompt_has_no_such_cases(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert [c.name for c in prompt_cases(tokenizer, None)] == ["one turn", "several turns"]
    assert go_templates(tokenizer, None) == [None]
    with pytest.raises(ModelError, match="refuses a conversation of system, user"):
        prompt_cases(tokenizer, "Be kind.")


def test_the_first_difference_is_shown(ollama: RecordedOllama, gguf: Path, tokenizer: Any) -> None:
    case = PromptCase("one turn", [{"role": "user", "content": "Hello"}], ["<|im_start|>user\nHello<|im_end|>\nX"])
    with pytest.raises(
        ExportError, match=r"expected '…m_start\|>user\\nHello<\|im_end\|>\\nX', found '…m_start\|>user\\n"
    ):
        register(ollama, gguf, SMOLLM2, tokenizer, system=None, cases=[case], templates=[None])
    assert full_name("demo") not in ollama.models
