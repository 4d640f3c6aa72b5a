"""A tiny elastic model with random routers, pictures, and ground truth meshes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import trimesh
from tiny_pipeline import save_picture, tiny_pipeline

from elastic3d.adapters import attach
from elastic3d.benchmark.options import BenchmarkConfig
from elastic3d.config.routing import RouterConfig
from elastic3d.diffusion.options import Solver
from elastic3d.evaluation.options import ProtocolConfig
from elastic3d.utils.devices import DeviceChoice, DTypeChoice


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/ (elastic), images/ and gt/."""
    root = tmp_path_factory.mktemp("world")
    pipeline = tiny_pipeline()
    pipeline.config = replace(pipeline.config, solver=Solver.ab2, shift=2.0)
    torch.manual_seed(0)
    attach(pipeline.dit, RouterConfig(initial_keep=0.5, initial_width_bias=0, head_std=3.0))
    pipeline.save_pretrained(root / "model")
    for name, colour in (("a", "maroon"), ("b", "navy"), ("c", "gold")):
        save_picture(root / "images" / f"{name}.png", colour, 10 * len(name) + ord(name) % 3 * 15)
        (root / "gt").mkdir(exist_ok=True)
        trimesh.creation.icosphere(2, radius=0.7).export(root / "gt" / f"{name}.ply")
    return root


def options(world: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """Fields of a configuration small enough for a test."""
    fields: dict[str, Any] = dict(
        model=str(world / "model"), images=world / "images", gt=world / "gt", output=output, limit=2, seeds=[0, 1],
        budgets=[0.5], steps=[2, 3, 4], reference_steps=4, resolution=8, batch_size=2, batches=[1],
        timing_images=1, repeats=1, end_to_end_repeats=0, calibration_samples=2, calibration_calls=1, workers=1,
        bootstrap=20, sheet_images=2, device=DeviceChoice.cpu, dtype=DTypeChoice.float32,
        protocol=ProtocolConfig(points=800, volume_points=50, near_points=0, views=0, surface_health=False),
    )  # fmt: skip
    return fields | changes


def config_of(world: Path, output: Path, **changes: Any) -> BenchmarkConfig:
    return BenchmarkConfig(**options(world, output, **changes))
