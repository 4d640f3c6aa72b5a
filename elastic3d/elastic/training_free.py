"""Decisions without training: which steps run the blocks, and how what they add goes on at the others.

Both follow from a calibration: the second moments M of what the blocks of a list add, over the steps of a few dense
generations.

- Forecast: the linear one of least mean squared error from the last two computed steps a < b,
  w = M[ab,ab]^-1 M[ab,s], a map for each step as in L2P; its error is M[s,s] - w M[ab,s].
- Steps: of all sets of n the one with the least sum of errors times squared step sizes, found by dynamic programming.
  Errors are those of what is added to the stream that becomes the result, under guidance. Or `online`, for each sample
  by itself: errors, scaled by how fast its own input changes, add up until they pass a threshold, as in TeaCache
  (2411.19108) and EasyCache (2507.02860).

Without a calibration the computed steps lie evenly, and residuals go on along a damped line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elastic3d.elastic.config import MIN_BUDGET, Branches, RouterConfig, RouterVariant, Scope
from elastic3d.elastic.context import StepContext
from elastic3d.elastic.router import RouteDecision
from elastic3d.errors import UserError
from elastic3d.utils.options import check_range

Array = NDArray[np.float64]
Series = tuple[int, int]  # what a list adds to a stream: the number of its first block, that of the stream
RIDGE = 1e-6  # of the mean of the moments' diagonal
DAMPING = 0.7  # without a calibration

# Blocks that are decided together and have no router.
NO_ROUTERS = RouterConfig(
    variant=RouterVariant.none, scope=Scope.step, branches=Branches.shared, widths=1, longest=1000,
    damping=DAMPING,
)  # fmt: skip


class Schedule(Enum):
    """Which steps run the blocks: at even distances, those of least predicted error, or each sample's own."""

    even = "even"
    planned = "planned"
    online = "online"


@dataclass(frozen=True)
class Calibration:
    """What a few dense generations of S steps say about a model.

    times: (S,) ascending in [0,1]; moments: (S,S) of each series; result: (S,S), the sum over lists of what they add to
    their first stream, the one that becomes the result, with the branches put together as guidance does; changes: (S,)
    squared change of the model's input since the step before, relative to its square; about: which model, on what.
    """

    times: Array
    moments: Mapping[Series, Array]
    result: Array
    changes: Array
    about: Mapping[str, Any] = field(default_factory=dict)

    def at(self, times: Sequence[float]) -> Calibration:
        """The same for steps at other times: residuals change linearly between those that were seen."""
        new = np.asarray(times, dtype=np.float64)
        if new.shape == self.times.shape and np.allclose(new, self.times, atol=1e-4):
            return self
        blend = np.stack([np.interp(new, self.times, row) for row in np.eye(len(self.times))], axis=1)
        moments = {series: blend @ moment @ blend.T for series, moment in self.moments.items()}
        changes = np.interp(new, self.times, self.changes) * (len(self.times) / len(new)) ** 2
        return Calibration(new, moments, blend @ self.result @ blend.T, changes, self.about)

    @staticmethod
    def forecasts(moment: Array, known: Sequence[int]) -> tuple[Array, Array]:
        """Weights (n,S) of values at n `known` steps for those at every step, and mean squared errors (S,), by the
        moments (S,S) of the values."""
        inner, cross = moment[np.ix_(known, known)], moment[list(known)]
        ridge = RIDGE * max(np.trace(inner), 1e-30) / len(known)
        weights = np.linalg.solve(inner + ridge * np.eye(len(known)), cross)
        return weights, np.maximum(moment.diagonal() - (weights * cross).sum(axis=0), 0.0)

    def errors(self) -> Array:
        """Predicted squared error (S,S,S) of the result where the third step is forecast from the first two; from
        one alone where they are the same. 0 for steps that do not come after these."""
        steps = len(self.times)
        sizes = np.diff([*self.times, 1.0])
        found = np.zeros((steps, steps, steps))
        for b in range(steps):
            for a in range(b + 1):
                known = (b,) if a == b else (a, b)
                found[a, b, b + 1 :] = (sizes**2 * self.forecasts(self.result, known)[1])[b + 1 :]
        return found


def even_steps(steps: int, count: int) -> tuple[int, ...]:
    """`count` of the steps: the first two, and others at even distances."""
    return (0, *(1 + i * (steps - 1) // (count - 1) for i in range(count - 1))) if count > 1 else (0,)


def planned_steps(errors: Array, count: int) -> tuple[int, ...]:
    """The `count` steps with the least sum of errors (S,S,S) at the others; the first is always one of them.

    Dynamic programming over the last two computed steps a <= b (a = b: there is one).
    """
    steps = len(errors)
    # gaps[a, b, c]: all steps after b and before c
    gaps = np.concatenate([np.zeros((steps, steps, 1)), errors.cumsum(axis=2)], axis=2)
    best = np.full((steps, steps), np.inf)
    best[0, 0] = 0.0
    came: list[NDArray[np.int64]] = []
    for _ in range(count - 1):
        reached = best[:, :, None] + gaps[:, :, :steps]  # (a, b, c)
        reached[:, np.tril(np.ones((steps, steps), dtype=bool))] = np.inf  # c comes after b
        came.append(reached.argmin(axis=0))
        best = reached.min(axis=0)
    a, b = np.unravel_index((best + gaps[:, :, steps]).argmin(), best.shape)
    chosen = [int(b)]
    for before in reversed(came):
        a, b = before[a, b], a
        chosen.append(int(b))
    return tuple(sorted(chosen))


class StepPolicy:
    """Decides in the place of routers. One object serves all generations of a model."""

    alike = True

    def __init__(self, calibration: Calibration | None = None, schedule: Schedule | None = None) -> None:
        """`schedule` None: planned where there is a calibration, else even; the others need one (ValueError)."""
        default = Schedule.even if calibration is None else Schedule.planned
        self.calibration, self.schedule = calibration, schedule or default
        if calibration is None and self.schedule is not Schedule.even:
            raise ValueError(f"schedule is {self.schedule.name}, expected even: there is no calibration")
        self._here: Calibration | None = None  # at the times of this generation
        self._steps: list[frozenset[int]] = []  # computed, of each sample
        self._errors: tuple[tuple[float, ...], Array] | None = None  # by the times that they are of
        self._online: list[_Online] = []

    def begin(self, steps: int, times: Sequence[float], budgets: Sequence[float]) -> Forecast | None:
        """A generation begins -> how residuals go on in it; None: along a damped line.

        Raises UserError for a budget of fewer than two of its steps.
        """
        times = list(times) or [i / steps for i in range(steps)]
        self._here = None if self.calibration is None else self.calibration.at(times)
        counts = [check_budget(budget, steps) for budget in budgets]
        self._online = []
        if self.schedule is Schedule.even:
            self._steps = [frozenset(even_steps(steps, count)) for count in counts]
        else:
            errors = self._errors_at(tuple(times))
            planned = {count: planned_steps(errors, count) for count in set(counts)}
            self._steps = [frozenset(planned[count]) for count in counts]
            if self.schedule is Schedule.online:
                levels = {count: _threshold(errors, count) for count in planned}
                self._online = [_Online(errors, levels[count], self._here) for count in counts]
        return None if self._here is None else Forecast(self._here)

    def decide(self, context: StepContext, block: int) -> RouteDecision:
        """Whether the blocks run, for every row of a pass."""
        moments = list(zip(context.steps, context.rows, strict=True))
        if self._online:
            inputs = context.entered[0][0]  # of the model's first block
            keep = [self._online[s].runs(step, inputs[row]) for row, (step, (_, s)) in enumerate(moments)]
        else:
            keep = [step in self._steps[sample] for step, (_, sample) in moments]
        kept = torch.tensor(keep, device=context.t.device)
        return RouteDecision.fixed(kept, torch.zeros_like(kept, dtype=torch.long), 1)

    @property
    def about(self) -> dict[str, Any]:
        """For metadata: the schedule, and on how many generations it was calibrated (0: it was not)."""
        samples = 0 if self.calibration is None else self.calibration.about.get("samples", 0)
        return {"schedule": self.schedule.name, "samples": samples}

    def _errors_at(self, times: tuple[float, ...]) -> Array:
        assert self._here is not None
        if self._errors is None or self._errors[0] != times:
            self._errors = times, self._here.errors()
        return self._errors[1]


class Forecast:
    """How residuals go on in one generation; see `elastic3d.elastic.cache`."""

    def __init__(self, calibration: Calibration) -> None:
        self.calibration = calibration
        self._known: dict[tuple[Any, ...], tuple[float, float]] = {}

    def weights(
        self, span: int, stream: int, step: int, newest: int, older: int | None
    ) -> tuple[float, float]:
        """Of the residual computed at step `newest`, and of the one at `older`, for the one at `step`."""
        key = (span, stream, step, newest, older)
        if key not in self._known:
            known = [newest] if older is None else [older, newest]
            found = self.calibration.forecasts(self.calibration.moments[span, stream], known)[0][:, step]
            self._known[key] = float(found[-1]), float(found[0]) if len(known) > 1 else 0.0
        return self._known[key]


class _Online:
    """The decisions of one sample, each taken once: by its first row, for those of all branches and blocks."""

    def __init__(self, errors: Array, threshold: float, calibration: Calibration | None) -> None:
        assert calibration is not None
        self.errors, self.threshold, self.changes = errors, threshold, calibration.changes
        self.computed, self.spent = [0], 0.0
        self.decided: dict[int, bool] = {}
        self._input: Tensor | None = None

    def runs(self, step: int, tokens: Tensor) -> bool:
        """Whether the blocks run at a step, whose first one is given `tokens` (L,D)."""
        if step not in self.decided:
            self.decided[step] = self._decide(step, relative_change(self._input, tokens))
            self._input = tokens
        return self.decided[step]

    def _decide(self, step: int, change: float) -> bool:
        if step == 0:
            return True
        a, b = self.computed[-2:] if len(self.computed) > 1 else self.computed * 2
        self.spent += float(self.errors[a, b, step]) * change / max(float(self.changes[step]), 1e-12)
        if self.spent <= self.threshold:
            return False
        self.computed.append(step)
        self.spent = 0.0
        return True


def relative_change(before: Tensor | None, now: Tensor) -> float:
    """Squared distance over the squared norm; 0 of nothing."""
    if before is None:
        return 0.0
    return float((now - before).float().square().sum() / before.float().square().sum().clamp_min(1e-30))


def _threshold(errors: Array, count: int) -> float:
    """The one at which a sample like those of the calibration computes as near to `count` steps as can be."""
    low, high = 0.0, float(errors.max(axis=(0, 1)).sum()) + 1e-30
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _computed(errors, middle) > count else (low, middle)
    return high


def _computed(errors: Array, threshold: float) -> int:
    computed, spent = [0], 0.0
    for step in range(1, len(errors)):
        a, b = computed[-2:] if len(computed) > 1 else computed * 2
        spent += float(errors[a, b, step])
        if spent > threshold:
            computed.append(step)
            spent = 0.0
    return len(computed)


def least_budget(steps: int) -> float:
    """The smallest budget that N steps cover: two of them are computed."""
    return min(max(MIN_BUDGET, 1.5 / steps), 1.0)


def check_budget(budget: float, steps: int) -> int:
    """How many of N steps a budget computes. UserError for fewer than two, or a budget out of range."""
    least = least_budget(steps)
    check_range("budget", budget, MIN_BUDGET, 1.0)
    if budget < least:
        raise UserError(
            f"budget is {budget:g}, expected at least {least:.2f} in {steps} steps: a forecast needs two computed ones"
        )
    return max(1, round(budget * steps))
