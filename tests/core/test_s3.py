"""Files to and from a bucket through faults: whole, or an error; what came through is not transferred twice."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from flows.store import DAY, collect_garbage, verify_artifacts
from tasks.core.errors import StoreError
from tasks.core.records import ModelRef
from tasks.core.s3 import MIB, S3Store
from tasks.core.settings import Settings
from tasks.core.stages import Stage
from tasks.core.store import read_marker, stored
from tests.core.faulty_s3 import FaultyS3

STAGE = Stage("merged", 1, ["abc"], {})
SIZE = 60 * MIB + 5
STORE = "import sys; from tests.core.test_s3 import *; store = S3Store('bucket', 'p', Path(sys.argv[1])); "
UPLOAD = "stored(store, STAGE, ModelRef, make)"
DOWNLOAD = "store.local_folder(stored(store, STAGE, ModelRef, make).artifact)"


def make(folder: Path) -> dict[str, str]:
    (folder / "model.bin").write_bytes(random.Random(1).randbytes(SIZE))
    (folder / "small.txt").write_text("hello")
    (folder / "empty").touch()
    return {"dtype": "float32"}


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    import httpx
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    httpx.post(f"http://{host}:{port}/moto-api/reset")  # all its servers in a process have the same buckets
    found = FaultyS3(f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", found.url)
    monkeypatch.setenv("FORGETLESS_S3_TIMEOUT", "1")
    S3Store("bucket", "", Path()).client.create_bucket(Bucket="bucket")
    yield found
    found.server.shutdown()
    server.stop()


def kill_midway(code: str, cache: Path, reached: Callable[[], bool]) -> None:
    process = subprocess.Popen([sys.executable, "-c", STORE + code, str(cache)], env={**os.environ, "PYTHONPATH": "."})
    deadline = time.monotonic() + 60
    while not reached():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_fifth_of_the_requests_may_fail(proxy: FaultyS3, tmp_path: Path) -> None:
    store = S3Store("bucket", "p", tmp_path)
    proxy.share = 0.2
    folder = store.local_folder(stored(store, STAGE, ModelRef, make).artifact)
    assert (folder / "model.bin").read_bytes() == random.Random(1).randbytes(SIZE)
    assert proxy.injected.total() >= 5


def test_an_answer_that_was_cut_off_does_not_count(proxy: FaultyS3, tmp_path: Path) -> None:
    """Half of `NoSuchKey` is no word at all, and no missing bucket."""
    store, asked = S3Store("bucket", "p", tmp_path), []

    def cut_once(**_: Any) -> None:
        asked.append(1)
        proxy.share = 1.0 if len(asked) == 1 else 0.0

    proxy.faults = ("truncated",)
    store.client.meta.events.register("before-send.s3", cut_once)
    assert store.read_bytes("nothing") is None
    assert (len(asked), proxy.injected["truncated"]) == (2, 1)


def test_wrong_bytes_in_every_download_are_an_error_and_not_kept(proxy: FaultyS3, tmp_path: Path) -> None:
    store = S3Store("bucket", "p", tmp_path)
    ref = stored(store, STAGE, ModelRef, make).artifact
    marker = store.read_bytes
    store.read_bytes = lambda path: _clean(proxy, marker, path)  # type: ignore[method-assign]
    with pytest.raises(StoreError, match="other bytes than were written"):
        store.local_folder(ref)
    assert not (tmp_path / "artifacts").exists()
    proxy.share = 1.0
    with pytest.raises(StoreError, match="other bytes than were written"):
        marker("artifacts/merged/" + STAGE.key + "/_artifact.json")


def _clean(proxy: FaultyS3, read: Callable[[str], bytes | None], path: str) -> bytes | None:
    proxy.share, data = 0.0, read(path)
    proxy.share, proxy.faults = 1.0, ("wrong bytes",)
    return data


def test_a_killed_upload_is_continued(proxy: FaultyS3, tmp_path: Path) -> None:
    proxy.slow = 0.2
    kill_midway(UPLOAD, tmp_path, lambda: proxy.sent > 24 * MIB)
    time.sleep(1)
    before, proxy.sent = proxy.sent, 0
    store = S3Store("bucket", "p", tmp_path)
    ref = stored(store, STAGE, ModelRef, make).artifact
    assert proxy.sent < SIZE - 24 * MIB + 1 * MIB, before
    assert (store.local_folder(ref) / "model.bin").stat().st_size == SIZE


def test_files_that_are_whole_already_are_not_sent_again(proxy: FaultyS3, tmp_path: Path) -> None:
    """Killed after the last file and before the marker: small files and one of several parts."""
    store = S3Store("bucket", "p", tmp_path)
    ref = stored(store, STAGE, ModelRef, make).artifact
    place = f"artifacts/merged/{STAGE.key}"
    store.delete_file(f"{place}/_artifact.json")
    store.write_bytes(f"{store.files_path(ref)}/small.txt", b"hallo")  # of the same size
    store.write_bytes(f"{place}/other-content/model.bin", b"of another writer that was killed")
    proxy.sent = 0
    again = stored(store, STAGE, ModelRef, make).artifact
    assert (again.content, again.reused) == (ref.content, False)
    assert proxy.sent < 10_000, "small.txt, the marker and a lease"
    assert (store.local_folder(again) / "small.txt").read_text() == "hello"
    assert store.list_folders(place) == [ref.content]
    marker = read_marker(store, "merged", STAGE.key)
    assert marker and len(marker["files"]["model.bin"]["md5"]) == 8


def test_an_upload_that_nobody_continues_is_aborted_by_gc(proxy: FaultyS3, tmp_path: Path) -> None:
    proxy.slow = 0.2
    kill_midway(UPLOAD, tmp_path, lambda: proxy.sent > 16 * MIB)
    proxy.slow = 0.0
    store = S3Store("bucket", "p", tmp_path)
    (begun,) = store.list_partial()  # of moto's, the time is always the same one
    settings = Settings(store.url, tmp_path, "")
    gone = collect_garbage(store, settings, lambda _: None, now=store.clock() + DAY + 60)["removed"]
    lost = {begun.path, f"leases/merged/{STAGE.key}.1", f"artifacts/merged/{STAGE.key}"}
    assert lost <= {g["path"] for g in gone}
    assert not list(store.list_partial())


def test_a_created_object_of_wrong_bytes_counts_for_nobody(proxy: FaultyS3, tmp_path: Path) -> None:
    store = S3Store("bucket", "p", tmp_path)
    assert store.create_bytes("a", b"1")
    proxy.faults, proxy.share = ("wrong bytes",), 1.0
    store.client.meta.events.register("before-send.s3.DeleteObject", lambda **_: setattr(proxy, "share", 0.0))
    assert store.create_bytes("b", b"right"), "the second time"
    assert proxy.injected["wrong bytes"] == 1
    assert store.read_bytes("b") == b"right"


@pytest.mark.parametrize(
    ("creates", "sentence"), [("ignored", "ignores If-None-Match"), ("refused", "does not know this request")]
)
def test_a_service_without_conditional_writes_is_refused(
    proxy: FaultyS3, tmp_path: Path, creates: str, sentence: str
) -> None:
    store = S3Store("bucket", "p", tmp_path)
    store.create_bytes("registry/a/1.json", b"first")
    proxy.creates = creates
    for _ in range(2):
        with pytest.raises(StoreError, match=sentence):
            S3Store("bucket", "p", tmp_path).create_bytes("registry/a/1.json", b"second")
    assert store.read_bytes("registry/a/1.json") == b"first", "nothing was overwritten"


def test_what_is_asked_of_a_service_is_what_all_of_them_know(
    proxy: FaultyS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Path style, whatever the host is called, and no checksum but Content-MD5: no trailer, no chunks."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url.replace("127.0.0.1", "localhost"))
    store = S3Store("bucket", "p", tmp_path)
    asked: list[Any] = []
    store.client.meta.events.register("before-send.s3", lambda request, **_: asked.append(request))
    store.local_folder(stored(store, STAGE, ModelRef, make).artifact)
    store.delete("artifacts")
    assert {r.method for r in asked} == {"GET", "HEAD", "POST", "PUT", "DELETE"}
    assert {r.url.split("/")[3].partition("?")[0] for r in asked} == {"bucket"}
    headers = {name.lower() for r in asked for name in r.headers}
    assert not [name for name in headers if "checksum" in name or "trailer" in name or "decoded" in name]
    assert all("Content-MD5" in r.headers for r in asked if r.method == "PUT")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_before_any_writing_request_the_same_call_ends_with_the_same_bytes(
    proxy: FaultyS3, tmp_path: Path
) -> None:
    code = (
        "import sys; from tests.core.test_s3 import *; from tests.flows.killed import count_requests; "
        "count_requests(lambda n: n == int(sys.argv[2]) and os.kill(os.getpid(), signal.SIGKILL)); "
        "print(stored(S3Store('bucket', sys.argv[1], Path(sys.argv[3])), STAGE, ModelRef, make).artifact.content)"
    )

    def run(prefix: str, point: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, prefix, str(point), str(tmp_path)]
        return subprocess.run(
            command, env={**os.environ, "PYTHONPATH": "."}, capture_output=True, text=True, check=False
        )

    contents = set()
    for point in range(2, 18, 2):  # lease, files and parts, the marker and what comes after it
        assert run(f"p{point}", point).returncode == -signal.SIGKILL, point
        store = S3Store("bucket", f"p{point}", tmp_path)
        whole = read_marker(store, "merged", STAGE.key) is not None
        proxy.sent = 0
        done = run(f"p{point}", 0)
        assert done.returncode == 0, done.stderr
        contents.add(done.stdout)
        assert not verify_artifacts(store, None, lambda _: None)["problems"]
        assert whole or not list(store.list_files("leases"))
        assert not list(store.list_partial())
        print(f"| request {point} | {'whole' if whole else 'not there'} | {proxy.sent / MIB:.1f} MiB sent again |")
    assert len(contents) == 1


def test_a_killed_download_is_continued(proxy: FaultyS3, tmp_path: Path) -> None:
    store = S3Store("bucket", "p", tmp_path)
    ref = stored(store, STAGE, ModelRef, make).artifact
    proxy.slow, proxy.fetched = 0.2, 0
    kill_midway(DOWNLOAD, tmp_path, lambda: proxy.fetched > 40 * MIB)
    proxy.fetched = 0
    assert (store.local_folder(ref) / "model.bin").read_bytes() == random.Random(1).randbytes(SIZE)
    assert proxy.fetched < SIZE - 8 * MIB


@pytest.mark.parametrize(
    ("code", "sentence"),
    [("ExpiredToken", "credentials .* still valid"), ("RequestTimeTooSkewed", "clock differs")],
)
def test_what_does_not_pass_is_one_sentence_at_once(proxy: FaultyS3, tmp_path: Path, code: str, sentence: str) -> None:
    proxy.code = code
    started = time.monotonic()
    with pytest.raises(StoreError, match=sentence):
        S3Store("bucket", "p", tmp_path).write_bytes("a", b"1")
    assert time.monotonic() - started < 3


def test_a_host_that_is_not_there(proxy: FaultyS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://no-such-host.invalid")
    with pytest.raises(StoreError, match="no such host"):
        S3Store("bucket", "p", tmp_path).write_bytes("a", b"1")


class Endless(BaseHTTPRequestHandler):
    """An S3 server that keeps no bytes: of what is put the ETags alone, and what is got are zeros."""

    protocol_version = "HTTP/1.1"
    size = 5 << 30
    objects: ClassVar[dict[str, bytes]] = {}

    def log_message(self, *words: Any) -> None: ...

    def reply(self, status: int, data: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content_Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if "If-None-Match" in self.headers and self.path in self.objects:
            return self.reply(412, b"<Error><Code>PreconditionFailed</Code></Error>")
        if "partNumber" not in self.path:
            self.objects[self.path] = data
        self.reply(200, ETag=f'"{hashlib.md5(data).hexdigest()}"')

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.reply(200, b"<R><UploadId>1</UploadId></R>")

    def do_HEAD(self) -> None:
        self.reply(200, Content_Length=str(self.size))

    def do_DELETE(self) -> None:
        self.objects.pop(self.path, None)
        self.reply(204)

    def do_GET(self) -> None:
        if "uploads" in self.path:
            self.reply(200, b"<ListMultipartUploadsResult/>")
        elif "list-type" in self.path:
            self.reply(200, b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>")
        elif "Range" in self.headers:
            start, end = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            self.reply(206, bytes(end - start + 1), Content_Range=f"bytes {start}-{end}/{self.size}")
        elif self.path in self.objects:
            self.reply(200, self.objects[self.path])
        else:
            self.reply(404, b"<Error><Code>NoSuchKey</Code></Error>")


def make_sparse(folder: Path) -> dict[str, str]:
    with (folder / "model.bin").open("wb") as file:
        file.truncate(Endless.size)
    return {"dtype": "float32"}


@pytest.mark.slow
def test_5_gib_take_less_than_256_mib_of_memory(proxy: FaultyS3, tmp_path: Path, monkeypatch: Any) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endless)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("FORGETLESS_S3_TIMEOUT", "60")
    code = "import resource; ref = stored(store, STAGE, ModelRef, make_sparse).artifact; store.local_folder(ref); "
    code += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    command = [sys.executable, "-c", STORE + code, str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": "."}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    server.shutdown()
    assert int(done.stdout) < 256, "at its peak, MiB"
