"""FLUX and Qwen-Image as diffusers has them: joint blocks of image and text tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from elastic3d.elastic.families import (
    BlockAdapter,
    BlockCall,
    BlockFlops,
    DoubleStreamAdapter,
    MLPSite,
    ModelAdapter,
    SingleStreamAdapter,
)
from elastic3d.elastic.rows import Rows

STREAMS = ("hidden_states", "encoder_hidden_states")  # image tokens, text tokens


class JointBlockAdapter(BlockAdapter):
    """A block that takes image and text tokens and returns (text, image)."""

    def take(self, call: BlockCall, rows: Rows) -> BlockCall:
        """The call for a sub-batch; tensors among the attention's keyword arguments are cut too."""
        part, extra = super().take(call, rows), call.arguments.get("joint_attention_kwargs")
        if not extra:
            return part
        taken = {name: _take(name, value, rows, len(call.streams[0])) for name, value in extra.items()}
        return BlockCall({**part.arguments, "joint_attention_kwargs": taken}, part.streams)


def _take(name: str, value: Any, rows: Rows, batch: int) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor) and len(value) == batch:
        return value[rows]
    raise ValueError(
        f"joint_attention_kwargs has {name}, which can't be cut to a sub-batch: run with elastic=false"
    )


class JointDoubleAdapter(JointBlockAdapter, DoubleStreamAdapter):
    """`FluxTransformerBlock`; the image stream's MLP, a `FeedForward`, is narrowed."""

    def mlp_site(self, block: nn.Module) -> MLPSite | None:
        """Its MLP; ValueError for a gated activation or a mixture of experts, which have no plain prefix."""
        name = self.mlp[0].partition(".")[0]
        part = type(block.get_submodule(name)).__name__
        if part != "FeedForward":
            raise ValueError(f"{name} is a {part}, expected a FeedForward: it can't be narrowed")
        activation = type(block.get_submodule(f"{name}.net.0")).__name__
        if activation != "GELU":
            raise ValueError(f"{name} has a {activation} activation, expected GELU: it can't be narrowed")
        return super().mlp_site(block)


class JointSingleAdapter(JointBlockAdapter, SingleStreamAdapter):
    """`FluxSingleTransformerBlock`; the MLP shares its output projection with the attention."""


class QwenImageBlockAdapter(JointDoubleAdapter):
    """`QwenImageTransformerBlock`.

    Models that know clean image tokens (`zero_cond_t`) carry 2B modulation vectors, those of time 0 behind, and
    `modulate_index` (B,N) says which of the two a token takes.
    """

    def take(self, call: BlockCall, rows: Rows) -> BlockCall:
        """The call for a sub-batch."""
        part, temb = super().take(call, rows), call.arguments["temb"]
        batch = len(call.streams[0])
        if len(temb) == batch:
            return part
        both = torch.cat([temb[:batch][rows], temb[batch:][rows]])
        return BlockCall({**part.arguments, "temb": both}, part.streams)

    def seen(self, call: BlockCall) -> tuple[Tensor, ...]:
        """Image tokens, and the mean (B,1,D) of the text's without those that fill a prompt up to the longest one."""
        image, text = call.streams
        if (mask := call.arguments.get("encoder_hidden_states_mask")) is None:
            return call.streams
        words = mask.bool()[..., None]
        total = text.float().masked_fill(~words, 0).sum(1, keepdim=True)
        return image, (total / words.sum(1, keepdim=True).clamp_min(1)).to(text.dtype)

    def flops(self, block: nn.Module, lengths: Sequence[int]) -> BlockFlops:
        """FLOPs of one sample; of such a model the image stream is modulated twice."""
        found, D = super().flops(block, lengths), self.width(block)
        again = 2 * D * 6 * D if getattr(block, "zero_cond_t", False) else 0
        return BlockFlops(found.fixed + again, found.mlp)


_RETURNS = STREAMS[::-1]
_DOUBLE = JointDoubleAdapter(
    STREAMS, "attn.to_out.0", ("ff.net.0.proj", "ff.net.2"), _RETURNS, per_sample=("temb",)
)
_SINGLE = JointSingleAdapter(STREAMS, "proj_out", ("proj_mlp", "proj_out"), _RETURNS, per_sample=("temb",))
_QWEN = QwenImageBlockAdapter(
    STREAMS,
    "attn.to_out.0",
    ("img_mlp.net.0.proj", "img_mlp.net.2"),
    _RETURNS,
    per_sample=("temb", "encoder_hidden_states_mask", "modulate_index"),
)
_FLUX_LISTS = (("transformer_blocks", _DOUBLE), ("single_transformer_blocks", _SINGLE))
FLUX = ModelAdapter("FluxTransformer2DModel", _FLUX_LISTS, "timestep", position=3, noise_at_one=True)
QWEN_IMAGE = ModelAdapter(
    "QwenImageTransformer2DModel", (("transformer_blocks", _QWEN),), "timestep", position=3, noise_at_one=True
)
