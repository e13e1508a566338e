"""A scoring that was killed goes on: batches that were answered are left out, and the end is the same to the bit."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import MistralConfig, MistralForCausalLM

from tasks.core.store import FileStore, Store
from tasks.evaluation import responses
from tasks.evaluation.gguf_backend import GgufLM
from tasks.evaluation.prefix_lm import SharedPrefixLM
from tasks.evaluation.responses import Responses
from tasks.evaluation.tree import find_needed
from tasks.models.load import load_model
from tasks.models.tokenizer import load_tokenizer
from tests.conftest import ROOT

EXAMPLES = "Rivers run to the sea. Snow is white and cold. The sun rises in the east, and grass is green. "


def write_lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def suite(tmp_path: Path) -> dict[str, Any]:
    """Choices after a common beginning, texts and written answers: every kind of request."""
    things = ("river", "stone", "tree", "house", "cloud", "ship")
    choices = [
        {"context": f"{EXAMPLES}Number {i}: the {t} is", "choices": [" wide.", " made of cheese, I say."], "gold": 0}
        for i in range(4)
        for t in things
    ]
    texts = [{"text": f"Text {i} about a {t}: {EXAMPLES * (1 + i)}"} for i in range(3) for t in things]
    answers = [
        {"messages": [{"role": "user", "content": f"What is a {t}?"}, {"role": "assistant", "content": f"A {t}."}]}
        for t in things
    ]
    tasks = [
        {"name": "choices", "choices": write_lines(tmp_path / "c.jsonl", choices)},
        {"name": "texts", "texts": write_lines(tmp_path / "t.jsonl", texts)},
        {"name": "answers", "answers": write_lines(tmp_path / "a.jsonl", answers), "max_answer_tokens": 6},
    ]
    measures = ("acc", "bits_per_byte", "f1")
    capabilities = [
        {"name": f"c_{task['name']}", "role": "target", "measure": measure, "tasks": [task]}
        for task, measure in zip(tasks, measures, strict=True)
    ]
    return {"capabilities": capabilities, "batch_tokens": 64}


def score(suite: dict[str, Any], base: Path, gguf: Path | None, store: Path, die: int | None) -> dict[str, Any] | None:
    """Return what a process of tests.evaluation.killed said; None where it was killed."""
    asked = {"suite": suite, "base": str(base), "gguf": gguf and str(gguf), "store": str(store), "die": die}
    done = subprocess.run(
        [sys.executable, "-m", "tests.evaluation.killed", json.dumps(asked)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    if done.returncode == -signal.SIGKILL:
        return None
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("is_file", [False, True])
def test_killed_in_any_kind_of_request_it_computes_the_rest(
    suite: dict[str, Any],
    smollm_folder: Path,
    smollm_gguf: Path,
    tmp_path: Path,
    is_file: bool,
) -> None:
    gguf = smollm_gguf if is_file else None
    whole = score(suite, smollm_folder, gguf, tmp_path / "whole", None)
    assert whole
    assert whole["lines"] == 24 + 18 + 6
    store = tmp_path / "store"
    for share in (0.4, 0.3, 0.2):
        assert score(suite, smollm_folder, gguf, store, int(share * whole["writes"])) is None
        assert not list(store.glob("artifacts/scores/*"))
    again = score(suite, smollm_folder, gguf, store, None)
    assert again
    assert again["items"] == whole["items"], "the same bytes"
    passes, all_passes = (sum(found["passes"].values()) for found in (again, whole))
    assert passes < 0.8 * all_passes
    assert not list(store.rglob("unfinished/*/*")), "merged, and gone"
    assert list(store.rglob("responses.json"))


# --- by kind of model and of request ----------------------------------------------------------------------------------

Ask = Callable[[Any], list[Any]]


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=a) for a in arguments]


def ask(kind: str, backend: Any) -> list[Any]:
    things = ("river", "stone", "tree", "house", "cloud", "ship")
    match kind:
        case "loglikelihood":
            prompts = [f"{EXAMPLES * (i % 2)}Number {i}: the {t} is" for i in range(10) for t in things]
            pairs = [(p, c) for p in prompts for c in (" wide.", " wide enough.", " made of cheese.")]
            return backend.loglikelihood(requests(*pairs))
        case "loglikelihood_rolling":
            texts = [(f"A {t}. {EXAMPLES * 2} {i}",) for t in things for i in range(2)]
            return backend.loglikelihood_rolling(requests(*texts))
    options = {"until": ["\n\n"], "max_gen_toks": 5, "do_sample": False}
    prompts = [f"{EXAMPLES}Question {i}: what is a {t}?" for i in range(4) for t in things]
    return backend.generate_until(requests(*((p, options) for p in prompts)))


@pytest.fixture(scope="module")
def models(smollm_folder: Path, smollm_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict]:
    """Backends: this project's layers, the library's with a mask, llama.cpp."""
    tokenizer = load_tokenizer(smollm_folder, "auto")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MistralConfig(vocab_size=len(tokenizer), num_hidden_layers=2, sliding_window=512, **sizes)
    folder = tmp_path_factory.mktemp("mistral")
    MistralForCausalLM(config).save_pretrained(folder)
    plans = SharedPrefixLM(load_model(smollm_folder, torch.float32, "cpu"), tokenizer, 48, lambda done, total: None)
    mask = SharedPrefixLM(load_model(folder, torch.float32, "cpu"), tokenizer, 48, lambda done, total: None)
    assert (plans.plans, mask.plans) == (True, False)
    gguf = GgufLM(smollm_gguf, tokenizer, 512, 1, lambda done, total: None)
    yield {"plans": plans, "mask": mask, "gguf": gguf}
    gguf.close()


class Passes:
    """Counts what goes through a model, and interrupts it before pass number `end`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, backend: Any, end: int | None = None) -> None:
        self.count, self.end = 0, end
        monkeypatch.setattr(backend, "unfinished", set())
        places: list[tuple[Any, str]]
        if isinstance(backend, GgufLM):
            places = [(backend.reader, "read")]
        elif backend.plans:
            places = [(backend, "_score_row"), ("tasks.evaluation.prefix_lm", "generate")]
        else:
            places = [(backend, "_score_row"), (backend.model, "generate")]
        for owner, name in places:
            target = sys.modules[owner] if isinstance(owner, str) else owner
            monkeypatch.setattr(target, name, self._counting(getattr(target, name)))

    def _counting(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            self.count += 1
            if self.count == self.end:
                raise KeyboardInterrupt
            return work(*arguments, **options)

        return counted


@pytest.mark.parametrize("kind", responses.KINDS)
@pytest.mark.parametrize("model", ["plans", "mask", "gguf"])
def test_an_interrupted_list_of_requests_is_gone_on_with(
    models: dict[str, Any], model: str, kind: str, store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = models[model]

    def run(place: Store, end: int | None) -> tuple[list[Any] | None, int, set[str] | None, Responses]:
        with monkeypatch.context() as patched:
            patched.setattr("tasks.evaluation.prefix_lm.BATCH", 4)
            patched.setattr(backend, "batch_size_per_gpu", 4, raising=False)
            for name in responses.KINDS:
                patched.setattr(backend, name, getattr(backend, name))  # undone: attach sets it
            passes, answers = Passes(patched, backend, end), Responses(place, "model")
            answers.attach(backend)
            try:
                found = ask(kind, backend)
            except KeyboardInterrupt:
                found = None
            return found, passes.count, backend.unfinished, answers

    whole, all_passes, unfinished, _ = run(FileStore(store.root / "whole"), None)
    found, _, _, answers = run(store, all_passes * 2 // 3)
    assert found is None
    assert len(list(store.list_files(responses.UNFINISHED))) == 1, "at an interrupt what is answered is written"
    found, second, unfinished_again, answers = run(store, None)
    assert found == whole
    assert unfinished_again == unfinished
    assert second < 0.6 * all_passes
    answers.write("stage")
    assert not list(store.list_files(responses.UNFINISHED))
    assert run(store, None)[:2] == (whole, 0)


def test_damaged_files_and_other_lists_are_computed(
    models: dict[str, Any], store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = models["plans"]
    for name in responses.KINDS:
        monkeypatch.setattr(backend, name, getattr(backend, name))
    monkeypatch.setattr(responses, "WRITE_SECONDS", 0)
    plain = backend.loglikelihood

    def asked(pairs: list[tuple[str, str]]) -> tuple[list[Any], int]:
        with monkeypatch.context() as patched:
            patched.setattr(backend, "loglikelihood", plain)
            passes = Passes(patched, backend)
            Responses(store, "model").attach(backend)
            return backend.loglikelihood(requests(*pairs)), passes.count

    pairs = [(f"{EXAMPLES}Number {i} is", " odd.") for i in range(60)]
    whole, passes = asked(pairs)
    files = list(store.list_files(responses.UNFINISHED))
    assert len(files) > 3, "one each time"
    assert asked(pairs) == (whole, 0)
    place = store.root / files[1].path
    place.write_bytes(place.read_bytes().replace(b"-", b"+", 1))
    found, again = asked(pairs)
    assert found == whole
    assert 0 < again < passes
    assert asked(pairs[:-1])[1] > 0, "another list makes other batches"
    place.write_bytes(b'{"responses":{"0":')
    assert asked(pairs)[0] == whole


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 5), st.booleans()), min_size=1, max_size=12))
def test_a_row_finds_all_that_it_goes_on_from(drawn: list[tuple[int, int, bool]]) -> None:
    """Each row has `base` tokens of the one before and some of its own; what it goes on from was computed in it."""
    rows: list[tuple[int, bool]] = []
    lengths, before = [], 0
    for base, own, is_known in drawn:
        rows.append((min(base, before), is_known))
        before = rows[-1][0] + own
        lengths.append(before)
    there: list[int] = []  # which row computed each place that is kept
    whole: list[int] = []
    for i, ((base, is_known), is_needed) in enumerate(zip(rows, find_needed(rows), strict=True)):
        assert is_needed or is_known
        whole = whole[:base] + [i] * (lengths[i] - base)
        if is_needed:
            assert there[:base] == whole[:base]
            there = whole
        else:
            there = there[:base]
    unknown = [is_known for _, is_known in rows]
    assert find_needed((0, k) for k in unknown) == [not k for k in unknown], "alone, only what is unknown"
