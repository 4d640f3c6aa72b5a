"""TripoSG (VAST-AI/TripoSG, MIT): its folder in the layout of diffusers as `SkipDiT`, `ShapeVAE` and DINOv2.

The original's time runs from 1000 at noise to 0 at data, and its field is negative inside: the first is an option of
`SkipDiT`, for the second the last layer is negated while it is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elastic3d.checkpoints.bundle import Bundle, Loader
from elastic3d.checkpoints.folders import Folder, Layout
from elastic3d.checkpoints.options import (
    INSIDE,
    PRESETS,
    CheckpointConfig,
    Table,
    check_partners,
    ignored,
    mapped,
)
from elastic3d.checkpoints.tensors import Row, has_encoder, rename_linear
from elastic3d.diffusion.options import PipelineConfig
from elastic3d.errors import UserError
from elastic3d.models.options import EncoderKind, ImageEncoderConfig, SkipDiTConfig, VAEConfig
from elastic3d.models.shape_vae import ShapeVAE
from elastic3d.utils.options import from_dict

ENCODER, EXTRACTOR = "image_encoder_dinov2", "feature_extractor_dinov2"
_LATENTS = 2048  # the original's default; the weights fit any number
_BORDER = 1 - 1 / 1.2  # 10 % of the object's longer side stay free at each end
# The defaults are the original code's; they are also what was published.
_DIT: Table = {
    "width": ("width", 2048),
    "num_layers": ("blocks", 21),
    "num_attention_heads": ("heads", 16),
    "in_channels": ("in_channels", 64),
    "cross_attention_dim": ("condition_channels", 1024),
    "use_cross_attention_2": ((False,), False),
    "cross_attention_2_dim": ((None,), None),
}
_VAE: Table = {
    "in_channels": ((3,), 3),
    "latent_channels": ("latent_channels", 64),
    "num_attention_heads": ("heads", 8),
    "width_encoder": ("encoder_width", 512),
    "width_decoder": ("width", 1024),
    "num_layers_encoder": ("encoder_layers", 8),
    "num_layers_decoder": ("decoder_layers", 16),
    "embedding_type": (("frequency",), "frequency"),
    "embed_frequency": ("num_freqs", 8),
    "embed_include_pi": ("include_pi", False),
}
_SCHEDULER: Table = {
    "num_train_timesteps": ((1000,), 1000),
    "shift": ((1, 1.0), 1.0),
    "use_dynamic_shifting": ((False,), False),
}
_EXTRACTOR: Table = {
    "size": ("size", {"shortest_edge": 256}),
    "crop_size": ("crop", {"height": 224, "width": 224}),
    "do_resize": ((True,), True),
    "do_center_crop": ((True,), True),
    "do_rescale": ((True,), True),
    "do_normalize": ((True,), True),
    "resample": ((3,), 3),
    "rescale_factor": ((1 / 255, 0.00392156862745098), 1 / 255),
    "image_mean": (([0.485, 0.456, 0.406],), [0.485, 0.456, 0.406]),
    "image_std": (([0.229, 0.224, 0.225],), [0.229, 0.224, 0.225]),
    **ignored("do_convert_rgb image_processor_type feature_extractor_type processor_class"),
}


def load_triposg(
    folder: str | Path = PRESETS["triposg"].repository,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    dinov2: str | Path | None = None,
    subfolder: str = "",
) -> Bundle:
    """TripoSG from its published folder.

    Args:
        folder: the folder of `model_index.json`, or a repository of the Hugging Face Hub or of its cache in $HF_HOME.
        dtype: of the parameters; None is fp32.
        device: None is the CPU.
        dinov2: folder of a DINOv2 to use instead of the folder's own.
        subfolder: of the repository; empty: the repository itself.

    Raises:
        UserError: a missing, truncated or third-party file, an unknown value in a configuration, weights that do
        not fit:
            names the file and the value or tensor.
    """
    return LAYOUT.load(folder, dtype, device, dinov2, subfolder)


def load_triposg_vae(
    folder: str | Path, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> ShapeVAE:
    """The VAE of a folder that has one in TripoSG's layout at `vae/`, whatever model it belongs to.

    Arguments and errors as in `load_triposg`.
    """
    root = Path(folder)
    source, loader = Folder(root, {"vae": ["", ""]}), Loader.of(dtype, device)
    state = source.state("vae")
    config = _vae(*source.config("vae"), has_encoder(state))
    source.check_class("vae", "TripoSGVAEModel", "Tripo2VAEModel")
    return loader.build(config, *source.renamed("vae", config, vae_rows(config), state))


def parse_triposg(
    source: Folder, encoder_state: Mapping[str, Tensor] | None = None, vae_encoder: bool = True
) -> CheckpointConfig:
    """The folder's configuration files in this project's dataclasses; `vae_encoder`: the weights hold one.

    Raises:
        UserError: an unknown parameter, or a value that this project can't honour: names the file and it.
    """
    values, path = source.config("transformer")
    source.check_class("transformer", "TripoSGDiTModel")
    encoder = _encoder(source)
    dinov2 = source.config(ENCODER)[0] if source.has(ENCODER) else {}
    fixed: dict[str, Any] = {
        "expert_blocks": 0,
        "norm_eps": 1e-5,
        "time_factor": 1000.0,
        "time_reversed": True,
        "num_latents": _LATENTS,
        "condition_tokens": (encoder.image_size // int(dinov2.get("patch_size", 14))) ** 2 + 1,
    }
    dit = from_dict(SkipDiTConfig, mapped(values, _DIT, path) | fixed, path)
    vae = _vae(*source.config("vae"), vae_encoder)
    source.check_class("vae", "TripoSGVAEModel", "Tripo2VAEModel")
    values, path = source.config("scheduler", "scheduler_config.json")
    mapped(values, _SCHEDULER, path)
    source.check_class("scheduler", "RectifiedFlowScheduler", name="scheduler_config.json")
    sampling = PipelineConfig(model="triposg", steps=50, guidance=7.0, resolution=512, box=1.005)
    config = CheckpointConfig(dit=dit, vae=vae, encoder=encoder, dinov2=dinov2, pipeline=sampling)
    check_partners(config, str(source.root))
    return config


def _vae(values: Mapping[str, Any], path: str, has_encoder: bool) -> VAEConfig:
    fixed: dict[str, Any] = {
        "qk_norm": False,
        "norm_eps": 1e-5,
        "point_features": 3,
        "num_latents": _LATENTS,
        "query_pool": 4 * _LATENTS,
        "logvar_min": -30.0,
        "logvar_max": 20.0,
        "neighbours_in": 0,
        "neighbours_out": 0,
    }
    if not has_encoder:
        fixed["encoder_layers"] = 0
    return from_dict(VAEConfig, mapped(values, _VAE, path) | fixed, path)


def _encoder(source: Folder) -> ImageEncoderConfig:
    """How images are prepared: the shorter edge to `size`, the middle cut out of it."""
    values, path = (
        source.config(EXTRACTOR, "preprocessor_config.json") if source.has(EXTRACTOR) else ({}, EXTRACTOR)
    )
    fields = mapped(values, _EXTRACTOR, path)
    size, crop = fields["size"], fields["crop"]
    if not isinstance(size, dict) or set(size) != {"shortest_edge"}:
        raise UserError(f"{path}: size is {size!r}, expected a shortest_edge")
    if not isinstance(crop, dict) or set(crop) != {"height", "width"} or crop["height"] != crop["width"]:
        raise UserError(f"{path}: crop_size is {crop!r}, expected a height and a width, both the same")
    return from_dict(
        ImageEncoderConfig,
        {
            "kind": EncoderKind.dinov2.name,
            "image_size": crop["height"],
            "prepared_size": size["shortest_edge"],
            "centre_crop": True,
            "border": _BORDER,
            "path": INSIDE,
        },
        path,
    )


def dit_rows(config: SkipDiTConfig) -> list[Row]:
    """Our names of the DiT's tensors, and the published ones."""
    rows = [
        *rename_linear("x_embedder", "proj_in"),
        *rename_linear("t_embedder.mlp.0", "time_proj.linear_1"),
        *rename_linear("t_embedder.mlp.2", "time_proj.linear_2"),
        *rename_linear("final_layer.norm_final", "norm_out"),
        *rename_linear("final_layer.linear", "proj_out"),
    ]
    for i in range(config.blocks):
        block = f"blocks.{i}"
        same = ["norm1", "norm2", "norm3"] + (["skip_linear", "skip_norm"] if i > config.blocks // 2 else [])
        for name in same:
            rows += rename_linear(f"{block}.{name}", f"{block}.{name}")
        for attention in (f"{block}.attn1", f"{block}.attn2"):
            for name in ("to_q", "to_k", "to_v"):
                rows += rename_linear(f"{attention}.{name}", f"{attention}.{name}", bias=False)
            rows += rename_linear(f"{attention}.q_norm", f"{attention}.norm_q", bias=False)
            rows += rename_linear(f"{attention}.k_norm", f"{attention}.norm_k", bias=False)
            rows += rename_linear(f"{attention}.out_proj", f"{attention}.to_out.0")
        rows += rename_linear(f"{block}.mlp.fc1", f"{block}.ff.net.0.proj")
        rows += rename_linear(f"{block}.mlp.fc2", f"{block}.ff.net.2")
    return rows


def vae_rows(config: VAEConfig) -> list[Row]:
    """Our names of the VAE's tensors, and the published ones; the field's sign is turned with the last layer."""
    layers = config.decoder_layers
    rows = [
        *rename_linear("post_kl", "post_quant"),
        *rename_linear("geo_decoder.query_proj", "decoder.proj_query"),
        *_cross("geo_decoder.cross_attn_decoder", f"decoder.blocks.{layers}"),
        *rename_linear("geo_decoder.ln_post", "decoder.norm_out"),
        *rename_linear("geo_decoder.output_proj", "decoder.proj_out", negative=True),
    ]
    for i in range(layers):
        rows += _self(f"transformer.resblocks.{i}", f"decoder.blocks.{i}")
    if config.encoder_layers:
        rows += rename_linear("pre_kl", "quant")
        rows += rename_linear("encoder.input_proj", "encoder.proj_in")
        rows += _cross("encoder.cross_attn", "encoder.blocks.0")
        for i in range(config.encoder_layers):
            rows += _self(f"encoder.self_attn.resblocks.{i}", f"encoder.blocks.{i + 1}")
        rows += rename_linear("encoder.ln_post", "encoder.norm_out")
    return rows


def _self(ours: str, theirs: str) -> list[Row]:
    parts = [f"{theirs}.attn1.{name}" for name in ("to_q", "to_k", "to_v")]
    return [
        *rename_linear(f"{ours}.ln_1", f"{theirs}.norm1"),
        *rename_linear(f"{ours}.attn.c_qkv", parts, bias=False),
        *rename_linear(f"{ours}.attn.c_proj", f"{theirs}.attn1.to_out.0"),
        *rename_linear(f"{ours}.ln_2", f"{theirs}.norm3"),
        *_mlp(ours, theirs),
    ]


def _cross(ours: str, theirs: str) -> list[Row]:
    return [
        *rename_linear(f"{ours}.ln_1", f"{theirs}.norm2"),
        *rename_linear(f"{ours}.ln_2", f"{theirs}.attn2.norm_cross"),
        *rename_linear(f"{ours}.attn.c_q", f"{theirs}.attn2.to_q", bias=False),
        *rename_linear(f"{ours}.attn.c_kv", (f"{theirs}.attn2.to_k", f"{theirs}.attn2.to_v"), bias=False),
        *rename_linear(f"{ours}.attn.c_proj", f"{theirs}.attn2.to_out.0"),
        *rename_linear(f"{ours}.ln_3", f"{theirs}.norm3"),
        *_mlp(ours, theirs),
    ]


def _mlp(ours: str, theirs: str) -> list[Row]:
    return [
        *rename_linear(f"{ours}.mlp.c_fc", f"{theirs}.ff.net.0.proj"),
        *rename_linear(f"{ours}.mlp.c_proj", f"{theirs}.ff.net.2"),
    ]


LAYOUT = Layout("triposg", ENCODER, parse_triposg, dit_rows, vae_rows)
