"""Bring a prediction into its ground truth's frame: units, axes and pose, by named options.

`icp` is iterative closest points (Besl and McKay 1992) for a similarity (rotation, uniform scale,
translation; the closed form of each step is Umeyama 1991), started from the 24 rotations of the cube and
continued from the best.
"""

from __future__ import annotations

import itertools

import numpy as np
import trimesh
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from skimage.transform import estimate_transform

from elastic3d.evaluation.metrics import TREE
from elastic3d.evaluation.options import Align, UpAxis
from elastic3d.geometry.normalize import placement_of
from elastic3d.geometry.sampling import sample_surface

Matrix = NDArray[np.float64]

_COARSE_POINTS, _FINE_POINTS = 400, 4000
_COARSE_STEPS, _FINE_STEPS = 12, 40
_PREFER_EARLIER = 0.98  # another start must fit this much better, so that symmetric shapes keep their pose


def align(pred: trimesh.Trimesh, gt: trimesh.Trimesh, how: Align, seed: int = 0) -> trimesh.Trimesh:
    """A copy of `pred` in the frame of `gt`; `pred` itself for `none`. Mirrored shapes are not matched."""
    if how is Align.none:
        return pred
    if how is Align.bbox:
        target = placement_of(gt, 1.0).invert()
        return target.apply(placement_of(pred, 1.0).apply(pred))
    return pred.copy().apply_transform(icp_transform(pred, gt, seed))


def turn_up(mesh: trimesh.Trimesh, up: UpAxis) -> trimesh.Trimesh:
    """A copy whose `up` axis is +Y: (x, y, z) becomes (x, z, -y) for Z up. The mesh itself if Y is up."""
    if up is UpAxis.y:
        return mesh
    turned = np.asarray(mesh.vertices)[:, [0, 2, 1]] * [1, 1, -1]
    return trimesh.Trimesh(turned, mesh.faces, process=False)


def icp_transform(pred: trimesh.Trimesh, gt: trimesh.Trimesh, seed: int = 0) -> Matrix:
    """The similarity (4, 4) that takes the surface of `pred` to that of `gt`. Deterministic for a seed."""
    (source, frame), (target, goal) = (_standard_points(mesh, seed) for mesh in (pred, gt))
    best, best_error = np.eye(4), np.inf
    for start in cube_rotations():
        found, error = _refine(source[:_COARSE_POINTS], target[:_COARSE_POINTS], start, _COARSE_STEPS)
        if error < _PREFER_EARLIER * best_error:
            best, best_error = found, error
    fine, _ = _refine(source, target, best, _FINE_STEPS)
    return np.linalg.inv(goal) @ fine @ frame


def similarity(source: Matrix, target: Matrix) -> Matrix:
    """The least-squares similarity (4, 4) from points (P, 3) to their partners (P, 3), never a reflection.

    ValueError for points that coincide.
    """
    if not np.ptp(source, axis=0).any():
        raise ValueError("no similarity: all points coincide")
    return estimate_transform("similarity", source, target).params


def cube_rotations() -> list[Matrix]:
    """The 24 rotations (4, 4) that keep the coordinate axes, the identity first, turns about Y next."""
    found = []
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1.0, -1.0), repeat=3):
            rotation = np.zeros((3, 3))
            rotation[range(3), order] = signs
            if np.linalg.det(rotation) > 0:
                found.append(_matrix(rotation, np.zeros(3)))
    return sorted(found, key=lambda m: (-m[1, 1], -np.trace(m)))


def _refine(source: Matrix, target: Matrix, start: Matrix, steps: int) -> tuple[Matrix, float]:
    """ICP from `start`, and the mean squared distance in both directions where it ends.

    Pairs are taken in both directions, so that a part can't win by shrinking onto a part of the other.
    """
    transform, tree = start, cKDTree(target, **TREE)
    for step in range(steps + 1):
        moved = _move(source, transform)
        forth, there = tree.query(moved)
        back, here = cKDTree(moved, **TREE).query(target)
        error = float(np.square(forth).mean() + np.square(back).mean())
        if step == steps:
            break
        new = similarity(np.concatenate([source, source[here]]), np.concatenate([target[there], target]))
        change, transform = np.abs(new - transform).max(), new
        if change < 1e-5:
            break
    return transform, error


def _standard_points(mesh: trimesh.Trimesh, seed: int) -> tuple[Matrix, Matrix]:
    """Surface points (P, 3) of centroid 0 and root-mean-square radius 1, which does not depend on the pose, and the
    map (4, 4) of the mesh to there."""
    box = placement_of(mesh, 1.0)  # points are sampled in single precision, too coarse far from the origin
    points = sample_surface(box.apply(mesh), _FINE_POINTS, seed)[0].astype(np.float64)
    mean = points.mean(axis=0)
    radius = np.sqrt(np.square(points - mean).sum(axis=1).mean())
    frame = _matrix(np.eye(3) * box.scale / radius, -(box.center_3 * box.scale + mean) / radius)
    return (points - mean) / radius, frame


def _matrix(linear: Matrix, shift: Matrix) -> Matrix:
    result = np.eye(4)
    result[:3, :3], result[:3, 3] = linear, shift
    return result


def _move(points: Matrix, transform: Matrix) -> Matrix:
    return points @ transform[:3, :3].T + transform[:3, 3]
