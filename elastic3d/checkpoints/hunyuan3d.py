"""Hunyuan3D-2 checkpoints as published: a folder with config.yaml and one file of weights, loaded strictly."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from elastic3d.checkpoints.bundle import Bundle, Inspection, Loader
from elastic3d.checkpoints.dinov2 import load_network, other_network
from elastic3d.checkpoints.hunyuan3d_config import parse_config, parse_vae
from elastic3d.checkpoints.identify import identify
from elastic3d.checkpoints.tensors import count_parameters, read_checkpoint
from elastic3d.errors import UserError
from elastic3d.models.image_encoder import DinoV2, dinov2_files
from elastic3d.models.options import VAEConfig
from elastic3d.models.shape_vae import ShapeVAE
from elastic3d.utils.structured import load_yaml
from elastic3d.utils.tensors import tensor_heads

CONFIG_NAME = "config.yaml"
WEIGHTS_NAMES = ("model.fp16.safetensors", "model.safetensors", "model.fp16.ckpt", "model.ckpt")
DEFAULT_SUBFOLDER = "hunyuan3d-dit-v2-0"
_PARTS = ("model", "vae", "conditioner")
_STAGES = {"conditioner": "condition", "model": "dit", "vae": "decode"}
_NETWORK_PREFIX = "main_image_encoder.model."
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


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
    has_encoder = any(name.startswith("encoder.") for name in state["vae"])
    config = parse_config(values, str(config_path), has_encoder)
    config.pipeline.model = subfolder
    place = Loader.of(dtype, device)
    dit = place.build(config.dit, state.pop("model"), f"{weights_path} (model.)")
    files = [weights_path]
    if vae_subfolder is None:
        vae = place.vae(config.vae, state.pop("vae"), f"{weights_path} (vae.)")
    else:
        vae, vae_path = _other_vae(folder, vae_subfolder, place, config.vae)
        files.append(vae_path)
        config.vae = vae.config
    conditioner: DinoV2 | None = None
    note = ""
    if dinov2 is not None:
        conditioner = other_network(config, Path(dinov2), place)
    elif encoder := _encoder_state(state.pop("conditioner"), weights_path):
        source = f"{weights_path} (conditioner.{_NETWORK_PREFIX})"
        conditioner = load_network(config, encoder, source, place)
    else:
        note = _no_encoder(weights_path)
        warnings.warn(note, stacklevel=2)
    return Bundle(dit, vae, conditioner, config, tuple(files), note)


def load_hunyuan3d_vae(
    folder: str | Path,
    subfolder: str = "hunyuan3d-vae-v2-0",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> ShapeVAE:
    """A checkpoint that is a VAE alone; arguments and errors as in `load_hunyuan3d`."""
    place = Loader.of(dtype, device)
    return _other_vae(folder, subfolder, place, None)[0]


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
    folder: str | Path, subfolder: str, place: Loader, instead_of: VAEConfig | None
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
    """Parameters of each stage's weights in a checkpoint, from the head of the file alone.

    A `.ckpt` has no such head: its bytes are taken for half-precision weights of the diffusion model. Tensors of no
    stage (those of a VAE that is a file of its own) count as the field decoder's.
    """
    sizes = dict.fromkeys(_STAGES.values(), 0)
    if path.suffix != ".safetensors":
        sizes["dit"] = path.stat().st_size // 2
        return sizes
    for name, head in tensor_heads(path).items():
        sizes[_STAGES.get(name.partition(".")[0], "decode")] += head.numel
    return sizes


def find_checkpoint(folder: str | Path, subfolder: str) -> tuple[Path, Path]:
    """Config and weights of a checkpoint.

    Args:
        folder: looked for as it is, then below $HY3DGEN_MODELS (or ~/.cache/hy3dgen), then on the Hugging Face Hub.
            It may also be the checkpoint's own folder.

    Raises:
        UserError: nothing is there; names what was looked for and what there is instead.
    """
    home = Path(os.environ.get("HY3DGEN_MODELS", "~/.cache/hy3dgen")).expanduser()
    candidates = [Path(folder).expanduser(), home / folder]
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
    if _REPOSITORY.fullmatch(str(folder)):
        return _files(_download(str(folder), subfolder, looked) / subfolder)
    raise UserError(f"there is no folder {looked}")


def _files(folder: Path) -> tuple[Path, Path]:
    config = folder / CONFIG_NAME
    if not config.is_file():
        raise UserError(f"there is no file {config}")
    for name in WEIGHTS_NAMES:
        if (folder / name).is_file():
            return config, folder / name
    raise UserError(f"{folder} has no weights, expected one of {', '.join(WEIGHTS_NAMES)}")


def _download(repository: str, subfolder: str, looked: str) -> Path:
    """The repository's snapshot in the Hub's own cache; `looked` are the folders where it was not."""
    from huggingface_hub import snapshot_download

    patterns = [f"{subfolder}/{name}" for name in (CONFIG_NAME, WEIGHTS_NAMES[0], "*.ckpt")]
    try:
        root = Path(snapshot_download(repository, allow_patterns=patterns))
    except Exception as error:  # offline, unknown, gated: each an exception of another library
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"there is no folder {looked}, and {repository} can't be downloaded ({reason}): put {subfolder}/ "
            f"with {CONFIG_NAME} and {WEIGHTS_NAMES[0]} into a folder and give that as weights="
        ) from error
    if not (root / subfolder).is_dir():
        raise UserError(f"{repository} has no folder {subfolder}")
    return root
