"""Errors of fixed routes, from which static masks are made."""

import pytest
import torch

from elastic3d.adapters import attach
from elastic3d.benchmark.execute import error_of_routes, following
from elastic3d.config.routing import RouterConfig
from elastic3d.models.options import DiTConfig
from elastic3d.models.shape_dit import ShapeDiT


@pytest.mark.parametrize("longest", [0, 3])
def test_a_closed_block_is_an_error_also_for_routers_that_reuse(longest):
    torch.manual_seed(0)
    sizes = dict(in_channels=5, condition_channels=8, width=32, heads=2, double_blocks=1, single_blocks=2)
    dit = ShapeDiT(DiTConfig(**sizes))
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    session = attach(dit, RouterConfig(longest=longest, widths=1))
    inputs = torch.randn(2, 6, 5), torch.rand(2), torch.randn(2, 4, 8)

    @torch.no_grad()
    def velocity(settings, routes):
        session.settings = settings
        with following(session, routes):
            session.begin(2, 1)
            session.step(0, 0.1, (0,))
            return dit(*inputs)

    error = error_of_routes(velocity, 1)
    assert error(torch.tensor([1, 1, 1])) == 0
    assert error(torch.tensor([1, 0, 1])) > 1e-6
