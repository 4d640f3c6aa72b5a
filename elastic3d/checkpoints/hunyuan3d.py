"""Hunyuan3D-2 checkpoints as published: a folder with config.yaml and one file of weights, loaded strictly."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elastic3d.checkpoints.bundle import Bundle, Inspection, Loader
from elastic3d.checkpoints.dinov2 import load_network, other_network
from elastic3d.checkpoints.folders import download, identify
from elastic3d.checkpoints.options import (
    INSIDE,
    REPOSITORY,
    CheckpointConfig,
    Table,
    check_partners,
    ignored,
    mapped,
    places,
)
from elastic3d.checkpoints.tensors import count_parameters, has_encoder, read_checkpoint, tensor_sizes
from elastic3d.diffusion.options import PipelineConfig, SamplingGrid
from elastic3d.errors import UserError
from elastic3d.models.image_encoder import DinoV2, dinov2_files
from elastic3d.models.options import DiTConfig, EncoderKind, ImageEncoderConfig, SkipDiTConfig, VAEConfig
from elastic3d.models.shape_vae import ShapeVAE
from elastic3d.utils.files import load_yaml
from elastic3d.utils.options import from_dict

CONFIG_NAME = "config.yaml"
WEIGHTS_NAMES = ("model.fp16.safetensors", "model.safetensors", "model.fp16.ckpt", "model.ckpt")
DEFAULT_SUBFOLDER = "hunyuan3d-dit-v2-0"
_PARTS = ("model", "vae", "conditioner")
_STAGES = {"conditioner": "condition", "model": "dit", "vae": "decode"}
_NETWORK_PREFIX = "main_image_encoder.model."
_SHARP = "pc_sharpedge_size"
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
    "ckpt_path": ((None,), None),
    **ignored("axes_dim theta"),
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
    **ignored("additional_cond_hidden_state decoupled_ca_dim decoupled_ca_weight"),
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
    **ignored(f"drop_path_rate pc_size {_SHARP} downsample_ratio"),
}
_IMAGE: Table = {"size": ("size", 512), "border_ratio": ((0.15, None), 0.15)}
_DINOV2_SIZES = {
    "dinov2-small": (384, 12, 6, False),
    "dinov2-base": (768, 12, 12, False),
    "dinov2-large": (1024, 24, 16, False),
    "dinov2-giant": (1536, 40, 24, True),
}


def load_hunyuan3d(
    folder: str | Path,
    subfolder: str = DEFAULT_SUBFOLDER,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    vae_subfolder: str | None = None,
    dinov2: str | Path | None = None,
) -> Bundle:
    """The checkpoint `folder/subfolder`: `config.yaml` and `model.fp16.safetensors` (or without fp16, or `.ckpt`).

    Args:
        folder: a folder, a name below $HY3DGEN_MODELS or ~/.cache/hy3dgen, or a repository of the Hugging Face Hub.
        dtype: of the parameters; None is fp32.
        device: None is the CPU.
        vae_subfolder: take the VAE from this folder instead (`hunyuan3d-vae-v2-0-turbo`, `...-withencoder`).
        dinov2: folder of a DINOv2 in the Hugging Face layout, for a file without the conditioner's weights.

    Raises:
        UserError: a missing, truncated or third-party file, an unknown value in config.yaml, weights that do not fit:
            names the file and the value or tensor.
    """
    config_path, weights_path = find_checkpoint(folder, subfolder)
    values = load_yaml(config_path)
    state = split_state(read_checkpoint(weights_path), weights_path)
    config = parse_config(values, str(config_path), has_encoder(state["vae"]))
    config.pipeline.model = subfolder
    place = Loader.of(dtype, device)
    dit = place.build(config.dit, state.pop("model"), f"{weights_path} (model.)")
    files = [weights_path]
    if vae_subfolder is None:
        vae = place.build(config.vae, state.pop("vae"), f"{weights_path} (vae.)")
    else:
        vae, vae_path = _other_vae(folder, vae_subfolder, place, config.vae)
        files.append(vae_path)
        config.vae = vae.config
    conditioner: DinoV2 | None = None
    note = ""
    if dinov2 is not None:
        conditioner = other_network(config, Path(dinov2), place)
        files += dinov2_files(Path(dinov2))
    elif encoder := _encoder_state(state.pop("conditioner"), weights_path):
        source = f"{weights_path} (conditioner.{_NETWORK_PREFIX})"
        conditioner = load_network(config, encoder, source, place)
    else:
        note = _no_encoder(weights_path)
        warnings.warn(note, stacklevel=2)
    return Bundle(dit, vae, conditioner, config, tuple(files), note)


def split_state(state: Mapping[str, Tensor], path: Path) -> dict[str, dict[str, Tensor]]:
    """Tensors of each part under their names in it; UserError for a tensor of no part."""
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS}
    for name, tensor in state.items():
        part, _, rest = name.partition(".")
        if part not in parts:
            raise UserError(
                f"{path} has a tensor {name}, expected names that start with {'., '.join(_PARTS)}."
            )
        parts[part][rest] = tensor
    for part in ("model", "vae"):
        if not parts[part]:
            raise UserError(
                f"{path} has no tensor that starts with {part}.: is it another kind of checkpoint?"
            )
    return parts


def _other_vae(
    folder: str | Path, subfolder: str, place: Loader, instead_of: VAEConfig
) -> tuple[ShapeVAE, Path]:
    config_path, weights_path = find_checkpoint(folder, subfolder)
    values = load_yaml(config_path)
    state = read_checkpoint(weights_path)
    if all(name.startswith("vae.") for name in state):
        state = {name.removeprefix("vae."): tensor for name, tensor in state.items()}
    config = parse_vae(values.get("vae", values), str(config_path), has_encoder(state))
    if config.channels != instead_of.channels:
        raise UserError(f"{config_path}: embed_dim is {config.channels}, expected {instead_of.channels}")
    return place.build(config, state, str(weights_path)), weights_path


def _encoder_state(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    for name in state:
        if not name.startswith(_NETWORK_PREFIX):
            raise UserError(
                f"{path} has a tensor conditioner.{name}, expected conditioner.{_NETWORK_PREFIX}*"
            )
    return {name.removeprefix(_NETWORK_PREFIX): tensor for name, tensor in state.items()}


def _no_encoder(path: Path) -> str:
    return f"{path} holds no image encoder (conditioner.*): give the folder of a DINOv2 as dinov2="


def inspect_hunyuan3d(folder: str | Path, subfolder: str, vae_subfolder: str, dinov2: str) -> Inspection:
    """What a checkpoint is made of, without its weights; arguments and errors as in `load_hunyuan3d`."""
    config_path, weights_path = find_checkpoint(folder, subfolder)
    config = parse_config(load_yaml(config_path), str(config_path))
    sizes, note = part_sizes(weights_path), ""
    if vae_subfolder:
        sizes["decode"] = sum(part_sizes(find_checkpoint(folder, vae_subfolder)[1]).values())
    if dinov2:
        sizes["condition"] = sum(count_parameters(path) for path in dinov2_files(Path(dinov2)))
    elif weights_path.suffix == ".safetensors" and not sizes["condition"]:
        note = _no_encoder(weights_path)
    return Inspection(config, sizes, note)


def part_sizes(path: Path) -> dict[str, int]:
    """Parameters of each stage's weights in a checkpoint, as `tensor_sizes`. Tensors of no stage (those of a VAE that
    is a file of its own) count as the field decoder's."""
    sizes = dict.fromkeys(_STAGES.values(), 0)
    for name, size in tensor_sizes(path).items():
        sizes[_STAGES.get(name.partition(".")[0], "decode")] += size
    return sizes


def find_checkpoint(folder: str | Path, subfolder: str) -> tuple[Path, Path]:
    """Config and weights of a checkpoint.

    Args:
        folder: looked for as it is, then below $HY3DGEN_MODELS (or ~/.cache/hy3dgen), then on the Hugging Face Hub.
            It may also be the checkpoint's own folder.

    Raises:
        UserError: nothing is there; names what was looked for and what there is instead.
    """
    candidates = places(folder)
    for root in candidates:
        if (root / subfolder).is_dir():
            return _files(root / subfolder)
    for root in candidates:
        if (root / CONFIG_NAME).is_file():
            if root.name.startswith("hunyuan3d-") and root.name != subfolder:
                raise UserError(
                    f"{root} is not {subfolder}: give the folder above it, or subfolder={root.name}"
                )
            return _files(root)
        if root.is_file():
            raise UserError(f"{root} is a file, expected the folder that holds {subfolder}/{CONFIG_NAME}")
        if root.is_dir():
            there = sorted(path.parent.name for path in root.glob(f"*/{CONFIG_NAME}"))
            hint = f"it has {', '.join(there)}" if there else f"and no other with a {CONFIG_NAME}"
            found = identify(root) if len(there) < 2 else ""
            raise UserError(f"{root} has no folder {subfolder}, {hint}{f': {found}' if found else ''}")
    looked = " nor ".join(dict.fromkeys(str(path) for path in candidates))
    if REPOSITORY.fullmatch(str(folder)):
        files = f"{subfolder}/ with {CONFIG_NAME} and {WEIGHTS_NAMES[0]}"
        hint = f"put {files} into a folder and give that as weights="
        for name in WEIGHTS_NAMES:  # until one is there: most repositories have several, gigabytes each
            patterns = [f"{subfolder}/{wanted}" for wanted in (CONFIG_NAME, name)]
            root = download(str(folder), looked, hint, patterns)
            if not (root / subfolder).is_dir():
                raise UserError(f"{folder} has no folder {subfolder}")
            if (root / subfolder / name).is_file():
                break
        return _files(root / subfolder)
    raise UserError(f"there is no folder {looked}")


def _files(folder: Path) -> tuple[Path, Path]:
    config = folder / CONFIG_NAME
    if not config.is_file():
        raise UserError(f"there is no file {config}")
    for name in WEIGHTS_NAMES:
        if (folder / name).is_file():
            return config, folder / name
    raise UserError(f"{folder} has no weights, expected one of {', '.join(WEIGHTS_NAMES)}")


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
    fields |= {
        "neighbours_in": 0,
        "neighbours_out": 0,
        "post_eps": 1e-5,
        "logvar_min": -30.0,
        "logvar_max": 20.0,
    }
    if not has_encoder:
        fields["encoder_layers"] = 0
    config = from_dict(VAEConfig, fields, source)
    if has_encoder and params.get(_SHARP, 5120):
        # The share of sharp edges in the points is that in the points from which latents are read.
        sizes = [_positive(params, name, 5120, f"{source}: vae") for name in ("pc_size", _SHARP)]
        config.sharp_latents = int(config.num_latents * sizes[1] / sum(sizes))
    return config


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
