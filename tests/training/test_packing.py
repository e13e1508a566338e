"""Packed conversations: nothing lost, nothing mixed, nothing computed twice."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from tasks.models.load import load_model
from tasks.models.template import Example
from tasks.training.packing import Pack, common_prefix, make_pack, pack_examples, plan_steps


def examples(count: int = 7) -> list[Example]:
    generator = torch.Generator().manual_seed(3)
    result = []
    for i in range(count):
        ids = torch.randint(10, 4000, (9 + 5 * i,), generator=generator).tolist()
        result.append(Example(ids, [p >= 4 for p in range(len(ids))]))
    return result


def test_a_pack_holds_every_label_of_its_examples_and_restarts_positions() -> None:
    pack = make_pack(examples(3))
    assert pack.tokens == pack.ids.numel() == 9 + 14 + 19
    assert pack.supervised == sum(sum(e.supervised) for e in examples(3))
    assert pack.positions[0].tolist() == [*range(9), *range(14), *range(19)]
    assert pack.labels.tolist() == [i for e in examples(3) for i, s in zip(e.ids, e.supervised, strict=True) if s]


def test_the_first_token_of_an_example_is_never_a_label() -> None:
    pack = make_pack([Example([1, 2], [True, True]), Example([3, 4], [True, True])])
    assert pack.labels.tolist() == [2, 4]
    assert pack.kept.tolist() == [0, 2]


def test_a_shared_prefix_is_laid_down_once_and_every_label_stays_behind_its_own_token() -> None:
    prompt = list(range(100, 112))
    rows = [Example([*prompt, *own], [False] * 12 + [True] * len(own)) for own in ([1, 2, 3], [4, 5], [1, 9])]
    pack = make_pack(rows, share_prefix=True)
    assert pack.ids[0].tolist() == [*prompt, 1, 2, 3, 4, 5, 1, 9]
    assert pack.positions[0].tolist() == [*range(12), 12, 13, 14, 12, 13, 12, 13]
    assert (pack.prefix, pack.starts, pack.tokens) == (12, [12, 15, 17, 19], 3 * 12 + 7)
    assert pack.labels.tolist() == [1, 2, 3, 4, 5, 1, 9]
    assert pack.kept.tolist() == [11, 12, 13, 11, 15, 11, 17]  # each first answer follows the prefix's last token


@pytest.mark.parametrize(
    ("rows", "shared"),
    [
        ([[*range(20), 1], [*range(20), 2]], 20),
        ([[*range(20), 1], [*range(5), 2]], 0),  # too short to be worth it
        ([[*range(20), 1]], 0),
        ([list(range(20)), list(range(20))], 19),  # the same: the last token of each stays its own
    ],
)
def test_what_examples_share(rows: list[list[int]], shared: int) -> None:
    assert common_prefix([Example(ids, [False] * (len(ids) - 1) + [True]) for ids in rows]) == shared


def test_no_learned_token_is_shared() -> None:
    ids = list(range(30))
    assert common_prefix([Example(ids, [p >= 10 for p in range(30)])] * 2) == 10


@pytest.mark.parametrize(("budget", "lanes"), [(60, 1), (60, 2), (25, 2), (1000, 2), (1, 3)])
def test_packs_hold_all_examples_once_and_respect_the_budget(budget: int, lanes: int) -> None:
    packs = pack_examples(examples(), budget, lanes=lanes)
    assert sorted(t for p in packs for t in p.ids[0].tolist()) == sorted(t for e in examples() for t in e.ids)
    assert all(p.tokens <= budget or p.examples == 1 for p in packs)
    assert len(packs) % lanes == 0 or len(packs) == len(examples())


def test_steps_are_deterministic_and_each_epoch_has_its_own_order() -> None:
    def flat(steps: list[list[Example]]) -> list[int]:
        return [t for step in steps for e in step for t in e.ids]

    first = plan_steps(examples(), 120, 2, None, seed=1)
    assert flat(first) == flat(plan_steps(examples(), 120, 2, None, seed=1))
    assert flat(first) != flat(plan_steps(examples(), 120, 2, None, seed=2))
    assert sorted(flat(first)) == sorted(2 * [t for e in examples() for t in e.ids])
    half = len(flat(first)) // 2
    assert flat(first)[:half] != flat(first)[half:]


def test_steps_are_of_even_size_and_no_example_is_lost() -> None:
    many = examples() * 9
    steps = plan_steps(many, 200, 1, None, seed=3)
    sizes = [sum(len(e.ids) for e in step) for step in steps]
    assert sum(sizes) == sum(len(e.ids) for e in many)
    assert len(steps) == round(sum(sizes) / 200)
    assert max(sizes) - min(sizes) <= 2 * max(len(e.ids) for e in many)


def test_a_part_of_an_epoch_takes_its_share_and_max_steps_stops_it() -> None:
    assert sum(map(len, plan_steps(examples(), 60, 0.5, None, 1))) == 4
    assert len(plan_steps(examples(), 60, 9, 3, 1)) == 3


def loss_of(model: Any, pack: Pack) -> torch.Tensor:
    logits = model(input_ids=pack.ids, position_ids=pack.positions, use_cache=False, logits_to_keep=pack.kept).logits
    return cross_entropy(logits[0], pack.labels, reduction="sum")


def test_an_example_does_not_see_its_neighbour(tiny_folder: Path) -> None:
    model = load_model(tiny_folder, torch.float32, "cpu")
    last = examples()[-1]
    with torch.no_grad():
        one = loss_of(model, make_pack([last])).item()
        first, second = (make_pack([Example([t] * 30, [False] * 30), last]) for t in (11, 3999))
        assert loss_of(model, first).item() == pytest.approx(one, abs=1e-3)
        assert loss_of(model, second).item() == pytest.approx(one, abs=1e-3)
