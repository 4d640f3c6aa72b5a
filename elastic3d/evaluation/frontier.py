"""Which of two families of methods gives more for the same time: frontiers of (time, loss) points.

A family is a set of operating points (step counts, budgets, ...), each with its time and a loss that is better the
lower it is. Between two points of a frontier the loss is linear in the logarithm of the time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

Front = list[tuple[float, float]]  # (time, loss), times ascending, losses descending


def pareto_front(points: Sequence[tuple[float, float]]) -> Front:
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


def knee(front: Front) -> tuple[float, float] | None:
    """The point of a frontier that is farthest below its chord, both axes scaled to [0, 1], the time's logarithmic
    (Satopaa et al. 2011, "Finding a Kneedle in a Haystack"); None with fewer than three points."""
    if len(front) < 3:
        return None
    x = np.log([time for time, _ in front])
    y = np.array([loss for _, loss in front])
    below = 1 - (x - x[0]) / (x[-1] - x[0]) - (y - y[-1]) / (y[0] - y[-1])
    return front[int(below.argmax())]


@dataclass(frozen=True)
class FrontierComparison:
    """A challenger's frontier beside another.

    `never_worse`: at no time within the range of both is the challenger's loss above the other's by more than the
    tolerance; `worst_time` is where it is worst, with both losses. `ratios` are (loss, other's time / challenger's) at
    the losses of either frontier's points that both reach; `best_ratio` is the largest. `knee_ratio` is that ratio at
    the other's knee. None where the frontiers do not overlap.
    """

    front: Front
    other: Front
    never_worse: bool | None
    worst_time: float | None
    worst_losses: tuple[float, float] | None
    ratios: list[tuple[float, float]]
    best_ratio: float | None
    knee: tuple[float, float] | None
    knee_ratio: float | None

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self)


def compare_fronts(
    challenger: Sequence[tuple[float, float]], other: Sequence[tuple[float, float]], tolerance: float = 0.0
) -> FrontierComparison:
    """Compare the frontiers of two families of (time, loss) points; `tolerance` is relative."""
    mine, theirs = pareto_front(challenger), pareto_front(other)
    worst: tuple[float, float, float] | None = None
    if mine and theirs:
        low, high = max(mine[0][0], theirs[0][0]), min(mine[-1][0], theirs[-1][0])
        for time in sorted({low, high, *(t for t, _ in mine + theirs)}):
            a, b = loss_at(mine, time), loss_at(theirs, time)
            if low <= time <= high and a is not None and b is not None:
                worst = max(worst, (a - b, a, time)) if worst else (a - b, a, time)
    ratios = _ratios(mine, theirs)
    corner = knee(theirs)
    at_knee = time_at(mine, corner[1]) if corner else None
    return FrontierComparison(
        front=mine,
        other=theirs,
        never_worse=None if worst is None else worst[0] <= tolerance * abs(worst[1] - worst[0]),
        worst_time=None if worst is None else worst[2],
        worst_losses=None if worst is None else (worst[1], worst[1] - worst[0]),
        ratios=ratios,
        best_ratio=max((ratio for _, ratio in ratios), default=None),
        knee=corner,
        knee_ratio=corner[0] / at_knee if corner and at_knee else None,
    )


def _ratios(mine: Front, theirs: Front) -> list[tuple[float, float]]:
    """(loss, their time / my time) at every loss of a point that lies within the range of both."""
    if not mine or not theirs:
        return []
    best, worst = max(mine[-1][1], theirs[-1][1]), min(mine[0][1], theirs[0][1])
    levels = sorted({loss for _, loss in mine + theirs if best <= loss <= worst})
    found = [(level, time_at(theirs, level), time_at(mine, level)) for level in levels]
    return [(level, a / b) for level, a, b in found if a is not None and b is not None]
