"""Metrics of a set of generated shapes, or the features of images, against a set of references.

G generated shapes, R reference shapes, P points a shape, D features of an image.

Sources: minimum matching distance and coverage as in Achlioptas et al. 2018, "Learning Representations and
Generative Models for 3D Point Clouds"; 1-NNA as in Yang et al. 2019, "PointFlow" (after Lopez-Paz and Oquab
2017), all with the squared Chamfer distance (`chamfer_l2`) as there; Frechet distance as in Heusel et al.
2017 (FID); kernel distance as in Binkowski et al. 2018 (KID).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import trimesh
from scipy.spatial import cKDTree

from elastic3d.evaluation.metrics import TREE, Floats
from elastic3d.evaluation.views import fixed_cameras, on_white
from elastic3d.geometry.normalize import normalize_mesh
from elastic3d.geometry.render import Scene
from elastic3d.geometry.sampling import sample_surface

if TYPE_CHECKING:
    from torch import Tensor

Features = Callable[[Floats], Floats]  # images (V, H, W, 3) in [0, 1] to features (V, D)


@dataclass(frozen=True)
class SetScores:
    """`mmd` in squared units of the points (lower is better), `coverage` in [0, 1] (higher), `one_nna` in [0,
    1] (0.5 is best: the two sets can't be told apart)."""

    mmd: float
    coverage: float
    one_nna: float


def set_scores(generated: Sequence[Floats], reference: Sequence[Floats]) -> SetScores:
    """Score point sets, each (P, 3), normalised as the caller wishes. ValueError if either set is empty."""
    if not generated or not reference:
        raise ValueError(
            f"{len(generated)} generated and {len(reference)} reference shapes, expected one or more"
        )
    shapes = [*generated, *reference]
    return scores_from_distances(chamfer_matrix(shapes, shapes), len(generated))


def chamfer_matrix(first: Sequence[Floats], second: Sequence[Floats]) -> Floats:
    """`chamfer_l2` between every shape of `first` and every one of `second`, (len(first), len(second))."""
    first_trees, second_trees = ([cKDTree(points, **TREE) for points in shapes] for shapes in (first, second))
    same = first is second
    result = np.zeros((len(first), len(second)))

    def fill(row: int) -> None:
        for column in range(row + 1 if same else 0, len(second)):
            forth, _ = second_trees[column].query(first_trees[row].data)
            back, _ = first_trees[row].query(second_trees[column].data)
            result[row, column] = np.square(forth).mean() + np.square(back).mean()

    with ThreadPoolExecutor() as pool:
        list(pool.map(fill, range(len(first))))
    return result + result.T if same else result


def scores_from_distances(distances: Floats, generated: int) -> SetScores:
    """MMD, COV and 1-NNA from the distances (G+R, G+R) between all shapes, the G generated ones first.

    MMD: mean over references of the distance to the nearest generated shape. COV: share of references that are the
    nearest one of some generated shape. 1-NNA: accuracy of telling the two sets apart by the nearest other shape.
    """
    across = distances[:generated, generated:]  # (G, R)
    others = distances + np.diag(np.full(len(distances), np.inf))
    is_generated = np.arange(len(distances)) < generated
    return SetScores(
        mmd=float(across.min(axis=0).mean()),
        coverage=len(np.unique(across.argmin(axis=1))) / across.shape[1],
        one_nna=float((is_generated[others.argmin(axis=1)] == is_generated).mean()),
    )


def shape_points(mesh: trimesh.Trimesh, count: int = 2048, seed: int = 0) -> Floats:
    """Surface points (P, 3) of a mesh in its own normalised frame: longest side from -1 to 1."""
    normalised, _ = normalize_mesh(mesh, half_extent=1.0)
    return sample_surface(normalised, count, seed)[0]


def view_features(mesh: trimesh.Trimesh, features: Features, views: int = 8, size: int = 224) -> Floats:
    """Image features (V, D) of a mesh's shaded views on white, in its own normalised frame."""
    normalised, _ = normalize_mesh(mesh, half_extent=1.0)
    scene = Scene(normalised)
    return features(np.stack([on_white(scene.render(camera, size)) for camera in fixed_cameras(views)]))


def frechet_distance(first: Floats, second: Floats) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of the features (N1, D) and (N2, D), with unbiased covariances.

    ValueError unless each set has two rows or more and both have D columns.
    """
    _check_features(first, second)
    a, b = first.astype(np.float64), second.astype(np.float64)
    offset = np.square(a.mean(axis=0) - b.mean(axis=0)).sum()
    a, b = ((x - x.mean(axis=0)) / np.sqrt(len(x) - 1) for x in (a, b))  # C1 = a^T a, C2 = b^T b
    if min(len(a), len(b)) <= a.shape[1]:
        # C1 C2 has the squared singular values of a b^T as its eigenvalues, and zeros
        cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    else:
        values, vectors = np.linalg.eigh(a.T @ a)
        root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
        cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ (b.T @ b) @ root), 0, None)).sum()
    return float(max(offset + np.square(a).sum() + np.square(b).sum() - 2 * cross, 0.0))


def kernel_distance(first: Floats, second: Floats) -> float:
    """Unbiased squared MMD with the kernel (x.y / D + 1)^3 between features (N1, D) and (N2, D); may be below 0."""
    _check_features(first, second)
    a, b = first.astype(np.float64), second.astype(np.float64)

    def kernel(x: Floats, y: Floats) -> Floats:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: Floats) -> float:
        gram = kernel(x, x)
        return float((gram.sum() - np.trace(gram)) / (len(x) * (len(x) - 1)))

    return within(a) + within(b) - 2 * float(kernel(a, b).mean())


def _check_features(first: Floats, second: Floats) -> None:
    for name, features in (("first", first), ("second", second)):
        if features.ndim != 2 or len(features) < 2 or features.shape[1] != first.shape[-1]:
            raise ValueError(
                f"{name} has shape {features.shape}, expected (N, D) with N at least 2 and one D for both"
            )


@dataclass(frozen=True)
class Probe:
    """A linear classifier on frozen features: standardised, times `weight` (D,K), plus `bias` (K,), for K classes."""

    classes: list[str]
    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor

    def predict(self, features: Floats) -> list[str]:
        """Features (N,D) -> the likeliest class of each."""
        import torch

        x = (torch.from_numpy(np.asarray(features, dtype=np.float32)) - self.mean) / self.scale
        return [self.classes[i] for i in (x @ self.weight + self.bias).argmax(dim=1).tolist()]

    def accuracy(self, features: Floats, labels: Sequence[str | None]) -> float | None:
        """Share of the rows with a label that is a class of which it is found; None where there is no such row."""
        known = [i for i, label in enumerate(labels) if label in self.classes]
        if not known:
            return None
        found = self.predict(features[known])
        return float(np.mean([labels[i] == guess for i, guess in zip(known, found, strict=True)]))


def fit_probe(features: Floats, labels: Sequence[str], decay: float = 1e-3, steps: int = 200) -> Probe:
    """Logistic regression of N labels on features (N,D) by L-BFGS; `decay` times half the squared weights is added to
    the mean loss. Deterministic: it is convex, and starts at zero. ValueError with fewer than two classes, or where
    the numbers differ."""
    import torch

    classes = sorted(set(labels))
    if len(classes) < 2 or len(labels) != len(features):
        raise ValueError(
            f"{len(features)} rows, {len(labels)} labels of {len(classes)} classes: expected 2 or more"
        )
    x = torch.from_numpy(np.asarray(features, dtype=np.float32))
    mean, scale = x.mean(dim=0), x.std(dim=0).clamp_min(1e-6)
    x = (x - mean) / scale
    y = torch.tensor([classes.index(label) for label in labels])
    weight = torch.zeros(x.shape[1], len(classes), requires_grad=True)
    bias = torch.zeros(len(classes), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(x @ weight + bias, y) + decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return Probe(classes, mean, scale, weight.detach(), bias.detach())
