"""The shared real data (read in place, never copied) and a Hub in this process, for the data stage's tests."""

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "c0ffee" + "0" * 34


@pytest.fixture
def shared_file() -> Callable[[str], Path]:
    """Return the path of a file of the shared data, or skip the test where it is absent."""
    folder = Path(os.environ.get("FORGETLESS_DATA") or ROOT.parent / "shared" / "data")

    def find(name: str) -> Path:
        if not (folder / name).is_file():
            pytest.skip(f"{folder / name} is absent; FORGETLESS_DATA names the folder of the shared data")
        return folder / name

    return find


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes rows as JSON Lines (for a .json name, as an indented array) and gives the path."""

    def write(rows: list[Any], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".json"):
            text = json.dumps(rows, ensure_ascii=False, indent=2)
        else:
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_text(text, encoding="utf-8")
        return path

    return write


class LocalHub:
    """As much of the Hub's HTTP interface as loading a data set asks for. `repos` maps an id to its files, or to the
    error code that the Hub would answer with."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes] | str] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: Any) -> None:
                pass

            def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def do_GET(self) -> None:
                path = self.path.split("?")[0]
                name = "/".join(path.split("/datasets/")[1].split("/")[:2])
                files = hub.repos.get(name, "RepoNotFound")
                _, _, rest = path.partition(f"/datasets/{name}/")
                kind, _, place = rest.partition("/")
                revision, _, file = place.partition("/")
                if isinstance(files, str):
                    self.answer(403 if files == "GatedRepo" else 404, b"{}", X_Error_Code=files)
                elif revision not in ("main", COMMIT):
                    self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
                elif kind == "resolve" and file not in files:
                    self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
                elif kind == "resolve":
                    etag = f'"{hashlib.sha1(files[file]).hexdigest()}"'
                    self.answer(200, files[file], ETag=etag, X_Repo_Commit=COMMIT)
                elif kind == "tree" and not file:
                    tree = [
                        {"type": "file", "path": p, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                        for p, b in files.items()
                    ]
                    self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
                elif kind == "revision":
                    info = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": p} for p in files]}
                    self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
                else:
                    self.answer(404, b"{}", X_Error_Code="EntryNotFound")

            do_HEAD = do_GET

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    local = LocalHub()
    yield local
    local.close()
