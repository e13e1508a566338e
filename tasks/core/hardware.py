"""What this machine computes on and in which precision, found without importing torch where that is possible."""

import contextlib
import functools
from pathlib import Path


@functools.cache
def device_class() -> str:
    """Return cuda or cpu. torch is asked only where a GPU's device file is present."""
    if not (list(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists() or Path("/dev/dxg").exists()):
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@functools.cache
def auto_dtype() -> str:
    """Return the precision this device does well: bfloat16 where there is hardware for it (on a CPU without it,
    bfloat16 is several times slower than float32), else float16 on a GPU and float32 on a CPU."""
    if device_class() == "cuda":
        import torch

        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        return "float32"
    return "bfloat16" if "amx_bf16" in flags or "avx512_bf16" in flags else "float32"


def resolve_dtype(wanted: str) -> str:
    return auto_dtype() if wanted == "auto" else wanted


def describe_machine() -> dict[str, str]:
    """Return what a result's last bits depend on: the CPU's model, its cores, and the GPUs where there are any."""
    import os
    import platform

    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # not Linux
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        model = next((line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line), model)
    found = {"machine": platform.machine(), "cpu": model, "cores": str(os.cpu_count())}
    if device_class() == "cuda":
        import torch

        found["gpu"] = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return found


def memory_bytes() -> int | None:
    """Return the memory this process may use: the machine's, or its container's limit; None where unknown."""
    import os

    if not hasattr(os, "sysconf"):
        return None
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(total, int(text)) if text.isdigit() else total
