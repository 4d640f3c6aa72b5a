"""Tiny models with random routers: images and ground truth meshes for one, prompts and real images for the other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from tiny_images import save_tiny_small
from tiny_pipeline import save_image, tiny_pipeline

from elastic3d.benchmark.config import (
    CacheName,
    ForecastName,
    ImageBenchmarkConfig,
    MeshBenchmarkConfig,
)
from elastic3d.diffusion.options import Solver
from elastic3d.elastic import attach, save_routers
from elastic3d.elastic.config import RouterConfig
from elastic3d.evaluation.options import ProtocolConfig
from elastic3d.pipelines.options import BackboneName
from elastic3d.pipelines.text_to_image import TextToImagePipeline
from elastic3d.utils.devices import DeviceChoice, DTypeChoice

PROMPTS = ("a red chair", "a bed", "a blue sofa seen from behind")
PACKAGED = (CacheName.db_cache, CacheName.hicache)  # of packages that may not be installed
INSTALLED = [name for name in CacheName if name not in PACKAGED]


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
        save_image(root / "images" / f"{name}.png", colour, 10 * len(name) + ord(name) % 3 * 15)
        (root / "gt").mkdir(exist_ok=True)
        trimesh.creation.icosphere(2, radius=0.7).export(root / "gt" / f"{name}.ply")
    return root


def options(world: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """Fields of a configuration small enough for a test."""
    fields: dict[str, Any] = dict(
        model=str(world / "model"), images=world / "images", gt=world / "gt", output=output, limit=2, seeds=[0, 1],
        budgets=[0.5], steps=[2, 3, 4], reference_steps=4, resolution=8, batch_size=2, batches=[1],
        timing_items=1, repeats=1, end_to_end_repeats=0, calibration_samples=2, workers=1,
        caches=[CacheName.forecast], forecasts=[ForecastName.dmd], intervals=[2], warmup=1,
        device=DeviceChoice.cpu, dtype=DTypeChoice.float32,
        protocol=ProtocolConfig(points=800, volume_points=50, near_points=0, views=0, surface_health=False),
    )  # fmt: skip
    return fields | changes


def config_of(world: Path, output: Path, **changes: Any) -> MeshBenchmarkConfig:
    return MeshBenchmarkConfig(**options(world, output, **changes))


@pytest.fixture(scope="session")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/ (elastic), prompts.txt and real/."""
    root = tmp_path_factory.mktemp("gallery")
    torch.manual_seed(0)
    save_tiny_small(root / "model")
    pipe = TextToImagePipeline.from_pretrained(BackboneName.small, root / "model", device="cpu").backbone.pipe
    attach(pipe, RouterConfig(initial_keep=0.5, initial_width_bias=0, head_std=3.0))
    save_routers(pipe.transformer, root / "model" / "routers")
    (root / "prompts.txt").write_text("# prompts\n" + "\n".join(PROMPTS) + "\n")
    (root / "real").mkdir()
    generator = np.random.default_rng(0)
    for number in range(3):
        pixels = generator.integers(256, size=(20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "real" / f"{number}.png")
        (root / "real" / f"{number}.txt").write_text("a bed")
    return root


def image_config_of(gallery: Path, output: Path, **changes: Any) -> ImageBenchmarkConfig:
    """Small enough for a test."""
    fields: dict[str, Any] = dict(
        weights=str(gallery / "model"), prompts=gallery / "prompts.txt", output=output, seeds=[0, 1], budgets=[0.5],
        steps=[2, 3], baseline_steps=4, reference_steps=6, batch_size=2, batches=[1], repeats=1,
        end_to_end_repeats=0, timing_items=1, calibration_samples=2,
        references=gallery / "real", feature_size=32, first_block_thresholds=[0.9],
        intervals=[2], warmup=1, mag_thresholds=[0.5], db_thresholds=[0.9], caches=INSTALLED,
        forecasts=[ForecastName.chebyshev], device=DeviceChoice.cpu,
    )  # fmt: skip
    return ImageBenchmarkConfig(**fields | changes)
