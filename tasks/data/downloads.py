"""Downloads: files at s3:// and https:// addresses, each fetched once into the cache, where it only ever is whole.

One that breaks off is tried again, and goes on where it ended, in another process too, as long as the server has that
version and gives files in parts.

What an address carries as a secret (user:password@, a signature or token in its query) goes to its server alone: no
message, name or path has it. Which addresses there are under a prefix is told here; what files hold is not asked.
"""

import contextlib
import fcntl
import functools
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.parse import unquote

from tasks.core.addresses import reveal, shown
from tasks.core.cache import make_cache
from tasks.core.digest import sha256
from tasks.core.errors import DataError
from tasks.core.progress import report_progress
from tasks.core.retry import WrongBytes, error_code, is_passing, retried
from tasks.core.settings import read_settings
from tasks.data.files import ARCHIVES, SUFFIXES, WORKBOOKS, data_names, data_suffix, one_line, refusal

SECONDS = 30.0  # without a byte, or a connection
PIECE = 1 << 20
FIRST_WAIT = 0.5  # seconds, before it is tried again
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Remote:
    """One file elsewhere: `name` and `where` are what it is called, `address` is where it is, secrets and all."""

    name: str
    where: str
    address: str


def is_remote(path: str) -> bool:
    return "://" in path


def address_digest(address: str) -> str:
    """Return what an address is found by where it must not be read: its sha256 without the user and the password."""
    return sha256(re.sub(r"(?<=://)[^/?#]*@", "", address).encode())


def list_remote(path: str) -> list[Remote]:
    """Return the files that an address names: itself, or those under an s3 prefix or glob. Raises DataError."""
    path = reveal(path)
    where = shown(path)
    scheme = path.partition("://")[0].lower()
    if scheme == "s3":
        return _list_s3(path)
    if scheme not in ("https", "http"):
        raise DataError(
            f"{where}: expected a local file, folder or glob, s3://bucket/key, https://host/file or a Hub data set id "
            f"(owner/name), found a {scheme}:// address. Download it first."
        )
    name = unquote(PurePosixPath(where.partition("://")[2].partition("/")[2]).name)
    if not data_suffix(name):
        raise DataError(f"{where}: {refusal(name)}")
    return [Remote(name, where, path)]


def fetch(remote: Remote) -> Path:
    """Return where a file is in the cache, downloaded unless what the server has now is there. Raises DataError."""
    return _fetch_s3(remote) if remote.address.lower().startswith("s3:") else _fetch_http(remote)


@dataclass(frozen=True)
class Answer:
    """What a server gives of a file: its bytes from `start` on. `version` and `size`, of the whole, are None where it
    does not say; with `mark` more is asked for of the same version, and without one it cannot be."""

    version: str | None
    size: int | None
    start: int
    mark: str | None
    pieces: Iterator[bytes]


Ask = Callable[[int, str | None], contextlib.AbstractContextManager[Answer]]
"""Asks for a file from a byte on, if it has the mark still; a server may give all of it instead."""


class Download:
    """A file on its way into the cache. `done` and `size` are bytes: what is there of it, what there should be."""

    def __init__(self, remote: Remote) -> None:
        self.remote = remote
        self.folder = read_settings().cache / "downloads"
        self.done = 0
        self.size: int | None = None

    def run(self, ask: Ask) -> Path:
        """Return where the file is in the cache. What fails for a passing reason is tried again, for as long as more
        of the file comes, and a few times more; then its error is raised."""
        while True:
            before = self.done
            try:
                path = retried(lambda: self._try(ask), FIRST_WAIT)
                if path:
                    return path
            except Exception as error:
                if isinstance(error, OSError) and error.errno is not None and not is_passing(error):
                    raise self._unwritable(error) from None
                if not is_passing(error) or self.done < before + PIECE:
                    raise

    def _try(self, ask: Ask) -> Path | None:
        """Return where the file is; None where another process was at it, and is no more.

        It is written under another name: what is under its own is whole."""
        with contextlib.ExitStack() as stack:
            asked = stack.enter_context(contextlib.ExitStack())
            answer = asked.enter_context(ask(0, None))
            self.size = answer.size
            path = self.folder / sha256(f"{self.remote.address}\n{answer.version}".encode())
            if answer.version and path.is_file():
                return path
            make_cache(self.folder.parent)
            self.folder.mkdir(exist_ok=True)
            can_go_on = answer.size is not None and answer.version and answer.mark
            part_path = self.folder / f"part-{path.name}-{answer.size}" if can_go_on else None
            part = stack.enter_context(self._open_part(part_path))
            if part is None:
                asked.close()  # who waits does not read
                self._wait(part_path)
                return None
            size = "an unknown number of" if answer.size is None else f"{answer.size:,}"
            report_progress("dataset", 0, 0, f"downloading {self.remote.name}, {size} bytes")
            self.done = part.seek(0, os.SEEK_END)
            if answer.size is not None and 0 < self.done < answer.size:
                asked.close()
                answer = self._go_on(asked, ask, answer, part)
            if self.done != answer.size:
                for piece in answer.pieces:
                    part.write(piece)
                    self.done += len(piece)
                part.flush()
                os.fsync(part.fileno())
            if answer.size is not None and self.done != answer.size:
                if self.done > answer.size:
                    part.truncate(0)
                raise WrongBytes(f"expected {answer.size} bytes, found {self.done}")
            Path(part.name).replace(path)
        report_progress("dataset", 0, 0, f"reading {self.remote.name}")
        return path

    def _go_on(self, asked: contextlib.ExitStack, ask: Ask, first: Answer, part: IO[bytes]) -> Answer:
        """Return the rest of the file, or all of it, with `part` cut to where that begins."""
        try:
            rest = asked.enter_context(ask(self.done, first.mark))
            if (rest.version, rest.size) != (first.version, first.size) or rest.start not in (0, self.done):
                raise WrongBytes("the file changed meanwhile")
        except WrongBytes:
            self.done = part.truncate(0)
            raise
        self.done = part.truncate(rest.start)
        return rest

    @contextlib.contextmanager
    def _open_part(self, path: Path | None) -> Iterator[IO[bytes] | None]:
        """Yield the file that bytes are added to, which stays if they do not become all; None where another process is
        at it. Without a path, and where the disk knows no locks, it is a new one that does not stay."""
        with contextlib.ExitStack() as stack:
            part: IO[bytes] | None = None
            is_free = path is None
            if path is not None:
                mine = functools.partial(os.open, mode=0o600)  # as a temporary file's
                file = stack.enter_context(open(path, "ab+", opener=mine))
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    is_same = path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
                    part = file if is_same else None  # not just renamed, by who was at it
                except BlockingIOError:
                    pass
                except OSError:
                    is_free = True
            if is_free:
                new = stack.enter_context(tempfile.NamedTemporaryFile(dir=self.folder, prefix="part-", delete=False))
                stack.callback(Path(new.name).unlink, missing_ok=True)
                part = new  # type: ignore[assignment]
            yield part

    def _wait(self, part: Path | None) -> None:
        report_progress("dataset", 0, 0, f"another process downloads {self.remote.name}: waiting for it")
        with contextlib.suppress(FileNotFoundError):
            if part is not None:
                with part.open("rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX)

    def _unwritable(self, error: OSError) -> DataError:
        size = "an unknown number of" if self.size is None else f"{self.size:,}"
        return DataError(
            f"{self.remote.where}: its {size} bytes could not be kept in the cache {self.folder}: "
            f"{error.strerror or error}. Free some space, or name another folder as FORGETLESS_CACHE."
        )


def _broken_off(where: str, done: int, size_bytes: int | None) -> str:
    return f"{where}: the download broke off: expected {size_bytes:,} bytes, found {done:,}. Run again."


# --- https ------------------------------------------------------------------------------------------------------------


def _fetch_http(remote: Remote) -> Path:
    import httpx

    logging.getLogger("httpx").setLevel(logging.WARNING)  # it notes every address, signatures and all
    where, download = remote.where, Download(remote)

    @contextlib.contextmanager
    def ask(start: int, mark: str | None) -> Iterator[Answer]:
        # identity: the bytes as they are stored, to which Content-Length and ETag belong.
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-", "If-Range": mark} if mark else {})
        with (
            httpx.Client(follow_redirects=True, timeout=SECONDS, event_hooks={"request": [_check_scheme]}) as client,
            client.stream("GET", remote.address, headers=headers) as response,
        ):
            if mark and response.status_code in (412, 416):
                raise WrongBytes("the file changed meanwhile")
            if response.status_code != 200 and not (mark and response.status_code == 206):
                raise httpx.HTTPStatusError("", request=response.request, response=response)
            yield _http_answer(response)

    try:
        return download.run(ask)
    except httpx.HTTPStatusError as error:
        raise DataError(_status_sentence(where, error.response.status_code, error.response.reason_phrase)) from None
    except (httpx.InvalidURL, httpx.UnsupportedProtocol, UnicodeError):  # their texts quote the address
        raise DataError(f"{where}: not a valid address. Escape what is special in it (@ is %40).") from None
    except httpx.TooManyRedirects:
        raise DataError(f"{where}: the server redirects in a circle. Check the address.") from None
    except httpx.ConnectError as error:
        raise DataError(
            f"{where}: the server cannot be reached: {one_line(error)}. Check the address and the network."
        ) from None
    except (httpx.TransportError, WrongBytes) as error:
        if isinstance(error, httpx.TimeoutException):
            what = f"the server was silent for {SECONDS:g} s, after {download.done:,} bytes"
        elif download.size is not None:
            raise DataError(_broken_off(where, download.done, download.size)) from None
        else:  # its text may hold secrets
            what = f"the download broke off after {download.done:,} bytes ({type(error).__name__})"
        raise DataError(f"{where}: {what}. Run again.") from None


def _http_answer(response: Any) -> Answer:
    etag, modified = response.headers.get("ETag"), response.headers.get("Last-Modified")
    start, size = 0, _length(response)
    if response.status_code == 206:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if found is None:
            raise WrongBytes("a part of unknown place")
        start, size = int(found[1]), int(found[2])
    # A weak ETag is of equal meaning, not of equal bytes.
    mark = etag if etag and not etag.startswith("W/") else modified
    return Answer(etag or (modified and f"{modified} {size}"), size, start, mark, response.iter_raw())


def _length(response: Any) -> int | None:
    length = response.headers.get("Content-Length", "")
    chunked = "Transfer-Encoding" in response.headers  # which overrules the length
    return int(length) if length.isdecimal() and not chunked else None


def _check_scheme(request: Any) -> None:
    """Raise DataError for an address, asked for or redirected to, that others on the way could read or change."""
    if request.url.scheme != "https" and request.url.host not in LOCAL_HOSTS:
        raise DataError(
            f"{shown(str(request.url))}: expected https://, found {request.url.scheme}://, which anyone on the way can "
            "read and change. Use https, or download it first."
        )


def _status_sentence(where: str, status: int, phrase: str) -> str:
    found = f"{status} {phrase}".strip()
    if status in (404, 410):
        return f"{where}: there is no such file on the server ({found}). Check the address."
    if status in (401, 403):
        return (
            f"{where}: the server does not let you read it ({found}). A signed address may have expired: get a new "
            "one, or download the file first."
        )
    return f"{where}: expected the file, the server answered {found}. Try again later, or download it first."


# --- s3 ---------------------------------------------------------------------------------------------------------------


def _client() -> Any:
    from tasks.core.s3 import S3Store

    return S3Store("", "", read_settings().cache).client  # its set-up: endpoint, credentials, retries, checksums


@contextlib.contextmanager
def _telling_s3(where: str) -> Iterator[None]:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError, WrongBytes, ValueError) as error:  # ValueError: an endpoint that is no URL
        raise DataError(_s3_sentence(where, error)) from None


def _s3_sentence(where: str, error: Exception) -> str:
    code = str(getattr(error, "response", {}).get("Error", {}).get("Code", ""))
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if code in ("NoSuchKey", "404", "NoSuchVersion"):
        return f"{where}: there is no such object. Check the key; a prefix ends in a slash."
    if code == "NoSuchBucket":
        return f"{where}: there is no such bucket. Check its name, and AWS_ENDPOINT_URL_S3."
    if code in ("AccessDenied", "403", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "Forbidden"):
        return f"{where}: the store does not let you read it ({code}). Check AWS_ACCESS_KEY_ID and its rights."
    if kinds & {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "TokenRetrievalError"}:
        return f"{where}: no credentials were found. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE."
    if kinds & {"ConnectionError", "HTTPClientError", "IncompleteReadError", "WrongBytes"}:
        return f"{where}: the store cannot be reached, or broke off. Check AWS_ENDPOINT_URL_S3 and the network."
    return f"{where}: the object could not be read: {one_line(error)}. Check AWS_ENDPOINT_URL_S3 and the bucket."


def _fetch_s3(remote: Remote) -> Path:
    from botocore.exceptions import ClientError

    bucket, _, key = remote.address.partition("://")[2].partition("/")

    @contextlib.contextmanager
    def ask(start: int, mark: str | None) -> Iterator[Answer]:
        rest = {"Range": f"bytes={start}-", "IfMatch": mark} if mark else {}
        try:
            found = client.get_object(Bucket=bucket, Key=key, **rest)
        except ClientError as error:
            if mark and error_code(error)[0] in (412, 416):
                raise WrongBytes("the object changed meanwhile") from None
            raise
        place = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", found.get("ContentRange", ""))
        begins, size = (int(place[1]), int(place[2])) if place else (0, found["ContentLength"])
        with contextlib.closing(found["Body"]) as body:
            yield Answer(found.get("ETag"), size, begins, found.get("ETag"), body.iter_chunks(PIECE))

    with _telling_s3(remote.where):
        client = _client()
        return Download(remote).run(ask)


def _list_s3(path: str) -> list[Remote]:
    where = shown(path)
    bucket, _, key = path.partition("://")[2].partition("/")
    name = key.rpartition("/")[2]
    if "@" in bucket:
        raise DataError(
            f"{where}: credentials do not belong in an address. Set AWS_ACCESS_KEY_ID and its secret instead."
        )
    is_glob = re.search(r"[*?]", key)
    if not is_glob and data_suffix(name):
        return [Remote(name, where, path)]
    if not is_glob and name.lower().endswith((*ARCHIVES, *WORKBOOKS)):
        raise DataError(f"{where}: {refusal(name)}")
    root = key[: is_glob.start()].rpartition("/")[0] if is_glob else key.rstrip("/")
    root = f"{root}/" if root else ""
    with _telling_s3(where):
        pages = _client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=root)
        keys = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
    if is_glob:
        keys = [k for k in keys if _glob_pattern(key).fullmatch(k)]
    names = data_names(k.removeprefix(root) for k in keys)
    if not names:
        raise DataError(
            f"{where}: expected objects that end in {', '.join(SUFFIXES)}, found {len(keys) or 'none'}"
            f"{' of other kinds' if keys else ''}. Check the bucket and the key."
        )
    return [Remote(n, f"s3://{bucket}/{root}{n}", f"s3://{bucket}/{root}{n}") for n in names]


def _glob_pattern(glob: str) -> re.Pattern[str]:
    """Return a glob as a regular expression: ** is any folders, * and ? stay within one."""
    parts = re.split(r"(\*\*/|\*|\?)", glob)
    known = {"**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}
    return re.compile("".join(known.get(part) or re.escape(part) for part in parts))
