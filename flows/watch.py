"""Look whether a recipe's data or base is another than it was the last time, and announce it.

Scheduled every few minutes it is the trigger of a run: a new object under an s3:// prefix, a new commit of a Hub data
set or base, a changed file.
"""

import json

from prefect import flow

from flows.events import announce
from tasks.core.config import load_recipe
from tasks.core.digest import canonical_json, sha256
from tasks.core.settings import quiet_libraries, read_settings
from tasks.core.store import open_store
from tasks.data.sources import source_digests
from tasks.models.base import locate_base

quiet_libraries()


@flow(name="watch", flow_run_name="watch-{recipe}", persist_result=False)
def watch(recipe: str = "quickstart", overrides: list[str] = [], store: str | None = None) -> list[str]:  # noqa: B006
    """Return what changed since the last time, data and base: none the first time. Each change is announced as
    forgetless.recipe.changed before it is remembered, so that none is lost.

    Args:
        recipe: A shipped recipe's name, or the path of a recipe file on the worker.
        overrides: Keys of the recipe as section.key=value, such as data.sources=s3://bucket/rows/.
        store: Folder or s3://bucket/prefix; empty for the worker's own (FORGETLESS_STORE).
    """
    place, config = open_store(read_settings(store)), load_recipe(recipe, overrides, None)
    now = {
        "data": sha256(canonical_json(source_digests(config.data, place))),
        "base": locate_base(config.model, weights=False, store=place).content,
    }
    path = f"watched/{sha256(canonical_json([recipe, overrides]))}.json"
    before = json.loads(place.read_bytes(path) or b"{}")
    changed = [what for what, digest in now.items() if before and before.get(what) != digest]
    if changed:
        text = f"{' and '.join(changed)} of {recipe} changed"
        announce("recipe.changed", f"recipe.{config.name}", recipe=recipe, overrides=overrides, text=text)
    place.write_bytes(path, canonical_json(now))
    return changed
