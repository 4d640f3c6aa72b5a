"""Pictures of a benchmark: the Pareto plot, the heat map of blocks over steps, the contact sheet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from elastic3d.evaluation.frontier import pareto_front
from elastic3d.evaluation.items import Row
from elastic3d.utils.files import atomic_path

Colour = tuple[int, int, int]
INK, GRID, PAPER = (30, 30, 30), (225, 225, 225), (255, 255, 255)
COLOURS: tuple[Colour, ...] = (
    (90, 90, 90), (20, 90, 170), (220, 90, 20), (40, 140, 70), (150, 60, 150), (200, 160, 0), (0, 150, 170),
    (180, 40, 60), (120, 80, 40), (90, 110, 230), (140, 170, 40), (230, 120, 170),
)  # fmt: skip
PANEL, LEFT, BOTTOM, TOP, LEGEND = (520, 400), 80, 60, 40, 22
LABELS = {
    "chamfer_l1_paired": "Chamfer-L1 to the reference (lower is better)",
    "iou_paired": "IoU with the reference (higher is better)",
    "f_score@0.02": "F@0.02 to ground truth (higher is better)",
}


@dataclass
class Series:
    """One method: its operating points (x, y); a line joins those that no other of them dominates."""

    name: str
    points: list[tuple[float, float]] = field(default_factory=list)


def save(picture: Image.Image, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG")


# ------------------------------------------------------------------------------------------------- Pareto plot


def pareto_plot(
    rows: Sequence[Row], batch: int, labels: Mapping[str, str] = LABELS, each_one: str = "a mesh"
) -> Image.Image | None:
    """Fidelity over the DiT's milliseconds, a panel each score, a colour each method; None without times.

    A label says in brackets whether lower is better.
    """
    panels = []
    names = list(dict.fromkeys("dense, fewer steps" if _is_dense(row) else row["method"] for row in rows))
    for score, label in labels.items():
        series = {name: Series(name) for name in names}
        for row in rows:
            value, time = row.get(score), row["dit_ms_median"]
            if row["batch"] == batch and value is not None and time is not None:
                name = "dense, fewer steps" if _is_dense(row) else row["method"]
                series[name].points.append((time, value))
        if any(each.points for each in series.values()):
            time_label, lower = f"DiT, ms {each_one}, batch {batch}", "(lower" in label
            panels.append(chart(list(series.values()), time_label, label, lower))
    if not panels:
        return None
    legend = _legend(names, sum(panel.width for panel in panels))
    sheet = Image.new("RGB", (legend.width, panels[0].height + legend.height), PAPER)
    for i, panel in enumerate(panels):
        sheet.paste(panel, (i * panel.width, 0))
    sheet.paste(legend, (0, panels[0].height))
    return sheet


def _is_dense(row: Row) -> bool:
    return row["method"] in ("dense", "fewer_steps")


def chart(series: Sequence[Series], x_label: str, y_label: str, lower: bool = True) -> Image.Image:
    """Points and frontiers over a logarithmic x axis, the colours those of `COLOURS` in order; `lower` y is better."""
    points = [point for each in series for point in each.points]
    x_range = _padded(
        math.log([*map(min, zip(*points, strict=True))][0]), math.log(max(x for x, _ in points))
    )
    y_range = _padded(min(y for _, y in points), max(y for _, y in points))
    width, height = PANEL
    picture = Image.new("RGB", (LEFT + width + 20, TOP + height + BOTTOM), PAPER)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(13)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log(x) - x_range[0]) / (x_range[1] - x_range[0])
        up = (y - y_range[0]) / (y_range[1] - y_range[0])
        return LEFT + across * width, TOP + (1 - up) * height

    for tick in _log_ticks(math.exp(x_range[0]), math.exp(x_range[1])):
        at = place(tick, y_range[0])[0]
        draw.line((at, TOP, at, TOP + height), fill=GRID)
        draw.text((at, TOP + height + 6), f"{tick:g}", fill=INK, font=font, anchor="ma")
    for tick in _ticks(*y_range):
        at = place(points[0][0], tick)[1]
        draw.line((LEFT, at, LEFT + width, at), fill=GRID)
        draw.text((LEFT - 8, at), f"{tick:.4g}", fill=INK, font=font, anchor="rm")
    draw.rectangle((LEFT, TOP, LEFT + width, TOP + height), outline=INK)
    draw.text((LEFT, TOP - 24), y_label, fill=INK, font=ImageFont.load_default(15))
    draw.text((LEFT + width / 2, TOP + height + 30), x_label, fill=INK, font=font, anchor="ma")
    for number, each in enumerate(series):
        colour = COLOURS[number % len(COLOURS)]
        sign = 1 if lower else -1
        front = pareto_front([(x, sign * y) for x, y in each.points])
        if len(front) > 1:
            draw.line([place(x, sign * y) for x, y in front], fill=colour, width=2)
        for x, y in (place(*point) for point in each.points):
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour)
    return picture


def _legend(names: Sequence[str], width: int) -> Image.Image:
    columns = max(1, width // 190)
    picture = Image.new("RGB", (width, LEGEND * math.ceil(len(names) / columns) + 10), PAPER)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    for number, name in enumerate(names):
        row, column = divmod(number, columns)
        x, y = 20 + column * 190, row * LEGEND + LEGEND // 2
        draw.ellipse((x, y - 5, x + 10, y + 5), fill=COLOURS[number % len(COLOURS)])
        draw.text((x + 16, y), name, fill=INK, font=font, anchor="lm")
    return picture


def _padded(low: float, high: float) -> tuple[float, float]:
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.1
    return low - margin, high + margin


def _ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers within a range."""
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= max(factor for factor in (1, 2, 5) if factor * step <= (high - low) / 4)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten within a range; round numbers where fewer than three of them are."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    found = [tick for tick in ticks if low <= tick <= high]
    return found if len(found) > 2 else [tick for tick in _ticks(low, high) if tick > 0]


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
    picture = Image.new("RGB", (margin + column * len(maps), blocks * cell + 56), PAPER)
    draw = ImageDraw.Draw(picture)
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
        picture.paste(pixels, (left, 44))
        draw.rectangle((left - 1, 43, left + steps * cell, 44 + blocks * cell), outline=GRID)
    return picture


# ----------------------------------------------------------------------------------------------- contact sheet


def titled_sheet(titles: Sequence[str], rows: Sequence[Sequence[np.ndarray]]) -> Image.Image:
    """Pictures of one size (H,W,3) uint8 in rows, a title over each column."""
    size = rows[0][0].shape[1]
    body = Image.fromarray(np.concatenate([np.concatenate(list(row), axis=1) for row in rows]))
    sheet = Image.new("RGB", (body.width, body.height + 24), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        at = (column * size + size / 2, 12)
        draw.text(at, title, fill=INK, font=ImageFont.load_default(13), anchor="mm")
    sheet.paste(body, (0, 24))
    return sheet
