"""Training-free forecasts on any model of a known family: its blocks run at every N-th step and are forecast between.

    with forecasting(pipeline.dit, "dmd", interval=3):
        result = pipeline("chair.png")  # one generation

The blocks of each list of a model are one, as for routers that decide once a step: what they add together is forecast,
each sample and each branch of guidance for itself.

A series is what they added at the sampling steps that were computed: n tensors (B,...), oldest first, at ascending
`steps`. Every forecast is a weighted sum of them, and the weights are its whole mathematics:

    weights = WEIGHTS["chebyshev"](history, steps, at)  # (n,), or (n,B) where they depend on the sample
    value = combine(history, weights)

All continue a constant and a linear series exactly, and fall back on the line, then on the last value, where the
history is too short.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from elastic3d.elastic.attachment import adapter_for, find_session
from elastic3d.elastic.cache import Streams
from elastic3d.elastic.families import BlockAdapter

History = Sequence[Tensor]  # n x (B,...)
Steps = Sequence[float]
Weights = Callable[[History, Steps, float], Tensor]

ORDER = 2  # of Taylor and Hermite: the highest derivative
SIGMA = math.sqrt(0.5)  # contraction of Hermite; the one at which a line is continued undamped
DEGREE, RIDGE = 4, 0.1  # of Chebyshev; Spectrum's own
RANK_TOLERANCE = 1e-4  # modes with a singular value below this share of the largest are noise
HISTORY = 6  # values that a forecast knows, as in HiCache++ and cache-dit


def combine(history: History, weights: Tensor) -> Tensor:
    """n x (B,...) and weights (n,) or (n,B) -> the weighted sum (B,...), in the format of the last value."""
    newest = history[-1]
    total = torch.zeros_like(newest, dtype=torch.promote_types(newest.dtype, torch.float32))
    for value, weight in zip(history, weights.to(total), strict=True):
        total += value * weight.reshape(-1, *[1] * (value.ndim - 1))
    return total.to(newest.dtype)


def taylor_weights(history: History, steps: Steps, at: float, order: int = ORDER) -> Tensor:
    """Derivatives by divided differences, and powers of the distance (TaylorSeer, 2503.06923)."""
    return _expansion(steps, [(at - steps[-1]) ** n for n in range(order + 1)])


line_weights = partial(taylor_weights, order=1)  # the last value and its last change


def hermite_weights(history: History, steps: Steps, at: float, sigma: float = SIGMA) -> Tensor:
    """The same with scaled Hermite polynomials for the powers, s^n H_n(s x) (HiCache, 2508.16984).

    A line goes on with 2 `sigma`^2 of its slope, all of it at the default.
    """
    [basis] = np.polynomial.hermite.hermvander(sigma * (at - steps[-1]), ORDER)
    return _expansion(steps, [sigma**n * float(value) for n, value in enumerate(basis)])


def _expansion(steps: Steps, basis: Sequence[float]) -> Tensor:
    """Weights of sum_n f[s_last, .., s_last-n] basis_n, the divided differences as far as the history goes."""
    weights = torch.zeros(len(steps), dtype=torch.float64)
    for n, factor in enumerate(basis[: len(steps)]):
        newest = range(len(steps) - 1 - n, len(steps))
        for i in newest:
            weights[i] += factor / math.prod(steps[i] - steps[j] for j in newest if j != i)
    return weights


def chebyshev_weights(history: History, steps: Steps, at: float) -> Tensor:
    """Chebyshev polynomials over all of the history and the step that is forecast, fitted by ridge regression
    (Spectrum, 2603.01623).

    Unlike Spectrum's, T_0 and T_1 are not penalised: a penalty on them damps constants and lines.
    """
    if len(steps) < 3:
        return line_weights(history, steps, at)
    x = 2 * (np.array([*steps, at], dtype=np.float64) - steps[0]) / (at - steps[0]) - 1
    basis = torch.from_numpy(np.polynomial.chebyshev.chebvander(x, DEGREE))
    fitted, wanted = basis[:-1], basis[-1]
    penalty = torch.full((DEGREE + 1,), RIDGE, dtype=torch.float64)
    penalty[:2] = 0
    return fitted @ torch.linalg.solve(fitted.T @ fitted + penalty.diag(), wanted)


def dmd_weights(history: History, steps: Steps, at: float) -> Tensor:
    """Dynamic mode decomposition (Schmid 2010, Prony 1795) of the series' changes: (n,B), each sample for itself.

    With the changes d_1 .. d_m, X = [d_1 .. d_m-1] and Y = [d_2 .. d_m]: the modes of A = X^+ Y, for which Y = X A,
    advance d_m, and the sum of what it becomes up to the horizon is added to the last value. A sum of exponentials is
    continued exactly, and so is a line, whose changes are the exponential of rate 1; fitting changes rather than values
    (as HiCache++ and cache-dit do) makes that stable. Only the last values at even distances take part.
    """
    gap, first = steps[-1] - steps[-2] if len(steps) > 1 else 0, len(steps) - 1
    while first > 0 and steps[first] - steps[first - 1] == gap:
        first -= 1
    if len(steps) - first < 3:
        return line_weights(history, steps, at)[:, None].expand(-1, len(history[-1]))
    horizon = (at - steps[-1]) / gap
    tail = torch.stack([value.flatten(1) for value in history[first:]], dim=1).double()  # (B,n,d)
    changes = tail.diff(dim=1)
    gram = changes @ changes.mT  # (B,m,m): X^T X without its last row and column, X^T Y beside it
    inverse = torch.linalg.pinv(gram[:, :-1, :-1], rtol=RANK_TOLERANCE**2, hermitian=True)
    advance = inverse @ gram[:, :-1, 1:]  # A (B,m-1,m-1)
    rates, modes = torch.linalg.eig(advance)
    start = torch.linalg.solve(modes, advance[:, :, -1].to(rates.dtype))  # d_m in the modes
    near = (rates - 1).abs() < 1e-6
    ratio = rates * (rates**horizon - 1) / torch.where(near, torch.ones_like(rates), rates - 1)
    gained = torch.where(near, torch.full_like(rates, horizon), ratio) * start
    of_changes = (modes @ gained[..., None]).real[..., 0]  # d_m takes no part
    of_changes = of_changes.where(of_changes.isfinite().all(dim=1, keepdim=True), 0.0)
    # of values, whose differences the changes are
    weights = -nn.functional.pad(of_changes, (first + 1, 2)).diff()
    weights[:, -1] += 1
    return weights.T


WEIGHTS: dict[str, Weights] = {
    "linear": line_weights,
    "taylor": taylor_weights,
    "hermite": hermite_weights,
    "chebyshev": chebyshev_weights,
    "dmd": dmd_weights,
}


@contextmanager
def forecasting(model: nn.Module, by: str, interval: int, warmup: int = 1) -> Iterator[None]:
    """For one generation, a plain model runs its blocks at the first `warmup` steps and at every N-th from there on.

    Args:
        by: how a series is continued, one of `WEIGHTS`.
        interval: N, at least 2.
        warmup: at least 1.

    Raises:
        ValueError: another value, a model of another family, or one with routers.
    """
    if by not in WEIGHTS:
        raise ValueError(f"by is {by!r}, expected one of {', '.join(WEIGHTS)}")
    if interval < 2 or warmup < 1:
        raise ValueError(f"interval is {interval} and warmup {warmup}, expected at least 2 and 1")
    if find_session(model) is not None:
        raise ValueError("the model has routers: detach them first")
    clock = Clock(model)

    def computes() -> bool:
        return clock.step < warmup or (clock.step - warmup + 1) % interval == 0

    with ExitStack() as stack:
        stack.enter_context(clock.ticking())
        for _, kind, blocks, _ in clock.adapter.block_lists(model):
            whole = _ListForecast(clock, kind, blocks, WEIGHTS[by], computes)
            for block in blocks:
                stack.enter_context(replaced(block, partial(whole.run, block)))
        yield


@contextmanager
def replaced(module: nn.Module, call: Callable[..., Any]) -> Iterator[None]:
    """While it lasts, `call(forward, ...)` runs for the module's forward, which it is given first."""
    before = module.__dict__.get("forward")
    module.forward = partial(call, module.forward)
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


class Clock:
    """Which step and which branch of guidance a pass of a model is: a step is over when the time changes."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.adapter = model, adapter_for(model)
        self.time: float | None = None
        self.step, self.branch = -1, 0

    def ticking(self) -> RemovableHandle:
        """While it lasts, every pass of the model looks at the clock first."""
        return self.model.register_forward_pre_hook(self._tick, with_kwargs=True)

    def _tick(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        time = float(self.adapter.timestep(args, kwargs)[0])
        self.branch = self.branch + 1 if time == self.time else 0
        self.step += time != self.time
        self.time = time


@dataclass
class _ListForecast:
    """What the blocks of one list add together: computed at some steps, and forecast at the others.

    known: by branch, the last steps that were computed, and what was added to each stream at each of them.
    """

    clock: Clock
    kind: BlockAdapter
    blocks: Sequence[nn.Module]
    weights: Weights
    computes: Callable[[], bool]
    entered: Streams = ()
    known: dict[int, deque[tuple[int, Streams]]] = field(default_factory=dict)

    def run(self, block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """In the place of a block's forward. The first one of the list adds what all are forecast to add."""
        call, is_first = self.kind.bind(block, args, kwargs), block is self.blocks[0]
        if not self.computes():
            return self.kind.pack(self._forecast(call.streams) if is_first else call.streams)
        if is_first:
            self.entered = call.streams
        out = self.kind.run(forward, call)
        if block is self.blocks[-1]:
            added = tuple(y - x for x, y in zip(self.entered, out, strict=True))
            known = self.known.setdefault(self.clock.branch, deque(maxlen=HISTORY))
            known.append((self.clock.step, added))
        return self.kind.pack(out)

    def _forecast(self, streams: Streams) -> Streams:
        steps, added = zip(*self.known[self.clock.branch], strict=True)
        series, at = zip(streams, *added, strict=True), self.clock.step
        return tuple(x + combine(known, self.weights(known, steps, at)) for x, *known in series)
