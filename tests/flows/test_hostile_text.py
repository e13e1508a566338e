"""Rows, names and answers that try to steer the terminal or to be HTML: shown as text by every command and page."""

import io
import json
import re
from pathlib import Path

import pytest

from flows import screen
from flows.chat import Screen
from flows.cli import main
from tasks.core.manifest import write_manifest
from tasks.core.store import FileStore
from tests.dashboards import manifests as made
from tests.hostile import HOSTILE, SCRIPT, STEERING, TEXTS

ROW = HOSTILE.replace("\r", " ")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A folder of rows that pass cleaning and rows that do not, all hostile, in a file with a hostile name."""
    folder = tmp_path / "\x1b[31mrows\u202e<img src=x onerror=alert(1)>"
    folder.mkdir()
    good = [{"prompt": f"{ROW} {i}?", "response": f"Answer {i}: {SCRIPT} {ROW} {i * 7919}"} for i in range(60)]
    bad = [{"prompt": ROW, "response": ""}, {"prompt": ROW}, {"prompt": [SCRIPT], "response": ROW}]
    lines = [json.dumps(row) for row in (*good, *bad)]
    lines += ["{\x1b[2J" + SCRIPT, json.dumps({SCRIPT: 1, "prompt": "x", "\x1b]0;title\x07": 2})]
    (folder / "a\x1b]0;x\x07\u202e.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_data_commands_show_rows_as_text(
    rows: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    kept = ["--set", "data.clean.html=false", "--set", "data.clean.near_duplicates=null"]
    kept += ["--set", "data.clean.duplicates=false", "--set", "data.clean.mojibake=false"]
    for command in (
        ["data", "check", str(rows), *kept, "--model", str(tiny_folder), "--out", str(tmp_path / "out")],
        ["data", "check", str(rows), "--json"],
        ["data", "show", str(rows), *kept, "--rows", "3"],
        ["data", "show", str(rows), *kept, "--quarantined", "--rows", "9"],
        ["data", "show", str(rows), *kept, "--rows", "3", "--json"],
        ["data", "show", str(rows), *kept, "--rows", "3", "--model", str(tiny_folder)],
        ["data", "show", str(rows), *kept, "--model", str(tiny_folder), "--html", str(tmp_path / "rows.html")],
        ["data", "check", str(rows / "absent\x1b[31m.jsonl")],
        ["run", "absent\x1b[31m\u202e"],
        ["show", "\x1b[31m", "--json", "--store", str(tmp_path / "store")],
    ):
        main(command)
        said = capsys.readouterr()
        assert said.out + said.err
        for stream in (said.out, said.err):
            assert not STEERING.search(stream), (command, STEERING.search(stream), stream[-300:])
    pages = [tmp_path / "rows.html", *(tmp_path / "out").rglob("*.html")]
    assert len(pages) > 2
    assert "&lt;script&gt;alert(31337)" in pages[0].read_text()
    for page in pages:
        text = page.read_text()
        assert SCRIPT not in text and "<img src=x" not in text and "<iframe src=https://evil" not in text, page


def test_a_wrong_command_line_is_repeated_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["runs", "\x1b[31mred\u202e"])
    said = capsys.readouterr().err
    assert "\\x1b" in said or "␛[31mred" in said
    assert not STEERING.search(said)


@pytest.mark.parametrize("text", [*TEXTS, HOSTILE])
def test_a_run_is_shown_as_text(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, failed = made.promoted(), made.failed()
    run.notes = [text]
    run.base = run.base.model_copy(update={"source": text, "license": text})
    run.gguf = run.gguf.model_copy(update={"prompt": text, "sample": text})
    run.report = run.report.model_copy(update={"reason": text})
    run.adapter = run.adapter.model_copy(update={"notes": [text]})
    failed.error = text
    store = FileStore(tmp_path)
    for manifest in (run, failed):
        write_manifest(store, manifest)
    for command in (["show", run.run_id], ["show", failed.run_id], ["show", run.run_id, "--json"], ["runs"]):
        assert main([*command, "--store", str(tmp_path)]) == 0
        said = capsys.readouterr()
        assert not STEERING.search(said.out + said.err)
        if "--json" in command:
            assert json.loads(said.out)["gguf"]["sample"] == text


def test_what_a_console_prints_cannot_steer_a_terminal() -> None:
    file = io.StringIO()
    console = screen.SafeConsole(file=file, force_terminal=True, color_system="truecolor", width=200, highlight=False)
    console.print(screen.Text(HOSTILE, "bold red"))
    console.print(f"[green]{screen.Text(TEXTS[7]).plain}[/]")
    table = screen.Table("\x1b]0;x\x07")
    table.add_row(TEXTS[7], screen.Text(TEXTS[8]))
    console.print(table)
    console.out(screen.visible(HOSTILE))
    plain = re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue())  # rich's own colours
    assert not STEERING.search(plain)
    assert "␛]8;;https://evil.example␇click" in plain.replace("\n", "")


def test_an_answer_in_a_chat_cannot_steer_the_terminal() -> None:
    file = io.StringIO()
    shown = Screen([], None, console=screen.SafeConsole(file=file, width=400))  # type: ignore[arg-type]
    shown.console.out(screen.visible(HOSTILE), end="", highlight=False)
    assert not STEERING.search(file.getvalue())
