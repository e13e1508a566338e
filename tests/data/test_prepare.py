import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tasks.core.cache import locked_folder
from tasks.core.config import DataConfig
from tasks.core.digest import file_sha256
from tasks.core.errors import DataError
from tasks.core.records import ArtifactRef, DatasetRef
from tasks.core.store import FileStore
from tasks.data.leakage import ItemIndex
from tasks.data.prepare import Job, prepare_dataset, split_questions
from tasks.data.shards import CleanShard, clean_shard, question_number
from tasks.data.sources import source_digests
from tests.conftest import ROOT

WriteRows = Callable[..., Path]
FILES = ("train.jsonl", "validation.jsonl", "quarantine.jsonl")


def pair(question: str, answer: str = "a") -> dict[str, str]:
    return {"prompt": question, "response": answer}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def questions(folder: Path, split: str) -> list[str]:
    return [row["messages"][0]["content"] for row in lines(folder / f"{split}.jsonl")]


# --- which split ------------------------------------------------------------------------------------------------------


def numbers(names: Iterable[str]) -> NDArray[np.uint64]:
    return np.array([question_number([{"role": "user", "content": name}]) for name in names], np.uint64)


def test_the_share_held_out_is_the_share_asked_for() -> None:
    questions = numbers(f"question {i}" for i in range(20_000))
    for share in (0.02, 0.1, 0.4):
        found = split_questions(questions, np.ones(20_000, bool), share).mean()
        assert found == pytest.approx(share, abs=4 * (share * (1 - share) / 20_000) ** 0.5)


def test_a_larger_share_only_adds_questions() -> None:
    questions, kept = numbers(map(str, range(500))), np.ones(500, bool)
    small, large = split_questions(questions, kept, 0.1), split_questions(questions, kept, 0.3)
    assert not (small & ~large).any()
    assert small.sum() < large.sum()


def test_the_question_alone_decides() -> None:
    system = {"role": "system", "content": "s"}
    asked = {"role": "user", "content": "q"}
    follow_up = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "q2"}]
    assert question_number([asked]) == question_number([system, {**asked, "content": " q\n"}, *follow_up])
    assert question_number([asked]) != question_number([{**asked, "content": "Q"}])


def test_rows_fall_the_same_way_in_any_order_and_file(write_rows: WriteRows, tmp_path: Path) -> None:
    rows = [pair(f"q{i % 150}", f"a{i}") for i in range(300)]
    prepare_dataset(DataConfig(sources=[str(write_rows(rows, "a.jsonl"))], validation_share=0.2), tmp_path / "one")
    random.Random(1).shuffle(rows)
    sources = [str(write_rows(rows[:100], "b.json")), str(write_rows(rows[100:], "c.jsonl"))]
    prepare_dataset(DataConfig(sources=sources, validation_share=0.2), tmp_path / "two")
    for split in ("train", "validation"):
        assert Counter(questions(tmp_path / "one", split)) == Counter(questions(tmp_path / "two", split))
    assert not set(questions(tmp_path / "one", "train")) & set(questions(tmp_path / "one", "validation"))
    assert 15 <= len(set(questions(tmp_path / "one", "validation"))) <= 45


def test_the_same_input_gives_the_same_bytes_in_file_order(write_rows: WriteRows, tmp_path: Path) -> None:
    config = DataConfig(sources=[str(write_rows([pair(f"q{i}") for i in range(200)]))])
    for name in ("one", "two"):
        prepare_dataset(config, tmp_path / name)
    for file in FILES:
        assert file_sha256(tmp_path / "one" / file) == file_sha256(tmp_path / "two" / file)
    numbers = [row["line"] for row in lines(tmp_path / "one" / "train.jsonl")]
    assert numbers == sorted(numbers)


@pytest.mark.parametrize("share", [1e-9, 0.499999])
@pytest.mark.parametrize("count", [2, 3, 10])
def test_neither_split_is_empty_of_two_rows_or_more(
    write_rows: WriteRows, tmp_path: Path, share: float, count: int
) -> None:
    for start in range(8):  # other questions, so that all fall to either side by chance
        rows = [pair(f"q{start * 10 + i}") for i in range(count)]
        config = DataConfig(sources=[str(write_rows(rows))], validation_share=share)
        sizes = prepare_dataset(config, tmp_path / "out")["rows"]
        assert min(sizes.values()) >= 1
        assert sizes == {split: len(questions(tmp_path / "out", split)) for split in ("train", "validation")}
        assert sorted(questions(tmp_path / "out", "train") + questions(tmp_path / "out", "validation")) == sorted(
            row["prompt"] for row in rows
        )
        assert sorted(file.name for file in (tmp_path / "out").iterdir()) == sorted(FILES)


def test_all_rows_of_a_question_move_to_an_empty_split(write_rows: WriteRows, tmp_path: Path) -> None:
    rows = [pair(question, answer) for answer in "xyz" for question in ("q1", "q2")]
    config = DataConfig(sources=[str(write_rows(rows))], validation_share=1e-9)
    assert prepare_dataset(config, tmp_path / "out")["rows"] == {"train": 3, "validation": 3}
    assert len(set(questions(tmp_path / "out", "validation"))) == 1


def test_one_question_alone_is_split_by_its_last_row(write_rows: WriteRows, tmp_path: Path) -> None:
    config = DataConfig(sources=[str(write_rows([pair("q", answer) for answer in "xyz"]))])
    assert prepare_dataset(config, tmp_path / "out")["rows"] == {"train": 2, "validation": 1}
    assert lines(tmp_path / "out" / "validation.jsonl")[0]["line"] == 3


@pytest.mark.parametrize("rows", [[pair("q")], [pair("q", "")]])
def test_fewer_than_two_rows_are_written_as_they_are(
    write_rows: WriteRows, tmp_path: Path, rows: list[dict[str, str]]
) -> None:
    fields = prepare_dataset(DataConfig(sources=[str(write_rows(rows))]), tmp_path / "out")
    assert sum(fields["rows"].values()) + sum(fields["quarantined"].values()) == fields["read"] == 1


# --- what is written --------------------------------------------------------------------------------------------------


def test_what_is_kept_refused_and_counted(write_rows: WriteRows, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]
    long = pair("long", "".join(map(str, range(70))))
    first = write_rows([pair("q1"), pair("q2", ""), pair("q1"), long], "set/a.jsonl")
    second = write_rows([{"conversations": [*turns, turns[0]]}, {"conversations": turns}], "b.json")
    seen: list[int] = []
    config = DataConfig(sources=[str(first.parent), str(second)], max_chars=100)
    fields = prepare_dataset(config, tmp_path / "out", on_progress=seen.append)
    assert fields["read"] == 6
    assert sum(fields["rows"].values()) == 2
    assert fields["quarantined"] == {"duplicate": 2, "empty_answer": 1, "too_long": 1}
    assert fields["sources"] == ["set", "b.json"]
    assert fields["formats"] == {"pairs": 1, "sharegpt": 1}
    assert fields["repaired"] == {"trailing_user_turn": 1}
    assert seen[-1] == 6

    artifact = ArtifactRef(kind="dataset", key="k", uri="file:///s/artifacts/dataset/k", content="c", size_bytes=1)
    assert DatasetRef(artifact=artifact, **fields).rows == fields["rows"]

    kept = lines(tmp_path / "out" / "train.jsonl") + lines(tmp_path / "out" / "validation.jsonl")
    assert sorted(kept, key=lambda row: row["source"]) == [
        {
            "messages": [{"role": "user", "content": "q1"}, {"role": "assistant", "content": "a"}],
            "source": "a.jsonl",
            "line": 1,
        },
        {
            "messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}],
            "source": "b.json",
            "line": 1,
            "repaired": ["trailing_user_turn"],
        },
    ]
    assert "问" in "".join((tmp_path / "out" / f).read_text(encoding="utf-8") for f in FILES[:2])
    quarantine = {(row["source"], row["line"]): row for row in lines(tmp_path / "out" / "quarantine.jsonl")}
    assert sorted(quarantine) == [("a.jsonl", 2), ("a.jsonl", 3), ("a.jsonl", 4), ("b.json", 2)]
    assert set(quarantine["a.jsonl", 4]) == {"source", "line", "reason", "detail", "raw"}
    assert quarantine["a.jsonl", 4]["detail"] == "The conversation has 134 characters; data.max_chars allows 100."
    assert str(tmp_path) not in "".join((tmp_path / "out" / f).read_text(encoding="utf-8") for f in FILES)


def test_duplicates_are_found_across_sources_and_formats(write_rows: WriteRows, tmp_path: Path) -> None:
    pairs = write_rows([pair("q", "a")], "a.jsonl")
    alpaca = write_rows([{"instruction": "q", "output": "a"}, {"instruction": "q", "output": "b"}], "b.jsonl")
    fields = prepare_dataset(DataConfig(sources=[str(pairs), str(alpaca)]), tmp_path / "out")
    assert fields["quarantined"] == {"duplicate": 1}
    assert lines(tmp_path / "out" / "quarantine.jsonl")[0]["source"] == "b.jsonl"


def test_progress_is_told_with_every_shard(
    write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.data.shards.SHARD_ROWS", 1000)
    monkeypatch.setattr("tasks.core.processes.START_SECONDS", 0)
    seen: list[int] = []
    config = DataConfig(sources=[str(write_rows([pair(f"q{i}") for i in range(2500)]))])
    fields = prepare_dataset(config, tmp_path / "three", on_progress=seen.append)
    assert seen == [1000, 2000, 2500]
    monkeypatch.undo()
    assert prepare_dataset(config, tmp_path / "one") == fields
    for file in FILES:  # by two processes or none, in three shards or one
        assert file_sha256(tmp_path / "one" / file) == file_sha256(tmp_path / "three" / file)


class Cleaned:
    """Cleans shards in this process, and counts them; the machine fails before number `end`."""

    def __init__(self, end: int | None = None) -> None:
        self.count, self.end = 0, end

    def __call__(self, jobs: Iterator[Job], config: DataConfig, items: ItemIndex | None) -> Iterator[CleanShard]:
        for job in jobs:
            if self.count == self.end:
                raise OSError("the machine fails")
            self.count += 1
            yield clean_shard(*job, config, items)


def test_a_preparation_goes_on_with_the_shards_that_are_not_cleaned(
    write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.data.shards.SHARD_ROWS", 100)
    rows = [pair(f"q{i % 990}  {i % 7}", f"a{i}" if i % 9 else "") for i in range(1000)]
    replay = {"share": 0.1, "sources": [str(write_rows([pair(f"r{i}") for i in range(150)], "r.jsonl"))]}
    config = DataConfig(sources=[str(write_rows(rows))], replay=replay, fill={"NAME": "A"})
    whole = prepare_dataset(config, tmp_path / "whole")
    kept, seen = tmp_path / "kept", []
    with pytest.raises(OSError, match="the machine fails"):
        prepare_dataset(config, tmp_path / "one", run_shards=Cleaned(7), kept=kept)
    (kept / "shard-2").write_bytes((kept / "shard-2").read_bytes()[:-100])
    damaged = bytearray((kept / "shard-4").read_bytes())
    damaged[50] ^= 1
    (kept / "shard-4").write_bytes(damaged)
    (kept / "shard-5").write_bytes(b"")
    (kept / "shard-8.part").write_bytes(b"half")
    again = Cleaned()
    assert prepare_dataset(config, tmp_path / "two", run_shards=again, kept=kept, on_progress=seen.append) == whole
    assert again.count == 12 - 4, "shards 0, 1, 3 and 6 were whole"
    assert seen == [*range(100, 1101, 100), 1150]
    for file in FILES:
        assert file_sha256(tmp_path / "two" / file) == file_sha256(tmp_path / "whole" / file)
    none = Cleaned()
    assert prepare_dataset(config, tmp_path / "three", run_shards=none, kept=kept) == whole
    assert none.count == 0
    monkeypatch.setattr("tasks.data.shards.SHARD_ROWS", 150)
    other = Cleaned()
    assert prepare_dataset(config, tmp_path / "four", run_shards=other, kept=kept) == whole
    assert other.count == 8, "cut otherwise, not one is the same"


def test_two_preparations_do_not_share_a_folder(write_rows: WriteRows, tmp_path: Path) -> None:
    config = DataConfig(sources=[str(write_rows([pair(f"q{i}") for i in range(50)]))])
    with locked_folder(tmp_path / "kept") as mine:
        assert mine
        cleaned = Cleaned()
        fields = prepare_dataset(config, tmp_path / "out", run_shards=cleaned, kept=tmp_path / "kept")
    assert sum(fields["rows"].values()) == 50
    assert list((tmp_path / "kept").iterdir()) == []
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == sorted(FILES)


KILLED = """
import os, signal, sys
from pathlib import Path
from tasks.core.config import DataConfig, EvalConfig
from tasks.core.store import FileStore
from tasks.data import prepare, shards, steps
from tasks.evaluation.steps import list_evaluation_items

rows, items, root, end = sys.argv[1:]
shards.SHARD_ROWS = 100
put, seen = prepare.put_shard, 0

def put_shard(path, shard, job):
    global seen
    put(path, shard, job)
    seen += 1
    if seen == int(end):
        os.kill(os.getpid(), signal.SIGKILL)

prepare.put_shard = put_shard
store = FileStore(Path(root))
task = {"name": "t", "texts": items}
suite = EvalConfig(capabilities=[{"name": "c", "role": "target", "measure": "bits_per_byte", "tasks": [task]}])
dataset = steps.store_dataset(DataConfig(sources=[rows]), list_evaluation_items.fn(suite, store.url), store.url)
print(seen, dataset.artifact.content)
"""


def test_killed_between_shards_the_stage_goes_on(write_rows: WriteRows, tmp_path: Path) -> None:
    rows = write_rows([pair(f"question {i}", f"answer {i * i}") for i in range(1000)])
    items = write_rows([{"text": "Something else entirely, which no row holds."}], "items.jsonl")

    def prepare(root: Path, end: int) -> tuple[int, list[str]]:
        command = [sys.executable, "-c", KILLED, str(rows), str(items), str(root), str(end)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
        return done.returncode, done.stdout.split()

    code, whole = prepare(tmp_path / "whole", 0)
    assert (code, whole[0]) == (0, "10")
    store = FileStore(tmp_path / "store")
    assert prepare(store.root, 6)[0] == -signal.SIGKILL
    (kept,) = store.root.glob("work/dataset-*")
    assert len(list(kept.glob("shard-*"))) == 6
    assert prepare(store.root, 0) == (0, ["4", whole[1]])
    assert not list(store.root.glob("work/dataset-*"))


def test_source_digests_are_in_the_order_of_the_sources(write_rows: WriteRows) -> None:
    a, b = write_rows([pair("a")], "a.jsonl"), write_rows([pair("b")], "b.jsonl")
    assert source_digests(DataConfig(sources=[str(b), str(a)])) == [file_sha256(b), file_sha256(a)]
    with pytest.raises(DataError, match=r"Did you mean a\.jsonl"):
        source_digests(DataConfig(sources=[str(a), str(a.parent / "aa.jsonl")]))


def test_real_files_together(shared_file: Callable[[str], Path], tmp_path: Path) -> None:
    names = ["sft_zh/oaast_sft_zh.json", "multiturn/sharegpt_zh_400.jsonl", "sft_zh/glaive_toolcall_zh_demo.json"]
    fields = prepare_dataset(DataConfig(sources=[str(shared_file(name)) for name in names]), tmp_path)
    assert fields["read"] == 689 + 400 + 300
    assert {**fields["quarantined"], "duplicate": 48, "too_long": 2, "empty_prompt": 1} == fields["quarantined"]
    assert 10 <= fields["quarantined"]["near_duplicate"] <= 30, "grown out of one beginning, with nearly one end"
    assert sum(fields["rows"].values()) == fields["read"] - sum(fields["quarantined"].values())
    assert not set(questions(tmp_path, "train")) & set(questions(tmp_path, "validation"))


# --- every row is accounted for ---------------------------------------------------------------------------------------

TEXTS = st.one_of(
    st.sampled_from(["q1", "q2", " ", "", "你好", "\ud83d", "x" * 150]),
    st.text(max_size=8),
    st.none(),
    st.integers(),
    st.just(float("nan")),
    st.lists(st.just("part"), max_size=1),
)
ROLES = st.sampled_from(["human", "gpt", "system", "user", "assistant", "observation", "narrator", None, 3])
TURNS = st.lists(
    st.one_of(st.fixed_dictionaries({"from": ROLES, "value": TEXTS}), st.fixed_dictionaries({"role": ROLES}), TEXTS),
    max_size=5,
)
RECORDS = st.one_of(
    st.fixed_dictionaries({"instruction": TEXTS, "output": TEXTS}, optional={"input": TEXTS, "history": TEXTS}),
    st.fixed_dictionaries({"conversations": st.one_of(TURNS, TEXTS)}, optional={"tools": TEXTS}),
    TURNS,
    TEXTS,
)
LINES = st.one_of(
    RECORDS.map(json.dumps),
    st.text(st.characters(codec="utf-8", exclude_characters="\n"), max_size=10),  # not JSON, or blank
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(LINES, max_size=25), st.booleans(), st.sampled_from([1e-9, 0.3]))
def test_rows_read_are_rows_kept_and_rows_quarantined(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[str], alpaca_first: bool, share: float
) -> None:
    folder = tmp_path_factory.mktemp("property")
    good = json.dumps({"instruction": "q", "output": "a"} if alpaca_first else pair("q"))
    written = [good, *drawn, good]
    (folder / "a.jsonl").write_text("\n".join(written), encoding="utf-8", newline="")
    config = DataConfig(sources=[str(folder / "a.jsonl")], max_chars=100, validation_share=share)
    fields = prepare_dataset(config, folder / "out")

    not_blank = [number for number, line in enumerate(written, 1) if line.strip()]
    kept = [row for split in ("train", "validation") for row in lines(folder / "out" / f"{split}.jsonl")]
    quarantine = lines(folder / "out" / "quarantine.jsonl")
    assert fields["read"] == len(not_blank) == len(kept) + len(quarantine)
    assert sorted(row["line"] for row in [*kept, *quarantine]) == not_blank
    assert fields["quarantined"] == Counter(row["reason"] for row in quarantine)
    assert sum(fields["rows"].values()) == sum(fields["formats"].values()) == len(kept)
    for row in kept:
        roles = [message["role"] for message in row["messages"] if message["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert roles
        assert all(message["content"].strip() for message in row["messages"])
    texts = [json.dumps(row["messages"]) for row in kept]
    assert len(set(texts)) == len(texts)
