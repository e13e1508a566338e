"""How often the intervals hold what they say, and the verdict errs: python -m tests.bench.statistics [--json FILE].

Data with a known effect, 2,000 times each; right and wrong answers are enumerated instead. Figures are in
STATISTICS.md.
"""

import argparse
import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tasks.core import paired
from tasks.core.paired import PairedChange
from tests.core.test_paired import clustered_flips, documents, outcomes, rejections, simulate

Case = tuple[str, str, Callable[..., Any], tuple[Any, ...]]


def enumerate_accuracy(n: int, discordance: float) -> tuple[float, float]:
    """Return the coverage of right/wrong answers with a true loss of half the discordance, and how often the interval
    lies above it: what promotes a model whose loss equals its budget."""
    p_lost, p_gained = 0.75 * discordance, 0.25 * discordance
    covered = above = 0.0
    for lost, gained, p in outcomes(n, p_lost, p_gained):
        interval = paired._Score(lost, gained, n, deskew=True).interval(0.95)
        covered += p * (interval.low <= p_gained - p_lost <= interval.high)
        above += p * (interval.low > p_gained - p_lost)
    return covered, above


def simulate_clusters(k: int, size: int, discordance: float) -> tuple[float, float]:
    delta = -0.5 * discordance

    def make(rng: np.random.Generator) -> PairedChange:
        return clustered_flips(rng, k, size, discordance, delta, 0.4, True)

    missed, promoted = simulate(make, 100 * delta)
    return 1 - missed, promoted


def simulate_documents(n: int, kind: str) -> tuple[float, float]:
    missed, promoted = simulate(lambda rng: documents(rng, n, -3.0, kind), -3.0)
    return 1 - missed, promoted


CASES: list[Case] = [
    *(
        ("accuracy", f"{n:,} items, {d:.0%} change", enumerate_accuracy, (n, d))
        for n in (60, 200, 1000)
        for d in (0.02, 0.1)
    ),
    *(
        ("accuracy in subjects", f"{k} subjects of about {size}, 10% change", simulate_clusters, (k, size, 0.1))
        for k, size in ((5, 40), (16, 25), (57, 10))
    ),
    *(
        ("bits per byte", f"{n} texts, {kind} change", simulate_documents, (n, kind))
        for n in (60, 200)
        for kind in ("even", "skewed")
    ),
]
REJECTED = [(n, d, loss) for n in (60, 200, 1000) for d in (0.05, 0.1) for loss in (0.0, 1.0)]


def _measure(case: tuple[Callable[..., Any], tuple[Any, ...]]) -> Any:
    work, arguments = case
    return work(*arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    jobs: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [(work, arguments) for *_, work, arguments in CASES]
    jobs += [(rejections, (n, d, 100, loss)) for n, d, loss in REJECTED]
    with multiprocessing.Pool() as pool:
        found = pool.map(_measure, jobs, chunksize=1)
    print("| what | of | coverage of the 95 % interval | promoted with the loss at the budget |\n|---|---|---|---|")
    for (what, of, *_), (covered, promoted) in zip(CASES, found, strict=False):
        print(f"| {what} | {of} | {100 * covered:.1f} % | {100 * promoted:.1f} % |")
    print("\n| items | change | true loss, budgets | rejected |\n|---|---|---|---|")
    for (n, d, loss), rejected in zip(REJECTED, found[len(CASES) :], strict=True):
        print(f"| {n:,} and 100 texts | {d:.0%} | {loss:g} | {100 * rejected:.1f} % |")
    if options.json:
        names = [f"{what}: {of}" for what, of, *_ in CASES]
        figures = {
            "coverage": dict(zip(names, (f[0] for f in found[: len(CASES)]), strict=True)),
            "promoted_at_the_budget": dict(zip(names, (f[1] for f in found[: len(CASES)]), strict=True)),
            "rejected": {f"{n}, {d}, {loss}": r for (n, d, loss), r in zip(REJECTED, found[len(CASES) :], strict=True)},
        }
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
