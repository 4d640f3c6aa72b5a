"""Forward passes: the branches of guidance, what is known of a pass, and who decides in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol

from torch import Tensor

from elastic3d.routing.cache import Key
from elastic3d.routing.decision import RouteDecision
from elastic3d.routing.protocol import BlockFlops
from elastic3d.routing.recall import Recall
from elastic3d.routing.router import Situation


class Branch(IntEnum):
    """The two branches of classifier-free guidance."""

    conditional = 0
    unconditional = 1


BOTH_BRANCHES = (Branch.conditional, Branch.unconditional)


Groups = dict[int, list[int]]  # the rows of each action


def grouped(actions: Sequence[int]) -> Groups:
    """The rows of each action, in the order in which actions appear."""
    groups: Groups = {}
    for row, action in enumerate(actions):
        groups.setdefault(action, []).append(row)
    return groups


@dataclass
class Pass:
    """One forward pass of the model. Rows of the batch are (branch, sample); masked passes are for training. In those
    the first `leaders` rows decide for the branches that follow them. `settled`: blocks within a span, and the rows of
    each action, as the first block of that span has settled it for them."""

    situation: Situation
    rows: list[tuple[int, int]]
    step: int
    masked: bool
    explored: Tensor | None = None
    lockstep: bool = False
    recall: Recall | None = None
    closed: bool = False
    leaders: int = 0
    modulation: Tensor | None = None
    ahead: RouteDecision | None = None
    actions: list[int] | None = None
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
    """What the next forward pass is told of itself; see `RoutingSession.step` and `RoutingSession.train`."""

    step: int
    dt: Tensor | float
    budget: Tensor | float
    branches: tuple[int, ...] | Tensor
    masked: bool = False
    explored: Tensor | None = None
    lockstep: bool = False
    recall: Recall | None = None
    closed: bool = False
    leaders: int = 0
