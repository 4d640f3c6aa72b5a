"""Low-rank updates of linear layers (LoRA, 2106.09685), as parametrizations: the layers stay `nn.Linear`s."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class LowRank(nn.Module):
    """weight (O,I) -> weight + up @ down; up starts at zero, so that nothing changes at first."""

    def __init__(self, out_features: int, in_features: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, in_features) * in_features**-0.5)
        self.up = nn.Parameter(torch.zeros(out_features, rank))

    def forward(self, weight: Tensor) -> Tensor:
        """(O,I) -> (O,I)."""
        return weight + self.up @ self.down


def add_low_rank(modules: Iterable[nn.Module], rank: int) -> None:
    """Give every linear layer inside `modules` a trainable low-rank update."""
    linears = [part for module in modules for part in module.modules() if type(part) is nn.Linear]
    for linear in linears:
        update = LowRank(linear.out_features, linear.in_features, rank)
        parametrize.register_parametrization(linear, "weight", update.to(linear.weight))


def merge_low_rank(modules: Iterable[nn.Module]) -> None:
    """Put the updates into the weights: plain layers again."""
    for part in [part for module in modules for part in module.modules()]:
        if parametrize.is_parametrized(part, "weight"):
            parametrize.remove_parametrizations(part, "weight")
