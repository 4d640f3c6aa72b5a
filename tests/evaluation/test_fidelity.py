"""Verdicts of the paired comparison on rows with known differences."""

from __future__ import annotations

import numpy as np
import pytest

from elastic3d.errors import UserError
from elastic3d.evaluation.statistics import Interval, Rival, Row, compare, direction, sample_of, verdict


def rows(chamfer: np.ndarray, prefix: str = "") -> list[Row]:
    return [
        {
            "name": f"{prefix}{i}",
            "status": "ok",
            "seconds": 1.0,
            "chamfer_l1": float(v),
            "f_score@0.02": 1 - float(v),
        }
        for i, v in enumerate(chamfer)
    ]


@pytest.fixture
def floor() -> np.ndarray:
    return np.random.default_rng(0).uniform(0.1, 0.2, 40)


def test_clearly_below_the_floor_is_inside(floor: np.ndarray) -> None:
    found = compare(rows(0.5 * floor), [rows(floor)], Rival.floor)
    assert [c.metric for c in found] == ["chamfer_l1", "f_score@0.02"]
    assert {c.verdict for c in found} == {"inside the noise floor"}
    assert all(c.p_value < 1e-6 and c.worse_by.mean < 0 for c in found)


def test_a_constant_loss_is_worse_by_that_much(floor: np.ndarray) -> None:
    noise = np.random.default_rng(1).normal(0, 0.005, 40)
    for comparison in compare(rows(floor + 0.03 + noise), [rows(floor)], Rival.floor):
        assert comparison.verdict.startswith("worse by 0.0")
        assert comparison.worse_by.mean == pytest.approx(0.03 + noise.mean())
        assert comparison.worse_by.low < 0.03 + noise.mean() < comparison.worse_by.high


def test_pure_noise_is_not_told_apart(floor: np.ndarray) -> None:
    other = np.random.default_rng(7).permutation(floor)
    for kind in Rival:
        assert compare(rows(other), [rows(floor)], kind)[0].verdict.startswith(
            f"not told apart from the {kind.value}"
        )


def test_pairing_finds_what_unpaired_means_hide(floor: np.ndarray) -> None:
    """A loss of a tenth of the spread between items is certain once items are paired."""
    spread = floor * 10
    (comparison, _) = compare(rows(spread + 0.03), [rows(spread)], Rival.baseline)
    assert comparison.verdict.startswith("worse by 0.03 +- ")
    assert comparison.p_value == pytest.approx(2 * 0.5**40)


def test_several_floor_seeds_are_averaged(floor: np.ndarray) -> None:
    (one, _) = compare(rows(floor), [rows(floor - 0.02), rows(floor + 0.02)], Rival.floor)
    assert one.worse_by.mean == pytest.approx(0)
    assert one.rival == pytest.approx(floor.mean())


def test_seeds_of_one_sample_count_once(floor: np.ndarray) -> None:
    """Copies of the same evidence under other seeds do not make the interval narrower."""
    worse = floor + np.random.default_rng(2).normal(0.01, 0.03, 40)
    once = compare(rows(worse), [rows(floor)], Rival.floor)[0]
    thrice_pred = [row for seed in range(3) for row in rows(worse, f"seed{seed}/")]
    thrice_floor = [row for seed in range(3) for row in rows(floor, f"seed{seed}/")]
    thrice = compare(thrice_pred, [thrice_floor], Rival.floor)[0]
    assert thrice.worse_by.count == 40
    assert (thrice.worse_by.high, thrice.p_value) == pytest.approx((once.worse_by.high, once.p_value))


def test_folders_that_are_no_seeds_tell_samples_apart(floor: np.ndarray) -> None:
    """As where every category numbers its shapes, or every shape is a `model` in a folder of its own."""
    noise = np.random.default_rng(3).normal(0.0, 0.01, 40)
    pred, other = ([row for half in (v[:20], v[20:]) for row in rows(half)] for v in (floor + noise, floor))
    for row, category in zip([*pred, *other], 2 * (20 * ["chair"] + 20 * ["table"]), strict=True):
        row["name"] = f"{category}/{row['name']}"
    assert compare(pred, [other], Rival.floor)[0].worse_by.count == 40
    for row in (*pred, *other):
        row["name"] += "/model"
    (found, _) = compare(pred, [other], Rival.floor)
    assert found.worse_by.count == 40
    assert found.verdict.startswith("not told apart")
    assert sample_of("Seed-2/chair/0/seed1") == "chair/0/seed1"


def test_failures_count_against_the_predictions(floor: np.ndarray) -> None:
    good, bad = rows(floor), rows(floor)
    for row in bad[:20]:
        row |= {"status": "failed", "chamfer_l1": 2.0, "f_score@0.02": 0.0}
    assert compare(bad, [good], Rival.baseline)[0].verdict.startswith("worse by 0.9")


def test_rows_without_a_value_and_unknown_names_are_left_out(floor: np.ndarray) -> None:
    pred = rows(floor)
    pred[0]["chamfer_l1"] = None
    found = compare(pred, [rows(floor[:10])], Rival.baseline)
    assert (found[0].worse_by.count, found[1].worse_by.count) == (9, 10)
    assert found[0].verdict == "equal"
    with pytest.raises(UserError, match="no name in common"):
        compare(pred, [rows(floor, "other/x")], Rival.floor)


def test_directions() -> None:
    assert (direction("chamfer_l2"), direction("f_score@0.05"), direction("components")) == (1, -1, None)


def test_better_than_a_baseline() -> None:
    assert verdict(Interval(-0.2, -0.3, -0.1, 9), Rival.baseline) == "better by 0.2 +- 0.1"
    assert verdict(Interval(-0.1, -0.2, 0.0, 9), Rival.baseline).startswith("not told apart")
