"""Records: how a file becomes records, whether JSON in one of its layouts, a table, Parquet, Excel or text.

Memory holds a record, not the file. JSON is passed on as text, so that other processes can parse it. What a record
means is deliberately not asked here (formats.py), nor where files are (sources.py) and how they are packed (files.py).
"""

import csv
import io
import json
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import IO, Any

from tasks.core.errors import DataError
from tasks.data.files import (
    MAX_RECORD_CHARS,
    PIECE,
    DataFile,
    check_unpacked,
    is_from_system,
    one_line,
    open_text,
    read_lines,
    telling_damage,
)
from tasks.data.formats import BadRow, excerpt, is_bare_conversation, listed

SNIFFED_CHARS = 1 << 20  # a first line longer than this is taken for an array; rows that long are quarantined anyway
SNIFFED_LINES = 20
CUT_CHARS = 16  # a JSON error this near to the end of what was read may be a cut escape, number or -Infinity
PARAGRAPH_CHARS = 200  # lines longer than this, on average, are paragraphs: wrapped text has 80 or 120
BLANK_CELLS = ("NaN", "nan", "NULL", "null")  # what pandas and databases write into a cell that has no value
EXCEL_ROWS = 1 << 20  # as many as a sheet can have
ROW_LISTS = ("data", "rows", "examples")
SPLITS = ("train", "training", "valid", "validation", "val", "dev", "test", "eval", "evaluation")

Records = Iterator[tuple[int, Any]]
"""Line (or number) and value of each record; the value is a BadRow where the record could not be read."""

_NOT_SPACE = re.compile(r"[^ \t\r\n]")
_DECODER = json.JSONDecoder()


class JsonText(str):
    """JSON that is still to be parsed, which parse_record does."""

    __slots__ = ()


def parse_record(value: Any) -> Any:
    """Return a record's value, parsed if it is JsonText, or the BadRow that says why it cannot be."""
    if not isinstance(value, JsonText):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        return BadRow("invalid_json", f"Not valid JSON at column {error.colno}: {error.msg}.", excerpt(value))
    except (ValueError, RecursionError):
        detail = "The JSON is nested too deeply, or has a number too long to read."
        return BadRow("invalid_json", detail, excerpt(value))


def read_records(file: DataFile, split: str) -> Records:
    """Yield a file's records; of a JSON file that holds several splits as lists, those of `split`.

    Raises DataError, while being read, for whatever makes the file unreadable as a whole."""
    with telling_damage(file):
        yield from _READERS[file.suffix](file, split)


# --- JSON -------------------------------------------------------------------------------------------------------------


def _json_records(file: DataFile, split: str) -> Records:
    """Yield the records of JSON text, whatever the suffix: lines, one array, or an object that holds lists of rows."""
    # newline="\n" keeps U+2028, a lone CR and the like inside their line.
    with open_text(file, "\n") as text:
        layout = _json_layout(text.read(SNIFFED_CHARS), split)
    with open_text(file, "\n") as text:
        if layout == "lines":
            yield from _line_records(text)
            return
        window = _Window(text, file.where)
        if layout == "array":
            yield from window.items()
        elif layout == "lists":
            yield from _listed_records(window, split)
        else:
            yield 1, window.value()
        if window.peek():
            raise window.error("more text after the end")


def _json_layout(head: str, split: str) -> str:
    """Return how a file that begins with `head` is laid out: lines, array, lists (in an object) or one (row)."""
    lines = [line.strip() for line in head.split("\n")]
    if len(head) == SNIFFED_CHARS and len(lines) > 1:
        del lines[-1]  # cut in the middle
    lines = [line for line in lines if line][:SNIFFED_LINES]
    if not lines:
        return "lines"
    values = [parse_record(JsonText(line)) for line in lines]
    if lines[0].startswith("["):
        one_by_one = sum(isinstance(value, list) for value in values) > 1 or is_bare_conversation(values[0])
        return "lines" if one_by_one and lines[0] != "[" else "array"
    if not (len(lines) > 1 and isinstance(values[0], dict)) and _begins_with_lists(head, split):
        return "lists"
    return "lines" if len(lines) == 1 or any(isinstance(value, dict) for value in values) else "one"


def _begins_with_lists(head: str, split: str) -> bool:
    """Return whether an object has a list of rows under the name of a split, or under a name like data."""
    window = _Window(io.StringIO(head), "")
    try:
        for key in window.keys():  # noqa: SIM118
            if window.peek() == "[" and key in (split, *ROW_LISTS, *SPLITS):
                first = _NOT_SPACE.search(window.text, window.at + 1)
                return first is None or first.group() in "{[]"
            window.value()
    except DataError:  # not an object, or cut off before any list
        return False
    return False


def _listed_records(window: "_Window", split: str) -> Records:
    """Yield the rows that an object keeps under the name of the split, or under a name like data."""
    found: list[str] = []
    lists: list[str] = []
    for key in window.keys():  # noqa: SIM118
        if window.peek() != "[":
            window.value()
            continue
        lists.append(key)
        wanted = key in (split, *ROW_LISTS)
        if wanted and found:
            raise DataError(f"{window.where}: rows are under both {found[0]} and {key}. Rename or remove one of them.")
        found += [key] * wanted
        for record in window.items():
            if wanted:
                yield record
    if not found:
        raise DataError(
            f"{window.where}: there is no split {split}; the file holds {listed(lists)}. Name one of these as "
            "data.sources split."
        )


def _line_records(text: IO[str]) -> Records:
    for number, line in read_lines(text):
        if isinstance(line, BadRow):
            yield number, line
        elif record := line.strip():
            yield number, JsonText(record)


class _Window:
    """The part of a JSON text that is being read, and where in the file it begins."""

    def __init__(self, file: IO[str], where: str) -> None:
        self.file, self.where = file, where
        self.text, self.at, self.line, self.column = "", 0, 1, 1

    def grow(self) -> bool:
        """Drop what was read and read on; False at the end of the file. Doubling keeps long records linear."""
        done, self.text, self.at = self.text[: self.at], self.text[self.at :], 0
        self.line, self.column = self._place(done, len(done))
        if len(self.text) > MAX_RECORD_CHARS:
            raise self.error(
                f"a row of more than {MAX_RECORD_CHARS:,} characters begins here, or a quote is never closed"
            )
        more = self.file.read(max(PIECE, len(self.text)))
        self.text += more
        return bool(more)

    def _place(self, text: str, at: int) -> tuple[int, int]:
        newline = text.rfind("\n", 0, at)
        column = at - newline if newline >= 0 else self.column + at
        return self.line + text.count("\n", 0, at), column

    def error(self, message: str, at: int | None = None) -> DataError:
        line, column = self._place(self.text, self.at if at is None else at)
        return DataError(
            f"{self.where}:{line}:{column}: expected an array of rows, or one row per line, found invalid JSON: "
            f"{message.rstrip('.')}. Mend the file, or write it anew if it was cut off."
        )

    def peek(self) -> str:
        """Return the next character that is not white space, or nothing at the end of the file."""
        while True:
            if found := _NOT_SPACE.search(self.text, self.at):
                self.at = found.start()
                return found.group()
            self.at = len(self.text)
            if not self.grow():
                return ""

    def value(self) -> JsonText:
        """Return the JSON value that begins here, and step over it."""
        self.peek()
        while True:
            start = self.at
            try:
                _, end = _DECODER.raw_decode(self.text, start)
            except json.JSONDecodeError as error:
                is_cut = error.pos > len(self.text) - CUT_CHARS or error.msg.startswith("Unterminated")
                if is_cut and self.grow():  # which moves the value to the window's start, whether or not there is more
                    continue
                raise self.error(error.msg, self.at + error.pos - start) from None
            except (ValueError, RecursionError):
                raise self.error("nested too deeply, or a number too long to read") from None
            if end > len(self.text) - CUT_CHARS and self.grow():  # 12 may be the start of 12.5e3
                continue
            start, self.at = self.at, self.at + end - start
            return JsonText(self.text[start : self.at])

    def items(self) -> Records:
        """Yield the items of the array that begins here, numbered from 1, and step over its end."""
        for number, _ in enumerate(self._parts("]"), 1):
            yield number, self.value()

    def keys(self) -> Iterator[str]:
        """Yield the keys of the object that begins here; whoever takes one must step over its value."""
        for _ in self._parts("}"):
            if self.peek() != '"':
                raise self.error("Expecting property name enclosed in double quotes")
            key = json.loads(self.value())
            if self.peek() != ":":
                raise self.error("Expecting ':' delimiter")
            self.at += 1
            yield key

    def _parts(self, end: str) -> Iterator[None]:
        """Yield before each part of the array or object that begins here."""
        if self.peek() not in ("[", "{"):
            raise self.error("Expecting value")
        self.at += 1
        more = self.peek() != end
        while more:
            yield
            following = self.peek()
            if following not in (",", end):
                raise self.error(f"Expecting ',' or '{end}'" if following else "it is never closed")
            more = following == ","
            self.at += more
        self.at += 1


# --- text -------------------------------------------------------------------------------------------------------------


def _text_records(file: DataFile, split: str) -> Records:
    """Yield the paragraphs of a text, each numbered by its first line: what blank lines set apart, or, where there are
    none and the lines are long, the lines."""
    with open_text(file, None) as text:
        head = text.read(SNIFFED_CHARS)
    by_line = not re.search(r"\n[ \t]*\n", head) and len(head) > PARAGRAPH_CHARS * (head.count("\n") + 1)
    with open_text(file, None) as text:
        block: list[str] = []
        bad: BadRow | None = None
        first = chars = 0
        for number, line in chain(read_lines(text), [(0, "")]):
            blank = isinstance(line, str) and not line.strip()
            if not (bad or block):
                first = number
            if isinstance(line, BadRow):
                bad = bad or line
            elif not (bad or blank):
                block.append(line)
                chars += len(line)
                if chars > MAX_RECORD_CHARS:
                    detail = f"The paragraph has more than {MAX_RECORD_CHARS:,} characters."
                    bad, block = BadRow("line_too_long", detail, excerpt(block[0])), []
            if (blank or by_line) and (bad or block):
                yield first, bad or {"text": "".join(block).rstrip("\n")}
                block, bad, chars = [], None, 0


# --- tables -----------------------------------------------------------------------------------------------------------


def _csv_records(file: DataFile, split: str) -> Records:
    with open_text(file, "") as text:  # csv does its own splitting
        yield from _named_cells(_csv_rows(text, file), file.where)


def _csv_rows(text: IO[str], file: DataFile) -> Iterator[tuple[int, list[str] | BadRow]]:
    csv.field_size_limit(MAX_RECORD_CHARS)  # its default, 131,072, would refuse what max_chars is there to judge
    lines = _csv_lines(text, file.where)
    header = next(lines, "")
    separator = "\t" if file.suffix == ".tsv" else max(",;\t", key=header.count)
    row_lines: list[str] = []
    table = csv.reader(_noted(chain([header], lines), row_lines), delimiter=separator, strict=True)
    while True:
        line = table.line_num + 1
        row_lines.clear()
        try:
            yield line, next(table)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end" in str(error) or "field limit" in str(error):
                raise DataError(
                    f"{file.where}:{line}: a quoted cell that begins in this row is never closed, or has more than "
                    f"{MAX_RECORD_CHARS:,} characters. Double the quotes inside cells, or write the file anew."
                ) from None
            said = str(error).replace("\t", "\\t")  # it names the separator
            yield line, BadRow("invalid_csv", f"Not a valid row: {said}.", excerpt("".join(row_lines)))


def _noted(lines: Iterator[str], noted: list[str]) -> Iterator[str]:
    for line in lines:
        noted.append(line)
        yield line


def _csv_lines(text: IO[str], where: str) -> Iterator[str]:
    for number, line in read_lines(text):
        if isinstance(line, BadRow):
            raise DataError(f"{where}:{number}: {line.detail} Check that it is a table, or write the file anew.")
        yield line


def _named_cells(rows: Iterable[tuple[int, Any]], where: str) -> Records:
    """Yield the rows of a table with the names that its first row gives."""
    names: list[str] | None = None
    for line, cells in rows:
        if isinstance(cells, BadRow):
            yield line, cells
        elif not any(cell is not None and str(cell).strip() for cell in cells):
            continue
        elif names is None:
            names = ["" if cell is None else str(cell).strip() for cell in cells]
            if len(set(names)) < len(names):
                raise DataError(f"{where}:{line}: column names must differ, found {listed(names)}. Rename one.")
        elif len(cells) != len(names):
            detail = f"Found {len(cells)} cells; expected {len(names)}: {listed(names)}."
            yield line, BadRow("wrong_column_count", detail, excerpt(",".join(map(str, cells))))
        else:
            yield line, {n: None if cell in BLANK_CELLS else cell for n, cell in zip(names, cells, strict=True)}


def _excel_records(file: DataFile, split: str) -> Records:
    return _named_cells(_excel_rows(file), file.where)


def _excel_rows(file: DataFile) -> Iterator[tuple[int, list[Any]]]:
    """Yield the rows of a workbook's first sheet, each as long as its header or longer."""
    import openpyxl  # type: ignore[import-untyped]

    width = 0
    try:
        with file.open() as data:
            with zipfile.ZipFile(data) as archive:
                check_unpacked(archive.infolist(), file.size_bytes, file.where)
            with warnings.catch_warnings(action="ignore"):  # about styles and other things that are not read
                sheet = openpyxl.load_workbook(data, read_only=True, data_only=True).worksheets[0]
            sheet.reset_dimensions()  # what the file declares may leave rows out
            for line, cells in enumerate(sheet.iter_rows(values_only=True), 1):
                if line > EXCEL_ROWS:  # a row may give itself any number, and those before it are then made up
                    raise ValueError(f"a sheet has at most {EXCEL_ROWS:,} rows")
                used = max((n for n, cell in enumerate(cells, 1) if cell is not None), default=0)
                width = width or used
                yield line, [*cells[:used], *[None] * (width - used)]
    except DataError:
        raise
    except Exception as error:  # openpyxl passes on what zip, XML and numbers raise
        raise DataError(
            f"{file.where}: not a readable Excel file: {one_line(error)}. Save it as .xlsx anew, or as .csv."
        ) from None


def _parquet_records(file: DataFile, split: str) -> Records:
    from pyarrow import parquet

    number = 0
    try:
        # A buffer reads a column's pages as they are needed, not a row group, which may be the whole file.
        with file.open() as data, parquet.ParquetFile(data, buffer_size=PIECE) as table:
            names = table.schema_arrow.names
            if len(set(names)) < len(names):  # of which to_pylist would keep the last
                raise DataError(f"{file.where}: column names must differ, found {listed(names)}. Rename one.")
            for batch in table.iter_batches(batch_size=256):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
    except DataError:
        raise
    except Exception as error:  # Arrow passes on what text, dates and time zones raise
        if isinstance(error, OSError) and is_from_system(error):
            raise
        after = f" after row {number}" if number else ""
        raise DataError(
            f"{file.where}: not a readable Parquet file{after}: {one_line(error)}. Write it anew, or download it again."
        ) from None


_READERS: dict[str, Callable[[DataFile, str], Records]] = {
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), _json_records),
    **dict.fromkeys((".csv", ".tsv"), _csv_records),
    ".parquet": _parquet_records,
    ".xlsx": _excel_records,
    ".txt": _text_records,
}
