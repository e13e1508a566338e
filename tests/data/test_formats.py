import json
from pathlib import Path
from typing import Any

import pytest

from tasks.core.errors import DataError
from tasks.data.formats import Rejected, Row, detect_format, to_row

USER = {"role": "user", "content": "你好"}
ASSISTANT = {"role": "assistant", "content": "你好！"}


def row_of(record: Any, format_: str = "auto") -> Row:
    row = to_row(record, detect_format([record], format_, "f"), "f", 1)
    assert isinstance(row, Row), row
    return row


def rejected(record: Any, format_: str) -> Rejected:
    row = to_row(record, format_, "f.jsonl", 7)
    assert isinstance(row, Rejected), row
    assert (row.source, row.line) == ("f.jsonl", 7)
    assert row.detail.endswith(".")
    return row


def turns(row: Row) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in row.messages]


def test_alpaca_joins_instruction_and_input_and_puts_system_and_history_first() -> None:
    row = row_of(
        {
            "instruction": "Translate",
            "input": "猫",
            "output": "cat",
            "system": "Be brief.",
            "history": [["Hi", "Hello"], ["How are you?", "Fine"]],
        }
    )
    assert row.format == "alpaca"
    assert turns(row) == [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "How are you?"),
        ("assistant", "Fine"),
        ("user", "Translate\n猫"),
        ("assistant", "cat"),
    ]


@pytest.mark.parametrize("nothing", [None, "", float("nan")])
def test_alpaca_fields_that_may_be_absent_may_be_null(nothing: Any) -> None:
    row = row_of({"instruction": "q", "input": nothing, "output": "a", "system": nothing, "history": nothing})
    assert turns(row) == [("user", "q"), ("assistant", "a")]


def test_dolly_names_its_fields_context_and_response() -> None:
    assert turns(row_of({"instruction": "q", "context": "c", "response": "a"})) == [
        ("user", "q\nc"),
        ("assistant", "a"),
    ]


@pytest.mark.parametrize("user", ["human", "user", "Human", "prompter"])
@pytest.mark.parametrize("assistant", ["gpt", "assistant", "chatgpt", "bard", "ASSISTANT"])
def test_sharegpt_role_names(user: str, assistant: str) -> None:
    row = row_of({"conversations": [{"from": user, "value": "q"}, {"from": assistant, "value": "a"}]})
    assert row.format == "sharegpt"
    assert turns(row) == [("user", "q"), ("assistant", "a")]


@pytest.mark.parametrize(
    ("record", "format_"),
    [
        ({"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, "messages"),
        ({"conversation": [{"from": "human", "content": "q"}, {"from": "gpt", "content": "a"}]}, "sharegpt"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, "messages"),
        ([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "messages"),
        # Parquet gives every message all the keys that any message has, and every row all the columns
        (
            {
                "messages": None,
                "conversations": [
                    {"from": "human", "value": "q", "content": None, "tool_calls": None},
                    {"from": "gpt", "value": "a", "content": None, "tool_calls": None},
                ],
            },
            "sharegpt",
        ),
        ({"messages": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'}, "messages"),
        ({"prompt": "q", "response": "a"}, "pairs"),
        ({"prompt": "q", "completion": "a"}, "pairs"),
        ({"question": "q", "answer": "a"}, "pairs"),
    ],
)
def test_key_variants_mean_the_same_conversation(record: Any, format_: str) -> None:
    row = row_of(record)
    assert row.format == format_
    assert turns(row) == [("user", "q"), ("assistant", "a")]
    assert row.digest == row_of({"instruction": "q", "output": "a"}).digest


def test_content_parts_are_joined_and_other_media_refused() -> None:
    parts = [{"type": "text", "text": "你"}, {"type": "text", "value": "好"}]
    assert turns(row_of([{"role": "user", "content": parts}, ASSISTANT]))[0] == ("user", "你好")
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ASSISTANT]
    assert "'image_url'" in rejected(image, "messages").detail


def test_a_system_column_and_an_empty_system_turn() -> None:
    assert turns(row_of({"system": "s", "conversations": [USER, ASSISTANT]}))[0] == ("system", "s")
    assert turns(row_of([{"role": "system", "content": " "}, USER, ASSISTANT]))[0] == ("user", "你好")


def test_text_is_kept_as_it_stands() -> None:
    assert turns(row_of({"prompt": " q\n", "response": "\ta \u200b"})) == [
        ("user", " q\n"),
        ("assistant", "\ta \u200b"),
    ]


def test_unanswered_last_questions_are_cut_and_said() -> None:
    row = row_of([USER, ASSISTANT, USER, USER])
    assert turns(row) == [("user", "你好"), ("assistant", "你好！")]
    assert row.repaired == "trailing_user_turn"
    assert row.digest == row_of([USER, ASSISTANT]).digest
    assert row_of([USER, ASSISTANT]).repaired is None


@pytest.mark.parametrize(
    ("record", "format_", "reason"),
    [
        ({"instruction": "q", "output": None}, "alpaca", "null_text"),
        ({"instruction": "q", "output": float("nan")}, "alpaca", "null_text"),
        ({"instruction": None, "output": "a"}, "alpaca", "null_text"),
        ({"instruction": "q", "output": 42}, "alpaca", "not_text"),
        ({"instruction": "q", "output": True}, "alpaca", "not_text"),
        ({"instruction": "q", "input": 3.5, "output": "a"}, "alpaca", "not_text"),
        ({"instruction": "q", "output": ["a"]}, "alpaca", "not_text"),
        ({"instruction": "q", "output": ["better", "worse"]}, "alpaca", "preference_pair"),
        ({"instruction": "q", "output": " \n"}, "alpaca", "empty_answer"),
        ({"instruction": "", "input": "", "output": "a"}, "alpaca", "empty_prompt"),
        ({"instruction": "q", "output": "\ud83d"}, "alpaca", "invalid_unicode"),
        ({"instruction": "q", "output": "a", "history": [["q"]]}, "alpaca", "bad_history"),
        ({"instruction": "q", "output": "a", "history": "q1: a1"}, "alpaca", "bad_history"),
        ({"instruction": "q", "output": "a", "history": [["q", None]]}, "alpaca", "null_text"),
        ({"prompt": "q", "response": "a"}, "alpaca", "wrong_format"),
        ("text", "alpaca", "wrong_format"),
        (None, "messages", "wrong_format"),
        ([], "messages", "wrong_format"),
        ({"messages": []}, "messages", "no_assistant_turn"),
        ({"messages": None}, "messages", "no_assistant_turn"),
        ({"messages": {"role": "user"}}, "messages", "bad_turn"),
        ({"messages": ["hi", "hello"]}, "messages", "bad_turn"),
        ([USER], "messages", "no_assistant_turn"),
        ([ASSISTANT, USER, ASSISTANT], "messages", "roles_out_of_order"),
        ([USER, ASSISTANT, ASSISTANT], "messages", "roles_out_of_order"),
        ([USER, USER, ASSISTANT], "messages", "roles_out_of_order"),
        ([USER, {"role": "system", "content": "s"}, ASSISTANT], "messages", "roles_out_of_order"),
        ([{"role": "user", "content": ""}, ASSISTANT], "messages", "empty_prompt"),
        ([USER, {"role": "assistant", "content": "　"}], "messages", "empty_answer"),
        ([USER, {"role": "assistant", "content": None}], "messages", "null_text"),
        ([USER, {"role": "narrator", "content": "x"}], "messages", "unknown_role"),
        ({"messages": [USER, {"content": "x"}]}, "messages", "unknown_role"),
        ([USER, {**ASSISTANT, "tool_calls": [{"id": 1}]}], "messages", "tool_calls"),
        ([USER, {"from": "function_call", "value": "{}"}, ASSISTANT], "sharegpt", "tool_calls"),
        ([USER, {"from": "observation", "value": "{}"}, ASSISTANT], "sharegpt", "tool_calls"),
        ({"conversations": [USER, ASSISTANT], "tools": '[{"name": "f"}]'}, "sharegpt", "tool_calls"),
        ([USER, {**ASSISTANT, "loss_weight": 0.0}], "messages", "unweighted_turn"),
    ],
)
def test_an_unusable_row_is_rejected_under_its_reason(record: Any, format_: str, reason: str) -> None:
    assert rejected(record, format_).reason == reason


def test_no_declared_tools_is_no_tool_call() -> None:
    row = row_of({"conversations": [USER, ASSISTANT], "tools": "[]"})
    assert turns(row) == [("user", "你好"), ("assistant", "你好！")]


def test_a_rejected_row_says_where_and_shows_its_start() -> None:
    row = rejected([USER, {"role": "narrator", "content": "长" * 1000}], "messages")
    assert row.detail == "Turn 2 has the role 'narrator'; expected system, user (human) or assistant (gpt)."
    assert len(row.raw) == 200
    assert "narrator" in row.raw


def test_the_excerpt_of_a_broken_surrogate_can_be_written(tmp_path: Path) -> None:
    row = rejected({"instruction": "\ud83d", "output": "a"}, "alpaca")
    (tmp_path / "q.jsonl").write_text(json.dumps(row.raw, ensure_ascii=False), encoding="utf-8")
    assert "\\ud83d" in row.raw


def test_the_format_is_told_by_most_rows() -> None:
    pair, alpaca = {"question": "q", "answer": "a"}, {"instruction": "q", "output": "a"}
    assert detect_format([pair, alpaca, alpaca, {"x": 1}], "auto", "f") == "alpaca"


def test_an_unknown_format_lists_keys_and_the_known_formats() -> None:
    with pytest.raises(DataError) as error:
        detect_format([{"title": "t", "body": "b"}, {"title": "t", "score": 1}], "auto", "/d/a.jsonl")
    assert str(error.value) == (
        "/d/a.jsonl: the format cannot be told from the first 2 rows: found the keys title, body, score. Expected one "
        "of: alpaca (instruction, input, output), sharegpt (conversations of from and value), messages (messages of "
        "role and content, or a bare list of them), pairs (prompt and response, or question and answer). Rename the "
        "fields to one of these."
    )
    with pytest.raises(DataError, match="found rows that are a list of str"):
        detect_format([["hi", "hello"]], "auto", "f")


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"conversations": [{"from": "human", "value": "q"}], "chosen": {}, "rejected": {}},
        {"instruction": "q", "input": "", "output": ["a", "b"]},
        {"instruction": "q", "input": "", "output": ["a", "b", "c"]},
    ],
)
@pytest.mark.parametrize("named", ["auto", "alpaca"])
def test_preference_pairs_are_refused(record: dict[str, Any], named: str) -> None:
    with pytest.raises(DataError, match=r"preference pairs .* keep the chosen one"):
        detect_format([record], named, "f")


def test_a_named_format_must_be_there() -> None:
    alpaca = {"instruction": "q", "output": "a"}
    pair = {"prompt": "q", "response": "a"}
    assert detect_format([alpaca, pair, pair], "alpaca", "f") == "alpaca"
    assert detect_format([[USER, ASSISTANT]], "sharegpt", "f") == "sharegpt"
    with pytest.raises(DataError, match=r"format: sharegpt was named, but the first row look like alpaca"):
        detect_format([alpaca], "sharegpt", "f")
