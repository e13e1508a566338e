"""The registry: the versions of each model, and aliases that name one of them, as files of the store.

    registry/<name>/versions/<N>.json                  a run's exported model
    registry/<name>/aliases/<alias>/<NNNNNN>.json      what the alias came to name; the highest number is current

Files are created and never replaced (but for a version that is withdrawn), so that of several who move an alias at once
one wins, and the history has every move, in order. What Ollama names is not here: tasks/export/register.py.
"""

import contextlib
import getpass
import os
import re
import socket
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Literal, TypeVar
from urllib.parse import quote, unquote

from tasks.core.digest import canonical_json
from tasks.core.errors import ConfigError, ConflictError, ForgetlessError, StoreError
from tasks.core.ollama import is_alias, name_problem
from tasks.core.records import OllamaRef, Record
from tasks.core.store import Store

READERS = 16  # files read at once: a bucket answers each in tens of milliseconds
Entry = TypeVar("Entry", bound=Record)


class Version(Record):
    """What a run exported: the file that is served."""

    number: int
    run: str
    verdict: str
    gguf_sha256: str
    when: datetime
    """By the store's clock."""
    ollama: str | None = None
    """Name in Ollama, where the run registered it."""
    ollama_digest: str | None = None
    withdrawn: bool = False
    """Its run failed after all."""


class Move(Record):
    """One entry of an alias's history."""

    number: int
    kind: Literal["promote", "force", "rollback", "undo"]
    version: int | None
    """That the alias names since; None: none, as the first promotion was undone."""
    run: str | None
    replaced: int | None
    """Version that the alias named before."""
    back: int
    """Number of the move that a rollback goes back to; 0: none."""
    who: str
    when: datetime
    why: str
    id: str
    """Makes it one's own: the same bytes in the store count as written by whoever writes them again."""


def add_version(store: Store, name: str, run: str, verdict: str, gguf_sha256: str, ollama: OllamaRef | None) -> Version:
    """Return a run's version, which is added unless it is there. Raises ConfigError, StoreError."""
    registered = ollama if ollama and ollama.registered else None
    folder = f"{_folder(name)}/versions"
    while True:
        versions = read_versions(store, name)
        for version in versions:
            if version.run == run:
                return version
        version = Version(
            number=len(versions) + 1,
            run=run,
            verdict=verdict,
            gguf_sha256=gguf_sha256,
            when=_now(store),
            ollama=registered.name if registered else None,
            ollama_digest=registered.digest if registered else None,
        )
        if store.create_bytes(f"{folder}/{version.number}.json", _bytes(version)):
            return version


def withdraw_version(store: Store, name: str, version: Version) -> None:
    """Mark a version as one whose run failed after all. Its number is never given again."""
    gone = version.model_copy(update={"withdrawn": True, "ollama": None, "ollama_digest": None})
    store.write_bytes(f"{_folder(name)}/versions/{version.number}.json", _bytes(gone))


def read_version(store: Store, name: str, number: int) -> Version:
    """Return one version. Raises StoreError where it is not there or cannot be read."""
    return _read(store, f"{_folder(name)}/versions/{number}.json", Version)


def read_versions(store: Store, name: str) -> list[Version]:
    """Return all versions, the first one first. Raises ConfigError, StoreError."""
    folder = f"{_folder(name)}/versions"
    return _read_all(store, folder, lambda number: f"{folder}/{number}.json", Version)


def read_names(store: Store) -> list[str]:
    """Return the names of all models in the registry."""
    folders = store.list_folders("registry")
    return [unquote(f) for f in folders if store.read_bytes(f"registry/{f}/versions/1.json") is not None]


def read_aliases(store: Store, name: str) -> dict[str, Move]:
    """Return what each alias of a model names at present."""
    found = {alias: read_current(store, name, alias) for alias in store.list_folders(f"{_folder(name)}/aliases")}
    return {alias: move for alias, move in found.items() if move}


def read_history(store: Store, name: str, alias: str) -> list[Move]:
    """Return every move of an alias, the first one first. Raises ConfigError; StoreError also where one is missing."""
    return _read_all(store, _alias_folder(name, alias), lambda number: _move_path(name, alias, number), Move)


def read_current(store: Store, name: str, alias: str) -> Move | None:
    """Return the last move of an alias, or None where there was none. Raises ConfigError, StoreError."""
    last = _last(store, _alias_folder(name, alias))
    return read_move(store, name, alias, last) if last else None


def read_move(store: Store, name: str, alias: str, number: int) -> Move:
    return _read(store, _move_path(name, alias, number), Move)


def promote_version(
    store: Store, name: str, alias: str, seen: Move | None, version: Version, why: str, forced: bool = False
) -> Move:
    """Return the move that lets an alias, of which `seen` is the last move, name `version`. Raises ConflictError where
    another was faster: nothing is changed then."""
    back = seen.number if seen and seen.version is not None else 0
    return _move(store, name, alias, seen, "force" if forced else "promote", version.number, version.run, back, why)


def roll_back(store: Store, name: str, alias: str, seen: Move | None, why: str) -> Move:
    """Return the move that lets an alias, of which `seen` is the last move, name the version before. Raises
    ForgetlessError where there is none, ConflictError where another was faster: nothing is changed then."""
    if seen is None or seen.version is None:
        raise ForgetlessError(f"{name}:{alias} names no version, so there is none before. {_look(name)}")
    if not seen.back:
        raise ForgetlessError(f"{name}:{alias} names version {seen.version}; no version was before. {_look(name)}")
    target = read_move(store, name, alias, seen.back)
    return _move(store, name, alias, seen, "rollback", target.version, target.run, target.back, why)


def undo_move(store: Store, name: str, alias: str, done: Move, before: Move | None, why: str) -> Move:
    """Return the move that lets an alias name again what it named `before` the move `done`. Raises ConflictError where
    the alias was moved again since: that stands."""
    version, run, back = (before.version, before.run, before.back) if before else (None, None, 0)
    return _move(store, name, alias, done, "undo", version, run, back, why)


def _move(
    store: Store,
    name: str,
    alias: str,
    seen: Move | None,
    kind: Literal["promote", "force", "rollback", "undo"],
    version: int | None,
    run: str | None,
    back: int,
    why: str,
) -> Move:
    move = Move(
        number=seen.number + 1 if seen else 1,
        kind=kind,
        version=version,
        run=run,
        replaced=seen.version if seen else None,
        back=back,
        who=_who(),
        when=_now(store),
        why=why,
        id=uuid.uuid4().hex,
    )
    if store.create_bytes(_move_path(name, alias, move.number), _bytes(move)):
        return move
    winner = read_move(store, name, alias, move.number)
    raise ConflictError(
        f"{winner.who} moved {name}:{alias} to {named(winner)} at the same time ({winner.kind}), so it was not moved "
        f"here. {_look(name)}; then do it again if it is still right."
    )


def named(move: Move | None) -> str:
    """Return in words what an alias names."""
    return f"version {move.version} (run {move.run})" if move and move.version is not None else "no version"


def check_names(name: str, alias: str | None = None) -> None:
    """Raise ConfigError unless these can be a model's name and an alias, here and in Ollama: parts of letters, digits,
    '_', '-' and '.' that begin with none of the last two, so that no path leaves its folder."""
    if name_problem(f"{name}:v1"):
        raise ConfigError(
            f"{name!r} is not a model's name: expected [namespace/]model, each of at most 80 ASCII letters, digits, "
            "'_', '-' and '.'. List the names with: forgetless registry"
        )
    if alias is not None and not is_alias(alias):
        raise ConfigError(
            f"{alias!r} is not an alias: expected at most 80 ASCII letters, digits, '_', '-' and '.'; "
            "cloud and local are Ollama's own, and 8 hexadecimal digits are a version's."
        )


def _folder(name: str) -> str:
    """Return a model's folder: without case, as Ollama compares names, and one folder also with a namespace."""
    check_names(name)
    return f"registry/{quote(name.lower(), safe='')}"


def _alias_folder(name: str, alias: str) -> str:
    check_names(name, alias)
    return f"{_folder(name)}/aliases/{alias.lower()}"


def _move_path(name: str, alias: str, number: int) -> str:
    return f"{_alias_folder(name, alias)}/{number:06}.json"


def _last(store: Store, folder: str) -> int:
    """Return the highest number of a folder's files; 0 where there is none."""
    pattern = re.compile(rf"{re.escape(folder)}/(\d+)\.json")
    return max((int(m[1]) for file in store.list_files(folder) if (m := pattern.fullmatch(file.path))), default=0)


def _read_all(store: Store, folder: str, path: Callable[[int], str], kind: type[Entry]) -> list[Entry]:
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(lambda number: _read(store, path(number), kind), range(1, _last(store, folder) + 1)))


def _read(store: Store, path: str, kind: type[Entry]) -> Entry:
    data = store.read_bytes(path)
    if data is None:
        raise StoreError(
            f"{store.url}/{path} is missing, so the registry was changed by hand. Restore it from a backup."
        )
    try:
        return kind.model_validate_json(data)
    except ValueError:
        expected = ", ".join(kind.model_fields)
        raise StoreError(
            f"{store.url}/{path} cannot be read: expected JSON with {expected}. Restore it from a backup."
        ) from None


def _bytes(record: Record) -> bytes:
    return canonical_json(record.model_dump(mode="json"))


def _now(store: Store) -> datetime:
    return datetime.fromtimestamp(store.clock(), UTC)


def _who() -> str:
    """Return user@host."""
    user = str(os.getuid())
    with contextlib.suppress(OSError, KeyError):  # a container may have no name for its user
        user = getpass.getuser()
    return f"{user}@{socket.gethostname()}"


def _look(name: str) -> str:
    return f"See its history with: forgetless registry {name}"
