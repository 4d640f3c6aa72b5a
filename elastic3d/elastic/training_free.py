"""Decisions without training: which steps run the blocks, and how what they add goes on at the others.

Both follow from a calibration: the second moments M of what the blocks of a list add, over the steps of a few dense
generations.

- Forecast: the linear one of least mean squared error from the last two computed steps a < b,
  w = M[ab,ab]^-1 M[ab,s], a map for each step as in L2P; its error is M[s,s] - w M[ab,s].
- Steps: of all sets of n the one with the least sum of errors times squared step sizes, found by dynamic programming.
  Errors are those of what is added to the stream that becomes the result, under guidance.

In more steps than the calibration's the computed ones lie denser early, and the forecast is interpolated; without a
calibration they do too, and residuals go on along a damped line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from elastic3d.elastic.attachment import attach
from elastic3d.elastic.cache import Forecast
from elastic3d.elastic.config import MIN_BUDGET, Branches, RouterConfig, Scope, least_budget
from elastic3d.elastic.context import RouteSource, StepContext
from elastic3d.elastic.router import RouteDecision
from elastic3d.elastic.session import ElasticSession
from elastic3d.errors import UserError
from elastic3d.utils.options import check_range

Array = NDArray[np.float64]
Series = tuple[int, int]  # what a list adds to a stream: the number of its first block, that of the stream
RIDGE = 1e-6  # of the mean of the moments' diagonal
DAMPING = 0.7  # without a calibration
CALIBRATION_NAME = "training_free.json"
# Blocks that share a decision.
NO_ROUTERS = RouterConfig(scope=Scope.step, branches=Branches.shared, widths=1, longest=1000, damping=DAMPING)


@dataclass(frozen=True)
class Calibration:
    """What a few dense generations of S steps say about a model.

    times: (S,) ascending in [0,1]; moments: (S,S) of each series; result: (S,S), the sum over lists of what they add to
    their first stream, the one that becomes the result, with the branches combined as guidance does; changes: (S,)
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

    def weights(
        self, span: int, stream: int, step: int, newest: int, older: int | None
    ) -> tuple[float, float]:
        """A `Forecast`: of the residuals computed at the steps `newest` and `older`, for the one at `step`."""
        known = [newest] if older is None else [older, newest]
        found = self.forecasts(self.moments[span, stream], known)[0][:, step]
        return float(found[-1]), float(found[0]) if len(known) > 1 else 0.0

    @cached_property
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


def early_steps(steps: int, count: int) -> tuple[int, ...]:
    """`count` of the steps: the first, the last, and others that lie denser early, as calibrated plans have them.

    Step i of n is at (i / (n - 1))^1.5 of the way, or the next one that is free.
    """
    chosen = [0]
    for i in range(1, count):
        place = round((steps - 1) * (i / (count - 1)) ** 1.5)
        chosen.append(max(chosen[-1] + 1, place))
    return tuple(chosen)


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


class StepPolicy(RouteSource):
    """Decides in the place of routers: by a plan and fitted forecasts where there is a calibration, else at early steps
    and along a damped line. One object serves all generations of a model."""

    alike = True

    def __init__(self, calibration: Calibration | None = None) -> None:
        self.calibration = calibration
        # of the generation that runs: its times, the calibration at these, each sample's computed steps
        self._times: tuple[float, ...] = ()
        self._here: Calibration | None = None
        self._computed: list[frozenset[int]] = []

    def begin(self, steps: int, times: Sequence[float], budgets: Sequence[float]) -> Forecast | None:
        """A generation begins -> how residuals go on in it; None: along a damped line.

        Raises UserError for a budget of fewer than two of its steps.
        """
        times = tuple(times) or tuple(i / steps for i in range(steps))
        if times != self._times and self.calibration is not None:
            self._here = self.calibration.at(times)
        self._times = times
        counts = [check_budget(budget, steps) for budget in budgets]
        chosen = {count: frozenset(self.chosen(count)) for count in set(counts)}
        self._computed = [chosen[count] for count in counts]
        return None if self._here is None else cache(self._here.weights)

    def chosen(self, count: int) -> tuple[int, ...]:
        """The `count` steps of this generation that run the blocks."""
        if self._here is None or not self.planned:
            return early_steps(len(self._times), count)
        return planned_steps(self._here.errors, count)

    @property
    def planned(self) -> bool:
        """Whether the errors of this generation's steps are known: in more steps than were seen they are interpolated,
        which makes them too small."""
        return self.calibration is not None and len(self._times) <= len(self.calibration.times)

    @property
    def schedule(self) -> str:
        """How the computed steps were found, for metadata."""
        return "planned" if self.planned else "early"

    def decide(self, context: StepContext, block: int, routed: RouteDecision | None) -> RouteDecision:
        """Whether the blocks run, for every row of a pass."""
        moments = zip(context.steps, context.rows, strict=True)
        return all_or_none([step in self._computed[sample] for step, (_, sample) in moments], context)

    @property
    def about(self) -> dict[str, Any]:
        """For metadata: the schedule, and on how many generations it was calibrated (0: it was not)."""
        samples = 0 if self.calibration is None else self.calibration.about.get("samples", 0)
        return {"schedule": self.schedule, "samples": samples}


def all_or_none(keep: Sequence[bool], context: StepContext) -> RouteDecision:
    """The route of rows that run all blocks, or none."""
    kept = torch.tensor(keep, device=context.t.device)
    return RouteDecision.fixed(kept, torch.zeros_like(kept, dtype=torch.long), 1)


def check_budget(budget: float, steps: int, requested: int | None = None) -> int:
    """How many of N steps a budget computes; `requested`: the `steps=` that they come from, None for N. UserError for
    fewer than two, or a budget out of range."""
    check_range("budget", budget, MIN_BUDGET, 1.0)
    if budget < (least := least_budget(steps)):
        why = f"in {requested or steps} steps: a forecast needs two computed ones"
        raise UserError(f"budget is {budget:g}, expected at least {least:.2f} {why}")
    return round(budget * steps)


def put_policy(model: Any, calibration: Calibration | None = None) -> ElasticSession:
    """Attach a training-free policy to a model, or a pipeline of diffusers, without routers: from now on the budget of
    `session.settings` holds. ValueError where it has routers."""
    return attach(model, NO_ROUTERS, StepPolicy(calibration))
