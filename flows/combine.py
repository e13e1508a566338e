"""Make one adapter of several runs' and prove what it gained and forgot: a run whose training is a combination."""

from prefect import flow, runtime

from flows.dispatch import check_placement
from flows.finetune import Run, judge_and_ship, resumed_run
from flows.score_model import score_model
from tasks.core.combination import read_combination
from tasks.core.config import CombineConfig
from tasks.core.errors import ConfigError
from tasks.core.licences import check_use
from tasks.core.manifest import RunManifest, called, new_run_id
from tasks.core.settings import quiet_libraries, read_settings
from tasks.core.store import open_store
from tasks.models.steps import prepare_base
from tasks.training.steps import combine_adapters

quiet_libraries()


def _run_name() -> str:
    return str((runtime.flow_run.parameters or {}).get("run_id") or "combine")


@flow(name="combine", flow_run_name=_run_name, persist_result=False, validate_parameters=True)
def combine(
    combination: CombineConfig,
    suites: list[str] = [],  # noqa: B006
    name: str | None = None,
    gate: bool = False,
    store: str | None = None,
    run_id: str | None = None,
) -> RunManifest:
    """Return the manifest of a run that combines others: the base's scores, theirs together, and what was decided.

    Args:
        combination: The runs, their weights, and how they become one.
        suites: Suites to score on, in place of what the runs were.
        name: Names the run and the exported model.
        gate: Stop before the merge unless the verdict is promote.
        store: Folder or s3://bucket/prefix; empty for the worker's own (FORGETLESS_STORE).
        run_id: The run's name; made from `name` and the time if empty.
    """
    settings = read_settings(store)
    place, url = open_store(settings), settings.store_url
    found = read_combination(place, combination, suites, name)
    recipe = found.recipe
    check_placement(recipe.placement)
    on = recipe.placement.score
    run = Run(place, recipe, run_id or resumed_run(place) or new_run_id(recipe.name), found.config)
    with run.recorded() as manifest:
        manifest.base = base = run.stage("base", lambda: prepare_base(recipe.model, url))
        if base.artifact.content != found.base.artifact.content:
            raise ConfigError(
                f"The base {called(base)} is not what the runs trained any more: it was changed. Restore it, or train "
                "them again."
            )
        manifest.before = before = run.stage(
            "before", lambda: score_model(recipe.model, recipe.eval, base, None, url, "before", on=on)
        )
        made = run.stage("combine", lambda: combine_adapters(recipe.model, found.config, base, found.parts, url))
        manifest.tokens, manifest.licences = found.tokens, found.licences
        manifest.notes = check_use(recipe.export.use, found.licences)
        judge_and_ship(run, base, found.tokens, before, made.model_copy(update={"notes": found.notes}), gate, url)
    return manifest
