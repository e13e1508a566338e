"""A proxy in front of an S3 server that fails as networks and services do: seeded, and counting what came through."""

import http.client
import random
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlparse

FAULTS = ("500", "503", "reset", "hang", "truncated", "wrong bytes")


class FaultyS3:
    """`share` of the requests gets one of `faults`; `slow` seconds go by before each. `sent` and `fetched` are the
    bytes of bodies that came through; `code` answers all with 403 and this."""

    def __init__(self, endpoint: str, share: float = 0.0, faults: tuple[str, ...] = FAULTS, hang: float = 2.0) -> None:
        self.share, self.faults, self.hang, self.slow = share, faults, hang, 0.0
        self.code = ""
        self.sent = self.fetched = self.failed = 0
        self.lock, self.random = threading.Lock(), random.Random(42)
        target, proxy = urlparse(endpoint).netloc, self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *words: Any) -> None: ...

            def answer(self) -> None:
                proxy.answer(self, target)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, asked: BaseHTTPRequestHandler, target: str) -> None:
        body = asked.rfile.read(int(asked.headers.get("Content-Length", 0)))
        time.sleep(self.slow)
        with self.lock:
            fault = self.random.choice(self.faults) if self.random.random() < self.share else ""
            self.failed += bool(fault)
        if self.code:
            return refuse(asked, 403, self.code)
        if fault in ("500", "503"):
            return refuse(asked, int(fault), "SlowDown" if fault == "503" else "InternalError")
        if fault in ("reset", "hang"):
            time.sleep(self.hang if fault == "hang" else 0)
            asked.close_connection = True
            return None
        if fault == "wrong bytes" and asked.command == "PUT":
            body = flip(body)
        server = http.client.HTTPConnection(target, timeout=60)
        headers = {k: v for k, v in asked.headers.items() if k.lower() not in ("host", "expect")}
        server.request(asked.command, asked.path, body, {**headers, "Host": asked.headers["Host"]})
        found = server.getresponse()
        data = found.read()
        server.close()
        size = int(found.headers.get("Content-Length", len(data))) if asked.command == "HEAD" else len(data)
        if fault == "wrong bytes" and asked.command == "GET" and "list" not in asked.path and "?" not in asked.path:
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
        return None


def flip(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1]) if data else data


def refuse(asked: BaseHTTPRequestHandler, status: int, code: str) -> None:
    data = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
    asked.send_response(status)
    asked.send_header("Content-Length", str(len(data)))
    asked.end_headers()
    asked.wfile.write(b"" if asked.command == "HEAD" else data)
