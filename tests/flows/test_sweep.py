"""Sweeps through Prefect with real tiny trainings: the adapters of the first one serve the others."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows.cli import main
from flows.screen import draw_front
from tasks.core.manifest import RunManifest, read_manifest, run_ids
from tasks.core.store import FileStore
from tasks.core.sweep import Sweep, read_sweep, sweep_ids
from tests.conftest import ROOT
from tests.flows.test_finetune import recipe  # noqa: F401 (a fixture)

RATES = ["--grid", "train.learning_rate=0.002,0.005,0.02"]
SHARED = ("dataset", "validate", "base", "tokens", "before")


@pytest.fixture(scope="module")
def store(recipe: Path, tmp_path_factory: pytest.TempPathFactory, prefect_server: None) -> FileStore:  # noqa: F811
    """A store in which three rates were swept, and the best adapter scaled."""
    store = FileStore(tmp_path_factory.mktemp("swept") / "store")
    assert main([*command(recipe, store, *RATES), "--strengths", "0.5", "--debug"]) == 0
    return store


def command(recipe_file: Path, store: FileStore, *words: str) -> list[str]:
    return ["sweep", str(recipe_file), "--store", str(store.root), "--set", "train.epochs=1", *words]


def swept(store: FileStore) -> Sweep:
    """Return the sweep that was written last."""
    sweep = read_sweep(store, sweep_ids(store)[0])
    assert sweep is not None
    return sweep


def runs_of(store: FileStore, sweep: Sweep) -> list[RunManifest]:
    return [read_manifest(store, trial.run or "") for trial in sweep.trials if trial.strength is None]


def test_trials_are_runs_that_share_what_they_can_and_end_before_the_merge(store: FileStore) -> None:
    first = next(s for s in (read_sweep(store, name) for name in sweep_ids(store)) if s and s.search.strengths)
    assert first.status == "completed"
    runs = runs_of(store, first)
    assert [run.recipe.train.learning_rate for run in runs] == [0.002, 0.005, 0.02]
    assert [run.recipe.name for run in runs] == [f"{first.sweep_id}-{n:02}" for n in (1, 2, 3)]
    assert {run.stages[name].status for run in runs[1:] for name in SHARED} == {"reused"}
    assert {run.stages[name].status for run in runs for name in ("train", "after")} == {"computed"}
    for run in runs:
        assert (run.status, run.sweep, run.gguf, run.registry_version) == ("completed", first.sweep_id, None, None)
        assert "exports nothing" in run.stages["merge"].note
    assert len(first.points) == 4
    (scaled,) = [point for point in first.points if point.strength is not None]
    whole = next(p for p in first.points if p.values == scaled.values and p.strength is None)
    assert 0 < scaled.gain.value != whole.gain.value
    assert [trial.curve[-1][0] for trial in first.trials[:3]] == [9, 9, 9]


def test_what_is_chosen_on_one_half_is_judged_on_the_other(store: FileStore, recipe: Path) -> None:  # noqa: F811
    first = next(s for s in (read_sweep(store, name) for name in sweep_ids(store)) if s and s.search.strengths)
    assert first.best is not None
    best = first.points[first.best]
    assert best.gain.value == max(point.gain.value for point in first.points if point.is_inside)
    assert best.on_front
    chosen_on = next(d for d in first.trials[best.trials[0] - 1].deltas if d.primary)
    judged_on = next(d for d in first.confirmed if d.primary)
    assert chosen_on.n + judged_on.n == 12
    assert first.reason.startswith("Chosen among 4 points on one half of the items; on the other: ")
    assert f"--set train.learning_rate={best.values['train.learning_rate']}" in first.command
    assert f"forgetless run {recipe} --set train.epochs=1 " in first.command
    assert {d.point for d in first.differences} == {
        n for n, point in enumerate(first.points) if point.on_front and n != first.best
    }
    names = {number: str(number) for number in range(4)}
    drawn = "\n".join(draw_front(first, names))
    assert all(re.search(rf"│.*{name}", drawn) for name in names.values())


def test_the_same_command_again_runs_nothing_and_says_the_same(
    store: FileStore,
    recipe: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    known = set(run_ids(store))
    assert main(command(recipe, store, *RATES, "--strengths", "0.5")) == 0
    shown = capsys.readouterr().out
    assert set(run_ids(store)) == known
    sweep = swept(store)
    assert sweep.reason in shown
    assert sweep.command in shown
    assert "these adapters only" in shown
    assert "too few points to rely on" in shown
    for point in sweep.points:
        assert f"{point.gain.value:+.2f} [{point.gain.low:+.2f}, {point.gain.high:+.2f}]" in shown


def test_a_bad_key_is_refused_before_anything_starts(
    store: FileStore,
    recipe: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs, sweeps = run_ids(store), sweep_ids(store)
    assert main(command(recipe, store, "--grid", "train.rnk=4,8", "--json")) == 2
    said = json.loads(capsys.readouterr().out)
    assert said["error"] == "tiny.yaml: train.rnk: unknown key; did you mean 'rank'?"
    assert (run_ids(store), sweep_ids(store)) == (runs, sweeps)


def test_seeds_make_one_point_and_a_wider_interval(
    store: FileStore,
    recipe: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(command(recipe, store, "--grid", "train.learning_rate=0.005", "--seeds", "2", "--json")) == 0
    sweep = Sweep.model_validate_json(capsys.readouterr().out.splitlines()[-1])
    one, other = runs_of(store, sweep)
    assert (one.recipe.train.seed, other.recipe.train.seed) == (42, 43)
    assert (one.stages["train"].status, other.stages["train"].status) == ("reused", "computed")
    (point,) = sweep.points
    alone = [next(d for d in trial.deltas if d.primary) for trial in sweep.trials]
    assert point.trials == [1, 2]
    assert point.gain.value == pytest.approx(sum(d.delta for d in alone) / 2)
    assert point.gain.high - point.gain.low > max(d.high - d.low for d in alone)
    assert "other seeds (2 a point)" in sweep.scope


def test_a_training_that_falls_behind_is_pruned_and_keeps_its_checkpoint(
    store: FileStore,
    recipe: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = ["--grid", "train.learning_rate=0.002,0.005,0.02,1e-7", "--prune"]
    assert main(command(recipe, store, *more)) == 0
    sweep = swept(store)
    assert [trial.status for trial in sweep.trials] == ["completed"] * 3 + ["pruned"]
    assert len(sweep.points) == 3
    last = sweep.trials[3]
    assert re.match(r"Pruned at step 3 of 9: the validation loss is 10\.\d+, and 10\.\d+ is the median", last.error)
    assert last.curve[-1][0] == 3
    run = read_manifest(store, last.run)
    assert (run.status, run.error, run.stages["train"].status) == ("failed", last.error, "failed")
    assert list(store.root.glob("work/training-*/last*")), "its run's own command goes on from there"
    assert "pruned: learning_rate 1e-07" in capsys.readouterr().out
    known = run_ids(store)
    assert main(command(recipe, store, *more)) == 0
    assert run_ids(store) == known, "what was pruned is not tried again"


def test_a_trial_that_fails_is_recorded_and_tried_again_by_the_same_command(
    store: FileStore,
    recipe: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = ["--set", "train.learning_rate=0.005", "--grid", "data.min_rows=1000,2"]
    for _ in range(2):
        assert main(command(recipe, store, *more)) == 0
        sweep = swept(store)
        assert [trial.status for trial in sweep.trials] == ["failed", "completed"]
        assert "1,000" in sweep.trials[0].error or "1000" in sweep.trials[0].error
        assert sweep.status == "completed"
    of_sweep = [name for name in run_ids(store) if name.startswith(sweep.sweep_id)]
    assert len(of_sweep) == 3, "the failed one twice, the finished one once"
    assert main(command(recipe, store, "--grid", "data.min_rows=1000", "--json")) == 1
    assert (
        "None of the 1 trials finished. The first says: "
        in json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    )


def test_optuna_goes_on_as_if_it_had_never_stopped(store: FileStore, recipe: Path) -> None:  # noqa: F811
    asked = command(recipe, store, *RATES, "--optuna", "--seed", "4")
    assert main([*asked, "--trials", "3", "--concurrency", "2"]) == 0
    assert len(swept(store).trials) <= 3
    assert main([*asked, "--trials", "2", "--seed", "5"]) == 0
    first = [trial.run for trial in swept(store).trials]
    assert main([*asked, "--trials", "3", "--seed", "5"]) == 0
    resumed = swept(store)
    assert [trial.run for trial in resumed.trials][: len(first)] == first
    store.delete(f"sweeps/{resumed.sweep_id}.json")
    assert main([*asked, "--trials", "3", "--seed", "5"]) == 0
    assert [trial.values for trial in swept(store).trials] == [trial.values for trial in resumed.trials]


def test_killed_in_its_midst_a_sweep_reruns_no_finished_trial(store: FileStore, recipe: Path) -> None:  # noqa: F811
    words = command(recipe, store, *RATES, "--set", "description=killed")
    killed = kill_at_trial(2, words, store)
    assert [trial.status for trial in killed.trials] == ["completed", "running", "pending"]
    assert main(words) == 0
    again = read_sweep(store, killed.sweep_id)
    assert again.status == "completed"
    assert again.trials[0].run == killed.trials[0].run
    assert again.started == killed.started
    assert len(again.points) == 3


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_twelve_points_of_a_shortened_quickstart(
    tmp_path: Path, prefect_server: None, capsys: pytest.CaptureFixture[str]
) -> None:
    store = FileStore(tmp_path / "store")
    rates = "train.learning_rate=5e-4,1e-3,1.5e-3,3e-3"
    short = ["--set", "train.max_steps=12", "--set", "eval.limit=60"]
    words = ["sweep", "quickstart", "--store", str(store.root), *short, "--grid", "train.rank=4,8,16", "--grid", rates]
    killed = kill_at_trial(7, words, store)
    finished = {t.number: t.run for t in killed.trials if t.status == "completed"}
    assert sorted(finished) == [1, 2, 3, 4, 5, 6]
    assert main(words) == 0
    sweep = swept(store)
    assert {t.number: t.run for t in sweep.trials if t.number in finished} == finished
    assert [trial.status for trial in sweep.trials] == ["completed"] * 12
    assert len(sweep.points) == 12
    assert sum(name.startswith(sweep.sweep_id) for name in run_ids(store)) == 13, "the killed one alone was run again"
    assert {run.stages["before"].status for run in runs_of(store, sweep)[1:]} == {"reused"}
    shown = capsys.readouterr().out
    assert "┊" in shown
    assert sweep.reason in shown
    print(shown)


def kill_at_trial(number: int, words: list[str], store: FileStore) -> Sweep:
    """Return the record of a sweep whose process was killed in the midst of a trial."""
    from prefect.settings import PREFECT_API_URL

    environment = {**os.environ, "PREFECT_API_URL": PREFECT_API_URL.value() or "", "PYTHONPATH": str(ROOT)}
    before = set(sweep_ids(store))
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", *words],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    name = wait_for_trial(store, before, number, process).sweep_id
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    killed = read_sweep(store, name)
    assert killed is not None and killed.status == "running"
    return killed


def wait_for_trial(store: FileStore, before: set[str], number: int, process: subprocess.Popen) -> Sweep:
    """Return a new sweep's record as soon as that trial is running."""
    end = time.monotonic() + 3600
    while time.monotonic() < end and process.poll() is None:
        for name in set(sweep_ids(store)) - before:
            sweep = read_sweep(store, name)
            if sweep and any(trial.number == number and trial.status == "running" for trial in sweep.trials):
                return sweep
        time.sleep(0.02)
    raise AssertionError(f"trial {number} was not reached")
