"""The job templates of infra/pools, rendered as Prefect's workers do it, and read as Docker and Kubernetes would."""

import asyncio
import json
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from jsonschema import Draft202012Validator
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_AUTH_STRING, temporary_settings
from prefect.utilities.templating import find_placeholders
from prefect.variables import Variable
from prefect.workers.base import BaseJobConfiguration

from tasks.core.errors import StoreError
from tasks.core.settings import read_settings
from tasks.core.store import open_store

POOLS = Path(__file__).resolve().parents[2] / "infra" / "pools"
HEARTBEAT = "PREFECT_FLOWS_HEARTBEAT_FREQUENCY"


class Rendered(BaseJobConfiguration, extra="allow"):
    """Prefect's own rendering, for any kind of worker."""


def template(name: str) -> dict[str, Any]:
    return json.loads((POOLS / f"{name}.json").read_text(encoding="utf-8"))


def render(name: str, kind: type[BaseJobConfiguration] = Rendered, **values: Any) -> Any:
    return asyncio.run(kind.from_template_and_values(template(name), values))


def prepared(configuration: BaseJobConfiguration) -> Any:
    """The configuration as a worker that logs in to its server hands it to the infrastructure."""
    with temporary_settings({PREFECT_API_AUTH_STRING: "team:in-clear"}):
        configuration.prepare_for_flow_run(FlowRun(id=uuid4(), name="a run", flow_id=uuid4()))
    return configuration


@pytest.fixture(scope="module")
def variables(prefect_server: None) -> dict[str, str]:
    values = {
        "forgetless_bucket": "bucket/team",
        "forgetless_s3_endpoint": "http://store:8333",
        "forgetless_s3_region": "eu-central-1",
    }
    for name, value in values.items():
        Variable.set(name, value, overwrite=True)
    return values


@pytest.mark.parametrize("name", ["docker", "kubernetes"])
def test_every_variable_has_a_place_and_a_valid_default(name: str) -> None:
    shown = template(name)
    schema = shown["variables"]
    Draft202012Validator.check_schema(schema)
    placed = {p.name for p in find_placeholders(shown["job_configuration"])}
    assert placed == schema["properties"].keys()
    defaults = {k: v["default"] for k, v in schema["properties"].items() if "default" in v}
    Draft202012Validator(schema).validate(defaults)
    assert all("title" in v for v in schema["properties"].values())
    assert defaults["env"][HEARTBEAT] == "30"


@pytest.mark.parametrize("name", ["docker", "kubernetes"])
def test_a_server_takes_the_template_as_it_is(name: str, prefect_server: None) -> None:
    """Also unchanged: infra/bootstrap.py compares it at every run."""
    pool = WorkPoolCreate(name=f"a-{name}-pool", type=name, base_job_template=template(name))
    with get_client(sync_client=True) as client:
        assert client.create_work_pool(pool).base_job_template == template(name)
        assert client.read_work_pool(pool.name).base_job_template == template(name)


def test_a_docker_run_gets_its_gpu_store_and_cache(variables: dict[str, str]) -> None:
    rendered = render("docker", env={"FORGETLESS_CACHE_LIMIT": "50GB"})
    assert rendered.env["FORGETLESS_STORE"] == "s3://bucket/team"
    assert rendered.env["AWS_ENDPOINT_URL_S3"] == variables["forgetless_s3_endpoint"]
    assert rendered.env["FORGETLESS_CACHE_LIMIT"] == "50GB"
    assert rendered.env[HEARTBEAT] == "30"
    assert rendered.volumes == ["forgetless-cache:/cache", "/etc/forgetless/secrets:/run/secrets/forgetless:ro"]
    host = docker_arguments(rendered)["host_config"]
    assert host["DeviceRequests"] == [
        {"Driver": "nvidia", "Count": 0, "DeviceIDs": ["0"], "Capabilities": [["gpu"]], "Options": {}}
    ]
    assert host["ShmSize"] == 8 * 1024**3
    assert host["Memory"] == host["MemorySwap"] == 32 * 1024**3
    assert host["CapDrop"] == ["ALL"] and host["SecurityOpt"] == ["no-new-privileges:true"]


def test_a_docker_run_may_differ(variables: dict[str, str]) -> None:
    values = {"device_requests": [], "nano_cpus": 4 * 10**9, "shm_size": "1g", "image": "forgetless:0.1.0-cpu"}
    rendered = render("docker", **values, mem_limit="8g", cache="/srv/cache", networks=["forgetless_default"])
    arguments = docker_arguments(rendered)
    assert arguments["image"] == "forgetless:0.1.0-cpu" and arguments["working_dir"] == "/opt/forgetless"
    assert "DeviceRequests" not in arguments["host_config"] or arguments["host_config"]["DeviceRequests"] == []
    assert arguments["host_config"]["NanoCpus"] == 4 * 10**9
    assert rendered.volumes[0] == "/srv/cache:/cache"


def test_a_docker_run_without_a_bucket_is_told_so(variables: dict[str, str]) -> None:
    """Nothing is written into the container, and lost with it."""
    Variable.unset("forgetless_bucket")
    try:
        url = render("docker").env["FORGETLESS_STORE"]
    finally:
        Variable.set("forgetless_bucket", variables["forgetless_bucket"])
    with pytest.raises(StoreError, match="is not a store"):
        open_store(read_settings(url))


def docker_arguments(rendered: Any) -> dict[str, Any]:
    """What docker-py, through which Prefect's worker creates containers, sends to Docker."""
    from docker.models.containers import _create_container_args

    limits = {"mem_limit": rendered.mem_limit, "memswap_limit": rendered.memswap_limit}
    return _create_container_args(
        {"image": rendered.image, "version": "1.44", **limits, **rendered.container_create_kwargs}
    )


def test_the_docker_worker_reads_the_template(variables: dict[str, str]) -> None:
    worker = pytest.importorskip("prefect_docker.worker", reason="prefect-docker is not installed")
    configuration = prepared(render("docker", worker.DockerWorkerJobConfiguration))
    assert configuration.image == "forgetless:0.1.0-gpu"
    assert configuration.command == "prefect flow-run execute"
    assert configuration.env["AWS_SHARED_CREDENTIALS_FILE"].startswith("/run/secrets/forgetless/")


def test_a_kubernetes_run_gets_its_gpu_secrets_and_memory(prefect_server: None) -> None:
    pod = render("kubernetes").job_manifest["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"] == {
        "limits": {"memory": "32Gi", "nvidia.com/gpu": 1},
        "requests": {"cpu": "2", "memory": "16Gi"},
    }
    assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert pod["terminationGracePeriodSeconds"] >= 120
    memory = {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}}
    assert memory in pod["volumes"] and {"name": "shared-memory", "mountPath": "/dev/shm"} in container["volumeMounts"]
    references = {e["name"]: e["valueFrom"]["secretKeyRef"] for e in container["env"]}
    assert references["AWS_SECRET_ACCESS_KEY"] == {"name": "forgetless", "key": "AWS_SECRET_ACCESS_KEY"}
    assert references["HF_TOKEN"]["optional"] is True


def test_a_kubernetes_run_may_differ(prefect_server: None) -> None:
    values = {"gpus": 2, "node_selector": {"gpu": "l4"}, "tolerations": [], "shm_size": "1Gi", "cpu_limit": "8"}
    rendered = render("kubernetes", **values, secret="other", cache_claim="bases", grace_seconds=600)
    pod = rendered.job_manifest["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"cpu": "8", "memory": "32Gi", "nvidia.com/gpu": 2}
    assert (pod["nodeSelector"], pod["tolerations"]) == ({"gpu": "l4"}, [])
    assert pod["terminationGracePeriodSeconds"] == 600
    assert {e["valueFrom"]["secretKeyRef"]["name"] for e in container["env"]} == {"other"}
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "bases"


def test_the_kubernetes_worker_makes_a_valid_job_without_secrets(prefect_server: None) -> None:
    worker = pytest.importorskip("prefect_kubernetes.worker", reason="prefect-kubernetes is not installed")
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    configuration = render("kubernetes", worker.KubernetesWorkerJobConfiguration, env={"HF_HUB_OFFLINE": "1"})
    job = prepared(configuration).job_manifest
    assert "in-clear" not in json.dumps(job)
    pod = job["spec"]["template"]
    assert pod["metadata"]["labels"]["app.kubernetes.io/component"] == "run"  # the network policy asks for it
    (container,) = pod["spec"]["containers"]
    given = {e["name"]: e for e in container["env"]}
    assert given["HF_HUB_OFFLINE"]["value"] == "1" and given[HEARTBEAT]["value"] == "30"
    assert given["PREFECT_API_AUTH_STRING"]["valueFrom"]["secretKeyRef"]["name"] == "forgetless"
    assert given["PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR"]["value"] == "reschedule"
    assert container["args"][:3] == ["prefect", "flow-run", "execute"]
    # Two of a Job's fields that Prefect asks for in the pod; Kubernetes drops them there.
    del pod["spec"]["completions"], pod["spec"]["parallelism"]
    kubernetes_validate.validate(job, "1.37", strict=True)
