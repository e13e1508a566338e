"""A Hub in this process to read from: models, data sets and metrics with branches and commits, over HTTP, as the
libraries huggingface_hub 2.4, datasets and evaluate ask for them. export/hub_server.py is the one to write to."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TYPES = ("models", "datasets", "spaces")


class LocalHub:
    """`repos` maps TYPE/OWNER/NAME to its files on the branch main, or to the error code that the Hub would answer
    with; files that are changed are another commit, and earlier ones stay. `files` are at other paths of the server.
    `token`: what is asked with another is refused. `faults`: statuses that the next requests for a path that holds a
    text get. `asked`: method and path of every request."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes] | str] = {}
        self.files: dict[str, bytes] = {}
        self.token: str | None = None
        self.faults: dict[str, list[int]] = {}
        self.asked: list[str] = []
        self._commits: dict[tuple[str, str], dict[str, bytes]] = {}
        self._start(0)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def _start(self, port: int) -> None:
        self.server = ThreadingHTTPServer(("127.0.0.1", port), _handler(self))
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Within, nothing answers at the Hub's address."""
        port = self.server.server_port
        self.close()
        try:
            yield
        finally:
            self._start(port)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def head(self, repo: str) -> str:
        """Return the commit that main is at."""
        files = self.repos[repo]
        assert isinstance(files, dict)
        commit = hashlib.sha1(repr((repo, sorted(files.items()))).encode()).hexdigest()
        self._commits[repo, commit] = dict(files)
        return commit

    def answer(self, path: str, query: str, token: str | None) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body."""
        for part, statuses in self.faults.items():
            if part in path and statuses:
                return statuses.pop(0), {}, b"{}"
        if path == "/":
            return 200, {}, b""
        if path in self.files:
            return 200, {"ETag": _etag(self.files[path])}, self.files[path]
        if token and token != f"Bearer {self.token}":
            return 401, {"X-Error-Message": "Invalid credentials in Authorization header"}, b"{}"
        parts = path.removeprefix("/api").strip("/").split("/")
        kind = parts.pop(0) if parts[0] in TYPES else "models"
        repo, action, revision = f"{kind}/{'/'.join(parts[:2])}", "".join(parts[2:3]), "".join(parts[3:4]) or "main"
        file, files = "/".join(parts[4:]), self.repos.get(repo, "RepoNotFound")
        if isinstance(files, str):
            return 403 if files == "GatedRepo" else 404, {"X-Error-Code": files}, b"{}"
        head = self.head(repo)
        commit = head if revision == "main" else revision
        if (repo, commit) not in self._commits:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        files = self._commits[repo, commit]
        if action in ("", "revision"):
            listed: Any = {"id": "/".join(parts[:2]), "sha": commit, "siblings": [{"rfilename": p} for p in files]}
        elif action == "tree" and (listed := _tree(files, f"{file}/".lstrip("/"), "recursive=true" in query.lower())):
            pass
        elif action == "resolve" and file in files:
            return 200, {"ETag": _etag(files[file]), "X-Repo-Commit": commit}, files[file]
        else:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b"{}"
        return 200, {"Content-Type": "application/json"}, json.dumps(listed).encode()


def _tree(files: dict[str, bytes], folder: str, recursive: bool) -> list[dict[str, Any]]:
    """Return what a repository has in a folder (its path ends in a slash), or at any depth below it."""
    found: dict[str, dict[str, Any]] = {}
    for path, data in files.items():
        if path.startswith(folder):
            parts = path.removeprefix(folder).split("/")
            for depth in range(1, len(parts)):
                place = folder + "/".join(parts[:depth])
                found[place] = {"type": "directory", "path": place, "size": 0, "oid": "0" * 40}
            found[path] = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    return [entry for place, entry in found.items() if recursive or "/" not in place.removeprefix(folder)]


def _etag(data: bytes) -> str:
    return f'"{hashlib.sha1(data).hexdigest()}"'


def _handler(hub: LocalHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            path = unquote(parts.path)
            hub.asked.append(f"{self.command} {path}")
            status, headers, body = hub.answer(path, parts.query, self.headers.get("Authorization"))
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_GET

    return Handler
