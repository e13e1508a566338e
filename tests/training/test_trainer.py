"""Training on a real tiny model: it learns, it is reproducible, and what is shipped is what was trained."""

import errno
import itertools
import math
import os
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from peft import PeftModel

from tasks.core.config import TrainConfig
from tasks.core.errors import ConfigError, DataError, ForgetlessError, StoreError
from tasks.core.records import TrainPoint
from tasks.models.load import load_model, load_shipped
from tasks.training import trainer
from tasks.training.checkpoints import Progress, load_checkpoint, save_checkpoint
from tasks.training.packing import Pack
from tasks.training.trainer import Places, schedule, train_adapter


def config(**changes: object) -> TrainConfig:
    defaults = {"method": "lora", "rank": 4, "alpha": 8, "learning_rate": 2e-2, "epochs": 3, "step_tokens": 256}
    return TrainConfig(**{**defaults, "pack_tokens": 256, "max_tokens": 64, "dtype": "float32", **changes})


def places(base: Path, tokens: Path, out: Path) -> Places:
    out.mkdir(exist_ok=True)
    return Places(base, tokens, out, out.with_name(f"{out.name}-checkpoints"))


def train(base: Path, tokens: Path, out: Path, settings: TrainConfig) -> tuple[dict[str, Any], list[TrainPoint]]:
    points: list[TrainPoint] = []
    found = train_adapter(places(base, tokens, out), settings, lambda s, n, point: points.append(point), False)
    return found, points


class Stop(Exception):
    pass


def train_until(step: int, base: Path, tokens: Path, out: Path, settings: TrainConfig) -> None:
    """Train, and die right after a step, as a killed process would: nothing is cleaned up."""

    def on_step(number: int, steps: int, point: TrainPoint) -> None:
        if number == step:
            raise Stop

    with pytest.raises(Stop):
        train_adapter(places(base, tokens, out), settings, on_step, False)


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


def test_adapters_of_steps_on_the_way_are_kept(tiny_folder: Path, tokens: Path, tmp_path: Path) -> None:
    plain, _ = train(tiny_folder, tokens, tmp_path / "plain", config())
    fields, _ = train(tiny_folder, tokens, tmp_path / "a", config(snapshots=2))
    steps = fields["steps"]
    assert fields["snapshots"] == [steps // 3, 2 * steps // 3]
    assert plain["snapshots"] == []
    weights = [
        (folder / "adapter_model.safetensors").read_bytes()
        for folder in (tmp_path / "a", *sorted((tmp_path / "a" / "snapshots").iterdir()))
    ]
    assert len(set(weights)) == 3
    assert weights[0] == (tmp_path / "plain" / "adapter_model.safetensors").read_bytes(), "keeping them changes nothing"
    early = tmp_path / "a" / "snapshots" / f"{steps // 3:06}"
    load_shipped(tiny_folder, early, "lora", torch.float32, "cpu")


def test_an_adapter_with_b_zero_changes_nothing_at_all(tiny_folder: Path, tokens: Path, tmp_path: Path) -> None:
    train(tiny_folder, tokens, tmp_path / "a", config(learning_rate=0, epochs=1))
    base = load_model(tiny_folder, torch.float32, "cpu").state_dict()
    shipped = load_shipped(tiny_folder, tmp_path / "a", "lora", torch.float32, "cpu").state_dict()
    assert base.keys() == shipped.keys()
    assert all(torch.equal(base[name], shipped[name]) for name in base)


@pytest.mark.parametrize("changes", [{}, {"method": "qlora"}, {"lora_dropout": 0.1}, {"optimizer": "adamw_8bit"}])
def test_two_resumptions_end_in_the_adapter_of_none(
    tiny_folder: Path, tokens: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    settings = config(checkpoint_minutes=0, **changes)  # after every step
    whole, points = train(tiny_folder, tokens, tmp_path / "whole", settings)
    assert len(points) >= 6
    for step in (2, 4):
        train_until(step, tiny_folder, tokens, tmp_path / "broken", settings)
    broken, rest = train(tiny_folder, tokens, tmp_path / "broken", settings)
    assert rest[0].step > 1
    assert "Resumed at step" in broken["notes"][-1]
    for name in ("adapter_model.safetensors", "adapter_config.json", "curve.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes(), name
    assert broken["tokens"] == whole["tokens"] and broken["steps"] == whole["steps"]


def test_a_half_written_checkpoint_is_not_taken_for_a_whole_one(
    tiny_folder: Path, tokens: Path, tmp_path: Path
) -> None:
    settings = config(checkpoint_minutes=0)
    train(tiny_folder, tokens, tmp_path / "whole", settings)
    train_until(3, tiny_folder, tokens, tmp_path / "broken", settings)
    last = tmp_path / "broken-checkpoints" / "last"
    last.rename(last.with_name("last.old"))  # a kill between the two renames
    last.mkdir()
    (last / "state.safetensors").write_bytes(b"half")
    found, _ = train(tiny_folder, tokens, tmp_path / "broken", settings)
    assert "Resumed" in found["notes"][0]
    whole, broken = ((tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("whole", "broken"))
    assert whole == broken


def test_no_space_for_checkpoints_is_said_before_any_step(
    tiny_folder: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("tasks.training.checkpoints.shutil.disk_usage", lambda _: usage(1, 1, 1 << 10))
    with pytest.raises(StoreError, match=r"need 0\.\d GiB, and .* has 0\.0 GiB free. Free some space"):
        train(tiny_folder, tokens, tmp_path / "a", config())


def test_a_disk_that_fills_up_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer, scaler = torch.optim.AdamW([parameter]), torch.amp.GradScaler("cpu", enabled=False)
    save_checkpoint(tmp_path, "last", [parameter], optimizer, scaler, Progress(step=1))
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr("tasks.training.checkpoints.save_file", Mock(side_effect=full))
    with pytest.raises(StoreError, match="checkpoint of step 2 could not be written to .*No space left on device"):
        save_checkpoint(tmp_path, "last", [parameter], optimizer, scaler, Progress(step=2))
    found = load_checkpoint(tmp_path, "last", [parameter], optimizer, scaler)
    assert found is not None
    assert found.step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_memory_that_runs_out_makes_packs_smaller_and_changes_no_step(
    tiny_folder: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(epochs=1, step_tokens=1024)
    whole, points = train(tiny_folder, tokens, tmp_path / "whole", settings)
    real = trainer._Run.loss

    def loss(self: Any, pack: Pack) -> torch.Tensor:
        if pack.ids.numel() > 100 and torch.is_grad_enabled():
            torch.empty(1 << 50)  # the allocator's own error
        return real(self, pack)

    monkeypatch.setattr(trainer._Run, "loss", loss)
    found, again = train(tiny_folder, tokens, tmp_path / "small", settings)
    assert found["notes"] == [
        "Memory ran out at step 1: packs of 128 tokens from there, steps unchanged.",
        "Memory ran out at step 1: packs of 64 tokens from there, steps unchanged.",
    ]
    assert [p.loss for p in again] == pytest.approx([p.loss for p in points], abs=1e-4)
    assert found["tokens"] == whole["tokens"]


def test_a_conversation_that_fits_in_no_way_is_said(
    tiny_folder: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = trainer._Run.loss

    def loss(self: Any, pack: Pack) -> torch.Tensor:
        return torch.empty(1 << 50) if torch.is_grad_enabled() else real(self, pack)

    monkeypatch.setattr(trainer._Run, "loss", loss)
    with pytest.raises(ForgetlessError, match=r"does not fit into memory. Lower train.max_tokens"):
        train(tiny_folder, tokens, tmp_path / "a", config())


def test_early_stopping_ships_the_best_step(tiny_folder: Path, tokens: Path, tmp_path: Path) -> None:
    settings = config(**BEST_OF, validate_every=1, early_stopping=2)
    found, points = train(tiny_folder, tokens, tmp_path / "a", settings)
    assert found["ended"] == "early stopping"
    assert found["steps"] == found["best_step"] + 2 == points[-1].step
    short, _ = train(tiny_folder, tokens, tmp_path / "b", config(**BEST_OF, max_steps=found["best_step"]))
    assert short["steps"] == found["best_step"]
    a, b = ((tmp_path / n / "adapter_model.safetensors").read_bytes() for n in "ab")
    assert a == b


BEST_OF: dict[str, Any] = {"learning_rate": 0.1, "schedule": "constant", "epochs": 20, "warmup_share": 0.0}


def test_a_time_limit_ends_after_the_step_at_work(tiny_folder: Path, tokens: Path, tmp_path: Path) -> None:
    found, points = train(tiny_folder, tokens, tmp_path / "a", config(epochs=50, max_minutes=0.0001))
    assert (found["ended"], found["steps"], len(points)) == ("time limit", 1, 1)
    assert points[-1].validation_loss is not None
    assert (tmp_path / "a" / "adapter_model.safetensors").is_file()


def test_the_loss_of_other_text_is_followed_too(tiny_folder: Path, tokens: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "The cat sat on the mat."}\n{"text": "Water is wet."}\n', encoding="utf-8")
    found, _ = train(tiny_folder, tokens, tmp_path / "a", config(retention_texts=str(texts)))
    followed = [p["retention_loss"] for p in found["curve"] if p["validation_loss"] is not None]
    assert all(loss > 0 for loss in followed)
    assert followed[0] != followed[-1]
    texts.write_text('{"text": "fine"}\n{"txt": "no"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"texts.jsonl:2: expected JSON Lines with a text each, found KeyError"):
        train(tiny_folder, tokens, tmp_path / "b", config(retention_texts=str(texts)))


def test_accumulation_in_any_cut_is_the_same_training(tiny_folder: Path, tokens: Path, tmp_path: Path) -> None:
    curves = []
    for size in (256, 90, 64):
        settings = config(epochs=1, max_tokens=64, pack_tokens=size, learning_rate=1e-3)
        _, points = train(tiny_folder, tokens, tmp_path / str(size), settings)
        curves.append([p.loss for p in points] + [p.grad_norm for p in points])
    assert curves[1] == pytest.approx(curves[0], abs=1e-4)
    assert curves[2] == pytest.approx(curves[0], abs=1e-4)


def test_activation_checkpointing_changes_nothing(tiny_folder: Path, tokens: Path, tmp_path: Path) -> None:
    for name, switch in (("a", "off"), ("b", "on")):
        train(tiny_folder, tokens, tmp_path / name, config(epochs=1, activation_checkpointing=switch))
    a, b = ((tmp_path / n / "adapter_model.safetensors").read_bytes() for n in "ab")
    assert a == b


def test_layers_that_give_another_loss_are_refused_before_the_first_step(
    tiny_folder: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "tasks.models.cpu_attention._probabilities", lambda q, k, r: torch.rand(*q.shape[:2], k.shape[1])
    )
    with pytest.raises(ForgetlessError, match=r"must change nothing, but the loss is .* Set train.fast_layers=off"):
        train(tiny_folder, tokens, tmp_path / "a", config())
    found, _ = train(tiny_folder, tokens, tmp_path / "b", config(fast_layers="off"))
    assert found["last_validation_loss"] < found["first_validation_loss"]


def test_modules_that_match_nothing_are_named(tiny_folder: Path, tokens: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"match nothing in this model"):
        train(tiny_folder, tokens, tmp_path / "a", config(target_modules=["query"]))


def test_a_loss_that_is_no_number_stops_with_advice(
    tiny_folder: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = trainer._Run.loss
    monkeypatch.setattr(
        trainer._Run, "loss", lambda self, pack: real(self, pack) * (math.nan if torch.is_grad_enabled() else 1)
    )
    with pytest.raises(ForgetlessError, match=r"the loss is nan. The last good checkpoint, of step 0.*\(now 0.02\)"):
        train(tiny_folder, tokens, tmp_path / "a", config())


def test_a_loss_worse_than_guessing_stops(
    tiny_folder: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = trainer._Run.loss
    monkeypatch.setattr(
        trainer._Run, "loss", lambda self, pack: real(self, pack) * (2 if torch.is_grad_enabled() else 1)
    )
    with pytest.raises(
        ForgetlessError, match=r"at step 3 of .*worse than guessing. The last good checkpoint, of step 2"
    ):
        train(tiny_folder, tokens, tmp_path / "a", config(learning_rate=1e-3))


def test_schedules() -> None:
    cosine = [schedule(s, 10, "cosine", 0.2) for s in range(1, 11)]
    assert cosine[:3] == [0.5, 1.0, 1.0]
    assert all(a >= b for a, b in itertools.pairwise(cosine[2:]))
    assert 0 < cosine[-1] < 0.1
    assert [schedule(s, 4, "linear", 0) for s in range(1, 5)] == [1.0, 0.75, 0.5, 0.25]
    assert [schedule(s, 4, "constant", 0) for s in range(1, 5)] == [1.0] * 4
    assert [schedule(s, 10, "wsd", 0.1) for s in (1, 2, 8, 9, 10)] == [1.0, 1.0, 1.0, 1.0, 0.5]
