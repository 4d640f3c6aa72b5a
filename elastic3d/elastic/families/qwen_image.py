"""Qwen-Image as diffusers has it: `QwenImageTransformer2DModel`, joint blocks with per-sample text masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from elastic3d.elastic.families.diffusers_blocks import JointBlockAdapter, feed_forward_site
from elastic3d.elastic.family import BlockCall, BlockFlops, MLPSite, ModelAdapter, Rows
from elastic3d.models.flops import double_block_flops


class QwenImageBlockAdapter(JointBlockAdapter):
    """`QwenImageTransformerBlock`; the image stream's MLP is narrowed.

    Models that know clean image tokens (`zero_cond_t`) carry 2B modulation vectors, those of time 0 behind, and
    `modulate_index` (B,N) says which of the two a token takes.
    """

    def __init__(self) -> None:
        super().__init__(per_sample=("encoder_hidden_states_mask", "modulate_index"))

    def conditioning(self, call: BlockCall) -> Tensor:
        """temb (B,D) of the noisy tokens."""
        return call.arguments["temb"][: len(call.streams[0])]

    def take(self, call: BlockCall, rows: Rows) -> BlockCall:
        """The call for a sub-batch."""
        part, temb = super().take(call, rows), call.arguments["temb"]
        batch = len(call.streams[0])
        if len(temb) == batch:
            return part
        both = torch.cat([temb[:batch][rows], temb[batch:][rows]])
        return BlockCall({**part.arguments, "temb": both}, part.streams)

    def width(self, block: nn.Module) -> int:
        """Channels of a token (D)."""
        return cast(nn.Linear, block.get_submodule("attn.to_out.0")).out_features

    def mlp_sites(self, block: nn.Module) -> tuple[MLPSite, ...]:
        """The image stream's MLP."""
        return (feed_forward_site(block, "img_mlp"),)

    def flops(self, block: nn.Module, lengths: Sequence[int]) -> BlockFlops:
        """FLOPs of one sample: image tokens, text tokens."""
        D = self.width(block)
        fixed, mlp = double_block_flops(D, self.mlp_sites(block)[0].hidden, *lengths)
        if getattr(block, "zero_cond_t", False):
            fixed += 2 * D * 6 * D  # the image stream is modulated twice
        return BlockFlops(fixed, mlp)


ADAPTER = ModelAdapter(
    "QwenImageTransformer2DModel",
    (("transformer_blocks", QwenImageBlockAdapter()),),
    time="timestep",
    position=3,
    noise_at_one=True,
)
