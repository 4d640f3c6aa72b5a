"""Straight-through functions: hard values forward, gradients of the probabilities backward (1308.3432)."""

from __future__ import annotations

import torch
from torch import Tensor

from elastic3d.routing.decision import RouteDecision


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The values of `hard`, exactly; the gradient of `soft`."""
    return hard.to(soft.dtype) + (soft - soft.detach())


def hard_keep(decision: RouteDecision) -> Tensor:
    """(B,) 0 or 1: is the block kept."""
    return straight_through(decision.keep, decision.keep_prob)


def hard_width(decision: RouteDecision) -> Tensor:
    """(B,K) one-hot: which width is taken."""
    one_hot = torch.nn.functional.one_hot(decision.width, decision.width_prob.shape[-1])
    return straight_through(one_hot, decision.width_prob)


def hard_ratio(decision: RouteDecision, ratios: tuple[float, ...]) -> Tensor:
    """(B,) the taken width as a share of the full one."""
    return hard_width(decision) @ decision.width_prob.new_tensor(ratios)


def gated(x: Tensor, y: Tensor, keep: Tensor, keep_prob: Tensor, weight: Tensor | None = None) -> Tensor:
    """x + g (y - x) with a straight-through gate: x, y (B,L,D), keep (B,) bool, keep_prob (B,) -> (B,L,D).

    Forward it is y or x bit for bit. Backward the gate gets <gradient, y - x>, times `weight` (B,) where
    given.
    """
    taken = torch.where(keep[:, None, None], y, x)
    slope = keep_prob - keep_prob.detach()
    if weight is not None:
        slope = slope * weight
    return taken + slope.to(x.dtype)[:, None, None] * (y - x).detach()
