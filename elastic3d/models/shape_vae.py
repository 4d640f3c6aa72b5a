"""Shape VAE: a point cloud becomes a set of latents, the latents become a field.

Layout and parameter names of the Hunyuan3D-2 vecset VAE (after 3DShape2VecSet, arXiv 2301.11445), so official
weights load as they are. `anchored=true` adds what small models need to learn fast: every latent carries the point it
was read from, attention between points and latents knows their distance, and local features its direction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from elastic3d.models.layers import (
    MLP,
    AnchorFeatures,
    DistanceBias,
    LocalFeatures,
    QKNorm,
    attend,
    farthest_points,
    fourier_embedding,
)
from elastic3d.models.options import VAEConfig
from elastic3d.models.weights import PretrainedMixin

_ROWS = 4096  # field queries at a time on a CPU: their activations stay in its cache


class SelfAttention(nn.Module):
    """Multi-head self-attention; q, k and v of a head lie side by side in `c_qkv`."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.c_qkv = nn.Linear(config.width, 3 * config.width, bias=config.qkv_bias)
        self.c_proj = nn.Linear(config.width, config.width)
        self.attention = QKNorm(config.width // config.heads, config.qk_norm)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        q, k, v = rearrange(self.c_qkv(x), "B N (H K d) -> K B H N d", H=self.heads, K=3)
        return self.c_proj(attend(self.attention.q_norm(q), self.attention.k_norm(k), v))


class SelfAttentionBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.attn = SelfAttention(config)
        self.ln_1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = MLP(config.width, config.mlp_ratio)
        self.ln_2 = nn.LayerNorm(config.width, eps=config.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of self-attention blocks, each of which may be compiled or sharded for itself."""

    def __init__(self, config: VAEConfig, layers: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(SelfAttentionBlock(config) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        for block in self.resblocks:
            x = block(x)
        return x


class CrossAttention(nn.Module):
    """Queries (B,P,D) read from keys and values (B,H,N,d); with a distance bias where both carry positions."""

    def __init__(self, config: VAEConfig, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.c_q = nn.Linear(width, width, bias=config.qkv_bias)
        self.c_kv = nn.Linear(width, 2 * width, bias=config.qkv_bias)
        self.c_proj = nn.Linear(width, width)
        self.attention = QKNorm(width // heads, qk_norm)
        if config.anchored:
            self.distance = DistanceBias(heads)

    def keys_values(self, data: Tensor, points: Tensor | None) -> tuple[Tensor, Tensor]:
        """Of data (B,N,D) at points (B,N,3)."""
        k, v = rearrange(self.c_kv(data), "B N (H K d) -> K B H N d", H=self.heads, K=2)
        k = self.attention.k_norm(k)
        return (k if points is None else self.distance.extend_keys(k, points)), v

    def forward(self, x: Tensor, points: Tensor | None, k: Tensor, v: Tensor) -> Tensor:
        """x (B,P,D) at points (B,P,3) -> (B,P,D)."""
        q = self.attention.q_norm(rearrange(self.c_q(x), "B P (H d) -> B H P d", H=self.heads))
        if points is None:
            return self.c_proj(attend(q, k, v))
        return self.c_proj(attend(self.distance.extend_queries(q, points), k, v, scale=1.0))


class CrossAttentionBlock(nn.Module):
    """Pre-norm cross-attention block. Points are given where the VAE is anchored, else None."""

    def __init__(self, config: VAEConfig, width: int, heads: int, mlp_ratio: int, qk_norm: bool) -> None:
        super().__init__()
        self.attn = CrossAttention(config, width, heads, qk_norm)
        self.ln_1 = nn.LayerNorm(width, eps=config.norm_eps)
        self.ln_2 = nn.LayerNorm(width, eps=config.norm_eps)
        self.ln_3 = nn.LayerNorm(width, eps=config.norm_eps)
        self.mlp = MLP(width, mlp_ratio)

    def keys_values(self, data: Tensor, points: Tensor | None) -> tuple[Tensor, Tensor]:
        """What queries read of data (B,N,D) at points (B,N,3): keys and values (B,H,N,d)."""
        return self.attn.keys_values(self.ln_2(data), points)

    def forward(self, x: Tensor, points: Tensor | None, k: Tensor, v: Tensor) -> Tensor:
        """Queries x (B,P,D) at points (B,P,3) -> (B,P,D)."""
        x = x + self.attn(self.ln_1(x), points, k, v)
        return x + self.mlp(self.ln_3(x))


@dataclass
class Posterior:
    """Diagonal Gaussian over latents: mean and logvar (B, N, C)."""

    mean: Tensor
    logvar: Tensor
    anchor_channels: int

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """One draw (B, N, C)."""
        noise = torch.empty_like(self.mean).normal_(generator=generator)
        return self.mean + noise * (0.5 * self.logvar).exp()

    def kl(self) -> Tensor:
        """KL to the standard normal of each sample (B,), mean over latents and features; anchors do not count."""
        mean, logvar = (x[..., self.anchor_channels :].float() for x in (self.mean, self.logvar))
        return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean(dim=(1, 2))


class Encoder(nn.Module):
    """Surface points -> one token per query point (a farthest-point sample of the surface)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        if config.encoder_width:
            config = replace(config, width=config.encoder_width)
        self.config = config
        channels = 3 + 6 * config.num_freqs + config.point_features
        self.input_proj = nn.Linear(channels, config.width)
        block = config.width, config.heads, config.mlp_ratio, config.qk_norm
        self.cross_attn = CrossAttentionBlock(config, *block)
        if config.sharp_attention:
            self.input_proj_sharp = nn.Linear(channels, config.width)
            self.cross_attn_sharp = CrossAttentionBlock(config, *block)
        if config.anchored and config.neighbours_in:
            sizes = config.point_features, config.width, config.local_width, config.neighbours_in
            self.local = LocalFeatures(*sizes, "max")
        self.self_attn = Transformer(config, config.encoder_layers)
        self.ln_post = nn.LayerNorm(config.width, eps=config.post_eps or config.norm_eps)

    def forward(self, surface: Tensor, sharp: Tensor | None, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
        """surface (B,P,6), sharp (B,Q,6) or None: xyz and unit normal -> tokens (B,N,D), anchors (B,N,3) fp32."""
        cfg = self.config
        if cfg.sharp_attention:
            return self._read_apart(surface, sharp)
        from_sharp = cfg.sharp_latents if sharp is not None else 0
        points = _labelled(surface, 0.0)
        queries = _pick(points[:, : cfg.query_pool or None], cfg.num_latents - from_sharp)
        if sharp is not None:
            edges = _labelled(sharp, 1.0)
            points = torch.cat([points, edges], dim=1)
            if from_sharp:
                queries = torch.cat([queries, _pick(edges, from_sharp)], dim=1)
        if offsets is not None:
            queries = torch.cat([queries[..., :3] + offsets, queries[..., 3:]], dim=-1)
        x = self._embed(queries)
        if cfg.anchored and cfg.neighbours_in:
            features = points[..., 3 : 3 + cfg.point_features].to(x.dtype)
            x = x + self.local(queries[..., :3], points[..., :3], features)
        at, data_at = (queries[..., :3], points[..., :3]) if cfg.anchored else (None, None)
        x = self.cross_attn(x, at, *self.cross_attn.keys_values(self._embed(points), data_at))
        return self.ln_post(self.self_attn(x)), queries[..., :3]

    def _read_apart(self, surface: Tensor, sharp: Tensor | None) -> tuple[Tensor, Tensor]:
        """All queries read the surface and the sharp-edge points, each with weights of its own; both are added.

        Each block adds what it read to the queries, so that these count twice: so the weights were trained.
        """
        cfg = self.config
        if sharp is None:
            raise ValueError("this VAE's encoder needs sharp-edge points (sharp_attention is true)")
        points, edges = _labelled(surface, 0.0), _labelled(sharp, 1.0)
        flat = _pick(points[:, : cfg.query_pool or None], cfg.num_latents - cfg.sharp_latents)
        edge = _pick(edges[:, : cfg.query_pool or None], cfg.sharp_latents)
        queries = torch.cat([self._embed(flat), self._embed(edge, self.input_proj_sharp)], dim=1)
        x = self.cross_attn(queries, None, *self.cross_attn.keys_values(self._embed(points), None))
        edge_tokens = self._embed(edges, self.input_proj_sharp)
        x = x + self.cross_attn_sharp(queries, None, *self.cross_attn_sharp.keys_values(edge_tokens, None))
        return self.ln_post(self.self_attn(x)), torch.cat([flat, edge], dim=1)[..., :3]

    def _embed(self, points: Tensor, projection: nn.Linear | None = None) -> Tensor:
        projection = projection or self.input_proj
        position = fourier_embedding(points[..., :3], self.config.num_freqs, self.config.include_pi)
        features = points[..., 3 : 3 + self.config.point_features]
        return projection(torch.cat([position, features], dim=-1).to(projection.weight.dtype))


def _labelled(points: Tensor, label: float) -> Tensor:
    """(B,P,6) -> (B,P,7) fp32 with the sharp-edge label behind."""
    return nn.functional.pad(points.float(), (0, 1), value=label)


def _pick(points: Tensor, count: int) -> Tensor:
    """Farthest-point sample of labelled points (B,P,7) -> (B,count,7)."""
    index = farthest_points(points[..., :3], count)
    return points.gather(1, index[..., None].expand(-1, -1, points.shape[-1]))


class GeoDecoder(nn.Module):
    """The field: query points read from the decoded latents by one cross-attention block."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        width, heads = config.width // config.geo_downsample, config.heads // config.geo_downsample
        self.query_proj = nn.Linear(3 + 6 * config.num_freqs, width)
        if config.geo_downsample > 1:
            self.latents_proj = nn.Linear(config.width, width)
        if config.anchored and config.neighbours_out:
            self.local = LocalFeatures(width, width, config.local_width, config.neighbours_out, "fade")
        qk_norm = config.qk_norm and config.geo_qk_norm
        self.cross_attn_decoder = CrossAttentionBlock(config, width, heads, config.geo_mlp_ratio, qk_norm)
        self.ln_post = nn.LayerNorm(width, eps=1e-5) if config.geo_ln_post else nn.Identity()
        self.output_proj = nn.Linear(width, 1)

    def forward(self, points: Tensor, tokens: Tensor, anchors: Tensor | None) -> Tensor:
        """points (B,P,3), tokens (B,N,D), anchors (B,N,3) or None -> field (B,P) fp32."""
        return self.read(points, *self.prepare(tokens, anchors))

    def prepare(
        self, tokens: Tensor, anchors: Tensor | None, often: bool = False
    ) -> tuple[Any, Tensor, Tensor]:
        """What `read` needs of tokens (B,N,D) and anchors: features of neighbours, keys and values.

        Args:
            often: of one sample, which will be read at many points.
        """
        if self.config.geo_downsample > 1:
            tokens = self.latents_proj(tokens)
        local: Any = None
        if anchors is not None and self.config.neighbours_out:
            local = partial(self.local, x_k=anchors, features=tokens)
            # a product an anchor is many small kernels for a GPU
            if often and tokens.device.type == "cpu" and self.config.neighbours_out > 1:
                local = AnchorFeatures(self.local, tokens[0], anchors[0])
        return local, *self.cross_attn_decoder.keys_values(tokens, anchors)

    def read(self, points: Tensor, local: Any, k: Tensor, v: Tensor) -> Tensor:
        """The field (B,P) at points (B,P,3), from what `prepare` found."""
        position = fourier_embedding(points, self.config.num_freqs, self.config.include_pi)
        x = self.query_proj(position.to(self.query_proj.weight.dtype))
        if local is not None:
            x = x + local(points)
        x = self.cross_attn_decoder(x, points if self.config.anchored else None, k, v)
        return self.output_proj(self.ln_post(x)).squeeze(-1).float()


class ShapeVAE(PretrainedMixin, nn.Module):
    """Point cloud <-> latents -> field, positive inside."""

    config_class = VAEConfig

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        if config.encoder_layers:
            self.encoder = Encoder(config)
            self.pre_kl = nn.Linear(config.encoder_width or config.width, 2 * config.latent_channels)
        self.post_kl = nn.Linear(config.latent_channels, config.width)
        if config.anchored:
            self.anchor_proj = nn.Linear(3 + 6 * config.num_freqs, config.width)
        self.transformer = Transformer(config, config.decoder_layers)
        self.geo_decoder = GeoDecoder(config)
        if not self.post_kl.weight.is_meta:  # where there is nothing to fill
            self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.config.encoder_layers:
            # A unit-variance posterior drowns the latents in noise for hundreds of steps: start it at std 0.05.
            nn.init.constant_(self.pre_kl.bias[self.config.latent_channels :], -6.0)

    def set_latent_statistics(self, mean: list[float], std: list[float]) -> None:
        """Standardise latents for the DiT by these channel statistics (C values each, or none)."""
        self.config.latent_mean, self.config.latent_std = list(mean), list(std)

    def encode(
        self, surface: Tensor, sharp: Tensor | None = None, offsets: Tensor | None = None
    ) -> Posterior:
        """surface (B,P,6), sharp (B,Q,6): xyz and outward unit normal -> posterior over raw latents (B,N,C).

        `offsets` (B,N,3) move the anchors off the surface before they are read: the features then tell where the
        surface is as seen from there, so that a generated anchor need not lie on it exactly.
        """
        if not self.config.encoder_layers:
            raise ValueError("this VAE has no encoder (encoder_layers is 0)")
        tokens, anchors = self.encoder(surface, sharp, offsets)
        mean, logvar = self.pre_kl(tokens).float().chunk(2, dim=-1)
        logvar = logvar.clamp(self.config.logvar_min, self.config.logvar_max)
        if not self.config.anchored:
            return Posterior(mean, logvar, 0)
        jitter = torch.full_like(anchors, 2 * torch.tensor(self.config.anchor_jitter + 1e-8).log().item())
        return Posterior(torch.cat([anchors, mean], dim=-1), torch.cat([jitter, logvar], dim=-1), 3)

    def to_latents(self, raw: Tensor) -> Tensor:
        """Raw latents (B,N,C) -> what the DiT sees: standardised and scaled."""
        mean, std = self._statistics(raw.device)
        return (raw - mean) / std * self.config.scale_factor

    def from_latents(self, latents: Tensor) -> Tensor:
        """Inverse of `to_latents`."""
        mean, std = self._statistics(latents.device)
        return latents.float() / self.config.scale_factor * std + mean

    def _statistics(self, device: torch.device) -> list[Tensor]:
        """Mean and standard deviation of raw latents, (C,) or (1,) each, in fp32."""
        both = self.config.latent_mean or [0.0], self.config.latent_std or [1.0]
        return [torch.tensor(each, device=device, dtype=torch.float32) for each in both]

    def decode(self, latents: Tensor) -> Tensor:
        """DiT-space latents (B,N,C) -> decoder tokens (B,N,D); anchored: (B,N,3+D), the anchor in front, in fp32."""
        raw = self.from_latents(latents)
        dtype = self.post_kl.weight.dtype
        if not self.config.anchored:
            return self.transformer(self.post_kl(raw.to(dtype)))
        anchors, features = raw[..., :3], raw[..., 3:]
        position = fourier_embedding(anchors, self.config.num_freqs, self.config.include_pi)
        tokens = self.post_kl(features.to(dtype)) + self.anchor_proj(position.to(dtype))
        return torch.cat([anchors, self.transformer(tokens).float()], dim=-1)

    def query(self, points: Tensor, tokens: Tensor) -> Tensor:
        """Field at points (B,P,3) from `decode`'s tokens -> (B,P) fp32, positive inside."""
        return self.geo_decoder(points, *self._parts(tokens))

    def field(self, tokens: Tensor) -> Callable[[Tensor], Tensor]:
        """field(points (P,3)) -> (P,), of one sample's tokens (1,N,D): `query` without gradients, for decoding a mesh.

        What depends on the tokens alone is computed once, so that it is equal to `query` within rounding.
        """
        geo, rows = self.geo_decoder, _ROWS if tokens.device.type == "cpu" else 1 << 30
        with torch.no_grad():
            prepared = geo.prepare(*self._parts(tokens), often=True)

        @torch.no_grad()
        def field(points: Tensor) -> Tensor:
            return torch.cat([geo.read(some[None], *prepared)[0] for some in points.split(rows)])

        return field

    def _parts(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """`decode`'s tokens -> those (B,N,D) of the decoder, and the anchors (B,N,3) or None."""
        dtype = self.post_kl.weight.dtype
        if not self.config.anchored:
            return tokens.to(dtype), None
        return tokens[..., 3:].to(dtype), tokens[..., :3]

    def forward(self, surface: Tensor, sharp: Tensor | None, points: Tensor) -> tuple[Tensor, Posterior]:
        """One training pass: encode, draw, decode, query -> field (B,P), posterior."""
        posterior = self.encode(surface, sharp)
        latents = self.to_latents(posterior.sample() if self.training else posterior.mean)
        return self.query(points, self.decode(latents)), posterior
