"""Encoding many rows at once gives what rendering each by its template gives, id for id and mark for mark."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks.models.encode import Encoder, read_examples, write_examples
from tasks.models.template import NAMED_TEMPLATES, Message, encode_conversation
from tasks.models.tokenizer import load_tokenizer

TRIMS = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}[end]{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
# As reasoning models do: what an earlier answer thought is dropped once a later question follows.
DROPS_THOUGHTS = (
    "{% for m in messages %}{% set text = m['content'] %}"
    "{% if m['role'] == 'assistant' and '</think>' in text and not loop.last %}"
    "{% set text = text.split('</think>')[-1] %}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ text }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TEMPLATES = {**NAMED_TEMPLATES, "own": None, "trims": TRIMS, "drops thoughts": DROPS_THOUGHTS, "no system": NO_SYSTEM}


@pytest.fixture(scope="module")
def encoders(tiny_folder: Path) -> dict[str, Encoder]:
    made = {}
    for name, template in TEMPLATES.items():
        tokenizer = load_tokenizer(tiny_folder, "auto")
        if template:
            tokenizer.chat_template = template
        made[name] = Encoder(tokenizer)
    return made


def conversation(texts: list[str], system: str | None = None) -> list[Message]:
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return ([{"role": "system", "content": system}] if system is not None else []) + turns


def assert_same(encoder: Encoder, rows: list[list[Message]]) -> None:
    found = encoder.encode(rows, 64)
    expected = [encode_conversation(encoder.tokenizer, row) for row in rows]
    assert [found.example(i) for i in range(len(found))] == [example for row in expected for example in row]
    assert found.rows.tolist() == [n for n, row in enumerate(expected) for _ in row]


@pytest.mark.parametrize("name", list(TEMPLATES))
@settings(max_examples=25, suppress_health_check=list(HealthCheck), deadline=None)
@given(data=st.data())
def test_ids_and_marks_are_the_templates_own(encoders: dict[str, Encoder], name: str, data: Any) -> None:
    text = st.one_of(
        st.text(min_size=1, max_size=40),
        st.sampled_from(
            [
                "你好，世界。",
                "  spaces  ",
                "\n",
                "a\n\nb ",
                "🙂👨‍👩‍👧",
                "<|im_end|>",
                "</think>yes",
                "[end]",
                "system",
                "1\t",
            ]
        ),
    )
    texts = data.draw(st.lists(text, min_size=2, max_size=6).filter(lambda t: len(t) % 2 == 0))
    system = data.draw(st.one_of(st.none(), text)) if name != "no system" else None
    assert_same(encoders[name], [conversation(texts, system)])


def test_the_simple_templates_are_found_simple(encoders: dict[str, Encoder]) -> None:
    assert {name for name, encoder in encoders.items() if encoder.text} == set(TEMPLATES)
    assert encoders["no system"].text.system is None
    assert encoders["trims"].text.strips["user"] == (True, True)
    # The thought is a string the template mentions, so the template renders such rows, one sequence per answer.
    rows = [conversation(["q", "<think>t</think>a", "r", "b"])]
    assert encoders["drops thoughts"].text.join(rows[0]) is None
    assert len(encoders["drops thoughts"].encode(rows, 64)) == 2
    assert_same(encoders["drops thoughts"], [*rows, conversation(["x", "y"])])


def test_plain_text_is_learned_whole_and_split_where_it_is_long(encoders: dict[str, Encoder]) -> None:
    encoder = encoders["own"]
    text = "春眠不觉晓，处处闻啼鸟。" * 12
    found = encoder.encode([[{"role": "text", "content": text}], conversation(["q", "a"])], 64)
    pieces = [found.example(i) for i in range(len(found)) if found.rows[i] == 0]
    ids = [i for piece in pieces for i in piece.ids]
    assert encoder.tokenizer.decode(ids[:-1]) == text
    assert ids[-1] == encoder.tokenizer.eos_token_id
    assert all(all(piece.supervised) for piece in pieces)
    assert [len(piece.ids) for piece in pieces[:-1]] == [64] * (len(pieces) - 1)
    assert found.rows.tolist() == [0] * len(pieces) + [1]


def test_written_examples_come_back(encoders: dict[str, Encoder], tmp_path: Path) -> None:
    encoder = encoders["own"]
    parts = [encoder.encode([conversation(["q", "a"]), conversation(["r", "b", "s", "c"])], 64) for _ in range(2)]
    write_examples(parts, tmp_path / "train")
    found = read_examples(tmp_path / "train")
    assert [found.example(i) for i in range(4)] == [part.example(i) for part in parts for i in range(2)]
    assert found.supervised_tokens == sum(sum(found.example(i).supervised) for i in range(4))
    assert found.supervised_lengths.tolist() == [sum(found.example(i).supervised) for i in range(4)]
    some = found.only(np.array([False, True, True, False]))
    assert [some.example(i) for i in range(2)] == [found.example(1), found.example(2)]
    empty = write_examples([], tmp_path / "none")
    assert len(empty) == 0
