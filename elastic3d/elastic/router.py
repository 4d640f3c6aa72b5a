"""Routers: from a block's input tokens to a gate logit and K width logits for each sample, and to a decision.

E-DiT's router (2602.13993): modulated LayerNorm of every token -> Linear -> ReLU -> heads -> mean over tokens.
`Router` pools the tokens before its trunk and takes its modulation from one `Conditioner` for all blocks, so that it
costs thousands of parameters and FLOPs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from elastic3d.elastic.cache import Streams
from elastic3d.elastic.config import RouterConfig, Scope

_TIME_OCTAVES, _BUDGET_OCTAVES = 4, 3
_FEATURES = (1 + 2 * _TIME_OCTAVES) + 3 + (1 + 2 * _BUDGET_OCTAVES) + 1
_SMALLEST_STEP = 1e-3


class RouteDecision(NamedTuple):
    """One route per sample through one block, or through all blocks of a step.

    keep (B,) bool: run the block; width (B,) long in [0, K): index of the MLP's nested width. keep_prob (B,)
    and width_prob (B,K) are what they were taken from, and carry the gradient.
    """

    keep: Tensor
    width: Tensor
    keep_prob: Tensor
    width_prob: Tensor

    @staticmethod
    def from_logits(logits: Tensor, threshold: float, bias: Tensor | None = None) -> RouteDecision:
        """logits (B, 1 + K), the gate first; a block is kept where sigmoid(gate + bias) > threshold (E-DiT, tau)."""
        logits = logits.float()
        gate = logits[:, 0] if bias is None else logits[:, 0] + bias
        keep_prob = gate.sigmoid()
        width_prob = logits[:, 1:].softmax(dim=-1)
        return RouteDecision(keep_prob > threshold, width_prob.argmax(dim=-1), keep_prob, width_prob)

    @staticmethod
    def fixed(keep: Tensor, width: Tensor, widths: int) -> RouteDecision:
        """A route that nobody computed: keep (B,) bool and width (B,) long, with certain probabilities."""
        return RouteDecision(keep, width, keep.float(), F.one_hot(width, widths).float())

    def hard_keep(self) -> Tensor:
        """(B,) 0 or 1: is the block kept; the gradient is that of the probability (straight through, 1308.3432)."""
        return straight_through(self.keep, self.keep_prob)

    def hard_width(self) -> Tensor:
        """(B,K) one-hot: which width is taken."""
        return straight_through(F.one_hot(self.width, self.width_prob.shape[-1]), self.width_prob)


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The values of `hard`, exactly; the gradient of `soft`."""
    return hard.to(soft.dtype) + (soft - soft.detach())


def interpolated(x: Tensor, at: Sequence[float], values: Sequence[float]) -> Tensor:
    """Values (B,) at x (B,): linear between those at the ascending positions `at`, constant outside."""
    knots, found = x.new_tensor(at), x.new_tensor(values)
    right = torch.searchsorted(knots, x.contiguous()).clamp(1, len(at) - 1)
    low, high = knots[right - 1], knots[right]
    share = ((x - low) / (high - low).clamp_min(1e-9)).clamp(0, 1)
    return torch.lerp(found[right - 1], found[right], share)


def _features(t: Tensor, dt: Tensor, budget: Tensor, branch: Tensor) -> Tensor:
    """(B,) each -> (B, 20): octaves of t and of the budget, the step size on a log scale, the branch."""
    step = dt.clamp(_SMALLEST_STEP, 1.0).log() / -math.log(_SMALLEST_STEP)
    parts = [_octaves(t, _TIME_OCTAVES), step[:, None], step.square()[:, None], dt[:, None]]
    parts += [_octaves(budget, _BUDGET_OCTAVES), branch[:, None]]
    return torch.cat(parts, dim=-1)


def _octaves(x: Tensor, count: int) -> Tensor:
    """x (B,) -> (B, 1 + 2 count): x, then sines and cosines of pi 2^k x."""
    angles = x[:, None] * (math.pi * 2.0 ** torch.arange(count, device=x.device, dtype=x.dtype))
    return torch.cat([x[:, None], angles.sin(), angles.cos()], dim=-1)


def pooled(streams: Streams) -> Tensor:
    """Token streams (B,L,D) -> (B, streams * D) fp32: LayerNorm of each stream's mean token. (A norm of every token
    costs eight times as much.)"""
    means = [stream.mean(dim=1).float() for stream in streams]
    return torch.cat([F.layer_norm(mean, mean.shape[-1:]) for mean in means], dim=-1)


class Conditioner(nn.Module):
    """The one embedding of time, step size, budget and branch, and from it every block's modulation; once a pass."""

    def __init__(self, config: RouterConfig, blocks: int) -> None:
        super().__init__()
        E = config.conditioning
        self.blocks, self.channels = blocks, 2 * config.hidden + 1 + config.widths
        self.embed = nn.Sequential(nn.Linear(_FEATURES, E), nn.SiLU(), nn.Linear(E, E), nn.SiLU())
        self.modulation = nn.Linear(E, blocks * self.channels)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, t: Tensor, dt: Tensor, budget: Tensor, branch: Tensor) -> Tensor:
        """(B,) each -> (B, blocks, 2 H_r + 1 + K): scale and shift of a trunk, offsets of its logits."""
        features = _features(t, dt, budget, branch).to(self.modulation.weight.dtype)
        return self.modulation(self.embed(features)).unflatten(-1, (self.blocks, self.channels))


class Router(nn.Module):
    """Pooled tokens -> Linear -> modulated SiLU -> logits, plus the conditioner's offsets."""

    def __init__(self, config: RouterConfig, width: int, streams: int) -> None:
        super().__init__()
        self.trunk = nn.Linear(streams * width, config.hidden)
        self.heads = nn.Linear(config.hidden, 1 + config.widths)
        _initialise_heads(self.heads, config)
        self.age = _age_embedding(config) if config.longest else None

    def forward(self, streams: Streams, modulation: Tensor, age: Tensor | None) -> Tensor:
        """A block's input tokens, the conditioner's output for it (B, 2 H_r + 1 + K), and the age (B,) long in steps of
        what the block would add if it were skipped (0: nothing) -> logits (B, 1 + K)."""
        if self.age is not None:
            modulation = modulation + self.age(age)
        hidden = self.trunk(pooled(streams).to(self.trunk.weight.dtype))
        H, K1 = self.trunk.out_features, self.heads.out_features
        scale, shift, offset = modulation.split([H, H, K1], dim=-1)
        return self.heads(F.silu(torch.addcmul(shift, hidden, 1 + scale))) + offset

    def flops(self, lengths: tuple[int, ...]) -> int:
        """FLOPs a sample. Pooling is counted as a product with a row of ones."""
        D = self.trunk.in_features // len(lengths)
        return 2 * sum(lengths) * D + 2 * self.trunk.weight.numel() + 2 * self.heads.weight.numel()


def _age_embedding(config: RouterConfig) -> nn.Embedding:
    """A modulation for each age. At the start it moves the gate alone, and only where one decision holds for all
    blocks: the older, the higher the gate."""
    longest = config.longest
    embedding = nn.Embedding(longest + 1, 2 * config.hidden + 1 + config.widths)
    nn.init.zeros_(embedding.weight)
    if config.scope is Scope.step:
        with torch.no_grad():
            embedding.weight[1:, 2 * config.hidden] = torch.arange(longest) - (longest - 1) / 2
    return embedding


def _initialise_heads(heads: nn.Linear, config: RouterConfig) -> None:
    """Open at the start (E-DiT): the gate at `initial_keep`, the widths leaning to the full one."""
    nn.init.normal_(heads.weight, std=config.head_std)
    nn.init.zeros_(heads.bias)
    with torch.no_grad():
        heads.bias[0] = math.log(config.initial_keep / (1 - config.initial_keep))
        heads.bias[-1] = config.initial_width_bias
