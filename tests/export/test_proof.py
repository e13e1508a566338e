"""A file is proven to be the merged model, and a file that was tampered with is not."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from peft import LoraConfig, get_peft_model

from tasks.core.errors import ExportError
from tasks.export.distributions import (
    Likeness,
    compare_distributions,
    negative_log_likelihood,
    next_log_probabilities,
)
from tasks.export.gguf import quantise_gguf
from tasks.export.merge import compare_merges
from tasks.export.proof import Recorded, prove_file, record_merged
from tasks.models.encode import Encoder, write_examples
from tasks.models.load import load_model
from tasks.models.tokenizer import load_tokenizer

ROWS = [
    [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    for question, answer in (
        ("What is the capital of France?", "Paris is the capital of France."),
        ("请介绍一下北京。", "北京是中国的首都，历史悠久。"),
        ("Write a loop in Python.", "for i in range(10):\n    print(i)"),
    )
]


def write_rows(folder: Path, model: Path) -> Path:
    """Return a folder of tokenised rows, as a run has it."""
    examples = Encoder(load_tokenizer(model, "auto")).encode(ROWS, 512)
    write_examples([examples], folder / "validation")
    return folder


def record(model: Path, folder: Path) -> Recorded:
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    return record_merged(model, write_rows(folder, model), asked)


@pytest.fixture(scope="module")
def smollm(smollm_folder: Path, smollm_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recorded]:
    """The real model's F16 file, and what the model expects."""
    return smollm_gguf, record(smollm_folder, tmp_path_factory.mktemp("proof"))


def test_an_f16_file_is_the_model(smollm: tuple[Path, Recorded], smollm_folder: Path) -> None:
    proof = prove_file(smollm[0], "f16", smollm[1])
    assert proof.reasons == []
    assert (proof.same_tokens, proof.same_template, proof.ends_answers) == (True, True, True)
    assert proof.agreement >= 0.99
    assert proof.divergence <= 0.01
    assert proof.places > 120
    assert "Paris" in smollm[1].answer
    assert proof.perplexity == pytest.approx(proof.merged_perplexity, rel=0.01)
    assert proof.summary.startswith("proven: same tokens, template and ends; most likely token the same at ")


@pytest.mark.parametrize("quantisation", ["q8_0", "q4_k_m"])
def test_quantised_files_are_nearer_the_more_bits_they_have(
    smollm: tuple[Path, Recorded], smollm_folder: Path, tmp_path: Path, quantisation: str
) -> None:
    quantise_gguf(smollm[0], tmp_path / "model.gguf", quantisation)
    exact = prove_file(smollm[0], "f16", smollm[1])
    proof = prove_file(tmp_path / "model.gguf", quantisation, smollm[1])
    assert proof.reasons == []
    assert proof.divergence > exact.divergence


def change_tensor(reader: Any) -> None:
    tensor = next(t for t in reader.tensors if t.name == "blk.12.ffn_down.weight")
    tensor.data[:] = tensor.data[::-1].copy()


def change_template(reader: Any) -> None:
    part = reader.fields["tokenizer.chat_template"].parts[-1]
    text = bytes(part)
    part[:] = list(text.replace(b"assistant", b"assistent", 1))


def change_end(reader: Any) -> None:
    reader.fields["tokenizer.ggml.eos_token_id"].parts[-1][0] = 5


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (change_tensor, "its most likely token is the merged model's, or as likely to it, at"),
        (change_template, "its chat template is not the tokenizer's"),
        (change_end, "its end-of-text token is 5, and the tokenizer's is"),
    ],
)
def test_a_file_that_was_tampered_with_is_caught(
    smollm: tuple[Path, Recorded],
    smollm_folder: Path,
    tmp_path: Path,
    change: Callable[[Any], None],
    reason: str,
) -> None:
    path = tmp_path / "model.gguf"
    shutil.copy(smollm[0], path)
    change(GGUFReader(path, "r+"))
    proof = prove_file(path, "f16", smollm[1])
    assert not proof.passed
    assert any(found.startswith(reason) for found in proof.reasons), proof.reasons
    assert proof.summary.startswith("not proven: ")


def test_a_file_cut_short_is_said(smollm: tuple[Path, Recorded], smollm_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(smollm[0].read_bytes()[:1_000_000])
    with pytest.raises(ExportError, match="model.gguf cannot be loaded"):
        prove_file(path, "f16", smollm[1])


def test_the_share_of_few_places_is_known_roughly() -> None:
    likeness = Likeness()
    likeness.places, likeness.same, likeness.tied = 10, 8, 1
    assert likeness.alike_at_most == pytest.approx(0.982, abs=5e-4)  # the textbook's for 9 of 10
    likeness.places, likeness.same, likeness.tied = 183, 172, 5
    assert likeness.alike_at_most == pytest.approx(0.985, abs=5e-4)
    likeness.same = likeness.tied = 0
    assert likeness.alike_at_most < 0.03


def test_likeness_of_distributions_that_are_known(smollm_folder: Path, tmp_path: Path) -> None:
    model = load_model(smollm_folder, torch.float32, "cpu")
    recorded = record(smollm_folder, tmp_path).answers
    same = compare_distributions(recorded, lambda probe: next_log_probabilities(model, probe))
    assert (same.agreement, same.ties, same.divergence) == (1.0, 0.0, pytest.approx(0, abs=1e-5))
    size = recorded.log_probabilities[0].shape[1]
    uniform = torch.full((1, size), 1 / size).log()
    other = compare_distributions(recorded, lambda probe: uniform.expand(len(probe.ids[probe.places]), -1))
    tables = [torch.tensor(rows).double() for rows in recorded.log_probabilities]
    entropy = -sum(float((table * table.exp()).sum()) for table in tables)
    probe = recorded.probes[0]
    uniform_row = uniform.expand(len(probe.ids[probe.places]), -1)
    nats = negative_log_likelihood(uniform_row, probe)
    assert nats == pytest.approx(len(uniform_row) * math.log(size), rel=1e-3)
    assert other.divergence == pytest.approx(torch.tensor(size).log().item() - entropy / other.places, rel=1e-3)


@pytest.mark.parametrize("method", ["qlora", "int8"])
def test_an_adapter_of_a_quantised_base_is_merged_where_it_gives_what_was_trained(
    smollm_folder: Path, tmp_path: Path, method: str
) -> None:
    base = load_model(smollm_folder, torch.float32, "cpu")
    torch.manual_seed(0)
    get_peft_model(base, LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"])).save_pretrained(
        tmp_path / "adapter"
    )
    tokens = write_rows(tmp_path, smollm_folder)
    more = (torch.float32, "cpu", tokens, tmp_path / "trained.npy", lambda done, total: None, False)
    found = compare_merges(smollm_folder, tmp_path / "adapter", method, *more)
    divergence = found["divergence"]
    assert found["onto"] == min(divergence, key=divergence.__getitem__)
    if method == "qlora":  # LLM.int8 also rounds what goes into a layer, which no weights can repeat
        assert divergence["quantised"] < 0.01 < divergence["full"]
    assert found["places"] > 60
