import math

import pytest
import torch

from elastic3d.elastic.cache import ResidualCache
from elastic3d.elastic.config import (
    BlockCacheConfig,
    CacheRule,
    ElasticConfig,
    RouterConfig,
    RouterCurves,
)

KEY = (2, 0)


def together(rows, step: int) -> tuple[list[int], list[int]]:
    """Rows that are all at the same step."""
    return list(rows), [step] * len(rows)


def times(steps: int) -> list[float]:
    return [i / steps for i in range(steps)]


def put(cache: ResidualCache, step: int, values: list[float], rows: list[int] | None = None) -> None:
    """Rows of (4,2) ones come out as one plus their value."""
    rows = list(range(len(values))) if rows is None else rows
    x = torch.ones(len(rows), 4, 2)
    y = x + torch.tensor(values)[:, None, None]
    cache.store(KEY, *together(rows, step), (x,), (y,))


def stored(step: int = 0, steps: int = 10, **changes) -> ResidualCache:
    cache = ResidualCache(BlockCacheConfig(**({"rule": CacheRule.band} | changes)), times(steps))
    put(cache, step, [2.0])
    return cache


def ages(cache: ResidualCache, count: int, step: int, key=KEY) -> list[int]:
    return cache.ages(key, *together(range(count), step))


def reuse(cache: ResidualCache, step: int, p: float) -> bool:
    return cache.reuse(ages(cache, 1, step, KEY)[0], p > 0.5, p, 0.5)


def kept_bytes(cache: ResidualCache) -> int:
    tensors = [t for bank in cache._banks.values() for t in (*bank.newest, *(bank.older or ()))]
    return sum(t.nbytes for t in tensors)


def value(cache: ResidualCache, step: int, row: int = 0) -> float:
    [found] = cache.apply(KEY, *together([row], step), (torch.zeros(1, 4, 2),))
    assert found.shape == (1, 4, 2) and found.min() == found.max()
    return found.max().item()


def test_the_band_ends_at_the_threshold_and_residuals_die():
    cache = stored(step=2, band=0.1, longest=3)
    for p, expected in ((0.5, False), (0.51, True), (0.6, True), (0.61, False)):
        assert reuse(cache, 3, p) is expected
    assert [reuse(cache, step, 0.55) for step in (3, 5, 6)] == [True, True, False]
    assert ages(cache, 1, 3, (2, 1)) == [0]  # the other branch
    assert value(cache, 3) == 2
    assert kept_bytes(cache) == 4 * 2 * 4 and len(cache) == 1


def test_nothing_is_reused_before_the_start():
    cache = stored(start=0.3, longest=9)
    assert [reuse(cache, step, 0.55) for step in (2, 3)] == [False, True]


def test_a_residual_goes_on_as_it_changed_while_both_lived():
    cache = stored(step=2, damping=1.0, longest=3)
    assert value(cache, 3) == 2  # of one alone no change is known
    put(cache, 4, [3.0])
    assert value(cache, 6) == 3 + 2 * 0.5 and ages(cache, 1, 6) == [2]
    assert kept_bytes(cache) == 2 * 4 * 2 * 4
    put(cache, 9, [3.0])  # the one before has died
    assert value(cache, 10) == 3


@pytest.mark.parametrize("damping", [0.0, 0.8, 1.0])
def test_rows_that_are_computed_at_different_steps_stay_separate(damping):
    """Three rows in one batch against a cache of its own for each."""
    config = BlockCacheConfig(skipped_reuse=True, longest=4, damping=damping)
    cache, *alone = (ResidualCache(config, times(20)) for _ in range(4))
    generator = torch.Generator().manual_seed(0)
    for step, rows in enumerate([[0, 2], [0, 1, 2], [1], [0, 2], [2], [0, 1, 2], [0], [], [1, 2]]):
        for row in range(3):
            age = ages(alone[row], 1, step)[0]
            assert ages(cache, 3, step)[row] == age
            if age:
                assert value(cache, step, row) == pytest.approx(value(alone[row], step), abs=1e-5)
        living = [row for row, age in enumerate(ages(cache, 3, step)) if age]
        if living:
            [batched] = cache.apply(KEY, *together(living, step), (torch.zeros(len(living), 4, 2),))
            for place, row in enumerate(living):
                assert batched[place, 0, 0].item() == pytest.approx(value(alone[row], step), abs=1e-5)
        values = torch.randn(3, generator=generator).tolist()
        if rows:
            put(cache, step, [values[row] for row in rows], rows)
        for row in rows:
            put(alone[row], step, [values[row]])
    assert len(cache) == 3 and kept_bytes(cache) == (1 + (damping > 0)) * 3 * 4 * 2 * 4


def test_a_calibrated_damping_changes_over_time():
    """0.5 at time 0.2 and 1.1 at 0.6, linear between, in the place of one for all times."""
    config = BlockCacheConfig(
        skipped_reuse=True, longest=9, damping=0.3, times=[0.2, 0.6], dampings=[0.5, 1.1]
    )
    x = torch.zeros(1, 4, 2)
    for time, damping in ((0.1, 0.5), (0.2, 0.5), (0.4, 0.8), (0.7, 1.1)):
        cache = ResidualCache(config, [0.0, 0.02, 0.04, 0.06, 0.08, time])
        for step in (1, 3):
            cache.store(KEY, [0], [step], (x,), (x + step,))
        expected = 3 + damping + damping**2  # two steps, where the change was one a step
        assert cache.apply(KEY, [0], [5], (x,))[0].max().item() == pytest.approx(expected)


def test_rows_of_a_batch_are_forecast_each_for_its_time():
    config = BlockCacheConfig(skipped_reuse=True, longest=9, times=[0.0, 1.0], dampings=[0.2, 1.1])
    cache, x = ResidualCache(config, times(10)), torch.zeros(2, 4, 2)
    for step in (0, 2):
        cache.store(KEY, [0, 1], [step, step + 1], (x,), (x + step + 1,))
    [found] = cache.apply(KEY, [0, 1], [4, 7], (x,))
    assert not torch.equal(found[0], found[1])
    for row, step in ((0, 4), (1, 7)):
        [alone] = cache.apply(KEY, [row], [step], (x[:1],))
        torch.testing.assert_close(found[row : row + 1], alone)


@pytest.mark.parametrize("forecast", [None, lambda span, stream, step, newest, older: (step / 7, -1 / step)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_is_rounded_alike_whatever_the_others_have(dtype, forecast):
    """Rows whose factors differ, each bit for bit as alone."""
    config = BlockCacheConfig(skipped_reuse=True, longest=9, damping=0.83)
    cache, x = ResidualCache(config, times(20), forecast), torch.randn(2, 3, 64, 32).to(dtype)
    rows, steps = [0, 1, 2], [4, 7, 7]
    cache.store(KEY, rows, [0, 1, 1], (x[0],), (x[1],))
    cache.store(KEY, rows, [3, 3, 3], (x[1],), (x[0] * 2,))
    [found] = cache.apply(KEY, rows, steps, (x[0],))
    assert found.dtype == dtype
    for row, step in zip(rows, steps, strict=True):
        assert torch.equal(found[row], cache.apply(KEY, [row], [step], (x[0, row : row + 1],))[0][0])


def test_by_age_executed_blocks_reuse_what_lives():
    cache = stored(step=2, rule=CacheRule.age, longest=1)
    assert [reuse(cache, step, 0.9) for step in (3, 4)] == [True, False]
    assert [ages(cache, 1, step, KEY) for step in (3, 4)] == [[1], [0]]


@pytest.mark.parametrize("build, message", [
    (lambda: BlockCacheConfig(band=-0.1), "band is -0.1, expected a value from 0 to 1"),
    (lambda: BlockCacheConfig(longest=0), "longest is 0"),
    (lambda: BlockCacheConfig(times=[0.5], dampings=[1.0, 0.5]),
     "times and dampings are no ascending list and one of the same length"),
    (lambda: RouterCurves(damping_times=[0.5, 0.2], dampings=[1.0, 0.5]),
     "damping_times is .* expected values in ascending order"),
    (lambda: BlockCacheConfig(damping=2), "damping is 2, expected a value from 0 to 1"),
    (lambda: BlockCacheConfig(start=1.5), "start is 1.5"),
    (lambda: BlockCacheConfig(damping=math.nan), "damping is nan"),
    (lambda: ElasticConfig(budget=0.1), "budget is 0.1, expected a value from 0.3 to 1"),
    (lambda: RouterConfig(hidden=0), "hidden is 0"),
])  # fmt: skip
def test_impossible_numbers_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
