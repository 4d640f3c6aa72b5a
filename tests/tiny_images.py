"""Tiny text-to-image pipelines with random weights, in the layout in which FLUX.1-dev and Qwen-Image are published.

Tokenizers and text encoders included: real classes, a few thousand weights, nothing downloaded.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!'-"


def save_tiny_flux(folder: Path, guidance_embeds: bool = True) -> Path:
    """A `FluxPipeline`: CLIP and T5, a VAE that shrinks by 4, one double and two single blocks."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        FluxPipeline,
        FluxTransformer2DModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    clip, t5 = clip_tokenizer(), t5_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=4, layers_per_block=1, norm_num_groups=4,
            scaling_factor=0.36, shift_factor=0.12, use_quant_conv=False, use_post_quant_conv=False,
        )  # fmt: skip
        transformer = FluxTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=12, pooled_projection_dim=8, guidance_embeds=guidance_embeds,
            axes_dims_rope=(4, 6, 6),
        )  # fmt: skip
        FluxPipeline(
            FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae,
            CLIPTextModel(
                CLIPTextConfig(
                    vocab_size=len(clip), hidden_size=8, intermediate_size=16, num_hidden_layers=1,
                    num_attention_heads=2, eos_token_id=clip.eos_token_id, pad_token_id=clip.pad_token_id,
                )
            ),
            clip,
            T5EncoderModel(
                T5Config(vocab_size=len(t5), d_model=12, d_kv=6, d_ff=16, num_layers=1, num_heads=2)
            ),
            t5,
            randomised(transformer),
        ).save_pretrained(folder)  # fmt: skip
    return folder


def save_tiny_qwen(folder: Path) -> Path:
    """A `QwenImagePipeline`: Qwen2.5-VL, a VAE that shrinks by 2, two joint blocks."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = qwen_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKLQwenImage(
            base_dim=4, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
            latents_mean=[0.1, -0.1, 0.2, 0.0], latents_std=[1.0, 2.0, 1.5, 0.5],
        )  # fmt: skip
        transformer = QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=8, axes_dims_rope=(4, 6, 6),
        )  # fmt: skip
        text = dict(
            vocab_size=len(tokenizer), hidden_size=8, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, rope_scaling={"type": "mrope", "mrope_section": [1, 1, 0]},
        )  # fmt: skip
        vision = dict(depth=1, hidden_size=8, intermediate_size=16, num_heads=2, out_hidden_size=8)
        encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02)
        pipe = QwenImagePipeline(scheduler, vae, encoder, tokenizer, randomised(transformer))
        pipe.save_pretrained(folder)
    return folder


def save_tiny_small(folder: Path) -> Path:
    """The small model of this repository, smaller: a background that is plain and an object that is random."""
    from elastic3d.pipelines.pixel_flux import PixelModelConfig, build_transformer, save_pixel_flux

    config = PixelModelConfig(
        size=16,
        patch=8,
        text_length=12,
        width=32,
        heads=2,
        double_blocks=1,
        single_blocks=1,
        steps=2,
        name="tiny",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = randomised(build_transformer(config))
    save_pixel_flux(config, transformer, folder, torch.float32)
    return folder


def clip_tokenizer():
    """Letters and letters at a word's end."""
    from transformers import CLIPTokenizer

    tokens = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)


def t5_tokenizer():
    """Letters, and the mark of a word's start."""
    from transformers import T5TokenizerFast

    tokens = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0), *((c, -3.0) for c in LETTERS)]
    return T5TokenizerFast(vocab=tokens, extra_ids=0, model_max_length=512)


def qwen_tokenizer():
    """Bytes."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    return Qwen2Tokenizer(vocab={c: i for i, c in enumerate(sorted(ByteLevel.alphabet()))}, merges=[])


def randomised(model: nn.Module) -> nn.Module:
    """Every weight drawn anew, so that no block is the identity."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    return model.eval()
