"""Bring a Prefect server to what forgetless needs: work pools, deployments, automations and, on S3, the bucket.

    PREFECT_API_URL=http://server:4200/api python infra/bootstrap.py --gpu kubernetes --gpus 4

What is as it should be stays untouched: a second run changes nothing, and says so. FORGETLESS_NOTIFY, a Slack or other
webhook's address, goes into the server's secrets as the notification block `forgetless`; a block of that name and any
type that was made in the UI is taken as it is.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from prefect.blocks.notifications import CustomWebhookNotificationBlock, SlackWebhook
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL
from prefect.variables import Variable

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tasks.core.errors import ConfigError, ForgetlessError, StoreError  # noqa: E402
from tasks.core.retry import error_code  # noqa: E402
from tasks.core.settings import read_settings  # noqa: E402
from tasks.core.store import check_writable, open_store  # noqa: E402

POOLS = {
    "cpu": "Whole runs; a run waits here for its stages on other pools.",
    "gpu": "Scoring and training.",
    "memory": "Merging and converting.",
}
TYPES = ("process", "docker", "kubernetes")
BLOCK = "forgetless"
NOTIFY_VARIABLE = "FORGETLESS_NOTIFY"


def say(what: str, name: str, done: str) -> None:
    print(f"{what:<12} {name:<42} {done}")


def main(argv: list[str] | None = None) -> int:
    """Return 0, or 1 after one sentence on what is wrong."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    for pool in POOLS:
        parser.add_argument(
            f"--{pool}", metavar="TYPE", choices=TYPES, default="process", help=f"{POOLS[pool]} {TYPES}"
        )
    parser.add_argument("--gpus", type=int, default=1, help="trainings and scorings at once on the gpu pool (1)")
    arguments = parser.parse_args(argv)
    if not PREFECT_API_URL.value():
        print("bootstrap: PREFECT_API_URL names no server. Set it, such as http://127.0.0.1:4200/api", file=sys.stderr)
        return 1
    try:
        with get_client(sync_client=True) as client:
            for pool in POOLS:
                limit = arguments.gpus if pool == "gpu" else None
                bring_pool(client, pool, getattr(arguments, pool), limit)
            bring_deployments(client)
            bring_automations(client)
            if any(getattr(arguments, pool) != "process" for pool in POOLS):
                bring_variables(client)
        bring_bucket()
    except ForgetlessError as error:
        print(f"bootstrap: {error}", file=sys.stderr)
        return 1
    return 0


def bring_pool(client: SyncPrefectClient, name: str, kind: str, limit: int | None) -> None:
    """Create a work pool, or mend its template and limit. Raises ConfigError for one of another type."""
    template = json.loads((ROOT / "infra" / "pools" / f"{kind}.json").read_text(encoding="utf-8"))
    try:
        found = client.read_work_pool(name)
    except ObjectNotFound:
        wanted = WorkPoolCreate(
            name=name, type=kind, base_job_template=template, concurrency_limit=limit, description=POOLS[name]
        )
        client.create_work_pool(wanted)
        return say("work pool", name, f"created ({kind})")
    if found.type != kind:
        raise ConfigError(
            f"The work pool {name} is of type {found.type}, not {kind}. Keep it with --{name} {found.type}, or delete "
            f"it first: prefect work-pool delete {name}"
        )
    if (found.base_job_template, found.concurrency_limit) == (template, limit):
        return say("work pool", name, "unchanged")
    client.update_work_pool(name, WorkPoolUpdate(base_job_template=template, concurrency_limit=limit))
    say("work pool", name, "updated")


def bring_deployments(client: SyncPrefectClient) -> None:
    """Register what prefect.yaml has. Schedules stay as they were switched on the server."""
    before = _deployments(client)
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ForgetlessError(f"prefect deploy --all failed: {(done.stderr or done.stdout).strip()[-2000:]}")
    after = _deployments(client)
    for name, found in after.items():
        known = before.get(name)
        for schedule in found.schedules:
            was = next((s for s in known.schedules if s.slug == schedule.slug), None) if known else None
            if was and was.active != schedule.active:
                client.update_deployment_schedule(found.id, schedule.id, active=was.active)
                schedule.active = was.active
        state = "created" if known is None else "unchanged" if _facts(known) == _facts(found) else "updated"
        say("deployment", name, state)


def _deployments(client: SyncPrefectClient) -> dict[str, Any]:
    flows = {flow.id: flow.name for flow in client.read_flows()}
    return {f"{flows[found.flow_id]}/{found.name}": found for found in client.read_deployments()}


def _facts(deployment: Any) -> dict[str, Any]:
    """Return what is the same as long as nobody changed anything."""
    facts: dict[str, Any] = deployment.model_dump(
        mode="json",
        include={
            *("description", "entrypoint", "parameters", "parameter_openapi_schema", "pull_steps", "tags"),
            *("work_pool_name", "work_queue_name", "job_variables", "enforce_parameter_schema"),
        },
    )
    return facts | {"schedules": [(s.slug, s.active, str(s.schedule)) for s in deployment.schedules]}


def bring_automations(client: SyncPrefectClient) -> None:
    """Create or update the automations of infra/automations; those that notify need the notification block."""
    block = bring_block(client)
    deployments = {name: found.id for name, found in _deployments(client).items()}
    for path in sorted((ROOT / "infra" / "automations").glob("*.yaml")):
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        notifies = [action for action in raw["actions"] if "block" in action]
        if notifies and block is None:
            say("automation", path.stem, f"left out: set {NOTIFY_VARIABLE}, or make a block named {BLOCK}")
            continue
        for action in raw["actions"]:
            if action.pop("block", None):
                action["block_document_id"] = str(block)
            if name := action.pop("deployment", None):
                action |= {"source": "selected", "deployment_id": str(deployments[name])}
        wanted = AutomationCore.model_validate(raw)
        found = client.read_automations_by_name(wanted.name)
        if not found:
            client.create_automation(wanted)
            say("automation", path.stem, "created")
        elif _plain(found[0]) == _plain(wanted):
            say("automation", path.stem, "unchanged")
        else:
            client.update_automation(found[0].id, wanted)
            say("automation", path.stem, "updated")


def _plain(automation: AutomationCore) -> Any:
    """Return what an automation says, whatever the server added to it."""
    return AutomationCore.model_validate(
        automation.model_dump(include={"name", "description", "trigger", "actions"})
    ).model_dump(mode="json", exclude={"enabled": True, "trigger": {"id"}})


def bring_block(client: SyncPrefectClient) -> Any:
    """Return the id of the notification block, made or changed as the environment says; None where there is none."""
    address = os.environ.get(NOTIFY_VARIABLE)
    found = [document for document in client.read_block_documents() if document.name == BLOCK]
    if not address:
        return found[0].id if found else None
    if not address.startswith(("https://", "http://")):
        raise ConfigError(
            f"{NOTIFY_VARIABLE}: expected the https:// address of a webhook. For e-mail and others, make a "
            f"notification block named {BLOCK} in the Prefect UI."
        )
    if address.startswith("https://hooks.slack.com/"):
        block: Any = SlackWebhook(url=address)
    else:
        block = CustomWebhookNotificationBlock(
            name=BLOCK,
            url="{{address}}",
            json_data={"subject": "{{subject}}", "text": "{{body}}"},
            secrets={"address": address},
        )
    kind = block.get_block_type_slug()
    try:
        known = type(block).load(BLOCK)
    except ValueError:
        known = None
    if known is not None and _address(known) == address:
        say("notification", BLOCK, "unchanged")
    else:
        block.save(BLOCK, overwrite=True)
        say("notification", BLOCK, f"{'updated' if known else 'created'} ({kind})")
    (document,) = (d for d in client.read_block_documents() if d.name == BLOCK and d.block_type.slug == kind)
    return document.id


def _address(block: Any) -> str | None:
    if isinstance(block, SlackWebhook):
        return block.url.get_secret_value() if block.url else None
    return str(block.secrets.get_secret_value().get("address"))


def bring_variables(client: SyncPrefectClient) -> None:
    """Say where the store is to the containers of Docker and Kubernetes pools, whose worker's environment they have
    not."""
    values = {
        "forgetless_bucket": read_settings().store_url.removeprefix("s3://"),
        "forgetless_s3_endpoint": os.environ.get("AWS_ENDPOINT_URL_S3", ""),
        "forgetless_s3_region": os.environ.get("AWS_DEFAULT_REGION", ""),
    }
    if not read_settings().store_url.startswith("s3://"):
        raise ConfigError("Containers share a bucket: set FORGETLESS_STORE to s3://bucket/prefix.")
    for name, value in values.items():
        found = client.read_variable_by_name(name)
        if not value or (found and found.value == value):
            say("variable", name, "unchanged" if value else "left out: not set here")
            continue
        Variable.set(name, value, overwrite=True)
        say("variable", name, "updated" if found else "created")


def bring_bucket() -> None:
    """Create the store's bucket, where FORGETLESS_STORE is s3:// and it is absent. Raises StoreError where the store
    cannot be used."""
    store: Any = open_store(read_settings())
    if not store.url.startswith("s3://"):
        return
    try:
        check_writable(store)
        return say("bucket", store.bucket, "unchanged")
    except StoreError as error:
        if error.__cause__ is None or error_code(error.__cause__)[1] != "NoSuchBucket":
            raise
    region = store.client.meta.region_name
    where = {} if region in (None, "us-east-1", "auto") else {"LocationConstraint": region}
    store.client.create_bucket(Bucket=store.bucket, **({"CreateBucketConfiguration": where} if where else {}))
    say("bucket", store.bucket, "created")


if __name__ == "__main__":
    sys.exit(main())
