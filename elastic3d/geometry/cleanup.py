"""Cleaning an extracted mesh, and a report of its health."""

from __future__ import annotations

from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
import trimesh

from elastic3d.errors import UserError
from elastic3d.geometry.mesh_io import far_centre, unit_normals, weld
from elastic3d.geometry.options import CleanupConfig
from elastic3d.geometry.sheets import separate_sheets

_QUADRIC_LOCK = Lock()
"""fast_simplification keeps the mesh it works on in global variables."""

_ROUNDS = 8
"""How often the tolerance of `simplify` grows: from 1e-6 to a quarter of the longest side."""

_FEW = 2000
"""Up to this number of faces every collapse counts, and `simplify` ends with an exact order of them."""

_DEGENERATE = 1e-12
"""A face counts as degenerate below this area, in squares of the mesh's longest side."""


@dataclass(kw_only=True)
class MeshHealth:
    """Topology of a mesh with vertices at equal positions merged, which may leave faces without three corners: these
    count as faces and as degenerate, and are no part of the surface."""

    faces: int
    vertices: int
    watertight: bool
    """Every edge belongs to exactly two faces."""
    components: int
    dominant_component_share: float
    """Area of the largest component over the whole area."""
    boundary_edges: int
    non_manifold_edges: int
    genus: int | None
    """Handles of all components together, a solid's see-through holes; None if the mesh is not watertight."""
    degenerate_share: float


def mesh_health(mesh: trimesh.Trimesh) -> MeshHealth:
    """Health of a mesh, however its vertices are split for normals or texture coordinates."""
    if (faces := len(mesh.faces)) == 0:
        raise ValueError("the mesh has no faces, expected at least one")
    degenerate = float(_degenerate(mesh).mean())
    mesh = weld(mesh)
    shared = faces_at_edges(mesh)
    labels = component_of_faces(mesh)
    area = np.bincount(labels, weights=mesh.area_faces)
    watertight = len(shared) > 0 and bool((shared == 2).all())
    return MeshHealth(
        faces=faces,
        vertices=len(np.unique(mesh.faces)),
        watertight=watertight,
        components=len(area),
        dominant_component_share=float(area.max() / area.sum()) if area.sum() > 0 else 0.0,
        boundary_edges=int((shared == 1).sum()),
        non_manifold_edges=int((shared > 2).sum()),
        genus=genus(mesh) if watertight else None,
        degenerate_share=degenerate,
    )


def count_solids(mesh: trimesh.Trimesh) -> int:
    """Components of a closed mesh but cavities: of another sign of volume than the largest, and in the box of one."""
    mesh = weld(mesh)
    labels, corners = component_of_faces(mesh), mesh.triangles
    sixfold = np.linalg.det(corners - corners[0, 0])  # far from the origin volumes would cancel
    volumes = np.bincount(labels, weights=sixfold)
    low, high = np.full((2, len(volumes), 3), [[[np.inf]], [[-np.inf]]])
    np.minimum.at(low, labels, corners.min(1))
    np.maximum.at(high, labels, corners.max(1))
    solid = volumes * volumes[np.abs(volumes).argmax()] >= 0
    inside = [
        ((low[solid] <= low[k]) & (high[solid] >= high[k])).all(1).any() for k in np.flatnonzero(~solid)
    ]
    return len(volumes) - int(sum(inside))


def genus(mesh: trimesh.Trimesh) -> int:
    """Handles of a closed surface, all components together; what touches at a vertex alone has no handle there."""
    corners = np.arange(mesh.faces.size).reshape(-1, 3)  # (F,3), each the start of an edge too
    starts, ends = corners.ravel(), corners[:, [1, 2, 0]].ravel()
    turned = mesh.edges[:, 0] > mesh.edges[:, 1]
    low, high = np.where(turned, [ends, starts], [starts, ends])  # (3F,) each
    edges = np.lexsort(mesh.edges_sorted.T).reshape(-1, 2)  # (E,2), the two faces of each
    label = trimesh.graph.connected_component_labels
    components = label(edges // 3, node_count=len(corners)).max() + 1
    # corners that meet along an edge are of one fan around their vertex: as many vertices, once what touches is apart
    fans = label(np.concatenate([low[edges], high[edges]]), node_count=corners.size).max() + 1
    return int(2 * components - (fans - len(edges) + len(corners))) // 2


def clean(mesh: trimesh.Trimesh, config: CleanupConfig) -> trimesh.Trimesh:
    """A cleaned copy: no floaters, no degenerate faces, decimated, checked for holes, with vertex normals.

    A closed mesh stays closed. With `uv` it has texture coordinates and vertices split at their seams.

    Raises:
        UserError: `require_closed` and the mesh has holes, or `uv` without xatlas.
        ValueError: the mesh has no faces.
    """
    if len(mesh.faces) == 0:
        raise ValueError("the mesh has no faces, expected at least one")
    if config.min_component > 0:
        mesh = drop_floaters(mesh, config.min_component)
    max_faces = min(config.max_faces or len(mesh.faces), len(mesh.faces))
    if max_faces < len(mesh.faces) or _degenerate(mesh).any():
        mesh = simplify(mesh, max_faces)
    if config.require_closed and (open_edges := int((faces_at_edges(mesh) != 2).sum())):
        raise UserError(f"the mesh is not closed: {open_edges} edges have no two faces")
    mesh = with_smooth_normals(mesh) if config.smooth_normals else with_flat_normals(mesh)
    return unwrap(mesh) if config.uv else mesh


def drop_floaters(mesh: trimesh.Trimesh, share: float) -> trimesh.Trimesh:
    """The mesh without components (outer or inner) whose area is below `share` of the largest component's."""
    labels = component_of_faces(mesh)
    area = np.bincount(labels, weights=mesh.area_faces)
    keep = area >= share * area.max()
    if keep.all():
        return mesh
    kept = trimesh.Trimesh(mesh.vertices, mesh.faces[keep[labels]], process=False)
    kept.remove_unreferenced_vertices()
    return kept


def simplify(mesh: trimesh.Trimesh, max_faces: int) -> trimesh.Trimesh:
    """A mesh of at most `max_faces` faces without degenerate ones; closed if `mesh` is. Repeatable.

    Quadrics (Garland and Heckbert 1997) do nearly all of it: they are fast and keep the shape best. Where they glue
    sheets together along an edge, `separate_sheets` undoes that. Where that is not enough (degenerate faces are
    left, flat parts stall, or the input itself touches itself), manifold3d makes room, closed by construction, with
    a tolerance that grows from a millionth of the longest side, before quadrics go on. The worst case in time is a
    surface of many handles, as of noise: two or three passes of quadrics.

    Raises:
        UserError: the surface can't be reduced so far.
    """
    centre = far_centre(mesh)
    near = trimesh.Trimesh(mesh.vertices - centre, mesh.faces, process=False)
    reduced = _reduce(near, max_faces)
    if not _accepted(reduced, max_faces):
        reduced = _reduce_solid(reduced if is_closed(reduced) else near, max_faces)
    return trimesh.Trimesh(reduced.vertices + centre, reduced.faces, process=False)


def _accepted(mesh: trimesh.Trimesh, max_faces: int) -> bool:
    return 0 < len(mesh.faces) <= max_faces and is_closed(mesh) and not _degenerate(mesh).any()


def _reduce(mesh: trimesh.Trimesh, max_faces: int) -> trimesh.Trimesh:
    """Reduced by quadrics as far as they go, sheets that they glued together drawn apart again."""
    target, reduced = max_faces, mesh
    if max_faces <= _FEW and len(mesh.faces) > max_faces:
        reduced = _in_order(mesh, max_faces)
    for _ in range(4):
        reduced = _quadric(reduced, max(target, 4))
        reduced = _apart(separate_sheets(reduced) or reduced)
        if len(reduced.faces) <= max_faces:
            break
        target -= 2 * (len(reduced.faces) - max_faces)  # room for the faces that separating adds
    return reduced


def _in_order(mesh: trimesh.Trimesh, max_faces: int) -> trimesh.Trimesh:
    """Reduced by quadrics in the order of their errors, without gluing sheets, as far as that goes.

    Too slow for large meshes, so five times as many faces are left to it. Thin walls survive it where `_quadric`,
    which goes round the mesh in passes, joins them and so loses them.
    """
    import igl

    middle = separate_sheets(_quadric(mesh, 5 * max_faces))
    if middle is None or len(middle.faces) <= max_faces:
        return mesh
    middle = _apart(middle)
    vertices, faces = np.asarray(middle.vertices, np.float64), np.asarray(middle.faces, np.int32)
    vertices, faces, *_ = igl.qslim(np.asfortranarray(vertices), np.asfortranarray(faces), max_faces)
    return trimesh.Trimesh(vertices, faces, process=False)


def _reduce_solid(mesh: trimesh.Trimesh, max_faces: int) -> trimesh.Trimesh:
    """The rest of `simplify`: manifold3d and quadrics in turn; quadrics alone for a mesh that is not closed."""
    import manifold3d

    extent = float(mesh.extents.max())
    source = manifold3d.Mesh(mesh.vertices.astype(np.float32), mesh.faces.astype(np.uint32))
    solid = manifold3d.Manifold(source)
    if solid.status() != manifold3d.Error.NoError:
        kept = trimesh.Trimesh(mesh.vertices, mesh.faces[~_degenerate(mesh)], process=False)
        return _quadric(weld(kept), max_faces)
    fallback = None
    for step in range(_ROUNDS):
        solid = solid.simplify(1e-6 * extent * 6**step)
        rest = _apart(_from_solid(solid))
        reduced = _reduce(rest, max_faces) if len(rest.faces) > max_faces else rest
        if _accepted(reduced, max_faces):
            return reduced
        if 0 < len(reduced.faces) <= max_faces and is_closed(reduced):
            fallback = fallback or reduced  # but for a degenerate face
    if fallback is not None:
        return fallback
    raise UserError(f"the mesh of {len(mesh.faces)} faces can't be reduced to {max_faces} faces")


def is_closed(mesh: trimesh.Trimesh) -> bool:
    """Whether every edge has two faces, also after vertices at equal positions are merged."""
    return weld(mesh).is_watertight


def solid_of(mesh: trimesh.Trimesh) -> trimesh.Trimesh | None:
    """The welded mesh with faces that run around in one sense in each component, that of most of its area: winding
    numbers need it. None if the mesh is not closed, or no such sense exists (a Klein bottle)."""
    import igl

    mesh = weld(mesh)
    if not mesh.is_watertight or mesh.is_winding_consistent:
        return mesh if mesh.is_watertight else None
    faces, component = igl.bfs_orient(np.ascontiguousarray(mesh.faces, np.int64))
    normals = np.cross(*np.diff(mesh.vertices[faces], axis=1).swapaxes(0, 1))  # as long as twice the areas
    turned = np.bincount(component, weights=np.einsum("fk,fk->f", normals, mesh.face_normals)) < 0
    faces = np.where(turned[component, None], faces[:, ::-1], faces)
    oriented = trimesh.Trimesh(mesh.vertices, faces, process=False)
    return oriented if oriented.is_winding_consistent else None


def _from_solid(solid: Any) -> trimesh.Trimesh:
    """The mesh of a manifold3d.Manifold."""
    result = solid.to_mesh()
    return trimesh.Trimesh(result.vert_properties[:, :3], result.tri_verts, process=False)


def _quadric(mesh: trimesh.Trimesh, max_faces: int) -> trimesh.Trimesh:
    """The mesh reduced by quadric edge collapse, as far as that goes."""
    import fast_simplification

    # Its thresholds are absolute: the larger the mesh, the nearer collapses come to the order of their errors, and
    # the sooner it stalls. The first of many collapses need no exact order.
    vertices, faces = np.asarray(mesh.vertices), mesh.faces.astype(np.int32)
    extent = float(np.ptp(vertices, axis=0).max())
    for size, count in ((8.0, 3 * max_faces), (20.0, max_faces), (2.0, max_faces), (0.2, max_faces)):
        if len(faces) <= max_faces or not extent > 0:
            break
        if len(faces) <= count:
            continue
        scale = size / extent
        with _QUADRIC_LOCK:
            vertices, faces = fast_simplification.simplify(vertices * scale, faces, target_count=count)
        vertices = vertices / scale
    return trimesh.Trimesh(vertices, faces, process=False)


def _apart(mesh: trimesh.Trimesh) -> trimesh.Trimesh:
    """The mesh with vertices at equal positions drawn apart, each by a thousandth towards its own neighbours.

    Where surfaces touch, manifold3d keeps one vertex a sheet. Readers that merge equal positions, as most do,
    would join the sheets there into edges of four faces.
    """
    position = mesh.vertices.astype(np.float32)
    _, group, size = np.unique(position, axis=0, return_inverse=True, return_counts=True)
    double = size[group] > 1
    if not double.any():
        return mesh
    neighbours = mesh.edges_sparse.tocsr()[double].astype(np.float64)
    mean = (neighbours @ mesh.vertices) / neighbours.sum(axis=1).reshape(-1, 1)
    vertices = mesh.vertices.copy()
    vertices[double] += 1e-3 * (mean - vertices[double])
    return trimesh.Trimesh(vertices, mesh.faces, process=False)


def with_smooth_normals(mesh: trimesh.Trimesh) -> trimesh.Trimesh:
    """The mesh with unit vertex normals, face normals weighted by the area and by the angle at the vertex.

    Either weight alone favours many small faces, or long thin ones, at a vertex.
    """
    weight = mesh.face_angles * mesh.area_faces[:, None]
    normals = trimesh.geometry.weighted_vertex_normals(
        len(mesh.vertices), mesh.faces, mesh.face_normals, weight
    )
    return trimesh.Trimesh(mesh.vertices, mesh.faces, vertex_normals=normals, process=False)


def with_flat_normals(mesh: trimesh.Trimesh) -> trimesh.Trimesh:
    """The mesh with vertices of its own for each face, and the face's normal at them."""
    corners = np.arange(3 * len(mesh.faces)).reshape(-1, 3)
    normals = np.repeat(mesh.face_normals, 3, axis=0)
    return trimesh.Trimesh(mesh.triangles.reshape(-1, 3), corners, vertex_normals=normals, process=False)


def unwrap(mesh: trimesh.Trimesh) -> trimesh.Trimesh:
    """The mesh with texture coordinates in [0, 1]^2 by xatlas, vertices split at seams, normals kept.

    Raises:
        UserError: xatlas is not installed.
    """
    try:
        import xatlas
    except ImportError as error:
        raise UserError("uv=true needs the package xatlas: pip install xatlas") from error
    source, faces, uv = xatlas.parametrize(mesh.vertices.astype(np.float32), mesh.faces.astype(np.uint32))
    normals = unit_normals(mesh)[source]
    result = trimesh.Trimesh(mesh.vertices[source], faces, vertex_normals=normals, process=False)
    result.visual = trimesh.visual.TextureVisuals(uv=uv)
    return result


def faces_at_edges(mesh: trimesh.Trimesh) -> np.ndarray:
    """The number of faces (E,) at each undirected edge."""
    return np.bincount(mesh.edges_unique_inverse)


def component_of_faces(mesh: trimesh.Trimesh) -> np.ndarray:
    """Component number (F,) of each face; faces that share a vertex are connected."""
    edges = mesh.faces[:, [0, 1, 1, 2]].reshape(-1, 2)
    of_vertex = trimesh.graph.connected_component_labels(edges, node_count=len(mesh.vertices))
    # Vertices without a face are components of their own.
    return np.unique(of_vertex[mesh.faces[:, 0]], return_inverse=True)[1]


def _degenerate(mesh: trimesh.Trimesh) -> np.ndarray:
    """Which faces (F,) have no area."""
    return mesh.area_faces <= _DEGENERATE * float(mesh.extents.max()) ** 2
