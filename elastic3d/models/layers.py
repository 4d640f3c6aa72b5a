"""Layers that several base models share."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn


def fourier_embedding(points: Tensor, num_freqs: int, include_pi: bool = False) -> Tensor:
    """Points (..., 3) -> (..., 3 + 6 num_freqs): the point, then sines, then cosines of its octaves.

    Channel order of 3DShape2VecSet and Hunyuan3D-2: axis-major, frequency-minor. Always computed in fp32: at the
    eighth octave bf16 has no digits left.
    """
    points = points.float()
    octaves = 2.0 ** torch.arange(num_freqs, dtype=torch.float32, device=points.device)
    if include_pi:
        octaves = octaves * math.pi
    angles = (points[..., None] * octaves).flatten(-2)
    return torch.cat([points, angles.sin(), angles.cos()], dim=-1)


def timestep_embedding(t: Tensor, width: int, max_period: float, time_factor: float) -> Tensor:
    """t (B,) -> (B, width) fp32: cosines, then sines (DDPM's embedding of time_factor * t)."""
    half = width // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = (time_factor * t.float())[:, None] * torch.exp(-math.log(max_period) * exponent)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedder(nn.Module):
    """t (B,) -> (B,D): sines, then cosines of as many channels as the model has, behind an MLP with exact GELU.

    `time_factor` scales t first: 1 in Hunyuan3D-2.1, 1000 in TripoSG and Step1X-3D.
    """

    def __init__(self, width: int, time_factor: float = 1.0) -> None:
        super().__init__()
        self.width, self.time_factor = width, time_factor
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, t: Tensor) -> Tensor:
        """(B,) -> (B,D)."""
        cosines, sines = timestep_embedding(t, self.width, 10000.0, self.time_factor).chunk(2, dim=-1)
        return self.mlp(torch.cat([sines, cosines], dim=-1).to(next(self.parameters()).dtype))


def farthest_points(points: Tensor, count: int) -> Tensor:
    """Greedy farthest-point sampling: points (B, P, 3) -> indices (B, count), the first point first.

    Deterministic; P >= count is required.
    """
    B, P, _ = points.shape
    if count > P:
        raise ValueError(f"{count} farthest points asked of {P} points")
    # One array an axis: (B, P) stays below the size from which elementwise kernels wake the thread pool, P times.
    axes = [axis.contiguous() for axis in points.float().unbind(-1)]
    chosen = torch.zeros(B, count, dtype=torch.long, device=points.device)
    distance = torch.full((B, P), math.inf, device=points.device)
    for i in range(1, count):
        last = chosen[:, i - 1, None]
        squared = torch.zeros_like(distance)
        for axis in axes:
            difference = axis - axis.gather(1, last)
            squared.addcmul_(difference, difference)
        distance = torch.minimum(distance, squared)
        chosen[:, i] = distance.argmax(dim=1)
    return chosen


class DistanceBias(nn.Module):
    """Adds -gamma_h |x_q - x_k|^2 to the attention logits of head h; gamma_h is learned and starts spread out.

    The square is an inner product, (2 gamma x_q, -gamma, -gamma |x_q|^2) with (x_k, |x_k|^2, 1): a few more channels
    of queries and keys instead of a (P, N) mask, whose traffic costs more than attention itself.
    """

    def __init__(self, heads: int, strongest: float = 128.0) -> None:
        super().__init__()
        # Numbers of Python: a power of tensors on the meta device loads torch's compiler, two seconds.
        spread = [math.log(strongest) * head / max(heads - 1, 1) for head in range(heads)]
        self.log_gamma = nn.Parameter(torch.tensor(spread))

    def extend_queries(self, q: Tensor, x_q: Tensor) -> Tensor:
        """q (B,H,P,d), x_q (B,P,3) -> q, scaled by d^-1/2, with channels behind; for logits at scale 1."""
        gamma = self.log_gamma.float().exp()[None, :, None, None]
        x_q = x_q.float()[:, None]
        minus = -gamma.expand(q.shape[0], -1, q.shape[2], 1)
        more = torch.cat([2 * gamma * x_q, minus, minus * x_q.square().sum(-1, keepdim=True)], dim=-1)
        q = q * q.shape[-1] ** -0.5
        if q.dtype == torch.float32:
            return torch.cat([q, more], dim=-1)
        # Half precision would lose the difference of two large terms: keep both factors as high + low parts.
        high, low = _split(more, q.dtype)
        return torch.cat([q, high, high, low], dim=-1)

    def extend_keys(self, k: Tensor, x_k: Tensor) -> Tensor:
        """k (B,H,N,d), x_k (B,N,3) -> k with channels behind."""
        x_k = x_k.float()[:, None]
        more = torch.cat([x_k, x_k.square().sum(-1, keepdim=True), torch.ones_like(x_k[..., :1])], dim=-1)
        more = more.expand(-1, k.shape[1], -1, -1)
        if k.dtype == torch.float32:
            return torch.cat([k, more], dim=-1)
        high, low = _split(more, k.dtype)
        return torch.cat([k, high, low, high], dim=-1)


def _split(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x as the sum of two numbers of a shorter format."""
    high = x.to(dtype)
    return high, (x - high.float()).to(dtype)


class MLP(nn.Module):
    """Linear, GELU, Linear (..., D) -> (..., D)."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, int(width * ratio))
        self.c_proj = nn.Linear(int(width * ratio), width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.c_proj(nn.functional.gelu(self.c_fc(x)))


class QKNorm(nn.Module):
    """LayerNorm of queries and keys over a head's channels."""

    def __init__(self, head_width: int) -> None:
        super().__init__()
        self.q_norm = nn.LayerNorm(head_width, eps=1e-6)
        self.k_norm = nn.LayerNorm(head_width, eps=1e-6)


EXPLICIT_LIMIT = 1 << 26  # logits a row; above it the fused kernel's smaller memory wins


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Heads-first attention q (B,H,P,d), k (B,H,N,d), v (B,H,N,e) -> (B, P, H*e); scale defaults to d^-1/2.

    On a CPU in bf16 two matrix products beat the fused kernel at the few hundred tokens of a shape: measured 3x
    forward and 5x backward at 177 tokens, 4x backward at 1024 queries of 128 keys. The choice does not depend on B.
    """
    logits = q.shape[1] * q.shape[2] * k.shape[2]
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and logits <= EXPLICIT_LIMIT:
        weights = torch.matmul(
            q * (q.shape[-1] ** -0.5 if scale is None else scale), k.transpose(-1, -2)
        ).softmax(-1)
        out = torch.matmul(weights, v)
    else:
        padded = nn.functional.pad(v, (0, q.shape[-1] - v.shape[-1]))  # the fused kernels want equal widths
        out = nn.functional.scaled_dot_product_attention(q, k, padded, scale=scale)[..., : v.shape[-1]]
    return rearrange(out, "B H P e -> B P (H e)")
