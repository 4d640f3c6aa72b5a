"""The probability path: the one place where the direction of time is fixed.

Linear path of flow matching (Lipman et al., 2210.02747; rectified flow, 2209.03003): t = 0 is noise, t = 1 is data,
x_t = (1 - t) x_0 + t x_1, velocity v = x_1 - x_0.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from elastic3d.diffusion.options import PipelineConfig, SamplingGrid


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


def timestep_grid(steps: int, shift: float = 1.0) -> Tensor:
    """Sampling times (steps + 1,) from 0 to 1, uniform before the shift."""
    if steps < 1:
        raise ValueError(f"steps is {steps}, expected at least 1")
    t = torch.linspace(0.0, 1.0, steps + 1, dtype=torch.float64)
    return (t / (t + shift * (1 - t))).float()


def endpoint_grid(steps: int, shift: float = 1.0) -> Tensor:
    """Sampling times as Hunyuan3D-2 counts them: `steps` times from 0 to 1, both included, so steps - 1 moves.

    Its scheduler calls the model once more at t = 1 and moves by nothing; that pass is left out here.
    """
    return timestep_grid(max(steps - 1, 1), shift)


def consistency_grid(steps: int, segments: int = 100, train_steps: int = 1000) -> Tensor:
    """Sampling times (steps + 1,) of phased consistency models (2405.18407) as Hunyuan3D-2 turbo takes them.

    The training times i / (train_steps - 1) are cut into `segments`; every N-th segment starts a step.
    """
    if not 1 <= steps <= segments:
        raise ValueError(f"steps is {steps}, expected 1 to {segments} for this consistency model")
    starts = torch.arange(segments, dtype=torch.float64) * (train_steps // segments) - 1
    chosen = (torch.arange(steps, dtype=torch.float64) * segments / steps).floor().long()
    times = starts.clamp_min(0)[chosen] / (train_steps - 1)
    return torch.cat([times, torch.ones(1, dtype=torch.float64)]).float()


def late_start_grid(steps: int, shift: float = 1.0, smallest: float = 0.001) -> Tensor:
    """Sampling times (steps,) as Step1X-3D counts them: `steps` noise levels from 1 to 0.001, then 0.

    Its first step moves nothing, so that the second starts from pure noise at its own time: that pass is left out here.
    """
    sigma = torch.linspace(1.0, smallest, steps, dtype=torch.float64)[min(1, steps - 1) :]
    t = 1 - torch.cat([sigma, torch.zeros(1, dtype=torch.float64)])
    return (t / (t + shift * (1 - t))).float()


def sampling_times(config: PipelineConfig, steps: int) -> Tensor:
    """The times (moves + 1,) of `steps` steps in a model's own grid."""
    if config.grid is SamplingGrid.endpoint:
        return endpoint_grid(steps, config.shift)
    if config.grid is SamplingGrid.consistency:
        return consistency_grid(steps, config.segments)
    if config.grid is SamplingGrid.late_start:
        return late_start_grid(steps, config.shift)
    return timestep_grid(steps, config.shift)


def match_noise(noise: Tensor, data: Tensor, channels: int) -> Tensor:
    """Noise tokens (N,C) in the order that brings them nearest to data tokens (N,C), by their first `channels`.

    A set of latents has no order, so any pairing of its tokens with noise tokens trains the same marginals; the one
    of least squared distance has the straightest paths (equivariant flow matching, 2306.15030).
    """
    cost = torch.cdist(data[:, :channels].float(), noise[:, :channels].float()).square()
    _, order = linear_sum_assignment(cost.numpy())
    return noise[torch.from_numpy(order)]
