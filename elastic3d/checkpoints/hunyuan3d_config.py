"""Hunyuan3D-2 checkpoints: what their config.yaml says, in this project's dataclasses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from elastic3d.checkpoints.options import INSIDE, CheckpointConfig, Table, check_partners, mapped
from elastic3d.diffusion.options import PipelineConfig, SamplingGrid
from elastic3d.errors import UserError
from elastic3d.models.options import DiTConfig, EncoderKind, ImageEncoderConfig, SkipDiTConfig, VAEConfig
from elastic3d.utils.options import from_dict

VIEW_NAMES = ("front", "left", "back", "right")
_DIT: Table = {
    "in_channels": ("in_channels", 64),
    "context_in_dim": ("condition_channels", 1536),
    "hidden_size": ("width", 1024),
    "mlp_ratio": ("mlp_ratio", 4.0),
    "num_heads": ("heads", 16),
    "depth": ("double_blocks", 16),
    "depth_single_blocks": ("single_blocks", 32),
    "qkv_bias": ("qkv_bias", True),
    "time_factor": ("max_period", 1000.0),  # their name for what they pass on as the longest period
    "guidance_embed": ("guidance_embed", False),
    "axes_dim": ((), None),
    "theta": ((), None),
    "ckpt_path": ((None,), None),
}
_SKIP_DIT: Table = {
    "in_channels": ("in_channels", 4),
    "context_dim": ("condition_channels", 1024),
    "hidden_size": ("width", 1024),
    "num_heads": ("heads", 16),
    "depth": ("blocks", 24),
    "num_moe_layers": ("expert_blocks", 6),
    "num_experts": ("experts", 8),
    "moe_top_k": ("experts_per_token", 2),
    "qkv_bias": ("qkv_bias", True),
    "qk_norm": ("qk_norm", False),
    "text_len": ("condition_tokens", 257),
    "input_size": ("num_latents", 1024),
    "mlp_ratio": ((4, 4.0), 4.0),
    "norm_type": (("layer",), "layer"),
    "qk_norm_type": (("rms",), "rms"),
    "with_decoupled_ca": ((False,), False),
    "use_pos_emb": ((False,), False),
    "use_attention_pooling": ((False,), True),
    "guidance_cond_proj_dim": ((None,), None),
    "additional_cond_hidden_state": ((), None),
    "decoupled_ca_dim": ((), None),
    "decoupled_ca_weight": ((), None),
}
_VAE: Table = {
    "num_latents": ("num_latents", 3072),
    "embed_dim": ("latent_channels", 64),
    "width": ("width", 1024),
    "heads": ("heads", 16),
    "num_encoder_layers": ("encoder_layers", 8),
    "num_decoder_layers": ("decoder_layers", 16),
    "geo_decoder_downsample_ratio": ("geo_downsample", 1),
    "geo_decoder_mlp_expand_ratio": ("geo_mlp_ratio", 4),
    "geo_decoder_ln_post": ("geo_ln_post", True),
    "num_freqs": ("num_freqs", 8),
    "include_pi": ("include_pi", True),
    "qkv_bias": ("qkv_bias", True),
    "qk_norm": ("qk_norm", False),
    "point_feats": ("point_features", 3),
    "scale_factor": ("scale_factor", 1.0),
    "label_type": (("binary",), "binary"),
    "drop_path_rate": ((), 0.0),
    "pc_size": ((), None),
    "pc_sharpedge_size": ((), None),
    "downsample_ratio": ((), None),
}
_IMAGE: Table = {"size": ("size", 512), "border_ratio": ((0.15, None), 0.15)}
_DINOV2_SIZES = {
    "dinov2-small": (384, 12, 6, False),
    "dinov2-base": (768, 12, 12, False),
    "dinov2-large": (1024, 24, 16, False),
    "dinov2-giant": (1536, 40, 24, True),
}


def dinov2_config(size: str) -> dict[str, Any]:
    """Fields of transformers' Dinov2Config for `dinov2-giant` and its smaller sisters, at 518 pixels."""
    width, layers, heads, swiglu = _DINOV2_SIZES[size]
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "use_swiglu_ffn": swiglu,
        "image_size": 518,
        "patch_size": 14,
    }


def parse_config(values: Mapping[str, Any], source: str, has_vae_encoder: bool = False) -> CheckpointConfig:
    """The values of a published config.yaml as our dataclasses.

    Args:
        source: the file, for error messages.
        has_vae_encoder: whether the weights hold the VAE's encoder: most files leave it out, whatever they say.

    Raises:
        UserError: a missing part, an unknown parameter, or a value that this project can't honour; names it.
    """
    for name in values:
        if name not in ("model", "vae", "conditioner", "scheduler", "image_processor", "pipeline"):
            raise UserError(f"{source}: unknown part {name!r}")
    vae = parse_vae(_part(values, "vae", source), source, has_vae_encoder)
    encoder, dinov2 = _encoder(_part(values, "conditioner", source), _image_size(values, source), source)
    kind, params = _target(_part(values, "model", source), f"{source}: model")
    tokens = encoder.views * ((encoder.image_size // 14) ** 2 + 1)
    dit: DiTConfig | SkipDiTConfig
    if kind == "Hunyuan3DDiT":
        more = {"num_latents": vae.num_latents, "condition_tokens": tokens}
        dit = from_dict(DiTConfig, mapped(params, _DIT, f"{source}: model") | more, source)
    elif kind == "HunYuanDiTPlain":
        dit = from_dict(SkipDiTConfig, mapped(params, _SKIP_DIT, f"{source}: model"), source)
    else:
        raise UserError(f"{source}: model.target is {kind!r}, expected Hunyuan3DDiT or HunYuanDiTPlain")
    sampling = _sampling(values, source)
    config = CheckpointConfig(dit=dit, vae=vae, encoder=encoder, dinov2=dinov2, pipeline=sampling)
    check_partners(config, source)
    return config


def parse_vae(part: Mapping[str, Any], source: str, has_encoder: bool) -> VAEConfig:
    """The VAE of a config.yaml, or of the whole config.yaml of a checkpoint that is a VAE alone."""
    kind, params = _target(part, f"{source}: vae")
    if kind != "ShapeVAE":
        raise UserError(f"{source}: vae.target is {kind!r}, expected ShapeVAE")
    fields = mapped(params, _VAE, f"{source}: vae")
    fields["geo_qk_norm"] = fields["geo_ln_post"]  # theirs drops both together
    fields |= {"neighbours_in": 0, "neighbours_out": 0}
    if not has_encoder:
        fields["encoder_layers"] = 0
    return from_dict(VAEConfig, fields, source)


def _part(values: Mapping[str, Any], name: str, source: str) -> dict[str, Any]:
    if name not in values:
        raise UserError(f"{source}: there is no part {name!r}")
    part = values[name]
    if not isinstance(part, dict):
        raise UserError(f"{source}: {name} is {part!r}, expected a mapping")
    return part


def _positive(params: Mapping[str, Any], name: str, default: float, source: str) -> float:
    """A number above zero; whole where the default is."""
    value = params.get(name, default)
    kinds = (int,) if isinstance(default, int) else (int, float)
    if type(value) not in kinds or not 0 < value < math.inf:
        raise UserError(f"{source}: {name} is {value!r}, expected a number above zero")
    return value


def _target(part: Mapping[str, Any], source: str) -> tuple[str, dict[str, Any]]:
    """Class name and parameters of a part."""
    params = part.get("params") or {}
    if set(part) - {"target", "params", "from_pretrained"} or not isinstance(params, dict):
        raise UserError(f"{source}: expected target and params, found {', '.join(map(str, part))}")
    return str(part.get("target", "")).rpartition(".")[2], params


def _image_size(values: Mapping[str, Any], source: str) -> int:
    """Side in pixels at which images are prepared."""
    where = f"{source}: image_processor"
    part = _part({"image_processor": {"target": "ImageProcessorV2"}, **values}, "image_processor", source)
    kind, params = _target(part, where)
    if kind not in ("ImageProcessorV2", "MVImageProcessorV2"):
        raise UserError(f"{where}.target is {kind!r}, expected ImageProcessorV2")
    fields = mapped(params, _IMAGE, where)
    return int(_positive(fields, "size", 512, where))


def _encoder(
    part: Mapping[str, Any], prepared_size: int, source: str
) -> tuple[ImageEncoderConfig, dict[str, Any]]:
    kind, params = _target(part, f"{source}: conditioner")
    if kind != "SingleImageEncoder" or set(params) != {"main_image_encoder"}:
        raise UserError(f"{source}: conditioner is a {kind}, expected SingleImageEncoder")
    main = _part(params, "main_image_encoder", source)
    kind, options = str(main.get("type")), dict(_part(main, "kwargs", source))
    if kind not in ("DinoImageEncoder", "DinoImageEncoderMV"):
        raise UserError(f"{source}: main_image_encoder.type is {kind!r}, expected DinoImageEncoder")
    fields: dict[str, Any] = {"kind": EncoderKind.dinov2.name, "prepared_size": prepared_size, "path": INSIDE}
    fields["image_size"] = options.pop("image_size", 224)
    if kind.endswith("MV"):
        fields["views"] = options.pop("view_num", 4)
    if options.pop("use_cls_token", True) is not True:
        raise UserError(f"{source}: use_cls_token is false, expected true")
    version, network = options.pop("version", None), options.pop("config", None)
    if options:
        raise UserError(f"{source}: main_image_encoder: unknown parameter {next(iter(options))!r}")
    if network is None:
        name = str(version).rpartition("/")[2]
        if name not in _DINOV2_SIZES:
            raise UserError(f"{source}: version is {version!r}, expected one of {', '.join(_DINOV2_SIZES)}")
        network = dinov2_config(name)
    elif not isinstance(network, dict):
        raise UserError(f"{source}: config of main_image_encoder is {network!r}, expected a mapping")
    return from_dict(ImageEncoderConfig, fields, source), {"hidden_size": 768, **network}


def _sampling(values: Mapping[str, Any], source: str) -> PipelineConfig:
    where = f"{source}: scheduler"
    kind, params = _target(_part(values, "scheduler", source), where)
    params = {"num_train_timesteps": 1000, **params}
    times = params.pop("num_train_timesteps")
    if times != 1000:
        raise UserError(f"{where}: num_train_timesteps is {times!r}, expected 1000")
    fields: dict[str, Any] = {"guidance": 5.0, "resolution": 384}
    if kind == "FlowMatchEulerDiscreteScheduler":
        if params.pop("use_dynamic_shifting", False):
            raise UserError(f"{where}: use_dynamic_shifting is true, expected false")
        # Theirs moves time the other way: s t / (1 + (s - 1) t).
        shift = 1 / _positive(params, "shift", 1.0, where)
        params.pop("shift", None)
        fields |= {"steps": 50, "grid": SamplingGrid.endpoint.name, "shift": shift}
    elif kind == "ConsistencyFlowMatchEulerDiscreteScheduler":
        segments = params.pop("pcm_timesteps", 50)
        fields |= {"steps": 5, "grid": SamplingGrid.consistency.name, "segments": segments}
    else:
        raise UserError(f"{where}.target is {kind!r}, expected a flow-matching Euler scheduler")
    if params:
        raise UserError(f"{where}: unknown parameter {next(iter(params))!r}")
    return from_dict(PipelineConfig, fields, where)
