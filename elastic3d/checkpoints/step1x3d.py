"""Step1X-3D (stepfun-ai/Step1X-3D, Apache-2.0): its folder in the layout of diffusers as `ShapeDiT` and `ShapeVAE`.

The original's time runs from 1000 at noise to 0 at data, and its velocity is noise - data: the first is an option of
`ShapeDiT`, for the second the last layer is negated while it is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elastic3d.checkpoints.bundle import Bundle, on_meta
from elastic3d.checkpoints.dinov2 import modern_names, network_fields
from elastic3d.checkpoints.folders import Folder, Layout
from elastic3d.checkpoints.options import (
    INSIDE,
    PRESETS,
    REQUIRED,
    CheckpointConfig,
    Table,
    check_partners,
    ignored,
    mapped,
)
from elastic3d.checkpoints.tensors import Row, rename_linear
from elastic3d.diffusion.options import PipelineConfig, SamplingGrid
from elastic3d.errors import UserError
from elastic3d.models.options import DiTConfig, EncoderKind, ImageEncoderConfig, VAEConfig
from elastic3d.utils.options import from_dict

ENCODER = "visual_encoder"
_PREFIX, _DIT_PREFIX = "dino_model.", "dit_model."
_BORDER = 0.05  # the object is 95 % of the image
# Defaults are the original code's. Where they differ from the published values, the field has to be there.
_DIT: Table = {
    "input_channels": ("in_channels", REQUIRED),
    "width": ("width", REQUIRED),
    "layers": ("double_blocks", 12),
    "num_single_layers": ("single_blocks", REQUIRED),
    "num_heads": ("heads", REQUIRED),
    "condition_dim": ("condition_channels", 1024),
    "multi_condition_type": (("in_context",), "in_context"),
    "use_visual_condition": ((True,), REQUIRED),
    "visual_condition_dim": ("visual_channels", 1024),
    "n_views": ((1,), 1),
    "use_caption_condition": ((False,), False),
    "use_label_condition": ((False,), False),
    **ignored("caption_condition_dim label_condition_dim identity_init pretrained_model_name_or_path"),
    **ignored("subfolder"),
}
_VAE: Table = {
    "num_latents": ("num_latents", REQUIRED),
    "embed_dim": ("latent_channels", 64),
    "width": ("width", 768),
    "heads": ("heads", 12),
    "num_encoder_layers": ("encoder_layers", 8),
    "num_decoder_layers": ("decoder_layers", 16),
    "num_freqs": ("num_freqs", 8),
    "include_pi": ("include_pi", REQUIRED),
    "qkv_bias": ("qkv_bias", REQUIRED),
    "point_feats": ("point_features", REQUIRED),
    "z_scale_factor": ("scale_factor", 1.0),
    "with_sharp_data": ("sharp_attention", True),
    "qk_norm": ((False,), False),
    "use_ln_post": ((True,), REQUIRED),
    "use_downsample": ((True,), REQUIRED),
    "embed_point_feats": ((False,), False),
    "out_dim": ((1,), 1),
    "embed_type": (("fourier",), "fourier"),
    **ignored("init_scale use_flash use_checkpoint volume_decoder_type surface_extractor_type n_samples"),
    **ignored("downsample_ratio use_multi_reso resolutions sampling_prob subfolder"),
    **ignored("pretrained_model_name_or_path"),
}
_ENCODER: Table = {
    "dino_type": ("dino_type", REQUIRED),
    "image_size": ("image_size", REQUIRED),
    "zero_uncond_embeds": ((True,), True),
    "encode_camera": ((False,), False),
    "normalize_embeds": ((False,), False),
    "n_views": ((1,), 1),
    **ignored("camera_embeds_type camera_embeds_dim empty_embeds_ratio freeze_modulation_dino"),
    **ignored("enable_gradient_checkpointing kwargs pretrained_model_name_or_path"),
    **ignored("pretrained_dino_name_or_path"),
}
_SCHEDULER: Table = {
    "num_train_timesteps": ((1000,), 1000),
    "shift": ("shift", 1.0),
    "use_dynamic_shifting": ((False,), False),
    "shift_terminal": ((None,), None),
    "invert_sigmas": ((False,), False),
    "stochastic_sampling": ((False,), False),
    "use_karras_sigmas": ((False, None), False),
    "use_exponential_sigmas": ((False, None), False),
    "use_beta_sigmas": ((False, None), False),
    **ignored("base_shift max_shift base_image_seq_len max_image_seq_len time_shift_type"),
}


def load_step1x3d(
    folder: str | Path = PRESETS["step1x3d"].repository,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    dinov2: str | Path | None = None,
    subfolder: str = "",
) -> Bundle:
    """Step1X-3D's geometry model from its published folder.

    Args:
        folder: the folder of `model_index.json`, the one above it, or a repository of the Hugging Face Hub or of its
            cache in $HF_HOME.
        dtype: of the parameters; None is fp32.
        device: None is the CPU.
        dinov2: folder of a DINOv2 (with registers) to use instead of the folder's own.
        subfolder: of the repository; empty: Step1X-3D-Geometry-1300m.

    Raises:
        UserError: a missing, truncated or third-party file, an unknown or missing value in a configuration,
        weights that
            do not fit: names the file and the value or tensor.
    """
    return LAYOUT.load(folder, dtype, device, dinov2, subfolder)


def _encoder_state(source: Folder) -> dict[str, Tensor]:
    """DINOv2's tensors by modern names."""
    state = source.state(ENCODER)
    for name in state:
        if not name.startswith(_PREFIX):
            raise UserError(
                f"{source.root / ENCODER} has a tensor {name}, expected names that start with {_PREFIX}"
            )
    return modern_names({name.removeprefix(_PREFIX): tensor for name, tensor in state.items()})


def parse_step1x3d(
    source: Folder, encoder_state: Mapping[str, Tensor] | None = None, vae_encoder: bool = True
) -> CheckpointConfig:
    """The folder's configuration files in this project's dataclasses.

    Args:
        encoder_state: tensors of the image encoder: no file describes its network.
        vae_encoder: whether the weights hold the VAE's encoder.

    Raises:
        UserError: an unknown or missing parameter, or a value that this project can't honour: names the file and it.
    """
    encoder = _encoder(source)
    dinov2 = network_fields(encoder_state, str(source.root / ENCODER)) if encoder_state else {}
    values, path = source.config("transformer")
    fields = mapped(values, _DIT, path)
    visual = fields.pop("visual_channels")
    if visual != fields["condition_channels"]:
        raise UserError(
            f"{path}: visual_condition_dim is {visual}, expected condition_dim {fields['condition_channels']}"
        )
    values, vae_path = source.config("vae")
    vae = _vae(mapped(values, _VAE, vae_path), vae_path, vae_encoder)
    fixed = {
        "wide_time": True,
        "time_reversed": True,
        "num_latents": vae.num_latents,
        "condition_tokens": (encoder.image_size // int(dinov2.get("patch_size", 14))) ** 2 + 1,
    }
    dit = from_dict(DiTConfig, fields | fixed, path)
    values, path = source.config("scheduler", "scheduler_config.json")
    source.check_class("scheduler", "FlowMatchEulerDiscreteScheduler", name="scheduler_config.json")
    sampling: dict[str, Any] = {
        "model": "step1x3d",
        "steps": 30,
        "guidance": 7.5,
        "resolution": 384,
        "box": 1.05,
        "grid": SamplingGrid.late_start.name,
    }
    pipeline = from_dict(PipelineConfig, sampling | mapped(values, _SCHEDULER, path), path)
    config = CheckpointConfig(dit=dit, vae=vae, encoder=encoder, dinov2=dinov2, pipeline=pipeline)
    check_partners(config, str(source.root))
    return config


def _vae(fields: dict[str, Any], path: str, has_encoder: bool) -> VAEConfig:
    fixed: dict[str, Any] = {
        "qk_norm": False,
        "norm_eps": 1e-5,
        "logvar_min": -30.0,
        "logvar_max": 20.0,
        "neighbours_in": 0,
        "neighbours_out": 0,
    }
    if fields["sharp_attention"]:
        fixed["sharp_latents"] = fields["num_latents"] // 2
    if not has_encoder:
        fixed |= {"encoder_layers": 0, "sharp_attention": False, "sharp_latents": 0}
    return from_dict(VAEConfig, fields | fixed, path)


def _encoder(source: Folder) -> ImageEncoderConfig:
    """How images are prepared; as published where there is no encoder."""
    size: Any = 518
    path = str(source.root)
    if source.has(ENCODER):
        values, path = source.config(ENCODER)
        fields = mapped(values, _ENCODER, path)
        size = fields["image_size"]
        if "dinov2" not in str(fields["dino_type"]):
            raise UserError(f"{path}: dino_type is {fields['dino_type']!r}, expected a DINOv2")
    kind = EncoderKind.dinov2.name
    return from_dict(
        ImageEncoderConfig, {"kind": kind, "image_size": size, "border": _BORDER, "path": INSIDE}, path
    )


def dit_rows(config: DiTConfig) -> list[Row]:
    """Our names of the DiT's tensors, and the published ones.

    diffusers' last modulation is scale, then shift; FLUX's is shift, then scale.
    """
    rows = [
        *rename_linear("latent_in", f"{_DIT_PREFIX}proj_in"),
        *rename_linear("cond_in", f"{_DIT_PREFIX}proj_cross_attention"),
        *rename_linear("time_in.mlp.0", f"{_DIT_PREFIX}time_proj.linear_1"),
        *rename_linear("time_in.mlp.2", f"{_DIT_PREFIX}time_proj.linear_2"),
        *rename_linear("final_layer.adaLN_modulation.1", f"{_DIT_PREFIX}norm_out.linear", swapped=True),
        *rename_linear("final_layer.linear", f"{_DIT_PREFIX}proj_out", negative=True),
    ]
    for i in range(config.double_blocks):
        rows += _double(f"double_blocks.{i}", f"{_DIT_PREFIX}transformer_blocks.{i}")
    for i in range(config.single_blocks):
        ours, theirs = f"single_blocks.{i}", f"{_DIT_PREFIX}single_transformer_blocks.{i}"
        parts = [f"{theirs}.attn.to_q", f"{theirs}.attn.to_k", f"{theirs}.attn.to_v", f"{theirs}.proj_mlp"]
        rows += rename_linear(f"{ours}.modulation.lin", f"{theirs}.norm.linear")
        rows += rename_linear(f"{ours}.linear1", parts, shares=(1, 1, 1, int(config.mlp_ratio)))
        rows += rename_linear(f"{ours}.linear2", f"{theirs}.proj_out")
        rows += _head_norms(f"{ours}.norm", f"{theirs}.attn.norm_q", f"{theirs}.attn.norm_k")
    return rows


def _double(ours: str, theirs: str) -> list[Row]:
    rows: list[Row] = []
    for stream, norm, kinds, out, mlp, head in (
        ("img", "norm1", ("to_q", "to_k", "to_v"), "to_out.0", "ff", ("norm_q", "norm_k")),
        (
            "txt",
            "norm1_context",
            ("add_q_proj", "add_k_proj", "add_v_proj"),
            "to_add_out",
            "ff_context",
            ("norm_added_q", "norm_added_k"),
        ),
    ):
        attention = f"{theirs}.attn"
        rows += rename_linear(f"{ours}.{stream}_mod.lin", f"{theirs}.{norm}.linear")
        rows += rename_linear(f"{ours}.{stream}_attn.qkv", [f"{attention}.{kind}" for kind in kinds])
        rows += rename_linear(f"{ours}.{stream}_attn.proj", f"{attention}.{out}")
        rows += _head_norms(f"{ours}.{stream}_attn.norm", *(f"{attention}.{name}" for name in head))
        rows += rename_linear(f"{ours}.{stream}_mlp.0", f"{theirs}.{mlp}.net.0.proj")
        rows += rename_linear(f"{ours}.{stream}_mlp.2", f"{theirs}.{mlp}.net.2")
    return rows


def _head_norms(ours: str, query: str, key: str) -> list[Row]:
    return [
        Row(f"{ours}.query_norm.scale", (f"{query}.weight",)),
        Row(f"{ours}.key_norm.scale", (f"{key}.weight",)),
    ]


def vae_rows(config: VAEConfig) -> list[Row]:
    """Our names of the VAE's tensors, and the published ones: the field decoder's alone differ."""
    names = on_meta(config).state_dict()
    return [Row(name, (re.sub("^geo_decoder", "decoder", name),)) for name in names]


LAYOUT = Layout("step1x3d", ENCODER, parse_step1x3d, dit_rows, vae_rows, _encoder_state, registers=True)
