"""Downloads: from an HTTP server in this process, and from an S3 server over HTTP."""

import gzip
import hashlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tasks.core.addresses import shown
from tasks.core.config import SourceConfig
from tasks.core.errors import DataError
from tasks.core.progress import watch_progress
from tasks.data import downloads
from tasks.data.downloads import fetch, list_remote
from tasks.data.formats import Row
from tasks.data.sources import content_identity, read_rows, source_name
from tests.conftest import ROOT

LINES = b'{"prompt": "q1", "response": "a"}\n{"prompt": "q2", "response": "a"}\n'


class WebServer:
    """Answers GET from `pages` (path to status, headers and body), and notes what was asked for. Some headers are for
    the server: `Wait` seconds, with `Ranges` parts are given, after `Break` bytes the connection ends, after `Hold` it
    waits for `go_on`. `before` is told the number of a request."""

    def __init__(self) -> None:
        self.pages: dict[str, tuple[int, dict[str, str], bytes]] = {}
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.go_on = threading.Event()
        self.before: Callable[[int], None] = lambda number: None
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                server.asked.append((self.path, dict(self.headers)))
                server.before(len(server.asked))
                status, headers, body = server.pages.get(self.path.split("?")[0], (404, {}, b"no"))
                own = ("Wait", "Ranges", "Break", "Hold")
                wait, ranges, end, hold = (headers.get(name) for name in own)
                headers = {name: value for name, value in headers.items() if name not in own}
                if wait:
                    time.sleep(float(wait))
                mark = headers.get("ETag") or headers.get("Last-Modified")
                if self.headers.get("If-Match", mark) != mark:
                    status, body = 412, b"<Error><Code>PreconditionFailed</Code></Error>"
                elif ranges and "Range" in self.headers and self.headers.get("If-Range", mark) == mark:
                    start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
                    status, headers = 206, {**headers, "Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}
                    body = body[start:]
                self.send_response(status)
                length = {} if "Transfer-Encoding" in headers else {"Content-Length": str(len(body))}
                for name, value in {"Connection": "close", **length, **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                body = body[: int(end)] if end else body
                first = int(hold) if hold else len(body)
                self.wfile.write(body[:first])
                if hold:
                    server.go_on.wait(60)
                    self.wfile.write(body[first:])

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def web() -> Iterator[WebServer]:
    server = WebServer()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FORGETLESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(downloads, "FIRST_WAIT", 0.01)
    return tmp_path / "cache" / "downloads"


def questions(path: str, **options: Any) -> list[str]:
    rows = read_rows(SourceConfig(path=path, **options))
    return [row.messages[0]["content"] if isinstance(row, Row) else row.reason for row in rows]


def message_of(path: str) -> str:
    with pytest.raises(DataError) as error:
        content_identity(SourceConfig(path=path))
    return str(error.value)


# --- addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("https://me:secret@host.org/a/b.jsonl?X-Amz-Signature=secret#secret", "https://host.org/a/b.jsonl"),
        ("https://host.org:8443/@scope/b.jsonl?token=secret", "https://host.org:8443/@scope/b.jsonl"),
        ("https://me:se/secret@host.org/b.jsonl", "https://…"),
        ("https://me@x:secret@host.org/b.jsonl", "https://host.org/b.jsonl"),
        ("http://[::1]:80/b.jsonl?secret", "http://[::1]:80/b.jsonl"),
        ("s3://key:secret@bucket/a.jsonl", "s3://bucket/a.jsonl"),
        ("s3://bucket/what?.jsonl", "s3://bucket/what?.jsonl"),
        ("/data/a?b.jsonl", "/data/a?b.jsonl"),
    ],
)
def test_what_is_shown_of_an_address_has_no_secrets(address: str, expected: str) -> None:
    assert shown(address) == expected
    assert "secret" not in source_name(SourceConfig(path=address))


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (
            "ftp://me:secret@host.org/a.jsonl",
            "ftp://host.org/a.jsonl: expected a local file, folder or glob, s3://bucket/key, https://host/file or a "
            "Hub data set id (owner/name), found a ftp:// address. Download it first.",
        ),
        (
            "http://host.org/a.jsonl?token=secret",
            "http://host.org/a.jsonl: expected https://, found http://, which anyone on the way can read and change. "
            "Use https, or download it first.",
        ),
        ("https://host.org/a.tar?token=secret", "https://host.org/a.tar: .tar is not unpacked here: of packed files"),
        ("https://host.org/download?file=secret", "https://host.org/download: expected a file name that ends in .json"),
        (
            "https://me:se/secret@host.org/a.jsonl",
            "https://…: expected a file name that ends in",
        ),
        (
            "https://me@x y:secret/a.jsonl",
            "https://…: expected a file name that ends in",
        ),
        ("https://127.0.0.1:1/a.jsonl?secret", "https://127.0.0.1:1/a.jsonl: the server cannot be reached: "),
        (
            "s3://key:secret@bucket/a.jsonl",
            "s3://bucket/a.jsonl: credentials do not belong in an address. Set AWS_ACCESS_KEY_ID and its "
            "secret instead.",
        ),
        ("s3://bucket/a.rar", "s3://bucket/a.rar: .rar is not unpacked here"),
    ],
)
def test_addresses_that_are_not_fetched(address: str, message: str) -> None:
    assert message_of(address).startswith(message)
    assert "secret" not in message_of(address).replace("and its secret instead", "")


# --- https ------------------------------------------------------------------------------------------------------------


def test_a_file_is_downloaded_once_for_each_etag(web: WebServer, cache: Path) -> None:
    web.pages["/set/a%20b.jsonl"] = (200, {"ETag": '"one"'}, LINES)
    address = f"{web.url.replace('//', '//me:secret@')}/set/a%20b.jsonl?token=secret"
    source = SourceConfig(path=address)
    notes: list[str] = []
    with watch_progress(lambda stage, done, total, note: notes.append(note)):
        assert content_identity(source) == hashlib.sha256(LINES).hexdigest()
        rows = list(read_rows(source))
    assert [(row.source, row.line) for row in rows] == [("a b.jsonl", 1), ("a b.jsonl", 2)]
    assert notes == ["downloading a b.jsonl, 68 bytes", "reading a b.jsonl"]
    assert source_name(source) == "a b.jsonl"
    asked, headers = web.asked[0]
    assert (asked, headers["Authorization"]) == ("/set/a%20b.jsonl?token=secret", "Basic bWU6c2VjcmV0")
    (kept,) = cache.iterdir()
    assert kept.read_bytes() == LINES
    kept.write_bytes(b'{"prompt": "cached", "response": "a"}\n')
    assert questions(address) == ["cached"]
    web.pages["/set/a%20b.jsonl"] = (200, {"ETag": '"two"'}, LINES)
    assert questions(address) == ["q1", "q2"]
    assert len(list(cache.iterdir())) == 2


def test_without_an_etag_the_date_tells_versions_apart(web: WebServer, cache: Path) -> None:
    web.pages["/a.jsonl"] = (200, {"Last-Modified": "Sun, 22 Nov 2026 12:00:00 GMT"}, LINES)
    address = f"{web.url}/a.jsonl"
    assert questions(address) == ["q1", "q2"]
    next(cache.iterdir()).write_bytes(b'{"prompt": "cached", "response": "a"}\n')
    assert questions(address) == ["cached"]
    web.pages["/a.jsonl"] = (200, {}, LINES)  # and without both it is downloaded each time, to one place
    assert questions(address) == ["q1", "q2"] == questions(address)
    assert len(list(cache.iterdir())) == 2


def test_redirects_packed_bodies_and_archives(web: WebServer) -> None:
    packed = gzip.compress(LINES)
    web.pages["/from.jsonl"] = (302, {"Location": "/to?signature=secret"}, b"")
    web.pages["/to"] = (200, {"ETag": "x"}, LINES)
    web.pages["/a.jsonl.gz"] = (200, {"Content-Encoding": "gzip"}, packed)  # a server that means well
    web.pages["/b.jsonl"] = (200, {"Content-Encoding": "gzip"}, packed)
    for name in ("from.jsonl", "a.jsonl.gz", "b.jsonl"):
        assert questions(f"{web.url}/{name}") == ["q1", "q2"], name
    web.pages["/out.jsonl"] = (302, {"Location": "http://host.org/a.jsonl?secret"}, b"")
    web.pages["/circle.jsonl"] = (302, {"Location": "/circle.jsonl"}, b"")
    web.pages["/lost.jsonl"] = (302, {"Location": "https://me:se/secret@:x/"}, b"")
    assert message_of(f"{web.url}/out.jsonl").startswith("http://host.org/a.jsonl: expected https://, found http://,")
    assert message_of(f"{web.url}/circle.jsonl") == (
        f"{web.url}/circle.jsonl: the server redirects in a circle. Check the address."
    )
    assert "secret" not in message_of(f"{web.url}/lost.jsonl")


def test_what_a_server_answers_instead_of_the_file(web: WebServer, cache: Path) -> None:
    statuses = {"gone": 404, "shut": 403, "login": 401, "busy": 503}
    web.pages |= {f"/{name}.jsonl": (status, {}, b"<html>") for name, status in statuses.items()}
    found = {name: message_of(f"{web.url}/{name}.jsonl?token=secret").removeprefix(web.url) for name in statuses}
    expired = "A signed address may have expired: get a new one, or download the file first."
    assert found == {
        "gone": "/gone.jsonl: there is no such file on the server (404 Not Found). Check the address.",
        "shut": f"/shut.jsonl: the server does not let you read it (403 Forbidden). {expired}",
        "login": f"/login.jsonl: the server does not let you read it (401 Unauthorized). {expired}",
        "busy": "/busy.jsonl: expected the file, the server answered 503 Service Unavailable. Try again later, or "
        "download it first.",
    }
    assert not cache.exists()


def test_a_download_that_breaks_off_says_how_far_it_came(
    web: WebServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "SECONDS", 0.3)
    address = f"{web.url}/a.jsonl"
    web.pages["/a.jsonl"] = (200, {"ETag": "x", "Content-Length": "1000"}, LINES)
    assert message_of(address) == (
        f"{address}: the download broke off: expected 1,000 bytes, found {len(LINES)}. Run again."
    )
    web.pages["/a.jsonl"] = (200, {"Transfer-Encoding": "chunked"}, b"5\r\n{}")
    assert message_of(address) == f"{address}: the download broke off after 2 bytes (RemoteProtocolError). Run again."
    web.pages["/a.jsonl"] = (200, {"Wait": "0.6"}, LINES)
    assert message_of(address) == f"{address}: the server was silent for 0.3 s, after 0 bytes. Run again."
    web.pages["/a.jsonl"] = (200, {"ETag": "x"}, LINES)
    assert questions(address) == ["q1", "q2"]


BODY = b"".join(b'{"prompt": "question %d", "response": "answer"}\n' % i for i in range(2000))


def ranges(web: WebServer) -> list[str | None]:
    return [headers.get("Range") for _, headers in web.asked]


def download(web: WebServer, name: str = "a.jsonl") -> bytes:
    (remote,) = list_remote(f"{web.url}/{name}?token=secret")
    return fetch(remote).read_bytes()


def test_what_broke_off_is_gone_on_with(web: WebServer, cache: Path) -> None:
    for name, mark in (("a", {"ETag": '"one"'}), ("b", {"Last-Modified": "Sun, 22 Nov 2026 12:00:00 GMT"})):
        web.asked.clear()
        web.pages[f"/{name}.jsonl"] = (200, {**mark, "Ranges": "yes", "Break": "30000"}, BODY)
        assert download(web, f"{name}.jsonl") == BODY
        assert ranges(web) == [None, None, "bytes=30000-", None, "bytes=60000-", None, "bytes=90000-"]
        assert web.asked[2][1]["If-Range"] == next(iter(mark.values()))
    assert all(re.fullmatch("[0-9a-f]{64}", file.name) for file in cache.iterdir())


def test_a_long_file_is_tried_again_for_as_long_as_more_of_it_comes(web: WebServer) -> None:
    body = BODY * 80
    web.pages["/a.jsonl"] = (200, {"ETag": '"one"', "Ranges": "yes", "Break": str(len(body) // 9)}, body)
    assert len(body) // 9 * 4 > downloads.PIECE
    assert download(web) == body
    assert len([r for r in ranges(web) if r]) == 9


@pytest.mark.parametrize("mark", [{"ETag": '"one"'}, {"ETag": 'W/"one"', "Ranges": "yes"}, {"Ranges": "yes"}])
def test_a_server_without_parts_or_marks_starts_over(web: WebServer, cache: Path, mark: dict[str, str]) -> None:
    web.pages["/a.jsonl"] = (200, {**mark, "Break": "30000"}, BODY)
    assert message_of(f"{web.url}/a.jsonl?token=secret") == (
        f"{web.url}/a.jsonl: the download broke off: expected {len(BODY):,} bytes, found 30,000. Run again."
    )
    web.pages["/a.jsonl"] = (200, mark, BODY)
    assert download(web) == BODY
    assert len(list(cache.iterdir())) == 1


def test_of_a_file_that_changed_no_byte_is_kept(web: WebServer, cache: Path) -> None:
    other = BODY.replace(b"question", b"QUESTION")
    web.pages["/a.jsonl"] = (200, {"ETag": '"one"', "Ranges": "yes", "Break": "20000"}, BODY)
    message_of(f"{web.url}/a.jsonl?token=secret")
    assert [file.stat().st_size for file in cache.iterdir()] == [80_000]

    def change(number: int) -> None:  # between what is asked first and the rest
        if web.asked[number - 1][1].get("Range"):
            web.pages["/a.jsonl"] = (200, {"ETag": '"two"', "Ranges": "yes"}, other)

    web.before = change
    web.asked.clear()
    assert download(web) == other
    assert ranges(web) == [None, "bytes=80000-", None]


def test_a_download_whose_process_was_killed_is_gone_on_with(web: WebServer, cache: Path) -> None:
    web.pages["/a.jsonl"] = (200, {"ETag": '"one"', "Ranges": "yes", "Hold": "50000"}, BODY)
    code = "import sys; from tasks.data.downloads import *; fetch(list_remote(sys.argv[1])[0])"
    process = subprocess.Popen(
        [sys.executable, "-c", code, f"{web.url}/a.jsonl?token=secret"], env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    end = time.monotonic() + 120
    try:
        while not web.asked and time.monotonic() < end:
            time.sleep(0.02)
        web.pages["/a.jsonl"] = (200, {"ETag": '"one"', "Ranges": "yes"}, BODY)
        while not list(cache.glob("part-*")) and time.monotonic() < end:
            time.sleep(0.02)
        (part,) = cache.glob("part-*")
        waiting = threading.Thread(target=lambda: found.append(download(web)))
        found: list[bytes] = []
        waiting.start()
        while len(web.asked) < 2 and time.monotonic() < end:
            time.sleep(0.02)
        assert not found, "the other process is at it"
        while not part.stat().st_size and time.monotonic() < end:
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
        web.go_on.set()
    waiting.join(60)
    assert found == [BODY]
    assert 0 < int(str(ranges(web)[-1]).removeprefix("bytes=").removesuffix("-")) <= 50000
    assert [file.name.startswith("part-") for file in cache.iterdir()] == [False]


def test_of_several_at_once_one_downloads(web: WebServer, cache: Path) -> None:
    web.pages["/a.jsonl"] = (200, {"ETag": '"one"', "Hold": "50000"}, BODY)
    web.before = lambda number: web.go_on.set() if number == 4 else None
    with ThreadPoolExecutor(4) as pool, watch_progress(lambda stage, done, total, note: None):
        found = list(pool.map(lambda _: download(web), range(4)))
    assert found == [BODY] * 4
    assert len(list(cache.iterdir())) == 1


def test_a_busy_server_is_asked_again_and_a_wrong_address_is_not(web: WebServer) -> None:
    for status in (503, 429, 500):
        web.asked.clear()
        web.pages["/a.jsonl"] = (status, {}, b"busy")

        def ready(number: int) -> None:
            if number == 3:
                web.pages["/a.jsonl"] = (200, {"ETag": f'"{web.asked}"'[:9]}, LINES)

        web.before = ready
        assert download(web) == LINES
        assert len(web.asked) == 3
        web.before = lambda number: None
    web.asked.clear()
    message_of(f"{web.url}/gone.jsonl")
    assert len(web.asked) == 1


def test_a_cache_that_cannot_be_written_is_one_sentence(web: WebServer, cache: Path) -> None:
    web.pages["/a.jsonl"] = (200, {"ETag": "x"}, LINES)
    cache.parent.write_text("a file")
    assert message_of(f"{web.url}/a.jsonl") == (
        f"{web.url}/a.jsonl: its 68 bytes could not be kept in the cache {cache}: Not a directory. Free some space, or "
        "name another folder as FORGETLESS_CACHE."
    )


# --- s3 ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "absent"))
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return monkeypatch


@pytest.fixture
def put(s3_endpoint: str, aws: pytest.MonkeyPatch) -> Callable[[str, bytes], None]:
    aws.setenv("AWS_ENDPOINT_URL_S3", s3_endpoint)
    client = downloads._client()
    client.create_bucket(Bucket="data")
    return lambda key, body: client.put_object(Bucket="data", Key=key, Body=body)


def test_objects_prefixes_and_globs(put: Callable[[str, bytes], None], cache: Path) -> None:
    put("set/b.jsonl", LINES)
    put("set/a.jsonl.gz", gzip.compress(LINES[:34]))
    put("set/deep/c#.json", b'[{"prompt": "q3", "response": "a"}]')
    put("set/notes.md", b"not data")
    put("settings.jsonl", b"not in the prefix")
    put("x.json", LINES[34:])
    assert questions("s3://data/set/b.jsonl") == ["q1", "q2"]
    assert content_identity(SourceConfig(path="s3://data/set/b.jsonl")) == hashlib.sha256(LINES).hexdigest()
    for path in ("s3://data/set/", "s3://data/set"):
        rows = list(read_rows(SourceConfig(path=path)))
        assert [(row.source, row.line) for row in rows] == [
            ("a.jsonl.gz", 1),
            ("b.jsonl", 1),
            ("b.jsonl", 2),
            ("deep/c#.json", 1),
        ]
        assert source_name(SourceConfig(path=path)) == "set"
    assert questions("s3://data/set/*.jsonl") == ["q1", "q2"]
    assert questions("s3://data/**/?.json*") == ["q1", "q1", "q2", *questions("s3://data/x.json")]
    assert questions("s3://data/s*/**/*.json") == ["q3"]
    assert len(list(cache.iterdir())) == 4
    before = content_identity(SourceConfig(path="s3://data/set/"))
    put("set/b.jsonl", LINES * 2)
    assert questions("s3://data/set/b.jsonl") == ["q1", "q2"] * 2
    assert content_identity(SourceConfig(path="s3://data/set/")) != before


def test_objects_that_are_not_there(put: Callable[[str, bytes], None]) -> None:
    assert message_of("s3://data/gone.jsonl") == (
        "s3://data/gone.jsonl: there is no such object. Check the key; a prefix ends in a slash."
    )
    assert message_of("s3://nothing/a.jsonl") == (
        "s3://nothing/a.jsonl: there is no such bucket. Check its name, and AWS_ENDPOINT_URL_S3."
    )
    put("other/a.md", b"x")
    kinds = ".json, .jsonl, .ndjson, .csv, .tsv, .parquet, .xlsx, .txt, .zip"
    assert message_of("s3://data/other/") == (
        f"s3://data/other/: expected objects that end in {kinds}, found 1 of other kinds. Check the bucket and the key."
    )
    assert "found none. Check the bucket and the key." in message_of("s3://data/no/*.jsonl")


def test_no_credentials_no_rights_and_a_broken_off_object(web: WebServer, aws: pytest.MonkeyPatch, cache: Path) -> None:
    aws.setenv("AWS_ENDPOINT_URL_S3", web.url)
    web.pages["/data/a.jsonl"] = (403, {}, b"<Error><Code>AccessDenied</Code></Error>")
    assert message_of("s3://data/a.jsonl") == (
        "s3://data/a.jsonl: the store does not let you read it (AccessDenied). Check AWS_ACCESS_KEY_ID and its rights."
    )
    web.pages["/data/a.jsonl"] = (200, {"ETag": '"x"', "Content-Length": "1000"}, LINES)
    assert message_of("s3://data/a.jsonl") == (
        "s3://data/a.jsonl: the store cannot be reached, or broke off. Check AWS_ENDPOINT_URL_S3 and the network."
    )
    web.asked.clear()
    web.pages["/data/b.jsonl"] = (200, {"ETag": '"x"', "Ranges": "yes", "Break": "30000"}, BODY)
    assert fetch(list_remote("s3://data/b.jsonl")[0]).read_bytes() == BODY
    assert ranges(web)[1:] == [None, "bytes=30000-", None, "bytes=60000-", None, "bytes=90000-"]
    assert web.asked[2][1]["If-Match"] == '"x"'
    web.pages["/data/c.jsonl"] = (200, {"ETag": '"x"', "Ranges": "yes", "Break": "20000"}, BODY)
    message_of("s3://data/c.jsonl")
    web.asked.clear()

    def change(number: int) -> None:
        if web.asked[number - 1][1].get("Range"):
            web.pages["/data/c.jsonl"] = (200, {"ETag": '"y"', "Ranges": "yes"}, LINES)

    web.before = change
    assert fetch(list_remote("s3://data/c.jsonl")[0]).read_bytes() == LINES
    assert ranges(web) == [None, "bytes=80000-", None]
    aws.delenv("AWS_ACCESS_KEY_ID")
    aws.delenv("AWS_SECRET_ACCESS_KEY")
    aws.setattr("boto3.DEFAULT_SESSION", None)  # it remembers credentials
    assert message_of("s3://data/a.jsonl") == (
        "s3://data/a.jsonl: no credentials were found. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE."
    )
