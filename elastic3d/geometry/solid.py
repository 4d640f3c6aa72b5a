"""The solid that any mesh, open or not, stands for: all that can't be reached from outside.

1. The unsigned distance to the triangles is measured at grid nodes near the surface.
2. Nodes closer than `THICKNESS` voxels are wall. Nodes that a walk from the outside through free neighbours
   doesn't reach are solid too: closed parts are filled, hidden interiors vanish.
3. The outer surface of that solid is the level `distance = THICKNESS`, placed between nodes by interpolation.
   It lies `THICKNESS` voxels outside the given triangles; a sheet becomes a plate of twice that thickness.

With 0.75 voxels no sheet is pierced (a step of one voxel across it comes within 0.5 of it) and no wire is
broken (some node is within 0.71 of it).
"""

from __future__ import annotations

import igl
import numpy as np
import trimesh
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from elastic3d.geometry.options import BOX
from elastic3d.geometry.sampling import sample_faces
from elastic3d.geometry.surface import extract_surface

THICKNESS = 0.75
SAMPLES_PER_VOXEL_AREA = 8.0


def solidify(mesh: trimesh.Trimesh, resolution: int = 128) -> trimesh.Trimesh:
    """The outer surface, watertight and wound outwards, of the solid of a mesh that lies within the decoding box,
    measured on `resolution` cells a side.

    ValueError if the mesh has no area or leaves the box.
    """
    voxel = 2 * BOX / resolution
    wall = THICKNESS * voxel
    reach, limit = np.abs(mesh.bounds).max(), BOX - wall
    if not reach < limit:
        raise ValueError(
            f"the mesh reaches {reach:.3f}, expected less than {limit:.3f} at {resolution} cells"
        )
    field = wall - _distance_near_surface(np.asarray(mesh.triangles, np.float32), resolution, voxel, wall)
    labels, _ = ndimage.label(field < 0)
    hidden = (labels != labels[0, 0, 0]) & (field < 0)
    field[hidden] = -field[hidden]
    return extract_surface(field, BOX)


def signed_distance(mesh: trimesh.Trimesh, points: NDArray[np.floating]) -> NDArray[np.float32]:
    """Exact distance (P,) of points (P, 3) to the surface of a solid, positive inside.

    The sign is that of the angle-weighted pseudonormal of the closest feature (Baerentzen and Aanaes 2005).
    """
    distance, *_ = igl.signed_distance(
        np.ascontiguousarray(points, np.float64),
        np.ascontiguousarray(mesh.vertices, np.float64),
        np.ascontiguousarray(mesh.faces, np.int64),
        sign_type=igl.SIGNED_DISTANCE_TYPE_PSEUDONORMAL,
    )
    return (-distance).astype(np.float32)


def _distance_near_surface(
    triangles: NDArray[np.float32], resolution: int, voxel: float, wall: float
) -> NDArray[np.float32]:
    """Unsigned distance (R+1, R+1, R+1) at nodes within `wall` of the triangles and at their neighbours.

    Four voxels elsewhere. Measured to dense samples: the closest one gives the distance to its triangle's
    plane, which is the distance to the surface unless the sample is further away than the spacing of
    samples explains (past an edge).
    """
    area = 0.5 * float(np.linalg.norm(_cross(triangles), axis=1).sum())
    count = int(np.clip(SAMPLES_PER_VOXEL_AREA * area / voxel**2, 20_000, 800_000))
    points, _, normals = sample_faces(triangles, count, seed=0)
    spacing = 3 * area / count  # squared radius within which a sample is expected
    tree = cKDTree(points, balanced_tree=False, compact_nodes=False)
    field = np.full((resolution + 1,) * 3, 4 * voxel, np.float32)

    def measure(nodes: NDArray[np.bool_]) -> None:
        band = np.argwhere(nodes)
        queries = (band * voxel - BOX).astype(np.float32)
        straight, nearest = tree.query(queries, distance_upper_bound=4 * voxel)
        nearest = np.minimum(nearest, count - 1)  # the tree answers P where nothing is near
        plane = np.einsum("ij,ij->i", queries - points[nearest], normals[nearest])
        distance = np.sqrt(np.maximum(plane**2, straight**2 - spacing))
        field[tuple(band.T)] = np.minimum(distance, 4 * voxel)

    touched = np.zeros(field.shape, np.uint8)
    touched[tuple(np.round((points + BOX) / voxel).astype(np.int64).T)] = 1
    reach = int(np.floor(wall / voxel + 0.5))  # in nodes, from the one a surface point rounds to
    close = ndimage.maximum_filter(touched, 2 * reach + 1).astype(bool)
    measure(close)
    measure(ndimage.binary_dilation(field <= wall) & ~close)
    return field


def _cross(triangles: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
