"""What is measured of trained routers: fidelity at budgets, and the calibration of times and of budgets."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import product

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from elastic3d.elastic.config import MIN_BUDGET, ElasticConfig, Scope
from elastic3d.elastic.session import ElasticSession
from elastic3d.training.options import Precision
from elastic3d.utils.options import Options, option

# settings, number of validation samples (0: all) -> latents (B,N,C), executed share (B,)
Generate = Callable[[ElasticConfig, int], tuple[Tensor, Tensor]]
EARLY, LATE = (0.0, 1.5, 3.0), (0.0, 2.0)
DAMPING_TIMES = (0.0, 0.05, 0.12, 0.3, 0.6, 1.0)
DAMPING_STEPS = ((-0.6, -0.3, 0.3), (-0.15, 0.15))  # of a value, round by round
MAX_DAMPING = 1.5
_PROBES, _DAMPING_PROBES = 16, 8  # samples on which these are compared
_BIAS_BUDGETS, _DAMPING_BUDGETS = (0.4, 0.5, 0.6, 0.7, 0.8), (0.5, 0.6, 0.7)
POINTS = 24  # requested budgets
_SHARES = (0.3, 0.35, 0.4, 0.5)


class Curve(Enum):
    """What a calibration does with a curve over time: `choose` it anew, or `keep` what is there."""

    choose = "choose"
    keep = "keep"


@dataclass(kw_only=True)
class CurvesConfig(Options):
    """What a calibration measures anew."""

    dampings: Curve = option(Curve.choose, "choose the forecasts' curve over time anew, or keep it")
    gate_bias: Curve = option(Curve.choose, "choose the gates' curve over time anew, or keep it")


def as_trained(precision: Precision, device: torch.device) -> torch.autocast:
    """The precision of the training, for a model that is exported in full."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision.name.startswith("bf16"))


def relative_error(found: Tensor, true: Tensor) -> float:
    """Squared distance over the squared norm."""
    return ((found - true).square().mean() / true.square().mean()).item()


def calibrate(
    session: ElasticSession,
    generate: Generate,
    times: Tensor,
    curves: CurvesConfig,
    lowest: float = MIN_BUDGET,
) -> None:
    """Note in the routers' configuration dampings and gate bias over time, and the calibrated budget for each of
    `POINTS` requested ones, so that a requested budget is what is executed.

    `times` (S+1,) are those that `generate` samples at. `lowest` is the smallest budget that the routers were trained
    at: what they do below it says nothing. Without routers there is nothing to calibrate.
    """
    if session.conditioner is None:
        return
    _draw(session, requested_budgets=[], calibrated_budgets=[])
    router = session.router_config
    by_step = router.scope is Scope.step  # routers of each block have no curves over time
    dampings, gate_bias = (by_step and curve is Curve.choose for curve in (curves.dampings, curves.gate_bias))
    if dampings:
        _draw(session, damping_times=[], dampings=[])
    if gate_bias:
        _draw(session, times=[], gate_bias=[])
    if dampings and router.longest and router.damping:
        choose_dampings(session, generate)
    if gate_bias and router.longest:
        choose_gate_bias(session, generate, times)
    requested = np.linspace(lowest, 1.0, POINTS)
    bar = tqdm(requested, desc="calibrate", dynamic_ncols=True)
    shares = [generate(ElasticConfig(budget=float(budget)), 0)[1].mean().item() for budget in bar]
    found = np.maximum.accumulate(shares) + 1e-6 * np.arange(POINTS)  # ascending, as an inverse needs
    calibrated = np.interp(requested, found, requested)
    _draw(session, requested_budgets=requested.tolist(), calibrated_budgets=calibrated.tolist())


def _draw(session: ElasticSession, **curves: list[float]) -> None:
    """Replace curves of the session's routers."""
    config = session.router_config
    session.router_config = replace(config, curves=replace(config.curves, **curves))


def choose_dampings(session: ElasticSession, generate: Generate) -> None:
    """Choose how much of a residual's change goes on, over time: the curve with the smallest error of the result.

    Where latents are noise, a change hardly goes on; where they are nearly clean it may even grow. One time after the
    other of `DAMPING_TIMES` takes the best of some values, which are finer from round to round.
    """
    dense, _ = generate(ElasticConfig(elastic=False), _DAMPING_PROBES)
    dampings = [session.router_config.damping] * len(DAMPING_TIMES)

    def error(values: list[float]) -> float:
        _draw(session, damping_times=list(DAMPING_TIMES), dampings=values)
        return _error_at_equal_cost(generate, dense, _DAMPING_BUDGETS)

    best = error(dampings)
    rounds = [(place, steps) for steps in DAMPING_STEPS for place in range(len(DAMPING_TIMES))]
    for place, steps in tqdm(rounds, desc="dampings", dynamic_ncols=True):
        middle = dampings[place]
        for value in sorted({min(max(middle + step, 0.0), MAX_DAMPING) for step in steps} - {middle}):
            tried = [*dampings[:place], value, *dampings[place + 1 :]]
            if (found := error(tried)) < best:
                best, dampings = found, tried
    _draw(session, dampings=dampings)


def choose_gate_bias(session: ElasticSession, generate: Generate, times: Tensor) -> None:
    """Choose what is added to gates over time: the curve with the smallest error of the result at equal cost.

    Routers predict the error of the skipped step itself. But the gaps of the first steps grow until the
    end, and those of the last ones hardly have the time to. A curve has a share of each: `EARLY` decays over the
    first fifth of the steps, `LATE` holds in the last tenth of them.
    """
    steps = len(times) - 1
    if steps < 3:
        return  # the first has nothing to go on with: no two to compare
    dense, _ = generate(ElasticConfig(elastic=False), _PROBES)
    place = np.arange(1, steps) / (steps - 1)

    def gate_bias(early: float, late: float) -> list[float]:
        return (early * np.exp(-place / 0.2) - late * (place > 0.9)).tolist()

    def error(curve: tuple[float, float]) -> float:
        _draw(session, times=times[1:-1].tolist(), gate_bias=gate_bias(*curve))
        return _error_at_equal_cost(generate, dense, _BIAS_BUDGETS)

    best = min(product(EARLY, LATE), key=error)
    _draw(session, gate_bias=gate_bias(*best))


def _error_at_equal_cost(generate: Generate, dense: Tensor, budgets: Sequence[float]) -> float:
    """Mean logarithm of the result's error at the shares that are compared, from what routers make of some budgets."""
    points = []
    for budget in budgets:
        latents, share = generate(ElasticConfig(budget=budget), len(dense))
        points.append((share.mean().item(), math.log(max(relative_error(latents, dense), 1e-12))))
    shares, errors = zip(*sorted(points), strict=True)
    return float(np.interp(_SHARES, shares, errors).mean())
