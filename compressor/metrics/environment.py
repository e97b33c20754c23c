"""Where a measurement was made, so that nobody compares figures of two machines unawares."""

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import psutil
import torch

PACKAGES = ("compressor", "torch", "transformers", "compressed-tensors", "safetensors", "accelerate", "numpy")

# The instruction sets that decide which int8, int4 and bf16 kernels run, as Linux names them; x86 first, then Arm.
INSTRUCTION_SETS = (
    *("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)


def describe_environment() -> dict[str, Any]:
    """The machine, its load, and the versions of what ran on it, ready for JSON; what is not known is null."""
    return {
        "cpu": _cpu(),
        "memory_bytes": psutil.virtual_memory().total,
        "memory_available_bytes": psutil.virtual_memory().available,
        "gpus": _gpus(),
        "gpu_driver": _gpu_driver(),
        "cuda": torch.version.cuda,
        "os": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "git": _git(),
    }


def _cpu() -> dict[str, Any]:
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return {
        "model": info.get("model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "cores": psutil.cpu_count(logical=False),
        "logical_cores": os.cpu_count(),
        # A container or taskset may give fewer than there are.
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }


def _cpuinfo() -> dict[str, str]:
    """The fields of the first processor in /proc/cpuinfo; empty where there is no such file."""
    first = (_read("/proc/cpuinfo") or "").split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": properties.name,
                "memory_bytes": properties.total_memory,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "multiprocessors": properties.multi_processor_count,
            }
        )
    return gpus


def _gpu_driver() -> str | None:
    if not torch.cuda.is_available():
        return None
    lines = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return lines.splitlines()[0] if lines else _read("/sys/module/nvidia/version")


def _git() -> dict[str, Any] | None:
    """Commit of the checkout that this package runs from; None when it is installed."""
    package = Path(__file__).resolve().parent.parent
    top = _run("git", "-C", str(package), "rev-parse", "--show-toplevel")
    # A virtual environment may lie inside the checkout of another project, whose commit would say nothing.
    if top is None or Path(top).resolve() != package.parent:
        return None
    commit = _run("git", "-C", str(package), "rev-parse", "--verify", "--quiet", "HEAD")
    if commit is None:
        return None
    changes = _run("git", "-C", str(package), "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "has_changes": None if changes is None else bool(changes)}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _read(path: str) -> str | None:
    with contextlib.suppress(OSError):
        return Path(path).read_text().strip()
    return None


def _run(*command: str) -> str | None:
    """What a command prints, or None when it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
