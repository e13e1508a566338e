"""A run's stages as functions in a process that kills itself: python -m tests.flows.killed RECIPE STORE POINT.

STORE is a folder or s3://bucket/prefix. A point is `{"writes": N}`, SIGKILL just before the process's Nth write into it
(in a bucket: request that writes), with `"stage": NAME` its Nth since that began; or `{"seconds": S}`, which falls
anywhere, inside writes of libraries too. Prints as JSON the stage it died in; with `{}` it runs to the end, and prints
what it made, the digests, the number of writes (in all and before each stage) and the seconds since the libraries were
loaded.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks.core.config import Recipe, load_recipe
from tasks.core.records import ArtifactRecord, TokensRef
from tasks.core.settings import read_settings

WRITES = {"os.rename", "os.link", "os.mkdir", "os.remove", "os.truncate", "shutil.rmtree"}


def run_stages(config: Recipe, url: str, note: Callable[[str], None]) -> dict[str, ArtifactRecord]:
    """Return the records of all stages, each by its name; `note` is told which begins."""
    from tasks.data import steps as data
    from tasks.evaluation import steps as evaluation
    from tasks.export import steps as export
    from tasks.models import steps as models
    from tasks.training import steps as training

    found: dict[str, Any] = {}

    def stage(name: str, task: Any, *arguments: Any, **more: str) -> Any:
        note(name)
        found[name] = task.fn(*arguments, store_url=url, **more)
        return found[name]

    items = stage("items", evaluation.list_evaluation_items, config.eval)
    dataset = stage("dataset", data.fetch_dataset, config.data, items)
    stage("validate", data.validate_dataset, config.data, dataset)
    base = stage("base", models.prepare_base, config.model)
    length = config.train.max_tokens
    tokens = stage("tokens", data.tokenise_dataset, config.model, base, config.data, dataset, None, length)
    before = stage("before", evaluation.score_model, config.model, config.eval, base, None, moment="before")
    adapter = stage("train", training.train_adapter, config.model, config.train, base, tokens, None)
    after = stage("after", evaluation.score_model, config.model, config.eval, base, adapter, moment="after")
    stage("compare", evaluation.compare_scores, config.eval, before, after)
    merged = stage("merge", export.merge_adapter, config.model, base, adapter)
    gguf = stage("gguf", export.convert_to_gguf, config.model, config.export, base, adapter, merged, tokens)
    stage("proof", export.prove_gguf, gguf, merged, tokens)
    return found


def count_writes(root: Path, act: Callable[[int], None]) -> None:
    """Call `act` with the number of each write into `root` that Python sees, just before it happens."""
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event == "open":
            flags = arguments[2] if isinstance(arguments[2], int) else 0
            writes = bool(flags & (os.O_WRONLY | os.O_RDWR))
        else:
            writes = event in WRITES
        if writes and any(isinstance(a, str | os.PathLike) and str(a).startswith(str(root)) for a in arguments):
            seen += 1
            act(seen)

    sys.addaudithook(hook)


def count_requests(act: Callable[[int], None]) -> None:
    """Call `act` with the number of each request to a bucket that writes, just before it is sent."""
    from tasks.core.s3 import S3Store

    seen, lock, create = 0, threading.Lock(), S3Store.__init__

    def hook(request: Any, **_: Any) -> None:
        nonlocal seen
        if request.method not in ("GET", "HEAD") and not request.url.endswith(".beat"):  # those come by the clock
            with lock:  # parts are sent by several threads
                seen += 1
                act(seen)

    def create_counted(self: S3Store, *given: Any, **named: Any) -> None:
        create(self, *given, **named)
        self.client.meta.events.register("before-send.s3", hook)

    S3Store.__init__ = create_counted  # type: ignore[method-assign]


def main() -> None:
    recipe, where, point = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    config = load_recipe(recipe, [], None)
    stage, writes, started = "", 0, time.monotonic()
    began: dict[str, int] = {}

    def die() -> None:
        print(json.dumps({"stage": stage}), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    def note(name: str) -> None:
        nonlocal stage
        stage = name
        began[name] = writes

    def count(seen: int) -> None:
        nonlocal writes
        writes = seen
        first = began.get(point["stage"], seen) if "stage" in point else 0
        if seen - first == point.get("writes"):
            die()

    if where.startswith("s3://"):
        count_requests(count)
    else:
        count_writes(Path(where), count)
    if "seconds" in point:
        threading.Timer(point["seconds"], die).start()
    records = run_stages(config, read_settings(where).store_url, note)
    result = {
        "seconds": time.monotonic() - started,
        "writes": writes,
        "began": began,
        "made": {n: f"{r.artifact.kind}/{r.artifact.key}" for n, r in records.items() if not r.artifact.reused},
        "digests": {
            name: record.digest if isinstance(record, TokensRef) else record.artifact.content
            for name, record in records.items()
            if name != "validate"  # Great Expectations' pages hold the time
        },
    }
    print(json.dumps(result), flush=True)
    os._exit(0)  # a timer may be waiting


if __name__ == "__main__":
    main()
