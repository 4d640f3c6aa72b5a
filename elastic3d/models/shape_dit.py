"""Shape DiT: velocity of shape latents, given an image's tokens.

Double- and single-stream blocks of FLUX without positional encoding, with the parameter names and shapes of
Hunyuan3D-2, so that official weights load as they are. Step1X-3D is the same with another time embedder. Knows nothing
of routers: they attach to the blocks from outside.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from elastic3d.models.layers import TimeEmbedder, attend, fourier_embedding, run_block, timestep_embedding
from elastic3d.models.options import DiTConfig
from elastic3d.models.weights import PretrainedMixin

TIMESTEP_CHANNELS = 256  # of the sinusoidal embedding, before its MLP; the same in every FLUX descendant


class VectorEmbedder(nn.Module):
    """A scalar (B,) -> (B,D): its sinusoidal embedding behind Linear, SiLU, Linear."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.max_period, self.factor = config.max_period, config.time_factor
        self.in_layer = nn.Linear(TIMESTEP_CHANNELS, config.width)
        self.out_layer = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """(B,) -> (B,D)."""
        embedded = timestep_embedding(x, TIMESTEP_CHANNELS, self.max_period, self.factor)
        return self.out_layer(nn.functional.silu(self.in_layer(embedded.to(self.in_layer.weight.dtype))))


class RMSNorm(nn.Module):
    """Root-mean-square norm over a head's channels, in fp32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        return nn.functional.rms_norm(x.float(), x.shape[-1:], self.scale.float(), eps=1e-6).to(x.dtype)


class QKNorm(nn.Module):
    """RMSNorm of queries and keys."""

    def __init__(self, head_width: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(head_width)
        self.key_norm = RMSNorm(head_width)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q, k (B,H,L,d) -> the same, normalised."""
        return self.query_norm(q), self.key_norm(k)


class Modulation(nn.Module):
    """adaLN: modulation vector (B, D) -> `count` tensors (B, 1, D), shift, scale and gate for each branch."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.lin = nn.Linear(width, count * width)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        """(B, D) -> count x (B, 1, D)."""
        return self.lin(nn.functional.silu(vec))[:, None].chunk(self.count, dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without parameters, then (1 + scale) x + shift."""
    return torch.addcmul(shift, nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


class StreamAttention(nn.Module):
    """The projections of one stream of a double block."""

    def __init__(self, width: int, heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.norm = QKNorm(width // heads)
        self.proj = nn.Linear(width, width)

    def heads_first(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B,L,D) -> normalised q, k and v, each (B,H,L,d)."""
        q, k, v = rearrange(self.qkv(x), "B L (K H d) -> K B H L d", K=3, H=self.heads)
        return *self.norm(q, k), v

    def project(self, x: Tensor) -> Tensor:
        """(B,L,D), a part of the tokens that attended -> (B,L,D).

        Such a part is contiguous in a batch of one alone, and torch's `linear` rounds once or twice by that: a sample
        would depend on its batch.
        """
        return self.proj(x.contiguous())


def _gelu(config: DiTConfig) -> str:
    """How GELU is computed, in torch's words."""
    return "tanh" if config.gelu_tanh else "none"


def _mlp(config: DiTConfig) -> nn.Sequential:
    width, hidden = config.width, int(config.width * config.mlp_ratio)
    return nn.Sequential(
        nn.Linear(width, hidden), nn.GELU(approximate=_gelu(config)), nn.Linear(hidden, width)
    )


class DoubleStreamBlock(nn.Module):
    """Latents and condition keep their own weights and attend to each other (MM-DiT, SD3)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        D, H = config.width, config.heads
        self.img_mod = Modulation(D, 6)
        self.img_attn = StreamAttention(D, H, config.qkv_bias)
        self.img_mlp = _mlp(config)
        self.txt_mod = Modulation(D, 6)
        self.txt_attn = StreamAttention(D, H, config.qkv_bias)
        self.txt_mlp = _mlp(config)

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor) -> tuple[Tensor, Tensor]:
        """img (latents) (B,N,D), txt (condition) (B,M,D), vec (B,D) -> new img, txt."""
        i_shift1, i_scale1, i_gate1, i_shift2, i_scale2, i_gate2 = self.img_mod(vec)
        t_shift1, t_scale1, t_gate1, t_shift2, t_scale2, t_gate2 = self.txt_mod(vec)
        i_qkv = self.img_attn.heads_first(modulate(img, i_shift1, i_scale1))
        t_qkv = self.txt_attn.heads_first(modulate(txt, t_shift1, t_scale1))
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(t_qkv, i_qkv, strict=True))
        t_out, i_out = attend(q, k, v).split([txt.shape[1], img.shape[1]], dim=1)
        img = torch.addcmul(img, i_gate1, self.img_attn.project(i_out))
        img = torch.addcmul(img, i_gate2, self.img_mlp(modulate(img, i_shift2, i_scale2)))
        txt = torch.addcmul(txt, t_gate1, self.txt_attn.project(t_out))
        txt = torch.addcmul(txt, t_gate2, self.txt_mlp(modulate(txt, t_shift2, t_scale2)))
        return img, txt


class SingleStreamBlock(nn.Module):
    """Condition and latents as one sequence; attention and MLP in parallel behind fused projections (ViT-22B)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        D = config.width
        self.heads, self.mlp_width = config.heads, int(D * config.mlp_ratio)
        self.gelu = _gelu(config)
        self.linear1 = nn.Linear(D, 3 * D + self.mlp_width)
        self.linear2 = nn.Linear(D + self.mlp_width, D)
        self.norm = QKNorm(D // config.heads)
        self.modulation = Modulation(D, 3)

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        """x (condition, then latents) (B,M+N,D), vec (B,D) -> new x."""
        shift, scale, gate = self.modulation(vec)
        widths = [x.shape[-1]] * 3 + [self.mlp_width]  # one split: when compiled, its gradient is cheaper
        *qkv, hidden = self.linear1(modulate(x, shift, scale)).split(widths, dim=-1)
        q, k, v = (rearrange(part, "B L (H d) -> B H L d", H=self.heads) for part in qkv)
        q, k = self.norm(q, k)
        out = attend(q, k, v)
        hidden = nn.functional.gelu(hidden, approximate=self.gelu)
        return torch.addcmul(x, gate, self.linear2(torch.cat([out, hidden], dim=-1)))


class FinalLayer(nn.Module):
    """Modulated norm and projection to a latent's channels."""

    def __init__(self, width: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        """x (B,N,D), vec (B,D) -> (B,N,C)."""
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(x, shift, scale))


class ShapeDiT(PretrainedMixin, nn.Module):
    """Velocity of flow matching, d x_t / d t with x_0 noise and x_1 data."""

    config_class = DiTConfig

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.latent_in = nn.Linear(config.in_channels, config.width)
        if config.point_freqs:
            self.point_in = nn.Linear(3 + 6 * config.point_freqs, config.width, bias=False)
        wide = config.wide_time
        self.time_in = TimeEmbedder(config.width, config.time_factor) if wide else VectorEmbedder(config)
        self.cond_in = nn.Linear(config.condition_channels, config.width)
        if config.pooled_condition:
            self.pooled_in = nn.Linear(config.condition_channels, config.width, bias=False)
        if config.guidance_embed:
            self.guidance_in = VectorEmbedder(config)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(config) for _ in range(config.double_blocks))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(config) for _ in range(config.single_blocks))
        self.final_layer = FinalLayer(config.width, config.in_channels)
        if not self.latent_in.weight.is_meta:  # where there is nothing to fill
            self._initialise()

    def _initialise(self) -> None:
        """Xavier for projections; adaLN and the output start at zero, so that every block starts as identity (DiT)."""
        zeros, normal, every = nn.init.zeros_, nn.init.normal_, [*self.modules()]
        for module in every:
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    zeros(module.bias)
        for module in every:
            if isinstance(module, Modulation):
                zeros(module.lin.weight)
            elif isinstance(module, FinalLayer):
                zeros(module.linear.weight)
                zeros(module.get_parameter("adaLN_modulation.1.weight"))
            elif isinstance(module, VectorEmbedder):
                normal(module.in_layer.weight, std=0.02)
                normal(module.out_layer.weight, std=0.02)
        if self.config.pooled_condition:
            zeros(self.pooled_in.weight)

    def forward(
        self, latents: Tensor, t: Tensor, condition: Tensor, guidance: Tensor | None = None
    ) -> Tensor:
        """latents (B,N,C), t (B,) in [0,1], condition (B,M,Cc), guidance (B,) or None -> velocity (B,N,C).

        Raises ValueError when `guidance` is missing for a guidance-embedded model or given to another.
        """
        if self.config.guidance_embed != (guidance is not None):
            expected = "needs a" if self.config.guidance_embed else "takes no"
            raise ValueError(f"this model {expected} guidance scale per sample")
        dtype = self.latent_in.weight.dtype
        vec = self.time_in(1 - t if self.config.time_reversed else t)
        vec = (vec if guidance is None else vec + self.guidance_in(guidance)).to(dtype)
        if self.config.pooled_condition:
            vec = vec + self.pooled_in(condition.to(dtype).mean(dim=1))
        img, txt = self.latent_in(latents.to(dtype)), self.cond_in(condition.to(dtype))
        if self.config.point_freqs:
            # A token's velocity depends sharply on where the token is; a linear map of xyz learns that slowly.
            points = fourier_embedding(latents[..., :3], self.config.point_freqs)
            img = img + self.point_in(points.to(dtype))
        for block in self.double_blocks:
            img, txt = run_block(block, self.gradient_checkpointing, img, txt, vec)
        x = torch.cat([txt, img], dim=1)
        for block in self.single_blocks:
            x = run_block(block, self.gradient_checkpointing, x, vec)
        return self.final_layer(x[:, txt.shape[1] :], vec)
