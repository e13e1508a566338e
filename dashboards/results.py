"""What the dashboard shows, read from the store: runs as cards, figures, tables and sentences.

All numbers are those of the manifests, formatted; nothing is measured again, and neither Prefect nor torch is imported.
Text that came from outside (errors, answers, paths) is returned as it is; pages show it where Markdown is not read.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

import pandas as pd
import streamlit as st
import yaml

from tasks.core.errors import ForgetlessError, StoreError, describe_os_error
from tasks.core.manifest import LiveCurve, RunManifest, manifest_path, read_manifest, run_ids
from tasks.core.records import (
    AdapterRef,
    ArtifactRef,
    CombinedRef,
    DataReport,
    DatasetRef,
    Delta,
    GgufRef,
    ProofRef,
    TrainPoint,
)
from tasks.core.settings import read_settings
from tasks.core.store import Store, open_store
from tasks.core.sweep import Estimate, Sweep, describe_values, sweep_ids
from tasks.core.sweep import read_sweep as read_record

REFRESH_SECONDS = 5
FIRST_COMMAND = "forgetless run quickstart"
FIRST_SWEEP = "forgetless sweep quickstart --grid train.rank=4,8,16"

STAGE_WORDS = {
    "base": "Fetching the base model",
    "dataset": "Preparing the data",
    "validate": "Checking the data",
    "tokens": "Tokenising the rows",
    "before": "Scoring the base model",
    "train": "Training the adapter",
    "combine": "Combining the adapters",
    "after": "Scoring the adapter",
    "compare": "Comparing the scores",
    "merge": "Merging the adapter",
    "gguf": "Converting to GGUF",
    "proof": "Proving the export",
    "served": "Scoring the exported file",
    "ollama": "Registering in Ollama",
    "publish": "Publishing the results",
}
STATUS_SYMBOLS = {
    "gained": "▲",
    "lost": "▼",
    "unclear": "?",
    "kept": "✓",
    "forgot": "✗",
    "inconclusive": "?",
    "at chance": "–",
    "computed": "✓",
    "reused": "↺",
    "running": "▶",
    "pending": "·",
    "skipped": "–",
    "failed": "✗",
}
MEASURES = {
    "bits_per_byte": "bits per byte",
    "acc": "accuracy",
    "acc_norm": "accuracy (by length)",
    "exact_match": "exact match",
}


TRIAL_STATUSES = ("completed", "running", "pending", "pruned", "failed")
DELTA_COLUMNS = {
    "Name": st.column_config.TextColumn(pinned=True),
    "Lost / gained": st.column_config.TextColumn(
        help="Items right before and wrong after / wrong before and right after"
    ),
    "Perplexity": st.column_config.TextColumn(help="Perplexity per token after, divided by before: below 1 is better"),
    "To settle": st.column_config.TextColumn(help="Items that would show it kept, if nothing truly changed"),
    "Margin (nats)": st.column_config.TextColumn(
        help="Mean change of the right answer's log-probability minus the best other one's, with its interval"
    ),
}


@dataclass(frozen=True)
class Badge:
    label: str
    icon: str
    color: Literal["green", "red", "violet", "blue", "gray"]


BADGES = {
    "promote": Badge("Promote", ":material/check_circle:", "green"),
    "reject": Badge("Reject", ":material/cancel:", "red"),
    "inconclusive": Badge("Inconclusive", ":material/help:", "violet"),
    "running": Badge("Running", ":material/hourglass_top:", "blue"),
    "failed": Badge("Failed", ":material/error:", "red"),
    "completed": Badge("No verdict", ":material/do_not_disturb_on:", "gray"),
    "unreadable": Badge("Unreadable", ":material/broken_image:", "gray"),
}


@dataclass(frozen=True)
class Figure:
    """One measured change as text: what changed, by how much, and the interval (with the budget, if it has one)."""

    label: str
    value: str
    detail: str


@dataclass(frozen=True)
class Progress:
    """How far a run is: `share` of its stages that are done (0 to 1) and the stage at work, in words."""

    share: float
    text: str


@dataclass(frozen=True)
class Run:
    """One run of the store. Without a manifest, `problem` says why there is none to show."""

    run_id: str
    manifest: RunManifest | None = None
    problem: str = ""


@dataclass(frozen=True)
class RunCard:
    """One run in the list. Failed and unreadable runs have a `problem`, running ones a `progress`."""

    run_id: str
    badges: tuple[Badge, ...]
    base: str = ""
    method: str = ""
    when: str = ""
    gain: Figure | None = None
    retention: Figure | None = None
    progress: Progress | None = None
    problem: str = ""


# Reading the store


def store_url() -> str:
    """Return the URL of the store this dashboard shows (FORGETLESS_STORE, or .forgetless in the working folder)."""
    return read_settings().store_url


@st.cache_resource(max_entries=4, show_spinner=False)
def _open(url: str) -> Store:
    return open_store(read_settings(url))


@st.cache_data(ttl=REFRESH_SECONDS, show_spinner=False)
def list_runs(url: str) -> list[str]:
    """Return the names of all runs of a store, newest first. Raises ForgetlessError if the store cannot be read."""
    try:
        return run_ids(_open(url))[::-1]
    except OSError as error:
        raise StoreError(describe_os_error(error, f"list the runs of {url}")) from error


@st.cache_data(ttl=REFRESH_SECONDS, max_entries=256, show_spinner=False)
def read_run(url: str, run_id: str) -> Run:
    """Return one run; a manifest that is absent, damaged or too new gives a Run with a problem, never an exception."""
    try:
        store = _open(url)
        if store.read_bytes(manifest_path(run_id)) is None:
            return Run(run_id, problem="This run has written no manifest: it has only just started, or never did.")
        return Run(run_id, read_manifest(store, run_id))
    except ForgetlessError as error:
        return Run(run_id, problem=str(error))


@st.cache_data(ttl=REFRESH_SECONDS, max_entries=64, show_spinner=False)
def read_live_curve(url: str, run_id: str) -> list[TrainPoint]:
    """Return what a training at work has told of its curve so far. Raises ForgetlessError for an unreadable store."""
    return LiveCurve(_open(url), run_id).read()


@st.cache_data(ttl=REFRESH_SECONDS, show_spinner=False)
def list_sweeps(url: str) -> list[str]:
    """Return the names of all sweeps of a store, the last written first. Raises ForgetlessError if the store cannot be
    read."""
    try:
        return sweep_ids(_open(url))
    except OSError as error:
        raise StoreError(describe_os_error(error, f"list the sweeps of {url}")) from error


@st.cache_data(ttl=REFRESH_SECONDS, max_entries=64, show_spinner=False)
def read_sweep(url: str, name: str) -> Sweep | str:
    """Return a sweep's record, or a sentence on why there is none to show."""
    try:
        return read_record(_open(url), name) or f"There is no record of the sweep {name} any more."
    except ForgetlessError as error:
        return str(error)


def sweep_pulse(url: str, name: str) -> str:
    """Return a value that changes when a sweep comes a trial further."""
    sweep = read_sweep(url, name)
    return sweep if isinstance(sweep, str) else f"{sweep.status} {[trial.status for trial in sweep.trials]}"


def find_runs(run_names: Sequence[str], text: str | None) -> list[str]:
    """Return the names that contain every word of `text`, whatever its case; all of them for no text."""
    words = (text or "").lower().split()
    return [name for name in run_names if all(word in name for word in words)]


def choose_run(run_names: Sequence[str], wanted: str | None) -> str | None:
    """Return the run to show: the wanted one, the newest if none is wanted, None if there is no such run."""
    if not wanted:
        return run_names[0]
    return wanted if wanted in run_names else None


def pulse(url: str, shown: Sequence[str] = ()) -> tuple[str, ...]:
    """Return a value that changes when a run appears, or when one of the runs that are `shown` comes a stage further.
    A store that cannot be read has its error as pulse."""
    try:
        return (*list_runs(url), *(_standing(url, read_run(url, name)) for name in shown))
    except ForgetlessError as error:
        return (str(error),)


def _standing(url: str, run: Run) -> str:
    if run.manifest is None:
        return run.problem
    steps = len(read_live_curve(url, run.run_id)) if is_training(run.manifest) else 0
    return f"{run.manifest.status} {[(name, stage.status) for name, stage in run.manifest.stages.items()]} {steps}"


def is_training(manifest: RunManifest) -> bool:
    return manifest.status == "running" and "train" in manifest.stages and manifest.stages["train"].status == "running"


# A run in a few words


def summarise(run: Run, now: datetime | None = None) -> RunCard:
    """Return a run as a card of the list."""
    manifest = run.manifest
    if manifest is None:
        return RunCard(run.run_id, (BADGES["unreadable"],), problem=first_line(run.problem))
    running = manifest.status == "running"
    return RunCard(
        run.run_id,
        badges(manifest),
        base=base_name(manifest),
        method=method_name(manifest),
        when=describe_time(manifest, now),
        gain=gain(manifest),
        retention=worst_retention(manifest),
        progress=progress(manifest) if running else None,
        problem=first_line(manifest.error or "No error was recorded.") if manifest.status == "failed" else "",
    )


def badges(manifest: RunManifest) -> tuple[Badge, ...]:
    """Return the run's status where it is not simply completed, then its verdict where it has one."""
    verdict = (BADGES[manifest.report.verdict],) if manifest.report else ()
    if manifest.status == "completed":
        return verdict or (BADGES["completed"],)
    return (BADGES[manifest.status], *verdict)


def base_name(manifest: RunManifest) -> str:
    """Return the base's file or folder name where it is a path, else its Hub id as it is."""
    base = manifest.recipe.model.base
    return base.rstrip("/").rpartition("/")[2] if base.startswith(("package:", "/")) else base


def method_name(manifest: RunManifest) -> str:
    if manifest.combine:
        return f"{len(manifest.combine.runs)} runs by {manifest.combine.method}"
    method = manifest.recipe.train.method
    names = {"lora": "LoRA", "qlora": "QLoRA", "int8": "LoRA on int8", "oft": "OFT", "full": "All weights"}
    return names.get(method, f"{method.capitalize()} tuning")


def gain(manifest: RunManifest) -> Figure | None:
    """Return the change of the primary target, or of the first target if none is marked."""
    targets = [d for d in capabilities(manifest) if d.role == "target"]
    chosen = next((d for d in targets if d.primary), targets[0] if targets else None)
    return _figure("Gain", chosen) if chosen else None


def worst_retention(manifest: RunManifest) -> Figure | None:
    """Return the retention capability that weighs most on the verdict: forgotten before open before kept, then the one
    whose interval reaches furthest into its budget (a share of the budget, so that units may differ)."""
    retained = [d for d in capabilities(manifest) if d.role == "retention"]
    order = ["forgot", "lost", "inconclusive", "unclear", "kept", "gained", "at chance"]
    retained.sort(key=lambda d: (not d.counts, order.index(d.status), d.low / d.budget if d.budget else math.inf))
    return _figure("Worst retention" if len(retained) > 1 else "Retention", retained[0]) if retained else None


def capabilities(manifest: RunManifest) -> list[Delta]:
    return manifest.report.capabilities if manifest.report else []


def _figure(what: str, delta: Delta) -> Figure:
    budget = f", budget {format_budget(delta)}" if delta.budget is not None else ""
    return Figure(
        f"{what}: {delta.name}",
        f"{STATUS_SYMBOLS[delta.status]} {format_change(delta.delta, delta.unit)}",
        f"{delta.status}; 95 % interval {format_interval(delta)}{budget}",
    )


def progress(manifest: RunManifest) -> Progress:
    """Return how far a run is, counting the stages that have ended."""
    names = manifest.stage_names
    status = {name: manifest.stages[name].status if name in manifest.stages else "pending" for name in names}
    ended = [name for name in names if status[name] in ("computed", "reused", "skipped")]
    at_work = [name for name in names if status[name] == "running"]
    waiting = [name for name in names if status[name] == "pending"]
    name = next(iter([*at_work, *waiting]), names[-1])
    verb = "" if at_work else "Next: "
    return Progress(
        len(ended) / len(names), f"{verb}{STAGE_WORDS[name]} · stage {names.index(name) + 1} of {len(names)}"
    )


def describe_failure(manifest: RunManifest) -> str:
    """Return where a failed run stopped, and what to do."""
    stage = failed_stage(manifest)
    where = f"This run failed while {stage[0].lower()}{stage[1:]}." if stage else "This run failed."
    return f"{where} Mend the cause and start it again with the same command: what has finished is not done twice."


def advice_for_unreadable(url: str, run_id: str) -> str:
    try:
        path = f"{url}/{manifest_path(run_id)}"
    except ForgetlessError:
        return f"Rename or remove the folder {url}/runs/{run_id}."
    return f"The file is {path}. If it is lost, start the run again: what has finished is not done twice."


def failed_stage(manifest: RunManifest) -> str:
    """Return the stage that failed in words, such as "Training the adapter", or "" if none is marked."""
    name = next((name for name, stage in manifest.stages.items() if stage.status == "failed"), "")
    return STAGE_WORDS.get(name, name)


def describe_time(manifest: RunManifest, now: datetime | None = None) -> str:
    """Return when the run started and how long it took, such as "3 h ago · took 4 min 12 s"."""
    now = now or datetime.now(UTC)
    since = max(0.0, (now - manifest.started).total_seconds())
    if manifest.seconds is not None:
        return f"{format_age(since)} · took {format_seconds(manifest.seconds)}"
    return f"started {format_age(since)}"


def describe_run(manifest: RunManifest, now: datetime | None = None) -> str:
    """Return one line of Markdown: base, method, when it started and how long it took."""
    started = manifest.started.astimezone(UTC).strftime("%-d %b %Y, %H:%M UTC")
    base = code_span(manifest.recipe.model.base)
    return f"{base} · {method_name(manifest)} · {started} · {describe_time(manifest, now)}"


# A sweep


def sweep_badge(sweep: Sweep) -> Badge:
    return BADGES[sweep.verdict or "completed"] if sweep.status == "completed" else BADGES[sweep.status]


def describe_sweep(sweep: Sweep, now: datetime | None = None) -> str:
    """Return one line: how many trials came to which end, of how many seeds, and when it began."""
    counts = {status: sum(trial.status == status for trial in sweep.trials) for status in TRIAL_STATUSES}
    told = ", ".join(f"{count:,} {status}" for status, count in counts.items() if count)
    age = format_age(max(0.0, ((now or datetime.now(UTC)) - sweep.started).total_seconds()))
    return f"{len(sweep.trials):,} trials ({told}) · started {age} · intervals speak of {sweep.scope}"


def point_table(sweep: Sweep) -> pd.DataFrame:
    """Return the points of a sweep as text, those that gain most first."""
    order = sorted(range(len(sweep.points)), key=lambda i: -sweep.points[i].gain.value)
    return _table(
        {
            "Settings": describe_values(sweep.points[i]),
            "Place": point_place(sweep, i),
            f"Gain ({sweep.unit})": _estimate(sweep.points[i].gain, "+.2f"),
            "Worst loss / budget": _estimate(sweep.points[i].forgetting, "+.0%"),
            "Of": sweep.points[i].worst,
            "Trials": ", ".join(map(str, sweep.points[i].trials)),
        }
        for i in order
    )


def point_place(sweep: Sweep, number: int) -> str:
    """Return what a point is to its sweep, in a word or two."""
    point = sweep.points[number]
    if number == sweep.best:
        return "best"
    return ("front" if point.on_front else "behind") + ("" if point.is_inside else ", over budget")


def trial_table(sweep: Sweep) -> pd.DataFrame:
    """Return every trial with its end, its run and its error."""
    return _table(
        {
            "Trial": str(trial.number),
            "Status": trial.status,
            "Settings": describe_values(trial),
            "Time": "" if trial.seconds is None else format_seconds(trial.seconds),
            "Run": trial.run or "",
            "Error": first_line(trial.error or ""),
        }
        for trial in sweep.trials
    )


def difference_table(sweep: Sweep) -> pd.DataFrame:
    """Return what the other points of the front do otherwise than the best, on the half of the items that judges."""
    return _table(
        {
            "Settings": describe_values(sweep.points[d.point]),
            "Capability": d.name,
            "Beside the best": f"{_estimate(d.delta, '+.2f')} {d.unit}",
            "Reads as": "noise" if d.is_noise else "differs",
        }
        for d in sweep.differences
    )


def importance_table(sweep: Sweep) -> pd.DataFrame:
    return _table(
        {
            "Key": i.key,
            "Of gain": f"{i.gain:.0%}",
            "Of forgetting": f"{i.forgetting:.0%}",
            "By chance": f"{i.chance:.0%}",
            "Reliable": "yes" if i.is_reliable else "too few points",
        }
        for i in sweep.importance
    )


def _estimate(estimate: Estimate, form: str) -> str:
    return f"{estimate.value:{form}} ({estimate.low:{form}} to {estimate.high:{form}})"


# Tables


def delta_table(deltas: Sequence[Delta]) -> pd.DataFrame:
    """Return the measured changes as text, one row each, in the order of the report; columns nobody fills are left
    out."""
    table = _table(
        {
            "Name": d.name,
            "Role": f"primary {d.role}" if d.primary else d.role,
            "Status": f"{STATUS_SYMBOLS[d.status]} {d.status}" + ("" if d.counts else ", not counted"),
            "Change": format_change(d.delta, d.unit),
            "95 % interval": format_interval(d),
            "Budget": format_budget(d),
            "Measure": MEASURES.get(d.measure, d.measure),
            "Before": f"{d.before:.3f}",
            "After": f"{d.after:.3f}",
            "Items": f"{d.n:,}",
            "Lost / gained": "" if d.lost_items is None else f"{d.lost_items:,} / {d.gained_items or 0:,}",
            "Perplexity": "" if d.perplexity_ratio is None else f"x {d.perplexity_ratio:.3f}",
            "To settle": "" if d.items_to_settle is None else f"{d.items_to_settle:,} items",
            "Margin (nats)": _margin(d),
            "Clusters": "" if d.clusters is None else f"{d.clusters:,}",
        }
        for d in deltas
    )
    return table.loc[:, [column for column in table if table[column].any()]]


def _margin(delta: Delta) -> str:
    if delta.margin_delta is None:
        return ""
    interval = "" if delta.margin_low is None else f" ({delta.margin_low:+.3f} to {delta.margin_high or 0:+.3f})"
    return f"{delta.margin_delta:+.3f}{interval}"


def stage_table(manifest: RunManifest) -> pd.DataFrame:
    """Return every stage, in order, with its status and seconds; stages that a newer version added come last."""
    names = dict.fromkeys([*manifest.stage_names, *manifest.stages])
    rows = []
    for name in names:
        stage = manifest.stages.get(name)
        status = stage.status if stage else "pending"
        rows.append(
            {
                "Stage": name,
                "Status": f"{STATUS_SYMBOLS[status]} {status}",
                "Time": format_seconds(stage.seconds) if stage and stage.seconds is not None else "",
                "Note": stage.note if stage else "",
                "Where": (stage.uri or "") if stage else "",
            }
        )
    return pd.DataFrame(rows)


def row_table(dataset: DatasetRef) -> pd.DataFrame:
    """Return how many rows were read, kept by split, and quarantined by reason."""
    rows = [("read", "", dataset.read)]
    rows += [("kept", split, n) for split, n in dataset.rows.items()]
    rows += [("quarantined", reason, n) for reason, n in sorted(dataset.quarantined.items(), key=lambda kv: -kv[1])]
    return _table(
        {
            "Rows": what,
            "Split or reason": detail,
            "Count": f"{n:,}",
            "Share": f"{100 * n / dataset.read:.1f} %" if dataset.read else "",
        }
        for what, detail, n in rows
    )


def describe_rows(dataset: DatasetRef) -> str:
    kept, quarantined = sum(dataset.rows.values()), sum(dataset.quarantined.values())
    formats = ", ".join(f"{name} ({n:,})" for name, n in dataset.formats.items())
    return f"{dataset.read:,} rows read, {kept:,} kept, {quarantined:,} quarantined. Formats: {formats or 'none'}."


def check_table(report: DataReport) -> pd.DataFrame:
    """Return the data checks, failed ones first, the most severe first among them."""
    severities = ["critical", "warning", "info"]
    checks = sorted(report.checks, key=lambda c: (c.passed, severities.index(c.severity)))
    return _table(
        {
            "Result": "✓ passed" if check.passed else "✗ failed",
            "Severity": check.severity,
            "Check": check.expectation,
            "Observed": check.observed,
        }
        for check in checks
    )


def file_table(gguf: GgufRef, served: str, proof: ProofRef | None = None) -> pd.DataFrame:
    """Return the exported files, largest first; `served` is the quantisation that Ollama and chat use."""
    proofs = proof.files if proof else {}
    files = gguf.files | gguf.extras
    return _table(
        {
            "Quantisation": f"{name} (served)" if name == served else name,
            "File": files[name],
            "Size": format_bytes(gguf.sizes_bytes.get(name, 0)),
            "Proof": proofs[name].summary if name in proofs else "none",
            "sha256": gguf.sha256.get(name, ""),
        }
        for name in sorted(files, key=lambda name: -gguf.sizes_bytes.get(name, 0))
    )


def artifact_table(manifest: RunManifest) -> pd.DataFrame:
    """Return where each artifact of the run lies in the store."""
    holders = {
        "base model": manifest.base,
        "data set": manifest.dataset,
        "data report": manifest.data_report,
        "tokenised rows": manifest.tokens,
        "scores before": manifest.before,
        "adapter": manifest.adapter,
        "scores after": manifest.after,
        "comparison": manifest.report,
        "merged model": manifest.merged,
        "GGUF files": manifest.gguf,
    }
    refs: dict[str, ArtifactRef | None] = {
        name: holder.artifact if holder else None for name, holder in holders.items()
    }
    refs["model card"] = manifest.card
    return _table(
        {"Artifact": name, "Size": format_bytes(ref.size_bytes), "Where": ref.uri, "Content sha256": ref.content}
        for name, ref in refs.items()
        if ref
    )


def environment_table(manifest: RunManifest) -> pd.DataFrame:
    return _table({"What": name, "Value": value} for name, value in sorted(manifest.environment.items()))


def _table(rows: Iterable[dict[str, str]]) -> pd.DataFrame:
    return pd.DataFrame(list(rows))


# Sentences


ENDS = {
    "finished": "",
    "early stopping": " It was stopped early, and the best step, {step}, is shipped.",
    "time limit": " It was stopped by its time limit.",
}


def describe_training(adapter: AdapterRef | CombinedRef) -> str:
    if isinstance(adapter, CombinedRef):
        parts = ", ".join(f"{part.share:g} of {part.run} ({part.method})" for part in adapter.parts)
        what = f"an adapter of rank {adapter.rank}" if adapter.rank else "a whole model"
        return f"Not trained, but made by {adapter.by} of {parts}: {what}."
    dropped = (
        f" {adapter.dropped_too_long:,} conversations were too long and dropped." if adapter.dropped_too_long else ""
    )
    return (
        f"{adapter.trainable_parameters:,} trainable parameters in {adapter.dtype}, {adapter.steps:,} steps, "
        f"{adapter.tokens:,} tokens ({adapter.supervised_tokens:,} supervised) in {format_seconds(adapter.seconds)}. "
        f"Validation loss {adapter.first_validation_loss:.3f} before, {adapter.last_validation_loss:.3f} after."
        f"{ENDS[adapter.ended].format(step=adapter.best_step)}{dropped}"
    )


def describe_sample(gguf: GgufRef) -> str:
    return "What the exported file answered" + ("" if gguf.stopped else " (cut off: it did not stop by itself)")


def ollama_state(manifest: RunManifest) -> tuple[str, str]:
    """Return one sentence on Ollama and the command to chat with the result."""
    ollama = manifest.ollama
    chat = f"forgetless chat {manifest.run_id}"
    if ollama is None:
        return "Not registered in Ollama: this run did not get that far, or its recipe says not to.", chat
    if ollama.registered:
        also = f" and {ollama.alias}" if ollama.alias else ""
        state = f"Registered in Ollama at {ollama.url} as {ollama.name}{also}. {ollama.note}".rstrip()
        return state, f"ollama run {ollama.name}"
    return f"Not registered in Ollama. {ollama.note}".strip(), chat


def recipe_yaml(manifest: RunManifest) -> str:
    """Return what decided the run's result, with every default filled in, as YAML."""
    text: str = yaml.safe_dump(manifest.settings, sort_keys=False, allow_unicode=True, width=100)
    return text


def first_line(text: str, longest: int = 240) -> str:
    line = next(iter(text.strip().splitlines()), "")
    return line if len(line) <= longest else line[: longest - 1] + "…"


# Words and numbers


def escape_markdown(text: str) -> str:
    """Return a name (of a run, a capability) so that Markdown does not style it, link it or load an image for it."""
    return re.sub(r"([\\`*_\[\]<>#$~:|!])", r"\\\1", text)


def code_span(text: str) -> str:
    """Return any text as Markdown code, which is shown letter by letter (a backtick becomes an apostrophe)."""
    return f"`{' '.join(text.split()).replace('`', chr(39))}`"


def format_change(value: float, unit: str) -> str:
    """Return a signed change with its unit: percent to 0.01, points to 0.1 (one item of 600 is 0.17 points)."""
    return f"{value:+.2f} %" if unit == "%" else f"{value:+.1f} {unit}"


def format_interval(delta: Delta) -> str:
    digits = 2 if delta.unit == "%" else 1
    return f"{delta.low:+.{digits}f} to {delta.high:+.{digits}f}"


def format_budget(delta: Delta) -> str:
    return "" if delta.budget is None else f"{delta.budget:g} {delta.unit}"


def format_bytes(size: float) -> str:
    """Return a size in decimal units, such as "91.7 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def format_seconds(seconds: float) -> str:
    """Return a duration, such as "0.4 s", "38 s", "4 min 12 s" or "1 h 03 min"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def format_age(seconds: float) -> str:
    """Return how long ago, roughly: "just now", "12 min ago", "3 h ago", "5 days ago"."""
    for size, word in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= size * (2 if word == "days" else 1):
            return f"{int(seconds // size)} {word} ago"
    return "just now"
