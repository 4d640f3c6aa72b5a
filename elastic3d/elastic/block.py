"""ElasticBlock: y = x + g * (B(x) - x) for a block B, with a gate g of 0 or 1 for each sample, as E-DiT (2602.13993).

With reuse, x stands for what comes out of a skipped block: its input plus the residual that it added at an earlier
step. Training computes just that line (`gated`), so that the gate gets a gradient. In a generation each row runs (at
its width), or reuses a residual, or passes. Where all blocks of a list do the same (a span of blocks), x is what came
into the first of them, B(x) what comes out of the last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from elastic3d.elastic.cache import Streams
from elastic3d.elastic.context import StepContext
from elastic3d.elastic.families import BlockAdapter, BlockCall, MLPSite
from elastic3d.elastic.few_step import FewStepLoRA, Key
from elastic3d.elastic.router import RouteDecision, Router
from elastic3d.elastic.rows import rows_index, take_rows
from elastic3d.elastic.trace import REUSED, SKIPPED
from elastic3d.elastic.width import exchanged, masked, sliced

Width = int | Tensor  # the number of a width, or one-hot widths (B,K) of a training


def gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x, y = B(x) (B,L,D), gate (B,) of 0 or 1 -> x + gate * (y - x) (B,L,D), which is y or x exactly.

    A straight-through gate gets the gradient <gradient, y - x>. It is taken of the difference: in bf16 the gradients of
    the two products gate * y and (1 - gate) * x round away what little a block changes.
    """
    gate = gate.to(x.dtype)[:, None, None]
    slope = gate - gate.detach()
    return torch.where(gate > 0.5, y, x) + slope * (y - x).detach()


@dataclass(eq=False, repr=False)
class ElasticBlock:
    """A block of a base model, its router, and what is done with a decision.

    The block stays the module that it is, in its place, with its parameters, hooks and names; the router is no part of
    it, so that base checkpoints are saved and loaded as if it was not there.
    """

    inner: nn.Module
    adapter: BlockAdapter
    name: str
    index: int  # in the order of execution
    stage: range  # the indices of all blocks of its list
    ratios: Sequence[float]  # the K widths
    router: Router | None = None  # None where another block's decides
    few_step: FewStepLoRA | None = None  # of its weights, for generations with few model evaluations

    def __post_init__(self) -> None:
        self.site: MLPSite | None = self.adapter.mlp_site(self.inner) if len(self.ratios) > 1 else None
        self._base: Callable[..., Any] = self.inner.forward  # which a router stands before
        self.forward = self._base  # compiled on request
        self._before = self.inner.__dict__.get("forward")  # of somebody who replaced it earlier
        self._stand_in: Callable[..., Any] | None = None
        self._adapted: tuple[Key | None, dict[str, Tensor]] | None = None

    def attach(self, forward: Callable[..., Any]) -> None:
        """From now on the block's forward is this one, which is given the block first."""
        self._stand_in = partial(forward, self)
        self.inner.__dict__.update({"forward": self._stand_in, "compile": self.compile})

    def detach(self) -> None:
        """The block is what it was."""
        own = self.inner.__dict__
        own.pop("compile", None)
        if own.get("forward") is self._stand_in:
            del own["forward"]
            if self._before is not None:
                own["forward"] = self._before
        self._stand_in = None

    @property
    def attached(self) -> bool:
        """False for somebody who wrapped the forward of an attached block, and calls it still."""
        return self._stand_in is not None

    def bind(self, coarse: float | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BlockCall:
        """The call of the block. What this computes already, the joint of a long skip, has the adapted weights too."""
        with exchanged(self.inner, self.adapted(coarse)):
            return self.adapter.bind(self.inner, args, kwargs)

    # ---------------------------------------------------------------------------------------- in training

    def run_masked(self, context: StepContext, call: BlockCall, decision: RouteDecision) -> Streams:
        """Every row runs, with its MLP masked, and gradients reach the decision straight through."""
        x, y = self._skipped(context, call), self._run(context, call, decision.hard_width())
        if context.cache is not None and (ran := decision.keep.nonzero()[:, 0].tolist()):
            kept = tuple(stream[decision.keep] for stream in y)
            context.cache.store(*context.entries(self.index, ran), take_rows(call.streams, ran), kept)
        return tuple(gated(*pair, decision.hard_keep()) for pair in zip(x, y, strict=True))

    def _skipped(self, context: StepContext, call: BlockCall) -> Streams:
        """What comes out where the block is skipped: what came in, and what is remembered."""
        x = call.streams
        known = [row for row, age in enumerate(context.ages(self.index)) if age]
        if context.cache is None or not known:
            return x
        index = torch.tensor(known, device=x[0].device)
        found = context.cache.apply(*context.entries(self.index, known), take_rows(x, known))
        return tuple(whole.index_copy(0, index, part) for whole, part in zip(x, found, strict=True))

    # -------------------------------------------------------------------------------------- in a generation

    def run_routed(self, context: StepContext, call: BlockCall, span: range) -> Streams:
        """Each group of rows its action; one that is everybody is not gathered."""
        if len(context.groups) == 1:
            ((action, rows),) = context.groups.items()
            return self._act(context, call, action, rows, span)
        output = tuple(stream.clone() for stream in call.streams)
        for action, rows in context.groups.items():
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
        cache, output = context.cache, call.streams
        if action > SKIPPED:
            output = self._run(context, call, action - 1)
        if cache is None or action == SKIPPED or self.index != span[-1]:
            return output
        where, entered = context.entries(span.start, rows), take_rows(context.entered[span.start], rows)
        if action == REUSED:
            return cache.apply(*where, entered)
        cache.store(*where, entered, output)
        return output

    # ------------------------------------------------------------------------------------- the block itself

    def _run(self, context: StepContext, call: BlockCall, width: Width) -> Streams:
        """B(x) at a width; activations are kept for the backward pass, or computed again there."""
        weights = self.adapted(context.coarseness)

        def run() -> Streams:
            with exchanged(self.inner, weights), self._at(width):
                return self.adapter.run(self.forward, call)

        if context.recompute and torch.is_grad_enabled():
            return checkpoint(run, use_reentrant=False, preserve_rng_state=False)
        return run()

    def _at(self, width: Width) -> AbstractContextManager[Any]:
        """While it lasts, the block's MLP has this width."""
        if self.site is None:
            return nullcontext()
        if isinstance(width, Tensor):
            return masked(self.inner, self.site, width, self.ratios)
        if width == len(self.ratios) - 1:
            return nullcontext()
        return sliced(self.inner, self.site, self.ratios[width])

    def adapted(self, coarse: float | None) -> dict[str, Tensor]:
        """What stands in for the block's weights in a generation of this coarseness, by name: nothing, or those with
        the few-step LoRA."""
        if self.few_step is None or coarse is None:
            return {}
        if self._adapted is None:
            weights = self.few_step.adapted(self.inner, coarse)
            learns = any(weight.requires_grad for weight in weights.values())
            self._adapted = None if learns else self.few_step.state(self.inner, coarse), weights
        return self._adapted[1]

    def refresh(self, coarse: float | None) -> None:
        """A generation of this coarseness begins: adapted weights of an earlier one go, unless they hold still. With
        gradients they never do: each generation has a graph of its own."""
        if self._adapted is None or self.few_step is None or coarse is None:
            return
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in self.few_step.parameters())
        if learns or self._adapted[0] != self.few_step.state(self.inner, coarse):
            self._adapted = None

    def forget(self) -> None:
        """Drop adapted weights, which may lie on a device that the block has left."""
        self._adapted = None

    def compile(self, **arguments: Any) -> None:
        """Compile the block; decisions stay eager."""
        self.forward = torch.compile(self._base, **arguments)
