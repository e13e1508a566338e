"""What a model answered to lm-eval's requests, kept in the store: a new task, or new items of one, are scored alone."""

import json
import math
from collections.abc import Callable
from typing import Any

from tasks.core.digest import canonical_json, sha256
from tasks.core.store import Store

KINDS = ("loglikelihood", "loglikelihood_rolling", "generate_until")
FILE = "responses.json"


class Responses:
    """Of one model, by a request's digest: [nats, greedy], nats, or [text, whether it was ended by its length]."""

    def __init__(self, store: Store, model: str) -> None:
        self.store, self.place = store, f"responses/{model}"
        self.known: dict[str, Any] = {}
        self.new: dict[str, Any] = {}
        for name in store.list_folders(self.place):
            self.known |= _read(store.read_bytes(f"{self.place}/{name}/{FILE}"))

    def attach(self, backend: Any) -> None:
        """Let a model of lm-eval's answer what is known without computing."""
        for kind in KINDS:
            setattr(backend, kind, self._answering(kind, getattr(backend, kind), backend))

    def write(self, name: str) -> None:
        """Keep what was answered since the beginning, under a name of its own: two writers do not meet."""
        if self.new:
            data = {"responses": self.new, "sha256": sha256(canonical_json(self.new))}
            self.store.write_bytes(f"{self.place}/{name}/{FILE}", canonical_json(data))

    def _answering(self, kind: str, work: Callable[..., list[Any]], backend: Any) -> Callable[..., list[Any]]:
        def answer(requests: list[Any], **options: Any) -> list[Any]:
            keys = [sha256(canonical_json([kind, *request.args])) for request in requests]
            missing = {key: request for key, request in zip(keys, requests, strict=True) if key not in self.known}
            found = work(list(missing.values()), **options) if missing else []
            unfinished = getattr(backend, "unfinished", None)
            for (key, request), result in zip(missing.items(), found, strict=True):
                if kind == "generate_until":
                    ended = None if unfinished is None else request.args[0] in unfinished
                    self.known[key] = [result, ended]
                else:
                    self.known[key] = list(result) if kind == "loglikelihood" else result
                if kind == "generate_until" or math.isfinite(result[0] if kind == "loglikelihood" else result):
                    self.new[key] = self.known[key]
            answers = [self.known[key] for key in keys]
            if kind == "generate_until":
                if unfinished is not None:
                    unfinished |= {r.args[0] for r, (_, ended) in zip(requests, answers, strict=True) if ended}
                return [text for text, _ in answers]
            return [tuple(pair) for pair in answers] if kind == "loglikelihood" else answers

        return answer


def _read(data: bytes | None) -> dict[str, Any]:
    """Return the responses of a file; none of one that is damaged, which costs only the time to score them again."""
    try:
        found = json.loads(data or b"{}")
        responses: dict[str, Any] = found.get("responses", {})
        return responses if sha256(canonical_json(responses)) == found.get("sha256") else {}
    except ValueError:
        return {}
