import pytest
import torch

from elastic3d.diffusion.options import IDLE, PipelineConfig, SamplingGrid, Solver
from elastic3d.diffusion.sampler import moves, sample, sampling_times, timestep_grid
from elastic3d.errors import UserError


def generators(*seeds):
    return [torch.Generator().manual_seed(s) for s in seeds]


class PointFlow:
    """The exact marginal velocity when the data is one point, given by the condition's mean: v = (c - x) / (1 - t)."""

    def __init__(self):
        self.times, self.batches = [], []

    def __call__(self, latents, t, condition, guidance=None):
        self.times.append(t[0].item())
        self.batches.append(len(latents))
        target = condition.mean(dim=1, keepdim=True)
        return (target - latents) / (1 - t.view(-1, 1, 1))


def test_exact_velocity_reaches_the_data_in_any_number_of_steps():
    condition = torch.randn(2, 5, 3)
    for steps in (1, 4, 9):
        out = sample(PointFlow(), condition, (7, 3), timestep_grid(steps), 1.0, generators(0, 1))
        torch.testing.assert_close(out, condition.mean(1, keepdim=True).expand(2, 7, 3), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver, order", [(Solver.euler, 1), (Solver.ab2, 2)])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_error_falls_with_the_order_of_the_solver(solver, order, shift):
    """x' = -3 x + 5 t, whose solution from x(0) is known; twice the steps, 2 ** order less error."""
    calls = []

    def flow(latents, t, condition, guidance=None):
        calls.append(t[0].item())
        return -3 * latents + 5 * t.view(-1, 1, 1)

    def error(steps):
        start = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
        exact = (start + 5 / 9) * torch.exp(torch.tensor(-3.0)) + 5 / 3 - 5 / 9
        times, condition = timestep_grid(steps, shift), torch.zeros(1, 2, 3)
        found = sample(flow, condition, (7, 3), times, 1.0, generators(0), solver=solver)
        return (found - exact).norm().item()

    assert error(40) / error(80) == pytest.approx(2**order, rel=0.15)
    assert len(calls) == 120


def test_guidance_extrapolates_from_the_unconditional_branch():
    """v = v_u + g (v_c - v_u) with v_u towards 0 and v_c towards c moves towards g c."""
    condition = torch.randn(1, 5, 3)
    flow = PointFlow()
    out = sample(flow, condition, (7, 3), timestep_grid(6), 3.0, generators(0))
    torch.testing.assert_close(out, 3 * condition.mean(1, keepdim=True).expand(1, 7, 3), rtol=1e-3, atol=1e-3)
    assert flow.batches == [2] * 6 and flow.times[0] == 0


@pytest.mark.parametrize("guidance", [1.0, 0.0])
def test_guidance_of_one_or_less_runs_the_conditional_branch(guidance):
    flow, condition = PointFlow(), torch.randn(2, 5, 3)
    out = sample(flow, condition, (7, 3), timestep_grid(4), guidance, generators(0, 1))
    torch.testing.assert_close(out, condition.mean(1, keepdim=True).expand(2, 7, 3), rtol=1e-4, atol=1e-4)
    assert flow.batches == [2] * 4


def test_seed_decides_and_batch_mates_do_not():
    condition = torch.randn(2, 5, 3)

    def curved(latents, t, condition, guidance=None):
        return torch.sin(latents) + condition.mean(dim=1, keepdim=True) * t.view(-1, 1, 1)

    both = sample(curved, condition, (7, 3), timestep_grid(5), 2.0, generators(0, 1))
    again = sample(curved, condition, (7, 3), timestep_grid(5), 2.0, generators(0, 1))
    alone = sample(curved, condition[1:], (7, 3), timestep_grid(5), 2.0, generators(1))
    assert torch.equal(both, again)
    torch.testing.assert_close(both[1:], alone, rtol=1e-5, atol=1e-6)


def test_progress_is_reported_and_generators_are_counted():
    seen = []
    sample(
        PointFlow(),
        torch.randn(1, 5, 3),
        (7, 3),
        timestep_grid(3),
        1.0,
        generators(0),
        on_step=lambda i, n: seen.append((i, n)),
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]
    with pytest.raises(ValueError, match="1 generators for a batch of 2"):
        sample(PointFlow(), torch.randn(2, 5, 3), (7, 3), timestep_grid(3), 1.0, generators(0))


def test_a_consistency_model_has_no_more_steps_than_segments():
    config = PipelineConfig(grid=SamplingGrid.consistency, segments=100)
    assert len(sampling_times(config, 100)) == 101
    with pytest.raises(UserError, match="steps is 101, expected 1 to 100 for this consistency model"):
        sampling_times(config, 101)


@pytest.mark.parametrize("grid", SamplingGrid)
def test_a_step_of_some_grids_moves_nothing(grid):
    config = PipelineConfig(grid=grid, shift=2.0)
    assert all(moves(config, steps) == steps - (grid in IDLE) for steps in range(2, 60))
    assert moves(config, 1) == 1


def test_grid_ends_at_both_ends_and_shift_spends_steps_near_noise():
    plain, shifted = timestep_grid(10), timestep_grid(10, shift=3.0)
    for grid in (plain, shifted):
        assert grid[0] == 0 and grid[-1] == 1 and (grid.diff() > 0).all() and len(grid) == 11
    assert (shifted[1:-1] < plain[1:-1]).all()
    with pytest.raises(ValueError, match="steps is 0"):
        timestep_grid(0)
