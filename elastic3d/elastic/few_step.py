"""The few-step LoRA: a low-rank adaptation of the blocks for generations with few model evaluations (NFE).

A dense model follows its path with many small steps. With an NFE of a handful each step
stands for a long piece of the path, which the dense weights were not trained for; the LoRA is. It belongs to the
routers: it is saved with them, and the model without routers, or with `elastic=false`, runs without it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from elastic3d.elastic.config import RouterConfig
from elastic3d.elastic.width import plain_linear

Key = tuple[object, ...]


def coarseness(
    config: RouterConfig, steps: int, budget: float, guidance: float | None, share: float = 1.0
) -> float | None:
    """How coarse a generation is: log2 of the largest NFE that the LoRA covers over this generation's NFE.

    0 at the largest NFE, 1 at half of it; None where the LoRA is not used: a larger NFE, more steps, another
    `guidance` than it has learned. `share` of the dense evaluations is all that a generation with learned guidance
    makes; its budget is spent on those. Per-block routers evaluate the model at every step, whatever their budget."""
    if config.few_step_guidance not in (None, guidance) or steps > (config.few_step_max_steps or steps):
        return None
    if config.trained_steps:
        budget = share = 1.0
    nfe = round(steps * budget, 6)  # a budget that is a rounded share of the steps must not miss the limit
    if not config.few_step_rank or nfe > config.few_step_nfe:
        return None
    return math.log2(config.few_step_nfe / min(max(nfe, 1e-6) / share, steps))


def least_default(config: RouterConfig, times: Sequence[float], guidance: float | None) -> float:
    """What a model's default budget is at least in a generation with steps at these times: 1 where the few-step LoRA
    covers every block, as routes on top of it lose; the smallest that per-block routers know."""
    if config.trained_steps:
        return config.least_budget(times)
    return float(coarseness(config, len(times), 1.0, guidance) is not None)


class LowRankUpdate(nn.Module):
    """weight (O,I) -> weight + up diag(1 + slope c) down, c being the coarseness (LoRA, 2106.09685, with a gain for
    each direction). `up` starts at zero, so that nothing changes at first."""

    def __init__(self, out_features: int, in_features: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, in_features) * in_features**-0.5)
        self.up = nn.Parameter(torch.zeros(out_features, rank))
        self.slope = nn.Parameter(torch.zeros(rank))

    def forward(self, weight: Tensor, coarse: float) -> Tensor:
        """(O,I) -> (O,I), in the weight's own format."""
        change = (self.up * (1 + coarse * self.slope)) @ self.down
        return weight + change.to(weight.dtype)


class FewStepLoRA(nn.Module):
    """A low-rank update of every linear layer of one block."""

    def __init__(self, block: nn.Module, rank: int) -> None:
        super().__init__()
        self.parts = nn.ModuleDict()
        for name, part in block.named_modules():
            if type(part) is nn.Linear:
                lora = LowRankUpdate(part.out_features, part.in_features, rank)
                self.parts[name.replace(".", "/")] = lora

    def adapted(self, block: nn.Module, coarse: float) -> dict[str, Tensor]:
        """The adapted weights (O,I) by the names of the block's own; gradients reach the LoRA while they are
        enabled."""
        return {
            f"{name}.weight": part(linear.weight.detach(), coarse)
            for name, part, linear in self._pairs(block)
        }

    @torch.no_grad()
    def merge(self, block: nn.Module, twin: nn.Module, coarse: float | None) -> None:
        """Give the linear layers of a twin the adapted weights of the block, None: the block's own. The twin may share
        them at first; later they change in place, as what was compiled around them needs it."""
        for name, part, linear in self._pairs(block):
            own = cast(nn.Linear, twin.get_submodule(name))
            lora = part.to(linear.weight.device)
            weight = linear.weight if coarse is None else lora(linear.weight, coarse)
            if own.weight is linear.weight:
                own.weight = nn.Parameter(weight.clone(), linear.weight.requires_grad)
            else:
                own.weight.copy_(weight)

    def state(self, block: nn.Module, coarse: float | None) -> Key:
        """What adapted weights were made of. Sums tell of a change through `.data`, as when a LoRA is merged."""
        tensors = [linear.weight for _, _, linear in self._pairs(block)] + list(self.parameters())
        sums = torch.stack([_bit_sum(tensor.detach()) for tensor in tensors]).tolist()
        return coarse, *sums, *((tensor.data_ptr(), tensor._version) for tensor in tensors)

    def _pairs(self, block: nn.Module) -> list[tuple[str, nn.Module, nn.Linear]]:
        names = [(key.replace("/", "."), part) for key, part in self.parts.items()]
        return [(name, part, plain_linear(block, name, "few_step=false")) for name, part in names]


def _bit_sum(tensor: Tensor) -> Tensor:
    """() long, the sum of a tensor's bits read as integers: several times as fast as a sum of bf16 values in fp32, and
    a change of one value never rounds away."""
    size, offset = tensor.element_size(), tensor.storage_offset()
    whole = tensor.is_contiguous() and tensor.shape[-1] * size % 8 == 0 == offset * size % 8
    return tensor.view(torch.int64).sum() if whole else tensor.contiguous().view(torch.uint8).sum()
