"""What a sweep tries: its axes as the user wrote them, the settings that follow, and the check of all of them before
anything starts. Which settings come next depends on the seed, and with Optuna on the results so far, on nothing else.
"""

import importlib.util
import json
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import yaml

from tasks.core.config import Recipe, SweepConfig, load_recipe
from tasks.core.digest import canonical_json, sha256
from tasks.core.errors import ConfigError
from tasks.core.sweep import Axis

Values = dict[str, Any]
Result = tuple[Values, float, float]
"""Settings with their gain and their forgetting."""

MOST_CHECKED = 256  # combinations of ends that Optuna's axes are checked at: some seconds of reading YAML
MOST_DRAWS = 200  # until settings are found that were not tried yet
FIRST_RANDOM = 5  # settings that Optuna draws at random before it models what they gave
FIXED = {
    "name": "a sweep names its runs itself",
    "description": "it changes nothing",
    "model": "gain and forgetting are measured against one base: make a sweep for each",
    "eval": "trials are compared on the same items: make a sweep for each",
    "train.start_from": "gain and forgetting are measured against what it goes on from: make a sweep for each",
    "export": "trials export nothing; only export.strength and export.step change what is scored",
}
SCALES = ("export.strength", "export.step")
OTHER_LOSSES = ("data.sources", "data.clean", "data.fill", "data.validation_share", "train.max_tokens")
"""Keys that change the rows whose loss is the validation loss."""


SHAPES = {
    "--grid": "key=value,value, such as train.rank=4,8",
    "--random": "key=low:high or key=low:high:log with low below high, such as train.learning_rate=1e-4:1e-2:log",
}


@dataclass(frozen=True)
class Search:
    """A sweep as it was checked: the recipe that it varies, its axes, and all settings where they are known before."""

    recipe: Recipe
    axes: list[Axis]
    known: list[Values] | None


def plan_search(recipe: str, overrides: list[str], data: str | None, search: SweepConfig) -> Search:
    """Return what a sweep tries. Raises ConfigError with every problem of every trial."""
    base = load_recipe(recipe, overrides, data)
    axes = read_axes(search)
    problems = _refuse(axes, search)
    if search.optuna and importlib.util.find_spec("optuna") is None:
        problems.append("--optuna needs Optuna, which is not installed: pip install 'forgetless[sweep]'")
    methods = [base.train.method, *(value for axis in axes if axis.key == "train.method" for value in axis.values)]
    if search.strengths and (virtual := next((m for m in methods if m in ("prefix", "prompt")), None)):
        problems.append(f"--strengths scales weights, and train.method {virtual} changes none.")
    size = math.prod(axis.size for axis in axes)
    if search.trials and search.trials > size:
        problems.append(f"There are only {size} settings to try, not {search.trials}: set --trials {size}, or a grid.")
    if problems:
        raise ConfigError(problems)
    known = None if search.optuna else _all_points(axes, search)
    found: dict[str, None] = {}  # in order, each once
    for values in _corners(axes) if known is None else known:
        try:
            load_recipe(recipe, [*overrides, *as_overrides(values)], data)
        except ConfigError as error:
            found |= dict.fromkeys(error.problems)
    if found:
        raise ConfigError(list(found))
    return Search(base, axes, known)


def as_overrides(values: Values) -> list[str]:
    """Return settings as `run --set` takes them."""
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in sorted(values.items())]


def sweep_id(search: Search, config: SweepConfig, contents: Sequence[str]) -> str:
    """Return the name of a sweep: the same for the same recipe, axes and seed over inputs of the same `contents`
    (digests of data, base and items). More trials, seeds or strengths go on with the same sweep."""
    settled = config.model_dump(mode="json", include={"optuna", "seed", "prune"})
    axes = [axis.model_dump(mode="json") for axis in search.axes]
    given = [search.recipe.model_dump(mode="json", exclude={"placement"}), axes, settled, list(contents)]
    return f"{search.recipe.name[:60]}-{sha256(canonical_json(given))[:8]}"


def read_axes(search: SweepConfig) -> list[Axis]:
    """Return the axes of a sweep. Raises ConfigError with every problem found."""
    problems: list[str] = []
    axes: list[Axis] = []
    for option, texts in (("--grid", search.grid), ("--random", search.random)):
        for text in texts:
            key, _, right = (part.strip() for part in text.partition("="))
            axis = (_choice(key, right) if option == "--grid" else _range(key, right)) if key else None
            if axis is None:
                problems.append(f"{option} {text!r}: expected {SHAPES[option]}.")
            elif axis.key in {a.key for a in axes}:
                problems.append(f"{option} {text!r}: {axis.key} is named twice.")
            else:
                axes.append(axis)
    if problems:
        raise ConfigError(problems)
    return axes


def draw_point(axes: Sequence[Axis], seed: str) -> Values:
    """Return settings drawn uniformly, or uniformly in the logarithm; the same ones for the same seed."""
    chance = random.Random(seed)
    return {axis.key: _draw(axis, chance) for axis in axes}


def propose_point(axes: Sequence[Axis], seed: int, number: int, done: Sequence[Result]) -> Values:
    """Return the settings that Optuna's TPE proposes as the `number`th, after the results so far; the same ones for the
    same seed and results. What was done already is only proposed again where nothing else is found."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    spaces = {axis.key: _distribution(optuna.distributions, axis) for axis in axes}
    tried = [values for values, _, _ in done]
    values: Values = {}
    for again in range(MOST_DRAWS // 10):
        sampler = optuna.samplers.TPESampler(
            seed=int(sha256(f"{seed}/{number}/{again}".encode())[:8], 16), n_startup_trials=FIRST_RANDOM
        )
        study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
        for known, gain, forgetting in done:
            study.add_trial(
                optuna.trial.create_trial(
                    params={a.key: _index(a, known[a.key]) for a in axes},
                    distributions=spaces,
                    values=[gain, forgetting],
                )
            )
        asked = study.ask(spaces).params
        values = {a.key: a.values[asked[a.key]] if a.values else _readable(a, asked[a.key]) for a in axes}
        if values not in tried:
            break
    return values


def _refuse(axes: Iterable[Axis], search: SweepConfig) -> list[str]:
    problems = []
    for key in (axis.key for axis in axes):
        why = next((text for fixed, text in FIXED.items() if key == fixed or key.startswith(f"{fixed}.")), None)
        if why and key not in SCALES:
            problems.append(f"{key}: a sweep cannot vary it, as {why}.")
        if key == "train.seed" and search.seeds > 1:
            problems.append("train.seed: --seeds varies it already. Leave out one of the two.")
        if search.prune and key.startswith(OTHER_LOSSES):
            problems.append(f"{key}: --prune compares validation losses, and this changes what they are of.")
    return problems


def _choice(key: str, text: str) -> Axis | None:
    try:
        values = [_number(value) for value in yaml.safe_load(f"[{text}]")]
    except yaml.YAMLError:
        return None
    distinct = [value for i, value in enumerate(values) if value not in values[:i]]
    return Axis(key=key, values=distinct) if values else None


def _number(value: Any) -> Any:
    """Return 1e-4 as the number that YAML 1.1 does not see in it; other values as they are."""
    try:
        return float(value) if isinstance(value, str) and value[:1] in "+-.0123456789" else value
    except ValueError:
        return value


def _range(key: str, text: str) -> Axis | None:
    low_text, _, rest = text.partition(":")
    high_text, colon, scale = rest.partition(":")
    try:
        low, high = float(low_text), float(high_text)
    except ValueError:
        return None
    if not (math.isfinite(low) and math.isfinite(high) and low < high) or (colon and (scale != "log" or low <= 0)):
        return None
    whole = all(part.strip().lstrip("+-").isdecimal() for part in (low_text, high_text))
    return Axis(key=key, low=low, high=high, log=bool(colon), whole=whole)


def _draw(axis: Axis, chance: random.Random) -> Any:
    if axis.values:
        return chance.choice(axis.values)
    assert axis.low is not None and axis.high is not None
    if axis.log:
        return _readable(axis, math.exp(chance.uniform(math.log(axis.low), math.log(axis.high))))
    return (
        chance.randint(int(axis.low), int(axis.high))
        if axis.whole
        else _readable(axis, chance.uniform(axis.low, axis.high))
    )


def _readable(axis: Axis, value: float) -> float:
    """Return a number of four digits, or a whole one, inside the range."""
    assert axis.low is not None and axis.high is not None
    inside = min(max(float(f"{value:.4g}"), axis.low), axis.high)
    return round(inside) if axis.whole else inside


def _index(axis: Axis, value: Any) -> Any:
    """Return what stands for a value in Optuna, whose categories hold no lists."""
    return axis.values.index(value) if axis.values else value


def _distribution(distributions: Any, axis: Axis) -> Any:
    if axis.values:
        return distributions.CategoricalDistribution(list(range(len(axis.values))))
    assert axis.low is not None and axis.high is not None
    if axis.whole:
        return distributions.IntDistribution(int(axis.low), int(axis.high), log=axis.log)
    return distributions.FloatDistribution(axis.low, axis.high, log=axis.log)


def _all_points(axes: Sequence[Axis], search: SweepConfig) -> list[Values]:
    if not search.random:
        keys = [axis.key for axis in axes]
        return [dict(zip(keys, chosen, strict=True)) for chosen in product(*(axis.values for axis in axes))]
    points: list[Values] = []
    for number in range(search.trials or 0):
        drawn = (draw_point(axes, f"{search.seed}/{number}/{again}") for again in range(MOST_DRAWS))
        new = next((values for values in drawn if values not in points), None)
        points += [new] if new else []
    return points


def _corners(axes: Sequence[Axis]) -> list[Values]:
    """Return settings that hold every value and both ends of every range: all combinations, if they are few."""
    ends = [axis.values or [_readable(axis, axis.low or 0), _readable(axis, axis.high or 0)] for axis in axes]
    keys = [axis.key for axis in axes]
    if math.prod(map(len, ends)) <= MOST_CHECKED:
        return [dict(zip(keys, chosen, strict=True)) for chosen in product(*ends)]
    first = {axis.key: values[0] for axis, values in zip(axes, ends, strict=True)}
    return [first | {key: value} for key, values in zip(keys, ends, strict=True) for value in values]
