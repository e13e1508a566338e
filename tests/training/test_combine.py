"""Several adapters as one, against sums made by hand: on a real tiny model, by PEFT and in sequence."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from tasks.core.combination import read_ranks
from tasks.core.config import CombineConfig, Combining, TrainConfig
from tasks.core.errors import ConfigError
from tasks.models.load import load_model, load_shipped
from tasks.training.combine import combine_adapters, merge_in_sequence
from tasks.training.methods import WEIGHTS, open_trainable, save_trained

FLOAT = torch.float32
METHODS = Combining.__args__
QUERY = "model.layers.0.self_attn.q_proj"


def make_adapter(base: Path, out: Path, seed: int, **changes: Any) -> Path:
    """Return a folder with an adapter whose factors are all random."""
    defaults = {"method": "lora", "rank": 4, "alpha": 8, "max_tokens": 128, "pack_tokens": 256, "seed": seed}
    settings = TrainConfig(**{**defaults, "target_modules": ["q_proj", "v_proj", "down_proj"], **changes})
    model = open_trainable(base, settings, FLOAT, "cpu", False, None)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.requires_grad and "magnitude" not in name:
            noise = torch.randn(weight.shape, generator=generator) * 0.1
            weight.data = weight.data + noise if "modules_to_save" in name else noise
    save_trained(model, settings, base, out)
    return out


def combine(base: Path, out: Path, shares: list[tuple[Path, float]], method: str, **changes: Any) -> Path:
    config = CombineConfig(runs=[str(i) for i in range(len(shares))], method=method, **changes)
    out.mkdir()
    combine_adapters(base, shares, config, out, False)
    return out


def weights_of(base: Path, adapter: Path | None, method: str = "lora") -> dict[str, torch.Tensor]:
    model = load_shipped(base, adapter, method, FLOAT, "cpu")
    return {name: w.detach() for name, w in model.named_parameters(remove_duplicate=False)}


def sum_by_hand(base: Path, shares: list[tuple[Path, float]]) -> dict[str, torch.Tensor]:
    """Return base + sum of share x (merged - base), each adapter merged alone."""
    plain = weights_of(base, None)
    total = {name: w.clone() for name, w in plain.items()}
    for folder, share in shares:
        for name, weight in weights_of(base, folder).items():
            total[name] += share * (weight - plain[name])
    return total


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], atol: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=atol)


@pytest.fixture(scope="module")
def pair(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, float]]:
    """Two adapters of one shape, with their shares."""
    folder = tmp_path_factory.mktemp("pair")
    return [(make_adapter(tiny_folder, folder / str(i), i), share) for i, share in enumerate((0.7, 0.3))]


PAIRS: dict[str, list[dict[str, Any]]] = {
    "two alike": [{}, {}],
    "three": [{}, {}, {}],
    "of different ranks": [{"rank": 2}, {"rank": 8}],
    "rank-stabilised and not": [{"rslora": True}, {}],
    "not and rank-stabilised": [{}, {"rslora": True}],
    "with patterns": [{"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"v_proj": 4}}, {}],
    "of different layers": [{"target_modules": ["q_proj"]}, {"target_modules": ["v_proj", "q_proj"]}],
    "by a pattern and by names": [{"target_modules": r".*\.q_proj"}, {"target_modules": ["v_proj"]}],
    "of a tied embedding": [{"target_modules": ["q_proj", "embed_tokens"]}, {"target_modules": ["embed_tokens"]}],
    "from the base's directions": [{"init": "pissa"}, {"init": "olora"}],
}


@pytest.mark.parametrize("name", PAIRS)
def test_cat_and_svd_of_full_rank_are_the_weighted_sum(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    shares = [
        (make_adapter(tiny_folder, tmp_path / str(i), i, **changes), share)
        for i, (changes, share) in enumerate(zip(PAIRS[name], (0.7, -0.4, 1.3), strict=False))
    ]
    expected = sum_by_hand(tiny_folder, shares)
    assert_same(weights_of(tiny_folder, combine(tiny_folder, tmp_path / "cat", shares, "cat")), expected)
    # 64 is more than a key's 32 outputs have: those layers get all the rank there is
    assert_same(weights_of(tiny_folder, combine(tiny_folder, tmp_path / "svd", shares, "svd", rank=64)), expected, 1e-4)


def test_layers_that_are_transposed_add_up_too(tmp_path: Path) -> None:
    shape = {"vocab_size": 3100, "n_positions": 256, "n_embd": 32, "n_layer": 2, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).save_pretrained(tmp_path / "gpt2")
    shares = [
        (make_adapter(tmp_path / "gpt2", tmp_path / str(i), i, rank=rank, target_modules="all-linear"), share)
        for i, (rank, share) in enumerate(((2, 0.7), (4, 0.3)))
    ]
    expected = sum_by_hand(tmp_path / "gpt2", shares)
    for method, options in (("cat", {}), ("svd", {"rank": 6})):
        out = combine(tmp_path / "gpt2", tmp_path / method, shares, method, **options)
        assert_same(weights_of(tmp_path / "gpt2", out), expected)


def test_the_factors_times_their_scale_are_what_is_added(tiny_folder: Path, tmp_path: Path) -> None:
    """W + w1 s1 B1 A1 + w2 s2 B2 A2, from the files alone."""
    shares = [
        (make_adapter(tiny_folder, tmp_path / "a", 1, rank=4, alpha=8), 0.7),
        (make_adapter(tiny_folder, tmp_path / "b", 2, rank=9, alpha=6, rslora=True), 0.3),
    ]
    found = weights_of(tiny_folder, combine(tiny_folder, tmp_path / "out", shares, "cat"))
    expected = weights_of(tiny_folder, None)[f"{QUERY}.weight"].clone()
    for (folder, share), scale in zip(shares, (8 / 4, 6 / 9**0.5), strict=True):
        factors = load_file(folder / WEIGHTS)
        a, b = (factors[f"base_model.model.{QUERY}.lora_{x}.weight"] for x in "AB")
        expected += share * scale * b @ a
    torch.testing.assert_close(found[f"{QUERY}.weight"], expected)
    assert read_ranks(tmp_path / "out")[QUERY] == 13


def test_linear_is_the_product_of_summed_factors(tiny_folder: Path, tmp_path: Path, pair: Any) -> None:
    found = weights_of(tiny_folder, combine(tiny_folder, tmp_path / "out", pair, "linear"))
    sums = {}
    for x in "AB":
        name = f"base_model.model.{QUERY}.lora_{x}.weight"
        sums[x] = sum((share * 2) ** 0.5 * load_file(folder / WEIGHTS)[name] for folder, share in pair)
    weight = f"{QUERY}.weight"
    torch.testing.assert_close(found[weight], weights_of(tiny_folder, None)[weight] + sums["B"] @ sums["A"])
    assert not torch.allclose(found[weight], sum_by_hand(tiny_folder, pair)[weight], atol=1e-3), "not the sum"


def test_linear_is_the_weighted_sum_where_no_layer_has_two_adapters(tiny_folder: Path, tmp_path: Path) -> None:
    shares = [
        (make_adapter(tiny_folder, tmp_path / "a", 1, target_modules=["q_proj"]), 0.7),
        (make_adapter(tiny_folder, tmp_path / "b", 2, target_modules=["v_proj", "up_proj"]), 0.3),
    ]
    found = weights_of(tiny_folder, combine(tiny_folder, tmp_path / "out", shares, "linear"))
    assert_same(found, sum_by_hand(tiny_folder, shares))


def one_layer(base: Path, out: Path, a: list[float], b: list[float]) -> Path:
    """Return an adapter of rank 1 and scale 1 on one layer of 64 x 64, whose factors repeat the given entries."""
    make_adapter(base, out, 0, rank=1, alpha=1, target_modules=[QUERY])
    name = f"base_model.model.{QUERY}.lora_"
    factors = {f"{name}A.weight": torch.tensor([a * 16]), f"{name}B.weight": torch.tensor([b * 16]).T.contiguous()}
    save_file(factors, out / WEIGHTS)
    return out


def test_ties_trims_elects_a_sign_and_averages_those_that_agree(tiny_folder: Path, tmp_path: Path) -> None:
    """TIES (arXiv 2306.01708) on each factor, times the root of the weight. Half of the entries stay: 6 and -5 of the
    first, 7 and -3 of the second. Of -5 and 7 the sum is positive, so 7 stays alone. The weight 4 doubles the first."""
    shares = [
        (one_layer(tiny_folder, tmp_path / "a", [6.0, -5.0, 1.0, 2.0], [1.0, 0.0, 0.0, 0.0]), 4.0),
        (one_layer(tiny_folder, tmp_path / "b", [2.0, 7.0, -3.0, 1.0], [1.0, 0.0, 0.0, 0.0]), 1.0),
    ]
    factors = load_file(combine(tiny_folder, tmp_path / "out", shares, "ties", density=0.5) / WEIGHTS)
    a, b = (factors[f"base_model.model.{QUERY}.lora_{x}.weight"] for x in "AB")
    assert a[0].tolist() == [12.0, 7.0, -3.0, 0.0] * 16
    assert b[:, 0].tolist() == [1.5, 0.0, 0.0, 0.0] * 16  # (2 + 1) / 2


@pytest.mark.parametrize("method", [m for m in METHODS if m != "sequence"])
def test_the_same_call_gives_the_same_bytes(tiny_folder: Path, tmp_path: Path, pair: Any, method: str) -> None:
    torch.manual_seed(1)
    first = combine(tiny_folder, tmp_path / "first", pair, method)
    torch.manual_seed(2)
    again = combine(tiny_folder, tmp_path / "again", pair, method)
    assert {f.name: f.read_bytes() for f in first.iterdir()} == {f.name: f.read_bytes() for f in again.iterdir()}
    seeded = combine(tiny_folder, tmp_path / "seeded", pair, method, seed=7)
    assert ((seeded / WEIGHTS).read_bytes() == (first / WEIGHTS).read_bytes()) is not method.startswith("dare")
    assert str(tmp_path).encode() not in (first / "adapter_config.json").read_bytes()
    changed = weights_of(tiny_folder, first)[f"{QUERY}.weight"] - weights_of(tiny_folder, None)[f"{QUERY}.weight"]
    assert 0 < changed.abs().max() < 10


def test_dare_keeps_on_average_what_it_leaves_out(tiny_folder: Path, tmp_path: Path) -> None:
    """Entries are left out at random and the rest divided by the share kept (arXiv 2311.03099)."""
    shares = [(make_adapter(tiny_folder, tmp_path / str(i), i, rank=64), share) for i, share in enumerate((2.0, 1.0))]
    out = combine(tiny_folder, tmp_path / "out", shares, "dare_linear", density=0.25)
    name = f"base_model.model.{QUERY}.lora_A.weight"
    first, second = (load_file(folder / WEIGHTS)[name] * (share * 8 / 64) ** 0.5 for folder, share in shares)
    found = load_file(out / WEIGHTS)[name]
    possible = torch.stack([0 * first, 4 * first, 4 * second, 4 * (first + second)])
    distance, which = (found - possible).abs().min(0)
    assert distance.max() < 1e-5
    shares_found = torch.bincount(which.flatten(), minlength=4) / found.numel()
    torch.testing.assert_close(shares_found, torch.tensor([0.5625, 0.1875, 0.1875, 0.0625]), atol=0.03, rtol=0)


def test_no_weight_of_the_base_is_read(tiny_folder: Path, tmp_path: Path, pair: Any) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_folder, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    with_base, without = (combine(base, tmp_path / out, pair, "cat") for base, out in ((tiny_folder, "a"), (bare, "b")))
    assert (with_base / WEIGHTS).read_bytes() == (without / WEIGHTS).read_bytes()


def test_what_peft_refuses_is_said_in_its_words(tiny_folder: Path, tmp_path: Path) -> None:
    pattern = {"rank": 16, "rank_pattern": {"q_proj": 4}, "target_modules": ["q_proj"]}  # no layer has 16
    shares = [
        (make_adapter(tiny_folder, tmp_path / "a", 1, **pattern), 1.0),
        (make_adapter(tiny_folder, tmp_path / "b", 2, target_modules=["q_proj"]), 1.0),
    ]
    with pytest.raises(ConfigError, match="PEFT cannot combine these adapters by linear: All adapters must have the"):
        combine(tiny_folder, tmp_path / "out", shares, "linear")


# --- in sequence ------------------------------------------------------------------------------------------------------


def merge_by_hand(model: Any, folder: Path, share: float) -> Any:
    begun = {name: w.detach().clone() for name, w in model.named_parameters(remove_duplicate=False)}
    merged = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    with torch.no_grad():
        for name, weight in merged.named_parameters():
            weight.copy_(begun[name] + share * (weight - begun[name]))
    return merged


SEQUENCES: dict[str, list[dict[str, Any]]] = {
    "lora": [{}, {"rank": 8}],
    "three": [{}, {}, {}],
    "what does not add up": [{"method": "oft"}, {"dora": True}, {"modules_to_save": ["norm"]}],
    "qlora": [{"method": "qlora"}, {"method": "qlora", "dora": True}],
    "int8": [{"method": "int8"}, {"method": "int8"}],
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_sequence_is_merging_one_after_the_other(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    shares = [
        (make_adapter(tiny_folder, tmp_path / str(i), i, **changes), share)
        for i, (changes, share) in enumerate(zip(SEQUENCES[name], (1.0, 0.5, 0.8), strict=False))
    ]
    method = SEQUENCES[name][0].get("method", "lora")
    merge_in_sequence(tiny_folder, shares, method, FLOAT, tmp_path / "out", False)
    model = load_shipped(tiny_folder, None, method, FLOAT, "cpu")
    for folder, share in shares:
        model = merge_by_hand(model, folder, share)
    expected = {n: w.detach() for n, w in model.named_parameters(remove_duplicate=False)}
    assert_same(weights_of(tiny_folder, tmp_path / "out", "full"), expected)
    if name in ("lora", "three"):
        assert_same(expected, sum_by_hand(tiny_folder, shares))


def test_the_order_of_a_sequence_matters_where_adapters_do_not_add_up(tiny_folder: Path, tmp_path: Path) -> None:
    shares = [
        (make_adapter(tiny_folder, tmp_path / "a", 1, method="oft"), 1.0),
        (make_adapter(tiny_folder, tmp_path / "b", 2), 1.0),
    ]
    for out, order in (("ab", shares), ("ba", shares[::-1])):
        merge_in_sequence(tiny_folder, order, "lora", FLOAT, tmp_path / out, False)
    one, other = (weights_of(tiny_folder, tmp_path / out, "full")[f"{QUERY}.weight"] for out in ("ab", "ba"))
    assert not torch.allclose(one, other, atol=1e-3)


def test_a_whole_head_is_untied_and_written_apart(tiny_folder: Path, tmp_path: Path) -> None:
    shares = [
        (make_adapter(tiny_folder, tmp_path / "a", 1, modules_to_save=["lm_head"]), 0.5),
        (make_adapter(tiny_folder, tmp_path / "b", 2), 1.0),
    ]
    merge_in_sequence(tiny_folder, shares, "lora", FLOAT, tmp_path / "out", False)
    model = load_model(tmp_path / "out", FLOAT, "cpu")
    assert model.config.tie_word_embeddings is False
    head, words = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert torch.equal(words, weights_of(tiny_folder, None)["model.embed_tokens.weight"])
    whole = weights_of(tiny_folder, shares[0][0])["lm_head.weight"]
    torch.testing.assert_close(head, (words + whole) / 2)


def test_a_sequence_is_rounded_once_and_carries_the_tokenizer(tiny_folder: Path, tmp_path: Path, pair: Any) -> None:
    folders = [folder for folder, _ in pair]
    merge_in_sequence(tiny_folder, [(f, 1.0) for f in folders], "lora", torch.bfloat16, tmp_path / "out", False)
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {w.dtype for w in found.values()} == {torch.bfloat16}
    plain = load_shipped(tiny_folder, None, "lora", torch.bfloat16, "cpu").float()
    for folder in folders:
        plain = PeftModel.from_pretrained(plain, str(folder)).merge_and_unload()
    expected = dict(plain.named_parameters())
    assert all(torch.equal(w, expected[name].to(torch.bfloat16)) for name, w in found.items())
