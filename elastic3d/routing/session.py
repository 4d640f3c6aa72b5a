"""The session: what routing knows of the generation it is in. Owns the caches and the trace; there is no global.

A sampler says `begin(samples, steps)` once and `step(i, t, dt)` before each forward pass; a training loop
says `train(...)` before each forward pass. A pass that nobody announced is an error.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from elastic3d.config.routing import BlockCacheConfig, Branches, CacheRule, ElasticConfig, RouterConfig
from elastic3d.routing.actions import actions_of
from elastic3d.routing.cache import ResidualCache, Streams
from elastic3d.routing.decision import RouteDecision, interpolated
from elastic3d.routing.passes import (
    BOTH_BRANCHES,
    Announced,
    Branch,
    Driver,
    Groups,
    Hold,
    Pass,
    RouteSource,
    Turn,
    grouped,
    one_each,
)
from elastic3d.routing.protocol import BlockCall
from elastic3d.routing.recall import Recall, Residuals
from elastic3d.routing.router import Conditioner, RouterInput, Tokens, looks_ahead
from elastic3d.routing.trace import Trace
from elastic3d.routing.updates import coarseness

if TYPE_CHECKING:
    from elastic3d.routing.block import ElasticBlock

Scale = float | None
Times = Sequence[float]
Budget = Sequence[float] | float | None  # one for all samples, one for each, or that of the settings


class RoutingSession:
    """The state that the blocks of one model share.

    Public attributes: `settings`, changed between generations; `source`, None where the routers decide; `driver`,
    which calls `begin` and `step` for a pass that nobody announced; `turn`, held by who generates; `trace` of the
    newest generation; `current`, the newest forward pass, whose `decisions` the losses read; `recorded`, what the spans
    of a dense pass add, while somebody asks for it; `entered`, by its first block, what came into each span in the
    newest pass; `coarseness` of a generation that uses the blocks' updates, else None.
    """

    def __init__(self, router_config: RouterConfig, family: str) -> None:
        self.router_config = router_config
        self.family = family
        self.settings = ElasticConfig()
        self.source: RouteSource | None = None
        self.driver: Driver | None = None
        self.turn = Turn()
        self.blocks: list[ElasticBlock] = []
        self.conditioner: Conditioner | None = None
        self.trace: Trace | None = None
        self.cache: ResidualCache | None = None
        self.current: Pass | None = None
        self.recorded: Residuals | None = None
        self.entered: dict[int, Streams] = {}
        self._led: tuple[list[int], RouteDecision] | None = None
        self._announced: Announced | None = None
        self.samples = self._steps = 0
        self._budget: Tensor = torch.ones(0)
        self.coarseness: float | None = None

    # ------------------------------------------------------------------------------------- told from outside

    def begin(
        self, samples: int, steps: int, budget: Budget = None, guidance: Scale = None, times: Times = ()
    ) -> None:
        """A new generation, of steps at `times`: caches and trace start empty. `guidance`: that of a second branch."""
        if samples < 1 or steps < 1:
            raise ValueError(f"a generation of {samples} samples in {steps} steps, expected at least 1 and 1")
        budgets = one_each(self.settings.budget if budget is None else budget, samples, "budgets")
        self.samples, self._steps = samples, steps
        self.coarsen(steps, sum(budgets) / samples, guidance, times)
        share = self.router_config.guided_share(times) if self.guided else 1.0
        self._budget = torch.tensor([self.router_config.calibrated(each, share) for each in budgets])
        self.trace = Trace(
            [b.name for b in self.blocks], self.router_config.ratios, steps, samples, self.guided
        )
        cache = self.reuse
        if self.router_config.longest and self.source is None and not cache.closed_reuse:
            raise ValueError("cache.closed_reuse is false, expected true: routers were trained to reuse")
        self.cache = ResidualCache(cache, steps) if cache.active else None
        self._forget()

    def coarsen(self, steps: int, budget: float, guidance: Scale, times: Times = ()) -> None:
        """Say how few calls a generation to come leaves: blocks are updated for that."""
        config, wanted = self.router_config, self.settings.updates and self.settings.elastic
        calls = (steps, budget, guidance, config.guided_share(times))
        self.coarseness = coarseness(config, *calls) if wanted else None
        for block in self.blocks:
            block.refresh(self.coarseness)

    @property
    def guided(self) -> bool:
        """Whether the blocks of this generation have learned its guidance."""
        return self.coarseness is not None and self.router_config.updates_guidance is not None

    def one_branch(self, t: float) -> bool:
        """Whether the conditional branch is enough at a time in [0,1]."""
        return self.guided and not self.router_config.guided_at(t)

    @property
    def reuse(self) -> BlockCacheConfig:
        """The cache of a generation: that of the settings, or the one that the routers were trained with."""
        return self.settings.cache or self.router_config.cache()

    def step(
        self,
        index: int | Sequence[int],
        dt: float | Sequence[float],
        branches: Sequence[int] = BOTH_BRANCHES,
        samples: Sequence[int] | None = None,
        hold: Hold = Hold.never,
        room: int = 1,
    ) -> None:
        """The next forward pass is sampling step `index` of size `dt`, for each branch the samples in order.

        Branches that run one after the other announce themselves one after the other. `samples`: those that take part,
        ascending, None for all; each may be at a step of its own then. Those that are held come out as they went in.
        `room`: of how many branches the cache keeps what these add; more than now where others join at some steps.
        """
        if not self.samples:
            raise ValueError("a step without a generation: call session.begin(samples, steps) first")
        samples = range(self.samples) if samples is None else samples
        steps = one_each(index, len(samples), "steps")
        for step in steps:
            if not 0 <= step < self._steps:
                raise ValueError(f"step {step} of a generation of {self._steps} steps")
        if hold is not Hold.never and not self.holds:
            raise ValueError(f"hold is {hold.name}, expected never: blocks or samples do not decide so")
        dts, budgets = one_each(dt, len(samples), "step sizes"), self._budget[list(samples)]
        self._announced = Announced(dts, budgets, branches, samples, steps, self.samples, hold, room=room)

    def train(
        self,
        dt: Tensor,
        budget: Tensor,
        branch: Tensor,
        explored: Tensor | None = None,
        lockstep: bool = False,
        recall: Recall | None = None,
        closed: bool = False,
        leaders: int = 0,
    ) -> None:
        """The next forward pass is a training pass: masked blocks, gradients to the gates, no caches.

        dt, budget, branch: (B,). By default every block runs for every row, so that closed gates get a gradient too.
        `explored` (B,I) bool says for which rows a closed block runs; for the others it is really skipped. The
        gradients of explored closed gates are weighted up by the share that is explored. With `lockstep` a block that
        no row needs runs all the same, to no effect: other processes may wait for its weights or gradients. Closed
        blocks add what they `recall`, which stands for a cache. With `closed` no block runs, whatever the routers
        decide; their decisions are recorded all the same. `leaders`: so many rows of the conditional branch come
        first, and the same samples' other branch after them, in the same order; 0: every row is for itself.
        """
        expected = (len(budget), len(self.blocks))
        if explored is not None and explored.shape != expected:
            raise ValueError(f"explored is {tuple(explored.shape)}, expected {expected}")
        options = (True, explored, lockstep, recall, closed, leaders)
        self._announced = Announced(dt, budget, branch, (), (), 0, Hold.never, *options)

    def end(self) -> None:
        """Free the caches; the trace stays."""
        self.cache = None
        self._forget()

    def _forget(self) -> None:
        self.current = self._announced = self._led = None
        self.entered = {}

    @contextmanager
    def dense(self) -> Iterator[None]:
        """While it lasts, the model is the dense one."""
        elastic, self.settings.elastic = self.settings.elastic, False
        try:
            yield
        finally:
            self.settings.elastic = elastic

    @contextmanager
    def recording(self) -> Iterator[Residuals]:
        """While it lasts, the model is the dense one, and what each block adds to its streams is noted."""
        self.recorded = {}
        try:
            with self.dense():
                yield self.recorded
        finally:
            self.recorded = None

    # ------------------------------------------------------------------------------------ called by the model

    def enter(self, t: Tensor) -> None:
        """A forward pass of the model starts, at times t (B,)."""
        if not self.settings.elastic:
            return
        if self._announced is None and self.driver is not None:
            self.driver.announce(t)
        if self._announced is None:
            raise ValueError("a forward pass that nobody announced: call session.step or session.train first")
        told, self._announced = self._announced, None
        self.current = current = told.pass_at(t, self.cache is not None and bool(self.cache.config.times))
        self.entered = {}
        if current.masked and self.conditioner is not None:  # here, and not in a block that may be recomputed
            current.modulation = self.conditioner(current.situation)

    def decide(self, block: ElasticBlock, call: BlockCall) -> RouteDecision:
        """The route of every row through `block`."""
        current = self.current
        if current is None:
            raise ValueError(f"block {block.name} was called outside a forward pass of its model")
        if block.index in current.visited and not torch.is_grad_enabled():  # with gradients: recomputation
            raise ValueError(f"block {block.name} was called twice in one forward pass")
        current.visited.add(block.index)
        if self.source is not None:
            decision = self.source.decide(current, block.index)
        elif looks_ahead(self.router_config):
            if current.ahead is None or block.index == 0:  # at the first block, also when it is recomputed
                current.ahead = self._decide_ahead(current, block, call)
            decision = current.ahead
        else:
            decision = self._decision(current, self._ask(current, block, call, slice(None)))
        age = self._age(block) if current.masked else None
        if age is not None:
            decision = decision.opened(age == 0)  # as in `plan`
        decision = decision if self.settings.width else decision.at_full_width()
        if block.index not in current.flops:
            current.flops[block.index] = block.flops(call.lengths)
        current.decisions.setdefault(block.index, decision)
        return decision

    def _decision(self, current: Pass, logits: Tensor) -> RouteDecision:
        """What logits (B, 1 + K) of all rows say; where routes are shared, their mean over the samples of a branch."""
        if self.settings.shared and current.rows:
            by_branch = logits.unflatten(0, (-1, current.leaders))
            logits = by_branch.mean(1, keepdim=True).expand_as(by_branch).flatten(0, 1)
        config, t = self.router_config, current.situation.t
        urgency = interpolated(t, config.times, config.urgency) if config.times else None
        return RouteDecision.from_logits(logits, config.threshold, urgency)

    def _ask(self, current: Pass, block: ElasticBlock, call: BlockCall, rows: slice) -> Tensor:
        """Logits of a block's router for some rows."""
        streams = tuple(stream[rows] for stream in call.streams)
        given = RouterInput(Tokens(streams), block.adapter.conditioning(call)[rows])
        age = self._age(block)
        if current.modulation is None and self.conditioner is not None:
            current.modulation = self.conditioner(current.situation)
        modulation = None if current.modulation is None else current.modulation[rows]
        return block.route(given, modulation, None if age is None else age[rows])

    def _decide_ahead(self, current: Pass, block: ElasticBlock, call: BlockCall) -> RouteDecision:
        """The same decision for all blocks. Where branches go together, the conditional one's rows are asked, which are
        the first of their pass, and in a later pass of that step nobody is."""
        count = len(current.situation.t)
        if self.router_config.branches is Branches.apart:
            return self._decision(current, self._ask(current, block, call, slice(None)))
        if current.rows and current.rows[0][0] != Branch.conditional and self._led is not None:
            steps, decision = self._led
            if steps == current.when.steps:
                return decision
        logits = self._ask(current, block, call, slice(current.leaders))
        decision = self._decision(current, logits.repeat(count // current.leaders, 1))
        self._led = (current.when.steps, decision)
        return decision

    @property
    def _alike(self) -> bool:
        """Whether all blocks of a list do the same in a pass."""
        if not self.settings.elastic or self.source is None or self.current is None or self.current.masked:
            own = looks_ahead(self.router_config)
        else:
            own = self.source.alike
        rule = CacheRule.off if self.settings.cache is None else self.settings.cache.rule  # routers' own: off
        return own and rule in (CacheRule.off, CacheRule.age)

    @property
    def holds(self) -> bool:
        """Whether samples can wait for each other: they decide once a step, each for itself."""
        return self._alike and not self.settings.shared and self.settings.elastic

    @property
    def held(self) -> Collection[int]:
        """Samples of the newest pass that should have run, and have to wait."""
        return () if self.current is None else self.current.held

    def span(self, block: ElasticBlock) -> range:
        """The blocks around this one whose residual is kept as one: all of its list, where all do the same."""
        return block.stage if self._alike else range(block.index, block.index + 1)

    def _age(self, block: ElasticBlock) -> Tensor | None:
        """Age (B,) in steps of what a closed block would add, 0 for nothing; None where routers are not told."""
        current, longest = self.current, self.router_config.longest
        assert current is not None
        if not longest:
            return None
        device = current.situation.t.device
        if current.recall is not None:
            return current.recall.age(self.span(block).start).clamp_max(longest)
        if self.cache is None:  # training, at the first step of a path
            return torch.zeros(current.situation.t.shape[0], dtype=torch.long, device=device)
        return torch.tensor(self._ages(block), device=device).clamp_max(longest)

    def _ages(self, block: ElasticBlock) -> list[int]:
        """The same for the rows of a generation."""
        current, cache = self.current, self.cache
        assert current is not None
        key = current.key(self.span(block).start)
        return [0] * len(current.rows) if cache is None else cache.ages(key, current.when)

    def plan(self, block: ElasticBlock, call: BlockCall, decision: RouteDecision) -> Groups:
        """The rows of each action, on the host (the one synchronisation of a block, or of a step that looks ahead),
        recorded in the trace."""
        current, trace = self.current, self.trace
        assert current is not None and trace is not None
        if current.actions is None or not self._alike:
            drift = None if self.cache is None else self.cache.drift(current.key(block.index), call.streams)
            ages = self._ages(block)
            current.actions = actions_of(current, decision, ages, drift, self.cache, self.router_config)
        trace.record(current.when.steps, current.rows, block.index, current.actions)
        if block.index not in trace.flops:
            trace.flops[block.index] = current.flops[block.index]
            trace.router_flops[block.index] = block.router.flops(call.lengths) if block.router else 0
        span, groups = self.span(block), grouped(current.actions)
        if block.index == span.start:
            current.settled = span[1:-1], groups
        return groups

    def settled(self, block: ElasticBlock) -> Groups | None:
        """The rows of each action, recorded in the trace, where the first block of this one's span has settled it; None
        where the block has to ask."""
        current, trace = self.current, self.trace
        if current is None or current.settled is None or trace is None or self.recorded is not None:
            return None
        blocks, groups = current.settled
        if block.index not in blocks or block.index in current.visited or block.index not in trace.flops:
            return None
        assert current.actions is not None
        current.visited.add(block.index)
        trace.record(current.when.steps, current.rows, block.index, current.actions)
        return groups
