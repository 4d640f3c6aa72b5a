"""The few-step LoRA: what they add, when they are used, and that nothing else changes."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from elastic3d.benchmark.controls import TableRoutes
from elastic3d.diffusion.sampler import integrate, sample, timestep_grid
from elastic3d.elastic import attach, detach, load_routers, save_routers
from elastic3d.elastic.attachment import load_router_state, router_modules, router_state
from elastic3d.elastic.config import ElasticConfig, RouterConfig, RouterCurves, Scope
from elastic3d.elastic.few_step import FewStepLoRA, LowRankUpdate, coarseness
from elastic3d.elastic.trace import NOT_RUN, trace_share
from elastic3d.errors import UserError
from elastic3d.models.options import DiTConfig
from elastic3d.models.shape_dit import ShapeDiT
from elastic3d.training.few_step import rebase

ROUTERS = RouterConfig(few_step_rank=3, few_step_nfe=4, head_std=0.3, widths=2)


def tiny() -> ShapeDiT:
    torch.manual_seed(0)
    model = ShapeDiT(DiTConfig(in_channels=4, condition_channels=6, width=32, heads=2, double_blocks=1,
                               single_blocks=2)).eval()  # fmt: skip
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    return model


def learned(model: ShapeDiT, config: RouterConfig = ROUTERS):
    """Routers with few-step LoRA that are not zero."""
    session = attach(model, config)
    for block in session.blocks:
        for parameter in block.few_step.parameters():
            nn.init.normal_(parameter, std=0.1)
    return session


def generate(
    model: ShapeDiT,
    session,
    steps: int,
    budget: float = 1.0,
    seeds=(0, 1),
    guidance=2.0,
    options=None,
    **settings,
):
    if session is not None:
        session.settings = ElasticConfig(budget=budget, **settings)
    condition = torch.stack(
        [torch.randn(5, 6, generator=torch.Generator().manual_seed(7 + seed)) for seed in seeds]
    )
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    options = options or {}
    return sample(
        model, condition, (10, 4), timestep_grid(steps), guidance, generators, session=session, **options
    )


def every_block(steps: int) -> TableRoutes:
    """Every block at full width."""
    return TableRoutes(torch.full((steps, 2, 2, 3), ROUTERS.widths), ROUTERS.widths)


def by_hand(model: ShapeDiT, session, coarse: float) -> ShapeDiT:
    """The dense model with the few-step LoRA added to its weights."""
    plain, few_step = copy.deepcopy(model), {}
    for block in session.blocks:
        for name, part in block.few_step.parts.items():
            gain = torch.diag(1 + coarse * part.slope)
            few_step[f"{block.name}.{name.replace('/', '.')}.weight"] = part.up @ gain @ part.down
    detach(plain)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if name in few_step:
                parameter += few_step.pop(name)
    assert not few_step
    return plain


@pytest.mark.parametrize(
    ("steps", "budget", "expected"),
    [(4, 1.0, 0.0), (2, 1.0, 1.0), (8, 0.5, 0.0), (5, 0.4, 1.0), (5, 1, None)],
)
def test_they_are_used_up_to_their_nfe(steps, budget, expected):
    assert coarseness(ROUTERS, steps, budget, None) == expected
    assert coarseness(RouterConfig(), steps, budget, 2.0) is None
    assert all(coarseness(ROUTERS, n, 4 / n, None) == 0 for n in range(4, 60))  # n * (4 / n) is not always 4
    few = replace(ROUTERS, few_step_max_steps=5)
    assert coarseness(few, steps, budget, None) == (expected if steps <= 5 else None)


def test_a_budget_is_spent_on_the_branches_that_run():
    """Where guidance is learned, up to half of the dense NFE is left out anyway, which a budget counts."""
    config = replace(
        ROUTERS,
        few_step_guidance=2.0,
        guided_times=[0.2, 0.6],
        curves=RouterCurves(requested_budgets=[0.3, 1.0], calibrated_budgets=[0.3, 0.9]),
    )
    times = [0.0, 0.25, 0.5, 0.75]
    assert config.guided_share(times) == 0.75 and config.guided_share([]) == 1.0
    assert replace(config, guided_times=[]).guided_share(times) == 0.5
    assert ROUTERS.guided_share(times) == 1.0  # both branches run everywhere
    assert config.calibrated(0.6, 0.75) == config.calibrated(0.8)
    assert config.calibrated(0.8, 0.75) == pytest.approx(0.9)
    with pytest.raises(ValueError, match="budget is 1.2"):
        config.calibrated(1.2, 0.5)
    assert coarseness(config, 4, 0.6, 2.0, 0.75) == coarseness(config, 4, 0.8, 2.0)
    assert coarseness(config, 5, 0.8, 2.0, 0.75) == pytest.approx(
        coarseness(config, 4, 1.0, 2.0) - math.log2(5 / 4)
    )

    model = tiny()
    session = learned(model, config)
    for guidance, requested in ((2.0, 0.8), (3.0, 0.6)):  # with another guidance both branches run
        session.begin(1, 4, 0.6, guidance, times)
        assert session._budget.item() == pytest.approx(config.calibrated(requested))
    session.settings = ElasticConfig(few_step=False)
    session.begin(1, 4, 0.6, 2.0, times)
    assert session._budget.item() == pytest.approx(config.calibrated(0.6))


@pytest.mark.parametrize("guidance", [None, 2.0])
def test_a_budget_below_the_smallest_that_is_calibrated_is_refused_by_per_block_routers(guidance):
    """They would execute no less. It is a share of what runs in those steps: with learned guidance less."""
    config = replace(
        ROUTERS, trained_steps=[2, 4], few_step_guidance=guidance, guided_times=[0.2, 0.6] if guidance else [],
        curves=RouterCurves(requested_budgets=[0.6, 1.0], calibrated_budgets=[0.7, 1.0]),
    )  # fmt: skip
    times, least = [0.0, 0.25, 0.5, 0.75], 0.45 if guidance else 0.6
    session = learned(tiny(), config)
    for budget in (least, least - 0.004, 1.0):  # as it is told
        session.begin(2, 4, [1.0, budget], guidance, times)
    with pytest.raises(UserError, match=f"budget is 0.4, expected {least:g} to 1, .* calibrated in 4 steps"):
        session.begin(2, 4, [1.0, 0.4], guidance, times)
    for settings in (ElasticConfig(elastic=False), ElasticConfig()):
        session.source = every_block(4) if settings.elastic else None  # or nobody listens to the budget
        session.settings = settings
        session.begin(2, 4, 0.4, guidance, times)
    session.source, session.router_config = None, replace(config, trained_steps=[])
    session.begin(2, 4, 0.4, guidance, times)


@pytest.mark.parametrize("steps", [4, 3, 2])
def test_a_generation_is_that_of_the_dense_model_with_adapted_weights(steps):
    model = tiny()
    session = learned(model)
    session.source = every_block(steps)
    found = generate(model, session, steps)
    expected = generate(by_hand(model, session, coarseness(ROUTERS, steps, 1.0, None)), None, steps)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_large_nfe_dense_runs_and_a_lora_that_is_off_know_nothing_of_them():
    dense, model = tiny(), tiny()
    session = learned(model)
    session.source = every_block(6)
    for steps, settings in ((6, {}), (3, {"elastic": False}), (3, {"few_step": False})):
        assert torch.equal(generate(model, session, steps, **settings), generate(dense, None, steps))
    assert not torch.allclose(generate(model, session, 3), generate(dense, None, 3), atol=1e-2)
    detach(model)
    assert torch.equal(generate(model, None, 3), generate(dense, None, 3))
    assert list(model.state_dict()) == list(dense.state_dict())


@pytest.mark.parametrize("sequential", [False, True])
def test_a_lora_that_has_learned_the_guidance_run_one_branch(sequential):
    model = tiny()
    session = learned(model, replace(ROUTERS, few_step_guidance=2.0))
    session.source = every_block(3)
    found = generate(model, session, 3, options={"sequential": sequential})
    assert session.guided and trace_share(session.trace).tolist() == [0.5, 0.5]
    assert (session.trace.actions[:, 1] == NOT_RUN).all()
    plain = by_hand(model, session, coarseness(ROUTERS, 3, 1.0, None))
    torch.testing.assert_close(found, generate(plain, None, 3, guidance=1.0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sequential", [False, True])
def test_both_branches_run_at_some_times_and_batches_change_nothing(sequential):
    """The generation of a model that is told when to leave the second branch out; samples meet its start and end at
    different turns."""
    config = replace(ROUTERS, scope=Scope.step, longest=4, widths=1, few_step_nfe=7)
    config = replace(config, few_step_guidance=2.0, guided_times=[0.15, 0.55])
    model = tiny()
    session = learned(model, config)
    keep = torch.ones(10, 2, 2, 3)
    keep[3:5, :, 0] = keep[6, :, 0] = keep[7:9, :, 1] = keep[2, :, 1] = 0
    session.source = TableRoutes(keep, 1)
    options = {"sequential": sequential}
    found = generate(model, session, 10, 0.7, options=options)
    ran = session.trace.actions[:, 1, :, 0] != NOT_RUN
    assert ran.T.tolist() == [[2 <= step <= 5 for step in range(10)]] * 2
    shares = trace_share(session.trace).tolist()
    for seed in (0, 1):
        session.source = TableRoutes(keep[:, :, [seed]], 1)
        alone = generate(model, session, 10, 0.7, seeds=(seed,), options=options)
        torch.testing.assert_close(alone[0], found[seed], rtol=1e-4, atol=1e-5)
        assert trace_share(session.trace).tolist() == shares[seed : seed + 1]


def test_the_second_branch_is_that_of_the_adapted_model_where_it_runs():
    model = tiny()
    session = learned(model, replace(ROUTERS, few_step_guidance=2.0, guided_times=[0.3, 0.6]))
    session.source = every_block(4)
    found = generate(model, session, 4)
    plain, last = by_hand(model, session, coarseness(ROUTERS, 4, 1.0, None)), {}

    def guided_at_times(x, t, condition, guidance=None):
        """The plain model, whose second branch says at other times what guidance is to be there."""
        v, without = plain(x, t, condition).chunk(2)
        if 0.3 <= t[0] <= 0.6:
            last["added"], last["t"] = v - without, t[0]
            return torch.cat([v, without])
        return torch.cat([v, v - last["added"] * last["t"] / t[0] if last else v])

    torch.testing.assert_close(found, generate(guided_at_times, None, 4), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("steps", "guidance", "settings"),
    [(3, 3.0, {}), (3, 1.0, {}), (6, 2.0, {}), (3, 2.0, {"few_step": False}), (3, 2.0, {"elastic": False})],
)
def test_another_guidance_runs_without_them_and_dense_runs_keep_both_branches(steps, guidance, settings):
    dense, model = tiny(), tiny()
    session = learned(model, replace(ROUTERS, few_step_guidance=2.0))
    session.source = every_block(steps)
    found = generate(model, session, steps, guidance=guidance, **settings)
    assert torch.equal(found, generate(dense, None, steps, guidance=guidance))
    assert not session.guided
    if session.settings.elastic:
        assert trace_share(session.trace).tolist() == [1.0, 1.0]


def test_narrow_blocks_are_slices_of_the_adapted_ones():
    model = tiny()
    session = learned(model)
    widths = torch.randint(1, 3, (3, 2, 2, 3), generator=torch.Generator().manual_seed(0))
    session.source = TableRoutes(widths, 2)
    plain = by_hand(model, session, coarseness(ROUTERS, 3, 1.0, None))
    other = attach(plain, RouterConfig(widths=2))
    other.source = session.source
    torch.testing.assert_close(generate(model, session, 3), generate(plain, other, 3), rtol=1e-4, atol=1e-5)


def test_stale_weights_are_made_anew():
    """After a change of the few-step LoRA, of the base weights, and of where they are."""
    model = tiny()
    session = learned(model)
    first = generate(model, session, 3)
    assert torch.equal(first, generate(model, session, 3))
    with torch.no_grad():
        session.blocks[0].few_step.parts["img_mlp/0"].up.mul_(2)
    second = generate(model, session, 3)
    assert not torch.equal(first, second)
    with torch.no_grad():
        model.single_blocks[0].linear1.weight.mul_(1.1)
    assert not torch.equal(second, third := generate(model, session, 3))
    model.single_blocks[1].linear2.weight.data += 0.1  # as a LoRA is merged: the tensor's version stays
    assert not torch.equal(third, fourth := generate(model, session, 3))
    session.blocks[1].few_step.parts["linear1"].up.data *= 2
    assert not torch.equal(fourth, third := generate(model, session, 3))
    model.double()
    assert generate(model, session, 3).dtype == torch.float32
    model.float()
    torch.testing.assert_close(generate(model, session, 3), third, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inputs", "offset"), [(64, 0), (7, 0), (64, 1)])  # 7 values are no whole 8 bytes
def test_what_weights_were_made_of_tells_of_every_value(inputs, offset, dtype):
    """Also of the last digit of one value through `.data`, which a sum of the values rounds away."""
    block = nn.Sequential(nn.Linear(inputs, 48)).to(dtype)
    lora = FewStepLoRA(block, 2)
    if offset:  # as in a file that is mapped to memory
        stored = torch.zeros(48 * inputs + offset, dtype=dtype)[offset:].view(48, inputs)
        block[0].weight = nn.Parameter(stored.copy_(block[0].weight.detach()))
    before = lora.state(block, 1.0)
    for weight in (block[0].weight, lora.parts["0"].up):
        for place in ((0, 0), (-1, -1)):
            weight.data[place] = torch.nextafter(weight.data[place], torch.ones((), dtype=weight.dtype))
            assert before != (before := lora.state(block, 1.0))
    assert before == lora.state(block, 1.0) != lora.state(block, 0.0)


def test_they_are_saved_with_the_routers(tmp_path):
    model, other = tiny(), tiny()
    session = learned(model)
    save_routers(model, tmp_path)
    again = attach(other, tmp_path)
    assert again.router_config == ROUTERS
    assert torch.equal(generate(model, session, 3, 0.9), generate(other, again, 3, 0.9))
    keys = set(router_state(model))
    assert "double_blocks.0.few_step.parts.img_attn.qkv.up" in keys
    state = {key: value for key, value in router_state(model).items() if ".few_step." not in key}
    with pytest.raises(ValueError, match="missing"):
        load_router_state(other, state)
    load_routers(other, tmp_path)


def test_gradients_go_back_through_a_whole_generation():
    """The derivative along a direction equals that of finite differences, blocks that wait for each other included."""
    config = RouterConfig(
        few_step_rank=2, few_step_nfe=4, scope=Scope.step, longest=4, widths=1, head_std=0.0,
        curves=RouterCurves(damping_times=[0.0, 1.0], dampings=[0.5, 1.0]),
    )  # fmt: skip
    model = tiny().double()
    model.requires_grad_(False)
    session = learned(model, config)
    model.double()
    keep = torch.ones(5, 2, 2, 3)
    keep[2, :, 0] = keep[3, :, :] = keep[4, :, 1] = 0  # the samples leave out different steps
    session.source = TableRoutes(keep, 1)
    noise = torch.randn(2, 10, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    condition = torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    parameters = [p for block in session.blocks for p in block.few_step.parameters()]

    def loss() -> torch.Tensor:
        session.settings = ElasticConfig(budget=0.6)
        return integrate(model, condition, noise, timestep_grid(5), 2.0, session=session).square().mean()

    gradients = torch.autograd.grad(loss(), parameters)
    torch.manual_seed(3)
    direction = [torch.randn_like(p) for p in parameters]
    slope = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True)).item()
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p += sign * 1e-4 * d
            ends.append(loss().item())
            for p, d in zip(parameters, direction, strict=True):
                p -= sign * 1e-4 * d
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=2e-2)


def test_the_nfe_can_be_counted_from_another_number():
    """The weights at each NFE stay what they are; only where few-step LoRA is used changes."""
    model = tiny()
    session = learned(model)
    block = session.blocks[0]
    linear = block.inner.img_mlp[0]
    part = block.few_step.parts["img_mlp/0"]
    before = [part(linear.weight, coarseness(ROUTERS, 2, budget, None)) for budget in (0.9, 0.5)]
    rebase(block.few_step, 0.75)
    fewer = replace(ROUTERS, few_step_nfe=3)
    for budget, expected in zip((0.9, 0.5), before, strict=True):
        found = part(linear.weight, coarseness(fewer, 2, budget, None))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert coarseness(fewer, 4, 1.0, None) is None


def test_times_that_are_no_interval_are_refused():
    for times in ([0.5], [0.6, 0.2], [0.1, 0.2, 0.3]):
        with pytest.raises(ValueError, match="guided_times is .*, expected .*ascending"):
            RouterConfig(guided_times=times)


def test_a_fresh_lora_change_nothing_and_replaced_layers_are_named():
    block = tiny().double_blocks[0]
    few_step = FewStepLoRA(block, 2)
    own = dict(block.named_parameters())
    adapted = few_step.adapted(block, 0.7)
    assert len(adapted) == sum(isinstance(part, nn.Linear) for part in block.modules())
    assert all(torch.equal(weight, own[name]) for name, weight in adapted.items())
    block.img_mlp[0] = nn.Identity()
    with pytest.raises(ValueError, match=r"img_mlp.0 is a Identity, expected nn.Linear"):
        few_step.adapted(block, 0.0)
    assert LowRankUpdate(5, 4, 2)(torch.ones(5, 4), 1.0).shape == (5, 4)


def test_compiled_blocks_run_with_the_lora():
    model = tiny()
    session = learned(model)
    session.source = every_block(3)
    eager = generate(model, session, 3)
    for block in session.blocks:
        block.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(generate(model, session, 3), eager)
    assert {name.split("/")[-1] for name in router_modules(model)} == {"router", "few_step", "conditioner"}
