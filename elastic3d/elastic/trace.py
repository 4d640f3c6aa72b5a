"""The record of a generation: what every block did, for every sample, branch and step, and its FLOPs (two a
multiply-add, matrix products only)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from elastic3d.elastic.families import BlockFlops

NOT_RUN, REUSED, SKIPPED = -2, -1, 0  # actions; k in 1..K: ran at width number k - 1
_SYMBOLS = "c.123456789ABCDEF0"  # of actions from REUSED on


@dataclass
class Trace:
    """Actions of S steps, 2 branches, B samples and I blocks, and what they cost.

    `blocks` are names, `ratios` the K widths; `flops` and `router_flops` hold, by branch, one entry a block once it was
    called: the unconditional branch has its own where it runs by itself, and else those of the conditional one.
    `one_branch`: at some steps the conditional one runs alone, where the dense model runs both. `actions` (S,2,B,I)
    int8 are NOT_RUN, REUSED, SKIPPED, or 1 + the width's number.
    """

    blocks: list[str]
    ratios: tuple[float, ...]
    steps: int
    samples: int
    one_branch: bool = False
    flops: tuple[dict[int, BlockFlops], dict[int, BlockFlops]] = field(default_factory=lambda: ({}, {}))
    router_flops: tuple[dict[int, int], dict[int, int]] = field(default_factory=lambda: ({}, {}))
    actions: Tensor = field(init=False)

    def __post_init__(self) -> None:
        shape = self.steps, 2, self.samples, len(self.blocks)
        self.actions = torch.full(shape, NOT_RUN, dtype=torch.int8, device="cpu")

    def record(self, rows: Sequence[tuple[int, int, int]], blocks: range, action: int) -> None:
        """Note one action of some blocks for rows (step, branch, sample)."""
        steps, branches, samples = map(list, zip(*rows, strict=True))
        self.actions[steps, branches, samples, blocks.start : blocks.stop] = action

    def by_branch(self, known: Sequence[Mapping[int, Any]], of: Callable[[Any], int] = int) -> Tensor:
        """A number of the entry of each block (2,1,I) fp64, 0 of a block without one."""
        both = known[0], {**known[0], **known[1]}
        found = [[[of(each[i]) if i in each else 0 for i in range(len(self.blocks))]] for each in both]
        return torch.tensor(found, dtype=torch.float64)

    def sample(self, index: int) -> list[list[str]]:
        """One sample's actions by step and branch that ran, a character a block.

        `.` skipped, `c` an earlier residual, else the number of the width, 1..K (K at most 16: hexadecimal, 0 is 16).
        """
        return [
            ["".join(_SYMBOLS[a - REUSED] for a in branch) for branch in step if branch[0] != NOT_RUN]
            for step in self.actions[:, :, index].tolist()
        ]


def parse_actions(steps: Sequence[Sequence[str]], blocks: int) -> Tensor:
    """One sample's actions (S,2,I) from what `Trace.sample` wrote; a branch that did not run is NOT_RUN."""
    actions = torch.full((len(steps), 2, blocks), NOT_RUN)
    for step, branches in enumerate(steps):
        for branch, symbols in enumerate(branches):
            actions[step, branch] = torch.tensor([_SYMBOLS.index(each) + REUSED for each in symbols])
    return actions


def trace_flops(trace: Trace) -> Tensor:
    """Executed FLOPs (S,2,B,I) fp64 of the blocks; a reused residual costs none. Routers are not in it."""
    ratio = torch.tensor([0.0, 0.0, 0.0, *trace.ratios], dtype=torch.float64)[trace.actions.long() + 2]
    fixed, mlp = (trace.by_branch(trace.flops, attrgetter(name)) for name in ("fixed", "mlp"))
    return (trace.actions > SKIPPED) * fixed + ratio * mlp


def trace_dense_flops(trace: Trace) -> Tensor:
    """FLOPs (S,2,B,I) fp64 of dense blocks on the same passes, and on the branch that the dense model runs as well."""
    ran, dense = trace.actions != NOT_RUN, trace.by_branch(trace.flops, attrgetter("dense"))
    return (ran[:, :1].expand_as(ran) if trace.one_branch else ran) * dense


def trace_router_flops(trace: Trace) -> Tensor:
    """FLOPs (S,2,B,I) fp64 of the routers themselves, the conditioner with those of the first block."""
    return (trace.actions != NOT_RUN) * trace.by_branch(trace.router_flops)


def trace_share(trace: Trace) -> Tensor:
    """Executed share (B,) of the dense blocks' FLOPs of each sample, over all steps and branches."""
    return trace_flops(trace).sum((0, 1, 3)) / trace_dense_flops(trace).sum((0, 1, 3))
