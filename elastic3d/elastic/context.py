"""What a forward pass is given, from the sampler to every block: the `StepContext`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum

from torch import Tensor

from elastic3d.elastic.cache import Forecast, ResidualCache, Streams
from elastic3d.elastic.router import RouteDecision

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


@dataclass
class StepContext:
    """One forward pass of the model: what it is given, then what its blocks decide and do.

    dt: size of the sampling step; budget: in [0.3,1]; branch: 0 conditional, 1 unconditional; t: time in [0,1], which
    the model itself is called with; each (B,) fp32. Each row has its (branch, sample) in `rows`, its step, and its slot
    in the `cache` of the generation. The first `conditional_rows` rows are those of one branch. `coarseness`: of a
    generation with the few-step LoRA. `training`: blocks are masked and gates get gradients; `recompute`: activation
    checkpointing, blocks run again for the backward pass.

    `step_decision` holds for all blocks of a step, `groups` are what follows from it or from that of a block;
    `entered`: by its first block, what came into each span of blocks; `deferred`: samples that should have run and
    wait; `decisions` are what is executed.
    """

    dt: Tensor
    budget: Tensor
    branch: Tensor
    conditional_rows: int
    rows: list[tuple[int, int]]
    steps: list[int]
    slots: list[int]
    cache: ResidualCache | None = None
    coarseness: float | None = None
    defer: Defer = Defer.never
    training: bool = False
    recompute: bool = False
    t: Tensor = field(init=False)  # once the model is called
    waiting: bool = True  # for the call of the model
    modulation: Tensor | None = None
    step_decision: RouteDecision | None = None
    groups: Groups = field(default_factory=dict)
    visited: set[int] = field(default_factory=set)
    deferred: set[int] = field(default_factory=set)
    entered: dict[int, Streams] = field(default_factory=dict)
    decisions: dict[int, RouteDecision] = field(default_factory=dict)

    def entries(self, span: int, rows: Sequence[int]) -> tuple[tuple[int, int], list[int], list[int]]:
        """Where the cache keeps what a span of blocks, by its first one, remembers of some rows: the key of its bank,
        their slots in it, and the steps that they are at."""
        key = span, self.rows[0][0]
        return key, [self.slots[row] for row in rows], [self.steps[row] for row in rows]

    def ages(self, span: int) -> list[int]:
        """Of each row, how many steps ago what a span would add was computed, 0 for nothing."""
        if self.cache is None:
            return [0] * len(self.rows)
        return self.cache.ages(*self.entries(span, range(len(self.rows))))


class RouteSource(ABC):
    """Decides in the place of the routers: a policy without training, a table, a rollout that routers learn from.

    `alike`: it decides the same for all blocks; `uses_routers`: it is given what the routers decide; `learns`: every
    block runs, masked, so that gradients reach each decision; `budgets`: of the samples, instead of that of the
    settings.
    """

    alike: bool = False
    uses_routers: bool = False
    learns: bool = False
    budgets: Sequence[float] | None = None

    def begin(self, steps: int, times: Sequence[float], budgets: Sequence[float]) -> Forecast | None:
        """A generation begins: its steps, their times in [0,1] where they are known, each sample's budget -> how
        residuals go on; None: as the cache says."""
        return None

    @abstractmethod
    def decide(self, context: StepContext, block: int, routed: RouteDecision | None) -> RouteDecision:
        """The route of every row through one block; `routed` is that of the routers, for a source that uses them."""
