"""Local features: what a point learns from its nearest neighbours in a set, as a function of the offset to them."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from elastic3d.models.layers import fourier_embedding

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

    def __init__(self, features: int, width: int, hidden: int, neighbours: int, pool: str) -> None:
        super().__init__()
        if pool not in ("max", "fade"):
            raise ValueError(f"pool is {pool!r}, expected max or fade")
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
        embedded = fourier_embedding(OFFSET_SCALE * offset, OFFSET_FREQS).to(features.dtype)
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
