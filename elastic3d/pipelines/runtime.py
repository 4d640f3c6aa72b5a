"""Where a bundled model is, which device and number format it runs in, how long it takes; seeds."""

from __future__ import annotations

import operator
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from elastic3d.errors import UserError
from elastic3d.utils.devices import DeviceChoice, DTypeChoice

_PACKAGE = Path(__file__).resolve().parents[1]
BUNDLED = (
    _PACKAGE / "data" / "pretrained",
    _PACKAGE.parent / "data" / "pretrained",
)  # of a wheel, of a checkout


def find_model(name: str | Path) -> Path:
    """A model's folder, or the one of a bundled model by its name, wherever the current folder is."""
    folder = Path(name)
    if folder.exists() or len(folder.parts) != 1:
        return folder
    return next((home / name for home in BUNDLED if (home / name).is_dir()), folder)


def seeds_of(seed: Any, count: int) -> list[int]:
    """One seed for each of `count` samples, from one for all or a list; integers of numpy and arrays are fine.

    Raises:
        UserError: another number of them, or one that is no integer of 64 bits.
    """
    try:
        one = operator.index(seed)
    except TypeError:
        pass
    else:
        seed = [one] * count
    try:
        seeds = [operator.index(each) for each in seed]
    except TypeError as error:
        raise UserError(f"seed is {seed!r}, expected an integer, or a list of them") from error
    if len(seeds) != count:
        raise UserError(f"seed has {len(seeds)} values, expected one or {count}")
    for each in seeds:
        if not -(2**63) <= each < 2**64:
            raise UserError(f"seed is {each}, expected an integer of 64 bits")
    return seeds


def resolve_device(choice: DeviceChoice | torch.device | str = DeviceChoice.auto) -> torch.device:
    """`auto` is CUDA, then MPS, then the CPU; anything else must exist.

    Raises:
        UserError: there is no such device here.
    """
    name = choice.value if isinstance(choice, DeviceChoice) else str(choice)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if _has_mps() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device is {name!r}, expected auto, cpu, cuda or mps") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise UserError(f"device is {name}, but PyTorch sees {found} CUDA devices: expected auto or cpu")
    if device.type == "mps" and not _has_mps():
        raise UserError("device is mps, but PyTorch has no Metal here: expected auto or cpu")
    return device


def resolve_dtype(choice: DTypeChoice | torch.dtype | str, device: torch.device) -> torch.dtype:
    """`auto` is bf16 where the hardware multiplies it directly, else fp32.

    Raises:
        UserError: unknown, or fp16 on a CPU, which has no such matrix product: a hundred times slower.
    """
    if isinstance(choice, torch.dtype):
        dtype = choice
    else:
        name = choice.value if isinstance(choice, DTypeChoice) else choice
        if name not in DTypeChoice.__members__:
            raise UserError(f"dtype is {name!r}, expected one of {', '.join(DTypeChoice.__members__)}")
        if name == "auto":
            return torch.bfloat16 if fast_bfloat16(device) else torch.float32
        dtype = getattr(torch, name)
    if dtype is torch.float16 and device.type == "cpu":
        raise UserError("dtype is float16, which a CPU can't multiply: expected auto, float32 or bfloat16")
    return dtype


def fast_bfloat16(device: torch.device) -> bool:
    """Whether the device has bf16 matrix products in hardware: Ampere and later, AMX or AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        has = torch.cpu.get_capabilities()
        return bool(has.get("amx_bf16") or has.get("avx512_bf16"))
    return False


def _has_mps() -> bool:
    return torch.backends.mps.is_available()


@contextmanager
def timed(ms: dict[str, float], name: str) -> Iterator[None]:
    """Add the milliseconds of the block to `ms[name]`, waiting for what it started on a GPU."""
    start = time.perf_counter()
    yield
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    ms[name] = ms.get(name, 0.0) + 1000 * (time.perf_counter() - start)
