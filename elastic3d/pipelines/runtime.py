"""What both pipelines share: where a bundled model is, device and number format, seeds, turns, times, FLOPs,
metadata of routes."""

from __future__ import annotations

import operator
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from elastic3d.diffusion.options import PipelineConfig
from elastic3d.diffusion.sampler import moves
from elastic3d.elastic.attachment import adapter_for
from elastic3d.elastic.config import ElasticConfig
from elastic3d.elastic.families import BlockFlops, block_flops
from elastic3d.elastic.session import ElasticSession
from elastic3d.elastic.trace import trace_dense_flops, trace_flops, trace_router_flops
from elastic3d.elastic.training_free import StepPolicy
from elastic3d.errors import UserError
from elastic3d.models.shape_dit import ShapeDiT
from elastic3d.models.skip_dit import SkipDiT
from elastic3d.models.weights import CONFIG_NAME
from elastic3d.utils.devices import DeviceChoice, DTypeChoice
from elastic3d.utils.files import load_json
from elastic3d.utils.options import to_dict

_PACKAGE = Path(__file__).resolve().parents[1]
BUNDLED = Path("data/pretrained")  # in a wheel, in a checkout
_LOCKS: WeakKeyDictionary[nn.Module, AbstractContextManager[Any]] = WeakKeyDictionary()


def find_model(name: str | Path) -> Path:
    """A model's folder, or the one of a bundled model, `shape-small` or `data/pretrained/shape-small`, wherever the
    current folder is."""
    folder = Path(name)
    if folder.exists() or folder.parent not in (Path(), BUNDLED):
        return folder
    homes = (_PACKAGE / BUNDLED / folder.name, _PACKAGE.parent / BUNDLED / folder.name)
    return next((home for home in homes if home.is_dir()), folder)


def named_routers(model: Path, name: str | Path) -> Path:
    """The folder of routers at a path, or of that name in a model's folder."""
    inside = model / name
    return inside if inside.is_dir() and not Path(name).exists() else Path(name)


def load_dit(
    folder: Path, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> ShapeDiT | SkipDiT:
    """The DiT saved in a folder, of either kind; errors as `from_pretrained`."""
    path = folder / CONFIG_NAME
    kind = load_json(path).get("_class_name") if path.is_file() else None
    return (SkipDiT if kind == SkipDiT.__name__ else ShapeDiT).from_pretrained(folder, dtype, device)


def seeds_of(seed: Any, count: int) -> list[int]:
    """One seed for each of `count` samples, from one for all or a list; integers of numpy and arrays are fine.

    Raises:
        UserError: another number of them, or one that is no integer of 64 bits.
    """
    try:
        seeds = [operator.index(each) for each in (seed if np.ndim(seed) else [seed] * count)]
    except (TypeError, ValueError) as error:
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
    if name != "auto":
        return _device_named(name)
    mps = torch.backends.mps.is_available()
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")


def _device_named(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device is {name!r}, expected auto, cpu, cuda or mps") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise UserError(f"device is {name}, but PyTorch sees {found} CUDA devices: expected auto or cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device is mps, but PyTorch has no Metal here: expected auto or cpu")
    return device


def resolve_dtype(choice: DTypeChoice | torch.dtype | str, device: torch.device) -> torch.dtype:
    """`auto` is bf16 where the hardware multiplies it directly, else fp32.

    Raises:
        UserError: unknown, or fp16 on a CPU, which has no such matrix product: a hundred times slower.
    """
    name = choice.value if isinstance(choice, DTypeChoice) else str(choice).removeprefix("torch.")
    if name != "auto":
        return _dtype_named(name, device, any_float=isinstance(choice, torch.dtype))
    return torch.bfloat16 if fast_bfloat16(device) else torch.float32


def _dtype_named(name: str, device: torch.device, any_float: bool) -> torch.dtype:
    if not any_float and name not in DTypeChoice.__members__:
        raise UserError(f"dtype is {name!r}, expected one of {', '.join(DTypeChoice.__members__)}")
    if name == "float16" and device.type == "cpu":
        raise UserError("dtype is float16, which a CPU can't multiply: expected auto, float32 or bfloat16")
    return getattr(torch, name)


def fast_bfloat16(device: torch.device) -> bool:
    """Whether the device has bf16 matrix products in hardware: Ampere and later, AMX or AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        has = torch.cpu.get_capabilities()
        return bool(has.get("amx_bf16") or has.get("avx512_bf16"))
    return False


def turn(model: nn.Module) -> AbstractContextManager[Any]:
    """The lock of a model, which one thread may take several times: whoever generates with the model holds it."""
    return _LOCKS.setdefault(model, threading.RLock())


@contextmanager
def timed(ms: dict[str, float], name: str, device: torch.device) -> Iterator[None]:
    """Add the milliseconds of the block to `ms[name]`, waiting for what it started on the device."""
    start = time.perf_counter()
    yield
    if device.type in ("cuda", "mps"):
        torch.accelerator.synchronize(device)
    ms[name] = ms.get(name, 0.0) + 1000 * (time.perf_counter() - start)


def pass_flops(dit: ShapeDiT | SkipDiT, condition: int) -> list[BlockFlops]:
    """FLOPs of each block of a DiT in one pass of one sample with M condition tokens."""
    latents = dit.config.num_latents
    lengths = [latents + 1] if isinstance(dit, SkipDiT) else [latents, condition]  # 1: the time token
    return block_flops(dit, adapter_for(dit), lengths)


def dense_flops(dit: ShapeDiT | SkipDiT, config: PipelineConfig, condition: int) -> int:
    """FLOPs of a DiT's blocks in a dense generation of one sample, over all moves and branches."""
    branches = 2 if config.guidance > 1.0 and not dit.config.guidance_embed else 1
    return moves(config, config.steps) * branches * sum(block.dense for block in pass_flops(dit, condition))


def routes_of(session: ElasticSession | None, settings: ElasticConfig, samples: int) -> list[dict[str, Any]]:
    """Metadata of each sample of the newest generation, none where it was dense: what the blocks did, of an ensemble in
    its first generation, and the cost of all; `flops_dense` is that of one."""
    if session is None or not settings.elastic:
        return [{} for _ in range(samples)]
    trace = session.trace
    assert trace is not None
    flops = {"executed": trace_flops, "dense": trace_dense_flops, "routers": trace_router_flops}
    K = trace.samples // samples  # of an ensemble
    costs = {name: of(trace).sum((0, 1, 3)).view(samples, K).sum(1) for name, of in flops.items()}
    costs["dense"] /= K
    totals = {f"flops_{name}": cost.long().tolist() for name, cost in costs.items()}
    policy = {"policy": session.source.about} if isinstance(session.source, StepPolicy) else {}
    blocks = {"blocks": trace.blocks, "widths": list(trace.ratios)}
    return [
        {
            **{name: each[row] for name, each in totals.items()},
            "elastic": to_dict(replace(settings, cache=settings.cache or session.router_config.cache())),
            **policy,
            "updated": session.coarseness is not None,
            "one_branch": session.guided,
            "routes": blocks | {"actions": trace.sample(K * row)},
        }
        for row in range(samples)
    ]
