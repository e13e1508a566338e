"""Duplicates and leakage: found where they are, and nowhere else."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.core.config import SourceConfig
from tasks.data.duplicates import (
    BINS,
    find_duplicates,
    find_near_duplicates,
    sketch_conversations,
)
from tasks.data.formats import Row
from tasks.data.grams import WindowHashes, read_letters, read_letters_in_batches
from tasks.data.leakage import find_leaks, index_items
from tasks.data.sources import read_rows


def grams(text: str) -> set[tuple[int, ...]]:
    codes = read_letters([text]).codes.tolist()
    return {tuple(codes[i : i + 4]) for i in range(len(codes) - 3)}


def jaccard(a: str, b: str) -> float:
    return len(grams(a) & grams(b)) / len(grams(a) | grams(b))


def near(texts: list[str], threshold: float = 0.8) -> dict[int, int]:
    sketches, keys = sketch_conversations([[text] for text in texts])
    return find_near_duplicates(lambda band: keys[band], lambda rows: sketches[rows], threshold, {})


@pytest.fixture(scope="module")
def real_texts(request: pytest.FixtureRequest) -> list[str]:
    from tests.conftest import DATA

    path = DATA / "sft_zh" / "oaast_sft_zh.json"
    if not path.is_file():
        pytest.skip(f"{path} is absent; FORGETLESS_DATA names the folder of the shared data")
    rows = [row for row in read_rows(SourceConfig(path=str(path))) if isinstance(row, Row)]
    return list(dict.fromkeys("\n".join(m["content"] for m in row.messages) for row in rows))


def edited(text: str, times: int, draw: random.Random) -> str:
    letters = list(text)
    for _ in range(times):
        letters[draw.randrange(len(letters))] = draw.choice("的一是在不了有和人这")
    return "".join(letters)


def test_letters_are_lower_case_without_spaces_and_punctuation() -> None:
    letters = read_letters(["Ab, c!", "", "你 好。", "🙂x"])
    parts = ["".join(map(chr, letters.codes[a:b])) for a, b in zip(letters.starts, letters.starts[1:], strict=False)]
    assert parts == ["abc", "", "你好", "🙂x"]


def test_windows_of_equal_letters_have_equal_hashes_wherever_they_are() -> None:
    letters = read_letters(["xxabcdef", "abc", "zabcd"])
    hashes, text = WindowHashes(letters).windows(3)
    assert text.tolist() == [0] * 6 + [1] + [2] * 3
    assert hashes[2] == hashes[6] == hashes[8]
    assert len(set(hashes.tolist())) == 7  # xxa xab abc bcd cde def zab


def test_batches_hold_every_text_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.data.grams.BATCH_LETTERS", 10)
    texts = ["", "a" * 25, "b", "c" * 9, "", "d" * 11, ""]
    found = [i for part, letters in read_letters_in_batches(texts) for i in range(len(texts))[part]]
    assert found == list(range(len(texts)))
    assert list(read_letters_in_batches([])) == []


def test_sketches_agree_as_much_as_the_texts_overlap(real_texts: list[str]) -> None:
    draw = random.Random(1)
    long = [text for text in real_texts if len(text) > 200][:200]
    changed = [edited(text, draw.randrange(1, len(text) // 10), draw) for text in long]
    sketches, _ = sketch_conversations([[text] for text in [*long, *changed]])
    estimates = (sketches[: len(long), :BINS] == sketches[len(long) :, :BINS]).mean(axis=1)
    errors = estimates - np.array([jaccard(a, b) for a, b in zip(long, changed, strict=True)])
    # Of 128 bins the standard error is at most sqrt(.25 / 128) = .044, and 1 in 256 agrees by chance.
    assert abs(errors.mean()) < 0.02
    assert errors.std() < 0.05


def test_injected_near_duplicates_are_found_and_others_are_not(real_texts: list[str]) -> None:
    draw = random.Random(2)
    originals = [text for text in real_texts if len(text) > 60]
    copies = [edited(text, max(1, len(text) // 80), draw) for text in originals]
    found = near([*originals, *copies])
    close = [i for i, (a, b) in enumerate(zip(originals, copies, strict=True)) if jaccard(a, b) >= 0.85]
    assert len(close) > 300
    assert np.mean([i + len(originals) in found for i in close]) >= 0.95
    wrong = [(a, b) for a, b in found.items() if jaccard([*originals, *copies][a], [*originals, *copies][b]) < 0.65]
    assert wrong == []


def test_short_rows_are_compared_word_for_word_alone() -> None:
    assert near([f"计算{i}加{i + 1}等于多少" for i in range(50)]) == {}
    long = (
        "春天来了，花园里的桃花开得格外热闹，孩子们放学以后都喜欢跑到树下捡花瓣，老人们坐在长椅上晒着太阳聊起了往事。"
    )
    assert near([long, long.replace("，", ", "), "别的" + long[::-1]]) == {1: 0}


def test_two_ends_of_one_beginning_are_two_conversations() -> None:
    start = ["请介绍一下杭州的西湖有哪些值得去的景点和吃的东西。", "西湖有苏堤、白堤、断桥和雷峰塔，" * 3]
    rows = [[*start, "那怎么去呢？", "可以坐地铁一号线到龙翔桥站，出来走几分钟就到湖边。"]]
    rows += [[*start, "冬天去好吗？", "冬天人少，断桥残雪也正是这个时候看的，多穿一点。"]]
    rows += [[*start, "那怎么去呢？", "可以坐地铁一号线到龙翔桥站，出来走几分钟就到湖边了。"]]
    sketches, keys = sketch_conversations(rows)
    assert find_near_duplicates(lambda band: keys[band], lambda at: sketches[at], 0.6, {}) == {2: 0}


def test_a_chain_of_small_changes_is_not_one_duplicate() -> None:
    """A row is dropped for a row that stays, never for one that is dropped itself."""
    draw = random.Random(3)
    text = "".join(draw.choice("天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏") for _ in range(300))
    chain = [text]
    for step in range(8):
        at = step * 30
        chain.append(
            chain[-1][:at] + "".join(draw.choice("闰余成岁律吕调阳") for _ in range(12)) + chain[-1][at + 12 :]
        )
    found = near(chain)
    assert found
    assert not set(found.values()) & set(found)


def test_equal_digests_point_to_the_first() -> None:
    digests = np.array([[1, 1], [2, 2], [1, 1], [1, 2], [1, 1], [2, 2]], np.uint64)
    assert find_duplicates(digests) == {2: 0, 4: 0, 5: 1}
    assert find_duplicates(np.empty((0, 2), np.uint64)) == {}


# --- leakage ----------------------------------------------------------------------------------------------------------

ITEMS = [
    ("quiz", "下列哪一座城市是中国古代丝绸之路的起点，并且曾经是唐朝的首都？", "西安"),
    (
        "quiz",
        "What is the name of the process by which green plants turn sunlight into chemical energy?",
        "Photosynthesis",
    ),
    ("quiz", "中国首都在哪里", "北京"),
]


@pytest.mark.parametrize(
    ("row", "item"),
    [
        (["下列哪一座城市是中国古代丝绸之路的起点，并且曾经是唐朝的首都？", "是长安。"], 0),
        (["请回答：下列哪一座城市，是中国古代丝绸之路的起点，并且曾经是唐朝的首都？A. 洛阳 B. 西安", "B"], 0),
        (["what is the NAME of the process by which green plants turn sunlight into chemical energy", "It is..."], 1),
        (["丝绸之路的起点在哪里？", "丝绸之路从长安出发，长安就是今天的西安。"], -1),
        (["What is the name of the river that runs through Cairo, the capital of Egypt?", "The Nile."], -1),
        (["中国首都在哪里北京", "是的。"], 2),
        (["中国首都在哪里？", "不告诉你。"], 2),
        (["我想知道中国首都在哪里，北京还是南京？", "北京。"], -1),
        (["", ""], -1),
    ],
)
def test_a_row_that_holds_an_item_is_found(row: list[str], item: int) -> None:
    assert find_leaks([["x", "y"], row], index_items(ITEMS)).tolist() == [-1, item]


def test_words_that_many_items_share_identify_none() -> None:
    stem = "Which of the following statements about the subject below is the most correct one? "
    items = [("quiz", stem, word) for word in ("tea", "ink", "oak", "rye", "sea")]
    assert find_leaks([[stem + "Copper, or gold?", "Yes."]], index_items(items)).tolist() == [-1]


def test_real_evaluation_items_leak_into_no_real_training_rows_but_are_found_when_planted(
    shared_file: Callable[[str], Path], real_texts: list[str]
) -> None:
    import csv

    texts: list[Any] = []
    for path in sorted(shared_file("nc/eval/cmmlu/test/agronomy.csv").parent.glob("*.csv"))[:12]:
        with path.open(encoding="utf-8") as file:
            texts += [(row["Question"], row[row["Answer"]]) for row in csv.DictReader(file)]
    index = index_items([("cmmlu", *text) for text in texts])
    assert (find_leaks([[text] for text in real_texts], index) < 0).all()
    planted = [["请回答下面的问题。" + question, answer] for question, answer in texts if len(question) > 25]
    found = find_leaks(planted, index)
    assert (found >= 0).mean() > 0.97
