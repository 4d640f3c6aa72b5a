"""Paired comparison of two sets of rows: does one method differ from another on the same items?

Fidelity of an accelerated model: score its meshes against the dense model's (`pred` = accelerated, `gt` =
dense, same seeds), and score the dense model's meshes of another seed against the same dense ones (`floor`).
If the first is no worse than the second, the acceleration changes a mesh no more than another seed does: it
is inside the noise floor. Quality against real ground truth works the same way, with the dense model's rows
as the `baseline`.

The difference is taken item by item, averaged over the seeds of one sample (names such as `seed1/chair` and
`seed2/chair` are one sample, `chair`), and its interval is a bootstrap over samples (paired bootstrap, Efron
and Tibshirani 1993), with a two-sided sign test beside it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

import numpy as np

from elastic3d.errors import UserError
from elastic3d.evaluation.items import Row
from elastic3d.evaluation.statistics import Interval, bootstrap_mean, sign_test

LOWER_IS_BETTER = ("chamfer_l1", "chamfer_l2", "hausdorff", "sharp_normal_error", "lpips", "feature")
HIGHER_IS_BETTER = (
    "f_score@",
    "normal_consistency",
    "volume_iou",
    "near_iou",
    "silhouette_iou",
    "normal_psnr",
    "normal_ssim",
    "psnr",
    "ssim",
)


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

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self)


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
    metric: str, pred: Sequence[Row], rivals: Sequence[Sequence[Row]], kind: Rival, resamples: int
) -> Comparison | None:
    """The paired comparison of one metric; None where no item has it on both sides."""
    sign = direction(metric)
    assert sign is not None
    mine = _values(pred, metric)
    theirs: dict[str, list[float]] = defaultdict(list)
    for rows in rivals:
        for name, value in _values(rows, metric).items():
            theirs[name].append(value)
    samples: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for name in sorted(mine.keys() & theirs.keys()):
        samples[name.rpartition("/")[2]].append((mine[name], float(np.mean(theirs[name]))))
    if not samples:
        return None
    means = np.array([np.mean(pairs, axis=0) for pairs in samples.values()])  # (samples, 2)
    worse = sign * (means[:, 0] - means[:, 1])
    interval = bootstrap_mean(worse, resamples)
    return Comparison(
        metric=metric,
        pred=float(means[:, 0].mean()),
        rival=float(means[:, 1].mean()),
        worse_by=interval,
        p_value=sign_test(worse),
        verdict=verdict(interval, kind),
    )


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
    """Comparisons, as `Comparison.as_dict` gives them, as text for a terminal."""
    lines = [f"{'metric':<20}{'predictions':>14}{kind.value:>14}{'sign test p':>13}  verdict"]
    for c in comparisons:
        numbers = f"{c['pred']:>14.5g}{c['rival']:>14.5g}{c['p_value']:>13.3g}"
        lines.append(f"{c['metric']:<20}{numbers}  {c['verdict']}")
    return "\n".join(lines)


def _values(rows: Sequence[Row], metric: str) -> dict[str, float]:
    return {row["name"]: float(row[metric]) for row in rows if row.get(metric) is not None}
