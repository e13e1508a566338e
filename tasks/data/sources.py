"""Sources: the rows of local files, folders and Hub data sets, one at a time, each usable or rejected with a reason.

Trouble with a file as a whole raises DataError; trouble with a row yields Rejected, so that every row read is accounted
for. Only Parquet and the Hub need a library, which is imported where it is used.
"""

import csv
import difflib
import json
import logging
import re
import sys
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

from tasks.core.config import SourceConfig
from tasks.core.digest import content_digest, file_sha256
from tasks.core.errors import DataError
from tasks.data.formats import BadRow, Rejected, Row, detect_format, excerpt, is_bare_conversation, to_row

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
NOT_ROWS = ("dataset_info.json", "dataset_infos.json")  # LLaMA-Factory's and the Hub's own descriptions of a folder
SNIFFED_ROWS = 50
SNIFFED_CHARS = 1 << 20  # a first line longer than this is taken for an array; rows that long are quarantined anyway
BLANK_CELLS = ("NaN", "nan", "NULL", "null")  # what pandas and databases write into a cell that has no value

Records = Iterator[tuple[int, Any]]
"""Line (or number) and value of each record; the value is a BadRow where the record could not be parsed."""


def read_rows(source: SourceConfig) -> Iterator[Row | Rejected]:
    """Yield every row of a source, at most `source.max_rows`, in the order of its files' names and lines.

    Raises DataError, while being read, for whatever makes a file or data set unreadable as a whole."""
    return islice(_all_rows(source), source.max_rows)


def _all_rows(source: SourceConfig) -> Iterator[Row | Rejected]:
    if is_hub_id(source.path):
        yield from _rows_of(_hub_records(source), source.format, source.path, f"Hub data set {source.path}")
        return
    for name, path in local_files(source.path).items():
        yield from _rows_of(_file_records(path), source.format, name, str(path))


def _rows_of(records: Records, named: str, name: str, where: str) -> Iterator[Row | Rejected]:
    head = list(islice(records, SNIFFED_ROWS))
    if not head:
        raise DataError(f"{where}: expected rows of training data, found none: it is empty. Check how it was written.")
    parsed = [value for _, value in head if not isinstance(value, BadRow)]
    if not parsed:
        line, bad = head[0]
        raise DataError(f"{where}:{line}: no row can be read. {bad.detail} Mend the file, or write it anew.")
    format_ = detect_format(parsed, named, where)
    for line, value in chain(head, records):
        yield to_row(value, format_, name, line)


def source_name(source: SourceConfig) -> str:
    """Return what a report calls a source: its file's or folder's name, or its Hub id."""
    return source.path if is_hub_id(source.path) else Path(source.path).name


def content_identity(source: SourceConfig) -> str:
    """Return what a source's rows are, without parsing: the sha256 of its local files, or hub:<id>@<commit>.

    Raises DataError where the source is not there."""
    if is_hub_id(source.path):
        return f"hub:{source.path}@{hub_commit(source)}"
    files = local_files(source.path)
    try:
        digests = {name: file_sha256(file) for name, file in files.items()}
    except OSError as error:
        raise DataError(_unreadable(source.path, error)) from None
    return content_digest(digests) if Path(source.path).is_dir() else next(iter(digests.values()))


def local_files(path: str) -> dict[str, Path]:
    """Return the data files of a local source by the name rows are labelled with. Raises DataError."""
    if "://" in path or path.startswith("package:"):
        raise DataError(
            f"{path}: expected a local file, a folder or a Hub data set id (owner/name), found a URL. Download it "
            "first."
        )
    root = Path(path)
    if root.is_file():
        if root.suffix.lower() not in SUFFIXES:
            raise DataError(
                f"{path}: expected a file name that ends in {', '.join(SUFFIXES)}, found "
                f"{root.suffix or 'no suffix'}. Convert or rename it."
            )
        return {root.name: root}
    if not root.is_dir():
        raise DataError(f"{path}: there is no such file or folder.{_near_names(root)}")
    files = {
        file.relative_to(root).as_posix(): file
        for file in root.rglob("*")
        if file.is_file() and file.suffix.lower() in SUFFIXES and file.name not in NOT_ROWS
    }
    visible = {name: files[name] for name in sorted(files) if not any(part[0] == "." for part in name.split("/"))}
    if not visible:
        raise DataError(f"{path}: expected a folder with {', '.join(SUFFIXES)} files, found none. Check the path.")
    return visible


def _near_names(path: Path) -> str:
    folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    if folder != path.absolute().parent:
        return f" Its folder does not exist either; {folder} does."
    try:
        names = sorted(file.name for file in folder.iterdir())
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, names, 3, cutoff=0.5)
    if near:
        return f" Did you mean {' or '.join(near)}?"
    data = [name for name in names if Path(name).suffix.lower() in SUFFIXES][:5]
    return f" {folder} has {', '.join(data) or 'no data files'}. Check data.sources."


def _unreadable(path: str | Path, error: OSError) -> str:
    return f"{path}: the file could not be read: {error.strerror or error}. Check its permissions and its disk."


# --- local files ------------------------------------------------------------------------------------------------------


def _file_records(path: Path) -> Records:
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            yield from _parquet_records(path)
            return
        encoding = _encoding(path)
        # newline="\n" keeps U+2028, a lone CR and the like inside their line; csv does its own splitting.
        with path.open(encoding=encoding, newline="" if suffix in (".csv", ".tsv") else "\n") as file:
            yield from _table_records(file, path) if suffix in (".csv", ".tsv") else _json_records(file, path)
    except UnicodeDecodeError as error:
        raise DataError(_not_utf8(path, error.encoding)) from None
    except OSError as error:
        raise DataError(_unreadable(path, error)) from None


def _encoding(path: Path) -> str:
    """Return the encoding that a byte-order mark, or UTF-16's zero bytes, give away; else UTF-8."""
    with path.open("rb") as file:
        head = file.read(4096)
    for mark, encoding in ((b"\xff\xfe\0\0", "utf-32"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16")):
        if head.startswith(mark):
            return encoding
    if head[1:2] == b"\0" or head[0:1] == b"\0":  # ASCII, with which every file of ours begins, as 16 bits
        return "utf-16-le" if head[1:2] == b"\0" else "utf-16-be"
    return "utf-8-sig"


def _not_utf8(path: Path, encoding: str) -> str:
    if not encoding.startswith("utf-8"):
        return f"{path}: expected {encoding} text, as its first bytes say, but it is damaged. Write it anew as UTF-8."
    with path.open("rb") as file:  # the decoder counts from the start of its own buffer: look for the line again
        number, line = next((n, line) for n, line in enumerate(file, 1) if not _decodes(line, "utf-8"))
    name = "GB18030" if _decodes(line, "gb18030") else "ITS_ENCODING"
    return (
        f"{path}:{number}: expected UTF-8 text, found other bytes. Convert it: "
        f"iconv -f {name} -t UTF-8 {path.name} > utf8-{path.name}"
    )


def _decodes(data: bytes, encoding: str) -> bool:
    try:
        data.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def _json_records(file: IO[str], path: Path) -> Records:
    """Yield the records of JSON text, whatever the suffix: lines of objects or of conversations, or one array."""
    head = file.read(SNIFFED_CHARS)
    file.seek(0)
    lines = [line.strip() for line in head.split("\n")]
    if len(head) == SNIFFED_CHARS and len(lines) > 1:
        del lines[-1]  # cut in the middle
    lines = [line for line in lines if line][:20]
    if not lines:
        return
    alone = [value for value in map(_parsed, lines) if not isinstance(value, BadRow)]
    if lines[0].startswith("["):
        if lines[0] != "[" and any(is_bare_conversation(value) for value in alone):
            yield from _line_records(file)
        else:
            yield from _array_records(file, path)
    elif any(isinstance(value, dict) for value in alone) or len(lines) == 1:
        yield from _line_records(file)
    else:
        yield 1, _whole(file.read(), path)


def _line_records(file: IO[str]) -> Records:
    for number, line in enumerate(file, 1):
        if text := line.strip():
            yield number, _parsed(text)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        return BadRow("invalid_json", f"Not valid JSON at column {error.colno}: {error.msg}.", excerpt(text))
    except (ValueError, RecursionError):
        return BadRow("invalid_json", "The JSON is nested too deeply, or has a number too long to read.", excerpt(text))


def _whole(text: str, path: Path) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(_invalid_json(path, error.lineno, error.colno, error.msg)) from None
    except (ValueError, RecursionError):
        raise DataError(_invalid_json(path, 1, 1, "nested too deeply, or a number too long to read")) from None


def _invalid_json(path: Path, line: int, column: int, message: str) -> str:
    return (
        f"{path}:{line}:{column}: expected an array of rows, or one row per line, found invalid JSON: {message}. "
        "Mend the file, or write it anew if it was cut off."
    )


class _Window:
    """The part of a text file that is being parsed, and where in the file it begins."""

    def __init__(self, file: IO[str], path: Path) -> None:
        self.file, self.path = file, path
        self.text, self.at, self.line, self.column = "", 0, 1, 1

    def grow(self) -> bool:
        """Drop what was parsed and read on; False at the end of the file. Doubling keeps long records linear."""
        done, self.text, self.at = self.text[: self.at], self.text[self.at :], 0
        self.line, self.column = self._place(done, len(done))
        more = self.file.read(max(1 << 20, len(self.text)))
        self.text += more
        return bool(more)

    def _place(self, text: str, at: int) -> tuple[int, int]:
        newline = text.rfind("\n", 0, at)
        column = at - newline if newline >= 0 else self.column + at
        return self.line + text.count("\n", 0, at), column

    def error(self, message: str, at: int | None = None) -> DataError:
        return DataError(
            _invalid_json(self.path, *self._place(self.text, self.at if at is None else at), message.rstrip("."))
        )

    def peek(self) -> str:
        """Return the next character that is not white space, or nothing at the end of the file."""
        while True:
            while self.at < len(self.text):
                if self.text[self.at] not in " \t\r\n":
                    return self.text[self.at]
                self.at += 1
            if not self.grow():
                return ""

    def value(self) -> Any:
        """Return the JSON value that begins here, and step over it."""
        decoder = json.JSONDecoder()
        while True:
            try:
                value, end = decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                into = error.pos - self.at
                if not self.grow():  # which moves the value to the window's start, whether or not there is more
                    raise self.error(error.msg, self.at + into) from None
                continue
            except (ValueError, RecursionError):
                raise self.error("nested too deeply, or a number too long to read") from None
            if end == len(self.text) and self.grow():  # 12 may be the start of 123
                continue
            self.at = end
            return value


def _array_records(file: IO[str], path: Path) -> Records:
    """Yield the items of one JSON array, numbered from 1, holding one at a time in memory."""
    window = _Window(file, path)
    window.peek()
    window.at += 1  # the bracket, which is why we are here
    number = 0
    more = window.peek() != "]"
    while more:
        number += 1
        window.peek()
        yield number, window.value()
        following = window.peek()
        if following not in (",", "]"):
            raise window.error("Expecting ',' or ']'" if following else "the array is never closed")
        more = following == ","
        window.at += more
    window.at += 1
    if window.peek():
        raise window.error("more text after the array's end")


def _table_records(file: IO[str], path: Path) -> Records:
    csv.field_size_limit(sys.maxsize)  # its default, 131,072, would refuse what max_chars is there to judge
    header = file.readline()
    file.seek(0)
    separator = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=header.count)
    table = csv.reader(file, delimiter=separator, strict=True)
    names: list[str] | None = None
    while True:
        line = table.line_num + 1
        try:
            cells = next(table)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end" in str(error):
                raise DataError(
                    f"{path}:{line}: a quoted cell that begins in this row is never closed. Double the quotes inside "
                    "cells, or write the file anew."
                ) from None
            yield line, BadRow("invalid_csv", f"Not a valid row: {error}.")
            continue
        if not any(cell.strip() for cell in cells):
            continue
        if names is None:
            names = [cell.strip() for cell in cells]
            if len(set(names)) < len(names):
                raise DataError(f"{path}:{line}: column names must differ, found {', '.join(names)}. Rename one.")
        elif len(cells) != len(names):
            detail = f"Found {len(cells)} cells; expected {len(names)}: {', '.join(names)}."
            yield line, BadRow("wrong_column_count", detail, excerpt(separator.join(cells)))
        else:
            yield line, {n: None if cell in BLANK_CELLS else cell for n, cell in zip(names, cells, strict=True)}


def _parquet_records(path: Path) -> Records:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
    except pyarrow.ArrowException as error:
        where = f" after row {number}" if number else ""
        raise DataError(
            f"{path}: not a readable Parquet file{where}: {_one_line(error)}. Write it anew, or download it again."
        ) from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".")


# --- the Hub ----------------------------------------------------------------------------------------------------------


def is_hub_id(path: str) -> bool:
    """Return whether `path` is a Hub data set id: name or owner/name, no data file's suffix, and nothing local."""
    return (
        re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", path) is not None
        and Path(path).suffix.lower() not in (*SUFFIXES, ".txt", ".gz", ".zip", ".xlsx")
        and not Path(path).exists()
    )


def hub_commit(source: SourceConfig) -> str:
    """Return the commit that a Hub data set's revision names now; offline, the one it named when it was downloaded.

    Raises DataError where the data set is absent, gated, or neither reachable nor downloaded."""
    revision = source.revision or "main"
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError
    from huggingface_hub.file_download import repo_folder_name

    try:
        # Asking for a file, not for the commit, notes in the cache what the revision names, for use offline.
        return Path(hf_hub_download(source.path, "README.md", repo_type="dataset", revision=revision)).parent.name
    except EntryNotFoundError as error:  # without a README, or offline: the note is there if it ever was online
        folder = repo_folder_name(repo_id=source.path, repo_type="dataset")
        note = Path(constants.HF_HUB_CACHE) / folder / "refs" / revision
        if not note.is_file():
            raise DataError(_hub_sentence(source, error)) from error
        return note.read_text(encoding="utf-8").strip()
    except Exception as error:  # the Hub's library also passes its HTTP client's exceptions on
        raise DataError(_hub_sentence(source, error)) from error


def _hub_records(source: SourceConfig) -> Records:
    commit = hub_commit(source)
    import datasets

    datasets.disable_progress_bars()
    for library in ("datasets", "huggingface_hub"):  # their warnings are about caches and README headers
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        rows = datasets.load_dataset(source.path, source.subset, split=source.split, revision=commit)
    except Exception as error:  # datasets has a dozen types for this, and passes those of four other libraries on
        raise DataError(_hub_sentence(source, error)) from error
    files = [Path(file["filename"]) for file in rows.cache_files]
    if any(commit not in file.parts for file in files):  # offline, datasets takes whatever commit it has
        raise DataError(
            f"Hub data set {source.path} is downloaded at another commit than {commit[:12]}, and the Hub cannot be "
            "reached (offline). Run once while online, or name the downloaded commit as data.sources revision."
        )
    yield from enumerate(rows, 1)


def _hub_sentence(source: SourceConfig, error: Exception) -> str:
    """Return what is wrong with a Hub data set, and what to do, from the exception its libraries raised."""
    name, kinds = source.path, {kind.__name__ for kind in type(error).__mro__}
    text = _one_line(error)
    if "GatedRepoError" in kinds or "gated dataset" in text:
        return (
            f"Hub data set {name} is gated. Accept its terms at https://huggingface.co/datasets/{name}, then log in "
            "with hf auth login."
        )
    if "RevisionNotFoundError" in kinds or text.startswith("Revision "):
        return f"Hub data set {name} has no revision {source.revision!r}. Correct data.sources revision, or drop it."
    if kinds & {"RepositoryNotFoundError", "DatasetNotFoundError", "HFValidationError"}:
        return (
            f"There is no file, folder or Hub data set {name} that you can read. Check the spelling; for a private "
            "one, log in with hf auth login."
        )
    if kinds & {"OfflineModeIsEnabled", "TransportError", "ConnectionError", "LocalEntryNotFoundError"}:
        return (
            f"{name} is not a file or folder here, and as a Hub data set it is not downloaded and the Hub cannot be "
            "reached (offline). Give a local file, or fetch it once while online."
        )
    return (
        f"Hub data set {name} (subset {source.subset or 'default'}, split {source.split}) could not be loaded: {text}. "
        "Check data.sources subset and split."
    )
