"""A GGUF file's scores are those of the model it was made from, whatever is shared with the request before."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import llama_cpp
import pytest
import torch
from lm_eval.models.huggingface import HFLM

from tasks.core.errors import ConfigError, ModelError
from tasks.evaluation.gguf_backend import GgufLM
from tasks.models.llama import quiet_llama
from tasks.models.load import load_model
from tasks.models.tokenizer import load_tokenizer

REQUESTS = [
    ("The capital of France is", " Paris."),
    ("The capital of France is", " London."),
    ("The capital of France is", " a city on the river Seine, and has been for a long time."),
    ("The capital of France is", " a city on the river Rhine."),
    ("The capital of Italy is", " Rome."),
    ("Question: which?\nAnswer:", " A"),
    ("Question: which?\nAnswer:", " B"),
    ("", "Hello there."),
    ("请问", "你好。"),
    ("The capital of France is", " Paris."),
]


def asked(*requests: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=request) for request in requests]


@pytest.fixture(scope="module")
def backend(smollm_gguf: Path, smollm_folder: Path) -> Iterator[GgufLM]:
    found = GgufLM(smollm_gguf, load_tokenizer(smollm_folder, "auto"), 8192, 2, lambda done, total: None)
    yield found
    found.close()


@pytest.fixture(scope="module")
def library(smollm_folder: Path) -> HFLM:
    model = load_model(smollm_folder, torch.float32, "cpu")
    return HFLM(pretrained=model, tokenizer=load_tokenizer(smollm_folder, "auto"), batch_size=1)


def test_log_likelihoods_are_those_of_the_model(backend: GgufLM, library: HFLM) -> None:
    theirs = library.loglikelihood(asked(*REQUESTS), disable_tqdm=True)
    ours = backend.loglikelihood(asked(*REQUESTS), disable_tqdm=True)
    for (a, greedy_a), (b, greedy_b) in zip(theirs, ours, strict=True):
        assert b == pytest.approx(a, abs=0.03, rel=2e-3)  # weights in F16, and a cache in F16
        assert greedy_a == greedy_b


def test_what_is_shared_with_the_request_before_changes_nothing(backend: GgufLM) -> None:
    together = backend.loglikelihood(asked(*REQUESTS), disable_tqdm=True)
    for request, found in zip(REQUESTS, together, strict=True):
        backend.reader.past, backend.reader.branch = [], None
        alone = backend.loglikelihood(asked(request), disable_tqdm=True)[0]
        assert alone[0] == pytest.approx(found[0], abs=5e-3)
        assert alone[1] == found[1]


def test_rolling_log_likelihoods_of_long_texts_too(backend: GgufLM, library: HFLM) -> None:
    texts = [("It was a dark night. " * 40,), ("春天来了，公园里的花都开了。",)]
    theirs = library.loglikelihood_rolling(asked(*texts), disable_tqdm=True)
    assert backend.loglikelihood_rolling(asked(*texts)) == pytest.approx(theirs, rel=2e-3)


def test_it_writes_what_llama_cpp_writes(backend: GgufLM, smollm_gguf: Path) -> None:
    prompts = ["The capital of France is", "The capital of Italy is", "def add(a, b):"]
    options = {"until": ["\n\n"], "do_sample": False, "max_gen_toks": 16}
    ours = backend.generate_until(asked(*((prompt, options) for prompt in prompts)))
    with quiet_llama():
        model = llama_cpp.Llama(str(smollm_gguf), n_ctx=256, verbose=False)
        whole = [model(p, max_tokens=16, temperature=0.0, stop=["\n\n"])["choices"][0] for p in prompts]  # type: ignore[index]
        model.close()
    assert ours == [choice["text"] for choice in whole]
    ended = {p for p, choice in zip(prompts, whole, strict=True) if choice["finish_reason"] == "length"}
    assert backend.unfinished == ended
    with pytest.raises(ConfigError, match="generates with sampling or beams"):
        backend.generate_until(asked(("x", {"do_sample": True})))


def test_a_file_that_is_none_is_said(tmp_path: Path, smollm_folder: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="model.gguf cannot be loaded"):
        GgufLM(tmp_path / "model.gguf", load_tokenizer(smollm_folder, "auto"), 64, 1, lambda done, total: None)
