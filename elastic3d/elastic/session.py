"""The session: the state of a generation, and who decides in it. Owns the caches and the trace; there is no global.

A sampler says `begin(samples, steps)` once, `step(i, dt)` before each forward pass, and `end()` however it ends. A pass
that nobody announced is an error. In a pass `run` stands where each block of the model has its `forward`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from elastic3d.elastic.block import ElasticBlock
from elastic3d.elastic.cache import ResidualCache
from elastic3d.elastic.config import Branches, CacheRule, ElasticConfig, RouterConfig, Scope
from elastic3d.elastic.context import BOTH_BRANCHES, Branch, Defer, Groups, RouteSource, StepContext
from elastic3d.elastic.families import BlockCall, ModelAdapter
from elastic3d.elastic.few_step import coarseness
from elastic3d.elastic.router import Conditioner, RouteDecision, interpolated
from elastic3d.elastic.trace import REUSED, SKIPPED, Trace
from elastic3d.errors import UserError

T = TypeVar("T", int, float)
Function = TypeVar("Function", bound=Callable[..., Any])
Scale = float | None
Times = Sequence[float]
Budget = Sequence[float] | float | None  # one for all samples, one for each, or that of the settings


def stays_eager(function: Function) -> Function:
    """As `torch.compiler.disable(recursive=False)`, which imports the compiler (half a second) at decoration."""
    kept: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:  # so nobody compiles
            return function(*args, **kwargs)
        if not kept:
            kept.append(torch.compiler.disable(function, recursive=False))
        return kept[0](*args, **kwargs)

    return call  # type: ignore[return-value]


@dataclass(eq=False, repr=False)
class ElasticSession:
    """What the blocks of one model share, and the generation that runs."""

    router_config: RouterConfig
    adapter: ModelAdapter
    blocks: list[ElasticBlock] = field(default_factory=list)
    conditioner: Conditioner | None = None  # None where no routers are
    routers: nn.ModuleDict = field(default_factory=nn.ModuleDict)  # with few-step LoRA and conditioner
    hooks: list[RemovableHandle] = field(default_factory=list)  # on the model
    driver: Any = None  # a `PipelineDriver`, which calls `begin` and `step` for a pass that nobody announced
    # changed between generations
    settings: ElasticConfig = field(default_factory=ElasticConfig)
    source: RouteSource | None = None  # None where the routers decide
    idle: int = 0  # steps that were asked for and move nothing
    recompute: bool = False  # activation checkpointing: blocks run again for the backward pass
    # of the newest generation
    trace: Trace | None = None
    cache: ResidualCache | None = None
    coarseness: float | None = None  # None where it runs without the few-step LoRA
    current: StepContext | None = None  # the newest forward pass, whose `decisions` the losses read
    _budget: Tensor = field(default_factory=lambda: torch.ones(0))

    # ------------------------------------------------------------------------------------ given from outside

    def begin(
        self, samples: int, steps: int, budget: Budget = None, guidance: Scale = None, times: Times = ()
    ) -> None:
        """A new generation, of steps at `times`: caches and trace start empty. `guidance`: that of a second branch."""
        if samples < 1 or steps < 1:
            raise ValueError(f"a generation of {samples} samples in {steps} steps, expected at least 1 and 1")
        if budget is None and self.source is not None:
            budget = self.source.budgets
        if budget is None:
            budget = self.settings.budget
        budgets, config = _one_each(budget, samples, "budgets"), self.router_config
        if self.settings.elastic and self.uses_routers:
            config.check_generation(steps, guidance, self.settings.few_step, self.idle)
            config.check_budget(min(budgets), times, self.idle)
        self.coarsen(steps, sum(budgets) / samples, guidance, times)
        for block in self.blocks:
            block.refresh(self.coarseness)
        whole = config.guided_share(times) if self.guided else 1.0
        self._budget = torch.tensor([config.calibrated(each, whole) for each in budgets], dtype=torch.float32)
        self.trace = Trace([b.name for b in self.blocks], config.ratios, steps, samples, self.guided)
        reuse = self.settings.cache or config.cache()
        forecast = self.source.begin(steps, times, budgets) if self.source else None
        if self.uses_routers and config.longest and not reuse.skipped_reuse:
            raise UserError("cache.skipped_reuse is false, expected true: routers were trained to reuse")
        self.end()
        if reuse.active:
            self.cache = ResidualCache(reuse, times or [i / steps for i in range(steps)], forecast)

    def coarsen(self, steps: int, budget: float, guidance: Scale, times: Times = ()) -> None:
        """Say how coarse a generation to come is: the few-step LoRA is scaled for that."""
        config, self.coarseness = self.router_config, None
        if self.settings.few_step and self.settings.elastic:
            self.coarseness = coarseness(config, steps, budget, guidance, config.guided_share(times))

    @property
    def uses_routers(self) -> bool:
        """Whether routers decide, in the first place at least."""
        return self.source is None or self.source.uses_routers

    @property
    def routers_run(self) -> bool:
        """Whether routers run: not where the settings alone say that every block runs."""
        return self.uses_routers and not self.every_block

    @property
    def guided(self) -> bool:
        """Whether the blocks of this generation have learned its guidance."""
        return self.coarseness is not None and self.router_config.few_step_guidance is not None

    @property
    def every_block(self) -> bool:
        """Whether the settings alone say that every block runs, at full width: those of the dense model, and a budget
        of 1 with the few-step LoRA, unless something else decides."""
        settings, others = self.settings, self.source is not None or bool(self.router_config.trained_steps)
        whole = settings.budget == 1 and settings.cache is None and self.coarseness is not None
        return not settings.elastic or (whole and not others)

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
    ) -> StepContext:
        """The next forward pass is sampling step `index` of size `dt`, for each branch the samples in order.

        Branches that run one after the other announce themselves one after the other. `samples`: those that take part,
        ascending, None for all; each may be at a step of its own then. Those that are deferred pass the blocks.
        """
        if (trace := self.trace) is None:
            raise ValueError("a step without a generation: call session.begin(samples, steps) first")
        samples = range(trace.samples) if samples is None else samples
        steps, copies = _one_each(index, len(samples), "steps"), len(branches)
        for step in steps:
            if not 0 <= step < trace.steps:
                raise ValueError(f"step {step} of a generation of {trace.steps} steps")
        if defer is not Defer.never and not self.defers:
            raise ValueError(f"defer is {defer.name}, expected never: blocks or samples do not decide so")
        rows, before = [(int(branch), sample) for branch in branches for sample in samples], self.current
        context = self.current = StepContext(
            dt=torch.tensor(_one_each(dt, len(samples), "step sizes") * copies, dtype=torch.float32),
            budget=self._budget[list(samples)].repeat(copies),
            branch=torch.tensor([branch for branch, _ in rows], dtype=torch.float32),
            conditional_rows=len(samples),
            rows=rows,
            steps=steps * copies,
            slots=[(branch - rows[0][0]) * trace.samples + sample for branch, sample in rows],
            cache=self.cache,
            coarseness=self.coarseness,
            defer=defer,
            training=self.source is not None and self.source.learns,
            recompute=self.recompute,
        )
        follows = self.router_config.branches is Branches.shared and rows[0][0] != Branch.conditional
        if follows and before is not None and before.steps == context.steps:  # of the other branch
            context.step_decision = before.step_decision
        return context

    def end(self) -> None:
        """Free the caches, also for who keeps a context; the trace stays."""
        if self.cache is not None:
            self.cache.clear()
        self.cache = self.current = None

    @contextmanager
    def dense(self) -> Iterator[None]:
        """While it lasts, the model is the dense one."""
        before, self.settings = self.settings, replace(self.settings, elastic=False)
        try:
            yield
        finally:
            self.settings = before

    def forget(self) -> None:
        """Drop adapted weights of the blocks: the model moves to another device."""
        for block in self.blocks:
            block.forget()

    # ------------------------------------------------------------------------------------ called by the model

    @stays_eager
    def before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of the model: a pass starts. ValueError where it is another than was announced."""
        if not self.settings.elastic:
            return
        t = self.adapter.timestep(args, kwargs)
        if self.driver is not None and (self.current is None or not self.current.waiting):
            t = self.driver.announce(t)
        context = self.current
        if context is None or not context.waiting:
            raise ValueError("a forward pass that nobody announced: call session.step first")
        first = next(self.routers.parameters(), None)
        if first is not None and first.device != t.device:
            self.routers.to(t.device)  # no part of the model: they go where it is
        context.t, context.waiting = t.float(), False
        for name in ("dt", "budget", "branch"):
            value = getattr(context, name).float().to(t.device)
            if value.shape != t.shape:
                raise ValueError(f"a batch of {len(t)}, but {len(value)} values of {name}")
            setattr(context, name, value)
        if self.conditioner is not None and self.routers_run and context.step_decision is None:
            given, rows = (context.t, context.dt, context.budget, context.branch), self._deciding(context)
            context.modulation = self.conditioner(*(values[rows] for values in given))

    @stays_eager  # decisions stay eager; blocks are compiled by themselves
    def run(self, block: ElasticBlock, *args: Any, **kwargs: Any) -> Any:
        """The forward of a block, with its own signature and return value: what is decided of it is done."""
        if not (block.attached and self.settings.elastic):
            return block.forward(*args, **kwargs)
        call = block.bind(self.coarseness, args, kwargs)
        context, trace = self._pass(block, call)
        span = self.span(block)
        if block.index == span.start:
            context.entered[span.start] = call.streams
        if context.training:
            return block.adapter.pack(block.run_masked(context, call, self._decide(context, block, call)))
        # where all blocks do the same, the first settles it: then a pass waits for the device only here
        if block.index == 0 or not self.alike:  # again where activations are recomputed
            context.groups = self._groups(context, self._decide(context, block, call), span)
        if block.index == span.start:
            for action, rows in context.groups.items():
                trace.record([(context.steps[row], *context.rows[row]) for row in rows], span, action)
        return block.adapter.pack(block.run_routed(context, call, span))

    def _pass(self, block: ElasticBlock, call: BlockCall) -> tuple[StepContext, Trace]:
        """The pass that a block is called in: once, unless it is called again for the backward pass."""
        context, trace = self.current, self.trace
        if context is None or context.waiting or trace is None:
            raise ValueError(f"block {block.name} was called outside a forward pass of its model")
        if block.index in context.visited and not torch.is_grad_enabled():
            raise ValueError(f"block {block.name} was called twice in one forward pass")
        context.visited.add(block.index)
        first = context.rows[0][0]  # branch; in one pass both have the same lengths
        if block.index not in trace.flops[first]:
            trace.flops[first][block.index] = block.adapter.flops(block.inner, call.lengths)
            trace.router_flops[first][block.index] = self._router_flops(block, call)
            if self.router_config.branches is Branches.shared:
                trace.router_flops[Branch.unconditional][block.index] = 0
        return context, trace

    def _router_flops(self, block: ElasticBlock, call: BlockCall) -> int:
        """FLOPs a row of the router of a block; with that of the first one go those of the conditioner."""
        if block.router is None or self.conditioner is None or not self.routers_run:
            return 0
        weights = [] if block.index else [p for p in self.conditioner.parameters() if p.ndim > 1]
        return block.router.flops(call.lengths) + sum(2 * weight.numel() for weight in weights)

    def _decide(self, context: StepContext, block: ElasticBlock, call: BlockCall) -> RouteDecision:
        """The route of every row through a block: from its router, from the one decision of this step, or from the
        source."""
        routed, widths = None, self.router_config.widths
        if self.every_block:
            rows = torch.ones_like(context.t, dtype=torch.long)
            routed = context.step_decision = RouteDecision.fixed(rows > 0, rows * (widths - 1), widths)
        elif context.step_decision is not None and (block.index > 0 or context.modulation is None):
            routed = context.step_decision
        elif self.uses_routers:  # the first block, unless the other branch has decided
            routed = self._router_decision(context, block, call)
            context.step_decision = routed if self.router_config.scope is Scope.step else None
        decision = routed if self.source is None else self.source.decide(context, block.index, routed)
        assert decision is not None
        context.decisions.setdefault(block.index, decision)
        return decision

    def _router_decision(self, context: StepContext, block: ElasticBlock, call: BlockCall) -> RouteDecision:
        """What the router of a block says of every row; where samples share their routes, their mean holds."""
        config, router, rows = self.router_config, block.router, self._deciding(context)
        assert router is not None
        streams, modulation = tuple(x[rows] for x in block.adapter.seen(call)), context.modulation
        assert modulation is not None
        if self.source is not None:  # the model does not learn to please its routers
            streams = tuple(x.detach() for x in streams)
        age = None
        if config.longest:
            ages = torch.tensor(context.ages(self.span(block).start), device=context.t.device)
            age = ages.clamp_max(config.longest)[rows]
        logits = router(streams, modulation[:, block.index], age)
        logits = logits.repeat(len(context.t) // len(logits), 1)
        if self.settings.shared:
            by_branch = logits.unflatten(0, (-1, context.conditional_rows))
            logits = by_branch.mean(1, keepdim=True).expand_as(by_branch).flatten(0, 1)
        at, found = config.curves.times, config.curves.gate_bias
        bias = interpolated(context.t, at, found) if at else None
        return RouteDecision.from_logits(logits, config.threshold, bias)

    def _deciding(self, context: StepContext) -> slice:
        """The rows whose routers decide for all of a pass: where branches share their routes, those of the conditional
        one, which come first."""
        return slice(context.conditional_rows if self.router_config.branches is Branches.shared else None)

    def _groups(self, context: StepContext, decision: RouteDecision, span: range) -> Groups:
        """What a decision means for each row: run at a width, go on with a residual, or pass. Where one decision holds
        for all blocks, rows with nothing to go on with run: to skip all is no step. Samples that are deferred, though a
        row of them should run, pass and are noted."""
        config, cache, actions = self.router_config, context.cache, []
        reuses = cache is not None and config.scope is Scope.step and config.longest > 0
        found = torch.stack([decision.keep_prob, decision.width.float(), decision.keep.float()])
        for age, p, width, keep in zip(context.ages(span.start), *found.tolist(), strict=True):  # waits, once
            if cache is not None and cache.reuse(age, bool(keep), p, config.threshold):
                actions.append(REUSED)
            elif (reuses and not age) or (keep and not self.settings.width):
                actions.append(config.widths)
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
        whole = self.router_config.scope is Scope.step if self.source is None else self.source.alike
        cache = self.settings.cache
        return whole and (cache is None or cache.rule is not CacheRule.band)

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


def _one_each(value: Sequence[T] | T, count: int, what: str) -> list[T]:
    """A value for each of `count` samples, of one for all or of a list; ValueError for one of another length."""
    values = list(value) if isinstance(value, Sequence) else [value] * count
    if len(values) != count:
        raise ValueError(f"{len(values)} {what} for {count} samples")
    return values
