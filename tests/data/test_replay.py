"""Replay: rows of other tasks in the share that was asked for, from sources or from the base's own answers."""

import json
from pathlib import Path
from typing import Any

import pytest

from tasks.core.config import DataConfig
from tasks.core.errors import DataError
from tasks.data.leakage import index_items
from tasks.data.prepare import prepare_dataset
from tasks.data.replay import answer_prompts, read_prompts


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def pairs(name: str, count: int) -> list[dict[str, str]]:
    return [{"prompt": f"{name} question {i}", "response": f"{name} answer {i}"} for i in range(count)]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_replay_rows_make_up_the_share_of_the_training_rows(tmp_path: Path, share: float) -> None:
    new, old = write(tmp_path / "new.jsonl", pairs("new", 90)), write(tmp_path / "old.jsonl", pairs("old", 200))
    config = DataConfig(sources=[str(new)], replay={"share": share, "sources": str(old)})
    fields = prepare_dataset(config, tmp_path / "out")
    train = lines(tmp_path / "out" / "train.jsonl")
    replayed = [row for row in train if row["source"] == "old.jsonl"]
    assert len(replayed) / len(train) == pytest.approx(share, abs=0.01)
    assert fields["replay"] == {"old.jsonl": len(replayed)}
    assert {row["source"] for row in lines(tmp_path / "out" / "validation.jsonl")} == {"new.jsonl"}
    assert fields["read"] == 290 == sum(fields["rows"].values()) + fields["unused"]
    assert fields["unused"] == 200 - len(replayed)


def test_a_larger_share_only_adds_rows_and_a_small_source_gives_all_it_has(tmp_path: Path) -> None:
    new, old = write(tmp_path / "new.jsonl", pairs("new", 90)), write(tmp_path / "old.jsonl", pairs("old", 40))
    found = []
    for share in (0.1, 0.2, 0.8):
        config = DataConfig(sources=[str(new)], replay={"share": share, "sources": str(old)})
        prepare_dataset(config, tmp_path / str(share))
        found.append({r["line"] for r in lines(tmp_path / str(share) / "train.jsonl") if r["source"] == "old.jsonl"})
    assert found[0] < found[1] < found[2] == set(range(1, 41))


def test_prompts_are_read_from_lines_objects_and_conversations(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    asked = [*talk, {"role": "user", "content": "Bye?"}]
    rows = [{"instruction": "Name a\u2028colour."}, {"messages": asked}, {"messages": talk}]
    lines = ["Who are you?\n", *(json.dumps(row, ensure_ascii=False) for row in rows)]
    path.write_text("\n".join(lines), encoding="utf-8")
    assert read_prompts(path) == [
        [{"role": "user", "content": "Who are you?"}],
        [{"role": "user", "content": "Name a\u2028colour."}],
        asked,
        talk[:1],
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"foo": 1}',
            r"prompts.jsonl:1: expected a prompt \(prompt, instruction, question, text or messages\), found",
        ),
        ('Hi\n{"prompt": ', r"prompts.jsonl:2: not valid JSON"),
        ("\n\n", "expected prompts for data.replay, found none"),
    ],
)
def test_prompts_that_are_none_are_said(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_prompts(path)


def test_the_base_answers_itself_and_ends(smollm_folder: Path) -> None:
    import torch

    from tasks.models.load import load_model
    from tasks.models.tokenizer import load_tokenizer

    model, tokenizer = load_model(smollm_folder, torch.float32, "cpu"), load_tokenizer(smollm_folder, "auto")
    questions = ["What is the capital of France?", "Write a novel of 900 pages.", "What is 2 + 2?", "Name a fruit."]
    prompts = [[{"role": "user", "content": question}] for question in questions]
    items = index_items([("quiz", "Name a fruit.", "Apple")])
    progress: list[int] = []
    rows = list(answer_prompts(model, tokenizer, prompts, 3, 40, items, progress.append))
    answers = {row["line"]: row["messages"][-1]["content"] for row in rows}
    assert "Paris" in answers[1]
    assert 2 not in answers, "it does not end within 40 tokens"
    assert 4 not in answers, "it is an evaluation item"
    assert all(row["source"] == "self-replay" for row in rows)
    assert progress[-1] == len(rows)
    alone = list(answer_prompts(model, tokenizer, prompts[:1], 1, 40, None, progress.append))
    assert alone[0]["messages"] == rows[0]["messages"], "padding beside longer prompts changes nothing"
