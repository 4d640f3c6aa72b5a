"""What the block families of diffusers have in common."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from elastic3d.elastic.family import BlockAdapter, BlockCall, MLPSite, Rows

STREAMS = ("hidden_states", "encoder_hidden_states")  # image tokens, text tokens


class JointBlockAdapter(BlockAdapter):
    """A block that takes image and text tokens and returns (text, image)."""

    def __init__(self, per_sample: tuple[str, ...] = ()) -> None:
        super().__init__(STREAMS, "temb", returns=STREAMS[::-1], per_sample=per_sample)

    def take(self, call: BlockCall, rows: Rows) -> BlockCall:
        """The call for a sub-batch; tensors among the attention's keyword arguments are cut too."""
        part = super().take(call, rows)
        extra = call.arguments.get("joint_attention_kwargs")
        if extra:
            batch = len(call.streams[0])
            taken = {name: _take(name, value, rows, batch) for name, value in extra.items()}
            return BlockCall({**part.arguments, "joint_attention_kwargs": taken}, part.streams)
        return part


def feed_forward_site(block: nn.Module, name: str) -> MLPSite:
    """The site of a diffusers `FeedForward`; ValueError for a gated activation or a mixture of experts, which have no
    plain prefix."""
    part = block.get_submodule(name)
    if type(part).__name__ != "FeedForward":
        raise ValueError(f"{name} is a {type(part).__name__}, expected a FeedForward: it can't be narrowed")
    up = block.get_submodule(f"{name}.net.0")
    if type(up).__name__ != "GELU":
        raise ValueError(f"{name} has a {type(up).__name__} activation, expected GELU: it can't be narrowed")
    proj = cast(nn.Linear, up.get_submodule("proj"))  # or a LoRA's layer around one
    return MLPSite(f"{name}.net.0.proj", f"{name}.net.2", proj.out_features)


def _take(name: str, value: Any, rows: Rows, batch: int) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor) and len(value) == batch:
        return value[rows]
    raise ValueError(
        f"joint_attention_kwargs has {name}, which can't be cut to a sub-batch: run with elastic=false"
    )
