"""All that a recipe needs from elsewhere, brought into the store: `forgetless fetch`, for runs without a network."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from tasks.core.config import Recipe
from tasks.core.errors import ConfigError, ForgetlessError
from tasks.core.fetched import Fetched, FetchRecord, write_record
from tasks.core.store import Store
from tasks.data.sources import all_sources, fetch_source, source_name
from tasks.evaluation.hub_data import fetch_tasks
from tasks.evaluation.suite import suite_digest
from tasks.models.base import fetch_base

Say = Callable[[str], None]


def fetch_recipe(recipe: Recipe, store: Store, say: Say) -> dict[str, Any]:
    """Return what was brought, as plain values, once all of it is in the store, with the record that keeps it there.
    Raises one error with all that could not be had; what came until then is not fetched again."""
    items: list[Fetched] = []
    problems: list[ForgetlessError] = []

    def bring(what: str, work: Callable[[], list[Fetched]]) -> None:
        say(f"Fetching {what}")
        try:
            items.extend(item for item in work() if item not in items)
        except ForgetlessError as error:
            problems.append(error)

    suite_digest(recipe.eval)  # names every local file that is absent
    bring(recipe.model.base, lambda: [item for item in [fetch_base(recipe.model, store)] if item])
    for source in all_sources(recipe.data):
        bring(source_name(source), lambda source=source: fetch_source(source, store))  # type: ignore[misc]

    def bring_tasks() -> list[Fetched]:
        found, missing = fetch_tasks(recipe.eval, store, say)
        problems.extend(missing)
        return found

    bring("the evaluation's tasks", bring_tasks)
    if problems:
        kinds = {type(problem) for problem in problems}
        raise (kinds.pop() if len(kinds) == 1 else ConfigError)("\n".join(str(problem) for problem in problems))
    record = FetchRecord(recipe=recipe.name, fetched=datetime.now(UTC), items=items)
    if items:
        write_record(store, record)
    listed = [
        {**item.model_dump(include={"kind", "name", "commit"}), "part": item.part}
        | {"artifact": f"{item.artifact.kind}/{item.artifact.key}", "size_bytes": item.artifact.size_bytes}
        for item in items
    ]
    sizes = {item.artifact.key: item.artifact.size_bytes for item in items}
    return {
        "recipe": recipe.name,
        "store": store.url,
        "record": record.name if items else None,
        "items": listed,
        "size_bytes": sum(sizes.values()),
    }
