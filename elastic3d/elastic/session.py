"""The session: the state of a generation, and who decides in it. Owns the caches and the trace; there is no global.

A sampler says `begin(samples, steps)` once, `step(i, dt)` before each forward pass, and `end()` however it ends; a
training loop says `train(...)` before each forward pass. A pass that nobody announced is an error.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from elastic3d.elastic.cache import ResidualCache, Residuals, SimulatedCache
from elastic3d.elastic.config import BlockCacheConfig, Branches, CacheRule, ElasticConfig, RouterConfig
from elastic3d.elastic.context import (
    BOTH_BRANCHES,
    Announced,
    Branch,
    Defer,
    Driver,
    Groups,
    RouteSource,
    StepContext,
    Streams,
    Training,
    Turn,
    grouped,
    one_each,
)
from elastic3d.elastic.family import BlockCall
from elastic3d.elastic.few_step import coarseness
from elastic3d.elastic.rollout import Rollout
from elastic3d.elastic.router import (
    Conditioner,
    RouteDecision,
    RouterInput,
    Tokens,
    decides_per_step,
    interpolated,
)
from elastic3d.elastic.trace import REUSED, SKIPPED, Trace

if TYPE_CHECKING:
    from elastic3d.elastic.block import ElasticBlock

Scale = float | None
Times = Sequence[float]
Budget = Sequence[float] | float | None  # one for all samples, one for each, or that of the settings


class ElasticSession:
    """What the blocks of one model share, and the generation that runs.

    Public attributes: `settings`, changed between generations; `source`, None where the routers decide; `driver`,
    which calls `begin` and `step` for a pass that nobody announced; `turn`, held by who generates; `trace` of the
    newest generation; `current`, the newest forward pass, whose `decisions` the losses read; `recorded`, what the spans
    of a dense pass add, while somebody asks for it; `coarseness` of a generation that uses the few-step LoRA, or
    None; `rollout`, from which routers learn while it is generated; `recompute`: blocks keep no activations for the
    backward pass of a generation, but run again there (activation checkpointing).
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
        self.current: StepContext | None = None
        self.recorded: Residuals | None = None
        self.entered: dict[int, Streams] = {}  # while recording
        self.samples = self._steps = 0
        self._times: list[float] = []
        self._budget: Tensor = torch.ones(0)
        self.coarseness: float | None = None
        self.rollout: Rollout | None = None
        self.recompute = False
        self._led: tuple[list[int], RouteDecision] | None = None
        self._announced: Announced | None = None

    @property
    def parts(self) -> dict[str, nn.Module]:
        """Every router, update and what they share, by name."""
        found: dict[str, nn.Module] = {}
        for what in ("router", "few_step"):
            for block in self.blocks:
                part = getattr(block, what)
                if part is not None:
                    found[f"{block.name}.{what}"] = part
        return found | ({"conditioner": self.conditioner} if self.conditioner is not None else {})

    # ------------------------------------------------------------------------------------- told from outside

    def begin(
        self, samples: int, steps: int, budget: Budget = None, guidance: Scale = None, times: Times = ()
    ) -> None:
        """A new generation, of steps at `times`: caches and trace start empty. `guidance`: that of a second branch."""
        if samples < 1 or steps < 1:
            raise ValueError(f"a generation of {samples} samples in {steps} steps, expected at least 1 and 1")
        if budget is None and self.rollout is not None:
            budget = cast(list[float], self.rollout.budget.tolist())
        budgets = one_each(self.settings.budget if budget is None else budget, samples, "budgets")
        if self.settings.elastic and self.source is None:
            self.router_config.check_generation(steps, guidance, self.settings.few_step)
        self.samples, self._steps, self._times = samples, steps, list(times)
        self.coarsen(steps, sum(budgets) / samples, guidance, times)
        share = self.router_config.guided_share(times) if self.guided else 1.0
        self._budget = torch.tensor([self.router_config.calibrated(each, share) for each in budgets])
        self.trace = Trace(
            [b.name for b in self.blocks], self.router_config.ratios, steps, samples, self.guided
        )
        cache, forecast = self.reuse, None
        if self.source is not None:
            forecast = self.source.begin(steps, times, budgets)
        elif self.router_config.longest and not cache.skipped_reuse:
            raise ValueError("cache.skipped_reuse is false, expected true: routers were trained to reuse")
        self.cache = ResidualCache(cache, steps, forecast) if cache.active else None
        self._forget()

    def coarsen(self, steps: int, budget: float, guidance: Scale, times: Times = ()) -> None:
        """Say how coarse a generation to come is: the few-step LoRA is scaled for that."""
        config, wanted = self.router_config, self.settings.few_step and self.settings.elastic
        nfe = (steps, budget, guidance, config.guided_share(times))
        self.coarseness = coarseness(config, *nfe) if wanted else None
        for block in self.blocks:
            block.refresh(self.coarseness)

    @property
    def guided(self) -> bool:
        """Whether the blocks of this generation have learned its guidance."""
        return self.coarseness is not None and self.router_config.few_step_guidance is not None

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
        defer: Defer = Defer.never,
        room: int = 1,
    ) -> None:
        """The next forward pass is sampling step `index` of size `dt`, for each branch the samples in order.

        Branches that run one after the other announce themselves one after the other. `samples`: those that take part,
        ascending, None for all; each may be at a step of its own then. Those that are deferred pass the blocks.
        `room`: of how many branches the cache keeps what these add; more than now where others join at some steps.
        """
        if not self.samples:
            raise ValueError("a step without a generation: call session.begin(samples, steps) first")
        samples = range(self.samples) if samples is None else samples
        steps = one_each(index, len(samples), "steps")
        for step in steps:
            if not 0 <= step < self._steps:
                raise ValueError(f"step {step} of a generation of {self._steps} steps")
        if defer is not Defer.never and not self.defers:
            raise ValueError(f"defer is {defer.name}, expected never: blocks or samples do not decide so")
        dts, budgets = one_each(dt, len(samples), "step sizes"), self._budget[list(samples)]
        training = Training() if self.rollout is not None and self.rollout.straight else None
        times = [self._times[step] for step in steps] if len(self._times) == self._steps else []
        self._announced = Announced(
            dts,
            budgets,
            branches,
            samples,
            steps,
            self.samples,
            defer,
            room=room,
            training=training,
            times=times,
        )

    def train(
        self,
        dt: Tensor,
        budget: Tensor,
        branch: Tensor,
        explored: Tensor | None = None,
        lockstep: bool = False,
        simulated: SimulatedCache | None = None,
        skipped: bool = False,
        conditional_rows: int = 0,
    ) -> None:
        """The next forward pass is a training pass: masked blocks, gradients to the gates, no caches.

        dt, budget, branch: (B,). By default every block runs for every row, so that skipped gates get a gradient too.
        `explored` (B,I) bool says for which rows a skipped block runs; for the others it is really skipped. The
        gradients of explored skipped gates are weighted up by the share that is explored. With `lockstep` a block that
        no row needs runs all the same, to no effect: other processes may wait for its weights or gradients. Closed
        blocks add what they `simulated`, which stands for a cache. With `skipped` no block runs, whatever the routers
        decide; their decisions are recorded all the same. `conditional_rows`: so many rows of the conditional
        branch come first, and the same samples' other branch after them, in the same order; 0: every row is for itself.
        """
        expected = (len(budget), len(self.blocks))
        if explored is not None and explored.shape != expected:
            raise ValueError(f"explored is {tuple(explored.shape)}, expected {expected}")
        training = Training(explored, lockstep, simulated, skipped)
        self._announced = Announced(dt, budget, branch, training=training, conditional_rows=conditional_rows)

    def end(self) -> None:
        """Free the caches; the trace stays."""
        self.cache = None
        self._forget()

    def _forget(self) -> None:
        self.current = self._announced = self._led = None

    @contextmanager
    def dense(self) -> Iterator[None]:
        """While it lasts, the model is the dense one."""
        elastic, self.settings.elastic = self.settings.elastic, False
        try:
            yield
        finally:
            self.settings.elastic = elastic

    @contextmanager
    def learning(self, rollout: Rollout) -> Iterator[None]:
        """While it lasts, a generation is a rollout: its budgets and routes are taken, its decisions noted there."""
        if decides_per_step(self.router_config):
            raise ValueError("scope is step, expected block: in a rollout each block decides for itself")
        self.rollout = rollout
        try:
            yield
        finally:
            self.rollout = None

    @contextmanager
    def recording(self) -> Iterator[Residuals]:
        """While it lasts, the model is the dense one, and what each block adds to its streams is noted."""
        self.recorded = {}
        try:
            with self.dense():
                yield self.recorded
        finally:
            self.recorded, self.entered = None, {}

    def forget(self) -> None:
        """Drop copies of the blocks: the model moves to another device."""
        for block in self.blocks:
            block.forget()

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
        self._follow(t.device)
        self.current = context = told.at(t, self.cache is not None and bool(self.cache.config.times))
        if self.rollout is not None:
            self.rollout.passes.append(context)
        if (
            context.training is not None and self.conditioner is not None
        ):  # not in a block that may be recomputed
            context.modulation = self.conditioner(context)

    def _follow(self, device: torch.device) -> None:
        """Routers are no part of the model: they go where it is."""
        for part in self.parts.values():
            if next(part.parameters()).device != device:
                part.to(device)

    def context_of(self, block: ElasticBlock) -> StepContext:
        """The pass that a block is called in."""
        if self.current is None:
            raise ValueError(f"block {block.name} was called outside a forward pass of its model")
        return self.current

    def decide(self, block: ElasticBlock, call: BlockCall) -> RouteDecision:
        """The route of every row through `block`: from the source, from the one decision of this step, or from its
        router. Where one decision holds for all blocks, rows with nothing to go on with run: to skip all is no step."""
        context = self.context_of(block)
        if block.index in context.visited and not torch.is_grad_enabled():  # with gradients: recomputation
            raise ValueError(f"block {block.name} was called twice in one forward pass")
        context.visited.add(block.index)
        if self.source is not None:
            decision = self.source.decide(context, block.index)
        elif not decides_per_step(self.router_config):
            decision = self._decision(context, self._logits(context, block, call, slice(None)))
            if self.rollout is not None:
                decision = self.rollout.settle(context, block.index, decision)
        else:
            if context.ahead is None or block.index == 0:  # at the first block, also when it is recomputed
                context.ahead = self._decide_ahead(context, block, call)
            decision = context.ahead
        if decides_per_step(self.router_config) and (context.training is not None or self.cache is not None):
            age = self._age(block)
            if age is not None:
                decision = decision.running(age == 0)
        decision = decision if self.settings.width else decision.at_full_width()
        if block.index not in context.flops:
            context.flops[block.index] = block.flops(call.lengths)
        context.decisions.setdefault(block.index, decision)
        return decision

    def _decision(self, context: StepContext, logits: Tensor) -> RouteDecision:
        """What logits (B, 1 + K) of all rows say; where routes are shared, their mean over the samples of a branch."""
        if self.settings.shared and context.rows:
            by_branch = logits.unflatten(0, (-1, context.conditional_rows))
            logits = by_branch.mean(1, keepdim=True).expand_as(by_branch).flatten(0, 1)
        config = self.router_config
        bias = interpolated(context.t, config.times, config.gate_bias) if config.times else None
        return RouteDecision.from_logits(logits, config.threshold, bias)

    def _logits(self, context: StepContext, block: ElasticBlock, call: BlockCall, rows: slice) -> Tensor:
        """Logits of a block's router for some rows."""
        assert block.router is not None
        streams = tuple(stream[rows] for stream in call.streams)
        conditioning, age, modulation = block.adapter.conditioning(call)[rows], self._age(block), None
        if self.rollout is not None:  # the model does not learn to please its routers
            streams, conditioning = tuple(stream.detach() for stream in streams), conditioning.detach()
        if context.modulation is None and self.conditioner is not None:
            context.modulation = self.conditioner(context)
        if context.modulation is not None:
            modulation = context.modulation[rows, block.index]
        age = None if age is None else age[rows]
        return block.router(RouterInput(Tokens(streams), conditioning, modulation, age))

    def _decide_ahead(self, context: StepContext, block: ElasticBlock, call: BlockCall) -> RouteDecision:
        """The same decision for all blocks. Where branches go together, the conditional one's rows are asked, which are
        the first of their pass, and in a later pass of that step nobody is."""
        if self.router_config.branches is Branches.separate:
            return self._decision(context, self._logits(context, block, call, slice(None)))
        if context.rows and context.rows[0][0] != Branch.conditional and self._led is not None:
            steps, decision = self._led
            if steps == context.when.steps:
                return decision
        logits = self._logits(context, block, call, slice(context.conditional_rows))
        decision = self._decision(context, logits.repeat(len(context.t) // context.conditional_rows, 1))
        self._led = (context.when.steps, decision)
        return decision

    @property
    def _alike(self) -> bool:
        """Whether all blocks of a list do the same in a pass."""
        own = decides_per_step(self.router_config)
        training = self.current is not None and self.current.training is not None
        if self.settings.elastic and self.source is not None and not training:
            own = self.source.alike
        rule = CacheRule.off if self.settings.cache is None else self.settings.cache.rule  # routers' own: off
        return own and rule in (CacheRule.off, CacheRule.age)

    @property
    def defers(self) -> bool:
        """Whether samples can wait for each other: they decide once a step, each for itself."""
        return self._alike and not self.settings.shared and self.settings.elastic

    @property
    def deferred(self) -> Collection[int]:
        """Samples of the newest pass that should have run, and are deferred."""
        return () if self.current is None else self.current.deferred

    def span(self, block: ElasticBlock) -> range:
        """The blocks around this one whose residual is kept as one: all of its list, where all do the same."""
        return block.stage if self._alike else range(block.index, block.index + 1)

    def _age(self, block: ElasticBlock) -> Tensor | None:
        """Age (B,) in steps of what a skipped block would add, 0 for nothing; None where routers are not told."""
        context, longest = self.context_of(block), self.router_config.longest
        if not longest:
            return None
        if context.training is not None and context.training.simulated is not None:
            return context.training.simulated.age(self.span(block).start).clamp_max(longest)
        if self.cache is None:  # training, at the first step of a path
            return torch.zeros(len(context.t), dtype=torch.long, device=context.t.device)
        return torch.tensor(self._ages(block), device=context.t.device).clamp_max(longest)

    def _ages(self, block: ElasticBlock) -> list[int]:
        """The same for the rows of a generation."""
        context = self.context_of(block)
        key = context.key(self.span(block).start)
        return [0] * len(context.rows) if self.cache is None else self.cache.ages(key, context.when)

    def plan(self, block: ElasticBlock, call: BlockCall, decision: RouteDecision) -> Groups:
        """The rows of each action, on the host (the one synchronisation of a block, or of a step that looks ahead),
        recorded in the trace."""
        context, trace = self.context_of(block), self.trace
        assert trace is not None
        if context.actions is None or not self._alike:
            context.actions = self._actions(context, decision, self._ages(block))
        trace.record(context.when.steps, context.rows, block.index, context.actions)
        if block.index not in trace.flops:
            trace.flops[block.index] = context.flops[block.index]
            trace.router_flops[block.index] = block.router.flops(call.lengths) if block.router else 0
        span, groups = self.span(block), grouped(context.actions)
        if block.index == span.start:
            context.settled = span[1:-1], groups
        return groups

    def _actions(self, context: StepContext, decision: RouteDecision, ages: Sequence[int]) -> list[int]:
        """What a decision means for each row: run at a width, go on with a residual of an age, or pass. Samples that
        are deferred, though a row of them should run, pass and are noted."""
        threshold, actions = self.router_config.threshold, []
        for age, p, width, keep in zip(ages, *decision.on_host(), strict=True):
            if self.cache is not None and self.cache.reuse(age, bool(keep), p, threshold):
                actions.append(REUSED)
            else:
                actions.append(1 + int(width) if keep else SKIPPED)
        if context.defer is Defer.never or (context.defer is Defer.unless_all and min(actions) > SKIPPED):
            return actions
        samples = [sample for _, sample in context.rows]
        context.deferred = {s for s, action in zip(samples, actions, strict=True) if action > SKIPPED}
        return [
            SKIPPED if s in context.deferred else action for s, action in zip(samples, actions, strict=True)
        ]

    def settled(self, block: ElasticBlock) -> Groups | None:
        """The rows of each action, recorded in the trace, where the first block of this one's span has settled it; None
        where the block has to ask."""
        context, trace = self.current, self.trace
        if context is None or context.settled is None or trace is None or self.recorded is not None:
            return None
        blocks, groups = context.settled
        if block.index not in blocks or block.index in context.visited or block.index not in trace.flops:
            return None
        assert context.actions is not None
        context.visited.add(block.index)
        trace.record(context.when.steps, context.rows, block.index, context.actions)
        return groups
