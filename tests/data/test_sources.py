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
from tasks.data.downloads import address_digest
from tasks.data.formats import Rejected, Row
from tasks.data.records import JsonText, parse_record
from tasks.data.sources import content_identity, is_hub_id, read_files, read_rows, resolve_entry, source_name

ALPACA = [
    {"instruction": "你好？", "input": "", "output": "你好！"},
    {"instruction": "Translate", "input": "猫", "output": "cat"},
    {"instruction": "q\u2028r", "input": "", "output": 'He said "hi",\r\nthen left;\tfor good'},
]
QUESTIONS = ["你好？", "Translate\n猫", "q\u2028r"]
PAIR = {"prompt": "q", "response": "a"}
SUFFIXES = ".json, .jsonl, .ndjson, .csv, .tsv, .parquet, .xlsx, .txt, .zip"
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


# --- files, folders and globs -----------------------------------------------------------------------------------------


def test_blank_lines_are_no_rows_but_count_as_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(["", json.dumps(ALPACA[0]), "  ", json.dumps(ALPACA[1])]))
    assert places(read(tmp_path / "a.jsonl")) == [("a.jsonl", 2), ("a.jsonl", 4)]


def test_conversations_in_a_table_cell(tmp_path: Path) -> None:
    cell = json.dumps([{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]).replace('"', '""')
    (tmp_path / "a.csv").write_text(f'id,conversations\n1,"{cell}"\n', encoding="utf-8")
    assert questions(read(tmp_path / "a.csv")) == ["q"]


def test_a_text_is_learned_whole(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One.\nStill.\n\nTwo.\n")
    rows = read(tmp_path / "a.txt")
    assert [(row.line, row.format, row.messages) for row in rows if isinstance(row, Row)] == [
        (1, "text", [{"role": "text", "content": "One.\nStill."}]),
        (4, "text", [{"role": "text", "content": "Two."}]),
    ]
    assert "a.txt:1: format: alpaca was named, but" in message_of(tmp_path / "a.txt", format="alpaca")


def test_a_folder_is_read_by_name_and_detected_file_by_file(tmp_path: Path, write_rows: WriteRows) -> None:
    write_rows([{"prompt": "q2", "response": "a"}], "set/b.jsonl")
    write_rows(ALPACA[:1], "set/a.json")
    write_rows([{"question": "q3", "answer": "a"}], "set/part/c.jsonl")
    write_rows([{"prompt": "no", "response": "no"}], "set/.cache/d.jsonl")
    write_rows([{"any": {"file_name": "a.json"}}], "set/dataset_info.json")
    for name in ("README.md", "labels.txt"):
        (tmp_path / "set" / name).write_text("not data")
    rows = read(tmp_path / "set")
    assert questions(rows) == ["你好？", "q2", "q3"]
    assert [row.source for row in rows] == ["a.json", "b.jsonl", "part/c.jsonl"]


def test_globs(tmp_path: Path, write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.json", "deep/er/d.jsonl", "deep/.e.jsonl", "[x].jsonl"):
        write_rows([PAIR], f"set/{name}")
    monkeypatch.chdir(tmp_path)
    for pattern, names in {
        "set/*.jsonl": ["[x].jsonl", "a.jsonl", "b.jsonl"],
        "set/**/*.jsonl": ["[x].jsonl", "a.jsonl", "b.jsonl", "deep/er/d.jsonl"],
        "set/[ab].js*": ["a.jsonl", "b.jsonl"],
        "set/d*/*/?.jsonl": ["deep/er/d.jsonl"],
        "s*t/c.json": ["set/c.json"],
        "set/[x].jsonl": ["[x].jsonl"],  # a file of that very name
    }.items():
        for path in (pattern, str(tmp_path / pattern)):
            assert [row.source for row in read(path)] == names, pattern
    assert message_of("set/*.csv") == f"*.csv: expected a glob of {SUFFIXES} files, found none. Check the path."
    (tmp_path / "set" / "f.tar").write_bytes(b"")
    assert message_of("set/*.tar").startswith("f.tar: .tar is not unpacked here: of packed files zip is")


def test_max_rows_counts_rejected_rows_too_and_ends_a_source(tmp_path: Path, write_rows: WriteRows) -> None:
    rows = [{"prompt": "q1", "response": ""}, {"prompt": "q2", "response": "a"}, {"prompt": 1, "response": 1}]
    for name in "ab":
        write_rows(rows, f"set/{name}.jsonl")
    (tmp_path / "set" / "c.jsonl").write_text("never read")
    assert questions(read(tmp_path / "set" / "a.jsonl", max_rows=2)) == ["empty_answer", "q2"]
    for limit, found in {2: [2], 3: [3], 4: [3, 1], 6: [3, 3]}.items():
        files = read_files(SourceConfig(path=str(tmp_path / "set"), max_rows=limit))
        assert [len(list(file.records)) for file in files] == found
    with pytest.raises(DataError, match=r"c\.jsonl:1: no row can be read\. Not valid JSON at column 1"):
        read(tmp_path / "set", max_rows=7)


def test_files_are_given_with_their_format_and_unparsed_records(tmp_path: Path, write_rows: WriteRows) -> None:
    write_rows(ALPACA, "set/a.jsonl")
    write_rows([PAIR] * 60, "set/b.json")
    source = SourceConfig(path=str(tmp_path / "set"))
    for file, name, format_, rows in zip(
        read_files(source), ("a.jsonl", "b.json"), ("alpaca", "pairs"), (ALPACA, [PAIR] * 60), strict=True
    ):
        assert (file.name, file.where, file.format) == (name, str(tmp_path / "set" / name), format_)
        assert file.source == source
        records = list(file.records)
        assert all(isinstance(value, JsonText) for _, value in records)
        assert [(line, parse_record(value)) for line, value in records] == [*enumerate(rows, 1)]


# --- rows that cannot be read -----------------------------------------------------------------------------------------


def test_a_bad_line_is_rejected_with_its_column(tmp_path: Path) -> None:
    good = json.dumps(ALPACA[0])
    (tmp_path / "a.jsonl").write_text("\n".join(["{'instruction': 1}", good, good[:30], "17", good]))
    rows = read(tmp_path / "a.jsonl")
    assert questions(rows) == ["invalid_json", "你好？", "invalid_json", "wrong_format", "你好？"]
    first = rows[0]
    assert isinstance(first, Rejected)
    assert first.detail == "Not valid JSON at column 2: Expecting property name enclosed in double quotes."
    assert first.raw == "{'instruction': 1}"


def test_a_row_of_another_format_is_rejected(write_rows: WriteRows) -> None:
    rows = read(write_rows([*ALPACA, {"prompt": "q", "response": "a"}]))
    assert questions(rows) == [*QUESTIONS, "wrong_format"]
    assert isinstance(rows[3], Rejected)
    assert "found the keys prompt, response" in rows[3].detail


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
        ("a.lst", b"hello", f"a.lst: expected a file name that ends in {SUFFIXES}, found .lst. Convert or rename it."),
        (
            "rows",
            b"hello",
            f"rows: expected a file name that ends in {SUFFIXES}, found no suffix. Convert or rename it.",
        ),
        ("a.xls", b"hello", "a.xls: of workbooks only .xlsx is read, found .xls. Save it as .xlsx or .csv."),
        ("a.7z", b"hello", "a.7z: .7z is not unpacked here: of packed files zip is, and gzip and zstd around .json"),
        ("a.jsonl", b"hello\n", "a.jsonl:1: no row can be read. Not valid JSON at column 1: Expecting value."),
        (
            "a.json",
            b'{"data": [{"instruction": "q"}]}',
            "a.json:1: the format cannot be told from the first row: found",
        ),
        ("a.csv", b"q1,a1\nq2,a2\n", "a.csv:2: the format cannot be told from the first row: found the keys q1, a1."),
    ],
)
def test_a_file_that_cannot_be_read_says_why_and_what_to_do(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    assert message in message_of(tmp_path / name)


def test_a_folder_without_data(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert (
        message_of(tmp_path / "empty") == f"empty: expected a folder with {SUFFIXES} files, found none. Check the path."
    )
    assert "found a packaged file" in message_of("package:module/rows.jsonl")


# --- dataset_info.json ------------------------------------------------------------------------------------------------


@pytest.fixture
def write_info(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes entries into a dataset_info.json beside rows of several shapes."""
    (tmp_path / "set").mkdir()

    def write(**entries: Any) -> Path:
        path = tmp_path / "set" / "dataset_info.json"
        path.write_text(json.dumps(entries), encoding="utf-8")
        return path

    return write


def test_entries_are_read_as_llama_factory_reads_them(write_info: Callable[..., Path], write_rows: WriteRows) -> None:
    info = write_info(
        plain={"file_name": "a.json"},
        named={
            "file_name": "named.jsonl",
            "columns": {"prompt": "ask", "query": "more", "response": "say", "system": None},
        },
        chat={
            "file_name": "folder",
            "formatting": "sharegpt",
            "columns": {"messages": "talk"},
            "tags": {"role_tag": "who", "content_tag": "what", "user_tag": "me", "assistant_tag": "you"},
            "num_samples": 3,
        },
        text={"file_name": "text.jsonl", "columns": {"prompt": "content"}},
        splits={"file_name": "splits.json", "split": "dev"},
    )
    turns = [{"who": "me", "what": "q"}, {"who": "you", "what": "a"}]
    write_rows(ALPACA, "set/a.json")
    write_rows([{"ask": "q", "more": "m", "say": "a", "input": "not named"}], "set/named.jsonl")
    write_rows([{"talk": turns}] * 2, "set/folder/a.jsonl")
    write_rows([{"talk": turns}] * 2, "set/folder/b.jsonl")
    write_rows([{"content": "words"}], "set/text.jsonl")
    (info.parent / "splits.json").write_text(json.dumps({"train": [PAIR], "dev": [{**PAIR, "prompt": "dev"}]}))
    for path in (info, info.parent):
        assert questions(read(path, entry="plain")) == QUESTIONS
        assert questions(read(path, entry="named")) == ["q\nm"]
        assert places(read(path, entry="chat")) == [("a.jsonl", 1), ("a.jsonl", 2), ("b.jsonl", 1)]
        assert questions(read(path, entry="chat", max_rows=2)) == ["q", "q"]
        assert questions(read(path, entry="splits")) == ["dev"]
        assert questions(read(path, entry="splits", split="train")) == ["q"]
        (row,) = read(path, entry="text")
        assert isinstance(row, Row) and (row.format, row.messages[0]["content"]) == ("text", "words")
    (file,) = read_files(SourceConfig(path=str(info), entry="named"))
    assert file.source.columns == {"prompt": "ask", "query": "more", "response": "say"}
    assert file.where == str(info.parent / "named.jsonl")
    assert source_name(SourceConfig(path=str(info), entry="named")) == "named"
    before = content_identity(SourceConfig(path=str(info), entry="named"))
    write_info(named={"file_name": "named.jsonl", "columns": {"prompt": "ask", "response": "say"}})
    assert content_identity(SourceConfig(path=str(info), entry="named")) != before


def test_entries_on_the_hub_and_of_preference_pairs(write_info: Callable[..., Path], write_rows: WriteRows) -> None:
    info = write_info(
        hub={"hf_hub_url": "me/rows", "ms_hub_url": "me/rows", "subset": "zh", "split": "dev", "folder": "python"},
        pairs={
            "file_name": "a.json",
            "ranking": True,
            "columns": {"prompt": "ask", "chosen": "good", "rejected": "bad"},
        },
        talks={
            "file_name": "b.json",
            "ranking": True,
            "formatting": "sharegpt",
            "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
        },
    )
    source, entry = resolve_entry(SourceConfig(path=str(info), entry="hub"))
    assert (source.path, source.subset, source.split, source.entry) == ("me/rows", "zh", "dev", None)
    assert entry["folder"] == "python"
    write_rows([{"ask": "q", "good": "yes", "bad": "no"}], "set/a.json")
    turn = {"from": "gpt", "value": "yes"}
    write_rows([{"conversations": [{"from": "human", "value": "q"}], "chosen": turn, "rejected": turn}], "set/b.json")
    for entry_name in ("pairs", "talks"):
        (row,) = read(info, entry=entry_name, preference="chosen")
        assert isinstance(row, Row) and [m["content"] for m in row.messages] == ["q", "yes"]
        assert message_of(info, entry=entry_name) == (
            f"dataset_info.json, entry {entry_name}: its rows are preference pairs (ranking), which supervised "
            "fine-tuning cannot use. Set data.sources preference=chosen to train on the chosen answers."
        )


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"script_url": "x.py"},
            "script_url names a program, which is not run. Load it once, and save the rows as JSON.",
        ),
        (
            {
                "file_name": "a.json",
                "formatting": "sharegpt",
                "columns": {"messages": "m", "images": "i", "videos": "v"},
            },
            "its rows have images, videos; only text is trained on. Choose another entry.",
        ),
        ({"file_name": "a.json", "columns": {"kto_tag": "label"}}, "its answers are labelled as good or bad (kto_tag)"),
        ({"ms_hub_url": "me/rows"}, "expected file_name or hf_hub_url, found ms_hub_url. Download the data set first"),
        ({}, "expected file_name or hf_hub_url, found nothing. Download the data set first, and name its file."),
        ([], "expected an object, found a list."),
        ({"file_name": "a", "formatting": "x"}, "formatting: expected alpaca, sharegpt, openai, found 'x'."),
        ({"file_name": "a", "num_samples": -1}, "num_samples: expected a number of rows, found -1."),
        ({"file_name": "a", "columns": ["x"]}, 'columns: expected an object of names, found ["x"].'),
        ({"file_name": "a", "tags": {"role": "x"}}, "tags: expected role_tag, content_tag, user_tag, assistant_tag, "),
        (
            {"file_name": "a", "columns": {"messages": "m", "chosen": "c"}},
            "the chosen answers to messages are expected under chosen, found c. Rename it.",
        ),
    ],
)
def test_entries_that_are_not_supported(write_info: Callable[..., Path], entry: Any, message: str) -> None:
    assert message_of(write_info(x=entry), entry="x").startswith(f"dataset_info.json, entry x: {message}")


def test_entries_that_are_not_there(write_info: Callable[..., Path], tmp_path: Path) -> None:
    info = write_info(alpaca_zh={"file_name": "gone.json"}, identity={})
    assert message_of(info, entry="alpaca_en") == (
        "dataset_info.json: there is no entry alpaca_en. Did you mean alpaca_zh?"
    )
    assert message_of(info, entry="zzz") == "dataset_info.json: there is no entry zzz. It has alpaca_zh, identity."
    assert message_of(info) == "dataset_info.json: name one of its entries as data.sources entry: alpaca_zh, identity."
    assert "gone.json: there is no such file or folder." in message_of(info, entry="alpaca_zh")
    for path in (tmp_path, "https://me:secret@host.org/dataset_info.json", "s3://bucket/set/"):
        message = message_of(path, entry="x")
        assert "expected a dataset_info.json on this machine, or a folder that holds one, found none." in message
        assert "secret" not in message
    for text, found in {
        "[]": "expected an object of data sets by name, found a list.",
        "{,}": "1:2: not valid JSON",
    }.items():
        info.write_text(text)
        assert found in message_of(info, entry="x")


# --- what a source is -------------------------------------------------------------------------------------------------


def test_a_local_source_is_its_bytes(tmp_path: Path, write_rows: WriteRows) -> None:
    path = write_rows(ALPACA, "set/a.jsonl")
    same = write_rows(ALPACA, "other/b.jsonl")
    assert content_identity(SourceConfig(path=str(path))) == file_sha256(path)
    assert content_identity(SourceConfig(path=str(same))) == file_sha256(path)
    folder, pattern = SourceConfig(path=str(tmp_path / "set")), SourceConfig(path=str(tmp_path / "set" / "*.jsonl"))
    before = content_identity(folder)
    assert content_identity(pattern) == before
    write_rows(ALPACA[:1], "set/b.jsonl")
    assert content_identity(folder) != before
    assert content_identity(pattern) == content_identity(folder)
    assert [source_name(source) for source in (folder, pattern)] == ["set", "*.jsonl"]
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
        "datasets/me/open": {"train.jsonl": rows},  # without a README, which is how the commit is asked for
        "datasets/me/card": {"train.jsonl": rows, "README.md": b"# A card"},
        "datasets/me/gated": "GatedRepo",
    }
    names = ["me/open", "me/card", "me/gated", "me/absent"]
    sources = [{"path": name} for name in names]
    sources += [
        {"path": "me/card", "split": "test"},
        {"path": "me/card", "subset": "zh"},
        {"path": "me/card", "revision": "v2"},
    ]
    answers, printed = ask_hub(sources, tmp_path, hub.url)
    expected = [f"hub:me/open@{hub.head('datasets/me/open')}", QUESTIONS]
    expected += [f"hub:me/card@{hub.head('datasets/me/card')}", QUESTIONS]
    assert answers[:4] == expected
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
    assert answers[:4] == expected
    assert answers[5].endswith("the Hub cannot be reached (offline). Give a local file, or fetch it once while online.")
    assert "me/card is downloaded at another commit than bbbbbbbbbbbb" in answers[7]
    assert printed == ""


def test_an_address_is_found_again_without_what_is_secret_in_it() -> None:
    place = "https://host/rows.jsonl?part=2"
    assert address_digest("https://me:secret@host/rows.jsonl?part=2") == address_digest(place)
    assert (
        len({address_digest(place), address_digest("https://host/rows.jsonl?part=3"), address_digest("s3://b/k@1")})
        == 3
    )


# --- real files -------------------------------------------------------------------------------------------------------


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


def test_real_texts_are_paragraphs(shared_file: Callable[[str], Path]) -> None:
    assert len(read(shared_file("eval/wiki_demo.txt"))) == 30
    assert len(read(shared_file("eval/wikitext2_test.txt"))) > 1000


def test_real_splits_and_entries(shared_file: Callable[[str], Path]) -> None:
    path = shared_file("multiturn/lccc_toy_data.json")
    assert [len(read(path, split=split)) for split in ("train", "valid", "test")] == [1000, 200, 200]
    assert message_of(path, split="dev") == (
        "lccc_toy_data.json: there is no split dev; the file holds valid, train, test. Name one of these as "
        "data.sources split."
    )
    info = shared_file("formats/dataset_info.json")
    entries = json.loads(info.read_text(encoding="utf-8"))
    refused: Counter[str] = Counter()
    for name in entries:
        try:
            resolve_entry(SourceConfig(path=str(info), entry=name))
        except DataError as error:
            refused[str(error).partition(f"{info}, entry {name}: ")[2].split(";")[0].split("(")[0]] += 1
    assert refused == {
        "its rows have images": 10,
        "its rows have audios": 1,
        "its rows have videos": 1,
        "its rows have videos, audios": 1,
        "its rows are preference pairs ": 9,
        "its answers are labelled as good or bad ": 3,
        "expected file_name or hf_hub_url, found ms_hub_url. Download the data set first, and name its file.": 1,
    }
