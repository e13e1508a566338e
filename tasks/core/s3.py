"""The store in a bucket of any S3-compatible service; endpoint, region and credentials from the usual AWS variables.

Files go in parts of their own here, not by boto3's transfer manager, which neither continues what was broken off nor
sees wrong bytes. The marker keeps the MD5 of every part (what ETags are): one that is there, in the bucket or on the
disk, is kept, and a wrong one is sent or fetched again. What is used has the sha256 that was written.
"""

import base64
import contextlib
import fcntl
import hashlib
import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar

from tasks.core.addresses import shown, without_secrets
from tasks.core.cache import held_folder, hold, make_cache, trim_cache
from tasks.core.digest import canonical_json
from tasks.core.errors import StoreError, describe_os_error
from tasks.core.progress import report_progress
from tasks.core.records import ArtifactRef
from tasks.core.retry import WrongBytes, error_code, is_unknown_host, retried
from tasks.core.store import MARKER, PIECE_BYTES, PROBE, StoredFile, check_marker, read_marker

MIB = 1 << 20
PART = 8 * MIB  # S3 takes 5 MiB to 5 GiB, and 10,000 of them
MOST_PARTS = 10_000
WORKERS = 4  # each holds a part, twice while it is sent: 64 MiB
TIMEOUT_VARIABLE = "FORGETLESS_S3_TIMEOUT"
DENIED = {
    *("AccessDenied", "Forbidden", "403", "401", "InvalidAccessKeyId", "SignatureDoesNotMatch", "AllAccessDisabled"),
    *("ExpiredToken", "InvalidToken", "TokenRefreshRequired", "InvalidSecurity", "AccountProblem", "Unauthorized"),
}
T = TypeVar("T")
Item = TypeVar("Item")


@dataclass(frozen=True)
class Part:
    """`number` counts from 1; `digest` (MD5, or of a file's only part sha256) is None where it is not known."""

    number: int
    offset: int
    size: int
    digest: str | None


class S3Store:
    """A bucket and prefix."""

    shares_kept_folders = False

    def __init__(self, bucket: str, prefix: str, cache: Path, cache_limit: int | None = None) -> None:
        import boto3
        from botocore.config import Config

        # Checksums only where required: several S3-compatible services reject the newer default.
        config = Config(
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            retries={"mode": "standard", "max_attempts": 3},  # of a request; bodies and longer troubles: `retried`
            connect_timeout=10,
            read_timeout=_timeout(),
        )
        try:
            self.client = boto3.client("s3", config=config)
        except ValueError as error:
            raise StoreError(
                f"{without_secrets(str(error))}. Set AWS_ENDPOINT_URL_S3 to http(s)://host[:port]."
            ) from None
        endpoint = self.client.meta.endpoint_url
        if shown(endpoint) != endpoint:
            raise StoreError(
                f"AWS_ENDPOINT_URL_S3 holds more than an address ({shown(endpoint)}). Set it to http(s)://host[:port], "
                "and the credentials as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
            )
        self.bucket, self.prefix = bucket, prefix
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self.cache, self.cache_limit = cache, cache_limit
        self.keeps_created = False

    def _key(self, path: str) -> str:
        return f"{self.prefix}/{path}".lstrip("/")

    def _place(self, path: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self._key(path)}

    def read_bytes(self, path: str) -> bytes | None:
        def read() -> bytes:
            found = self.client.get_object(**self._place(path))
            with contextlib.closing(found["Body"]) as body:
                data: bytes = body.read()
            _check_etag(found, _md5(data))
            return data

        with self._telling(f"read {path}"):
            try:
                return retried(read)
            except self.client.exceptions.NoSuchKey:
                return None

    def write_bytes(self, path: str, data: bytes) -> None:
        with self._telling(f"write {path}"):
            self._put(path, data)

    def _put(self, path: str, data: bytes) -> None:
        md5 = _md5(data)

        def put() -> None:
            _check_etag(self.client.put_object(**self._place(path), Body=data, ContentMD5=_content_md5(md5)), md5)

        retried(put)

    def create_bytes(self, path: str, data: bytes) -> bool:
        with self._telling(f"write {path}"):
            if not self.keeps_created:
                self._check_keeps_created()
            return self._create(path, data) or self.read_bytes(path) == data

    def _create(self, path: str, data: bytes) -> bool:
        from botocore.exceptions import ClientError

        md5 = _md5(data)

        def put() -> None:
            made = self.client.put_object(**self._place(path), Body=data, ContentMD5=_content_md5(md5), IfNoneMatch="*")
            try:
                _check_etag(made, md5)
            except WrongBytes:  # there was none, so it is this writer's, and nobody's to use
                self.delete_file(path)
                raise

        while True:
            try:
                retried(put)
                return True
            except ClientError as error:
                match error_code(error)[0]:
                    case 412 | 304:  # MinIO's until 2024
                        return False
                    case 409:  # another writer is at it: who was first is known at the next try
                        continue
                raise

    def _check_keeps_created(self) -> None:
        """Raise StoreError unless what is there is not created again: some services ignore If-None-Match, and there of
        two writers both would win. Asked once by a process, of a file that nobody reads."""
        if self._create(PROBE, b"forgetless") and self._create(PROBE, b"forgetless"):
            raise StoreError(
                f"{self.client.meta.endpoint_url} ignores If-None-Match, so of two runs that write the same both would "
                "win. Use a service, or a version of it, that knows conditional writes."
            )
        self.keeps_created = True

    def delete_file(self, path: str) -> None:
        with self._telling(f"delete {path}"):
            retried(lambda: self.client.delete_object(**self._place(path)))

    def delete(self, path: str) -> None:
        with self._telling(f"delete {path}"):
            found = [file.path for file in self.list_files(path)] or [path]
            for file in sorted(found, key=lambda file: file != f"{path}/{MARKER}"):
                self.delete_file(file)

    def list_files(self, path: str) -> Iterator[StoredFile]:
        prefix = self._key(path).rstrip("/") + "/" if self._key(path) else ""
        with self._telling(f"list {path}"):
            for page in self._pages(Prefix=prefix):
                for entry in page.get("Contents", []):
                    name = entry["Key"].removeprefix(self.prefix).lstrip("/")
                    yield StoredFile(name, entry["Size"], entry["LastModified"].timestamp())

    def stream(self, path: str) -> Iterator[bytes]:
        with self._telling(f"read {path}"):
            found = retried(lambda: self.client.get_object(**self._place(path)))
            with contextlib.closing(found["Body"]) as body:
                yield from body.iter_chunks(PIECE_BYTES)

    def list_partial(self) -> Iterator[StoredFile]:
        with self._telling("list uploads"):
            for upload in self._list_uploads(f"{self.prefix}/" if self.prefix else ""):
                name = upload["Key"].removeprefix(self.prefix).lstrip("/")
                yield StoredFile(f"{name}?uploadId={upload['UploadId']}", 0, upload["Initiated"].timestamp())

    def _list_uploads(self, prefix: str) -> list[dict[str, Any]]:
        """Return the uploads in parts that were neither completed nor aborted; none where a service lists none."""
        from botocore.exceptions import ClientError

        pages = self.client.get_paginator("list_multipart_uploads")
        try:
            found = retried(lambda: list(pages.paginate(Bucket=self.bucket, Prefix=prefix)))
        except ClientError as error:
            if error_code(error)[0] not in (405, 501):
                raise
            return []
        return [upload for page in found for upload in page.get("Uploads", [])]

    def delete_partial(self, path: str) -> None:
        name, _, upload = path.rpartition("?uploadId=")
        with self._telling(f"abort the upload of {name}"), contextlib.suppress(self.client.exceptions.NoSuchUpload):
            retried(lambda: self.client.abort_multipart_upload(**self._place(name), UploadId=upload))

    def clock(self) -> float:
        with self._telling("read the time"):
            found = retried(lambda: self.client.head_bucket(Bucket=self.bucket))
        return parsedate_to_datetime(found["ResponseMetadata"]["HTTPHeaders"]["date"]).timestamp()

    def list_folders(self, path: str) -> list[str]:
        prefix = self._key(path) + "/"
        with self._telling(f"list {path}"):
            pages = self._pages(Prefix=prefix, Delimiter="/")
            return sorted(
                entry["Prefix"][len(prefix) :].rstrip("/") for page in pages for entry in page.get("CommonPrefixes", [])
            )

    def _pages(self, **arguments: str) -> Iterator[dict[str, Any]]:
        more = True
        while more:
            page = retried(lambda: self.client.list_objects_v2(Bucket=self.bucket, **arguments))
            yield page
            more = page["IsTruncated"]
            arguments["ContinuationToken"] = page.get("NextContinuationToken", "")

    @contextlib.contextmanager
    def work_folder(self) -> Iterator[Path]:
        with held_folder(make_cache(self.cache) / "work") as folder:
            yield folder

    def kept_folder(self, name: str) -> Path:
        return make_cache(self.cache) / "work" / name

    # --- files up ---

    def files_path(self, ref: ArtifactRef) -> str:
        # Named by content: what two writers of one key upload side by side never mixes, the marker says whose counts.
        return f"artifacts/{ref.kind}/{ref.key}/{ref.content}"

    def upload(self, folder: Path, ref: ArtifactRef, marker: bytes) -> bool:
        path, place, facts = f"artifacts/{ref.kind}/{ref.key}", self.files_path(ref), json.loads(marker)
        progress = _Progress("sending to the store", facts["files"])
        with self._telling(f"write {path}"):
            pages = self._pages(Prefix=self._key(path) + "/")
            found = {e["Key"].removeprefix(self._key(path) + "/"): e for p in pages for e in p.get("Contents", [])}
            for name, file in facts["files"].items():
                there = found.get(f"{ref.content}/{name}", {})
                md5s = self._upload_file(folder / name, f"{place}/{name}", file, there, progress)
                if len(md5s) > 1:
                    file["md5"] = md5s
        first = self.create_bytes(f"{path}/{MARKER}", canonical_json(facts))
        counts = facts if first else read_marker(self, ref.kind, ref.key) or facts
        for content in {ref.content, *(name.partition("/")[0] for name in found if "/" in name)}:
            if content != counts["artifact"]["content"]:  # of a writer that was killed, or came second
                self.delete(f"{path}/{content}")
        return first

    def _upload_file(
        self, file: Path, path: str, facts: dict[str, Any], there: dict[str, Any], progress: "_Progress"
    ) -> list[str]:
        """Put a file into the bucket and return the MD5 of each part. What an upload that was broken off left is not
        sent again: `there`, the object as the bucket lists it, or parts."""
        parts, whole = _parts(facts), hashlib.sha256()
        if there.get("Size") == facts["size"] and (md5s := _md5s_as_listed(file, parts, facts, _etag(there))):
            progress.add(facts["size"])
            return md5s
        upload, sent = self._find_upload(path) if len(parts) > 1 else ("", {})

        def read() -> Iterator[tuple[Part, bytes]]:
            with file.open("rb") as source:
                for part in parts:
                    data = source.read(part.size)
                    whole.update(data)
                    yield part, data

        def send(item: tuple[Part, bytes]) -> tuple[int, str, str]:
            part, data = item
            md5 = _md5(data)
            etag = sent.get(part.number, "")
            if not upload:
                self._put(path, data)
            elif etag != md5:
                etag = retried(lambda: self._send_part(path, upload, part.number, data, md5))
            return len(data), md5, etag

        md5s, etags = [], []
        for size, md5, etag in _in_order(send, read()):
            md5s.append(md5)
            etags.append(etag)
            progress.add(size)
        if whole.hexdigest() != facts["sha256"]:  # before it is complete: it never becomes an object
            raise StoreError(f"{file} changed while it was written to {self.url}. Run again.")
        if upload:
            self._complete(path, upload, md5s, etags, facts["size"])
        return md5s

    def _find_upload(self, path: str) -> tuple[str, dict[int, str]]:
        """Return the id of an upload of this object that was broken off, with the ETags of its parts by number, or of
        a new one. Whose bytes the parts have is not asked: those of other bytes have other ETags, and are replaced."""
        place = self._place(path)
        started = [u for u in self._list_uploads(place["Key"]) if u["Key"] == place["Key"]]
        if not started:
            return str(retried(lambda: self.client.create_multipart_upload(**place))["UploadId"]), {}
        upload = str(max(started, key=lambda u: u["Initiated"])["UploadId"])
        pages = retried(lambda: list(self.client.get_paginator("list_parts").paginate(**place, UploadId=upload)))
        there = {part["PartNumber"]: _etag(part) for page in pages for part in page.get("Parts", [])}
        return upload, there

    def _send_part(self, path: str, upload: str, number: int, data: bytes, md5: str) -> str:
        sent = self.client.upload_part(
            **self._place(path), UploadId=upload, PartNumber=number, Body=data, ContentMD5=_content_md5(md5)
        )
        _check_etag(sent, md5)
        return _etag(sent)

    def _complete(self, path: str, upload: str, md5s: list[str], etags: list[str], size: int) -> None:
        from botocore.exceptions import ClientError

        place = self._place(path)
        parts = {"Parts": [{"PartNumber": n, "ETag": f'"{etag}"'} for n, etag in enumerate(etags, 1)]}
        joined = _joined(md5s)
        lost: ClientError | None = None
        try:
            retried(lambda: self.client.complete_multipart_upload(**place, UploadId=upload, MultipartUpload=parts))
        except self.client.exceptions.NoSuchUpload as error:  # complete already, and the answer was lost?
            lost = error
        found = retried(lambda: self.client.head_object(**place))
        if lost and _etag(found) != joined:
            raise lost
        if found["ContentLength"] != size:
            raise WrongBytes(f"expected {size:,} bytes, found {found['ContentLength']:,}")

    # --- files down ---

    def local_folder(self, ref: ArtifactRef) -> Path:
        target = self.cache / "artifacts" / ref.kind / ref.content
        if hold(target):
            return target
        marker = read_marker(self, ref.kind, ref.key)
        if marker is None or marker["artifact"]["content"] != ref.content:
            raise StoreError(f"{ref.uri} is not in the store any more. Run again to make it anew.")
        check_marker(self, ref, marker)
        if self.cache_limit is not None:
            trim_cache(self.cache, self.cache_limit - ref.size_bytes)
        files = marker["files"]
        folder = self.kept_folder(f"download-{ref.content}")
        progress = _Progress("fetching from the store", files)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(folder.with_suffix(".lock")):
                if hold(target):  # another process was first
                    return target
                for name, facts in files.items():
                    file = folder / name
                    file.parent.mkdir(parents=True, exist_ok=True)
                    path = f"{self.files_path(ref)}/{name}"
                    with self._telling(f"read {path}"):
                        self._download_file(path, file, facts, progress)
                target.parent.mkdir(parents=True, exist_ok=True)
                folder.rename(target)
                folder.with_suffix(".lock").unlink()  # who waits for it finds the target
        except OSError as error:
            raise StoreError(describe_os_error(error, f"keep {ref.uri} in the cache {self.cache}")) from error
        if not hold(target):
            raise StoreError(f"{ref.uri} could not be kept in the cache {self.cache}. Check its free space.")
        return target

    def _download_file(self, path: str, file: Path, facts: dict[str, Any], progress: "_Progress") -> None:
        """Write an object to a file; parts that an earlier download left there are kept if they are right."""
        whole, begun = hashlib.sha256(), file.exists()
        with file.open("r+b" if begun else "w+b") as target:
            target.truncate(facts["size"])

            def fetch(part: Part) -> bytes:
                if begun and part.digest:
                    data = os.pread(target.fileno(), part.size, part.offset)
                    if _has_digest(data, part.digest):
                        return data
                data = retried(lambda: self._fetch_part(path, part, facts["size"]))
                _write_at(target.fileno(), data, part.offset)
                return data

            for data in _in_order(fetch, _parts(facts)):
                whole.update(data)
                progress.add(len(data))
            os.fsync(target.fileno())
        if whole.hexdigest() != facts["sha256"]:
            file.unlink()
            raise WrongBytes("another sha256")

    def _fetch_part(self, path: str, part: Part, size: int) -> bytes:
        if not part.size:
            return b""
        span = f"bytes={part.offset}-{part.offset + part.size - 1}"
        found = self.client.get_object(**self._place(path), Range=span)
        with contextlib.closing(found["Body"]) as body:
            total = found.get("ContentRange", "").rpartition("/")[2]
            if total != str(size):
                raise WrongBytes(f"expected {size} bytes, found {total or 'the whole object'}")
            data: bytes = body.read()
        if len(data) != part.size or (part.digest and not _has_digest(data, part.digest)):
            raise WrongBytes(f"part {part.number} differs")
        return data

    # --- what went wrong ---

    @contextlib.contextmanager
    def _telling(self, what: str) -> Iterator[None]:
        from botocore.exceptions import BotoCoreError, ClientError
        from botocore.parsers import ResponseParserError

        try:
            yield
        except (BotoCoreError, ClientError, ResponseParserError, WrongBytes) as error:
            raise StoreError(f"Could not {what} in {self.url}: {self._reason(error)}") from error

    def _reason(self, error: Exception) -> str:
        status, code = error_code(error)
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if isinstance(error, WrongBytes) or code == "InvalidRange":
            return f"it has other bytes than were written ({error}). Delete it and run again."
        if code == "NoSuchBucket" or (status == 404 and code == "404"):
            return f"there is no bucket {self.bucket}. Create it, or name another. Check AWS_ENDPOINT_URL_S3 too."
        if code == "RequestTimeTooSkewed":
            return "this machine's clock differs too much from the store's. Set it (timedatectl set-ntp true)."
        if status == 501 or code == "NotImplemented":
            return (
                f"{self.client.meta.endpoint_url} does not know this request ({error}). Conditional writes "
                "(If-None-Match) are needed: use a service, or a version of it, that has them."
            )
        if code in DENIED or status in (401, 403):
            return (
                f"the store denies it ({code}). Check that the credentials (AWS_ACCESS_KEY_ID, AWS_PROFILE) are still "
                f"valid and may read and write {self.bucket}."
            )
        if kinds & {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "TokenRetrievalError"}:
            return "no credentials were found. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE."
        if code == "InvalidBucketName" or "ParamValidationError" in kinds:
            return f"{self.bucket!r} cannot be a bucket's name: expected 3 to 63 of a-z, 0-9, '.' and '-'."
        endpoint = self.client.meta.endpoint_url
        if is_unknown_host(error):
            return f"there is no such host as {endpoint} names. Check AWS_ENDPOINT_URL_S3 and the network."
        if kinds & {"ReadTimeoutError", "ConnectTimeoutError"}:
            return (
                f"{endpoint} was silent for too long. Run again: what was transferred is kept. {TIMEOUT_VARIABLE} sets "
                f"the seconds to wait ({_timeout():g})."
            )
        if kinds & {"HTTPClientError", "ConnectionError", "IncompleteReadError", "ResponseStreamingError"}:
            return f"{endpoint} cannot be reached, or broke off. Check AWS_ENDPOINT_URL_S3 and run again."
        return f"{error}. Check AWS_ENDPOINT_URL_S3, the credentials and the bucket; forgetless doctor tests it."


class _Progress:
    """Tells the bytes transferred of an artifact, if it is one of more than a part."""

    def __init__(self, what: str, files: dict[str, Any]) -> None:
        self.what, self.done, self.total = what, 0, sum(facts["size"] for facts in files.values())

    def add(self, size: int) -> None:
        self.done += size
        if self.total > PART:
            report_progress("", self.done // MIB, self.total // MIB, f"{self.what}: {self.done // MIB:,} MiB")


def _timeout() -> float:
    """Return the seconds without a byte after which a server counts as hanging."""
    given = os.environ.get(TIMEOUT_VARIABLE) or "60"
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 86_400:
        raise StoreError(f"{TIMEOUT_VARIABLE} must be a number of seconds above 0, found {given!r}.")
    return seconds


def _parts(facts: dict[str, Any]) -> list[Part]:
    """Return the parts of a file by its facts in the marker: all but the last are equally long, whole MiB."""
    size = facts["size"]
    length = max(PART, -(-size // MOST_PARTS // MIB) * MIB)
    starts = range(0, max(size, 1), length)
    digests = facts.get("md5") or ([facts["sha256"]] if len(starts) == 1 else [None] * len(starts))
    return [
        Part(number, start, min(length, size - start), digest)
        for number, (start, digest) in enumerate(zip(starts, digests, strict=True), 1)
    ]


def _in_order(work: Callable[[Item], T], items: Iterable[Item]) -> Iterator[T]:
    """Yield `work` of each item, in order, done by a few threads that are never far ahead."""
    with ThreadPoolExecutor(WORKERS) as pool:
        ahead: deque[Future[T]] = deque()
        for item in items:
            ahead.append(pool.submit(work, item))
            if len(ahead) > WORKERS:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait until no other process is within; the system opens the lock of one that was killed."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write_at(file: int, data: bytes, offset: int) -> None:
    rest = memoryview(data)
    while rest:
        written = os.pwrite(file, rest, offset)
        rest, offset = rest[written:], offset + written


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def _joined(md5s: list[str]) -> str:
    """Return the ETag of an object from the MD5 of its parts."""
    return md5s[0] if len(md5s) == 1 else f"{_md5(b''.join(map(bytes.fromhex, md5s)))}-{len(md5s)}"


def _md5s_as_listed(file: Path, parts: list[Part], facts: dict[str, Any], etag: str) -> list[str]:
    """Return the MD5 of each part of a file whose bytes are those of an object with this ETag; else nothing."""
    whole, md5s = hashlib.sha256(), []
    with file.open("rb") as source:
        for part in parts:
            data = source.read(part.size)
            whole.update(data)
            md5s.append(_md5(data))
    return md5s if (_joined(md5s), whole.hexdigest()) == (etag, facts["sha256"]) else []


def _has_digest(data: bytes, digest: str) -> bool:
    return (_md5(data) if len(digest) == 32 else hashlib.sha256(data).hexdigest()) == digest


def _content_md5(md5: str) -> str:
    return base64.b64encode(bytes.fromhex(md5)).decode()


def _etag(found: dict[str, Any]) -> str:
    return str(found.get("ETag", "")).strip('"').lower()


def _check_etag(found: dict[str, Any], md5: str) -> None:
    """Raise WrongBytes unless the ETag is `md5`, the data's, where it is an MD5 (with other keys than S3's, or of
    several parts, it is not)."""
    encrypted = str(found.get("ServerSideEncryption", "")).startswith("aws:kms") or "SSECustomerAlgorithm" in found
    etag = _etag(found)
    if re.fullmatch(r"[0-9a-f]{32}", etag) and not encrypted and etag != md5:
        raise WrongBytes(f"ETag {etag}, MD5 {md5}")
