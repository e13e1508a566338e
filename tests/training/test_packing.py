"""Packed conversations: nothing lost, nothing mixed, the same loss and gradients as one by one."""

from pathlib import Path

import pytest
import torch

from tasks.core.config import TrainConfig
from tasks.models.load import load_model
from tasks.models.template import Example
from tasks.training.packing import make_pack, pack_examples, plan_steps
from tasks.training.trainer import add_adapter, summed_loss


def examples(count: int = 7) -> list[Example]:
    generator = torch.Generator().manual_seed(3)
    result = []
    for i in range(count):
        ids = torch.randint(10, 4000, (9 + 5 * i,), generator=generator).tolist()
        result.append(Example(ids, [p >= 4 for p in range(len(ids))]))
    return result


def test_a_pack_holds_every_label_of_its_examples_and_restarts_positions() -> None:
    pack = make_pack(examples(3))
    assert pack.tokens == 9 + 14 + 19
    assert pack.supervised == sum(sum(e.supervised) for e in examples(3))
    assert pack.positions[0].tolist() == [*range(9), *range(14), *range(19)]
    assert pack.labels.tolist() == [i for e in examples(3) for i, s in zip(e.ids, e.supervised, strict=True) if s]


def test_the_first_token_of_an_example_is_never_a_label() -> None:
    pack = make_pack([Example([1, 2], [True, True]), Example([3, 4], [True, True])])
    assert pack.labels.tolist() == [2, 4]
    assert pack.kept.tolist() == [0, 2]


def test_packs_hold_all_examples_in_order_and_respect_the_budget() -> None:
    packs = pack_examples(examples(), 60)
    assert [t for p in packs for t in p.ids[0].tolist()] == [t for e in examples() for t in e.ids]
    assert all(p.tokens <= 60 for p in packs)


def test_steps_are_deterministic_and_each_epoch_has_its_own_order() -> None:
    first = plan_steps(examples(), 60, 120, 2, None, seed=1)
    again = plan_steps(examples(), 60, 120, 2, None, seed=1)
    other = plan_steps(examples(), 60, 120, 2, None, seed=2)

    def flat(steps: list) -> list[int]:
        return [t for step in steps for p in step for t in p.ids[0].tolist()]

    assert flat(first) == flat(again)
    assert flat(first) != flat(other)
    assert sorted(flat(first)) == sorted(2 * [t for e in examples() for t in e.ids])
    half = len(flat(first)) // 2
    assert flat(first)[:half] != flat(first)[half:]


def test_a_part_of_an_epoch_takes_its_share_and_max_steps_stops_it() -> None:
    assert sum(p.examples for s in plan_steps(examples(), 60, 60, 0.5, None, 1) for p in s) == 4
    assert len(plan_steps(examples(), 60, 60, 9, 3, 1)) == 3


@pytest.mark.parametrize("pack_tokens", [1, 60, 1000])
def test_packing_and_accumulation_change_neither_loss_nor_gradients(tiny_folder: Path, pack_tokens: int) -> None:
    def run(packs: list) -> tuple[float, list[torch.Tensor]]:
        torch.manual_seed(0)
        model = add_adapter(load_model(tiny_folder, torch.float32, "cpu"), TrainConfig(rank=4))
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.normal_(std=0.05)
        labels = sum(p.supervised for p in packs)
        total = 0.0
        for pack in packs:
            loss = summed_loss(model, pack, "cpu") / labels
            loss.backward()
            total += loss.item()
        return total, [p.grad for p in model.parameters() if p.requires_grad]

    alone, alone_gradients = run([make_pack([e]) for e in examples()])
    packed, gradients = run(pack_examples(examples(), pack_tokens))
    assert packed == pytest.approx(alone, abs=1e-5)
    assert max((a - b).abs().max().item() for a, b in zip(alone_gradients, gradients, strict=True)) < 1e-4


def test_an_example_does_not_see_its_neighbour(tiny_folder: Path) -> None:
    model = load_model(tiny_folder, torch.float32, "cpu")
    last = examples()[-1]
    with torch.no_grad():
        one = summed_loss(model, make_pack([last]), "cpu").item()
        first, second = (make_pack([Example([t] * 30, [False] * 30), last]) for t in (11, 3999))
        assert summed_loss(model, first, "cpu").item() == pytest.approx(one, abs=1e-3)
        assert summed_loss(model, second, "cpu").item() == pytest.approx(one, abs=1e-3)
