"""The session: the state of a generation, and who decides in it. Owns the caches and the trace; there is no global.

A sampler says `begin(samples, steps)` once, `step(i, dt)` before each forward pass, and `end()` however it ends; a
training loop says `train(...)` before each forward pass. A pass that nobody announced is an error. In a pass each block
asks `decide`, and in a generation `route`, what to do.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from elastic3d.elastic.cache import ResidualCache, Residuals, SimulatedCache
from elastic3d.elastic.compiling import stays_eager
from elastic3d.elastic.config import Branches, CacheRule, ElasticConfig, RouterConfig, Scope
from elastic3d.elastic.context import (
    BOTH_BRANCHES,
    Branch,
    Defer,
    Driver,
    Groups,
    RouteSource,
    StepContext,
    Streams,
    Training,
    one_each,
)
from elastic3d.elastic.family import BlockCall, ModelAdapter
from elastic3d.elastic.few_step import coarseness
from elastic3d.elastic.rollout import Rollout
from elastic3d.elastic.router import Conditioner, RouteDecision, interpolated
from elastic3d.elastic.trace import REUSED, SKIPPED, Trace

if TYPE_CHECKING:
    from elastic3d.elastic.block import ElasticBlock

Scale = float | None
Times = Sequence[float]
Budget = Sequence[float] | float | None  # one for all samples, one for each, or that of the settings


class ElasticSession:
    """What the blocks of one model share, and the generation that runs.

    Public attributes: `settings`, changed between generations; `source`, None where the routers decide; `driver`,
    which calls `begin` and `step` for a pass that nobody announced; `trace` of the newest generation; `current`, the
    newest forward pass, whose `decisions` the losses read; `coarseness` of a generation that uses the few-step LoRA, or
    None; `rollout`, from which routers learn while it is generated; `recompute`: blocks keep no activations for the
    backward pass of a generation, but run again there (activation checkpointing).
    """

    def __init__(self, router_config: RouterConfig, adapter: ModelAdapter) -> None:
        self.router_config, self.adapter = router_config, adapter
        self.settings = ElasticConfig()
        self.source: RouteSource | None = None
        self.driver: Driver | None = None
        self.blocks: list[ElasticBlock] = []
        self.conditioner: Conditioner | None = None
        self.trace: Trace | None = None
        self.cache: ResidualCache | None = None
        self.current: StepContext | None = None
        self.samples = self._steps = 0
        self._budget = torch.ones(0)
        self.coarseness: float | None = None
        self.rollout: Rollout | None = None
        self.recompute = False
        self.entered: dict[int, Streams] = {}  # while recording

    @property
    def parts(self) -> dict[str, nn.Module]:
        """Every router, few-step LoRA and what they share, by name."""
        found: dict[str, nn.Module | None] = {f"{block.name}.router": block.router for block in self.blocks}
        found |= {f"{block.name}.few_step": block.few_step for block in self.blocks}
        found["conditioner"] = self.conditioner
        return {name: part for name, part in found.items() if part is not None}

    # ------------------------------------------------------------------------------------- told from outside

    def begin(
        self, samples: int, steps: int, budget: Budget = None, guidance: Scale = None, times: Times = ()
    ) -> None:
        """A new generation, of steps at `times`: caches and trace start empty. `guidance`: that of a second branch."""
        if samples < 1 or steps < 1:
            raise ValueError(f"a generation of {samples} samples in {steps} steps, expected at least 1 and 1")
        if budget is None:
            budget = self.settings.budget if self.rollout is None else list(self.rollout.budget.tolist())
        budgets, config = one_each(budget, samples, "budgets"), self.router_config
        if self.settings.elastic and self.source is None:
            config.check_generation(steps, guidance, self.settings.few_step)
        self.samples, self._steps = samples, steps
        self.coarsen(steps, sum(budgets) / samples, guidance, times)
        whole = config.guided_share(times) if self.guided else 1.0
        self._budget = torch.tensor([config.calibrated(each, whole) for each in budgets])
        self.trace = Trace([b.name for b in self.blocks], config.ratios, steps, samples, self.guided)
        forecast, reuse = None, self.settings.cache or config.cache()
        if self.source is not None:
            forecast = self.source.begin(steps, times, budgets)
        elif config.longest and not reuse.skipped_reuse:
            raise ValueError("cache.skipped_reuse is false, expected true: routers were trained to reuse")
        self.end()
        if reuse.active:
            self.cache = ResidualCache(reuse, times or [i / steps for i in range(steps)], forecast)

    def coarsen(self, steps: int, budget: float, guidance: Scale, times: Times = ()) -> None:
        """Say how coarse a generation to come is: the few-step LoRA is scaled for that."""
        config, self.coarseness = self.router_config, None
        if self.settings.few_step and self.settings.elastic:
            self.coarseness = coarseness(config, steps, budget, guidance, config.guided_share(times))
        for block in self.blocks:
            block.refresh(self.coarseness)

    @property
    def guided(self) -> bool:
        """Whether the blocks of this generation have learned its guidance."""
        return self.coarseness is not None and self.router_config.few_step_guidance is not None

    def one_branch(self, t: float) -> bool:
        """Whether the conditional branch is enough at a time in [0,1]."""
        return self.guided and not self.router_config.guided_at(t)

    def step(
        self,
        index: int | Sequence[int],
        dt: float | Sequence[float],
        branches: Sequence[int] = BOTH_BRANCHES,
        samples: Sequence[int] | None = None,
        defer: Defer = Defer.never,
    ) -> None:
        """The next forward pass is sampling step `index` of size `dt`, for each branch the samples in order.

        Branches that run one after the other announce themselves one after the other. `samples`: those that take part,
        ascending, None for all; each may be at a step of its own then. Those that are deferred pass the blocks.
        """
        if not self.samples:
            raise ValueError("a step without a generation: call session.begin(samples, steps) first")
        samples = range(self.samples) if samples is None else samples
        steps, copies = one_each(index, len(samples), "steps"), len(branches)
        for step in steps:
            if not 0 <= step < self._steps:
                raise ValueError(f"step {step} of a generation of {self._steps} steps")
        if defer is not Defer.never and not self.defers:
            raise ValueError(f"defer is {defer.name}, expected never: blocks or samples do not decide so")
        rows = [(int(branch), sample) for branch in branches for sample in samples]
        context = StepContext(
            dt=torch.tensor(one_each(dt, len(samples), "step sizes") * copies),
            budget=self._budget[list(samples)].repeat(copies),
            branch=torch.tensor([float(branch) for branch, _ in rows]),
            conditional_rows=len(samples),
            rows=rows,
            steps=steps * copies,
            slots=[(branch - rows[0][0]) * self.samples + sample for branch, sample in rows],
            defer=defer,
            training=Training() if self.rollout is not None and self.rollout.straight else None,
        )
        if self.router_config.branches is Branches.shared and rows[0][0] != Branch.conditional:
            context.follow(self.current)
        self.current = context

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
        no row needs runs all the same, to no effect: other processes may wait for its weights or gradients. Skipped
        blocks add what they `simulated`, which stands for a cache. With `skipped` no block runs, whatever the routers
        decide; their decisions are recorded all the same. `conditional_rows`: so many rows of the conditional
        branch come first, and the same samples' other branch after them, in the same order; 0: every row is for itself.
        """
        expected = (len(budget), len(self.blocks))
        if explored is not None and explored.shape != expected:
            raise ValueError(f"explored is {tuple(explored.shape)}, expected {expected}")
        training = Training(explored, lockstep, simulated, skipped)
        self.current = StepContext(dt, budget, branch, conditional_rows or len(budget), training=training)

    def end(self) -> None:
        """Free the caches; the trace stays."""
        self.cache = self.current = None

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
        if self.router_config.scope is Scope.step:
            raise ValueError("scope is step, expected block: in a rollout each block decides for itself")
        self.rollout = rollout
        try:
            yield
        finally:
            self.rollout = None

    @contextmanager
    def recording(self) -> Iterator[Residuals]:
        """While it lasts, the model is the dense one, and what each span of blocks adds to its streams is noted."""
        residuals: Residuals = {}

        def first(block: ElasticBlock, inner: nn.Module, args: Any, kwargs: Any) -> None:
            self.entered[block.index] = block.adapter.bind(inner, args, kwargs).streams

        def last(block: ElasticBlock, inner: nn.Module, args: Any, output: Any) -> None:
            start, streams = self.span(block).start, block.adapter.unpack(output)
            added = zip(self.entered[start], streams, strict=True)
            residuals[start] = tuple((y - x).detach() for x, y in added)

        with self.dense(), ExitStack() as hooks:
            hooks.callback(self.entered.clear)
            for block in self.blocks:
                span = self.span(block)
                if block.index == span.start:
                    hook = block.inner.register_forward_pre_hook(partial(first, block), with_kwargs=True)
                    hooks.callback(hook.remove)
                if block.index == span[-1]:
                    hooks.callback(block.inner.register_forward_hook(partial(last, block)).remove)
            yield residuals

    def forget(self) -> None:
        """Drop copies of the blocks: the model moves to another device."""
        for block in self.blocks:
            block.forget()

    # ------------------------------------------------------------------------------------ called by the model

    @stays_eager
    def before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of the model."""
        if self.settings.elastic:
            self.enter(self.adapter.timestep(args, kwargs))

    def enter(self, t: Tensor) -> None:
        """A forward pass of the model starts, at times t (B,)."""
        if self.driver is not None and (self.current is None or not self.current.waiting):
            self.driver.announce(t)
        context = self.current
        if context is None or not context.waiting:
            raise ValueError("a forward pass that nobody announced: call session.step or session.train first")
        for part in self.parts.values():  # no part of the model: they go where it is
            if next(part.parameters()).device != t.device:
                part.to(t.device)
        context.called(t)
        if self.rollout is not None:
            self.rollout.passes.append(context)
        if self.conditioner is not None and self.source is None and context.ahead is None:
            context.modulation = self.conditioner(context)

    def visit(self, block: ElasticBlock) -> StepContext:
        """The pass that a block is called in: once, unless it is called again for the backward pass."""
        context = self.current
        if context is None or context.waiting:
            raise ValueError(f"block {block.name} was called outside a forward pass of its model")
        if block.index in context.visited and not torch.is_grad_enabled():
            raise ValueError(f"block {block.name} was called twice in one forward pass")
        context.visited.add(block.index)
        return context

    def route(self, context: StepContext, block: ElasticBlock, call: BlockCall) -> Groups:
        """The rows of each action of a block in a generation. The first block of a span settles it for all of them, and
        where it is the first of the model too, for all spans: then a pass waits for the device only here."""
        trace, span = self.trace, self.span(block)
        assert trace is not None
        if block.index == span.start:
            if context.groups is None or not self.alike:
                context.groups = self._groups(context, self.decide(context, block, call), span)
            for action, rows in context.groups.items():
                trace.record([(context.steps[row], *context.rows[row]) for row in rows], span, action)
            if block.index not in trace.flops:
                for each in self.blocks[span.start : span.stop]:
                    trace.flops[each.index] = each.flops(call.lengths)
                    trace.router_flops[each.index] = each.router.flops(call.lengths) if each.router else 0
        assert context.groups is not None
        return context.groups

    def decide(self, context: StepContext, block: ElasticBlock, call: BlockCall) -> RouteDecision:
        """The route of every row through a block: from the source, from the one decision of this step, or from its
        router. Where one decision holds for all blocks, rows with nothing to go on with run: to skip all is no step."""
        once = self.router_config.scope is Scope.step
        if self.source is not None:
            decision = self.source.decide(context, block.index)
        elif context.ahead is not None and (block.index > 0 or context.rows):
            decision = context.ahead
        else:  # the first block decides again where its activations are recomputed
            decision = self._ask(context, block, call)
            if self.rollout is not None:
                decision = self.rollout.settle(context, block.index, decision)
            context.ahead = decision if once else None
        if once and self.router_config.longest and (context.training is not None or self.cache is not None):
            decision = decision.running(self._age(context, block) == 0)
        if not self.settings.width:
            decision = decision.at_full_width()
        context.flops.setdefault(block.index, block.flops(call.lengths))
        context.decisions.setdefault(block.index, decision)
        return decision

    def _ask(self, context: StepContext, block: ElasticBlock, call: BlockCall) -> RouteDecision:
        """What the router of a block says of every row. Where branches share their routes, rows of the conditional one
        are asked, which come first in their pass; where samples do, their mean holds."""
        config, router, rows = self.router_config, block.router, slice(None)
        assert router is not None
        if config.branches is Branches.shared:
            rows = slice(context.conditional_rows)
        streams, conditioning = tuple(x[rows] for x in call.streams), block.adapter.conditioning(call)[rows]
        if self.rollout is not None:  # the model does not learn to please its routers
            streams, conditioning = tuple(x.detach() for x in streams), conditioning.detach()
        modulation = None if context.modulation is None else context.modulation[rows, block.index]
        age = self._age(context, block)[rows] if config.longest else None
        logits = router(streams, conditioning, modulation, age)
        logits = logits.repeat(len(context.t) // len(logits), 1)
        if self.settings.shared and context.rows:
            by_branch = logits.unflatten(0, (-1, context.conditional_rows))
            logits = by_branch.mean(1, keepdim=True).expand_as(by_branch).flatten(0, 1)
        bias = interpolated(context.t, config.times, config.gate_bias) if config.times else None
        return RouteDecision.from_logits(logits, config.threshold, bias)

    def _groups(self, context: StepContext, decision: RouteDecision, span: range) -> Groups:
        """What a decision means for each row: run at a width, go on with a residual, or pass. Samples that are
        deferred, though a row of them should run, pass and are noted."""
        threshold, actions = self.router_config.threshold, []
        for age, p, width, keep in zip(self._ages(context, span), *decision.on_host(), strict=True):
            if self.cache is not None and self.cache.reuse(age, bool(keep), p, threshold):
                actions.append(REUSED)
            else:
                actions.append(1 + int(width) if keep else SKIPPED)
        samples, groups = [sample for _, sample in context.rows], Groups()
        if context.defer is Defer.always or (context.defer is Defer.unless_all and min(actions) <= SKIPPED):
            context.deferred = {s for s, action in zip(samples, actions, strict=True) if action > SKIPPED}
        for row, (sample, action) in enumerate(zip(samples, actions, strict=True)):
            groups.setdefault(SKIPPED if sample in context.deferred else action, []).append(row)
        return groups

    @property
    def alike(self) -> bool:
        """Whether all blocks of a list do the same in a pass."""
        own, cache = self.router_config.scope is Scope.step, self.settings.cache
        training = self.current is not None and self.current.training is not None
        if self.settings.elastic and self.source is not None and not training:
            own = self.source.alike
        return own and (cache is None or cache.rule is not CacheRule.band)

    @property
    def defers(self) -> bool:
        """Whether samples can wait for each other: they decide once a step, each for itself."""
        return self.alike and not self.settings.shared and self.settings.elastic

    @property
    def deferred(self) -> Collection[int]:
        """Samples of the newest pass that should have run, and are deferred."""
        return () if self.current is None else self.current.deferred

    def span(self, block: ElasticBlock) -> range:
        """The blocks around this one whose residual is kept as one: all of its list, where all do the same."""
        return block.stage if self.alike else range(block.index, block.index + 1)

    def _ages(self, context: StepContext, span: range) -> list[int]:
        """Of each row, how many steps ago what a span would add was computed, 0 for nothing."""
        if self.cache is None:
            return [0] * len(context.t)
        return self.cache.ages(context.key(span.start), context.slots, context.steps)

    def _age(self, context: StepContext, block: ElasticBlock) -> Tensor:
        """The same (B,) long, as routers are told it."""
        span, longest = self.span(block), self.router_config.longest
        if context.training is not None and context.training.simulated is not None:
            return context.training.simulated.age(span.start).clamp_max(longest)
        return torch.tensor(self._ages(context, span), device=context.t.device).clamp_max(longest)
