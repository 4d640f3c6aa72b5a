import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from elastic3d.training.optim import Average, MasterOptimizer, Muon, learning_rate, orthogonal
from elastic3d.training.options import LoopConfig, OptimizerName, Schedule


def parameters(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    values = {"weight": torch.randn(5, 3, generator=generator), "bias": torch.randn(5, generator=generator)}
    return {name: nn.Parameter(value.to(dtype)) for name, value in values.items()}


def test_fp32_equals_adamw_with_decay_on_matrices_only():
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    config = LoopConfig(weight_decay=0.1)
    optimizer = MasterOptimizer(ours, config)
    reference = torch.optim.AdamW(
        [dict(params=[theirs["weight"]], weight_decay=0.1), dict(params=[theirs["bias"]], weight_decay=0.0)],
        lr=1e-2, betas=(0.9, 0.99),
    )  # fmt: skip
    for step in range(5):
        for group in (ours, theirs):
            for parameter in group.values():
                parameter.grad = torch.sin(parameter.detach() + step)
        optimizer.collect()
        optimizer.step(1e-2, clip=0.0)
        reference.step()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)


def test_masters_keep_what_bf16_would_round_away():
    parameter = {"weight": nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))}
    optimizer = MasterOptimizer(parameter, LoopConfig(weight_decay=0.0))
    for _ in range(100):
        parameter["weight"].grad = torch.ones(4, 4, dtype=torch.bfloat16)
        optimizer.collect()
        optimizer.step(1e-4, clip=0.0)  # one such step is below half a unit in the last place of bf16 at 1
    torch.testing.assert_close(optimizer.masters[0].detach(), torch.full((4, 4), 0.99), rtol=1e-3, atol=0)
    assert torch.equal(parameter["weight"].detach(), torch.full((4, 4), 0.99).bfloat16())


def test_collect_adds_micro_batches_in_fp32():
    parameter = {"weight": nn.Parameter(torch.zeros(2, 2, dtype=torch.bfloat16))}
    optimizer = MasterOptimizer(parameter, LoopConfig())
    for value in (256.0, 1.0):  # their sum needs nine bits
        parameter["weight"].grad = torch.full((2, 2), value, dtype=torch.bfloat16)
        optimizer.collect()
    assert parameter["weight"].grad is None
    assert torch.equal(optimizer.masters[0].grad, torch.full((2, 2), 257.0))


def test_clips_and_returns_the_norm_before():
    ours = parameters(torch.float32)
    optimizer = MasterOptimizer(ours, LoopConfig())
    for parameter in ours.values():
        parameter.grad = torch.ones_like(parameter)
    assert optimizer.step(0.0, clip=0.5).item() == pytest.approx(math.sqrt(20))


def test_a_gradient_that_is_not_finite_changes_nothing():
    ours = parameters(torch.float32)
    before = {name: value.detach().clone() for name, value in ours.items()}
    optimizer = MasterOptimizer(ours, LoopConfig())
    ours["bias"].grad = torch.full((5,), math.nan)
    assert not optimizer.step(1.0, clip=1.0).isfinite()
    assert ours["bias"].grad is None
    assert all(torch.equal(before[name], ours[name]) for name in ours)


def test_rate_factor_and_nothing_to_train():
    ours = parameters(torch.float32)
    optimizer = MasterOptimizer(
        ours, LoopConfig(weight_decay=0.0), lambda name: 0.0 if name == "bias" else 1.0
    )
    before = ours["bias"].detach().clone()
    for parameter in ours.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(1e-2, clip=1.0)
    assert torch.equal(ours["bias"], before)
    with pytest.raises(ValueError, match="no parameter to train"):
        MasterOptimizer({}, LoopConfig())


def test_state_round_trip_and_strangers():
    ours = parameters(torch.float32)
    optimizer = MasterOptimizer(ours, LoopConfig())
    for parameter in ours.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(1e-2, clip=1.0)
    state = optimizer.state_tensors()
    assert set(state) == {f"{n}/{k}" for n in ours for k in ("step", "exp_avg", "exp_avg_sq")}
    other = MasterOptimizer(parameters(torch.float32), LoopConfig())
    other.load_state_tensors(state)
    assert all(torch.equal(value, other.state_tensors()[key]) for key, value in state.items())
    with pytest.raises(ValueError, match="unknown parameters, first stranger"):
        other.load_state_tensors({"stranger/step": torch.zeros(())})
    with pytest.raises(ValueError, match="lacks bias/exp_avg_sq"):
        other.load_state_tensors({key: state[key] for key in ("bias/step", "bias/exp_avg")})
    for key, value, message in (
        ("bias/exp_avg", torch.zeros(1), r"bias/exp_avg has the shape \(1,\), expected"),
        ("bias/exp_avg_sq", torch.zeros_like(state["bias/exp_avg_sq"]).long(), "no finite numbers"),
        ("bias/exp_avg", torch.full_like(state["bias/exp_avg"], torch.nan), "no finite numbers"),
        ("bias/step", torch.zeros(3), r"bias/step has the shape \(3,\), expected \(\)"),
    ):
        with pytest.raises(ValueError, match=message):  # the fused step would read and write beyond it
            other.load_state_tensors({**state, key: value})


def test_a_resumed_state_lies_where_the_fused_kernel_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that need not be there: fake tensors have a device and no values, so that none can be checked."""
    ours = parameters(torch.float32)
    optimizer = MasterOptimizer(ours, LoopConfig())
    for parameter in ours.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(1e-2)
    state = optimizer.state_tensors()
    monkeypatch.setattr("elastic3d.training.optim.check_tensor", lambda name, tensor, shape: None)
    with FakeTensorMode(allow_non_fake_inputs=True):
        there = {name: nn.Parameter(torch.ones(p.shape, device="cuda")) for name, p in ours.items()}
        resumed = MasterOptimizer(there, LoopConfig())
        resumed.load_state_tensors(state)
        found = resumed.state_tensors()
    assert found.keys() == state.keys() and {value.device.type for value in found.values()} == {"cuda"}


def test_muon_steps_the_matrices_of_blocks_orthogonally_and_adamw_the_rest():
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"embed": nn.Linear(8, 16), "blocks": nn.ModuleList([nn.Sequential(nn.Linear(16, 32))])}
    )
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    config = LoopConfig(optimizer=OptimizerName.muon, weight_decay=0.0)
    optimizer = MasterOptimizer(dict(model.named_parameters()), config)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step(1e-2, clip=0.0)
    moved = {name: value.detach() - before[name] for name, value in model.named_parameters()}
    torch.testing.assert_close(moved["embed.weight"].abs(), torch.full((16, 8), 1e-2), rtol=1e-3, atol=0)
    assert moved["blocks.0.0.bias"].abs().sub(1e-2).abs().max() < 1e-5
    scaled = torch.linalg.svdvals(moved["blocks.0.0.weight"]) / (1e-2 * 0.2 * 32**0.5)
    assert scaled.min() > 0.5 and scaled.max() < 1.5

    state = optimizer.state_tensors()
    assert {key for key in state if "blocks.0.0.weight" in key} == {"blocks.0.0.weight/momentum_buffer"}
    other = MasterOptimizer(dict(model.named_parameters()), config)
    other.load_state_tensors(state)
    assert all(torch.equal(value, other.state_tensors()[key]) for key, value in state.items())


def test_muon_in_fp32_steps_as_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch rounds to bf16 between its Newton-Schulz steps; the fp32 of processors without it differs by that alone."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(*shape, generator=generator) for shape in ((24, 64), (64, 24), (16, 16))]
    found: dict[bool, list[torch.Tensor]] = {}
    for fast in (True, False):
        monkeypatch.setattr("elastic3d.training.optim.fast_bfloat16", lambda device, fast=fast: fast)
        matrices = [nn.Parameter(value.clone()) for value in start]
        muon = Muon([{"params": matrices, "lr": 0.1, "weight_decay": 0.3}])
        for step in range(3):
            for matrix in matrices:
                matrix.grad = torch.cos(3 * matrix.detach() + step)
            muon.step()
        matrices[0].grad = None  # such a matrix is left alone
        found[fast] = [
            *(matrix.detach() for matrix in matrices),
            *(muon.state[m]["momentum_buffer"] for m in matrices),
        ]
    for ours, theirs, first in zip(found[False], found[True], [*start, *start], strict=True):
        assert not torch.equal(ours, theirs)
        assert (ours - theirs).norm() < 0.02 * (theirs - first).norm()


def test_newton_schulz_converges_to_the_polar_factor() -> None:
    matrix = torch.randn(40, 24, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonal(matrix, (15 / 8, -10 / 8, 3 / 8), 30, 1e-7)  # these coefficients converge
    torch.testing.assert_close(found, u @ vh, rtol=0, atol=1e-4)


def test_average_is_the_weighted_sum_of_its_past():
    masters = [torch.zeros(3)]
    average = Average(masters, decay=0.9)
    expected = 0.0
    for step in range(200):
        masters[0].fill_(step)
        average.update(masters, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    torch.testing.assert_close(average.values[0], torch.full((3,), expected))


def test_average_is_applied_inside_the_block_only():
    parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    average = Average([torch.full((3,), 2.0)], decay=0.9)
    with pytest.raises(KeyError), average.applied([parameter]):
        assert parameter.tolist() == [2.0] * 3
        raise KeyError
    assert parameter.tolist() == [1.0] * 3


@pytest.mark.parametrize("schedule", list(Schedule))
def test_schedule(schedule):
    config = LoopConfig(steps=100, warmup=10, decay_steps=20, learning_rate=2.0, schedule=schedule)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == pytest.approx(2.0)
    assert all(a >= b for a, b in zip(rates[9:], rates[10:], strict=False))
    middle = {"constant": 2.0, "cosine": 1.0, "linear": 1.0, "trapezoid": 2.0}[schedule.name]
    assert rates[55] == pytest.approx(middle)
    last = {"constant": 2.0, "trapezoid": 0.1, "linear": 2 / 90}.get(
        schedule.name, 2 * math.sin(math.pi / 180) ** 2
    )
    assert rates[99] == pytest.approx(last)


@pytest.mark.parametrize("schedule", list(Schedule))
@pytest.mark.parametrize("steps", [5, 10, 11, 20, 100])
def test_a_short_run_warms_up_and_decays_without_a_jump(schedule, steps):
    """`stage=dit steps=2000`, the printed command, with the stage's own decay of 4000 steps."""
    config = LoopConfig(steps=steps, warmup=10, decay_steps=200, learning_rate=2.0, schedule=schedule)
    rates = [learning_rate(step, config) for step in range(steps)]
    assert max(rates) == pytest.approx(2.0 * min(steps, 10) / 10)
    longest = max(
        0.2, 2 * 2.0 / max(steps - 10, 1)
    )  # twice a linear decay's: a cosine is steeper in the middle
    assert max(abs(a - b) for a, b in zip(rates, rates[1:], strict=False)) <= longest + 1e-9
