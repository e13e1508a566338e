import contextlib
import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.core.config import SourceConfig
from tasks.core.errors import DataError
from tasks.data.formats import (
    KNOWN_FORMATS,
    READERS,
    BadRow,
    Message,
    Rejected,
    Row,
    conversation_digest,
    detect_format,
    fill_placeholders,
    to_format,
    to_row,
)

USER = {"role": "user", "content": "你好"}
ASSISTANT = {"role": "assistant", "content": "你好！"}
TOOL = {"name": "weather", "description": "天气", "parameters": {"type": "object", "properties": {"city": {}}}}


def source(**options: Any) -> SourceConfig:
    return SourceConfig(path="f", **options)


def row_of(record: Any, format_: str = "auto", **options: Any) -> Row:
    read = source(**options)
    row = to_row(record, detect_format([record], format_, "f", read), "f", 1, read)
    assert isinstance(row, Row), row
    return row


def rejected(record: Any, format_: str, **options: Any) -> Rejected:
    row = to_row(record, format_, "f.jsonl", 7, source(**options))
    assert isinstance(row, Rejected), row
    assert (row.source, row.line) == ("f.jsonl", 7)
    assert row.detail.endswith(".")
    return row


def turns(row: Row) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in row.messages]


def error_of(records: list[Any], named: str = "auto", **options: Any) -> str:
    with pytest.raises(DataError) as error:
        detect_format(records, named, "f.json", source(**options))
    return str(error.value)


# --- one answer to an instruction -------------------------------------------------------------------------------------


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


def test_a_conversation_that_belle_writes_into_the_instruction_becomes_turns() -> None:
    belle = {
        "instruction": "Human:你好\nAssistant:你好！\nHuman: 讲个\n\n笑话\nAssistant:\n",
        "input": "",
        "output": "好",
    }
    assert turns(row_of(belle)) == [
        ("user", "你好"),
        ("assistant", "你好！"),
        ("user", "讲个\n\n笑话"),
        ("assistant", "好"),
    ]
    for instruction in ("Human: who?", "Explain:\nHuman: who?\nAssistant:", "Human: name the Assistant:"):
        assert turns(row_of({**belle, "instruction": instruction}))[0] == ("user", instruction)


def test_a_seed_task_becomes_one_exchange_per_instance() -> None:
    instances = [{"input": "猫", "output": "cat"}, {"input": "", "output": "?"}]
    row = row_of({"id": "seed_task_0", "instruction": "Translate", "instances": instances})
    assert row.format == "seed_tasks"
    assert turns(row) == [
        ("user", "Translate\n猫"),
        ("assistant", "cat"),
        ("user", "Translate"),
        ("assistant", "?"),
    ]


def test_plain_text_is_one_turn_of_its_own_role() -> None:
    row = row_of({"text": " 一段文字。\n", "url": "x"})
    assert (row.format, turns(row)) == ("text", [("text", " 一段文字。\n")])
    assert rejected({"text": " "}, "text").reason == "empty_text"
    assert turns(row_of({"text": "whole prompt", "instruction": "q", "output": "a"}))[0] == ("user", "q")


# --- turns ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("user", ["human", "user", "Human", "prompter", "usr", "client"])
@pytest.mark.parametrize("assistant", ["gpt", "assistant", "chatgpt", "bard", "bing", "ASSISTANT", "sys", "counselor"])
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
        ({"dialogue": [{"role": "client", "content": "q"}, {"role": "counselor", "content": "a"}]}, "messages"),
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
        ({"messages": None, "chosen": None, "rejected": None, "instruction": "q", "output": "a"}, "alpaca"),
        ({"messages": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'}, "messages"),
        ({"messages": [{"message": "q"}, {"message": "a", "attrs": []}]}, "messages"),  # KdConv
        ({"conversation": [{"human": "q", "assistant": "a"}]}, "messages"),
        (["q", "a"], "lccc"),
        ({"dialog": ["q", "a"]}, "lccc"),
        ({"prompt": "q", "response": "a"}, "pairs"),
        ({"prompt": "q", "completion": "a"}, "pairs"),
        ({"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "gpt", "content": "a"}]}, "pairs"),
        ({"question": "q", "answer": "a"}, "pairs"),
        ({"question": "q", "std_answer": "a", "class": "qa"}, "pairs"),
        ({"kind": "qa", "input": "q", "target": "a"}, "pairs"),
        ({"instruction": "q", "instances": [{"input": "", "output": "a"}]}, "seed_tasks"),
    ],
)
def test_key_variants_mean_the_same_conversation(record: Any, format_: str) -> None:
    row = row_of(record)
    assert row.format == format_
    assert turns(row) == [("user", "q"), ("assistant", "a")]
    assert conversation_digest(row.messages) == conversation_digest(
        row_of({"instruction": "q", "output": "a"}).messages
    )


def test_content_parts_are_joined_and_other_media_refused() -> None:
    parts = [{"type": "text", "text": "你"}, {"type": "text", "value": "好"}]
    assert turns(row_of([{"role": "user", "content": parts}, ASSISTANT]))[0] == ("user", "你好")
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ASSISTANT]
    assert "'image_url'" in rejected(image, "messages").detail
    beside = rejected({"messages": [USER, ASSISTANT], "images": ["1.jpg"], "videos": []}, "messages")
    assert (beside.reason, beside.detail) == ("not_text", "The row has images; expected text alone.")


def test_the_system_turn_comes_from_its_column_its_turn_or_both_if_they_agree() -> None:
    system = {"role": "system", "content": "s"}
    for record in (
        {"system": "s", "conversations": [USER, ASSISTANT]},
        {"system": "s", "conversations": [system, USER, ASSISTANT]},
        [{"role": "developer", "content": "s"}, USER, ASSISTANT],
        {"system_prompt": "s", "question": "你好", "response": "你好！"},
    ):
        assert turns(row_of(record)) == [("system", "s"), ("user", "你好"), ("assistant", "你好！")]
    assert turns(row_of([{"role": "system", "content": " "}, USER, ASSISTANT]))[0] == ("user", "你好")
    assert rejected({"system": "t", "messages": [system, USER, ASSISTANT]}, "messages").reason == "roles_out_of_order"


def test_text_is_kept_as_it_stands() -> None:
    assert turns(row_of({"prompt": " q\n", "response": "\ta \u200b"})) == [
        ("user", " q\n"),
        ("assistant", "\ta \u200b"),
    ]


@pytest.mark.parametrize(
    ("utterance", "joined"),
    [
        ("我 饿 了 。", "我饿了。"),
        ("相 机 今 年 木 有 回 去 T . T", "相机今年木有回去T.T"),
        ("我 觉 得 2 1 万 也 好 多", "我觉得21万也好多"),
        ("X T 2 0", "XT20"),
        ("… …", "……"),
        ("我 说 hello world 你 好", "我说hello world你好"),
        ("an apple a day", "an apple a day"),
        ("今天 天气 不错", "今天 天气 不错"),
        ("好, I see", "好, I see"),
        ("哈", "哈"),
    ],
)
def test_lccc_characters_are_joined_and_latin_words_stay_apart(utterance: str, joined: str) -> None:
    assert turns(row_of([utterance, "a"]))[0] == ("user", joined)


def test_unanswered_last_questions_are_cut_and_said() -> None:
    row = row_of([USER, ASSISTANT, USER, USER])
    assert turns(row) == [("user", "你好"), ("assistant", "你好！")]
    assert row.repaired == ("trailing_user_turn",)
    assert row_of([USER, ASSISTANT]).repaired == ()
    assert row_of(["q", "a", "q"]).repaired == ("trailing_user_turn",)


@pytest.mark.parametrize(("max_turns", "kept"), [(2, 2), (3, 2), (4, 4), (5, 4), (6, 6)])
def test_max_turns_keeps_the_first_and_ends_with_an_answer(max_turns: int, kept: int) -> None:
    row = row_of([{"role": "system", "content": "s"}, *[USER, ASSISTANT] * 3], max_turns=max_turns)
    assert [role for role, _ in turns(row)] == ["system", *["user", "assistant"] * (kept // 2)]
    assert row.repaired == (("max_turns",) if kept < 6 else ())


# --- tools ------------------------------------------------------------------------------------------------------------


def test_sharegpt_tools_become_text_that_any_template_carries() -> None:
    call = {"name": "weather", "arguments": {"city": "北京"}}
    row = row_of(
        {
            "conversations": [
                {"from": "human", "value": "天气？"},
                {"from": "function_call", "value": json.dumps(call)},
                {"from": "observation", "value": '{"sky": "晴"}'},
                {"from": "gpt", "value": "晴。"},
            ],
            "tools": json.dumps([TOOL]),
        }
    )
    system, *rest = turns(row)
    schema = json.dumps({"type": "function", "function": TOOL}, ensure_ascii=False)
    assert system[0] == "system" and f"<tools>\n{schema}\n</tools>" in system[1]
    assert rest == [
        ("user", "天气？"),
        ("assistant", '<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>'),
        ("user", '<tool_response>\n{"sky": "晴"}\n</tool_response>'),
        ("assistant", "晴。"),
    ]
    assert row.repaired == ()


def test_openai_tool_calls_and_their_results_are_joined() -> None:
    calls = [{"type": "function", "function": {"name": name, "arguments": '{"x": 1}'}} for name in "fg"]
    row = row_of(
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                USER,
                {"role": "assistant", "content": "One moment.", "tool_calls": calls},
                {"role": "tool", "content": "1", "tool_call_id": "f"},
                {"role": "tool", "content": [{"type": "text", "text": "2"}], "tool_call_id": "g"},
                ASSISTANT,
            ],
            "tools": [{"type": "function", "function": TOOL}],
        }
    )
    assert [role for role, _ in turns(row)] == ["system", "user", "assistant", "user", "assistant"]
    system, _, call, result, _ = (text for _, text in turns(row))
    assert system.startswith("Be brief.\n\nYou can call the functions below") and system.count('"weather"') == 1
    assert call == (
        'One moment.\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>\n'
        '<tool_call>\n{"name": "g", "arguments": {"x": 1}}\n</tool_call>'
    )
    assert result == "<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>"


def test_text_that_is_in_the_hermes_convention_already_stays() -> None:
    texts = ["<tools>[]</tools>", "q", "<tool_call>{}</tool_call>", "<tool_response>1</tool_response>", "a"]
    roles = ["system", "human", "gpt", "tool", "gpt"]
    turn_list = [{"from": role, "value": text} for role, text in zip(roles, texts, strict=True)]
    assert [text for _, text in turns(row_of({"conversations": turn_list, "tools": json.dumps([TOOL])}))] == texts


def test_no_declared_tools_is_no_tool_call() -> None:
    row = row_of({"conversations": [USER, ASSISTANT], "tools": "[]"})
    assert turns(row) == [("user", "你好"), ("assistant", "你好！")]


# --- columns and tags -------------------------------------------------------------------------------------------------


def test_a_column_map_names_what_is_read_and_nothing_else_is() -> None:
    record = {"q": "问", "more": "句", "a": "答", "sys": "s", "output": "x", "system": "x", "A": 1, "choices": []}
    columns = {"prompt": "q", "query": "more", "response": "a"}
    assert turns(row_of(record, columns=columns)) == [("user", "问\n句"), ("assistant", "答")]
    assert turns(row_of(record, "pairs", columns={**columns, "system": "sys"}))[0] == ("system", "s")
    assert turns(row_of(record, columns={"text": "q"})) == [("text", "问")]
    assert turns(row_of(record, columns={"prompt": "q"})) == [("text", "问")]  # LLaMA-Factory's pre-training
    assert rejected({"q": None, "a": "答"}, "alpaca", columns=columns).detail == "q is null; expected text."
    assert rejected({"output": "x"}, "alpaca", columns=columns).reason == "wrong_format"


def test_columns_and_tags_of_dataset_info_find_turns() -> None:
    record = {
        "chat": [
            {"who": "S", "says": "s"},
            {"who": "Kunde", "says": "q"},
            {"who": "Ruf", "says": '{"name": "f", "arguments": {}}'},
            {"who": "Ergebnis", "says": "1"},
            {"who": "Bank", "says": "a"},
        ],
        "functions_json": json.dumps(TOOL),
    }
    tags = {
        "role_tag": "who",
        "content_tag": "says",
        "user_tag": "Kunde",
        "assistant_tag": "Bank",
        "system_tag": "S",
        "function_tag": "Ruf",
        "observation_tag": "Ergebnis",
    }
    row = row_of(record, columns={"messages": "chat", "tools": "functions_json"}, tags=tags)
    assert [role for role, _ in turns(row)] == ["system", "user", "assistant", "user", "assistant"]
    assert "<tools>" in turns(row)[0][1]
    assert (
        "a name that data.sources tags gives" in rejected(record["chat"], "messages", tags={"role_tag": "who"}).detail
    )


def test_a_map_of_absent_columns_lists_those_present_and_suggests_a_near_one() -> None:
    assert error_of([{"Question": "q", "Answer": "a"}], columns={"prompt": "question", "response": "Answer"}) == (
        "f.json: data.sources columns names question, absent from the first row: found the keys Question, Answer. Did "
        "you mean Question? Correct columns, or leave it out."
    )
    assert "names response alone. Expected also messages" in error_of([{"Answer": "a"}], columns={"response": "Answer"})


# --- preference pairs and multiple choice -----------------------------------------------------------------------------

SAID = {"role": "assistant", "content": "a"}
ASKED = {"role": "user", "content": "q"}
PREFERENCES = [
    {"prompt": "q", "chosen": "a", "rejected": "b"},
    {"system": "", "question": "q", "chosen": "a", "rejected": "b"},
    {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"},
    {"instruction": "q", "input": "", "output": ["a", "b"]},
    {"instruction": "q", "input": "", "output": ["a", "b", "c"], "history": []},
    {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"}, "rejected": {}},
    {"messages": [ASKED], "chosen": "a", "rejected": "b"},
    {"prompt": [ASKED], "chosen": [SAID], "rejected": [SAID]},
    {"prompt": [ASKED], "chosen": [ASKED, SAID], "rejected": [ASKED, SAID]},
    {"prompt": "q", "chosen": [ASKED, SAID], "rejected": [ASKED, SAID]},
    {"prompt": "q", "chosen": [SAID], "rejected": [SAID]},
    {"chosen": [ASKED, SAID], "rejected": [ASKED, SAID]},
    {"chosen": json.dumps([ASKED, SAID]), "rejected": "[]"},
    {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
]


@pytest.mark.parametrize("record", PREFERENCES)
@pytest.mark.parametrize("named", ["auto", "alpaca"])
def test_preference_pairs_are_refused(record: dict[str, Any], named: str) -> None:
    assert "these are preference pairs (a chosen and a rejected answer)" in error_of([record], named)
    assert "keep the chosen one" in error_of([record], named)
    assert rejected(record, "alpaca").reason == "preference_pair"


@pytest.mark.parametrize("record", PREFERENCES)
def test_the_chosen_answer_is_taken_when_asked_for(record: dict[str, Any]) -> None:
    row = row_of(record, preference="chosen")
    assert turns(row) == [("user", "q"), ("assistant", "a")]


def test_a_chosen_answer_keeps_what_stands_before_it() -> None:
    system = {"role": "system", "content": "s"}
    record = {"prompt": [system, ASKED], "chosen": [ASKED, SAID], "rejected": [ASKED, SAID]}
    assert turns(row_of(record, preference="chosen"))[0] == ("system", "s")
    record = {"instruction": "q", "input": "c", "chosen": [SAID], "rejected": [SAID]}
    assert turns(row_of(record, preference="chosen"))[0] == ("user", "q\nc")
    mapped = {"question": "q", "chosen": "a", "rejected": "b", "text": "x"}
    assert turns(row_of(mapped, preference="chosen", columns={"prompt": "question"})) == [
        ("user", "q"),
        ("assistant", "a"),
    ]
    no_question = rejected({"chosen": "a", "rejected": "b"}, "alpaca", preference="chosen")
    assert no_question.reason == "preference_pair"
    assert no_question.detail.startswith("The row has no question to its chosen answer")


@pytest.mark.parametrize(
    "record",
    [
        {"question": "q", "A": "1", "B": "2", "C": "3", "D": "4", "answer": "A"},
        {"query": "q", "choices": ["1", "2"], "gold": 0},
        {"goal": "g", "sol1": "1", "sol2": "2"},
        {"context": "c", "continuation": "d"},
        {"What is 1 + 1?": "What is 2 + 2?", "1": "3", "2": "4", "3": "5", "4": "6", "B": "C"},  # MMLU, without names
    ],
)
def test_evaluation_items_are_refused_unless_their_columns_are_named(record: dict[str, Any]) -> None:
    assert "these are evaluation items (options to choose from, or endings to predict)" in error_of([record])
    prompt, *_, answer = record
    assert detect_format([record], "auto", "f", source(columns={"prompt": prompt, "response": answer})) == "alpaca"


# --- rows and files that are refused ----------------------------------------------------------------------------------


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
        ({"instruction": "q", "output": "a", "image": "1.jpg"}, "alpaca", "not_text"),
        ({"instruction": "q", "instances": []}, "seed_tasks", "bad_instances"),
        ({"instruction": "q", "instances": ["a"]}, "seed_tasks", "bad_instances"),
        ({"instruction": "q", "instances": [{"input": "i"}]}, "seed_tasks", "null_text"),
        ({"prompt": "q", "response": "a"}, "alpaca", "wrong_format"),
        ("text", "alpaca", "wrong_format"),
        (None, "messages", "wrong_format"),
        ([], "messages", "wrong_format"),
        (["q", "a"], "messages", "wrong_format"),
        ([[USER, ASSISTANT]], "messages", "wrong_format"),
        ({"dialogue": "Ann: hi. Bob: hello.", "summary": "They greet."}, "messages", "wrong_format"),
        (["q"], "lccc", "too_few_turns"),
        (["q", None], "lccc", "null_text"),
        (["q", 1], "lccc", "not_text"),
        (["q", " "], "lccc", "empty_answer"),
        ({"text": None}, "text", "null_text"),
        ({"text": 1}, "text", "not_text"),
        ({"messages": []}, "messages", "no_assistant_turn"),
        ({"messages": None}, "messages", "no_assistant_turn"),
        ({"messages": {"role": "user"}}, "messages", "bad_turn"),
        ({"messages": [USER, "hello"]}, "messages", "bad_turn"),
        ({"messages": [{"message": "q"}, "a"]}, "messages", "bad_turn"),
        ({"messages": [{"human": "q", "assistant": None}]}, "messages", "null_text"),
        ([USER], "messages", "no_assistant_turn"),
        ([{"role": "system", "content": "s"}], "messages", "no_assistant_turn"),
        ([ASSISTANT, USER, ASSISTANT], "messages", "roles_out_of_order"),
        ([USER, ASSISTANT, ASSISTANT], "messages", "roles_out_of_order"),
        ([USER, USER, ASSISTANT], "messages", "roles_out_of_order"),
        ([USER, {"role": "system", "content": "s"}, ASSISTANT], "messages", "roles_out_of_order"),
        ([{"role": "user", "content": ""}, ASSISTANT], "messages", "empty_prompt"),
        ([USER, {"role": "assistant", "content": "　"}], "messages", "empty_answer"),
        ([USER, {"role": "assistant", "content": None}], "messages", "null_text"),
        ([USER, {"role": "assistant", "content": {"a": 1}}], "messages", "not_text"),
        ([USER, {"role": "narrator", "content": "x"}], "messages", "unknown_role"),
        ([USER, {"role": ["user"], "content": "x"}], "messages", "unknown_role"),
        ({"messages": [USER, {"content": "x"}]}, "messages", "unknown_role"),
        ([USER, {**ASSISTANT, "loss_weight": 0.0}], "messages", "unweighted_turn"),
        ([USER, {**ASSISTANT, "train": False}], "messages", "unweighted_turn"),
        ([USER, {**ASSISTANT, "tool_calls": [{"id": 1}]}], "messages", "bad_tool_call"),
        ([USER, {"from": "function_call", "value": "weather('x')"}], "sharegpt", "bad_tool_call"),
        ([USER, {"from": "function_call", "value": '{"name": "f", "arguments": [1]}'}], "sharegpt", "bad_tool_call"),
        ([USER, {"from": "function_call", "value": '{"name": "\\ud83d"}'}], "sharegpt", "invalid_unicode"),
        ([USER, {"from": "observation", "value": "{}"}, ASSISTANT], "sharegpt", "roles_out_of_order"),
        ({"conversations": [USER, ASSISTANT], "tools": "hammer"}, "sharegpt", "bad_tools"),
        ({"conversations": [USER, ASSISTANT], "tools": [{"type": "function"}]}, "sharegpt", "bad_tools"),
    ],
)
def test_an_unusable_row_is_rejected_under_its_reason(record: Any, format_: str, reason: str) -> None:
    assert rejected(record, format_).reason == reason


def test_a_rejected_row_says_where_and_shows_its_start() -> None:
    row = rejected([USER, {"role": "narrator", "content": "长" * 1000}], "messages")
    assert row.detail == (
        "Turn 2 has the role 'narrator'; expected system, user (human) or assistant (gpt), or a name that data.sources "
        "tags gives."
    )
    assert len(row.raw) == 200
    assert "narrator" in row.raw


def test_a_row_that_could_not_be_parsed_is_rejected_as_it_was_found() -> None:
    row = rejected(BadRow("invalid_json", "Not valid JSON at column 1: Expecting value.", "{oops"), "alpaca")
    assert (row.reason, row.raw) == ("invalid_json", "{oops")


def test_the_excerpt_of_a_broken_surrogate_can_be_written(tmp_path: Path) -> None:
    row = rejected({"instruction": "\ud83d", "output": "a"}, "alpaca")
    (tmp_path / "q.jsonl").write_text(json.dumps(row.raw, ensure_ascii=False), encoding="utf-8")
    assert "\\ud83d" in row.raw


def test_a_row_nested_too_deeply_to_be_written_is_still_rejected() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    assert rejected({"instruction": deep, "output": "a"}, "alpaca").raw == "<dict>"


def test_the_format_is_told_by_most_rows() -> None:
    pair, alpaca = {"question": "q", "answer": "a"}, {"instruction": "q", "output": "a"}
    assert detect_format([pair, alpaca, alpaca, {"x": 1}], "auto", "f", source()) == "alpaca"


def test_an_unknown_format_lists_keys_and_the_known_formats() -> None:
    assert error_of([{"title": "t", "body": "b"}, {"title": "t", "score": 1}]) == (
        "f.json: the format cannot be told from the first 2 rows: found the keys title, body, score. Expected one "
        f"of: {KNOWN_FORMATS}. Rename the fields to these, or name them in data.sources columns."
    )
    assert "found rows that are a list that holds a number" in error_of([[1, 2]])


def test_a_named_format_must_be_there() -> None:
    alpaca = {"instruction": "q", "output": "a"}
    pair = {"prompt": "q", "response": "a"}
    assert detect_format([alpaca, pair, pair], "alpaca", "f", source()) == "alpaca"
    assert detect_format([[USER, ASSISTANT], alpaca], "sharegpt", "f", source()) == "sharegpt"
    assert "format: sharegpt was named, but by the first row it is alpaca" in error_of([alpaca], "sharegpt")


# --- placeholders and the way back ------------------------------------------------------------------------------------


def test_placeholders_are_filled_and_unknown_ones_stay() -> None:
    messages = [
        {"role": "user", "content": "{{name}}?"},
        {"role": "assistant", "content": "I am {{ name }} by {{author}}."},
    ]
    filled, changed = fill_placeholders(messages, {"name": "{{author}}", "other": "x"})
    assert changed
    assert [message["content"] for message in filled] == ["{{author}}?", "I am {{author}} by {{author}}."]
    assert fill_placeholders(messages, {"none": "x"}) == (messages, False)
    assert fill_placeholders(messages, {}) == (messages, False)


TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(lambda text: not text.isspace())


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    texts = draw(st.lists(TEXT | st.sampled_from(["Human: q\nAssistant:", "[]", "null"]), min_size=2, max_size=8))
    system = [{"role": "system", "content": draw(TEXT)}] if draw(st.booleans()) else []
    roles = ["user", "assistant"] * (len(texts) // 2)
    return [*system, *({"role": role, "content": text} for role, text in zip(roles, texts, strict=False))]


@settings(max_examples=150, deadline=None)
@given(messages=conversations(), format_=st.sampled_from(["messages", "alpaca", "sharegpt"]))
def test_a_converted_conversation_is_read_as_the_same_messages(messages: list[Message], format_: Any) -> None:
    row = row_of(json.loads(json.dumps(to_format(messages, format_))))
    assert (row.messages, row.repaired) == (messages, ())


def test_converted_plain_text_stays_plain_text() -> None:
    messages = [{"role": "text", "content": "x"}]
    assert row_of(to_format(messages, "alpaca")).messages == messages


KEYS = st.sampled_from(
    [
        *("instruction", "input", "output", "system", "history", "messages", "conversations", "dialog", "role", "from"),
        *("content", "value", "tools", "text", "tool_calls", "function_call", "name", "arguments", "function", "human"),
        *(
            "chosen",
            "rejected",
            "instances",
            "prompt",
            "response",
            "choices",
            "message",
            "assistant",
            "weight",
            "images",
        ),
    ]
)
ROLE_NAMES = ["user", "assistant", "system", "tool", "function_call", "gpt", "[]", "{}", "Human:", "\ud800", ""]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(ROLE_NAMES) | st.text(max_size=3)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=5), max_leaves=12
)
SOURCES = [
    source(),
    source(preference="chosen", max_turns=2),
    source(preference="chosen", columns={"prompt": "prompt"}),
    source(columns={"messages": "messages", "system": "system", "tools": "tools"}, tags={"role_tag": "name"}),
    source(columns={"query": "input", "response": "output", "history": "history"}),
    source(columns={"response": "output"}),
]


WHOLE: list[Any] = [
    *PREFERENCES,
    {"instruction": "q", "input": "c", "output": "a", "system": "s", "history": [["q", "a"]]},
    {"instruction": "Human:q\nAssistant:", "output": "a"},
    {"messages": [ASKED, {**SAID, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}], "tools": [TOOL]},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": '{"name": "f"}'}]},
    {"conversations": [ASKED, SAID, {"from": "observation", "value": "1"}, SAID], "tools": "[]", "system": "s"},
    {"messages": [{"message": "q"}, {"message": "a"}]},
    {"conversation": [{"human": "q", "assistant": "a"}]},
    {"prompt": [ASKED], "completion": [SAID]},
    {"instruction": "q", "instances": [{"input": "i", "output": "o"}]},
    [ASKED, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}],
    ["我 饿", "o k"],
    {"text": "x"},
]


@st.composite
def damaged_rows(draw: st.DrawFn) -> Any:
    """Return a good row with any JSON value in some place of it, or in place of it."""
    row = copy.deepcopy(draw(st.sampled_from(WHOLE)))
    parent, key = [row], 0
    while isinstance(node := parent[key], dict | list) and node and draw(st.integers(0, 3)):
        parent, key = node, draw(st.sampled_from(list(node) if isinstance(node, dict) else range(len(node))))
    parent[key] = draw(JSON)
    return row


@settings(max_examples=400, deadline=None)
@given(record=damaged_rows() | JSON, read=st.sampled_from(SOURCES), format_=st.sampled_from([*READERS, "text"]))
def test_no_json_value_makes_reading_fail(record: Any, read: SourceConfig, format_: str) -> None:
    for named in (format_, "auto"):
        with contextlib.suppress(DataError):
            format_ = detect_format([record], named, "f", read)
    row = to_row(record, format_, "f", 1, read)
    if isinstance(row, Row):
        roles = [message["role"] for message in row.messages if message["role"] != "system"]
        assert roles == ["text"] or (roles and roles == ["user", "assistant"] * (len(roles) // 2))
        assert [message["role"] for message in row.messages].count("system") == len(row.messages) - len(roles) <= 1
        json.dumps(row.messages, ensure_ascii=False).encode()
