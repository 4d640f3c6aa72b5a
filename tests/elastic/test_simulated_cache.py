import pytest
import torch

from elastic3d.elastic.cache import ResidualCache
from elastic3d.elastic.config import BlockCacheConfig, RouterConfig
from elastic3d.training.router import SimulatedCache


def passes(*values: float):
    """Earlier passes, the newest first, of one block with one stream (2,3,4), all of one value."""
    return [{0: (torch.full((2, 3, 4), value),)} for value in values]


@pytest.mark.parametrize("damping", [0.0, 0.8, 1.0])
def test_training_simulates_what_a_cache_would_hold(damping):
    """Row 0 was computed 1, 3 and 4 steps ago, row 1 two and five; every pick against a real cache."""
    ages = torch.tensor([[1, 3, 4], [2, 5, 0]])
    known = passes(1.0, 5.0, 11.0)
    for pick in (0, 1, 2):
        simulated = SimulatedCache(known, ages, torch.full((2, 1), pick), damping)
        found = simulated.residuals(0)[0]
        for row in range(2):
            if ages[row, pick] == 0:
                continue
            cache, now = (
                ResidualCache(BlockCacheConfig(skipped_reuse=True, longest=9, damping=damping), [0.0] * 20),
                10,
            )
            for index in range(2, pick - 1, -1):
                if ages[row, index] > 0:
                    x = torch.zeros(1, 3, 4)
                    step = now - int(ages[row, index])
                    cache.store((0, 0), [0], [step], (x,), (known[index][0][0][:1],))
            [expected] = cache.apply((0, 0), [0], [now], (torch.zeros(1, 3, 4),))
            torch.testing.assert_close(found[row : row + 1], expected)
            assert simulated.age(0)[row] == ages[row, pick] == cache.ages((0, 0), [0], [now])[0]


def test_a_row_that_remembers_nothing_adds_nothing():
    simulated = SimulatedCache(passes(1.0, 5.0), torch.tensor([[1, 2], [1, 2]]), torch.tensor([[-1], [0]]), 1)
    assert simulated.age(0).tolist() == [0, 1]
    assert simulated.residuals(0)[0][0].eq(0).all() and not simulated.residuals(0)[0][1].eq(0).any()


def test_routers_state_the_cache_that_they_were_trained_with():
    assert RouterConfig().cache() == BlockCacheConfig()
    assert RouterConfig(longest=3, damping=0.0).cache() == BlockCacheConfig(
        skipped_reuse=True, longest=3, damping=0.0
    )
