"""Files: which names hold rows, and a file's bytes and text, whether packed (gzip, Zstandard, zip) or not.

Everything is a stream, and nothing is unpacked onto the disk; what unpacks to far more than data does is refused before
it fills the memory. What a text says is deliberately not asked here (records.py).
"""

import codecs
import errno
import gzip
import io
import lzma
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

from tasks.core.errors import DataError
from tasks.data.formats import BadRow, excerpt, printable

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".xlsx", ".txt", ".zip")
STREAMED = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt")
TABLES = (".csv", ".tsv", ".xlsx")
PACKED = (".gz", ".zst", ".zstd")  # around a streamed one
ARCHIVES = (".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar", ".bz2", ".xz", ".lz4", ".z", *PACKED)
WORKBOOKS = (".xls", ".xlsm", ".xlsb", ".ods")
# Descriptions of a folder (LLaMA-Factory's, the Hub's) and texts beside data; not the data.
NOT_ROWS = re.compile(r"(?i)dataset_infos?\.json|(readme|licen[cs]e|notice|changelog|requirements)[^/]*\.txt")
GZIP, ZSTANDARD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"

MAX_RECORD_CHARS = 100_000_000  # up to 4 bytes each: 400 MB while such a record is read
# Text and JSON pack 3 to 20 times smaller, one repeated value 100 times; DEFLATE's limit is 1,032. What unpacks to less
# than 1 GiB is done in seconds, whatever its ratio.
MAX_UNPACKED_BYTES = 1 << 30
MAX_UNPACKED_RATIO = 200
PIECE = 1 << 20


@dataclass(frozen=True)
class DataFile:
    """One file of rows, or one member of a zip archive. `where` is what messages call it; `size_bytes` is as packed."""

    name: str
    where: str
    size_bytes: int
    open: Callable[[], Any]
    """Returns a binary file with `peek`, at its start."""

    @property
    def suffix(self) -> str:
        return data_suffix(self.name)


# --- names ------------------------------------------------------------------------------------------------------------


def data_suffix(name: str) -> str:
    """Return the suffix that says what a data file holds, looking through .gz and .zst, or nothing if it is no data."""
    path = PurePosixPath(name.lower())
    if path.suffix in PACKED:
        inner = PurePosixPath(path.stem).suffix
        return inner if inner in STREAMED else ""
    return path.suffix if path.suffix in SUFFIXES else ""


def data_names(names: Iterable[str]) -> list[str]:
    """Return those names of a folder that hold rows, in order. Hidden ones do not, nor descriptions of data; .txt files
    only do where there is nothing else, because beside data they are labels, lists and notes."""
    found = sorted(
        name
        for name in names
        if data_suffix(name)
        and not any(part.startswith((".", "__MACOSX")) for part in name.split("/"))
        and not NOT_ROWS.fullmatch(name.rpartition("/")[2])
    )
    return [name for name in found if data_suffix(name) != ".txt"] or found


def refusal(name: str) -> str:
    """Return why a file of this name is not read, and what to do."""
    suffix = PurePosixPath(name.lower()).suffix
    if suffix in ARCHIVES:
        return (
            f"{suffix} is not unpacked here: of packed files zip is, and gzip and zstd around {', '.join(STREAMED)}. "
            "Unpack it first, and name what was in it."
        )
    if suffix in WORKBOOKS:
        return f"of workbooks only .xlsx is read, found {suffix}. Save it as .xlsx or .csv."
    return (
        f"expected a file name that ends in {', '.join(SUFFIXES)}, found {suffix or 'no suffix'}. Convert or rename it."
    )


def unreadable(where: str | Path, error: OSError) -> str:
    return f"{where}: the file could not be read: {error.strerror or error}. Check its permissions and its disk."


def is_from_system(error: OSError) -> bool:
    """Return whether the disk or the network is to blame, not what a file holds: an archive may point to before its
    start, which is an invalid argument, and gzip and Zstandard raise OSError without a number for what they read."""
    return error.errno not in (None, errno.EINVAL)


def one_line(error: Exception) -> str:
    said = error.args[0] if isinstance(error, KeyError) and error.args else getattr(error, "strerror", None) or error
    return printable(str(said))[:200].rstrip(".") or type(error).__name__


# --- packed files -----------------------------------------------------------------------------------------------------


def data_files(path: Path, name: str, where: str) -> list[DataFile]:
    """Return the one file of rows that a file is, or the several that a zip archive holds; it is never extracted.

    Raises DataError for an archive that is damaged, encrypted, without data, or unsafe to unpack."""
    try:
        if data_suffix(name) != ".zip":
            return [DataFile(name, where, path.stat().st_size, partial(path.open, "rb"))]
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in _checked_members(archive, path.stat().st_size, where)}
    except DataError:
        raise
    except Exception as error:  # zipfile passes on what numbers and names raise that it did not expect
        if isinstance(error, OSError) and is_from_system(error):
            raise DataError(unreadable(where, error)) from None
        raise DataError(f"{where}: not a readable zip archive: {one_line(error)}. Make it anew.") from None
    names = [member for member in data_names(members) if data_suffix(member) != ".zip"]
    if not names:
        raise DataError(f"{where}: expected an archive with {', '.join(SUFFIXES[:-1])} files, found none.")
    for member in names:
        if members[member].flag_bits & 1 or members[member].compress_type not in (0, 8, 12, 14):
            raise DataError(
                f"{where}/{printable(member)}: it is encrypted, or packed in a rare way. Unpack the archive first."
            )
    return [
        DataFile(
            f"{name}/{printable(member)}",
            f"{where}/{printable(member)}",
            members[member].compress_size,
            partial(_open_member, path, member),
        )
        for member in names
    ]


def _checked_members(archive: zipfile.ZipFile, packed_bytes: int, where: str) -> list[zipfile.ZipInfo]:
    members = [info for info in archive.infolist() if not info.is_dir()]
    for name, count in Counter(info.filename for info in members).items():
        if name.startswith(("/", "\\")) or ":" in name[:2] or ".." in re.split(r"[/\\]", name):
            raise DataError(f"{where}: the archive has a member that leaves its folder: {name!r}. Do not trust it.")
        if count > 1:
            raise DataError(f"{where}: the archive has {count} members of one name, {name!r}. Make it anew.")
    check_unpacked(members, packed_bytes, where)
    return members


def _open_member(path: Path, member: str) -> Any:
    try:
        with zipfile.ZipFile(path) as archive:  # the member keeps the file open until it is closed itself
            return archive.open(member)
    except (RuntimeError, ValueError) as error:  # what it is packed with, or its name, is not what zipfile knows
        raise zipfile.BadZipFile(one_line(error)) from None


def check_unpacked(members: Iterable[zipfile.ZipInfo], packed_bytes: int, where: str) -> None:
    """Raise DataError for a zip bomb. Sizes may lie, but zipfile stops at them, and then the checksum is wrong."""
    size_bytes = sum(member.file_size for member in members)
    if size_bytes > MAX_UNPACKED_BYTES and size_bytes > MAX_UNPACKED_RATIO * packed_bytes:
        raise DataError(_bomb(where, packed_bytes))


def _bomb(where: str, packed_bytes: int) -> str:
    return (
        f"{where}: its {packed_bytes:,} bytes unpack to more than {MAX_UNPACKED_RATIO} times as much, and to more than "
        f"{MAX_UNPACKED_BYTES:,} bytes; no data packs so well. If you trust it, unpack it first."
    )


class _Unpacked(io.RawIOBase):
    """The bytes of a packed stream, as long as they are not too many."""

    def __init__(self, stream: Any, file: DataFile) -> None:
        self.stream, self.file, self.total = stream, file, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count: int = self.stream.readinto(buffer)
        self.total += count
        if self.total > MAX_UNPACKED_BYTES and self.total > MAX_UNPACKED_RATIO * self.file.size_bytes:
            raise DataError(_bomb(self.file.where, self.file.size_bytes))
        return count


@contextmanager
def _open_bytes(file: DataFile) -> Iterator[Any]:
    """Yield a file's bytes, unpacked. The first ones tell whether it is: browsers and servers unpack unasked."""
    with file.open() as stream:
        magic = stream.peek(4)[:4]
        if magic[:2] == GZIP:
            with io.BufferedReader(_Unpacked(gzip.GzipFile(fileobj=stream, mode="rb"), file), PIECE) as data:
                yield data
        elif magic == ZSTANDARD:
            import pyarrow  # whose reader, unlike zstandard's, does not take what was cut off for whole

            with io.BufferedReader(_Unpacked(pyarrow.CompressedInputStream(stream, "zstd"), file), PIECE) as data:
                yield data
        else:
            yield stream


@contextmanager
def telling_damage(file: DataFile) -> Iterator[None]:
    """Raise what goes wrong while a file is read as DataError."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(_not_utf8(file, error.encoding)) from None
    except (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile) as error:
        raise DataError(_damaged(file, error)) from None
    except OSError as error:
        raise DataError(unreadable(file.where, error) if is_from_system(error) else _damaged(file, error)) from None


def _damaged(file: DataFile, error: Exception) -> str:
    return f"{file.where}: a packed file that is damaged or cut off: {one_line(error)}. Pack it anew, or get it again."


# --- text -------------------------------------------------------------------------------------------------------------


@contextmanager
def open_text(file: DataFile, newline: str | None) -> Iterator[IO[str]]:
    """Yield a file's text; `newline` is open's."""
    with _open_bytes(file) as data, io.TextIOWrapper(data, _encoding(data.peek(4)[:4]), newline=newline) as text:
        yield text


def _encoding(head: bytes) -> str:
    """Return the encoding that a byte-order mark, or UTF-16's zero bytes, give away; else UTF-8."""
    for mark, encoding in (
        (b"\xff\xfe\0\0", "utf-32"),
        (b"\0\0\xfe\xff", "utf-32"),
        (b"\xff\xfe", "utf-16"),
        (b"\xfe\xff", "utf-16"),
        (b"\xef\xbb\xbf", "utf-8-sig"),
    ):
        if head.startswith(mark):
            return encoding
    if head[1:2] == b"\0" or head[0:1] == b"\0":  # ASCII, with which every file of ours begins, as 16 bits
        return "utf-16-le" if head[1:2] == b"\0" else "utf-16-be"
    return "utf-8"


def read_lines(text: IO[str]) -> Iterator[tuple[int, str | BadRow]]:
    """Yield number and text of each line; of one that is too long, a BadRow with its start."""
    number = 0
    while line := text.readline(MAX_RECORD_CHARS + 1):
        number += 1
        if len(line) <= MAX_RECORD_CHARS or line.endswith("\n"):
            yield number, line
            continue
        bad = BadRow("line_too_long", f"The line has more than {MAX_RECORD_CHARS:,} characters.", excerpt(line))
        while line and not line.endswith("\n"):
            line = text.readline(PIECE)
        yield number, bad


def _not_utf8(file: DataFile, encoding: str) -> str:
    if not encoding.startswith("utf-8"):
        return (
            f"{file.where}: expected {encoding[:6]} text, as its first bytes say, but it is damaged. Write it anew as "
            "UTF-8."
        )
    decoder = codecs.getincrementaldecoder("utf-8")()
    number = 1
    with _open_bytes(file) as data:  # the decoder counted from the start of its buffer: look for the line again
        while (piece := data.readline(PIECE)) and _decodes(decoder, piece):
            number += piece.endswith(b"\n")
    name = "GB18030" if piece and _decodes(codecs.getincrementaldecoder("gb18030")(), piece) else "ITS_ENCODING"
    text = PurePosixPath(file.name).name
    act = "Convert"
    if text.lower().endswith(PACKED):
        act, text = "Unpack and convert", text.rpartition(".")[0]
    return (
        f"{file.where}:{number}: expected UTF-8 text, found other bytes. {act} it: "
        f"iconv -f {name} -t UTF-8 {text} > utf8-{text}"
    )


def _decodes(decoder: codecs.IncrementalDecoder, data: bytes) -> bool:
    try:
        decoder.decode(data)
    except UnicodeDecodeError:
        return False
    return True
