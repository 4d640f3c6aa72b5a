"""Everything that a benchmark writes in the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import numpy as np
from PIL import Image

from elastic3d.benchmark.machine import machine
from elastic3d.benchmark.methods import Case
from elastic3d.benchmark.options import BenchmarkOptions, Method
from elastic3d.benchmark.pictures import heat_map, pareto_plot, save, titled_sheet
from elastic3d.benchmark.quality import Scores, Workplace
from elastic3d.benchmark.rows import build_rows, compare_rivals, route_shares
from elastic3d.benchmark.store import Job, spread
from elastic3d.benchmark.summary import beaten, summarise_rows
from elastic3d.benchmark.table import page
from elastic3d.benchmark.timing import Round
from elastic3d.evaluation.items import Row
from elastic3d.evaluation.report import write_csv
from elastic3d.geometry.mesh_io import load_mesh
from elastic3d.training.samples import mesh_picture, on_white
from elastic3d.utils.files import atomic_path
from elastic3d.utils.options import to_dict
from elastic3d.utils.structured import save_json

PICTURE_SIZE = 160


def write_report(
    place: Workplace,
    cases: Sequence[Case],
    scores: Scores,
    rounds: Sequence[Round],
    truth: dict[str, Any],
    command: str,
) -> dict[str, Any]:
    """Write results.json, results.csv and the pictures; what results.json holds."""
    config, planner = place.config, place.planner
    rows = build_rows(place, cases, scores, rounds)
    comparisons = compare_rivals(place, cases, scores)
    shares = route_shares(place, cases)
    about = {
        "models": {name: pipeline.weights_sha256 for name, pipeline in planner.models.items()},
        "pictures": len(place.images),
        "baseline_steps": planner.baseline_steps,
    }
    summary = summarise_rows(rows, config.reference_steps, planner.baseline_steps)
    results = save_results(config, command, about, rows, summary, comparisons, shares, SCORES)
    draw(place, cases, rows, shares, truth)
    return results


def save_results(
    config: BenchmarkOptions,
    command: str,
    about: Mapping[str, Any],
    rows: Sequence[Row],
    summary: Mapping[str, Any],
    comparisons: Sequence[dict[str, Any]],
    shares: dict[str, Any],
    scores: Mapping[str, str],
) -> dict[str, Any]:
    """Write results.json, results.csv and table.md with the columns `scores`; what results.json holds."""
    results = {
        "about": {
            "command": command,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": machine(),
            **about,
            "config": to_dict(config),
        },
        "rows": rows,
        "summary": {
            **summary,
            "routers_beside_rivals": beaten(comparisons),
            "blocks": {run: block_means(entry) for run, entry in shares.items()},
        },
        "comparisons": comparisons,
    }
    save_json(results, config.output / "results.json")
    write_csv(rows, config.output / "results.csv")
    with atomic_path(config.output / "table.md") as path:
        path.write_text(page(results, scores))
    return results


def draw(
    place: Workplace,
    cases: Sequence[Case],
    rows: Sequence[Row],
    shares: dict[str, Any],
    truth: dict[str, Any],
) -> None:
    """Write pareto.png (and one for each further batch size), blocks.png and sheet.png, where there is something."""
    output, batches = place.config.output, place.config.batches
    for batch in batches:
        if (plot := pareto_plot(rows, batch)) is not None:
            save(plot, output / ("pareto.png" if batch == batches[0] else f"pareto-batch-{batch}.png"))
    if (blocks := heat_map(shares)) is not None:
        save(blocks, output / "blocks.png")
    if place.config.sheet_images and (sheet := contact_sheet(place, cases, truth)) is not None:
        save(sheet, output / "sheet.png")


def contact_sheet(place: Workplace, cases: Sequence[Case], truth: dict[str, Any]) -> Image.Image | None:
    """A row a picture: input, dense, elastic at each budget, ground truth; None where no mesh is made."""
    runs = {"dense": place.planner.dense(place.planner.baseline_steps)}
    for case in cases:
        if case.method == Method.elastic.value and case.run.steps == place.planner.baseline_steps:
            runs[f"elastic {case.budget:g}"] = case.run
    images = spread(place.images, place.config.sheet_images)
    seed = place.config.seeds[0]
    runs = {name: run for name, run in runs.items() if place.store.record(run, Job(images[0], seed))}
    if not runs:
        return None
    rows = []
    for image in images:
        with Image.open(image) as opened:
            fitted = opened.convert("RGBA").resize((PICTURE_SIZE, PICTURE_SIZE))
        paths = [place.store.mesh(run, Job(image, seed)) for run in runs.values()]
        paths += [truth[image.stem]] if truth else []
        meshes = [load_mesh(path) if path.is_file() else None for path in paths]  # white where one failed
        pictures = [mesh_picture(mesh, PICTURE_SIZE) for mesh in meshes]
        rows.append([on_white(np.asarray(fitted)), *pictures])
    return titled_sheet(["input", *runs, *(["ground truth"] if truth else [])], rows)


def block_means(entry: dict[str, Any]) -> dict[str, Any]:
    """How wide each block ran on average over steps and meshes, by branch, and how much meshes differ."""
    names = ("conditional", "unconditional")
    found: dict[str, Any] = {name: entry[name] for name in ("method", "budget", "steps", "blocks")}
    for branch, name in enumerate(names):
        mean = entry["mean"][:, branch].mean(axis=0)
        if np.isfinite(mean).all():
            found[name] = [round(float(value), 4) for value in mean]
            found[f"{name}_std"] = [round(float(v), 4) for v in entry["std"][:, branch].mean(axis=0)]
    return found


SCORES = {
    "chamfer_l1_same_steps": "Chamfer-L1 to dense, same steps", "iou_same_steps": "IoU to dense, same steps",
    "chamfer_l1_paired": "Chamfer-L1 to reference", "iou_paired": "IoU to reference", "f_score@0.02": "F@0.02",
    "f_score@0.05": "F@0.05",
}  # fmt: skip
COLUMNS = {
    "method": "method", "budget": "budget", "steps": "steps", "batch": "batch", "executed_flops_ratio": "FLOPs",
    "dit_ms_median": "DiT ms", "dit_speedup": "speed-up", "efficiency": "efficiency",
    "end_to_end_speedup": "end to end", "chamfer_l1_paired": "Chamfer", "iou_paired": "IoU", "f_score@0.02": "F@0.02",
}  # fmt: skip


def text_table(results: dict[str, Any], columns: Mapping[str, str] = COLUMNS) -> str:
    """The headline columns, `columns` with their titles, and the targets, for a terminal."""
    titles = columns.values()
    lines = ["".join(f"{name:<21}" if i == 0 else f"{name:>12}" for i, name in enumerate(titles))]
    for row in results["rows"]:
        lines.append("".join(_cell(row.get(name), i == 0) for i, name in enumerate(columns)))
    answers = {True: "met", False: "NOT met", None: "not measured"}
    lines += ["", *(f"{name}: {answers[t['met']]}" for name, t in results["summary"]["targets"].items())]
    return "\n".join(lines)


def _cell(value: Any, first: bool) -> str:
    text = "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return f"{text:<21}" if first else f"{text:>12}"
