"""Forecasts: what they must continue exactly, with slow, direct computations beside them; around a plain model, which
steps run, what goes on between, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from elastic3d.benchmark.forecasting import (
    WEIGHTS,
    chebyshev_weights,
    combine,
    dmd_weights,
    forecasting,
    hermite_weights,
    line_weights,
    taylor_weights,
)
from elastic3d.elastic import attach, detach
from elastic3d.models.options import DiTConfig
from elastic3d.models.shape_dit import ShapeDiT

EVEN, UNEVEN = [0, 3, 6, 9, 12], [0, 1, 2, 5, 7, 10]


def series(of, steps, samples=2, width=5):
    """`of(step)` scaled by random vectors: n x (B,width) fp64."""
    generator = torch.Generator().manual_seed(0)
    amplitude = torch.randn(samples, width, generator=generator, dtype=torch.float64)
    offset = torch.randn(samples, width, generator=generator, dtype=torch.float64)
    return lambda s: amplitude * of(s) + offset


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("steps", [EVEN, UNEVEN, EVEN[:3], EVEN[:2]])
@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_a_linear_series_is_continued_exactly(name, steps, ahead):
    value = series(lambda s: 0.7 * s - 2, steps)
    history, at = [value(s) for s in steps], steps[-1] + ahead
    found = combine(history, WEIGHTS[name](history, steps, at))
    torch.testing.assert_close(found, value(at), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("steps", [EVEN, [4]])
def test_a_constant_stays_what_it_is(name, steps):
    history = [torch.full((2, 3), 5.0) for _ in steps]
    found = combine(history, WEIGHTS[name](history, steps, steps[-1] + 2))
    torch.testing.assert_close(found, history[0])
    assert found.dtype == torch.float32


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_sum_to_one_and_look_forwards(name):
    """A forecast of a rising series is above its last value: none goes backwards."""
    history = [torch.tensor([[float(s) ** 1.3]]) for s in EVEN]
    weights = WEIGHTS[name](history, EVEN, 14)
    assert weights.sum(0).flatten().tolist() == pytest.approx([1.0])
    assert combine(history, weights) > history[-1]


@pytest.mark.parametrize("name", WEIGHTS)
def test_samples_do_not_depend_on_each_other(name):
    generator = torch.Generator().manual_seed(1)
    history = [torch.randn(3, 4, 6, generator=generator, dtype=torch.float64) for _ in EVEN]
    whole = combine(history, WEIGHTS[name](history, EVEN, 13))
    for row in range(3):
        alone = [value[row : row + 1] for value in history]
        found = combine(alone, WEIGHTS[name](alone, EVEN, 13))
        torch.testing.assert_close(found, whole[row : row + 1], rtol=1e-6, atol=1e-6)


def test_taylor_and_hermite_equal_their_series():
    value = series(lambda s: math.sin(s / 7), EVEN)
    f = [value(s) for s in EVEN]
    first, k = (f[-1] - f[-2]) / 3, 2.0
    second = (first - (f[-2] - f[-3]) / 3) / 3
    taylor = f[-1] + first * k + second / 2 * k**2
    torch.testing.assert_close(combine(f, taylor_weights(f, EVEN, 14)), taylor)
    for sigma in (0.5, math.sqrt(0.5)):
        y = sigma * k
        hermite = f[-1] + first * sigma * 2 * y + second / 2 * sigma**2 * (4 * y * y - 2)
        torch.testing.assert_close(combine(f, hermite_weights(f, EVEN, 14, sigma=sigma)), hermite)


def test_the_line_goes_on_with_the_last_change():
    history = [torch.randn(1, 3, dtype=torch.float64) for _ in EVEN]
    line = combine(history, line_weights(history, EVEN, 14))
    torch.testing.assert_close(line, history[-1] + 2 * (history[-1] - history[-2]) / 3)
    assert torch.equal(combine(history[:1], line_weights(history[:1], EVEN[:1], 14)), history[0])


def test_chebyshev_is_the_ridge_regression_of_numpy():
    generator = np.random.default_rng(0)
    y, at = generator.normal(size=(len(UNEVEN), 4)), 12
    x = 2 * np.array([*UNEVEN, at]) / at - 1
    basis = np.polynomial.chebyshev.chebvander(x, 4)
    penalty = np.diag(np.sqrt([0, 0, 0.1, 0.1, 0.1]))  # of an augmented least-squares problem
    design = np.concatenate([basis[:-1], penalty])
    fit = np.linalg.lstsq(design, np.concatenate([y, np.zeros((5, 4))]), rcond=None)[0]
    history = [torch.from_numpy(row)[None] for row in y]
    found = combine(history, chebyshev_weights(history, UNEVEN, at))
    np.testing.assert_allclose(found[0].numpy(), basis[-1] @ fit, rtol=1e-9)


def test_dmd_continues_exponentials_and_the_others_do_not():
    """Two decaying modes, one of them turning, and a constant, between the steps that were computed too."""
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(4, 2, 8, generator=generator, dtype=torch.float64)
    steps = [3 * i for i in range(6)]

    def value(s):
        turning = parts[0] * 0.95**s * math.cos(0.2 * s) + parts[1] * 0.95**s * math.sin(0.2 * s)
        return turning + parts[2] * 0.9**s + parts[3]

    history = [value(s) for s in steps]
    for ahead in (1, 2, 3, 6):
        at = steps[-1] + ahead
        errors = {n: (combine(history, w(history, steps, at)) - value(at)).norm() for n, w in WEIGHTS.items()}
        assert errors.pop("dmd") < 1e-5 * value(at).norm() and min(errors.values()) > 1e-3, ahead


def test_dmd_takes_the_last_even_distances():
    """A first value at another distance plays no part; with less than three even ones it is the line."""
    value = series(lambda s: 0.9**s, UNEVEN)
    steps = [0, 1, 4, 7, 10]
    history = [value(s) for s in steps]
    found = combine(history, dmd_weights(history, steps, 12))
    torch.testing.assert_close(found, value(12), rtol=1e-6, atol=1e-6)
    assert torch.equal(dmd_weights(history, steps, 12)[0], torch.zeros(2, dtype=torch.float64))
    line = line_weights(history, UNEVEN[:5], 9)
    assert torch.equal(dmd_weights(history, UNEVEN[:5], 9)[:, 0], line)


def test_dmd_of_changes_that_end_is_finite():
    """Its matrix of changes is singular, or has no basis of modes."""
    v, w = torch.eye(4, dtype=torch.float64)[:2]
    for changes in ([v, w, 0 * v], [v, 0 * v, 0 * v], [0 * v, v, 0 * v], [0 * v, 0 * v, 0 * v]):
        history = list(torch.stack([0 * v, *changes]).cumsum(0)[:, None])
        weights = dmd_weights(history, EVEN[:4], 14)
        assert weights.isfinite().all() and weights.sum() == pytest.approx(1)
        torch.testing.assert_close(combine(history, weights), history[-1])


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
