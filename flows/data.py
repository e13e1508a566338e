"""The data commands: rows checked, shown and converted as a run would read them, without Prefect or the store.

What needs torch's libraries (a model's tokenizer) is imported where a model is named.
"""

import contextlib
import itertools
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, Literal

from tasks.core.config import DataConfig, DataSections, ModelConfig, Recipe, load_recipe, load_sections
from tasks.core.errors import ConfigError, DataError
from tasks.core.records import ArtifactRef, DatasetRef
from tasks.data.clean import clean_row
from tasks.data.expectations import validate_rows
from tasks.data.formats import Rejected, Row, fill_placeholders, to_format
from tasks.data.leakage import ItemIndex, index_items
from tasks.data.prepare import Job, clean_here, prepare_dataset
from tasks.data.reasons import REASONS
from tasks.data.shards import CleanShard, Origin, clean_shard, write_shard
from tasks.data.sources import read_files, read_rows
from tasks.models.base import locate_tokenizer

Say = Callable[[str], None]
ROWS_AT_ONCE = 64


def read_request(
    uri: str | None, options: dict[str, Any], recipe: str | None, model: str | None, overrides: list[str]
) -> Recipe | DataSections:
    """Return the sections that a command is about: the recipe's, with `uri` and its options in place of its sources and
    `model` of its base; without a recipe the defaults. Overrides are those of `run`. Raises ConfigError."""
    if uri is None and recipe is None:
        raise ConfigError("Name the data: a file, folder, glob, address or Hub data set id, or --recipe RECIPE.")
    if uri is None and options:
        raise ConfigError(f"--{next(iter(options)).replace('_', '-')} says how URI is read: name a URI too.")
    named = {"data.sources": {"path": uri, **options} if uri else None, "model.base": model}
    words = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in named.items() if value is not None]
    return load_recipe(recipe, [*words, *overrides]) if recipe else load_sections([*words, *overrides])


# --- check ------------------------------------------------------------------------------------------------------------


def check_data(sections: Recipe | DataSections, folder: Path, say: Say) -> dict[str, Any]:
    """Return, as plain values, what a run would find in its data before it loads a model. The rows, the quarantine and
    the reports are written to `folder`. Raises DataError for what cannot be read, ModelError for an unusable base."""
    read: Counter[str] = Counter()
    formats: dict[str, set[str]] = {}

    def watch(jobs: Iterator[Job], config: DataConfig, items: ItemIndex | None) -> Iterator[CleanShard]:
        jobs, again = itertools.tee(jobs)
        for shard, (_, origin) in zip(clean_here(jobs, config, items), again, strict=False):
            read[origin.name] += shard.read
            formats.setdefault(origin.name, set()).add(origin.format)
            yield shard

    items, notes = _index_evaluation(sections)
    with tempfile.TemporaryDirectory(prefix="forgetless-") as scratch:
        base = None
        if sections.model:
            say("Reading the tokenizer")
            base = locate_tokenizer(sections.model, Path(scratch))
        say("Reading and cleaning")
        fields = prepare_dataset(sections.data, folder, items, lambda rows: say(f"Cleaned {rows:,} rows"), watch)
        nowhere = ArtifactRef(kind="dataset", key="none", uri=folder.absolute().as_uri(), content="none", size_bytes=0)
        dataset = DatasetRef(artifact=nowhere, **fields)
        kept = sum(dataset.rows.values())
        say(f"Checking {kept:,} rows")
        (folder / "rows").mkdir()
        _, checks = validate_rows(folder, dataset, sections.data, folder / "rows")
        tokens = _check_tokens(sections, folder, dataset, base, say) if base and kept else None
    found = [check.model_dump() for check in checks]
    failed = Counter(check["severity"] for check in [*found, *(tokens or {}).get("checks", [])] if not check["passed"])
    refusals = Refusals()
    for row in _json_lines(folder / "quarantine.jsonl"):
        refusals.add(Rejected(**row))
    return {
        "passed": not failed["critical"],
        "failed": dict(failed),
        **dataset.model_dump(include={"read", "rows", "unused", "replay", "repaired"}),
        "quarantined": refusals.found(),
        "files": [
            {"file": name, "format": " and ".join(formats[name]), "read": rows, "quarantined": refusals.files[name]}
            for name, rows in read.items()
        ],
        "checks": found,
        "tokens": tokens,
        "notes": notes,
    }


def _check_tokens(
    sections: Recipe | DataSections, folder: Path, dataset: DatasetRef, base: Path, say: Say
) -> dict[str, Any]:
    from tasks.data.tokens import tokenise_dataset

    assert sections.model is not None
    say(f"Tokenising {sum(dataset.rows.values()):,} rows")
    out = folder / "tokens"
    out.mkdir()
    limits = sections.train.max_tokens, sections.data.min_rows
    tokens = tokenise_dataset(folder, dataset, base, sections.model.template.value, *limits, out)
    for file in (*out.glob("*.ids"), *out.glob("*.npz")):
        file.unlink()  # only a run trains on them
    return tokens


def _index_evaluation(sections: Recipe | DataSections) -> tuple[ItemIndex | None, list[str]]:
    """Return the index of the evaluation items that rows must not hold, and what the user should know of what is looked
    at. Raises ConfigError for a file of items that is absent or of another shape."""
    replay = sections.data.replay
    notes = ["The rows that the base writes itself (data.replay.prompts) are made, and checked, by a run."]
    notes = notes if replay and replay.prompts else []
    if sections.data.leakage == "off":
        return None, ["Leakage was not looked for: data.leakage is off.", *notes]
    if sections.eval is None:
        return None, ["Leakage was not looked for: only a recipe names evaluation items.", *notes]
    tasks = [task for capability in sections.eval.capabilities for task in capability.tasks]
    if named := ", ".join(task.name for task in tasks if not task.file):
        return None, [f"Leakage was not looked for: lm-eval has the items of {named}, which only a run loads.", *notes]
    from tasks.evaluation.suite import read_item_texts, suite_digest

    suite_digest(sections.eval)  # names every file that is absent
    texts = read_item_texts(sections.eval)
    return index_items(texts), [f"Leakage was looked for: {len(texts):,} items of {len(tasks)} tasks.", *notes]


class Refusals:
    """Rows that were refused, counted by reason and by file."""

    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()
        self.files: Counter[str] = Counter()
        self.first: dict[str, Rejected] = {}

    def add(self, row: Rejected) -> None:
        self.reasons[row.reason] += 1
        self.files[row.source] += 1
        self.first.setdefault(row.reason, row)

    def found(self) -> list[dict[str, Any]]:
        """Return the reasons, the commonest first: how many rows, what it means, and the first row."""
        return [
            {
                "reason": reason,
                "rows": rows,
                "meaning": REASONS[reason],
                "first": f"{self.first[reason].source}:{self.first[reason].line}",
                "detail": self.first[reason].detail,
            }
            for reason, rows in self.reasons.most_common()
        ]


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


# --- show -------------------------------------------------------------------------------------------------------------


def read_first(data: DataConfig, count: int) -> list[dict[str, Any]]:
    """Return the first rows that formats and cleaning leave, as training gets them; which of them repeat another row or
    hold an evaluation item is not looked at. Raises DataError where none is left."""
    config = data.model_copy(update={"clean": data.clean.model_copy(update={"near_duplicates": None})})
    rows: list[dict[str, Any]] = []
    for file in (file for source in config.sources for file in read_files(source)):
        origin = Origin(file.name, file.format, file.source)
        while len(rows) < count and (taken := list(itertools.islice(file.records, ROWS_AT_ONCE))):
            rows += map(json.loads, clean_shard(write_shard(taken), origin, config, None).rows.splitlines())
        if len(rows) >= count:
            break
    if not rows:
        raise DataError("Not one row can be trained on. To see why, add --quarantined.")
    return rows[:count]


def read_quarantined(sections: Recipe | DataSections, count: int, say: Say) -> list[dict[str, Any]]:
    """Return quarantined rows: the first of every reason, then the second of every reason, and so on."""
    items, _ = _index_evaluation(sections)
    ranks: Counter[str] = Counter()
    found = []
    with tempfile.TemporaryDirectory(prefix="forgetless-") as folder:
        prepare_dataset(sections.data, Path(folder), items, lambda rows: say(f"Cleaned {rows:,} rows"))
        for row in _json_lines(Path(folder) / "quarantine.jsonl"):
            if ranks[row["reason"]] < count:
                found.append((ranks[row["reason"]], row))
            ranks[row["reason"]] += 1
    return [row for _, row in sorted(found, key=lambda ranked: ranked[0])[:count]]


def see_as_model(encoder: Any, rows: list[dict[str, Any]], max_tokens: int) -> list[dict[str, Any]]:
    """Return the rows' token sequences: where each is from, its tokens, those learned, and its text in stretches that
    are learned or not."""
    seen = []
    for row in rows:
        encoded = encoder.encode([row["messages"]], max_tokens)
        for i, tokens in enumerate(encoded.lengths.tolist()):
            learned, pieces = int(encoded.supervised_lengths[i]), encoder.pieces(encoded.example(i))
            counts = {"tokens": tokens, "learned": learned, "too_long": tokens > max_tokens}
            seen.append({"source": row["source"], "line": row["line"], **counts, "pieces": pieces})
    return seen


def open_encoder(model: ModelConfig, say: Say) -> Any:
    """Return the Encoder of a base with its chat template. Raises ModelError."""
    with tempfile.TemporaryDirectory(prefix="forgetless-") as scratch:
        say("Reading the tokenizer")
        folder = locate_tokenizer(model, Path(scratch))
        from tasks.models.encode import Encoder
        from tasks.models.tokenizer import load_tokenizer

        return Encoder(load_tokenizer(folder, model.template.value))


# --- convert ----------------------------------------------------------------------------------------------------------


def convert_rows(
    data: DataConfig, format_: Literal["messages", "alpaca", "sharegpt"], clean: bool, write: Callable[[bytes], object]
) -> tuple[int, list[dict[str, Any]]]:
    """Write every usable row as a line of `format_`; return how many there were, and why the others are not among them.
    Raises DataError where there was none."""
    written, refusals = 0, Refusals()
    for row in (row for source in data.sources for row in read_rows(source)):
        if isinstance(row, Row):
            row = replace(row, messages=fill_placeholders(row.messages, data.fill)[0])
            row = clean_row(row, data.clean) if clean else row
        if isinstance(row, Rejected):
            refusals.add(row)
            continue
        write(json.dumps(to_format(row.messages, format_), ensure_ascii=False).encode() + b"\n")
        written += 1
    if not written:
        why = "; ".join(f"{r['reason']} {r['rows']:,} (first {r['first']}: {r['detail']})" for r in refusals.found())
        raise DataError(f"Not one row can be converted: {why}")
    return written, refusals.found()


# --- what is written --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def new_file(path: Path, option: str) -> Iterator[IO[bytes]]:
    """Yield a file that takes the place of `path` once all is written; on an error `path` stays as it was."""
    partial = path.absolute().with_name(f".{path.name}.{os.getpid()}.part")
    try:
        if path.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        with partial.open("wb") as file:
            yield file
        partial.replace(path)
    except OSError as error:
        raise ConfigError(f"{option} {path}: expected a file that can be written ({error.strerror}).") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


@contextlib.contextmanager
def new_folder(path: Path, option: str) -> Iterator[Path]:
    """Yield the new folder `path`, which is removed again on an error."""
    try:
        path.mkdir()
    except OSError as error:
        raise ConfigError(
            f"{option} {path}: expected a new folder inside one that exists ({error.strerror})."
        ) from None
    try:
        yield path
    except BaseException:
        shutil.rmtree(path)
        raise
