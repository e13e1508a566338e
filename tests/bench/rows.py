"""Rows to measure with: any number of distinct alpaca rows, recombined from the sentences of real ones.

Each row has a real instruction (one in four with a real sentence as its input) and an answer of 3 to 8 real sentences
of its language, drawn independently, so that two rows share one sentence at most, save for a few in a million. Some
lines are near duplicates of a line before them, and known to be. The same seed and files give the same bytes, and a
smaller number of rows the same first ones.
"""

import json
import random
import re
from pathlib import Path
from typing import Any

from tasks.data.grams import read_letters

ZH_FILES = (
    "sft_zh/oaast_sft_zh.json",
    "sft_zh/cdb_extra_*.json",
    "nc/sft_zh/alpaca_zh_demo.json",
    "nc/sft_zh/cdb_alpaca_zh_*.json",
)
EN_FILES = ("nc/sft_en/alpaca_en_demo.json", "nc/sft_en/cdb_alpaca_en_*.json", "sft_en/gpteacher_roleplay_*.json")
ZH_SHARE = 0.7
NEAR_SHARE = 0.02
SEED = 20261122
# No sentence may outweigh the others of its row: two rows that share it would be near duplicates.
SENTENCE_CHARS = {"zh": (20, 90), "en": (40, 180)}
MOST_PROMPT_CHARS = 90
LEAST_COPIED_LETTERS = 100
LETTERS_PER_EDIT = 80
LEAST_JACCARD = 0.85
COPIED_FROM = 4096
SENTENCES = {"zh": re.compile(r"[^。！？\n]+[。！？]"), "en": re.compile(r"[A-Z][^.!?\n]+[.!?](?=\s|$)")}

Row = dict[str, str]
Pool = tuple[list[str], list[str]]


def write_rows(data: Path, count: int, path: Path) -> list[int]:
    """Write `count` rows as JSON Lines, and return the line numbers of the near duplicates. `data` is the folder of the
    shared data; raises FileNotFoundError where it has none of the files."""
    draw = random.Random(SEED)
    pools = {"zh": _read_pool(data, "zh", ZH_FILES), "en": _read_pool(data, "en", EN_FILES)}
    earlier: list[Row] = []
    near: list[int] = []
    with path.open("w", encoding="utf-8") as file:
        for line in range(1, count + 1):
            if earlier and draw.random() < NEAR_SHARE:
                row = next(copy for copy in iter(lambda: _copy_nearly(draw.choice(earlier), draw), 0) if copy)
                near.append(line)
            else:
                row = _compose(pools, draw)
                if len(earlier) < COPIED_FROM:
                    earlier.append(row)
                elif (place := draw.randrange(line)) < COPIED_FROM:  # a sample of all rows so far, new and old alike
                    earlier[place] = row
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return near


def _read_pool(data: Path, language: str, patterns: tuple[str, ...]) -> Pool:
    """Return the instructions and the sentences of some alpaca files, each once and in the order of the files."""
    prompts: dict[str, None] = {}
    sentences: dict[str, None] = {}
    low, high = SENTENCE_CHARS[language]
    for path in (path for pattern in patterns for path in sorted(data.glob(pattern))):
        for row in json.loads(path.read_text(encoding="utf-8")):
            if isinstance(row["instruction"], str) and 4 <= len(row["instruction"]) <= MOST_PROMPT_CHARS:
                prompts[row["instruction"]] = None
            found = map(str.strip, SENTENCES[language].findall(str(row["output"])))
            sentences.update(dict.fromkeys(text for text in found if low <= len(text) <= high))
    if not sentences:
        raise FileNotFoundError(f"{data}: expected {', '.join(patterns)}; FORGETLESS_DATA names the folder.")
    return list(prompts), list(sentences)


def _compose(pools: dict[str, Pool], draw: random.Random) -> Row:
    language = "zh" if draw.random() < ZH_SHARE else "en"
    prompts, sentences = pools[language]
    answer = draw.sample(sentences, draw.randint(3, 8))
    given = draw.choice(sentences) if draw.random() < 0.25 else ""
    joined = ("" if language == "zh" else " ").join(answer)
    return {"instruction": draw.choice(prompts), "input": given, "output": joined}


def _copy_nearly(row: Row, draw: random.Random) -> Row | None:
    """Return the row with about one letter in LETTERS_PER_EDIT of its answer changed; None where it is too short, or
    would be less alike than LEAST_JACCARD."""
    letters = list(row["output"])
    places = [place for place, letter in enumerate(letters) if letter.isalnum()]
    if len(places) < LEAST_COPIED_LETTERS:
        return None
    for place in draw.sample(places, len(places) // LETTERS_PER_EDIT):
        letters[place] = draw.choice("的一是在不了有和人这" if ord(letters[place]) > 0x3400 else "aeiourstln")
    copy = {**row, "output": "".join(letters)}
    return copy if LEAST_JACCARD <= _jaccard(row, copy) < 1 else None


def _jaccard(a: Row, b: Row) -> float:
    first, second = (_grams("\n".join(row.values())) for row in (a, b))
    return len(first & second) / len(first | second)


def _grams(text: str) -> set[tuple[int, ...]]:
    codes = read_letters([text]).codes.tolist()
    return set(zip(codes, codes[1:], codes[2:], codes[3:], strict=False))


def read_items(data: Path) -> list[tuple[str, str, str]]:
    """Return the task, question and right answer of some thousand real evaluation items."""

    def rows(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (data / "eval" / name).read_text(encoding="utf-8").splitlines()]

    return [
        *(("arc_easy", row["query"], row["choices"][row["gold"]]) for row in rows("arc_easy.jsonl")),
        *(("gsm8k", row["question"], row["answer"]) for row in rows("gsm8k_test.jsonl")),
        *(("xcopa_zh", row["premise"], row[f"choice{row['label'] + 1}"]) for row in rows("xcopa_zh_test.jsonl")),
        *(("gsdsimp_zh", "", row["text"]) for row in rows("ud_gsdsimp_zh_dev.jsonl")),
    ]
