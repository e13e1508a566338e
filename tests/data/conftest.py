"""The shared real data (read in place, never copied) and a Hub in this process, for the data stage's tests."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.local_hub import LocalHub

ROOT = Path(__file__).resolve().parents[2]


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


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    local = LocalHub()
    yield local
    local.close()
