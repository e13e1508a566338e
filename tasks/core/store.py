"""The artifact store: a folder (file://) or an S3-compatible bucket (s3://) behind one small protocol.

An artifact exists once its `_artifact.json` (files, sizes, sha256, record) is there; it is written last, so a partial
artifact is never taken for a whole one. A hit in the store is the cache: nothing that finished is computed again.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import unquote, urlparse

from tasks.core.cache import held_folder
from tasks.core.digest import canonical_json, content_digest, file_sha256
from tasks.core.errors import ForgetlessError, StoreError, describe_os_error, one_line
from tasks.core.lease import hold_lease
from tasks.core.records import ArtifactRecord, ArtifactRef
from tasks.core.settings import Settings
from tasks.core.stages import Stage

MARKER = "_artifact.json"
PROBE = "work/probe"
PIECE_BYTES = 1 << 20
TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}")
CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM}
RecordType = TypeVar("RecordType", bound=ArtifactRecord)


@dataclass(frozen=True)
class StoredFile:
    """A file of a store: its path there, bytes, and when it was written by the store's clock, seconds since 1970."""

    path: str
    size: int
    written: float


class Store(Protocol):
    url: str
    shares_kept_folders: bool
    """Whether other machines find a `kept_folder` too."""

    def read_bytes(self, path: str) -> bytes | None:
        """Return a small object's bytes, or None if it does not exist."""

    def write_bytes(self, path: str, data: bytes) -> None:
        """Write a small object, atomically."""

    def create_bytes(self, path: str, data: bytes) -> bool:
        """Write a small object where there is none, atomically: of several writers one gets True. The same bytes there
        already are one's own, written before an answer that was lost: True too. Raises StoreError where the store
        cannot do so."""

    def delete(self, path: str) -> None:
        """Delete a small object or a folder, where there is one; of an artifact the marker first."""

    def delete_file(self, path: str) -> None:
        """Delete a small object, where there is one, by one request."""

    def stream(self, path: str) -> Iterator[bytes]:
        """Yield a file in pieces of at most 1 MiB. Raises StoreError, also where there is none."""

    def list_partial(self) -> Iterator[StoredFile]:
        """Yield what was begun and not finished of single files: temporary files, uploads in parts (their size is 0
        where the store does not say it)."""

    def delete_partial(self, path: str) -> None:
        """Delete one of `list_partial`."""

    def list_folders(self, path: str) -> list[str]:
        """Return the names of the folders directly under `path`."""

    def list_files(self, path: str) -> Iterator[StoredFile]:
        """Yield every file under `path`, at any depth."""

    def clock(self) -> float:
        """Return the time by the store's own clock, seconds since 1970: the same for all who share it."""

    def work_folder(self) -> contextlib.AbstractContextManager[Path]:
        """Yield an empty local folder that is removed afterwards, on the disk that artifacts are moved to."""

    def kept_folder(self, name: str) -> Path:
        """Return a local folder for unfinished work that outlives a process; whoever finishes the work removes it."""

    def files_path(self, ref: ArtifactRef) -> str:
        """Return where in the store an artifact's files are."""

    def upload(self, folder: Path, ref: ArtifactRef, marker: bytes) -> bool:
        """Move the files of a local folder to where an artifact's are, the marker last, and return True; False where
        the artifact is there already, which stays as it is. Of several writers at once one gets True."""

    def local_folder(self, ref: ArtifactRef) -> Path:
        """Return a local folder with the artifact's files, downloaded and verified if need be."""


def open_store(settings: Settings) -> Store:
    """Return the store of `settings.store_url`. Raises StoreError for an unknown scheme or an unusable place."""
    url = urlparse(settings.store_url)
    if url.scheme == "file":
        return FileStore(Path(unquote(url.path)))
    if url.scheme == "s3" and url.netloc:
        from tasks.core.s3 import S3Store

        return S3Store(url.netloc, url.path.strip("/"), settings.cache, settings.cache_limit)
    raise StoreError(f"{settings.store_url} is not a store: expected a folder, file:///folder or s3://bucket/prefix.")


def find_artifact(store: Store, stage: Stage, record_type: type[RecordType]) -> RecordType | None:
    """Return the record of a finished artifact, marked as reused, or None."""
    marker = read_marker(store, stage.kind, stage.key)
    if marker is None:
        return None
    path = f"artifacts/{stage.kind}/{stage.key}"
    try:
        artifact = ArtifactRef(**{**marker["artifact"], "uri": f"{store.url}/{path}"}, reused=True)
        return record_type(artifact=artifact, **marker["record"])
    except (ValueError, KeyError, TypeError) as error:
        raise _unreadable(store, path, error) from None


def read_marker(store: Store, kind: str, key: str) -> dict[str, Any] | None:
    """Return what the store says of an artifact: its files with sha256 and size, its record, and what it was made from
    (content digests and settings). None where there is no such artifact."""
    path = f"artifacts/{kind}/{key}"
    data = store.read_bytes(f"{path}/{MARKER}")
    try:
        marker: dict[str, Any] | None = None if data is None else json.loads(data)
        return marker
    except ValueError as error:
        raise _unreadable(store, path, error) from None


def check_marker(store: Store, ref: ArtifactRef, marker: dict[str, Any]) -> None:
    """Raise StoreError unless a marker's files stay in their folder and are those that `ref.content` stands for: who
    writes into a store must not write onto this machine, nor slip in other files than were made."""
    path = f"artifacts/{ref.kind}/{ref.key}"
    try:
        files: dict[str, Any] = marker["files"]
        for name, facts in files.items():
            if not re.fullmatch(r"[\w.@+ -]+(/[\w.@+ -]+)*", name) or {".", ".."} & set(name.split("/")):
                raise StoreError(f"{ref.uri} names a file outside its folder, {name!r}: do not trust that store.")
            if not isinstance(facts["size"], int) or facts["size"] < 0:
                raise ValueError(f"{name} has {facts['size']!r} bytes")
        found = content_digest({name: facts["sha256"] for name, facts in files.items()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(store, path, error) from None
    if found != ref.content:
        raise _unreadable(store, path, ValueError("its files are not those of its digest"))


def _unreadable(store: Store, path: str, error: Exception) -> StoreError:
    return StoreError(
        f"{store.url}/{path}/{MARKER} cannot be read ({one_line(error)}). Delete that folder to make it anew."
    )


def stored(
    store: Store, stage: Stage, record_type: type[RecordType], make: Callable[[Path], dict[str, Any]]
) -> RecordType:
    """Return the record of a stage's artifact, making it only if it is not in the store and no other process is at it.

    `make(folder)` writes the artifact's files and returns the record's fields except `artifact`."""
    found = find_artifact(store, stage, record_type)
    if found is not None:
        return found
    with hold_lease(store, stage):
        found = find_artifact(store, stage, record_type)  # its former holder may have finished it
        if found is not None:
            return found
        with store.work_folder() as folder:
            try:
                fields = make(folder)
                return put_artifact(store, stage, folder, record_type, fields)
            except ForgetlessError:
                raise
            except Exception as error:
                denied = _write_error(error, folder)
                if denied is None:
                    raise  # the stage's own trouble, a network's say: it may be retried
                raise StoreError(
                    describe_os_error(denied, f"write the {stage.kind} artifact to {store.url}")
                ) from error


def _write_error(error: Exception, folder: Path) -> OSError | None:
    """Return why a disk could not be written, or None for other trouble. Libraries tell it in words of their own
    (safetensors) or not at all (NumPy)."""
    if not isinstance(error, OSError) or error.errno is None:
        told = re.search(r"os error (\d+)", str(error))
        is_full = shutil.disk_usage(folder).free < PIECE_BYTES
        number = int(told[1]) if told else errno.ENOSPC if is_full else 0
        error = OSError(number, os.strerror(number))
    return error if error.errno in CANNOT_WRITE else None


def put_artifact(
    store: Store, stage: Stage, folder: Path, record_type: type[RecordType], fields: dict[str, Any]
) -> RecordType:
    """Move a folder's files into the store as an artifact, and return its record; where another process committed the
    same artifact first, the record of that one."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    files: dict[str, Any] = {
        p.relative_to(folder).as_posix(): {"sha256": file_sha256(p), "size": p.stat().st_size} for p in paths
    }
    artifact = ArtifactRef(
        kind=stage.kind,
        key=stage.key,
        uri=f"{store.url}/artifacts/{stage.kind}/{stage.key}",
        content=content_digest({name: f["sha256"] for name, f in files.items()}),
        size_bytes=sum(f["size"] for f in files.values()),
    )
    record = record_type(artifact=artifact, **fields)
    marker = {
        "artifact": artifact.model_dump(exclude={"uri", "reused"}),
        "files": files,
        "made_from": {"version": stage.version, "inputs": stage.inputs, "settings": stage.section},
        "record": record.model_dump(mode="json", exclude={"artifact"}),
    }
    if store.upload(folder, artifact, canonical_json(marker)):
        return record
    found = find_artifact(store, stage, record_type)
    if found is None:
        raise StoreError(f"{artifact.uri} was finished by another process and deleted since. Run again.")
    return found


def check_writable(store: Store) -> None:
    """Raise StoreError unless something can be written, read back and is the same."""
    store.write_bytes(PROBE, b"forgetless")
    if store.read_bytes(PROBE) != b"forgetless":
        raise StoreError(f"{store.url} does not give back what was written to it. Choose another place with --store.")


class FileStore:
    """A folder. Artifacts are renamed into place whole, so a crash leaves work/ litter and nothing else."""

    shares_kept_folders = True

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = root.absolute().as_uri()

    def _path(self, path: str) -> Path:
        full = (self.root / path).resolve()
        if not full.is_relative_to(self.root.resolve()):
            raise StoreError(f"{path!r} leaves the store {self.url}.")
        return full

    def read_bytes(self, path: str) -> bytes | None:
        try:
            return self._path(path).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise StoreError(describe_os_error(error, f"read {path} from {self.url}")) from error

    def write_bytes(self, path: str, data: bytes) -> None:
        self._put(path, data, os.replace)

    def create_bytes(self, path: str, data: bytes) -> bool:
        return self._put(path, data, os.link) or self.read_bytes(path) == data

    def _put(self, path: str, data: bytes, place: Callable[[str, Path], None]) -> bool:
        """Write a file beside its place and let `place` bring it there; return False where that finds one there."""
        target = self._path(path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as file:
                try:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                    os.chmod(file.name, 0o644)
                    place(file.name, target)
                    return True
                except FileExistsError:
                    return False
                finally:
                    Path(file.name).unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(describe_os_error(error, f"write {path} to {self.url}")) from error

    def delete(self, path: str) -> None:
        target = self._path(path)
        try:
            (target / MARKER).unlink(missing_ok=True)
            shutil.rmtree(target)
        except NotADirectoryError:
            self.delete_file(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise StoreError(describe_os_error(error, f"delete {path} from {self.url}")) from error

    def delete_file(self, path: str) -> None:
        try:
            self._path(path).unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(describe_os_error(error, f"delete {path} from {self.url}")) from error

    def list_files(self, path: str) -> Iterator[StoredFile]:
        root = self.root.resolve()
        for folder, _, names in os.walk(self._path(path)):
            for name in names:
                file = Path(folder) / name
                with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                    facts = file.stat()
                    yield StoredFile(file.relative_to(root).as_posix(), facts.st_size, facts.st_mtime)

    def stream(self, path: str) -> Iterator[bytes]:
        try:
            with self._path(path).open("rb") as file:
                while piece := file.read(PIECE_BYTES):
                    yield piece
        except OSError as error:
            raise StoreError(describe_os_error(error, f"read {path} from {self.url}")) from error

    def list_partial(self) -> Iterator[StoredFile]:
        top = (p for folder in (self.root, self.root / "work") for p in folder.glob(".*") if p.is_file())
        found = [StoredFile(str(p.relative_to(self.root)), p.stat().st_size, p.stat().st_mtime) for p in top]
        for folder in ("runs", "registry", "fetched", "leases", "responses", "sweeps"):
            found += self.list_files(folder)
        yield from (file for file in found if TEMPORARY.fullmatch(file.path.rpartition("/")[2]))

    def delete_partial(self, path: str) -> None:
        self.delete_file(path)

    def clock(self) -> float:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.root, prefix=".clock.") as file:  # a shared disk has its own
                return os.stat(file.name).st_mtime
        except OSError as error:
            raise StoreError(describe_os_error(error, f"write to {self.url}")) from error

    def list_folders(self, path: str) -> list[str]:
        folder = self._path(path)
        return sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []

    @contextlib.contextmanager
    def work_folder(self) -> Iterator[Path]:
        with contextlib.ExitStack() as stack:
            try:
                folder = stack.enter_context(held_folder(self.root / "work"))
            except OSError as error:
                raise StoreError(describe_os_error(error, f"write to the store {self.url}")) from error
            yield folder

    def kept_folder(self, name: str) -> Path:
        return self._path(f"work/{name}")

    def files_path(self, ref: ArtifactRef) -> str:
        return f"artifacts/{ref.kind}/{ref.key}"

    def upload(self, folder: Path, ref: ArtifactRef, marker: bytes) -> bool:
        target = self._path(self.files_path(ref))
        (folder / MARKER).write_bytes(marker)
        for file in folder.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            _empty_partial(target)
        try:
            folder.rename(target)
            return True
        except OSError:
            if (target / MARKER).exists():  # another process finished the same artifact first
                return False
            raise

    def local_folder(self, ref: ArtifactRef) -> Path:
        folder = self._path(self.files_path(ref))
        for place, folders, names in os.walk(folder):
            for name in (*folders, *names):
                if os.path.islink(file := os.path.join(place, name)):
                    raise StoreError(
                        f"{ref.uri} holds a link, {file}, and might lead anywhere. Delete it and run again."
                    )
        return folder


def _empty_partial(target: Path) -> None:
    """Empty a folder that has no marker; a whole one that takes its place meanwhile is not touched."""
    opened = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if MARKER in os.listdir(opened):
            return
        for _, folders, files, place in os.fwalk(".", topdown=False, dir_fd=opened):
            for name in files:
                os.unlink(name, dir_fd=place)
            for name in folders:
                os.rmdir(name, dir_fd=place)
    finally:
        os.close(opened)
