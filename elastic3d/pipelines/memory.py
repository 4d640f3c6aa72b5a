"""Memory that a generation or a training will need, told before it starts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from elastic3d.errors import UserError
from elastic3d.models.options import DiTConfig, SkipDiTConfig, VAEConfig

GB = 1e9
# Bytes: copies of the token streams that are alive at the worst place of a block, measured in token widths.
_TRANSFORMER_COPIES = 20
_QUERY_COPIES = 16
_NODE_BYTES = 20  # of the decoding grid: values, masks, the interpolation's copies, the extraction's
_SMALLEST_CHUNK, LOW_MEMORY_CHUNK = 256, 8192


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes: `weights` of each part, and what each stage needs besides."""

    weights: dict[str, int]
    stages: dict[str, int]

    def peak(self, offload: bool) -> int:
        """On the device: with `offload` it holds the weights of one part at a time."""
        if offload:
            return max(self.weights[name] + extra for name, extra in self.stages.items())
        return sum(self.weights.values()) + max(self.stages.values())

    def __str__(self) -> str:
        weights = ", ".join(f"{name} {size / GB:.1f}" for name, size in self.weights.items())
        stages = ", ".join(f"{name} {size / GB:.1f}" for name, size in self.stages.items())
        return f"weights: {weights}; while working: {stages} GB"


def memory_need(
    dit: DiTConfig | SkipDiTConfig,
    vae: VAEConfig,
    parameters: dict[str, int],
    dtype: torch.dtype,
    *,
    rows: int,
    resolution: int,
    max_points: int,
    encoder_width: int,
    encoder_tokens: int,
) -> MemoryNeed:
    """An estimate from shapes; attention is taken to be fused.

    Args:
        parameters: of the parts `condition`, `dit` and `decode`.
        rows: samples times the branches that run at once.
        max_points: points in one call of the field.
        encoder_width, encoder_tokens: of the image encoder, over all views.
    """
    size = dtype.itemsize
    tokens = dit.num_latents + dit.condition_tokens
    field_width = vae.width // vae.geo_downsample
    grid = (resolution + 1) ** 3 * _NODE_BYTES
    latents = rows * vae.num_latents * vae.width * _TRANSFORMER_COPIES * size
    return MemoryNeed(
        {name: count * size for name, count in parameters.items()},
        {
            "condition": rows * encoder_tokens * encoder_width * _TRANSFORMER_COPIES * size,
            "dit": rows * tokens * dit.width * _TRANSFORMER_COPIES * size,
            "decode": max(latents, grid + max_points * field_width * _QUERY_COPIES * size),
        },
    )


def points_within(budget: int, vae: VAEConfig, dtype: torch.dtype, resolution: int, limit: int) -> int:
    """Points in one call of the field that fit into `budget` bytes beside the grid, at most `limit`.

    Raises:
        UserError: not even a few hundred fit.
    """
    per_point = vae.width // vae.geo_downsample * _QUERY_COPIES * dtype.itemsize
    grid = (resolution + 1) ** 3 * _NODE_BYTES
    points = (budget - grid) // per_point
    if points < _SMALLEST_CHUNK:
        raise UserError(
            f"decoding at resolution={resolution} needs {(grid + _SMALLEST_CHUNK * per_point) / GB:.2f} GB, but"
            f" {max(budget, 0) / GB:.2f} GB are left for it: try a smaller resolution"
        )
    return min(int(points), limit)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken: of the GPU, or of the machine or its container."""
    if device.type == "cuda":  # what PyTorch holds without using it is free for this process
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    import psutil

    return int(min(psutil.virtual_memory().available, left_in_container(Path("/sys/fs/cgroup"))))


def left_in_container(root: Path) -> float:
    """Bytes up to the memory limit of a container, by its control groups (version 2 or 1) in a folder: its page cache
    counts as free, as it gives way. Infinite without a limit."""
    for folder, limit, used in (
        (root, "max", "current"),
        (root / "memory", "limit_in_bytes", "usage_in_bytes"),
    ):
        try:
            most, taken = (int((folder / f"memory.{name}").read_text()) for name in (limit, used))
            counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # there is none, or it is "max"
            continue
        return most - taken + sum(int(counts.get(name, 0)) for name in ("inactive_file", "active_file"))
    return math.inf


def require(need: MemoryNeed, budget: int, offload: bool, device: torch.device) -> None:
    """UserError if `need` exceeds `budget` bytes; says what it is made of and what would help."""
    peak = need.peak(offload and device.type != "cpu")
    if peak > budget:
        raise UserError(
            f"this needs about {peak / GB:.1f} GB of {device.type} memory ({need}), but {budget / GB:.1f} GB are"
            " there: try low_memory=true, batch_size=1, dtype=bfloat16, a smaller resolution or ensemble"
        )


@contextmanager
def on_device(part: Any, device: torch.device) -> Iterator[None]:
    """While it lasts, a part of a model that waits in main memory for its turn is on the device."""
    if not isinstance(part, nn.Module):
        yield
        return
    try:
        part.to(device)  # on an error, what has moved goes back too
        yield
    finally:
        part.to("cpu")
        if device.type == "cuda":
            torch.cuda.empty_cache()


def machine_memory() -> int:
    """Bytes of main memory, or of the largest GPU where it has more."""
    import psutil

    found = [psutil.virtual_memory().total]
    if torch.cuda.is_available():
        found += [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
    return max(found)


def require_memory(need: float, what: str) -> None:
    """UserError if `need` bytes are more than this machine has at all; `what` needs them."""
    there = machine_memory()
    if need > there:
        raise UserError(
            f"{what} at least {_amount(need)} of memory, expected at most {_amount(there)}, which this machine has"
        )


def _amount(size: float) -> str:
    return f"{size / GB:,.3g} GB" if size < 1e15 else f"{size / 1e12:.3g} TB"
