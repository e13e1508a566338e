"""compose.yaml, the manifests, the units and the Dockerfile: valid by their own tools, closed where they must be."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

INFRA = Path(__file__).resolve().parents[2] / "infra"
ROOT = INFRA.parent
HADOLINT = shutil.which("hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
UNITS = sorted((INFRA / "systemd").glob("*.service"))
SECRETS = ("POSTGRES_PASSWORD", "PREFECT_API_AUTH_STRING", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN")


def manifests() -> list[dict[str, Any]]:
    """Everything that kustomization.yaml lists, as it is written."""
    folder = INFRA / "kubernetes"
    listed = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
    return [m for name in listed for m in yaml.safe_load_all((folder / name).read_text())]


def compose() -> dict[str, Any]:
    return yaml.safe_load((INFRA / "compose.yaml").read_text(encoding="utf-8"))


def workloads() -> list[dict[str, Any]]:
    """The manifests that make pods."""
    return [m for m in manifests() if m["kind"] in {"Deployment", "StatefulSet"}]


def database(environment: dict[str, str]) -> dict[str, str]:
    return {k: str(v) for k, v in environment.items() if k.startswith("PREFECT_SERVER_DATABASE_")}


# --- compose ----------------------------------------------------------------------------------------------------------


def test_compose_follows_its_specification() -> None:
    check_jsonschema = pytest.importorskip("check_jsonschema", reason="it ships the specification's schema")
    from jsonschema import Draft202012Validator

    schemas = Path(check_jsonschema.__file__).parent / "builtin_schemas" / "vendor"
    validator = Draft202012Validator(json.loads((schemas / "compose-spec.json").read_text()))
    assert [f"{e.json_path}: {e.message}" for e in validator.iter_errors(compose())] == []
    wrong = compose()
    wrong["services"]["server"]["healthchek"] = {}
    assert not validator.is_valid(wrong)


def test_compose_listens_on_this_machine_alone_unless_told_otherwise() -> None:
    ports = {name: s.get("ports", []) for name, s in compose()["services"].items()}
    published = [p for listed in ports.values() for p in listed]
    assert published and all(p.startswith("${FORGETLESS_BIND:-127.0.0.1}:") for p in published)
    assert ports["postgres"] == ports["worker-cpu"] == ports["worker-gpu"] == []


def test_compose_has_no_default_secret() -> None:
    text = (INFRA / "compose.yaml").read_text()
    for name in SECRETS[:4]:
        uses = re.findall(rf"\${{{name}[^}}]*}}", text)
        assert uses and all(u == f"${{{name}:?set it in infra/.env}}" for u in uses), name
    for service in compose()["services"].values():
        for name, value in (service.get("environment") or {}).items():
            if re.search("PASSWORD|AUTH_STRING|SECRET|ACCESS_KEY|TOKEN", name):
                assert re.fullmatch(r"\$\{\w+(:\?.+|:-)}", value), name


def test_every_service_is_pinned_checked_and_restarted() -> None:
    services = compose()["services"]
    for name, service in services.items():
        assert re.search(r":v?\d+\.\d+[\w.-]*$", service["image"]), name
        assert service["healthcheck"]["test"][0] == "CMD", name
        assert service["restart"] == "unless-stopped" and service["security_opt"] == ["no-new-privileges:true"], name
    kept = {v.split(":")[0] for s in services.values() for v in s.get("volumes", [])}
    assert kept == compose()["volumes"].keys()
    assert services["worker-gpu"]["profiles"] == ["gpu"]
    assert services["worker-cpu"]["stop_grace_period"] == "150s"
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    ours = [s["image"] for s in services.values() if "build" in s]
    assert ours == [f"forgetless:{version}-{target}" for target in ("cpu", "cpu", "gpu", "dashboard")]


def test_prefects_images_have_the_pinned_version() -> None:
    pinned = re.search(r"^prefect==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)[1]
    texts = [INFRA / "compose.yaml", *(INFRA / "kubernetes").glob("*.yaml")]
    tags = [t for path in texts for t in re.findall(r"prefecthq/prefect:(\S+)", path.read_text())]
    assert len(tags) == 3 and all(t.startswith(f"{pinned}-python3.11") for t in tags)


def test_the_example_settings_have_the_secrets_names_and_no_values() -> None:
    lines = (INFRA / ".env.example").read_text().splitlines()
    given = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    assert given == dict.fromkeys(SECRETS, "")
    secret = yaml.safe_load((INFRA / "kubernetes" / "secret.example.yaml").read_text())
    assert secret["stringData"] == given
    optional = {m for line in lines for m in re.findall(r"^# ([A-Z_0-9]+)=$", line)}
    used = set(re.findall(r"\$\{(\w+)", (INFRA / "compose.yaml").read_text()))
    assert used == given.keys() | optional
    ignored = (ROOT / ".gitignore").read_text().split()
    assert "infra/.env" in ignored and "infra/kubernetes/secret.yaml" in ignored


# --- Kubernetes -------------------------------------------------------------------------------------------------------


def test_the_manifests_follow_kubernetes_schemas() -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="it ships Kubernetes' schemas")
    for manifest in manifests():
        kubernetes_validate.validate(manifest, "1.37", strict=True)
    wrong = next(m for m in manifests() if m["kind"] == "StatefulSet")
    wrong["spec"]["template"]["spec"]["containers"][0]["imagge"] = "x"
    with pytest.raises(kubernetes_validate.utils.ValidationError):
        kubernetes_validate.validate(wrong, "1.37", strict=True)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl here")
def test_kustomize_builds_them() -> None:
    done = subprocess.run(
        ["kubectl", "kustomize", str(INFRA / "kubernetes")], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    built = list(yaml.safe_load_all(done.stdout))
    assert {m["metadata"].get("namespace") for m in built if m["kind"] != "Namespace"} == {"forgetless"}
    images = [
        c["image"] for m in built if m["kind"] == "Deployment" for c in m["spec"]["template"]["spec"]["containers"]
    ]
    assert "forgetless:0.1.0-dashboard" in images and all(":" in image for image in images)
    (settings,) = (m for m in built if m["kind"] == "ConfigMap")
    assert settings["metadata"]["name"] == "forgetless"  # without a hash: the job template names it
    assert not [m for m in built if m["kind"] == "Secret"]


def test_every_pod_is_restricted() -> None:
    (namespace,) = (m for m in manifests() if m["kind"] == "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    job = json.loads((INFRA / "pools" / "kubernetes.json").read_text())["job_configuration"]["job_manifest"]
    for manifest in [*workloads(), job]:
        pod = manifest["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["limits"]["memory"] and container["resources"]["requests"]["cpu"]


def test_pods_take_secrets_by_reference_and_the_database_is_closed() -> None:
    for manifest in workloads():
        for container in manifest["spec"]["template"]["spec"]["containers"]:
            for entry in container.get("env", []):
                if entry["name"] in SECRETS or re.search("PASSWORD$|AUTH_STRING$", entry["name"]):
                    assert entry["valueFrom"]["secretKeyRef"]["key"] in SECRETS, entry
    policies = {m["metadata"]["name"]: m["spec"] for m in manifests() if m["kind"] == "NetworkPolicy"}
    assert policies["deny-ingress"] == {"podSelector": {}, "policyTypes": ["Ingress"]}
    (source,) = policies["postgres"]["ingress"][0]["from"]
    assert source["podSelector"]["matchLabels"] == {"app.kubernetes.io/component": "server"}
    assert policies["postgres"]["egress"] == []
    (role,) = (m for m in manifests() if m["kind"] == "Role")
    assert not [r for rule in role["rules"] for r in rule["resources"] if r in {"secrets", "*"}]


def test_names_in_the_job_template_exist() -> None:
    properties = json.loads((INFRA / "pools" / "kubernetes.json").read_text())["variables"]["properties"]
    names = {(m["kind"], m["metadata"]["name"]) for m in manifests()}
    assert ("PersistentVolumeClaim", properties["cache_claim"]["default"]) in names
    assert ("Namespace", properties["namespace"]["default"]) in names
    secret = yaml.safe_load((INFRA / "kubernetes" / "secret.example.yaml").read_text())
    assert secret["metadata"]["name"] == properties["secret"]["default"]
    (generated,) = yaml.safe_load((INFRA / "kubernetes" / "kustomization.yaml").read_text())["configMapGenerator"]
    assert generated["name"] == properties["config_map"]["default"]


def test_one_way_to_the_database() -> None:
    """Compose, Kubernetes and systemd start the server with the same settings, but for where the database is."""
    server = compose()["services"]["server"]["environment"]
    (manifest,) = (m for m in workloads() if m["metadata"]["name"] == "server")
    entries = manifest["spec"]["template"]["spec"]["containers"][0]["env"]
    pod = {e["name"]: e.get("value", "a secret") for e in entries}
    unit = dict(
        re.findall(r"^Environment=(\w+)=(.*)$", (INFRA / "systemd" / "forgetless-server.service").read_text(), re.M)
    )
    expected = database(unit)
    assert len(expected) == 5
    for other in (database(server), database(pod)):
        assert other.pop("PREFECT_SERVER_DATABASE_PASSWORD")
        assert other | {"PREFECT_SERVER_DATABASE_HOST": "127.0.0.1"} == expected
    for settings in (server, pod, unit):
        assert settings["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"


# --- systemd ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_systemd_takes_the_units_and_finds_them_closed(tmp_path: Path) -> None:
    names = []
    for path in UNITS:
        name = path.name.replace("@.", "@0.")
        text = path.read_text().replace("/opt/forgetless/.venv/bin/forgetless", "/bin/true")
        (tmp_path / name).write_text(text.replace("/opt/forgetless/infra/worker.sh", "/bin/true"))
        names.append(name)
    words = ["systemd-analyze", "verify", *names]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and "Unknown" not in done.stderr, done.stderr
    for name in names:
        words = ["systemd-analyze", "security", "--offline=true", "--threshold=25", name]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout[-500:] + done.stderr


def test_units_hold_no_secret_and_leave_time_for_a_checkpoint() -> None:
    from tasks.training.worker import ENDING_SECONDS

    assert [u.name for u in UNITS] == [
        f"forgetless-{n}.service" for n in ("dashboard", "server", "worker-gpu@", "worker@")
    ]
    for path in UNITS:
        text = path.read_text()
        assert "EnvironmentFile=/etc/forgetless/env\n" in text and "User=forgetless\n" in text
        assert not re.search(r"^Environment=\w*(PASSWORD|AUTH_STRING|SECRET|TOKEN)", text, re.M)
        # `$NAME` would be filled in by systemd and be seen in `ps`.
        assert not re.search(r"(?<!\$)\$(\w|{)", text)
        kept = set(SECRETS) - set(re.search(r"^UnsetEnvironment=(.+)$", text, re.M)[1].split())
        assert ("POSTGRES_PASSWORD" in kept) == ("server" in path.name)
        if "worker" in path.name:
            assert "KillMode=mixed\n" in text
            assert int(re.search(r"^TimeoutStopSec=(\d+)$", text, re.M)[1]) > ENDING_SECONDS
    assert "\nEnvironment=CUDA_VISIBLE_DEVICES=%i\n" in UNITS[-2].read_text()


# --- the images -------------------------------------------------------------------------------------------------------


def dockerfile() -> str:
    return (INFRA / "docker" / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")


@pytest.mark.skipif(HADOLINT is None, reason="no hadolint here")
def test_hadolint_finds_nothing() -> None:
    words = [str(HADOLINT), str(INFRA / "docker" / "Dockerfile")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout


def test_the_images_are_pinned_run_as_nobody_and_hold_no_compiler() -> None:
    lines = dockerfile().splitlines()
    bases = [line.split("=", 1)[1] for line in lines if re.match(r"ARG \w+_IMAGE=", line)]
    assert len(bases) == 2 and all(re.search(r":\d+\.\d+\.\d+-", base) for base in bases)
    stages: dict[str, list[str]] = {}
    parent: dict[str, str] = {}
    for line in lines:
        if found := re.match(r"FROM (\S+) AS (\S+)", line):
            name = found[2]
            stages[name], parent[name] = [], found[1]
        elif stages:
            stages[name].append(line)
    assert all(base in stages or base.startswith("${") for base in parent.values())
    for target in ("cpu", "gpu", "dashboard"):
        assert parent[target] == "runtime" and parent["runtime"] == "${PYTHON_IMAGE}"
        own = [line for line in stages["runtime"] + stages[target] if line]
        assert [line for line in own if line.startswith("USER ")] == ["USER 10001:10001"]
        assert "build-essential" not in "".join(own)
        assert f"COPY --from=build-{target} /opt/venv /opt/venv" in own
        installs = [
            line for line in stages[f"build-{target}"] if "pip install" in line and "--no-deps --force" not in line
        ]
        assert installs and all("-c constraints.txt" in line and "--mount=type=cache" in line for line in installs)
    assert list(stages)[-1] == "cpu"
    assert not re.search("PASSWORD|TOKEN|SECRET|ACCESS_KEY", dockerfile())


def test_what_the_images_copy_exists_and_is_in_their_context() -> None:
    ignore = (INFRA / "docker" / "Dockerfile.dockerignore").read_text().split("\n")
    let_in = {line[1:] for line in ignore if line.startswith("!")}
    copied = {w for line in re.findall(r"^COPY (?!--from)(.+)$", dockerfile(), re.M) for w in line.split()[:-1]}
    assert copied == let_in
    assert all((ROOT / path).exists() for path in copied)
    assert "**/.env" in ignore
