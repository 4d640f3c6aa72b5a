"""FLUX as diffusers has it: `FluxTransformer2DModel`, double-stream and single-stream blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import nn

from elastic3d.elastic.families.diffusers_blocks import JointBlockAdapter, feed_forward_site
from elastic3d.elastic.family import BlockFlops, MLPSite, ModelAdapter
from elastic3d.models.flops import double_block_flops, single_block_flops


class FluxDoubleAdapter(JointBlockAdapter):
    """`FluxTransformerBlock`; the image stream's MLP is narrowed."""

    def width(self, block: nn.Module) -> int:
        """Channels of a token (D)."""
        return cast(nn.Linear, block.get_submodule("attn.to_out.0")).out_features

    def mlp_sites(self, block: nn.Module) -> tuple[MLPSite, ...]:
        """The image stream's MLP."""
        return (feed_forward_site(block, "ff"),)

    def flops(self, block: nn.Module, lengths: Sequence[int]) -> BlockFlops:
        """FLOPs of one sample: image tokens, text tokens."""
        return BlockFlops(*double_block_flops(self.width(block), self.mlp_sites(block)[0].hidden, *lengths))


class FluxSingleAdapter(JointBlockAdapter):
    """`FluxSingleTransformerBlock`; the MLP shares its output projection with the attention."""

    def width(self, block: nn.Module) -> int:
        """Channels of a token (D)."""
        return cast(nn.Linear, block.get_submodule("proj_out")).out_features

    def mlp_sites(self, block: nn.Module) -> tuple[MLPSite, ...]:
        """`proj_mlp`, and the columns of `proj_out` behind the attention's output."""
        up = cast(nn.Linear, block.get_submodule("proj_mlp"))
        return (MLPSite("proj_mlp", "proj_out", up.out_features, fc2_offset=self.width(block)),)

    def flops(self, block: nn.Module, lengths: Sequence[int]) -> BlockFlops:
        """FLOPs of one sample."""
        return BlockFlops(
            *single_block_flops(self.width(block), self.mlp_sites(block)[0].hidden, sum(lengths))
        )


ADAPTER = ModelAdapter(
    "FluxTransformer2DModel",
    (("transformer_blocks", FluxDoubleAdapter()), ("single_transformer_blocks", FluxSingleAdapter())),
    time="timestep",
    position=3,
    noise_at_one=True,
)
