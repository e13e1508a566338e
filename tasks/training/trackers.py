"""Experiment trackers: the training curve, sent to TensorBoard, W&B, MLflow or SwanLab while it grows.

They get the curve and the settings of `train`, nothing else: command line, console, code and list of packages, which
W&B and SwanLab collect by themselves, are turned off. Each tracker's own variables (WANDB_PROJECT,
MLFLOW_TRACKING_URI, SWANLAB_MODE, ...) hold; what keeps files keeps them in the folder given, unless a variable says
otherwise. Trackers are imported where they are opened: none is needed to train.
"""

import contextlib
import importlib.util
import json
import logging
import netrc
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tasks.core.errors import ConfigError, ForgetlessError
from tasks.core.records import TrainPoint

Log = Callable[[dict[str, float], int], None]
Close = Callable[[str | None], None]
"""Takes what stopped the training (the exception's type), None where it ended well."""

PROJECT = "forgetless"
TITLES = {"tensorboard": "TensorBoard", "wandb": "W&B", "mlflow": "MLflow", "swanlab": "SwanLab"}
WANDB_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")
MLFLOW_BATCH = 100  # parameters that one call may hold


def check_trackers(names: Sequence[str]) -> None:
    """Return if every tracker can be opened. Raises ConfigError, a sentence each, where a package or a key is missing.
    Asks no server, so a key that is wrong is found when the tracker is opened."""
    problems = []
    for name in names:
        if not _is_installed(name):
            problems.append(
                f"train.report_to {name}: {TITLES[name]} needs the Python package {name}, which is not installed. "
                f"Install it: pip install {name}"
            )
        elif name == "swanlab" and _swanlab_mode() == "local" and not _is_installed("swanboard"):
            problems.append(
                "train.report_to swanlab: SWANLAB_MODE=local needs the Python package swanboard, which is not "
                "installed. Install it: pip install 'swanlab[dashboard]', or set SWANLAB_MODE=offline."
            )
        elif name == "wandb" and not _wandb_needs_no_key():
            problems.append(
                "train.report_to wandb: W&B is online and there is no key: expected WANDB_API_KEY or an entry in "
                "netrc, found neither. Log in with wandb login, or set WANDB_MODE=offline."
            )
        elif name == "swanlab" and not _swanlab_needs_no_key():
            problems.append(
                "train.report_to swanlab: SwanLab is online and there is no key: expected SWANLAB_API_KEY or a login, "
                "found neither. Log in with swanlab login, or set SWANLAB_MODE=offline."
            )
    if problems:
        raise ConfigError(problems)


@contextlib.contextmanager
def open_trackers(
    names: list[str], run_name: str, settings: dict[str, Any], folder: Path
) -> Iterator[Callable[[TrainPoint], None]]:
    """Yield log(point), which sends every field that the point has to every tracker, by step.

    All are closed at the end, and told that the run failed where an error ends it. `settings` are train's alone.
    Raises ForgetlessError where a tracker cannot be opened, or no longer takes the curve."""
    if names:
        folder.mkdir(parents=True, exist_ok=True)  # W&B would choose another place
    with contextlib.ExitStack() as stack:
        logs: dict[str, Log] = {}
        for name in names:
            with _told_of(name, "could not be opened"):
                log, close = OPENERS[name](run_name, settings, folder)
            stack.push(_closing(name, close))
            logs[name] = log

        def log_point(point: TrainPoint) -> None:
            values = point.model_dump(exclude={"step"}, exclude_none=True)
            for name, log in logs.items():
                with _told_of(name, f"no longer takes the curve (step {point.step})"):
                    log(values, point.step)

        yield log_point


@contextlib.contextmanager
def _told_of(name: str, what: str) -> Iterator[None]:
    """Let a tracker's exceptions, of dozens of types, become one sentence, and its notices stay out of --json."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        reason = re.sub(r"://[^/\s]*@", "://", reason).rstrip(".")  # an address may hold a password
        raise ForgetlessError(
            f"{TITLES[name]} {what}: {reason}. Mend that, or leave {name} out of train.report_to, and run "
            "again: training goes on from its last checkpoint."
        ) from error


def _closing(name: str, close: Close) -> Callable[..., None]:
    def leave(kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        try:
            with _told_of(name, "could not be closed"):
                close(kind.__name__ if kind else None)
        except ForgetlessError as failure:
            if error is None:
                raise
            error.add_note(str(failure))  # what stopped the training comes first

    return leave


# --- the trackers -----------------------------------------------------------------------------------------------------


def _open_tensorboard(run_name: str, settings: dict[str, Any], folder: Path) -> tuple[Log, Close]:
    from torch.utils.tensorboard import SummaryWriter

    place = Path(os.environ.get("TENSORBOARD_LOGGING_DIR") or folder / "tensorboard")
    writer: Any = SummaryWriter(str(place / run_name), flush_secs=10)  # type: ignore[no-untyped-call]
    indented = "\n".join(f"    {line}" for line in json.dumps(settings, indent=1, ensure_ascii=False).splitlines())
    writer.add_text("settings", indented)  # Markdown: indented is as it stands

    def log(values: dict[str, float], step: int) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, step)

    return log, lambda failed: writer.close()


def _open_wandb(run_name: str, settings: dict[str, Any], folder: Path) -> tuple[Log, Close]:
    import wandb  # type: ignore[import-not-found]

    quiet = wandb.Settings(
        silent=True,
        console="off",
        disable_git=True,
        save_code=False,
        x_disable_meta=True,  # the command line, which may hold a signed address
        x_save_requirements=False,
    )
    # An argument would win over the user's variable.
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT") or PROJECT,
        name=os.environ.get("WANDB_NAME") or run_name,
        dir=os.environ.get("WANDB_DIR") or str(folder),
        config=settings,
        reinit="create_new",  # another run of this process is not ours to end
        settings=quiet,
    )
    return lambda values, step: run.log(values, step=step), lambda failed: run.finish(exit_code=1 if failed else 0)


def _open_mlflow(run_name: str, settings: dict[str, Any], folder: Path) -> tuple[Log, Close]:
    from mlflow import MlflowClient  # type: ignore[import-not-found]
    from mlflow.entities import Metric, Param  # type: ignore[import-not-found]

    logging.getLogger("mlflow.store.db").setLevel(logging.WARNING)  # it notes every table it makes
    # The client and not mlflow.start_run, which tags a run with user and command and is one for the whole process.
    here = None if os.environ.get("MLFLOW_TRACKING_URI") else f"sqlite:///{folder.absolute() / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=here)
    title = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
    experiment = client.get_experiment_by_name(title)
    artifacts = (folder.absolute() / "mlartifacts").as_uri() if here else None
    number = experiment.experiment_id if experiment else client.create_experiment(title, artifacts)
    run_id = client.create_run(number, run_name=run_name).info.run_id
    try:
        params = [Param(key, str(value)) for key, value in settings.items()]
        for start in range(0, len(params), MLFLOW_BATCH):
            client.log_batch(run_id, params=params[start : start + MLFLOW_BATCH])
    except Exception:
        client.set_terminated(run_id, "FAILED")
        raise

    def log(values: dict[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        client.log_batch(run_id, metrics=[Metric(key, value, now, step) for key, value in values.items()])

    return log, lambda failed: client.set_terminated(run_id, "FAILED" if failed else "FINISHED")


def _open_swanlab(run_name: str, settings: dict[str, Any], folder: Path) -> tuple[Log, Close]:
    import swanlab  # type: ignore[import-not-found]

    def unless(value: str, *variables: str) -> str | None:
        return None if any(os.environ.get(variable) for variable in variables) else value

    own: Any = swanlab.Settings
    run = swanlab.init(
        project=unless(PROJECT, "SWANLAB_PROJ_NAME", "SWANLAB_PROJECT_NAME"),
        name=unless(run_name, "SWANLAB_EXP_NAME", "SWANLAB_EXPERIMENT_NAME"),
        log_dir=unless(str(folder / "swanlog"), "SWANLAB_LOGDIR", "SWANLAB_LOG_DIR"),
        config={key: value for key, value in settings.items() if value is not None},  # it shows None as {}
        settings=own(
            interactive=False,
            terminal=own.Terminal(proxy_type="none"),
            probe=own.Probe(runtime=False, requirements=False, git=False),
        ),
    )

    def close(failed: str | None) -> None:
        run.finish(state="crashed", error=failed) if failed else run.finish()

    return lambda values, step: run.log(values, step=step), close


OPENERS: dict[str, Callable[[str, dict[str, Any], Path], tuple[Log, Close]]] = {
    "tensorboard": _open_tensorboard,
    "wandb": _open_wandb,
    "mlflow": _open_mlflow,
    "swanlab": _open_swanlab,
}


# --- what is there: packages, and keys as the trackers' own log-ins leave them ----------------------------------------


def _is_installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None  # a folder that W&B left behind, ./wandb, has no origin


def _wandb_needs_no_key() -> bool:
    if os.environ.get("WANDB_MODE", "").lower() in {"offline", "disabled", "dryrun"}:
        return True
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    own = urlsplit(os.environ.get("WANDB_BASE_URL", "")).netloc
    named = os.environ.get("NETRC")
    files = [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]
    return any(host in _netrc_hosts(file) for file in files for host in ([own] if own else WANDB_HOSTS))


def _swanlab_mode() -> str:
    return os.environ.get("SWANLAB_MODE", "").lower()


def _swanlab_needs_no_key() -> bool:
    if _swanlab_mode() in {"offline", "local", "disabled"}:
        return True
    root = os.environ.get("SWANLAB_ROOT") or os.environ.get("SWANLAB_SAVE_DIR") or Path.home() / ".swanlab"
    folders = (Path.cwd() / ".swanlab", Path(root))
    return bool(os.environ.get("SWANLAB_API_KEY")) or any(_netrc_hosts(folder / ".netrc") for folder in folders)


def _netrc_hosts(file: Path) -> set[str]:
    try:
        return set(netrc.netrc(file).hosts)
    except (OSError, netrc.NetrcParseError):  # absent, or of no use to the tracker either
        return set()
