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


def farthest_points(points: Tensor, count: int) -> Tensor:
    """Greedy farthest-point sampling: points (B, P, 3) -> indices (B, count), the first point first.

    Deterministic; P >= count is required.
    """
    B, P, _ = points.shape
    if count > P:
        raise ValueError(f"{count} farthest points asked of {P} points")
    points = points.float()
    batch = torch.arange(B, device=points.device)
    chosen = torch.zeros(B, count, dtype=torch.long, device=points.device)
    distance = torch.full((B, P), math.inf, device=points.device)
    for i in range(1, count):
        last = points[batch, chosen[:, i - 1]]
        distance = torch.minimum(distance, (points - last[:, None]).square().sum(-1))
        chosen[:, i] = distance.argmax(dim=1)
    return chosen


class DistanceBias(nn.Module):
    """Adds -gamma_h |x_q - x_k|^2 to the attention logits of head h; gamma_h is learned and starts spread out.

    Softmax ignores terms that are the same for every key, so the bias is the inner product of (2 gamma x_q, -gamma)
    with (x_k, |x_k|^2): four more channels of queries and keys, no (P, N) mask.
    """

    def __init__(self, heads: int, strongest: float = 128.0) -> None:
        super().__init__()
        gammas = strongest ** torch.linspace(0.0, 1.0, heads)
        self.log_gamma = nn.Parameter(gammas.log())

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x_q: Tensor, x_k: Tensor) -> Tensor:
        """q (B,H,P,d), k and v (B,H,N,d), x_q (B,P,3), x_k (B,N,3) -> attention output (B,H,P,d).

        In fp32: the biased logits differ by less than bf16 resolves.
        """
        gamma = self.log_gamma.float().exp()[None, :, None, None]
        x_q, x_k = x_q.float()[:, None], x_k.float()[:, None]
        scale = q.shape[-1] ** -0.5
        q = torch.cat([q.float() * scale, 2 * gamma * x_q, -gamma.expand(*q.shape[:3], 1)], dim=-1)
        x_k = x_k.expand(-1, k.shape[1], -1, -1)
        k = torch.cat([k.float(), x_k, x_k.square().sum(-1, keepdim=True)], dim=-1)
        v = nn.functional.pad(v.float(), (0, 4))
        out = nn.functional.scaled_dot_product_attention(q, k, v, scale=1.0)
        return out[..., :-4]


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


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads-first attention (B,H,L,d) x (B,H,S,d) -> (B, L, H*d)."""
    return rearrange(nn.functional.scaled_dot_product_attention(q, k, v), "B H L d -> B L (H d)")
