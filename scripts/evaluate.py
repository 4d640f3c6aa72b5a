"""Score a folder of generated meshes against a folder of ground truth meshes.

Example: python scripts/evaluate.py pred=outputs gt=data/test output=report.json

Meshes are paired by file name, suffix aside. A missing or broken mesh is a failed row and counts against the
method. Exit code: 0 all items scored, 1 an item failed, 2 a mistake in the options.
"""

from __future__ import annotations

import shlex
import sys

from _cli import run
from tqdm import tqdm

from elastic3d.config.evaluate import EvaluateConfig
from elastic3d.errors import UserError
from elastic3d.evaluation.items import find_items
from elastic3d.evaluation.report import build_report, text_table, write_csv, write_json
from elastic3d.evaluation.runner import score_all


def main(config: EvaluateConfig) -> int:
    if config.output.suffix.lower() != ".json":
        raise UserError(f"output={config.output}: expected a name that ends in .json")
    items = find_items(config.pred, config.gt)
    journal = config.output.with_suffix(".rows.jsonl")
    if not config.resume:
        journal.unlink(missing_ok=True)
    journal.parent.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(items), desc="score", unit="pair") as bar:
        rows = score_all(
            items, config.protocol, config.runner, config.workers, journal, on_row=lambda row: bar.update()
        )
    command = shlex.join(["python", *sys.argv])
    report = build_report(rows, config.protocol, config.bootstrap, command)
    write_csv(rows, config.output.with_suffix(".csv"))
    write_json(report, config.output)
    print(text_table(report))
    return int(report["count"]["failed"] > 0)


if __name__ == "__main__":
    run(main, EvaluateConfig, "evaluate")
