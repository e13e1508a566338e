"""What a training curve says: whether it still gains, whether it runs away, and from where it learns rows by heart."""

import math
from collections.abc import Sequence

from tasks.core.records import TrainPoint

RISE = 0.01  # of the best validation loss: less is the noise of a few hundred held-out tokens
BAD_STEPS = 3


def runs_away(losses: Sequence[float], words: int) -> bool:
    """Return whether the last steps' losses are all a nat and more above that of guessing among `words`: the model is
    then surely wrong, and no later step of this learning rate mends it."""
    return len(losses) >= BAD_STEPS and all(loss > math.log(words) + 1 for loss in losses[-BAD_STEPS:])


def find_onset(curve: Sequence[TrainPoint]) -> int | None:
    """Return the step of the best validation loss where, to the end, it stays above that by more than noise while the
    training loss goes on falling; None where no overfitting shows."""
    checked = [p for p in curve if p.validation_loss is not None]
    if len(checked) < 3:
        return None
    best = min(range(len(checked)), key=lambda i: checked[i].validation_loss or 0.0)
    lowest = checked[best].validation_loss or 0.0
    later = checked[best + 1 :]
    if not later or any((p.validation_loss or 0.0) <= lowest * (1 + RISE) for p in later):
        return None
    before = [p.loss for p in curve if p.loss is not None and p.step <= checked[best].step]
    after = [p.loss for p in curve if p.loss is not None and p.step > checked[best].step]
    if not before or not after or min(after) >= sum(before[-3:]) / len(before[-3:]):
        return None
    return checked[best].step


def explain_onset(curve: Sequence[TrainPoint], shipped: int) -> str:
    """Return a sentence on overfitting and what to do about it, or nothing where none shows. The adapter of step
    `shipped` is what ships."""
    onset = find_onset(curve)
    if onset is None:
        return ""
    checked = [p for p in curve if p.validation_loss is not None]
    lowest = next(p.validation_loss for p in checked if p.step == onset)
    last = checked[-1].validation_loss
    advice = "That step ships." if shipped == onset else "Train fewer epochs, or set train.early_stopping=2."
    return (
        f"From step {onset} on the validation loss rises ({lowest:.3f} to {last:.3f}) while the training loss falls: "
        f"the rows are learned by heart. {advice}"
    )
