"""Random routes: what is drawn, that skipped blocks are skipped, and that narrow MLPs learn as masked ones would."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from elastic3d.diffusion.flow import sample_timesteps, timesteps_at
from elastic3d.elastic import find_session
from elastic3d.models.options import DiTConfig
from elastic3d.models.shape_dit import ShapeDiT
from elastic3d.training.dit import FlowObjective
from elastic3d.training.routes import WIDTHS, RandomRoutes, RandomRoutesConfig, draw, draw_route

BLOCKS = 4


def tiny() -> ShapeDiT:
    torch.manual_seed(0)
    dit = ShapeDiT(
        DiTConfig(in_channels=5, condition_channels=4, width=16, heads=2, double_blocks=2, single_blocks=2)
    )
    for parameter in dit.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return dit


def batch(rows: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "latents": torch.randn(rows, 3, 5, generator=generator),
        "noise": torch.randn(rows, 3, 5, generator=generator),
        "t": torch.rand(rows, generator=generator),
        "condition": torch.randn(rows, 4, 4, generator=generator),
    }


def test_the_sandwich_of_routes():
    rng = np.random.default_rng(0)
    assert (draw_route(0, 0.5, 16, 0.4, rng) == WIDTHS).all()
    shares = {}
    for kind in (1, 2):
        routes = np.stack([draw_route(kind, 0.5, 16, 0.4, rng) for _ in range(400)])
        cost = np.where(routes > 0, 0.5 + 0.5 * routes / WIDTHS, 0)
        shares[kind] = cost.mean(1)
    assert abs(shares[1].mean() - 0.4) < 0.05 and shares[2].mean() == pytest.approx(0.7, abs=0.05)
    early, late = (
        np.stack([draw_route(1, time, 16, 0.4, rng) for _ in range(800)]) == 0 for time in (0.05, 0.95)
    )
    assert early[:, 10:15].mean() > early[:, 2:6].mean() + 0.05  # late blocks go first at early times
    assert early[:, -1].mean() > 2 * late[:, -1].mean()
    assert late[:, 0].mean() < 0.5 * late[:, 5].mean()


def test_draws_follow_from_position_and_seed_and_keep_the_times():
    config = RandomRoutesConfig(smallest=0.4, group=4)
    drawn = [draw(config, 8, 16, i, 3, np.random.default_rng([3, i, 2])) for i in range(4000)]
    again = draw(config, 8, 16, 17, 3, np.random.default_rng([3, 17, 2]))
    assert again[0] == drawn[17][0] and (again[1] == drawn[17][1]).all()
    for first in range(0, 400, 4):
        group = drawn[first : first + 4]
        assert len({tuple(route) for _, route in group}) == 1
        assert len({int(quantile * 4) for quantile, _ in group}) == 1
    full = [(route == WIDTHS).all() for _, route in drawn[::4]]
    assert 0.25 <= np.mean(full) < 0.3 and all(full[::4])
    times = timesteps_at(torch.tensor([quantile for quantile, _ in drawn])).sort().values
    other = sample_timesteps(4000, torch.Generator().manual_seed(0)).sort().values
    assert (times - other).abs().max() < 0.05  # the same distribution


@pytest.mark.parametrize(("batch", "groups"), [(4, 4), (6, 6), (16, 4), (32, 4), (64, 8), (72, 9)])
def test_every_batch_has_the_sandwich(batch, groups):
    """The full route first, then the smallest and two between, however large the batch and the group are."""
    config = RandomRoutesConfig(smallest=0.2)  # in groups of 8 where the batch allows it
    for first in range(0, 20 * batch, batch):
        drawn = [draw(config, 64, batch, first + i, 3, np.random.default_rng(i)) for i in range(batch)]
        shares = [np.where(route > 0, 0.5 + 0.5 * route / WIDTHS, 0).mean() for _, route in drawn]
        assert shares[0] == 1 and min(shares) < 0.3
        assert len({tuple(route) for _, route in drawn if (route < WIDTHS).any()}) == groups * 3 // 4


def test_the_full_route_is_the_model_and_skipped_blocks_do_not_run():
    dit, given = tiny(), batch(3)
    plain = FlowObjective(dit, 3, 4.0)(given)[0]
    objective = FlowObjective(dit, 3, 4.0, RandomRoutes(dit))
    full = torch.full((3, BLOCKS), WIDTHS)
    torch.testing.assert_close(objective({**given, "route": full})[0], plain, rtol=0, atol=0)
    calls = []
    for index, block in enumerate([*dit.double_blocks, *dit.single_blocks]):
        linear = next(part for part in block.modules() if isinstance(part, nn.Linear))
        linear.register_forward_hook(lambda *_, index=index: calls.append(index))
    route = full.clone()
    route[:, 1] = 0
    route[1:, 2] = 0
    loss, values = objective({**given, "route": route})
    assert 1 not in calls and 2 in calls and values["executed"] == pytest.approx(7 / 12)
    loss.backward()
    assert all(p.grad is None for p in dit.double_blocks[1].parameters())
    assert all(p.grad is not None for p in dit.single_blocks[0].parameters())


def test_a_row_does_not_depend_on_the_others():
    dit, given = tiny(), batch(4)
    objective = FlowObjective(dit, 3, 4.0, RandomRoutes(dit))
    route = torch.tensor([[4, 4, 4, 4], [4, 0, 2, 4], [1, 4, 0, 3], [4, 2, 2, 0]])
    together = objective.squared_error({**given, "route": route})
    for row in range(4):
        alone = {name: tensor[row : row + 1] for name, tensor in given.items()}
        found = objective.squared_error({**alone, "route": route[row : row + 1]})
        torch.testing.assert_close(found, together[row : row + 1], rtol=1e-5, atol=1e-6)


def test_narrow_mlps_learn_as_with_the_other_units_at_zero():
    """Slices carry the gradient of a model whose units beyond the prefix are masked."""
    dit, given = tiny(), batch(2)
    objective = FlowObjective(dit, 3, 4.0, RandomRoutes(dit))
    objective({**given, "route": torch.full((2, BLOCKS), 2)})[0].backward()
    found = {name: p.grad.clone() for name, p in dit.named_parameters() if p.grad is not None}
    masked = tiny()
    hidden = 64
    mask = (torch.arange(hidden) < hidden // 2).float()
    for block in masked.double_blocks:
        block.img_mlp[2].register_forward_pre_hook(lambda _, args: (args[0] * mask,))
    fused = torch.cat([torch.ones(16), mask])
    for block in masked.single_blocks:
        block.linear2.register_forward_pre_hook(lambda _, args: (args[0] * fused,))
    FlowObjective(masked, 3, 4.0)(given)[0].backward()
    for name, parameter in masked.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
    biases = [name for name in found if name.endswith("linear1.bias")]
    assert biases and all(found[name].any() for name in biases)


def test_validation_sees_the_dense_model_and_the_state_dict_is_the_models():
    dit = tiny()
    keys = list(dit.state_dict())
    objective = FlowObjective(dit, 3, 4.0, RandomRoutes(dit))
    assert list(dit.state_dict()) == keys and find_session(dit) is not None
    assert [name for name, _ in objective.named_parameters()] == [
        f"dit.{k}" for k, _ in dit.named_parameters()
    ]
    given = batch(2) | {"route": torch.zeros(2, BLOCKS, dtype=torch.long)}
    elastic = objective.squared_error(given)
    objective.eval()
    torch.testing.assert_close(
        objective.squared_error(given), FlowObjective(tiny(), 3, 4.0).squared_error(given), rtol=0, atol=0
    )
    assert not torch.equal(objective.squared_error(given), elastic)
