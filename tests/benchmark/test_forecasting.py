"""Forecasts around a plain model: which steps run, what goes on between, and what is refused."""

from __future__ import annotations

import pytest
import torch

from elastic3d.benchmark.forecasting import forecasting
from elastic3d.benchmark.forecasts import WEIGHTS
from elastic3d.elastic import attach, detach
from elastic3d.models.options import DiTConfig
from elastic3d.models.shape_dit import ShapeDiT


@pytest.fixture(scope="module")
def dit() -> ShapeDiT:
    torch.manual_seed(0)
    sizes = dict(in_channels=5, condition_channels=8, width=32, heads=2, double_blocks=2, single_blocks=2)
    model = ShapeDiT(DiTConfig(**sizes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@torch.no_grad()
def velocities(dit, steps=7, samples=2):
    """Outputs of two branches, one after the other, at times of a grid."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 6, 5, generator=generator)
    conditions = torch.randn(2, samples, 4, 8, generator=generator)
    times = [step / steps for step in range(steps)]
    return torch.stack(
        [torch.stack([dit(x, torch.full((samples,), t), c) for c in conditions]) for t in times]
    )


@pytest.mark.parametrize("by", WEIGHTS)
def test_steps_that_run_are_the_models_own_in_both_branches(dit, by):
    dense = velocities(dit)
    with forecasting(dit, by, interval=3, warmup=2):  # 0, 1, 4
        found = velocities(dit)
    same = [bool(torch.equal(a, b)) for a, b in zip(found, dense, strict=True)]
    assert same == [True, True, False, False, True, False, False]
    assert torch.equal(velocities(dit), dense)


def test_a_forecast_is_what_the_blocks_added_before(dit):
    """With one step known, each list of blocks adds what it added there, to the stream as it is now."""
    added = {}

    def note(name):
        def hook(module, args, out):
            added.setdefault(name, []).append(out if torch.is_tensor(out) else out[0])

        return hook

    lists = (dit.double_blocks, dit.single_blocks)
    hooks = [each[-1].register_forward_hook(note(i)) for i, each in enumerate(lists)]
    inputs = []
    hooks.append(
        dit.double_blocks[0].register_forward_pre_hook(lambda m, a, k: inputs.append(a[0]), with_kwargs=True)
    )
    with forecasting(dit, "linear", interval=2):
        velocities(dit, steps=2)
    for hook in hooks:
        hook.remove()
    for branch in range(2):
        before = added[0][branch] - inputs[branch]
        torch.testing.assert_close(added[0][2 + branch] - inputs[2 + branch], before, rtol=1e-4, atol=1e-5)


def test_samples_and_branches_do_not_mix(dit):
    with forecasting(dit, "dmd", interval=2, warmup=3):
        both = velocities(dit)
    real = dit.forward
    alone = []
    for row in range(2):
        dit.forward = lambda x, t, c, row=row: real(x[row : row + 1], t[:1], c[row : row + 1])
        with forecasting(dit, "dmd", interval=2, warmup=3):
            alone.append(velocities(dit))
    del dit.forward
    torch.testing.assert_close(torch.cat(alone, dim=2), both, rtol=1e-3, atol=1e-3)


def test_what_is_refused(dit):
    for options, message in (
        (("spline", 2), "by is 'spline', expected one of linear"),
        (("linear", 1), "interval is 1 and warmup 1"),
        (("linear", 2, 0), "warmup 0"),
    ):
        with pytest.raises(ValueError, match=message), forecasting(dit, *options):
            pass
    attach(dit)
    with pytest.raises(ValueError, match="has routers"), forecasting(dit, "linear", 2):
        pass
    detach(dit)
    assert "forward" not in dit.__dict__
