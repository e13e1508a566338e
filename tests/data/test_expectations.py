import html
import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks.core.config import DataConfig
from tasks.core.records import ArtifactRef, Check, DatasetRef
from tasks.data.expectations import list_rules, read_features, validate_rows
from tasks.data.prepare import prepare_dataset

WriteRows = Callable[..., Path]
ARTIFACT = ArtifactRef(kind="dataset", key="k", uri="file:///s/artifacts/dataset/k", content="c", size_bytes=1)
USER = {"role": "user", "content": "你好"}
ASSISTANT = {"role": "assistant", "content": "你好！"}


def validate(config: DataConfig, folder: Path) -> tuple[bool, dict[str, Check]]:
    """Prepare and validate, and return the outcome with the checks by their description."""
    (folder / "report").mkdir(parents=True)
    dataset = DatasetRef(artifact=ARTIFACT, **prepare_dataset(config, folder / "data"))
    passed, checks = validate_rows(folder / "data", dataset, config, folder / "report")
    return passed, {check.expectation: check for check in checks}


def failed(checks: dict[str, Check]) -> dict[str, str]:
    """Return what was observed where a check failed, by the first word of its severity and its description."""
    return {f"{c.severity}: {c.expectation}": c.observed for c in checks.values() if not c.passed}


def shown(path: Path) -> str:
    """Return the text of a page, without its markup and scripts."""
    text = re.sub(r"<(script|style).*?</\1>", "", path.read_text(encoding="utf-8"), flags=re.S)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", text)))


def write_split(folder: Path, split: str, conversations: list[list[dict[str, str]]]) -> None:
    folder.mkdir(exist_ok=True)
    rows = [{"messages": messages, "source": f"{split}.json", "line": n} for n, messages in enumerate(conversations, 1)]
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_good_rows_pass_quietly_with_a_report_and_data_docs(
    write_rows: WriteRows, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    rows = [{"prompt": f"第{i}个问题?", "response": f"secret answer {i}"} for i in range(60)]
    rows += [{"prompt": "", "response": "x"}, rows[0]]
    passed, checks = validate(DataConfig(sources=[str(write_rows(rows))]), tmp_path / "run")
    assert passed
    assert failed(checks) == {}
    assert capfd.readouterr() == ("", "")
    assert os.listdir(tmp_path / "tmp") == []
    assert checks["At least 32 rows can be used"].observed == "60 rows"
    assert checks["At most 20% of the rows are quarantined"].observed == (
        "3.2% (2 of 62 rows: duplicate 1, empty_prompt 1)"
    )
    assert checks["Every row read was either kept or quarantined"].observed == "62 rows read, 60 kept, 2 quarantined"
    assert checks["User and assistant alternate"].observed == "all 60 rows pass"
    assert checks["The longest conversation"].observed == "2 turns"

    out = tmp_path / "run" / "report"
    report = json.loads((out / "report.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert report["passed"] is True
    assert [Check(**check) for check in report["checks"]] == list(checks.values())
    assert [result["expectation_config"]["description"] for result in report["great_expectations"]] == list(checks)
    assert all(result["success"] for result in report["great_expectations"])

    index = out / "data_docs" / "index.html"
    assert "Training data: passed" in shown(index)
    for check in checks.values():
        assert check.expectation in shown(index)
        assert check.observed in shown(index)
    assert "http" not in index.read_text(encoding="utf-8")
    links = re.findall(r'href="([^"]+)"', index.read_text(encoding="utf-8"))
    assert len(links) == 5
    for link in links:
        assert (index.parent / link).is_file()
    results = [shown(index.parent / link) for link in links if link.startswith("validations/")]
    assert "Status: Succeeded" in results[0]
    for check in checks.values():
        assert any(check.expectation in page for page in results)

    everything = b"".join(file.read_bytes() for file in out.rglob("*") if file.is_file())
    assert b"secret answer" not in everything
    assert str(tmp_path).encode() not in everything
    assert len(everything) < 2_000_000


def test_every_critical_check_finds_its_fault(tmp_path: Path) -> None:
    good = [[{**USER, "content": f"q{i}"}, ASSISTANT] for i in range(30)]
    bad = [
        [ASSISTANT, USER, ASSISTANT],  # 31: begins with the assistant
        [{**USER, "content": "x"}, ASSISTANT, ASSISTANT],  # 32: does not alternate
        [{**USER, "content": "y"}, ASSISTANT, USER],  # 33: ends with the user
        [{**USER, "content": "z"}, {**ASSISTANT, "content": " "}],  # 34: empty answer
        [{**USER, "content": "long" * 100}, ASSISTANT],  # 35: too long
        good[0],  # 36: there twice
        [{"role": "system", "content": "s"}],  # 37: no turns at all
    ]
    write_split(tmp_path / "data", "train", good + bad)
    write_split(tmp_path / "data", "validation", [[{**USER, "content": " q1 "}, USER, ASSISTANT]])
    dataset = DatasetRef(
        artifact=ARTIFACT,
        rows={"train": 37, "validation": 1},
        read=60,
        quarantined={"not_text": 20, "duplicate": 1},
        sources=["train.json"],
        formats={},
    )
    config = DataConfig(sources=["train.json"], min_rows=50, max_chars=300)
    (tmp_path / "report").mkdir()
    passed, checks = validate_rows(tmp_path / "data", dataset, config, tmp_path / "report")
    assert not passed
    assert {
        check.expectation: check.observed for check in checks if check.severity == "critical" and not check.passed
    } == {
        "At least 50 rows can be used": "38 rows",
        "At most 20% of the rows are quarantined": "35.0% (21 of 60 rows: not_text 20, duplicate 1)",
        "Every row read was either kept or quarantined": "60 rows read, 38 kept, 21 quarantined",
        "Every conversation begins with the user, after a system turn or none": (
            "2 of 38 rows (5.3%): train.json:31, train.json:37"
        ),
        "User and assistant alternate": "3 of 38 rows (7.9%): train.json:31, train.json:32, validation.json:1",
        "Every conversation ends with the assistant": "2 of 38 rows (5.3%): train.json:33, train.json:37",
        "No answer is empty": "2 of 38 rows (5.3%): train.json:34, train.json:37",
        "No row exceeds 300 characters": "1 of 38 rows (2.6%): train.json:35",
        "No question is in both splits": "2 of 38 rows (5.3%): train.json:2, validation.json:1",
        "No conversation is there twice": "2 of 38 rows (5.3%): train.json:1, train.json:36",
    }
    index = tmp_path / "report" / "data_docs" / "index.html"
    assert "Training data: rejected" in shown(index)
    assert "failed critical At least 50 rows can be used 38 rows" in shown(index)


def test_no_usable_row_fails_and_says_why(write_rows: WriteRows, tmp_path: Path) -> None:
    path = write_rows([{"messages": [{"role": "hero", "content": "q"}, {"role": "foe", "content": "a"}]}] * 40)
    passed, checks = validate(DataConfig(sources=[str(path)]), tmp_path / "run")
    assert not passed
    critical = {name: text for name, text in failed(checks).items() if name.startswith("critical")}
    assert critical == {
        "critical: At least 32 rows can be used": "0 rows",
        "critical: At most 20% of the rows are quarantined": "100.0% (40 of 40 rows: unknown_role 40)",
        "critical: Neither the training nor the validation split is empty": (
            "0 rows for train and 0 rows for validation"
        ),
    }


def test_warnings_do_not_reject(write_rows: WriteRows, tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "response": f"an answer {i}"} for i in range(50)]
    rows += [{"prompt": "q", "response": f"answer {i}"} for i in range(30)]  # one question, many answers
    rows += [{"prompt": "who?", "response": "I am {{name}}"}, {"prompt": "what?", "response": "lost \ufffd text"}]
    rows += [{"prompt": f"s{i}", "response": str(i)} for i in range(9)]
    rows += [{"prompt": "n", "response": None}] * 8
    big, small = write_rows(rows, "big.jsonl"), write_rows([{"messages": [USER, ASSISTANT, USER]}], "small.jsonl")
    passed, checks = validate(DataConfig(sources=[str(big), str(small)]), tmp_path / "run")
    assert passed
    assert failed(checks) == {
        "warning: No more rows are quarantined than usual (5%)": "8.0% (8 of 100 rows: null_text 8)",
        "warning: No source among several makes up more than 90% of the rows": "the largest has 99%",
        "warning: At most 1% of the rows hold U+FFFD, a lost character": "1 of 92 rows (1.1%): big.jsonl:82",
        "warning: At most 1% of the rows hold a {{placeholder}} to fill in": "1 of 92 rows (1.1%): big.jsonl:81",
        "warning: At most 20% of the rows share their question with another": (
            "30 of 92 rows (32.6%): big.jsonl:51, big.jsonl:52, big.jsonl:53, …"
        ),
        "warning: At most 5% of the rows have an answer of 1 character": (
            "9 of 92 rows (9.8%): big.jsonl:83, big.jsonl:84, big.jsonl:85, …"
        ),
        "info: No row ended with an unanswered question, which was cut": "1 of 92 rows (1.1%): small.jsonl:1",
    }


def test_one_question_in_both_splits_is_rejected(write_rows: WriteRows, tmp_path: Path) -> None:
    rows = [{"prompt": "q", "response": f"answer {i}"} for i in range(40)]
    passed, checks = validate(DataConfig(sources=[str(write_rows(rows))]), tmp_path / "run")
    assert not passed
    assert checks["No question is in both splits"].observed.startswith("40 of 40 rows (100.0%): rows.jsonl:1")


def test_features_of_rows(tmp_path: Path) -> None:
    system = {"role": "system", "content": "你是助手"}
    write_split(
        tmp_path, "train", [[system, USER, ASSISTANT, {**USER, "content": "ab c"}, {**ASSISTANT, "content": "x"}]]
    )
    write_split(tmp_path, "validation", [])
    frame = read_features(tmp_path)
    assert len(frame) == 1
    features: dict[str, Any] = frame.iloc[0].to_dict()
    assert features["n_turns"] == 4
    assert features["min_answer_chars"] == 1
    assert features["total_chars"] == 4 + 2 + 3 + 4 + 1
    assert features["cjk_share"] == pytest.approx((4 + 2 + 2) / (4 + 2 + 3 + 3 + 1))  # "！" is no letter
    assert features["first_role_ok"]
    assert features["roles_alternate"]
    assert not features["has_replacement_char"]


@pytest.mark.parametrize("share", [0.0, 0.05, 0.2, 1.0])
def test_checks_have_names_of_their_own(share: float) -> None:
    dataset = DatasetRef(artifact=ARTIFACT, rows={}, read=0, quarantined={}, sources=[], formats={})
    names = [rule.description for rule in list_rules(dataset, DataConfig(sources=["a"], max_quarantined_share=share))]
    assert len(set(names)) == len(names) == 20


def test_real_rows(shared_file: Callable[[str], Path], tmp_path: Path) -> None:
    names = ["multiturn/sharegpt_zh_400.jsonl", "sft_zh/identity.json"]
    passed, checks = validate(DataConfig(sources=[str(shared_file(name)) for name in names]), tmp_path / "run")
    assert passed
    assert set(failed(checks)) == {
        "warning: At most 1% of the rows hold a {{placeholder}} to fill in",
        "info: No row ended with an unanswered question, which was cut",
    }
