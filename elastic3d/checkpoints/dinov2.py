"""The DINOv2 in a published checkpoint: its network, with or without registers, from tensors of either naming."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elastic3d.checkpoints.bundle import Loader
from elastic3d.checkpoints.options import CheckpointConfig
from elastic3d.errors import UserError
from elastic3d.models.image_encoder import DinoV2, load_dinov2
from elastic3d.models.weights import fill

_HEAD_WIDTH = 64  # of every published DINOv2
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


def build_network(fields: Mapping[str, Any], source: str) -> Any:
    """A transformers Dinov2Model of this configuration, on the current default device.

    With `num_register_tokens` it is a Dinov2WithRegistersModel.
    """
    from transformers import (
        Dinov2Config,
        Dinov2Model,
        Dinov2WithRegistersConfig,
        Dinov2WithRegistersModel,
    )

    registers = "num_register_tokens" in fields
    config: Any = Dinov2WithRegistersConfig if registers else Dinov2Config
    model: Any = Dinov2WithRegistersModel if registers else Dinov2Model
    known = {name for base in config.__mro__ for name in vars(base).get("__annotations__", {})}
    for name in fields:
        if name not in known | _IGNORED_FIELDS:
            raise UserError(f"{source}: conditioner: unknown parameter {name!r} of DINOv2")
    kept = {name: value for name, value in fields.items() if name not in _IGNORED_FIELDS}
    try:
        return model(config(**kept)).eval()
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


def network_fields(state: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """What tensors (modern names) tell of their network, where no file does; heads are 64 wide, as in every DINOv2.

    Raises:
        UserError: they are not those of a DINOv2.
    """
    try:
        patches, patch = (
            state["embeddings.position_embeddings"],
            state["embeddings.patch_embeddings.projection.weight"],
        )
        width, side = patch.shape[0], patch.shape[-1]
        grid = round((patches.shape[1] - 1) ** 0.5)
        layers = len([name for name in state if name.endswith(".norm1.weight")])
        swiglu = "encoder.layer.0.mlp.gate_proj.weight" in state
        hidden = 4 * width if swiglu else state["encoder.layer.0.mlp.fc1.weight"].shape[0]
    except (KeyError, IndexError) as error:
        raise UserError(f"{source} does not hold a DINOv2: there is no tensor {error}") from error
    fields = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": max(width // _HEAD_WIDTH, 1),
        "mlp_ratio": hidden // width,
        "use_swiglu_ffn": swiglu,
        "image_size": grid * side,
        "patch_size": side,
    }
    if "embeddings.register_tokens" in state:
        fields["num_register_tokens"] = state["embeddings.register_tokens"].shape[1]
    return fields


def load_network(
    config: CheckpointConfig, state: Mapping[str, Tensor], source: str, loader: Loader
) -> DinoV2:
    """The encoder of a checkpoint from its own tensors, of either naming."""
    with torch.device("meta"):
        network = build_network(config.dinov2, source)
    fill(network, modern_names(state), source, loader.dtype, loader.device)
    return DinoV2(config.encoder, network).to(loader.device)


def other_network(config: CheckpointConfig, folder: Path, loader: Loader, registers: bool = False) -> DinoV2:
    """The encoder of a checkpoint with a DINOv2 from elsewhere; UserError if its width doesn't fit, or it has registers
    and the family's none, or the other way round."""
    network = load_dinov2(folder).to(loader.device, loader.dtype)
    found, wanted = network.config.hidden_size, config.dit.condition_channels
    if found != wanted:
        raise UserError(f"{folder} is a DINOv2 of {found} channels, expected {wanted}")
    if (getattr(network.config, "num_register_tokens", 0) > 0) != registers:
        kinds = ("with", "without") if registers else ("without", "with")
        raise UserError(f"{folder} is a DINOv2 {kinds[1]} registers, expected one {kinds[0]}")
    return DinoV2(config.encoder, network).to(loader.device)
