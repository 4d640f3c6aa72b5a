"""Architecture of the shape VAE and of the shape diffusion transformer."""

from __future__ import annotations

from dataclasses import dataclass

from elastic3d.config.base import check_range, option


def _check_sizes(config: VAEConfig | DiTConfig | SkipDiTConfig, *names: str) -> None:
    """ValueError unless these fields, and those that all have, are 1 or more and the heads divide the width."""
    for name in ("width", "heads", "num_latents", *names):
        check_range(name, getattr(config, name), 1, 1 << 20)
    if config.width % config.heads:
        raise ValueError(f"width {config.width} is no multiple of heads {config.heads}")


@dataclass(kw_only=True)
class VAEConfig:
    """Vecset shape VAE (3DShape2VecSet; Hunyuan3D-2 layout), optionally with anchored latents.

    With `anchored` a latent is its anchor point (xyz of the farthest-point sample it was read from) followed by
    `latent_channels` features; without it a latent is the features alone, as in the official checkpoints.
    """

    num_latents: int = option(128, "latent tokens a shape (N)")
    latent_channels: int = option(16, "feature channels of a latent, without its anchor")
    width: int = option(192, "transformer width (D)")
    heads: int = option(3, "attention heads")
    encoder_layers: int = option(2, "self-attention layers of the encoder; 0 builds no encoder")
    decoder_layers: int = option(6, "self-attention layers of the decoder")
    num_freqs: int = option(8, "octaves of the Fourier embedding of a point")
    include_pi: bool = option(False, "multiply the embedding's frequencies by pi")
    qkv_bias: bool = option(False, "bias in the query, key and value projections")
    qk_norm: bool = option(True, "LayerNorm on queries and keys")
    norm_eps: float = option(1e-6, "epsilon of the LayerNorms (1e-5 in TripoSG and Step1X-3D)")
    mlp_ratio: int = option(4, "hidden width of the MLPs over their width")
    encoder_width: int = option(0, "width of the encoder; 0: the decoder's")
    geo_downsample: int = option(1, "width of the field decoder: the transformer's width divided by this")
    geo_mlp_ratio: int = option(4, "hidden width over width in the field decoder's MLP")
    geo_ln_post: bool = option(True, "LayerNorm before the field decoder's output")
    geo_qk_norm: bool = option(True, "with qk_norm: LayerNorm on the field decoder's queries and keys too")
    point_features: int = option(4, "channels after xyz of a surface point: normal (3), sharp-edge label (1)")
    sharp_latents: int = option(
        0, "how many of the latents read their query point from the sharp-edge stream"
    )
    sharp_attention: bool = option(
        False,
        "sharp-edge points have a projection and a cross-attention of their own, added to the surface's (Step1X-3D)",
    )
    query_pool: int = option(0, "latents' query points are chosen among the first N points; 0: all")
    logvar_min: float = option(-20.0, "lower bound of a latent's log variance")
    logvar_max: float = option(4.0, "upper bound of a latent's log variance")
    anchored: bool = option(False, "a latent carries its anchor point and attention knows distances to it")
    neighbours_in: int = option(16, "anchored: surface points whose local shape a latent reads; 0 for none")
    neighbours_out: int = option(8, "anchored: latents whose local shape a field query reads; 0 for none")
    local_width: int = option(128, "anchored: hidden width of the local features")
    anchor_jitter: float = option(0.005, "standard deviation of a drawn anchor about the point that was read")
    scale_factor: float = option(1.0, "latents are multiplied by this for the DiT (after standardisation)")
    latent_mean: list[float] = option([], "mean of each latent channel over the training set; empty: 0")
    latent_std: list[float] = option([], "standard deviation of each latent channel; empty: 1")

    def __post_init__(self) -> None:
        _check_sizes(self, "latent_channels", "num_freqs", "geo_downsample")
        if self.width % (self.heads * self.geo_downsample):
            raise ValueError(f"width {self.width} is no multiple of heads x geo_downsample")
        if self.heads % self.geo_downsample:
            raise ValueError(f"heads {self.heads} is no multiple of geo_downsample {self.geo_downsample}")
        if self.encoder_width % self.heads:
            raise ValueError(f"encoder_width {self.encoder_width} is no multiple of heads {self.heads}")
        if self.sharp_attention and self.anchored:
            raise ValueError("sharp_attention and anchored are both true, expected one of them at most")
        for name in ("norm_eps", "encoder_width", "query_pool"):
            check_range(name, getattr(self, name), 0, 1 << 20)
        check_range("neighbours_out", self.neighbours_out, 0, self.num_latents)
        check_range("sharp_latents", self.sharp_latents, 0, self.num_latents)
        for name in ("latent_mean", "latent_std"):
            if len(getattr(self, name)) not in (0, self.channels):
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} values, expected {self.channels} or none"
                )

    @property
    def channels(self) -> int:
        """Channels of a latent as the DiT sees it (C)."""
        return self.latent_channels + (3 if self.anchored else 0)


@dataclass(kw_only=True)
class DiTConfig:
    """Shape DiT in the Hunyuan3D-2 layout: double-stream, then single-stream blocks, no positional encoding."""

    in_channels: int = option(19, "channels of a latent (C)")
    condition_channels: int = option(768, "channels of a condition token")
    width: int = option(256, "transformer width (D)")
    heads: int = option(4, "attention heads")
    double_blocks: int = option(4, "double-stream blocks")
    single_blocks: int = option(12, "single-stream blocks")
    mlp_ratio: float = option(4.0, "hidden width of the MLPs over D")
    gelu_tanh: bool = option(
        True,
        "tanh approximation of GELU, as in the official weights; false is exact, and much faster on a CPU",
    )
    qkv_bias: bool = option(True, "bias in the double blocks' query, key and value projections")
    guidance_embed: bool = option(False, "embed the guidance scale (guidance-distilled models)")
    time_factor: float = option(1000.0, "t in [0, 1] is multiplied by this before it is embedded")
    max_period: float = option(1000.0, "longest period of the timestep embedding (1000 in Hunyuan3D-2)")
    wide_time: bool = option(
        False,
        "embed t in as many channels as the model has, sines first, with periods up to 10000 (Step1X-3D)",
    )
    time_reversed: bool = option(False, "the network's own time is 1 - t: 1 is noise (Step1X-3D)")
    pooled_condition: bool = option(
        False,
        "the condition tokens' mean modulates the blocks, as the timestep does (official models: false)",
    )
    point_freqs: int = option(
        0,
        "octaves in which a latent's first three channels, its anchor, are embedded besides; 0: none (official)",
    )
    num_latents: int = option(128, "latent tokens to generate (N); the weights do not depend on it")
    condition_tokens: int = option(49, "condition tokens (M) the model was trained with; likewise")

    def __post_init__(self) -> None:
        _check_sizes(self, "in_channels", "condition_channels", "condition_tokens")
        check_range("double_blocks", self.double_blocks, 0, 1000)
        check_range("single_blocks", self.single_blocks, 0, 1000)
        check_range("point_freqs", self.point_freqs, 0, 16)


@dataclass(kw_only=True)
class SkipDiTConfig:
    """Shape DiT of Hunyuan3D-2.1 and TripoSG: one stream with long skips (U-ViT), cross-attention, perhaps experts."""

    in_channels: int = option(64, "channels of a latent (C)")
    condition_channels: int = option(1024, "channels of a condition token")
    width: int = option(2048, "transformer width (D)")
    heads: int = option(16, "attention heads")
    blocks: int = option(21, "blocks; those of the second half read the output of their mirror image")
    expert_blocks: int = option(6, "how many of the last blocks have experts in place of an MLP")
    experts: int = option(8, "experts of such a block, besides the one that every token passes")
    experts_per_token: int = option(2, "experts that a token passes")
    qkv_bias: bool = option(False, "bias in the query, key and value projections")
    qk_norm: bool = option(True, "RMSNorm on queries and keys")
    norm_eps: float = option(1e-6, "epsilon of the LayerNorms (1e-5 in TripoSG)")
    time_factor: float = option(1.0, "t is multiplied by this before it is embedded (1000 in TripoSG)")
    time_reversed: bool = option(False, "the network's own time is 1 - t: 1 is noise (TripoSG)")
    num_latents: int = option(4096, "latent tokens to generate (N); the weights do not depend on it")
    condition_tokens: int = option(1370, "condition tokens (M) the model was trained with; likewise")
    guidance_embed: bool = option(False, "there is no guidance-distilled model of this kind: false")

    def __post_init__(self) -> None:
        _check_sizes(self, "in_channels", "condition_channels", "condition_tokens", "blocks", "experts")
        check_range("expert_blocks", self.expert_blocks, 0, self.blocks)
        check_range("experts_per_token", self.experts_per_token, 1, self.experts)
        if self.guidance_embed:
            raise ValueError("guidance_embed is true, expected false for this kind of model")
