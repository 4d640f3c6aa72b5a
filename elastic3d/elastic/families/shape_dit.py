"""The shape DiT: double-stream and single-stream blocks in the Hunyuan3D-2 layout."""

from __future__ import annotations

from typing import cast

from torch import nn

from elastic3d.elastic.families import (
    DoubleStreamAdapter,
    MLPSite,
    ModelAdapter,
    SingleStreamAdapter,
)
from elastic3d.models.shape_dit import DoubleStreamBlock, SingleStreamBlock


class DoubleAdapter(DoubleStreamAdapter):
    """Latents and condition with weights of their own; the latents' MLP is narrowed (as in E-DiT's code)."""

    def mlp_sites(self, block: nn.Module) -> tuple[MLPSite, ...]:
        """The latents' MLP."""
        up = cast(nn.Linear, cast(DoubleStreamBlock, block).img_mlp[0])
        return (MLPSite("img_mlp.0", "img_mlp.2", up.out_features),)


class SingleAdapter(SingleStreamAdapter):
    """Condition and latents as one sequence; the MLP is fused with the attention's projections."""

    def mlp_sites(self, block: nn.Module) -> tuple[MLPSite, ...]:
        """The MLP behind QKV in linear1, and behind the attention's output in linear2."""
        D, hidden = self.width(block), cast(SingleStreamBlock, block).mlp_width
        return (MLPSite("linear1", "linear2", hidden, 3 * D, D, attribute="mlp_width"),)


_DOUBLE = DoubleAdapter(("img", "txt"), "img_attn.proj", ("img", "txt"), ("vec",))
_SINGLE = SingleAdapter(("x",), "linear2", per_sample=("vec",))
ADAPTER = ModelAdapter(
    "ShapeDiT", (("double_blocks", _DOUBLE), ("single_blocks", _SINGLE)), time="t", position=1
)
