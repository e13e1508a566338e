"""A Hub in this process: the endpoints that huggingface_hub 2.4 calls to look at, create, fill and delete a model
repository, over HTTP, with what its client checks in their answers. Faults are put in by endpoint."""

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from huggingface_hub.utils import sha

TOKEN = "hf_secretTokenOfTheTests0123456789"
LARGE_BYTES = 1_000_000
"""Files above this size are LFS's where the Hub has LFS."""


@dataclass
class Repository:
    private: bool
    commits: list[str] = field(default_factory=lambda: ["initial commit"])
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b""})

    @property
    def head(self) -> str:
        return hashlib.sha1(repr(self.commits).encode()).hexdigest()


class LocalHub:
    """`mine`: namespaces the token may write to. `faults`: status and headers of the answer by method and a part of the
    path. `lfs`: whether large files go the way of LFS. `loses_answers`: commits come through, and their answers do
    not."""

    def __init__(self, lfs: bool = False) -> None:
        self.repos: dict[str, Repository] = {}
        self.mine = {"me"}
        self.faults: dict[tuple[str, str], tuple[int, dict[str, str]]] = {}
        self.asked: list[tuple[str, str, str | None]] = []
        self.objects: dict[str, bytes] = {}
        self.lfs = lfs
        self.loses_answers = False
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fail(self, method: str, path: str, status: int, **headers: str) -> None:
        """Answer requests whose path ends or begins with `path` with an HTTP status from now on."""
        self.faults[method, path] = (status, {name.replace("_", "-"): value for name, value in headers.items()})

    # --- what it answers: status, headers and a value to be written as JSON

    def answer(self, method: str, path: str, token: str | None, body: bytes) -> tuple[int, dict[str, str], Any]:
        for (wanted, part), (status, headers) in self.faults.items():
            if method == wanted and part in path:
                return status, headers, {"error": headers.get("X-Error-Message", "made to fail")}
        if path.startswith("/lfs/"):
            return self._take_object(path, body)
        if token != f"Bearer {TOKEN}":
            said = "Invalid credentials in Authorization header"
            return 401, {"X-Error-Message": said}, {"error": said}
        if path in ("/api/repos/create", "/api/repos/delete"):
            return self._create(json.loads(body)) if method == "POST" else self._delete(json.loads(body))
        if path == "/api/validate-yaml":
            return 200, {}, {"errors": [], "warnings": []}
        if path.endswith(".git/info/lfs/objects/batch"):
            return 200, {}, self._batch(json.loads(body))
        _, _, _, namespace, name, *rest = path.split("/")
        repo = self.repos.get(f"{namespace}/{name}")
        if repo is None:
            return 404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, {}
        if not rest or rest[0] == "revision":
            return 200, {}, {"id": f"{namespace}/{name}", "private": repo.private, "sha": repo.head}
        if rest[0] == "tree":
            return 200, {}, [{"type": "file", "path": p, "size": 0, "oid": "0" * 40} for p in repo.files]
        if rest[0] == "commits":
            return 200, {}, [self._commit_facts(title) for title in reversed(repo.commits)]
        if namespace not in self.mine:
            return 403, {"X-Error-Message": f"You don't have the rights to write to {namespace}"}, {}
        if rest[0] == "preupload":
            return 200, {}, {"files": [self._mode(repo, file) for file in json.loads(body)["files"]]}
        assert rest[0] == "commit", path
        return self._commit(f"{namespace}/{name}", repo, body)

    def _create(self, asked: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        repo = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] not in self.mine:
            said = f"You don't have the rights to create a model under the namespace {asked['organization']}"
            return 403, {"X-Error-Message": said}, {"error": said}
        if repo in self.repos:
            return 409, {}, {"error": "You already created this model repo", "url": f"{self.url}/{repo}"}
        self.repos[repo] = Repository(private=asked.get("visibility") == "private")
        return 200, {}, {"url": f"{self.url}/{repo}"}

    def _delete(self, asked: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        del self.repos[f"{asked['organization']}/{asked['name']}"]
        return 200, {}, {}

    def _mode(self, repo: Repository, file: dict[str, Any]) -> dict[str, Any]:
        large = self.lfs and file["size"] > LARGE_BYTES
        there = repo.files.get(file["path"])
        oid = None if there is None else hashlib.sha256(there).hexdigest() if large else sha.git_hash(there)
        mode = "lfs" if large else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def _batch(self, asked: dict[str, Any]) -> dict[str, Any]:
        objects = []
        for wanted in asked["objects"]:
            upload = {"upload": {"href": f"{self.url}/lfs/{wanted['oid']}"}}
            objects.append({**wanted, **({} if wanted["oid"] in self.objects else {"actions": upload})})
        return {"transfer": "basic", "objects": objects}

    def _take_object(self, path: str, body: bytes) -> tuple[int, dict[str, str], Any]:
        oid = hashlib.sha256(body).hexdigest()
        if not path.endswith(oid):
            return 400, {}, {}
        self.objects[oid] = body
        return 200, {}, {}

    def _commit(self, name: str, repo: Repository, body: bytes) -> tuple[int, dict[str, str], Any]:
        files = dict(repo.files)
        title = ""
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                title = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            else:
                assert line["key"] == "deletedFile"
                del files[value["path"]]
        repo.files = files
        repo.commits.append(title)
        if self.loses_answers:
            return 400, {}, {"error": "lost"}
        return 200, {}, {"commitUrl": f"{self.url}/{name}/commit/{repo.head}", "commitOid": repo.head}

    def _commit_facts(self, title: str) -> dict[str, Any]:
        return {"id": "0" * 40, "title": title, "message": "", "authors": [], "date": "2026-11-28T00:00:00.000Z"}


def _handler(hub: LocalHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def _serve(self) -> None:
            path, token = unquote(urlsplit(self.path).path), self.headers.get("Authorization")
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.asked.append((self.command, path, token))
            status, headers, value = hub.answer(self.command, path, token, body)
            data = json.dumps(value).encode()
            self.send_response(status)
            for name, text in {"Content-Type": "application/json", **headers}.items():
                self.send_header(name, text)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = _serve

    return Handler
