"""Measure an elastic model against its dense self, fewer steps, controls and training-free caches, in one table.

    python scripts/benchmark.py images=photos budgets=[1,.5] seeds=[0,1,2] output=outputs/benchmark
    python scripts/benchmark.py images=held_out/images gt=held_out/gt output=outputs/benchmark batches=[1]
    python scripts/benchmark.py task=images budgets=[1,.5] output=outputs/benchmark-2d

With task=images it is a text-to-image model that is measured; `task=images --help` lists the options of that. Writes
results.json, results.csv, table.md, pareto.png, blocks.png and sheet.png to the output folder. Run it again and it goes
on where it was: meshes or images, scores and timing rounds are kept. Exit code 0 whether or not targets are met, 1 if a
mesh or an image failed.
"""

from __future__ import annotations

import shlex
import sys

from _cli import run

from elastic3d.benchmark.config import ImageBenchmarkConfig, MeshBenchmarkConfig, Phase
from elastic3d.utils.files import check_paths, check_there

INPUTS = (
    "images", "gt", "model", "dense", "calibration", "policy_calibration", "weights",
    "routers", "prompts", "prepared", "splits", "references"
)  # fmt: skip


def main(config: MeshBenchmarkConfig | ImageBenchmarkConfig) -> int:
    """Run it and print the table."""
    inputs = {name: getattr(config, name, None) for name in INPUTS}
    # before imports that take seconds
    check_there({name: inputs[name] for name in ("images", "gt", "prompts", "references")})
    from elastic3d.benchmark.run import benchmark

    check_paths({**inputs, "variants": config.variants.values()}, {}, {"output": config.output})

    results = benchmark(config, shlex.join(["python", *sys.argv]))
    quick = Phase.quick in config.phases
    print((config.output / ("quick.md" if quick else "table.md")).read_text(), end="")
    for name, reason in results["about"]["left_out"].items():
        print(f"no rows of {name}: {reason}")
    print(f"written to {config.output}")
    return int(any(row.get("failed") for row in results["rows"]))


if __name__ == "__main__":
    if any(argument.startswith(("task=images", "backbone=")) for argument in sys.argv[1:]):
        run(main, ImageBenchmarkConfig, "benchmark_images")
    run(main, MeshBenchmarkConfig, "benchmark")
