"""Write a model's dial.json, which turns a budget into steps and router budget, from the results of its benchmark.

    python scripts/make_dial.py model=data/pretrained/shape-small results=reports/elastic-3d/results.json
    python scripts/make_dial.py model=data/pretrained/image-small results=DIR/results.json

The results have to be those of `scripts/benchmark.py` with this model's weights, with times, and of meshes with ground
truth.
"""

from __future__ import annotations

from _cli import run

from elastic3d.diffusion.options import Quality
from elastic3d.studies.config import DialConfig
from elastic3d.utils.files import check_paths, check_there


def main(config: DialConfig) -> int:
    """Write the file and print its rows."""
    check_there({"results": config.results})  # before what takes seconds to import
    from elastic3d.diffusion.dial import DIAL_NAME
    from elastic3d.pipelines.runtime import find_model
    from elastic3d.studies.dial import make_dial

    check_paths({"results": config.results}, {"dial": find_model(config.model) / DIAL_NAME})
    dial = make_dial(config)
    for row in dial.rows:
        who = "plan" if row.planned else "routers"
        settings = f"{who} {row.router_budget:g}" if row.router_budget not in (None, 1) else "every block"
        lora = ", few-step LoRA" if row.few_step_lora else ""
        pairs = zip((dial.kind.fidelity, *dial.kind.scores), (row.fidelity, *row.scores), strict=True)
        scores = ", ".join(f"{name} {score:.4g}" for name, score in pairs)
        names = ", ".join(quality.name for quality in Quality if dial.named(quality) is row)
        print(
            f"budget {row.cost:.2f}: {row.steps} steps, {settings}{lora}; {row.speedup['1']:.2f} times faster,"
            f" {scores} {names}"
        )
    return 0


if __name__ == "__main__":
    run(main, DialConfig, "make_dial")
