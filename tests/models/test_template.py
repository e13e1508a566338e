"""Label masks: the assistant's turns and their ends are learned, nothing else, whatever the template."""

import json
import shutil
from pathlib import Path

import pytest

from tasks.core.errors import ModelError
from tasks.models.template import (
    NAMED_TEMPLATES,
    apply_named_template,
    check_template,
    default_system,
    encode_conversation,
)
from tasks.models.tokenizer import load_tokenizer

TALK = [
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "你好！有什么可以帮你？"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Goodbye."},
]


def learned(tokenizer, messages: list[dict[str, str]]) -> list[str]:
    """Return the runs of supervised text."""
    (example,) = encode_conversation(tokenizer, messages)
    runs: list[list[int]] = []
    previous = False
    for token, supervised in zip(example.ids, example.supervised, strict=True):
        if supervised and not previous:
            runs.append([])
        if supervised:
            runs[-1].append(token)
        previous = supervised
    return [tokenizer.decode(run) for run in runs]


def test_smollm2_learns_its_turns_and_the_end_of_each(smollm_folder: Path) -> None:
    tokenizer = load_tokenizer(smollm_folder, "auto")
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"
    assert learned(tokenizer, TALK) == ["你好！有什么可以帮你？<|im_end|>\n", "Goodbye.<|im_end|>\n"]


@pytest.mark.parametrize("name", NAMED_TEMPLATES)
def test_named_templates_learn_the_answers_and_their_end(smollm_folder: Path, name: str) -> None:
    tokenizer = load_tokenizer(smollm_folder, name)
    runs = learned(tokenizer, [{"role": "system", "content": "Be kind."}, *TALK])
    assert [run.replace(tokenizer.eos_token, "").strip() for run in runs] == ["你好！有什么可以帮你？", "Goodbye."]
    assert all(tokenizer.eos_token in run for run in runs)


def test_a_template_that_rewrites_earlier_turns_gives_one_example_per_answer(smollm_folder: Path) -> None:
    tokenizer = load_tokenizer(smollm_folder, "auto")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: "
        "{{ '[earlier]' if m['role'] == 'assistant' and not loop.last else m['content'] }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    examples = encode_conversation(tokenizer, TALK)
    ends = [tokenizer.decode([i for i, s in zip(e.ids, e.supervised, strict=True) if s]) for e in examples]
    assert [e.strip() for e in ends] == ["你好！有什么可以帮你？<|im_end|>", "Goodbye.<|im_end|>"]


def test_a_template_that_cannot_be_masked_is_refused(smollm_folder: Path) -> None:
    tokenizer = load_tokenizer(smollm_folder, "auto")
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ModelError, match="cannot be masked"):
        encode_conversation(tokenizer, TALK)


def test_a_base_without_a_template_gets_an_error_that_lists_them(smollm_folder: Path) -> None:
    tokenizer = load_tokenizer(smollm_folder, "auto")
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="chatml, llama2, alpaca, vicuna"):
        apply_named_template(tokenizer, "auto", "some/base")


def test_the_default_system_prompt_is_found(smollm_folder: Path) -> None:
    tokenizer = load_tokenizer(smollm_folder, "auto")
    assert default_system(tokenizer) == "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert default_system(load_tokenizer(smollm_folder, "chatml")) is None


def test_the_quickstart_rows_all_learn_something(smollm_folder: Path) -> None:
    from tasks.core.config import RECIPES

    tokenizer = load_tokenizer(smollm_folder, "auto")
    lines = (RECIPES / "quickstart" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    examples = [e for line in lines for e in encode_conversation(tokenizer, json.loads(line)["messages"])]
    assert len(examples) == len(lines) >= 240
    assert all(any(e.supervised) and not e.supervised[0] for e in examples)


BOMBS = {
    "two loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a doubling": "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "a power": "{{ 9 ** (9 ** (9 ** 9)) }}",
    "a constant": "{{ 'x' * 10 ** 10 }}",
    "a filter": "{{ messages[0].content | center(10 ** 11) }}",
    "long text": "{% for a in range(99999) %}{{ a }} and another sentence{% endfor %}",
    "long talks alone": "{% if messages | length > 9 %}{{ 'x' * 10 ** 10 }}{% endif %}{{ messages }}",
}
ESCAPES = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('touch {path}') }}",
    "a function's": "{{ raise_exception.__globals__['__builtins__']['open']('{path}', 'w') }}",
    "a filter": "{{ ('' | attr('__class__')).mro() }}",
    "a format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "a change": "{{ messages.append(1) }}",
    "an import": "{% import 'os' as os %}{{ os.system('touch {path}') }}",
    "an include": "{% include '/etc/passwd' %}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "nonsense": "{{ 1 / 0 }}",
}


def with_template(folder: Path, template: str, target: Path, place: str) -> Path:
    """Return a copy of a model's folder, without weights, that has another chat template."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors", "chat_template.jinja"))
    settings = json.loads((target / "tokenizer_config.json").read_text()) | {"chat_template": template}
    if place != "tokenizer_config.json":
        del settings["chat_template"]
        (target / place).write_text(template)
    (target / "tokenizer_config.json").write_text(json.dumps(settings))
    return target


@pytest.mark.parametrize("name", BOMBS)
def test_a_template_without_an_end_is_refused(name: str, tiny_folder: Path, tmp_path: Path) -> None:
    place = "chat_template.jinja" if name == "a power" else "tokenizer_config.json"
    folder = with_template(tiny_folder, BOMBS[name], tmp_path / "model", place)
    with pytest.raises(ModelError, match="for a conversation of a few words: it is broken or hostile. Name another"):
        load_tokenizer(folder, "auto")
    assert load_tokenizer(folder, "chatml").chat_template == NAMED_TEMPLATES["chatml"]


@pytest.mark.parametrize("name", ESCAPES)
def test_a_template_reaches_nothing_outside(name: str, tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "was-here"
    template = ESCAPES[name].replace("{path}", str(path))
    tokenizer = load_tokenizer(
        with_template(tiny_folder, template, tmp_path / "model", "tokenizer_config.json"), "auto"
    )
    with pytest.raises(ModelError, match="The base's chat template refuses a conversation of user") as error:
        encode_conversation(tokenizer, TALK[2:])
    assert "root:" not in str(error.value) and not path.exists()


def test_every_named_template_passes_its_own_check() -> None:
    for name, template in NAMED_TEMPLATES.items():
        check_template(template, name)
