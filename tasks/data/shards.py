"""Shards: some thousand records at a time, cleaned on their own, so that every core (or a cluster) has one to do.

A shard goes in and comes out as bytes; what has to be compared across shards leaves as small arrays beside the rows.
A cleaned shard is a file with all of this, its rows first, so that who goes on after a process that was killed has it.
"""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.core.config import DataConfig, SourceConfig
from tasks.core.digest import sha256
from tasks.data.clean import clean_row
from tasks.data.duplicates import sketch_conversations
from tasks.data.formats import BadRow, Message, Rejected, Row, conversation_digest, excerpt, fill_placeholders, to_row
from tasks.data.leakage import ItemIndex, find_leaks
from tasks.data.records import JsonText, parse_record
from tasks.data.sources import SourceFile

SHARD_ROWS = 8192
SHARD_CHARS = 16 << 20
DIGEST_BYTES = 32
_JSON = json.JSONEncoder(ensure_ascii=False)  # made once: json.dumps would make one for each row
HOPELESS = 10
"""Times data.max_chars: no cleaning makes so long a row fit, and of 100 MB it would take minutes and 5 GB."""


@dataclass(frozen=True)
class Origin:
    """What a shard's records have in common: they are of one file."""

    name: str
    format: str
    source: SourceConfig


@dataclass(frozen=True)
class CleanShard:
    """`rows` and `rejected` are JSON Lines. The arrays have an entry per row: `digests` (rows, 2) of the conversation,
    `questions` of its first question, `keys` (BANDS, rows) and `sketches` (rows, SKETCH_BYTES) of near duplicates."""

    rows: bytes
    rejected: bytes
    lines: NDArray[np.int64]
    digests: NDArray[np.uint64]
    questions: NDArray[np.uint64]
    keys: NDArray[np.uint64]
    sketches: NDArray[np.uint8]
    read: int
    quarantined: dict[str, int]
    repairs: dict[tuple[str, ...], NDArray[np.int64]]
    """Numbers of the rows that were mended, by all that was mended in them."""


ARRAYS = ("lines", "digests", "questions", "keys", "sketches")


def cut_shards(file: SourceFile) -> Iterator[list[tuple[int, Any]]]:
    """Yield the records of a file, so many at a time that a shard fits well into memory."""
    shard: list[tuple[int, Any]] = []
    chars = 0
    for line, value in file.records:
        shard.append((line, value))
        chars += len(value) if isinstance(value, str) else 500
        if len(shard) == SHARD_ROWS or chars >= SHARD_CHARS:
            yield shard
            shard, chars = [], 0
    if shard:
        yield shard


def write_shard(records: Iterable[tuple[int, Any]]) -> bytes:
    """Return records as bytes that another process, or machine, reads back."""
    return "\n".join(_packed(line, value) for line, value in records).encode("utf-8", "surrogatepass")


def _packed(line: int, value: Any) -> str:
    if isinstance(value, JsonText):
        return f"{line} {value.replace(chr(10), ' ')}"  # between values alone: within strings JSON escapes it
    if isinstance(value, BadRow):  # told by a second space, with which no line begins that a file may hold
        return f"{line}  {json.dumps([value.reason, value.detail, value.raw])}"
    # What JSON has no word for (a date, bytes) is told apart from text: the formats refuse it as what it is.
    return f"{line} {json.dumps(value, ensure_ascii=False, default=lambda v: {type(v).__name__: str(v)})}"


def read_shard(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield the records that write_shard was given."""
    for packed in data.decode("utf-8", "surrogatepass").split("\n"):
        line, _, text = packed.partition(" ")
        yield int(line), BadRow(*json.loads(text)) if text.startswith(" ") else parse_record(JsonText(text))


def put_shard(path: Path, shard: CleanShard, job: str) -> None:
    """Write a cleaned shard, at once: its rows as they are, the rest, and a digest of all. `job` says what it was
    cleaned from."""
    facts = {
        "job": job,
        "read": shard.read,
        "quarantined": shard.quarantined,
    }
    facts["repairs"] = [[list(steps), numbers.tolist()] for steps, numbers in shard.repairs.items()]
    rest = io.BytesIO()
    arrays = {name: getattr(shard, name) for name in ARRAYS}
    arrays |= {"facts": _as_array(json.dumps(facts).encode()), "rejected": _as_array(shard.rejected)}
    np.savez(rest, **arrays)
    digest, partial_path = hashlib.sha256(), path.with_suffix(".part")
    with partial_path.open("wb") as file:
        for piece in (shard.rows, rest.getbuffer(), len(shard.rows).to_bytes(8, "big")):
            file.write(piece)
            digest.update(piece)
        file.write(digest.digest())
    partial_path.replace(path)


def get_shard(path: Path, job: str) -> CleanShard | None:
    """Return a cleaned shard that was written; None where there is none, it is damaged, or cleaned from another job."""
    try:
        data = memoryview(path.read_bytes())
    except FileNotFoundError:
        return None
    end = len(data) - DIGEST_BYTES
    if hashlib.sha256(data[: max(0, end)]).digest() != data[max(0, end) :]:
        return None
    size = int.from_bytes(data[end - 8 : end], "big")
    with np.load(io.BytesIO(data[size : end - 8]), allow_pickle=False) as found:
        arrays = {name: found[name] for name in ARRAYS}
        facts, rejected = json.loads(found["facts"].tobytes()), found["rejected"].tobytes()
    if facts["job"] != job:
        return None
    repairs = {tuple(steps): np.array(numbers) for steps, numbers in facts["repairs"]}
    return CleanShard(
        rows=bytes(data[:size]),
        rejected=rejected,
        read=facts["read"],
        quarantined=facts["quarantined"],
        repairs=repairs,
        **arrays,
    )


def _as_array(data: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8)


def clean_shard(data: bytes, origin: Origin, config: DataConfig, items: ItemIndex | None) -> CleanShard:
    """Return what is left of a shard, and why the rest is not: formats, placeholders, cleaning, leakage."""
    rows: list[Row] = []
    rejected: list[Rejected] = []
    read = 0
    for line, value in read_shard(data):
        read += 1
        row = _cleaned(to_row(value, origin.format, origin.name, line, origin.source), config)
        rows.append(row) if isinstance(row, Row) else rejected.append(row)
    if items is not None:
        rows, leaked = _without_leaks(rows, items)
        rejected = sorted([*rejected, *leaked], key=lambda r: r.line)
    if config.clean.near_duplicates:
        sketches, keys = sketch_conversations([[m["content"] for m in row.messages] for row in rows])
    else:
        sketches, keys = np.empty((len(rows), 0), np.uint8), np.empty((0, len(rows)), np.uint64)
    repairs: dict[tuple[str, ...], list[int]] = {}
    for number, row in enumerate(rows):
        if row.repaired:
            repairs.setdefault(row.repaired, []).append(number)
    digests = [conversation_digest(row.messages) for row in rows]
    return CleanShard(
        rows="".join(map(partial(_row_line, weight=origin.source.weight), rows, digests)).encode(),
        rejected="".join(rejected_line(r) for r in rejected).encode(),
        lines=np.array([row.line for row in rows], np.int64),
        digests=np.array([(int(d[:16], 16), int(d[16:32], 16)) for d in digests], np.uint64).reshape(-1, 2),
        questions=np.array([question_number(row.messages) for row in rows], np.uint64),
        keys=keys,
        sketches=sketches,
        read=read,
        quarantined=dict(Counter(r.reason for r in rejected)),
        repairs={steps: np.array(numbers) for steps, numbers in repairs.items()},
    )


def _cleaned(row: Row | Rejected, config: DataConfig) -> Row | Rejected:
    if isinstance(row, Rejected):
        return row
    if config.fill:
        messages, filled = fill_placeholders(row.messages, config.fill)
        if filled:
            row = replace(row, messages=messages, repaired=(*row.repaired, "placeholder"))
    if (chars := _count_chars(row)) <= HOPELESS * config.max_chars:
        cleaned = clean_row(row, config.clean)
        if isinstance(cleaned, Rejected):
            return cleaned
        row, chars = cleaned, _count_chars(cleaned)
    if chars <= config.max_chars:
        return row
    detail = f"The conversation has {chars:,} characters; data.max_chars allows {config.max_chars:,}."
    return Rejected(row.source, row.line, "too_long", detail, excerpt(row.messages))


def _count_chars(row: Row) -> int:
    return sum(len(message["content"]) for message in row.messages)


def _without_leaks(rows: list[Row], items: ItemIndex) -> tuple[list[Row], list[Rejected]]:
    found = find_leaks([[m["content"] for m in row.messages] for row in rows], items)
    kept = [row for row, item in zip(rows, found, strict=True) if item < 0]
    leaked = [
        Rejected(
            row.source,
            row.line,
            "leaked",
            f"The row holds an evaluation item ({items.names[item]}), which would then measure memory.",
            excerpt(row.messages),
        )
        for row, item in zip(rows, found.tolist(), strict=True)
        if item >= 0
    ]
    return kept, leaked


def question_number(messages: list[Message]) -> int:
    """Return the first 64 bits of the sha256 of a conversation's first question, without the white space around it."""
    question = next((m["content"] for m in messages if m["role"] in ("user", "text")), "")
    return int(sha256(question.strip().encode())[:16], 16)


def _row_line(row: Row, digest: str, weight: float) -> str:
    fields: dict[str, Any] = {"messages": row.messages, "source": row.source, "line": row.line}
    if row.repaired:
        fields["repaired"] = row.repaired
    if weight != 1:  # 2.5 is twice for every row, and once more for the half of them with a small digest
        fields["times"] = int(weight) + (int(digest[-16:], 16) < (weight % 1) * 2**64)
    return _JSON.encode(fields) + "\n"


def rejected_line(row: Rejected) -> str:
    return _JSON.encode(asdict(row)) + "\n"
