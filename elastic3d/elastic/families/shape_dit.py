"""The shape DiT: double-stream and single-stream blocks in the Hunyuan3D-2 layout."""

from __future__ import annotations

from elastic3d.elastic.families import DoubleStreamAdapter, ModelAdapter, SingleStreamAdapter

# Latents and condition, each with weights of its own.
_DOUBLE = DoubleStreamAdapter(
    ("img", "txt"), "img_attn.proj", ("img_mlp.0", "img_mlp.2"), ("img", "txt"), ("vec",)
)
# Both as one sequence: the MLP stands behind QKV in linear1, and behind the attention's output in linear2.
_SINGLE = SingleStreamAdapter(
    ("x",), "linear2", ("linear1", "linear2"), per_sample=("vec",), mlp_width="mlp_width"
)
ADAPTER = ModelAdapter(
    "ShapeDiT", (("double_blocks", _DOUBLE), ("single_blocks", _SINGLE)), time="t", position=1
)
