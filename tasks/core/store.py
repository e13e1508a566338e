"""The artifact store: a folder (file://) or an S3-compatible bucket (s3://) behind one small protocol.

An artifact exists once its `_artifact.json` (files, sizes, sha256, record) is there; it is written last, so a partial
artifact is never taken for a whole one. A hit in the store is the cache: nothing that finished is computed again.
"""

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import unquote, urlparse

from tasks.core.digest import canonical_json, content_digest, file_sha256
from tasks.core.errors import StoreError, describe_os_error
from tasks.core.records import ArtifactRecord, ArtifactRef
from tasks.core.settings import Settings
from tasks.core.stages import Stage

MARKER = "_artifact.json"
CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM}
RecordType = TypeVar("RecordType", bound=ArtifactRecord)


class Store(Protocol):
    url: str

    def read_bytes(self, path: str) -> bytes | None:
        """Return a small object's bytes, or None if it does not exist."""

    def write_bytes(self, path: str, data: bytes) -> None:
        """Write a small object, atomically."""

    def list_folders(self, path: str) -> list[str]:
        """Return the names of the folders directly under `path`."""

    def work_folder(self) -> contextlib.AbstractContextManager[Path]:
        """Yield an empty local folder that is removed afterwards, on the disk that artifacts are moved to."""

    def kept_folder(self, name: str) -> Path:
        """Return a local folder for unfinished work that outlives a process; whoever finishes the work removes it."""

    def upload(self, folder: Path, path: str, marker: bytes) -> None:
        """Move the files of a local folder under `path`, the marker last."""

    def local_folder(self, ref: ArtifactRef) -> Path:
        """Return a local folder with the artifact's files, downloaded and verified if need be."""


def open_store(settings: Settings) -> Store:
    """Return the store of `settings.store_url`. Raises StoreError for an unknown scheme or an unusable place."""
    url = urlparse(settings.store_url)
    if url.scheme == "file":
        return FileStore(Path(unquote(url.path)))
    if url.scheme == "s3" and url.netloc:
        return S3Store(url.netloc, url.path.strip("/"), settings.cache)
    raise StoreError(f"{settings.store_url} is not a store: expected a folder, file:///folder or s3://bucket/prefix.")


def find_artifact(store: Store, stage: Stage, record_type: type[RecordType]) -> RecordType | None:
    """Return the record of a finished artifact, marked as reused, or None."""
    path = f"artifacts/{stage.kind}/{stage.key}"
    data = store.read_bytes(f"{path}/{MARKER}")
    if data is None:
        return None
    try:
        marker = json.loads(data)
        artifact = ArtifactRef(**{**marker["artifact"], "uri": f"{store.url}/{path}"}, reused=True)
        return record_type(artifact=artifact, **marker["record"])
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{store.url}/{path}/{MARKER} cannot be read ({error}). Delete that folder to make it anew."
        ) from None


def stored(
    store: Store, stage: Stage, record_type: type[RecordType], make: Callable[[Path], dict[str, Any]]
) -> RecordType:
    """Return the record of a stage's artifact, making it only if it is not in the store.

    `make(folder)` writes the artifact's files and returns the record's fields except `artifact`."""
    found = find_artifact(store, stage, record_type)
    if found is not None:
        return found
    with store.work_folder() as folder:
        try:
            fields = make(folder)
            return put_artifact(store, stage, folder, record_type, fields)
        except OSError as error:
            if error.errno not in CANNOT_WRITE:
                raise  # the stage's own trouble, a network's say: it may be retried
            raise StoreError(describe_os_error(error, f"write the {stage.kind} artifact to {store.url}")) from error


def put_artifact(
    store: Store, stage: Stage, folder: Path, record_type: type[RecordType], fields: dict[str, Any]
) -> RecordType:
    """Move a folder's files into the store as an artifact, and return its record."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    files: dict[str, Any] = {
        p.relative_to(folder).as_posix(): {"sha256": file_sha256(p), "size": p.stat().st_size} for p in paths
    }
    path = f"artifacts/{stage.kind}/{stage.key}"
    artifact = ArtifactRef(
        kind=stage.kind,
        key=stage.key,
        uri=f"{store.url}/{path}",
        content=content_digest({name: f["sha256"] for name, f in files.items()}),
        size_bytes=sum(f["size"] for f in files.values()),
    )
    record = record_type(artifact=artifact, **fields)
    marker = {
        "artifact": artifact.model_dump(exclude={"uri", "reused"}),
        "files": files,
        "record": record.model_dump(mode="json", exclude={"artifact"}),
    }
    store.upload(folder, path, canonical_json(marker))
    return record


def check_writable(store: Store) -> None:
    """Raise StoreError unless something can be written, read back and is the same."""
    store.write_bytes("work/probe", b"forgetless")
    if store.read_bytes("work/probe") != b"forgetless":
        raise StoreError(f"{store.url} does not give back what was written to it. Choose another place with --store.")


class FileStore:
    """A folder. Artifacts are renamed into place whole, so a crash leaves work/ litter and nothing else."""

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
        target = self._path(path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, target)
        except OSError as error:
            for litter in target.parent.glob(f".{target.name}.*"):
                litter.unlink(missing_ok=True)
            raise StoreError(describe_os_error(error, f"write {path} to {self.url}")) from error

    def list_folders(self, path: str) -> list[str]:
        folder = self._path(path)
        return sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []

    @contextlib.contextmanager
    def work_folder(self) -> Iterator[Path]:
        try:
            (self.root / "work").mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(dir=self.root / "work"))
        except OSError as error:
            raise StoreError(describe_os_error(error, f"write to the store {self.url}")) from error
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def kept_folder(self, name: str) -> Path:
        return self._path(f"work/{name}")

    def upload(self, folder: Path, path: str, marker: bytes) -> None:
        target = self._path(path)
        (folder / MARKER).write_bytes(marker)
        for file in folder.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and not (target / MARKER).exists():
            shutil.rmtree(target)
        try:
            folder.rename(target)
        except OSError:
            if not (target / MARKER).exists():  # else: another run finished the same artifact first
                raise

    def local_folder(self, ref: ArtifactRef) -> Path:
        return self._path(f"artifacts/{ref.kind}/{ref.key}")


class S3Store:
    """A bucket and prefix of any S3-compatible service; endpoint and credentials from the usual AWS variables."""

    def __init__(self, bucket: str, prefix: str, cache: Path) -> None:
        import boto3
        from botocore.config import Config

        # Checksums only where required: several S3-compatible services reject the newer default.
        config = Config(
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            retries={"mode": "standard", "max_attempts": 5},
        )
        self.client = boto3.client("s3", config=config)
        self.bucket, self.prefix = bucket, prefix
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self.cache = cache

    def _key(self, path: str) -> str:
        return f"{self.prefix}/{path}".lstrip("/")

    def read_bytes(self, path: str) -> bytes | None:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            body: bytes = self.client.get_object(Bucket=self.bucket, Key=self._key(path))["Body"].read()
            return body
        except self.client.exceptions.NoSuchKey:
            return None
        except (BotoCoreError, ClientError) as error:
            raise self._error(f"read {path}", error) from error

    def write_bytes(self, path: str, data: bytes) -> None:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            self.client.put_object(Bucket=self.bucket, Key=self._key(path), Body=data)
        except (BotoCoreError, ClientError) as error:
            raise self._error(f"write {path}", error) from error

    def list_folders(self, path: str) -> list[str]:
        from botocore.exceptions import BotoCoreError, ClientError

        prefix = self._key(path) + "/"
        try:
            pages = self.client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=prefix, Delimiter="/"
            )
            return sorted(
                entry["Prefix"][len(prefix) :].rstrip("/") for page in pages for entry in page.get("CommonPrefixes", [])
            )
        except (BotoCoreError, ClientError) as error:
            raise self._error(f"list {path}", error) from error

    @contextlib.contextmanager
    def work_folder(self) -> Iterator[Path]:
        self.cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.cache, prefix="work-") as folder:
            yield Path(folder)

    def kept_folder(self, name: str) -> Path:
        return self.cache / "work" / name

    def upload(self, folder: Path, path: str, marker: bytes) -> None:
        from boto3.exceptions import S3UploadFailedError
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            for file in sorted(p for p in folder.rglob("*") if p.is_file()):
                name = file.relative_to(folder).as_posix()
                self.client.upload_file(str(file), self.bucket, self._key(f"{path}/{name}"))
        except (BotoCoreError, ClientError, S3UploadFailedError) as error:
            raise self._error(f"write {path}", error) from error
        self.write_bytes(f"{path}/{MARKER}", marker)

    def local_folder(self, ref: ArtifactRef) -> Path:
        from botocore.exceptions import BotoCoreError, ClientError

        target = self.cache / "artifacts" / ref.kind / ref.content
        if target.is_dir():
            return target
        path = f"artifacts/{ref.kind}/{ref.key}"
        marker = self.read_bytes(f"{path}/{MARKER}")
        if marker is None:
            raise StoreError(f"{ref.uri} is not in the store any more. Run again to make it anew.")
        with self.work_folder() as folder:
            for name, facts in json.loads(marker)["files"].items():
                file = (folder / name).resolve()
                if not file.is_relative_to(folder.resolve()):
                    raise StoreError(f"{ref.uri} names a file outside its folder: {name!r}.")
                file.parent.mkdir(parents=True, exist_ok=True)
                try:
                    self.client.download_file(self.bucket, self._key(f"{path}/{name}"), str(file))
                except (BotoCoreError, ClientError) as error:
                    raise self._error(f"read {path}/{name}", error) from error
                if file_sha256(file) != facts["sha256"]:
                    raise StoreError(f"{ref.uri}/{name} has other bytes than were written. Delete it and run again.")
            target.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError, OSError):  # another process may have finished it first
                folder.rename(target)
                folder.mkdir()
        if not target.is_dir():
            raise StoreError(f"{ref.uri} could not be kept in the cache {self.cache}. Check its free space.")
        return target

    def _error(self, what: str, error: Exception) -> StoreError:
        return StoreError(
            f"Could not {what} in {self.url}: {error}. Check AWS_ENDPOINT_URL_S3, the credentials and that the bucket "
            "exists; forgetless doctor tests it."
        )
