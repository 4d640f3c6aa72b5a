"""Everything that a benchmark writes in the end: results.json, results.csv, table.md, the Pareto plots, the heat map of
blocks over steps, and the contact sheet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from elastic3d.benchmark.methods import FEWER, Case
from elastic3d.benchmark.rivals import missing
from elastic3d.benchmark.rows import Round, beaten, build_rows, compare_rivals, route_shares, summarise_rows
from elastic3d.benchmark.task import Scores, Task
from elastic3d.evaluation.frontier import GRID, INK, PAPER, Series, chart, legend
from elastic3d.evaluation.report import machine, markdown_table, write_csv
from elastic3d.evaluation.statistics import Row
from elastic3d.utils.files import atomic_path
from elastic3d.utils.options import to_dict
from elastic3d.utils.structured import save_json

ANSWERS = {True: "met", False: "**not met**", None: "not measured"}


def write_report(
    task: Task, cases: Sequence[Case], scores: Scores, rounds: Sequence[Round], command: str
) -> dict[str, Any]:
    """Write all files; what results.json holds."""
    output, shares = task.config.output, route_shares(task, cases)
    rows = build_rows(task, cases, scores, rounds)
    comparisons = compare_rivals(task, cases, scores, rows)
    results = {
        "about": {
            "command": command,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": machine(),
            "models": {name: model.weights_sha256 for name, model in task.planner.models.items()},
            "baseline_steps": task.planner.baseline_steps,
            "left_out": missing(task.config),
            **task.about(),
            "config": to_dict(task.config),
        },
        "rows": rows,
        "summary": {
            **summarise_rows(task, rows),
            "routers_beside_rivals": beaten(comparisons),
            "blocks": {run: block_means(entry) for run, entry in shares.items()},
        },
        "comparisons": comparisons,
    }
    save_json(results, output / "results.json")
    write_csv(rows, output / "results.csv")
    with atomic_path(output / "table.md") as path:
        path.write_text(page(results, task.table))
    first, *others = task.config.batches
    images = {"pareto.png": pareto_plot(rows, first, task.plot, task.noun), "blocks.png": heat_map(shares)}
    for batch in others:
        images[f"pareto-batch-{batch}.png"] = pareto_plot(rows, batch, task.plot, task.noun)
    if (sheet := task.sheet(cases)) is not None:
        images["sheet.png"] = titled_sheet(*sheet)
    for name, image in images.items():
        if image is not None:
            with atomic_path(output / name) as path:
                image.save(path, format="PNG")
    return results


def block_means(entry: dict[str, Any]) -> dict[str, Any]:
    """How wide each block ran on average over steps and results, by branch, and how much results differ."""
    found: dict[str, Any] = {name: entry[name] for name in ("method", "budget", "steps", "blocks")}
    for branch, name in enumerate(("conditional", "unconditional")):
        mean = entry["mean"][:, branch].mean(axis=0)
        if np.isfinite(mean).all():
            found[name] = mean.round(4).tolist()
            found[f"{name}_std"] = entry["std"][:, branch].mean(axis=0).round(4).tolist()
    return found


def page(results: Mapping[str, Any], scores: Mapping[str, str]) -> str:
    """Markdown: a line for every run with the DiT's speed-up at each batch size and the columns `scores` (name:
    title), then the targets."""
    rows = results["rows"]
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    titles = ["method", "budget", "steps", "executed FLOPs / dense"]
    titles += [f"{name}, batch {batch}" for name in ("DiT speed-up", "efficiency") for batch in batches]
    groups: dict[tuple[Any, ...], dict[int, Row]] = {}
    for row in rows:
        identity = tuple(row.get(name) for name in ("method", "note", "budget", "steps", "run"))
        groups.setdefault(identity, {})[row["batch"]] = row
    lines = []
    for (method, note, budget, steps, _), group in groups.items():
        first = next(iter(group.values()))
        cells = [", ".join(filter(None, [method, note])), budget, steps]
        cells.append(_number(first["flops_ratio_to_baseline"], ".2f"))
        for name in ("dit_speedup", "efficiency"):
            cells += [_number(group.get(batch, {}).get(name), ".2f") for batch in batches]
        lines.append([*cells, *(_number(first.get(name), ".4g") for name in scores)])
    targets = results["summary"]["targets"].items()
    answers = [f"- {name}: {_found(t['found'])}, {ANSWERS[t['met']]}" for name, t in targets]
    return "\n".join([markdown_table([*titles, *scores.values()], lines), "", *answers]) + "\n"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _found(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_found(part)}" for name, part in value.items())
    if isinstance(value, (list, tuple)):
        return " / ".join(map(_found, value))
    return "nothing" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


# ------------------------------------------------------------------------------------------------- Pareto plot


def pareto_plot(
    rows: Sequence[Row], batch: int, labels: Mapping[str, str], noun: str = "mesh"
) -> Image.Image | None:
    """Fidelity over the DiT's milliseconds, a panel each score, a colour each method; None without times.

    A label says in brackets whether lower is better.
    """

    def name_of(row: Row) -> str:
        return "dense, fewer steps" if row["method"] in FEWER else row["method"]

    panels, names = [], list(dict.fromkeys(map(name_of, rows)))
    for score, label in labels.items():
        series = {name: Series(name) for name in names}
        for row in rows:
            value, time = row.get(score), row["dit_ms_median"]
            if row["batch"] == batch and value is not None and time is not None:
                series[name_of(row)].points.append((time, value))
        if any(each.points for each in series.values()):
            time_label, lower = f"DiT, ms a {noun}, batch {batch}", "(lower" in label
            panels.append(chart(list(series.values()), time_label, label, lower))
    if not panels:
        return None
    below = legend(names, sum(panel.width for panel in panels))
    return _stacked([_stacked(panels, across=True), below])


# ---------------------------------------------------------------------------------------------------- heat map


def heat_map(shares: dict[str, Any], cell: int = 12) -> Image.Image | None:
    """How wide each block (down) ran at each step (across), averaged over meshes: white skipped, dark blue full width.

    A panel for each of the runs of `route_shares`: conditional branch, unconditional branch, and in orange the standard
    deviation over meshes of the conditional one (white: the same for every sample).
    """
    return _stacked([_heat_panel(entry, cell) for entry in shares.values()]) if shares else None


def _heat_panel(entry: dict[str, Any], cell: int) -> Image.Image:
    mean, std = entry["mean"], entry["std"]
    maps = [("conditional", mean[:, 0], (20, 60, 140)), ("unconditional", mean[:, 1], (20, 60, 140)),
            ("spread over samples", 2 * std[:, 0], (200, 90, 0))]  # fmt: skip
    maps = [each for each in maps if np.isfinite(each[1]).all()]
    steps, blocks = mean.shape[0], mean.shape[2]
    font = ImageFont.load_default(12)
    margin = max(150, *(int(font.getlength(name)) + 20 for name in entry["blocks"]))
    column = max(steps * cell + 24, 150)
    image = Image.new("RGB", (margin + column * len(maps), blocks * cell + 56), PAPER)
    draw = ImageDraw.Draw(image)
    budget = "" if entry["budget"] is None else f", budget {entry['budget']:g}"
    title = f"{entry['method']}, {entry['steps']} steps{budget}"
    draw.text((10, 6), title, fill=INK, font=ImageFont.load_default(14))
    for row, name in enumerate(entry["blocks"]):
        draw.text((margin - 10, 44 + row * cell + cell / 2), name, fill=INK, font=font, anchor="rm")
    for number, (name, values, full) in enumerate(maps):
        left = margin + number * column
        draw.text((left, 26), name, fill=INK, font=font)
        shade = np.clip(values.T, 0, 1)[..., None] * (np.array(full) - 255) + 255
        pixels = Image.fromarray(np.round(shade).astype(np.uint8)).resize(
            (steps * cell, blocks * cell), Image.Resampling.NEAREST
        )
        image.paste(pixels, (left, 44))
        draw.rectangle((left - 1, 43, left + steps * cell, 44 + blocks * cell), outline=GRID)
    return image


# ----------------------------------------------------------------------------------------------- contact sheet


def titled_sheet(titles: Sequence[str], rows: Sequence[Sequence[np.ndarray]]) -> Image.Image:
    """Images of one size (H,W,3) uint8 in rows, a title over each column."""
    size = rows[0][0].shape[1]
    body = Image.fromarray(np.concatenate([np.concatenate(list(row), axis=1) for row in rows]))
    sheet = Image.new("RGB", (body.width, body.height + 24), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        at = (column * size + size / 2, 12)
        draw.text(at, title, fill=INK, font=ImageFont.load_default(13), anchor="mm")
    sheet.paste(body, (0, 24))
    return sheet


def _stacked(panels: Sequence[Image.Image], across: bool = False) -> Image.Image:
    """Panels below each other, or side by side."""
    widths, heights = ([getattr(panel, side) for panel in panels] for side in ("width", "height"))
    size = (sum(widths), max(heights)) if across else (max(widths), sum(heights))
    sheet, offset = Image.new("RGB", size, PAPER), 0
    for panel, width, height in zip(panels, widths, heights, strict=True):
        sheet.paste(panel, (offset, 0) if across else (0, offset))
        offset += width if across else height
    return sheet
