"""The faster layers give the library's own losses and gradients, packed or not, whatever the family."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import (
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from tasks.core.config import TrainConfig
from tasks.models.cpu_attention import PackPlan
from tasks.models.cpu_layers import CpuLayers
from tasks.models.products import ArrangedProduct, Product, can_arrange
from tasks.models.template import Example
from tasks.training.chunked_loss import WIDE_ROWS, chunked_loss
from tasks.training.methods import open_trainable
from tasks.training.packing import make_pack, pack_examples

SMALL = {
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
}
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SMALL),
    "mistral": MistralConfig(**SMALL, sliding_window=None),
    "qwen2": Qwen2Config(**SMALL),  # biases on query, key and value
    "qwen3": Qwen3Config(**SMALL, head_dim=16),  # norms of queries and keys
    "phi3": Phi3Config(**SMALL),  # one projection for query, key and value
}
SPECIAL: dict[str, PreTrainedConfig] = {
    "gemma2": Gemma2Config(**SMALL, head_dim=16),  # capped scores, windows
    "window": MistralConfig(**SMALL, sliding_window=32),
}


def examples(count: int = 7) -> list[Example]:
    """Return rows that begin with the same 12 tokens; one is longer than a tile of the attention."""
    generator = torch.Generator().manual_seed(3)
    lengths = [9 + 11 * i for i in range(count - 1)] + [300]
    rows = [[*range(50, 62), *torch.randint(70, 400, (n,), generator=generator).tolist()] for n in lengths]
    return [Example(ids, [p >= 15 for p in range(len(ids))]) for ids in rows]


def save(config: PreTrainedConfig, folder: Path) -> Path:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def open_model(folder: Path, method: str = "lora", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    config = TrainConfig(method=method, rank=4, alpha=8, **options)
    model = open_trainable(folder, config, dtype, "cpu", False, None)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=generator)
    return model.train()


def plain(model: Any, rows: list[Example]) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the summed loss and the gradients of rows one by one, by the library."""
    total = 0.0
    for row in rows:
        pack = make_pack([row])
        logits = model(input_ids=pack.ids, use_cache=False, logits_to_keep=pack.kept).logits
        loss = cross_entropy(logits[0].float(), pack.labels, reduction="sum")
        loss.backward()
        total += loss.item()
    return total, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def fast(
    model: Any, rows: list[Example], budget: int, lanes: int = 1
) -> tuple[float, dict[str, torch.Tensor], CpuLayers]:
    base = model.get_base_model()
    layers = CpuLayers(base)
    total = 0.0
    for pack in pack_examples(rows, budget, layers.shares_prefix, lanes):
        options = {"plan": PackPlan(pack.starts)} if layers.shares_prefix else {}
        decoder = base.get_decoder()
        hidden = decoder(input_ids=pack.ids, position_ids=pack.positions, use_cache=False, **options).last_hidden_state
        loss = chunked_loss(hidden[0, pack.kept], Product(base.get_output_embeddings().weight), pack.labels)
        loss.backward()
        total += loss.item()
    return total, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}, layers


@pytest.mark.parametrize("budget", [64, 200, 2000])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_loss_and_gradients_are_the_librarys(family: str, budget: int, tmp_path: Path) -> None:
    folder = save(FAMILIES[family], tmp_path / family)
    expected, gradients = plain(open_model(folder), examples())
    total, found, layers = fast(open_model(folder), examples(), budget)
    assert layers.shares_prefix
    assert len(layers.layers) == (0 if family == "phi3" else 2)  # the library's own, with our attention
    assert total == pytest.approx(expected, rel=1e-6)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-4), name


@pytest.mark.parametrize(
    "options",
    [
        {"method": "qlora"},
        {"dora": True},
        {"rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 32}},
        {"target_modules": ["q_proj", "down_proj"]},
    ],
)
def test_every_kind_of_lora_is_right(options: dict[str, Any], tmp_path: Path) -> None:
    folder = save(FAMILIES["qwen2"], tmp_path / "base")
    expected, gradients = plain(open_model(folder, **options), examples())
    total, found, layers = fast(open_model(folder, **options), examples(), 200)
    assert len(layers.layers) == (0 if "dora" in options else 2)
    assert total == pytest.approx(expected, rel=1e-5)
    for name, gradient in gradients.items():
        assert torch.allclose(found[name], gradient, rtol=1e-3, atol=1e-3), name


@pytest.mark.parametrize("family", list(SPECIAL))
def test_attention_of_another_kind_is_left_to_the_library(family: str, tmp_path: Path) -> None:
    model = open_model(save(SPECIAL[family], tmp_path / family))
    before = model.config._attn_implementation
    assert not CpuLayers(model.get_base_model()).shares_prefix
    assert model.config._attn_implementation == before


def test_in_bfloat16_it_is_as_near_to_float32_as_the_library_is(tmp_path: Path) -> None:
    folder = save(FAMILIES["llama"], tmp_path / "base")
    exact, exact_gradients = plain(open_model(folder), examples())
    library, library_gradients = plain(open_model(folder, dtype=torch.bfloat16), examples())
    ours, gradients, _ = fast(open_model(folder, dtype=torch.bfloat16), examples(), 200)

    def distance(found: dict[str, torch.Tensor]) -> float:
        return sum((found[n].float() - g).square().sum().item() for n, g in exact_gradients.items()) ** 0.5

    assert abs(ours - exact) < 2 * abs(library - exact) + 0.5
    assert distance(gradients) < 1.25 * distance(library_gradients)


def test_a_refresh_brings_the_copies_up_to_date(tmp_path: Path) -> None:
    folder = save(FAMILIES["llama"], tmp_path / "base")
    model, changed = open_model(folder), open_model(folder)
    layers = CpuLayers(model.get_base_model())
    for one in (model, changed):
        with torch.no_grad():
            for name, parameter in one.named_parameters():
                if "lora" in name:
                    parameter.add_(0.01)
    ids = torch.arange(50, 70)[None]
    options = {"input_ids": ids, "position_ids": torch.arange(20)[None], "use_cache": False}
    with torch.no_grad():
        expected = changed(**options).logits
        assert not torch.allclose(model(**options, plan=PackPlan([0, 20])).logits, expected, atol=1e-4)
        layers.refresh()
        assert torch.allclose(model(**options, plan=PackPlan([0, 20])).logits, expected, atol=1e-4)


@pytest.mark.skipif(not can_arrange(), reason="oneDNN multiplies no bfloat16 on this CPU")
def test_an_arranged_weight_gives_the_same_products() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x, dy = (torch.randn(*s, generator=generator).bfloat16() for s in ((96, 64), (37, 64), (37, 96)))
    bias = torch.randn(96, generator=generator).bfloat16()
    plain, arranged = Product(weight, bias), ArrangedProduct(weight, bias)
    assert torch.allclose(arranged.forward(x).float(), plain.forward(x).float(), rtol=0.02, atol=0.02)
    assert torch.allclose(arranged.backward(dy).float(), plain.backward(dy).float(), rtol=0.02, atol=0.02)
    assert plain.outputs == arranged.outputs == 96


@pytest.mark.parametrize("rows", [1, WIDE_ROWS, WIDE_ROWS + 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_in_chunks_is_the_loss(rows: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    head = (torch.randn(300, 32, generator=generator) / 4).to(dtype)
    hidden = torch.randn(rows, 32, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, 300, (rows,), generator=generator)
    expected = cross_entropy((hidden.float() @ head.float().t()), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(expected, hidden)
    found = chunked_loss(hidden, Product(head), labels)
    (ours,) = torch.autograd.grad(3 * found, hidden)
    exact = dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-6 if exact else 2e-3)
    assert torch.allclose(ours.float() / 3, gradient.float(), atol=1e-5 if exact else 0.02)


def test_an_unlikely_label_has_a_finite_loss() -> None:
    hidden, head = torch.tensor([[200.0]]), torch.tensor([[1.0], [-1.0]])
    assert chunked_loss(hidden, Product(head), torch.tensor([1])).item() == pytest.approx(400.0)
