"""Shape DiT of Hunyuan3D-2.1 and TripoSG: a time token and latents in one stream, long skips, cross-attention, experts.

Parameter names and shapes of Hunyuan3D-2.1's checkpoints; TripoSG is the same without experts. Differs from
`shape_dit` in everything: time is a token in front of the latents instead of a modulation, the condition is read by
cross-attention, the blocks of the second half read the output of their mirror image in the first (U-ViT, 2209.12152),
and the last blocks choose experts for each token (mixture of experts, DiT-MoE 2407.11633).
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn

from elastic3d.models.layers import TimeEmbedder, attend, run_block
from elastic3d.models.options import SkipDiTConfig
from elastic3d.models.weights import PretrainedMixin

_MLP_RATIO = 4
_RMS_EPS = 1e-6


class Attention(nn.Module):
    """Attention of x to `data`, or to itself.

    The projections are not split into heads one by one: side by side (q | k | v, or k | v) they are cut into heads,
    and each head's piece into q, k and v. That is how the published weights were trained.
    """

    def __init__(self, config: SkipDiTConfig, data_channels: int | None) -> None:
        super().__init__()
        D, bias, read = config.width, config.qkv_bias, data_channels or config.width
        self.heads, self.cross = config.heads, data_channels is not None
        self.to_q = nn.Linear(D, D, bias=bias)
        self.to_k = nn.Linear(read, D, bias=bias)
        self.to_v = nn.Linear(read, D, bias=bias)
        norm = config.qk_norm
        self.q_norm = nn.RMSNorm(D // config.heads, eps=_RMS_EPS) if norm else nn.Identity()
        self.k_norm = nn.RMSNorm(D // config.heads, eps=_RMS_EPS) if norm else nn.Identity()
        self.out_proj = nn.Linear(D, D)

    def forward(self, x: Tensor, data: Tensor | None = None) -> Tensor:
        """x (B,L,D), data (B,M,Cc) -> (B,L,D)."""
        if self.cross:
            assert data is not None
            q = rearrange(self.to_q(x), "B L (H d) -> B H L d", H=self.heads)
            both = torch.cat([self.to_k(data), self.to_v(data)], dim=-1)
            k, v = rearrange(both, "B M (H K d) -> K B H M d", H=self.heads, K=2)
        else:
            three = torch.cat([self.to_q(x), self.to_k(x), self.to_v(x)], dim=-1)
            q, k, v = rearrange(three, "B L (H K d) -> K B H L d", H=self.heads, K=3)
        return self.out_proj(attend(self.q_norm(q), self.k_norm(k), v))


class MLP(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, _MLP_RATIO * width)
        self.fc2 = nn.Linear(_MLP_RATIO * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class _Projection(nn.Module):
    """Linear and GELU, under the name that diffusers' feed-forward gives it."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., hidden)."""
        return nn.functional.gelu(self.proj(x))


class Expert(nn.Module):
    """An MLP under the parameter names of diffusers' feed-forward: net.0.proj, net.2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = _MLP_RATIO * width
        self.net = nn.Sequential(_Projection(width, hidden), nn.Identity(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.net(x)


class ExpertGate(nn.Module):
    """Scores of the experts for each token."""

    def __init__(self, width: int, experts: int, chosen: int) -> None:
        super().__init__()
        self.chosen = chosen
        self.weight = nn.Parameter(torch.empty(experts, width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (T,D) -> weights (T,k) and experts (T,k); the weights are shares among all experts, not among the k."""
        scores = nn.functional.linear(x, self.weight).softmax(dim=-1)
        weights, experts = scores.topk(self.chosen, dim=-1)
        return weights, experts


class MixtureOfExperts(nn.Module):
    """Every token passes the shared expert and the best few of the others."""

    def __init__(self, config: SkipDiTConfig) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Expert(config.width) for _ in range(config.experts))
        self.gate = ExpertGate(config.width, config.experts, config.experts_per_token)
        self.shared_experts = Expert(config.width)

    def forward(self, x: Tensor) -> Tensor:
        """(B,L,D) -> (B,L,D)."""
        tokens = x.flatten(0, 1)
        weights, chosen = self.gate(tokens)
        output = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            row, place = (chosen == number).nonzero(as_tuple=True)
            # An expert that nobody chose runs on no token: its gradient is zero rather than missing (FSDP, DDP).
            output = output.index_add(0, row, expert(tokens[row]) * weights[row, place, None])
        return output.view_as(x) + self.shared_experts(x)


class SkipBlock(nn.Module):
    """Self-attention, cross-attention, MLP or experts; in the second half after the long skip."""

    def __init__(self, config: SkipDiTConfig, has_skip: bool, has_experts: bool) -> None:
        super().__init__()
        D = config.width
        self.condition_tokens = config.condition_tokens
        self.norm1 = nn.LayerNorm(D, eps=config.norm_eps)
        self.attn1 = Attention(config, None)
        self.norm2 = nn.LayerNorm(D, eps=config.norm_eps)
        self.attn2 = Attention(config, config.condition_channels)
        self.norm3 = nn.LayerNorm(D, eps=config.norm_eps)
        if has_skip:
            self.skip_norm = nn.LayerNorm(D, eps=config.norm_eps)
            self.skip_linear = nn.Linear(2 * D, D)
        if has_experts:
            self.moe = MixtureOfExperts(config)
        else:
            self.mlp = MLP(D)

    def join(self, x: Tensor, skip: Tensor) -> Tensor:
        """x, skip (B,L,D) -> (B,L,D): the long skip, before anything else happens."""
        return self.skip_norm(self.skip_linear(torch.cat([skip, x], dim=-1)))

    def forward(self, x: Tensor, condition: Tensor, skip: Tensor | None = None) -> Tensor:
        """x (time, then latents) (B,1+N,D), condition (B,M,Cc), skip (B,1+N,D) or None -> new x."""
        if skip is not None:
            x = self.join(x, skip)
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), condition)
        return x + (self.moe if hasattr(self, "moe") else self.mlp)(self.norm3(x))


class OutputLayer(nn.Module):
    """Norm, and projection of the latents' tokens."""

    def __init__(self, config: SkipDiTConfig) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.linear = nn.Linear(config.width, config.in_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B,1+N,D) -> (B,N,C)."""
        return self.linear(self.norm_final(x)[:, 1:])


class SkipDiT(PretrainedMixin, nn.Module):
    """Velocity of flow matching; the same call as `ShapeDiT`."""

    config_class = SkipDiTConfig

    def __init__(self, config: SkipDiTConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.x_embedder = nn.Linear(config.in_channels, config.width)
        self.t_embedder = TimeEmbedder(config.width, config.time_factor)
        first_expert = config.blocks - config.expert_blocks
        self.blocks = nn.ModuleList(
            SkipBlock(config, i > config.blocks // 2, i >= first_expert) for i in range(config.blocks)
        )
        self.final_layer = OutputLayer(config)
        for module in self.modules():
            if isinstance(module, ExpertGate):
                nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))

    def forward(
        self, latents: Tensor, t: Tensor, condition: Tensor, guidance: Tensor | None = None
    ) -> Tensor:
        """latents (B,N,C), t (B,) in [0,1], condition (B,M,Cc) -> velocity (B,N,C); ValueError for a guidance."""
        if guidance is not None:
            raise ValueError("this model takes no guidance scale per sample")
        dtype = self.x_embedder.weight.dtype
        time = self.t_embedder(1 - t if self.config.time_reversed else t)
        x = torch.cat([time[:, None], self.x_embedder(latents.to(dtype))], dim=1)
        condition = condition.to(dtype)
        skips: list[Tensor] = []
        half = len(self.blocks) // 2
        for i, block in enumerate(self.blocks):
            skip = skips.pop() if i > half else None
            x = run_block(block, self.gradient_checkpointing, x, condition, skip)
            if i < half:
                skips.append(x)
        return self.final_layer(x)
