"""The formula equals what PyTorch counts while the blocks run."""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from elastic3d.elastic import adapter_for
from elastic3d.elastic.families import dense_flops
from elastic3d.models.options import DiTConfig, SkipDiTConfig
from elastic3d.models.shape_dit import ShapeDiT
from elastic3d.models.skip_dit import SkipDiT


def test_against_the_flop_counter_of_pytorch() -> None:
    config = DiTConfig(
        in_channels=5,
        condition_channels=7,
        width=32,
        heads=2,
        double_blocks=2,
        single_blocks=3,
        mlp_ratio=3.0,
    )
    model = ShapeDiT(config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it misses fused kernels
        model(torch.rand(1, 11, 5), torch.rand(1), torch.rand(1, 6, 7))
    counts = counter.get_flop_counts()
    blocks = [name for name in counts if name.split(".")[-2:-1] in (["double_blocks"], ["single_blocks"])]
    assert len(blocks) == 5
    assert dense_flops(model, adapter_for(model), [11, 6]) == sum(
        sum(counts[name].values()) for name in blocks
    )


def test_skip_dit_against_the_flop_counter_of_pytorch() -> None:
    config = SkipDiTConfig(
        in_channels=5, condition_channels=7, width=32, heads=2, blocks=3, expert_blocks=1, experts=2,
        experts_per_token=2, condition_tokens=6,
    )  # fmt: skip
    model = SkipDiT(config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.rand(1, 11, 5), torch.rand(1), torch.rand(1, 6, 7))
    counts = {name: sum(found.values()) for name, found in counter.get_flop_counts().items()}
    found = sum(count for name, count in counts.items() if name.split(".")[-2:-1] == ["blocks"])
    extra = sum(count for name, count in counts.items() if name.endswith(".skip_linear"))
    assert extra > 0 and dense_flops(model, adapter_for(model), [12]) == found - extra
