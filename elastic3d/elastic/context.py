"""What a forward pass is told, from the sampler to every block: the `StepContext`."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from elastic3d.elastic.cache import SimulatedCache
    from elastic3d.elastic.family import BlockFlops
    from elastic3d.elastic.router import RouteDecision

T = TypeVar("T", int, float)
Streams = tuple[Tensor, ...]  # (B,L,D) each
Groups = dict[int, list[int]]  # the rows of each action


class Branch(IntEnum):
    """The two branches of classifier-free guidance."""

    conditional = 0
    unconditional = 1


BOTH_BRANCHES = (Branch.conditional, Branch.unconditional)


class Defer(Enum):
    """Which rows of a pass are deferred though they should run: none, all, or all unless every row should run.

    A sampler asks so where samples leave out different steps: those that can go on without the blocks do, until all of
    them need the blocks, which then run for all at once.
    """

    never = "never"
    unless_all = "unless_all"
    always = "always"


@dataclass(frozen=True)
class Moments:
    """When rows are computed or wanted, and where the cache keeps them.

    rows: their places in a bank of `count`; steps: the sampling step of each, times: its time in [0,1].
    """

    rows: list[int]
    count: int
    steps: list[int]
    times: list[float]

    def some(self, places: Sequence[int]) -> Moments:
        """Those at some places of this list."""
        if len(places) == len(self.rows):
            return self
        rows, steps = ([values[i] for i in places] for values in (self.rows, self.steps))
        return Moments(rows, self.count, steps, [self.times[i] for i in places])


@dataclass(frozen=True)
class Training:
    """What a training pass is told besides; see `ElasticSession.train`."""

    explored: Tensor | None = None
    lockstep: bool = False
    simulated: SimulatedCache | None = None
    skipped: bool = False


@dataclass
class StepContext:
    """One forward pass of the model: what it is told, then what its blocks decide and do.

    t: time (B,) in [0,1]; dt: size of the sampling step; budget: in [0.3,1]; branch: 0 conditional, 1 unconditional;
    each (B,) fp32. Rows of a generation are (branch, sample), each at its step; a training pass has none. The first
    `conditional_rows` rows are those of one branch. `entered`: by its first block, what came into each span of blocks;
    `settled`: blocks within a span, and the rows of each action, as its first block has settled it for them;
    `deferred`: samples that should have run and wait. `decisions` are what is executed, `proposed` what the
    routers of the blocks decided in a rollout.
    """

    t: Tensor
    dt: Tensor
    budget: Tensor
    branch: Tensor
    rows: list[tuple[int, int]]
    when: Moments
    conditional_rows: int
    defer: Defer = Defer.never
    training: Training | None = None
    modulation: Tensor | None = None
    ahead: RouteDecision | None = None
    actions: list[int] | None = None
    settled: tuple[range, Groups] | None = None
    deferred: set[int] = field(default_factory=set)
    entered: dict[int, Streams] = field(default_factory=dict)
    decisions: dict[int, RouteDecision] = field(default_factory=dict)
    proposed: dict[int, RouteDecision] = field(default_factory=dict)
    flops: dict[int, BlockFlops] = field(default_factory=dict)
    ran_rows: dict[int, int] = field(default_factory=dict)
    visited: set[int] = field(default_factory=set)

    def key(self, span: int) -> tuple[int, int]:
        """Where the cache keeps what a span of blocks, by its first one, remembers of these rows."""
        return span, self.rows[0][0]


@dataclass(frozen=True)
class Announced:
    """All of a `StepContext` but the times, which the model is given; see `ElasticSession.step` and `train`.

    Of a generation: `samples` of all `total` take part, and the cache keeps what `room` branches add; `times` are
    theirs, where they are known without reading them from the device.
    """

    dt: Tensor | Sequence[float]
    budget: Tensor
    branches: Sequence[int] | Tensor
    samples: Sequence[int] = ()
    steps: Sequence[int] = ()
    total: int = 0
    defer: Defer = Defer.never
    room: int = 1
    training: Training | None = None
    conditional_rows: int = 0
    times: Sequence[float] = ()

    def at(self, t: Tensor, timed: bool = False) -> StepContext:
        """The pass at times t (B,), which the cache gets to know where it is `timed`.

        Raises ValueError where its batch is another than what was announced.
        """
        rows: list[tuple[int, int]] = []
        copies, when, branch = 1, Moments([], 0, [], []), self.branches
        if not isinstance(branch, Tensor):
            copies = len(branch)
            rows = [(int(each), sample) for each in branch for sample in self.samples]
            places = [(each - rows[0][0]) * self.total + sample for each, sample in rows]
            times = [0.0] * len(rows)
            if timed:
                times = list(self.times) * copies or t.tolist()
            when = Moments(places, max(copies, self.room) * self.total, list(self.steps) * copies, times)
            branch = torch.tensor([float(each) for each, _ in rows])
        values = {"dt": torch.as_tensor(self.dt).repeat(copies), "budget": self.budget.repeat(copies)}
        values = {name: value.float().to(t.device) for name, value in (values | {"branch": branch}).items()}
        B = t.shape[0]
        for name, value in values.items():
            if value.shape != (B,):
                raise ValueError(f"a batch of {B}, but {value.shape[0]} values of {name}")
        conditional_rows = self.conditional_rows or len(self.samples) or B
        told = (values["dt"], values["budget"], values["branch"])
        return StepContext(
            t.float(),
            *told,
            rows=rows,
            when=when,
            conditional_rows=conditional_rows,
            defer=self.defer,
            training=self.training,
        )


class Forecast(Protocol):
    """How residuals go on in one generation, where that is not along a damped line."""

    def weights(
        self, span: int, stream: int, step: int, newest: int, older: int | None
    ) -> tuple[float, float]:
        """At a step, of what a span of blocks added to a stream at the `newest` computed step and the `older` one."""
        ...


class RouteSource(Protocol):
    """Something else than the routers that decides (see `policies`, `training_free`). `alike`: it decides the same for
    all blocks."""

    alike: bool

    def begin(self, steps: int, times: Sequence[float], budgets: Sequence[float]) -> Forecast | None:
        """A generation begins: its steps, their times in [0,1] where they are known, each sample's budget -> how
        residuals go on; None: as the cache says."""
        ...

    def decide(self, context: StepContext, block: int) -> RouteDecision:
        """The route of every row through one block."""
        ...


class Driver(Protocol):
    """A loop of others that generates: it is asked to announce a pass that nobody announced. `hook`: on its model."""

    hook: Any
    pipelines: list[Any]

    def announce(self, t: Tensor) -> None:
        """Call `begin` and `step` for a pass at times t (B,)."""
        ...


class Turn:
    """A lock that one thread may take several times; a copy is a lock of its own."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[Turn], tuple[()]]:
        return Turn, ()


def grouped(actions: Sequence[int]) -> Groups:
    """The rows of each action, in the order in which actions appear."""
    groups: Groups = {}
    for row, action in enumerate(actions):
        groups.setdefault(action, []).append(row)
    return groups


def one_each(value: Sequence[T] | T, count: int, what: str) -> list[T]:
    """A value for each of `count` samples, of one for all or of a list; ValueError for one of another length."""
    values = list(value) if isinstance(value, Sequence) else [value] * count
    if len(values) != count:
        raise ValueError(f"{len(values)} {what} for {count} samples")
    return values
