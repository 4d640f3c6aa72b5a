"""Layers that several base models share."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def fourier_embedding(points: Tensor, num_freqs: int, include_pi: bool = False) -> Tensor:
    """Points (..., 3) -> (..., 3 + 6 num_freqs): the point, then sines, then cosines of its octaves.

    Channel order of 3DShape2VecSet and Hunyuan3D-2: axis-major, frequency-minor. In fp32 at least: at the eighth octave
    bf16 has no digits left.
    """
    points = points.to(torch.promote_types(points.dtype, torch.float32))
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
    distance = torch.full_like(axes[0], math.inf)
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
        return _widened(q * q.shape[-1] ** -0.5, more, lambda high, low: (high, high, low))

    def extend_keys(self, k: Tensor, x_k: Tensor) -> Tensor:
        """k (B,H,N,d), x_k (B,N,3) -> k with channels behind."""
        x_k = x_k.float()[:, None]
        more = torch.cat([x_k, x_k.square().sum(-1, keepdim=True), torch.ones_like(x_k[..., :1])], dim=-1)
        return _widened(k, more.expand(-1, k.shape[1], -1, -1), lambda high, low: (high, low, high))


def _widened(x: Tensor, more: Tensor, parts: Callable[[Tensor, Tensor], tuple[Tensor, ...]]) -> Tensor:
    """x (..., d) with channels behind. Half precision would lose the difference of two large terms: there, `parts` of
    high + low of both factors make up their product."""
    if x.dtype == torch.float32:
        return torch.cat([x, more], dim=-1)
    high = more.to(x.dtype)
    return torch.cat([x, *parts(high, (more - high.float()).to(x.dtype))], dim=-1)


class MLP(nn.Sequential):
    """Linear, GELU, Linear (..., D) -> (..., D)."""

    def __init__(self, width: int, ratio: float) -> None:
        hidden = int(width * ratio)
        first, last = nn.Linear(width, hidden), nn.Linear(hidden, width)
        super().__init__(OrderedDict(c_fc=first, gelu=nn.GELU(), c_proj=last))


class QKNorm(nn.Module):
    """LayerNorm of queries and keys over a head's channels; with `norm` false they stay as they are."""

    def __init__(self, head_width: int, norm: bool) -> None:
        super().__init__()
        self.q_norm = nn.LayerNorm(head_width, eps=1e-6) if norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_width, eps=1e-6) if norm else nn.Identity()


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


def run_block(block: nn.Module, recompute: bool, *streams: Tensor | None) -> Any:
    """What a block makes of its streams; with `recompute` its activations are computed again for the gradient."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *streams, use_reentrant=False)
    return block(*streams)


OFFSET_SCALE = 4.0  # the spacing of 128 anchors on a shape, about 0.2, becomes about 1
OFFSET_FREQS = 5


def nearest_neighbours(x_q: Tensor, x_k: Tensor, count: int) -> Tensor:
    """Indices (B,P,count) of the points x_k (B,N,3) nearest to each of x_q (B,P,3)."""
    x_q, x_k = x_q.detach().float(), x_k.detach().float()
    # |x_q|^2 is the same for every key; a product and a sum is several times faster than cdist here.
    squared = torch.baddbmm(x_k.square().sum(-1)[:, None], x_q, x_k.transpose(1, 2), alpha=-2.0)
    return squared.topk(count, dim=-1, largest=False).indices


class LocalFeatures(nn.Module):
    """Features of neighbours, modulated by the embedded offset to them, pooled over the neighbours.

    The product of a neighbour's features with the embedded offset is what makes a small model learn fast: the signed
    distance to a neighbour's tangent plane is such a product (normal times offset), which neither attention over
    absolute positions nor an MLP of a sum has at hand.

    `pool="max"` is for the encoder (PointNet); `pool="fade"` averages with weights that grow towards the nearest and
    reach zero at the farthest of the neighbours, so that the result is continuous as neighbours change.
    """

    def __init__(
        self, features: int, width: int, hidden: int, neighbours: int, pool: Literal["max", "fade"]
    ) -> None:
        super().__init__()
        self.neighbours, self.pool = neighbours, pool
        offset = 3 + 6 * OFFSET_FREQS
        self.feature_proj = nn.Linear(features, 2 * hidden)
        self.offset_proj = nn.Linear(offset, 2 * hidden)
        self.hidden_proj = nn.Linear(hidden, hidden)
        self.out_proj = nn.Linear(hidden, width)

    def forward(self, x_q: Tensor, x_k: Tensor, features: Tensor) -> Tensor:
        """x_q (B,P,3), x_k (B,N,3), features (B,N,F) -> (B,P,width); N >= neighbours is required."""
        B, N, _ = x_k.shape
        index = nearest_neighbours(x_q, x_k, self.neighbours)
        flat = (index + N * torch.arange(B, device=index.device)[:, None, None]).flatten()
        offset = x_q.float()[:, :, None] - _gather(x_k.float(), flat, index.shape)
        embedded = _embedded(offset).to(features.dtype)
        plus, times = self.offset_proj(embedded).chunk(2, dim=-1)
        shift, gain = _gather(self.feature_proj(features), flat, index.shape).chunk(2, dim=-1)
        x = self.hidden_proj(nn.functional.gelu(torch.addcmul(shift + plus, gain, times)))
        if self.pool == "max":
            return self.out_proj(x.amax(dim=2))
        weights = fade_weights(offset.square().sum(-1)).to(x.dtype)
        return self.out_proj(torch.einsum("BPk,BPkh->BPh", weights, nn.functional.gelu(x)))


def _gather(x: Tensor, flat: Tensor, shape: torch.Size) -> Tensor:
    """Rows of x (B,N,F) by flattened index -> (*shape, F)."""
    return rearrange(x, "B N F -> (B N) F").index_select(0, flat).view(*shape, -1)


def fade_weights(squared: Tensor) -> Tensor:
    """Squared distances (B,P,k) -> weights (B,P,k) that sum to one; the farthest gets none."""
    share = squared / squared.amax(dim=-1, keepdim=True).clamp(min=1e-8)
    weights = (1 - share).square() / (share + 0.02)
    return weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-8)


class AnchorFeatures:
    """`LocalFeatures` from one set of anchors, for very many points, without gradients.

    The Fourier embedding of the offset to an anchor is, by the addition theorems, a linear function of the embedding of
    the point itself. So the first layer becomes one matrix an anchor, and all pairs of a point and a neighbour are done
    by one product an anchor, without gathering features or embedding offsets. That layer is in fp32: half precision
    loses the small difference between a point and its anchor if both are embedded apart. The farthest of the neighbours
    has no weight and is left out. On one core the field of a small model is evaluated 1.5 times as fast, in bf16 1.3.
    """

    def __init__(self, local: LocalFeatures, features: Tensor, anchors: Tensor) -> None:
        """features (N,F), anchors (N,3)."""
        self.local, self.anchors, self.squares = local, anchors, anchors.square().sum(dim=-1)
        shift, gain = local.feature_proj(features).double().chunk(2, dim=-1)
        plus, times = local.offset_proj.weight.double().chunk(2)
        plus_bias, times_bias = local.offset_proj.bias.double().chunk(2)
        whole = plus + gain[:, :, None] * times  # (N,h,E) of the embedded offset
        sizes = [3, 3 * OFFSET_FREQS, 3 * OFFSET_FREQS]
        linear, sine, cosine = whole.split(sizes, dim=-1)
        origin, sin, cos = _embedded(anchors.double())[:, None].split(sizes, dim=-1)
        # sin(x - a) = sin x cos a - cos x sin a, and likewise the cosine
        matrices = torch.cat([linear, sine * cos + cosine * sin, cosine * cos - sine * sin], dim=-1)
        biases = shift + plus_bias + gain * times_bias - (linear @ origin.transpose(1, 2))[..., 0]
        self.matrices, self.biases = matrices.float().transpose(1, 2).contiguous(), biases.float()

    def __call__(self, points: Tensor) -> Tensor:
        """points (1,P,3) -> (1,P,width)."""
        points, k = points[0], self.local.neighbours - 1
        squared = torch.addmm(self.squares, points, self.anchors.T, alpha=-2.0)
        near, index = squared.topk(k + 1, dim=-1, largest=False)
        weights = fade_weights(near + points.square().sum(dim=-1, keepdim=True))[:, :k]
        anchor = index[:, :k].flatten()
        order = anchor.argsort()
        rows = _embedded(points).index_select(0, order // k)
        counts = torch.bincount(anchor, minlength=len(self.biases)).tolist()
        hidden = rows.new_empty(len(rows), self.biases.shape[1])
        parts = zip(hidden.split(counts), self.biases, rows.split(counts), self.matrices, strict=True)
        for out, *part in parts:
            torch.addmm(*part, out=out)
        hidden = nn.functional.gelu(hidden.to(self.local.hidden_proj.weight.dtype))
        hidden = nn.functional.gelu(self.local.hidden_proj(hidden))
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        pooled = nn.functional.embedding_bag(
            place.view(-1, k), hidden, per_sample_weights=weights.to(hidden.dtype).contiguous(), mode="sum"
        )
        return self.local.out_proj(pooled)[None]


def _embedded(offset: Tensor) -> Tensor:
    """Offsets (...,3) -> their embedding (..., 3 + 6 OFFSET_FREQS)."""
    return fourier_embedding(OFFSET_SCALE * offset, OFFSET_FREQS)
