"""What every block family owes the routing code, on real classes at tiny size."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from elastic3d.adapters import adapter_for, attach, detach, load_routers, save_routers
from elastic3d.config.models import DiTConfig
from elastic3d.config.routing import (
    BlockCacheConfig,
    CacheRule,
    ElasticConfig,
    Lookahead,
    RouterConfig,
    RouterVariant,
)
from elastic3d.errors import UserError
from elastic3d.models.shape_dit import ShapeDiT
from elastic3d.routing.attach import load_router_state, router_modules, router_state
from elastic3d.routing.losses import session_share
from elastic3d.routing.session import Branch, RoutingSession
from elastic3d.routing.tables import TableRoutes

B, K = 4, 4  # rows of a batch; widths
CONDITIONAL = (Branch.conditional,)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@dataclass
class Family:
    """A tiny random model, its inputs, and how it is asked to checkpoint."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Any]]
    checkpointing: Callable[[nn.Module], None]

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.build().eval()
        for parameter in model.parameters():  # no block may be the identity by its initialisation
            nn.init.normal_(parameter, std=0.15)
        return model


def run(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    output = model(**inputs)
    return output if isinstance(output, Tensor) else output[0]


def rows(inputs: dict[str, Any], index: list[int]) -> dict[str, Any]:
    taken = {k: v[index] if isinstance(v, Tensor) and v.shape[0] == B else v for k, v in inputs.items()}
    return {k: [v[i] for i in index] if isinstance(v, list) else v for k, v in taken.items()}


def _shape_dit() -> ShapeDiT:
    return ShapeDiT(
        DiTConfig(in_channels=4, condition_channels=6, width=32, heads=2, double_blocks=2, single_blocks=3)
    )


def _shape_inputs(batch: int) -> dict[str, Any]:
    torch.manual_seed(1)
    return {
        "latents": torch.randn(batch, 10, 4),
        "t": torch.rand(batch),
        "condition": torch.randn(batch, 5, 6),
    }


def _flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=4, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=6, pooled_projection_dim=6, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def _flux_inputs(batch: int) -> dict[str, Any]:
    torch.manual_seed(1)
    places = torch.stack([torch.zeros(9), torch.arange(9) // 3, torch.arange(9) % 3], dim=-1)
    return {
        "hidden_states": torch.randn(batch, 9, 4),
        "encoder_hidden_states": torch.randn(batch, 5, 6),
        "pooled_projections": torch.randn(batch, 6),
        "timestep": torch.rand(batch),
        "guidance": torch.full((batch,), 3.5),
        "img_ids": places,
        "txt_ids": torch.zeros(5, 3),
        "return_dict": False,
    }


def _qwen(zero_cond_t: bool) -> nn.Module:
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(
        in_channels=4, out_channels=1, num_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=6, axes_dims_rope=(4, 6, 6), zero_cond_t=zero_cond_t,
    )  # fmt: skip


def _qwen_inputs(batch: int, reference: bool) -> dict[str, Any]:
    torch.manual_seed(1)
    mask = torch.ones(batch, 5, dtype=torch.bool)
    mask[1:2, 3:] = False  # a shorter prompt
    shapes = [(1, 2, 3), (1, 3, 1)] if reference else [(1, 3, 3)]
    return {
        "hidden_states": torch.randn(batch, 9, 4),
        "encoder_hidden_states": torch.randn(batch, 5, 6),
        "encoder_hidden_states_mask": mask,
        "timestep": torch.rand(batch),
        "img_shapes": [shapes] * batch,
        "return_dict": False,
    }


def _checkpoint_diffusers(model: Any) -> None:
    model.enable_gradient_checkpointing()


FAMILIES = {
    "shape_dit": Family(
        _shape_dit, _shape_inputs, lambda model: setattr(model, "gradient_checkpointing", True)
    ),
    "flux": Family(_flux, _flux_inputs, _checkpoint_diffusers),
    "qwen_image": Family(
        lambda: _qwen(False), lambda batch: _qwen_inputs(batch, False), _checkpoint_diffusers
    ),
    "qwen_image_edit": Family(
        lambda: _qwen(True), lambda batch: _qwen_inputs(batch, True), _checkpoint_diffusers
    ),
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


def begin(session: RoutingSession, samples: int = B, steps: int = 1) -> None:
    session.begin(samples, steps)


def forward(
    model: nn.Module, session: RoutingSession, inputs: dict[str, Any], step: int = 0, branches=CONDITIONAL
):
    session.step(step, 0.1, branches)
    with torch.no_grad():
        return run(model, inputs)


def train_forward(
    model: nn.Module, session: RoutingSession, inputs: dict[str, Any], skip: bool = False
) -> Tensor:
    n = len(next(v for v in inputs.values() if isinstance(v, Tensor)))
    explored = torch.zeros(n, len(session.blocks), dtype=torch.bool) if skip else None
    session.train(torch.full((n,), 0.1), torch.linspace(0.3, 1, n), torch.arange(n) % 2.0, explored)
    return run(model, inputs)


def table(session: RoutingSession, action: int | Tensor, samples: int = B) -> TableRoutes:
    full = torch.zeros(1, 1, samples, len(session.blocks), dtype=torch.long)
    return TableRoutes(full + action, K)


def random_table(session: RoutingSession, seed: int, steps: int = 1, samples: int = B) -> TableRoutes:
    generator = torch.Generator().manual_seed(seed)
    return TableRoutes(
        torch.randint(0, K + 1, (steps, 2, samples, len(session.blocks)), generator=generator), K
    )


# -------------------------------------------------------------------------------------------- the dense model


@pytest.mark.parametrize("config", [RouterConfig(), RouterConfig(variant=RouterVariant.paper, hidden=16),
                                    RouterConfig(lookahead=Lookahead.step)])  # fmt: skip
def test_everything_kept_at_full_width_is_the_base_model_exactly(family, config):
    model, inputs = family.model(), family.inputs(B)
    with torch.no_grad():
        base = run(model, inputs)
    session = attach(model, config)  # open at the start
    begin(session)
    assert torch.equal(forward(model, session, inputs), base)
    assert torch.equal(train_forward(model, session, inputs), base)
    session.settings = ElasticConfig(elastic=False)
    assert torch.equal(run(model, inputs), base)


def test_detach_restores_keys_names_and_outputs(family):
    model, inputs = family.model(), family.inputs(B)
    keys, names = list(model.state_dict()), [name for name, _ in model.named_parameters()]
    modules = [name for name, _ in model.named_modules()]
    with torch.no_grad():
        base = run(model, inputs)
    session = attach(model)
    assert list(model.state_dict()) == keys
    attached = [name for name, _ in model.named_parameters()]
    assert [n for n in attached if ".router." not in n and ".conditioner." not in n] == names
    assert len([n for n in attached if ".router." in n]) == 4 * len(session.blocks)
    assert {n for n, _ in model.named_modules()} > set(modules)
    assert all(type(model.get_submodule(name)) is not None for name in modules)  # peft walks by name
    begin(session)
    session.source = table(session, 0)
    forward(model, session, inputs)
    detach(model)
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_modules()] == modules
    with torch.no_grad():
        assert torch.equal(run(model, inputs), base)
    with pytest.raises(ValueError, match="no routers"):
        detach(model)


def test_base_checkpoints_load_unchanged_after_attach(family):
    model, other, inputs = family.model(), family.build().eval(), family.inputs(B)
    attach(other)
    routers = {key: value.clone() for key, value in router_state(other).items()}
    other.load_state_dict(model.state_dict())  # strict
    assert all(torch.equal(value, routers[key]) for key, value in router_state(other).items())
    detach(other)
    with torch.no_grad():
        assert torch.equal(run(other, inputs), run(model, inputs))
    state = dict(model.state_dict())
    state.pop(next(key for key in state if ".0." in key))
    attach(other)
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(state)


# ------------------------------------------------------------------------------------------- single decisions


def test_skipping_is_bypassing_and_calls_nothing(family, monkeypatch):
    model, inputs = family.model(), family.inputs(B)
    session = attach(model)

    def called(*args, **kwargs):
        raise AssertionError("a skipped block ran")

    for block in session.blocks:
        monkeypatch.setattr(block.inner, "forward", called)
    begin(session)
    session.source = table(session, 0)
    skipped = forward(model, session, inputs)
    monkeypatch.undo()
    for block in session.blocks:  # bypass: a block whose output is its input
        adapter = block.adapter
        monkeypatch.setattr(block.inner, "forward", lambda *args, adapter=adapter, inner=block.inner, **kwargs:
                            adapter.pack(adapter.bind(inner, args, kwargs).streams))  # fmt: skip
    session.settings = ElasticConfig(elastic=False)
    with torch.no_grad():
        assert torch.equal(skipped, run(model, inputs))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6))
def test_random_routes_sliced_masked_and_alone_agree(family, seed):
    model, inputs = family.model(), family.inputs(B)
    session = attach(model)
    session.source = random_table(session, seed)
    begin(session)
    sliced = forward(model, session, inputs)
    session.step(0, 0.1, CONDITIONAL)
    session._announced.masked = True
    with torch.no_grad():
        torch.testing.assert_close(run(model, inputs), sliced, **CLOSE)
    for b in range(B):  # a sample's result does not depend on its batch mates
        one = random_table(session, seed).actions[:, :, b : b + 1]
        session.source = TableRoutes(one, K)
        begin(session, 1)
        torch.testing.assert_close(forward(model, session, rows(inputs, [b])), sliced[b : b + 1], **CLOSE)


def test_routers_own_decisions_do_not_depend_on_batch_mates(family):
    model, inputs = family.model(), family.inputs(B)
    session = attach(model, RouterConfig(initial_keep=0.5, initial_width_bias=0, head_std=3.0))
    begin(session)
    together = forward(model, session, inputs)
    actions = session.trace.actions[0, 0]
    assert len(actions.unique()) > 2
    for b in range(B):
        begin(session, 1)
        alone = forward(model, session, rows(inputs, [b]))
        assert torch.equal(session.trace.actions[0, 0, 0], actions[b])
        torch.testing.assert_close(alone, together[b : b + 1], **CLOSE)


# ------------------------------------------------------------------------------------------------- the session


def noisy(inputs: dict[str, Any], step: int) -> dict[str, Any]:
    first = next(iter(inputs))
    return inputs | {first: inputs[first] * (1 + 0.1 * step)}


def generation(model: nn.Module, session: RoutingSession, inputs: dict[str, Any]) -> list[Tensor]:
    begin(session, B // 2, 4)
    return [forward(model, session, noisy(inputs, i), i, (0, 1)) for i in range(4)]


CACHES = [BlockCacheConfig(rule=CacheRule.band, band=0.5, longest=2), BlockCacheConfig(closed_reuse=True, longest=2),
          BlockCacheConfig(rule=CacheRule.drift, drift=10.0, longest=2, probe_stride=2)]  # fmt: skip


@pytest.mark.parametrize("cache", CACHES)
def test_a_second_generation_equals_the_first(family, cache):
    model, inputs = family.model(), family.inputs(B)
    session = attach(model, RouterConfig(initial_keep=0.5, initial_width_bias=0, head_std=3.0))
    session.settings = ElasticConfig(cache=cache)
    if cache.closed_reuse:  # these routers never change their mind
        session.source = random_table(session, 5, steps=4, samples=B // 2)
    first = generation(model, session, inputs)
    assert (session.trace.actions == -1).any()
    assert len(session.cache) <= B * len(session.blocks)
    second = generation(model, session, inputs)
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
    [{"initial_width_bias": 0.1}, {"lookahead": Lookahead.step}, {"variant": RouterVariant.paper}],
)
def test_every_router_gets_finite_gradients_also_under_checkpointing(family, changes):
    gradients = []
    for checkpointing in (False, True):
        model, inputs = family.model().train(), family.inputs(B)
        torch.manual_seed(3)
        session = attach(model, RouterConfig(initial_keep=0.51, head_std=1.0, **changes))
        if checkpointing:
            family.checkpointing(model)
        loss = train_forward(model, session, inputs).square().mean() + session_share(session).square().mean()
        gradients.append(router_gradients(model, loss))
    for block in session.blocks:
        heads = block.router.heads.weight.grad
        assert heads.isfinite().all() and heads[0].abs().max() > 0
        if session.current.decisions[block.index].keep.any():  # a closed block has no width
            assert heads[1:].abs().max() > 0
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-4, atol=1e-6)


def test_the_task_alone_moves_the_gates_and_skipped_blocks_are_skipped(family):
    model, inputs = family.model(), family.inputs(B)
    session = attach(model, RouterConfig(initial_keep=0.45, head_std=0.5))
    train_forward(model, session, inputs).square().mean().backward()
    assert all(block.router.heads.weight.grad[0].abs().max() > 0 for block in session.blocks)
    explored = session.current.ran_rows
    assert all(count == B for count in explored.values())
    with torch.no_grad():
        train_forward(model, session, inputs, skip=True)
    kept = {index: int(d.keep.sum()) for index, d in session.current.decisions.items()}
    assert session.current.ran_rows == kept and sum(kept.values()) < B * len(kept)


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
    session = twin.__dict__["_routing"][0]
    assert session.blocks[0] is not model.__dict__["_routing"][0].blocks[0]
    begin(session)
    session.source = random_table(session, 2)
    forward(twin, session, inputs)
    with pytest.raises(ValueError, match="nobody announced"):
        run(model, inputs)


def test_blocks_compile_whole_with_a_bounded_number_of_recompilations(family):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, inputs = family.model(), family.inputs(B)
    session = attach(model)
    outputs = []
    for compiled in (False, True):
        if compiled:
            for block in session.blocks:
                block.compile(backend="eager", fullgraph=True)
        with torch._dynamo.config.patch(error_on_recompile=False, recompile_limit=16):
            for seed in range(2):
                session.source = random_table(session, seed)
                begin(session)
                outputs.append(forward(model, session, inputs))
    for plain, traced in zip(outputs[:2], outputs[2:], strict=True):
        torch.testing.assert_close(plain, traced, **CLOSE)
    kinds = len({type(block.inner) for block in session.blocks})
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= kinds * 2 * K + kinds
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
        flops = [session.trace.flops[i] for i in range(len(session.blocks))]
        executed = sum(f.at(action / K) if action else 0 for f in flops)
        saved = dense.get_total_flops() - counter.get_total_flops()
        assert saved == pytest.approx(sum(f.dense for f in flops) - executed)


def test_adapters_know_their_family(family):
    assert adapter_for(family.build()).family in type(family.build()).__name__
    with pytest.raises(ValueError, match="no routing for Linear"):
        adapter_for(nn.Linear(2, 2))
