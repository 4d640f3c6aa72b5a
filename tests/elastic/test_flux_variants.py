"""FLUX pipelines that take an image besides the prompt: each runs with routers, and a second call equals the first."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from PIL import Image

from elastic3d.elastic import attach

IMAGE, MASK = Image.new("RGB", (48, 48), "red"), Image.new("L", (48, 48), 255)
VARIANTS: dict[str, tuple[int, dict[str, Any]]] = {  # channels of a token, and what the call takes besides
    "FluxImg2ImgPipeline": (4, {"image": IMAGE, "strength": 0.8}),
    "FluxInpaintPipeline": (4, {"image": IMAGE, "mask_image": MASK, "strength": 0.8}),
    "FluxFillPipeline": (24, {"image": IMAGE, "mask_image": MASK}),
    "FluxControlPipeline": (8, {"control_image": IMAGE}),
    "FluxControlNetPipeline": (4, {"control_image": IMAGE}),
}
SIZES = dict(
    num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=6,
    pooled_projection_dim=6, axes_dims_rope=(4, 6, 6),
)  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_runs_twice_alike(name: str) -> None:
    channels, options = VARIANTS[name]
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=2, latent_channels=1, shift_factor=0.0,
    )  # fmt: skip
    transformer = diffusers.FluxTransformer2DModel(in_channels=channels, out_channels=4, **SIZES).eval()
    parts = [diffusers.FlowMatchEulerDiscreteScheduler(), vae, None, None, None, None, transformer]
    if name == "FluxControlNetPipeline":
        parts.append(diffusers.FluxControlNetModel(in_channels=4, **SIZES).eval())
    pipe = getattr(diffusers, name)(*parts)
    pipe.set_progress_bar_config(disable=True)
    session = attach(pipe)
    session.settings.budget = 0.5

    def run() -> torch.Tensor:
        embeds = torch.Generator().manual_seed(1)
        return pipe(
            prompt_embeds=torch.randn(1, 5, 6, generator=embeds),
            pooled_prompt_embeds=torch.randn(1, 6, generator=embeds),
            height=48, width=48, num_inference_steps=4, generator=torch.Generator().manual_seed(0),
            output_type="latent", return_dict=False, **options,
        )[0]  # fmt: skip

    first = run()
    assert session.trace is not None and (session.trace.actions >= 0).any()
    assert torch.equal(run(), first)
