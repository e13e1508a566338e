"""Judge what of a finished run's adapter to ship, without training again: at several strengths, or steps."""

from typing import Annotated, Any

from prefect import flow
from pydantic import Field

from flows.score_model import score_model
from tasks.core.errors import ForgetlessError
from tasks.core.manifest import read_manifest
from tasks.core.records import CombinedRef, ScoreSheet, ShippingCurve, TrainedRef
from tasks.core.settings import quiet_libraries, read_settings
from tasks.core.store import open_store
from tasks.evaluation.steps import choose_shipping

quiet_libraries()
STRENGTHS = [0.25, 0.5, 0.75, 1.0]


@flow(name="strength", flow_run_name="strength-{run}", persist_result=False)
def scale_adapter(
    run: str,
    strengths: list[Annotated[float, Field(gt=0, le=2)]] = STRENGTHS,
    store: str | None = None,
) -> ShippingCurve:
    """Return what a run's adapter changes at each strength: base + strength x (trained - base)."""
    return _judge(run, [{"strength": strength} for strength in sorted(set(strengths))], store)


@flow(name="steps", flow_run_name="steps-{run}", persist_result=False)
def judge_steps(run: str, store: str | None = None) -> ShippingCurve:
    """Return what a run's adapter changed at each step that was kept (train.snapshots), and at the end."""
    manifest = read_manifest(open_store(read_settings(store)), run)
    if isinstance(manifest.adapter, CombinedRef):
        raise ForgetlessError(f"Run {manifest.run_id} combines others, so it has no steps. Name one of those.")
    snapshots = manifest.adapter.snapshots if manifest.adapter else []
    if manifest.adapter and not snapshots:
        raise ForgetlessError(
            f"Run {manifest.run_id} kept no steps of its training. Run its recipe with --set train.snapshots=5"
        )
    return _judge(run, [{"step": step} for step in [*snapshots, None]], store)


def _judge(run: str, parts: list[dict[str, Any]], store: str | None) -> ShippingCurve:
    settings = read_settings(store)
    manifest = read_manifest(open_store(settings), run)
    adapter, base, before = manifest.adapter, manifest.base, manifest.before
    if adapter is None or base is None or before is None:
        raise ForgetlessError(f"Run {manifest.run_id} has no adapter: it is {manifest.status}. Run its recipe again.")
    if adapter.unmerged and any(part.get("strength", 1) != 1 for part in parts):
        raise ForgetlessError(f"Run {manifest.run_id} cannot be scaled: {adapter.unmerged}.")
    recipe, url = manifest.recipe, settings.store_url
    scored: list[tuple[TrainedRef, ScoreSheet]] = []
    for part in parts:
        shipped = adapter.model_copy(update={"strength": 1.0, "step": None, **part})
        title = " ".join(f"{name} {value:g}" for name, value in part.items() if value is not None) or "the end"
        scored.append((shipped, score_model(recipe.model, recipe.eval, base, shipped, url, title)))
    return choose_shipping(recipe.eval, before, scored, url)
