"""Forward passes: the branches of guidance, what is known of a pass, and who decides in it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from elastic3d.routing.cache import Key, Moments
from elastic3d.routing.decision import RouteDecision
from elastic3d.routing.protocol import BlockFlops
from elastic3d.routing.recall import Recall
from elastic3d.routing.router import Situation

T = TypeVar("T", int, float)


class Branch(IntEnum):
    """The two branches of classifier-free guidance."""

    conditional = 0
    unconditional = 1


BOTH_BRANCHES = (Branch.conditional, Branch.unconditional)


class Hold(Enum):
    """Which rows of a pass are not run though they should: none, all, or all unless every row should run.

    A sampler asks so where samples leave out different steps: those that can go on without the blocks do, until all of
    them need the blocks, which then run for all at once.
    """

    never = "never"
    unless_all = "unless_all"
    always = "always"


Groups = dict[int, list[int]]  # the rows of each action


def grouped(actions: Sequence[int]) -> Groups:
    """The rows of each action, in the order in which actions appear."""
    groups: Groups = {}
    for row, action in enumerate(actions):
        groups.setdefault(action, []).append(row)
    return groups


def one_each(value: Sequence[T] | T, count: int, what: str) -> list[T]:
    """A value for each of so many samples, of one for all or of a list; ValueError for one of another length."""
    values = list(value) if isinstance(value, Sequence) else [value] * count
    if len(values) != count:
        raise ValueError(f"{len(values)} {what} for {count} samples")
    return values


@dataclass
class Pass:
    """One forward pass of the model. Rows of the batch are (branch, sample), each at its step; masked passes are for
    training. The first `leaders` rows are those of one branch. `when`: steps, times and the cache's rows; `held`:
    samples that should have run and were held. `settled`: blocks within a span, and the rows of each action, as the
    first block of that span has settled it for them."""

    situation: Situation
    rows: list[tuple[int, int]]
    when: Moments
    masked: bool
    hold: Hold = Hold.never
    explored: Tensor | None = None
    lockstep: bool = False
    recall: Recall | None = None
    closed: bool = False
    leaders: int = 0
    modulation: Tensor | None = None
    ahead: RouteDecision | None = None
    actions: list[int] | None = None
    held: set[int] = field(default_factory=set)
    settled: tuple[range, Groups] | None = None
    decisions: dict[int, RouteDecision] = field(default_factory=dict)
    flops: dict[int, BlockFlops] = field(default_factory=dict)
    ran_rows: dict[int, int] = field(default_factory=dict)
    visited: set[int] = field(default_factory=set)

    def key(self, span: int) -> Key:
        """Where the cache keeps what a span of blocks, by its first one, remembers of these rows."""
        return span, self.rows[0][0]


class RouteSource(Protocol):
    """Something else than the routers that decides (see `tables.py`). `alike`: it decides the same for all blocks."""

    alike: bool

    def decide(self, current: Pass, block: int) -> RouteDecision:
        """The route of every row of `current` through one block."""
        ...


@dataclass
class Announced:
    """What the next forward pass is told of itself; see `RoutingSession.step` and `RoutingSession.train`.

    Of a generation: `steps`, `dt` and `budget` of its `samples`, which are those of all `total` that take part, and for
    how many branches the cache has `room`.
    """

    dt: Tensor | Sequence[float]
    budget: Tensor
    branches: Sequence[int] | Tensor
    samples: Sequence[int] = ()
    steps: Sequence[int] = ()
    total: int = 0
    hold: Hold = Hold.never
    masked: bool = False
    explored: Tensor | None = None
    lockstep: bool = False
    recall: Recall | None = None
    closed: bool = False
    leaders: int = 0
    room: int = 1

    def pass_at(self, t: Tensor, timed: bool = False) -> Pass:
        """The pass at times t (B,), which the cache gets to know where it is `timed`.

        Raises ValueError where its batch is another than what was announced.
        """
        if isinstance(self.branches, Tensor):
            rows, branch, copies, when = [], self.branches, 1, Moments([], 0, [], [])
        else:
            rows = [(int(branch), sample) for branch in self.branches for sample in self.samples]
            branch, copies = torch.tensor([float(b) for b, _ in rows]), len(self.branches)
            places = [(b - rows[0][0]) * self.total + sample for b, sample in rows]
            times = t.tolist() if timed else [0.0] * len(rows)
            when = Moments(places, max(copies, self.room) * self.total, list(self.steps) * copies, times)
        B, device = t.shape[0], t.device
        values = {"dt": torch.as_tensor(self.dt).repeat(copies), "budget": self.budget.repeat(copies)}
        values = {name: value.float().to(device) for name, value in (values | {"branch": branch}).items()}
        for name, value in values.items():
            if value.shape != (B,):
                raise ValueError(f"a batch of {B}, but {value.shape[0]} values of {name}")
        return Pass(
            Situation(t.float(), **values),
            rows,
            when,
            self.masked,
            self.hold,
            self.explored,
            self.lockstep,
            self.recall,
            self.closed,
            self.leaders or len(self.samples) or B,
        )


class Driver(Protocol):
    """A loop of others that generates: it is asked to announce a pass that nobody announced. `hook`: on its model."""

    hook: Any

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
