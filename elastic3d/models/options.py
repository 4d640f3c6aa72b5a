"""Architecture of the networks, and what happens to an image before the encoder sees it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from elastic3d.utils.options import Options, option

MAX_WIDTH = 1 << 16  # channels; published models have at most some thousand
MAX_TOKENS = 1 << 20
MAX_LAYERS = 256


def check_heads(config: VAEConfig | DiTConfig | SkipDiTConfig) -> None:
    """ValueError unless the heads divide the width."""
    if config.width % config.heads:
        raise ValueError(f"width {config.width} is no multiple of heads {config.heads}")


@dataclass(kw_only=True)
class VAEConfig(Options):
    """Vecset shape VAE (3DShape2VecSet; Hunyuan3D-2 layout), optionally with anchored latents.

    With `anchored` a latent is its anchor point (xyz of the farthest-point sample it was read from) followed by
    `latent_channels` features; without it a latent is the features alone, as in the official checkpoints.
    """

    num_latents: int = option(128, "latent tokens a shape (N)", ge=1, le=MAX_TOKENS)
    latent_channels: int = option(16, "feature channels of a latent, without its anchor", ge=1, le=MAX_WIDTH)
    width: int = option(192, "transformer width (D)", ge=1, le=MAX_WIDTH)
    heads: int = option(3, "attention heads", ge=1, le=MAX_WIDTH)
    encoder_layers: int = option(
        2, "self-attention layers of the encoder; 0 builds no encoder", ge=0, le=MAX_LAYERS
    )
    decoder_layers: int = option(6, "self-attention layers of the decoder", ge=0, le=MAX_LAYERS)
    num_freqs: int = option(8, "octaves of the Fourier embedding of a point", ge=1, le=32, internal=True)
    include_pi: bool = option(False, "multiply the embedding's frequencies by pi", internal=True)
    qkv_bias: bool = option(False, "bias in the query, key and value projections", internal=True)
    qk_norm: bool = option(True, "LayerNorm on queries and keys", internal=True)
    mlp_ratio: int = option(4, "hidden width of the MLPs over their width", ge=1, le=64)
    geo_downsample: int = option(
        1,
        "width of the field decoder: the transformer's width divided by this",
        ge=1,
        le=MAX_WIDTH,
        internal=True,
    )
    geo_mlp_ratio: int = option(4, "hidden width over width in the field decoder's MLP", ge=1, le=64)
    geo_ln_post: bool = option(True, "LayerNorm before the field decoder's output", internal=True)
    geo_qk_norm: bool = option(
        True, "with qk_norm: LayerNorm on the field decoder's queries and keys too", internal=True
    )
    point_features: int = option(
        4,
        "channels after xyz of a surface point: normal (3), sharp-edge label (1)",
        ge=0,
        le=1024,
        internal=True,
    )
    sharp_latents: int = option(
        0,
        "how many of the latents read their query point from the sharp-edge stream",
        ge=0,
        le=MAX_TOKENS,
        internal=True,
    )
    norm_eps: float = option(
        1e-6, "epsilon of the LayerNorms (1e-5 in TripoSG and Step1X-3D)", gt=0, le=1, internal=True
    )
    post_eps: float = option(
        0.0, "epsilon of the encoder's last LayerNorm; 0: norm_eps", ge=0, le=1, internal=True
    )
    encoder_width: int = option(
        0, "width of the encoder; 0: the decoder's", ge=0, le=MAX_WIDTH, internal=True
    )
    sharp_attention: bool = option(
        False,
        "sharp-edge points have a projection and a cross-attention of their own, added to the surface's (Step1X-3D)",
        internal=True,
    )
    query_pool: int = option(
        0,
        "latents' query points are chosen among the first N points; 0: all",
        ge=0,
        le=1 << 24,
        internal=True,
    )
    logvar_min: float = option(-20.0, "lower bound of a latent's log variance", ge=-100, le=0, internal=True)
    logvar_max: float = option(4.0, "upper bound of a latent's log variance", ge=0, le=100, internal=True)
    anchored: bool = option(False, "a latent carries its anchor point and attention knows distances to it")
    neighbours_in: int = option(
        16, "anchored: surface points whose local shape a latent reads; 0 for none", ge=0, le=4096
    )
    neighbours_out: int = option(
        8, "anchored: latents whose local shape a field query reads; 0 for none", ge=0, le=4096
    )
    local_width: int = option(128, "anchored: hidden width of the local features", ge=1, le=MAX_WIDTH)
    anchor_jitter: float = option(
        0.005,
        "standard deviation of a drawn anchor about the point that was read",
        ge=0,
        le=1,
        internal=True,
    )
    scale_factor: float = option(
        1.0,
        "latents are multiplied by this for the DiT (after standardisation)",
        gt=0,
        le=1e6,
        internal=True,
    )
    latent_mean: list[float] = option(
        [], "mean of each latent channel over the training set; empty: 0", ge=-1e6, le=1e6, internal=True
    )
    latent_std: list[float] = option(
        [], "standard deviation of each latent channel; empty: 1", gt=0, le=1e6, internal=True
    )

    def check(self) -> None:
        """Widths divide, and parts are no larger than their whole."""
        check_heads(self)
        if self.encoder_width % self.heads:
            raise ValueError(f"encoder_width {self.encoder_width} is no multiple of heads {self.heads}")
        if self.sharp_attention and self.anchored:
            raise ValueError("sharp_attention and anchored are both true, expected one of them at most")
        if self.width % (self.heads * self.geo_downsample):
            raise ValueError(f"width {self.width} is no multiple of heads x geo_downsample")
        if self.heads % self.geo_downsample:
            raise ValueError(f"heads {self.heads} is no multiple of geo_downsample {self.geo_downsample}")
        for name in ("neighbours_out", "sharp_latents"):
            if getattr(self, name) > self.num_latents:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, expected a value from 0 to {self.num_latents}"
                )
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
class DiTConfig(Options):
    """Shape DiT in the Hunyuan3D-2 layout: double-stream, then single-stream blocks, no positional encoding."""

    in_channels: int = option(19, "channels of a latent (C)", ge=1, le=MAX_WIDTH, internal=True)
    condition_channels: int = option(768, "channels of a condition token", ge=1, le=MAX_WIDTH, internal=True)
    width: int = option(256, "transformer width (D)", ge=1, le=MAX_WIDTH)
    heads: int = option(4, "attention heads", ge=1, le=MAX_WIDTH)
    double_blocks: int = option(4, "double-stream blocks", ge=0, le=MAX_LAYERS)
    single_blocks: int = option(12, "single-stream blocks", ge=0, le=MAX_LAYERS)
    mlp_ratio: float = option(4.0, "hidden width of the MLPs over D", ge=1 / 16, le=64)
    gelu_tanh: bool = option(
        True,
        "tanh approximation of GELU, as in the official weights; false is exact, and much faster on a CPU",
    )
    qkv_bias: bool = option(
        True, "bias in the double blocks' query, key and value projections", internal=True
    )
    guidance_embed: bool = option(
        False, "embed the guidance scale (guidance-distilled models)", internal=True
    )
    time_factor: float = option(
        1000.0, "t in [0, 1] is multiplied by this before it is embedded", gt=0, le=1e6, internal=True
    )
    max_period: float = option(
        1000.0,
        "longest period of the timestep embedding (1000 in Hunyuan3D-2)",
        gt=1,
        le=1e9,
        internal=True,
    )
    wide_time: bool = option(
        False,
        "embed t in as many channels as the model has, sines first, with periods up to 10000 (Step1X-3D)",
        internal=True,
    )
    time_reversed: bool = option(
        False, "the network's own time is 1 - t: 1 is noise (Step1X-3D)", internal=True
    )
    pooled_condition: bool = option(
        False,
        "the condition tokens' mean modulates the blocks, as the timestep does (official models: false)",
    )
    point_freqs: int = option(
        0,
        "octaves in which a latent's first three channels, its anchor, are embedded besides; 0: none (official)",
        ge=0,
        le=16,
    )
    num_latents: int = option(
        128,
        "latent tokens to generate (N); the weights do not depend on it",
        ge=1,
        le=MAX_TOKENS,
        internal=True,
    )
    condition_tokens: int = option(
        49,
        "condition tokens (M) the model was trained with; likewise",
        ge=1,
        le=MAX_TOKENS,
        internal=True,
    )

    def check(self) -> None:
        """The heads divide the width, and an MLP has channels."""
        check_heads(self)
        if int(self.width * self.mlp_ratio) < 1:
            raise ValueError(f"width {self.width} x mlp_ratio {self.mlp_ratio:g} leaves MLPs no channel")


@dataclass(kw_only=True)
class SkipDiTConfig(Options):
    """Shape DiT of Hunyuan3D-2.1: one stream with long skips (U-ViT), cross-attention, experts in the last blocks."""

    in_channels: int = option(64, "channels of a latent (C)", ge=1, le=MAX_WIDTH)
    condition_channels: int = option(1024, "channels of a condition token", ge=1, le=MAX_WIDTH)
    width: int = option(2048, "transformer width (D)", ge=1, le=MAX_WIDTH)
    heads: int = option(16, "attention heads", ge=1, le=MAX_WIDTH)
    blocks: int = option(
        21,
        "blocks; those of the second half read the output of their mirror image",
        ge=1,
        le=MAX_LAYERS,
    )
    expert_blocks: int = option(
        6, "how many of the last blocks have experts in place of an MLP", ge=0, le=MAX_LAYERS
    )
    experts: int = option(8, "experts of such a block, besides the one that every token passes", ge=1, le=64)
    experts_per_token: int = option(2, "experts that a token passes", ge=1, le=64)
    qkv_bias: bool = option(False, "bias in the query, key and value projections")
    qk_norm: bool = option(True, "RMSNorm on queries and keys")
    norm_eps: float = option(1e-6, "epsilon of the LayerNorms (1e-5 in TripoSG)", gt=0, le=1)
    time_factor: float = option(
        1.0, "t is multiplied by this before it is embedded (1000 in TripoSG)", gt=0, le=1e6
    )
    time_reversed: bool = option(False, "the network's own time is 1 - t: 1 is noise (TripoSG)")
    num_latents: int = option(
        4096, "latent tokens to generate (N); the weights do not depend on it", ge=1, le=MAX_TOKENS
    )
    condition_tokens: int = option(
        1370, "condition tokens (M) the model was trained with; likewise", ge=1, le=MAX_TOKENS
    )
    guidance_embed: bool = option(False, "there is no guidance-distilled model of this kind: false")

    def check(self) -> None:
        """The heads divide the width; experts are there to choose from."""
        check_heads(self)
        if self.expert_blocks > self.blocks:
            raise ValueError(
                f"expert_blocks is {self.expert_blocks}, expected a value from 0 to {self.blocks}"
            )
        if self.experts_per_token > self.experts:
            raise ValueError(
                f"experts_per_token is {self.experts_per_token}, expected a value from 1 to {self.experts}"
            )
        if self.guidance_embed:
            raise ValueError("guidance_embed is true, expected false for this kind of model")


class EncoderKind(Enum):
    """Which pretrained network reads the image."""

    efficientnet_lite0 = "efficientnet_lite0"
    dinov2 = "dinov2"


class EncoderFeatures(Enum):
    """EfficientNet only: `multiscale` keeps where things are, `head` is the classifier's last feature map."""

    multiscale = "multiscale"
    head = "head"


class ForegroundMethod(Enum):
    """Where the object's mask comes from; `auto`: the first of alpha, plain background, rembg that fits."""

    auto = "auto"
    alpha = "alpha"
    plain = "plain"
    rembg = "rembg"


@dataclass(kw_only=True)
class ImageEncoderConfig(Options):
    """A frozen image encoder."""

    kind: EncoderKind = option(EncoderKind.efficientnet_lite0, "pretrained network that reads the image")
    features: EncoderFeatures = option(EncoderFeatures.multiscale, "feature maps taken (EfficientNet only)")
    image_size: int = option(
        224, "side of the input in pixels, a multiple of 32 (EfficientNet) or 14 (DINOv2)", ge=28, le=2048
    )
    prepared_size: int = option(
        0,
        "DINOv2 only: images are prepared at this side and then resized; 0: image_size",
        ge=0,
        le=2048,
    )
    centre_crop: bool = option(
        False,
        "DINOv2 only: image_size pixels are cut out of the middle of prepared_size, rather than resized",
    )
    border: float = option(
        0.15, "share of the square that stays free along the object's longer side", ge=0, le=0.9
    )
    views: int = option(
        1, "DINOv2 only: images of one object, told apart by an embedding of their direction", ge=1, le=16
    )
    path: str = option("", "folder of the DINOv2 model (config.json and safetensors); unused by EfficientNet")

    def check(self) -> None:
        """The input is cut into whole patches."""
        step = 14 if self.kind is EncoderKind.dinov2 else 32
        if self.image_size % step:
            raise ValueError(
                f"image_size is {self.image_size}, expected a multiple of {step} ({self.kind.name})"
            )
        if self.centre_crop and self.prepared_size < self.image_size:
            raise ValueError(
                f"prepared_size is {self.prepared_size}, expected at least image_size {self.image_size} to cut from"
            )
        if self.kind is EncoderKind.dinov2 and not self.path:
            raise ValueError("path is empty, expected the folder of a DINOv2 model")


@dataclass(kw_only=True)
class ForegroundConfig(Options):
    """How the object is cut out and centred."""

    method: ForegroundMethod = option(ForegroundMethod.auto, "where the object's mask comes from")
    border: float | None = option(
        None,
        "share of the square that stays free along the object's longer side; null: the model's own",
        ge=0,
        le=0.9,
    )
    tolerance: int = option(
        20, "largest channel difference (0 to 255) within a plain background", ge=0, le=255
    )

    def for_encoder(self, encoder: ImageEncoderConfig) -> ForegroundConfig:
        """With the border that a model's images have, where none was chosen."""
        return replace(self, border=encoder.border) if self.border is None else self
