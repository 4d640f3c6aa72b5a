import math

import pytest
import torch

from elastic3d.config.routing import BlockCacheConfig, CacheRule, ElasticConfig, RouterConfig, RouterVariant
from elastic3d.routing.cache import ResidualCache

KEY = (1, 0, 2, 0)


def stored(step: int = 0, steps: int = 10, **changes) -> ResidualCache:
    cache = ResidualCache(BlockCacheConfig(**({"rule": CacheRule.band} | changes)), steps)
    x = torch.ones(1, 4, 2)
    cache.store([KEY], step, (x,), (x * 3,))
    return cache


def test_the_band_is_closed_above_the_threshold_and_residuals_die():
    cache = stored(step=2, band=0.1, longest=3)
    for p, expected in ((0.5, False), (0.51, True), (0.6, True), (0.61, False)):
        assert cache.reuse(KEY, 3, p, 0.5, math.inf) is expected
    assert [cache.reuse(KEY, step, 0.55, 0.5, 0) for step in (3, 5, 6)] == [True, True, False]
    assert not cache.reuse((1, 1, 2, 0), 3, 0.55, 0.5, 0)  # the other branch
    assert torch.equal(cache.residuals([KEY], 3)[0], torch.full((1, 4, 2), 2.0))
    assert cache.bytes == 4 * 2 * 4 and len(cache) == 1


def test_nothing_is_reused_before_the_start():
    cache = stored(start=0.3, longest=9)
    assert [cache.reuse(KEY, step, 0.55, 0.5, 0) for step in (2, 3)] == [False, True]


def test_a_residual_goes_on_as_it_changed_while_both_lived():
    cache = stored(step=2, order=1, longest=3)
    x = torch.ones(1, 4, 2)
    assert torch.equal(cache.residuals([KEY], 3)[0], 2 * x)  # of one alone no change is known
    cache.store([KEY], 4, (x,), (x * 4,))
    assert torch.equal(cache.residuals([KEY], 6)[0], (3 + 2 * 0.5) * x)
    assert cache.bytes == 2 * 4 * 2 * 4
    cache.store([KEY], 9, (x,), (x * 4,))  # the one before has died
    assert torch.equal(cache.residuals([KEY], 10)[0], 3 * x)


def test_drift_is_the_relative_change_of_the_input():
    cache = stored(rule=CacheRule.drift, drift=0.2, probe_stride=1)
    drift = cache.drift([KEY, (1, 0, 2, 1)], (torch.full((2, 4, 2), 1.1),))
    assert drift[0] == pytest.approx(0.1, abs=1e-6) and drift[1] == math.inf
    assert cache.reuse(KEY, 1, 0.9, 0.5, 0.1) and not cache.reuse(KEY, 1, 0.9, 0.5, 0.3)
    assert not cache.reuse(KEY, 1, 0.4, 0.5, 0.1)  # a closed block stays closed
    assert stored(rule=CacheRule.drift, closed_reuse=True).reuse(KEY, 1, 0.4, 0.5, 9.0)


def test_by_age_open_blocks_reuse_what_lives():
    cache = stored(step=2, rule=CacheRule.age, longest=1)
    assert [cache.reuse(KEY, step, 0.9, 0.5, 0) for step in (3, 4)] == [True, False]
    assert [cache.age(KEY, step) for step in (3, 4)] == [1, 0]


@pytest.mark.parametrize("build, message", [
    (lambda: BlockCacheConfig(band=-0.1), "cache.band is -0.1, expected a value from 0 to 1"),
    (lambda: BlockCacheConfig(longest=0), "cache.longest is 0"),
    (lambda: BlockCacheConfig(order=2), "cache.order is 2, expected a value from 0 to 1"),
    (lambda: BlockCacheConfig(start=1.5), "cache.start is 1.5"),
    (lambda: BlockCacheConfig(drift=math.nan), "cache.drift is nan"),
    (lambda: ElasticConfig(budget=0.1), "budget is 0.1, expected a value from 0.3 to 1"),
    (lambda: RouterConfig(hidden=0), "hidden is 0"),
    (lambda: RouterConfig(variant=RouterVariant.paper, lookahead="step"), "the paper's router"),
])  # fmt: skip
def test_impossible_numbers_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
