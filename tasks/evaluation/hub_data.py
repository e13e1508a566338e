"""What lm-eval's own tasks load from the Hub: data sets and metrics, known by really loading the tasks.

lm-eval asks the libraries datasets and evaluate by name, also out of Python files of its tasks. Within `hub_data` both
answer as the Hub does, where it cannot be reached from what was fetched into the store.
"""

import contextlib
import functools
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tasks.core.config import EvalConfig
from tasks.core.errors import ConfigError, ForgetlessError
from tasks.core.fetched import Fetched, read_records
from tasks.core.retry import is_out_of_reach
from tasks.core.store import Store
from tasks.evaluation.suite import load_named, named_tasks
from tasks.models.hub import (
    FORBIDDEN,
    ask_hub,
    fetch_hub_dataset,
    fetch_repository,
    is_hub_reached,
    is_refused,
    named_part,
    open_hub_folder,
    open_repository,
)

METRIC_FILES = ["*.py"]
METRIC_TYPES = ("metric", "comparison", "measurement")
"""Whose names evaluate tries in this order."""


class _HubData:
    """The two libraries' ways to load, over a store; with `fetched`, all that is asked for is brought there first.
    `load_plain_*` are their own."""

    def __init__(self, store: Store, fetched: list[Fetched] | None = None) -> None:
        import datasets

        self.store, self.fetched = store, fetched
        self.load_plain_dataset: Any = datasets.load_dataset
        self.load_plain_metric: Any = None

    def load_dataset(self, path: str, name: str | None = None, *more: Any, **options: Any) -> Any:
        if not _is_hub_id(path) or more:
            return self.load_plain_dataset(path, name, *more, **options)
        part = {"subset": name, "folder": options.get("data_dir"), "files": options.get("data_files")}
        revision = options.get("revision")
        return self._load(
            f"data set {path}{f' ({name})' if name else ''}",
            lambda: self.load_plain_dataset(path, name, **options),
            lambda folder: self.load_plain_dataset(str(folder), name, **_without_revision(options)),
            lambda: fetch_hub_dataset(self.store, path, revision, **part),
            lambda: open_hub_folder(self.store, "dataset", path, revision or "main", named_part(**part)),
        )

    def load_metric(self, path: str, *more: Any, **options: Any) -> Any:
        if Path(path).exists():
            return self.load_plain_metric(path, *more, **options)
        kinds = (options["module_type"],) if options.get("module_type") else METRIC_TYPES
        names = [path] if "/" in path else [f"evaluate-{kind}/{path}" for kind in kinds]
        revision = options.get("revision")
        found = (open_hub_folder(self.store, "metric", name, revision or "main") for name in names)
        return self._load(
            f"metric {path}",
            lambda: self.load_plain_metric(path, *more, **options),
            lambda folder: self.load_plain_metric(str(folder), *more, **_without_revision(options)),
            lambda: _fetch_metric(self.store, names, revision),
            lambda: next((place for place in found if place), None),
        )

    def _load(
        self,
        what: str,
        load: Callable[[], Any],
        load_folder: Callable[[Path], Any],
        fetch: Callable[[], Fetched],
        find: Callable[[], tuple[Path, str] | None],
    ) -> Any:
        def load_fetched() -> Any:
            place = find()
            return load_folder(place[0]) if place else None

        try:
            if self.fetched is None:
                return ask_hub(load, load_fetched)
            item = fetch()
            if item not in self.fetched:
                self.fetched.append(item)
            return load_folder(open_repository(self.store, item))  # what came is enough, or it is said now
        except ForgetlessError:
            raise
        except Exception as error:  # of a dozen types
            raise ForgetlessError(_sentence(what, error)) from error


def _without_revision(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "revision"}


@contextlib.contextmanager
def hub_data(store: Store, fetched: list[Fetched] | None = None) -> Iterator[None]:
    """Within, tasks load data sets and metrics as told above; what is brought in order to fetch is added to `fetched`.
    Loading raises ForgetlessError for what cannot be had."""
    import datasets

    ours = _HubData(store, fetched)
    with contextlib.ExitStack() as undone:
        datasets.load_dataset = ours.load_dataset
        undone.callback(setattr, datasets, "load_dataset", ours.load_plain_dataset)
        items = (item for record in read_records(store).values() for item in record.items)
        if fetched is not None or any(item.kind == "metric" for item in items):
            import evaluate  # 6 s of a processor, which few tasks need

            ours.load_plain_metric = evaluate.load
            evaluate.load = ours.load_metric
            undone.callback(setattr, evaluate, "load", ours.load_plain_metric)
        yield


def fetch_tasks(
    config: EvalConfig, store: Store, say: Callable[[str], None]
) -> tuple[list[Fetched], list[ForgetlessError]]:
    """Bring what lm-eval's own tasks of a suite load into the store; return what it is found by, and an error for each
    task that could not be loaded."""
    fetched: list[Fetched] = []
    if not named_tasks(config):
        return [], []
    with hub_data(store, fetched):
        return fetched, _load_each(config, say)


def missing_tasks(config: EvalConfig, store: Store) -> list[ForgetlessError]:
    """Return an error for each of lm-eval's own tasks whose data or metrics are neither in reach nor fetched. Where the
    Hub can be reached, none is loaded to find out."""
    if not named_tasks(config) or is_hub_reached():
        return []
    with hub_data(store):
        return _load_each(config, lambda _: None)


def _load_each(config: EvalConfig, say: Callable[[str], None]) -> list[ForgetlessError]:
    names = named_tasks(config)
    say("Reading lm-eval's tasks")
    problems: list[ForgetlessError] = []
    try:  # what lm-eval prints is for its own command line
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            loaded = list(load_named(config, names, say))
        for name, error in loaded:
            if error is not None:
                text = str(error) if isinstance(error, ForgetlessError) else _sentence("what it loads", error)
                problem = ForgetlessError(f"eval task {name}: {text}")
                problem.__cause__ = error.__cause__ or error
                problems.append(problem)
    except ConfigError as error:
        problems.append(error)
    return problems


def _fetch_metric(store: Store, names: list[str], revision: str | None) -> Fetched:
    from evaluate import __version__
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    wanted = [revision] if revision else [f"v{__version__}", "main"]  # as evaluate looks for them
    for number, (name, tag) in enumerate((name, tag) for name in names for tag in wanted):
        try:
            commit = str(ask_hub(functools.partial(_space_commit, name, tag)))
        except GatedRepoError:
            raise
        except (RepositoryNotFoundError, RevisionNotFoundError):
            if number == len(names) * len(wanted) - 1:
                raise
            continue
        return fetch_repository(store, "metric", name, revision or "main", commit, METRIC_FILES)
    raise AssertionError("there is a name and a revision")


def _space_commit(name: str, revision: str) -> str:
    from huggingface_hub import HfApi

    return str(HfApi().space_info(name, revision=revision).sha)


def _is_hub_id(path: str) -> bool:
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    return path not in _PACKAGED_DATASETS_MODULES and not Path(path).exists() and path.count("/") <= 1


def _sentence(what: str, error: BaseException) -> str:
    kinds = {kind.__name__ for kind in type(error).__mro__}
    text = (str(error).splitlines() or [type(error).__name__])[0]
    if is_refused(error):
        return f"{what}: {FORBIDDEN}"
    if "GatedRepoError" in kinds or "gated dataset" in text:
        return f"{what} is gated: accept its terms on its Hub page, then log in with: hf auth login"
    if is_out_of_reach(error) or "OfflineModeIsEnabled" in text:
        return f"{what} is not in the local cache and the Hub cannot be reached."
    return f"{what} cannot be loaded: {text}"
