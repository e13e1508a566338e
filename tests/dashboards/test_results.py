"""Reading, ordering and formatting, apart from any page."""

import shutil
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import streamlit as st

from dashboards import results
from tasks.core.errors import StoreError
from tasks.core.manifest import StageState, write_manifest
from tests.dashboards import manifests as made

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _fresh_caches() -> None:
    st.cache_data.clear()


def test_the_dashboard_imports_neither_torch_nor_prefect_and_only_core() -> None:
    code = (
        "import sys, dashboards.results, dashboards.charts, dashboards.app\n"
        "heavy = {'torch', 'prefect', 'transformers', 'peft', 'datasets', 'lm_eval', 'great_expectations', 'boto3'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
        "print(sorted(m for m in sys.modules if m.split('.')[0] == 'flows' or m.startswith('tasks.') "
        "and not m.startswith('tasks.core')))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-2:] == ["[]", "[]"], done.stderr


def test_pages_neither_switch_html_on_nor_load_from_elsewhere() -> None:
    for path in (ROOT / "dashboards").rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        assert "unsafe_allow_html" not in source
        assert "st.html" not in source
        assert 'page_icon=":material' not in source  # Streamlit fetches such an icon from fonts.gstatic.com


def test_readers_are_cached_by_store_and_run(tmp_path: Path) -> None:
    first = made.fill_store(tmp_path / "a").url
    second = made.fill_store(tmp_path / "b").url
    before = results.read_run(first, made.PROMOTED)
    shutil.rmtree(tmp_path / "a")
    assert results.read_run(first, made.PROMOTED) == before
    assert results.list_runs(second) == made.NEWEST_FIRST
    st.cache_data.clear()
    assert results.list_runs(first) == []


def test_a_run_without_manifest_or_with_a_strange_name_is_a_problem(tmp_path: Path) -> None:
    url = made.fill_store(tmp_path).url
    (tmp_path / "runs" / "new-20261121-000000-000").mkdir()
    (tmp_path / "runs" / "Not A Run").mkdir()
    assert "has written no manifest" in results.read_run(url, "new-20261121-000000-000").problem
    assert "'Not A Run' is not a run's name" in results.read_run(url, "Not A Run").problem
    assert "Rename or remove the folder" in results.advice_for_unreadable(url, "Not A Run")


def test_a_manifest_of_a_newer_version_says_upgrade(tmp_path: Path) -> None:
    store = made.fill_store(tmp_path)
    store.write_bytes(f"runs/{made.PROMOTED}/manifest.json", b'{"version": 99}')
    assert "Upgrade forgetless" in results.read_run(store.url, made.PROMOTED).problem


def test_a_store_that_is_a_file_is_empty_or_an_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is not a store"):
        results.list_runs("ftp://host/x")
    assert results.pulse("ftp://host/x")[0].startswith("ftp://host/x is not a store")
    (tmp_path / "file").write_text("x")
    assert results.list_runs((tmp_path / "file").as_uri()) == []


def test_the_pulse_changes_with_a_stage_and_with_a_new_run(tmp_path: Path) -> None:
    store = made.fill_store(tmp_path)
    calm = results.pulse(store.url, [made.RUNNING])
    assert results.pulse(store.url, [made.RUNNING]) == calm
    manifest = made.running()
    manifest.stages = made.stages(7, "running")
    write_manifest(store, manifest)
    st.cache_data.clear()
    further = results.pulse(store.url, [made.RUNNING])
    assert further != calm
    write_manifest(store, manifest.model_copy(update={"run_id": "next-20261123-000000-000"}))
    st.cache_data.clear()
    assert results.pulse(store.url, [made.RUNNING]) != further


def test_the_worst_retention_is_the_forgotten_one_then_the_nearest_to_its_budget() -> None:
    kept, forgot = made.text_retention(-0.9, 0.05, "kept"), made.endings_retention(-11, 4, "forgot")
    at_chance = made.endings_retention(-30, 4, "at chance", name="coin", counts=False)

    def worst(*deltas: object) -> str:
        figure = results.worst_retention(made.completed(made.PROMOTED, made.report("reject", "", list(deltas))))  # type: ignore[arg-type]
        return figure.label if figure else ""

    assert worst(kept, forgot, at_chance) == "Worst retention: english-endings"
    assert worst(made.endings_retention(-1, 1, "kept"), kept, at_chance) == "Worst retention: english-text"
    assert worst(kept) == "Retention: english-text"
    assert worst(made.target(1, 1, "gained")) == ""


def test_the_gain_is_the_primary_targets() -> None:
    other = made.target(50, 1, "gained", name="other", primary=False)
    manifest = made.completed(made.PROMOTED, made.report("promote", "", [other, made.target(3, 1, "gained")]))
    figure = results.gain(manifest)
    assert figure
    assert (figure.label, figure.value) == ("Gain: zh-answers", "▲ +3.00 %")


def test_a_run_without_verdict_and_a_failure_after_the_verdict_show_both_facts() -> None:
    manifest = made.promoted()
    manifest.report = None
    assert [b.label for b in results.badges(manifest)] == ["No verdict"]
    manifest = made.promoted()
    manifest.status = "failed"
    assert [b.label for b in results.badges(manifest)] == ["Failed", "Promote"]


@pytest.mark.parametrize(
    ("done", "then", "text"),
    [
        (0, "running", "Preparing the data · stage 1 of 13"),
        (5, None, "Next: Training the adapter · stage 6 of 13"),
        (12, "running", "Publishing the results · stage 13 of 13"),
        (13, None, "Publishing the results · stage 13 of 13"),
    ],
)
def test_progress_names_the_stage_at_work(done: int, then: str | None, text: str) -> None:
    manifest = made.running()
    manifest.stages = made.stages(done, then)
    progress = results.progress(manifest)
    assert progress.text.removeprefix("Next: " if done == 13 else "") == text
    assert progress.share == pytest.approx(done / 13)


def test_times_sizes_and_changes_read_well() -> None:
    manifest = made.promoted()
    assert results.describe_time(manifest, made.START + timedelta(hours=3)) == "3 h ago · took 12 min 24 s"
    assert results.describe_time(made.running(), made.START + timedelta(seconds=20)) == "started just now"
    assert [results.format_seconds(s) for s in (0.04, 9.96, 59.7, 3780)] == [
        "0.0 s",
        "10.0 s",
        "1 min 00 s",
        "1 h 03 min",
    ]
    assert [results.format_age(s) for s in (5, 700, 7200, 90000, 400000)] == [
        "just now",
        "11 min ago",
        "2 h ago",
        "25 h ago",
        "4 days ago",
    ]
    assert [results.format_bytes(n) for n in (7, 4_100, 105_450_000, 5e9)] == ["7 B", "4.1 kB", "105.5 MB", "5.0 GB"]
    assert results.format_change(-0.004, "%") == "-0.00 %"
    assert results.format_change(2, "points") == "+2.0 points"


def test_long_errors_are_cut_in_the_list_alone() -> None:
    assert results.first_line("\n  a\nb") == "a"
    assert results.first_line("x" * 500) == "x" * 239 + "…"
    assert results.first_line("") == ""


def test_stages_of_a_newer_version_come_last() -> None:
    manifest = made.running()
    manifest.stages["evaluate-again"] = StageState(status="skipped")
    table = results.stage_table(manifest)
    assert list(table["Stage"])[-1] == "evaluate-again"
    assert list(table["Status"])[5] == "▶ running"
