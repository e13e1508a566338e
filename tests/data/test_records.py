import csv
import json
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks.core.errors import DataError
from tasks.data import files, records
from tasks.data.files import data_files
from tasks.data.formats import BadRow
from tasks.data.records import JsonText, parse_record, read_records

ROWS = [
    {"instruction": "你好？", "input": "", "output": "你好！"},
    {"instruction": "Translate", "input": "猫", "output": "cat"},
    {"instruction": "q\u2028r", "input": "", "output": 'He said "hi",\r\nthen left;\tfor good'},
]
Write = Callable[[str, str | bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write_file


def raw(path: Path, split: str = "train") -> list[tuple[int, Any]]:
    return [record for file in data_files(path, path.name, path.name) for record in read_records(file, split)]


def read(path: Path, split: str = "train") -> list[tuple[int, Any]]:
    return [(line, parse_record(value)) for line, value in raw(path, split)]


def values(path: Path, split: str = "train") -> list[Any]:
    return [v.reason if isinstance(v, BadRow) else v for _, v in read(path, split)]


def message_of(path: Path, split: str = "train") -> str:
    with pytest.raises(DataError) as error:
        raw(path, split)
    return str(error.value)


def bad_of(path: Path) -> list[tuple[int, str, str]]:
    return [(line, v.reason, v.detail) for line, v in read(path) if isinstance(v, BadRow)]


# --- JSON -------------------------------------------------------------------------------------------------------------


def test_json_lines_and_arrays_under_any_name(write: Write) -> None:
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    array = json.dumps(ROWS, ensure_ascii=False)
    for name, text in {
        "lines.jsonl": lines,
        "lines.ndjson": lines,
        "lines.json": lines + "\n\n",
        "array.json": array,
        "array.jsonl": array,
        "indented.json": json.dumps(ROWS, indent=4),
        "windows.jsonl": lines.replace("\n", "\r\n"),
        "spaced.json": "\n\n  [\n" + ",\n".join(json.dumps(row) for row in ROWS) + "\n]\n",
    }.items():
        assert read(write(name, text)) == [*enumerate(ROWS, 1)], name


def test_rows_that_are_lists_one_per_line_or_in_one_array(write: Write) -> None:
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": "a"}] for q in "abc"]
    for rows in (turns, [["遭 淋 安 逸 了 ？", "晚 班"], ["生 快", "恩 恩"], ["一"]]):
        for name, text in {
            "lines.jsonl": "\n".join(map(json.dumps, rows)),
            "broken_first.jsonl": "\n".join(["[{]", *map(json.dumps, rows)]),
            "array.json": json.dumps(rows),
            "indented.json": json.dumps(rows, indent=1),
            "row_per_line.json": "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]",
            "rows_and_brackets.json": "[" + ",\n".join(map(json.dumps, rows)) + "]",
        }.items():
            expected = ["invalid_json", *rows] if name == "broken_first.jsonl" else rows
            assert values(write(name, text)) == expected, name
    assert values(write("one_line.jsonl", json.dumps(turns[0]))) == turns[:1]


def test_lines_are_passed_on_unparsed_and_can_be_sent_to_another_process(write: Write) -> None:
    found = raw(write("a.jsonl", '\n{"a": 1}\n  \n {"b": [NaN, null, 1.5]} \n{bad\n'))
    assert [(line, type(value), str(value)) for line, value in found] == [
        (2, JsonText, '{"a": 1}'),
        (4, JsonText, '{"b": [NaN, null, 1.5]}'),
        (5, JsonText, "{bad"),
    ]
    assert pickle.loads(pickle.dumps(found)) == found
    assert isinstance(pickle.loads(pickle.dumps(found[0][1])), JsonText)
    assert parse_record(found[0][1]) == {"a": 1}
    assert parse_record("text") == "text"
    parsed = parse_record(found[1][1])["b"]
    assert parsed[0] != parsed[0] and parsed[1:] == [None, 1.5]


def test_a_bad_line_says_its_column(write: Write) -> None:
    deep = '{"instruction":' + "[" * 200_000
    number = '{"n": ' + "1" * 5000 + "}"
    path = write("a.jsonl", "\n".join(["{'instruction': 1}", "{}", '{"instruction": "q', deep, "17", number]))
    too_deep = "The JSON is nested too deeply, or has a number too long to read."
    assert bad_of(path) == [
        (1, "invalid_json", "Not valid JSON at column 2: Expecting property name enclosed in double quotes."),
        (3, "invalid_json", "Not valid JSON at column 17: Unterminated string starting at."),
        (4, "invalid_json", too_deep),
        (6, "invalid_json", too_deep),
    ]
    assert read(path)[4] == (5, 17)


@pytest.mark.parametrize("layout", ["{}", "[{},\n {}]"])
def test_a_file_of_one_row_may_be_indented(write: Write, layout: str) -> None:
    row = json.dumps(ROWS[0], indent=2)
    assert values(write("a.json", layout.replace("{}", row))) == [ROWS[0]] * layout.count("{}")


def test_lists_by_split_and_under_a_name_like_data(write: Write) -> None:
    splits = {"valid": [["a", "b"], ["c", "d"]], "train": [["e", "f"]], "version": 2}
    for indent in (None, 1):
        path = write("splits.json", json.dumps(splits, indent=indent))
        assert read(path, "valid") == [(1, ["a", "b"]), (2, ["c", "d"])]
        assert read(path) == [(1, ["e", "f"])]
        assert message_of(path, "test") == (
            "splits.json: there is no split test; the file holds valid, train. Name one of these as data.sources split."
        )
    assert values(write("named.json", json.dumps({"about": "x", "train_sft": ROWS})), "train_sft") == ROWS
    for name in ("data", "rows", "examples"):
        assert values(write("a.json", json.dumps({"dataset": {"x": []}, name: ROWS}))) == ROWS
    assert values(write("empty.json", '{"data": []}')) == []
    assert message_of(write("two.json", json.dumps({"data": ROWS, "train": ROWS}))) == (
        "two.json: rows are under both data and train. Rename or remove one of them."
    )
    # A line of rows is one row, whatever its keys, and so is an object whose list is not of rows.
    assert len(values(write("lines.jsonl", '{"data": [["q"]]}\n{"data": [["r"]]}\n'))) == 2
    assert values(write("words.json", '{"train": ["a", "b"]}')) == [{"train": ["a", "b"]}]


def test_large_arrays_and_splits_are_read_across_their_windows(write: Write) -> None:
    rows: list[Any] = [{"prompt": f"q{i}", "response": "长" * 3000} for i in range(1000)]  # three windows
    rows[700]["response"] = "x" * 2_500_000  # and one value that is longer than a window
    rows += [12.5e300, -1, True, "text", [], {}] * 20
    assert values(write("a.json", json.dumps(rows, ensure_ascii=False))) == rows
    assert values(write("a.json", json.dumps({"train": rows}, ensure_ascii=False))) == rows


@pytest.mark.parametrize("size", range(1, 40))
def test_an_array_may_be_cut_anywhere_between_windows(write: Write, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(records, "PIECE", size)
    text = '[-1.5e-3, true , "\\ud83d\\ude00\\n", {"a": [null,"x"]},\n-Infinity, 1234567890 ]\n'
    path = write("a.json", text)
    assert values(path) == json.loads(text)
    path = write("b.json", text[:-2] + ', "\\x"]')
    assert message_of(path).startswith("b.json:2:26: expected an array of rows")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.json",
            '[\n {"instruction": "q", "output": "a"},\n {"instruction": "q" "output": "a"}\n]',
            "a.json:3:22: expected an array of rows, or one row per line, found invalid JSON: Expecting ',' delimiter. "
            "Mend the file, or write it anew if it was cut off.",
        ),
        ("a.json", '[{"instruction": "q", "output": "a"}, {"instr', "a.json:1:40: expected an array of rows"),
        ("a.json", '[{"instruction": "q"}', "a.json:1:22: expected an array of rows, or one row per line"),
        ("a.json", '[{"instruction": "q"}', "found invalid JSON: it is never closed."),
        ("a.json", '[{"instruction": "q"} {', "a.json:1:23: expected an array of rows, or one row per line"),
        ("a.json", '[{"instruction": "q"},]', "found invalid JSON: Expecting value."),
        ("a.json", '[{"instruction": "q"}] x', "a.json:1:24: expected an array of rows"),
        ("a.json", '[{"n": ' + "1" * 5000 + "}]", "a.json:1:2: expected an array of rows"),
        ("a.json", "[" * 200_000, "nested too deeply, or a number too long to read."),
        ("a.json", '{\n "instruction": "q",\n "output" "a"\n}', "a.json:3:11: expected an array of rows"),
        ("a.json", '{"train": [{}], 5: 1}', "a.json:1:17: expected an array of rows"),
        ("a.json", '{"train": [{}], "a" 1}', "Expecting ':' delimiter"),
        ("a.json", '{"train": [{}]', "found invalid JSON: it is never closed."),
        ("a.json", "hello\nworld\n", "a.json:1:1: expected an array of rows"),
    ],
)
def test_invalid_json_is_located(write: Write, name: str, content: str, message: str) -> None:
    assert message in message_of(write(name, content))


def test_an_error_late_in_a_large_array_is_located(write: Write) -> None:
    rows = [json.dumps({"prompt": f"q{i}", "response": "x" * 3000}) for i in range(1000)]
    rows[900] = '{"prompt": q900}'
    assert message_of(write("a.json", "[" + ",\n".join(rows) + "]")).startswith("a.json:901:12: ")
    column = sum(len(row) + 2 for row in rows[:900]) + 1 + 12
    assert message_of(write("a.json", "[" + ", ".join(rows) + "]")).startswith(f"a.json:1:{column}: ")


# --- what is too long -------------------------------------------------------------------------------------------------


def test_a_line_of_over_100_mb_is_one_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"a": 1}\n{"a": "')
        for _ in range(101):
            file.write(b"x" * 1_000_000)
        file.write(b'"}\n{"a": 3}\n')
    found = read(path)
    assert [line for line, _ in found] == [1, 2, 3]
    assert found[2] == (3, {"a": 3})
    bad = found[1][1]
    assert isinstance(bad, BadRow)
    assert (bad.reason, bad.detail) == ("line_too_long", "The line has more than 100,000,000 characters.")
    assert bad.raw == '{"a": "' + "x" * 193


@pytest.fixture
def short_records(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (files, records):
        monkeypatch.setattr(module, "MAX_RECORD_CHARS", 100)


@pytest.mark.usefixtures("short_records")
def test_other_records_that_are_too_long(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "PIECE", 64)
    limit = "more than 100 characters"
    assert bad_of(write("last.jsonl", "{}\n" + "x" * 101)) == [(2, "line_too_long", f"The line has {limit}.")]
    assert bad_of(write("just.jsonl", json.dumps("x" * 98) + "\n{}")) == []
    for text in ('[{}, {"a": "%s"}]', '[{}, "%s'):
        assert message_of(write("a.json", text % ("x" * 500))).startswith(
            f"a.json:1:6: expected an array of rows, or one row per line, found invalid JSON: a row of {limit} begins "
            "here, or a quote is never closed. "
        )
    assert message_of(write("a.csv", "a,b\n1,2\n" + "x" * 101)) == (
        "a.csv:3: The line has more than 100 characters. Check that it is a table, or write the file anew."
    )
    assert message_of(write("a.csv", 'a,b\n1,2\n"' + "xxxxxxxxx\n" * 20)) == (
        f"a.csv:3: a quoted cell that begins in this row is never closed, or has {limit}. Double the quotes inside "
        "cells, or write the file anew."
    )
    text = "one\n\n" + "x" * 200 + "\nstill it\n\ntwo\n\n" + "yyyyyyyyy\n" * 11 + "\nthree\n"
    path = write("a.txt", text)
    assert values(path) == [{"text": "one"}, "line_too_long", {"text": "two"}, "line_too_long", {"text": "three"}]
    assert bad_of(path) == [
        (3, "line_too_long", f"The line has {limit}."),
        (8, "line_too_long", f"The paragraph has {limit}."),
    ]


def test_a_syntax_error_early_in_a_large_array_is_found_in_its_first_window(write: Write) -> None:
    path = write("a.json", '[{"a": x}, ' + '{"a": 1}, ' * 1_000_000)
    with path.open(encoding="utf-8") as text:
        window = records._Window(text, "a.json")
        with pytest.raises(DataError, match=r"a\.json:1:8: .*: Expecting value"):
            list(window.items())
        assert len(window.text) == records.PIECE


# --- text -------------------------------------------------------------------------------------------------------------


def test_a_text_is_its_paragraphs(write: Write) -> None:
    text = "\ufeff\n \nOne\n goes on\r\n\n\n\nTwo\u2028still\n \t\nThree"
    assert read(write("a.txt", text)) == [
        (3, {"text": "One\n goes on"}),
        (8, {"text": "Two\u2028still"}),
        (10, {"text": "Three"}),
    ]
    assert values(write("wrapped.txt", "short line\n" * 3)) == [{"text": "short line\nshort line\nshort line"}]
    assert values(write("empty.txt", " \n\n")) == []


def test_long_lines_without_blank_ones_are_paragraphs(write: Write) -> None:
    assert read(write("a.txt", "a" * 300 + "\n" + "b" * 300 + "\n")) == [
        (1, {"text": "a" * 300}),
        (2, {"text": "b" * 300}),
    ]
    assert len(values(write("b.txt", "a" * 300 + "\n" + "b" * 300 + "\n\nc"))) == 2


# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "separator"), [("a.csv", ","), ("b.csv", ";"), ("c.csv", "\t"), ("d.tsv", "\t")])
def test_tables(tmp_path: Path, name: str, separator: str) -> None:
    last = {"instruction": "last", "input": "NaN", "output": "x" * 200_000}
    with (tmp_path / name).open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, ["instruction", "input", "output"], delimiter=separator)
        table.writeheader()
        table.writerows([*ROWS, last])
    found = read(tmp_path / name)
    assert [value for _, value in found] == [*ROWS, {**last, "input": None}]
    assert [line for line, _ in found] == [2, 3, 4, 6]  # the third row has a line break inside


def test_a_table_row_that_does_not_fit_is_bad_and_the_next_one_read(write: Write) -> None:
    path = write("a.csv", 'prompt,response\nq1,a1\nq2\nq3,a3,more\n\n"q4"x,a4\nq5,nan\nq6,a6\n')
    expected = "expected 2: prompt, response."
    assert bad_of(path) == [
        (3, "wrong_column_count", f"Found 1 cells; {expected}"),
        (4, "wrong_column_count", f"Found 3 cells; {expected}"),
        (6, "invalid_csv", "Not a valid row: ',' expected after '\"'."),
    ]
    assert [(line, v) for line, v in read(path) if isinstance(v, dict)] == [
        (2, {"prompt": "q1", "response": "a1"}),
        (7, {"prompt": "q5", "response": None}),
        (8, {"prompt": "q6", "response": "a6"}),
    ]
    assert message_of(write("b.csv", "prompt,prompt\nq,a\n")) == (
        "b.csv:1: column names must differ, found prompt, prompt. Rename one."
    )
    assert message_of(write("c.csv", 'prompt,response\nq,a\n"q,a\n')).startswith(
        "c.csv:3: a quoted cell that begins in this row is never closed, or has more than 100,000,000 characters."
    )
    assert values(write("empty.csv", "")) == []


@pytest.fixture
def workbook(tmp_path: Path) -> Callable[[list[list[Any]]], Path]:
    def save(cells: list[list[Any]]) -> Path:
        import openpyxl

        book = openpyxl.Workbook()
        for row in cells:
            book.worksheets[0].append(row)
        book.create_sheet("other").append(["not", "read"])
        book.save(tmp_path / "a.xlsx")
        return tmp_path / "a.xlsx"

    return save


def test_the_first_sheet_of_a_workbook_is_a_table(workbook: Callable[[list[list[Any]]], Path]) -> None:
    path = workbook(
        [
            [],
            ["prompt", " response ", 3],
            ["你好", "你好！", None],
            [],
            ["q", 42, 0.5],
            ["q", None, "NaN"],
            ["q", 1, 2, 3],
        ]
    )
    found = read(path)
    assert found[:3] == [
        (3, {"prompt": "你好", "response": "你好！", "3": None}),
        (5, {"prompt": "q", "response": 42, "3": 0.5}),
        (6, {"prompt": "q", "response": None, "3": None}),
    ]
    assert bad_of(path) == [(7, "wrong_column_count", "Found 4 cells; expected 3: prompt, response, 3.")]
    assert message_of(workbook([["a", "a"], [1, 2]])) == ("a.xlsx:1: column names must differ, found a, a. Rename one.")


def test_a_damaged_workbook_is_one_sentence(workbook: Callable[[list[list[Any]]], Path], write: Write) -> None:
    sentence = "b.xlsx: not a readable Excel file: .+ Save it as .xlsx anew, or as .csv."
    data = workbook([["a"], [1]]).read_bytes()
    for content in (b"", b"PK\x03\x04", data[:-40], data.replace(b"worksheets", b"workshoots")):
        assert re.fullmatch(sentence, message_of(write("b.xlsx", content))), content[:20]


def test_a_workbook_cannot_make_rows_up_without_end(
    workbook: Callable[[list[list[Any]]], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "EXCEL_ROWS", 1000)
    with (
        zipfile.ZipFile(workbook([["a"], [1]])) as good,
        zipfile.ZipFile(tmp_path / "b.xlsx", "w", zipfile.ZIP_DEFLATED) as bad,
    ):
        for name in good.namelist():
            bad.writestr(name, good.read(name).replace(b'<row r="2"', b'<row r="2000000000"'))
    assert message_of(tmp_path / "b.xlsx") == (
        "b.xlsx: not a readable Excel file: a sheet has at most 1,000 rows. Save it as .xlsx anew, or as .csv."
    )


def test_parquet_is_read_in_batches_with_nested_columns(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    columns = {"conversations": [turns] * 600 + [None, [{"from": "human", "value": None}]]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet", row_group_size=250)
    found = read(tmp_path / "a.parquet")
    assert [line for line, _ in found] == [*range(1, 603)]
    assert [value for _, value in found] == [{"conversations": value} for value in columns["conversations"]]


def test_a_damaged_parquet_file_is_one_sentence(tmp_path: Path, write: Write) -> None:
    import pyarrow
    from pyarrow import parquet

    assert message_of(write("a.parquet", "PAR1 not really")).startswith(
        "a.parquet: not a readable Parquet file: Parquet magic bytes not found in footer"
    )
    assert message_of(write("a.parquet", "")).startswith(
        "a.parquet: not a readable Parquet file: Parquet file size is 0 bytes."
    )
    path = tmp_path / "b.parquet"
    texts = [f"{i} {i**7}" for i in range(20_000)]
    parquet.write_table(pyarrow.table({"text": texts}), path, compression="gzip", row_group_size=2000)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 3000] = bytes(3000)
    path.write_bytes(data)
    assert re.match(r"b\.parquet: not a readable Parquet file after row \d+: .+ Write it anew, or", message_of(path))


# --- real files -------------------------------------------------------------------------------------------------------

REAL_SPLITS = {
    "multiturn/lccc_toy_data.json": ("train", "valid", "test"),
    "eval/hellaswag_abstainqa_dev.json": ("dev",),
}


def test_every_real_file_gives_all_its_rows(shared_file: Callable[[str], Path]) -> None:
    manifest = shared_file("manifest.json")
    for entry in json.loads(manifest.read_text(encoding="utf-8"))["entries"]:
        path = manifest.parent / entry["file"]
        if path.suffix in (".txt", ".lst") or path.name == "dataset_info.json":
            continue
        found = [value for split in REAL_SPLITS.get(entry["file"], ("train",)) for _, value in read(path, split)]
        headless = "eval/mmlu/" in entry["file"]  # there the first row is taken for the columns' names
        assert len(found) == entry["rows"] - headless, path
        assert not any(isinstance(value, BadRow) for value in found), path
