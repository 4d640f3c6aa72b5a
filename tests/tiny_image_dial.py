"""A tiny text-to-image model with routers, a few-step LoRA for two steps, and results of a benchmark of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_images import save_tiny_small

from elastic3d.elastic import attach, save_routers
from elastic3d.elastic.config import RouterConfig
from elastic3d.pipelines.image_loading import weight_files
from elastic3d.pipelines.pixel_flux import load_pixel_flux
from elastic3d.studies.config import DialConfig
from elastic3d.studies.dial import make_dial
from elastic3d.utils.files import file_sha256, load_json, save_json

ROUTERS = RouterConfig(few_step_rank=2, few_step_nfe=2.0, few_step_max_steps=2)


def row(
    method: str,
    steps: int,
    budget: float,
    cost: float,
    speed: float,
    psnr: float,
    ssim: float,
    note: str = "",
) -> list[dict[str, Any]]:
    """Of one image at a time, and of four."""
    return [
        {
            "method": method, "note": note, "budget": budget, "steps": steps, "batch": batch,
            "as_trained": method == "elastic", "flops_ratio_to_baseline": cost, "dit_speedup": speed,
            "psnr_dense": psnr, "ssim_dense": ssim, "feature_dense": 0.1,
        }
        for batch in (1, 4)
    ]  # fmt: skip


def results(folder: Path) -> dict[str, Any]:
    """Four dense steps, two, two with the few-step LoRA, four with routers or by a plan."""
    return {
        "about": {
            "date": "2026-01-01",
            "machine": {"processor": "none", "cores": 2},
            "models": {"model": file_sha256(*weight_files(folder), folder / "routers/model.safetensors")},
            "baseline_steps": 4,
            "prompts": 3,
            "config": {"seeds": [0, 1], "guidance": None},
        },
        "rows": [
            *row("dense", 4, 1.0, 1.0, 1.0, 100.0, 1.0),
            *row("fewer_steps", 2, 1.0, 0.5, 2.0, 21.0, 0.8),
            *row("few_step_lora", 2, 1.0, 0.5, 1.9, 25.0, 0.9),
            *row("elastic", 4, 0.5, 0.704, 1.4, 40.0, 0.995),
            *row("elastic", 4, 1.0, 0.99, 1.1, 39.0, 0.99),
            *row("training_free", 4, 0.8, 0.8, 1.2, 60.0, 0.999, note="planned"),
        ],
    }


def save_routed(folder: Path) -> Path:
    """The model with its routers, without a dial."""
    save_tiny_small(folder)
    save_json(load_json(folder / "pipeline.json") | {"steps": 4}, folder / "pipeline.json")
    pipe = load_pixel_flux(folder, torch.device("cpu"), torch.float32, encoders=False)
    torch.manual_seed(0)
    attach(pipe.transformer, ROUTERS)
    save_routers(pipe.transformer, folder / "routers")
    return folder


def save_dialled(folder: Path) -> Path:
    """The model with its routers and the dial of its results."""
    save_routed(folder)
    save_json(results(folder), folder.parent / "results.json")
    make_dial(DialConfig(model=folder, results=folder.parent / "results.json"))
    return folder
