"""A chart of families of operating points over a logarithmic time axis, each with its frontier."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image, ImageDraw, ImageFont

from elastic3d.evaluation.frontier import pareto_front

Colour = tuple[int, int, int]
INK, GRID, PAPER = (30, 30, 30), (225, 225, 225), (255, 255, 255)
COLOURS: tuple[Colour, ...] = (
    (90, 90, 90), (20, 90, 170), (220, 90, 20), (40, 140, 70), (150, 60, 150), (200, 160, 0), (0, 150, 170),
    (180, 40, 60), (120, 80, 40), (90, 110, 230), (140, 170, 40), (230, 120, 170),
)  # fmt: skip
PANEL, LEFT, BOTTOM, TOP, LEGEND = (520, 400), 80, 60, 40, 22


@dataclass
class Series:
    """One method: its operating points (x, y); a line joins those that no other of them dominates."""

    name: str
    points: list[tuple[float, float]] = field(default_factory=list)


def chart(series: Sequence[Series], x_label: str, y_label: str, lower: bool = True) -> Image.Image:
    """Points and frontiers over a logarithmic x axis, the colours those of `COLOURS` in order; `lower` y is better."""
    points = [point for each in series for point in each.points]
    x_range = _padded(
        math.log([*map(min, zip(*points, strict=True))][0]), math.log(max(x for x, _ in points))
    )
    y_range = _padded(min(y for _, y in points), max(y for _, y in points))
    width, height = PANEL
    image = Image.new("RGB", (LEFT + width + 20, TOP + height + BOTTOM), PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)

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
    return image


def legend(names: Sequence[str], width: int) -> Image.Image:
    columns = max(1, width // 190)
    image = Image.new("RGB", (width, LEGEND * math.ceil(len(names) / columns) + 10), PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    for number, name in enumerate(names):
        row, column = divmod(number, columns)
        x, y = 20 + column * 190, row * LEGEND + LEGEND // 2
        draw.ellipse((x, y - 5, x + 10, y + 5), fill=COLOURS[number % len(COLOURS)])
        draw.text((x + 16, y), name, fill=INK, font=font, anchor="lm")
    return image


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
