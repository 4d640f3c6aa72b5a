"""Routes without routers: they execute what they are asked for, and the greedy one finds what matters."""

import pytest
import torch

from elastic3d.benchmark.controls import (
    executed_share,
    greedy_static,
    random_routes,
    timestep_routes,
)
from elastic3d.elastic.families import BlockFlops
from elastic3d.elastic.trace import NOT_RUN, REUSED, Trace, parse_actions
from elastic3d.training.routes import action_flops

RATIOS = (0.25, 0.5, 0.75, 1.0)
BLOCKS = [BlockFlops(30, 70), BlockFlops(10, 40), BlockFlops(30, 70), BlockFlops(20, 20)]
TABLE = action_flops(BLOCKS, RATIOS)


@pytest.mark.parametrize("branches", [1, 2, 1.5])  # 1.5: the second one runs at every other step
@pytest.mark.parametrize("share", [0.0, 0.3, 0.65, 1.0])
def test_random_routes_execute_the_share(branches, share):
    ran = torch.ones(20, 2, dtype=torch.long)
    ran[:: 2 if branches == 1.5 else 1, 1] = int(branches == 2)
    costs = ran[..., None, None] * TABLE
    one, two = (random_routes(costs, share, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert set(one.unique().tolist()) <= {0, 4} and not one[ran == 0].any()
    assert torch.equal(one, two) == (share in (0.0, 1.0))
    both = random_routes(costs.sum(1, keepdim=True), share, torch.Generator().manual_seed(0))
    for routes in (one, both.expand(-1, 2, -1)):  # of each branch, or as the conditional one
        played = routes.masked_fill(ran[..., None] == 0, NOT_RUN)
        assert executed_share(played, TABLE) == pytest.approx(share, abs=0.02)


def test_blocks_as_one_are_all_drawn_or_none():
    whole = TABLE.sum(0, keepdim=True).expand(20, 2, -1, -1)
    routes = random_routes(whole, 0.4, torch.Generator().manual_seed(0))
    assert routes.shape == (20, 2, 1) and int((routes > 0).sum()) == 16
    assert executed_share(routes.expand(-1, -1, 4), TABLE) == pytest.approx(0.4)


def test_timestep_routes_keep_what_most_samples_keep():
    actions = torch.zeros(4, 2, 10, 4, dtype=torch.int8)
    actions[:, :, :, 0] = 4  # all samples, always
    actions[:2, 0, :9, 1] = 2  # nine of ten, in the first steps of one branch, half wide
    actions[2:, 1, :5, 2] = 3
    share = executed_share(torch.cat([actions[:, :, :1, :2], 0 * actions[:, :, :1, 2:]], -1), TABLE)
    costs = TABLE.expand(4, 2, -1, -1)
    routes = timestep_routes(actions, costs, share)
    assert (routes[:, :, 0] == 4).all() and (routes[:2, 0, 1] == 2).all() and not routes[:, :, 2:].any()
    assert executed_share(routes, TABLE) == pytest.approx(share)
    more = timestep_routes(actions, costs, 0.6)
    assert (more[2:, 1, 2] == 3).all() and executed_share(more, TABLE) == pytest.approx(0.6, abs=0.03)
    one_branch = actions.clone()
    one_branch[:, 1] = NOT_RUN
    found = timestep_routes(one_branch, costs * torch.tensor([1, 0])[:, None, None], 0.5)
    assert not found[:, 1].any()
    found[:, 1] = NOT_RUN
    assert executed_share(found, TABLE) == pytest.approx(0.5, abs=0.05)


def test_the_greedy_path_gives_up_first_what_matters_least():
    importance = torch.tensor([5.0, 1.0, 0.1, 3.0])
    narrowing_is_free = torch.tensor([True, False, False, False])

    def error(routes):
        lost = torch.where(narrowing_is_free, (routes == 0).double(), 1 - routes / 4)
        return float((importance * lost).sum())

    path = greedy_static(error, TABLE, lowest=0.2)
    shares = [share for share, _ in path]
    assert shares[0] == 1 and shares == sorted(shares, reverse=True) and shares[-1] <= 0.2 < shares[-2]
    for share, routes in path:
        assert executed_share(routes, TABLE) == pytest.approx(share)
    # first the free narrowing of block 0, then block 2, which hardly matters
    assert [routes.tolist() for _, routes in path[1:4]] == [[3, 4, 4, 4], [2, 4, 4, 4], [1, 4, 4, 4]]
    assert path[4][1][2] < 4


def test_actions_survive_being_written():
    trace = Trace(["a", "b", "c"], RATIOS, 2, 1)
    for step in range(2):
        for block, action in enumerate((REUSED, 0, 3 + step)):
            trace.record([(step, 0, 0)], range(block, block + 1), action)
    assert torch.equal(parse_actions(trace.sample(0), 3), trace.actions[:, :, 0].long())
    both = Trace(["a"], tuple((i + 1) / 16 for i in range(16)), 1, 1)
    for branch, action in enumerate((16, 10)):
        both.record([(0, branch, 0)], range(1), action)
    assert parse_actions(both.sample(0), 1).flatten().tolist() == [16, 10]
