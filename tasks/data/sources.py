"""Sources: where rows are (local files, folders and globs, s3:// and https:// addresses, the Hub), file by file.

Trouble with a file as a whole raises DataError; trouble with a row is passed on with it, so that every row read is
accounted for. What a file's records are is records.py's; the Hub's library is imported where it is used.
"""

import difflib
import glob
import json
import logging
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, get_args
from urllib.parse import unquote

from tasks.core.addresses import shown
from tasks.core.config import Column, DataConfig, ReplayConfig, SourceConfig, Tag
from tasks.core.digest import content_digest, file_sha256, sha256
from tasks.core.errors import DataError, ForgetlessError
from tasks.core.fetched import Fetched, find_fetched, open_fetched
from tasks.core.licences import licence_of_card
from tasks.core.records import LicenceRef
from tasks.core.retry import is_out_of_reach
from tasks.core.stages import Stage
from tasks.core.store import Store
from tasks.data.downloads import address_digest, fetch, is_remote, list_remote
from tasks.data.files import (
    ARCHIVES,
    SUFFIXES,
    TABLES,
    WORKBOOKS,
    data_files,
    data_names,
    data_suffix,
    one_line,
    refusal,
    unreadable,
)
from tasks.data.formats import BadRow, Rejected, Row, detect_format, listed, to_row
from tasks.data.records import Records, parse_record, read_records
from tasks.models.hub import (
    CARD,
    FORBIDDEN,
    ask_hub,
    fetch_hub_dataset,
    is_refused,
    named_part,
    open_hub_folder,
    store_fetched,
)

SNIFFED_ROWS = 50
DOWNLOADED = "file"
"""What a fetched file is called: its name is in no key."""
INFO = "dataset_info.json"
MEDIA = ("images", "videos", "audios")
FORMATTINGS = ("alpaca", "sharegpt", "openai")


@dataclass(frozen=True)
class SourceFile:
    """One file of a source, whose records are read as they are asked for, once and in the order of the files."""

    name: str
    """What its rows are labelled with: its name (inside the folder, where the source is one), or the Hub id."""
    where: str
    """What messages call it: path or address, without secrets."""
    source: SourceConfig
    """The source; for an entry of a dataset_info.json, what the entry stands for."""
    format: str
    records: Records
    """Line (or number) and value of each record: a BadRow, a value, or JsonText for parse_record to make one."""


def read_files(source: SourceConfig, store: Store | None = None) -> Iterator[SourceFile]:
    """Yield the files of a source in the order of their names; together they give at most `source.max_rows` records.
    What cannot be reached is read as it was fetched into `store`.

    Raises DataError, while being read, for whatever makes a file or data set unreadable as a whole."""
    source, entry = resolve_entry(source)
    left = source.max_rows
    for name, where, records in _all_records(source, entry, store):
        head = list(islice(records, SNIFFED_ROWS))
        format_ = _head_format(head, name, where, source)
        taken = islice(chain(head, records), left)
        if left is None:
            yield SourceFile(name, where, source, format_, taken)
            continue
        counted = _Counted(taken)
        yield SourceFile(name, where, source, format_, counted)
        left -= counted.count
        if left == 0:
            return


class _Counted:
    """Records, and how many of them were taken."""

    def __init__(self, records: Records) -> None:
        self.records, self.count = records, 0

    def __iter__(self) -> "_Counted":
        return self

    def __next__(self) -> tuple[int, Any]:
        record = next(self.records)
        self.count += 1
        return record


def read_rows(source: SourceConfig) -> Iterator[Row | Rejected]:
    """Yield every row of a source, usable or rejected, at most `source.max_rows`, as read_files does."""
    for file in read_files(source):
        for line, value in file.records:
            yield to_row(parse_record(value), file.format, file.name, line, file.source)


def _all_records(
    source: SourceConfig, entry: dict[str, Any], store: Store | None
) -> Iterator[tuple[str, str, Records]]:
    if is_hub_id(source.path):
        yield source.path, f"Hub data set {source.path}", _hub_records(source, entry.get("folder"), store)
        return
    for name, (where, path) in _files(source.path, store).items():
        for file in data_files(path, name, where):
            yield file.name, file.where, read_records(file, source.split)


def _head_format(head: list[tuple[int, Any]], name: str, where: str, source: SourceConfig) -> str:
    if not head:
        raise DataError(f"{where}: expected rows of training data, found none: it is empty. Check how it was written.")
    values = [parse_record(value) for _, value in head]
    parsed = [value for value in values if not isinstance(value, BadRow)]
    if not parsed:
        raise DataError(
            f"{where}:{head[0][0]}: no row can be read. {values[0].detail} Mend the file, or write it anew."
        )
    first = next(line for (line, _), value in zip(head, values, strict=True) if not isinstance(value, BadRow))
    place = where if is_hub_id(source.path) else f"{where}:{first}"
    return detect_format(parsed, source.format, place, source, is_table=data_suffix(name) in TABLES)


def source_name(source: SourceConfig) -> str:
    """Return what a report calls a source: its entry's, file's or folder's name, or its Hub id; never a secret."""
    if source.entry:
        return source.entry
    if is_hub_id(source.path):
        return source.path
    name = shown(source.path).rstrip("/").rpartition("/")[2]
    return unquote(name) if is_remote(source.path) else name


def list_licences(config: DataConfig, store: Store | None = None) -> list[LicenceRef]:
    """Return the licence of each source, of replay's too: as the recipe states it, or the card of a Hub data set that
    is downloaded, or was fetched into `store`."""
    found = []
    for key, sources in (
        ("data.sources license", config.sources),
        ("data.replay.sources license", config.replay.sources if config.replay else []),
    ):
        for source in sources:
            resolved, _ = resolve_entry(source)
            is_hub = is_hub_id(resolved.path)
            stated = source.license or (_card_licence(resolved, store) if is_hub else None)
            name = resolved.path if is_hub else source_name(source)
            found.append(LicenceRef(what="data source", key=key, name=name, license=stated, is_hub=is_hub))
    return found


def all_sources(config: DataConfig) -> list[SourceConfig]:
    """Return the sources of the training rows, and of replay's."""
    return [*config.sources, *(config.replay.sources if config.replay else [])]


def source_digests(config: DataConfig, store: Store | None = None) -> list[str]:
    """Return the content identity of each source, for the key of the data set made from them. Raises DataError."""
    return [content_identity(source, store) for source in all_sources(config)]


def prompts_digest(replay: ReplayConfig) -> str:
    """Return the content of the prompts that self-replay answers. Raises DataError where they are not there."""
    path = Path(str(replay.prompts))
    if not path.is_file():
        raise DataError(f"{path}: the prompts of data.replay are not there.{_near_names(path)}")
    return file_sha256(path)


def content_identity(source: SourceConfig, store: Store | None = None) -> str:
    """Return what a source's rows are, without parsing: the sha256 of its files, or hub:<id>@<commit>.

    Raises DataError where the source is not there."""
    source, entry = resolve_entry(source)
    if is_hub_id(source.path):
        identity = f"hub:{source.path}@{hub_commit(source, store)}"
    else:
        files = _files(source.path, store)
        try:
            digests = {name: file_sha256(path) for name, (_, path) in files.items()}
        except OSError as error:
            raise DataError(unreadable(shown(source.path), error)) from None
        identity = content_digest(digests) if len(digests) > 1 else next(iter(digests.values()))
    if entry:  # its columns and tags say what the rows are, and are in no recipe
        identity = content_digest({"entry": sha256(json.dumps(entry, sort_keys=True).encode()), "rows": identity})
    return identity


def fetch_source(source: SourceConfig, store: Store) -> list[Fetched]:
    """Bring a source that is elsewhere into the store, and return what its parts are found by; nothing for files of
    this machine. Raises DataError."""
    source, entry = resolve_entry(source)
    if is_hub_id(source.path):
        commit, part = hub_commit(source), _hub_part(source, entry.get("folder"))
        try:
            return [fetch_hub_dataset(store, source.path, source.revision, commit, **part)]
        except ForgetlessError:
            raise
        except Exception as error:  # as in _hub_records
            raise DataError(_hub_sentence(source, error)) from error
    if not is_remote(source.path):
        return []
    found = []
    for name, (where, path) in _files(source.path, None).items():
        digest = file_sha256(path)

        def copy(folder: Path, path: Path = path, where: str = where) -> dict[str, Any]:
            shutil.copyfile(path, folder / DOWNLOADED)
            return {"source": where}

        artifact = store_fetched(store, Stage("download", 1, [digest], {}), copy).artifact
        place = {"name": shown(source.path), "revision": address_digest(source.path), "commit": digest}
        found.append(Fetched(kind="address", **place, part={"name": name, "where": where}, artifact=artifact))
    return found


# --- files ------------------------------------------------------------------------------------------------------------


def _files(path: str, store: Store | None) -> dict[str, tuple[str, Path]]:
    """Return the data files of a source that is not on the Hub: what messages call each, and its path here, by name."""
    if not is_remote(path):
        return {name: (str(file), file) for name, file in local_files(path).items()}
    try:
        return {remote.name: (remote.where, fetch(remote)) for remote in list_remote(path)}
    except DataError as error:
        digest = address_digest(path)
        cannot = is_out_of_reach(error) or type(error.__context__).__name__ == "NoCredentialsError"
        found = find_fetched(store, "address", shown(path), digest) if cannot else []
        if not store or not found:
            raise
        return {str(i.part["name"]): (str(i.part["where"]), open_fetched(store, i) / DOWNLOADED) for i in found}


def local_files(path: str) -> dict[str, Path]:
    """Return the data files of a local file, folder or glob by the name rows are labelled with. Raises DataError."""
    if path.startswith("package:"):
        raise DataError(f"{path}: expected a file, a folder or a Hub data set id (owner/name), found a packaged file.")
    root = Path(path)
    if root.is_file():
        if not data_suffix(root.name):
            raise DataError(f"{path}: {refusal(root.name)}")
        return {root.name: root}
    if root.is_dir():
        found = [file for file in root.rglob("*") if file.is_file()]
    elif glob.has_magic(path):
        found = [file for file in map(Path, glob.glob(path, recursive=True)) if file.is_file()]
        root = Path(*root.parts[: next(n for n, part in enumerate(root.parts) if glob.has_magic(part))])
    else:
        raise DataError(f"{path}: there is no such file or folder.{_near_names(root)}")
    files = {file.relative_to(root).as_posix(): file for file in found}
    names = data_names(files)
    if not names and len(files) == 1:
        raise DataError(f"{root / next(iter(files))}: {refusal(next(iter(files)))}")
    if not names:
        expected = "a folder with" if root == Path(path) else "a glob of"
        raise DataError(f"{path}: expected {expected} {', '.join(SUFFIXES)} files, found none. Check the path.")
    return {name: files[name] for name in names}


def _near_names(path: Path) -> str:
    folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    if folder != path.absolute().parent:
        return f" Its folder does not exist either; {folder} does."
    try:
        names = sorted(file.name for file in folder.iterdir())
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, names, 3, cutoff=0.5)
    if near:
        return f" Did you mean {' or '.join(near)}?"
    data = [name for name in names if data_suffix(name)][:5]
    return f" {folder} has {', '.join(data) or 'no data files'}. Check data.sources."


# --- dataset_info.json ------------------------------------------------------------------------------------------------


def resolve_entry(source: SourceConfig) -> tuple[SourceConfig, dict[str, Any]]:
    """Return the source that an entry of LLaMA-Factory's dataset_info.json stands for, and the entry; or the source as
    it is, and nothing. What the recipe says itself wins. Raises DataError for what is absent or not supported."""
    path = Path(source.path)
    if path.name != INFO:
        if not source.entry:
            return source, {}
        path /= INFO
    if is_remote(source.path) or not path.is_file():
        raise DataError(
            f"{shown(source.path)}: expected a {INFO} on this machine, or a folder that holds one, found none. Correct "
            "data.sources path, or leave entry out."
        )
    entries = _read_info(path)
    if not source.entry:
        raise DataError(f"{path}: name one of its entries as data.sources entry: {listed(entries, 20)}.")
    if source.entry not in entries:
        near = difflib.get_close_matches(source.entry, entries, 3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"It has {listed(entries, 20)}."
        raise DataError(f"{path}: there is no entry {source.entry}. {hint}")
    entry = entries[source.entry]
    where = f"{path}, entry {source.entry}"
    if not isinstance(entry, dict):
        raise DataError(f"{where}: expected an object, found a {type(entry).__name__}.")
    _check_entry(entry, source, where)
    place = _entry_place(entry, path.parent, where)
    rows = [number for number in (source.max_rows, entry.get("num_samples")) if number]
    resolved = source.model_copy(
        update={
            "path": place,
            "entry": None,
            "columns": {**_entry_columns(entry, source, where), **source.columns},
            "tags": {**_named(entry, "tags", get_args(Tag), where), **source.tags},
            "subset": source.subset or entry.get("subset"),
            "split": source.split if "split" in source.model_fields_set else entry.get("split") or source.split,
            "max_rows": min(rows) if rows else None,
        }
    )
    return resolved, entry


def _read_info(path: Path) -> dict[str, Any]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(unreadable(path, error)) from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}. Mend it.") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON: {one_line(error)}. Mend it.") from None
    if not isinstance(entries, dict):
        raise DataError(f"{path}: expected an object of data sets by name, found a {type(entries).__name__}.")
    return entries


def _check_entry(entry: dict[str, Any], source: SourceConfig, where: str) -> None:
    columns = entry.get("columns") or {}
    if "script_url" in entry:
        raise DataError(
            f"{where}: script_url names a program, which is not run. Load it once, and save the rows as JSON."
        )
    if entry.get("formatting", "alpaca") not in FORMATTINGS:
        raise DataError(f"{where}: formatting: expected {', '.join(FORMATTINGS)}, found {entry['formatting']!r}.")
    if media := [name for name in MEDIA if isinstance(columns, dict) and columns.get(name)]:
        raise DataError(f"{where}: its rows have {', '.join(media)}; only text is trained on. Choose another entry.")
    if isinstance(columns, dict) and columns.get("kto_tag"):
        raise DataError(
            f"{where}: its answers are labelled as good or bad (kto_tag), which supervised fine-tuning cannot use. "
            "Keep the good ones in a file of their own."
        )
    if entry.get("ranking") and source.preference != "chosen":
        raise DataError(
            f"{where}: its rows are preference pairs (ranking), which supervised fine-tuning cannot use. Set "
            "data.sources preference=chosen to train on the chosen answers."
        )
    samples = entry.get("num_samples")
    if samples is not None and not (isinstance(samples, int) and samples > 0):
        raise DataError(f"{where}: num_samples: expected a number of rows, found {samples!r}.")


def _entry_place(entry: dict[str, Any], folder: Path, where: str) -> str:
    """Return the Hub id or the path of an entry's rows, in the order in which LLaMA-Factory looks for them."""
    for key in ("hf_hub_url", "file_name", "cloud_file_name"):
        place = entry.get(key)
        if isinstance(place, str) and place:
            if key == "hf_hub_url" or is_remote(place):
                return place
            if not (folder / place).resolve().is_relative_to(folder.resolve()):
                raise DataError(
                    f"{where}: {key} leaves the folder of {INFO}: {place!r}. If you trust it, name that file itself as "
                    "data.sources path."
                )
            return str(folder / place)
    others = [key for key in entry if key.endswith("_hub_url")]
    raise DataError(
        f"{where}: expected file_name or hf_hub_url, found {', '.join(others or entry) or 'nothing'}. "
        "Download the data set first, and name its file."
    )


def _entry_columns(entry: dict[str, Any], source: SourceConfig, where: str) -> dict[str, str]:
    columns = _named(entry, "columns", (*get_args(Column), *MEDIA, "chosen", "rejected", "kto_tag"), where)
    chosen = columns.get("chosen", "chosen")
    if chosen != "chosen" and "messages" in columns:
        raise DataError(
            f"{where}: the chosen answers to messages are expected under chosen, found {chosen}. Rename it."
        )
    if chosen != "chosen":
        columns["response"] = chosen
    return {name: column for name, column in columns.items() if name in get_args(Column)}


def _named(entry: dict[str, Any], key: str, known: tuple[str, ...], where: str) -> dict[str, str]:
    names = entry.get(key) or {}
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values() if name):
        raise DataError(f"{where}: {key}: expected an object of names, found {json.dumps(names)[:100]}.")
    if unknown := [name for name in names if name not in known]:
        raise DataError(f"{where}: {key}: expected {', '.join(known)}, found {', '.join(unknown)}.")
    return {name: value for name, value in names.items() if value}


# --- the Hub ----------------------------------------------------------------------------------------------------------


def is_hub_id(path: str) -> bool:
    """Return whether `path` is a Hub data set id: name or owner/name, no data file's suffix, and nothing local."""
    return (
        re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", path) is not None
        and Path(path).suffix.lower() not in (*SUFFIXES, *ARCHIVES, *WORKBOOKS)
        and not Path(path).exists()
    )


def hub_commit(source: SourceConfig, store: Store | None = None) -> str:
    """Return the commit that a Hub data set's revision names now; offline, the one it named when it was fetched into
    `store`, or else downloaded.

    Raises DataError where the data set is absent, gated, or neither reachable nor downloaded."""
    revision = source.revision or "main"
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.file_download import repo_folder_name

    def fetched() -> str | None:
        found = find_fetched(store, "dataset", source.path, revision)
        return found[0].commit if found else None

    try:
        # Asking for a file, not for the commit, notes in the cache what the revision names, for use offline.
        return ask_hub(
            lambda: Path(hf_hub_download(source.path, CARD, repo_type="dataset", revision=revision)).parent.name,
            fetched,
        )
    except Exception as error:  # the Hub's library also passes its HTTP client's exceptions on
        is_absent = "EntryNotFoundError" in {kind.__name__ for kind in type(error).__mro__}
        # Without a card, or offline: the note is there if it ever was online.
        note = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=source.path, repo_type="dataset")
        note = note / "refs" / revision
        if not ((is_absent or is_out_of_reach(error)) and note.is_file()):
            raise DataError(_hub_sentence(source, error)) from error
        return note.read_text(encoding="utf-8").strip()


def _card_licence(source: SourceConfig, store: Store | None) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    card = try_to_load_from_cache(source.path, CARD, repo_type="dataset", revision=source.revision)
    if not isinstance(card, str):
        found = open_hub_folder(store, "dataset", source.path, source.revision or "main")
        card = str(found[0] / CARD) if found and (found[0] / CARD).is_file() else None
    return licence_of_card(Path(card).read_text(encoding="utf-8", errors="replace")) if card else None


def _hub_part(source: SourceConfig, folder: str | None) -> dict[str, str | None]:
    return named_part(subset=source.subset, folder=folder)


def _hub_records(source: SourceConfig, folder: str | None, store: Store | None) -> Records:
    commit, part = hub_commit(source, store), _hub_part(source, folder)
    import datasets

    datasets.disable_progress_bars()
    for library in ("datasets", "huggingface_hub"):  # their warnings are about caches and README headers
        logging.getLogger(library).setLevel(logging.ERROR)
    options = {"split": source.split, "data_dir": folder}

    def load_fetched() -> Any:
        found = open_hub_folder(store, "dataset", source.path, commit, part)
        return datasets.load_dataset(str(found[0]), source.subset, **options) if found else None

    def load() -> Any:
        rows = datasets.load_dataset(source.path, source.subset, revision=commit, **options)
        files = [Path(file["filename"]) for file in rows.cache_files]
        if any(commit not in file.parts for file in files):  # offline, datasets takes whatever commit it has
            raise DataError(
                f"Hub data set {source.path} is downloaded at another commit than {commit[:12]}, and the Hub cannot be "
                "reached (offline). Run once while online, or name the downloaded commit as data.sources revision."
            )
        return rows

    try:
        rows = ask_hub(load, load_fetched)
    except ForgetlessError:
        raise
    except Exception as error:  # datasets has a dozen types for this, and passes those of four other libraries on
        raise DataError(_hub_sentence(source, error)) from error
    yield from enumerate(rows, 1)


def _hub_sentence(source: SourceConfig, error: Exception) -> str:
    """Return what is wrong with a Hub data set, and what to do, from the exception its libraries raised."""
    name, kinds = source.path, {kind.__name__ for kind in type(error).__mro__}
    text = one_line(error)
    if is_refused(error):
        return f"Hub data set {name}: {FORBIDDEN}"
    if "GatedRepoError" in kinds or "gated dataset" in text:
        return (
            f"Hub data set {name} is gated. Accept its terms at https://huggingface.co/datasets/{name}, then log in "
            "with hf auth login."
        )
    if "RevisionNotFoundError" in kinds or text.startswith("Revision "):
        return f"Hub data set {name} has no revision {source.revision!r}. Correct data.sources revision, or drop it."
    if kinds & {"RepositoryNotFoundError", "DatasetNotFoundError", "HFValidationError"}:
        return (
            f"There is no file, folder or Hub data set {name} that you can read. Check the spelling; for a private "
            "one, log in with hf auth login."
        )
    if kinds & {"TransportError", "ConnectionError"} or is_out_of_reach(error):
        return (
            f"{name} is not a file or folder here, and as a Hub data set it is not downloaded and the Hub cannot be "
            "reached (offline). Give a local file, or fetch it once while online."
        )
    return (
        f"Hub data set {name} (subset {source.subset or 'default'}, split {source.split}) could not be loaded: {text}. "
        "Check data.sources subset and split."
    )
