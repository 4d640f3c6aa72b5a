"""What every block family owes the routing code: exactness, bypass, independence of rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elastic3d.benchmark.controls import TableRoutes
from elastic3d.elastic import attach, detach
from elastic3d.elastic.attachment import router_state
from elastic3d.elastic.config import (
    ElasticConfig,
    RouterConfig,
    Scope,
)
from tests.contracts.families import (
    CLOSE,
    CONDITIONAL,
    B,
    K,
    begin,
    forward,
    random_table,
    rows,
    run,
    table,
    train_forward,
)


@pytest.mark.parametrize("config", [RouterConfig(), RouterConfig(scope=Scope.step)])
def test_everything_kept_at_full_width_is_the_base_model_exactly(family, config):
    model, inputs = family.model(), family.inputs(B)
    with torch.no_grad():
        base = run(model, inputs)
    session = attach(model, config)  # every block runs at the start
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
    classes = [type(module) for module in model.modules()]
    session = attach(model)
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_parameters()] == names  # routers are no part of the model
    assert [name for name, _ in model.named_modules()] == modules
    assert [type(module) for module in model.modules()] == classes
    assert len(router_state(model)) == 4 * len(session.blocks) + len(session.conditioner.state_dict())
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
        monkeypatch.setattr(block, "forward", called)
    begin(session)
    session.source = table(session, 0)
    skipped = forward(model, session, inputs)
    monkeypatch.undo()
    for block in session.blocks:  # bypass: a block whose output is its input
        adapter = block.adapter
        monkeypatch.setattr(block, "forward", lambda *args, adapter=adapter, inner=block.inner, **kwargs:
                            adapter.pack(adapter.bind(inner, args, kwargs).streams))  # fmt: skip
    session.settings = ElasticConfig(elastic=False)
    with torch.no_grad():
        assert torch.equal(skipped, run(model, inputs))


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6))
def test_random_routes_sliced_masked_and_alone_agree(family, seed):
    model, inputs = family.model(), family.inputs(B)
    session = attach(model)
    session.source = random_table(session, seed)
    begin(session)
    sliced = forward(model, session, inputs)
    session.step(0, 0.1, CONDITIONAL)
    session.current.training = True
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


def test_in_bf16_a_row_alone_is_what_it_is_in_a_batch(family):
    """Also in the dense model: a batch of one must not take kernels that round otherwise."""
    model, inputs = family.model().to(torch.bfloat16), family.inputs(B)
    inputs = {
        k: v.bfloat16() if torch.is_tensor(v) and v.dtype is torch.float32 else v for k, v in inputs.items()
    }
    with torch.no_grad():
        together = run(model, inputs).float()
        for b in range(B):
            alone = run(model, rows(inputs, [b])).float()[0]
            assert (alone - together[b]).square().sum() < 2e-5 * together[b].square().sum()
