"""What the command line shows: the stages as they pass, and the tables at the end."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

from rich.console import Console, Group
from rich.filesize import decimal
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from tasks.core.config import EvalConfig
from tasks.core.manifest import RunManifest
from tasks.core.progress import watch_progress
from tasks.core.records import AdapterRef, Delta, RunComparison, ScoreSheet, ShippingCurve, ShippingPoint
from tasks.core.store import Store
from tasks.core.sweep import Sweep, describe_values

if TYPE_CHECKING:
    from flows.doctor import Finding
    from flows.store import Stored
    from tasks.evaluation.explain import Explanation

TITLES = {
    "start": "Start Prefect",
    "dataset": "Fetch data",
    "validate": "Validate data",
    "base": "Base model",
    "tokens": "Tokenise",
    "scores": "Score the model",
    "before": "Score the base",
    "train": "Train the adapter",
    "combine": "Combine the adapters",
    "after": "Score again",
    "compare": "Compare",
    "merge": "Merge",
    "gguf": "Convert to GGUF",
    "proof": "Prove the export",
    "served": "Score the file",
    "ollama": "Register in Ollama",
    "publish": "Publish",
}
MARKS = {"computed": "[green]✔[/]", "reused": "[cyan]↻[/]", "skipped": "[dim]–[/]", "failed": "[red]✘[/]"}
VERDICTS = {"promote": ("✔", "bold green"), "reject": ("✘", "bold red"), "inconclusive": ("?", "bold yellow")}
SEVERITIES = {"critical": "bold red", "warning": "yellow", "info": "cyan"}
ROLE_STYLES = {"system": "magenta", "user": "bold cyan", "assistant": "bold green"}
SHOWN_CHARS = 300  # of an item's question or answer
LEARNED_STYLE = "bold black on green"
TURNS = [*range(0x202A, 0x202F), *range(0x2066, 0x206A)]  # let what follows run the other way
CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | dict.fromkeys(
    [*range(0x7F, 0xA0), 0x2028, 0x2029, *TURNS], 0xFFFD
)
DRAWN = (64, 14)  # columns and rows of a drawing
STATUS_STYLE = {"gained": "green", "kept": "green", "lost": "red", "forgot": "red"}


class SafeConsole(Console):
    """A console whose texts cannot steer the terminal: rows, answers, names and errors come from anywhere."""

    def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


class RunScreen:
    """Shows the stages of a run in this process: live bars on a terminal, a line per stage elsewhere (on stderr)."""

    def __init__(self, run_id: str, enabled: bool) -> None:
        self.console = SafeConsole(file=sys.stderr, highlight=False)  # the real one, whatever is redirected later
        self.enabled = enabled
        self.run_id = run_id
        self.began = time.monotonic()
        self.stage = "start"
        self.stage_began = self.began
        self.done = self.total = 0
        self.note = ""
        self.rows: list[tuple[str, str, float]] = []
        self.live: Live | None = None
        self.watching = contextlib.ExitStack()

    def __enter__(self) -> "RunScreen":
        if self.enabled:
            self.watching.enter_context(watch_progress(self._on_progress))
            self.console.print(
                f"[bold]forgetless[/] run [bold]{self.run_id}[/]" if self.run_id else "[bold]forgetless[/]"
            )
            if self.console.is_terminal:
                self.live = Live(get_renderable=self._render, console=self.console, refresh_per_second=4)
                self.live.start()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.watching.close()
        if self.live:
            self.stage = ""
            self.live.stop()

    def _on_progress(self, stage: str, done: int, total: int, note: str) -> None:
        now, stage = time.monotonic(), stage or self.stage
        if self.stage == "start" != stage:
            self._finish("start", "computed", now - self.began)
        if done == -1:
            self._finish(stage, note, now - self.stage_began if stage == self.stage else 0.0)
            self.stage, self.stage_began, self.note, self.done, self.total = "", now, "", 0, 0
            return
        if stage != self.stage:
            if self.stage and self.stage != "start":
                self._finish(self.stage, "computed", now - self.stage_began)
            self.stage, self.stage_began, self.note = stage, now, ""
        self.done, self.total, self.note = done, total, note or self.note

    def _finish(self, stage: str, status: str, seconds: float) -> None:
        self.rows.append((stage, status, seconds))
        if not self.live:
            took = f"{seconds:.1f} s" if status == "computed" else status
            self.console.print(f"{MARKS.get(status, ' ')} {TITLES.get(stage, stage):<20} {took}")

    def _render(self) -> Group:
        table = Table.grid(padding=(0, 1))
        for stage, status, seconds in self.rows:
            took = f"{seconds:6.1f} s" if status in ("computed", "failed") else status
            table.add_row(MARKS.get(status, " "), TITLES.get(stage, stage), Text(took, style="dim"), "")
        if self.stage:
            seconds = time.monotonic() - self.stage_began
            bar: Any = ProgressBar(self.total, self.done, width=30) if self.total else Text(str(self.done or ""), "dim")
            title = f"[bold]{TITLES.get(self.stage, self.stage)}[/]"
            table.add_row("[yellow]•[/]", title, f"{seconds:6.1f} s", bar, Text(self.note, "dim"))
        return Group(table)


def show_reproduction(found: dict[str, Any]) -> None:
    """Print of a run that was made again which artifacts have the same bytes, and how near the scores are."""
    console = _console()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("Artifact", "First", "Again", "Bytes"):
        table.add_column(heading, no_wrap=True)
    for name, link in found["artifacts"].items():
        digests = [(link[which] or "not made")[:16] for which in ("first", "again")]
        table.add_row(name, *digests, Text("the same", "green") if link["same"] else Text("others", "yellow"))
    console.print()
    console.print(table)
    if found["same"]:
        console.print(f"Run {found['again']} made the very bytes of {found['first']}.")
        return
    for score in found["scores"]:
        again = "not scored" if score["again"] is None else f"{score['again']:+.2f}"
        where = "inside" if score["inside"] else "outside"
        console.print(f"{score['capability']}: {score['first']:+.2f}, again {again}, {where} the first's interval")
    verdicts = " and ".join(str(verdict) for verdict in found["verdicts"])
    console.print(f"Verdicts: {verdicts}.")
    for name, (one, other) in found["environment"].items():
        console.print(f"{name}: {one}, now {other}")
    if found["environment"]:
        console.print("The same bytes are promised for the same libraries, CPU model and number of threads alone.")


def show_summary(manifest: RunManifest, store: Store) -> None:
    """Print what a run gained and forgot, where everything is, and what to do next."""
    console = _console()
    console.print()
    if manifest.status == "failed":
        console.print(Text.assemble(("✘", "red"), f" Run {manifest.run_id} failed: {manifest.error}"))
    elif manifest.status == "running":
        stage = next(
            (s for s in manifest.stage_names if s in manifest.stages and manifest.stages[s].status == "running"), None
        )
        console.print(f"Run {manifest.run_id} is running: {TITLES.get(stage or '', 'starting')}.")
    if manifest.report:
        console.print(delta_table(manifest.report.capabilities))
        for d in manifest.report.capabilities:
            if d.perplexity_ratio is not None and d.primary:
                console.print(f"Per-token perplexity of {d.name}: {d.perplexity_ratio:.2f} of what it was.")
        mark, style = VERDICTS[manifest.report.verdict]
        console.print(Text.assemble((mark, style), " ", (manifest.report.reason, "bold")))
        console.print(
            Text("Deltas: after minus before on the same items; negative is forgetting; 95 % intervals.", "dim")
        )
        if manifest.report.verdict != "promote":
            from tasks.evaluation.explain import explain_run

            show_advice(console, explain_run(store, manifest), most=2)
    for label, text in _facts(manifest):
        console.print(Text.assemble((f"{label:<12}", "dim"), text), soft_wrap=True)


def _facts(manifest: RunManifest) -> list[tuple[str, str]]:
    facts = [("Note", note) for note in manifest.notes]
    if manifest.combine:
        facts.append(("Made", manifest.recipe.description))
    a = manifest.adapter
    if isinstance(a, AdapterRef):
        losses = f"{a.first_validation_loss:.2f} → {a.last_validation_loss:.2f}"
        facts.append(("Training", f"{a.method}, {a.steps} steps, {a.tokens:,} tokens, validation loss {losses}"))
        if a.dropped_too_long:
            what = "conversation" if a.dropped_too_long == 1 else "conversations"
            limit = manifest.recipe.train.max_tokens
            facts.append(("Left out", f"{a.dropped_too_long:,} {what} longer than train.max_tokens={limit}"))
    facts += [("Note", note) for note in (a.notes if a else [])]
    if manifest.merge_choice:
        facts.append(("Merge", manifest.merge_choice.summary))
    if manifest.proof:
        for name, proof in manifest.proof.files.items():
            facts.append((name, proof.summary))
    if manifest.served:
        facts.append(("In llama.cpp", f"{manifest.served.verdict}: {manifest.served.reason}"))
    if manifest.gguf:
        facts += [("Asked", manifest.gguf.prompt), ("It answers", manifest.gguf.sample)]
    for name, record in (("Adapter", manifest.adapter), ("Merged", manifest.merged), ("GGUF", manifest.gguf)):
        if record:
            facts.append((name, _place(record.artifact.uri)))
    if manifest.seconds is not None:
        reused = sum(1 for s in manifest.stages.values() if s.status == "reused")
        facts.append(("Took", f"{manifest.seconds:.0f} s" + (f", {reused} stages reused" if reused else "")))
    if manifest.gguf:
        facts.append(("Chat", f"forgetless chat {manifest.run_id}"))
    if manifest.registry_version:
        name = manifest.recipe.registry_name
        facts.append(("Registry", f"version {manifest.registry_version}; forgetless registry {name}"))
    if manifest.ollama and manifest.ollama.registered:
        also = f", now also {manifest.ollama.alias}" if manifest.ollama.alias else ""
        facts.append(("Ollama", f"ollama run {manifest.ollama.name}{also}"))
        facts += [("Note", manifest.ollama.note)] if manifest.ollama.note else []
    elif manifest.ollama:
        later = f"forgetless export {manifest.run_id} --to ollama"
        facts.append(("Ollama", f"no answer at {manifest.ollama.url}; later: {later}"))
    link = f"/runs/flow-run/{manifest.flow_run_id}" if manifest.flow_run_id else ""
    facts.append(("Dashboard", "forgetless dashboard"))
    facts.append(("Prefect UI", f"prefect server start, then http://127.0.0.1:4200{link}"))
    return facts


def delta_table(deltas: list[Delta]) -> Table:
    table = Table(box=None, padding=(0, 1), header_style="bold", pad_edge=False)
    for name in ("Capability", "Measure", "Before", "After", "Delta", "95 % interval", "Budget", "Status"):
        table.add_column(name, justify="left" if name in ("Capability", "Measure", "Status") else "right")
    for d in deltas:
        sign = "%" if d.unit == "%" else " pt"
        table.add_row(
            Text(d.name),
            "bits/byte" if d.measure == "bits_per_byte" else d.measure,
            f"{d.before:.3f}",
            f"{d.after:.3f}",
            f"{d.delta:+.2f}{sign}",
            f"{d.low:+.2f} to {d.high:+.2f}",
            "target" if d.budget is None else f"-{d.budget:g}{sign}",
            Text(d.status, STATUS_STYLE.get(d.status, "yellow")),
        )
    return table


def show_plan(plan: dict[str, Any]) -> None:
    console = _console()
    console.print(f"[bold]{plan['recipe']}[/] with the store {_place(plan['store'])}")
    table = Table.grid(padding=(0, 2))
    for stage in plan["stages"]:
        mark = {"reuse": "[cyan]↻[/]", "compute": "•", "always": "•"}[stage["action"]]
        table.add_row(mark, TITLES[stage["stage"]], stage["action"])
    console.print(table)
    for note in plan["notes"]:
        console.print(f"Note: {note}", markup=False, highlight=False)
    for item in plan["detectable"]:
        if item["detectable"] is not None:
            enough = "enough" if item["detectable"] <= item["budget"] else "not enough: add items or widen the budget"
            console.print(
                f"{item['capability']}: {item['items']} items can show a budget of {item['detectable']} points kept "
                f"(80 % power, one item in ten changing); yours is {item['budget']:g}: {enough}."
            )


def show_runs(manifests: list[RunManifest], store: Store) -> None:
    console = _console()
    if not manifests:
        console.print(
            f"There are no runs in {_place(store.url)} yet. Start one with: forgetless run quickstart", soft_wrap=True
        )
        return
    table = Table(box=None, padding=(0, 1), header_style="bold", pad_edge=False)
    for name in ("Run", "Status", "Target", "Worst retention", "Verdict", "Took"):
        table.add_column(name)
    for m in manifests:
        deltas = m.report.capabilities if m.report else []
        target = next((d for d in deltas if d.primary), None)
        worst = min(
            (d for d in deltas if d.role == "retention" and d.budget),
            key=lambda d: d.delta / (d.budget or 1),
            default=None,
        )
        table.add_row(
            m.run_id,
            m.status,
            f"{target.delta:+.1f} {target.unit}" if target else "",
            f"{worst.name} {worst.delta:+.1f} {worst.unit}" if worst else "",
            Text(f"{VERDICTS[m.report.verdict][0]} {m.report.verdict}", VERDICTS[m.report.verdict][1])
            if m.report
            else "",
            f"{m.seconds:.0f} s" if m.seconds is not None else "",
        )
    console.print(table)


def show_models(models: list[dict[str, Any]]) -> None:
    """Print the registry's models with what their aliases name."""
    console = _console()
    if not models:
        console.print("The registry has no model yet: a run that exports adds its own.")
        return
    table = Table(box=None, padding=(0, 1), header_style="bold", pad_edge=False)
    for name in ("Model", "Alias", "Version", "Run", "Since", "By"):
        table.add_column(name)
    for model in models:
        for alias, move in (model["aliases"] or {"": None}).items():
            table.add_row(*map(Text, (model["name"], alias, *(_move_columns(move) if move else ()))))
    console.print(table)


def show_model(model: dict[str, Any]) -> None:
    """Print a model's versions and the history of each alias."""
    console = _console()
    table = Table(box=None, padding=(0, 1), header_style="bold", pad_edge=False)
    for name in ("Version", "Run", "Verdict", "GGUF sha256", "Ollama", "When"):
        table.add_column(name)
    for v in model["versions"]:
        verdict = "withdrawn: the run failed" if v["withdrawn"] else v["verdict"]
        columns = (str(v["number"]), v["run"], verdict, v["gguf_sha256"][:8], v["ollama"] or "", _shown_time(v["when"]))
        table.add_row(*map(Text, columns))
    console.print(table)
    for alias, moves in model["aliases"].items():
        history = Table(box=None, padding=(0, 1), header_style="bold", pad_edge=False)
        for name in ("", "Did", "Version", "Run", "When", "By", "Replaced", "Why"):
            history.add_column(name)
        for move in moves:
            replaced = "" if move["replaced"] is None else str(move["replaced"])
            history.add_row(
                *map(Text, (str(move["number"]), move["kind"], *_move_columns(move), replaced, move["why"]))
            )
        console.print(Text(f"\n{model['name']}:{alias}", "bold"))
        console.print(history)


def _move_columns(move: dict[str, Any]) -> tuple[str, str, str, str]:
    version = "none" if move["version"] is None else str(move["version"])
    return version, move["run"] or "", _shown_time(move["when"]), move["who"]


def _shown_time(when: str) -> str:
    return f"{when[:10]} {when[11:16]} UTC"


def show_comparison(comparisons: list[RunComparison]) -> None:
    console = _console()
    for c in comparisons:
        console.print(f"\n[bold]{c.second}[/] against {c.first}\n")
        console.print(delta_table([*c.capabilities, *c.tasks]))
        changed = Table.grid(padding=(0, 2))
        for key, (before, after) in c.changed.items():
            changed.add_row(Text(key, "dim"), Text(f"{before} → {after}"))
        console.print("\n[bold]What was set differently[/]" if c.changed else "\nBoth have the same settings.")
        console.print(changed)
    console.print("\nIntervals speak of other items, not of other seeds: these adapters only.", style="dim")


def show_explanation(found: "Explanation") -> None:
    """Print what moved, the items that moved most with both answers, and the advice that follows."""
    console = _console()
    table = Table(box=None, padding=(0, 1), header_style="bold", pad_edge=False)
    for name in ("Task", "Subject", "Before", "After", "Delta", "95 % interval", "Items"):
        table.add_column(name, justify="left" if name in ("Task", "Subject") else "right")
    for m in found.moved:
        interval = "" if m.low is None or m.high is None else f"{m.low:+.2f} to {m.high:+.2f}"
        style = "green" if (m.low or 0) > 0 else "red" if (m.high or 0) < 0 else ""
        change = Text(f"{m.delta:+.2f} {m.unit}", style)
        table.add_row(
            Text(m.task), Text(m.subject or ""), f"{m.before:.3f}", f"{m.after:.3f}", change, interval, str(m.n)
        )
    console.print(table)
    if found.note:
        console.print(Text(found.note, "dim"))
    for item in found.items:
        mark = Text("✘ lost ", "red") if item.kind == "lost" else Text("✔ gained ", "green")
        console.print(Text.assemble("\n", mark, (" / ".join(filter(None, (item.task, item.subject))), "dim")))
        for label, text in (
            ("question", item.question),
            ("expected", item.expected),
            ("before", item.before),
            ("after", item.after),
        ):
            if text:
                console.print(Text.assemble((f"  {label:<9}", "dim"), visible(" ".join(text.split()))[-SHOWN_CHARS:]))
    show_advice(console, found)


def show_advice(console: Console, found: "Explanation", most: int | None = None) -> None:
    for advice in found.advice[:most]:
        console.print(Text.assemble("\n", ("→ ", "bold cyan"), (advice.what, "bold"), " ", (advice.why, "dim")))


def show_scores(evaluation: EvalConfig, sheet: ScoreSheet) -> None:
    """Print a model's scores, each by the measure of its capability, with what else was measured."""
    console = _console()
    table = Table(box=None, padding=(0, 1), header_style="bold", pad_edge=False)
    for name in ("Capability", "Task", "Measure", "Score", "± 95 %", "Chance", "Items", "Calibration error"):
        table.add_column(name, justify="left" if name in ("Capability", "Task", "Measure") else "right")
    scores = {score.task: score for score in sheet.tasks}
    for capability in evaluation.capabilities:
        for score in (scores[task.name] for task in capability.tasks):
            value = getattr(score, capability.measure, None)
            value = score.generated.get(capability.measure) if value is None else value
            by_items = capability.measure == "acc" and score.acc_stderr is not None
            table.add_row(
                Text(capability.name),
                Text(score.task),
                "bits/byte" if capability.measure == "bits_per_byte" else capability.measure,
                "" if value is None else f"{value:.3f}",
                f"{1.96 * (score.acc_stderr or 0):.3f}" if by_items else "",
                "" if score.chance is None else f"{score.chance:.3f}",
                f"{score.n:,}",
                "" if score.ece is None else f"{score.ece:.3f}",
            )
    console.print(table)
    for score in sheet.tasks:
        if score.generated:
            values = ", ".join(f"{name} {value:.3g}" for name, value in score.generated.items())
            console.print(Text.assemble((f"{score.task}: ", "bold"), values), soft_wrap=True)
    console.print(Text(f"{sheet.seconds:.0f} s. Scores of one model have no verdict: compare two of its runs.", "dim"))


def show_curve(curve: ShippingCurve, by: str) -> None:
    """Print what an adapter gains and forgets at each strength or step, and the best one."""
    console = _console()
    table = Table(box=None, padding=(0, 1), header_style="bold", pad_edge=False)
    table.add_column(by.title(), justify="right")
    for delta in curve.points[0].capabilities:
        budget = "" if delta.budget is None else f" (-{delta.budget:g})"
        table.add_column(f"{delta.name}{budget}", justify="right")
    for point in curve.points:
        cells = [
            Text(f"{d.delta:+.2f} [{d.low:+.2f}, {d.high:+.2f}]", STATUS_STYLE.get(d.status, "yellow"))
            for d in point.capabilities
        ]
        table.add_row(Text(_named(point, by), "bold" if point == curve.best else ""), *cells)
    console.print(table)
    console.print(Text("Deltas on the half of the items that chooses, with 95 % intervals.", "dim"))
    mark, style = VERDICTS[curve.verdict]
    if curve.best is None:
        console.print(Text.assemble((mark, style), " ", (curve.reason, "bold")))
        return
    best = _named(curve.best, by)
    console.print(f"\nBest inside the budgets: [bold]{best}[/]. On the other half of the items:")
    console.print(delta_table(curve.confirmed))
    console.print(Text.assemble((mark, style), " ", (curve.reason, "bold")))
    if best not in ("end", "1"):
        console.print(f"Ship it: the run's own command with --set export.{by}={best}; nothing is trained again.")


@contextlib.contextmanager
def show_trials(enabled: bool) -> Iterator[None]:
    """Show a sweep's trials as they begin and end, on stderr; in a terminal also the stage at work."""
    console = SafeConsole(file=sys.stderr, highlight=False)
    if not enabled:
        yield
        return
    with console.status("Start Prefect") as status:

        def on_progress(stage: str, done: int, total: int, note: str) -> None:
            if stage == "trial":
                console.print(Text(f"  {note}" if done == -1 else note), soft_wrap=True)
            elif done != -1:
                status.update(Text(f"{TITLES.get(stage, stage)} {f'{done}/{total} ' if total else ''}{note}"))

        with watch_progress(on_progress):
            yield


def show_sweep(sweep: Sweep) -> None:
    """Print a sweep's points, the front as a drawing, what was chosen and what is noise."""
    console = _console()
    names = _letters(sweep)
    table = Table(box=None, padding=(0, 1), header_style="bold", pad_edge=False)
    table.add_column("")
    for axis in sweep.axes:
        table.add_column(axis.key, justify="right")
    if any(point.strength is not None for point in sweep.points):
        table.add_column("Strength", justify="right")
    for name in (f"Gain ({sweep.unit})", "Worst loss / budget"):
        table.add_column(name, justify="right")
    for name in ("of", "Front"):
        table.add_column(name)
    for number in sorted(names, key=lambda i: -sweep.points[i].gain.value):
        point = sweep.points[number]
        gain, loss = (
            f"{e.value:{form}} [{e.low:{form}}, {e.high:{form}}]"
            for e, form in ((point.gain, "+.2f"), (point.forgetting, "+.0%"))
        )
        style = "green" if point.is_inside else "red"
        cells = [names[number], *(str(point.values[axis.key]) for axis in sweep.axes)]
        if len(table.columns) > len(sweep.axes) + 5:
            cells.append("" if point.strength is None else f"{point.strength:g}")
        mark = "best" if number == sweep.best else "front" if point.on_front else ""
        table.add_row(*map(Text, cells), gain, Text(loss, style), Text(point.worst), Text(mark, "bold"))
    console.print(table)
    console.print(Text("On the half of the items that chooses, with 95 % intervals.\n", "dim"))
    for line in draw_front(sweep, names):
        console.print(line, markup=False)
    for trial in sweep.trials:
        if trial.error:
            said = (f"\n{trial.status}: ", "yellow"), f"{describe_values(trial)}: {trial.error}"
            console.print(Text.assemble(*said), soft_wrap=True)
    if sweep.importance:
        console.print("\n[bold]What matters[/]  (share of the variance between points; in brackets by chance)")
        for i in sweep.importance:
            doubt = "" if i.is_reliable else "; too few points to rely on"
            shares = f"gain {i.gain:.0%}, forgetting {i.forgetting:.0%} ({i.chance:.0%}{doubt})"
            console.print(Text.assemble((f"{i.key}: ", "bold"), shares), soft_wrap=True)
    if sweep.best is not None:
        chosen = sweep.points[sweep.best]
        console.print(f"\nBest inside the budgets: [bold]{names[sweep.best]}[/]", end=" ")
        console.print(Text(f"({describe_values(chosen)}). On the other half of the items, run {sweep.run}:"))
        console.print(delta_table(sweep.confirmed))
        for d in sweep.differences:
            word = "noise" if d.is_noise else "differs"
            text = f"{names[d.point]} beside {names[sweep.best]}: {d.name} {d.delta.value:+.2f} {d.unit} "
            console.print(Text(f"{text}[{d.delta.low:+.2f}, {d.delta.high:+.2f}], {word}", "dim" if d.is_noise else ""))
    assert sweep.verdict
    mark, style = VERDICTS[sweep.verdict]
    console.print(Text.assemble((mark, style), " ", (sweep.reason, "bold")), soft_wrap=True)
    console.print(Text(f"Intervals speak of {sweep.scope}.", "dim"), soft_wrap=True)
    if sweep.command:
        console.print(Text(f"Export it, with nothing trained again: {sweep.command}"), soft_wrap=True)


def _letters(sweep: Sweep) -> dict[int, str]:
    """Return a name for each point: letters for the front, by gain, numbers for the others."""
    by_gain = sorted(range(len(sweep.points)), key=lambda i: -sweep.points[i].gain.value)
    front = [i for i in by_gain if sweep.points[i].on_front]
    others = [i for i in by_gain if not sweep.points[i].on_front]
    letters = [chr(ord("A") + i) if i < 26 else f"A{i}" for i in range(len(front))]
    return dict(zip(front, letters, strict=True)) | {i: str(n) for n, i in enumerate(others, 1)}


def draw_front(sweep: Sweep, names: dict[int, str]) -> list[str]:
    """Return a drawing of the points by name, gain upwards and the loss as a share of the budget to the right, whose
    end is a line at 1."""
    losses, gains = ([getattr(p, of).value for p in sweep.points] for of in ("forgetting", "gain"))
    left, right, low, high = min(0.0, *losses), max(1.1, *losses), min(gains), max(gains)
    width, height = DRAWN
    column = {x: round((x - left) / (right - left) * (width - 1)) for x in (*losses, 1.0)}
    cells = [["┊" if x == column[1.0] else " " for x in range(width)] for _ in range(height)]
    for number in sorted(names, key=lambda i: sweep.points[i].on_front):  # the front is drawn over the others
        row = round((high - gains[number]) / (high - low) * (height - 1)) if high > low else height // 2
        at = min(column[losses[number]], width - len(names[number]))
        cells[row][at : at + len(names[number])] = names[number]
    labels = {0: f"{high:+.2f}", height - 1: f"{low:+.2f}"}
    lines = [f"{labels.get(i, ''):>9} │{''.join(row).rstrip()}" for i, row in enumerate(cells)]
    scale = f"{left:+.0%}".ljust(column[1.0] - 2) + "budget"
    return [f"Gain ({sweep.unit})", *lines, f"{'':>9} └{'─' * width}", f"{'':>11}{scale}{'':>4}worst loss / budget"]


def _named(point: ShippingPoint, by: str) -> str:
    return f"{point.strength:g}" if by == "strength" else str(point.step or "end")


def show_findings(findings: "list[Finding]") -> None:
    console = _console()
    marks = {"ok": "[green]✔[/]", "missing": "[red]✘[/]", "absent": "[yellow]–[/]"}
    table = Table.grid(padding=(0, 2))
    for f in findings:
        table.add_row(marks[f.state], f.name, Text(f.found), Text(f.cost, "dim"))
    console.print(table)


def show_artifacts(artifacts: "list[Stored]") -> None:
    """Print artifacts, the newest last, with the runs that reach them."""
    table = Table(box=None, padding=(0, 1), header_style="bold", pad_edge=False)
    table.add_column("Artifact", overflow="fold")
    table.add_column("Size", justify="right", no_wrap=True)
    table.add_column("Written", no_wrap=True)
    table.add_column("Runs", overflow="fold")
    for a in artifacts:
        written = datetime.fromtimestamp(a.written).strftime("%Y-%m-%d %H:%M")
        runs = ", ".join(a.runs) or Text("none" if a.whole else "none, never finished", "yellow")
        table.add_row(a.name, decimal(a.size_bytes), written, runs)
    _console().print(table)


def show_usage(usage: dict[str, Any]) -> None:
    """Print what takes how much room."""
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    for kind, size in usage["kinds"].items():
        table.add_row(kind, decimal(size))
    table.add_row(Text("all artifacts", "bold"), Text(decimal(usage["total"]), "bold"))
    table.add_row("  that runs reach", decimal(usage["reached"]))
    table.add_row("  that no run reaches", decimal(usage["unreached"]))
    table.add_row("answers kept for scoring", decimal(usage["responses"]))
    table.add_row("work in progress", decimal(usage["work"]))
    cache = usage["cache"]
    limit = f" of {decimal(cache['limit'])}" if cache["limit"] is not None else ""
    table.add_row(f"copies in {cache['folder']}", decimal(cache["artifacts"]) + limit)
    table.add_row(f"downloads in {cache['folder']}", decimal(cache["downloads"]))
    _console().print(table)


def show_problems(found: dict[str, Any]) -> None:
    """Print what `store verify` found wrong, and what to do next."""
    console = _console()
    for p in found["problems"]:
        console.print(Text.assemble((f"{p['problem']:<10} ", "red"), f"artifacts/{p['artifact']}/{p['file']}"))
    wrong = sorted({p["artifact"] for p in found["problems"]})
    size = decimal(found["size_bytes"])
    console.print(f"{found['artifacts']:,} artifacts, {found['files']:,} files, {size} read.")
    if not wrong:
        console.print("[green]✔[/] Every file is as it was written.")
        return
    console.print(f"[red]✘[/] {len(wrong):,} artifacts are not as they were written. Delete each, then run again what")
    console.print("made it, which makes it anew:")
    for name in wrong:
        runs = found["runs"][name]
        console.print(f"  forgetless store rm {name}" + (f"   # {', '.join(runs)}" if runs else ""), soft_wrap=True)


def show_fetched(done: dict[str, Any]) -> None:
    """Print what was fetched, at which commit, and how large it is."""
    console = _console()
    if not done["items"]:
        console.print(f"{done['recipe']} needs nothing from elsewhere.")
        return
    table = Table.grid(padding=(0, 2))
    for item in done["items"]:
        part = item["part"].get("name") or item["part"].get("subset") or ""
        table.add_row(item["kind"], Text(item["name"], "bold"), part, item["commit"][:12], decimal(item["size_bytes"]))
    console.print(table)
    console.print(
        f"{decimal(done['size_bytes'])} in {_place(done['store'])}. It stays until: forgetless store rm "
        f"{done['record']}",
        soft_wrap=True,
    )


def show_removed(done: dict[str, Any]) -> None:
    """Print what `store gc` removed, or would, and how much was freed."""
    console = _console()
    for r in done["removed"]:
        console.print(f"{decimal(r['size_bytes']):>10}  {r['path']}  ({r['what']})", markup=False, soft_wrap=True)
    would = "would be " if done["dry_run"] else ""
    console.print(f"{len(done['removed']):,} {would}removed, {decimal(done['freed'])} {would}freed.")


@contextlib.contextmanager
def show_progress() -> Iterator[Callable[[str], None]]:
    """Yield a function that shows what is being done, in a line of a terminal that goes away; elsewhere nothing."""
    with SafeConsole(file=sys.stderr, highlight=False).status("Starting") as status:

        def say(text: str) -> None:
            status.update(Text(text))

        with watch_progress(lambda stage, done, total, note: say(note) if note else None):  # downloads
            yield say


def show_check(check: dict[str, Any]) -> None:
    """Print what `data check` found: files, counts, reasons, failed checks, and the verdict last."""
    console = _console()
    table = Table.grid(padding=(0, 2))
    for file in check["files"]:
        left = f"{file['quarantined']:,} quarantined" if file["quarantined"] else ""
        table.add_row(Text(file["file"], "bold"), file["format"], f"{file['read']:,} rows", left)
    console.print(table)
    rows, kept = check["rows"], sum(check["rows"].values())
    replay = f", {sum(check['replay'].values()):,} of them replay" if check["replay"] else ""
    unused = f", {check['unused']:,} replay rows not needed" if check["unused"] else ""
    splits = f"{rows['train']:,} to train on, {rows['validation']:,} for validation{replay}"
    console.print(f"\n[bold]{check['read']:,} read, {kept:,} kept[/] ({splits}){unused}")
    facts = Table.grid(padding=(0, 2))
    for r in check["quarantined"]:
        first = Text(f"first {r['first']}: {visible(r['detail'])}", "dim")
        facts.add_row(f"{r['rows']:>6,}", Text(r["reason"], "yellow"), r["meaning"])
        facts.add_row("", "", first)
    if check["quarantined"]:
        console.print("\n[bold]Quarantined[/]", facts, sep="\n")
    if check["repaired"]:
        mended = [f"{name.replace('_', ' ')} {number:,}" for name, number in check["repaired"].items()]
        console.print(f"\n[bold]Mended[/]  {', '.join(mended)}")
    if tokens := check["tokens"]:
        total, learned = (sum(tokens[key].values()) for key in ("tokens", "supervised_tokens"))
        long = f"; rows that are too long: {number:,}" if (number := sum(tokens["too_long"].values())) else ""
        console.print(f"\n[bold]Tokens[/]  {total:,}, of which {learned:,} are learned{long}")
    failed = [c for c in [*check["checks"], *(tokens["checks"] if tokens else [])] if not c["passed"]]
    console.print()
    for note in check["notes"]:
        console.print(Text(note, "dim"), soft_wrap=True)
    for c in sorted(failed, key=lambda c: list(SEVERITIES).index(c["severity"])):
        mark = f"{c['severity']:<8}", SEVERITIES[c["severity"]]
        console.print(Text.assemble(mark, f"  {c['expectation']}: ", (visible(c["observed"]), "bold")), soft_wrap=True)
    if check["out"]:
        console.print(Text(f"The rows, the quarantine and the reports are in {check['out']}."), soft_wrap=True)
    warnings = check["failed"].get("warning", 0)
    if not check["passed"]:
        console.print("[bold red]✘ Rejected:[/] a run would stop here, before it loads a model.")
    else:
        note = f", with {warnings} warning{'s' if warnings > 1 else ''}" if warnings else ""
        console.print(f"[bold green]✔ Passed[/]{note}: a run can train on {kept:,} rows.")


def show_conversations(rows: list[dict[str, Any]]) -> None:
    """Print rows turn by turn."""
    console = _console()
    for row in rows:
        mended = f"  mended: {', '.join(row['repaired'])}" if row.get("repaired") else ""
        console.print(Text.assemble((f"{row['source']}:{row['line']}", "bold"), (mended, "dim")), soft_wrap=True)
        for message in row["messages"]:
            role = (f"{message['role']}: ", ROLE_STYLES.get(message["role"], "bold"))
            console.print(Text.assemble(role, visible(message["content"])), soft_wrap=True)
        console.print()


def show_quarantined(rows: list[dict[str, Any]]) -> None:
    """Print quarantined rows: where, why, and how each begins."""
    console = _console()
    for row in rows:
        place = (f"{row['source']}:{row['line']}", "bold"), "  ", (row["reason"], "yellow")
        console.print(Text.assemble(*place), soft_wrap=True)
        console.print(Text(visible(row["detail"])), Text(visible(row["raw"]), "dim"), sep="\n", soft_wrap=True)
        console.print()
    if not rows:
        console.print("No row is quarantined.")


def show_sequences(rows: list[dict[str, Any]]) -> None:
    """Print rows as the model sees them, what is learned on green; without colours, between ⟦ and ⟧."""
    console = _console()
    plain = not console.is_terminal or console.no_color
    for row in rows:
        counts = f"  {row['tokens']:,} tokens, {row['learned']:,} learned"
        counts += "; longer than train.max_tokens, so left out" if row["too_long"] else ""
        console.print(Text.assemble((f"{row['source']}:{row['line']}", "bold"), (counts, "dim")), soft_wrap=True)
        text = Text()
        for piece, learned in row["pieces"]:
            marked = f"⟦{visible(piece)}⟧" if learned and plain else visible(piece)
            text.append(marked, LEARNED_STYLE if learned else "")
        console.print(text, soft_wrap=True)
        console.print()
    console.print(Text.assemble("What is ", ("⟦marked⟧" if plain else "marked", LEARNED_STYLE), " is learned."))


def visible(text: str) -> str:
    """Return the text with control characters as symbols: a row must not steer the terminal."""
    return text.translate(CONTROLS)


def _console() -> Console:
    console = SafeConsole(highlight=False)
    if not console.is_terminal:
        console.width = 120  # a file or a pipe has no width to respect
    return console


def _place(uri: str) -> str:
    """Return a file:// address as a path, relative to here where it lies below."""
    if not uri.startswith("file://"):
        return uri
    path = Path(unquote(urlparse(uri).path))
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
