"""Try settings of a recipe, each as a run of its own, and find the front of gain against forgetting.

The sweep's record in the store lists its trials and their runs, and is rewritten as they pass: a sweep that is started
again reruns no trial that finished. A trial that fails is recorded with its error and does not end the sweep.
"""

import contextlib
import contextvars
import shlex
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from prefect import flow, runtime
from prefect.artifacts import create_table_artifact
from pydantic import Field

from flows.finetune import finetune
from flows.score_model import score_model
from tasks.core.config import Recipe, SweepConfig
from tasks.core.errors import ComparisonError, ForgetlessError, PrunedError
from tasks.core.lease import hold_lease
from tasks.core.manifest import LiveCurve, RunManifest, new_run_id, read_manifest, run_ids, run_stage
from tasks.core.progress import report_progress, watch_progress
from tasks.core.records import ForgettingReport, ScoreSheet
from tasks.core.search import Search, Values, as_overrides, plan_search, propose_point, sweep_id
from tasks.core.settings import quiet_libraries, read_settings
from tasks.core.store import Store, open_store
from tasks.core.sweep import (
    Difference,
    Estimate,
    Sweep,
    SweepPoint,
    SweepTrial,
    choose_best,
    describe_values,
    importance_of,
    measure_points,
    over_seeds,
    read_sweep,
    write_sweep,
)
from tasks.evaluation.shipping import CHOOSES, CONFIRMS
from tasks.evaluation.steps import compare_scores

quiet_libraries()


def _run_name() -> str:
    return f"sweep-{Path(str((runtime.flow_run.parameters or {}).get('recipe'))).stem}"


@flow(name="sweep", flow_run_name=_run_name, persist_result=False, validate_parameters=True)
def sweep(
    search: SweepConfig,
    recipe: str = "quickstart",
    overrides: list[str] = [],  # noqa: B006
    data: str | None = None,
    concurrency: Annotated[int, Field(ge=1, le=64)] = 1,
    store: str | None = None,
) -> Sweep:
    """Return the sweep's record: its trials, the front of gain against forgetting, and the best inside the budgets.

    Args:
        search: The keys that are varied, and how.
        recipe: A shipped recipe's name, or the path of a recipe file on the worker.
        overrides: Other keys as section.key=value; placement.train=train-adapter/gpu puts trainings on a pool.
        data: A file, s3:// address or Hub data set in place of the recipe's sources.
        concurrency: Trials at once; each needs the memory of a run, where its stages are not placed elsewhere.
        store: Folder or s3://bucket/prefix; empty for the worker's own (FORGETLESS_STORE).
    """
    found = plan_search(recipe, overrides, data, search)
    settings = read_settings(store)
    place = open_store(settings)
    request = (recipe, overrides, data, settings.store_url)
    name = name_sweep(place, found, search)
    with hold_lease(place, run_stage(name)):  # of the same sweep twice at once, the second goes on from the first's end
        work = _Sweep(place, found, open_record(place, found, search, name), *request)
        with work.recorded():
            work.run_trials(concurrency)
            work.conclude()
    return work.record


def name_sweep(store: Store, found: Search, search: SweepConfig) -> str:
    """Return what a sweep is called: the same for the same question about the same data, base and items."""
    from tasks.data.sources import source_digests
    from tasks.evaluation.suite import suite_digest
    from tasks.models.base import locate_base

    recipe = found.recipe
    contents = [
        *source_digests(recipe.data, store),
        suite_digest(recipe.eval),
        locate_base(recipe.model, weights=False, store=store).content,
    ]
    return sweep_id(found, search, contents)


def open_record(store: Store, found: Search, search: SweepConfig, name: str) -> Sweep:
    """Return the record of a sweep, with the trials that finished before; it is not written yet."""
    known = read_sweep(store, name)
    runs = set(run_ids(store)) if known else set()
    record = Sweep(
        sweep_id=name,
        recipe=found.recipe,
        search=search,
        axes=found.axes,
        started=datetime.now(UTC),
        flow_run_id=str(runtime.flow_run.id) if runtime.flow_run.id else None,
    )
    if known:
        begun = [trial for trial in known.trials if trial.run in runs and trial.strength is None]
        record.trials, record.started = begun, known.started
    return record


class _Sweep:
    """A sweep at work: the one writer of its record."""

    def __init__(
        self, store: Store, found: Search, record: Sweep, recipe: str, overrides: list[str], data: str | None, url: str
    ) -> None:
        self.store, self.found, self.record = store, found, record
        self.recipe, self.overrides, self.data, self.url = recipe, overrides, data, url
        self.lock = threading.RLock()
        self.stopping = threading.Event()

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """Write the record as completed, or as failed with the error, when the sweep ends."""
        self.write()
        try:
            yield
            self.record.status = "completed"
        except BaseException as error:
            self.record.status = "failed"
            self.record.error = str(error) if isinstance(error, ForgetlessError) else f"{type(error).__name__}: {error}"
            raise
        finally:
            self.record.finished = datetime.now(UTC)
            self.write()

    def write(self) -> None:
        with self.lock:
            self.record.points = measure_points(self.record.trials)
            write_sweep(self.store, self.record)

    # --- trials -------------------------------------------------------------------------------------------------------

    def run_trials(self, concurrency: int) -> None:
        """Run every trial that is not finished, `concurrency` at once. Where this is interrupted, trainings leave a
        checkpoint and end."""
        if concurrency == 1:  # here, where signals come
            for trial in self.due_trials():
                self.run_trial(trial)
            return
        running: set[Future[None]] = set()
        with watch_progress(self._stop_where_asked), ThreadPoolExecutor(concurrency) as pool:
            try:
                for trial in self.due_trials():
                    running.add(pool.submit(contextvars.copy_context().run, self.run_trial, trial))
                    if len(running) == concurrency:
                        running = self._wait(running)
                while running:
                    running = self._wait(running)
            except BaseException:
                self.stopping.set()
                raise

    def _wait(self, running: set[Future[None]]) -> set[Future[None]]:
        done, running = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            future.result()
        return running

    def _stop_where_asked(self, *_: object) -> None:
        if self.stopping.is_set():
            raise ForgetlessError("The sweep was interrupted. The same command goes on from there.")

    def due_trials(self) -> Iterator[SweepTrial]:
        """Yield every trial that is to be run, as late as it can be chosen."""
        first = self.found.recipe.train.seed
        seeds = [first + i for i in range(self.record.search.seeds)]
        seen: set[int] = set()
        if self.found.known is not None:
            for values in self.found.known:
                self._trials_of(values, seeds)
        for number in range(self.count):
            for trial in self._trials_of(self._settings(number), seeds):
                if trial.status not in ("completed", "pruned") and trial.number not in seen:
                    seen.add(trial.number)
                    yield trial

    @property
    def count(self) -> int:
        return len(self.found.known) if self.found.known is not None else self.record.search.trials or 0

    def _settings(self, number: int) -> Values:
        if self.found.known is not None:
            return self.found.known[number]
        with self.lock:
            asked: list[Values] = []
            for trial in self.record.trials:
                asked += [] if trial.values in asked else [trial.values]
            if number < len(asked):
                return asked[number]
            done = [(p.values, p.gain.value, p.forgetting.value) for p in measure_points(self.record.trials)]
        return propose_point(self.found.axes, self.record.search.seed, number, done)

    def _trials_of(self, values: Values, seeds: list[int]) -> list[SweepTrial]:
        """Return the trials of some settings, which are added to the record where they are new."""
        with self.lock:
            known = {trial.seed: trial for trial in self.record.trials if trial.values == values}
            seeds = [values["train.seed"]] if "train.seed" in values else seeds
            for seed in seeds:
                if seed not in known:
                    number = max((trial.number for trial in self.record.trials), default=0) + 1
                    known[seed] = SweepTrial(number=number, values=values, seed=seed)
                    self.record.trials.append(known[seed])
            return [known[seed] for seed in seeds]

    def run_trial(self, trial: SweepTrial) -> None:
        """Run one trial to its end, whatever that is, and record it."""
        name = f"{self.record.sweep_id}-{trial.number:02}"
        total = self.count * self.record.search.seeds
        began = time.monotonic()
        manifest = self._finished_run(trial)
        trial.status, trial.error = "running", None
        if manifest is None:
            trial.run = new_run_id(name)
        self.write()
        report_progress("trial", trial.number, total, f"trial {trial.number} of {total}: {describe_values(trial)}")
        try:
            assert trial.run
            manifest = manifest or finetune(
                recipe=self.recipe,
                overrides=[*self.overrides, *self._overrides(trial), f"name={name}"],
                data=self.data,
                store=self.url,
                run_id=trial.run,
                sweep=self.record.sweep_id,
            )
            assert manifest.adapter and manifest.before and manifest.after
            curve = getattr(manifest.adapter, "curve", [])
            deltas = self._compare(manifest.before, manifest.after, CHOOSES).capabilities
            trial.deltas, trial.status = deltas, "completed"
        except PrunedError as error:
            trial.status, trial.error = "pruned", str(error)
            curve = LiveCurve(self.store, trial.run or "").read()
        except ComparisonError:  # no trial's own: all are scored on the same items
            raise
        except Exception as error:
            if self.stopping.is_set():
                raise
            trial.status, curve = "failed", []
            trial.error = str(error) if isinstance(error, ForgetlessError) else f"{type(error).__name__}: {error}"
        trial.curve = [(p.step, p.validation_loss) for p in curve if p.validation_loss is not None]
        trial.seconds = time.monotonic() - began
        self.write()
        report_progress("trial", -1, total, f"{trial.status}: {trial.error or describe_trial(trial)}")

    def _finished_run(self, trial: SweepTrial) -> RunManifest | None:
        """Return the run that a killed sweep's trial finished before this could be recorded."""
        manifest = read_manifest(self.store, trial.run) if trial.run else None
        return manifest if manifest and manifest.status == "completed" else None

    def _overrides(self, trial: SweepTrial) -> list[str]:
        seed = [] if trial.seed == self.found.recipe.train.seed else [f"train.seed={trial.seed}"]
        strength = [] if trial.strength is None else [f"export.strength={trial.strength:g}"]
        return [*seed, *as_overrides(trial.values), *strength]

    # --- what came of them --------------------------------------------------------------------------------------------

    def conclude(self) -> None:
        """Find the front and the best inside the budgets, on one half of the items, and judge that on the other."""
        record = self.record
        points = measure_points(record.trials)
        if not points:
            errors = [trial.error for trial in record.trials if trial.error]
            raise ForgetlessError(f"None of the {len(record.trials)} trials finished. The first says: {errors[0]}")
        if record.search.strengths:
            best = choose_best(points)
            gains = [point.gain.value for point in points]
            self._scale(points[gains.index(max(gains)) if best is None else best])
            points = measure_points(record.trials)
        record.points, record.best = points, choose_best(points)
        record.importance = importance_of(record.axes, points)
        if record.best is None:
            record.verdict, record.run, record.command = "reject", None, ""
            record.reason = (
                f"None of the {len(points)} points gains anything inside every budget: train more gently, or with "
                "replay."
            )
        else:
            self._judge(points[record.best])
        self._publish()

    def _scale(self, point: SweepPoint) -> None:
        for trial in [t for t in self.record.trials if t.number in point.trials]:
            manifest = read_manifest(self.store, trial.run or "")
            assert manifest.adapter and manifest.before
            for strength in sorted({*self.record.search.strengths} - {manifest.adapter.strength}):
                scaled = trial.model_copy(
                    update={"number": len(self.record.trials) + 1, "strength": strength, "seconds": None, "curve": []}
                )
                scaled.deltas = self._compare(manifest.before, self._sheet(scaled), CHOOSES).capabilities
                self.record.trials.append(scaled)
                self.write()

    def _judge(self, best: SweepPoint) -> None:
        record = self.record
        trials = {trial.number: trial for trial in record.trials}
        first = trials[best.trials[0]]  # not the best of the seeds, which would owe that to luck
        before = read_manifest(self.store, first.run or "").before
        assert before
        report = self._compare(before, self._sheet(first), CONFIRMS)
        record.run, record.confirmed, record.verdict = first.run, report.capabilities, report.verdict
        record.reason = (
            f"Chosen among {len(record.points)} points on one half of the items; on the other: {report.reason}"
        )
        words = ["forgetless", "run", self.recipe]
        for override in [*self.overrides, *self._overrides(first)]:
            words += ["--set", override]
        words += ["--data", self.data] if self.data else []
        words += ["--store", self.url] if self.url != read_settings().store_url else []
        record.command = shlex.join(words)
        record.differences = []
        for number, point in enumerate(record.points):
            if point.on_front and point != best:
                pairs = [(trials[a], trials[b]) for a in best.trials for b in point.trials]
                reports = [
                    self._compare(self._sheet(a), self._sheet(b), CONFIRMS) for a, b in pairs if a.seed == b.seed
                ]
                names = {d.name for d in record.confirmed if d.counts and (d.primary or d.role == "retention")}
                record.differences += _differences(number, names, reports)

    def _sheet(self, trial: SweepTrial) -> ScoreSheet:
        """Return the scores of a trial's adapter, at its strength."""
        manifest = read_manifest(self.store, trial.run or "")
        assert manifest.adapter and manifest.base and manifest.after
        if trial.strength is None:
            return manifest.after
        adapter = manifest.adapter.model_copy(update={"strength": trial.strength})
        recipe: Recipe = manifest.recipe
        return score_model(recipe.model, recipe.eval, manifest.base, adapter, self.url, f"strength {trial.strength:g}")

    def _compare(self, before: ScoreSheet, after: ScoreSheet, half: int) -> ForgettingReport:
        return compare_scores(self.found.recipe.eval, before, after, self.url, half)

    def _publish(self) -> None:
        record = self.record
        rows = [
            {
                "settings": describe_values(point),
                f"gain ({record.unit})": _shown(point.gain),
                "loss / budget": _shown(point.forgetting),
                "of": point.worst,
                "front": ("best" if number == record.best else "front") if point.on_front else "",
            }
            for number, point in enumerate(record.points)
        ]
        create_table_artifact(rows, key="sweep", description=f"{record.sweep_id}: {record.reason}")


def describe_trial(trial: SweepTrial) -> str:
    """Return what a completed trial gained and forgot, on the half of the items that chooses."""
    (point,) = measure_points([trial])
    lost = f", loss {point.forgetting.value:.0%} of the budget of {point.worst}" if point.worst else ""
    return f"gain {point.gain.value:+.2f}{lost}"


def _shown(estimate: Estimate) -> str:
    return f"{estimate.value:+.2f} [{estimate.low:+.2f}, {estimate.high:+.2f}]"


def _differences(point: int, names: set[str], reports: list[ForgettingReport]) -> list[Difference]:
    """Return what the adapters of a point do otherwise in capabilities, from comparisons of each seed's."""
    found = []
    for delta in reports[0].capabilities if reports else []:
        if delta.name in names:
            same = [d for report in reports for d in report.capabilities if d.name == delta.name]
            estimate = over_seeds([Estimate(value=d.delta, low=d.low, high=d.high) for d in same])
            found.append(Difference(point=point, name=delta.name, unit=delta.unit, delta=estimate))
    return found
