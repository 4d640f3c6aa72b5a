"""One decision a step for all blocks: what runs, what is kept, and whose decision it is."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from elastic3d.benchmark.controls import TableRoutes
from elastic3d.diffusion.sampler import sample, timestep_grid
from elastic3d.elastic import attach
from elastic3d.elastic.block import ElasticBlock
from elastic3d.elastic.config import (
    BlockCacheConfig,
    Branches,
    ElasticConfig,
    RouterConfig,
    RouterCurves,
    Scope,
)
from elastic3d.elastic.context import Defer
from elastic3d.elastic.session import ElasticSession
from elastic3d.elastic.trace import SKIPPED, trace_router_flops
from elastic3d.models.options import DiTConfig
from elastic3d.models.shape_dit import ShapeDiT

STEPS = 8


def model() -> ShapeDiT:
    """Blocks that change their streams, unlike those of a fresh model."""
    torch.manual_seed(0)
    dit = ShapeDiT(
        DiTConfig(in_channels=5, condition_channels=8, width=32, heads=2, double_blocks=2, single_blocks=3)
    )
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return dit


def attached(config: RouterConfig, std: float = 20.0) -> tuple[ShapeDiT, ElasticSession]:
    dit = model()
    session = attach(dit, config)
    torch.manual_seed(1)
    for block in session.blocks:
        if block.router is not None:
            torch.nn.init.normal_(block.router.heads.weight, std=std)
    session.settings = ElasticConfig(budget=0.5)
    return dit, session


def generated(dit: ShapeDiT, session: ElasticSession, sequential: bool = False):
    """Latents and actions of three samples."""
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    condition = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(9))
    latents = sample(
        dit, condition, (6, 5), timestep_grid(STEPS), 2.0, generators, session=session, sequential=sequential
    )
    return latents, session.trace.actions


def of_one_decision(**options) -> RouterConfig:
    return RouterConfig(**(dict(scope=Scope.step, longest=3, widths=1, initial_keep=0.5) | options))


def test_one_router_decides_for_all_blocks():
    dit, session = attached(of_one_decision())
    assert [block.router is None for block in session.blocks] == [False] + 4 * [True]
    _, actions = generated(dit, session)
    assert (actions == actions[..., :1]).all()
    assert (actions == -1).any() and (actions[1:] == 1).any()
    dit, session = attached(RouterConfig(longest=3, widths=1, initial_keep=0.5))
    _, actions = generated(dit, session)
    assert (actions != actions[..., :1]).any()


@pytest.mark.parametrize("sequential", [False, True])
def test_branches_share_decisions_or_have_their_own(sequential):
    dit, session = attached(of_one_decision(branches=Branches.shared))
    _, actions = generated(dit, session, sequential)
    assert torch.equal(actions[:, 0], actions[:, 1])
    assert (actions == -1).any() and (actions[1:] == 1).any()
    assert (actions[:, :, 0] != actions[:, :, 1]).any()
    dit, session = attached(of_one_decision())
    _, actions = generated(dit, session, sequential)
    assert (actions[:, 0] != actions[:, 1]).any()


def test_branches_one_after_the_other_take_the_same_routes():
    dit, session = attached(of_one_decision(branches=Branches.shared))
    (latents, actions), (other, others) = generated(dit, session), generated(dit, session, True)
    assert torch.equal(actions, others)
    torch.testing.assert_close(latents, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize(
    ("scope", "branches"),
    [(Scope.step, Branches.shared), (Scope.step, Branches.separate), (Scope.block, Branches.separate)],
)
def test_flops_of_routers_are_those_of_the_rows_that_they_see(scope, branches, sequential):
    dit, session = attached(of_one_decision(scope=scope, branches=branches))
    rows = Counter()
    for name, part in session.routers.items():
        part.register_forward_hook(lambda module, args, out, name=name: rows.update({name: len(out)}))
    with FlopCounterMode(display=False) as counter:
        session.conditioner(*torch.zeros(4, 1))
    each = {"conditioner": counter.get_total_flops()}
    rows.clear()
    for block in session.blocks:
        if block.router is not None:
            lengths = (6, 4) if block.name.startswith("double") else (10,)
            each[f"{block.name}.router".replace(".", "/")] = block.router.flops(lengths)

    def counted():
        condition = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(9))
        given = [torch.Generator().manual_seed(0)]
        sample(
            dit, condition, (6, 5), timestep_grid(STEPS), 2.0, given, session=session, sequential=sequential
        )
        return trace_router_flops(session.trace).sum().item()

    assert counted() == sum(rows[name] * flops for name, flops in each.items())
    assert set(rows.values()) == {STEPS if branches is Branches.shared else 2 * STEPS}
    assert set(rows) == set(each)
    rows.clear()
    session.source = TableRoutes(torch.ones(1, 1, 1, 5), 1)
    assert counted() == 0 == sum(rows.values()), "a table decides"
    session.source = None


def test_routers_that_nobody_asks_cost_nothing():
    """At a budget of 1 with the few-step LoRA every block runs."""
    dit, session = attached(of_one_decision(few_step_rank=1))
    session.settings, asked = ElasticConfig(), []
    session.conditioner.register_forward_hook(lambda *_: asked.append(1))
    generated(dit, session)
    assert session.coarseness is not None and not asked
    assert trace_router_flops(session.trace).sum() == 0


@pytest.mark.parametrize("damping", [0.0, 0.8, 1.0])
def test_what_a_list_of_blocks_adds_is_kept_as_one_and_gives_the_same(damping):
    """A table decides alike for all blocks, or, where it is said not to, block by block."""
    routes = torch.randint(0, 2, (STEPS, 2, 3, 1), generator=torch.Generator().manual_seed(1)).expand(
        -1, -1, -1, 5
    )
    found = []
    for alike in (True, False):
        dit, session = attached(of_one_decision(damping=damping))
        cache = BlockCacheConfig(skipped_reuse=True, longest=3, damping=damping)
        session.settings, session.source = ElasticConfig(cache=cache), TableRoutes(routes, 1)
        session.source.alike = alike
        latents, actions = generated(dit, session)
        found.append((latents, actions))
        assert (actions == -1).any()
    assert torch.equal(found[0][1], found[1][1])
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scope", Scope)
def test_with_nothing_to_reuse_a_step_runs_and_a_single_block_passes(scope):
    config = RouterConfig(longest=2, initial_keep=0.01, head_std=0.0, scope=scope)
    dit, session = attached(config, std=0.0)
    _, actions = generated(dit, session)
    ran = (actions[:, 0, 0, 0] > 0).tolist()
    if scope is Scope.step:  # and nothing is reused for longer than it may
        assert ran == [True, False, False, True, False, False, True, False]
    else:
        assert not any(ran) and (actions[:, 0] == SKIPPED).all()


def count_rows(block: ElasticBlock, batches: list[int]) -> None:
    """Note how many rows the base block is called with."""
    full = block.forward

    def counting(*args, **kwargs):
        out = full(*args, **kwargs)
        batches.append(len(out[0]))
        return out

    block.forward = counting


def one_by_one(dit: ShapeDiT, session: ElasticSession):
    """The same three samples, each in a generation of its own."""
    condition = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(9))
    latents, actions = [], []
    for i in range(3):
        noise = [torch.Generator().manual_seed(i)]
        latents.append(
            sample(dit, condition[i : i + 1], (6, 5), timestep_grid(STEPS), 2.0, noise, session=session)
        )
        actions.append(session.trace.actions)
    return torch.cat(latents), torch.cat(actions, dim=2)


@pytest.mark.parametrize("branches", list(Branches))
@pytest.mark.parametrize("damping", [0.0, 0.8])
def test_samples_wait_for_each_other_and_take_the_routes_that_they_take_alone(branches, damping):
    dit, session = attached(of_one_decision(branches=branches, damping=damping))
    batches = []
    count_rows(session.blocks[1], batches)
    latents, actions = generated(dit, session)
    ran, batches[:] = sum(batches), []
    alone, routes = one_by_one(dit, session)
    assert torch.equal(actions, routes) and ran == sum(batches)
    assert (actions[:, :, 0] != actions[:, :, 1]).any()
    torch.testing.assert_close(latents, alone, rtol=1e-4, atol=1e-5)


def test_blocks_run_as_often_as_the_sample_that_needs_them_most():
    routes = torch.zeros(STEPS, 1, 3, 1, dtype=torch.long)
    for row, steps in enumerate([(0, 3, 6), (0, 1, 7), (0, 5)]):
        routes[list(steps), 0, row] = 1
    dit, session = attached(of_one_decision(longest=STEPS))
    session.source = TableRoutes(routes.expand(-1, -1, -1, 5), 1)
    batches, done = [], []
    count_rows(session.blocks[1], batches)
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    condition = torch.randn(3, 4, 8)
    sample(
        dit,
        condition,
        (6, 5),
        timestep_grid(STEPS),
        2.0,
        generators,
        session=session,
        on_step=lambda *at: done.append(at),
    )
    assert batches == [6, 6, 4]  # two branches of three samples, of three, of two
    assert done == [(i + 1, STEPS) for i in range(STEPS)]
    assert torch.equal(session.trace.actions[:, 0, :, 0] > 0, routes[:, 0, :, 0] > 0)


def test_only_samples_that_decide_once_a_step_and_separately_are_deferred():
    for config, settings in (
        (RouterConfig(), ElasticConfig(budget=0.5)),
        (of_one_decision(), ElasticConfig(budget=0.5, shared=True)),
        (of_one_decision(), ElasticConfig(elastic=False)),
    ):
        _, session = attached(config)
        session.settings = settings
        session.begin(2, STEPS)
        assert not session.defers
        with pytest.raises(ValueError, match="defer is always, expected never"):
            session.step(0, 0.1, defer=Defer.always)


def test_only_who_looks_ahead_decides_for_both_branches():
    with pytest.raises(ValueError, match="branches is shared, expected separate: only with scope=step"):
        RouterConfig(branches=Branches.shared)


@pytest.mark.parametrize("config", [
    of_one_decision(), of_one_decision(branches=Branches.shared), RouterConfig(initial_keep=0.5),
])  # fmt: skip
@pytest.mark.parametrize("sequential", [False, True])
def test_samples_share_their_routes_only_where_that_is_asked_for(config, sequential):
    dit, session = attached(config)
    _, separate = generated(dit, session, sequential)
    assert (separate != separate[:, :, :1]).any()
    session.settings = ElasticConfig(budget=0.5, shared=True)
    _, shared = generated(dit, session, sequential)
    assert (shared == shared[:, :, :1]).all()
    assert (shared <= 0).any() and (shared > 0).any()
    session.settings = ElasticConfig(budget=0.5)
    assert torch.equal(generated(dit, session, sequential)[1], separate)


def test_gate_bias_moves_gates_at_its_times_alone():
    dit, session = attached(of_one_decision())
    _, before = generated(dit, session)
    config = session.router_config
    session.router_config = replace(
        config, curves=RouterCurves(times=[0.4, 0.5, 0.6], gate_bias=[0.0, 1e3, 0.0])
    )
    _, after = generated(dit, session)
    steps = torch.arange(STEPS) / STEPS
    assert (after[steps == 0.5] == 1).all() and (before[steps == 0.5] == -1).any()
    early = steps < 0.4
    assert torch.equal(after[early], before[early])
