"""What a store holds, whether it is whole, and what of it nobody needs: `forgetless store`.

What a run reaches is what its manifest names, and what that was made from; a fetch reaches what its record names.
What is younger than a day is never garbage: somebody may be at it.
"""

import contextlib
import hashlib
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tasks.core.cache import folder_bytes, is_held, remove_unheld, trim_cache
from tasks.core.digest import content_digest
from tasks.core.errors import ConfigError, ForgetlessError, StoreError
from tasks.core.fetched import FOLDER as FETCHED
from tasks.core.fetched import read_records
from tasks.core.lease import Lease
from tasks.core.manifest import manifest_path, parse_manifest, read_manifest, run_ids, run_stage
from tasks.core.records import ArtifactRef
from tasks.core.settings import Settings
from tasks.core.store import MARKER, FileStore, Store, StoredFile
from tasks.evaluation.responses import UNFINISHED

DAY = 86_400.0
READERS = 8  # files that are read at once; each holds one piece of at most 1 MiB
PLACE = re.compile(r'artifacts/([\w-]+)/([\w-]+)"')  # the end of a URI; a sentence may name a folder of the cache
LEFT = ("leases", UNFINISHED, "handoffs")
"""What processes leave that were killed: leases, answers of a scoring, a stage's record for a run on another pool."""
Say = Callable[[str], None]


@dataclass
class Stored:
    """An artifact as it lies in the store; `whole` says that it has its marker, `written` when its newest file came,
    `runs` which runs and fetches reach it."""

    kind: str
    key: str
    size_bytes: int = 0
    written: float = 0.0
    whole: bool = False
    runs: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.kind}/{self.key}"


def list_artifacts(store: Store, name: str | None = None) -> list[Stored]:
    """Return the artifacts of a kind, those that a run or a fetch reaches, or all, the newest last. Raises
    ForgetlessError where there is neither such a kind nor such a run."""
    found = _read_artifacts(store.list_files("artifacts"))
    reached = _read_reached(store, found)
    for artifact in found:
        artifact.runs = reached.get(artifact.name, [])
    kinds = sorted({artifact.kind for artifact in found})
    if name in kinds:
        found = [artifact for artifact in found if artifact.kind == name]
    elif name is not None and (name == "latest" or name in run_ids(store) or name in read_records(store)):
        run = name if name.startswith(f"{FETCHED}/") else read_manifest(store, name).run_id
        found = [artifact for artifact in found if run in artifact.runs]
    elif name is not None:
        raise ForgetlessError(
            f"{name!r} is neither a kind of artifact in {store.url} ({', '.join(kinds) or 'none yet'}) nor a run. List "
            "the runs with: forgetless runs"
        )
    return sorted(found, key=lambda artifact: artifact.written)


def measure_store(store: Store, settings: Settings) -> dict[str, Any]:
    """Return bytes: of the artifacts by kind, of those that runs reach and that none does, of the answers kept for
    scoring, of work in progress, and of this machine's cache."""
    artifacts = list_artifacts(store)
    kinds: Counter[str] = Counter()
    for artifact in artifacts:
        kinds[artifact.kind] += artifact.size_bytes
    work = {entry: folder_bytes(entry) for entry in _work_folders(store)}
    begun = (file for place in LEFT for file in store.list_files(place))
    partial = sum(file.size for file in [*store.list_partial(), *begun])
    return {
        "store": store.url,
        "kinds": dict(kinds.most_common()),
        "total": kinds.total(),
        "reached": sum(a.size_bytes for a in artifacts if a.runs),
        "unreached": sum(a.size_bytes for a in artifacts if not a.runs),
        "responses": sum(file.size for file in store.list_files("responses")),
        "work": sum(work.values()) + partial,
        "cache": {
            "folder": str(settings.cache),
            "artifacts": folder_bytes(settings.cache / "artifacts"),
            "downloads": folder_bytes(settings.cache / "downloads"),
            "limit": settings.cache_limit,
        },
    }


def verify_artifacts(store: Store, run: str | None, say: Say) -> dict[str, Any]:
    """Return how many artifacts and bytes were read again and hashed, of a run or all, and a list of each file that is
    damaged, missing or additional. Folders without a marker are no artifacts."""
    files = list(store.list_files("artifacts"))
    reached = _read_reached(store, _read_artifacts(files))
    run_id = read_manifest(store, run).run_id if run is not None else None
    listed: dict[str, list[StoredFile]] = {name: [] for name in sorted(reached)}
    for file in files:
        listed.setdefault(_artifact_of(file), []).append(file)
    if run_id:
        listed = {name: found for name, found in listed.items() if run_id in reached.get(name, [])}
    problems: list[dict[str, str]] = []
    jobs: list[tuple[str, str, str, str]] = []
    artifacts = total = 0

    def note(artifact: str, name: str, problem: str) -> None:
        problems.append({"artifact": artifact, "file": name, "problem": problem})

    def is_gone(artifact: str) -> bool:
        """Return whether a training at work has deleted a checkpoint of its since it was listed."""
        return artifact.startswith("checkpoint/") and store.read_bytes(f"artifacts/{artifact}/{MARKER}") is None

    for artifact, files in listed.items():
        place = f"artifacts/{artifact}/"
        sizes = {file.path.removeprefix(place): file.size for file in files}
        if MARKER not in sizes:
            if artifact in reached and not is_gone(artifact):
                note(artifact, MARKER, "missing")
            continue
        if is_gone(artifact):
            continue
        artifacts += 1
        marker = _read_marker(store.read_bytes(place + MARKER))
        if marker is None:
            note(artifact, MARKER, "damaged")
            continue
        inside = f"{store.files_path(marker[0])}/".removeprefix(place)
        expected = {inside + name: facts for name, facts in marker[1].items()}
        for path in sizes.keys() - expected.keys() - {MARKER}:
            note(artifact, path.removeprefix(inside), "additional")
        for path, facts in expected.items():
            name = path.removeprefix(inside)
            if path not in sizes:
                note(artifact, name, "missing")
            elif sizes[path] != facts["size"]:
                note(artifact, name, "damaged")
            else:
                jobs.append((artifact, name, place + path, facts["sha256"]))
                total += sizes[path]

    def digest_of(job: tuple[str, str, str, str]) -> str:
        digest = hashlib.sha256()
        try:
            for piece in store.stream(job[2]):
                digest.update(piece)
        except StoreError:
            if is_gone(job[0]):
                return job[3]
            raise
        return digest.hexdigest()

    with ThreadPoolExecutor(READERS) as pool:
        for done, (job, found) in enumerate(zip(jobs, pool.map(digest_of, jobs), strict=True), 1):
            artifact, name, _, sha256 = job
            if found != sha256:
                note(artifact, name, "damaged")
            say(f"{done:,} of {len(jobs):,} files read ({artifact[:24]})")
    problems.sort(key=lambda problem: (problem["artifact"], problem["file"]))
    runs = {problem["artifact"]: reached.get(problem["artifact"], []) for problem in problems}
    return {"artifacts": artifacts, "files": len(jobs), "size_bytes": total, "problems": problems, "runs": runs}


def collect_garbage(
    store: Store, settings: Settings, say: Say, dry_run: bool = False, cache: bool = False, now: float | None = None
) -> dict[str, Any]:
    """Remove what no manifest reaches and what killed processes left, if older than a day, and return what was removed;
    with `dry_run`, what would be. `cache` empties this machine's cache too, but for what is in use. `now` stands for
    the store's clock. Raises StoreError, before anything is removed, where a manifest or the registry cannot be read.
    """
    say("Listing the store")
    young = (store.clock() if now is None else now) - DAY
    # Listed before the manifests are read: a run that begins to use an artifact meanwhile names it there.
    artifacts = _read_artifacts(store.list_files("artifacts"))
    partial = [file for file in store.list_partial() if file.written < young]
    left: dict[str, list[StoredFile]] = defaultdict(list)  # each group is one process's, as long as any of it is young
    for file in (file for place in LEFT for file in store.list_files(place)):
        left[re.sub(r"\.\d+(\.beat)?$|/[0-9a-f]+\.json$", "", file.path)].append(file)
    responses = list(store.list_files("responses"))
    parts = {part: part.stat().st_mtime for part in (settings.cache / "downloads").glob("part-*")}
    reached = _read_reached(store, artifacts)
    removed: list[dict[str, Any]] = []

    def note(what: str, path: str, size_bytes: int) -> None:
        removed.append({"what": what, "path": path, "size_bytes": size_bytes})
        say(f"{len(removed):,} {'found' if dry_run else 'removed'} ({path[:40]})")

    for artifact in artifacts:
        if artifact.written < young and not (artifact.whole and artifact.name in reached):
            if not dry_run:
                store.delete(f"artifacts/{artifact.name}")
            what = "no run reaches it" if artifact.whole else "never finished"
            note(what, f"artifacts/{artifact.name}", artifact.size_bytes)
    for file in partial:
        if not dry_run:
            store.delete_partial(file.path)
        note("never finished", file.path, file.size)
    for file in responses:  # responses/<model>/<key of the scores they were for>/
        if file.written < young and f"scores/{file.path.split('/')[2]}" not in reached:
            if not dry_run:
                store.delete_file(file.path)
            note("no run reaches it", file.path, file.size)
    for files in left.values():
        if max(file.written for file in files) < young:
            for file in files:
                if not dry_run:
                    store.delete_file(file.path)
                note("left by a process", file.path, file.size)
    for folder, written in {**_work_folders(store), **parts}.items():
        if written < (FileStore(folder.parent).clock() if now is None else now) - DAY:
            size = folder_bytes(folder)
            try:
                if not is_held(folder) if dry_run else remove_unheld(folder):
                    if not dry_run:  # a download's; nobody had it for a day
                        folder.with_suffix(".lock").unlink(missing_ok=True)
                    note("left by a process", str(folder), size)
            except FileNotFoundError:  # its process ended meanwhile
                pass
    for path, size in trim_cache(settings.cache, 0, dry_run) if cache else []:
        note("local copy", str(settings.cache / path), size)
    return {"store": store.url, "dry_run": dry_run, "removed": removed, "freed": sum(r["size_bytes"] for r in removed)}


def remove_from_store(store: Store, name: str) -> str:
    """Delete a run's record, that of a fetch, or an artifact given as KIND/KEY, and return its path. What it alone
    reached is garbage then. Raises ConfigError for what the registry names and for a run at work, ForgetlessError where
    there is no such thing."""
    if name.startswith(f"{FETCHED}/"):
        path = f"{name}.json"
        if path not in {file.path for file in store.list_files(FETCHED)}:
            raise ForgetlessError(
                f"There is no {name!r} in {store.url}. List what was fetched with: forgetless store ls"
            )
    elif "/" in name:
        path, (kind, _, key) = f"artifacts/{name}", name.partition("/")
        if kind not in store.list_folders("artifacts") or key not in store.list_folders(f"artifacts/{kind}"):
            raise ForgetlessError(f"There is no artifact {name!r} in {store.url}. List them with: forgetless store ls")
    else:
        path = f"runs/{name}"
        if name not in run_ids(store):
            raise ForgetlessError(f"There is no run {name!r} in {store.url}. List them with: forgetless runs")
        named = _registered_runs(store).get(name)
        if named:
            raise ConfigError(f"Run {name} is in the registry ({named}), so it stays.")
        if holder := Lease(store, run_stage(name)).holder():
            raise ConfigError(
                f"Run {name} is at work in process {holder['process']} on {holder['host']}. Let it finish, or end it "
                f"there with Ctrl-C or `kill {holder['process']}`; then remove it."
            )
    store.delete(path)
    return path


def _read_reached(store: Store, artifacts: list[Stored]) -> dict[str, list[str]]:
    """Return the runs, and the records of fetches, that reach each artifact: they name it, or what they reach was made
    from it, such as evaluation items, rows that the base answered, what training went on from, the scores of a served
    file. Raises StoreError for what cannot be read, or is absent and named by the registry."""
    named: dict[str, list[str]] = {}
    unfinished: set[str] = set()
    ids = run_ids(store)
    with ThreadPoolExecutor(READERS) as pool:
        manifests = dict(zip(ids, pool.map(lambda run: store.read_bytes(manifest_path(run)), ids), strict=True))
    for run, data in manifests.items():
        if data is None:  # deleted meanwhile
            continue
        try:
            manifest = parse_manifest(data, run)
        except StoreError as error:
            raise StoreError(
                f"{error} What it reaches is not known, so nothing was done. Mend {store.url}/{manifest_path(run)}, or "
                f"delete that run: forgetless store rm {run}"
            ) from None
        # From the text, not the parsed record: a newer version may name what this one does not know.
        places = PLACE.findall(json.dumps(json.loads(data), ensure_ascii=False))
        named[run] = sorted({f"{kind}/{key}" for kind, key in places})
        if manifest.status != "completed":
            unfinished.add(run)
    for name, writer in _read_checkpoints(store).items():
        if writer in unfinished:
            named[writer].append(f"checkpoint/{name}")
    for record, fetched in read_records(store).items():
        named[record] = sorted({f"{item.artifact.kind}/{item.artifact.key}" for item in fetched.items})
    for run, path in _registered_runs(store).items():
        if manifests.get(run) is None:
            raise StoreError(
                f"{store.url}/{path} names run {run}, which has no manifest. What it reaches is not known, so nothing "
                "was done. Bring the manifest back, or delete that entry."
            )
    made_from = _read_made_from(store, {a.name for a in artifacts if a.whole}.union(*named.values()))
    reached: dict[str, list[str]] = defaultdict(list)
    for run, coming in named.items():
        seen: set[str] = set()
        while coming:
            name = coming.pop()
            if name not in seen:
                seen.add(name)
                reached[name].append(run)
                coming += made_from.get(name, [])
    return reached


def _read_made_from(store: Store, names: set[str]) -> dict[str, list[str]]:
    """Return of each artifact those that it was made from: its marker names them by key, content or a file's sha256."""
    inputs: dict[str, list[str]] = {}
    named_by: dict[str, list[str]] = defaultdict(list)
    with ThreadPoolExecutor(READERS) as pool:
        markers = pool.map(lambda name: store.read_bytes(f"artifacts/{name}/{MARKER}"), names)
        for name, data in zip(names, markers, strict=True):
            found = _read_marker(data)
            if found is None:  # missing or damaged: `verify` says so
                continue
            ref, files, inputs[name] = found
            digests = {ref.key, ref.content, *(facts["sha256"] for facts in files.values())}
            # Training rows that are not searched for evaluation items do not name these, but the scores do their suite.
            for digest in digests | set(inputs[name] if ref.kind == "items" else []):
                named_by[digest].append(name)
    return {name: [other for digest in used for other in named_by.get(digest, [])] for name, used in inputs.items()}


def _read_checkpoints(store: Store) -> dict[str, str]:
    """Return the checkpoints of trainings whose adapter is not there, each with the run that it was written for."""
    found: dict[str, str] = {}
    for name in store.list_folders("artifacts/checkpoint"):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # half of one, or damaged: no training can use it
            marker = json.loads(store.read_bytes(f"artifacts/checkpoint/{name}/{MARKER}") or b"{}")
            if store.read_bytes(f"artifacts/adapter/{marker['made_from']['inputs'][0]}/{MARKER}") is None:
                found[name] = marker["record"]["run"]
    return found


def _registered_runs(store: Store) -> dict[str, str]:
    """Return the runs that the registry names, each with a file that does."""
    found: dict[str, str] = {}
    for file in store.list_files("registry"):
        if not file.path.endswith(".json"):
            continue
        data = store.read_bytes(file.path)
        try:
            entry = json.loads(data) if data is not None else {}  # deleted meanwhile
            run = entry.get("run")
        except (ValueError, AttributeError):
            raise StoreError(
                f"{store.url}/{file.path} is not an entry of the registry. Which run it keeps is not known, so nothing "
                "was done. Mend or delete that file."
            ) from None
        if run:
            found[run] = file.path
    return found


def _read_artifacts(files: Iterable[StoredFile]) -> list[Stored]:
    found: dict[str, Stored] = {}
    for file in files:
        name = _artifact_of(file)
        kind, _, key = name.partition("/")
        artifact = found.setdefault(name, Stored(kind, key))
        artifact.size_bytes += file.size
        artifact.written = max(artifact.written, file.written)
        artifact.whole |= file.path == f"artifacts/{name}/{MARKER}"
    return list(found.values())


def _artifact_of(file: StoredFile) -> str:
    return "/".join(file.path.split("/")[1:3])


def _read_marker(data: bytes | None) -> tuple[ArtifactRef, dict[str, Any], list[str]] | None:
    """Return the artifact of a marker, the files that it names and the digests of what it was made from, or None where
    it is damaged."""
    try:
        marker = json.loads(data or b"")
        files: dict[str, Any] = marker["files"]
        content = content_digest({name: facts["sha256"] for name, facts in files.items()})
        sizes = sum(facts["size"] for facts in files.values())
        artifact = ArtifactRef(**marker["artifact"], uri="")
        inputs: list[str] = marker.get("made_from", {}).get("inputs", [])
        return (artifact, files, inputs) if (artifact.content, artifact.size_bytes) == (content, sizes) else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _work_folders(store: Store) -> dict[Path, float]:
    """Return what processes of this machine work in, checkpoints of unfinished trainings, shards of unfinished data
    sets and downloads that broke off, each with the time of its newest file. Trackers' files, which are there too, are
    for their user."""
    work = store.kept_folder("trackers").parent
    found: dict[Path, float] = {}
    for folder in (
        folder for kind in ("tmp", "training-", "dataset-", "download-") for folder in work.glob(f"{kind}*")
    ):
        times = [os.stat(place).st_mtime for place, _, _ in os.walk(folder)]
        times += [file.written for file in FileStore(folder).list_files("")]
        if times:
            found[folder] = max(times)
    return found
