"""Training-free policies to compare the planned one with: even steps, and each sample's own."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from elastic3d.benchmark.config import PolicyName
from elastic3d.elastic.cache import Forecast
from elastic3d.elastic.context import StepContext
from elastic3d.elastic.router import RouteDecision
from elastic3d.elastic.training_free import Array, Calibration, StepPolicy, all_or_none, even_steps
from elastic3d.pipelines.calibration import relative_change


def policy_named(name: PolicyName, calibration: Calibration | None) -> StepPolicy:
    """The policy of a name; all but `even` need a calibration."""
    kinds: dict[PolicyName, type[StepPolicy]] = {
        PolicyName.fitted: FittedPolicy,
        PolicyName.online: OnlinePolicy,
    }
    return kinds.get(name, StepPolicy)(None if name is PolicyName.even else calibration)


class FittedPolicy(StepPolicy):
    """Steps at even distances, fitted forecasts."""

    schedule = "even"

    def chosen(self, count: int) -> tuple[int, ...]:
        """Even steps, whatever is predicted."""
        return even_steps(len(self._times), count)


class OnlinePolicy(StepPolicy):
    """Each sample by itself: predicted errors, scaled by how fast its own input changes, add up until they pass a
    threshold, as in TeaCache (2411.19108) and EasyCache (2507.02860)."""

    schedule = "online"

    def begin(self, steps: int, times: Sequence[float], budgets: Sequence[float]) -> Forecast | None:
        """A generation begins -> how residuals go on in it."""
        forecast = super().begin(steps, times, budgets)
        counts = [len(computed) for computed in self._computed]
        levels = {count: threshold(self._errors, count) for count in set(counts)}
        self._samples = [_Online(self._errors, levels[count]) for count in counts]
        return forecast

    def decide(self, context: StepContext, block: int, routed: RouteDecision | None) -> RouteDecision:
        """Whether the blocks run, for every row of a pass."""
        assert self._here is not None
        inputs, usual = context.entered[0][0], self._here.changes  # of the model's first block
        moments = enumerate(zip(context.steps, context.rows, strict=True))
        keep = [self._samples[s].runs(step, inputs[i], usual) for i, (step, (_, s)) in moments]
        return all_or_none(keep, context)


class _Online:
    """The decisions of one sample, each taken once: by its first row, for those of all branches and blocks."""

    def __init__(self, errors: Array, threshold: float) -> None:
        self.errors, self.threshold = errors, threshold
        self.computed, self.spent = [0], 0.0
        self.decided: dict[int, bool] = {}
        self._input: Tensor | None = None

    def runs(self, step: int, tokens: Tensor, usual: Array) -> bool:
        """Whether the blocks run at a step, whose first one is given `tokens` (L,D); `usual` are changes (S,) of it."""
        if step not in self.decided:
            change = relative_change(self._input, tokens) / max(float(usual[step]), 1e-12)
            self.decided[step] = self.take(step, change)
            self._input = tokens
        return self.decided[step]

    def take(self, step: int, change: float = 1.0) -> bool:
        """Whether the blocks run at the next step, whose input changes by `change` times what is usual."""
        if step == 0:
            return True
        a, b = self.computed[-2:] if len(self.computed) > 1 else self.computed * 2
        self.spent += float(self.errors[a, b, step]) * change
        if self.spent <= self.threshold:
            return False
        self.computed.append(step)
        self.spent = 0.0
        return True


def threshold(errors: Array, count: int) -> float:
    """The one at which a sample like those of the calibration computes as near to `count` steps as can be."""
    low, high = 0.0, float(errors.max(axis=(0, 1)).sum()) + 1e-30
    for _ in range(60):
        middle = (low + high) / 2
        usual = _Online(errors, middle)
        computed = sum(usual.take(step) for step in range(len(errors)))
        low, high = (middle, high) if computed > count else (low, middle)
    return high
