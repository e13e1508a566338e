"""Tokenised rows: what is judged is what is learned, and what cannot be learned stops the run before any training."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tasks.core.config import DataConfig
from tasks.core.records import ArtifactRef, DatasetRef
from tasks.data.prepare import prepare_dataset
from tasks.data.tokens import tokenise_dataset
from tasks.models.encode import read_examples
from tasks.models.template import encode_conversation
from tasks.models.tokenizer import load_tokenizer

ARTIFACT = ArtifactRef(kind="dataset", key="k", uri="file:///s/artifacts/dataset/k", content="c", size_bytes=1)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    written = [{"prompt": f"{i} 加 {i}?", "response": f"等于 {2 * i}。"} for i in range(60)]
    written.append({"prompt": "长", "response": "、".join(str(i * 7919) for i in range(300))})
    path.write_text("".join(json.dumps(row) + "\n" for row in written))
    return path


def tokenise(rows: Path, base: Path, out: Path, template: str = "auto", **options: Any) -> dict[str, Any]:
    config = DataConfig(sources=[{"path": str(rows), "weight": options.pop("weight", 1)}], **options.pop("data", {}))
    dataset = DatasetRef(artifact=ARTIFACT, **prepare_dataset(config, out / "data"))
    (out / "tokens").mkdir()
    return tokenise_dataset(
        out / "data", dataset, base, template, options.pop("max_tokens", 128), config.min_rows, out / "tokens"
    )


def checks(fields: dict[str, Any]) -> dict[str, tuple[str, bool, str]]:
    return {c["expectation"]: (c["severity"], c["passed"], c["observed"]) for c in fields["checks"]}


def test_the_rows_that_were_judged_are_the_rows_that_are_learned(rows: Path, tiny_folder: Path, tmp_path: Path) -> None:
    fields = tokenise(rows, tiny_folder, tmp_path)
    assert fields["passed"]
    assert fields["too_long"] == {"train": 1, "validation": 0}
    assert sum(fields["sequences"].values()) == 60
    tokenizer = load_tokenizer(tiny_folder, "auto")
    for split in ("train", "validation"):
        found = read_examples(tmp_path / "tokens" / split)
        lines = (tmp_path / "data" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        kept = [row for row in map(json.loads, lines) if len(row["messages"][1]["content"]) < 100]
        assert [found.example(i) for i in range(len(found))] == [
            example for row in kept for example in encode_conversation(tokenizer, row["messages"])
        ]
        assert found.lines.tolist() == [row["line"] for row in kept]
        assert fields["tokens"][split] == len(found.ids)
    seen = checks(fields)
    assert seen["The end of every answer is learned"] == ("critical", True, "all 60 rows pass")
    assert seen["At least 32 rows fit into train.max_tokens=128"][2] == "60 rows; 1 are longer and left out"
    assert re.fullmatch(r"\d+, \d+, \d+", seen["Tokens per row (5 %, half, 95 %)"][2])
    assert seen["Tokens per epoch, with validation"][2] == f"{sum(fields['tokens'].values()):,}"
    assert "Tokenised rows: passed" in (tmp_path / "tokens" / "data_docs" / "index.html").read_text(encoding="utf-8")


def test_the_same_rows_give_the_same_digest(rows: Path, tiny_folder: Path, tmp_path: Path) -> None:
    found = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        found.append(tokenise(rows, tiny_folder, tmp_path / name)["digest"])
    assert found[0] == found[1]


def test_rows_that_are_all_too_long_are_rejected(rows: Path, tiny_folder: Path, tmp_path: Path) -> None:
    fields = tokenise(rows, tiny_folder, tmp_path, max_tokens=16)
    assert not fields["passed"]
    failed = {name: text for name, (severity, passed, text) in checks(fields).items() if not passed}
    assert failed["At least 32 rows fit into train.max_tokens=16"] == "0 rows; 61 are longer and left out"
    assert failed["No more rows are too long than usual (5%)"].startswith("100.0% (61) are longer")


def test_an_end_that_is_not_learned_is_rejected(
    rows: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A template that leaves answers open teaches a model never to stop."""
    open_ended = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    template = open_ended + "{% if add_generation_prompt %}assistant: {% endif %}"

    def load(*arguments: Any) -> Any:
        tokenizer = load_tokenizer(*arguments)
        tokenizer.chat_template = template
        return tokenizer

    monkeypatch.setattr("tasks.data.tokens.load_tokenizer", load)
    fields = tokenise(rows, tiny_folder, tmp_path)
    severity, passed, text = checks(fields)["The end of every answer is learned"]
    assert (severity, passed) == ("critical", False)
    assert text.startswith("60 of 60 rows (100.0%): train, line 1")


def test_the_sample_marks_what_is_learned(rows: Path, tiny_folder: Path, tmp_path: Path) -> None:
    tokenise(rows, tiny_folder, tmp_path)
    page = (tmp_path / "tokens" / "sample.html").read_text(encoding="utf-8")
    assert page.count("<h2>rows.jsonl:") == 10
    marked = re.findall("<mark>(.*?)</mark>", page, re.S)
    assert "等于 0。&lt;|im_end|&gt;" in marked[1]
    assert "加 0?" not in "".join(marked)


def test_a_weight_is_how_often_a_row_is_seen(rows: Path, tiny_folder: Path, tmp_path: Path) -> None:
    fields = tokenise(rows, tiny_folder, tmp_path, weight=2.5)
    times = read_examples(tmp_path / "tokens" / "train").times
    assert set(times.tolist()) == {2, 3}
    assert times.mean() == pytest.approx(2.5, abs=0.25)
    assert len(times) == fields["sequences"]["train"]
