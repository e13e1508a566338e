"""What a run says of itself in words: the model card and the table of deltas, as Markdown.

Text from users and models is escaped: a card is shown in the Prefect UI and on hubs."""

import html
import re

from tasks.core.config import TrainConfig
from tasks.core.manifest import RunManifest
from tasks.core.records import CombinedRef, Delta

SYMBOLS = {"promote": "✔ promote", "reject": "✘ reject", "inconclusive": "? inconclusive"}


def write_card(manifest: RunManifest) -> str:
    """Return the Markdown card of a finished run: what it is, what it gained and forgot, how it was made."""
    parts = [f"# {manifest.recipe.name}", ""]
    if manifest.recipe.description:
        parts += [escape(manifest.recipe.description), ""]
    parts += verdict_part(manifest)
    facts: list[tuple[str, str]] = []
    if manifest.base:
        facts.append(
            ("Base", f"{manifest.base.source}" + (f" @ {manifest.base.revision}" if manifest.base.revision else ""))
        )
        facts.append(("Base licence", manifest.recipe.model.license or manifest.base.license or "not stated"))
    if manifest.dataset:
        facts.append(("Data", ", ".join(manifest.dataset.sources)))
    facts += [(f"Licence of {x.name}", x.license or "not stated") for x in manifest.licences if x.what != "base"]
    facts += [*row_facts(manifest), *training_facts(manifest)]
    if manifest.merge_choice:
        facts.append(("Merged", manifest.merge_choice.summary))
    if manifest.gguf:
        for quantisation, name in (manifest.gguf.files | manifest.gguf.extras).items():
            size = manifest.gguf.sizes_bytes[quantisation] / 1e6
            facts.append((name, f"{size:.0f} MB, sha256 `{manifest.gguf.sha256[quantisation]}`"))
            if manifest.proof and quantisation in manifest.proof.files:
                facts.append(("", manifest.proof.files[quantisation].summary))
    if manifest.served:
        facts.append(("In llama.cpp", f"{manifest.served.verdict}: {manifest.served.reason}"))
    if manifest.ollama:
        state = "registered" if manifest.ollama.registered else "not registered"
        facts.append(("Ollama", f"{manifest.ollama.name} ({state})"))
    parts += [fact_table(facts), ""]
    parts += [line for note in manifest.notes for line in (escape(note), "")]
    if manifest.gguf:
        parts += [f"> {escape(manifest.gguf.prompt)}", ">", f"> {escape(manifest.gguf.sample)}", ""]
    return "\n".join(parts)


def verdict_part(manifest: RunManifest) -> list[str]:
    """Return the verdict and the table of deltas as lines, none for a run that was not judged."""
    if not manifest.report:
        return []
    return [
        f"**Verdict: {SYMBOLS[manifest.report.verdict]}.** {escape(manifest.report.reason)}",
        "",
        delta_table(manifest.report.capabilities),
        "",
        "Deltas are after minus before on the same items, signed so that negative is forgetting, with 95 % "
        "intervals over items (not over training seeds).",
        "",
    ]


def row_facts(manifest: RunManifest) -> list[tuple[str, str]]:
    """Return how many rows were read, kept, and replayed."""
    if not manifest.dataset:
        return []
    rows = ", ".join(f"{count} {split}" for split, count in manifest.dataset.rows.items())
    quarantined = sum(manifest.dataset.quarantined.values())
    facts = [("Rows", f"{manifest.dataset.read} read: {rows}, {quarantined} quarantined")]
    if replayed := {**manifest.dataset.replay, **_self_replay(manifest)}:
        facts.append(("Replay", ", ".join(f"{count} {name}" for name, count in replayed.items())))
    return facts


def training_facts(manifest: RunManifest) -> list[tuple[str, str]]:
    """Return the method, its size and what training came to."""
    a, t = manifest.adapter, manifest.recipe.train
    if isinstance(a, CombinedRef):
        parts = [(f"Run {part.run}", f"weight {part.share:g}, {part.method}") for part in a.parts]
        return [*parts, ("Combined by", a.by + (f", rank {a.rank}" if a.rank else " into a whole model"))]
    if a is None:
        return []
    done = f"{a.steps} steps, {a.supervised_tokens:,} supervised tokens, {a.seconds:.0f} s, {a.dtype}, seed {t.seed}"
    facts = [
        ("Method", f"{t.method}{_size(t)}, learning rate {t.learning_rate:g}, {t.schedule}"),
        ("Training", done),
    ]
    if a.dropped_too_long:
        facts.append(("Left out", f"conversations longer than {t.max_tokens} tokens: {a.dropped_too_long:,}"))
    losses = f"{a.first_validation_loss:.3f} → {a.last_validation_loss:.3f} nats per token"
    return [*facts, ("Validation loss", losses)]


def fact_table(facts: list[tuple[str, str]]) -> str:
    """Return names and values as a Markdown table without a head."""
    return "\n".join(["| | |", "|---|---|", *(f"| {escape(name)} | {escape(value)} |" for name, value in facts)])


def _size(train: TrainConfig) -> str:
    """Return what makes up the adapter's size, in the words of its method."""
    if train.method in ("prefix", "prompt"):
        return f", {train.virtual_tokens} virtual tokens"
    return {"full": "", "oft": f", blocks of {train.rank}"}.get(
        train.method, f", rank {train.rank}, alpha {train.alpha}"
    )


def _self_replay(manifest: RunManifest) -> dict[str, int]:
    answered = manifest.tokens.replayed if manifest.tokens else 0
    return {"answered by the base itself": answered} if answered else {}


def delta_table(deltas: list[Delta]) -> str:
    """Return the deltas as a Markdown table."""
    lines = [
        "| capability | role | before | after | delta | 95 % interval | budget | status |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for d in deltas:
        lines.append("| " + " | ".join(escape(cell) for cell in delta_cells(d)) + " |")
    return "\n".join(lines)


def delta_cells(d: Delta) -> list[str]:
    """Return a delta as the eight cells that every table of the project shows."""
    sign = "%" if d.unit == "%" else " pt"
    budget = "" if d.budget is None else f"-{d.budget:g}{sign}"
    interval = f"{d.low:+.2f} to {d.high:+.2f}{sign}"
    label = "bits/byte" if d.measure == "bits_per_byte" else d.measure
    return [
        f"{d.name} ({label})",
        d.role + (" *" if d.primary else ""),
        f"{d.before:.3f}",
        f"{d.after:.3f}",
        f"{d.delta:+.2f}{sign}",
        interval,
        budget,
        d.status,
    ]


def escape(text: str) -> str:
    """Return `text` so that it cannot be markup, a link, a line's or a table cell's end, nor turn what follows it."""
    plain = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]", " ", text)
    return re.sub(r"([\\`*_~\[\]|#<>!])", r"\\\1", html.escape(plain, quote=False))
