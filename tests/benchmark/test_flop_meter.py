"""The meter beside products counted by hand; nothing outside is counted, and nothing stays behind."""

from __future__ import annotations

import torch
from torch import nn

from elastic3d.benchmark.flop_meter import metered


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return nn.functional.scaled_dot_product_attention(q, k, v)


@torch.no_grad()
def test_products_of_the_models_passes_are_counted():
    model, x = Attention().eval(), torch.randn(3, 1, 5, 8)  # B, heads, L, D
    with metered(model) as meter:
        model(x)
        nn.Linear(8, 8)(x)  # outside of the model
        model(x[:1])
    one = 2 * 5 * 8 * 24 + 2 * 2 * 5 * 5 * 8
    assert meter.total == 4 * one
    model(x)
    assert meter.total == 4 * one and "forward" not in model.__dict__
