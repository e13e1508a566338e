"""Tokenised rows: what training will really see, after the chat template, checked before a model is loaded.

Written once and read by training, so that the rows that were judged are the rows that are learned. A row longer than
`max_tokens` is left out whole and counted, never cut; plain text is cut into pieces and loses nothing.
"""

import html
import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tasks.core.digest import content_digest, file_sha256
from tasks.core.processes import map_processes, read_chunks
from tasks.core.records import DatasetRef
from tasks.data.expectations import Rule, count_rows, judge
from tasks.data.prepare import SPLITS
from tasks.models.encode import Encoder, Examples, read_ids, write_examples
from tasks.models.template import encode_conversation
from tasks.models.tokenizer import load_tokenizer

if TYPE_CHECKING:
    import pandas as pd

SAMPLE_ROWS = 10
PROVED_ROWS = 64
USUAL_TOO_LONG_SHARE = 0.05
SPANS_AT_ONCE = 1 << 13


def tokenise_dataset(
    dataset: Path,
    record: DatasetRef,
    base: Path,
    template: str,
    max_tokens: int,
    min_rows: int,
    out: Path,
    replay: Path | None = None,
) -> dict[str, Any]:
    """Write the token sequences of both splits, a coloured sample and the report into `out`; return TokensRef's fields.

    `base` is the model's folder, of which only the tokenizer is read; `replay` has more rows for training. Raises
    ModelError where the template cannot be masked."""
    import pandas as pd

    sample = _spread_rows(dataset / "train.jsonl", PROVED_ROWS)
    encoder = Encoder(load_tokenizer(base, template), [row["messages"] for row in sample])
    too_long = dict.fromkeys(SPLITS, 0)

    def encoded(split: str) -> Iterator[Examples]:
        files = [dataset / f"{split}.jsonl", *([replay] if replay and split == "train" else [])]
        chunks = chain.from_iterable(map(read_chunks, files))
        for part, dropped in map_processes(encode_lines, chunks, encoder, max_tokens):
            too_long[split] += dropped
            yield part

    examples = {split: write_examples(encoded(split), out / split) for split in SPLITS}
    features = _features(examples, encoder, out)
    dropped = sum(too_long.values()) / max(1, sum(record.rows.values()))
    facts = pd.DataFrame({"differing": [_differing(encoder, sample, max_tokens)], "too_long_share": [dropped]})
    frames = {"rows": features, "dataset": facts}
    rules = list_rules(features, too_long, min_rows, max_tokens)
    passed, checks = judge(frames, rules, lambda at: _place(features, at), out, "Tokenised rows")
    page = show_sample(encoder, sample[:: max(1, len(sample) // SAMPLE_ROWS)][:SAMPLE_ROWS], max_tokens)
    (out / "sample.html").write_text(page, encoding="utf-8")
    return {
        "passed": passed,
        "checks": [check.model_dump() for check in checks],
        "sequences": {split: len(found) for split, found in examples.items()},
        "tokens": {split: int(found.starts[-1]) for split, found in examples.items()},
        "supervised_tokens": {split: found.supervised_tokens for split, found in examples.items()},
        "too_long": too_long,
        "digest": content_digest(
            {file.name: file_sha256(file) for file in out.glob("*.ids")}
            | {file.name: file_sha256(file) for file in out.glob("*.npz")}
        ),
    }


def encode_lines(lines: bytes, encoder: Encoder, max_tokens: int) -> tuple[Examples, int]:
    """Return the sequences of some rows, and how many were longer than `max_tokens` and are left out."""
    rows = [json.loads(line) for line in lines.splitlines()]
    encoded = encoder.encode([row["messages"] for row in rows], max_tokens)
    encoded.lines = np.array([row["line"] for row in rows], np.int64)[encoded.rows]
    encoded.times = np.array([row.get("times", 1) for row in rows], np.int32)[encoded.rows]
    fits = encoded.lengths <= max_tokens
    return encoded.only(fits), int((~fits).sum())


def _spread_rows(path: Path, count: int) -> list[dict[str, Any]]:
    """Return at most `count` rows from all over a file, the first among them."""
    with path.open("rb") as file:
        step = max(1, path.stat().st_size // count)
        rows: list[bytes] = []
        while len(rows) < count and (line := file.readline()):
            rows.append(line)
            if (ahead := len(rows) * step - 1) > file.tell():
                file.seek(ahead)
                file.readline()  # the rest of a row; the next begins after it
    return list(map(json.loads, rows))


def _features(examples: dict[str, Examples], encoder: Encoder, out: Path) -> "pd.DataFrame":
    """Return one record per sequence: its tokens, the learned ones, and whether every answer's end is among them."""
    import pandas as pd

    frames = [
        pd.DataFrame(
            {
                "split": pd.Categorical.from_codes(np.full(len(found), SPLITS.index(split)), list(SPLITS)),
                "line": found.lines,
                "tokens": found.lengths.astype(np.int32),
                "supervised": found.supervised_lengths,
                "ends_learned": _ends_learned(found, encoder, out / split),
            }
        )
        for split, found in examples.items()
    ]
    return pd.concat(frames, ignore_index=True)


def _ends_learned(found: Examples, encoder: Encoder, path: Path) -> NDArray[np.bool_]:
    """Return of each sequence whether all its learned stretches end with an end token, as they are on disk."""
    learned = np.ones(len(found), bool)
    last = found.starts[found.spans[:, 0]] + found.spans[:, 2] - 1
    for start in range(0, len(last), SPANS_AT_ONCE):
        part = last[start : start + SPANS_AT_ONCE]
        first = max(0, int(part.min()) - 2)
        ids = read_ids(path, first, max(first, int(part.max())) + 1)
        # Templates end an answer with the end token, some with a line break after it.
        near = [np.isin(ids[np.maximum(part - back, 0) - first], encoder.end_ids) for back in range(3)]
        learned[found.spans[start : start + SPANS_AT_ONCE, 0][~np.any(near, axis=0)]] = False
    return learned


def _place(rows: "pd.DataFrame", at: list[int]) -> str:
    first = rows.iloc[at]
    return ", ".join(f"{split}, line {line}" for split, line in zip(first["split"], first["line"], strict=True))


def _differing(encoder: Encoder, rows: list[dict[str, Any]], max_tokens: int) -> int:
    """Return how many of some rows have other ids or marks than rendering their prefixes with the template gives."""
    differing = 0
    for row in rows:
        if row["messages"][0]["role"] == "text":
            continue
        found = encoder.encode([row["messages"]], max_tokens)
        slow = encode_conversation(encoder.tokenizer, row["messages"])
        differing += [found.example(i) for i in range(len(found))] != slow
    return differing


def list_rules(rows: "pd.DataFrame", too_long: dict[str, int], min_rows: int, max_tokens: int) -> list[Rule]:
    """Return what is expected of the tokenised rows, the most serious first."""
    dropped = sum(too_long.values())

    def each(column: str, low: Any, high: Any, description: str) -> Rule:
        arguments = {"column": column, "min_value": low, "max_value": high}
        return Rule("rows", "ExpectColumnValuesToBeBetween", "critical", description, arguments)

    def quantiles(column: str, description: str) -> Rule:
        # Its own expectation on quantiles cannot be written down by Great Expectations 1.24 (a numpy bool).
        low, half, high = (int(rows[column].quantile(q)) if len(rows) else 0 for q in (0.05, 0.5, 0.95))
        arguments = {"column": column, "min_value": 0}
        return Rule(
            *("rows", "ExpectColumnMeanToBeBetween", "info", description),
            arguments,
            lambda mean: "no rows" if mean is None else f"{low:,}, {half:,}, {high:,}",
        )

    return [
        Rule(
            "rows",
            "ExpectTableRowCountToBeBetween",
            "critical",
            f"At least {count_rows(min_rows)} fit into train.max_tokens={max_tokens}",
            {"min_value": min_rows},
            lambda fitting: f"{count_rows(fitting)}; {dropped:,} are longer and left out",
        ),
        Rule(
            "rows",
            "ExpectColumnDistinctValuesToContainSet",
            "critical",
            "Both splits have rows that fit",
            {"column": "split", "value_set": list(SPLITS)},
            lambda _: ", ".join(f"{split}: {too_long[split]:,} too long" for split in SPLITS),
        ),
        each("supervised", 1, None, "Every row has a token to learn"),
        Rule(
            "rows",
            "ExpectColumnValuesToBeInSet",
            "critical",
            "The end of every answer is learned",
            {"column": "ends_learned", "value_set": [True]},
        ),
        each("tokens", 1, max_tokens, "No answer is cut off"),
        Rule(
            "dataset",
            "ExpectColumnValuesToBeInSet",
            "critical",
            "The template itself gives the same tokens, and no prompt token is learned",
            {"column": "differing", "value_set": [0]},
            lambda _: f"compared on up to {PROVED_ROWS} rows from all over the file",
        ),
        Rule(
            "dataset",
            "ExpectColumnMaxToBeBetween",
            "warning",
            f"No more rows are too long than usual ({USUAL_TOO_LONG_SHARE:.0%})",
            {"column": "too_long_share", "max_value": USUAL_TOO_LONG_SHARE},
            lambda share: f"{share:.1%} ({dropped:,}) are longer than train.max_tokens={max_tokens}",
        ),
        quantiles("tokens", "Tokens per row (5 %, half, 95 %)"),
        quantiles("supervised", "Learned tokens per row (5 %, half, 95 %)"),
        Rule(
            "rows",
            "ExpectColumnSumToBeBetween",
            "info",
            "Tokens per epoch, with validation",
            {"column": "tokens", "min_value": 0},
            lambda total: "no rows" if total is None else f"{total:,.0f}",
        ),
    ]


def show_sample(encoder: Encoder, rows: list[dict[str, Any]], max_tokens: int) -> str:
    """Return a page of some rows as the model sees them, the learned tokens coloured."""
    parts = []
    for row in rows:
        encoded = encoder.encode([row["messages"]], max_tokens)
        for i in range(len(encoded)):
            tokens, learned = int(encoded.lengths[i]), int(encoded.supervised_lengths[i])
            text = "".join(
                f"<mark>{html.escape(piece)}</mark>" if is_learned else html.escape(piece)
                for piece, is_learned in encoder.pieces(encoded.example(i))
            )
            place = html.escape(f"{row['source']}:{row['line']}")
            parts.append(f"<h2>{place} · {tokens} tokens, {learned} learned</h2>\n<pre>{text}</pre>")
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Rows as they are learned</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
h2 {{ font-size: 1rem; margin: 2rem 0 .3rem }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; padding: .8rem 1rem }}
pre {{ border: 1px solid #8884; border-radius: 6px }}
mark {{ background: light-dark(#c9efd8, #14532d); color: inherit; border-radius: 2px }}
</style></head><body>
<h1>Rows as they are learned</h1>
<p>What the model sees of some rows. <mark>Coloured</mark> tokens are learned, the end of a turn included; the rest
is the prompt.</p>
{"".join(parts)}
</body></html>
"""
