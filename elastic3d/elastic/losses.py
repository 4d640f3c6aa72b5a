"""FLOPs that decisions execute, with gradients, and the loss that holds them to a budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from elastic3d.elastic.families import BlockFlops
from elastic3d.elastic.router import RouteDecision

if TYPE_CHECKING:
    from elastic3d.elastic.session import ElasticSession


def decision_flops(decision: RouteDecision, block: BlockFlops, ratios: tuple[float, ...]) -> Tensor:
    """Executed FLOPs (B,) of one block: hard values, straight-through gradients to gates and widths."""
    ratio = decision.hard_width() @ decision.width_prob.new_tensor(ratios)
    return decision.hard_keep() * (block.fixed + block.mlp * ratio)


def executed_share(
    decisions: Sequence[RouteDecision], blocks: Sequence[BlockFlops], ratios: tuple[float, ...]
) -> Tensor:
    """Executed share (B,) of the dense blocks' FLOPs in one pass, with straight-through gradients."""
    dense = sum(block.dense for block in blocks)
    shares = [decision_flops(d, block, ratios) / dense for d, block in zip(decisions, blocks, strict=True)]
    return torch.stack(shares).sum(dim=0)


def session_share(session: ElasticSession) -> Tensor:
    """Executed share (B,) of the dense block FLOPs in the newest training pass, with gradients to the
    routers."""
    current = session.current
    if current is None or len(current.decisions) != len(session.blocks):
        raise ValueError("no complete elastic forward pass to count: run the model after session.train")
    order = sorted(current.decisions)
    decisions = [current.decisions[index] for index in order]
    flops = [current.flops[index] for index in order]
    return executed_share(decisions, flops, session.router_config.ratios)


def budget_loss(share: Tensor, budget: Tensor, slack: float = 0.0, groups: int = 4) -> Tensor:
    """How far the executed cost is from its budget: share, budget (B,) -> scalar.

    The squared mean difference within each of `groups` bands of the budget, so that timesteps, samples and
    branches may trade compute with each other, plus the squared difference of every sample beyond `slack`.
    """
    band = (budget / (1 + 1e-6) * groups).long()
    count = torch.zeros(groups, device=share.device).index_add(0, band, torch.ones_like(share))
    total = torch.zeros(groups, device=share.device).index_add(0, band, share - budget)
    mean = (total / count.clamp_min(1)).square() * (count / count.sum())
    each = ((share - budget).abs() - slack).clamp_min(0).square().mean()
    return mean.sum() + each
