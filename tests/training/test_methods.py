"""Every training method on a real tiny model: it learns from packed rows, its files are the model that was trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy, log_softmax
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from tasks.core.config import TrainConfig
from tasks.core.errors import ConfigError
from tasks.models.load import load_model, load_shipped
from tasks.models.template import Example
from tasks.training.methods import add_adapter, open_trainable, parameter_groups, save_trained
from tasks.training.packing import Pack, make_pack

FLOAT = torch.float32
IDS = torch.tensor([[1, 50, 60, 70, 80, 90, 400, 3000]])
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "qlora": {"method": "qlora"},
    "int8": {"method": "int8"},
    "oft": {"method": "oft", "learning_rate": 0.1},
    "prefix": {"method": "prefix", "learning_rate": 0.3},
    "prompt": {"method": "prompt", "learning_rate": 0.3},
    "full": {"method": "full", "learning_rate": 5e-3},
    "dora": {"dora": True},
    "rslora": {"rslora": True},
    "gaussian": {"init": "gaussian"},
    "pissa": {"init": "pissa"},
    "olora": {"init": "olora"},
    "lora+": {"lora_plus_ratio": 16, "learning_rate": 5e-3},
    "patterns": {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"layers.0.mlp.up_proj": 4}},
    "whole": {"modules_to_save": ["embed_tokens", "norm"]},
    "head": {"modules_to_save": ["lm_head"], "learning_rate": 5e-3},
    "tied target": {"target_modules": ["q_proj", "embed_tokens"]},
    "qlora, all of it": {
        "method": "qlora",
        "dora": True,
        "rank_pattern": {"q_proj": 8},
        "alpha_pattern": {"v_proj": 4},
        "modules_to_save": ["lm_head"],
    },
    "pissa, all of it": {
        "init": "pissa",
        "dora": True,
        "rslora": True,
        "rank_pattern": {"q_proj": 8},
        "alpha_pattern": {"v_proj": 4},
        "modules_to_save": ["norm"],
    },
    "int8, whole head": {"method": "int8", "modules_to_save": ["lm_head"], "learning_rate": 5e-3},
    "oft, whole head": {"method": "oft", "modules_to_save": ["lm_head"], "learning_rate": 5e-3},
}
# Nats per token in 8 steps, of about 11: the model's weights are random, and a prompt hardly moves those.
LEARNED = {"prompt": 0.04}
MERGED = [name for name, options in VARIANTS.items() if options.get("method") not in ("prefix", "prompt")]


def config(**changes: Any) -> TrainConfig:
    defaults = {"method": "lora", "rank": 4, "alpha": 8, "learning_rate": 2e-2, "virtual_tokens": 6, "dtype": "float32"}
    return TrainConfig(**{**defaults, "max_tokens": 128, "pack_tokens": 256, **changes})


def pack() -> Pack:
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(10, 400, (9 + 5 * i,), generator=generator).tolist() for i in range(4)]
    return make_pack([Example(row, [place >= 4 for place in range(len(row))]) for row in rows])


def loss_of(model: Any, part: Pack) -> torch.Tensor:
    logits = model(input_ids=part.ids, position_ids=part.positions, use_cache=False, logits_to_keep=part.kept).logits
    return cross_entropy(logits[0].float(), part.labels) if part.supervised else logits.sum()


def open_model(base: Path, settings: TrainConfig, start_from: Path | None = None, dtype: torch.dtype = FLOAT) -> Any:
    return open_trainable(base, settings, dtype, "cpu", False, start_from)


def train(model: Any, settings: TrainConfig, steps: int = 8) -> list[float]:
    groups = parameter_groups(model, settings)
    for group in groups:
        group["lr"] = settings.learning_rate * group.pop("lr_scale")
    optimizer = torch.optim.AdamW(groups)
    parameters = [p for group in groups for p in group["params"]]
    losses = []
    for _ in range(steps):
        model.train()
        loss = loss_of(model, pack())
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits.float()


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_every_method_of_the_config_is_tried() -> None:
    methods = set(TrainConfig.model_fields["method"].annotation.__args__)
    assert methods == {options.get("method", "lora") for options in VARIANTS.values()}


# --- what each method learns, saves and ships -------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_it_learns_from_a_packed_row_and_ships_what_it_learned(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    settings = config(**VARIANTS[name])
    model = open_model(tiny_folder, settings)
    losses = train(model, settings)
    assert losses[-1] < losses[0] - LEARNED.get(settings.method, 0.1)
    trained = logits_of(model)
    save_trained(model, settings, tiny_folder, tmp_path / "out")
    shipped = load_shipped(tiny_folder, tmp_path / "out", settings.method, FLOAT, "cpu")
    base = logits_of(load_model(tiny_folder, FLOAT, "cpu"))
    difference = (logits_of(shipped) - trained).abs().max().item()
    # LLM.int8 also rounds what goes into a layer, which no shipped weights can repeat.
    assert difference < (0.1 if settings.method == "int8" else 2e-3)
    assert difference < (base - trained).abs().max().item() / 10
    assert not any("bit" in type(module).__name__ for module in shipped.modules())


@pytest.mark.parametrize("name", MERGED)
def test_the_merged_model_is_the_same_when_written_and_read_again(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    settings = config(**VARIANTS[name])
    model = open_model(tiny_folder, settings)
    train(model, settings, 2)
    save_trained(model, settings, tiny_folder, tmp_path / "out")
    shipped = load_shipped(tiny_folder, tmp_path / "out", settings.method, FLOAT, "cpu")
    shipped.save_pretrained(tmp_path / "merged")
    again = load_model(tmp_path / "merged", FLOAT, "cpu")
    assert torch.equal(logits_of(again), logits_of(shipped))
    trains_ends = {"lm_head", "embed_tokens"} & {*settings.modules_to_save, *settings.target_modules}
    assert again.config.tie_word_embeddings is not bool(trains_ends)


@pytest.mark.parametrize("name", MERGED)
def test_half_of_it_is_half_way_from_the_base(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    settings = config(**VARIANTS[name])
    model = open_model(tiny_folder, settings)
    train(model, settings, 2)
    save_trained(model, settings, tiny_folder, tmp_path / "out")

    def shipped(adapter: Path | None, strength: float = 1.0) -> dict[str, torch.Tensor]:
        loaded = load_shipped(tiny_folder, adapter, settings.method, FLOAT, "cpu", strength=strength)
        return dict(loaded.named_parameters(remove_duplicate=False))

    base, half, whole = shipped(None), shipped(tmp_path / "out", 0.5), shipped(tmp_path / "out")
    assert half.keys() == whole.keys()
    for weight, found in half.items():
        torch.testing.assert_close(found, (base[weight] + whole[weight]) / 2)
    assert any(not torch.equal(base[n], whole[n]) for n in whole)


@pytest.mark.parametrize("name", VARIANTS)
def test_it_computes_in_bfloat16_and_trains_in_float32(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    settings = config(**VARIANTS[name], dtype="bfloat16")
    model = open_model(tiny_folder, settings, dtype=torch.bfloat16)
    assert {p.dtype for g in parameter_groups(model, settings) for p in g["params"]} == {FLOAT}
    losses = train(model, settings)
    assert losses[-1] < losses[0] - LEARNED.get(settings.method, 0.1)
    trained = logits_of(model)
    save_trained(model, settings, tiny_folder, tmp_path / "out")
    shipped = load_shipped(tiny_folder, tmp_path / "out", settings.method, torch.bfloat16, "cpu")
    assert {p.dtype for p in shipped.base_model.parameters()} == {torch.bfloat16}
    base = logits_of(load_model(tiny_folder, torch.bfloat16, "cpu"))
    assert (logits_of(shipped) - trained).abs().mean() < (base - trained).abs().mean() / 10


@pytest.mark.parametrize("name", VARIANTS)
def test_equal_trainings_give_equal_bytes(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    elsewhere = tmp_path / "another place"
    elsewhere.mkdir()
    for file in tiny_folder.iterdir():
        (elsewhere / file.name).symlink_to(file)
    settings = config(**VARIANTS[name])
    for base, out in ((tiny_folder, "a"), (elsewhere, "b")):
        model = open_model(base, settings)
        train(model, settings, 2)
        save_trained(model, settings, base, tmp_path / out)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert not any(str(tmp_path).encode() in data or b"smollm" in data for data in files_of(tmp_path / "b").values())
    if settings.method != "full":
        assert set(files_of(tmp_path / "a")) == {"adapter_config.json", "adapter_model.safetensors"}
        found = json.loads(files_of(tmp_path / "a")["adapter_config.json"])
        names = found.get("target_modules") or []
        assert names == sorted(names)  # a set's order differs from process to process


@pytest.mark.parametrize("name", VARIANTS)
def test_an_untrained_adapter_begins_at_the_base(tiny_folder: Path, name: str) -> None:
    settings = config(**VARIANTS[name])
    model = open_model(tiny_folder, settings)
    if settings.method in ("prefix", "prompt"):
        return  # its virtual tokens are words from the start
    same = load_model(tiny_folder, FLOAT, "cpu", nf4=settings.method == "qlora", int8=settings.method == "int8")
    assert (logits_of(model) - logits_of(same)).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # rank x (inputs + outputs) of q, k, v, o, gate, up, down; two layers
        ("lora", 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))),
        ("pissa", 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))),
        ("patterns", 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128)) + 2 * 4 * (64 + 64)),
        ("dora", 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128)) + 2 * (2 * 64 + 2 * 32 + 2 * 128 + 64)),
        # blocks of 4 x 4 have 6 angles; 16 blocks over 64 inputs, 32 over 128
        ("oft", 2 * 6 * (6 * 16 + 32)),
        ("prefix", 6 * 2 * 2 * 2 * 16),  # tokens x (keys, values) x layers x key heads x size
        ("prompt", 6 * 64),
    ],
)
def test_trainable_parameters(tiny_folder: Path, name: str, expected: int) -> None:
    settings = config(**VARIANTS[name])
    groups = parameter_groups(open_model(tiny_folder, settings), settings)
    assert sum(p.numel() for group in groups for p in group["params"]) == expected


def test_full_trains_every_weight_once(tiny_folder: Path) -> None:
    settings = config(method="full", weight_decay=0.1)
    model = open_model(tiny_folder, settings)
    groups = parameter_groups(model, settings)
    assert sum(p.numel() for group in groups for p in group["params"]) == model.num_parameters()
    decays = {g["weight_decay"]: {p.ndim for p in g["params"]} for g in groups}
    assert decays == {0.1: {2}, 0.0: {1}}  # norms do not decay


def test_modules_to_save_are_those_named_and_no_others(tiny_folder: Path) -> None:
    settings = config(modules_to_save=["norm"])  # PEFT alone would also take every input_layernorm
    model = open_model(tiny_folder, settings)
    whole = [n for n, p in model.named_parameters() if p.requires_grad and "lora" not in n]
    assert whole == ["base_model.model.model.norm.modules_to_save.default.weight"]


def test_full_writes_a_model_that_stands_alone(tiny_folder: Path, tmp_path: Path) -> None:
    settings = config(method="full", dtype="bfloat16")
    model = open_model(tiny_folder, settings, dtype=torch.bfloat16)
    save_trained(model, settings, tiny_folder, tmp_path / "out")
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert alone.dtype == torch.bfloat16
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tiny_folder / "tokenizer.json").read_bytes()
    assert next(model.parameters()).dtype == FLOAT  # what is trained stays as it was


# --- the options' meaning ---------------------------------------------------------------------------------------------


def test_lora_plus_lets_b_learn_faster(tiny_folder: Path) -> None:
    settings = config(lora_plus_ratio=16)
    model = open_model(tiny_folder, settings)
    names = {id(p): n for n, p in model.named_parameters()}
    for group in parameter_groups(model, settings):
        kinds = {names[id(p)].split(".")[-3] for p in group["params"]}
        assert kinds == ({"lora_B"} if group["lr_scale"] == 16 else {"lora_A"})
    assert len(parameter_groups(model, config())) == 1


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_moved_the_base_ships_as_a_plain_lora_for_the_base_as_it_was(
    tiny_folder: Path, tmp_path: Path, init: str
) -> None:
    settings = config(init=init, rslora=True, rank_pattern={"q_proj": 8}, alpha_pattern={"v_proj": 4})
    model = open_model(tiny_folder, settings)
    moved = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj.base_layer").weight
    original = load_model(tiny_folder, FLOAT, "cpu")
    assert (moved - original.model.layers[0].self_attn.q_proj.weight).abs().max() > 1e-3
    train(model, settings)
    save_trained(model, settings, tiny_folder, tmp_path / "out")
    plain = PeftModel.from_pretrained(original, str(tmp_path / "out"))
    assert (logits_of(plain) - logits_of(model)).abs().max() < 1e-3
    found = plain.peft_config["default"]
    assert (found.r, found.rank_pattern, found.use_rslora, found.init_lora_weights) == (8, {"q_proj": 16}, False, True)


@torch.no_grad()
def test_int8_ships_the_base_that_it_was_trained_on(smollm_folder: Path, tmp_path: Path) -> None:
    from tasks.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(smollm_folder, "auto")
    texts = ["The library opens at nine and is shut on Sundays.", "请问去车站怎么走？", "Water boils at 100 degrees."]
    rows = [tokenizer(text)["input_ids"] for text in texts]
    part = make_pack([Example(row, [True] * len(row)) for row in rows])
    settings = config(method="int8", rank=8, alpha=16)
    model = open_model(smollm_folder, settings)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(len(name)))
    save_trained(model, settings, smollm_folder, tmp_path / "out")
    # Rows with a single one pass the rounding of inputs unharmed: they read out the weights that a layer computes with.
    layer = model.get_submodule("base_model.model.model.layers.3.self_attn.q_proj.base_layer")
    held = layer(torch.eye(layer.in_features)).T
    dequantised = load_shipped(smollm_folder, None, "int8", FLOAT, "cpu").model.layers[3].self_attn.q_proj.weight
    original = load_model(smollm_folder, FLOAT, "cpu").model.layers[3].self_attn.q_proj.weight
    assert (held - dequantised).abs().max() < (held - original).abs().max() / 100

    def words(of: Any) -> torch.Tensor:
        return log_softmax(of.eval()(input_ids=part.ids, position_ids=part.positions).logits[0].float(), -1)

    trained = words(model)
    shipped = words(load_shipped(smollm_folder, tmp_path / "out", "int8", FLOAT, "cpu"))
    base = words(load_model(smollm_folder, FLOAT, "cpu"))
    kl, far = ((trained.exp() * (trained - other)).sum(-1).mean().item() for other in (shipped, base))
    same = (trained.argmax(-1) == shipped.argmax(-1)).float().mean().item()

    # What remains is LLM.int8's rounding of what goes into a layer: 0.02 on this base without an adapter.
    assert kl < min(0.1, far / 2)
    assert same > 0.75


# --- virtual tokens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_every_example_sees_the_virtual_tokens_and_no_neighbour(tiny_folder: Path, method: str, attention: str) -> None:
    settings = config(**VARIANTS[method])
    model = open_model(tiny_folder, settings).eval()
    model.base_model.set_attn_implementation(attention)
    generator = torch.Generator().manual_seed(3)
    rows = [[7, 8, 9, *torch.randint(10, 400, (6 + i,), generator=generator).tolist()] for i in range(3)]
    packed = make_pack([Example(row, [True] * len(row)) for row in rows])
    with torch.no_grad():
        together = model(input_ids=packed.ids, position_ids=packed.positions).logits[0]
        # PEFT's own forward, which is right for a text alone.
        alone = [
            super(type(model), model).forward(input_ids=torch.tensor([row])).logits[0][-len(row) :] for row in rows
        ]
        assert (together - torch.cat(alone)).abs().max() < 1e-4
        # Padded on the left, as lm-eval does, and with a prefix that the examples share.
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        padded = model(input_ids=ids, attention_mask=mask).logits
        for found, expected in zip(padded, alone, strict=True):
            assert (found[-len(expected) :] - expected).abs().max() < 1e-4
        shared = torch.tensor([[7, 8, 9, *(i for row in rows for i in row[3:])]])
        places = torch.tensor([[0, 1, 2, *(p for row in rows for p in range(3, len(row)))]])
        starts = [3, 3 + len(rows[0]) - 3, 0, 0]
        found = model(input_ids=shared, position_ids=places, starts=starts).logits[0]
        assert (found[3:] - torch.cat([a[3:] for a in alone])).abs().max() < 1e-4


def test_virtual_tokens_begin_as_words_of_the_model(tiny_folder: Path) -> None:
    """A prefix that is the keys and values of some words does what a prompt of these words does."""
    prefix, prompt = (logits_of(open_model(tiny_folder, config(method=m))) for m in ("prefix", "prompt"))
    assert (prefix - prompt).abs().max() < 1e-4
    other = logits_of(open_model(tiny_folder, config(method="prompt", seed=1)))
    assert (other - prompt).abs().max() > 1e-2


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_generation_in_a_padded_batch_is_that_of_each_text_alone(
    tiny_folder: Path, tmp_path: Path, method: str
) -> None:
    settings = config(**VARIANTS[method])
    model = open_model(tiny_folder, settings)
    train(model, settings)
    save_trained(model, settings, tiny_folder, tmp_path / "out")
    shipped = load_shipped(tiny_folder, tmp_path / "out", method, FLOAT, "cpu")
    rows = [[11, 12, 13, 14, 15], [200, 201]]

    def greedy(row: list[int]) -> list[int]:
        row = list(row)
        for _ in range(6):
            with torch.no_grad():
                row.append(int(shipped(input_ids=torch.tensor([row])).logits[0, -1].argmax()))
        return row

    made = shipped.generate(
        input_ids=torch.tensor([rows[0], [0, 0, 0, *rows[1]]]),
        attention_mask=torch.tensor([[1] * 5, [0, 0, 0, 1, 1]]),
        max_length=11,
        do_sample=False,
        eos_token_id=-1,
        pad_token_id=0,
    )
    assert made[0].tolist() == greedy(rows[0])
    assert made[1][3:].tolist() == greedy(rows[1])


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_scoring_sees_the_virtual_tokens(tiny_folder: Path, tmp_path: Path, method: str) -> None:
    from tasks.evaluation.prefix_lm import SharedPrefixLM
    from tasks.models.tokenizer import load_tokenizer

    settings = config(**VARIANTS[method])
    model = open_model(tiny_folder, settings)
    train(model, settings)
    save_trained(model, settings, tiny_folder, tmp_path / "out")
    shipped = load_shipped(tiny_folder, tmp_path / "out", method, FLOAT, "cpu")
    backend = SharedPrefixLM(shipped, load_tokenizer(tiny_folder, "auto"), None, lambda done, total: None)
    assert backend.max_length == 1024 - settings.virtual_tokens
    requests = [(None, [21, 22, 23], [24, 25]), (None, [21, 22, 23], [30]), (None, [21, 22], [90, 91, 92])]
    scores = backend._loglikelihood_tokens(requests)
    for (_, context, ending), (found, _) in zip(requests, scores, strict=True):
        with torch.no_grad():
            words = log_softmax(model.eval()(input_ids=torch.tensor([context + ending])).logits[0].float(), -1)
        expected = sum(words[len(context) - 1 + i, token].item() for i, token in enumerate(ending))
        assert found == pytest.approx(expected, abs=1e-3)


# --- going on from an adapter -----------------------------------------------------------------------------------------

SAME_AGAIN = {"init": "default", "rank": 8, "alpha": 8}


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "pissa, all of it"])
def test_training_goes_on_from_what_was_saved(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    settings = config(**VARIANTS[name])
    model = open_model(tiny_folder, settings)
    train(model, settings)
    save_trained(model, settings, tiny_folder, tmp_path / "out")
    if settings.init in ("pissa", "olora"):
        settings = config(**{**VARIANTS[name], **SAME_AGAIN})
    resumed = open_model(tiny_folder, settings, start_from=tmp_path / "out")
    assert (logits_of(resumed) - logits_of(model)).abs().max() < 1e-3
    # A new optimizer knows no scale yet: its first steps are small ones.
    gentle = settings.model_copy(update={"learning_rate": settings.learning_rate / 20})
    losses = train(resumed, gentle, 3)
    assert losses[-1] < losses[0] < loss_of(open_model(tiny_folder, settings), pack()).item()


def saved(base: Path, out: Path, **options: Any) -> Path:
    settings = config(**options)
    save_trained(open_model(base, settings), settings, base, out)
    return out


@pytest.mark.parametrize(
    ("made", "wanted", "sentence"),
    [
        ({}, {"method": "oft"}, r"is LORA, which does not go on as OFT. Set train.method=lora, qlora or int8."),
        ({"method": "prefix"}, {}, r"is PREFIX_TUNING, .* Set train.method=prefix."),
        ({}, {"rank": 8, "alpha": 16}, r"has rank 4, and the recipe 8. Set train.rank=4.\n.*has alpha 8, .* 16."),
        ({"dora": True}, {}, r"has dora True, and the recipe False. Set train.dora=true."),
        ({"method": "prompt"}, {"method": "prompt", "virtual_tokens": 9}, r"has virtual_tokens 6, and the recipe 9."),
        ({"target_modules": ["q_proj"]}, {}, r'adapts other layers.*Set train.target_modules=\["q_proj"\]'),
        ({}, {"modules_to_save": ["lm_head"]}, r"lm_head.weight \(only in the recipe\)"),
        ({}, {"method": "full"}, r"is not a whole model \(it has no config.json\)"),
        ({"method": "full"}, {}, r"is no adapter .* it is a whole model: name it as model.base"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    tiny_folder: Path, tmp_path: Path, made: dict[str, Any], wanted: dict[str, Any], sentence: str
) -> None:
    folder = saved(tiny_folder, tmp_path / "out", **made)
    with pytest.raises(ConfigError, match=sentence):
        open_model(tiny_folder, config(**wanted), start_from=folder)


@pytest.mark.parametrize("method", ["lora", "oft", "prefix", "prompt", "full"])
def test_an_adapter_of_another_base_is_refused(
    tiny_folder: Path, smollm_folder: Path, tmp_path: Path, method: str
) -> None:
    folder = saved(tiny_folder, tmp_path / "out", method=method)
    with pytest.raises(ConfigError, match=r"another base: .*here|another architecture than the base: .*in the base"):
        open_model(smollm_folder, config(method=method), start_from=folder)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"target_modules": ["query", "q_pro", "v_proj"]},
            r"\['query', 'q_pro'\] match nothing in this model. Its linear layers are: down_proj, gate_proj, .*"
            r"all-linear takes them all. Did you mean \[.*q_proj.*\]\?",
        ),
        ({"target_modules": "q_proj"}, r"'q_proj' match nothing in this model.*Did you mean \[.*q_proj"),
        ({"target_modules": "q_proj("}, r"is not a valid regular expression"),
        ({"rank_pattern": {"query_proj": 2}}, r"train.rank_pattern 'query_proj' matches none of the adapter's layers"),
        ({"alpha_pattern": {"lm_head": 2}}, r"train.alpha_pattern 'lm_head' matches none"),
        ({"modules_to_save": ["head"]}, r"train.modules_to_save 'head' matches nothing.*Did you mean \[lm_head\]"),
        ({"method": "qlora", "modules_to_save": ["q_proj"]}, r"qlora holds these in few bits"),
        ({"init": "pissa", "rank": 48}, r"train.init pissa does not fit .*k_proj: .* rank of at most 32, .* and 48"),
        ({"method": "oft", "rank": 10}, r"train.rank 10 is the side .* has 64. 8 would fit it."),
        ({"method": "prompt", "virtual_tokens": 1000}, r"make 1128 tokens, and this model sees 1024 at most"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(tiny_folder: Path, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        open_model(tiny_folder, config(**options))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"method": "oft", "dora": True, "lora_dropout": 0.1},
            r"dora, lora_dropout: only for method lora, qlora or int8",
        ),
        ({"method": "qlora", "init": "olora"}, r"init olora changes the base's weights, which qlora rounds"),
        ({"init": "pissa", "start_from": "run-1"}, r"init pissa begins an adapter anew, and start_from goes on"),
        ({"method": "int8", "dora": True}, r"dora does not work with int8"),
        ({"method": "oft", "rank": 1}, r"must be at least 2"),
        ({"method": "full", "modules_to_save": ["norm"]}, r"no modules_to_save with full"),
        ({"method": "prefix", "activation_checkpointing": "on"}, r"would drop the virtual tokens of method prefix"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_with_the_recipe(
    options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        config(**options)


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_activation_checkpointing_would_drop_the_virtual_tokens(tiny_folder: Path, method: str) -> None:
    model = open_model(tiny_folder, config(method=method))
    model.base_model.gradient_checkpointing_enable()
    with pytest.raises(ConfigError, match="no activation checkpointing"):
        model.train()(input_ids=IDS)


# --- another family ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lora", "pissa", "dora", "prefix", "prompt", "full", "rslora"])
def test_gpt2_whose_layers_are_transposed_and_have_other_names(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    shape = {"vocab_size": 3100, "n_positions": 256, "n_embd": 32, "n_layer": 2, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).save_pretrained(tmp_path / "gpt2")
    settings = config(**VARIANTS[name])
    model = open_model(tmp_path / "gpt2", settings)
    assert train(model, settings, 12)[-1] < loss_of(load_model(tmp_path / "gpt2", FLOAT, "cpu"), pack()).item()
    save_trained(model, settings, tmp_path / "gpt2", tmp_path / "out")
    shipped = load_shipped(tmp_path / "gpt2", tmp_path / "out", settings.method, FLOAT, "cpu")
    assert (logits_of(shipped) - logits_of(model)).abs().max() < 1e-3


@pytest.mark.parametrize("options", [{"method": "oft"}, {"init": "olora"}])
def test_gpt2_refuses_what_its_layers_cannot_have(options: dict[str, Any]) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_positions=256, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(ConfigError, match=r"does not fit"):
        add_adapter(model, config(**options))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, which no machine of ours has had")
def test_gpu_kernels_give_the_loss_of_the_librarys_layers(tiny_folder: Path, tmp_path: Path) -> None:
    pack = make_pack([Example(list(range(5, 40)), [True] * 35), Example(list(range(50, 70)), [True] * 20)])
    losses = []
    for layers in ("auto", "off"):
        config = TrainConfig(method="lora", rank=4, alpha=8, fast_layers=layers)
        model = open_trainable(tiny_folder, config, torch.bfloat16, "cuda", False, None)
        logits = model(input_ids=pack.ids.cuda(), position_ids=pack.positions.cuda(), use_cache=False).logits
        losses.append(torch.nn.functional.cross_entropy(logits[0, pack.kept].float(), pack.labels.cuda()).item())
    assert losses[0] == pytest.approx(losses[1], abs=0.02)
