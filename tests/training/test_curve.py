"""What a curve is said to show: a run that got away, rows learned by heart, or neither."""

import pytest

from tasks.core.records import TrainPoint
from tasks.training.curve import explain_onset, find_onset, runs_away


def curve(training: list[float], validation: dict[int, float]) -> list[TrainPoint]:
    return [
        TrainPoint(step=0, validation_loss=validation[0]),
        *(TrainPoint(step=s, loss=loss, validation_loss=validation.get(s)) for s, loss in enumerate(training, 1)),
    ]


FALLING = [3.0, 2.6, 2.3, 2.0, 1.7, 1.4, 1.1, 0.9]


@pytest.mark.parametrize(
    ("training", "validation", "onset"),
    [
        (FALLING, {0: 3.0, 2: 2.7, 4: 2.5, 6: 2.7, 8: 3.0}, 4),
        (FALLING, {0: 3.0, 2: 2.7, 4: 2.5, 6: 2.4, 8: 2.3}, None),  # still gains
        (FALLING, {0: 3.0, 2: 2.7, 4: 2.5, 6: 2.51, 8: 2.52}, None),  # noise
        (FALLING, {0: 3.0, 2: 2.7, 4: 2.5, 6: 2.9, 8: 2.5}, None),  # came back
        ([3.0] * 8, {0: 3.0, 2: 2.7, 4: 2.5, 6: 2.9, 8: 3.3}, None),  # the training loss does not fall: no heart
        (FALLING[:2], {0: 3.0, 2: 3.3}, None),  # too little to tell
        (FALLING, {0: 2.0, 2: 2.4, 4: 2.6, 8: 3.0}, None),  # nothing learned before it
    ],
)
def test_onset(training: list[float], validation: dict[int, float], onset: int | None) -> None:
    points = curve(training, validation)
    assert find_onset(points) == onset
    said = explain_onset(points, shipped=len(points))
    assert not said or "set train.early_stopping=2" in said
    if onset is not None:
        assert explain_onset(points, shipped=onset).endswith("learned by heart. That step ships.")
    assert said == "" if onset is None else said.startswith(f"From step {onset} on the validation loss rises (2.500 to")


def test_a_run_got_away_only_where_it_stays_worse_than_guessing() -> None:
    assert runs_away([2.0, 8.0, 8.1, 8.2], words=1000)
    assert not runs_away([2.0, 8.0, 7.8, 8.2], words=1000)  # guessing among 1,000 words costs 6.9
    assert not runs_away([9.0, 9.0], words=1000)
