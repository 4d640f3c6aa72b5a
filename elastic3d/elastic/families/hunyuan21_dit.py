"""The shape DiT of Hunyuan3D-2.1: blocks with long skips, cross-attention and experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from elastic3d.elastic.families import BlockAdapter, BlockCall, BlockFlops, MLPSite, ModelAdapter
from elastic3d.models.flops import skip_block_flops
from elastic3d.models.skip_dit import SkipBlock


class SkipBlockAdapter(BlockAdapter):
    """Time token and latents as one stream.

    The long skip is joined when the call is bound, before the router decides: a block that is bypassed passes on the
    joined stream, and only what follows the joint is left out. A block with experts can be left out but not narrowed:
    its tokens go different ways, so that there is no prefix that all of them share.
    """

    def bind(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BlockCall:
        """The call with its arguments by name and the long skip joined."""
        arguments = dict(super().bind(block, args, kwargs).arguments)
        if (skip := arguments.pop("skip", None)) is not None:
            arguments["x"] = cast(SkipBlock, block).join(arguments["x"], skip)
        return self._call(arguments)

    def mlp_sites(self, block: nn.Module) -> tuple[MLPSite, ...]:
        """The MLP; nothing in a block with experts."""
        if hasattr(block, "moe"):
            return ()
        return (MLPSite("mlp.fc1", "mlp.fc2", cast(SkipBlock, block).mlp.fc1.out_features),)

    def flops(self, block: nn.Module, lengths: Sequence[int]) -> BlockFlops:
        """FLOPs of one sample with the condition tokens of the model's own encoder; the joint is always executed."""
        whole = cast(SkipBlock, block)
        gate = whole.moe.gate if hasattr(block, "moe") else None
        experts = (gate.chosen, len(gate.weight)) if gate is not None else (0, 0)
        read = whole.attn2.to_k.in_features
        return BlockFlops(
            *skip_block_flops(self.width(block), read, lengths[0], whole.condition_tokens, *experts)
        )


_BLOCK = SkipBlockAdapter(("x",), "attn1.out_proj", per_sample=("condition",))
ADAPTER = ModelAdapter("SkipDiT", (("blocks", _BLOCK),), time="t", position=1)
