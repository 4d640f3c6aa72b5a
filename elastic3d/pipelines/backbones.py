"""What differs between families of diffusers' text-to-image pipelines: prompts, latents, guidance, velocity.

Generation runs the stock pipeline; training needs its parts one by one. Both find them here.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from elastic3d.elastic.config import ElasticConfig
from elastic3d.pipelines.options import BackboneName

Text = dict[str, Tensor]  # arguments of the pipeline, each (B, ...)


class Backbone(ABC):
    """A pipeline and its family's ways; subclasses fill in the parts.

    `defaults` are sampling steps and guidance, for models with an embedding of the guidance and for others.
    """

    name: ClassVar[BackboneName]
    pipeline_class: ClassVar[str]
    negative: ClassVar[str] = ""  # what the unconditional branch is told
    longest: int = 512  # tokens of a prompt
    stores_bytes: ClassVar[bool] = False  # latents in [-1,1] that 8 bits hold exactly
    defaults: ClassVar[dict[bool, tuple[int, float]]]

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    @property
    def transformer(self) -> nn.Module:
        """The DiT."""
        return self.pipe.transformer

    @property
    def device(self) -> torch.device:
        """Where inputs belong."""
        return self.pipe._execution_device

    @property
    def embeds_guidance(self) -> bool:
        """Whether guidance is an input of the DiT: one branch, not two."""
        return bool(self.pipe.transformer.config.guidance_embeds)

    @property
    def multiple(self) -> int:
        """Both sides of an image are multiples of this many pixels."""
        return 2 * self.pipe.vae_scale_factor

    @property
    def default_size(self) -> int:
        """Pixels a side."""
        return self.pipe.default_sample_size * self.pipe.vae_scale_factor

    @property
    def cached_tokens(self) -> int:
        """Tokens that a prompt is filled up to for training."""
        return self.longest

    @property
    def fewest_steps(self) -> int:
        """Of a generation. One step stretched to a terminal time, as in Qwen-Image's schedule, is 0 / 0."""
        return 2 if self.pipe.scheduler.config.get("shift_terminal") else 1

    def times(self, steps: int, size: tuple[int, int]) -> Tensor:
        """Times (S+1,), 0 = noise, at which the pipeline samples an image of `size`, width and height in pixels, in
        S = `steps` steps: its shift may depend on the size."""
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps

        scheduler = copy.deepcopy(self.pipe.scheduler)  # new times in the pipeline's own begin a generation
        config = scheduler.config
        mu = calculate_shift(
            math.prod(side // self.multiple for side in size),
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        sigmas = None if config.get("use_flow_sigmas") else np.linspace(1.0, 1 / steps, steps).tolist()
        retrieve_timesteps(scheduler, steps, sigmas=sigmas, mu=mu)
        times: Tensor = 1 - scheduler.sigmas
        return times

    def default_sampling(self) -> tuple[int, float]:
        """Sampling steps and guidance."""
        return self.defaults[self.embeds_guidance]

    def default_elastic(self) -> ElasticConfig:
        """How it runs once it has routers."""
        return ElasticConfig()

    @abstractmethod
    def count_tokens(self, prompt: str) -> int:
        """Tokens of a prompt."""

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str], length: int | None = None) -> Text:
        """Prompts -> arguments of the pipeline; every prompt with `length` tokens, where it is given."""

    @abstractmethod
    def encode_images(self, images: Tensor) -> Tensor:
        """Images (B,3,H,W) in [0,1] -> latents (B,N,C)."""

    @abstractmethod
    def decode(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        """Latents (B,N,C) -> images (B,3,H,W), [0,1] but for overshoots; `size` is width, height."""

    @abstractmethod
    def velocity(
        self, dit: Any, latents: Tensor, t: Tensor, text: Text, size: tuple[int, int], guidance: float
    ) -> Tensor:
        """Latents (B,N,C) at t (B,), 0 = noise -> `dit`'s velocity (B,N,C) towards the data."""

    def gain(self, conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor | float:
        """Factor (B,N,1) that the pipeline has on the guided velocity (B,N,C)."""
        return 1.0

    def guidance_arguments(
        self, guidance: float, samples: int, negative: Text | None = None
    ) -> dict[str, Any]:
        """Arguments of the pipeline for a guidance; where two branches are needed, the second one's text.

        `negative` (1, ...) is that text where it was encoded before.
        """
        if self.embeds_guidance:
            return {"guidance_scale": guidance}
        if guidance <= 1:
            return {"true_cfg_scale": 1.0}
        text = negative or self.encode_prompts([self.negative])
        other = {f"negative_{name}": value.expand(samples, *value.shape[1:]) for name, value in text.items()}
        return {"true_cfg_scale": guidance, **other}

    def _guidance(self, guidance: float, like: Tensor) -> Tensor | None:
        return (
            torch.full((len(like),), guidance, device=like.device, dtype=torch.float32)
            if self.embeds_guidance
            else None
        )


class FluxBackbone(Backbone):
    """`FluxPipeline`: T5's tokens, CLIP's pooled vector."""

    name = BackboneName.flux
    pipeline_class = "FluxPipeline"
    defaults = {True: (28, 3.5), False: (4, 1.0)}  # FLUX.1-dev, FLUX.1-schnell

    @property
    def longest(self) -> int:  # type: ignore[override]
        """Tokens of a prompt, which is filled up to them; FLUX.1-schnell was trained on fewer."""
        return 512 if self.embeds_guidance else 256

    def count_tokens(self, prompt: str) -> int:
        """T5's."""
        return len(self.pipe.tokenizer_2(prompt).input_ids)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], length: int | None = None) -> Text:
        """`prompt_embeds` (B,L,D) and `pooled_prompt_embeds` (B,P)."""
        embeds, pooled, _ = self.pipe.encode_prompt(
            prompt=list(prompts), device=self.device, max_sequence_length=length or self.longest
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Latents (B,N,C), 2 x 2 of the VAE's in a token."""
        vae = self.pipe.vae
        raw = vae.encode((2 * images - 1).to(vae.dtype)).latent_dist.mode()
        x = (raw - vae.config.shift_factor) * vae.config.scaling_factor
        return self.pipe._pack_latents(x, *x.shape)

    def decode(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        """Images (B,3,H,W)."""
        pipe, config = self.pipe, self.pipe.vae.config
        x = pipe._unpack_latents(latents, size[1], size[0], pipe.vae_scale_factor)
        x = x / config.scaling_factor + config.shift_factor
        return pipe.vae.decode(x.to(pipe.vae.dtype), return_dict=False)[0] / 2 + 0.5

    def velocity(
        self, dit: Any, latents: Tensor, t: Tensor, text: Text, size: tuple[int, int], guidance: float
    ) -> Tensor:
        """(B,N,C)."""
        number, embeds = dit.dtype, text["prompt_embeds"]
        rows, columns = size[1] // self.multiple, size[0] // self.multiple
        places = self.pipe._prepare_latent_image_ids(len(latents), rows, columns, latents.device, number)
        found = dit(
            hidden_states=latents.to(number),
            timestep=(1 - t).to(number),
            guidance=self._guidance(guidance, latents),
            pooled_projections=text["pooled_prompt_embeds"].to(number),
            encoder_hidden_states=embeds.to(number),
            txt_ids=torch.zeros(embeds.shape[1], 3, device=latents.device, dtype=number),
            img_ids=places,
            return_dict=False,
        )[0]
        return -found


class QwenImageBackbone(Backbone):
    """`QwenImagePipeline`: the hidden states of a Qwen2.5-VL, with a mask."""

    name = BackboneName.qwen_image
    pipeline_class = "QwenImagePipeline"
    negative = " "
    longest = 1024
    defaults = {True: (50, 4.0), False: (50, 4.0)}

    @property
    def cached_tokens(self) -> int:
        """Enough for most: what prompts are filled up with is masked, and generation adds nothing."""
        return 256

    def count_tokens(self, prompt: str) -> int:
        """Qwen's."""
        return len(self.pipe.tokenizer(prompt).input_ids)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], length: int | None = None) -> Text:
        """`prompt_embeds` (B,L,D) and `prompt_embeds_mask` (B,L), 1 on tokens."""
        embeds, mask = self.pipe.encode_prompt(
            list(prompts), self.device, max_sequence_length=length or self.longest
        )
        if mask is None:
            mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        missing = 0 if length is None else length - embeds.shape[1]
        embeds = nn.functional.pad(embeds, (0, 0, 0, missing))
        return {"prompt_embeds": embeds, "prompt_embeds_mask": nn.functional.pad(mask, (0, missing))}

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Latents (B,N,C), 2 x 2 of the VAE's in a token."""
        vae = self.pipe.vae
        raw = vae.encode((2 * images - 1).to(vae.dtype)[:, :, None]).latent_dist.mode()
        mean, std = self._statistics(raw)
        x = ((raw - mean) / std)[:, :, 0]
        return self.pipe._pack_latents(x, *x.shape)

    def decode(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        """Images (B,3,H,W)."""
        pipe = self.pipe
        x = pipe._unpack_latents(latents, size[1], size[0], pipe.vae_scale_factor).to(pipe.vae.dtype)
        mean, std = self._statistics(x)
        return pipe.vae.decode(x * std + mean, return_dict=False)[0][:, :, 0] / 2 + 0.5

    def velocity(
        self, dit: Any, latents: Tensor, t: Tensor, text: Text, size: tuple[int, int], guidance: float
    ) -> Tensor:
        """(B,N,C)."""
        number = dit.dtype
        shape = (1, size[1] // self.multiple, size[0] // self.multiple)
        found = dit(
            hidden_states=latents.to(number),
            timestep=(1 - t).to(number),
            guidance=self._guidance(guidance, latents),
            encoder_hidden_states=text["prompt_embeds"].to(number),
            encoder_hidden_states_mask=text["prompt_embeds_mask"],
            img_shapes=[[shape]] * len(latents),
            return_dict=False,
        )[0]
        return -found

    def gain(self, conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
        """(B,N,1): a guided velocity is as long as the conditional one."""
        guided = unconditional + guidance * (conditional - unconditional)
        return conditional.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        config = self.pipe.vae.config
        mean, std = (
            torch.tensor(v).to(x).view(1, -1, 1, 1, 1) for v in (config.latents_mean, config.latents_std)
        )
        return mean, std


BACKBONES: dict[BackboneName, type[Backbone]] = {
    backbone.name: backbone for backbone in (FluxBackbone, QwenImageBackbone)
}
