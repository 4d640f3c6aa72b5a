"""What surrounds a run: processes and devices, signals, memory."""

from __future__ import annotations

import ctypes
import platform
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from elastic3d.errors import UserError
from elastic3d.pipelines.memory import GB, free_memory
from elastic3d.training.options import LoopConfig, Precision
from elastic3d.utils.devices import DeviceChoice

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


def state_bytes(module: nn.Module, config: LoopConfig, shards: int = 1) -> int:
    """Bytes in each process of weights, gradients, masters, averages and moments; activations come on top.

    Args:
        shards: processes that the state is divided between; the weights are whole in each before that.
    """
    half = config.precision is Precision.bf16_master
    size = 2 if half else 4
    state = size + 4 + 8 + (8 if half else 0)  # gradient; average; AdamW's moments; master and its gradient
    weights = size * sum(p.numel() for p in module.parameters())
    trained = state * sum(p.numel() for p in module.parameters() if p.requires_grad)
    return max(weights, (weights + trained) // shards)


def require_memory(need: int, module: nn.Module, device: torch.device) -> None:
    """UserError if `need` bytes don't fit on the device, with what is there already of the module."""
    there = sum(p.nbytes for p in module.parameters() if p.device.type == device.type)
    free = free_memory(device) + there
    if need > free:
        raise UserError(
            f"weights, gradients and optimizer state need {need / GB:.1f} GB of {device.type} memory in each process,"
            f" activations come on top, but {free / GB:.1f} GB are there: train fewer weights (routing.parts=lora or"
            " routers), take precision=bf16_master, or shard over several GPUs (configs/accelerate/fsdp.yaml)"
        )


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
