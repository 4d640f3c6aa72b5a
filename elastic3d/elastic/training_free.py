"""Decisions without training: which steps run the blocks, and how what they add goes on at the others.

Both follow from a calibration: the second moments M of what the blocks of a list add, over the steps of a few dense
generations.

- Forecast: the linear one of least mean squared error from the last two computed steps a < b,
  w = M[ab,ab]^-1 M[ab,s], a map for each step as in L2P; its error is M[s,s] - w M[ab,s].
- Steps: of all sets of n the one with the least sum of errors times squared step sizes, found by dynamic programming.
  Errors are those of what is added to the stream that becomes the result, under guidance.

Without a calibration the computed steps lie evenly, and residuals go on along a damped line.

    from elastic3d import disable, enable

    enable(pipe, budget=0.5)  # a pipeline of diffusers; its calibration is taken where its folder has one
    images = pipe("a red fox")
    disable(pipe)  # the pipeline is what it was
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from elastic3d.elastic.attachment import adapter_for, attach, detach, has_routers, is_attached
from elastic3d.elastic.cache import Forecast
from elastic3d.elastic.config import (
    MIN_BUDGET,
    Branches,
    ElasticConfig,
    RouterConfig,
    Scope,
    least_budget,
)
from elastic3d.elastic.context import RouteSource, StepContext
from elastic3d.elastic.router import RouteDecision
from elastic3d.elastic.session import ElasticSession
from elastic3d.errors import UserError
from elastic3d.utils.files import Number, load_json, printable, save_json
from elastic3d.utils.options import check_range

Array = NDArray[np.float64]
Series = tuple[int, int]  # what a list adds to a stream: the number of its first block, that of the stream
RIDGE = 1e-6  # of the mean of the moments' diagonal
DAMPING = 0.7  # without a calibration
CALIBRATION_NAME = "training_free.json"
_ANY = Number(-1e300, 1e300)
_SHAPE = {
    "about": {"model": dict, "samples": int},
    "times": [Number(0, 1)],
    "moments": [{"span": int, "stream": int, "values": [[_ANY]]}],
    "result": [[_ANY]],
    "changes": [Number(0, 1e300)],
}

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


class StepPolicy(RouteSource):
    """Decides in the place of routers: by a plan and fitted forecasts where there is a calibration, else at even steps
    and along a damped line. One object serves all generations of a model."""

    alike = True

    def __init__(self, calibration: Calibration | None = None) -> None:
        self.calibration = calibration
        self.schedule = "even" if calibration is None else "planned"
        # of the generation that runs: its times, the calibration and the errors at these, each sample's computed steps
        self._times: tuple[float, ...] = ()
        self._here: Calibration | None = None
        self._errors = np.zeros((0, 0, 0))
        self._computed: list[frozenset[int]] = []

    def begin(self, steps: int, times: Sequence[float], budgets: Sequence[float]) -> Forecast | None:
        """A generation begins -> how residuals go on in it; None: along a damped line.

        Raises UserError for a budget of fewer than two of its steps.
        """
        times = tuple(times) or tuple(i / steps for i in range(steps))
        if times != self._times and self.calibration is not None:
            self._here = self.calibration.at(times)
            self._errors = self._here.errors()
        self._times = times
        counts = [check_budget(budget, steps) for budget in budgets]
        chosen = {count: frozenset(self.chosen(count)) for count in set(counts)}
        self._computed = [chosen[count] for count in counts]
        return None if self._here is None else cache(self._here.weights)

    def chosen(self, count: int) -> tuple[int, ...]:
        """The `count` steps of this generation that run the blocks."""
        if self._here is None:
            return even_steps(len(self._times), count)
        return planned_steps(self._errors, count)

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


def check_budget(budget: float, steps: int) -> int:
    """How many of N steps a budget computes. UserError for fewer than two, or a budget out of range."""
    check_range("budget", budget, MIN_BUDGET, 1.0)
    if budget < (least := least_budget(steps)):
        why = f"in {steps} steps: a forecast needs two computed ones"
        raise UserError(f"budget is {budget:g}, expected at least {least:.2f} {why}")
    return round(budget * steps)


# ------------------------------------------------------------------------------------------------ on and off


def put_policy(model: Any, calibration: Calibration | None = None) -> ElasticSession:
    """Attach a training-free policy to a model, or a pipeline of diffusers, without routers: from now on the budget of
    `session.settings` holds. ValueError where it has routers."""
    return attach(model, NO_ROUTERS, StepPolicy(calibration))


def enable(pipe: Any, budget: float = 0.5, calibration: str | Path | None = None) -> ElasticSession:
    """Let a stock pipeline of diffusers run its blocks at a share `budget` of their FLOPs, from 0.3 to 1.

    Without training: some of the steps run the blocks, what these add is forecast at the others. Called again, it
    changes the budget.

    Args:
        calibration: file or folder of `elastic3d calibrate`; None: the pipeline's own folder, where it has one.

    Raises:
        ValueError: a pipeline of another family, or with routers; a budget out of range.
        UserError: a calibration that is missing, broken, empty, or of another model.
    """
    transformer = pipe.transformer
    settings = ElasticConfig(budget=budget)
    if calibration is not None:
        calibration = calibration_file(calibration)
    found = find_calibration(calibration or getattr(pipe.config, "_name_or_path", None), transformer)
    if is_attached(transformer):
        if has_routers(transformer):
            raise ValueError(
                "the pipeline has routers, which take a budget: set session.settings.budget, or detach them"
            )
        detach(pipe)
    session = put_policy(pipe, found)
    session.settings = settings
    return session


def disable(pipe: Any) -> None:
    """Take off what `enable` put on: the pipeline is what it was before. ValueError where there is nothing."""
    detach(pipe)


# -------------------------------------------------------------------------------------------------- files


def describe(model: nn.Module) -> dict[str, Any]:
    """What a calibration has to fit: the family, the number of blocks of each list, their width."""
    adapter = adapter_for(model)
    lists = list(adapter.block_lists(model))
    _, kind, first, _ = lists[0]
    return {
        "family": adapter.family,
        "blocks": [len(blocks) for _, _, blocks, _ in lists],
        "width": kind.width(first[0]),
    }


def calibration_file(place: str | Path) -> Path:
    """The file of a calibration, named by itself or by its folder; UserError where there is none."""
    path = Path(place) / CALIBRATION_NAME if Path(place).is_dir() else Path(place)
    if not path.is_file():
        raise UserError(f"there is no calibration {printable(path)}: write one with elastic3d calibrate")
    return path


def series_of(model: nn.Module) -> set[Series]:
    """What a calibration has moments of: every stream of every list of blocks, by the number of its first block."""
    lists = adapter_for(model).block_lists(model)
    return {(span.start, number) for _, kind, _, span in lists for number in range(len(kind.stream_names))}


def find_calibration(place: str | Path | None, model: nn.Module) -> Calibration | None:
    """The calibration in a file, or in a folder; None where there is none. UserError as `load_calibration`."""
    if not place:
        return None
    path = Path(place) / CALIBRATION_NAME if Path(place).is_dir() else Path(place)
    return load_calibration(path, model) if path.is_file() else None


def load_calibration(path: Path, model: nn.Module) -> Calibration:
    """A calibration of this model. UserError naming the file: it is broken, empty, or of another model."""
    values, source = load_json(path, _SHAPE), printable(path)
    expected = describe(model)
    if values["about"]["model"] != expected:
        raise UserError(f"{source} is of another model: {values['about']['model']}, expected {expected}")
    times = np.array(values["times"])
    steps = len(times)
    if steps < 2 or not values["moments"]:
        raise UserError(f"{source} is empty, expected at least two steps: run elastic3d calibrate again")
    if not (np.diff(times) > 0).all():
        raise UserError(f"{source}: times are {values['times']}, expected ascending ones")
    tables = [("moments", each["values"]) for each in values["moments"]] + [("result", values["result"])]
    for name, table in tables:
        if [len(row) for row in table] != [steps] * steps:
            raise UserError(f"{source}: {name} has no {steps} x {steps} numbers, one row a step")
    moments = {(each["span"], each["stream"]): np.array(each["values"]) for each in values["moments"]}
    if set(moments) != series_of(model):
        raise UserError(f"{source} has moments of {sorted(moments)}, expected {sorted(series_of(model))}")
    result, changes = np.array(values["result"]), np.array(values["changes"])
    if len(changes) != steps:
        raise UserError(f"{source}: changes has {len(changes)} values, expected {steps}, one a step")
    return Calibration(times, moments, result, changes, values["about"])


def save_calibration(calibration: Calibration, path: Path) -> None:
    """Write the file that `load_calibration` reads, whole or not at all."""
    rounded = np.vectorize(lambda value: float(f"{value:.8g}"), otypes=[float])
    moments = [
        {"span": span, "stream": stream, "values": rounded(moment).tolist()}
        for (span, stream), moment in calibration.moments.items()
    ]
    parts = {name: rounded(getattr(calibration, name)).tolist() for name in ("times", "result", "changes")}
    save_json({"about": dict(calibration.about), **parts, "moments": moments}, path)
