"""What every evidence file says of its own making: the command's settings, versions, and the device it ran on.

A number without this is not evidence. Settings hold names and figures, never local paths.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

from quantpub import __version__


def made_by(stage: str, settings: dict[str, Any], packages: tuple[str, ...] = ("torch",)) -> dict[str, Any]:
    """The `made_by` block: stage, settings, versions of `packages` as installed, device."""
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {
        "stage": stage,
        "settings": settings,
        "versions": {"quantpub": __version__, "python": platform.python_version(), **versions},
        "device": device(),
    }


def installed(packages: tuple[str, ...]) -> tuple[str, ...]:
    """Those of `packages` that are there."""
    found = []
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(name)
            found.append(name)
    return tuple(found)


def device() -> dict[str, Any]:
    """The processor, its usable cores, and the GPU with its driver where torch sees one."""
    import torch

    found: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": None,
    }
    if torch.cuda.is_available():
        found["gpu"] = {
            "name": torch.cuda.get_device_name(),
            "capability": list(torch.cuda.get_device_capability()),
            "memory": torch.cuda.get_device_properties(0).total_memory,
            "cuda": torch.version.cuda,
            "driver": _driver(),
        }
    return found


def cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    match = re.search(r"model name\s*:\s*(.+)", text)
    return match[1].strip() if match else platform.machine()


def _driver() -> str | None:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    match = re.search(r"(\d+\.\d+(?:\.\d+)?)", text)
    return match[1] if match else None
