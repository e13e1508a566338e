"""The store in a bucket of any S3-compatible service; endpoint, region and credentials from the usual AWS variables."""

import contextlib
import json
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path

from tasks.core.cache import held_folder, hold, trim_cache
from tasks.core.digest import file_sha256
from tasks.core.errors import StoreError
from tasks.core.records import ArtifactRef
from tasks.core.store import MARKER, PIECE_BYTES, StoredFile


class S3Store:
    """A bucket and prefix."""

    def __init__(self, bucket: str, prefix: str, cache: Path, cache_limit: int | None = None) -> None:
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
        self.cache, self.cache_limit = cache, cache_limit

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

    def create_bytes(self, path: str, data: bytes) -> bool:
        from botocore.exceptions import BotoCoreError, ClientError

        while True:
            try:
                self.client.put_object(Bucket=self.bucket, Key=self._key(path), Body=data, IfNoneMatch="*")
                return True
            except ClientError as error:
                match error.response["ResponseMetadata"].get("HTTPStatusCode"):
                    case 412:
                        return self.read_bytes(path) == data
                    case 409:  # another writer is at it: who was first is known at the next try
                        continue
                raise self._error(f"write {path}", error) from error
            except BotoCoreError as error:
                raise self._error(f"write {path}", error) from error

    def delete(self, path: str) -> None:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            found = [file.path for file in self.list_files(path)] or [path]
            for file in sorted(found, key=lambda file: file != f"{path}/{MARKER}"):
                self.client.delete_object(Bucket=self.bucket, Key=self._key(file))
        except (BotoCoreError, ClientError) as error:
            raise self._error(f"delete {path}", error) from error

    def list_files(self, path: str) -> Iterator[StoredFile]:
        from botocore.exceptions import BotoCoreError, ClientError

        prefix = self._key(path).rstrip("/") + "/" if self._key(path) else ""
        try:
            for page in self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix):
                for entry in page.get("Contents", []):
                    name = entry["Key"].removeprefix(self.prefix).lstrip("/")
                    yield StoredFile(name, entry["Size"], entry["LastModified"].timestamp())
        except (BotoCoreError, ClientError) as error:
            raise self._error(f"list {path}", error) from error

    def stream(self, path: str) -> Iterator[bytes]:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            body = self.client.get_object(Bucket=self.bucket, Key=self._key(path))["Body"]
            with contextlib.closing(body):
                yield from body.iter_chunks(PIECE_BYTES)
        except (BotoCoreError, ClientError) as error:
            raise self._error(f"read {path}", error) from error

    def list_partial(self) -> Iterator[StoredFile]:
        from botocore.exceptions import BotoCoreError, ClientError

        pages = self.client.get_paginator("list_multipart_uploads")
        prefix = f"{self.prefix}/" if self.prefix else ""
        try:
            for page in pages.paginate(Bucket=self.bucket, Prefix=prefix):
                for upload in page.get("Uploads", []):
                    name = upload["Key"].removeprefix(self.prefix).lstrip("/")
                    yield StoredFile(f"{name}?uploadId={upload['UploadId']}", 0, upload["Initiated"].timestamp())
        except (BotoCoreError, ClientError) as error:
            raise self._error("list uploads", error) from error

    def delete_partial(self, path: str) -> None:
        from botocore.exceptions import BotoCoreError, ClientError

        name, _, upload = path.rpartition("?uploadId=")
        try:
            self.client.abort_multipart_upload(Bucket=self.bucket, Key=self._key(name), UploadId=upload)
        except self.client.exceptions.NoSuchUpload:  # finished or aborted meanwhile
            pass
        except (BotoCoreError, ClientError) as error:
            raise self._error(f"abort the upload of {name}", error) from error

    def clock(self) -> float:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            headers = self.client.head_bucket(Bucket=self.bucket)["ResponseMetadata"]["HTTPHeaders"]
        except (BotoCoreError, ClientError) as error:
            raise self._error("read the time", error) from error
        return parsedate_to_datetime(headers["date"]).timestamp()

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
        with held_folder(self.cache / "work") as folder:
            yield folder

    def kept_folder(self, name: str) -> Path:
        return self.cache / "work" / name

    def files_path(self, ref: ArtifactRef) -> str:
        # Named by content: what two writers of one key upload side by side never mixes, the marker says whose counts.
        return f"artifacts/{ref.kind}/{ref.key}/{ref.content}"

    def upload(self, folder: Path, ref: ArtifactRef, marker: bytes) -> bool:
        from boto3.exceptions import S3UploadFailedError
        from botocore.exceptions import BotoCoreError, ClientError

        path, place = f"artifacts/{ref.kind}/{ref.key}", self.files_path(ref)
        try:
            for file in sorted(p for p in folder.rglob("*") if p.is_file()):
                name = file.relative_to(folder).as_posix()
                self.client.upload_file(str(file), self.bucket, self._key(f"{place}/{name}"))
        except (BotoCoreError, ClientError, S3UploadFailedError) as error:
            raise self._error(f"write {path}", error) from error
        first = self.create_bytes(f"{path}/{MARKER}", marker)
        counts = json.loads(marker if first else self.read_bytes(f"{path}/{MARKER}") or marker)["artifact"]["content"]
        for content in self.list_folders(path):
            if content != counts:  # of a writer that was killed, or came second
                self.delete(f"{path}/{content}")
        return first

    def local_folder(self, ref: ArtifactRef) -> Path:
        from botocore.exceptions import BotoCoreError, ClientError

        target = self.cache / "artifacts" / ref.kind / ref.content
        if hold(target):
            return target
        path = f"artifacts/{ref.kind}/{ref.key}"
        marker = self.read_bytes(f"{path}/{MARKER}")
        if marker is None or json.loads(marker)["artifact"]["content"] != ref.content:
            raise StoreError(f"{ref.uri} is not in the store any more. Run again to make it anew.")
        if self.cache_limit is not None:
            trim_cache(self.cache, self.cache_limit - ref.size_bytes)
        with self.work_folder() as folder:
            for name, facts in json.loads(marker)["files"].items():
                file = (folder / name).resolve()
                if not file.is_relative_to(folder.resolve()):
                    raise StoreError(f"{ref.uri} names a file outside its folder: {name!r}.")
                file.parent.mkdir(parents=True, exist_ok=True)
                try:
                    self.client.download_file(self.bucket, self._key(f"{self.files_path(ref)}/{name}"), str(file))
                except (BotoCoreError, ClientError) as error:
                    raise self._error(f"read {path}/{name}", error) from error
                if file_sha256(file) != facts["sha256"]:
                    raise StoreError(f"{ref.uri}/{name} has other bytes than were written. Delete it and run again.")
            target.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError, OSError):  # another process may have finished it first
                folder.rename(target)
                folder.mkdir()
        if not hold(target):
            raise StoreError(f"{ref.uri} could not be kept in the cache {self.cache}. Check its free space.")
        return target

    def _error(self, what: str, error: Exception) -> StoreError:
        return StoreError(
            f"Could not {what} in {self.url}: {error}. Check AWS_ENDPOINT_URL_S3, the credentials and that the bucket "
            "exists; forgetless doctor tests it."
        )
