"""Training-free forecasts on any model of a known family: its blocks run at every N-th step and are forecast between.

    with forecasting(pipeline.dit, "dmd", interval=3):
        result = pipeline("chair.png")  # one generation

The blocks of each list of a model are one, as for routers that decide once a step: what they add together is forecast
(`elastic3d.benchmark.forecasts`), each sample and each branch of guidance for itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from elastic3d.benchmark.forecasts import WEIGHTS, combine
from elastic3d.elastic.attachment import adapter_for, is_attached
from elastic3d.elastic.families import BlockAdapter

HISTORY = 6  # values that a forecast knows, as in HiCache++ and cache-dit
Forward = Callable[..., Any]


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
    if is_attached(model):
        raise ValueError("the model has routers: detach them first")
    clock = Clock(model)
    with ExitStack() as stack:
        stack.enter_context(replaced(model, clock.around))
        for name, kind in clock.adapter.lists:
            blocks = list(model.get_submodule(name).children())
            own = _ListForecast(clock, kind, by, interval, warmup)
            for block in blocks:
                around = own.around(block, block is blocks[0], block is blocks[-1])
                stack.enter_context(replaced(block, around))
        yield


@contextmanager
def replaced(module: nn.Module, around: Callable[[Forward], Forward]) -> Iterator[None]:
    """While it lasts, the module's forward is another one, made around its own."""
    own = module.__dict__
    before = own.get("forward")
    own["forward"] = around(module.forward)
    try:
        yield
    finally:
        if before is None:
            del own["forward"]
        else:
            own["forward"] = before


class Clock:
    """Which step and which branch of guidance a pass of a model is: a step is over when the time changes."""

    def __init__(self, model: nn.Module) -> None:
        self.adapter = adapter_for(model)
        self.time: float | None = None
        self.step, self.branch = -1, 0

    def around(self, forward: Forward) -> Forward:
        """The model's forward, that looks at the clock."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            time = float(self.adapter.timestep(args, kwargs)[0])
            self.branch = self.branch + 1 if time == self.time else 0
            self.step += time != self.time
            self.time = time
            return forward(*args, **kwargs)

        return wrapped


class _ListForecast:
    """What the blocks of one list add together: computed at some steps, and forecast at the others."""

    def __init__(self, clock: Clock, kind: BlockAdapter, by: str, interval: int, warmup: int) -> None:
        self.clock, self.kind, self.weights = clock, kind, WEIGHTS[by]
        self.interval, self.warmup = interval, warmup
        self.entered: tuple[Tensor, ...] = ()
        # by branch: the steps that were computed, and what was added to each stream at each of them
        self.known: dict[int, list[tuple[int, tuple[Tensor, ...]]]] = defaultdict(list)

    @property
    def computes(self) -> bool:
        """Whether the blocks run at this step: the first ones, and from the last of them on every N-th."""
        step = self.clock.step
        return step < self.warmup or (step - self.warmup + 1) % self.interval == 0

    def around(self, block: nn.Module, first: bool, last: bool) -> Callable[[Forward], Forward]:
        """A block's forward. The first one of a list adds what all of them are forecast to add."""

        def made(forward: Forward) -> Forward:
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                call = self.kind.bind(block, args, kwargs)
                if not self.computes:
                    return self.kind.pack(self._forecast(call.streams) if first else call.streams)
                if first:
                    self.entered = call.streams
                out = self.kind.run(forward, call)
                if last:
                    self._note(out)
                return self.kind.pack(out)

            return wrapped

        return made

    def _note(self, out: tuple[Tensor, ...]) -> None:
        added = tuple(y - x for x, y in zip(self.entered, out, strict=True))
        known = self.known[self.clock.branch]
        known.append((self.clock.step, added))
        del known[:-HISTORY]

    def _forecast(self, streams: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        known = self.known[self.clock.branch]
        steps = [step for step, _ in known]
        found = []
        for number, stream in enumerate(streams):
            history = [added[number] for _, added in known]
            weights = self.weights(history, steps, self.clock.step)
            found.append(stream + combine(history, weights))
        return tuple(found)
