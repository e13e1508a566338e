"""Files that nobody meant to write: thousands, generated and damaged, thrown at the whole data stage.

Whatever a file holds, it is refused in a sentence that names it, or each of its rows is kept or quarantined.
"""

import csv
import functools
import gzip
import io
import json
import random
import struct
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks.core.config import CleanConfig, DataConfig, SourceConfig
from tasks.core.errors import DataError
from tasks.data.formats import Row
from tasks.data.leakage import ItemIndex
from tasks.data.prepare import SPLITS, Job, prepare_dataset
from tasks.data.reasons import REASONS
from tasks.data.shards import CleanShard, clean_shard
from tasks.data.sources import read_rows

EXAMPLES = 300
FILES_AT_ONCE = 10
MAX_MESSAGE_CHARS = 1500


def clean_in_this_process(jobs: Iterator[Job], config: DataConfig, items: ItemIndex | None) -> Iterator[CleanShard]:
    return (clean_shard(*job, config, items) for job in jobs)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def is_sentence(text: str) -> bool:
    """Return whether a text is one of our sentences, and can be shown in one line of any terminal. One ends with the
    command that converts a file."""
    return len(text) <= MAX_MESSAGE_CHARS and text.isprintable() and (text.endswith(".") or ": iconv -f " in text)


def prepare(path: Path, **options: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]] | str:
    """Return the rows that are kept of a file and those that are quarantined, or the sentence it is refused with, and
    check what holds for every file."""
    out = path.parent / "out"
    source = SourceConfig(path=str(path), **options)
    try:
        fields = prepare_dataset(DataConfig(sources=[source]), out, run_shards=clean_in_this_process)
    except DataError as error:
        message = str(error)
        assert message.startswith(f"{path}")
        assert is_sentence(message), message
        return message
    kept = [row for split in SPLITS for row in lines_of(out / f"{split}.jsonl")]
    quarantine = lines_of(out / "quarantine.jsonl")
    assert fields["read"] == len(kept) + len(quarantine) > 0, "a row was lost"
    assert fields["quarantined"] == Counter(row["reason"] for row in quarantine)
    assert fields["quarantined"].keys() <= REASONS.keys()
    assert fields["rows"].keys() == set(SPLITS) and sum(fields["rows"].values()) == len(kept)
    for row in [*kept, *quarantine]:
        assert row["source"].partition("/")[0] == path.name
        assert row["line"] >= 1
    for row in quarantine:
        assert row.keys() == {"source", "line", "reason", "detail", "raw"}
        assert row["reason"].replace("_", "").isalpha() and is_sentence(row["detail"]), row
        assert len(row["raw"]) <= 200
    for row in kept:
        roles = [message["role"] for message in row["messages"] if message["role"] != "system"]
        assert roles == ["text"] or (roles and roles == ["user", "assistant"] * (len(roles) // 2)), row
        assert all(message["content"].strip() for message in row["messages"])
    assert sum(1 for _ in read_rows(source)) == fields["read"]
    return kept, quarantine


# --- what a file may hold ---------------------------------------------------------------------------------------------

USER, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
GOOD: dict[str, Any] = {
    "alpaca": {"instruction": "问", "input": "", "output": "答", "history": [["q", "a"]], "system": "s"},
    "sharegpt": {
        "conversations": [USER, {"from": "function_call", "value": '{"name": "f"}'}, USER, GPT],
        "tools": "[]",
    },
    "messages": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 1}]},
    "pairs": {"prompt": "q", "response": "a", "id": 7},
    "lccc": ["我 饿 了 。", "去 吃 … …"],
    "seed_tasks": {"instruction": "q", "instances": [{"input": "i", "output": "o"}]},
    "text": {"text": "Once upon a time."},
    "preference": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "choices": {"question": "q", "A": "1", "B": "2", "C": "3", "D": "4", "answer": "A"},
}
KEYS = sorted({key for row in GOOD.values() if isinstance(row, dict) for key in row} | {"role", "content", "from", "x"})
ODD_TEXTS = [
    *(
        "",
        " ",
        "\ud83d",
        "\x00",
        "\x1b[31m",
        "a\nb",
        "\u2028",
        "\ufeff",
        "NaN",
        "null",
        "[]",
        "{}",
        '[{"role": "user"}]',
    ),
    *("Human: q\nAssistant:", "<tool_call>", "x" * 300, "我 饿", "&lt;p&gt;", "{{name}}", "a@b.de", "，" * 50, "=1+1"),
]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([-1, 10**400, float("nan"), float("inf"), 1e308]),
    st.sampled_from(ODD_TEXTS),
    st.text(st.characters(), max_size=6),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*KEYS, *ODD_TEXTS]), inner, max_size=3)
    ),
    max_leaves=8,
)
TURNS = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool", "narrator", 3, None])},
        optional={"content": SCALARS, "weight": SCALARS, "tool_calls": VALUES},
    ),
    max_size=4,
)


@st.composite
def damaged(draw: st.DrawFn, row: Any) -> Any:
    """Return a row with any value in some place of it."""
    if isinstance(row, dict):
        return {**row, draw(st.sampled_from([*row, *KEYS])): draw(VALUES | TURNS)}
    return [*row, draw(VALUES)]


@st.composite
def rows_of_a_file(draw: st.DrawFn) -> list[Any]:
    """Return rows of which the first and the last are good ones of one format; the others are what they are."""
    good = GOOD[draw(st.sampled_from([*GOOD]))]
    other = st.sampled_from([*GOOD.values()])
    return [good, *draw(st.lists(st.just(good) | damaged(good) | other | TURNS | VALUES, max_size=5)), good]


OPTIONS: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.just({}),
    st.fixed_dictionaries(
        {},
        optional={
            "format": st.sampled_from(["alpaca", "sharegpt", "messages", "lccc", "pairs", "text", "seed_tasks"]),
            "columns": st.sampled_from(
                [
                    {"prompt": "prompt", "response": "response"},
                    {"messages": "x"},
                    {"text": "text"},
                    {"system": "system"},
                ]
            ),
            "tags": st.just({"role_tag": "from", "user_tag": "x"}),
            "preference": st.just("chosen"),
            "max_turns": st.just(2),
            "max_rows": st.integers(1, 4),
            "split": st.sampled_from(["train", "test"]),
        },
    ),
)


# --- how a file may be written ----------------------------------------------------------------------------------------


def text_cell(value: Any) -> Any:
    return value if value is None or isinstance(value, str) else json.dumps(value)


def cells_of(rows: list[Any]) -> tuple[list[str], list[list[Any]]]:
    """Return rows as a table: the names of its columns, and its cells."""
    named = [row if isinstance(row, dict) else {"conversation": row} for row in rows]
    names = list(dict.fromkeys(key for row in named for key in row))
    return names, [[text_cell(row.get(name)) for name in names] for row in named]


def write_array(rows: list[Any]) -> str:
    return json.dumps(rows)


def write_indented(rows: list[Any]) -> str:
    return json.dumps({"about": "x", "train": rows, "test": rows[:1]}, ensure_ascii=False, indent=1)


def write_lines(rows: list[Any]) -> str:
    return "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


def write_table(rows: list[Any], separator: str = ",") -> str:
    text = io.StringIO(newline="")
    names, cells = cells_of(rows)
    csv.writer(text, delimiter=separator).writerows([names, *cells])
    return text.getvalue()


def write_text(rows: list[Any]) -> str:
    return "\n\n".join(text_cell(row) or "" for row in rows)


def write_workbook(rows: list[Any]) -> bytes:
    import openpyxl
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

    book, data = openpyxl.Workbook(), io.BytesIO()
    names, cells = cells_of(rows)
    for line in [names, *cells]:
        book.worksheets[0].append([cell and ILLEGAL_CHARACTERS_RE.sub("", printable(cell)) for cell in line])
    book.save(data)
    return data.getvalue()


def write_parquet(rows: list[Any]) -> bytes:
    import pyarrow
    from pyarrow import parquet

    data = io.BytesIO()
    named = json.loads(printable(json.dumps([row if isinstance(row, dict) else {"dialog": row} for row in rows])))
    try:
        table = pyarrow.Table.from_pylist(named)
        parquet.write_table(table, data)
    except (pyarrow.ArrowException, OverflowError, UnicodeError):  # a column of several types
        names, cells = cells_of(rows)
        lists = [[cell and printable(cell) for cell in column] for column in zip(*cells, strict=True)]
        data = io.BytesIO()
        parquet.write_table(pyarrow.table(dict(zip(map(printable, names), lists, strict=True))), data)
    return data.getvalue()


def printable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


WRITERS: dict[str, Callable[[list[Any]], str | bytes]] = {
    "a.json": write_array,
    "b.json": write_indented,
    "c.jsonl": write_lines,
    "d.csv": write_table,
    "e.tsv": lambda rows: write_table(rows, "\t"),
    "f.txt": write_text,
    "g.xlsx": write_workbook,
    "h.parquet": write_parquet,
}


def as_bytes(content: str | bytes, encoding: str) -> bytes:
    return content.encode(encoding, "surrogatepass") if isinstance(content, str) else content


def pack(name: str, data: bytes, suffix: str) -> tuple[str, bytes]:
    if suffix == ".gz":
        return f"{name}.gz", gzip.compress(data, 1, mtime=0)
    if suffix == ".zst":
        import pyarrow

        packed = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(packed, "zstd") as stream:
            stream.write(data)
        return f"{name}.zst", packed.getvalue().to_pybytes()
    if suffix == ".zip":
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as members:
            members.writestr(zipfile.ZipInfo(f"in/{name}"), data)
        return "z.zip", archive.getvalue()
    return name, data


ENCODINGS = ("utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32")
fast = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("any")


@fast
@given(
    rows=rows_of_a_file(),
    name=st.sampled_from([*WRITERS]),
    encoding=st.sampled_from(ENCODINGS),
    suffix=st.sampled_from(["", "", ".gz", ".zst", ".zip"]),
    options=OPTIONS,
)
def test_any_rows_in_any_file(
    folder: Path, rows: list[Any], name: str, encoding: str, suffix: str, options: dict[str, Any]
) -> None:
    packed, data = pack(name, as_bytes(WRITERS[name](rows), encoding), suffix)
    (folder / packed).write_bytes(data)
    prepare(folder / packed, **options)
    found = prepare(folder / packed)
    if not isinstance(found, str) and name in ("a.json", "b.json", "c.jsonl"):
        assert sorted(row["line"] for part in found for row in part) == [*range(1, len(rows) + 1)]


RAW_LINES = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_characters="\n"), max_size=12),
    st.sampled_from(
        ["", " \t", "\u2028", "{", '{"prompt": "q"', "[1, 2", "NaN", "17", '"text"', "1" * 5000, "[" * 3000]
    ),
    st.sampled_from(
        ["!", '!["a", "b", "c"]', "  x", "#", "\ufeff", "\x00", "\r", "null", "{}", "[]", '{"a": 1} {"b": 2}']
    ),
)


@fast
@given(
    lines=st.lists(RAW_LINES | st.none(), max_size=12),
    end=st.sampled_from(["\n", "\r\n", "\n\n"]),
    encoding=st.sampled_from(ENCODINGS),
    suffix=st.sampled_from(["", ".gz", ".zst", ".zip"]),
)
def test_a_line_is_counted_as_an_editor_counts_it(
    folder: Path, lines: list[str | None], end: str, encoding: str, suffix: str
) -> None:
    number, text = 1, ""
    expected: Counter[int] = Counter()
    for line in [None, *lines, None]:  # None is a good row, which tells where it stands
        text += (
            json.dumps({"prompt": f"q {number}", "response": f"{number} {number}"}) if line is None else line
        ) + end
        if line is None or line.strip():
            expected[number] += 1
        number += end.count("\n")
    name, data = pack("lines.jsonl", text.encode(encoding), suffix)
    (folder / name).write_bytes(data)
    found = prepare(folder / name)
    assert not isinstance(found, str), found
    kept, quarantine = found
    assert all(row["messages"][0]["content"] == f"q {row['line']}" for row in kept)
    assert Counter(row["line"] for row in [*kept, *quarantine]) == expected


# --- damaged files ----------------------------------------------------------------------------------------------------

TOKENS = [
    *(
        b"!",
        b'"',
        b"\\",
        b",",
        b"{",
        b"}",
        b"[",
        b"]",
        b":",
        b"\n",
        b"\r",
        b"\t",
        b";",
        b"'",
        b"<",
        b"&",
        b"\x00",
        b"\xff",
    ),
    *(b"NaN", b"null", b"-Infinity", b"1e999", b"1" * 5000, b"[" * 3000, b'{"a":' * 3000, b"\xef\xbb\xbf", b"\xff\xfe"),
    *(b'"role"', b'"from": 3', b'"\\ud83d"', b"\xe2\x80\xa8", "好".encode("gb18030"), b"\x1f\x8b", b"PK\x03\x04"),
]


def mutate(data: bytes, chance: random.Random) -> bytes:
    """Return the bytes with a few places of them damaged, each in one of the ways in which files are."""
    for _ in range(chance.choice((1, 1, 2, 5))):
        at, end = sorted(chance.choices(range(len(data) + 1), k=2))
        near = min(at + chance.randint(1, 8), len(data))
        edits = (
            (at, b"", len(data)),  # cut off
            (at, b"", end),  # a part is lost
            (at, 2 * data[at:end], end),  # a part is there twice
            (at, chance.randbytes(near - at), near),
            (at, bytes(near - at), near),
            (at, chance.choice(TOKENS), near),
            (at, chance.choice(TOKENS), at),
        )
        first, new, last = chance.choice(edits)
        data = data[:first] + new + data[last:]
    return data


def mutate_members(data: bytes, chance: random.Random) -> bytes:
    """Return a zip archive of which one member is damaged, and packed again so that its checksum is right."""
    new = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(new, "w", zipfile.ZIP_DEFLATED) as archive:
        chosen = chance.choice(old.namelist())
        for name in old.namelist():
            content = old.read(name)
            archive.writestr(zipfile.ZipInfo(name), mutate(content, chance) if name == chosen else content)
    return new.getvalue()


@functools.cache
def good_files() -> list[tuple[str, bytes]]:
    """Return good files of every kind, in every packing."""
    files = []
    for number, row in enumerate(GOOD.values()):
        for name, write in WRITERS.items():
            suffix = ("", ".gz", "", ".zst", "", ".zip")[number % 6]
            encoding = ENCODINGS[number % len(ENCODINGS)]
            files.append(pack(name, as_bytes(write([row, GOOD["pairs"], row, row]), encoding), suffix))
    return files


@fast
@given(seed=st.integers(0, 2**64 - 1))
def test_damaged_files(folder: Path, seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(FILES_AT_ONCE):
        name, data = chance.choice(good_files())
        if name.endswith((".xlsx", ".zip")) and chance.random() < 0.7:
            data = mutate_members(data, chance)
        else:
            data = mutate(data, chance)
        if chance.random() < 0.1:
            name = chance.choice(good_files())[0]
        (folder / name).write_bytes(data)
        prepare(folder / name)


# --- what was met on the way ------------------------------------------------------------------------------------------

# Elsewhere: a line of over 100 MB, and where invalid JSON, a table or a text is broken (test_records.py); archives that
# leave their folder, bombs, byte-order marks, other encodings (test_files.py); each kind of bad row by itself, absent
# columns (test_formats.py); several formats in one file (test_sources.py). Here all of them go through the whole stage.

ROW = {"prompt": "q", "response": "a"}


def message_of(path: Path, **options: Any) -> str:
    found = prepare(path, **options)
    assert isinstance(found, str)
    return found.removeprefix(f"{path.parent}/")


def quarantine_of(path: Path, **options: Any) -> list[tuple[int, str, str]]:
    found = prepare(path, **options)
    assert not isinstance(found, str), found
    return [(row["line"], row["reason"], row["detail"]) for row in found[1]]


def test_every_bad_row_of_one_file_is_told_by_its_line_and_reason(tmp_path: Path) -> None:
    user, assistant = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    rows: list[Any] = [
        {"messages": [user, assistant]},
        {"messages": [user, {**assistant, "content": float("nan")}]},
        {"messages": [user, {**assistant, "content": None}]},
        {"messages": [user, {**assistant, "content": 42}]},
        {"messages": [user, {**assistant, "content": True}]},
        {"messages": [user, {**assistant, "content": ["a", 1]}]},
        {"messages": [user, user, assistant]},
        {"messages": [assistant, user]},
        {"messages": [user]},
        {"messages": []},
        {"messages": "q"},
        {"messages": [user, "a"]},
        {"instruction": "q", "output": "a"},
        ["q", "a"],
        17,
        {"messages": [user, {**assistant, "content": " "}]},
        {"messages": [{**user, "role": "narrator"}, assistant]},
    ]
    lines = [json.dumps(row) for row in rows]
    lines[10:10] = ["{'messages': []}", '{"messages": [', "", "!"]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    role = "expected system, user (human) or assistant (gpt), or a name that data.sources tags gives."
    order = "user and assistant must alternate, beginning with user after an optional system turn."
    own = "Expected the file's own format, messages; found"
    nothing = "There is no assistant turn, so there is nothing to learn."
    assert quarantine_of(path) == [
        (2, "null_text", "turn 2 (assistant) is NaN; expected text."),
        (3, "null_text", "turn 2 (assistant) is null; expected text."),
        (4, "not_text", "turn 2 (assistant) is a number; expected text."),
        (5, "not_text", "turn 2 (assistant) is true or false; expected text."),
        (6, "not_text", "turn 2 (assistant) has a part that is a number; expected text."),
        (7, "roles_out_of_order", f"Turn 2 is user; expected assistant: {order}"),
        (8, "roles_out_of_order", f"Turn 1 is assistant; expected user: {order}"),
        (9, "no_assistant_turn", nothing),
        (10, "no_assistant_turn", "The conversation is empty; expected a user and an assistant turn."),
        (11, "invalid_json", "Not valid JSON at column 2: Expecting property name enclosed in double quotes."),
        (12, "invalid_json", "Not valid JSON at column 15: Expecting value."),
        (14, "invalid_json", "Not valid JSON at column 1: Expecting value."),
        (15, "wrong_format", f"{own} the keys messages."),
        (16, "bad_turn", "Turn 2 is text; expected a role and a text."),
        (17, "wrong_format", f"{own} the keys instruction, output, which is alpaca."),
        (18, "wrong_format", f"{own} rows that are a list that holds text, which is lccc."),
        (19, "wrong_format", f"{own} rows that are a number."),
        (20, "empty_answer", "Turn 2 (assistant) is empty."),
        (21, "unknown_role", f"Turn 1 has the role 'narrator'; {role}"),
    ]


def test_a_list_as_an_answer_is_refused_and_several_are_a_ranking(tmp_path: Path) -> None:
    rows = [{"instruction": "q", "output": answer} for answer in ("a", ["a"], [], ["better", "worse"], {"text": "a"})]
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    assert quarantine_of(tmp_path / "a.json") == [
        (2, "not_text", "output is a list; expected text."),
        (3, "not_text", "output is a list; expected text."),
        (4, "preference_pair", "The row has a chosen and a rejected answer; expected one question and one answer."),
        (5, "not_text", "output is an object; expected text."),
    ]


def test_empty_cells_and_numbers_in_each_kind_of_table(tmp_path: Path) -> None:
    import openpyxl
    import pyarrow
    from pyarrow import parquet

    cells: list[Any] = ["a", None, "NaN", 42]
    nothing, number = "response is null; expected text.", "response is a number; expected text."
    (tmp_path / "a.csv").write_text("prompt,response\n" + "".join(f"q,{cell or ''}\n" for cell in cells))
    assert quarantine_of(tmp_path / "a.csv") == [
        (3, "empty_answer", "Turn 2 (assistant) is empty."),
        (4, "null_text", nothing),
    ]
    book = openpyxl.Workbook()
    for row in (["prompt", "response"], *(["q", cell] for cell in cells)):
        book.worksheets[0].append(row)
    book.save(tmp_path / "a.xlsx")
    assert quarantine_of(tmp_path / "a.xlsx") == [
        (3, "null_text", nothing),
        (4, "null_text", nothing),
        (5, "not_text", number),
    ]
    for values, expected in {
        ("a", None, "NaN"): [(2, "null_text", nothing)],
        (1.5, None, float("nan")): [(1, "not_text", number), (2, "null_text", nothing)],
    }.items():
        parquet.write_table(pyarrow.table({"prompt": ["q"] * 3, "response": values}), tmp_path / "a.parquet")
        assert quarantine_of(tmp_path / "a.parquet")[: len(expected)] == expected


def test_a_column_map_that_names_absent_columns_lists_those_present(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("Frage,Antwort,Quelle\nq,a,x\n", encoding="utf-8-sig")
    assert quarantine_of(tmp_path / "a.csv", columns={"prompt": "Frage", "response": "Antwort"}) == []
    assert message_of(tmp_path / "a.csv", columns={"prompt": "frage", "response": "Answer"}) == (
        "a.csv:2: data.sources columns names frage, Answer, absent from the first row: found the keys Frage, Antwort, "
        "Quelle. Did you mean Frage or Antwort? Correct columns, or leave it out."
    )


def test_a_row_of_a_table_with_a_stray_quote_is_kept_as_it_stands(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('prompt\tresponse\nq\ta\n"q\ntwo"x\ta\nq\tb\n', encoding="utf-8")
    found = prepare(tmp_path / "a.tsv")
    assert not isinstance(found, str)
    (row,) = found[1]
    assert (row["line"], row["reason"], row["raw"]) == (3, "invalid_csv", '"q\ntwo"x\ta\n')
    assert row["detail"] == "Not a valid row: '\\t' expected after '\"'."


def test_names_out_of_a_file_are_shown_short_and_in_one_line(tmp_path: Path) -> None:
    names = ["a\nb", "\ud83d", "\x1b[31m", "k" * 50, *map(str, range(20))]
    (tmp_path / "a.json").write_text(json.dumps([dict.fromkeys(names)]))
    assert (
        "found the keys a b, \\ud83d, \\x1b[31m, " + "k" * 39 + "…, 0, 1, 2, 3, 4, 5, 6, 7 and 12 more."
        in message_of(tmp_path / "a.json")
    )
    (tmp_path / "b.json").write_text(json.dumps({"dev": [ROW], **{f"split\n{n}": [] for n in range(20)}}))
    assert message_of(tmp_path / "b.json").startswith("b.json: there is no split train; the file holds dev, split 0, ")
    (tmp_path / "c.csv").write_text('"a\nb","a\nb"\n1,2\n')
    assert message_of(tmp_path / "c.csv") == "c.csv:1: column names must differ, found a b, a b. Rename one."
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        archive.writestr("a\n\x1b[31m.json", json.dumps([ROW, ROW]))
    assert quarantine_of(tmp_path / "d.zip") == [
        (2, "duplicate", r"The same text came before, at d.zip/a \x1b[31m.json:1.")
    ]


def zip_of_one(method: int = zipfile.ZIP_DEFLATED) -> bytearray:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", method) as archive:
        archive.writestr(zipfile.ZipInfo("ü.jsonl"), (json.dumps(ROW) + "\n") * 50, method)
    return bytearray(data.getvalue())


def test_members_that_zipfile_does_not_read(tmp_path: Path) -> None:
    path, name = tmp_path / "a.zip", "ü".encode()
    damaged, again = "a.zip/ü.jsonl: a packed file that is damaged or cut off: ", ". Pack it anew, or get it again."
    for bit, said in ((5, "compressed patched data (flag bit 5)"), (6, "strong encryption (flag bit 6)")):
        data = zip_of_one()
        data[data.rindex(b"PK\x01\x02") + 8] |= 1 << bit
        path.write_bytes(data)
        assert message_of(path) == f"{damaged}{said}{again}"

    data = zip_of_one(zipfile.ZIP_LZMA)
    data[data.index(name) + 30] ^= 0x55
    path.write_bytes(data)
    assert message_of(path) == f"{damaged}Corrupt input data{again}"

    data = zip_of_one()
    data[data.index(name)] = 0xFF  # in front of the member
    path.write_bytes(data)
    assert message_of(path).startswith(f"{damaged}'utf-8' codec can't decode byte 0xff")
    data[data.rindex(name)] = 0xFF  # in the directory
    path.write_bytes(data)
    assert message_of(path).startswith("a.zip: not a readable zip archive: 'utf-8' codec can't decode byte 0xff")

    data = zip_of_one()
    data[data.rindex(b"PK\x01\x02") + 28] = 0  # a member without a name, whose letters are then a comment
    data[data.rindex(b"PK\x01\x02") + 32] = len(name) + len(".jsonl")
    path.write_bytes(data)
    assert message_of(path) == "a.zip: not a readable zip archive: string index out of range. Make it anew."

    data = zip_of_one()
    end = data.rindex(b"PK\x05\x06")
    data[end + 16 : end + 20] = struct.pack("<L", end + 1000)  # all else then begins before the file does
    path.write_bytes(data)
    assert message_of(path) == f"{damaged}Invalid argument{again}"


def test_columns_of_a_parquet_file_that_python_has_no_values_for(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    path, texts = tmp_path / "a.parquet", pyarrow.array(["q", "r"])
    for column, said in (
        (pyarrow.array([2**30, 0], pyarrow.int32()).cast(pyarrow.date32()), "days=1073741824; must have magnitude"),
        (pyarrow.array([1, 2], pyarrow.timestamp("us", tz="No/Where")), "No/Where"),
    ):
        parquet.write_table(pyarrow.table({"prompt": texts, "response": texts, "at": column}), path)
        assert message_of(path).startswith(f"a.parquet: not a readable Parquet file: {said}")
    parquet.write_table(pyarrow.Table.from_arrays([texts] * 3, names=["prompt", "response", "response"]), path)
    assert message_of(path) == ("a.parquet: column names must differ, found prompt, response, response. Rename one.")


def test_a_row_far_too_long_is_refused_before_it_is_cleaned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [ROW, {"prompt": "q", "response": "<p>词</p> " * 25_000}]
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    cleaned: list[str] = []

    def clean_row(row: Row, config: CleanConfig) -> Row:
        cleaned.append(row.messages[-1]["content"])
        return row

    monkeypatch.setattr("tasks.data.shards.clean_row", clean_row)
    assert quarantine_of(tmp_path / "a.json") == [
        (2, "too_long", "The conversation has 225,001 characters; data.max_chars allows 20,000.")
    ]
    assert cleaned == ["a"]
