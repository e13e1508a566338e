"""Digests: what names a stage's result (a key) and what its bytes are (a content digest)."""

import functools
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def canonical_json(value: Any) -> bytes:
    """Return `value` as JSON bytes with sorted keys and no spaces: equal values give equal bytes."""
    return _CANONICAL.encode(value).encode()


def stage_key(kind: str, version: int, inputs: Iterable[str], section: dict[str, Any]) -> str:
    """Return the sha256 that names a stage's result: its kind and version, the content digests of its inputs in
    order, and the settings that matter. Names, retries and library versions are deliberately not in it."""
    return sha256(canonical_json({"kind": kind, "version": version, "inputs": list(inputs), "section": section}))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file, read in pieces, so that size does not matter. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unchanged_sha256(path: Path) -> str:
    """Return the sha256 of a file that is asked for often: read once, as long as its size and time stay. Raises
    OSError."""
    facts = path.stat()
    return _known_sha256(path, facts.st_size, facts.st_mtime_ns)


@functools.cache
def _known_sha256(path: Path, size_bytes: int, changed_ns: int) -> str:
    return file_sha256(path)


def content_digest(files: dict[str, str]) -> str:
    """Return one sha256 for a set of files given as {relative path: sha256}."""
    return sha256(canonical_json(sorted(files.items())))
