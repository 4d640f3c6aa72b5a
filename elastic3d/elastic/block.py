"""ElasticBlock: gate * block(x) + (1 - gate) * x, with a gate for each sample, of E-DiT (2602.13993).

Training computes just that (`gated`). In a generation a gate is 0 or 1, so that each row runs (at its width), or goes
on with the residual of an earlier step, or passes. Where all blocks of a list do the same (a span of blocks), x is what
came into the first of them, block(x) what comes out of the last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from elastic3d.elastic.cache import Streams
from elastic3d.elastic.context import Groups, StepContext
from elastic3d.elastic.families import BlockAdapter, BlockCall, rows_index, take_rows
from elastic3d.elastic.few_step import FewStepLoRA, Key
from elastic3d.elastic.router import RouteDecision, Router
from elastic3d.elastic.session import ElasticSession
from elastic3d.elastic.trace import REUSED, SKIPPED
from elastic3d.elastic.width import NarrowBlocks, masked, stays_eager


def gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x, y = block(x) (B,L,D), gate (B,) of 0 or 1 -> gate * y + (1 - gate) * x (B,L,D), which is y or x exactly.

    A straight-through gate gets the gradient <gradient, y - x>. It is taken of the difference: in bf16 the gradients of
    the two products round away what little a block changes.
    """
    gate = gate.to(x.dtype)[:, None, None]
    slope = gate - gate.detach()
    return torch.where(gate > 0.5, y, x) + slope * (y - x).detach()


@dataclass(eq=False, repr=False)
class ElasticBlock:
    """Stands where a block of a base model has its `forward`, and calls that, or not.

    The block stays the module that it is, in its place, with its parameters, hooks and names; the router is no part of
    it, so that base checkpoints are saved and loaded as if it was not there.
    """

    session: ElasticSession
    inner: nn.Module
    adapter: BlockAdapter
    router: Router | None  # None where another block's decides
    name: str
    index: int  # in the order of execution
    stage: range  # the indices of all blocks of its list
    few_step: FewStepLoRA | None = None  # of its weights, for generations with few model evaluations

    def __post_init__(self) -> None:
        config = self.session.router_config
        self.sites = self.adapter.mlp_sites(self.inner) if config.widths > 1 else ()
        self._before = self.inner.__dict__.get("forward")  # of somebody who replaced it earlier
        self.narrow = NarrowBlocks(self.inner, self.inner.forward, self.sites, config.ratios)
        if config.few_step_rank:
            device = next(self.inner.parameters()).device
            self.few_step = FewStepLoRA(self.inner, config.few_step_rank).to(device)
        self._adapted: tuple[Key, NarrowBlocks] | None = None
        self._attached = False

    def attach(self) -> None:
        """From now on the block's forward is this."""
        self._attached = True
        self.inner.__dict__.update({"forward": self, "compile": self.compile})

    def detach(self) -> None:
        """The block is what it was."""
        self._attached = False  # for somebody who wrapped this forward and calls it still
        own = self.inner.__dict__
        own.pop("compile", None)
        if own.get("forward") is self:
            del own["forward"]
            if self._before is not None:
                own["forward"] = self._before

    # -------------------------------------------------------------------------------------------------- running

    @stays_eager  # decisions stay eager; blocks are compiled by themselves, see `compile`
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The block's own signature and return value."""
        session = self.session
        if not (self._attached and session.settings.elastic):
            return self.narrow.full(*args, **kwargs)
        call = self.adapter.bind(self.inner, args, kwargs)
        context, span = session.visit(self, call), session.span(self)
        if self.index == span.start:
            context.entered[span.start] = call.streams
        if context.training:
            output = self._masked(context, call, session.decide(context, self, call))
        else:
            output = self._grouped(context, call, session.route(context, self, call), span)
        return self.adapter.pack(output)

    def _masked(self, context: StepContext, call: BlockCall, decision: RouteDecision) -> Streams:
        """Training: the gate straight through, the block with its MLPs masked."""
        cache, x, keep = self.session.cache, self._skipped(context, call), decision.keep
        y = self._run(partial(self._at_width, self.running(), call, decision.hard_width()))
        if cache is not None and (ran := keep.nonzero()[:, 0].tolist()):
            kept = tuple(stream[keep] for stream in y)
            cache.store(*context.entries(self.index, ran), take_rows(call.streams, ran), kept)
        return tuple(gated(*pair, decision.hard_keep()) for pair in zip(x, y, strict=True))

    def _skipped(self, context: StepContext, call: BlockCall) -> Streams:
        """Training: what comes out where the block is skipped, which is what came in, and what is remembered."""
        cache, x = self.session.cache, call.streams
        if cache is None:
            return x
        ages = cache.ages(*context.entries(self.index, range(len(context.rows))))
        known = [row for row, age in enumerate(ages) if age]
        if not known:
            return x
        index = torch.tensor(known, device=x[0].device)
        found = cache.apply(*context.entries(self.index, known), take_rows(x, known))
        return tuple(whole.index_copy(0, index, part) for whole, part in zip(x, found, strict=True))

    def _at_width(self, blocks: NarrowBlocks, call: BlockCall, width: Tensor) -> Streams:
        """The whole block, its MLPs masked to one-hot widths (B,K)."""
        with masked(blocks.block, self.sites, width, blocks.ratios):
            return self.adapter.run(blocks.full, call)

    def _grouped(self, context: StepContext, call: BlockCall, groups: Groups, span: range) -> Streams:
        """A generation: each group of rows its action; one that is everybody is not gathered."""
        if len(groups) == 1:
            ((action, rows),) = groups.items()
            return self._act(context, call, action, rows, span)
        output = tuple(stream.clone() for stream in call.streams)
        for action, rows in groups.items():
            if action > SKIPPED or (action == REUSED and self.index == span[-1]):
                index = rows_index(rows, output[0].device)
                found = self._act(context, self.adapter.take(call, index), action, rows, span)
                for whole, part in zip(output, found, strict=True):
                    whole[index] = part
        return output

    def _act(
        self, context: StepContext, call: BlockCall, action: int, rows: Sequence[int], span: range
    ) -> Streams:
        """One action for all rows of `call`, which are `rows` of the batch: run at a width, pass, or reuse. Rows that
        reuse pass a span unchanged, and get all that it adds at its end."""
        cache, output = self.session.cache, call.streams
        if action > SKIPPED:
            output = self._run(partial(self.adapter.run, self.running().at(action - 1), call))
        if cache is None or action == SKIPPED or self.index != span[-1]:
            return output
        where, entered = context.entries(span.start, rows), take_rows(context.entered[span.start], rows)
        if action == REUSED:
            return cache.apply(*where, entered)
        cache.store(*where, entered, output)
        return output

    def _run(self, block: Callable[[], Streams]) -> Streams:
        """What a block puts out; its activations are kept for the backward pass, or computed again there."""
        if self.session.recompute and torch.is_grad_enabled():
            return checkpoint(block, use_reentrant=False, preserve_rng_state=False)
        return block()

    # ------------------------------------------------------------------------------------- what it is made of

    def running(self) -> NarrowBlocks:
        """The block at its widths, with its few-step LoRA in a generation that uses it."""
        coarse = self.session.coarseness
        if self.few_step is None or coarse is None:
            return self.narrow
        if self._adapted is None:
            twin, state = self.few_step.adapted(self.inner, coarse), self.few_step.state(self.inner, coarse)
            narrow = NarrowBlocks(twin, twin.forward, self.sites, self.narrow.ratios)
            narrow.compile(self.narrow.compile_arguments)
            self._adapted = (state, narrow)
        return self._adapted[1]

    def refresh(self, coarse: float | None) -> None:
        """A generation of this coarseness begins: what an earlier one made of the few-step LoRA goes, unless it
        holds still. With gradients it never does: each generation has a graph of its own."""
        if self._adapted is None or self.few_step is None or coarse is None:
            return
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in self.few_step.parameters())
        if learns or self._adapted[0] != self.few_step.state(self.inner, coarse):
            self._adapted = None

    def forget(self) -> None:
        """Drop the copies of the block, which may hold weights on a device that it has left."""
        self.narrow.forget()
        self._adapted = None

    def compile(self, **arguments: Any) -> None:
        """Compile the block and, as they are made, its narrow copies; decisions stay eager."""
        self.narrow.compile(arguments)
        self._adapted = None
