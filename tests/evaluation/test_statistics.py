"""Bootstrap intervals and the sign test."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest

from elastic3d.evaluation.statistics import bootstrap_mean, sign_test


def test_interval_of_a_mean_is_that_of_the_normal_distribution() -> None:
    values = np.random.default_rng(0).normal(3, 2, 400)
    interval = bootstrap_mean(values, resamples=4000)
    half = 1.96 * values.std() / np.sqrt(400)
    assert interval.mean == pytest.approx(values.mean())
    assert interval.count == 400
    assert interval.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_interval_is_deterministic_and_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    samples = rng.exponential(1.0, (200, 60))
    intervals = [bootstrap_mean(sample, resamples=500) for sample in samples]
    assert 0.88 <= np.mean([i.low <= 1 <= i.high for i in intervals]) <= 0.98
    assert bootstrap_mean(samples[0], 500) == intervals[0]


def test_one_value_has_no_spread() -> None:
    assert bootstrap_mean([0.5]).low == bootstrap_mean([0.5]).high == 0.5


@pytest.mark.parametrize("values", [[], [1.0, float("nan")]])
def test_bad_values_raise(values: list[float]) -> None:
    with pytest.raises(ValueError, match="expected at least one"):
        bootstrap_mean(values)


@pytest.mark.parametrize("positive", [0, 3, 5, 10])
def test_sign_test_is_the_binomial_tail(positive: int) -> None:
    differences = np.array([0.1] * positive + [-0.2] * (10 - positive) + [0.0] * 4)
    at_least_as_far = [k for k in range(11) if abs(k - 5) >= abs(positive - 5)]
    expected = sum(comb(10, k) for k in at_least_as_far) / 2**10
    assert sign_test(differences) == pytest.approx(expected)


def test_sign_test_of_no_difference_is_one() -> None:
    assert sign_test([0.0, 0.0]) == 1.0
