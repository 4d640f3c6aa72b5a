"""The machine and the versions that numbers were taken with."""

from __future__ import annotations

import os
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from elastic3d import __version__
from elastic3d.evaluation.runner import usable_cores

LIBRARIES = ("torch", "numpy", "scipy", "scikit-image", "trimesh", "safetensors")


def machine() -> dict[str, Any]:
    """Processor, cores, memory, accelerator, threads, versions, and how busy the machine is now."""
    cuda = torch.cuda.is_available()
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": usable_cores(),
        "memory_gb": _memory(),
        "accelerator": torch.cuda.get_device_name() if cuda else None,
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "elastic3d": __version__,
        **{name: _version(name) for name in LIBRARIES},
    }


@cache
def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory() -> float | None:
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
