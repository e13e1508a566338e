"""Downloads: files at s3:// and https:// addresses, each fetched once into the cache, where it only ever is whole.

What an address carries as a secret (user:password@, a signature or token in its query) goes to its server alone: no
message, name or path has it. Which addresses there are under a prefix is told here; what files hold is not asked.
"""

import contextlib
import logging
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from tasks.core.addresses import reveal, shown
from tasks.core.cache import make_cache
from tasks.core.digest import sha256
from tasks.core.errors import DataError
from tasks.core.progress import report_progress
from tasks.core.settings import read_settings
from tasks.data.files import ARCHIVES, SUFFIXES, WORKBOOKS, data_names, data_suffix, one_line, refusal

SECONDS = 30.0  # without a byte, or a connection
PIECE = 1 << 20
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Remote:
    """One file elsewhere: `name` and `where` are what it is called, `address` is where it is, secrets and all."""

    name: str
    where: str
    address: str


def is_remote(path: str) -> bool:
    return "://" in path


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


def _keep(remote: Remote, version: str | None, size_bytes: int | None, pieces: Iterable[bytes]) -> Path:
    """Return where the pieces of a download are in the cache, written unless this version of them is there.

    They are written under another name: what is under its own is whole."""
    folder = read_settings().cache / "downloads"
    path = folder / sha256(f"{remote.address}\n{version}".encode())
    if version and path.is_file():
        return path
    size = "an unknown number of" if size_bytes is None else f"{size_bytes:,}"
    report_progress("dataset", 0, 0, f"downloading {remote.name}, {size} bytes")
    part = None
    try:
        make_cache(folder.parent)
        folder.mkdir(exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix="part-", delete=False) as file:
            part = Path(file.name)
            for piece in pieces:
                file.write(piece)
            done = file.tell()
            file.flush()
            os.fsync(file.fileno())
        if size_bytes is not None and done != size_bytes:
            raise DataError(_broken_off(remote.where, done, size_bytes))
        part.replace(path)
    except OSError as error:
        raise DataError(
            f"{remote.where}: its {size} bytes could not be kept in the cache {folder}: {error.strerror or error}. "
            "Free some space, or name another folder as FORGETLESS_CACHE."
        ) from None
    finally:
        if part is not None:
            part.unlink(missing_ok=True)
    report_progress("dataset", 0, 0, f"reading {remote.name}")
    return path


def _broken_off(where: str, done: int, size_bytes: int | None) -> str:
    return f"{where}: the download broke off: expected {size_bytes:,} bytes, found {done:,}. Run again."


# --- https ------------------------------------------------------------------------------------------------------------


def _fetch_http(remote: Remote) -> Path:
    import httpx

    logging.getLogger("httpx").setLevel(logging.WARNING)  # it notes every address, signatures and all
    where = remote.where
    response: httpx.Response | None = None
    try:
        with (
            httpx.Client(follow_redirects=True, timeout=SECONDS, event_hooks={"request": [_check_scheme]}) as client,
            # identity: the bytes as they are stored, to which Content-Length and ETag belong.
            client.stream("GET", remote.address, headers={"Accept-Encoding": "identity"}) as response,
        ):
            if response.status_code != 200:
                raise DataError(_status_sentence(where, response.status_code, response.reason_phrase))
            modified = response.headers.get("Last-Modified")
            version = response.headers.get("ETag") or (modified and f"{modified} {_length(response)}")
            return _keep(remote, version, _length(response), response.iter_raw(PIECE))
    except (httpx.InvalidURL, httpx.UnsupportedProtocol, UnicodeError):  # their texts quote the address
        raise DataError(f"{where}: not a valid address. Escape what is special in it (@ is %40).") from None
    except httpx.TooManyRedirects:
        raise DataError(f"{where}: the server redirects in a circle. Check the address.") from None
    except httpx.ConnectError as error:
        raise DataError(
            f"{where}: the server cannot be reached: {one_line(error)}. Check the address and the network."
        ) from None
    except httpx.TransportError as error:
        done = response.num_bytes_downloaded if response else 0
        if isinstance(error, httpx.TimeoutException):
            what = f"the server was silent for {SECONDS:g} s, after {done:,} bytes"
        elif response and _length(response) is not None:
            raise DataError(_broken_off(where, done, _length(response))) from None
        else:
            what = f"the download broke off after {done:,} bytes ({type(error).__name__})"  # its text may hold secrets
        raise DataError(f"{where}: {what}. Run again.") from None


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
    except (BotoCoreError, ClientError, ValueError) as error:  # ValueError: an endpoint that is no URL
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
    if kinds & {"ConnectionError", "HTTPClientError", "IncompleteReadError"}:
        return f"{where}: the store cannot be reached, or broke off. Check AWS_ENDPOINT_URL_S3 and the network."
    return f"{where}: the object could not be read: {one_line(error)}. Check AWS_ENDPOINT_URL_S3 and the bucket."


def _fetch_s3(remote: Remote) -> Path:
    bucket, _, key = remote.address.partition("://")[2].partition("/")
    with _telling_s3(remote.where):
        found = _client().get_object(Bucket=bucket, Key=key)
        with contextlib.closing(found["Body"]) as body:
            return _keep(remote, found.get("ETag"), found["ContentLength"], body.iter_chunks(PIECE))


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
