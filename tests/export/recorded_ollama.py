"""An Ollama in the test process that answers from recordings of a real one (0.32.15) and from nothing else.

It keeps a little state (which blobs were uploaded, which names hold which recorded model) so that an answer changes as
the recordings say it does; every body it sends was recorded, with names and digests put in place. A request that no
recording covers gets HTTP 501, so that a test fails loudly. The liberties, all from pairs in the recordings:
- A success recorded only unstreamed (034) is sent to a streaming client as the one last line it is.
- A model's recorded answer does for any `options` with temperature 0.
- A create like a recorded one but for system, license and parameters goes like it, with a digest made up of both. Its
  system prompt then comes before conversations that have none (086c).
- So does one with another Go template than the recorded one (087a). The file's recording says whether it is obeyed:
  where the GGUF's own supports tools it is not.
- Where Ollama renders by a Go template that a recording shows, other conversations than the recorded ones are rendered
  by it too (go_template.py).
"""

import hashlib
import json
import os
import socket
import struct
import threading
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import pytest

from tests.export.go_template import render_go

ROOT = Path(__file__).resolve().parents[2]
CREATE_KEYS = ("template", "system", "parameters", "license", "messages", "quantize", "adapters", "from")
SETTINGS = ("system", "license", "parameters")


@dataclass(frozen=True)
class Exchange:
    name: str
    method: str
    path: str
    request: Any
    status: int
    headers: dict[str, str]
    kind: str
    body: Any


@dataclass(frozen=True)
class Pin:
    """The next request of `method` to a path starting with `path` gets this exchange's answer. `lines`: only so many of
    its NDJSON lines. `cut`: the connection dies after them, or before any answer that is not NDJSON. `carried_out`: the
    request takes effect all the same. `replace`: text to exchange in the recorded body. `after`: so many such requests
    are answered as usual first."""

    method: str
    path: str
    exchange: str
    lines: int | None = None
    cut: bool = False
    carried_out: bool = False
    replace: dict[str, str] = field(default_factory=dict)
    after: int = 0


def recordings_folder() -> Path:
    return Path(os.environ.get("FORGETLESS_RECORDINGS") or ROOT.parent / "shared" / "ollama-recordings")


def read_recordings() -> list[dict[str, Any]]:
    """Return every recorded exchange, HTTP and CLI; skips the test where they are absent."""
    file = recordings_folder() / "exchanges.jsonl"
    if not file.is_file():
        pytest.skip(f"no Ollama recordings at {file}: set FORGETLESS_RECORDINGS to their folder")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def full_name(name: str) -> str:
    return (name if ":" in name.rpartition("/")[2] else f"{name}:latest").lower()


class RecordedOllama:
    """A context manager: `url` is where it listens, `requests` is what it was asked (method, path, JSON body)."""

    def __init__(self) -> None:
        self.exchanges = {
            e["name"]: Exchange(
                e["name"],
                e["request"]["method"],
                e["request"]["path"],
                e["request"]["body"],
                e["response"]["status"],
                e["response"]["headers"],
                e["response"]["kind"],
                e["response"]["body"],
            )
            for e in read_recordings()
            if "request" in e
        }
        self.tags = {
            full_name(model["name"]): model
            for e in reversed(self.exchanges.values())  # of a name made anew, the first recorded digest
            if e.path == "/api/tags" and e.status == 200
            for model in e.body["models"]
        }
        self.requests: list[tuple[str, str, Any]] = []
        self.blobs: set[str] = set()
        self.models: dict[str, str] = {}
        """Full name to the full name of the recorded model it is a copy of."""
        self.settings: dict[str, dict[str, Any]] = {}
        """Of a name whose create was not recorded: in what it differs from the recorded one."""
        self.pushes: list[tuple[int, list[dict[str, Any]]]] = []
        """Status and lines for the next pushes, from the test: no push was recorded."""
        self.stand_ins: dict[str, str] = {}
        self.pins: list[Pin] = []
        self.drop_upload_after_bytes: int | None = None
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def stand_in(self, gguf: Path, exchange: str) -> str:
        """Let the bytes of `gguf` stand for the file that a recorded create was given; return their sha256."""
        sha256 = hashlib.sha256(gguf.read_bytes()).hexdigest()
        (recorded,) = self.exchanges[exchange].request["files"].values()
        self.stand_ins[f"sha256:{sha256}"] = recorded
        return sha256

    def pin(self, method: str, path: str, exchange: str, **how: Any) -> None:
        self.pins.append(Pin(method, path, exchange, **how))

    def asked(self, method: str, path: str) -> list[Any]:
        """Return the bodies of the requests of that method to paths that start with `path`."""
        return [body for m, p, body in self.requests if m == method and p.startswith(path)]

    def digest(self, recorded_name: str) -> str:
        return str(self.tags[full_name(recorded_name)]["digest"])

    def take_pin(self, method: str, path: str) -> Pin | None:
        with self.lock:
            for at, pin in enumerate(self.pins):
                if pin.method == method and path.startswith(pin.path):
                    if pin.after == 0:
                        return self.pins.pop(at)
                    self.pins[at] = replace(pin, after=pin.after - 1)
                    return None
        return None

    def answer(self, method: str, path: str, body: Any) -> tuple[Exchange, Any] | None:
        """Return the recorded exchange for a request and its body with names put in place; None if none covers it."""
        match method, path:
            case "GET", "/api/version":
                return self._recorded("003-version")
            case "GET", "/api/tags":
                entries = [
                    {**self.tags[kept], "name": name, "model": name, "digest": self._digest(name)}
                    for name, kept in self.models.items()
                ]
                exchange = self.exchanges["037-tags" if entries else "005-tags-empty"]
                return exchange, {"models": entries}
            case "POST", "/api/create":
                return self._create(body)
            case "GET", "/api/ps":
                return self._recorded("006-ps-empty")
            case "POST", "/api/chat":
                return self._chat(body)
            case "POST", "/api/copy":
                kept = self.models.get(full_name(body["source"]))
                if kept is None:
                    return self._recorded("108-copy-missing", body["source"])
                self._keep(body["destination"], kept, self.settings.get(full_name(body["source"]), {}))
                return self._recorded("107-copy")
            case "POST", "/api/push" if self.pushes:
                status, lines = self.pushes.pop(0)
                kind = "ndjson" if status == 200 else "json"
                exchange = Exchange(
                    "push", method, path, body, status, {"Content-Type": "application/json"}, kind, lines
                )
                return exchange, lines if status == 200 else lines[0]
            case "DELETE", "/api/delete":
                if self.models.pop(full_name(body["model"]), None) is None:
                    return self._recorded("113-delete-missing", body["model"])
                return self._recorded("111-delete")
        return None

    def _recorded(self, exchange: str, model: str = "") -> tuple[Exchange, Any]:
        found = self.exchanges[exchange]
        text = json.dumps(found.body)
        return found, json.loads(text.replace("no-such-model", model) if model else text)

    def _keep(self, name: str, kept: str, settings: dict[str, Any]) -> None:
        self.models[full_name(name)] = full_name(kept)
        self.settings[full_name(name)] = settings

    def _digest(self, name: str) -> str:
        recorded = str(self.tags[self.models[name]]["digest"])
        settings = self.settings.get(name, {})
        return hashlib.sha256(json.dumps([recorded, settings]).encode()).hexdigest() if settings else recorded

    def _create(self, body: dict[str, Any]) -> tuple[Exchange, Any] | None:
        files = sorted(body["files"].values())
        if not all(name.endswith(".gguf") and "/" not in name for name in body["files"]) or set(files) - self.blobs:
            return None
        wanted = {k: body[k] for k in CREATE_KEYS if k in body}
        recorded_files = sorted(self.stand_ins.get(f, f) for f in files)
        creates = [
            (e, {k: e.request[k] for k in CREATE_KEYS if k in e.request})
            for e in self.exchanges.values()
            if e.path == "/api/create"
            and isinstance(e.request, dict)
            and all(name.endswith(".gguf") for name in e.request.get("files", {}))
            and sorted(e.request.get("files", {}).values()) == recorded_files
        ]
        # a streamed recording first, and of names only the valid ones: 050 asked for the bad ones
        creates = [c for c in creates if c[0].kind == "ndjson"] + [
            c for c in creates if c[0].body == {"status": "success"}
        ]
        plain = {k: v for k, v in wanted.items() if k not in SETTINGS}
        found = (
            [(e, {}) for e, asked in creates if asked == wanted]
            or [(e, wanted) for e, asked in creates if asked == plain]
            or [(e, wanted) for e, asked in creates if "template" in wanted and e.name.startswith("087a")]
        )
        if body.get("stream") is False or not found:
            return None
        exchange, settings = found[0]
        lines = exchange.body if isinstance(exchange.body, list) else [exchange.body]
        if lines[-1] == {"status": "success"}:
            self._keep(body["model"], exchange.request["model"], settings)
        return exchange, lines

    def _chat(self, body: dict[str, Any]) -> tuple[Exchange, Any] | None:
        name = full_name(body["model"])
        kept = self.models.get(name)
        if kept is None:
            return self._recorded("103-chat-missing-model", body["model"])
        messages, own = body["messages"], self.settings.get(name, {}).get("system")
        if own and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": own}, *messages]
        shown = bool(body.get("_debug_render_only"))
        template = self._go_template(name, kept)
        for e in self.exchanges.values():
            if (
                e.path == "/api/chat"
                and full_name(e.request["model"]) == kept
                and e.request["messages"] == messages
                and e.request.get("stream") is body.get("stream")
                and bool(e.request.get("_debug_render_only")) == shown
                and "go-template-env" not in e.name
                and (shown or body["options"]["temperature"] == 0)
                and not (shown and template and "template" in self.settings.get(name, {}))
            ):
                named = {"model": body["model"]}
                return e, [{**line, **named} for line in e.body] if isinstance(e.body, list) else {**e.body, **named}
        if shown and template:
            like = self.exchanges["131-chat-nosystem-smol"]
            rendered = {"rendered_template": render_go(template, messages)}
            return like, {**like.body, "model": body["model"], "_debug_info": rendered}
        return None

    def _go_template(self, name: str, kept: str) -> str | None:
        """Return the Go template by which a model's prompts are rendered; None where that was not recorded."""
        for e in self.exchanges.values():
            if e.path == "/api/show" and e.status == 200 and full_name(e.request["model"]) == kept:
                template = self.settings.get(name, {}).get("template") or e.body.get("template", "")
                return template if ".Messages" in template and "tools" not in e.body["capabilities"] else None
        return None


def _handler(ollama: RecordedOllama) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # head and body in one segment: unbuffered, each answer waits 40 ms for a delayed ACK

        def do_GET(self) -> None:
            self._serve()

        def do_HEAD(self) -> None:
            self._serve()

        def do_POST(self) -> None:
            self._serve()

        def do_DELETE(self) -> None:
            self._serve()

        def log_message(self, *_: Any) -> None:
            pass

        def _serve(self) -> None:
            size_bytes = int(self.headers.get("Content-Length") or 0)
            if self.path.startswith("/api/blobs/"):
                self._serve_blob(size_bytes)
                return
            sent = self.rfile.read(size_bytes)
            body = json.loads(sent) if sent else None
            ollama.requests.append((self.command, self.path, body))
            if not self._serve_pin(body):
                with ollama.lock:
                    answer = ollama.answer(self.command, self.path, body)
                if answer is None:
                    self._send(501, "application/json", [_json({"error": f"not recorded: {self.path} {body}"})])
                else:
                    self._send_exchange(*answer)

        def _serve_blob(self, size_bytes: int) -> None:
            ollama.requests.append((self.command, self.path, None))
            if self._serve_pin():
                return
            digest = self.path.removeprefix("/api/blobs/")
            if self.command == "HEAD":
                self._send_named("020-blob-head-existing" if digest in ollama.blobs else "010-blob-head-missing")
            elif digest in ollama.blobs:
                self.close_connection = True  # as recorded in 160: the body is left unread
                self._send_named("021-blob-post-existing")
            else:
                sha256 = hashlib.sha256()
                left = size_bytes
                while left > 0 and (piece := self.rfile.read(min(left, 1 << 20))):
                    sha256.update(piece)
                    left -= len(piece)
                    dropped = ollama.drop_upload_after_bytes
                    if dropped is not None and size_bytes - left >= dropped:
                        self._die()
                        return
                if left:
                    self.close_connection = True
                elif f"sha256:{sha256.hexdigest()}" != digest:
                    wrong = ollama.exchanges["013-blob-post-wrong-digest"]
                    recorded = wrong.path.removeprefix("/api/blobs/sha256:")
                    got = wrong.body["error"].rpartition("sha256:")[2].rstrip('"')
                    text = wrong.body["error"].replace(got, sha256.hexdigest())
                    self._send_exchange(wrong, {"error": text.replace(f"sha256:{recorded}", digest)})
                else:
                    ollama.blobs.add(digest)
                    self._send_named("019-blob-post-create")

        def _serve_pin(self, sent: Any = None) -> bool:
            pin = ollama.take_pin(self.command, self.path)
            if pin is None:
                return False
            if pin.carried_out:
                with ollama.lock:
                    ollama.answer(self.command, self.path, sent)
            if pin.cut and pin.lines is None:
                self._die()
                return True
            exchange = ollama.exchanges[pin.exchange]
            text = json.dumps(exchange.body)
            for old, new in pin.replace.items():
                if old not in text:
                    raise AssertionError(f"{pin.exchange} does not hold {old!r}")
                text = text.replace(old, new)
            body = json.loads(text)
            self._send_exchange(exchange, body[: pin.lines] if pin.lines is not None else body, cut=pin.cut)
            return True

        def _send_named(self, name: str) -> None:
            self._send_exchange(ollama.exchanges[name], ollama.exchanges[name].body)

        def _send_exchange(self, exchange: Exchange, body: Any, cut: bool = False) -> None:
            if isinstance(body, list):
                self._send(exchange.status, "application/x-ndjson", [_json(line) + b"\n" for line in body], True, cut)
            else:
                data = body.encode() if isinstance(body, str) else _json(body)
                self._send(exchange.status, exchange.headers.get("Content-Type", ""), [data])

        def _send(
            self, status: int, content_type: str, parts: list[bytes], chunked: bool = False, cut: bool = False
        ) -> None:
            self.send_response(status)
            if content_type:
                self.send_header("Content-Type", content_type)
            if self.close_connection:
                self.send_header("Connection", "close")
            if chunked:
                self.send_header("Transfer-Encoding", "chunked")
                parts = [b"%x\r\n%s\r\n" % (len(part), part) for part in parts] + ([] if cut else [b"0\r\n\r\n"])
            else:
                self.send_header("Content-Length", str(sum(map(len, parts))))
            self.end_headers()
            if self.command != "HEAD":
                for part in parts:
                    self.wfile.write(part)
                self.wfile.flush()
            if cut:
                self.close_connection = True

        def _die(self) -> None:
            """Reset the connection, as a server does whose process ends."""
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True

    return Handler


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()
