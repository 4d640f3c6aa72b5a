"""Everything that a benchmark of pictures writes in the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from elastic3d.benchmark.images.foreign import missing
from elastic3d.benchmark.images.models import ImageModel
from elastic3d.benchmark.images.place import ImagePlace
from elastic3d.benchmark.images.references import References
from elastic3d.benchmark.images.rows import build_rows, compare_rivals
from elastic3d.benchmark.images.scores import Scores
from elastic3d.benchmark.images.summary import summarise_rows
from elastic3d.benchmark.methods import Case, Run
from elastic3d.benchmark.options import Method
from elastic3d.benchmark.pictures import heat_map, pareto_plot, save, titled_sheet
from elastic3d.benchmark.report import save_results
from elastic3d.benchmark.rows import route_shares
from elastic3d.benchmark.store import spread
from elastic3d.benchmark.timing import Round
from elastic3d.evaluation.items import Row

PICTURE_SIZE = 128
LABELS = {
    "feature_dense": "feature distance to the dense picture (lower is better)",
    "ssim_dense": "SSIM with the dense picture (higher is better)",
    "feature_reference": "feature distance to the reference (lower is better)",
    "frechet": "Frechet distance to real pictures (lower is better)",
}
SCORES = {
    "psnr_dense": "PSNR to dense", "ssim_dense": "SSIM to dense", "feature_dense": "feature distance to dense",
    "feature_reference": "to reference", "frechet": "Frechet distance", "category_accuracy": "category",
}  # fmt: skip
COLUMNS = {
    "method": "method", "note": "note", "budget": "budget", "steps": "steps", "batch": "batch",
    "executed_flops_ratio": "FLOPs", "dit_ms_median": "DiT ms", "dit_speedup": "speed-up", "psnr_dense": "PSNR",
    "ssim_dense": "SSIM", "feature_dense": "feature", "frechet": "Frechet", "category_accuracy": "category",
}  # fmt: skip


def write_report(
    place: ImagePlace,
    cases: Sequence[Case],
    scores: Scores,
    rounds: Sequence[Round],
    references: References | None,
    command: str,
) -> dict[str, Any]:
    """Write results.json, results.csv and the pictures; what results.json holds."""
    config, planner = place.config, place.planner
    rows = build_rows(place, cases, scores, rounds, references)
    comparisons = compare_rivals(place, cases, scores, rows)
    shares = route_shares(place, cases)
    models = {name: model for name, model in planner.models.items() if isinstance(model, ImageModel)}
    about = {
        "models": {name: model.weights_sha256 for name, model in models.items()},
        "prompts": len(place.prompts),
        "baseline_steps": planner.baseline_steps,
        "left_out": missing(config),
        **(references.about() if references else {"real_pictures": 0}),
    }
    summary = summarise_rows(rows, config.reference_steps, planner.baseline_steps)
    results = save_results(config, command, about, rows, summary, comparisons, shares, SCORES)
    for batch in config.batches:
        if (plot := pareto_plot(rows, batch, LABELS, "a picture")) is not None:
            name = "pareto.png" if batch == config.batches[0] else f"pareto-batch-{batch}.png"
            save(plot, config.output / name)
    if (blocks := heat_map(shares)) is not None:
        save(blocks, config.output / "blocks.png")
    if config.sheet_prompts and (sheet := contact_sheet(place, cases, rows)) is not None:
        save(sheet, config.output / "sheet.png")
    return results


def contact_sheet(place: ImagePlace, cases: Sequence[Case], rows: Sequence[Row]) -> Image.Image | None:
    """A row a prompt, all of one seed: the reference, dense, elastic at each budget, few steps; None without pictures.

    Of fewer_steps the counts are shown that take about as long as dense at a budget.
    """
    planner, seed = place.planner, place.config.seeds[0]
    steps = planner.baseline_steps
    runs: dict[str, Run] = {
        f"{place.config.reference_steps} steps": planner.reference(),
        f"dense, {steps} steps": planner.dense(steps),
    }
    for case in cases:
        if case.method == Method.elastic.value and case.run.steps == steps and case.budget is not None:
            runs[f"elastic {case.budget:g}"] = case.run
    fewer = [case for case in cases if case.method == Method.fewer_steps.value and case.run.steps < steps]
    runs |= {f"{case.run.steps} steps": case.run for case in spread(fewer, 4)}
    prompts = spread(place.prompts, place.config.sheet_prompts)
    runs = {name: run for name, run in runs.items() if place.store.has(run, seed, prompts)}
    if not runs:
        return None
    columns = [place.store.pictures(run, seed, prompts) for run in runs.values()]
    enlarged = [[_enlarged(picture) for picture in column] for column in columns]
    return titled_sheet(list(runs), list(zip(*enlarged, strict=True)))


def _enlarged(picture: np.ndarray) -> np.ndarray:
    size = (PICTURE_SIZE, PICTURE_SIZE)
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))
