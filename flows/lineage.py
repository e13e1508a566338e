"""Where a model comes from, link by link, and whether the same comes out when its run is made again."""

import re
from collections.abc import Iterator
from typing import Any

from tasks.core.errors import ForgetlessError
from tasks.core.manifest import RunManifest, read_manifest, run_ids
from tasks.core.records import ArtifactRecord, TokensRef
from tasks.core.store import Store, read_marker

DIGEST = re.compile(r"^(sha256:)?[0-9a-f]{8,64}$")
# From what ships back to what it is made of; `before` and `after` are what it was judged by.
LINKS = ("proof", "gguf", "merged", "after", "before", "adapter", "tokens", "dataset", "base")


def find_run(store: Store, wanted: str) -> RunManifest:
    """Return the run that a name names: its own, `latest`, its model's in Ollama, or eight and more digits of the
    sha256 of its file or of its model in Ollama. Of several that made the same file the first. Raises
    ForgetlessError."""
    is_digest = DIGEST.match(wanted) is not None
    if not is_digest and ":" not in wanted:
        return read_manifest(store, wanted)
    names = run_ids(store)
    for run_id in names:
        manifest = read_manifest(store, run_id)
        if any(n.startswith(wanted.removeprefix("sha256:")) if is_digest else n == wanted for n in _names(manifest)):
            return manifest
    if is_digest and wanted in names:
        return read_manifest(store, wanted)
    raise ForgetlessError(
        f"No run in {store.url} made {wanted!r}: expected a run's name, the name of its model in Ollama, or the "
        "beginning of a sha256. List them with: forgetless runs"
    )


def _names(manifest: RunManifest) -> Iterator[str]:
    if manifest.ollama:
        yield manifest.ollama.name
        yield (manifest.ollama.digest or "").removeprefix("sha256:")
    if manifest.gguf:
        yield from manifest.gguf.sha256.values()


def trace(store: Store, manifest: RunManifest) -> dict[str, Any]:
    """Return all that a run's model is made from: each artifact with its files' sha256 and what it was made from, the
    sources' digests, the base at its revision, seeds, config, library versions, commit and machine."""
    links: dict[str, dict[str, Any]] = {}
    for name in LINKS:
        record = getattr(manifest, name)
        if isinstance(record, ArtifactRecord):
            marker = read_marker(store, record.artifact.kind, record.artifact.key) or {}
            links[name] = {
                "uri": record.artifact.uri,
                "content": record.artifact.content,
                "in_store": bool(marker),
                "files": {file: facts["sha256"] for file, facts in marker.get("files", {}).items()},
                "made_from": marker.get("made_from"),
            }
    recipe = manifest.recipe
    digests = (links.get("dataset", {}).get("made_from") or {}).get("inputs", [])
    sources = [*recipe.data.sources, *(recipe.data.replay.sources if recipe.data.replay else [])]
    return {
        "run": manifest.run_id,
        "started": manifest.started.isoformat(),
        "verdict": manifest.report.verdict if manifest.report else None,
        "ollama": manifest.ollama.model_dump(include={"url", "name", "digest"}) if manifest.ollama else None,
        "base": manifest.base.model_dump(include={"source", "revision"}) if manifest.base else None,
        "combines": manifest.combine.runs if manifest.combine else [],
        "sources": []
        if manifest.combine
        else [
            {"path": source.path, "revision": source.revision, "sha256": digest}
            for source, digest in zip(sources, [*digests, *[None] * len(sources)], strict=False)
        ],
        "artifacts": links,
        "seeds": dict(_seeds(manifest.settings)),
        "settings": manifest.settings,
        "environment": manifest.environment,
    }


def _seeds(settings: dict[str, Any], path: str = "") -> Iterator[tuple[str, int]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _seeds(value, f"{path}{key}.")
        elif key == "seed":
            yield path + key, value


def origin_lines(found: dict[str, Any]) -> Iterator[tuple[int, str, str]]:
    """Yield a lineage as depth, name and fact, from the model in Ollama down to the rows."""
    ollama, links = found["ollama"], found["artifacts"]
    if ollama:
        yield 0, "Ollama", f"{ollama['name']} {ollama['digest'] or '(not registered)'}"
    yield 0, "Run", f"{found['run']}, {found['verdict'] or 'without a verdict'}"
    depth = 1
    for name, what in (("gguf", "GGUF"), ("merged", "Merged"), ("adapter", "Adapter"), ("tokens", "Tokens")):
        if name in links:
            yield depth, what, links[name]["content"]
            for file, digest in links[name]["files"].items() if name == "gguf" else ():
                yield depth + 1, file, f"sha256 {digest}"
            depth += 1
    for run in found["combines"]:
        yield depth, "Combines", run
    if "dataset" in links:
        yield depth, "Rows", links["dataset"]["content"]
        for file, digest in links["dataset"]["files"].items():
            yield depth + 1, file, f"sha256 {digest}"
        for source in found["sources"]:
            revision = f" at {source['revision']}" if source["revision"] else ""
            yield depth + 1, "Source", f"{source['path']}{revision}, {source['sha256'] or 'digest not recorded'}"
    if found["base"]:
        revision = f" at {found['base']['revision']}" if found["base"]["revision"] else ""
        yield 1, "Base", f"{found['base']['source']}{revision}, {links['base']['content']}"
    for name, what in (("before", "Scored before"), ("after", "Scored after"), ("proof", "Proof")):
        if name in links:
            yield 1, what, links[name]["content"]
    yield 0, "Seeds", ", ".join(f"{name} {value}" for name, value in found["seeds"].items())
    yield 0, "Made with", ", ".join(f"{name} {version}" for name, version in found["environment"].items())
    if gone := [name for name, link in links.items() if not link["in_store"]]:
        yield 0, "Gone", f"no longer in the store: {', '.join(gone)}"


# --- once more --------------------------------------------------------------------------------------------------------


def check_reproducible(manifest: RunManifest) -> None:
    """Raise ForgetlessError where a run cannot be made again from its recipe alone."""
    if manifest.status != "completed":
        raise ForgetlessError(f"Run {manifest.run_id} is {manifest.status}: only a completed run can be made again.")
    again = None
    if manifest.combine:
        again = "combines the adapters of other runs: reproduce those, then combine them"
    elif manifest.recipe.train.start_from:
        again = f"went on from {manifest.recipe.train.start_from}, which a new store does not hold: reproduce that"
    if again:
        raise ForgetlessError(f"Run {manifest.run_id} {again}.")


def _bytes(record: ArtifactRecord) -> str:
    """Return the digest of an artifact's bytes; of tokens without Great Expectations' pages, which hold the time."""
    return record.digest if isinstance(record, TokensRef) else record.artifact.content


def compare_runs(first: RunManifest, again: RunManifest) -> dict[str, Any]:
    """Return of each artifact whether it has the same bytes, of each capability the deltas of both and whether the
    second lies in the first's interval, and what differs between the environments."""
    artifacts = {}
    for name in reversed(LINKS):
        one, other = getattr(first, name), getattr(again, name)
        if isinstance(one, ArtifactRecord):  # a gate that was closed then is open now
            digests = [_bytes(record) if record else None for record in (one, other)]
            artifacts[name] = {"first": digests[0], "again": digests[1], "same": digests[0] == digests[1]}
    deltas = {d.name: d for d in again.report.capabilities} if again.report else {}
    scores = [
        {
            "capability": d.name,
            "first": d.delta,
            "again": deltas[d.name].delta if d.name in deltas else None,
            "inside": d.name in deltas and d.low <= deltas[d.name].delta <= d.high,
        }
        for d in (first.report.capabilities if first.report else [])
    ]
    keys = sorted(first.environment.keys() | again.environment.keys())
    return {
        "first": first.run_id,
        "again": again.run_id,
        "same": all(link["same"] for link in artifacts.values()),
        "artifacts": artifacts,
        "scores": scores,
        "verdicts": [run.report.verdict if run.report else None for run in (first, again)],
        "environment": {
            key: [first.environment.get(key), again.environment.get(key)]
            for key in keys
            if first.environment.get(key) != again.environment.get(key)
        },
    }
