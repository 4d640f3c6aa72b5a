"""Bootstrap intervals and the sign test: how sure a mean or a difference is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Interval:
    """A mean with its percentile bootstrap interval and the number of values behind it."""

    mean: float
    low: float
    high: float
    count: int


def bootstrap_mean(
    values: ArrayLike, resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Mean of `values` (I,) over items, with its percentile bootstrap interval (Efron 1979).

    Deterministic for a seed. Memory stays bounded: at most about four million indices are drawn at a time.
    Raises ValueError on an empty or non-finite array.
    """
    data = np.asarray(values, dtype=np.float64).ravel()
    if len(data) == 0 or not np.isfinite(data).all():
        raise ValueError(f"values has {len(data)} entries, expected at least one and all finite")
    rng = np.random.default_rng(seed)
    chunk = max(1, 4_000_000 // len(data))
    means = np.concatenate(
        [
            data[rng.integers(len(data), size=(min(chunk, resamples - start), len(data)))].mean(axis=1)
            for start in range(0, resamples, chunk)
        ]
    )
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(data.mean()), float(low), float(high), len(data))


def sign_test(differences: ArrayLike) -> float:
    """Two-sided p-value of the sign test: are positive and negative differences equally likely? Zeros are
    left out.

    1.0 where no difference is left.
    """
    from scipy.stats import binomtest

    data = np.asarray(differences, dtype=np.float64)
    positive, negative = int((data > 0).sum()), int((data < 0).sum())
    if positive + negative == 0:
        return 1.0
    return float(binomtest(positive, positive + negative, 0.5).pvalue)
