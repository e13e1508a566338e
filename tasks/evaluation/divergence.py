"""How far a tuned model's next words are from the base's on text of the base's own kind: drift that no choice shows."""

from typing import Any

import torch

from tasks.core.paired import mean_change_interval
from tasks.core.records import TaskScore

TEXTS, TOKENS = 32, 128


@torch.inference_mode()
def base_divergence(base: Any, tuned: Any, tokenizer: Any, texts: list[str]) -> list[float]:
    """Return the mean Kullback-Leibler divergence of `tuned` from `base`, nats a token, over the first tokens of
    each of the first texts; those of one token are left out."""
    found = []
    for text in texts[:TEXTS]:
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=TOKENS)["input_ids"].to(base.device)
        if ids.shape[1] > 1:
            old, new = (
                model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1) for model in (base, tuned)
            )
            found.append(torch.nn.functional.kl_div(new, old, log_target=True, reduction="none").sum(-1).mean().item())
    return found


def with_divergence(score: TaskScore, found: list[float]) -> TaskScore:
    """Return a task's scores with the mean divergence and its 95 % interval over texts."""
    if len(found) < 2:
        return score
    interval = mean_change_interval(found)
    kl = {"kl": sum(found) / len(found), "kl_low": interval.low, "kl_high": interval.high}
    return score.model_copy(update=kl)
