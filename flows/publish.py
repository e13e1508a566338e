"""Push a finished run to the Hugging Face Hub, or write the folder that would go up."""

import contextlib
import shutil
from pathlib import Path
from typing import Any

from flows.data import new_folder
from tasks.core.errors import ExportError
from tasks.core.manifest import RunManifest
from tasks.core.records import PushKind
from tasks.core.store import Store


def push_run(
    store: Store, run: RunManifest, repo: str, kind: PushKind | None, private: bool, dry_run: Path | None
) -> dict[str, Any]:
    """Return, as plain values, where a run's adapter, merged model or GGUF files went with their card; by default the
    adapter, of method full the merged model. With `dry_run` they go into that new folder and nothing is uploaded.
    Raises ConfigError and ExportError in one sentence."""
    from tasks.export.hub import check_repo, check_token, link, push_folder
    from tasks.reporting.hub_card import write_hub_card

    kind = kind or ("merged" if run.recipe.train.method == "full" else "adapter")
    _require(run, kind)
    check_repo(repo, run.base.source if run.base else None)
    if dry_run is None:
        check_token()
    place = link if dry_run is None else shutil.copyfile
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(new_folder(dry_run, "--dry-run") if dry_run else store.work_folder())
        _fill(store, run, kind, folder, place)
        (folder / "README.md").write_text(write_hub_card(run, repo, kind), encoding="utf-8")
        files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        result = {"run": run.run_id, "as": kind, "repo": repo, "files": files}
        if dry_run:
            return {**result, "folder": str(folder)}
        pushed = push_folder(folder, repo, private, f"Run {run.run_id} of forgetless")
    return {**result, "url": pushed.url, "commit": pushed.commit, "created": pushed.created, "private": pushed.private}


def _require(run: RunManifest, kind: PushKind) -> None:
    """Raise ExportError where the run does not have what is to be pushed."""
    if (run.adapter if kind == "adapter" else run.merged if kind == "merged" else run.gguf) is not None and run.base:
        return
    if run.adapter and run.adapter.unmerged:
        raise ExportError(f"Run {run.run_id}: {run.adapter.unmerged}. Push it with --as adapter.")
    stage = run.stages.get({"adapter": "train", "merged": "merge", "gguf": "gguf"}[kind])
    why = f": {stage.note}" if stage and stage.note else f": it is {run.status}"
    what = {"adapter": "adapter", "merged": "merged model", "gguf": "GGUF files"}[kind]
    raise ExportError(f"Run {run.run_id} has no {what}{why}. Run its recipe again, without --gate.")


def _fill(store: Store, run: RunManifest, kind: PushKind, folder: Path, place: Any) -> None:
    from tasks.export.hub import place_adapter, place_files, place_gguf
    from tasks.models.base import locate_tokenizer, open_base

    if kind == "merged" and run.merged:
        place_files(store.local_folder(run.merged.artifact), folder, place)
    elif kind == "gguf" and run.gguf:
        place_gguf(store.local_folder(run.gguf.artifact), folder, run.gguf, place)
    elif run.adapter and run.base:
        source = run.adapter.folder(store.local_folder(run.adapter.artifact))
        model = run.recipe.model.model_copy(update={"revision": run.base.revision})
        # Of a base on the Hub the tokenizer is enough: its weights may not be here.
        base = locate_tokenizer(model, folder, store) if run.base.revision else open_base(store, run.base, model)
        place_adapter(source, folder, run.base, base, run.adapter, model.trust_remote_code, place)
