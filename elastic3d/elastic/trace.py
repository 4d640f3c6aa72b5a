"""The record of a generation: what every block did, for every sample, branch and step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from elastic3d.elastic.family import BlockFlops

NOT_RUN, REUSED, SKIPPED = -2, -1, 0  # actions; k in 1..K: ran at width number k - 1


@dataclass
class Trace:
    """Actions of S steps, 2 branches, B samples and I blocks, and what they cost.

    `blocks` are names, `ratios` the K widths; `flops` and `router_flops` hold one entry a block once it was
    called. `one_branch`: at some steps the conditional one runs alone, where the
    dense model runs both.
    """

    blocks: list[str]
    ratios: tuple[float, ...]
    steps: int
    samples: int
    one_branch: bool = False
    flops: dict[int, BlockFlops] = field(default_factory=dict)
    router_flops: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._actions = [
            [[[NOT_RUN] * len(self.blocks) for _ in range(self.samples)] for _ in range(2)]
            for _ in range(self.steps)
        ]

    def record(self, rows: Sequence[tuple[int, int, int]], blocks: range, action: int) -> None:
        """Note one action of some blocks for rows (step, branch, sample)."""
        for step, branch, sample in rows:
            self._actions[step][branch][sample][blocks.start : blocks.stop] = [action] * len(blocks)

    @property
    def actions(self) -> Tensor:
        """(S,2,B,I) int8: NOT_RUN, REUSED, SKIPPED, or 1 + the width's number."""
        return torch.tensor(self._actions, dtype=torch.int8)

    def sample(self, index: int) -> list[list[str]]:
        """One sample's actions by step and branch that ran, a character a block.

        `.` skipped, `c` an earlier residual, else the number of the width, 1..K (K at most 16: hexadecimal, 0 is 16).
        """
        return [
            ["".join(map(_symbol, branch[index])) for branch in branches if branch[index][0] != NOT_RUN]
            for branches in self._actions
        ]


def _symbol(action: int) -> str:
    return "c" if action == REUSED else "." if action == SKIPPED else f"{action % 16:X}"


def parse_actions(steps: Sequence[Sequence[str]], blocks: int) -> Tensor:
    """One sample's actions (S,2,I) from what `Trace.sample` wrote; a branch that did not run is NOT_RUN."""
    actions = torch.full((len(steps), 2, blocks), NOT_RUN)
    for step, branches in enumerate(steps):
        for branch, symbols in enumerate(branches):
            actions[step, branch] = torch.tensor(list(map(_action, symbols)))
    return actions


def _action(symbol: str) -> int:
    return REUSED if symbol == "c" else SKIPPED if symbol == "." else int(symbol, 16) or 16
