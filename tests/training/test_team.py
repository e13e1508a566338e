"""Training in several processes: the same step, its conversations dealt out, whatever happens to one of them."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tasks.core.errors import ForgetlessError
from tasks.core.records import TrainPoint
from tasks.models.template import Example
from tasks.training.team import Team
from tests.training.test_trainer import config
from tests.training.test_worker import places, run


def test_two_processes_train_what_one_does(tiny_folder: Path, tokens: Path, tmp_path: Path) -> None:
    curves: dict[int, list[TrainPoint]] = {}
    for count in (1, 2):
        (tmp_path / str(count)).mkdir()
        curves[count] = []
        settings = config(epochs=2, processes=count, retention_texts=None, snapshots=1, dtype="float32")
        fields = run(
            places(tiny_folder, tokens, tmp_path / str(count) / "out"),
            settings,
            lambda *a, seen=curves[count]: seen.append(a[2]),
        )
        assert fields["steps"] == len(curves[count])
    alone, together = curves[1], curves[2]
    assert [p.loss for p in together] == pytest.approx([p.loss for p in alone], abs=1e-4)
    validated = [
        (p.validation_loss, q.validation_loss) for p, q in zip(alone, together, strict=True) if p.validation_loss
    ]
    assert validated and all(a == pytest.approx(b, abs=1e-4) for a, b in validated)
    assert [p.grad_norm for p in together] == pytest.approx([p.grad_norm for p in alone], rel=1e-3)
    one, two = (load_file(tmp_path / str(n) / "out" / "adapter_model.safetensors") for n in (1, 2))
    assert one.keys() == two.keys()
    # Adam divides by what a gradient usually is: sums of another order move an entry near zero by up to a step.
    moved = max(float((one[name] - two[name]).abs().max()) for name in one)
    size = max(float(one[name].abs().max()) for name in one)
    assert moved < 0.02 * size
    snapshots = [sorted(p.name for p in (tmp_path / str(n) / "out" / "snapshots").iterdir()) for n in (1, 2)]
    assert snapshots[0] == snapshots[1]


def test_two_processes_end_softly_and_go_on(tiny_folder: Path, tokens: Path, tmp_path: Path) -> None:
    where = places(tiny_folder, tokens, tmp_path / "out")
    settings = config(epochs=4, processes=2)

    class Enough(Exception):
        pass

    def stop(step: int, steps: int, point: TrainPoint) -> None:
        if step == 2:
            raise Enough

    with pytest.raises(Enough):
        run(where, settings, stop)
    fields = run(where, settings)
    assert "Resumed at step" in fields["notes"][0]


def test_one_process_that_dies_ends_the_other(tiny_folder: Path, tokens: Path, tmp_path: Path) -> None:
    where = places(tiny_folder, tokens, tmp_path / "out")

    def kill_follower() -> None:
        for place in Path("/proc").glob("[0-9]*"):
            try:
                words = (place / "cmdline").read_bytes().decode().split("\0")
                ranks = (place / "environ").read_bytes().decode().split("\0")
            except OSError:
                continue
            if str(tmp_path) in " ".join(words) and "RANK=1" in ranks:
                os.kill(int(place.name), signal.SIGABRT)

    killed = threading.Event()

    def on_step(step: int, steps: int, point: TrainPoint) -> None:
        if not killed.is_set():
            killed.set()
            kill_follower()

    began = time.monotonic()
    with pytest.raises(ForgetlessError, match=r"The training process ended with signal SIGABRT"):
        run(where, config(epochs=50, processes=2), on_step)
    assert time.monotonic() - began < 300


def test_shares_are_even_and_whole() -> None:
    examples = [Example(list(range(n)), [True] * n) for n in (9, 2, 7, 4, 4, 3, 8, 1)]
    found = []
    for rank in range(3):
        team = Team("cpu")
        team.rank, team.size = rank, 3
        found.append(team.share(examples))
    assert sorted(len(e.ids) for share in found for e in share) == sorted(len(e.ids) for e in examples)
    sizes = [sum(len(e.ids) for e in share) for share in found]
    assert max(sizes) - min(sizes) <= 2
