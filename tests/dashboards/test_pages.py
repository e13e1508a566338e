"""Every page renders every kind of run, and says what to do next where there is nothing to show."""

from collections.abc import Callable
from pathlib import Path

import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

from tasks.core.manifest import LiveCurve, write_manifest
from tasks.core.store import FileStore
from tests.dashboards import manifests as made
from tests.hostile import SCRIPT, TEXTS, active_parts

APP = str(Path(__file__).resolve().parents[2] / "dashboards" / "app.py")
Show = Callable[..., AppTest]


@pytest.fixture
def show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Show:
    """Return a function that renders a page over the store in tmp_path: show() is Runs, show(run_id) is Run."""
    monkeypatch.setenv("FORGETLESS_STORE", str(tmp_path))
    # AppTest looks through the metadata of all installed packages for components at every run: 0.4 s of its 0.5 s.
    monkeypatch.setattr("streamlit.components.v2.manifest_scanner.scan_component_manifests", list, raising=False)
    st.cache_data.clear()

    def render(run_id: str | None = None, page: str = "run") -> AppTest:
        at = AppTest.from_file(APP, default_timeout=20)
        if run_id is not None:
            at.query_params["sweep" if page == "sweep" else "run"] = run_id
            at.switch_page(f"app_pages/{page}.py")
        at.run()
        assert not at.exception, at.exception
        return at

    return render


def words(at: AppTest) -> str:
    """Return all text of a page as the browser gets it, tables included."""
    kinds = (at.title, at.header, at.subheader, at.markdown, at.caption, at.text, at.code, at.metric)
    alerts = (at.error, at.warning, at.info, at.success)
    parts = [str(element.value) for kind in (*kinds, *alerts) for element in kind]
    parts += [f"{element.text} {element.value}" for element in at.progress]
    parts += [element.value for element in at.page_link]
    parts += [frame.value.to_csv(index=False) for frame in at.dataframe]
    return "\n".join(parts)


def test_runs_lists_every_run_newest_first(show: Show, tmp_path: Path) -> None:
    made.fill_store(tmp_path)
    at = show()
    assert [link.value.strip("*") for link in at.page_link] == made.NEWEST_FIRST
    assert [link.proto.query_string for link in at.page_link] == [f"run={name}" for name in made.NEWEST_FIRST]


def test_runs_shows_verdict_gain_retention_and_duration(show: Show, tmp_path: Path) -> None:
    made.fill_store(tmp_path)
    text = words(show())
    for verdict in (
        ":green-badge[:material/check_circle: Promote]",
        ":red-badge[:material/cancel: Reject]",
        ":violet-badge[:material/help: Inconclusive]",
    ):
        assert verdict in text
    assert "Gain: zh-answers **▲ +24.90 %**".replace(":", "\\:") in text
    assert "gained; 95 % interval +22.10 to +27.70" in text
    assert "Worst retention: english-text **✓ -0.58 %**".replace(":", "\\:") in text
    assert "kept; 95 % interval -0.77 to -0.39, budget 1 %" in text
    assert "Worst retention: english-endings **? -2.1 points**".replace(":", "\\:") in text
    assert "SmolLM2-135M-Instruct.Q4_1.gguf" in text
    assert "QLoRA" in text
    assert "took 12 min 24 s" in text
    assert "took 1 h 04 min" in text


def test_runs_shows_live_stage_errors_and_damage(show: Show, tmp_path: Path) -> None:
    made.fill_store(tmp_path)
    at = show()
    text = words(at)
    assert (at.progress[0].text, at.progress[0].value) == ("Training the adapter · stage 6 of 13", 38)
    assert "data.jsonl:7: a conversation must end with the assistant, found" in text
    assert f"The manifest of run {made.CORRUPT} cannot be read" in text


def test_runs_finds_by_name_and_shows_more_on_demand(show: Show, tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    for i in range(23):
        write_manifest(store, made.failed().model_copy(update={"run_id": f"sweep-20261120-2100{i:02}-000"}))
    at = show()
    assert len(at.page_link) == 20
    at.button[0].click().run()
    assert len(at.page_link) == 23
    at.text_input(key="find").set_value("sweep 210007").run()
    assert [link.value for link in at.page_link] == ["**sweep-20261120-210007-000**"]
    at.text_input(key="find").set_value("nothing like it").run()
    assert "No run's name contains 'nothing like it'." in words(at)


@pytest.mark.parametrize("run_id", [None, "anything"])
def test_an_empty_store_says_how_to_start(show: Show, run_id: str | None) -> None:
    at = show(run_id)
    assert "No runs in this store yet" in at.info[0].value
    assert [code.value for code in at.code] == ["forgetless run quickstart"]


@pytest.mark.parametrize("run_id", [None, "anything"])
def test_an_unknown_store_is_a_sentence(show: Show, monkeypatch: pytest.MonkeyPatch, run_id: str | None) -> None:
    monkeypatch.setenv("FORGETLESS_STORE", "ftp://host/folder")
    at = show(run_id)
    assert at.error[0].value == "The store cannot be read."
    assert "ftp://host/folder is not a store: expected a folder, file:///folder or s3://bucket/prefix." in words(at)


def test_run_shows_verdict_reason_and_all_numbers(show: Show, tmp_path: Path) -> None:
    made.fill_store(tmp_path)
    at = show(made.PROMOTED)
    text = words(at)
    assert at.header[0].value == ":green[:material/check_circle: Promote]"
    assert made.promoted().report.reason in [t.value for t in at.text]  # type: ignore[union-attr]
    changes = at.dataframe[0].value.set_index("Name")
    assert changes.loc["english-endings"].to_dict() | {"Margin (nats)": "-0.021 (-0.048 to +0.006)"} == {
        "Role": "retention",
        "Status": "✓ kept",
        "Change": "-1.2 points",
        "95 % interval": "-3.1 to +0.7",
        "Budget": "5 points",
        "Measure": "accuracy (by length)",
        "Before": "0.742",
        "After": "0.730",
        "Items": "600",
        "Lost / gained": "21 / 14",
        "Perplexity": "",
        "Margin (nats)": "-0.021 (-0.048 to +0.006)",
        "Clusters": "",
    }
    assert changes.loc["zh-answers", "Perplexity"] == "x 0.704"
    assert len(at.get("vega_lite_chart")) == 3 + 3  # target in %, retention in %, retention in points; training
    assert "1,540 rows read, 1,511 kept, 29 quarantined" in text
    assert "quarantined,no assistant turn,17,1.1 %" in text
    assert "✗ failed,warning,answers differ from each other,31 answers occur more than 5 times" in text
    assert "q8_0 (served),model-q8_0.gguf,144.8 MB," in text
    assert "proven: same tokens, template and ends; most likely token the same at 98.20%" in text
    assert "q4_k_m,model-q4_k_m.gguf,105.5 MB,none," in text
    assert "你好！我是一个小小的语言模型" in text
    assert "Registered in Ollama at http://127.0.0.1:11434 as quickstart." in text
    assert "ollama run quickstart" in text
    assert "dataset,↺ reused,0.1 s" in text
    assert "train,✓ computed,1 min 29 s" in text
    assert "✓ passed,critical,the end is learned" in text
    assert "learning_rate: 0.001" in text
    assert "教小模型用中文回答" in text
    assert "torch,2.13.0+cpu" in text


@pytest.mark.parametrize(
    ("run_id", "heading", "told"),
    [
        (made.REJECTED, ":red[:material/cancel: Reject]", ["✗ forgot,-38.20 %,-40.10 to -36.30,1 %"]),
        (
            made.INCONCLUSIVE,
            ":violet[:material/help: Inconclusive]",
            ["420 items", "Not registered in Ollama. Ollama does not answer.", f"forgetless chat {made.INCONCLUSIVE}"],
        ),
        (
            made.RUNNING,
            ":blue[:material/hourglass_top: Running]",
            ["Training the adapter · stage 6 of 13", "train,▶ running", "If it was interrupted, start it again"],
        ),
        (
            made.FAILED,
            ":red[:material/error: Failed]",
            ["This run failed while preparing the data. Mend the cause", "Fix the row.", "No data has been read yet."],
        ),
    ],
)
def test_run_shows_each_outcome(show: Show, tmp_path: Path, run_id: str, heading: str, told: list[str]) -> None:
    made.fill_store(tmp_path)
    at = show(run_id)
    assert at.header[0].value == heading
    text = words(at)
    assert [sentence for sentence in told if sentence not in text] == []


def test_an_unreadable_run_says_which_file_and_what_to_do(show: Show, tmp_path: Path) -> None:
    made.fill_store(tmp_path)
    at = show(made.CORRUPT)
    assert at.warning[0].value == "This run cannot be shown."
    assert f"runs/{made.CORRUPT}/manifest.json" in words(at)
    assert "start the run again" in words(at)


def test_an_unknown_run_is_said_and_another_can_be_chosen(show: Show, tmp_path: Path) -> None:
    made.fill_store(tmp_path)
    at = show("<b>../../etc/passwd</b>")
    assert "There is no such run in this store" in at.warning[0].value
    assert at.code[0].value == "<b>../../etc/passwd</b>"
    at.selectbox[0].select(made.REJECTED).run()
    assert at.header[0].value == ":red[:material/cancel: Reject]"
    assert at.query_params["run"] == made.REJECTED


def test_the_select_box_offers_all_runs_and_starts_at_the_newest(show: Show, tmp_path: Path) -> None:
    made.fill_store(tmp_path)
    (tmp_path / "runs" / made.CORRUPT / "manifest.json").unlink()
    (tmp_path / "runs" / made.CORRUPT).rmdir()
    st.cache_data.clear()
    at = show("")
    assert at.selectbox[0].options == made.NEWEST_FIRST[1:]
    assert at.selectbox[0].value == made.RUNNING
    at.selectbox[0].select(made.PROMOTED).run()
    at.selectbox[0].select(made.REJECTED).run()
    assert at.header[0].value == ":red[:material/cancel: Reject]"


@pytest.mark.parametrize("page", ["runs", "run"])
def test_hostile_text_is_shown_as_text(show: Show, tmp_path: Path, page: str) -> None:
    made.fill_store(tmp_path)
    at = show(made.FAILED, page)
    literal = [*(t.value for t in at.text), *(c.value for c in at.code)]  # elements that read neither Markdown nor HTML
    assert any("<script>alert('x')</script> ![x](https://evil.example/x.png)" in text for text in literal)
    markdown = [*at.markdown, *at.caption, *at.title, *at.header, *at.subheader, *at.error, *at.warning, *at.info]
    assert not [m.value for m in markdown if "evil.example" in m.value or "<script>" in m.value]
    assert not [m for m in at.markdown if m.allow_html]
    assert not at.get("html")
    assert not at.get("iframe")


def test_hostile_names_in_a_finished_run_stay_text(show: Show, tmp_path: Path) -> None:
    whole = made.promoted()
    assert whole.report
    assert whole.gguf
    deltas = [d.model_copy(update={"name": made.HOSTILE}) for d in whole.report.capabilities]
    whole.report = whole.report.model_copy(update={"capabilities": deltas, "reason": made.HOSTILE})
    whole.gguf = whole.gguf.model_copy(update={"sample": made.HOSTILE, "prompt": made.HOSTILE})
    model = whole.recipe.model.model_copy(update={"base": f"`x` {made.HOSTILE}"})
    whole.recipe = whole.recipe.model_copy(update={"model": model})
    write_manifest(FileStore(tmp_path), whole)
    at = show(made.PROMOTED)
    assert [t.value for t in at.text].count(made.HOSTILE) == 3
    assert f"`'x' {made.HOSTILE}` · QLoRA" in words(at)
    assert "\\!\\[x\\](https\\://evil.example/x.png)" in words(show())


def test_a_run_that_goes_on_is_followed(show: Show, tmp_path: Path) -> None:
    made.fill_store(tmp_path)
    at = show(made.RUNNING)
    manifest = made.running()
    manifest.stages = made.stages(6, "running")
    write_manifest(FileStore(tmp_path), manifest)
    st.cache_data.clear()  # what REFRESH_SECONDS do
    assert at.run().progress[0].text == "Scoring the adapter · stage 7 of 13"


def test_a_training_at_work_shows_its_curve_as_it_grows(show: Show, tmp_path: Path) -> None:
    store = made.fill_store(tmp_path)
    at = show(made.RUNNING)
    assert "No adapter is trained yet." in words(at)
    live = LiveCurve(store, made.RUNNING)
    for part in (made.curve(8)[:4], made.curve(8)[4:]):
        live.points += part
        live.write()
    st.cache_data.clear()  # what REFRESH_SECONDS do
    assert "Step 8 so far." in words(at.run())


def test_what_a_training_noted_is_shown_as_text(show: Show, tmp_path: Path) -> None:
    whole = made.promoted()
    assert whole.adapter
    notes = ["Memory ran out at step 3: packs of 512 tokens from there, steps unchanged.", made.HOSTILE]
    whole.adapter = whole.adapter.model_copy(update={"notes": notes, "ended": "early stopping", "best_step": 20})
    write_manifest(FileStore(tmp_path), whole)
    at = show(made.PROMOTED)
    assert notes[0].partition(":")[0] in at.info[0].value.replace("\\", "")
    assert made.HOSTILE not in [box.value for box in at.info]  # escaped: not read as Markdown
    assert "It was stopped early, and the best step, 20, is shipped." in words(at)


def test_what_a_licence_does_not_allow_is_shown_as_text(show: Show, tmp_path: Path) -> None:
    whole = made.promoted()
    whole.notes = ["rows.jsonl is under cc-by-nc-4.0, which allows no commercial use.", made.HOSTILE]
    write_manifest(FileStore(tmp_path), whole)
    at = show(made.PROMOTED)
    assert at.info[0].value.replace("\\", "") == whole.notes[0]
    assert made.HOSTILE not in [box.value for box in at.info]


def test_a_combined_run_names_its_parts_and_shows_no_training(show: Show, tmp_path: Path) -> None:
    write_manifest(FileStore(tmp_path), made.combined())
    text = words(show(made.COMBINED))
    assert (
        f"made by ties of 0.7 of {made.PROMOTED} (qlora), 0.3 of {made.REJECTED} (qlora): an adapter of rank 16."
        in text
    )
    assert "One counts twice." in text
    assert "This run combines others: it reads no training data." in text
    assert "has not been checked yet" not in text
    assert "combine,✓ computed" in text
    assert "dataset" not in text
    assert "method: ties" in text
    assert "learning_rate" not in text, "the first run's training is not this one's"
    assert "2 runs by ties" in words(show())


def test_a_sweep_shows_its_front_its_best_and_every_trial(show: Show, tmp_path: Path) -> None:
    made.fill_sweep(tmp_path)
    at = show(made.SWEEP, "sweep")
    text = words(at)
    assert at.header[0].value == ":green[:material/check_circle: Promote]"
    assert "Chosen among 4 points on one half of the items; on the other: Promote." in text
    assert len(at.get("vega_lite_chart")) == 2
    points = at.dataframe[0].value.set_index("Settings")
    assert points.loc["learning_rate 0.0001, rank 4"].to_dict() == {
        "Place": "best",
        "Gain (%)": "+10.00 (+8.50 to +11.50)",
        "Worst loss / budget": "+40% (+20% to +60%)",
        "Of": "english-text",
        "Trials": "1",
    }
    assert points.iloc[0].to_dict()["Place"] == "front, over budget"
    assert "5 trials (4 completed, 1 pruned)" in text.replace("\\", "")
    assert "these adapters only" in text
    assert '"learning_rate 0.0001, rank 4, strength 0.5",zh-answers,-0.50 (-1.50 to +0.50) %,noise' in text
    assert "too few points" in text
    assert "forgetless run rates.yaml --set train.rank=4 --set train.learning_rate=0.0001" in text
    assert "4,pruned," in text
    assert at.page_link[0].value.replace("\\", "") == f"**{made.sweep().run}**"
    assert not [m.value for m in (*at.markdown, *at.caption) if "evil.example" in m.value]


def test_a_trial_leads_to_its_sweep(show: Show, tmp_path: Path) -> None:
    write_manifest(FileStore(tmp_path), made.rejected().model_copy(update={"sweep": made.SWEEP}))
    (link,) = show(made.REJECTED).page_link
    assert "A trial of the sweep" in link.value
    assert link.proto.query_string == f"sweep={made.SWEEP}"


def test_a_sweep_at_work_is_followed_and_one_without_points_says_so(show: Show, tmp_path: Path) -> None:
    waiting = [trial.model_copy(update={"status": "pending", "deltas": []}) for trial in made.sweep().trials[:2]]
    empty = {"status": "running", "points": [], "best": None, "run": None, "confirmed": [], "verdict": None}
    more = {**empty, "reason": "", "differences": [], "importance": [], "command": "", "trials": waiting}
    made.fill_sweep(tmp_path, **more)
    at = show(made.SWEEP, "sweep")
    assert at.header[0].value == ":blue[:material/hourglass_top: Running]"
    assert "No trial is finished yet." in words(at)
    made.fill_sweep(tmp_path)
    st.cache_data.clear()  # what REFRESH_SECONDS do
    assert at.run().header[0].value == ":green[:material/check_circle: Promote]"


def test_without_sweeps_or_with_a_damaged_one_it_is_said(show: Show, tmp_path: Path) -> None:
    at = show("", "sweep")
    assert "No sweeps in this store yet" in at.info[0].value
    assert [code.value for code in at.code] == ["forgetless sweep quickstart --grid train.rank=4,8,16"]
    FileStore(tmp_path).write_bytes("sweeps/broken-1.json", b'{"version": 1')
    st.cache_data.clear()
    at = show("broken-1", "sweep")
    assert at.warning[0].value == "This sweep cannot be shown."
    assert "The record of sweep broken-1 cannot be read" in words(at)
    at = show("another", "sweep")
    assert "There is no such sweep in this store" in at.warning[0].value


@pytest.mark.parametrize("text", TEXTS)
def test_no_text_from_outside_is_read_as_markdown(text: str, show: Show, tmp_path: Path) -> None:
    """Whatever a row, an answer, a path or an error says: no element that reads Markdown makes a link, a picture, HTML,
    a colour or a formula of it."""
    run = made.promoted()
    run.recipe = run.recipe.model_copy(update={"description": text})
    run.recipe = run.recipe.model_copy(update={"model": run.recipe.model.model_copy(update={"base": text})})
    run.notes = [text]
    run.base = run.base.model_copy(update={"source": text})
    run.dataset = run.dataset.model_copy(update={"sources": [text], "quarantined": {text: 1}, "formats": {text: 1}})
    checks = [run.data_report.checks[0].model_copy(update={"observed": text, "expectation": text})]
    run.data_report = run.data_report.model_copy(update={"checks": checks})
    run.gguf = run.gguf.model_copy(update={"prompt": text, "sample": text})
    run.report = run.report.model_copy(update={"reason": text})
    run.adapter = run.adapter.model_copy(update={"notes": [text]})
    run.ollama = run.ollama and run.ollama.model_copy(update={"note": text})
    run.environment = {text: text}
    run.stages["train"].note = text
    failed = made.failed()
    failed.error = text
    broken = tmp_path / "runs" / "broken-20261122-000000-000"
    store = FileStore(tmp_path)
    for manifest in (run, failed):
        write_manifest(store, manifest)
    store.write_bytes(f"runs/{broken.name}/manifest.json", text.encode())
    for at in (show(), show(run.run_id), show(failed.run_id), show(broken.name), show(text)):
        for kind in (at.title, at.header, at.subheader, at.markdown, at.caption, at.error, at.warning, at.info):
            for element in kind:
                value = str(element.value)
                assert not active_parts(value), (type(element).__name__, value)
                assert not getattr(element, "allow_html", False)
                assert ":red[x]" not in value.replace("\\:", "").replace(code(value), "")
        for link in at.page_link:
            assert not active_parts(link.value)
    assert text in words(show(run.run_id)) or text == TEXTS[-1] or "\r" in text or "\u2028" in text


def code(value: str) -> str:
    """Return the code spans of a Markdown text, in which nothing is read."""
    return next(iter(value.split("`")[1:2]), "\0")


def test_the_script_would_be_found() -> None:
    assert active_parts(SCRIPT)
