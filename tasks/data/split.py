"""The split: training and validation rows on disk, and every row that was refused, with its reason.

Rows keep the order of their files, because that order is the same on every machine and lets a person follow a line back
to its source; training shuffles by its own seed. Which split a row falls into depends on its first question alone.
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tasks.core.config import DataConfig
from tasks.core.digest import sha256
from tasks.data.formats import Message, Rejected, Row, excerpt
from tasks.data.sources import content_identity, read_rows, source_name

SPLITS = ("train", "validation")
PROGRESS_ROWS = 1000

OnProgress = Callable[[int], None]
"""Called with the number of rows read so far."""


def source_digests(config: DataConfig) -> list[str]:
    """Return the content identity of each source, for the key of the data set made from them. Raises DataError."""
    return [content_identity(source) for source in config.sources]


def prompt_digest(messages: list[Message]) -> str:
    """Return the sha256 of a conversation's first question, without the white space around it."""
    return sha256(next((m["content"] for m in messages if m["role"] == "user"), "").strip().encode())


def is_validation(digest: str, share: float) -> bool:
    """Return whether the question of this hexadecimal digest is held out: true for `share` of all questions."""
    return int(digest[:16], 16) < share * 2**64


def prepare_dataset(config: DataConfig, folder: Path, on_progress: OnProgress = lambda _: None) -> dict[str, Any]:
    """Write train.jsonl, validation.jsonl and quarantine.jsonl into `folder`, and return a DatasetRef's fields.

    Of two kept rows or more, each split gets at least one. Besides DatasetRef's fields there is `repaired`: kept rows
    by what was mended in them. Memory holds 16 bytes per kept row, not the rows. Raises DataError."""
    kept: Counter[str] = Counter()
    quarantined: Counter[str] = Counter()
    formats: Counter[str] = Counter()
    repaired: Counter[str] = Counter()
    seen: set[bytes] = set()  # 16 of sha256's 32 bytes: two of 10^9 rows collide with probability 1e-21
    lowest, highest = "g", ""  # the questions nearest to the other split: "g" is above every hexadecimal digit
    read = 0
    folder.mkdir(parents=True, exist_ok=True)
    with (
        (folder / "train.jsonl").open("w", encoding="utf-8", newline="\n") as train,
        (folder / "validation.jsonl").open("w", encoding="utf-8", newline="\n") as validation,
        (folder / "quarantine.jsonl").open("w", encoding="utf-8", newline="\n") as quarantine,
    ):
        for source in config.sources:
            for row in read_rows(source):
                read += 1
                if read % PROGRESS_ROWS == 0:
                    on_progress(read)
                if isinstance(row, Row):
                    row = _accepted(row, seen, config.max_chars)
                if isinstance(row, Rejected):
                    quarantined[row.reason] += 1
                    quarantine.write(_json_line(asdict(row)))
                    continue
                question = prompt_digest(row.messages)
                held_out = is_validation(question, config.validation_share)
                if not held_out:
                    lowest = min(lowest, question)
                else:
                    highest = max(highest, question)
                kept["validation" if held_out else "train"] += 1
                formats[row.format] += 1
                fields: dict[str, Any] = {"messages": row.messages, "source": row.source, "line": row.line}
                if row.repaired:
                    repaired[row.repaired] += 1
                    fields["repaired"] = row.repaired
                (validation if held_out else train).write(_json_line(fields))
    if sum(kept.values()) >= 2 and not kept["validation"]:
        _move_question(folder, "train", "validation", lowest, kept)
    elif sum(kept.values()) >= 2 and not kept["train"]:
        _move_question(folder, "validation", "train", highest, kept)
    on_progress(read)
    return {
        "rows": {split: kept[split] for split in SPLITS},
        "read": read,
        "quarantined": dict(sorted(quarantined.items())),
        "sources": [source_name(source) for source in config.sources],
        "formats": dict(sorted(formats.items())),
        "repaired": dict(sorted(repaired.items())),
    }


def _accepted(row: Row, seen: set[bytes], max_chars: int) -> Row | Rejected:
    """Return the row, or why it is refused beside the rows before it; an accepted row's digest is added to `seen`."""
    chars = sum(len(message["content"]) for message in row.messages)
    digest = bytes.fromhex(row.digest)[:16]
    if digest in seen:
        reason, detail = "duplicate", "The same conversation came before, word for word."
    elif chars > max_chars:
        reason, detail = "too_long", f"The conversation has {chars:,} characters; data.max_chars allows {max_chars:,}."
    else:
        seen.add(digest)
        return row
    return Rejected(row.source, row.line, reason, detail, excerpt(row.messages))


def _move_question(folder: Path, from_: str, to: str, question: str, kept: Counter[str]) -> None:
    """Move the rows of one question from a split to the other, which is empty. If no row would stay, only the last one
    moves: then one question is in both splits, and validation says so."""
    source, rest = folder / f"{from_}.jsonl", folder / f"{from_}.rest"
    with source.open(encoding="utf-8") as file:
        matches = sum(prompt_digest(json.loads(line)["messages"]) == question for line in file)
    stay = 0 if matches < kept[from_] else matches - 1
    moved = 0
    with (
        source.open(encoding="utf-8") as file,
        rest.open("w", encoding="utf-8", newline="\n") as left,
        (folder / f"{to}.jsonl").open("w", encoding="utf-8", newline="\n") as right,
    ):
        for line in file:
            if prompt_digest(json.loads(line)["messages"]) == question:
                moved += 1
                (right if moved > stay else left).write(line)
            else:
                left.write(line)
    rest.replace(source)
    kept[from_] -= moved - stay
    kept[to] += moved - stay


def _json_line(fields: dict[str, Any]) -> str:
    return json.dumps(fields, ensure_ascii=False) + "\n"
