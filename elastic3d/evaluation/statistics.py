"""How sure a mean or a difference is: bootstrap intervals, the sign test, the paired comparison of two sets of rows.

Fidelity of an accelerated model: score its meshes against the dense model's (`pred` = accelerated, `gt` =
dense, same seeds), and score the dense model's meshes of another seed against the same dense ones (`floor`).
If the first is no worse than the second, the acceleration changes a mesh no more than another seed does: it
is inside the noise floor. Quality against real ground truth works the same way, with the dense model's rows
as the `baseline`.

The difference is taken item by item, averaged over the seeds of one sample (names such as `seed1/chair` and
`seed2/chair` are one sample, `chair`; other folders, as of categories, are part of a sample's name), and its
interval is a bootstrap over samples (paired bootstrap, Efron and Tibshirani 1993), with a two-sided sign test
beside it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from elastic3d.errors import UserError

Row = dict[str, Any]  # of an item: `name`, `status`, and a value for each score
LOWER_IS_BETTER = ("chamfer_l1", "chamfer_l2", "hausdorff", "sharp_normal_error", "lpips", "feature")
HIGHER_IS_BETTER = (
    "f_score@", "normal_consistency", "volume_iou", "near_iou", "silhouette_iou", "normal_psnr", "normal_ssim", "psnr",
    "ssim",
)  # fmt: skip


_SEED_FOLDER = re.compile(r"seed[-_ ]?\d+", re.IGNORECASE)


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
    sizes = [(min(chunk, resamples - start), len(data)) for start in range(0, resamples, chunk)]
    means = np.concatenate([data[rng.integers(len(data), size=size)].mean(axis=1) for size in sizes])
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(data.mean()), float(low), float(high), len(data))


def sign_test(differences: ArrayLike) -> float:
    """Two-sided p-value of the sign test: are positive and negative differences equally likely? Zeros are left out; 1.0
    where no difference is left."""
    from scipy.stats import binomtest

    data = np.asarray(differences, dtype=np.float64)
    positive, negative = int((data > 0).sum()), int((data < 0).sum())
    if positive + negative == 0:
        return 1.0
    return float(binomtest(positive, positive + negative, 0.5).pvalue)


class Rival(Enum):
    """What the predictions are compared with: another seed's noise, or another method."""

    floor = "noise floor"
    baseline = "baseline"


@dataclass(frozen=True)
class Comparison:
    """One metric of the predictions beside the rival's, both against the same ground truth.

    `worse_by` is the mean paired difference in the bad direction of the metric (above 0: the predictions are
    worse), with its interval. `p_value` is the sign test's.
    """

    metric: str
    pred: float
    rival: float
    worse_by: Interval
    p_value: float
    verdict: str


def averages(rows: Iterable[Row], metric: str, of: Callable[[str], str] = str) -> dict[str, float]:
    """The metric of rows that have it, averaged by their names, or by what is a part `of` those."""
    found: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row.get(metric) is not None:
            found[of(row["name"])].append(float(row[metric]))
    return {name: float(np.mean(values)) for name, values in found.items()}


def sample_of(name: str) -> str:
    """The sample in names such as `seed1/toys/car` and `seed-2/toys/car`: `toys/car`."""
    *folders, stem = name.split("/")
    return "/".join([*(folder for folder in folders if not _SEED_FOLDER.fullmatch(folder)), stem])


def direction(metric: str) -> int | None:
    """1 where a higher value is worse, -1 where a lower one is, None for what is no score."""
    if metric in LOWER_IS_BETTER:
        return 1
    return -1 if metric.startswith(HIGHER_IS_BETTER) else None


def compare(
    pred: Sequence[Row], rivals: Sequence[Sequence[Row]], kind: Rival, resamples: int = 2000
) -> list[Comparison]:
    """Compare every score that the rows share. `rivals` are one or more runs (seeds), averaged item by item.

    A failed row takes part with the scores it carries (those of an empty prediction).

    Raises:
        UserError: no name is in the predictions and in a rival.
    """
    names = {row["name"] for row in pred} & {row["name"] for rows in rivals for row in rows}
    if not names:
        raise UserError(
            f"the predictions and the {kind.value} have no name in common, expected the same file names"
        )
    metrics = {key: None for row in pred for key in row if direction(key) is not None}
    found = (compare_metric(metric, pred, rivals, kind, resamples) for metric in metrics)
    return [comparison for comparison in found if comparison is not None]


def compare_metric(
    metric: str, pred: Sequence[Row], rivals: Sequence[Sequence[Row]], kind: Rival, resamples: int = 2000
) -> Comparison | None:
    """The paired comparison of one metric; None where no item has it on both sides."""
    sign = direction(metric)
    assert sign is not None
    mine, theirs = averages(pred, metric), averages(chain.from_iterable(rivals), metric)
    samples: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for name in sorted(mine.keys() & theirs.keys()):
        samples[sample_of(name)].append((mine[name], theirs[name]))
    if not samples:
        return None
    means = np.array([np.mean(pairs, axis=0) for pairs in samples.values()])  # (samples, 2)
    worse = sign * (means[:, 0] - means[:, 1])
    interval, (own, other) = bootstrap_mean(worse, resamples), means.T
    both = float(own.mean()), float(other.mean())
    return Comparison(metric, *both, interval, sign_test(worse), verdict(interval, kind))


def verdict(worse_by: Interval, kind: Rival) -> str:
    """One plain phrase; the number after +- is half of the interval."""
    half = f"+- {(worse_by.high - worse_by.low) / 2:.2g}"
    if worse_by.low > 0:
        return f"worse by {worse_by.mean:.3g} {half}"
    if kind is Rival.floor and worse_by.high <= 0:
        return "inside the noise floor"
    if worse_by.high < 0:
        return f"better by {-worse_by.mean:.3g} {half}"
    if worse_by.low == worse_by.high == 0:
        return "equal"
    tendency = "worse" if worse_by.mean > 0 else "better"
    return f"not told apart from the {kind.value} ({tendency} by {abs(worse_by.mean):.3g} {half})"


def comparison_table(comparisons: Sequence[dict[str, Any]], kind: Rival) -> str:
    """Comparisons, each as a dict, as text for a terminal."""
    if not comparisons:
        return f"{kind.value}: none of its meshes could be scored, so nothing is compared"
    lines = [f"{'metric':<20}{'predictions':>14}{kind.value:>14}{'sign test p':>13}  verdict"]
    for c in comparisons:
        numbers = f"{c['pred']:>14.5g}{c['rival']:>14.5g}{c['p_value']:>13.3g}"
        lines.append(f"{c['metric']:<20}{numbers}  {c['verdict']}")
    return "\n".join(lines)
