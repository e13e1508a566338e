"""Promotion, rollback and the registry for the command line: its answers as plain values, the same for --json."""

import os
from typing import Any

from tasks.core import registry
from tasks.core.errors import ConfigError, ForgetlessError
from tasks.core.manifest import RunManifest, read_manifest
from tasks.core.registry import Move, Version
from tasks.core.store import Store

ALIAS = "promoted"


def require_exported(run: RunManifest) -> None:
    """Raise ForgetlessError unless a run has an exported model."""
    if run.gguf is None:
        raise ForgetlessError(
            f"Run {run.run_id} has no exported model: it is {run.status}"
            + (f" ({run.error})" if run.error else "")
            + ". Finish it first: run its recipe again."
        )


def version_of(store: Store, run: RunManifest) -> Version:
    """Return a run's version in the registry, which is added where it is absent. Raises ForgetlessError for a run that
    exported nothing or did not complete."""
    require_exported(run)
    if run.status != "completed":
        raise ForgetlessError(f"Run {run.run_id} is {run.status}, so it is no version. Run its recipe again.")
    assert run.gguf and run.judged
    return registry.add_version(
        store,
        run.recipe.registry_name,
        run.run_id,
        run.judged.verdict,
        run.gguf.sha256[run.recipe.export.serve],
        run.ollama,
    )


def promote_run(store: Store, run_id: str, alias: str | None, force: str | None) -> dict[str, Any]:
    """Return what an alias names after a run was promoted, here and in Ollama. `force` says why, where the verdict does
    not allow it. Raises ForgetlessError: nothing is changed then, and ConflictError where another was faster, as who
    promotes by hand should see first what did."""
    from tasks.export.register import promote

    run = read_manifest(store, run_id)
    name, alias = run.recipe.registry_name, alias or run.recipe.export.ollama_alias or ALIAS
    registry.check_names(name, alias)
    if force is not None and not force.strip():
        raise ConfigError("--force needs the reason, which is recorded: --force 'why it is promoted all the same'.")
    require_exported(run)
    judged = run.judged
    if judged is None or judged.verdict != "promote":
        if force is None:
            verdict = f"{judged.verdict} ({judged.reason.rstrip('.')})" if judged else "missing"
            raise ForgetlessError(
                f"Run {run.run_id} is not promoted: its verdict is {verdict}. To promote it all the same, say why with "
                "--force WHY; who and why are recorded."
            )
        why, forced = force, True
    else:
        why, forced = force or judged.reason, False
    done = promote(store, name, alias, version_of(store, run), why, forced)
    if os.environ.get("PREFECT_API_URL"):  # no server, no automation: nobody hears of it
        from flows.events import announce_promoted

        announce_promoted(name, alias, run.run_id)
    return _told(name, alias, *done)


def roll_back(store: Store, name: str, alias: str) -> dict[str, Any]:
    """Return what an alias names after it was moved to the version before, here and in Ollama. Raises ForgetlessError
    where there is none, and ConflictError where another was faster, or two who roll back at once would go two back."""
    from tasks.export.register import roll_back as move_back

    _require_name(store, name)
    return _told(name, alias, *move_back(store, name, alias, "rolled back by hand"))


def list_models(store: Store) -> list[dict[str, Any]]:
    """Return the models of the registry, with what their aliases name."""
    return [
        {"name": name, "aliases": {alias: _plain(move) for alias, move in registry.read_aliases(store, name).items()}}
        for name in registry.read_names(store)
    ]


def describe_model(store: Store, name: str) -> dict[str, Any]:
    """Return a model's versions, and the history of each of its aliases. Raises ForgetlessError where it is absent."""
    _require_name(store, name)
    return {
        "name": name,
        "versions": [_plain(version) for version in registry.read_versions(store, name)],
        "aliases": {
            alias: [_plain(move) for move in registry.read_history(store, name, alias)]
            for alias in registry.read_aliases(store, name)
        },
    }


def _require_name(store: Store, name: str) -> None:
    registry.check_names(name)
    if name.lower() not in registry.read_names(store):
        raise ForgetlessError(f"There is no model {name!r} in the registry of {store.url}. List: forgetless registry")


def _told(name: str, alias: str, move: Move, in_ollama: Any) -> dict[str, Any]:
    return {"name": name, "alias": alias, **_plain(move), "ollama": in_ollama.alias, "note": in_ollama.note}


def _plain(record: Move | Version) -> dict[str, Any]:
    return record.model_dump(mode="json", exclude={"id", "back"})
