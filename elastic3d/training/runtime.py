"""What surrounds a run: processes and devices, signals, memory."""

from __future__ import annotations

import ctypes
import platform
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from elastic3d.config.base import DeviceChoice
from elastic3d.config.train import LoopConfig
from elastic3d.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # mallopt(3)


def keep_memory_mapped() -> None:
    """Let glibc keep freed memory instead of giving it back to the kernel after every tensor.

    By default each large tensor is mapped and unmapped anew, and every page of it faults in again. Does
    nothing where there is no glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(_M_TOP_PAD, 256 << 20)


@contextmanager
def stop_signals() -> Iterator[list[str]]:
    """Names of the SIGTERM and SIGINT that arrived inside the block; a second one acts as it did before."""
    arrived: list[str] = []
    before: dict[signal.Signals, Any] = {}

    def note(number: int, frame: object) -> None:
        caught = signal.Signals(number)
        arrived.append(caught.name)
        signal.signal(caught, before[caught])

    for caught in (signal.SIGTERM, signal.SIGINT):
        before[caught] = signal.signal(caught, note)
    try:
        yield arrived
    finally:
        for caught, handler in before.items():
            signal.signal(caught, handler)


def make_accelerator(config: LoopConfig) -> Accelerator:
    """Process group and device as `config` says; starts the run's random numbers."""
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    accelerator = Accelerator(cpu=config.device is DeviceChoice.cpu)
    set_seed(config.seed, device_specific=True)
    return accelerator


def compile_blocks(module: nn.Module) -> None:
    """Compile every block, a child of a `ModuleList`, for itself: all of a kind share one short compilation."""
    blocks = [block for part in module.modules() if isinstance(part, nn.ModuleList) for block in part]
    if not blocks:
        raise UserError(f"compile: {type(module).__name__} has no list of blocks")
    for block in blocks:
        block.compile()


@contextmanager
def first_process_first(config: LoopConfig) -> Iterator[None]:
    """The main process runs the block before the others do, which then find what it wrote."""
    from accelerate import PartialState

    with PartialState(cpu=config.device is DeviceChoice.cpu).main_process_first():
        yield


def enable_gradient_checkpointing(module: nn.Module) -> None:
    """Turn on `gradient_checkpointing` in every part that has the switch; UserError if none has."""
    parts = [part for part in module.modules() if hasattr(part, "gradient_checkpointing")]
    if not parts:
        raise UserError(f"gradient_checkpointing: {type(module).__name__} can't recompute its blocks")
    for part in parts:
        part.gradient_checkpointing = True  # type: ignore[assignment]
