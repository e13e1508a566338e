"""Training on a real tiny model: it learns, it is reproducible, and what is shipped is what was trained."""

import itertools
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from tasks.core.config import TrainConfig
from tasks.core.errors import ConfigError, ForgetlessError
from tasks.core.records import TrainPoint
from tasks.models.encode import Encoder, write_examples
from tasks.models.load import load_model, load_shipped
from tasks.models.tokenizer import load_tokenizer
from tasks.training.trainer import schedule, train_adapter


@pytest.fixture
def tokens(tiny_folder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "tokens"
    folder.mkdir()
    rows = [
        {"messages": [{"role": "user", "content": f"{a}+{b}?"}, {"role": "assistant", "content": f"= {a + b}."}]}
        for a in range(6)
        for b in range(6)
    ]
    encoder = Encoder(load_tokenizer(tiny_folder, "auto"))
    for split, part in (("train", rows[:30]), ("validation", rows[30:])):
        write_examples([encoder.encode([row["messages"] for row in part], 256)], folder / split)
    return folder


def config(**changes: object) -> TrainConfig:
    defaults = {"method": "lora", "rank": 4, "alpha": 8, "learning_rate": 2e-2, "epochs": 3, "step_tokens": 256}
    return TrainConfig(**{**defaults, "pack_tokens": 256, "max_tokens": 256, "dtype": "float32", **changes})


def train(base: Path, tokens: Path, out: Path, settings: TrainConfig) -> tuple[dict, list[TrainPoint]]:
    out.mkdir()
    points: list[TrainPoint] = []
    fields = train_adapter(base, tokens, settings, out, lambda s, n, point: points.append(point), False)
    return fields, points


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_training_lowers_the_validation_loss_and_ships_what_was_trained(
    tiny_folder: Path, tokens: Path, tmp_path: Path, method: str
) -> None:
    fields, points = train(tiny_folder, tokens, tmp_path / "a", config(method=method))
    assert fields["last_validation_loss"] < fields["first_validation_loss"] - 0.5
    assert fields["steps"] == len(points) == points[-1].step
    assert fields["supervised_tokens"] > 0
    assert (tmp_path / "a" / "adapter_model.safetensors").is_file()
    # The same logits from the model as trained (4-bit base and adapter) and from the merged weights.
    ids = torch.tensor([[1, 50, 60, 70, 80, 90]])
    trained = PeftModel.from_pretrained(
        load_model(tiny_folder, torch.float32, "cpu", nf4=method == "qlora"), str(tmp_path / "a")
    )
    shipped = load_shipped(tiny_folder, tmp_path / "a", method, torch.float32, "cpu")
    with torch.no_grad():
        difference = (trained(input_ids=ids).logits - shipped(input_ids=ids).logits).abs().max().item()
    assert difference < 1e-3
    assert not any("4bit" in type(m).__name__ for m in shipped.modules())


def test_the_same_seed_gives_the_same_adapter_byte_for_byte(tiny_folder: Path, tokens: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(tiny_folder, tokens, tmp_path / name, config(seed=seed, epochs=1))
    a, b, c = ((tmp_path / n / "adapter_model.safetensors").read_bytes() for n in "abc")
    assert a == b
    assert a != c


def test_an_adapter_with_b_zero_changes_nothing_at_all(tiny_folder: Path, tokens: Path, tmp_path: Path) -> None:
    train(tiny_folder, tokens, tmp_path / "a", config(learning_rate=0, epochs=1))
    base = load_model(tiny_folder, torch.float32, "cpu").state_dict()
    shipped = load_shipped(tiny_folder, tmp_path / "a", "lora", torch.float32, "cpu").state_dict()
    assert base.keys() == shipped.keys()
    assert all(torch.equal(base[name], shipped[name]) for name in base)


def test_modules_that_match_nothing_are_named(tiny_folder: Path, tokens: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"match nothing in this model. Its linear layers are: down_proj, gate_proj"):
        train(tiny_folder, tokens, tmp_path / "a", config(target_modules=["query"]))


def test_a_loss_that_is_no_number_stops_with_advice(
    tiny_folder: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "tasks.training.trainer.summed_loss",
        lambda model, pack, device: float("nan") * sum(p.sum() for p in model.parameters() if p.requires_grad),
    )
    with pytest.raises(ForgetlessError, match=r"the loss is nan. Lower train.learning_rate \(now 0.02\)"):
        train(tiny_folder, tokens, tmp_path / "a", config())


def test_schedules() -> None:
    cosine = [schedule(s, 10, "cosine", 0.2) for s in range(1, 11)]
    assert cosine[:3] == [0.5, 1.0, 1.0]
    assert all(a >= b for a, b in itertools.pairwise(cosine[2:]))
    assert 0 < cosine[-1] < 0.1
    assert [schedule(s, 4, "linear", 0) for s in range(1, 5)] == [1.0, 0.75, 0.5, 0.25]
    assert [schedule(s, 4, "constant", 0) for s in range(1, 5)] == [1.0] * 4
