"""Measure an elastic model against its dense self, fewer steps and controls: speed and fidelity in one table.

    python scripts/benchmark.py model=default budgets=[1,.5] images=photos seeds=[0,1,2] output=outputs/benchmark
    python scripts/benchmark.py images=held_out/images gt=held_out/gt output=outputs/benchmark batches=[1]

Writes results.json, results.csv, pareto.png, blocks.png and sheet.png to the output folder. Run it again and it goes on
where it was: meshes, scores and timing rounds are kept. Exit code 0 whether or not targets are met, 1 if a mesh failed.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from _cli import run

from elastic3d.config.benchmark import BenchmarkConfig

REPOSITORY = Path(__file__).resolve().parent.parent


def main(config: BenchmarkConfig) -> int:
    """Run it and print the table."""
    from elastic3d.benchmark.report import text_table
    from elastic3d.benchmark.run import benchmark

    results = benchmark(config, REPOSITORY, shlex.join(["python", *sys.argv]))
    print(text_table(results))
    print(f"written to {config.output}")
    return int(any(row["failed"] for row in results["rows"]))


if __name__ == "__main__":
    run(main, BenchmarkConfig, "benchmark")
