"""What the command line shows: the stages as they pass, and the tables at the end."""

import contextlib
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tasks.core.manifest import STAGES, RunManifest
from tasks.core.progress import watch_progress
from tasks.core.records import Delta
from tasks.core.store import Store

if TYPE_CHECKING:
    from flows.doctor import Finding

TITLES = {
    "start": "Start Prefect",
    "base": "Base model",
    "dataset": "Fetch data",
    "validate": "Validate data",
    "before": "Score the base",
    "train": "Train the adapter",
    "after": "Score again",
    "compare": "Compare",
    "merge": "Merge",
    "gguf": "Convert to GGUF",
    "ollama": "Register in Ollama",
    "publish": "Publish",
}
MARKS = {"computed": "[green]✔[/]", "reused": "[cyan]↻[/]", "skipped": "[dim]–[/]", "failed": "[red]✘[/]"}
VERDICTS = {"promote": ("✔", "bold green"), "reject": ("✘", "bold red"), "inconclusive": ("?", "bold yellow")}
STATUS_STYLE = {"gained": "green", "kept": "green", "lost": "red", "forgot": "red"}


class RunScreen:
    """Shows the stages of a run in this process: live bars on a terminal, a line per stage elsewhere (on stderr)."""

    def __init__(self, run_id: str, enabled: bool) -> None:
        self.console = Console(file=sys.stderr, highlight=False)  # the real one, whatever is redirected later
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
            self.console.print(f"[bold]forgetless[/] run [bold]{self.run_id}[/]")
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
        now = time.monotonic()
        if self.stage == "start":
            self._finish("start", "computed", now - self.began)
        if done == -1:
            self._finish(stage, note, now - self.stage_began if stage == self.stage else 0.0)
            self.stage, self.stage_began, self.note, self.done, self.total = "", now, "", 0, 0
            return
        if stage != self.stage:
            self.stage, self.stage_began, self.note = stage, now, ""
        self.done, self.total, self.note = done, total, note or self.note

    def _finish(self, stage: str, status: str, seconds: float) -> None:
        self.rows.append((stage, status, seconds))
        if not self.live:
            took = f"{seconds:.1f} s" if status == "computed" else status
            self.console.print(f"{MARKS.get(status, ' ')} {TITLES[stage]:<20} {took}")

    def _render(self) -> Group:
        table = Table.grid(padding=(0, 1))
        for stage, status, seconds in self.rows:
            took = f"{seconds:6.1f} s" if status in ("computed", "failed") else status
            table.add_row(MARKS.get(status, " "), TITLES[stage], Text(took, style="dim"), "")
        if self.stage:
            seconds = time.monotonic() - self.stage_began
            bar: Any = ProgressBar(self.total, self.done, width=30) if self.total else Text(str(self.done or ""), "dim")
            table.add_row(
                "[yellow]•[/]", f"[bold]{TITLES[self.stage]}[/]", f"{seconds:6.1f} s", bar, Text(self.note, "dim")
            )
        return Group(table)


def show_summary(manifest: RunManifest, store: Store) -> None:
    """Print what a run gained and forgot, where everything is, and what to do next."""
    console = _console()
    console.print()
    if manifest.status == "failed":
        console.print(Text.assemble(("✘", "red"), f" Run {manifest.run_id} failed: {manifest.error}"))
    elif manifest.status == "running":
        stage = next((s for s in STAGES if manifest.stages[s].status == "running"), None)
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
    for label, text in _facts(manifest):
        console.print(Text.assemble((f"{label:<12}", "dim"), text), soft_wrap=True)


def _facts(manifest: RunManifest) -> list[tuple[str, str]]:
    facts = []
    if manifest.adapter:
        a = manifest.adapter
        losses = f"{a.first_validation_loss:.2f} → {a.last_validation_loss:.2f}"
        facts.append(("Training", f"{a.method}, {a.steps} steps, {a.tokens:,} tokens, validation loss {losses}"))
        if a.dropped_too_long:
            what = "conversation" if a.dropped_too_long == 1 else "conversations"
            limit = manifest.recipe.train.max_tokens
            facts.append(("Left out", f"{a.dropped_too_long:,} {what} longer than train.max_tokens={limit}"))
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
    if manifest.ollama and manifest.ollama.registered:
        facts.append(("Ollama", f"ollama run {manifest.ollama.name}"))
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


def show_findings(findings: "list[Finding]") -> None:
    console = _console()
    marks = {"ok": "[green]✔[/]", "missing": "[red]✘[/]", "absent": "[yellow]–[/]"}
    table = Table.grid(padding=(0, 2))
    for f in findings:
        table.add_row(marks[f.state], f.name, Text(f.found), Text(f.cost, "dim"))
    console.print(table)


def _console() -> Console:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120  # a file or a pipe has no width to respect
    return console


def _place(uri: str) -> str:
    """Return a file:// address as a path, relative to here where it lies below."""
    if not uri.startswith("file://"):
        return uri
    path = Path(unquote(urlparse(uri).path))
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
