"""Repositories of the Hugging Face Hub: asked with patience, and what is brought of them into the store.

The Hub comes first, where it can be reached; else what `forgetless fetch` brought, and then the cache of the Hub's
library. That reads tokens from their usual places; they go to the Hub alone.
"""

import contextlib
import functools
import glob
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml

from tasks.core.errors import ForgetlessError
from tasks.core.fetched import Fetched, FetchedFiles, Kind, find_fetched, open_fetched
from tasks.core.retry import error_code, is_out_of_reach, is_passing, retried
from tasks.core.stages import Stage
from tasks.core.store import Store, find_artifact, stored

T = TypeVar("T")
TYPES: dict[Kind, str] = {"model": "model", "dataset": "dataset", "metric": "space"}
CARD = "README.md"
DATASET_FILES = [CARD, "dataset_infos.json", ".huggingface.yaml"]
"""What says how a data set is read, beside its rows."""
PROBE_SECONDS = 5.0
FORBIDDEN = "The Hub refuses your token (401). Log in again with hf auth login, or correct HF_TOKEN."


def ask_hub(work: Callable[[], T], fetched: Callable[[], T | None] = lambda: None) -> T:
    """Return what `work` gets from the Hub, tried again where its trouble passes. Where the Hub cannot be reached,
    return what was `fetched`; where nothing was, what `work` finds in the library's cache. Raises what it raises."""
    if not is_hub_reached():
        found = fetched()
        if found is not None:
            return found
        with _offline():
            return work()
    try:
        return retried(lambda: _unwrapped(work))
    except Exception as error:
        found = fetched() if is_out_of_reach(error) else None
        if found is None:
            raise
        return found


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Let the Hub's library look into its cache at once: it would wait half a minute for every file, and say so."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _unwrapped(work: Callable[[], T]) -> T:
    """Raise what the Hub's library hides where its cache could not help either: whether it passes can be seen of it."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return work()
    except LocalEntryNotFoundError as error:
        if error.__cause__ and is_passing(error.__cause__):
            raise error.__cause__ from None
        raise


def is_hub_reached() -> bool:
    """Return whether there is a Hub: not where HF_HUB_OFFLINE forbids it, or where nothing answers. Asked once per
    process."""
    from huggingface_hub import constants

    return not constants.HF_HUB_OFFLINE and _answers(constants.ENDPOINT)


@functools.cache
def _answers(endpoint: str) -> bool:
    from huggingface_hub.utils import get_session

    try:
        retried(lambda: get_session().head(endpoint, timeout=PROBE_SECONDS))
        return True
    except Exception:  # whatever its HTTP client calls it: there was no answer
        return False


def is_refused(error: BaseException) -> bool:
    """Return whether the Hub does not know the token that it was sent."""
    return any(error_code(found)[0] == 401 for found in (error, error.__cause__) if found) and not (
        {"RepositoryNotFoundError", "DatasetNotFoundError"} & {kind.__name__ for kind in type(error).__mro__}
    )


def open_hub_folder(
    store: Store | None, kind: Kind, name: str, revision: str, part: dict[str, str | None] | None = None
) -> tuple[Path, str] | None:
    """Return the folder and the commit of what was fetched of a repository, None where nothing was."""
    found = find_fetched(store, kind, name, revision, part)
    if not store or not found:
        return None
    return open_repository(store, found[0]), found[0].commit


def open_repository(store: Store, item: Fetched) -> Path:
    """Return the folder of a repository that was fetched."""
    return open_fetched(store, item) / item.name.rpartition("/")[2]


def fetch_repository(
    store: Store,
    kind: Kind,
    name: str,
    revision: str,
    commit: str,
    files: list[str],
    part: dict[str, str | None] | None = None,
    mend: Callable[[Path], None] = lambda folder: None,
) -> Fetched:
    """Bring the files of a Hub repository at a commit that match `files` into the store, unless it has them, and return
    what they are found by. `mend` changes the copy. Raises what the Hub's library raises."""

    def make(folder: Path) -> dict[str, Any]:
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import filter_repo_objects

        snapshot = Path(
            ask_hub(lambda: snapshot_download(name, repo_type=TYPES[kind], revision=commit, allow_patterns=files))
        )
        there = (path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file())
        target = folder / name.rpartition("/")[2]
        for file in filter_repo_objects(there, allow_patterns=files):
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(snapshot / file, target / file)  # a link into the cache leads nowhere elsewhere
        mend(target)
        return {"source": f"{kind} {name}@{commit}"}

    stage = Stage("hub", 1, [f"hub:{kind}:{name}@{commit}"], {"files": files, "part": part})
    made = store_fetched(store, stage, make)
    return Fetched(kind=kind, name=name, revision=revision, commit=commit, part=part or {}, artifact=made.artifact)


def store_fetched(store: Store, stage: Stage, make: Callable[[Path], dict[str, Any]]) -> FetchedFiles:
    """Return the artifact of what is fetched, made anew where the store's is damaged."""
    found = find_artifact(store, stage, FetchedFiles)
    if found is not None:
        probe = Fetched(kind="model", name=found.source, revision="", commit="", artifact=found.artifact)
        try:
            open_fetched(store, probe)
        except ForgetlessError:
            store.delete(f"artifacts/{stage.kind}/{stage.key}")
    return stored(store, stage, FetchedFiles, make)


def fetch_hub_dataset(store: Store, name: str, revision: str | None, commit: str | None = None, **part: Any) -> Fetched:
    """Bring what loading a Hub data set reads into the store: of its `part` (subset, folder, files) all splits. Raises
    what the Hub's libraries raise, ForgetlessError where its rows are not in its repository."""
    import datasets
    from huggingface_hub import HfApi

    if commit is None:
        commit = str(ask_hub(lambda: HfApi().dataset_info(name, revision=revision).sha))
    options = {"revision": commit, "data_dir": part.get("folder"), "data_files": part.get("files")}
    builder = ask_hub(lambda: datasets.load_dataset_builder(name, part.get("subset"), **options))
    place = f"hf://datasets/{name}@{commit}/"
    rows = sorted({str(file) for files in (builder.config.data_files or {}).values() for file in files})
    if elsewhere := [file for file in rows if not file.startswith(place)]:
        raise ForgetlessError(
            f"Hub data set {name}: its rows are not in its repository but at {elsewhere[0].partition('?')[0]}, from "
            "where they cannot be fetched. Download them, and name the files."
        )
    files = [*DATASET_FILES, *(glob.escape(file.removeprefix(place)) for file in rows)]
    return fetch_repository(
        *(store, "dataset", name, revision or "main", commit, files, named_part(**part)),
        lambda folder: _keep_subset(folder / CARD, str(builder.config.name)),
    )


def named_part(**part: Any) -> dict[str, str | None]:
    """Return what a part of a data set is found by: its subset, folder and files, as far as they are given."""
    return {
        key: yaml.safe_dump(value) if isinstance(value, dict | list) else value for key, value in part.items() if value
    }


def _keep_subset(card: Path, subset: str) -> None:
    """Leave of a data set's card the subset that was fetched: those whose files are not here could not be read."""
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    found = re.match(r"---\r?\n(.*?)\r?\n---[^\S\n]*(?:\r?\n|$)", text, re.DOTALL)
    facts = yaml.safe_load(found[1]) if found else None
    if not found or not isinstance(facts, dict):
        return
    for key in ("configs", "dataset_info"):
        listed = facts.get(key)
        if isinstance(listed, list) and any(one.get("config_name") == subset for one in listed):
            facts[key] = [one for one in listed if one.get("config_name") == subset]
    head = yaml.safe_dump(facts, allow_unicode=True, sort_keys=False)
    card.write_text(f"---\n{head}---\n{text[found.end() :]}", encoding="utf-8")
