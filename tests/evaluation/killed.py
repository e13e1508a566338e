"""Scoring in a process that kills itself: python -m tests.evaluation.killed ASKED.

ASKED is JSON: `suite` (an EvalConfig), `base` (a folder), `store` (a folder), `gguf` (a file to score, or null for
the base), and `die`, the number of writes of unfinished responses after which SIGKILL comes (null for none).
Prints as JSON how many passes through the model there were, by kind, how many such writes, and the sha256 of the items.
"""

import functools
import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from tasks.core.config import EvalConfig, ModelConfig
from tasks.core.digest import file_sha256
from tasks.core.records import ArtifactRecord, FileRef
from tasks.core.stages import Stage
from tasks.core.store import FileStore, stored
from tasks.evaluation import prefix_lm, responses, steps
from tasks.evaluation.prefix_lm import SharedPrefixLM
from tasks.models.llama import LlamaReader
from tasks.models.steps import prepare_base


def count(counts: Counter[str], owner: Any, name: str) -> None:
    """Count the calls of a function."""
    former = getattr(owner, name)

    @functools.wraps(former)
    def counting(*arguments: Any, **options: Any) -> Any:
        counts[name] += 1
        return former(*arguments, **options)

    setattr(owner, name, counting)


def die_after(writes: int | None, seen: Counter[str]) -> None:
    """Count the files of unfinished responses that are written; let this process be killed after so many."""
    former = FileStore.write_bytes

    def write(store: FileStore, path: str, data: bytes) -> None:
        former(store, path, data)
        seen["writes"] += path.startswith(responses.UNFINISHED)
        if seen["writes"] == writes:
            os.kill(os.getpid(), signal.SIGKILL)

    FileStore.write_bytes = write  # type: ignore[method-assign]


def main() -> None:
    asked = json.loads(sys.argv[1])
    evaluation, model = EvalConfig(**asked["suite"]), ModelConfig(base=asked["base"])
    store = FileStore(Path(asked["store"]))
    counts: Counter[str] = Counter()
    for owner, name in ((SharedPrefixLM, "_score_row"), (prefix_lm, "generate"), (LlamaReader, "read")):
        count(counts, owner, name)
    responses.WRITE_SECONDS = 0
    seen: Counter[str] = Counter()
    die_after(asked["die"], seen)
    base = prepare_base.fn(model, store.url)
    if asked["gguf"]:
        gguf = Path(asked["gguf"])

        def link(folder: Path) -> dict[str, Any]:
            os.link(gguf, folder / gguf.name)
            return {}

        made = stored(store, Stage("gguf", 1, [], {}), ArtifactRecord, link)
        file = FileRef(artifact=made.artifact, name=gguf.name, sha256=file_sha256(gguf))
        sheet = steps.score_file.fn(model, evaluation, base, file, store.url)
    else:
        sheet = steps.score_model.fn(model, evaluation, base, None, store.url, "before")
    items = store.local_folder(sheet.artifact) / "items.jsonl"
    lines = items.read_text().count("\n")
    print(json.dumps({"passes": counts, "items": file_sha256(items), "lines": lines, "writes": seen["writes"]}))


if __name__ == "__main__":
    main()
