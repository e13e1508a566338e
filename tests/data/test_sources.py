import codecs
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks.core.config import SourceConfig
from tasks.core.digest import file_sha256
from tasks.core.errors import DataError
from tasks.data.formats import Rejected, Row
from tasks.data.sources import content_identity, is_hub_id, read_rows

ALPACA = [
    {"instruction": "你好？", "input": "", "output": "你好！"},
    {"instruction": "Translate", "input": "猫", "output": "cat"},
    {"instruction": "q\u2028r", "input": "", "output": 'He said "hi",\r\nthen left;\tfor good'},
]
QUESTIONS = ["你好？", "Translate\n猫", "q\u2028r"]
WriteRows = Callable[..., Path]


def read(path: Path | str, **options: Any) -> list[Row | Rejected]:
    return list(read_rows(SourceConfig(path=str(path), **options)))


def questions(rows: list[Row | Rejected]) -> list[str]:
    return [row.messages[0]["content"] if isinstance(row, Row) else row.reason for row in rows]


def places(rows: list[Row | Rejected]) -> list[tuple[str, int]]:
    return [(row.source, row.line) for row in rows]


def message_of(path: Path | str, **options: Any) -> str:
    """Return the sentence of the DataError that reading `path` raises, without the folder's name."""
    with pytest.raises(DataError) as error:
        read(path, **options)
    return str(error.value).replace(f"{Path(path).parent}/", "")


# --- kinds of files ---------------------------------------------------------------------------------------------------


def test_json_lines_and_arrays_under_either_name(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in ALPACA)
    array = json.dumps(ALPACA, ensure_ascii=False)
    texts = {
        "lines.jsonl": lines,
        "lines.json": lines + "\n\n",
        "array.json": array,
        "array.jsonl": array,
        "indented.json": json.dumps(ALPACA, indent=4),
        "windows.jsonl": lines.replace("\n", "\r\n"),
        "spaced.json": "\n\n  [\n" + ",\n".join(json.dumps(row) for row in ALPACA) + "\n]\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
        rows = read(tmp_path / name)
        assert questions(rows) == QUESTIONS, name
        assert places(rows) == [(name, 1), (name, 2), (name, 3)], name


def test_bare_conversations_one_per_line_or_in_one_array(tmp_path: Path) -> None:
    rows = [[{"role": "user", "content": q}, {"role": "assistant", "content": "a"}] for q in QUESTIONS]
    for name, text in {
        "lines.jsonl": "\n".join(map(json.dumps, rows)),
        "one_line.jsonl": json.dumps(rows[0]),
        "broken_first.jsonl": "\n".join(["[{]", *map(json.dumps, rows)]),
        "array.json": json.dumps(rows),
        "indented.json": json.dumps(rows, indent=1),
        "row_per_line.json": "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]",
    }.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        expected = {"one_line.jsonl": QUESTIONS[:1], "broken_first.jsonl": ["invalid_json", *QUESTIONS]}
        assert questions(read(tmp_path / name)) == expected.get(name, QUESTIONS), name


def test_blank_lines_are_no_rows_but_count_as_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(["", json.dumps(ALPACA[0]), "  ", json.dumps(ALPACA[1])]))
    assert places(read(tmp_path / "a.jsonl")) == [("a.jsonl", 2), ("a.jsonl", 4)]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
def test_byte_order_marks_and_utf16(tmp_path: Path, encoding: str, name: str) -> None:
    text = {
        "a.json": json.dumps(ALPACA[:2], ensure_ascii=False),
        "a.jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in ALPACA[:2]),
        "a.csv": "instruction,input,output\n你好？,,你好！\nTranslate,猫,cat\n",
    }[name]
    (tmp_path / name).write_bytes(text.encode(encoding))
    assert questions(read(tmp_path / name)) == QUESTIONS[:2]


@pytest.mark.parametrize(("name", "separator"), [("a.csv", ","), ("b.csv", ";"), ("c.csv", "\t"), ("d.tsv", "\t")])
def test_tables(tmp_path: Path, name: str, separator: str) -> None:
    import csv

    with (tmp_path / name).open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, ["instruction", "input", "output"], delimiter=separator)
        table.writeheader()
        table.writerows(ALPACA)
        table.writerow({"instruction": "last", "input": "NaN", "output": "x" * 200_000})
    rows = read(tmp_path / name)
    assert questions(rows) == [*QUESTIONS, "last"]
    assert isinstance(rows[2], Row)
    assert rows[2].messages[1]["content"] == ALPACA[2]["output"]
    assert places(rows)[2:] == [(name, 4), (name, 6)]  # the third row has a line break inside


def test_a_table_row_that_does_not_fit_is_rejected_and_the_next_one_read(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('prompt,response\nq1,a1\nq2\nq3,a3,more\n\n"q4"x,a4\nq5,nan\nq6,a6\n', encoding="utf-8")
    rows = read(path)
    assert questions(rows) == ["q1", "wrong_column_count", "wrong_column_count", "invalid_csv", "null_text", "q6"]
    assert [row.line for row in rows] == [2, 3, 4, 6, 7, 8]
    assert isinstance(rows[1], Rejected)
    assert rows[1].detail == "Found 1 cells; expected 2: prompt, response."


def test_conversations_in_a_table_cell(tmp_path: Path) -> None:
    cell = json.dumps([{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]).replace('"', '""')
    (tmp_path / "a.csv").write_text(f'id,conversations\n1,"{cell}"\n', encoding="utf-8")
    assert questions(read(tmp_path / "a.csv")) == ["q"]


def test_parquet_is_read_in_batches_with_nested_columns(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    columns = {"conversations": [turns] * 600 + [None, [{"from": "human", "value": None}]]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    rows = read(tmp_path / "a.parquet")
    assert Counter(questions(rows)) == {"q": 600, "no_assistant_turn": 1, "null_text": 1}
    assert rows[-1].line == 602


def test_a_folder_is_read_by_name_and_detected_file_by_file(tmp_path: Path, write_rows: WriteRows) -> None:
    write_rows([{"prompt": "q2", "response": "a"}], "set/b.jsonl")
    write_rows(ALPACA[:1], "set/a.json")
    write_rows([{"question": "q3", "answer": "a"}], "set/part/c.jsonl")
    write_rows([{"prompt": "no", "response": "no"}], "set/.cache/d.jsonl")
    write_rows([{"any": {"file_name": "a.json"}}], "set/dataset_info.json")
    (tmp_path / "set" / "README.md").write_text("not data")
    rows = read(tmp_path / "set")
    assert questions(rows) == ["你好？", "q2", "q3"]
    assert [row.source for row in rows] == ["a.json", "b.jsonl", "part/c.jsonl"]


def test_max_rows_counts_rejected_rows_too(write_rows: WriteRows) -> None:
    path = write_rows(
        [{"prompt": "q1", "response": ""}, {"prompt": "q2", "response": "a"}, {"prompt": 1, "response": 1}]
    )
    assert questions(read(path, max_rows=2)) == ["empty_answer", "q2"]


def test_json_lines_are_streamed(write_rows: WriteRows) -> None:
    path = write_rows([{"prompt": f"q{i}", "response": "a" * 600} for i in range(3000)])
    with path.open("ab") as file:
        file.write(b"\xff\xff\n")
    rows = read_rows(SourceConfig(path=str(path)))
    assert isinstance(next(rows), Row)  # before the bad end was seen
    with pytest.raises(DataError, match=r"rows\.jsonl:3001: expected UTF-8"):
        list(rows)


def test_a_large_array_is_read_across_its_windows(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "response": "长" * 3000} for i in range(1500)]  # four windows of a million characters
    rows[700]["response"] = "x" * 2_500_000  # and one value that is longer than a window
    (tmp_path / "a.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    assert questions(read(tmp_path / "a.json")) == [f"q{i}" for i in range(1500)]


# --- rows that cannot be read -----------------------------------------------------------------------------------------


def test_a_bad_line_is_rejected_with_its_column(tmp_path: Path) -> None:
    good = json.dumps(ALPACA[0])
    deep = '{"instruction":' + "[" * 200_000
    (tmp_path / "a.jsonl").write_text("\n".join(["{'instruction': 1}", good, good[:30], deep, "17", good]))
    rows = read(tmp_path / "a.jsonl")
    assert questions(rows) == ["invalid_json", "你好？", "invalid_json", "invalid_json", "wrong_format", "你好？"]
    first = rows[0]
    assert isinstance(first, Rejected)
    assert first.detail == "Not valid JSON at column 2: Expecting property name enclosed in double quotes."
    assert first.raw == "{'instruction': 1}"


def test_a_row_of_another_format_is_rejected(write_rows: WriteRows) -> None:
    rows = read(write_rows([*ALPACA, {"prompt": "q", "response": "a"}]))
    assert questions(rows) == [*QUESTIONS, "wrong_format"]
    assert isinstance(rows[3], Rejected)
    assert rows[3].detail == "Expected the file's own format, alpaca; found the keys prompt, response, which is pairs."


# --- files that cannot be read ----------------------------------------------------------------------------------------


def test_a_missing_file_names_its_neighbours(tmp_path: Path, write_rows: WriteRows) -> None:
    write_rows(ALPACA, "train.jsonl")
    assert message_of(tmp_path / "trian.jsonl") == (
        "trian.jsonl: there is no such file or folder. Did you mean train.jsonl?"
    )
    assert message_of(tmp_path / "zzz.csv").endswith(f"{tmp_path} has train.jsonl. Check data.sources.")
    missing = tmp_path / "no" / "such" / "a.json"
    assert message_of(missing).endswith(f"Its folder does not exist either; {tmp_path} does.")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "a.jsonl: expected rows of training data, found none: it is empty. Check how it was written."),
        ("a.json", b" \n\n", "a.json: expected rows of training data, found none: it is empty"),
        ("a.json", b"[]", "a.json: expected rows of training data, found none: it is empty"),
        ("a.csv", b"instruction,output\n", "a.csv: expected rows of training data, found none: it is empty"),
        (
            "a.txt",
            b"hello",
            "a.txt: expected a file name that ends in .json, .jsonl, .csv, .tsv, .parquet, found .txt.",
        ),
        (
            "rows",
            b"hello",
            "rows: expected a file name that ends in .json, .jsonl, .csv, .tsv, .parquet, found no suffix",
        ),
        (
            "a.json",
            b'[\n {"instruction": "q", "output": "a"},\n {"instruction": "q" "output": "a"}\n]',
            "a.json:3:22: expected an array of rows, or one row per line, found invalid JSON: Expecting ',' delimiter. "
            "Mend the file, or write it anew if it was cut off.",
        ),
        ("a.json", b'[{"instruction": "q", "output": "a"}, {"instr', "a.json:1:40: expected an array of rows"),
        (
            "a.json",
            b'[{"instruction": "q", "output": "a"}',
            "a.json:1:37: expected an array of rows, or one row per line",
        ),
        ("a.json", b'[{"instruction": "q", "output": "a"},]', "found invalid JSON: Expecting value."),
        ("a.json", b'[{"instruction": "q", "output": "a"}] x', "a.json:1:39: expected an array of rows"),
        ("a.json", b'{\n "instruction": "q",\n "output" "a"\n}', "a.json:3:11: expected an array of rows"),
        ("a.jsonl", b"hello\n", "a.jsonl:1: no row can be read. Not valid JSON at column 1: Expecting value."),
        (
            "a.json",
            b'{"data": [{"instruction": "q"}]}',
            "a.json: the format cannot be told from the first row: found the",
        ),
        ("a.csv", b"q1,a1\nq2,a2\n", "a.csv: the format cannot be told from the first row: found the keys q1, a1."),
        ("a.csv", b"prompt,prompt\nq,a\n", "a.csv:1: column names must differ, found prompt, prompt. Rename one."),
        ("a.csv", b'prompt,response\nq,a\n"q,a\n', "a.csv:3: a quoted cell that begins in this row is never closed."),
        (
            "a.parquet",
            b"PAR1 not really",
            "a.parquet: not a readable Parquet file: Parquet magic bytes not found in footer",
        ),
        ("a.parquet", b"", "a.parquet: not a readable Parquet file: Parquet file size is 0 bytes."),
        (
            "a.jsonl",
            '{"prompt": "q", "response": "a"}\n{"prompt": "你好"}'.encode("gb18030"),
            "a.jsonl:2: expected UTF-8 text, found other bytes. Convert it: iconv -f GB18030 -t UTF-8 a.jsonl > "
            "utf8-a.jsonl",
        ),
        ("a.csv", b"prompt,response\nq,\x81\n", "iconv -f ITS_ENCODING -t UTF-8 a.csv"),
        ("a.json", codecs.BOM_UTF16_LE + b"[\0{", "a.json: expected utf-16"),
    ],
)
def test_a_file_that_cannot_be_read_says_why_and_what_to_do(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    assert message in message_of(tmp_path / name)


def test_an_error_late_in_a_large_array_is_located(tmp_path: Path) -> None:
    rows = [json.dumps({"prompt": f"q{i}", "response": "x" * 3000}) for i in range(1000)]
    rows[900] = '{"prompt": q900}'
    (tmp_path / "a.json").write_text("[" + ",\n".join(rows) + "]")
    assert message_of(tmp_path / "a.json").startswith("a.json:901:12: ")
    (tmp_path / "a.json").write_text("[" + ", ".join(rows) + "]")
    column = sum(len(row) + 2 for row in rows[:900]) + 1 + 12
    assert message_of(tmp_path / "a.json").startswith(f"a.json:1:{column}: ")


def test_an_unreadable_file_and_a_folder_without_data(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").symlink_to("/proc/self/mem")  # opens, but reading it fails, even for root
    assert message_of(tmp_path / "a.jsonl") == (
        "a.jsonl: the file could not be read: Input/output error. Check its permissions and its disk."
    )
    (tmp_path / "empty").mkdir()
    assert "expected a folder with .json, .jsonl, .csv, .tsv, .parquet files, found none" in message_of(
        tmp_path / "empty"
    )


def test_urls_are_not_fetched() -> None:
    assert "found a URL. Download it first." in message_of("https://example.com/a.jsonl")


# --- what a source is -------------------------------------------------------------------------------------------------


def test_a_local_source_is_its_bytes(tmp_path: Path, write_rows: WriteRows) -> None:
    path = write_rows(ALPACA, "set/a.jsonl")
    same = write_rows(ALPACA, "other/b.jsonl")
    assert content_identity(SourceConfig(path=str(path))) == file_sha256(path)
    assert content_identity(SourceConfig(path=str(same))) == file_sha256(path)
    folder = SourceConfig(path=str(tmp_path / "set"))
    before = content_identity(folder)
    write_rows(ALPACA[:1], "set/b.jsonl")
    assert content_identity(folder) != before
    with pytest.raises(DataError, match="there is no such file"):
        content_identity(SourceConfig(path=str(tmp_path / "c.jsonl")))


def test_what_counts_as_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("tatsu-lab/alpaca")
    assert is_hub_id("squad")
    for path in ("data/train.jsonl", "train.txt", "/data/alpaca", "a/b/c", "./alpaca", "s3://a/b"):
        assert not is_hub_id(path), path
    (tmp_path / "tatsu-lab" / "alpaca").mkdir(parents=True)
    assert not is_hub_id("tatsu-lab/alpaca")


HUB_PROGRAM = """
import json, sys
from tasks.core.config import SourceConfig
from tasks.core.errors import DataError
from tasks.data.sources import content_identity, read_rows
for options in json.loads(sys.argv[1]):
    source = SourceConfig(**options)
    for act in (content_identity, lambda source: [row.messages[0]["content"] for row in read_rows(source)]):
        try:
            print(json.dumps(act(source)))
        except DataError as error:
            print(json.dumps(f"DataError: {error}"))
"""


def ask_hub(sources: list[dict[str, str]], home: Path, url: str, offline: bool = False) -> tuple[list[Any], str]:
    """Return the identity and the questions of each source, or their errors, and what was printed besides. In a process
    of its own, because the Hub's libraries read their settings when they are imported."""
    environment = {**os.environ, "HF_HOME": str(home), "HF_ENDPOINT": url, "HF_HUB_OFFLINE": str(int(offline))}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    environment.pop("HF_DATASETS_OFFLINE", None)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", HUB_PROGRAM, json.dumps(sources)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def test_hub_data_sets_online_offline_gated_and_absent(hub: Any, tmp_path: Path) -> None:
    rows = "".join(json.dumps(row) + "\n" for row in ALPACA).encode()
    hub.repos = {
        "me/open": {"train.jsonl": rows},  # without a README, which is how the commit is asked for
        "me/card": {"train.jsonl": rows, "README.md": b"# A card"},
        "me/gated": "GatedRepo",
    }
    names = ["me/open", "me/card", "me/gated", "me/absent"]
    sources = [{"path": name} for name in names]
    sources += [
        {"path": "me/card", "split": "test"},
        {"path": "me/card", "subset": "zh"},
        {"path": "me/card", "revision": "v2"},
    ]
    answers, printed = ask_hub(sources, tmp_path, hub.url)
    commit = answers[0].partition("@")[2]
    assert len(commit) == 40
    assert answers[:4] == [f"hub:me/open@{commit}", QUESTIONS, f"hub:me/card@{commit}", QUESTIONS]
    assert answers[4] == answers[5]
    assert answers[4].startswith(
        "DataError: Hub data set me/gated is gated. Accept its terms at https://huggingface.co/"
    )
    assert answers[7].startswith("DataError: There is no file, folder or Hub data set me/absent that you can read.")
    assert "Unknown split \"test\". Should be one of ['train']. Check data.sources" in answers[9]
    assert "BuilderConfig 'zh' not found. Available: ['default']. Check data.sources" in answers[11]
    assert answers[12].startswith("DataError: Hub data set me/card has no revision 'v2'.")
    assert printed == ""

    sources = [*sources[:2], {"path": "me/absent"}, {"path": "me/card", "revision": "b" * 40}]
    answers, printed = ask_hub(sources, tmp_path, hub.url, offline=True)
    assert answers[:4] == [f"hub:me/open@{commit}", QUESTIONS, f"hub:me/card@{commit}", QUESTIONS]
    assert answers[5].endswith("the Hub cannot be reached (offline). Give a local file, or fetch it once while online.")
    assert "me/card is downloaded at another commit than bbbbbbbbbbbb" in answers[7]
    assert printed == ""


# --- real files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kept", "rejected", "format_"),
    [
        ("sft_zh/oaast_sft_zh.json", 689, {}, "alpaca"),
        ("sft_zh/identity.json", 91, {}, "alpaca"),
        ("sft_zh/cdb_extra_terms.json", 151, {"empty_prompt": 1}, "alpaca"),
        ("nc/sft_zh/cdb_alpaca_zh_0-3252.json", 3243, {"empty_answer": 4}, "alpaca"),
        ("multiturn/sharegpt_zh_400.jsonl", 399, {"empty_prompt": 1}, "sharegpt"),
        ("multiturn/fastchat_dummy_conversation.json", 500, {}, "sharegpt"),
        ("sft_zh/glaive_toolcall_zh_demo.json", 100, {"tool_calls": 200}, "sharegpt"),
        ("nc/sft_en/xtuner_openai_sft.jsonl", 128, {}, "messages"),
        ("sft_en/v1_sft_demo.jsonl", 500, {}, "messages"),
        ("sft_en/dolly_hhrlhf_train_small.jsonl", 1000, {}, "pairs"),
        ("multiturn/crosswoz_val_messages.jsonl", 0, {"unknown_role": 500}, None),
    ],
)
def test_real_files(
    shared_file: Callable[[str], Path], name: str, kept: int, rejected: dict[str, int], format_: str | None
) -> None:
    rows = read(shared_file(name))
    assert Counter(row.reason for row in rows if isinstance(row, Rejected)) == rejected
    assert Counter(row.format for row in rows if isinstance(row, Row)) == ({format_: kept} if kept else {})
    assert len({row.line for row in rows}) == len(rows) == kept + sum(rejected.values())


def test_real_history_becomes_earlier_turns(shared_file: Callable[[str], Path]) -> None:
    path = shared_file("sft_zh/oaast_sft_zh.json")
    records = json.loads(path.read_text(encoding="utf-8"))
    rows = read(path)
    assert [len(row.messages) for row in rows if isinstance(row, Row)] == [2 * len(r["history"]) + 2 for r in records]
    number, record = next((n, r) for n, r in enumerate(records) if len(r["history"]) == 2)
    row = rows[number]
    assert isinstance(row, Row)
    texts = [text for pair in record["history"] for text in pair] + [record["instruction"], record["output"]]
    assert [message["content"] for message in row.messages] == texts


def test_real_unanswered_questions_are_cut(shared_file: Callable[[str], Path]) -> None:
    rows = read(shared_file("multiturn/sharegpt_zh_400.jsonl"))
    cut = [row.line for row in rows if isinstance(row, Row) and row.repaired == "trailing_user_turn"]
    assert cut == [119, 341]


@pytest.mark.parametrize("name", ["dpo_zh_demo.json", "dpo_en_demo.json", "oaast_rm_zh_150.json"])
def test_real_preference_pairs_are_refused(shared_file: Callable[[str], Path], name: str) -> None:
    assert "these are preference pairs" in message_of(shared_file(f"preference/{name}"))


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("multiturn/lccc_base_test.json", "found rows that are a list of str"),
        ("multiturn/kdconv_film_dev.json", "found the keys messages, name"),
        ("nc/sft_zh/belle_zh_seed_tasks.json", "found the keys id, name, instruction, instances, is_classification"),
    ],
)
def test_real_files_of_other_shapes_are_told_apart(shared_file: Callable[[str], Path], name: str, found: str) -> None:
    assert found in message_of(shared_file(name))
