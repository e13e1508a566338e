"""The data commands on real small files: what they print, write and answer, and how a mistake is said."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.cli import main
from tasks.core.config import DataSections, SourceConfig
from tasks.core.errors import ConfigError
from tasks.data.formats import Row
from tasks.data.sources import read_rows

Run = Callable[..., tuple[int, str, str]]
FRUIT = ("apple", "pear", "plum", "fig", "quince", "cherry", "melon", "grape")
PLACES = ("garden", "market", "cellar", "kitchen", "orchard", "harbour")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs a data command in an empty folder: its exit code, output and errors."""
    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> tuple[int, str, str]:
        try:
            code = main(["data", *map(str, words)])
        except SystemExit as stopped:
            code = int(str(stopped.code))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def write(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def alpaca(count: int = 48) -> list[dict[str, Any]]:
    pairs = [(fruit, place) for place in PLACES for fruit in FRUIT][:count]
    return [
        {"instruction": f"Where do I find the {f}?", "input": "", "output": f"Look in the {p}, behind the {f} basket."}
        for f, p in pairs
    ]


def chat(*texts: str, system: str = "") -> dict[str, Any]:
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"messages": [{"role": "system", "content": system}, *turns] if system else turns}


def messages(path: Path) -> list[list[dict[str, str]]]:
    rows = list(read_rows(SourceConfig(path=str(path))))
    assert all(isinstance(row, Row) for row in rows)
    return [row.messages for row in rows if isinstance(row, Row)]


# --- check ------------------------------------------------------------------------------------------------------------


def test_check_says_what_was_found_and_keeps_it_where_asked(run: Run, tmp_path: Path) -> None:
    write(tmp_path / "rows" / "a.json", alpaca())
    bad = [{"role": "assistant", "content": "Hello."}]
    write(
        tmp_path / "rows" / "b.jsonl",
        [chat("Hi!", "Salt &amp; pepper?"), {"messages": bad}, chat("Hi!", "Salt & pepper?")],
    )
    code, out, err = run("check", "rows", "--json", "--out", "kept")
    check = json.loads(out)
    assert (code, err) == (0, "")
    assert check["passed"]
    assert check["files"] == [
        {"file": "a.json", "format": "alpaca", "read": 48, "quarantined": 0},
        {"file": "b.jsonl", "format": "messages", "read": 3, "quarantined": 2},
    ]
    assert check["read"] == 51 == sum(check["rows"].values()) + 2
    assert {r["reason"]: (r["rows"], r["first"]) for r in check["quarantined"]} == {
        "roles_out_of_order": (1, "b.jsonl:2"),
        "duplicate": (1, "b.jsonl:3"),
    }
    assert check["repaired"] == {"html": 1}
    assert {"expectation", "severity", "passed", "observed"} == check["checks"][0].keys()
    assert check["tokens"] is None
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == [
        *("check.json", "quarantine.jsonl", "rows", "train.jsonl", "validation.jsonl")
    ]
    assert json.loads((tmp_path / "kept" / "check.json").read_text(encoding="utf-8")) == check
    assert (tmp_path / "kept" / "rows" / "data_docs" / "index.html").is_file()


def test_check_rejects_with_the_reasons_and_leaves_nothing(run: Run, tmp_path: Path) -> None:
    copies = [{"instruction": f"Say it again, {fruit}.", "output": f"Say it again, {fruit}."} for fruit in FRUIT]
    write(tmp_path / "rows.jsonl", [*alpaca(12), *copies])
    code, out, err = run("check", "rows.jsonl")
    assert (code, err) == (3, "")
    assert "20 read, 12 kept" in out
    assert "8  copied_prompt  an answer only repeats its prompt" in out
    assert "first rows.jsonl:13: An answer is its prompt again." in out
    assert "critical  At least 32 rows can be used: 12 rows" in out
    assert out.splitlines()[-1] == "✘ Rejected: a run would stop here, before it loads a model."
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_check_of_a_recipe_finds_leaks_and_checks_the_tokens(run: Run, tmp_path: Path, tiny_folder: Path) -> None:
    rows = alpaca()
    item = {"context": rows[6]["instruction"], "choices": [rows[6]["output"], "Nowhere."], "gold": 0}
    write(tmp_path / "choices.jsonl", [item])
    write(tmp_path / "rows.jsonl", rows)
    task = {"name": "endings", "choices": "choices.jsonl"}
    recipe = {
        "name": "tiny",
        "model": {"base": str(tiny_folder)},
        "data": {"sources": "rows.jsonl"},
        "eval": {"capabilities": [{"name": "find", "role": "target", "tasks": [task]}]},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    code, out, _ = run("check", "--recipe", "tiny.yaml", "--json", "--set", "train.max_tokens=64")
    check = json.loads(out)
    assert code == 0
    assert check["notes"] == ["Leakage was looked for: 1 items of 1 tasks."]
    (leak,) = check["quarantined"]
    assert leak["reason"] == "leaked"
    assert "endings" in leak["detail"]
    assert leak["rows"] == 6, "the question is asked in six places"
    assert sum(check["tokens"]["sequences"].values()) == 42
    assert check["tokens"]["passed"]

    code, out, err = run("check", "--recipe", "tiny.yaml", "--set", "train.max_tokens=16", "--set", "data.leakage=off")
    assert err == ""
    assert code == 3
    assert "Leakage was not looked for: data.leakage is off." in out
    assert "rows that are too long: 48" in out
    assert "critical  At least 32 rows fit into train.max_tokens=16: 0 rows" in out


# --- show -------------------------------------------------------------------------------------------------------------


def test_show_prints_conversations_turn_by_turn(run: Run, tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", [chat("Hi &amp; bye", "Hello."), *alpaca(3)][:1])
    code, out, _ = run("show", "rows.jsonl", "--rows", 1)
    assert (code, out) == (0, "rows.jsonl:1  mended: html\nuser: Hi & bye\nassistant: Hello.\n\n")
    code, out, _ = run("show", "rows.jsonl", "--set", "data.clean.html=false", "--json")
    assert json.loads(out) == [{**chat("Hi &amp; bye", "Hello."), "source": "rows.jsonl", "line": 1}]


def test_show_takes_entries_columns_and_limits(run: Run, tmp_path: Path) -> None:
    rows = [{"q": f"How many {fruit}s?", "a": "Seven of them."} for fruit in FRUIT]
    write(tmp_path / "rows.jsonl", rows)
    (tmp_path / "dataset_info.json").write_text(
        json.dumps({"fruit": {"file_name": "rows.jsonl", "columns": {"prompt": "q", "response": "a"}}})
    )
    entry = run("show", "dataset_info.json", "--entry", "fruit", "--max-rows", 3)
    mapped = run("show", "rows.jsonl", "--set", "data.sources.columns={prompt: q, response: a}", "--rows", 3)
    assert entry == mapped
    assert entry[1].count("user: How many") == 3


def test_show_quarantined_gives_every_reason_before_a_second_row_of_one(run: Run, tmp_path: Path) -> None:
    copies = [chat(f"{fruit}, please \x1b[31m", f"{fruit}, please \x1b[31m") for fruit in FRUIT]
    write(tmp_path / "rows.jsonl", [*copies, {"messages": [{"role": "user", "content": "Alone."}]}])
    code, out, _ = run("show", "rows.jsonl", "--quarantined", "--rows", 2, "--set", "data.clean.mojibake=false")
    assert code == 0
    first, second, rest = out.split("\n\n")
    assert first.startswith("rows.jsonl:1  copied_prompt\nAn answer is its prompt again.\n[{")
    assert second.startswith("rows.jsonl:9  no_assistant_turn\nThere is no assistant turn")
    assert (rest, "\x1b" in out) == ("", False)
    assert run("show", write(tmp_path / "good.jsonl", alpaca(2)), "--quarantined")[1] == "No row is quarantined.\n"
    code, _, err = run("show", "rows.jsonl")
    assert (code, err) == (3, "forgetless: Not one row can be trained on. To see why, add --quarantined.\n")


def test_the_sample_marks_what_is_learned(
    run: Run, tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "rows.jsonl", [chat("2 加 2？", "4。", "再加 1？", "5。")])
    command = ("show", "rows.jsonl", "--model", tiny_folder)
    code, out, _ = run(*command)
    assert code == 0
    assert "⟦4。<|im_end|>\n⟧<|im_start|>user\n再加 1？<|im_end|>\n<|im_start|>assistant\n⟦5。<|im_end|>\n⟧" in out
    (row,) = json.loads(run(*command, "--json")[1])
    assert sum(learned for _, learned in row["pieces"]) == 2
    assert 0 < row["learned"] < row["tokens"]

    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = run(*command)[1]
    assert "\x1b[1;30;42m4。<|im_end|>\x1b[0m" in coloured
    assert "\n再加 1？<|im_end|>\n" in coloured
    assert "⟦" not in coloured

    assert run(*command, "--html", "page.html")[:2] == (0, "Wrote 1 rows to page.html.\n")
    assert "<mark>4。&lt;|im_end|&gt;" in (tmp_path / "page.html").read_text(encoding="utf-8")


# --- convert ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format_", ["messages", "alpaca", "sharegpt"])
def test_convert_and_back_gives_the_same_messages(run: Run, tmp_path: Path, format_: str) -> None:
    rows = [chat("你好", "你好！", "1 + 1？", "2", system="短"), chat("Hi\u2028there", " Hello.\n"), {"text": "Plain."}]
    write(tmp_path / "a" / "chats.jsonl", rows[:2])
    write(tmp_path / "a" / "texts.jsonl", rows[2:])
    before = messages(tmp_path / "a")
    code, out, err = run("convert", "a", "--to", format_, "--out", "b.jsonl")
    assert (code, out, err) == (0, "", "forgetless: 3 rows written to b.jsonl.\n")
    lines = (tmp_path / "b.jsonl").read_text(encoding="utf-8").split("\n")
    write(tmp_path / "c" / "chats.jsonl", [json.loads(line) for line in lines[:2]])
    write(tmp_path / "c" / "texts.jsonl", [json.loads(lines[2])])
    assert messages(tmp_path / "c") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b.jsonl", "c"]


def test_convert_counts_what_it_leaves_out(run: Run, tmp_path: Path) -> None:
    write(
        tmp_path / "rows.jsonl",
        [chat("A&amp;B?", "Yes."), {"messages": []}, chat("What does {{name}} say?", "What does {{name}} say?")],
    )
    code, out, err = run("convert", "rows.jsonl", "--to", "sharegpt", "--clean", "--set", "data.fill.name=Bo")
    assert code == 0
    assert [turn["value"] for turn in json.loads(out)["conversations"]] == ["A&B?", "Yes."]
    assert err.splitlines()[0] == "forgetless: 1 rows written."
    assert "1 left out: no_assistant_turn, first rows.jsonl:2: The conversation is empty" in err
    assert "1 left out: copied_prompt, first rows.jsonl:3: " in err
    code, out, _ = run("convert", "rows.jsonl", "--to", "alpaca", "--json", "--out", "out.jsonl")
    assert (code, json.loads(out)["written"]) == (0, 2)

    (tmp_path / "out.jsonl").write_text("as it was")
    code, out, err = run("convert", "rows.jsonl", "--to", "alpaca", "--max-rows", 1, "--out", "out.jsonl", "--clean",
                         "--set", "data.clean.min_answer_chars=10")  # fmt: skip
    assert (code, out) == (3, "")
    assert err.startswith("forgetless: Not one row can be converted: short_answer 1 (first rows.jsonl:1: The longest")
    assert (tmp_path / "out.jsonl").read_text() == "as it was"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "rows.jsonl"]


def test_a_reader_that_goes_away_is_no_traceback(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [chat(f"How many {i}?", "Many. " * 200) for i in range(500)])
    command = [sys.executable, "-m", "flows.cli", "data", "convert", str(path), "--to", "messages"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(os.environ))
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline().startswith(b'{"messages": ')
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 1


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_the_data_section_of_a_readme_is_valid(name: str) -> None:
    text = (Path(__file__).resolve().parents[2] / name).read_text(encoding="utf-8")
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.S)]
    (data,) = [block for block in blocks if list(block) == ["data"]]
    sections = DataSections.model_validate(data)
    assert [len(sections.data.sources), sections.data.clean.near_duplicates] == [4, None]


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("", 2, "the following arguments are required: COMMAND. See: forgetless data --help"),
        ("check", 2, "Name the data: a file, folder, glob, address or Hub data set id, or --recipe RECIPE."),
        ("check --recipe quickstart --format text", 2, "--format says how URI is read: name a URI too."),
        ("check --recipe quikstart", 2, "There is no recipe 'quikstart'; did you mean 'quickstart'?"),
        ("check absent.json", 3, "there is no such file or folder. Did you mean pairs.jsonl or rows.jsonl?"),
        ("check rows.jsonl --format csv", 2, "data.sources.0.format: input should be 'auto', 'alpaca'"),
        ("check rows.jsonl --format sharegpt", 3, "format: sharegpt was named, but"),
        ("check rows.jsonl --set data.clean.htm=1", 2, "data.clean.htm: unknown key; did you mean 'html'?"),
        ("check rows.jsonl --set html=1", 2, "html: unknown key; valid keys: data, model, train, eval."),
        ("check rows.jsonl --model no/such-base", 2, "The base model no/such-base is not in the local cache"),
        ("check rows.jsonl --out absent/out", 2, "--out absent/out: expected a new folder inside one that exists"),
        ("check rows.jsonl --out .", 2, "--out .: expected a new folder inside one that exists (File exists)."),
        ("check pairs.jsonl --out kept", 3, "pairs.jsonl:1: these are preference pairs"),
        ("show", 2, "Name the data"),
        ("show rows.jsonl --rows 0", 2, "argument --rows: expected 1 or more. See: forgetless data show --help"),
        ("show rows.jsonl --html page.html", 2, "--html shows rows as a model sees them: name the model"),
        ("convert", 2, "the following arguments are required: URI, --to. See: forgetless data convert --help"),
        ("convert rows.jsonl --to csv", 2, "argument --to: invalid choice: 'csv'"),
        ("convert rows.jsonl --to alpaca --out absent/x", 2, "(No such file or directory)."),
        ("convert rows.jsonl --to alpaca --out rows.jsonl/x", 2, "(Not a directory)."),
        ("convert rows.jsonl --to alpaca --out .", 2, "--out .: expected a file that can be written (it is a folder)."),
    ],
)
def test_a_mistake_is_one_sentence(run: Run, tmp_path: Path, words: str, code: int, message: str) -> None:
    write(tmp_path / "rows.jsonl", alpaca(2))
    write(tmp_path / "pairs.jsonl", [{"prompt": "Which?", "chosen": "This.", "rejected": "That."}])
    found, out, err = run(*words.split())
    assert (found, out) == (code, "")
    assert message in err
    assert err.count("\n") == 1, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs.jsonl", "rows.jsonl"]


def test_debug_shows_the_traceback_and_json_the_error(run: Run) -> None:
    with pytest.raises(ConfigError):
        run("check", "--debug")
    code, out, err = run("convert", "rows.jsonl", "--to", "alpaca", "--json")
    assert json.loads(out) == {"error": err.removeprefix("forgetless: ").strip(), "exit_code": code}
    assert err.endswith("name a file for the rows, --out FILE.\n")
