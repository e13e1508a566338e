"""What a model answered to lm-eval's requests, kept in the store: a new task, or new items of one, are scored alone.

While a list of requests is worked on, what is answered of it is written every so often too. A process that was killed
is followed by one that is given the same list, makes the same batches of it, and leaves out those that are answered.
"""

import contextlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tasks.core.digest import canonical_json, sha256
from tasks.core.errors import StoreError
from tasks.core.store import Store

KINDS = ("loglikelihood", "loglikelihood_rolling", "generate_until")
FILE = "responses.json"
UNFINISHED = "unfinished"
WRITE_SECONDS = 30.0


@dataclass(frozen=True)
class Begun:
    """A list of requests that a model is at. `known`: what an earlier process answered of it, as JSON gives it back, by
    numbers that the model gives to requests or batches; `keep` is told what is answered now."""

    known: dict[int, Any] = field(default_factory=dict)
    keep: Callable[[dict[int, Any]], None] = lambda _: None


class Responses:
    """Of one model, by a request's digest: [nats, greedy], nats, or [text, whether it was ended by its length]."""

    def __init__(self, store: Store, model: str) -> None:
        self.store, self.place = store, f"responses/{model}"
        self.known: dict[str, Any] = {}
        self.new: dict[str, Any] = {}
        self._unwritten: dict[str, dict[int, Any]] = {}
        """By the place of the list in the store."""
        self._places: set[str] = set()
        self._written = time.monotonic()
        for name in store.list_folders(self.place):
            self.known |= _read(store.read_bytes(f"{self.place}/{name}/{FILE}"))

    def attach(self, backend: Any) -> None:
        """Let a model of lm-eval's answer what is known without computing."""
        for kind in KINDS:
            setattr(backend, kind, self._answering(kind, getattr(backend, kind), backend))

    def write(self, name: str) -> None:
        """Keep what was answered since the beginning, under a name of its own: two writers do not meet."""
        if self.new:
            self.store.write_bytes(f"{self.place}/{name}/{FILE}", _packed(self.new))
        for place in self._places:
            self.store.delete(place)

    def _begin(self, kind: str, keys: list[str]) -> Begun:
        """Return what is known of a list of requests: only the same list is made into the same batches, and only they
        give the same last bits."""
        place = f"{UNFINISHED}/{sha256(canonical_json([self.place, kind, keys]))}"
        known: dict[int, Any] = {}
        for file in self.store.list_files(place):
            self._places.add(place)
            known |= {int(number): found for number, found in _read(self.store.read_bytes(file.path)).items()}

        def keep(found: dict[int, Any]) -> None:
            self._unwritten.setdefault(place, {}).update(found)
            if time.monotonic() - self._written >= WRITE_SECONDS:
                self._write_unfinished()

        return Begun(known, keep)

    def _write_unfinished(self) -> None:
        with contextlib.suppress(StoreError):  # it is tried again; what is never written costs the time to compute it
            for place, found in list(self._unwritten.items()):
                data = _packed({str(number): result for number, result in found.items()})
                self._places.add(place)
                self.store.write_bytes(f"{place}/{sha256(data)[:16]}.json", data)
                del self._unwritten[place]
        self._written = time.monotonic()

    def _answering(self, kind: str, work: Callable[..., list[Any]], backend: Any) -> Callable[..., list[Any]]:
        def answer(requests: list[Any], **options: Any) -> list[Any]:
            keys = [sha256(canonical_json([kind, *request.args])) for request in requests]
            missing = {key: request for key, request in zip(keys, requests, strict=True) if key not in self.known}
            found: list[Any] = []
            if missing:
                backend.begun = self._begin(kind, list(missing))
                try:
                    found = work(list(missing.values()), **options)
                except BaseException:  # an interrupt, SIGTERM
                    self._write_unfinished()
                    raise
            unfinished = getattr(backend, "unfinished", None)
            for (key, request), result in zip(missing.items(), found, strict=True):
                if kind == "generate_until":
                    ended = None if unfinished is None else request.args[0] in unfinished
                    self.known[key] = [result, ended]
                else:
                    self.known[key] = list(result) if kind == "loglikelihood" else result
                if is_finite(result):
                    self.new[key] = self.known[key]
            answers = [self.known[key] for key in keys]
            if kind == "generate_until":
                if unfinished is not None:
                    unfinished |= {r.args[0] for r, (_, ended) in zip(requests, answers, strict=True) if ended}
                return [text for text, _ in answers]
            return [tuple(pair) for pair in answers] if kind == "loglikelihood" else answers

        return answer


def is_finite(result: Any) -> bool:
    """Return whether an answer is a text, or a log-likelihood (alone or first of a pair) that JSON has a word for."""
    number = result[0] if isinstance(result, tuple | list) else result
    return not isinstance(number, float) or math.isfinite(number)


def _packed(responses: dict[str, Any]) -> bytes:
    return canonical_json({"responses": responses, "sha256": sha256(canonical_json(responses))})


def _read(data: bytes | None) -> dict[str, Any]:
    """Return the responses of a file; none of one that is damaged, which costs only the time to score them again."""
    try:
        found = json.loads(data or b"{}")
        responses: dict[str, Any] = found.get("responses", {})
        return responses if sha256(canonical_json(responses)) == found.get("sha256") else {}
    except ValueError:
        return {}
