"""Forecasts of a series from its last values: what stands in for a step whose blocks do not run.

A series is what the blocks of a model added at the sampling steps that were computed: n tensors (B,...), oldest first,
at ascending `steps`. Every forecast is a weighted sum of them, and the weights are its whole mathematics:

    weights = WEIGHTS["chebyshev"](history, steps, at)  # (n,), or (n,B) where they depend on the sample
    value = combine(history, weights)

All continue a constant and a linear series exactly, and fall back on the line, then on the last value, where the
history is too short.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

History = Sequence[Tensor]  # n x (B,...)
Steps = Sequence[float]
Weights = Callable[[History, Steps, float], Tensor]

ORDER = 2  # of Taylor and Hermite: the highest derivative
SIGMA = math.sqrt(0.5)  # contraction of Hermite; the one at which a line is continued undamped
DEGREE, RIDGE = 4, 0.1  # of Chebyshev; Spectrum's own
RANK_TOLERANCE = 1e-4  # modes with a singular value below this share of the largest are noise


def combine(history: History, weights: Tensor) -> Tensor:
    """n x (B,...) and weights (n,) or (n,B) -> the weighted sum (B,...), in the format of the last value."""
    newest = history[-1]
    total = torch.zeros_like(newest, dtype=torch.promote_types(newest.dtype, torch.float32))
    for value, weight in zip(history, weights.to(total), strict=True):
        total += value * weight.reshape(-1, *[1] * (value.ndim - 1))
    return total.to(newest.dtype)


def line_weights(history: History, steps: Steps, at: float) -> Tensor:
    """The last value and its last change: the first order of TaylorSeer (2503.06923)."""
    return taylor_weights(history, steps, at, order=1)


def taylor_weights(history: History, steps: Steps, at: float, order: int = ORDER) -> Tensor:
    """Derivatives by divided differences, and powers of the distance (TaylorSeer, 2503.06923)."""
    return _expansion(steps, order, [(at - steps[-1]) ** n for n in range(order + 1)])


def hermite_weights(
    history: History, steps: Steps, at: float, order: int = ORDER, sigma: float = SIGMA
) -> Tensor:
    """The same with scaled Hermite polynomials for the powers, s^n H_n(s x) (HiCache, 2508.16984).

    A line goes on with 2 `sigma`^2 of its slope, all of it at the default.
    """
    [basis] = np.polynomial.hermite.hermvander(sigma * (at - steps[-1]), order)
    return _expansion(steps, order, [sigma**n * float(value) for n, value in enumerate(basis)])


def _expansion(steps: Steps, order: int, basis: Sequence[float]) -> Tensor:
    """Weights of sum_n f[s_last, .., s_last-n] basis_n, the divided differences as far as the history goes."""
    weights = torch.zeros(len(steps), dtype=torch.float64)
    for n in range(min(order, len(steps) - 1) + 1):
        for i in range(len(steps) - 1 - n, len(steps)):
            others = [steps[i] - steps[j] for j in range(len(steps) - 1 - n, len(steps)) if j != i]
            weights[i] += basis[n] / math.prod(others)
    return weights


def chebyshev_weights(
    history: History, steps: Steps, at: float, degree: int = DEGREE, ridge: float = RIDGE
) -> Tensor:
    """Chebyshev polynomials over all of the history and the step that is forecast, fitted by ridge regression
    (Spectrum, 2603.01623).

    Unlike Spectrum's, T_0 and T_1 are not penalised: a penalty on them damps constants and lines.
    """
    if len(steps) < 3:
        return line_weights(history, steps, at)
    x = 2 * (np.array([*steps, at], dtype=np.float64) - steps[0]) / (at - steps[0]) - 1
    basis = torch.from_numpy(np.polynomial.chebyshev.chebvander(x, degree))
    fitted, wanted = basis[:-1], basis[-1]
    penalty = torch.full((degree + 1,), ridge, dtype=torch.float64)
    penalty[:2] = 0
    return fitted @ torch.linalg.solve(fitted.T @ fitted + penalty.diag(), wanted)


def dmd_weights(history: History, steps: Steps, at: float) -> Tensor:
    """Dynamic mode decomposition (Schmid 2010, Prony 1795) of the series' changes: (n,B), each sample for itself.

    A sum of exponentials is continued exactly, and so is a line, whose changes are the exponential of rate 1; fitting
    changes rather than values (as HiCache++ and cache-dit do) makes that stable. Only the last values at even
    distances take part.
    """
    gap, first = steps[-1] - steps[-2] if len(steps) > 1 else 0, len(steps) - 1
    while first > 0 and steps[first] - steps[first - 1] == gap:
        first -= 1
    count, batch = len(steps) - first, history[-1].shape[0]
    if count < 3:
        return line_weights(history, steps, at)[:, None].expand(-1, batch)
    tail = torch.stack([value.flatten(1) for value in history[first:]], dim=1).double()  # (B,n,d)
    changes = tail.diff(dim=1)
    gram = changes @ changes.mT  # (B,n-1,n-1)
    weights = torch.zeros(len(steps), batch, dtype=torch.float64, device=gram.device)
    for row in range(batch):
        weights[first:, row] = _dmd_of(gram[row], (at - steps[-1]) / gap)
    return weights


def _dmd_of(gram: Tensor, horizon: float) -> Tensor:
    """Weights (n,) of one sample's values from the Gram matrix (n-1,n-1) of its changes.

    With changes D = [d_1 .. d_m], X = D[:-1], Y = D[1:]: the modes of A = Y X^+ advance d_m, and the sum of what it
    becomes up to the horizon is added to the last value. All of it lies in the span of the changes.
    """
    m = len(gram)
    last = torch.zeros(m + 1, dtype=gram.dtype, device=gram.device)
    last[-1] = 1
    values, vectors = torch.linalg.eigh(gram[:-1, :-1])  # X^T X = V S^2 V^T
    kept = values > values[-1] * RANK_TOLERANCE**2
    if not values[-1] > 0:
        return last  # nothing has changed
    inverse = vectors[:, kept] / values[kept].sqrt()  # X^+ = inverse U^T, U = X inverse
    small = inverse.T @ gram[:-1, 1:] @ inverse  # U^T A U
    rates, modes = torch.linalg.eig(small)
    start = torch.linalg.solve(modes, (inverse.T @ gram[:-1, -1]).to(rates.dtype))  # d_m in the modes
    near = (rates - 1).abs() < 1e-6
    ratio = rates * (rates**horizon - 1) / torch.where(near, torch.ones_like(rates), rates - 1)
    gained = (modes @ (torch.where(near, torch.full_like(rates, horizon), ratio) * start)).real  # in U
    of_changes = torch.cat([inverse @ gained, gained.new_zeros(1)])  # U = X inverse; d_m takes no part
    if not of_changes.isfinite().all():
        return last
    return (
        last
        + torch.cat([of_changes.new_zeros(1), of_changes])
        - torch.cat([of_changes, of_changes.new_zeros(1)])
    )


WEIGHTS: dict[str, Weights] = {
    "linear": line_weights,
    "taylor": taylor_weights,
    "hermite": hermite_weights,
    "chebyshev": chebyshev_weights,
    "dmd": dmd_weights,
}
