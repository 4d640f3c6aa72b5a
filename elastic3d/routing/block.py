"""ElasticBlock: a block that asks its router first, and then bypasses, reuses, or runs where it is needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from elastic3d.routing.compiling import stays_eager
from elastic3d.routing.decision import RouteDecision
from elastic3d.routing.gates import gated, hard_width
from elastic3d.routing.passes import Groups
from elastic3d.routing.protocol import BlockAdapter, BlockCall, BlockFlops, rows_index
from elastic3d.routing.router import Conditioner, Router, RouterInput
from elastic3d.routing.session import RoutingSession
from elastic3d.routing.trace import REUSED, SKIPPED
from elastic3d.routing.updates import BlockUpdates, Key
from elastic3d.routing.width import NarrowBlocks, masked


@dataclass(frozen=True)
class Place:
    """Where a block is in its model: its dotted name, its number, and the numbers of all blocks of its list."""

    name: str
    index: int
    stage: range


class ElasticBlock(nn.Module):
    """Wraps a block of a base model. Keys of the state dict, dotted names and attributes stay the block's
    own.

    The router is among `parameters()` and `modules()` (as `router.*`), but not in the state dict: base
    checkpoints are saved and loaded as if it was not there, and routers have their own file.
    """

    def __init__(
        self,
        inner: nn.Module,
        place: Place,
        adapter: BlockAdapter,
        router: Router | None,
        conditioner: Conditioner | None,
        session: RoutingSession,
    ) -> None:
        super().__init__()
        self.inner = inner
        self.router = router  # None where another block's decides
        self.conditioner = conditioner  # one module, shared by all blocks
        self.name, self.index, self.stage = place.name, place.index, place.stage
        self.adapter, self.session = adapter, session
        self.sites = adapter.mlp_sites(inner)
        self.narrow = NarrowBlocks(inner, self.sites, session.router_config.ratios)
        self.updates = None  # of the block's weights, for generations with few calls
        if rank := session.router_config.updates:
            self.updates = BlockUpdates(inner, rank).to(next(inner.parameters()).device)
        self._updated: tuple[Key, NarrowBlocks] | None = None
        self._flops: dict[tuple[int, ...], BlockFlops] = {}
        self.train(inner.training)
        self.register_load_state_dict_pre_hook(_keys_to_inner)

    # -------------------------------------------------------------------------------------------------- running

    @stays_eager  # decisions do; what they run is compiled in its own frame
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The block's own signature and return value."""
        session = self.session
        if not session.settings.elastic and session.recorded is None:
            return self.inner(*args, **kwargs)
        settled = session.settled(self)
        if settled is not None and len(settled) == 1 and min(settled) > SKIPPED:
            return self.running().at(min(settled) - 1)(*args, **kwargs)
        call = self.adapter.bind(self.inner, args, kwargs)
        span = session.span(self)
        if settled is not None:
            return self.adapter.pack(self._grouped(call, settled, span))
        if self.index == span.start:
            session.entered[span.start] = call.streams
        if session.recorded is not None:
            return self.adapter.pack(self._recorded(call, span))
        decision = session.decide(self, call)
        assert session.current is not None
        run = self._masked if session.current.masked else self._sparse
        return self.adapter.pack(run(call, decision, span))

    def running(self) -> NarrowBlocks:
        """The block at its widths, with its updates in a generation that uses them."""
        coarse = self.session.coarseness
        if self.updates is None or coarse is None:
            return self.narrow
        if self._updated is None:
            twin, state = self.updates.updated(self.inner, coarse), self.updates.state(self.inner, coarse)
            if self.narrow.compile_arguments is not None:
                twin.compile(**self.narrow.compile_arguments)
            narrow = NarrowBlocks(twin, self.sites, self.narrow.ratios)
            narrow.compile_arguments = self.narrow.compile_arguments
            self._updated = (state, narrow)
        return self._updated[1]

    def refresh(self, coarse: float | None) -> None:
        """A generation of this coarseness begins: what an earlier one made of the updates goes, unless it holds still.
        With gradients it never does: each generation has a graph of its own."""
        if self._updated is None or self.updates is None or coarse is None:
            return
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in self.updates.parameters())
        if learns or self._updated[0] != self.updates.state(self.inner, coarse):
            self._updated = None

    def route(self, given: RouterInput, modulation: Tensor | None, age: Tensor | None) -> Tensor:
        """What this block's router makes of it, with its part of the modulation (B,I,C): logits (B, 1 + K)."""
        assert self.router is not None
        own = None if modulation is None else modulation[:, self.index]
        return self.router(replace(given, modulation=own, age=age))

    def flops(self, lengths: tuple[int, ...]) -> BlockFlops:
        """FLOPs of one sample with `lengths` tokens in each stream."""
        if lengths not in self._flops:
            self._flops[lengths] = self.adapter.flops(self.inner, lengths)
        return self._flops[lengths]

    def _recorded(self, call: BlockCall, span: range) -> tuple[Tensor, ...]:
        """The dense block, and at the end of a span a note of what it added."""
        session = self.session
        assert session.recorded is not None
        output = self.adapter.run(self.inner, call)
        if self.index == span[-1]:
            added = zip(session.entered[span.start], output, strict=True)
            session.recorded[span.start] = tuple((y - x).detach() for x, y in added)
        return output

    def _sparse(self, call: BlockCall, decision: RouteDecision, span: range) -> tuple[Tensor, ...]:
        """Each group of rows with the same action does just that."""
        return self._grouped(call, self.session.plan(self, call, decision), span)

    def _grouped(self, call: BlockCall, groups: Groups, span: range) -> tuple[Tensor, ...]:
        """Each group its action; one that is everybody is not gathered. What is reused is added at a span's end."""
        if len(groups) == 1:
            ((action, rows),) = groups.items()
            return self._act(call, action, rows, span)
        ends = self.index == span[-1]
        output = tuple(stream.clone() for stream in call.streams)
        for action, rows in groups.items():
            if action > SKIPPED or (action == REUSED and ends):
                index = rows_index(rows, output[0].device)
                found = self._act(self.adapter.take(call, index), action, rows, span)
                for whole, part in zip(output, found, strict=True):
                    whole[index] = part
        return output

    def _act(self, call: BlockCall, action: int, rows: Sequence[int], span: range) -> tuple[Tensor, ...]:
        """One action for all rows of `call`, which are `rows` of the batch.

        Rows that reuse pass a span unchanged, and get all that it adds at its end.
        """
        session, ends = self.session, self.index == span[-1]
        current, cache = session.current, session.cache
        assert current is not None
        if action == SKIPPED or (action == REUSED and not ends):
            return call.streams
        output = call.streams if action == REUSED else self.adapter.run(self.running().at(action - 1), call)
        if cache is None or not ends:
            return output
        key, entered, when = current.key(span.start), session.entered[span.start], current.when.some(rows)
        if len(rows) < len(current.rows):
            index = rows_index(rows, entered[0].device)
            entered = tuple(stream[index] for stream in entered)
        if action == REUSED:
            return cache.apply(key, when, entered)
        cache.store(key, when, entered, output)
        return output

    def _masked(self, call: BlockCall, decision: RouteDecision, span: range) -> tuple[Tensor, ...]:
        """Training: hard gates and width masks with straight-through gradients, on the rows that take
        part. Of a span of several blocks the gates act at its end."""
        current, ends = self.session.current, self.index == span[-1]
        assert current is not None
        closed = call.streams  # what comes out where the block is closed
        if ends:
            closed = self.session.entered[span.start]
            if current.recall is not None:
                added = current.recall.residuals(span.start)
                closed = tuple(x + r.to(x.dtype) for x, r in zip(closed, added, strict=True))
        if current.closed:
            current.ran_rows[self.index] = 0
            return closed
        weight: Tensor | None = None
        rows: Tensor | None = None
        if current.explored is not None:
            rows = (decision.keep | current.explored[:, span.start]).nonzero()[:, 0]
            current.ran_rows[self.index] = len(rows)
            share = current.explored.float().mean().clamp_min(1e-3)
            weight = torch.where(decision.keep, 1.0, 1 / share)[rows]
            if len(rows) == 0:
                if not current.lockstep:
                    return closed
                rows, weight = rows.new_zeros(1), weight.new_zeros(1)  # closed, and its gate learns nothing
        part = call if rows is None else self.adapter.take(call, rows)
        keep, keep_prob, width = decision.keep, decision.keep_prob, hard_width(decision)
        if rows is not None:
            keep, keep_prob, width = keep[rows], keep_prob[rows], width[rows]
        current.ran_rows.setdefault(self.index, len(keep))
        with masked(self.inner, self.sites, width, self.session.router_config.ratios):
            output = self.adapter.run(self.inner, part)
        mixed = output
        if ends:
            base = closed if rows is None else tuple(x[rows] for x in closed)
            mixed = tuple(gated(x, y, keep, keep_prob, weight) for x, y in zip(base, output, strict=True))
        if rows is None:
            return mixed
        return tuple(x.index_copy(0, rows, y.to(x.dtype)) for x, y in zip(closed, mixed, strict=True))

    # ---------------------------------------------------------------------------- looking like the wrapped block

    def compile(self, **arguments: Any) -> None:
        """Compile the block and, as they are made, its narrow copies; decisions stay eager."""
        self.inner.compile(**arguments)
        self.narrow.compile_arguments = dict(arguments)
        self._updated = None

    def __setattr__(self, name: str, value: Any) -> None:
        """A part that is exchanged from outside (LoRA, quantisation) is exchanged in the wrapped block."""
        inner = self.__dict__.get("_modules", {}).get("inner")
        own = name in ("inner", "router", "conditioner", "updates")
        if isinstance(value, nn.Module) and inner is not None and name in inner._modules and not own:
            setattr(inner, name, value)
        else:
            super().__setattr__(name, value)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """The block moves: copies that view its old weights would keep those in memory."""
        self.narrow.forget()
        self._updated = None
        return super()._apply(fn, recurse)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "inner":
                raise
            return getattr(self.inner, name)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """The wrapped block's modules by the names they have without the wrapper, and the router's."""
        memo = set() if memo is None else memo
        if self in memo:
            return
        if remove_duplicate:
            memo.add(self)
        yield prefix, self
        yield from self.inner.named_modules(memo, prefix, remove_duplicate)
        dot = prefix + "." if prefix else ""
        for name, own in self._own():
            if own is not None:
                yield from own.named_modules(memo, dot + name, remove_duplicate)

    def _own(self) -> tuple[tuple[str, nn.Module | None], ...]:
        """What the wrapper adds to the block."""
        return ("router", self.router), ("conditioner", self.conditioner), ("updates", self.updates)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped block's."""
        return self.inner.state_dict(*args, **kwargs)


def _keys_to_inner(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Keys of a base checkpoint find the wrapped block; it says nothing of routers, so they keep their
    values."""
    assert isinstance(module, ElasticBlock)
    for key in [key for key in state if key.startswith(prefix)]:
        state[f"{prefix}inner.{key.removeprefix(prefix)}"] = state.pop(key)
    for name, child in module._own():
        if child is not None:
            for key, value in child.state_dict(prefix=f"{prefix}{name}.", keep_vars=True).items():
                state[key] = value
