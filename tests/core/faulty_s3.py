"""A proxy in front of an S3 server that fails as networks and services do: seeded, and counting what came through."""

import http.client
import random
import threading
import time
from collections import Counter
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlparse

FAULTS = ("500", "503", "reset", "hang", "truncated", "wrong bytes")


class FaultyS3:
    """`share` of the requests gets one of `faults`; `slow` seconds go by before each. `sent` and `fetched` are the
    bytes of bodies that came through; `code` answers all with 403 and this. `creates` is what becomes of If-None-Match:
    "ignored" or "refused", where it is not empty. As S3's, its clock tells a request of another time.

    `injected` counts the faults, `mended` those whose very request came through later."""

    def __init__(self, endpoint: str, share: float = 0.0, faults: tuple[str, ...] = FAULTS, hang: float = 2.0) -> None:
        self.share, self.faults, self.hang, self.slow = share, faults, hang, 0.0
        self.code = self.creates = ""
        self.is_gone = False
        self.sent = self.fetched = 0
        self.injected: Counter[str] = Counter()
        self.mended: Counter[str] = Counter()
        self.waiting: dict[tuple[str, ...], list[str]] = {}
        self.lock, self.random = threading.Lock(), random.Random(42)
        self.target, proxy = urlparse(endpoint).netloc, self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *words: Any) -> None: ...

            def answer(self) -> None:
                proxy.answer(self)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self.is_gone = True
        self.server.shutdown()
        self.server.server_close()

    def answer(self, asked: BaseHTTPRequestHandler) -> None:
        body = asked.rfile.read(int(asked.headers.get("Content-Length", 0)))
        if self.is_gone:  # connections that were open before outlive the server
            asked.close_connection = True
            return None
        time.sleep(self.slow)
        is_object = "?" not in asked.path and "list" not in asked.path
        request = (asked.command, asked.path, asked.headers.get("Range", ""))
        with self.lock:
            fault = self.random.choice(self.faults) if self.random.random() < self.share else ""
            if fault == "wrong bytes" and not (body or (is_object and asked.command == "GET")):
                fault = "reset"  # there are none
            self.injected[fault] += bool(fault)
            if fault:
                self.waiting.setdefault(request, []).append(fault)
        if self.code:
            return refuse(asked, 403, self.code)
        if "X-Amz-Date" in asked.headers:
            sent = datetime.strptime(asked.headers["X-Amz-Date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
            if abs((datetime.now(UTC) - sent).total_seconds()) > 900:
                return refuse(asked, 403, "RequestTimeTooSkewed")
        if self.creates == "refused" and "If-None-Match" in asked.headers:
            return refuse(asked, 501, "NotImplemented")
        if fault in ("500", "503"):
            return refuse(asked, int(fault), "SlowDown" if fault == "503" else "InternalError")
        if fault in ("reset", "hang"):
            time.sleep(self.hang if fault == "hang" else 0)
            asked.close_connection = True
            return None
        if fault == "wrong bytes":
            body = flip(body)
        server = http.client.HTTPConnection(self.target, timeout=60)
        headers = {k: v for k, v in asked.headers.items() if k.lower() not in ("host", "expect")}
        if self.creates:
            headers.pop("If-None-Match", None)
        server.request(asked.command, asked.path, body, {**headers, "Host": asked.headers["Host"]})
        found = server.getresponse()
        data = found.read()
        server.close()
        size = int(found.headers.get("Content-Length", len(data))) if asked.command == "HEAD" else len(data)
        if fault == "wrong bytes" and asked.command == "GET":
            data = flip(data)
        asked.send_response(found.status)
        for name, value in found.headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                asked.send_header(name, value)
        asked.send_header("Content-Length", str(size))
        asked.end_headers()
        if fault == "truncated":
            data, asked.close_connection = data[: len(data) // 2], True
        if asked.command != "HEAD":
            asked.wfile.write(data)
        with self.lock:
            self.sent += len(body) * (asked.command == "PUT")
            self.fetched += len(data) * (asked.command == "GET")
            if not fault:
                self.mended.update(self.waiting.pop(request, []))
        return None


def flip(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1]) if data else data


def refuse(asked: BaseHTTPRequestHandler, status: int, code: str) -> None:
    data = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
    asked.send_response(status)
    asked.send_header("Content-Length", str(len(data)))
    asked.end_headers()
    asked.wfile.write(b"" if asked.command == "HEAD" else data)
