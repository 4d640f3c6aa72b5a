"""What every block family owes the routing code: caches, training, storage, compilation, cost."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from elastic3d.benchmark.controls import TableRoutes
from elastic3d.elastic import adapter_for, attach, detach, load_routers, save_routers, session_of
from elastic3d.elastic.attachment import load_router_state, router_modules, router_state
from elastic3d.elastic.config import (
    BlockCacheConfig,
    CacheRule,
    ElasticConfig,
    RouterConfig,
    Scope,
)
from elastic3d.elastic.session import ElasticSession
from elastic3d.errors import UserError
from elastic3d.models.options import DiTConfig
from elastic3d.models.shape_dit import ShapeDiT
from tests.contracts.families import (
    CLOSE,
    FAMILIES,
    B,
    Family,
    K,
    begin,
    forward,
    random_table,
    rows,
    run,
    table,
    train_forward,
)

# ------------------------------------------------------------------------------------------------- the session


def noisy(inputs: dict[str, Any], step: int) -> dict[str, Any]:
    first = next(iter(inputs))
    return inputs | {first: inputs[first] * (1 + 0.1 * step)}


def generation(model: nn.Module, session: ElasticSession, inputs: dict[str, Any]) -> list[Tensor]:
    begin(session, B // 2, 4)
    return [forward(model, session, noisy(inputs, i), i, (0, 1)) for i in range(4)]


CACHES = [BlockCacheConfig(rule=CacheRule.band, band=0.5, longest=2), BlockCacheConfig(skipped_reuse=True, longest=2),
          BlockCacheConfig(rule=CacheRule.age, longest=2, skipped_reuse=True, damping=0.8)]  # fmt: skip


@pytest.mark.parametrize("cache", CACHES)
def test_a_second_generation_equals_the_first(family, cache):
    model, inputs = family.model(), family.inputs(B)
    session = attach(model, RouterConfig(initial_keep=0.5, initial_width_bias=0, head_std=3.0))
    session.settings = ElasticConfig(cache=cache)
    if cache.skipped_reuse:  # these routers never change their mind
        session.source = random_table(session, 5, steps=4, samples=B // 2)
    first = generation(model, session, inputs)
    assert (session.trace.actions == -1).any()
    kept = session.cache
    assert 0 < len(kept) <= B * len(session.blocks)
    second = generation(model, session, inputs)
    assert len(kept) == 0 < len(session.cache)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("cache", CACHES)
def test_branches_and_samples_never_share_a_cache_entry(family, cache):
    """A batch of two branches gives what each row gives in a generation of its own."""
    model, inputs = family.model(), family.inputs(B)
    session = attach(model)
    session.settings = ElasticConfig(cache=cache)
    routes = random_table(session, 5, steps=4, samples=B // 2)
    session.source = routes
    together = generation(model, session, inputs)
    for row in range(B):
        branch, sample = divmod(row, B // 2)
        session.source = TableRoutes(routes.actions[:, branch : branch + 1, sample : sample + 1], K)
        begin(session, 1, 4)
        for i in range(4):
            alone = forward(model, session, rows(noisy(inputs, i), [row]), i)
            torch.testing.assert_close(alone, together[i][row : row + 1], **CLOSE)


def test_a_pass_that_nobody_announced_raises(family):
    model, inputs = family.model(), family.inputs(B)
    session = attach(model)
    with pytest.raises(ValueError, match="nobody announced"):
        run(model, inputs)
    with pytest.raises(ValueError, match="step without a generation"):
        session.step(0, 0.1)
    begin(session)
    forward(model, session, inputs)
    with pytest.raises(ValueError, match="nobody announced"):
        run(model, inputs)
    with pytest.raises(ValueError, match="step 1 of a generation of 1"):
        session.step(1, 0.1)
    session.begin(B + 1, 1)
    with pytest.raises(ValueError, match=f"a batch of {B}, but {B + 1} values"):
        forward(model, session, inputs)


# ---------------------------------------------------------------------------------------------------- training


def router_gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    loss.backward()
    return [
        p.grad.clone() if p.grad is not None else torch.zeros_like(p)
        for p in router_modules(model).parameters()
    ]


@pytest.mark.parametrize(
    "changes",
    [{"initial_width_bias": 0.1}, {"scope": Scope.step}],
)
def test_every_router_gets_finite_gradients_also_under_checkpointing(family, changes):
    gradients = []
    for checkpointing in (False, True):
        model, inputs = family.model().train(), family.inputs(B)
        torch.manual_seed(3)
        session = attach(model, RouterConfig(initial_keep=0.51, head_std=1.0, **changes))
        if checkpointing:
            family.checkpointing(model)
        loss = train_forward(model, session, inputs).square().mean()
        loss = loss + session.source.share(session.trace).square().mean()
        gradients.append(router_gradients(model, loss))
    for block in session.blocks:
        if block.router is None:
            continue
        heads = block.router.heads.weight.grad
        assert heads.isfinite().all() and heads[0].abs().max() > 0
        runs = session.current.decisions[block.index].keep.any()
        if runs and block.site:  # a skipped block has no width, one with experts can't be narrowed
            assert heads[1:].abs().max() > 0
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-4, atol=1e-6)


def test_the_task_alone_moves_the_gates(family):
    model, inputs = family.model(), family.inputs(B)
    session = attach(model, RouterConfig(initial_keep=0.45, head_std=0.5))
    train_forward(model, session, inputs).square().mean().backward()
    assert all(block.router.heads.weight.grad[0].abs().max() > 0 for block in session.blocks)


# ----------------------------------------------------------------------------------------------------- weights


def test_routers_save_load_and_refuse_what_does_not_fit(family, tmp_path):
    model, inputs = family.model(), family.inputs(B)
    session = attach(model, RouterConfig(head_std=1.0, initial_keep=0.5))
    begin(session)
    out = forward(model, session, inputs)
    save_routers(model, tmp_path / "routers")
    detach(model)
    session = attach(model, tmp_path / "routers")
    begin(session)
    assert torch.equal(forward(model, session, inputs), out)
    state = router_state(model)
    first = next(iter(state))
    for broken, what in (
        ({k: v for k, v in state.items() if k != first}, "1 missing"),
        (state | {"extra": state[first]}, "1 unknown"),
        (state | {first: state[first][:1]}, "1 mis-shaped"),
    ):
        with pytest.raises(ValueError, match=what):
            load_router_state(model, broken)
    detach(model)
    attach(model, RouterConfig(hidden=8))
    with pytest.raises(UserError, match="another architecture"):
        load_routers(model, tmp_path / "routers")


def test_a_copy_of_the_model_has_a_session_of_its_own(family):
    model, inputs = family.model(), family.inputs(B)
    attach(model)
    twin = copy.deepcopy(model)
    session = session_of(twin)
    assert session.blocks[0] is not session_of(model).blocks[0]
    begin(session)
    session.source = random_table(session, 2)
    forward(twin, session, inputs)
    with pytest.raises(ValueError, match="nobody announced"):
        run(model, inputs)


# tracing takes long: one family of this project and one of diffusers by default
@pytest.mark.parametrize(
    "family",
    [pytest.param(n, marks=() if n in ("shape_dit", "flux") else pytest.mark.slow) for n in FAMILIES],
    indirect=True,
)
def test_blocks_compile_whole_with_a_bounded_number_of_recompilations(family):
    """Other rows in groups of the same sizes need no other graphs."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, inputs = family.model(), family.inputs(B)
    session = attach(model, RouterConfig(widths=2))  # each is a graph
    routes = random_table(session, 0)
    both = routes, TableRoutes(routes.actions.roll(1, dims=2), routes.widths)
    outputs, graphs = [], []
    for compiled in (False, True):
        if compiled:
            for block in session.blocks:
                block.compile(backend="eager", fullgraph=True)
        with torch._dynamo.config.patch(error_on_recompile=False, recompile_limit=16):
            for session.source in both:
                begin(session)
                outputs.append(forward(model, session, inputs))
                graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    for plain, traced in zip(outputs[:2], outputs[2:], strict=True):
        torch.testing.assert_close(plain, traced, **CLOSE)
    kinds = len({frozenset(name for name, _ in block.inner.named_modules()) for block in session.blocks})
    assert 0 < graphs[2] == graphs[3] <= kinds * 2 * 2 + kinds
    torch._dynamo.reset()


def fewer_blocks() -> Family:
    """The family shape_dit; the whole model breaks into graphs at each block, and each takes long."""
    config = DiTConfig(
        in_channels=4, condition_channels=6, width=32, heads=2, double_blocks=1, single_blocks=1
    )
    return replace(FAMILIES["shape_dit"], build=lambda: ShapeDiT(config))


# of this project, and of diffusers
@pytest.mark.parametrize(
    "small",
    [fewer_blocks(), pytest.param(FAMILIES["flux"], marks=pytest.mark.slow)],
    ids=["shape_dit", "flux"],
)
def test_the_whole_model_compiles_around_blocks_that_decide(small):
    torch._dynamo.reset()
    model, inputs = small.model(), small.inputs(B)
    session = attach(model, RouterConfig(widths=1))  # blocks of several widths are compiled above
    outputs = []
    for compiled in (False, True):
        if compiled:
            model.compile(backend="eager")
        session.source = random_table(session, 3)
        begin(session)
        outputs.append(forward(model, session, inputs))
    torch.testing.assert_close(*outputs, **CLOSE)
    assert (session.trace.actions == 0).any()
    torch._dynamo.reset()


@sdpa_kernel(SDPBackend.MATH)  # torch has no formula for the CPU's fused attention
def test_flops_are_those_that_torch_counts(family):
    model, inputs = family.model(), family.inputs(1)
    session = attach(model)
    with FlopCounterMode(display=False) as dense, torch.no_grad(), session.dense():
        run(model, inputs)
    for action in range(K + 1):
        session.source = table(session, action, 1)
        begin(session, 1)
        with FlopCounterMode(display=False) as counter:
            forward(model, session, inputs)
        flops = [session.trace.flops[0][i] for i in range(len(session.blocks))]
        executed = sum(f.at(action / K) if action else 0 for f in flops)
        saved = dense.get_total_flops() - counter.get_total_flops()
        assert saved == pytest.approx(sum(f.dense for f in flops) - executed)


def test_adapters_know_their_family(family):
    assert adapter_for(family.build()).family in type(family.build()).__name__
    with pytest.raises(ValueError, match="no routing for Linear"):
        adapter_for(nn.Linear(2, 2))
