"""What `forgetless fetch` brought into a store: an index from what a recipe names elsewhere to artifacts.

Each fetch leaves one record, fetched/<recipe>-<what it asked for>.json, which keeps its artifacts from being garbage.
Who asks says when: the Hub and the servers come first where they can be reached.
"""

import json
from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import Field

from tasks.core.digest import canonical_json, sha256, unchanged_sha256
from tasks.core.errors import StoreError
from tasks.core.records import ArtifactRecord, ArtifactRef, Record
from tasks.core.store import Store, read_marker

FOLDER = "fetched"
Kind = Literal["model", "dataset", "metric", "address"]


class FetchedFiles(ArtifactRecord):
    """Files from elsewhere: of a Hub repository at a commit below a folder of its name, or one of an address."""

    source: str


class Fetched(Record):
    """One thing that a recipe names: `revision` is what it says (branch, tag or commit; of an address a digest of it),
    `commit` what that was then (of an address the file's sha256). `part` says which part: of a data set its subset, of
    an address the file."""

    kind: Kind
    name: str
    revision: str
    commit: str
    part: dict[str, str | None] = Field({})
    artifact: ArtifactRef


class FetchRecord(Record):
    recipe: str
    fetched: datetime
    items: list[Fetched]

    @property
    def name(self) -> str:
        """The same for the same recipe that asks for the same things."""
        asked = sorted(canonical_json(item.model_dump(exclude={"commit", "artifact"})).decode() for item in self.items)
        return f"{FOLDER}/{self.recipe}-{sha256(canonical_json(asked))[:8]}"


def write_record(store: Store, record: FetchRecord) -> None:
    store.write_bytes(f"{record.name}.json", canonical_json(record.model_dump(mode="json")))


def read_records(store: Store) -> dict[str, FetchRecord]:
    """Return the records of a store by name, the newest first. Raises StoreError for one that cannot be read."""
    found = {}
    for file in store.list_files(FOLDER):
        data = store.read_bytes(file.path) if file.path.endswith(".json") else None
        if data is None:  # deleted meanwhile
            continue
        try:
            found[file.path.removesuffix(".json")] = FetchRecord(**json.loads(data))
        except (ValueError, TypeError) as error:
            problem = str(error).splitlines()[0]
            raise StoreError(
                f"{store.url}/{file.path} cannot be read ({problem}). Delete it (forgetless store rm "
                f"{file.path.removesuffix('.json')}), and fetch its recipe again."
            ) from None
    return dict(sorted(found.items(), key=lambda entry: entry[1].fetched, reverse=True))


def find_fetched(
    store: Store | None, kind: Kind, name: str, revision: str, part: dict[str, str | None] | None = None
) -> list[Fetched]:
    """Return what a recipe means by a name and a revision (or its commit), as it was fetched last; of any part where
    none is given. Empty where nothing was."""
    for record in read_records(store).values() if store else ():
        found = [
            item
            for item in record.items
            if (item.kind, item.name) == (kind, name)
            and revision in (item.revision, item.commit)
            and part in (None, item.part)
        ]
        if found:
            return found
    return []


def open_fetched(store: Store, item: Fetched) -> Path:
    """Return the local folder of what was fetched. Raises StoreError where a file is not the one that came."""
    marker = read_marker(store, item.artifact.kind, item.artifact.key)
    if marker is None:
        raise StoreError(
            f"{item.name} was fetched into {store.url}, and its files were deleted since. Where there is a network, "
            "fetch it again: forgetless fetch RECIPE"
        )
    folder = store.local_folder(item.artifact)
    damaged = [name for name, facts in marker["files"].items() if not _is_whole(folder / name, facts["sha256"])]
    if damaged:
        raise StoreError(
            f"{folder / damaged[0]}: expected the bytes that were fetched ({item.name}), found others. Delete "
            f"{folder}, and where there is a network fetch them again: forgetless fetch RECIPE"
        )
    return folder


def _is_whole(path: Path, digest: str) -> bool:
    try:
        return unchanged_sha256(path) == digest  # a run opens a base at every stage
    except OSError:
        return False
