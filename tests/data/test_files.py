import codecs
import gzip
import io
import json
import random
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.core.errors import DataError
from tasks.data import files
from tasks.data.files import data_files, data_names, data_suffix, refusal
from tasks.data.records import parse_record, read_records

ROWS = [{"prompt": f"问{i}", "response": "答" * i} for i in range(300)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
TEXTS = {
    "a.jsonl": LINES,
    "a.json": json.dumps(ROWS, indent=1).encode(),
    "a.csv": ("prompt,response\n" + "".join(f"{r['prompt']},{r['response']}\n" for r in ROWS)).encode(),
    "a.tsv": ("prompt\tresponse\n" + "".join(f"{r['prompt']}\t{r['response']}\n" for r in ROWS)).encode(),
}


def zstd(data: bytes) -> bytes:
    import pyarrow

    packed = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(packed, "zstd") as stream:
        stream.write(data)
    return packed.getvalue().to_pybytes()


PACK: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": zstd, ".zstd": zstd}


def read(path: Path) -> dict[str, list[object]]:
    found = data_files(path, path.name, path.name)
    return {file.name: [parse_record(value) for _, value in read_records(file, "train")] for file in found}


def message_of(path: Path) -> str:
    with pytest.raises(DataError) as error:
        read(path)
    return str(error.value)


def write_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


# --- names ------------------------------------------------------------------------------------------------------------


def test_what_is_data_by_its_name() -> None:
    for name, suffix in {
        "a.JSONL": ".jsonl",
        "b/a.json.gz": ".json",
        "a.txt.zst": ".txt",
        "a.csv.ZSTD": ".csv",
        "a.zip": ".zip",
        "a.parquet.gz": "",
        "a.tar.gz": "",
        "a.gz": "",
        "a.md": "",
        "json": "",
    }.items():
        assert data_suffix(name) == suffix, name
    assert data_names(["b.json", "a.txt", "x/a.csv.gz", ".c/d.json", "dataset_info.json", "__MACOSX/e.json"]) == [
        "b.json",
        "x/a.csv.gz",
    ]
    assert data_names(["b.txt", "a.txt", "README.txt", "LICENSE-2.0.txt", "x.md"]) == ["a.txt", "b.txt"]


def test_what_is_not_read_says_what_to_do() -> None:
    for name in ("a.tar", "a.tgz", "a.7z", "a.rar", "a.tar.gz", "a.parquet.gz"):
        assert re.fullmatch(
            r"\.\w+ is not unpacked here: of packed files zip is, and gzip and zstd around \.json, \.jsonl, .+\. "
            r"Unpack it first, and name what was in it\.",
            refusal(name),
        )
    assert refusal("a.xls") == "of workbooks only .xlsx is read, found .xls. Save it as .xlsx or .csv."
    assert refusal("rows").endswith(".xlsx, .txt, .zip, found no suffix. Convert or rename it.")


# --- packed -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".zstd"])
@pytest.mark.parametrize("name", list(TEXTS))
def test_packed_files(tmp_path: Path, name: str, suffix: str) -> None:
    path = tmp_path / f"{name}{suffix}"
    path.write_bytes(PACK[suffix](TEXTS[name]))
    expected = {f"{name}{suffix}": ROWS}
    assert read(path) == expected
    parts = PACK[suffix](TEXTS[name][:1000]) + PACK[suffix](TEXTS[name][1000:])  # as pigz, bgzip and cat write them
    path.write_bytes(parts)
    assert read(path) == expected


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_the_bytes_tell_what_is_packed_not_the_name(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(PACK[suffix](LINES))
    assert read(tmp_path / "a.jsonl") == {"a.jsonl": ROWS}
    (tmp_path / f"b.jsonl{suffix}").write_bytes(LINES)
    assert read(tmp_path / f"b.jsonl{suffix}") == {f"b.jsonl{suffix}": ROWS}


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_packed_file_that_was_cut_off_is_never_taken_for_whole(tmp_path: Path, suffix: str) -> None:
    random.seed(0)
    noise = random.randbytes(200_000).hex()
    data = PACK[suffix](json.dumps({"text": noise}).encode() + b"\n" + LINES)
    path = tmp_path / f"a.jsonl{suffix}"
    for kept in (len(data) - 1, len(data) - 9, len(data) // 2, 20):
        path.write_bytes(data[:kept])
        assert re.fullmatch(
            rf"a\.jsonl{suffix}: a packed file that is damaged or cut off: .+\. Pack it anew, or get it again\.",
            message_of(path),
        ), kept
    if suffix == ".gz":  # Arrow, which packs here, leaves Zstandard's checksum out
        path.write_bytes(data[: len(data) // 3] + bytes(100) + data[len(data) // 3 + 100 :])
        assert "a packed file that is damaged or cut off: " in message_of(path)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_bomb_is_refused_before_it_unpacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(PACK[suffix](LINES + b"0" * 30_000_000))
    monkeypatch.setattr(files, "MAX_UNPACKED_BYTES", 20_000_000)
    size = path.stat().st_size
    assert message_of(path) == (
        f"a.jsonl{suffix}: its {size:,} bytes unpack to more than 200 times as much, and to more than 20,000,000 "
        "bytes; no data packs so well. If you trust it, unpack it first."
    )
    monkeypatch.setattr(files, "MAX_UNPACKED_RATIO", (30_000_000 + len(LINES)) // size + 1)  # large, but no bomb
    assert len(read(path)[path.name]) == len(ROWS) + 1


def test_members_of_a_zip_archive_are_read_in_order(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    table = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), table)
    members = {"z/b.json": TEXTS["a.json"], "a.csv": TEXTS["a.csv"], "c.parquet": table.getvalue()}
    members |= {"d.jsonl.gz": gzip.compress(LINES), "readme.md": b"x", "notes.txt": b"x", "__MACOSX/a.csv": b"x"}
    path = write_zip(tmp_path / "set.zip", members)
    names = ["set.zip/a.csv", "set.zip/c.parquet", "set.zip/d.jsonl.gz", "set.zip/z/b.json"]
    assert read(path) == dict.fromkeys(names, ROWS)
    assert sorted(tmp_path.iterdir()) == [path]
    (write_zip(tmp_path / "bad.zip", {"x/a.json": b'[{"a": 1}'}))
    assert message_of(tmp_path / "bad.zip").startswith("bad.zip/x/a.json:1:10: expected an array of rows")


@pytest.mark.parametrize("member", ["../a.jsonl", "/etc/a.jsonl", "x/../../a.jsonl", "..\\a.jsonl", "C:\\a.jsonl"])
def test_an_archive_that_leaves_its_folder_is_refused(tmp_path: Path, member: str) -> None:
    path = write_zip(tmp_path / "a.zip", {"fine.jsonl": LINES, member: LINES})
    assert message_of(path) == (f"a.zip: the archive has a member that leaves its folder: {member!r}. Do not trust it.")


def test_archives_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_zip(tmp_path / "a.zip", {"a.md": b"x", "b.zip": b"x"})
    assert message_of(path) == (
        "a.zip: expected an archive with .json, .jsonl, .ndjson, .csv, .tsv, .parquet, .xlsx, .txt files, found none."
    )
    path.write_bytes(b"PK\x03\x04 not an archive")
    assert message_of(path) == "a.zip: not a readable zip archive: File is not a zip file. Make it anew."
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.jsonl", LINES)
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a.jsonl", LINES)
    assert message_of(path) == "a.zip: the archive has 2 members of one name, 'a.jsonl'. Make it anew."
    data = bytearray(write_zip(path, {"a.jsonl": LINES}).read_bytes())
    directory = data.rindex(b"PK\x01\x02")
    data[directory + 8] |= 1
    path.write_bytes(data)
    assert message_of(path) == "a.zip/a.jsonl: it is encrypted, or packed in a rare way. Unpack the archive first."
    data[directory + 8] ^= 1
    data[directory + 24 : directory + 28] = (1000).to_bytes(4, "little")  # a size that lies
    path.write_bytes(data)
    assert message_of(path) == (
        "a.zip/a.jsonl: a packed file that is damaged or cut off: Bad CRC-32 for file 'a.jsonl'. Pack it anew, or get "
        "it again."
    )
    monkeypatch.setattr(files, "MAX_UNPACKED_BYTES", 1_000_000)
    write_zip(path, {"a.jsonl": LINES, "b.bin": bytes(2_000_000)})
    assert message_of(path).startswith(
        f"a.zip: its {path.stat().st_size:,} bytes unpack to more than 200 times as much"
    )


def test_a_workbook_is_a_zip_archive_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_UNPACKED_BYTES", 1_000_000)
    path = write_zip(tmp_path / "a.xlsx", {"xl/sharedStrings.xml": b" " * 2_000_000})
    assert "bytes unpack to more than 200 times as much, and to more than 1,000,000 bytes" in message_of(path)


# --- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
def test_byte_order_marks_and_utf16(tmp_path: Path, encoding: str, name: str, suffix: str) -> None:
    data = TEXTS[name].decode().encode(encoding)
    (tmp_path / f"{name}{suffix}").write_bytes(PACK[suffix](data) if suffix else data)
    assert read(tmp_path / f"{name}{suffix}") == {f"{name}{suffix}": ROWS}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            '{"prompt": "q"}\n{"prompt": "你好"}'.encode("gb18030"),
            "a.jsonl:2: expected UTF-8 text, found other bytes. Convert it: iconv -f GB18030 -t UTF-8 a.jsonl > "
            "utf8-a.jsonl",
        ),
        (
            "a.csv.gz",
            gzip.compress("prompt,response\n你,好\n".encode("gb18030")),
            "a.csv.gz:2: expected UTF-8 text, found other bytes. Unpack and convert it: iconv -f GB18030 -t UTF-8 "
            "a.csv > utf8-a.csv",
        ),
        ("a.csv", b"prompt,response\nq,\x81\n", "iconv -f ITS_ENCODING -t UTF-8 a.csv"),
        ("a.txt", "好".encode()[:2], "a.txt:1: expected UTF-8 text, found other bytes."),
        (
            "a.json",
            codecs.BOM_UTF16_LE + b"[\0{",
            "a.json: expected utf-16 text, as its first bytes say, but it is damaged. Write it anew as UTF-8.",
        ),
    ],
)
def test_other_encodings_say_how_to_convert(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert message in message_of(tmp_path / name)


def test_other_bytes_are_found_in_a_line_longer_than_a_piece(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"{}\n" + "长".encode() * 700_000 + b"\xff\n")
    assert message_of(tmp_path / "a.jsonl").startswith("a.jsonl:2: expected UTF-8 text")


def test_lines_are_streamed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"prompt": "q"}\n' * 80_000 + b"\xff\xff\n")
    (file,) = data_files(path, path.name, path.name)
    records = read_records(file, "train")
    assert next(records) == (1, '{"prompt": "q"}')  # before the bad end was seen
    with pytest.raises(DataError, match=r"a\.jsonl:80001: expected UTF-8"):
        list(records)


def test_a_file_that_the_system_cannot_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").symlink_to("/proc/self/mem")  # opens, but reading it fails, even for root
    assert message_of(tmp_path / "a.jsonl") == (
        "a.jsonl: the file could not be read: Input/output error. Check its permissions and its disk."
    )
