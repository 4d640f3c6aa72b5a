"""ElasticBlock: a block that asks its router first, and then bypasses, reuses, or runs where it is needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from elastic3d.routing.decision import RouteDecision
from elastic3d.routing.gates import gated, hard_width
from elastic3d.routing.protocol import BlockAdapter, BlockCall, BlockFlops, rows_index
from elastic3d.routing.router import Conditioner, Router, RouterInput
from elastic3d.routing.session import RoutingSession
from elastic3d.routing.trace import REUSED, SKIPPED
from elastic3d.routing.width import NarrowBlocks, masked


class ElasticBlock(nn.Module):
    """Wraps a block of a base model. Keys of the state dict, dotted names and attributes stay the block's
    own.

    The router is among `parameters()` and `modules()` (as `router.*`), but not in the state dict: base
    checkpoints are saved and loaded as if it was not there, and routers have their own file.
    """

    def __init__(
        self,
        inner: nn.Module,
        name: str,
        index: int,
        adapter: BlockAdapter,
        router: Router,
        conditioner: Conditioner | None,
        session: RoutingSession,
    ) -> None:
        super().__init__()
        self.inner = inner
        self.router = router
        self.conditioner = conditioner  # one module, shared by all blocks
        self.name, self.index, self.adapter, self.session = name, index, adapter, session
        self.sites = adapter.mlp_sites(inner)
        self.narrow = NarrowBlocks(inner, self.sites, session.router_config.ratios)
        self._flops: dict[tuple[int, ...], BlockFlops] = {}
        self.train(inner.training)
        self.register_load_state_dict_pre_hook(_keys_to_inner)

    # -------------------------------------------------------------------------------------------------- running

    @torch.compiler.disable(
        recursive=False
    )  # decisions stay eager; what they run is compiled in its own frame
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The block's own signature and return value."""
        session = self.session
        if not session.settings.elastic and session.recorded is None:
            return self.inner(*args, **kwargs)
        call = self.adapter.bind(self.inner, args, kwargs)
        if session.recorded is not None:
            return self.adapter.pack(self._recorded(call))
        decision = session.decide(self, call)
        assert session.current is not None
        streams = self._masked(call, decision) if session.current.masked else self._sparse(call, decision)
        return self.adapter.pack(streams)

    def route(self, given: RouterInput, modulation: Tensor | None, age: Tensor | None) -> Tensor:
        """What this block's router makes of it, with its part of the modulation (B,I,C): logits (B, 1 + K)."""
        own = None if modulation is None else modulation[:, self.index]
        return self.router(replace(given, modulation=own, age=age))

    def flops(self, lengths: tuple[int, ...]) -> BlockFlops:
        """FLOPs of one sample with `lengths` tokens in each stream."""
        if lengths not in self._flops:
            self._flops[lengths] = self.adapter.flops(self.inner, lengths)
        return self._flops[lengths]

    def _recorded(self, call: BlockCall) -> tuple[Tensor, ...]:
        """The dense block, and a note of what it added."""
        assert self.session.recorded is not None
        output = self.adapter.run(self.inner, call)
        added = tuple((y - x).detach() for x, y in zip(call.streams, output, strict=True))
        self.session.recorded[self.index] = added
        return output

    def _sparse(self, call: BlockCall, decision: RouteDecision) -> tuple[Tensor, ...]:
        """Each group of rows with the same action does just that; one group that is everybody is not
        gathered."""
        actions = self.session.plan(self, call, decision)
        groups: dict[int, list[int]] = {}
        for row, action in enumerate(actions):
            groups.setdefault(action, []).append(row)
        if len(groups) == 1:
            return self._act(call, actions[0], groups[actions[0]])
        output = tuple(stream.clone() for stream in call.streams)
        for action, rows in groups.items():
            if action != SKIPPED:
                index = rows_index(rows, output[0].device)
                for whole, part in zip(
                    output, self._act(self.adapter.take(call, index), action, rows), strict=True
                ):
                    whole[index] = part
        return output

    def _act(self, call: BlockCall, action: int, rows: Sequence[int]) -> tuple[Tensor, ...]:
        """One action for all rows of `call`, which are `rows` of the batch."""
        current, cache = self.session.current, self.session.cache
        assert current is not None
        if action == SKIPPED:
            return call.streams
        if action == REUSED:
            assert cache is not None
            return cache.apply(current.key(self.index), rows, current.step, call.streams)
        output = self.adapter.run(self.narrow.at(action - 1), call)
        if cache is not None:
            cache.store(current.key(self.index), rows, len(current.rows), current.step, call.streams, output)
        return output

    def _masked(self, call: BlockCall, decision: RouteDecision) -> tuple[Tensor, ...]:
        """Training: hard gates and width masks with straight-through gradients, on the rows that take
        part."""
        current = self.session.current
        assert current is not None
        closed = call.streams  # what comes out where the block is closed
        if current.recall is not None:
            added = current.recall.residuals(self.index)
            closed = tuple(x + r.to(x.dtype) for x, r in zip(closed, added, strict=True))
        if current.closed:
            current.ran_rows[self.index] = 0
            return closed
        weight: Tensor | None = None
        rows: Tensor | None = None
        if current.explored is not None:
            rows = (decision.keep | current.explored[:, self.index]).nonzero()[:, 0]
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

    def __setattr__(self, name: str, value: Any) -> None:
        """A part that is exchanged from outside (LoRA, quantisation) is exchanged in the wrapped block."""
        inner = self.__dict__.get("_modules", {}).get("inner")
        own = name in ("inner", "router", "conditioner")
        if isinstance(value, nn.Module) and inner is not None and name in inner._modules and not own:
            setattr(inner, name, value)
        else:
            super().__setattr__(name, value)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """The block moves: narrow copies that view its old weights would keep those in memory."""
        self.narrow.forget()
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
        yield from self.router.named_modules(memo, dot + "router", remove_duplicate)
        if self.conditioner is not None:
            yield from self.conditioner.named_modules(memo, dot + "conditioner", remove_duplicate)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped block's."""
        return self.inner.state_dict(*args, **kwargs)


def _keys_to_inner(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Keys of a base checkpoint find the wrapped block; it says nothing of routers, so they keep their
    values."""
    assert isinstance(module, ElasticBlock)
    for key in [key for key in state if key.startswith(prefix)]:
        state[f"{prefix}inner.{key.removeprefix(prefix)}"] = state.pop(key)
    own: Mapping[str, nn.Module | None] = {"router": module.router, "conditioner": module.conditioner}
    for name, child in own.items():
        if child is not None:
            for key, value in child.state_dict(prefix=f"{prefix}{name}.", keep_vars=True).items():
                state[key] = value
