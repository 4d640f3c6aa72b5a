"""Write a model's dial.json, which turns a budget into steps and router budget, from the results of its benchmark.

    python scripts/make_dial.py model=data/pretrained/shape-small results=reports/elastic-3d/results.json

The results have to be those of `scripts/benchmark.py` with this model's weights, with ground truth and times.
"""

from __future__ import annotations

from _cli import run

from elastic3d.diffusion.dial import DIAL_NAME
from elastic3d.pipelines.runtime import find_model
from elastic3d.studies.config import DialConfig
from elastic3d.studies.dial import make_dial
from elastic3d.utils.files import check_paths


def main(config: DialConfig) -> int:
    """Write the file and print its rows."""
    check_paths({"results": config.results}, {"dial": find_model(config.model) / DIAL_NAME})
    for name, row in make_dial(config):
        who = "plan" if row.planned else "routers"
        settings = f"{who} {row.router_budget:g}" if row.router_budget not in (None, 1) else "every block"
        lora = ", few-step LoRA" if row.few_step_lora else ""
        scores = ", ".join(f"{score:.4f}" for score in row.f_scores)
        print(
            f"budget {row.cost:.2f}: {row.steps} steps, {settings}{lora}; {row.speedup['1']:.2f} times faster,"
            f" IoU {row.iou:.3f}, F-scores {scores} {name}"
        )
    return 0


if __name__ == "__main__":
    run(main, DialConfig, "make_dial")
