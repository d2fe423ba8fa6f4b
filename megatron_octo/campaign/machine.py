"""The machine and the package versions a campaign ran with, recorded in its directory when it starts."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import megatron_octo
from megatron_octo.files import write_json

MACHINE_FILE = "machine.json"
"""File of a campaign directory that holds `describe_machine()`."""

_PACKAGES = ("torch", "megatron-core", "transformer-engine", "transformers", "openrlhf", "ray", "deepspeed", "numpy")


def record_machine(out: Path) -> dict[str, Any]:
    """Write the machine's description into a campaign directory.

    Args:
        out: campaign directory; an older description there is replaced.

    Returns:
        What was written.
    """
    machine = describe_machine()
    write_json(out / MACHINE_FILE, machine)
    return machine


def describe_machine() -> dict[str, Any]:
    """Hardware and versions: `{"hardware": {cpu, cores, memory_bytes, gpus}, "versions": {name: version}}`.

    Cores are those this process may use; memory is the machine's, or the container's limit when lower.
    """
    return {
        "hardware": {
            "cpu": _cpu_model(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_bytes": _memory_bytes(),
            "gpus": gpus(),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    found = {"megatron_octo": megatron_octo.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cpu_model() -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model"):
            return value.strip()
    return platform.processor() or platform.machine()


def _memory_bytes() -> int | None:
    limits = [_read("/sys/fs/cgroup/memory.max").strip()]
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemTotal:"):
            limits.append(str(int(line.split()[1]) * 1024))
    known = [int(limit) for limit in limits if limit.isdigit()]
    return min(known) if known else None


def gpus() -> list[str]:
    """Model names as the NVIDIA driver states them; needs no CUDA library."""
    names = []
    for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        names += [line.partition(":")[2].strip() for line in _read(str(file)).splitlines() if line.startswith("Model:")]
    return names


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
