"""The mesh of a field's zero level: extracted by well-kept libraries, placed exactly and wound outwards.

Without PyTorch, which takes seconds to import: data preparation has no other use for it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
import trimesh

from elastic3d.errors import NoSurfaceError, UserError
from elastic3d.geometry.options import BOX, SurfaceMethod

if TYPE_CHECKING:
    from torch import Tensor


def extract_surface(
    field: np.ndarray | Tensor,
    box: float = BOX,
    method: SurfaceMethod | str = SurfaceMethod.skimage,
) -> trimesh.Trimesh:
    """Mesh of the zero level of a field sampled at grid nodes, with faces wound outwards.

    A solid that leaves the cube ends at the cube's face, so that the mesh has no hole there.

    Args:
        field: (R+1, R+1, R+1) values indexed [x, y, z], positive inside; node i is at -box + 2 box i / R.
        box: half side of the cube that the nodes span.
        method: the library that does it.

    Raises:
        NoSurfaceError: the field is positive everywhere or nowhere inside the cube.
        UserError: the method's library is optional and does not work here.
        ValueError: the field is not a cube of at least 2 nodes a side, or holds values that are not finite.
    """
    array = field if isinstance(field, np.ndarray) else field.detach().float().cpu()
    volume = np.ascontiguousarray(array, np.float32)
    if volume.ndim != 3 or len(set(volume.shape)) != 1 or volume.shape[0] < 2:
        raise ValueError(f"field has shape {volume.shape}, expected a cube (R+1, R+1, R+1) with R >= 1")
    if not -np.inf < volume.min() < 0 < volume.max() < np.inf:
        raise _why_no_surface(volume)
    if max(volume.swapaxes(0, axis)[[0, -1]].max() for axis in range(3)) >= 0:  # on the cube's faces
        volume = _closed(volume)
    if SurfaceMethod(method) is SurfaceMethod.open3d:
        vertices, faces = _open3d(volume)
    else:
        from skimage.measure import marching_cubes  # Lewiner's: no holes and no ambiguous cells

        vertices, faces, *_ = marching_cubes(volume, 0.0, gradient_direction="ascent", method="lewiner")
    if len(faces) == 0:
        raise NoSurfaceError("the field has no surface: the extractor found no face")
    vertices = vertices.astype(np.float64) * (2 * box / (volume.shape[0] - 1)) - box  # node i was at i
    return trimesh.Trimesh(vertices, faces, process=False)


def _why_no_surface(volume: np.ndarray) -> ValueError:
    """Of values that are not finite, or not of both signs."""
    low, high = volume.min(), volume.max()
    if bad := volume.size - int(np.isfinite(volume).sum()):
        return ValueError(f"field holds {bad} of {volume.size} values that are not finite")
    return NoSurfaceError(
        f"the field has no surface: its values run from {low:.3g} to {high:.3g}, expected both signs"
    )


def _closed(volume: np.ndarray) -> np.ndarray:
    """The volume with its outermost nodes just outside, so that the surface closes at the cube's faces."""
    volume = volume.copy()
    for face in [(slice(None),) * axis + (end,) for axis in range(3) for end in (0, -1)]:
        # A hundredth of a typical magnitude puts the surface within a hundredth of a cell of the cube's face.
        np.minimum(volume[face], -0.01 * np.abs(volume).mean(), out=volume[face])
    if not volume.max() > 0:  # what was inside lay in the outermost nodes only
        raise NoSurfaceError("the field has no surface inside the cube, only on its faces")
    return volume


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
