"""Figures of a benchmark: the Pareto plot, the heat map of blocks over steps, the contact sheet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from elastic3d.benchmark.methods import FEWER
from elastic3d.evaluation.chart import GRID, INK, PAPER, Series, chart, legend
from elastic3d.evaluation.items import Row
from elastic3d.utils.files import atomic_path


def save(image: Image.Image, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")


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
    sheet = Image.new("RGB", (below.width, panels[0].height + below.height), PAPER)
    for i, panel in enumerate(panels):
        sheet.paste(panel, (i * panel.width, 0))
    sheet.paste(below, (0, panels[0].height))
    return sheet


# ---------------------------------------------------------------------------------------------------- heat map


def heat_map(shares: dict[str, Any], cell: int = 12) -> Image.Image | None:
    """How wide each block (down) ran at each step (across), averaged over meshes: white skipped, dark blue full width.

    A panel for each of the runs of `route_shares`: conditional branch, unconditional branch, and in orange the standard
    deviation over meshes of the conditional one (white: the same for every sample).
    """
    panels = [_heat_panel(entry, cell) for entry in shares.values()]
    if not panels:
        return None
    sheet = Image.new("RGB", (max(p.width for p in panels), sum(p.height for p in panels)), PAPER)
    top = 0
    for panel in panels:
        sheet.paste(panel, (0, top))
        top += panel.height
    return sheet


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
    title = f"{entry['method']}, {entry['steps']} steps" + (
        f", budget {entry['budget']:g}" if entry["budget"] is not None else ""
    )
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
