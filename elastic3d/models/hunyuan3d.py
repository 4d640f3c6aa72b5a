"""Hunyuan3D-2 checkpoints as published: a folder with config.yaml and one file of weights, loaded strictly."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from elastic3d.config.hunyuan3d import INSIDE, Hunyuan3DConfig, parse_config, parse_vae
from elastic3d.errors import UserError
from elastic3d.models.hunyuan3d_files import find_checkpoint
from elastic3d.models.image_encoder import DinoV2, load_dinov2
from elastic3d.models.options import DiTConfig, ImageEncoderConfig, SkipDiTConfig, VAEConfig
from elastic3d.models.shape_dit import ShapeDiT
from elastic3d.models.shape_vae import ShapeVAE
from elastic3d.models.skip_dit import SkipDiT
from elastic3d.models.weights import check_fit, load_strict
from elastic3d.utils.structured import load_yaml
from elastic3d.utils.tensors import read_weights

DEFAULT_SUBFOLDER = "hunyuan3d-dit-v2-0"
_PARTS = ("model", "vae", "conditioner")
_NETWORK_PREFIX = "main_image_encoder.model."
# Names of DINOv2's tensors in files of transformers 4 -> those of its version 5.
_RENAMED = {
    ".attention.attention.query.": ".attention.q_proj.",
    ".attention.attention.key.": ".attention.k_proj.",
    ".attention.attention.value.": ".attention.v_proj.",
    ".attention.output.dense.": ".attention.o_proj.",
    ".mlp.weights_out.": ".mlp.down_proj.",
}
_IGNORED_FIELDS = {
    "model_type",
    "torch_dtype",
    "dtype",
    "transformers_version",
    "architectures",
    "_name_or_path",
}


@dataclass
class Hunyuan3DBundle:
    """The parts of one checkpoint, in evaluation mode on one device.

    `dit(latents, t, condition)` is a velocity; `vae.decode(latents)` divides by the scale factor itself;
    `vae.query(points, tokens)` is the field (B,P). `conditioner` is None where the file holds none: see `note`.
    """

    dit: ShapeDiT | SkipDiT
    vae: ShapeVAE
    conditioner: DinoV2 | None
    config: Hunyuan3DConfig
    weights: tuple[Path, ...]
    note: str = ""


def load_hunyuan3d(
    folder: str | Path,
    subfolder: str = DEFAULT_SUBFOLDER,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    vae_subfolder: str | None = None,
    dinov2: str | Path | None = None,
) -> Hunyuan3DBundle:
    """The checkpoint `folder/subfolder`: `config.yaml` and `model.fp16.safetensors` (or without fp16, or `.ckpt`).

    Args:
        folder: a folder, a name below $HY3DGEN_MODELS or ~/.cache/hy3dgen, or a repository of the Hugging Face Hub.
        dtype: of the parameters; None is fp32.
        device: None is the CPU.
        vae_subfolder: take the VAE from this folder instead (`hunyuan3d-vae-v2-0-turbo`, `...-withencoder`).
        dinov2: folder of a DINOv2 in the Hugging Face layout, for a file without the conditioner's weights.

    Raises:
        UserError: a missing, truncated or foreign file, an unknown value in config.yaml, weights that do not fit:
            names the file and the value or tensor.
    """
    config_path, weights_path = find_checkpoint(folder, subfolder)
    values = load_yaml(config_path)
    state = split_state(read_checkpoint(weights_path), weights_path)
    has_encoder = any(name.startswith("encoder.") for name in state["vae"])
    config = parse_config(values, str(config_path), has_encoder)
    config.pipeline.model = subfolder
    kind: type[ShapeDiT] | type[SkipDiT] = SkipDiT if isinstance(config.dit, SkipDiTConfig) else ShapeDiT
    place = _Place(dtype or torch.float32, torch.device(device or "cpu"))
    dit = place.build(kind, config.dit, state.pop("model"), f"{weights_path} (model.)")
    files = [weights_path]
    if vae_subfolder is None:
        vae = place.vae(config.vae, state.pop("vae"), f"{weights_path} (vae.)")
    else:
        vae, vae_path = _other_vae(folder, vae_subfolder, place, config.vae)
        files.append(vae_path)
        config.vae = vae.config
    conditioner = _conditioner(config, state.pop("conditioner"), weights_path, dinov2, place)
    note = ""
    if conditioner is None:
        note = (
            f"{weights_path} holds no image encoder (conditioner.*): give the folder of a DINOv2 as dinov2="
        )
        warnings.warn(note, stacklevel=2)
    return Hunyuan3DBundle(dit, vae, conditioner, config, tuple(files), note)


def load_hunyuan3d_vae(
    folder: str | Path,
    subfolder: str = "hunyuan3d-vae-v2-0",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> ShapeVAE:
    """A checkpoint that is a VAE alone; arguments and errors as in `load_hunyuan3d`."""
    place = _Place(dtype or torch.float32, torch.device(device or "cpu"))
    return _other_vae(folder, subfolder, place, None)[0]


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Every tensor of a `.safetensors` or `.ckpt` file by its full name; a `.ckpt` can't run code.

    Raises:
        UserError: the file is truncated, or a `.ckpt` that holds anything else than tensors in dictionaries.
    """
    if path.suffix == ".safetensors":
        return read_weights(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)|[Uu]nsupported operand ([\w.]+)", str(error))
        what = f" ({found[1] or found[2]})" if found else ""
        raise UserError(f"{path} holds code{what}, expected nothing but tensors: it was not run") from error
    except Exception as error:  # truncated archives surface as RuntimeError, EOFError, OSError, KeyError, ...
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{path} is truncated or no checkpoint ({reason[0]})") from error
    tensors: dict[str, Tensor] = {}
    _flatten(content.get("state_dict", content) if isinstance(content, dict) else content, "", path, tensors)
    return tensors


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


def build_network(fields: Mapping[str, Any], source: str) -> Any:
    """A transformers Dinov2Model of this configuration, on the current default device."""
    from transformers import Dinov2Config, Dinov2Model

    known = {name for base in Dinov2Config.__mro__ for name in vars(base).get("__annotations__", {})}
    for name in fields:
        if name not in known | _IGNORED_FIELDS:
            raise UserError(f"{source}: conditioner: unknown parameter {name!r} of DINOv2")
    kept = {name: value for name, value in fields.items() if name not in _IGNORED_FIELDS}
    try:
        return Dinov2Model(Dinov2Config(**kept)).eval()
    except Exception as error:  # transformers checks its fields with exceptions of its own
        raise UserError(f"{source}: conditioner: {' '.join(str(error).split())}") from error


def modern_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """DINOv2's tensors under transformers 5's names, from those or from transformers 4's."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for old, new in _RENAMED.items():
            name = name.replace(old, new)
        if ".mlp.weights_in." in name:  # gate and value as one layer
            for new, half in zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True):
                renamed[name.replace("weights_in", new)] = half
        else:
            renamed[name] = tensor
    return renamed


@dataclass(frozen=True)
class _Place:
    """Where loaded parameters go."""

    dtype: torch.dtype
    device: torch.device

    def build(self, kind: Any, config: Any, state: Mapping[str, Tensor], source: str) -> Any:
        """A model that takes over `state`: no memory is spent on initial weights."""
        with torch.device("meta"):
            model = kind(config)
        return self.fill(model, state, source)

    def fill(self, model: nn.Module, state: Mapping[str, Tensor], source: str) -> Any:
        """Give a model on the meta device its weights; what doesn't fit is told before any is converted."""
        check_fit(model, state, source)
        placed = {
            name: tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)
            for name, tensor in state.items()
        }
        load_strict(model, placed, source, assign=True)
        return model.eval()

    def vae(self, config: VAEConfig, state: Mapping[str, Tensor], source: str) -> ShapeVAE:
        """A VAE; its statistics are no weights and still have to be put on the device."""
        vae: ShapeVAE = self.build(ShapeVAE, config, state, source)
        vae.set_latent_statistics(config.latent_mean, config.latent_std)
        return vae.to(self.device)


def _other_vae(
    folder: str | Path, subfolder: str, place: _Place, instead_of: VAEConfig | None
) -> tuple[ShapeVAE, Path]:
    config_path, weights_path = find_checkpoint(folder, subfolder)
    values = load_yaml(config_path)
    state = read_checkpoint(weights_path)
    if all(name.startswith("vae.") for name in state):
        state = {name.removeprefix("vae."): tensor for name, tensor in state.items()}
    has_encoder = any(name.startswith("encoder.") for name in state)
    config = parse_vae(values.get("vae", values), str(config_path), has_encoder)
    if instead_of is not None and config.channels != instead_of.channels:
        raise UserError(f"{config_path}: embed_dim is {config.channels}, expected {instead_of.channels}")
    return place.vae(config, state, str(weights_path)), weights_path


def _conditioner(
    config: Hunyuan3DConfig,
    state: Mapping[str, Tensor],
    path: Path,
    dinov2: str | Path | None,
    place: _Place,
) -> DinoV2 | None:
    encoder: ImageEncoderConfig = config.encoder
    if dinov2 is not None:
        network = load_dinov2(Path(dinov2)).to(place.device, place.dtype)
        found, wanted = network.config.hidden_size, config.dit.condition_channels
        if found != wanted:
            raise UserError(f"{dinov2} is a DINOv2 of {found} channels, expected {wanted}")
        return DinoV2(encoder, network).to(place.device)
    if not state:
        return None
    for name in state:
        if not name.startswith(_NETWORK_PREFIX):
            raise UserError(
                f"{path} has a tensor conditioner.{name}, expected conditioner.{_NETWORK_PREFIX}*"
            )
    own = modern_names({name.removeprefix(_NETWORK_PREFIX): tensor for name, tensor in state.items()})
    with torch.device("meta"):
        network = build_network(config.dinov2, INSIDE)
    place.fill(network, own, f"{path} (conditioner.{_NETWORK_PREFIX})")
    return DinoV2(encoder, network).to(place.device)


def _flatten(content: Any, prefix: str, path: Path, into: dict[str, Tensor]) -> None:
    """Nested dictionaries of tensors -> dotted names."""
    if isinstance(content, Tensor):
        into[prefix] = content
    elif isinstance(content, dict):
        for name, value in content.items():
            _flatten(value, f"{prefix}.{name}" if prefix else str(name), path, into)
    else:
        kind = type(content).__name__
        raise UserError(f"{path} has a value of type {kind} at {prefix or 'its top'}, expected tensors")


def parameter_count(config: DiTConfig | SkipDiTConfig | VAEConfig) -> int:
    """Parameters of the model that a configuration describes; none is allocated."""
    kinds: dict[type[Any], Any] = {DiTConfig: ShapeDiT, SkipDiTConfig: SkipDiT, VAEConfig: ShapeVAE}
    with torch.device("meta"):
        model = kinds[type(config)](config)
    return sum(parameter.numel() for parameter in model.parameters())
