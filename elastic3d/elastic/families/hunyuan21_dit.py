"""The shape DiT of Hunyuan3D-2.1: blocks with long skips, cross-attention and experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from elastic3d.elastic.families import (
    BlockAdapter,
    BlockCall,
    BlockFlops,
    MLPSite,
    ModelAdapter,
    attention_flops,
)
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

    def mlp_site(self, block: nn.Module) -> MLPSite | None:
        """The MLP; None in a block with experts."""
        return None if hasattr(block, "moe") else super().mlp_site(block)

    def flops(self, block: nn.Module, lengths: Sequence[int]) -> BlockFlops:
        """FLOPs of one sample: latents and the time token, with the condition tokens of the model's own encoder.

        The joint of a long skip is always executed and left out. Experts count as fixed: a token passes the shared
        one and those that it chooses.
        """
        whole, D, (tokens,) = cast(SkipBlock, block), self.width(block), lengths
        read, M = whole.attn2.to_k.in_features, whole.condition_tokens
        cross = 2 * tokens * 2 * D**2 + 2 * M * 2 * read * D + 4 * tokens * M * D
        fixed, mlp = attention_flops(D, tokens) + cross, tokens * 4 * D * 4 * D
        if not hasattr(block, "moe"):
            return BlockFlops(fixed, mlp)
        gate = whole.moe.gate
        return BlockFlops(fixed + 2 * tokens * D * len(gate.weight) + (1 + gate.chosen) * mlp, 0)


_BLOCK = SkipBlockAdapter(("x",), "attn1.out_proj", ("mlp.fc1", "mlp.fc2"), per_sample=("condition",))
ADAPTER = ModelAdapter("SkipDiT", (("blocks", _BLOCK),), time="t", position=1)
