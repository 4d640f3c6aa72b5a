"""Set metrics against brute force and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import trimesh
from scipy.linalg import sqrtm

from elastic3d.evaluation import metrics, sets


def clouds(count: int, shift: float, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.random((rng.integers(20, 40), 3)) + shift * rng.random(3) for _ in range(count)]


def test_chamfer_matrix_equals_the_pair_metric() -> None:
    first, second = clouds(4, 1, 0), clouds(3, 1, 1)
    expected = [[metrics.chamfer_l2(metrics.correspond(a, b)) for b in second] for a in first]
    assert sets.chamfer_matrix(first, second) == pytest.approx(np.array(expected))
    square = sets.chamfer_matrix(first, first)
    assert square == pytest.approx(sets.chamfer_matrix(first, list(first)))


def test_scores_equal_a_naive_count() -> None:
    generated, reference = clouds(7, 1, 2), clouds(5, 1, 3)

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        return metrics.chamfer_l2(metrics.correspond(a, b))

    mmd = np.mean([min(distance(g, r) for g in generated) for r in reference])
    matched = {min(range(5), key=lambda r: distance(g, reference[r])) for g in generated}
    everything = [(g, True) for g in generated] + [(r, False) for r in reference]
    hits = []
    for index, (shape, label) in enumerate(everything):
        others = [(distance(shape, other), kind) for j, (other, kind) in enumerate(everything) if j != index]
        hits.append(min(others, key=lambda pair: pair[0])[1] == label)
    scores = sets.set_scores(generated, reference)
    assert scores.mmd == pytest.approx(mmd)
    assert scores.coverage == len(matched) / 5
    assert scores.one_nna == pytest.approx(np.mean(hits))


def test_extremes() -> None:
    reference = clouds(6, 0.5, 4)
    copies = sets.set_scores(reference, reference)
    assert (copies.mmd, copies.coverage) == (0, 1)
    assert copies.one_nna == 0  # each shape's twin carries the other label
    collapsed = sets.set_scores([reference[0]] * 6, reference)
    assert collapsed.coverage == pytest.approx(1 / 6)
    far = sets.set_scores([cloud + 100 for cloud in clouds(6, 0.5, 5)], reference)
    assert far.one_nna == 1
    with pytest.raises(ValueError, match="0 generated"):
        sets.set_scores([], reference)


def test_one_nna_of_one_distribution_is_a_half() -> None:
    scores = sets.set_scores(clouds(60, 1, 6), clouds(60, 1, 7))
    assert 0.35 < scores.one_nna < 0.65


def test_frechet_distance_equals_the_formula() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((50, 6)), rng.standard_normal((40, 6)) @ rng.random((6, 6)) + 1
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(
        cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real
    )
    assert sets.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert sets.frechet_distance(a, b) == pytest.approx(sets.frechet_distance(b, a), rel=1e-6)
    assert sets.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert sets.frechet_distance(a, a + 2) == pytest.approx(6 * 4)


@pytest.mark.parametrize(("rows", "more"), [(4, 5), (4, 40), (40, 4)])
def test_frechet_distance_of_few_rows_equals_the_formula(rows: int, more: int) -> None:
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal((rows, 6)), 2 * rng.standard_normal((more, 6)) + 1
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    roots = np.sqrt(np.clip(np.linalg.eigvals(cov_a @ cov_b).real, 0, None))
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a + cov_b) - 2 * roots.sum()
    assert sets.frechet_distance(a, b) == pytest.approx(expected, rel=1e-5)


def test_frechet_distance_works_with_fewer_samples_than_features() -> None:
    a = np.random.default_rng(1).standard_normal((5, 30))
    assert sets.frechet_distance(a, a + 1) == pytest.approx(30, abs=1e-4)


def test_kernel_distance_equals_the_sum() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((6, 4)), rng.standard_normal((5, 4)) + 0.5

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / 4 + 1) ** 3)

    within_a = np.mean([kernel(a[i], a[j]) for i in range(6) for j in range(6) if i != j])
    within_b = np.mean([kernel(b[i], b[j]) for i in range(5) for j in range(5) if i != j])
    across = np.mean([kernel(x, y) for x in a for y in b])
    assert sets.kernel_distance(a, b) == pytest.approx(within_a + within_b - 2 * across)


def test_kernel_distance_of_one_distribution_is_near_zero() -> None:
    rng = np.random.default_rng(3)
    same = [sets.kernel_distance(*rng.standard_normal((2, 60, 8))) for _ in range(30)]
    assert abs(np.mean(same)) < 3 * np.std(same) / np.sqrt(30)
    assert sets.kernel_distance(rng.standard_normal((60, 8)), rng.standard_normal((60, 8)) + 1) > 10 * np.std(
        same
    )


@pytest.mark.parametrize("distance", [sets.frechet_distance, sets.kernel_distance])
def test_bad_features_raise(distance: object) -> None:
    good = np.zeros((3, 4))
    for bad in (np.zeros((1, 4)), np.zeros((3, 5)), np.zeros(4)):
        with pytest.raises(ValueError, match="expected"):
            distance(good, bad)  # type: ignore[operator]


def test_shapes_are_compared_in_their_own_frame() -> None:
    box = trimesh.creation.box((1, 2, 3))
    moved = box.copy().apply_scale(7).apply_translation([5, 5, 5])
    assert sets.shape_points(moved, 500) == pytest.approx(sets.shape_points(box, 500), abs=1e-5)
    features = sets.view_features(
        box, lambda images: images.reshape(len(images), -1).mean(1, keepdims=True), 4, 32
    )
    assert features.shape == (4, 1)
