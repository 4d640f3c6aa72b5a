"""What is wrong with a surface beyond its topology: crossings, thin shells, winding, floaters; and what a 3D print asks
of a mesh: a closed surface in one piece, and walls that a nozzle can lay.

`elastic3d.geometry.cleanup.mesh_health` counts what faces and edges say by themselves (watertight,
components, boundary edges, genus, degenerate faces); the shares here need rays. All are shares in [0, 1] of
faces or of surface area, so that they compare between meshes. Rays: Embree; every crossing it reports is
checked in double precision.

Source of the winding test: Takayama et al. 2014, "A Simple Method for Correcting Facet Orientations in
Polygon Meshes Based on Ray Casting".
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_HALF_EVEN, Context
from typing import Any

import numpy as np
import trimesh
from embreex import rtcore_scene
from embreex.mesh_construction import TriangleMesh
from numpy.typing import NDArray

from elastic3d.geometry.cleanup import (
    MeshHealth,
    component_of_faces,
    count_solids,
    faces_at_edges,
    mesh_health,
)
from elastic3d.geometry.mesh_io import weld
from elastic3d.geometry.normalize import normalize_mesh, placement_of
from elastic3d.geometry.sampling import sample_faces

Floats = NDArray[np.floating]

SAMPLES = 4000
THIN = 0.01  # thickness, where the longest side is 2: half a percent of it
FLOATER = 0.01  # a floater has less than this share of the surface area
_STEP = 1e-4  # how far a ray starts from its surface
_SWELL = 1e-5  # how far faces are moved outwards, so that a wall of no thickness has two sides
_MARGIN = 1e-7  # an edge's ends are at least this far from the face it crosses
_LAYERS = 8  # faces that one edge is followed through
MANY_HANDLES = 20  # chairs with many bars have fewer; a vase with holes in its wall has more


@dataclass(frozen=True)
class SurfaceHealth:
    """Defects of a surface.

    Attributes:
        manifold: no edge has more than two faces, and the faces around each vertex hang together.
        self_intersection_share: faces that cross another face in more than a shared corner, of all with three corners.
        thin_shell_share: area whose opposite wall is nearer than `THIN`.
        inverted_share: area that shows its back to the outside.
        inconsistent_edges: edges whose two faces run around in opposite senses.
        floaters: components with less than `FLOATER` of the area.
    """

    manifold: bool
    self_intersection_share: float
    thin_shell_share: float
    inverted_share: float
    inconsistent_edges: int
    floaters: int


def surface_health(mesh: trimesh.Trimesh, seed: int = 0) -> SurfaceHealth:
    """Examine a mesh, welded as `mesh_health` does. Deterministic for a seed.

    Raises ValueError for a mesh without faces, of no extent or with vertices that are not finite.
    """
    mesh, _ = normalize_mesh(weld(mesh), half_extent=1.0)
    scene = Rays(mesh)
    return SurfaceHealth(
        manifold=is_manifold(np.asarray(mesh.faces)),
        self_intersection_share=float(self_intersections(mesh, scene).mean()),
        thin_shell_share=thin_shell_share(mesh, scene, seed),
        inverted_share=inverted_share(mesh, scene, seed),
        inconsistent_edges=inconsistent_edges(mesh),
        floaters=count_floaters(mesh),
    )


class Rays:
    """Nearest hits of rays with the triangles of a mesh."""

    def __init__(self, mesh: trimesh.Trimesh, swell: float = 0.0) -> None:
        self._scene = rtcore_scene.EmbreeScene()
        triangles = mesh.triangles + swell * mesh.face_normals[:, None]
        TriangleMesh(self._scene, np.ascontiguousarray(triangles, np.float32))

    def hit(self, origins: Floats, directions: Floats, reach: Floats | None = None) -> tuple[NDArray, Floats]:
        """Face (R,) or -1, and distance (R,) in lengths of the directions (R, 3), up to `reach` (R,)."""
        origins, directions = (np.ascontiguousarray(a, np.float32) for a in (origins, directions))
        far = np.full(len(origins), np.inf, np.float32) if reach is None else reach.astype(np.float32)
        found: dict[str, Any] = self._scene.run(origins, directions, dists=far, output=True)
        return np.asarray(found["primID"]).astype(np.int64), np.asarray(found["tfar"], np.float64)


def self_intersections(mesh: trimesh.Trimesh, rays: Rays | None = None) -> NDArray[np.bool_]:
    """Which faces (F,) are crossed by an edge of another face that shares no corner with them, or own that
    edge.

    Two triangles that cross do so where an edge of one passes through the other, so every edge is cast as a
    ray. Faces that overlap in one plane do not cross.
    """
    rays = rays or Rays(mesh)
    faces, vertices = np.asarray(mesh.faces), np.asarray(mesh.vertices, np.float64)
    edges = mesh.edges_unique
    start, along = vertices[edges[:, 0]], vertices[edges[:, 1]] - vertices[edges[:, 0]]
    crossed, guilty = np.zeros(len(faces), bool), np.zeros(len(edges), bool)
    open_edges, passed = np.arange(len(edges)), np.zeros(len(edges))
    for _ in range(_LAYERS):
        origins = start[open_edges] + passed[open_edges, None] * along[open_edges]
        face, step = rays.hit(origins, along[open_edges], 1 - passed[open_edges])
        open_edges, face, step = open_edges[face >= 0], face[face >= 0], step[face >= 0]
        if len(open_edges) == 0:
            break
        real = _crosses(vertices, edges[open_edges], faces[face])
        crossed[face[real]] = True
        guilty[open_edges[real]] = True
        passed[open_edges] += step + 1e-4
        open_edges = open_edges[passed[open_edges] < 1]
    return crossed | guilty[mesh.faces_unique_edges].any(axis=1)


def _crosses(vertices: Floats, edges: NDArray, faces: NDArray) -> NDArray[np.bool_]:
    """Whether edges (E, 2) pass through the inside of faces (E, 3) with which they share no vertex."""
    separate = (edges[:, :, None] != faces[:, None]).all(axis=(1, 2))
    a, b = vertices[edges[:, 0]], vertices[edges[:, 1]]
    p, q, r = (vertices[faces[:, i]] for i in range(3))
    normal = np.cross(q - p, r - p)
    length = np.linalg.norm(normal, axis=1)
    side_a, side_b = (np.einsum("ek,ek->e", normal, x - p) / np.maximum(length, 1e-300) for x in (a, b))
    apart = (np.minimum(side_a, side_b) < -_MARGIN) & (np.maximum(side_a, side_b) > _MARGIN)
    share = np.divide(side_a, side_a - side_b, out=np.zeros_like(side_a), where=apart)
    point = a + share[:, None] * (b - a)
    inside = [
        np.einsum("ek,ek->e", np.cross(v - u, point - u), normal) > 0 for u, v in ((p, q), (q, r), (r, p))
    ]
    return separate & apart & np.logical_and.reduce(inside)


def thin_shell_share(mesh: trimesh.Trimesh, rays: Rays, seed: int = 0) -> float:
    """Share of the area from which a ray inwards meets the opposite wall before `THIN`."""
    thickness, met = opposite_walls(mesh, rays, seed)
    return float((met & (thickness < THIN)).mean())


def opposite_walls(mesh: trimesh.Trimesh, rays: Rays, seed: int = 0) -> tuple[Floats, NDArray[np.bool_]]:
    """Thickness (P,) straight inwards of uniform surface points, and whether it is the opposite wall that is met.

    That wall faces away from the ray's start, within 60 degrees, so that corners are not walls.
    """
    points, face, normals = sample_faces(mesh.triangles, SAMPLES, seed)

    def look(rays: Rays, start: float) -> tuple[Floats, Floats]:
        other, distance = rays.hit(points - start * normals, -normals)
        cosine = np.einsum("pk,pk->p", normals, mesh.face_normals[other])
        return distance + start, np.where((other < 0) | (other == face), 1.0, cosine)

    thickness, cosine = look(rays, _STEP)
    met, outside = cosine < -0.5, cosine > 0
    if outside.any():  # these started past a wall thinner than the step; solids that touch have none there
        thin, cosine = look(Rays(mesh, _SWELL), 0.0)
        thin, passed = np.maximum(thin - _SWELL, 0), outside & (cosine < -0.5) & (thin < 2 * _STEP)
        thickness, met = np.where(passed, thin, thickness), met | passed
    return thickness, met


def inverted_share(mesh: trimesh.Trimesh, rays: Rays, seed: int = 0, directions: int = 16) -> float:
    """Share of the area whose back sees more of the outside than its front; points that see none are left
    out.
    """
    points, _, normals = sample_faces(mesh.triangles, SAMPLES, seed)
    rng = np.random.default_rng((seed, 2))
    free = np.zeros((2, len(points)), int)
    for _ in range(directions):
        towards = rng.standard_normal(points.shape)
        towards /= np.linalg.norm(towards, axis=1, keepdims=True)
        towards *= np.sign(np.einsum("pk,pk->p", towards, normals))[:, None]
        for side, sign in enumerate((1, -1)):
            face, _ = rays.hit(points + sign * _STEP * normals, sign * towards)
            free[side] += face < 0
    seen = free.sum(axis=0) > 0
    return float((free[1] > free[0])[seen].mean()) if seen.any() else 0.0


def is_manifold(faces: NDArray[np.integer]) -> bool:
    """Whether each edge has one or two faces and the faces around each vertex form one fan. Holes are allowed."""
    import igl

    used = np.unique(faces, return_inverse=True)[1].reshape(-1, 3).astype(np.int64)
    return bool(igl.is_edge_manifold(used)[0] and igl.is_vertex_manifold(used).all())


def inconsistent_edges(mesh: trimesh.Trimesh) -> int:
    """Edges whose two faces run around in opposite senses."""
    count = faces_at_edges(mesh)
    forward = mesh.edges[:, 0] < mesh.edges[:, 1]
    sense = np.bincount(mesh.edges_unique_inverse, weights=np.where(forward, 1, -1))
    return int(((count == 2) & (sense != 0)).sum())


def count_floaters(mesh: trimesh.Trimesh) -> int:
    """Components (joined by vertices, as in `mesh_health`) with less than `FLOATER` of the area."""
    areas = np.bincount(component_of_faces(mesh), weights=mesh.area_faces)
    return int((areas < FLOATER * areas.sum()).sum())


def thinnest_wall(mesh: trimesh.Trimesh) -> float | None:
    """How thin the thinnest hundredth of a closed mesh's walls is, in units of the mesh; None if no wall is met.

    That quantile of the distances to the opposite wall: the minimum itself would be the tip of the sharpest ridge. For
    a print: nothing but the thinnest hundredth is thinner than this.

    Raises ValueError for a mesh without faces, of no extent or with vertices that are not finite.
    """
    placement = placement_of(mesh, half_extent=1.0)
    mesh = placement.apply(mesh)
    thickness, met = opposite_walls(mesh, Rays(mesh))
    return float(np.quantile(thickness[met], 0.01)) / placement.scale if met.any() else None


def digits(value: float, rounding: str = ROUND_HALF_EVEN, count: int = 3) -> float:
    """The number with `count` significant digits, as decimals say them."""
    return float(Context(count, rounding).create_decimal_from_float(value))


@dataclass(kw_only=True)
class PrintCheck(MeshHealth):
    """What was found.

    Attributes:
        pieces: components that print as separate objects: the cavities of a closed mesh are none.
        thinnest_wall: its share of the longest side (see `thinnest_wall`), of four digits; None if not watertight,
            or if no wall was met.
        size_mm: the longest side, where it is known.
        min_wall_mm: the thinnest wall that prints.
    """

    pieces: int
    thinnest_wall: float | None
    size_mm: float | None
    min_wall_mm: float

    @property
    def thinnest_mm(self) -> float | None:
        """The thinnest wall in millimetres, where the size is known."""
        return self.size_mm and self.thinnest_wall and self.size_mm * self.thinnest_wall

    @property
    def smallest_mm(self) -> float | None:
        """The longest side from which on the thinnest wall prints, rounded up; None where no size makes it print."""
        return digits(self.min_wall_mm / self.thinnest_wall, ROUND_CEILING) if self.thinnest_wall else None

    def warnings(self) -> list[str]:
        """What stands in the way of a print, a sentence each."""
        found = []
        if not self.watertight:
            edges = self.boundary_edges + self.non_manifold_edges
            found.append(f"not watertight: {edges:,} edges have no two faces, a slicer guesses what is solid")
        if self.pieces > 1:
            found.append(f"{self.pieces} pieces that do not touch: they print as separate objects")
        if self.genus is not None and self.genus > MANY_HANDLES:
            found.append(f"genus {self.genus}: walls have see-through holes, more than by design")
        thin = self.thinnest_mm
        if thin is not None and thin < self.min_wall_mm and self.size_mm != self.smallest_mm:
            cure = f": they print from size_mm={self.smallest_mm:g} on" if self.smallest_mm else ""
            found.append(f"walls of {digits(thin):g} mm, thinner than min_wall_mm={self.min_wall_mm:g}{cure}")
        return found

    def summary(self) -> str:
        """`watertight, 1 piece, genus 2, thinnest wall 1.3 % of the longest side`; in mm where the size is known."""
        parts = ["watertight" if self.watertight else "not watertight"]
        parts.append("1 piece" if self.pieces == 1 else f"{self.pieces} pieces")
        if self.genus is not None:
            parts.append(f"genus {self.genus}")
        if self.thinnest_mm is not None:
            parts.append(f"thinnest wall {digits(self.thinnest_mm):g} mm")
        elif self.thinnest_wall is not None:
            parts.append(f"thinnest wall {digits(100 * self.thinnest_wall):g} % of the longest side")
        return ", ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """The `print` object of a mesh's metadata: lengths as shares of the longest side, and in mm if it is known."""
        return {
            "watertight": self.watertight,
            "pieces": self.pieces,
            "genus": self.genus,
            "thinnest_wall": self.thinnest_wall,
            "thinnest_wall_mm": self.thinnest_mm and digits(self.thinnest_mm, count=4),
            "size_mm": self.size_mm,
            "printable_from_mm": self.smallest_mm,
            "warnings": self.warnings(),
        }


def print_check(mesh: trimesh.Trimesh, size_mm: float | None = None, min_wall_mm: float = 0.8) -> PrintCheck:
    """Examine a mesh, however its vertices are split for normals or texture coordinates.

    `size_mm` is the length that its longest side will have, `min_wall_mm` two lines of a usual 0.4 mm nozzle. Raises
    ValueError for a mesh without faces.
    """
    base = mesh_health(mesh)
    parts = count_solids(mesh) if base.watertight else base.components
    thin = thinnest_wall(mesh) if base.watertight else None
    wall = None if thin is None else digits(thin / float(mesh.extents.max()), count=4)
    return PrintCheck(
        **vars(base), pieces=parts, thinnest_wall=wall, size_mm=size_mm, min_wall_mm=min_wall_mm
    )
