"""The probability path: the one place where the direction of time is fixed.

Linear path of flow matching (Lipman et al., 2210.02747; rectified flow, 2209.03003): t = 0 is noise, t = 1 is data,
x_t = (1 - t) x_0 + t x_1, velocity v = x_1 - x_0.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def _per_sample(t: Tensor, x: Tensor) -> Tensor:
    return t.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def interpolate(noise: Tensor, data: Tensor, t: Tensor) -> Tensor:
    """x_t for noise and data (B, ...), t (B,)."""
    return torch.lerp(noise, data, _per_sample(t, data))


def velocity(noise: Tensor, data: Tensor) -> Tensor:
    """The target (B, ...) of flow matching."""
    return data - noise


def predict_data(x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """Clean data that a velocity implies: x_1 = x_t + (1 - t) v."""
    return x_t + (1 - _per_sample(t, x_t)) * v


def sample_timesteps(
    count: int, generator: torch.Generator | None = None, logit_normal: bool = True, shift: float = 1.0
) -> Tensor:
    """Training timesteps (count,): logit-normal (SD3, 2403.03206) or uniform, in [0, 1].

    `shift` > 1 moves mass towards noise: t -> t / (t + shift (1 - t)), the SD3 shift written for this time direction.
    """
    draw = torch.randn(count, generator=generator) if logit_normal else torch.rand(count, generator=generator)
    t = draw.sigmoid() if logit_normal else draw
    return t / (t + shift * (1 - t))


def timesteps_at(u: Tensor, logit_normal: bool = True, shift: float = 1.0) -> Tensor:
    """The timesteps (count,) at quantiles u (count,) in [0, 1] of the distribution of `sample_timesteps`."""
    u = u.double().clamp(1e-6, 1 - 1e-6)
    t = torch.special.ndtri(u).sigmoid() if logit_normal else u
    return (t / (t + shift * (1 - t))).float()


def match_noise(noise: Tensor, data: Tensor, channels: int) -> Tensor:
    """Noise tokens (N,C) in the order that brings them nearest to data tokens (N,C), by their first `channels`.

    A set of latents has no order, so any pairing of its tokens with noise tokens trains the same marginals; the one
    of least squared distance has the straightest paths (equivariant flow matching, 2306.15030).
    """
    cost = torch.cdist(data[:, :channels].float(), noise[:, :channels].float()).square()
    _, order = linear_sum_assignment(cost.numpy())
    return noise[torch.from_numpy(order)]
