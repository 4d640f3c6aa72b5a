"""Which of two families of methods gives more for the same time: frontiers of (time, loss) points, and their chart.

A family is a set of operating points (step counts, budgets, ...), each with its time and a loss that is better the
lower it is. Between two points of a frontier the loss is linear in the logarithm of the time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Point = tuple[float, float]  # (time, loss)
Front = list[Point]  # times ascending, losses descending

Colour = tuple[int, int, int]
INK, GRID, PAPER = (30, 30, 30), (225, 225, 225), (255, 255, 255)
COLOURS: tuple[Colour, ...] = (
    (90, 90, 90), (20, 90, 170), (220, 90, 20), (40, 140, 70), (150, 60, 150), (200, 160, 0), (0, 150, 170),
    (180, 40, 60), (120, 80, 40), (90, 110, 230), (140, 170, 40), (230, 120, 170),
)  # fmt: skip
PANEL, LEFT, BOTTOM, TOP, LEGEND = (520, 400), 80, 60, 40, 22


def pareto_front(points: Sequence[Point]) -> Front:
    """The points that no other is at least as good as in both time and loss, fastest first.

    Raises ValueError for a time that is not positive, or anything that is not finite.
    """
    front: Front = []
    for time, loss in sorted(points):
        if not (time > 0 and math.isfinite(time) and math.isfinite(loss)):
            raise ValueError(f"a point of time {time} and loss {loss}, expected a positive time, both finite")
        if not front or loss < front[-1][1]:
            front.append((time, loss))
    return front


def loss_at(front: Front, time: float) -> float | None:
    """The loss that a frontier reaches within a time; None before its first point."""
    if not front or time < front[0][0]:
        return None
    times, losses = np.log([t for t, _ in front]), [loss for _, loss in front]
    return float(np.interp(math.log(time), times, losses))


def time_at(front: Front, loss: float) -> float | None:
    """The time in which a frontier reaches a loss; None if it never does."""
    if not front or loss < front[-1][1]:
        return None
    losses, times = [loss for _, loss in reversed(front)], np.log([t for t, _ in reversed(front)])
    return float(np.exp(np.interp(loss, losses, times)))


def knee(front: Front) -> Point | None:
    """The point of a frontier that is farthest below its chord, both axes scaled to [0, 1], the time's logarithmic
    (Satopaa et al. 2011, "Finding a Kneedle in a Haystack"); None with fewer than three points."""
    if len(front) < 3:
        return None
    x = np.log([time for time, _ in front])
    y = np.array([loss for _, loss in front])
    below = 1 - (x - x[0]) / (x[-1] - x[0]) - (y - y[-1]) / (y[0] - y[-1])
    return front[int(below.argmax())]


def compare_fronts(
    challenger: Sequence[Point], other: Sequence[Point], tolerance: float = 0.0
) -> dict[str, Any]:
    """Compare the frontiers, `front` and `other`, of two families of points; `tolerance` is relative.

    `never_worse`: at no time within the range of both is the challenger's loss above the other's by more than the
    tolerance; `worst_time` is where that is most, with both losses, `worst_losses`. `ratios` are (loss, other's time /
    challenger's) at the losses of either frontier's points that both reach; `best_ratio` is the largest. `knee_ratio`
    is that ratio at the other's `knee`. None where the frontiers do not overlap.
    """
    mine, theirs = pareto_front(challenger), pareto_front(other)
    worst: tuple[float, float, float, float] | None = None  # beyond the tolerance, time, both losses
    if mine and theirs:
        low, high = max(mine[0][0], theirs[0][0]), min(mine[-1][0], theirs[-1][0])
        for time in sorted({low, high, *(t for t, _ in mine + theirs)}):
            a, b = loss_at(mine, time), loss_at(theirs, time)
            if low <= time <= high and a is not None and b is not None:
                found = (a - b - tolerance * abs(b), time, a, b)
                worst = max(worst, found) if worst else found
    ratios = _ratios(mine, theirs)
    corner = knee(theirs)
    at_knee = time_at(mine, corner[1]) if corner else None
    return {
        "front": mine,
        "other": theirs,
        "never_worse": None if worst is None else worst[0] <= 0,
        "worst_time": None if worst is None else worst[1],
        "worst_losses": None if worst is None else worst[2:],
        "ratios": ratios,
        "best_ratio": max((ratio for _, ratio in ratios), default=None),
        "knee": corner,
        "knee_ratio": corner[0] / at_knee if corner and at_knee else None,
    }


def _ratios(mine: Front, theirs: Front) -> list[Point]:
    """(loss, their time / my time) at every loss of a point that lies within the range of both."""
    if not mine or not theirs:
        return []
    best, worst = max(mine[-1][1], theirs[-1][1]), min(mine[0][1], theirs[0][1])
    levels = sorted({loss for _, loss in mine + theirs if best <= loss <= worst})
    found = [(level, time_at(theirs, level), time_at(mine, level)) for level in levels]
    return [(level, a / b) for level, a, b in found if a is not None and b is not None]


# ------------------------------------------------------------------------------------------------------ chart


@dataclass
class Series:
    """One method: its operating points (x, y); a line joins those that no other of them dominates."""

    name: str
    points: list[Point] = field(default_factory=list)


def chart(series: Sequence[Series], x_label: str, y_label: str, lower: bool = True) -> Image.Image:
    """Points and frontiers over a logarithmic x axis, the colours those of `COLOURS` in order; `lower` y is better."""
    xs, ys = zip(*(point for each in series for point in each.points), strict=True)
    x_range, y_range = _padded(math.log(min(xs)), math.log(max(xs))), _padded(min(ys), max(ys))
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
        at = place(xs[0], tick)[1]
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
    """The colours of methods, in as many columns as fit."""
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
