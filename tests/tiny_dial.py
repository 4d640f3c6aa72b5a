"""A tiny model with a dial whose costs are exact: fresh routers keep every block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_pipeline import tiny_pipeline

from elastic3d.diffusion.dial import F_SCORES
from elastic3d.elastic import attach
from elastic3d.elastic.config import RouterConfig
from elastic3d.pipelines.image_to_3d import ImageTo3DPipeline
from elastic3d.utils.files import save_json

ROUTERS = RouterConfig(few_step_rank=2, few_step_nfe=1.0, few_step_max_steps=2, few_step_guidance=2.0)


def row(
    cost: float, steps: int, budget: float | None, lora: bool, speed: float, iou: float, f: float
) -> dict:
    scores = dict.fromkeys(F_SCORES, f)
    return {
        "cost": cost, "steps": steps, "router_budget": budget, "few_step_lora": lora,
        "speedup": {"1": speed, "4": speed}, "iou": iou, **scores,
    }  # fmt: skip


def values() -> dict[str, Any]:
    """One step with the few-step LoRA (one branch: a sixth of three steps with two), two dense, three routed."""
    return {
        "dense": {"steps": 3, "guidance": 2.0, **dict.fromkeys(F_SCORES, 0.5)},
        "rows": [
            row(1 / 6, 1, 1.0, True, 5.5, 0.6, 0.48),
            row(2 / 3, 2, None, False, 1.4, 0.8, 0.496),
            row(1.0, 3, 1.0, False, 0.9, 0.9, 0.501),
        ],
        "names": {"fast": 1 / 6, "default": 2 / 3, "best": 1.0},
        "measured": {"results": "results.json"},
    }


def save_dialled(folder: Path) -> Path:
    """A model folder with routers, a few-step LoRA and a dial."""
    pipeline = tiny_pipeline()
    attach(pipeline.dit, ROUTERS)
    pipeline.save_pretrained(folder)
    save_json(values(), folder / "dial.json")
    return folder


def load(folder: Path, **options: Any) -> ImageTo3DPipeline:
    return ImageTo3DPipeline.from_pretrained(folder, "cpu", "float32", **options)
