"""Tiny Hunyuan3D-2 checkpoints with random weights, in the published layout: same keys, same config.yaml."""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

SEED = 7
LATENTS, CHANNELS, CONTEXT, IMAGE = 6, 8, 24, 40
CASES = ("base", "turbo", "mv")
DINOV2 = {
    "hidden_size": CONTEXT, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    "use_swiglu_ffn": True, "mlp_ratio": 4, "layerscale_value": 1.0, "layer_norm_eps": 1e-6, "num_channels": 3,
    "hidden_act": "gelu", "qkv_bias": True, "model_type": "dinov2", "torch_dtype": "float32",
}  # fmt: skip


def tiny_config(case: str = "base") -> dict[str, Any]:
    """What `config.yaml` holds: `base`, `turbo` (guidance-embedded, small field decoder), or `mv` (several views)."""
    turbo, views = case == "turbo", case == "mv"
    small_decoder = {
        "geo_decoder_downsample_ratio": 2, "geo_decoder_mlp_expand_ratio": 1, "geo_decoder_ln_post": False,
    }  # fmt: skip
    encoder = {"config": DINOV2, "image_size": 28, "use_cls_token": True} | ({"view_num": 4} if views else {})
    package = "hy3dgen.shapegen"
    return {
        "model": {
            "target": f"{package}.models.Hunyuan3DDiT",
            "params": {
                "in_channels": CHANNELS, "context_in_dim": CONTEXT, "hidden_size": 32, "mlp_ratio": 4.0,
                "num_heads": 2, "depth": 2, "depth_single_blocks": 2, "axes_dim": [16], "theta": 10000,
                "qkv_bias": True, "guidance_embed": turbo,
            },
        },
        "vae": {
            "target": f"{package}.models.ShapeVAE",
            "params": {
                "num_latents": LATENTS, "embed_dim": CHANNELS, "num_freqs": 8, "include_pi": False, "heads": 2,
                "width": 32, "num_decoder_layers": 2, "qkv_bias": False, "qk_norm": True,
                "scale_factor": 0.93, **(small_decoder if turbo else {}),
            },
        },
        "conditioner": {
            "target": f"{package}.models.SingleImageEncoder",
            "params": {
                "main_image_encoder": {
                    "type": "DinoImageEncoderMV" if views else "DinoImageEncoder", "kwargs": encoder,
                }
            },
        },
        "scheduler": {
            "target": f"{package}.schedulers."
            + ("ConsistencyFlowMatchEulerDiscreteScheduler" if turbo else "FlowMatchEulerDiscreteScheduler"),
            "params": {"num_train_timesteps": 1000} | ({"pcm_timesteps": 100} if turbo else {}),
        },
        "image_processor": {
            "target": f"{package}.preprocessors.{'MV' if views else ''}ImageProcessorV2",
            "params": {"size": IMAGE},
        },
        "pipeline": {"target": f"{package}.pipelines.Hunyuan3DDiTFlowMatchingPipeline"},
    }  # fmt: skip


def dit_shapes(params: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published DiT's tensors, written down from its layout."""
    D, C, H = params["hidden_size"], params["in_channels"], params["num_heads"]
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, rows: int, columns: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (rows, columns), (rows,)

    linear("latent_in", D, C)
    linear("cond_in", D, params["context_in_dim"])
    for name in ("time_in", "guidance_in") if params["guidance_embed"] else ("time_in",):
        linear(f"{name}.in_layer", D, 256)
        linear(f"{name}.out_layer", D, D)
    for i in range(params["depth"]):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}"
            linear(f"{block}_mod.lin", 6 * D, D)
            linear(f"{block}_attn.qkv", 3 * D, D)
            linear(f"{block}_attn.proj", D, D)
            linear(f"{block}_mlp.0", 4 * D, D)
            linear(f"{block}_mlp.2", D, 4 * D)
            for norm in ("query_norm", "key_norm"):
                shapes[f"{block}_attn.norm.{norm}.scale"] = (D // H,)
    for i in range(params["depth_single_blocks"]):
        block = f"single_blocks.{i}"
        linear(f"{block}.linear1", 7 * D, D)
        linear(f"{block}.linear2", D, 5 * D)
        linear(f"{block}.modulation.lin", 3 * D, D)
        for norm in ("query_norm", "key_norm"):
            shapes[f"{block}.norm.{norm}.scale"] = (D // H,)
    linear("final_layer.linear", C, D)
    linear("final_layer.adaLN_modulation.1", 2 * D, D)
    return shapes


def vae_shapes(params: dict[str, Any], encoder_layers: int = 0) -> dict[str, tuple[int, ...]]:
    """The same for the VAE; with `encoder_layers` as in the files that hold an encoder."""
    D, H, C = params["width"], params["heads"], params["embed_dim"]
    down = params.get("geo_decoder_downsample_ratio", 1)
    geo, ln_post = D // down, params.get("geo_decoder_ln_post", True)
    shapes: dict[str, tuple[int, ...]] = {"post_kl.weight": (D, C), "post_kl.bias": (D,)}

    def linear(name: str, rows: int, columns: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"{name}.bias"] = (rows,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (width,), (width,)

    def mlp(name: str, width: int, ratio: int) -> None:
        linear(f"{name}.mlp.c_fc", ratio * width, width)
        linear(f"{name}.mlp.c_proj", width, ratio * width)

    def heads(name: str, width: int) -> None:
        for each in ("q_norm", "k_norm"):
            norm(f"{name}.attn.attention.{each}", width)

    def stack(name: str, layers: int) -> None:
        for i in range(layers):
            block = f"{name}.resblocks.{i}"
            linear(f"{block}.attn.c_qkv", 3 * D, D, bias=False)
            linear(f"{block}.attn.c_proj", D, D)
            heads(block, D // H)
            norm(f"{block}.ln_1", D)
            norm(f"{block}.ln_2", D)
            mlp(block, D, 4)

    def cross(name: str, width: int, ratio: int, qk_norm: bool) -> None:
        linear(f"{name}.attn.c_q", width, width, bias=False)
        linear(f"{name}.attn.c_kv", 2 * width, width, bias=False)
        linear(f"{name}.attn.c_proj", width, width)
        if qk_norm:
            heads(name, D // H)
        for i in (1, 2, 3):
            norm(f"{name}.ln_{i}", width)
        mlp(name, width, ratio)

    stack("transformer", params["num_decoder_layers"])
    linear("geo_decoder.query_proj", geo, 51)
    if down > 1:
        linear("geo_decoder.latents_proj", geo, D)
    cross("geo_decoder.cross_attn_decoder", geo, params.get("geo_decoder_mlp_expand_ratio", 4), ln_post)
    if ln_post:
        norm("geo_decoder.ln_post", geo)
    linear("geo_decoder.output_proj", 1, geo)
    if encoder_layers:
        linear("encoder.input_proj", D, 51 + params["point_feats"])
        cross("encoder.cross_attn", D, 4, True)
        stack("encoder.self_attn", encoder_layers)
        norm("encoder.ln_post", D)
        linear("pre_kl", 2 * C, D)
    return shapes


def dinov2_shapes(config: dict[str, Any], old_names: bool = True) -> dict[str, tuple[int, ...]]:
    """The same for DINOv2, with the names of transformers 4 (as published) or 5."""
    D, patch = config["hidden_size"], config["patch_size"]
    hidden = (int(4 * D * 2 / 3) + 7) // 8 * 8
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.cls_token": (1, 1, D),
        "embeddings.mask_token": (1, D),
        "embeddings.position_embeddings": (1, (config["image_size"] // patch) ** 2 + 1, D),
        "embeddings.patch_embeddings.projection.weight": (D, 3, patch, patch),
        "embeddings.patch_embeddings.projection.bias": (D,),
        "layernorm.weight": (D,),
        "layernorm.bias": (D,),
    }
    names = ("attention.query", "attention.key", "attention.value", "output.dense")
    names = names if old_names else ("q_proj", "k_proj", "v_proj", "o_proj")
    for i in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{i}"
        linears = {f"attention.{name}": (D, D) for name in names}
        if not config["use_swiglu_ffn"]:
            linears |= {"mlp.fc1": (4 * D, D), "mlp.fc2": (D, 4 * D)}
        elif old_names:
            linears |= {"mlp.weights_in": (2 * hidden, D), "mlp.weights_out": (D, hidden)}
        else:
            linears |= {
                "mlp.gate_proj": (hidden, D),
                "mlp.up_proj": (hidden, D),
                "mlp.down_proj": (D, hidden),
            }
        for name, shape in linears.items():
            shapes[f"{layer}.{name}.weight"], shapes[f"{layer}.{name}.bias"] = shape, shape[:1]
        for norm in ("norm1", "norm2"):
            shapes[f"{layer}.{norm}.weight"], shapes[f"{layer}.{norm}.bias"] = (D,), (D,)
        for scale in ("layer_scale1", "layer_scale2"):
            shapes[f"{layer}.{scale}.lambda1"] = (D,)
    return shapes


def config_21() -> dict[str, Any]:
    """A `config.yaml` of Hunyuan3D-2.1: another DiT, a VAE with its encoder, a DINOv2 without SwiGLU."""
    config = tiny_config()
    package = "hy3dshape"
    config["model"] = {
        "target": f"{package}.models.denoisers.hunyuandit.HunYuanDiTPlain",
        "params": {
            "input_size": LATENTS, "in_channels": CHANNELS, "hidden_size": 32, "context_dim": CONTEXT, "depth": 5,
            "num_heads": 2, "qk_norm": True, "text_len": 5, "with_decoupled_ca": False,
            "use_attention_pooling": False, "qk_norm_type": "rms", "qkv_bias": False, "use_pos_emb": False,
            "num_moe_layers": 2, "num_experts": 3, "moe_top_k": 2,
        },
    }  # fmt: skip
    config["vae"]["params"] |= {
        "num_encoder_layers": 1, "geo_decoder_mlp_expand_ratio": 4, "geo_decoder_downsample_ratio": 1,
        "geo_decoder_ln_post": True, "point_feats": 4, "pc_size": 64, "pc_sharpedge_size": 0,
    }  # fmt: skip
    encoder = config["conditioner"]["params"]["main_image_encoder"]["kwargs"]
    encoder["config"] = {**DINOV2, "use_swiglu_ffn": False}
    config["image_processor"]["params"]["border_ratio"] = 0.15
    return config


def dit_shapes_21(params: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of 2.1's DiT."""
    D, C, Cc, H = (params[name] for name in ("hidden_size", "in_channels", "context_dim", "num_heads"))
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, rows: int, columns: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"{name}.bias"] = (rows,)

    def norm(name: str) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (D,), (D,)

    linear("x_embedder", D, C)
    linear("t_embedder.mlp.0", 4 * D, D)
    linear("t_embedder.mlp.2", D, 4 * D)
    depth = params["depth"]
    for i in range(depth):
        block = f"blocks.{i}"
        for number in (1, 2, 3):
            norm(f"{block}.norm{number}")
        for name, read in (("attn1", D), ("attn2", Cc)):
            linear(f"{block}.{name}.to_q", D, D, bias=False)
            linear(f"{block}.{name}.to_k", D, read, bias=False)
            linear(f"{block}.{name}.to_v", D, read, bias=False)
            linear(f"{block}.{name}.out_proj", D, D)
            shapes[f"{block}.{name}.q_norm.weight"] = shapes[f"{block}.{name}.k_norm.weight"] = (D // H,)
        if i > depth // 2:
            norm(f"{block}.skip_norm")
            linear(f"{block}.skip_linear", D, 2 * D)
        if i < depth - params["num_moe_layers"]:
            linear(f"{block}.mlp.fc1", 4 * D, D)
            linear(f"{block}.mlp.fc2", D, 4 * D)
            continue
        shapes[f"{block}.moe.gate.weight"] = (params["num_experts"], D)
        experts = [f"experts.{j}" for j in range(params["num_experts"])]
        for expert in (*experts, "shared_experts"):
            linear(f"{block}.moe.{expert}.net.0.proj", 4 * D, D)
            linear(f"{block}.moe.{expert}.net.2", D, 4 * D)
    norm("final_layer.norm_final")
    linear("final_layer.linear", C, D)
    return shapes


def random_tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    """Always the same for a name: matrices of about unit gain, scales about one, biases small."""
    generator = torch.Generator().manual_seed(SEED * 1_000_003 + zlib.crc32(name.encode()))
    value = torch.randn(shape, generator=generator)
    if len(shape) > 1 and "token" not in name and "position" not in name:
        return value * math.prod(shape[1:]) ** -0.5
    if name.endswith(".weight") or name.endswith(".scale") or name.endswith(".lambda1"):
        return 1 + 0.2 * value
    return 0.2 * value


def tiny_state(
    config: dict[str, Any], encoder_layers: int = 0, conditioner: bool = True
) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by their published names."""
    model = config["model"]
    dit = (dit_shapes_21 if model["target"].endswith("Plain") else dit_shapes)(model["params"])
    shapes = {f"model.{name}": shape for name, shape in dit.items()}
    vae = vae_shapes(config["vae"]["params"], encoder_layers)
    shapes |= {f"vae.{name}": shape for name, shape in vae.items()}
    if conditioner:
        network = config["conditioner"]["params"]["main_image_encoder"]["kwargs"]["config"]
        prefix = "conditioner.main_image_encoder.model."
        shapes |= {f"{prefix}{name}": shape for name, shape in dinov2_shapes(network).items()}
    return {name: random_tensor(name, shape) for name, shape in shapes.items()}


def write_checkpoint(
    root: Path,
    case: str = "base",
    subfolder: str = "hunyuan3d-dit-v2-0",
    conditioner: bool = True,
    config: dict[str, Any] | None = None,
) -> Path:
    """`root/subfolder/{config.yaml, model.fp16.safetensors}` -> root. The numbers are fp32 for the sake of parity."""
    folder = root / subfolder
    folder.mkdir(parents=True)
    config = config or tiny_config(case)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    layers = config["vae"]["params"].get("num_encoder_layers", 0)
    save_file(tiny_state(config, layers, conditioner), folder / "model.fp16.safetensors")
    return root


def write_checkpoint_21(root: Path, subfolder: str = "hunyuan3d-dit-v2-1") -> Path:
    """`root/subfolder/{config.yaml, model.fp16.ckpt}`, a dictionary of each part's tensors -> root."""
    folder = root / subfolder
    folder.mkdir(parents=True)
    config = config_21()
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    nested: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tiny_state(config, encoder_layers=1).items():
        part, _, rest = name.partition(".")
        nested.setdefault(part, {})[rest] = tensor
    torch.save(nested, folder / "model.fp16.ckpt")
    return root
