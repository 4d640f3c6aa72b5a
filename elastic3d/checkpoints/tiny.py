"""Tiny models with random weights in the layout of a published one: to try every command before gigabytes are loaded.

They follow the image in nothing. Only the field is arranged: it is positive in a blob around the centre, so that there
is a surface to extract.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elastic3d.checkpoints import step1x3d, triposg
from elastic3d.checkpoints.bundle import model_class
from elastic3d.checkpoints.dinov2 import build_network
from elastic3d.checkpoints.folders import INDEX_NAME, Folder, open_folder
from elastic3d.checkpoints.options import CheckpointConfig
from elastic3d.checkpoints.tensors import Row, to_published
from elastic3d.errors import UserError
from elastic3d.models.options import DiTConfig, SkipDiTConfig
from elastic3d.models.shape_vae import ShapeVAE
from elastic3d.models.weights import save_weights
from elastic3d.utils.files import printable, save_json

_WEIGHTS = "diffusion_pytorch_model.safetensors"
_MARKER = "tiny.json"  # in a folder that may be written anew
_BLOB = 0.6  # about the radius at which the field changes its sign
_DINOV2 = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "patch_size": 14,
    "image_size": 518,
}
_TRIPOSG: dict[str, dict[str, Any]] = {
    "transformer": {
        "_class_name": "TripoSGDiTModel", "width": 64, "num_layers": 5, "num_attention_heads": 4, "in_channels": 8,
        "cross_attention_dim": 64,
    },
    "vae": {
        "_class_name": "TripoSGVAEModel", "in_channels": 3, "latent_channels": 8, "num_attention_heads": 2,
        "width_encoder": 32, "width_decoder": 64, "num_layers_encoder": 1, "num_layers_decoder": 2,
        "embedding_type": "frequency", "embed_frequency": 8, "embed_include_pi": False,
    },
    "scheduler": {
        "_class_name": "RectifiedFlowScheduler", "num_train_timesteps": 1000, "shift": 1.0,
        "use_dynamic_shifting": False,
    },
    "feature_extractor_dinov2": {
        "image_processor_type": "BitImageProcessor", "crop_size": {"height": 224, "width": 224}, "resample": 3,
        "do_center_crop": True, "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True,
        "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
        "rescale_factor": 0.00392156862745098, "size": {"shortest_edge": 256},
    },
}  # fmt: skip
_STEP1X: dict[str, dict[str, Any]] = {
    "transformer": {
        "input_channels": 8, "width": 64, "layers": 2, "num_single_layers": 2, "num_heads": 4, "condition_dim": 64,
        "multi_condition_type": "in_context", "use_visual_condition": True, "visual_condition_dim": 64, "n_views": 1,
        "use_caption_condition": False, "use_label_condition": False, "identity_init": False,
    },
    "vae": {
        "num_latents": 128, "embed_dim": 8, "width": 64, "heads": 2, "num_encoder_layers": 1,
        "num_decoder_layers": 2, "num_freqs": 8, "include_pi": False, "qkv_bias": False, "qk_norm": False,
        "use_ln_post": True, "with_sharp_data": True, "point_feats": 3, "embed_point_feats": False,
        "use_downsample": True, "out_dim": 1, "embed_type": "fourier", "z_scale_factor": 1.0,
    },
    "scheduler": {
        "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0,
    },
    "visual_encoder": {
        "dino_type": "facebook/dinov2-with-registers-large", "image_size": 518, "zero_uncond_embeds": True,
    },
}  # fmt: skip
_INDEX: dict[str, dict[str, Any]] = {
    "triposg": {
        "_class_name": "TripoSGPipeline",
        "vae": ["triposg", "TripoSGVAEModel"],
        "transformer": ["triposg", "TripoSGDiTModel"],
        "scheduler": ["triposg", "RectifiedFlowScheduler"],
        "image_encoder_dinov2": ["transformers", "Dinov2Model"],
        "feature_extractor_dinov2": ["transformers", "BitImageProcessor"],
    },
    "step1x3d": {
        "_class_name": "Step1X3DGeometryPipeline",
        "vae": ["step1x3d", "MichelangeloAutoencoder"],
        "transformer": ["step1x3d", "FluxDenoiser"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "visual_encoder": ["step1x3d", "Dinov2Encoder"],
        "caption_encoder": [None, None],
        "label_encoder": [None, None],
        "visual_eature_extractor": [None, None],  # the original's own spelling
    },
}


def write_tiny(model: str, folder: str | Path, seed: int = 0) -> Path:
    """Write a tiny `triposg` or `step1x3d` with random weights; `model_index.json` comes last.

    The global random state is left as it was. UserError if the folder holds anything else: it may be the download.
    """
    root = Path(folder)
    if not (root / _MARKER).is_file():
        if root.is_dir() and any(root.iterdir()):
            raise UserError(
                f"output is {printable(root)}, which holds files of no tiny model: choose an empty folder"
            )
        save_json({"model": model, "seed": seed}, root / _MARKER)
    values = _TRIPOSG if model == "triposg" else _STEP1X
    for part, fields in values.items():
        save_json(fields, root / part / _CONFIG_NAMES.get(part, "config.json"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if model == "triposg":
            build_network({**_DINOV2, "model_type": "dinov2"}, "tiny").save_pretrained(root / triposg.ENCODER)
            source = Folder(root, _INDEX[model])
            config = triposg.parse_triposg(source)
            assert isinstance(config.dit, SkipDiTConfig)
            _write_weights(root, config, triposg.dit_rows(config.dit), triposg.vae_rows(config.vae))
        else:
            network = build_network({**_DINOV2, "num_register_tokens": 4}, "tiny")
            state = {f"dino_model.{name}": value for name, value in network.state_dict().items()}
            save_weights(state, root / step1x3d.ENCODER / _WEIGHTS)
            config = step1x3d.parse_step1x3d(Folder(root, _INDEX[model]))
            assert isinstance(config.dit, DiTConfig)
            _write_weights(root, config, step1x3d.dit_rows(config.dit), step1x3d.vae_rows(config.vae))
    save_json(_INDEX[model], root / INDEX_NAME)
    open_folder(root, model)
    return root


_CONFIG_NAMES = {
    "scheduler": "scheduler_config.json",
    "feature_extractor_dinov2": "preprocessor_config.json",
}


def _write_weights(root: Path, config: CheckpointConfig, dit_rows: list[Row], vae_rows: list[Row]) -> None:
    dit = {
        name: _drawn(name, value) for name, value in model_class(config.dit)(config.dit).state_dict().items()
    }
    save_weights(to_published(dit, dit_rows), root / "transformer" / _WEIGHTS)
    vae = ShapeVAE(config.vae)
    state = {name: _drawn(name, value) for name, value in vae.state_dict().items()}
    _arrange_blob(state, config.vae.num_freqs)
    save_weights(to_published(state, vae_rows), root / "vae" / _WEIGHTS)


def _drawn(name: str, value: Tensor) -> Tensor:
    """Matrices of about unit gain, scales about one, small biases: no block is the identity."""
    noise = torch.randn(value.shape)
    if value.ndim > 1:
        return noise * value[0].numel() ** -0.5
    return 1 + 0.1 * noise if name.endswith(("weight", "scale")) else 0.1 * noise


def _arrange_blob(state: dict[str, Tensor], freqs: int) -> None:
    """The output reads one channel above all, that of cos x + cos y + cos z: it falls with the distance."""
    query, output = "geo_decoder.query_proj", "geo_decoder.output_proj"
    axis_cosines = [3 + 3 * freqs + axis * freqs for axis in range(3)]
    state[f"{query}.weight"][0] = 0
    state[f"{query}.weight"][0, axis_cosines] = 20.0
    state[f"{query}.bias"][0] = -20.0 * (2 + torch.cos(torch.tensor(_BLOB)))
    state["geo_decoder.ln_post.weight"][0], state["geo_decoder.ln_post.bias"][0] = 1.0, 0.0
    state[f"{output}.weight"] *= 0.1
    state[f"{output}.weight"][0, 0] = 1.0
    state[f"{output}.bias"].zero_()
