"""One decision a step for all blocks, and blocks that decide together."""

import pytest
import torch

from elastic3d.adapters import attach
from elastic3d.config.models import DiTConfig
from elastic3d.config.routing import ElasticConfig, Lookahead, RouterConfig
from elastic3d.diffusion.sampler import sample
from elastic3d.models.shape_dit import ShapeDiT
from elastic3d.routing.decision import RouteDecision


def generated(config: RouterConfig, settings: ElasticConfig, std: float = 5.0):
    torch.manual_seed(0)
    dit = ShapeDiT(
        DiTConfig(in_channels=5, condition_channels=8, width=32, heads=2, double_blocks=1, single_blocks=3)
    )
    session = attach(dit, config)
    for block in session.blocks:
        torch.nn.init.normal_(block.router.heads.weight, std=std)
    session.settings = settings
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    sample(dit, torch.randn(3, 4, 8), (6, 5), 8, 2.0, generators, session=session)
    return session.trace.actions


def test_blocks_that_decide_together_all_run_or_none():
    config = RouterConfig(lookahead=Lookahead.step, common=1e6, longest=3, widths=1, initial_keep=0.5)
    actions = generated(config, ElasticConfig(budget=0.5))
    assert (actions == actions[..., :1]).all()
    assert (actions == -1).any() and (actions[1:] == 1).any()
    apart = generated(
        RouterConfig(lookahead=Lookahead.step, longest=3, initial_keep=0.5), ElasticConfig(budget=0.5)
    )
    assert (apart != apart[..., :1]).any()


def test_a_block_with_nothing_to_reuse_runs_and_none_is_reused_for_longer_than_it_may():
    config = RouterConfig(longest=2, initial_keep=0.01, head_std=0.0)
    actions = generated(config, ElasticConfig(budget=0.5), std=0.0)
    assert (actions[:, 0, 0, 0] > 0).tolist() == [True, False, False, True, False, False, True, False]


def test_decisions_of_all_blocks_are_those_of_each():
    logits = torch.randn(3, 4, 1 + 4)
    each = [RouteDecision.from_logits(own, 0.5) for own in logits]
    together = RouteDecision.from_logits(logits.flatten(0, 1), 0.5).by_block(3)
    for one, other in zip(each, together, strict=True):
        assert torch.equal(one.keep, other.keep) and torch.equal(one.width_prob, other.width_prob)
        assert one.on_host() == other.on_host() and other.host is not None
        assert other.at_full_width().on_host() == one.at_full_width().on_host()


def test_only_blocks_that_look_ahead_decide_together():
    with pytest.raises(ValueError, match="common is 3, expected 0: only with lookahead=step"):
        RouterConfig(common=3)
