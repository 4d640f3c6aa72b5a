"""Measure an elastic model against its dense self, fewer steps and controls: speed and fidelity in one table.

    python scripts/benchmark.py model=default budgets=[1,.5] images=photos seeds=[0,1,2] output=outputs/benchmark
    python scripts/benchmark.py images=held_out/images gt=held_out/gt output=outputs/benchmark batches=[1]
    python scripts/benchmark.py backbone=small budgets=[1,.5] output=outputs/benchmark-2d

With backbone= it is a text-to-image model that is measured; `backbone=small --help` lists the options of that. Writes
results.json, results.csv, pareto.png, blocks.png and sheet.png to the output folder. Run it again and it goes on where
it was: meshes or pictures, scores and timing rounds are kept. Exit code 0 whether or not targets are met, 1 if a mesh
or a picture failed.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from _cli import run

from elastic3d.benchmark.images.options import ImageBenchmarkConfig
from elastic3d.benchmark.options import BenchmarkConfig
from elastic3d.utils.paths import check_distinct

REPOSITORY = Path(__file__).resolve().parent.parent


def main(config: BenchmarkConfig) -> int:
    """Run it and print the table."""
    from elastic3d.benchmark.report import text_table
    from elastic3d.benchmark.run import benchmark

    inputs = {name: getattr(config, name) for name in ("images", "gt", "model", "dense", "calibration")}
    check_distinct({**inputs, "variants": config.variants.values()}, {"output": config.output})
    results = benchmark(config, REPOSITORY, shlex.join(["python", *sys.argv]))
    print(text_table(results))
    print(f"written to {config.output}")
    return int(any(row["failed"] for row in results["rows"]))


def main_images(config: ImageBenchmarkConfig) -> int:
    """The same for a text-to-image model."""
    from elastic3d.benchmark.images.report import COLUMNS
    from elastic3d.benchmark.images.run import benchmark_images
    from elastic3d.benchmark.report import text_table

    inputs = {name: getattr(config, name) for name in ("weights", "routers", "prompts", "prepared", "splits")}
    check_distinct({**inputs, "variants": config.variants.values()}, {"output": config.output})
    results = benchmark_images(config, REPOSITORY, shlex.join(["python", *sys.argv]))
    print(text_table(results, COLUMNS))
    for name, reason in results["about"]["left_out"].items():
        print(f"no rows of {name}: {reason}")
    print(f"written to {config.output}")
    return int(any(row["failed"] for row in results["rows"]))


if __name__ == "__main__":
    if any(argument.startswith("backbone=") for argument in sys.argv[1:]):
        run(main_images, ImageBenchmarkConfig, "benchmark_images")
    run(main, BenchmarkConfig, "benchmark")
