"""Trackers: what was sent can be read back, a failed run is marked, and what is missing is said before any step."""

import contextlib
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks.core.config import TrainConfig
from tasks.core.errors import ConfigError, ForgetlessError
from tasks.core.records import TrainPoint
from tasks.training import trackers
from tasks.training.trackers import check_trackers, open_trackers

POINTS = [
    TrainPoint(step=0, validation_loss=2.5),
    TrainPoint(step=1, loss=2.0, learning_rate=1e-3, grad_norm=0.5, tokens_per_second=900),
    TrainPoint(step=2, loss=1.5, learning_rate=5e-4, validation_loss=1.75),
]
SETTINGS = TrainConfig(rank=8, report_to=["mlflow"]).model_dump(mode="json")
FAMILIES = ("WANDB_", "MLFLOW_", "SWANLAB_", "TENSORBOARD_", "NETRC")


@pytest.fixture(autouse=True)
def _bare_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No key and no variable of the tester's own, and a home without log-ins."""
    for name in [n for n in os.environ if n.startswith(FAMILIES)]:
        monkeypatch.delenv(name)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "home")


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let a package be found without being there: what is checked before it is imported."""

    def put(name: str) -> None:
        (tmp_path / "site" / name).mkdir(parents=True)
        (tmp_path / "site" / name / "__init__.py").write_text("raise AssertionError('imported by a mere check')")
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.syspath_prepend(str(tmp_path / "site"))

    return put


def send(name: str, folder: Path) -> None:
    with open_trackers([name], "run-1", SETTINGS, folder) as log:
        for point in POINTS:
            log(point)


def fail(name: str, folder: Path) -> None:
    with contextlib.suppress(ZeroDivisionError), open_trackers([name], "run-1", SETTINGS, folder) as log:
        log(POINTS[0])
        raise ZeroDivisionError


# --- what is missing --------------------------------------------------------------------------------------------------


def test_nothing_asked_for_is_nothing_needed(tmp_path: Path) -> None:
    check_trackers([])
    with open_trackers([], "run-1", SETTINGS, tmp_path / "work") as log:
        log(POINTS[0])
    assert not (tmp_path / "work").exists()


def test_missing_packages_are_all_named_with_their_command(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["tensorboard", "wandb", "mlflow", "swanlab"]
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError) as caught:
        check_trackers(names)
    assert caught.value.problems[0] == (
        "train.report_to tensorboard: TensorBoard needs the Python package tensorboard, which is not installed. "
        "Install it: pip install tensorboard"
    )
    assert [p.rpartition(" ")[2] for p in caught.value.problems] == names


def test_a_folder_that_wandb_left_behind_is_not_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site" / "wandb").mkdir(parents=True)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    with pytest.raises(ConfigError, match="pip install wandb"):
        check_trackers(["wandb"])


def test_wandb_online_needs_a_key(install: Callable[[str], None]) -> None:
    install("wandb")
    with pytest.raises(ConfigError) as caught:
        check_trackers(["wandb"])
    assert str(caught.value) == (
        "train.report_to wandb: W&B is online and there is no key: expected WANDB_API_KEY or an entry in netrc, found "
        "neither. Log in with wandb login, or set WANDB_MODE=offline."
    )


@pytest.mark.parametrize(
    ("name", "value"), [("WANDB_MODE", "offline"), ("WANDB_MODE", "disabled"), ("WANDB_API_KEY", "k" * 40)]
)
def test_wandb_with_a_key_or_offline_passes(
    name: str, value: str, install: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    install("wandb")
    monkeypatch.setenv(name, value)
    check_trackers(["wandb"])


def test_a_login_in_netrc_counts_for_its_own_host_only(
    tmp_path: Path, install: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    install("wandb")
    (tmp_path / "home" / ".netrc").write_text("machine api.wandb.ai\n login user\n password secret\n")
    (tmp_path / "home" / ".netrc").chmod(0o600)
    check_trackers(["wandb"])
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    with pytest.raises(ConfigError, match="there is no key"):
        check_trackers(["wandb"])


def test_swanlab_online_needs_a_key_or_a_login(
    tmp_path: Path, install: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    install("swanlab")
    with pytest.raises(ConfigError, match="expected SWANLAB_API_KEY or a login, found neither"):
        check_trackers(["swanlab"])
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    check_trackers(["swanlab"])
    monkeypatch.setenv("SWANLAB_MODE", "local")
    monkeypatch.setitem(sys.modules, "swanboard", None)
    with pytest.raises(ConfigError, match=r"pip install 'swanlab\[dashboard\]'"):
        check_trackers(["swanlab"])
    monkeypatch.delenv("SWANLAB_MODE")
    (tmp_path / "home" / ".swanlab").mkdir()
    (tmp_path / "home" / ".swanlab" / ".netrc").write_text("machine host\n login web\n password secret\n")
    check_trackers(["swanlab"])


# --- what is sent -----------------------------------------------------------------------------------------------------


def test_all_are_closed_when_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[dict[str, float], int]] = []
    closed: list[str | None] = []
    working = (lambda values, step: sent.append((values, step)), closed.append)

    def full(values: dict[str, float], step: int) -> None:
        raise OSError("POST https://me:secret-word@host/api failed.\nsecond line")

    def stuck(failed: str | None) -> None:
        raise OSError("no answer")

    monkeypatch.setitem(trackers.OPENERS, "tensorboard", lambda *_: working)
    monkeypatch.setitem(trackers.OPENERS, "mlflow", lambda *_: (full, stuck))
    with (
        pytest.raises(ForgetlessError) as caught,
        open_trackers(["tensorboard", "mlflow"], "run-1", {}, tmp_path) as log,
    ):
        log(POINTS[1])
    assert str(caught.value) == (
        "MLflow no longer takes the curve (step 1): POST https://host/api failed. Mend that, or leave mlflow out of "
        "train.report_to, and run again: training goes on from its last checkpoint."
    )
    assert "MLflow could not be closed: no answer" in caught.value.__notes__[0]
    assert sent == [({"loss": 2.0, "learning_rate": 1e-3, "grad_norm": 0.5, "tokens_per_second": 900.0}, 1)]
    assert closed == ["ForgetlessError"]


def test_tensorboard_reads_back_what_was_logged(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    send("tensorboard", tmp_path / "work")
    read = EventAccumulator(str(tmp_path / "work" / "tensorboard" / "run-1"))
    read.Reload()
    found = {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}
    assert found == {
        "validation_loss": [(0, 2.5), (2, 1.75)],
        "loss": [(1, 2.0), (2, 1.5)],
        "learning_rate": [(1, pytest.approx(1e-3)), (2, pytest.approx(5e-4))],
        "grad_norm": [(1, 0.5)],
        "tokens_per_second": [(1, 900.0)],
    }
    assert b'"rank": 8' in read.Tensors("settings/text_summary")[0].tensor_proto.string_val[0]


def test_tensorboard_goes_where_its_variable_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed: pip install tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "boards"))
    fail("tensorboard", tmp_path / "work")
    assert len(list((tmp_path / "boards" / "run-1").glob("events.*"))) == 1
    assert not list((tmp_path / "work").iterdir())


def test_mlflow_reads_back_what_was_logged_and_marks_a_failed_run(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason="MLflow is not installed: pip install mlflow")
    send("mlflow", tmp_path / "work")
    fail("mlflow", tmp_path / "work")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'work' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("forgetless")
    failed, run = client.search_runs([experiment.experiment_id], order_by=["start_time DESC"])
    assert (run.info.run_name, run.info.status, failed.info.status) == ("run-1", "FINISHED", "FAILED")
    assert run.data.params == {key: str(value) for key, value in SETTINGS.items()}
    history = {key: client.get_metric_history(run.info.run_id, key) for key in ("loss", "validation_loss")}
    assert {key: [(m.step, m.value) for m in found] for key, found in history.items()} == {
        "loss": [(1, 2.0), (2, 1.5)],
        "validation_loss": [(0, 2.5), (2, 1.75)],
    }
    assert not list(tmp_path.rglob("mlruns"))


def test_wandb_offline_keeps_the_curve_and_neither_command_nor_console(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb", reason="W&B is not installed: pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(sys, "argv", ["forgetless", "--data", "s3://bucket/rows?signature=secret-word"])
    send("wandb", tmp_path / "work")
    fail("wandb", tmp_path / "other")
    records = wandb_records(next((tmp_path / "work").rglob("*.wandb")))
    run = next(r.run for r in records if r.HasField("run"))
    assert (run.project, run.display_name) == ("forgetless", "run-1")
    assert {item.key: item.value_json for item in run.config.update}["rank"] == "8"
    rows = [
        {(i.key or i.nested_key[0]): float(i.value_json) for i in r.history.item}
        for r in records
        if r.HasField("history")
    ]
    assert [(row["_step"], row.get("loss"), row.get("validation_loss")) for row in rows] == [
        (0, None, 2.5),
        (1, 2.0, None),
        (2, 1.5, 1.75),
    ]
    exits = [
        [r.exit.exit_code for r in wandb_records(next(folder.rglob("*.wandb"))) if r.HasField("exit")]
        for folder in (tmp_path / "work", tmp_path / "other")
    ]
    assert exits == [[0], [1]]
    assert not any(b"secret-word" in f.read_bytes() for f in (tmp_path / "work").rglob("*") if f.is_file())
    assert capfd.readouterr().out == ""


def wandb_records(path: Path) -> list[Any]:
    """Return the records of a W&B transaction log: 7 bytes of header, then LevelDB's log format."""
    from wandb.proto import wandb_internal_pb2

    data, at, part, records = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if (left := 32_768 - at % 32_768) < 7:
            at += left
            continue
        size, kind = struct.unpack_from("<HB", data, at + 4)
        part += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or its last piece
            records.append(wandb_internal_pb2.Record.FromString(part))
            part = b""
    return records


def test_swanlab_offline_keeps_the_curve_and_prints_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("swanlab", reason="SwanLab is not installed: pip install swanlab")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    send("swanlab", tmp_path / "work")
    fail("swanlab", tmp_path / "other")
    kept = next((tmp_path / "work" / "swanlog").rglob("*.swanlab")).read_bytes()
    assert all(word in kept for word in (b"run-1", b"forgetless", b"validation_loss", b"grad_norm"))
    assert b"ZeroDivisionError" in next((tmp_path / "other" / "swanlog").rglob("*.swanlab")).read_bytes()
    assert capfd.readouterr().out == ""
