"""Iso-surface of a sampled field by well-kept libraries, placed exactly and wound outwards."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import torch
import trimesh

from elastic3d.errors import NoSurfaceError, UserError
from elastic3d.geometry.options import BOX, SurfaceMethod

MANY_FACES = 1_000_000  # take about three seconds to reduce


def extract_surface(
    field: np.ndarray | torch.Tensor,
    box: float = BOX,
    method: SurfaceMethod | str = SurfaceMethod.skimage,
    closed: bool = True,
) -> trimesh.Trimesh:
    """Mesh of the zero level of a field sampled at grid nodes, with faces wound outwards.

    Args:
        field: (R+1, R+1, R+1) values indexed [x, y, z], positive inside; node i is at -box + 2 box i / R.
        box: half side of the cube that the nodes span.
        method: the library that does it.
        closed: end a solid that leaves the cube at the cube's face, so that the mesh has no hole there.

    Raises:
        NoSurfaceError: the field is positive everywhere or nowhere.
        UserError: the method's library is optional and does not work here.
        ValueError: the field is not a cube of at least 2 nodes a side, or holds values that are not finite.
    """
    method = SurfaceMethod(method)
    volume = np.ascontiguousarray(torch.as_tensor(field).detach().float().cpu().numpy())
    if volume.ndim != 3 or len(set(volume.shape)) != 1 or volume.shape[0] < 2:
        raise ValueError(f"field has shape {volume.shape}, expected a cube (R+1, R+1, R+1) with R >= 1")
    low, high = volume.min(), volume.max()
    if not np.isfinite([low, high]).all():
        bad = volume.size - int(np.isfinite(volume).sum())
        raise ValueError(f"field holds {bad} of {volume.size} values that are not finite")
    if not low < 0 < high:
        raise NoSurfaceError(
            f"the field has no surface: its values run from {low:.3g} to {high:.3g}, expected both signs"
        )
    if closed:
        volume = _closed(volume)
    if not volume.max() > 0:  # what was inside lay in the outermost nodes only
        raise NoSurfaceError("the field has no surface inside the cube, only on its faces")
    vertices, faces = (_open3d if method is SurfaceMethod.open3d else _skimage)(volume)
    if len(faces) == 0:
        raise NoSurfaceError("the field has no surface: the extractor found no face")
    # Extractors return index coordinates, where node i is at i, whatever the resolution.
    vertices = vertices.astype(np.float64) * (2 * box / (volume.shape[0] - 1)) - box
    return trimesh.Trimesh(vertices, faces, process=False)


def _closed(volume: np.ndarray) -> np.ndarray:
    """The volume with its outermost nodes just outside, so that the surface closes at the cube's faces."""
    faces = [(slice(None),) * axis + (end,) for axis in range(3) for end in (0, -1)]
    if all(volume[face].max() < 0 for face in faces):
        return volume
    volume = volume.copy()
    for face in faces:
        # A hundredth of a typical magnitude puts the surface within a hundredth of a cell of the cube's face.
        np.minimum(volume[face], -0.01 * np.abs(volume).mean(), out=volume[face])
    return volume


def _skimage(volume: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lewiner's marching cubes: no holes and no ambiguous cells. Returns vertices (V,3), faces (F,3)."""
    from skimage.measure import marching_cubes

    vertices, faces, _, _ = marching_cubes(volume, 0.0, gradient_direction="ascent", method="lewiner")
    return vertices, faces


def _open3d(volume: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """VTK's flying edges through open3d, which indexes [z, y, x]. Returns vertices (V,3), faces (F,3)."""
    try:
        open3d: Any = import_module("open3d")
    except (ImportError, OSError) as error:
        raise UserError(f"surface=open3d needs a working open3d, which is optional: {error}") from error
    tensor = open3d.core.Tensor(np.ascontiguousarray(volume.transpose(2, 1, 0)))
    mesh = open3d.t.geometry.TriangleMesh.create_isosurfaces(tensor, [0.0])
    if "indices" not in mesh.triangle:
        return np.zeros((0, 3), np.float32), np.zeros((0, 3), np.int64)
    return mesh.vertex.positions.numpy(), mesh.triangle.indices.numpy()


def reducible(values: torch.Tensor, max_faces: int) -> torch.Tensor:
    """Values (n, n, n), or every second node of them, or every fourth: a surface of at most `MANY_FACES` faces.

    Only where it is reduced to an eighth of that or less afterwards, as a surface of noise: the time of that does not
    grow without a bound then. A level of `decode` is exact at the surface, so this is the mesh of a coarser one.
    """
    while 0 < 8 * max_faces <= MANY_FACES and len(values) % 2 == 1 and len(values) > 64:
        inside = (values > 0).cpu().numpy()  # whose counting is ten times faster than PyTorch's
        axes = (inside.swapaxes(0, axis) for axis in range(3))
        crossings = sum(int(np.count_nonzero(line[:-1] != line[1:])) for line in axes)
        if 2 * crossings <= MANY_FACES:  # a vertex on each, two faces a vertex
            break
        values = values[::2, ::2, ::2]
    return values
