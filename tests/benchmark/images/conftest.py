"""A tiny text-to-image model with random routers, prompts, and real pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_images import save_tiny_small

from elastic3d.adapters import attach, save_routers
from elastic3d.benchmark.images.options import CacheName, ImageBenchmarkConfig
from elastic3d.config.routing import RouterConfig
from elastic3d.pipelines.options import BackboneName
from elastic3d.pipelines.text_to_image import TextToImagePipeline
from elastic3d.utils.devices import DeviceChoice

PROMPTS = ("a red chair", "a bed", "a blue sofa seen from behind")
DIFFUSERS = [name for name in CacheName if name is not CacheName.db_cache]


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


def config_of(gallery: Path, output: Path, **changes: Any) -> ImageBenchmarkConfig:
    """Small enough for a test."""
    fields: dict[str, Any] = dict(
        weights=str(gallery / "model"), prompts=gallery / "prompts.txt", output=output, seeds=[0, 1], budgets=[0.5],
        steps=[2, 3], baseline_steps=4, reference_steps=6, batch_size=2, batches=[1], repeats=1,
        end_to_end_repeats=0, timing_prompts=1, calibration_samples=2, calibration_calls=1, bootstrap=20,
        sheet_prompts=2, references=gallery / "real", feature_size=32, first_block_thresholds=[0.9],
        taylor_intervals=[2], taylor_warmup=1, mag_thresholds=[0.5], db_thresholds=[0.9], caches=DIFFUSERS,
        device=DeviceChoice.cpu,
    )  # fmt: skip
    return ImageBenchmarkConfig(**fields | changes)
