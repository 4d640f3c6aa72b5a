"""Ray: the cluster of RAY_ADDRESS, or processes of this machine."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from elastic3d.errors import UserError

_OBJECT_STORE = 128 * 2**20  # bytes; what travels are paths, options and rows of numbers


def join_cluster(workers: int | None, extra: str = "ray") -> tuple[Any, bool]:
    """The module `ray`, connected, and whether that was done here (the caller ends it).

    Args:
        workers: cores that a cluster on this machine offers; None: all of them.
        extra: what to install where Ray is missing.

    Raises:
        UserError: Ray is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no request leaves the machine
    try:
        import ray
    except ImportError as error:
        raise UserError(f"runner=ray needs Ray: pip install 'elastic3d[{extra}]'") from error
    if ray.is_initialized():
        return ray, False
    # "local": without an address Ray joins a cluster that runs on this machine
    local: dict[str, Any] = {"address": "local", "num_cpus": workers, "object_store_memory": _OBJECT_STORE}
    handler = signal.getsignal(signal.SIGTERM)
    ray.init(include_dashboard=False, log_to_driver=False, **({} if os.environ.get("RAY_ADDRESS") else local))
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # Ray puts its own there
    return ray, True


def work_in(folder: str | Path) -> None:
    """In a worker: relative paths become those of the caller's folder, where this machine has it. A worker starts in
    the folder of its cluster."""
    with suppress(OSError):
        os.chdir(folder)
