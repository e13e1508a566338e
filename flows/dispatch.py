"""A stage on its deployment: a worker of another work pool takes it, and its record comes back through the store.

The child leaves what it made, or the sentence of its error, in `handoffs/<its flow run>.json`. A child that crashed (a
lost worker or machine) is started again and goes on from what is in the store; a parent that ends ends its child.
"""

import contextlib
import json
import time
from collections.abc import Callable
from typing import Any, TypeVar

from prefect import runtime
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import WorkerFilter, WorkerFilterStatus
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL
from prefect.states import Cancelling
from prefect.utilities.urls import url_for
from pydantic import BaseModel

from tasks.core import errors
from tasks.core.config import PlacementConfig
from tasks.core.digest import canonical_json
from tasks.core.errors import ConfigError, ForgetlessError
from tasks.core.progress import report_progress
from tasks.core.records import Record
from tasks.core.settings import quiet_libraries, read_settings
from tasks.core.store import Store, open_store

quiet_libraries()  # a worker imports a flow's module, not the command line
Result = TypeVar("Result", bound=Record)
FLOWS = {"score": "score-model", "train": "train-adapter", "package": "package-model"}
"""Which flow a deployment must be of, by the key of a recipe's placement section."""
POLL_SECONDS = 2.0
NO_WORKER_SECONDS = 60.0
ENDING_SECONDS = 20.0  # for a child's checkpoint; a worker gives its own processes 30
STARTS = 3


def handing_over(store_url: str, work: Callable[[], Result]) -> Result:
    """Return what `work` returns; as another flow's child on a deployment, leave it for that flow too."""
    if not (runtime.deployment.id and runtime.flow_run.parent_flow_run_id):
        return work()

    def leave(what: dict[str, Any]) -> None:
        open_store(read_settings(store_url)).write_bytes(_place(runtime.flow_run.id), canonical_json(what))

    try:
        record = work()
    except ForgetlessError as error:
        leave({"error": str(error), "kind": type(error).__name__})
        raise
    leave({"record": record.model_dump(mode="json")})
    return record


def _place(flow_run: Any) -> str:
    return f"handoffs/{flow_run}.json"


def check_placement(placement: PlacementConfig) -> None:
    """Raise ConfigError, with every problem, unless the deployments of a recipe are on this server and fit."""
    problems = []
    wanted = {key: name for key, name in placement.model_dump().items() if name}
    if not wanted:
        return
    with get_client(sync_client=True) as client:
        for key, name in wanted.items():
            if name.partition("/")[0] != FLOWS[key]:
                problems.append(f"placement.{key}: expected a deployment of {FLOWS[key]}, found {name!r}.")
                continue
            try:
                client.read_deployment_by_name(name)
            except ObjectNotFound:
                problems.append(f"placement.{key}: {_absent(client, name)}")
    if problems:
        raise ConfigError(problems)


def _absent(client: SyncPrefectClient, name: str) -> str:
    if not PREFECT_API_URL.value():
        return f"{name} needs a Prefect server, and PREFECT_API_URL names none. Set it, or leave placement out."
    flow = name.partition("/")[0]
    flows = {str(found.id): found.name for found in client.read_flows()}
    known = sorted(f"{flow}/{d.name}" for d in client.read_deployments() if flows.get(str(d.flow_id)) == flow)
    there = f"it has {', '.join(known)}" if known else f"it has none of {flow}"
    return f"there is no deployment {name} on {PREFECT_API_URL.value()}; {there}. Register it: prefect deploy --all"


def run_on(name: str, parameters: dict[str, Any], kind: type[Result], store: Store, stage: str) -> Result:
    """Return the record that a deployment's run makes of `parameters`, started again up to twice where it crashed.

    Raises the child's own error, ForgetlessError where it ended without one, ConfigError where the deployment is absent
    or takes other parameters."""
    for start in range(1, STARTS + 1):
        run_id, state = _run_child(name, parameters, stage)
        data = store.read_bytes(_place(run_id))
        store.delete(_place(run_id))
        left = json.loads(data or b"{}")
        if "record" in left and state.is_completed():
            return kind(**left["record"])
        link = url_for("flow-run", obj_id=run_id) or f"prefect flow-run logs {run_id}"
        if "error" in left:
            raise getattr(errors, left["kind"], ForgetlessError)(f"{left['error']}\n{name} said so: {link}")
        if not state.is_crashed() or start == STARTS:
            break
        report_progress(stage, 0, 0, f"{name} was lost ({state.message}), starting it again")
    what = "left no result in the store" if state.is_completed() else f"ended as {state.name}: {state.message}"
    if state.is_completed():
        what += f" {store.url}: it writes to another one, or its forgetless is an older version"
    raise ForgetlessError(
        f"{name} {what.rstrip('.')}. Its log: {link}. What finished is kept: the same run started again goes on."
    )


def _run_child(name: str, parameters: dict[str, Any], stage: str) -> tuple[Any, Any]:
    """Return a child's flow run id and its final state; whatever ends the wait ends the child too."""
    with get_client(sync_client=True) as client:
        try:
            asked = {k: v.model_dump(mode="json") if isinstance(v, BaseModel) else v for k, v in parameters.items()}
            run: Any = run_deployment(name, parameters=asked, timeout=0)
        except ObjectNotFound:
            raise ConfigError(_absent(client, name)) from None
        except PrefectHTTPStatusError as error:
            raise ConfigError(
                f"{name} does not take this run's parameters ({_detail(error)}): it was deployed by another version of "
                "forgetless. Register it again: prefect deploy --all"
            ) from None
        try:
            return run.id, _wait(client, name, run, stage)
        except BaseException:
            _cancel(client, run.id)
            raise


def _detail(error: PrefectHTTPStatusError) -> str:
    try:
        return str(error.response.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return f"status {error.response.status_code}"


def _wait(client: SyncPrefectClient, name: str, run: Any, stage: str) -> Any:
    """Return a run's final state; say meanwhile where it stands, and where no worker could take it."""
    since, shown = time.monotonic(), ""
    while True:
        run = client.read_flow_run(run.id)
        state = run.state
        if state and state.is_final():
            return state
        note = f"{name}: {state.name.lower() if state else 'submitted'}"
        is_waiting = state is None or state.is_scheduled() or state.is_pending()
        if is_waiting and time.monotonic() - since > NO_WORKER_SECONDS:
            note = _describe_pool(client, run) or note
        if note != shown:
            report_progress(stage, 0, 0, note)
            shown = note
        time.sleep(POLL_SECONDS)


def _describe_pool(client: SyncPrefectClient, run: Any) -> str | None:
    """Return why a run still waits: no worker polls its work pool. None where one does, which may be busy."""
    online = WorkerFilter(status=WorkerFilterStatus(any_=["ONLINE"]))
    pool = run.work_pool_name
    if pool is None or client.read_workers_for_work_pool(pool, worker_filter=online):
        return None
    return f"no worker polls the work pool {pool}. Start one: prefect worker start --pool {pool}"


def _cancel(client: SyncPrefectClient, run_id: Any) -> None:
    """Ask for a run's end and give it time to leave a checkpoint."""
    with contextlib.suppress(Exception):  # what ended the wait is what the user must hear of
        client.set_flow_run_state(run_id, Cancelling(message="The run that waits for it ended."))
        end = time.monotonic() + ENDING_SECONDS
        while time.monotonic() < end:
            state = client.read_flow_run(run_id).state
            if state is None or state.is_final():
                return
            time.sleep(0.5)
