"""Score a folder of generated meshes against a folder of ground truth meshes.

Example: python scripts/evaluate.py pred=outputs gt=data/test output=report.json html=report.html

Meshes are paired by file name, suffix aside. A missing or broken mesh is a failed row and counts against the
method. Exit code: 0 all items scored and within the gate, 1 an item failed or the gate is violated, 2 a
mistake in the options.
"""

from __future__ import annotations

import shlex
import sys
from typing import Any

from _cli import run
from tqdm import tqdm

from elastic3d.evaluation.folders import evaluate_folders
from elastic3d.evaluation.html import load_frontier, write_html
from elastic3d.evaluation.options import EvaluateConfig
from elastic3d.evaluation.report import text_report, write_csv
from elastic3d.utils.files import check_paths, save_json


def main(config: EvaluateConfig) -> int:
    outputs = [config.output, *(config.output.with_suffix(end) for end in (".csv", ".rows.jsonl"))]
    inputs = ("gate", "benchmark", "pred", "gt", "floor", "baseline")
    check_paths({name: getattr(config, name) for name in inputs}, {"output": outputs, "html": config.html})
    frontier = load_frontier(config.benchmark) if config.benchmark else []
    command = shlex.join(["python", *sys.argv])
    with tqdm(desc="score", unit="pair") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        report = evaluate_folders(config, image_features() if config.sets else None, command, progress)
    write_csv(report["items"], config.output.with_suffix(".csv"))
    save_json(report, config.output)
    print(text_report(report))
    if config.html:
        write_html(report, config, frontier)
    broken = report.get("gate", {}).get("violations", [])
    return int(report["count"]["failed"] > 0 or len(broken) > 0)


def image_features() -> Any:
    """EfficientNet features (V, 1280) of views (V, H, W, 3), for the Frechet and kernel distances."""
    import torch

    from elastic3d.models.image_encoder import build_image_encoder
    from elastic3d.models.options import ImageEncoderConfig

    encoder = build_image_encoder(ImageEncoderConfig())

    def features(views: Any) -> Any:
        images = torch.from_numpy(views).permute(0, 3, 1, 2).float()
        return encoder.pooled(images).numpy()

    return features


if __name__ == "__main__":
    run(main, EvaluateConfig, "evaluate")
