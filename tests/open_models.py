"""Tiny TripoSG and Step1X-3D folders with random weights: names and shapes written down from the published layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hunyuan_tiny import dinov2_shapes, random_tensor
from safetensors.torch import save_file
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]
WEIGHTS = "diffusion_pytorch_model.safetensors"
CONTEXT = 64
DINOV2 = {
    "hidden_size": CONTEXT, "num_hidden_layers": 2, "num_attention_heads": 1, "image_size": 28, "patch_size": 14,
    "use_swiglu_ffn": False, "mlp_ratio": 4, "layerscale_value": 1.0, "layer_norm_eps": 1e-6, "num_channels": 3,
    "hidden_act": "gelu", "qkv_bias": True, "model_type": "dinov2", "torch_dtype": "float32",
}  # fmt: skip
TRIPOSG: dict[str, dict[str, Any]] = {
    "transformer": {
        "_class_name": "TripoSGDiTModel", "_diffusers_version": "0.30.0", "width": 32, "num_layers": 5,
        "num_attention_heads": 2, "in_channels": 8, "cross_attention_dim": CONTEXT,
    },
    "vae": {
        "_class_name": "Tripo2VAEModel", "in_channels": 3, "latent_channels": 8, "num_attention_heads": 2,
        "width_encoder": 16, "width_decoder": 32, "num_layers_encoder": 2, "num_layers_decoder": 2,
        "embedding_type": "frequency", "embed_frequency": 8, "embed_include_pi": False,
    },
    "scheduler": {
        "_class_name": "RectifiedFlowScheduler", "num_train_timesteps": 1000, "shift": 1,
        "use_dynamic_shifting": False,
    },
    "feature_extractor_dinov2": {
        "crop_size": {"height": 28, "width": 28}, "do_center_crop": True, "do_convert_rgb": True,
        "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": [0.485, 0.456, 0.406],
        "image_processor_type": "BitImageProcessor", "image_std": [0.229, 0.224, 0.225], "resample": 3,
        "rescale_factor": 0.00392156862745098, "size": {"shortest_edge": 32},
    },
}  # fmt: skip
STEP1X: dict[str, dict[str, Any]] = {
    "transformer": {
        "input_channels": 8, "width": 32, "layers": 2, "num_single_layers": 2, "num_heads": 2,
        "condition_dim": CONTEXT, "multi_condition_type": "in_context", "use_visual_condition": True,
        "visual_condition_dim": CONTEXT, "n_views": 1, "use_caption_condition": False,
        "caption_condition_dim": 1024, "use_label_condition": False, "label_condition_dim": 1024,
        "identity_init": False,
    },
    "vae": {
        "num_latents": 6, "embed_dim": 8, "width": 32, "heads": 2, "num_encoder_layers": 2,
        "num_decoder_layers": 2, "num_freqs": 8, "include_pi": False, "qkv_bias": False, "qk_norm": False,
        "use_ln_post": True, "with_sharp_data": True, "point_feats": 3, "embed_point_feats": False,
        "use_downsample": True, "out_dim": 1, "embed_type": "fourier", "z_scale_factor": 0.9, "init_scale": 0.01,
        "use_flash": True, "use_checkpoint": True, "volume_decoder_type": "hierarchical",
        "surface_extractor_type": "mc",
    },
    "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0},
    "visual_encoder": {
        "dino_type": "facebook/dinov2-with-registers-large", "image_size": 28, "zero_uncond_embeds": True,
    },
}  # fmt: skip


def _linear(name: str, rows: int, columns: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (rows, columns)} | ({f"{name}.bias": (rows,)} if bias else {})


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def triposg_dit(c: dict[str, Any]) -> Shapes:
    W, H, C, K = (c[n] for n in ("width", "num_attention_heads", "in_channels", "cross_attention_dim"))
    layers = c["num_layers"]
    shapes = _linear("proj_in", W, C) | _linear("time_proj.linear_1", 4 * W, W)
    shapes |= _linear("time_proj.linear_2", W, 4 * W) | _norm("norm_out", W) | _linear("proj_out", C, W)
    for i in range(layers):
        block = f"blocks.{i}"
        for name, read in (("attn1", W), ("attn2", K)):
            shapes |= _linear(f"{block}.{name}.to_q", W, W, False)
            shapes |= _linear(f"{block}.{name}.to_k", W, read, False)
            shapes |= _linear(f"{block}.{name}.to_v", W, read, False)
            shapes |= {f"{block}.{name}.norm_q.weight": (W // H,), f"{block}.{name}.norm_k.weight": (W // H,)}
            shapes |= _linear(f"{block}.{name}.to_out.0", W, W)
        for number in (1, 2, 3):
            shapes |= _norm(f"{block}.norm{number}", W)
        shapes |= _linear(f"{block}.ff.net.0.proj", 4 * W, W) | _linear(f"{block}.ff.net.2", W, 4 * W)
        if i > layers // 2:
            shapes |= _linear(f"{block}.skip_linear", W, 2 * W) | _norm(f"{block}.skip_norm", W)
    return shapes


def triposg_vae(c: dict[str, Any], encoder: bool = True) -> Shapes:
    E, D, L = c["width_encoder"], c["width_decoder"], c["latent_channels"]
    n, m = c["num_layers_decoder"], c["num_layers_encoder"]

    def block(name: str, width: int, cross: bool) -> Shapes:
        attention = f"{name}.{'attn2' if cross else 'attn1'}"
        found = _norm(f"{name}.{'norm2' if cross else 'norm1'}", width) | _norm(f"{name}.norm3", width)
        for part in ("to_q", "to_k", "to_v"):
            found |= _linear(f"{attention}.{part}", width, width, False)
        found |= _linear(f"{attention}.to_out.0", width, width)
        found |= _norm(f"{attention}.norm_cross", width) if cross else {}
        found |= _linear(f"{name}.ff.net.0.proj", 4 * width, width)
        return found | _linear(f"{name}.ff.net.2", width, 4 * width)

    shapes = _linear("post_quant", D, L) | _linear("decoder.proj_query", D, 51)
    shapes |= _norm("decoder.norm_out", D) | _linear("decoder.proj_out", 1, D)
    for i in range(n):
        shapes |= block(f"decoder.blocks.{i}", D, False)
    shapes |= block(f"decoder.blocks.{n}", D, True)
    if encoder:
        shapes |= (
            _linear("quant", 2 * L, E) | _linear("encoder.proj_in", E, 54) | _norm("encoder.norm_out", E)
        )
        shapes |= block("encoder.blocks.0", E, True)
        for i in range(1, m + 1):
            shapes |= block(f"encoder.blocks.{i}", E, False)
    return shapes


def step1x_dit(c: dict[str, Any]) -> Shapes:
    W, H, C, K = (c[n] for n in ("width", "num_heads", "input_channels", "condition_dim"))
    shapes = _linear("proj_in", W, C) | _linear("proj_cross_attention", W, K)
    shapes |= _linear("time_proj.linear_1", 4 * W, W) | _linear("time_proj.linear_2", W, 4 * W)
    shapes |= _linear("norm_out.linear", 2 * W, W) | _linear("proj_out", C, W)
    for i in range(c["layers"]):
        block = f"transformer_blocks.{i}"
        for norm in ("norm1", "norm1_context"):
            shapes |= _linear(f"{block}.{norm}.linear", 6 * W, W)
        for name in (
            "to_q",
            "to_k",
            "to_v",
            "add_q_proj",
            "add_k_proj",
            "add_v_proj",
            "to_out.0",
            "to_add_out",
        ):
            shapes |= _linear(f"{block}.attn.{name}", W, W)
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            shapes[f"{block}.attn.{name}.weight"] = (W // H,)
        for name in ("ff", "ff_context"):
            shapes |= _linear(f"{block}.{name}.net.0.proj", 4 * W, W)
            shapes |= _linear(f"{block}.{name}.net.2", W, 4 * W)
    for i in range(c["num_single_layers"]):
        block = f"single_transformer_blocks.{i}"
        shapes |= _linear(f"{block}.norm.linear", 3 * W, W)
        for name in ("to_q", "to_k", "to_v"):
            shapes |= _linear(f"{block}.attn.{name}", W, W)
        for name in ("norm_q", "norm_k"):
            shapes[f"{block}.attn.{name}.weight"] = (W // H,)
        shapes |= _linear(f"{block}.proj_mlp", 4 * W, W) | _linear(f"{block}.proj_out", W, 5 * W)
    return {f"dit_model.{name}": shape for name, shape in shapes.items()}


def step1x_vae(c: dict[str, Any], encoder: bool = True) -> Shapes:
    D, C = c["width"], c["embed_dim"]

    def mlp(name: str) -> Shapes:
        return _linear(f"{name}.mlp.c_fc", 4 * D, D) | _linear(f"{name}.mlp.c_proj", D, 4 * D)

    def stack(name: str, layers: int) -> Shapes:
        found: Shapes = {}
        for i in range(layers):
            block = f"{name}.resblocks.{i}"
            found |= _linear(f"{block}.attn.c_qkv", 3 * D, D, False) | _linear(f"{block}.attn.c_proj", D, D)
            found |= _norm(f"{block}.ln_1", D) | _norm(f"{block}.ln_2", D) | mlp(block)
        return found

    def cross(name: str) -> Shapes:
        found = _linear(f"{name}.attn.c_q", D, D, False) | _linear(f"{name}.attn.c_kv", 2 * D, D, False)
        found |= _linear(f"{name}.attn.c_proj", D, D) | mlp(name)
        for i in (1, 2, 3):
            found |= _norm(f"{name}.ln_{i}", D)
        return found

    shapes = _linear("post_kl", D, C) | stack("transformer", c["num_decoder_layers"])
    shapes |= _linear("decoder.query_proj", D, 51) | cross("decoder.cross_attn_decoder")
    shapes |= _norm("decoder.ln_post", D) | _linear("decoder.output_proj", 1, D)
    if encoder:
        shapes |= _linear("pre_kl", 2 * C, D) | _norm("encoder.ln_post", D)
        shapes |= _linear("encoder.input_proj", D, 54) | _linear("encoder.input_proj_sharp", D, 54)
        shapes |= cross("encoder.cross_attn") | cross("encoder.cross_attn_sharp")
        shapes |= stack("encoder.self_attn", c["num_encoder_layers"])
    return shapes


LAYOUTS = {"triposg": (TRIPOSG, triposg_dit, triposg_vae), "step1x3d": (STEP1X, step1x_dit, step1x_vae)}


def states(model: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The published tensors of the DiT and of the VAE."""
    values, dit, vae = LAYOUTS[model]
    found = []
    for prefix, shapes in (("dit.", dit(values["transformer"])), ("vae.", vae(values["vae"]))):
        found.append({name: random_tensor(prefix + name, shape) for name, shape in shapes.items()})
    return found[0], found[1]


def encoder_state(registers: int = 0) -> dict[str, Tensor]:
    """DINOv2's tensors, by the names of transformers 4."""
    shapes = dinov2_shapes(DINOV2)
    if registers:
        shapes["embeddings.register_tokens"] = (1, registers, CONTEXT)
    return {name: random_tensor(name, shape) for name, shape in shapes.items()}


def write_folder(root: Path, model: str, encoder: bool = True) -> Path:
    """The published folder; without an encoder its entries in the index are null."""
    values, _, _ = LAYOUTS[model]
    names = {"scheduler": "scheduler_config.json", "feature_extractor_dinov2": "preprocessor_config.json"}
    index: dict[str, Any] = {
        "_class_name": "TripoSGPipeline" if model == "triposg" else "Step1X3DGeometryPipeline",
        "_diffusers_version": "0.30.0",
    }
    for part, fields in values.items():
        optional = part in ("feature_extractor_dinov2", "visual_encoder")
        index[part] = [None, None] if optional and not encoder else ["some.module", "SomeClass"]
        if not optional or encoder:
            (root / part).mkdir(parents=True)
            (root / part / names.get(part, "config.json")).write_text(json.dumps(fields))
    for part, state in zip(("transformer", "vae"), states(model), strict=True):
        save_file(state, root / part / WEIGHTS)
    if model == "step1x3d":
        index |= {
            "caption_encoder": [None, None],
            "label_encoder": None,
            "visual_eature_extractor": [None, None],
        }
        if encoder:
            state = {f"dino_model.{n}": tensor for n, tensor in encoder_state(registers=4).items()}
            save_file(state, root / "visual_encoder" / WEIGHTS)
    else:
        index["image_encoder_dinov2"] = ["transformers", "Dinov2Model"] if encoder else [None, None]
        if encoder:
            folder = root / "image_encoder_dinov2"
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(DINOV2))
            save_file(encoder_state(), folder / "model.safetensors", metadata={"format": "pt"})
    (root / "model_index.json").write_text(json.dumps(index))
    return root
