"""What every block family owes per-block routers in few steps: whole generations, reuse, few-step LoRA, gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from elastic3d.elastic import attach
from elastic3d.elastic.attachment import router_modules
from elastic3d.elastic.config import ElasticConfig, RouterConfig
from elastic3d.elastic.few_step import LowRankUpdate
from elastic3d.elastic.session import ElasticSession
from elastic3d.elastic.trace import REUSED, SKIPPED, trace_share
from elastic3d.training.routes import FREE, Rollout
from tests.contracts.families import CLOSE, B, Family, K, rows, run

S, SAMPLES = 3, B // 2
# of few-step LoRA and gates that differ between samples, blocks and steps; residuals live for one step
CONFIG = RouterConfig(
    longest=1, damping=0.0, initial_keep=0.5, initial_width_bias=0.0, head_std=3.0,
    few_step_rank=2, few_step_nfe=S, few_step_max_steps=S, trained_steps=[2, S],
)  # fmt: skip


def routed(family: Family, config: RouterConfig = CONFIG) -> tuple[nn.Module, ElasticSession]:
    """A model with such routers, whose gates change over time, and a LoRA that changes something."""
    model = family.model()
    session = attach(model, config)
    torch.manual_seed(5)
    if config.head_std:
        nn.init.normal_(session.conditioner.modulation.weight, std=2.0)
    for part in router_modules(model).modules():
        if isinstance(part, LowRankUpdate):
            nn.init.normal_(part.up, std=0.05)
    return model, session


def generate(
    model: nn.Module,
    session: ElasticSession,
    inputs: dict,
    samples: int = SAMPLES,
    budget: float | None = None,
) -> Tensor:
    """The sum of what the model puts out in S steps with both branches, each step's input being that of the last one
    and what came out. (2 x samples, ...)"""
    session.begin(samples, S, budget)
    first, total = next(iter(inputs)), 0.0
    time = "t" if "t" in inputs else "timestep"
    for step in range(S):
        session.step(step, 1 / S, (0, 1))
        out = run(model, inputs)
        moved = inputs[first] + 0.1 * out.mean(-1, keepdim=True)
        inputs = inputs | {first: moved, time: torch.full_like(inputs[time], (step + 1) / S)}
        total = total + out
    session.end()
    return total


def rollout(routes: Tensor | int = FREE, session: ElasticSession | None = None, **options) -> Rollout:
    blocks = len(session.blocks)
    free = torch.full((SAMPLES, S, 2, blocks), routes) if isinstance(routes, int) else routes
    return Rollout(torch.tensor([1.0, 0.4]), free, **options)


def learned(model, session, inputs, roll: Rollout) -> Tensor:
    with roll.leading(session):
        return generate(model, session, inputs)


@pytest.mark.parametrize("straight", [True, False])
def test_a_rollout_is_the_generation_that_the_routers_make(family, straight):
    model, session = routed(family)
    inputs = family.inputs(B)
    with torch.no_grad():
        expected = generate(model, session, inputs, budget=[1.0, 0.4])
    trace = session.trace
    assert {SKIPPED, REUSED} < set(trace.actions.flatten().tolist()) and (trace.actions > 1).any()
    roll = rollout(session=session, straight=straight)
    found = learned(model, session, inputs, roll)
    torch.testing.assert_close(found, expected, **CLOSE)
    actions = trace.actions.permute(2, 0, 1, 3).clamp_min(SKIPPED).long()
    assert torch.equal(roll.actions(), actions)
    torch.testing.assert_close(roll.share(session.trace).double(), trace_share(trace))


@pytest.mark.parametrize("straight", [True, False])
def test_losses_at_the_end_reach_routers_and_lora_also_with_recomputation(family, straight):
    gradients = []
    for recompute in (False, True):
        model, session = routed(family)
        model.requires_grad_(False)
        session.recompute = recompute
        roll = rollout(session=session, straight=straight)
        loss = learned(model, session, family.inputs(B), roll).square().mean()
        loss = loss + roll.share(session.trace).square().mean()
        if not straight:
            loss = loss - roll.log_likelihood().mean()
        loss.backward()
        gradients.append([p.grad for p in router_modules(model).parameters() if p.grad is not None])
        for block in session.blocks:
            heads = block.router.heads.weight.grad
            assert heads.isfinite().all() and heads[0].abs().max() > 0
        ups = [part.up.grad for part in router_modules(model).modules() if isinstance(part, LowRankUpdate)]
        assert all(g is None or g.isfinite().all() for g in ups)
        assert sum(g is not None and bool(g.any()) for g in ups) > len(ups) // 2
        assert all(p.grad is None for p in model.parameters())
        idle = [name for name, p in router_modules(model).named_parameters() if p.grad is None]
        # nothing reads what the last block of Qwen-Image makes of the text
        last = session.blocks[-1].name.replace(".", "/")
        assert not straight or all(n.startswith(last) and ("add_out" in n or "txt_mlp" in n) for n in idle)
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-3, atol=1e-6)


def test_a_sample_of_a_generation_does_not_depend_on_its_batch_mates(family):
    model, session = routed(family)
    inputs = family.inputs(B)
    with torch.no_grad():
        together = generate(model, session, inputs, budget=[1.0, 0.4])
        actions = session.trace.actions
        assert (actions == REUSED).any()
        again = generate(model, session, inputs, budget=[1.0, 0.4])  # nothing of the first is left
        assert torch.equal(again, together) and torch.equal(session.trace.actions, actions)
        for sample, budget in enumerate((1.0, 0.4)):
            index = [sample, SAMPLES + sample]
            alone = generate(model, session, rows(inputs, index), 1, budget)
            assert torch.equal(session.trace.actions[:, :, 0], actions[:, :, sample])
            torch.testing.assert_close(alone, together[index], **CLOSE)


def test_a_skipped_block_adds_what_it_remembers_or_nothing_and_its_router_knows(family, monkeypatch):
    """Blocks run at the first step only: their residuals stand in at the second, and nothing does at the third."""
    model, session = routed(family)
    inputs = family.inputs(B)
    routes = torch.zeros(SAMPLES, S, 2, len(session.blocks), dtype=torch.long)
    routes[:, 0] = K
    ages: list[list[int]] = []
    for block in session.blocks:
        forward = block.router.forward
        monkeypatch.setattr(
            block.router, "forward", lambda *given, f=forward: ages.append(given[-1].tolist()) or f(*given)
        )
    with torch.no_grad():
        learned(model, session, inputs, rollout(routes, session))
    blocks = len(session.blocks)
    assert ages == [[0] * B] * blocks + [[1] * B] * blocks + [[0] * B] * blocks
    actions = session.trace.actions
    assert (actions[0] == K).all() and (actions[1] == REUSED).all() and (actions[2] == SKIPPED).all()
    with torch.no_grad():
        straight = learned(model, session, inputs, rollout(routes, session, straight=True))
        sliced = learned(model, session, inputs, rollout(routes, session))
    torch.testing.assert_close(straight, sliced, **CLOSE)


def test_the_full_route_without_lora_is_the_dense_model(family):
    model, session = routed(family, RouterConfig(head_std=3.0, initial_keep=0.5, longest=1))
    inputs = family.inputs(B)
    with torch.no_grad(), session.dense():
        session.source = None
        dense = generate(model, session, inputs)
    full = rollout(K, session, straight=True)
    assert torch.equal(learned(model, session, inputs, full), dense)
    assert full.share(session.trace).tolist() == pytest.approx([1.0, 1.0])
    for recompute in (False, True):
        session.recompute = recompute
        assert torch.equal(learned(model, session, inputs, rollout(K, session)), dense)


def test_the_full_route_with_lora_is_the_dense_model_with_adapted_weights(family):
    model, session = routed(family)
    inputs = family.inputs(B)
    with torch.no_grad():
        found = learned(model, session, inputs, rollout(K, session))
        own = dict(model.named_parameters())
        for block in session.blocks:
            for name, weight in block.few_step.adapted(block.inner, session.coarseness).items():
                own[f"{block.name}.{name}"].copy_(weight)
        session.settings = ElasticConfig(elastic=False)
        torch.testing.assert_close(generate(model, session, inputs), found, **CLOSE)


def test_the_likelihood_is_that_of_what_was_executed(family):
    model, session = routed(family, RouterConfig(head_std=0.0, initial_keep=0.6, initial_width_bias=0.0))
    generator = torch.Generator().manual_seed(0)
    routes = torch.randint(0, K + 1, (SAMPLES, S, 2, len(session.blocks)), generator=generator)
    roll = rollout(routes, session)
    with torch.no_grad():
        learned(model, session, family.inputs(B), roll)
    assert torch.equal(roll.actions(), routes)
    chance = torch.where(routes > 0, torch.tensor(0.6 / K), torch.tensor(0.4)).log().mean((1, 2, 3))
    torch.testing.assert_close(roll.log_likelihood(), chance)
