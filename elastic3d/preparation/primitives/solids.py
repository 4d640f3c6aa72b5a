"""Solids that everything else is put together from. Y up, front +Z, in any unit; built with manifold3d."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import trimesh
from manifold3d import CrossSection, FillRule, JoinType, Manifold, OpType
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator, make_interp_spline
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

Point = Sequence[float] | NDArray[np.float64]
Points = Sequence[Point] | NDArray[np.float64]
Parts = dict[str, Any]  # solids (manifold3d.Manifold) by the name of their material
SEGMENTS = 40  # of a full circle
ORIGIN = (0.0, 0.0, 0.0)


class Dice:
    """Random choices of one shape."""

    def __init__(self, *seed: int) -> None:
        self._generator = np.random.default_rng(seed)

    def __call__(self, low: float, high: float) -> float:
        """A number between the two."""
        return float(self._generator.uniform(low, high))

    def whole(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both included."""
        return int(self._generator.integers(low, high + 1))

    def chance(self, probability: float) -> bool:
        """Whether something happens."""
        return bool(self._generator.random() < probability)

    def pick(self, *choices: Any) -> Any:
        """One of the choices."""
        return choices[int(self._generator.integers(len(choices)))]

    def direction(self) -> NDArray[np.float64]:
        """A unit vector (3,)."""
        vector = self._generator.standard_normal(3)
        return vector / np.linalg.norm(vector)


def join(*solids: Manifold) -> Manifold:
    """Their union."""
    return Manifold.batch_boolean(list(solids), OpType.Add)


def box(x: float, y: float, z: float, at: Point = ORIGIN) -> Manifold:
    """A box with its centre at a point."""
    return Manifold.cube((x, y, z), True).translate(at)


def round_box(x: float, y: float, z: float, radius: float, at: Point = ORIGIN) -> Manifold:
    """A box with rounded edges; the radius is limited to half of the shortest side."""
    radius = min(radius, 0.499 * min(x, y, z))
    corner = Manifold.sphere(radius, 20)
    signs = [(i, j, k) for i in (-1, 1) for j in (-1, 1) for k in (-1, 1)]
    inner = (x / 2 - radius, y / 2 - radius, z / 2 - radius)
    corners = [corner.translate([s * c for s, c in zip(sign, inner, strict=True)]) for sign in signs]
    return Manifold.batch_hull(corners).translate(at)


def ball(radius: float, at: Point = ORIGIN) -> Manifold:
    """A sphere."""
    return Manifold.sphere(radius, SEGMENTS).translate(at)


def ellipsoid(x: float, y: float, z: float, at: Point = ORIGIN) -> Manifold:
    """An ellipsoid with these half axes."""
    return Manifold.sphere(1.0, SEGMENTS).scale((x, y, z)).translate(at)


def rod(start: Point, end: Point, radius: float, end_radius: float | None = None) -> Manifold:
    """A cylinder, cone or frustum between two points. `end_radius` of 0 is a cone."""
    return prism(start, end, radius, SEGMENTS, end_radius)


def post(low: float, high: float, radius: float, end_radius: float | None = None) -> Manifold:
    """A `rod` that stands on the Y axis, from one height to another."""
    return rod((0, low, 0), (0, high, 0), radius, end_radius)


def prism(start: Point, end: Point, radius: float, sides: int, end_radius: float | None = None) -> Manifold:
    """A regular prism or, with an `end_radius` of 0, a pyramid between two points."""
    axis = np.subtract(end, start).astype(np.float64)
    length = float(np.linalg.norm(axis))
    top = radius if end_radius is None else end_radius
    return _aim(Manifold.cylinder(length, radius, top, sides), axis / length, start)


def capsule(start: Point, end: Point, radius: float, end_radius: float | None = None) -> Manifold:
    """The hull of a sphere at each of two points."""
    first = Manifold.sphere(radius, 24).translate(start)
    second = Manifold.sphere(radius if end_radius is None else end_radius, 24).translate(end)
    return Manifold.batch_hull([first, second])


def torus(ring: float, tube: float, at: Point = ORIGIN, axis: Point = (0.0, 1.0, 0.0)) -> Manifold:
    """A torus of a ring's radius and a tube's radius around an axis."""
    profile = CrossSection.circle(tube, 24).translate((ring, 0))
    return _aim(Manifold.revolve(profile, 48), np.asarray(axis, np.float64), at)


def spline(points: Points, count: int = 24) -> NDArray[np.float64]:
    """A smooth curve (count, D) through at least three points (n, D)."""
    given = np.asarray(points, np.float64)
    steps = np.linalg.norm(np.diff(given, axis=0), axis=1) ** 0.5
    along = np.concatenate([[0], np.cumsum(steps)])
    curve = make_interp_spline(along, given, k=min(3, len(given) - 1))
    return curve(np.linspace(0, along[-1], count))


def tube(points: Points, radius: float, end_radius: float | None = None, count: int = 14) -> Manifold:
    """A round tube along the smooth curve through the points."""
    curve = spline(points, count)
    radii = np.linspace(radius, radius if end_radius is None else end_radius, count)
    beads = [
        Manifold.sphere(float(size), 16).translate(point) for size, point in zip(radii, curve, strict=True)
    ]
    return join(*(Manifold.batch_hull([a, b]) for a, b in zip(beads[:-1], beads[1:], strict=True)))


def profile_curve(points: Points, count: int = 28) -> NDArray[np.float64]:
    """A curve (count, 2) through points (n, 2) that never swings beyond its neighbours."""
    given = np.asarray(points, np.float64)
    along = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(given, axis=0), axis=1))])
    return PchipInterpolator(along, given)(np.linspace(0, along[-1], count))


def lathe(points: Points, smooth: bool = True) -> Manifold:
    """The solid of revolution around Y below a profile of (radius, height), listed from bottom to top."""
    outline = profile_curve(points) if smooth else np.asarray(points, np.float64)
    outline = np.maximum(outline, [0, -np.inf])
    closed = np.concatenate([[[0, outline[0, 1]]], outline, [[0, outline[-1, 1]]]])
    section = CrossSection([closed], FillRule.NonZero)
    return Manifold.revolve(section, SEGMENTS).rotate((-90, 0, 0))


def vessel(points: Points, wall: float, floor: float | None = None) -> Manifold:
    """An open vessel around Y: the profile of (radius, height) from the foot to the rim, hollowed to a wall."""
    outline = profile_curve(points)
    level = outline[0, 1] + (wall if floor is None else floor)
    inner = outline[outline[:, 1] > level]
    if len(inner) == 0 or inner[0, 1] > level + 1e-6:
        radius = float(np.interp(level, outline[:, 1], outline[:, 0]))
        inner = np.concatenate([[[radius, level]], inner])
    inner = inner - [wall, 0]
    inner = np.concatenate([inner, inner[-1:] + [0, wall]])
    return lathe(outline, smooth=False) - lathe(np.maximum(inner, [1e-3, -np.inf]), smooth=False)


def plate(outline: Any, depth: float, at: Point = ORIGIN, bevel: float = 0.0) -> Manifold:
    """A polygon (n, 2) or CrossSection of the XY plane, `depth` thick in Z, with a bevel at front and back."""
    section = outline if isinstance(outline, CrossSection) else polygon(outline)
    if bevel <= 0:
        return Manifold.extrude(section, depth).translate((0, 0, -depth / 2)).translate(at)
    steps = [(bevel, depth), (bevel / 3, depth - bevel * 2 / 3), (0, depth - 2 * bevel)]
    layers = [
        Manifold.extrude(section.offset(-inset, JoinType.Round, circular_segments=24), height).translate(
            (0, 0, -height / 2)
        )
        for inset, height in steps
    ]
    return join(*layers).translate(at)


def polygon(*rings: Points) -> CrossSection:
    """The area within an odd number of the rings (n, 2)."""
    return CrossSection([np.asarray(ring, np.float64) for ring in rings], FillRule.EvenOdd)


def disc(radius: float, at: Point = (0.0, 0.0)) -> CrossSection:
    """A filled circle of the XY plane."""
    return CrossSection.circle(radius, SEGMENTS).translate(at)


def around(solid: Manifold, count: int, start: float = 0.0) -> Manifold:
    """`count` copies of a solid at equal angles (degrees from `start`) around Y."""
    return join(*(solid.rotate((0, start + 360 * index / count, 0)) for index in range(count)))


def both_sides(solid: Manifold) -> Manifold:
    """A solid and its mirror image in X."""
    return join(solid, solid.mirror((1, 0, 0)))


def warp(solid: Manifold, moved: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> Manifold:
    """The solid with every point (V, 3) moved by a function, on a mesh fine enough for it."""
    low, high = np.split(np.asarray(solid.bounding_box()), 2)
    fine = solid.refine_to_length(float((high - low).max()) / 24)
    return fine.warp_batch(moved)


def bend(solid: Manifold, degrees: float) -> Manifold:
    """Bent sideways: the Y axis becomes an arc in the XY plane."""
    low, high = height_of(solid)
    curvature = np.radians(degrees) / (high - low)

    def moved(points: NDArray[np.float64]) -> NDArray[np.float64]:
        angle = (points[:, 1] - low) * curvature
        radius = 1 / curvature - points[:, 0]
        return np.stack(
            [1 / curvature - radius * np.cos(angle), low + radius * np.sin(angle), points[:, 2]], 1
        )

    return warp(solid, moved) if abs(curvature) > 1e-6 else solid


def twist(solid: Manifold, degrees: float) -> Manifold:
    """Turned around Y in proportion to the height."""
    low, high = height_of(solid)

    def moved(points: NDArray[np.float64]) -> NDArray[np.float64]:
        angle = np.radians(degrees) * (points[:, 1] - low) / (high - low)
        cosine, sine = np.cos(angle), np.sin(angle)
        x, z = points[:, 0], points[:, 2]
        return np.stack([cosine * x + sine * z, points[:, 1], cosine * z - sine * x], 1)

    return warp(solid, moved)


def taper(solid: Manifold, top: float) -> Manifold:
    """Scaled across from 1 at the bottom to `top` at the top."""
    low, high = height_of(solid)

    def moved(points: NDArray[np.float64]) -> NDArray[np.float64]:
        scale = 1 + (top - 1) * (points[:, 1] - low) / (high - low)
        return points * np.stack([scale, np.ones_like(scale), scale], 1)

    return warp(solid, moved)


def bumps(solid: Manifold, height: float, waves: float, phase: float = 0.0) -> Manifold:
    """Every point moved by up to `height` in waves of the position; `waves` over the longest side."""
    low, high = np.split(np.asarray(solid.bounding_box()), 2)
    pitch = 2 * np.pi * waves / float((high - low).max())

    def moved(points: NDArray[np.float64]) -> NDArray[np.float64]:
        shifted = points[:, [1, 2, 0]] * pitch + phase
        return points + height * np.sin(shifted) * np.cos(points[:, [2, 0, 1]] * pitch)

    return warp(solid, moved)


def height_of(solid: Manifold) -> tuple[float, float]:
    """Where it begins and ends in Y."""
    return solid.bounding_box()[1], solid.bounding_box()[4]


def _aim(solid: Manifold, axis: NDArray[np.float64], at: Point) -> Manifold:
    """A solid along +Z turned to a unit axis and moved to a point."""
    helper = np.array([0.0, 0, 1]) if abs(axis[2]) < 0.9 else np.array([1.0, 0, 0])
    side = np.cross(helper, axis)
    side /= np.linalg.norm(side)
    turned = np.stack([side, np.cross(axis, side), axis, np.asarray(at, np.float64)], axis=1)
    return solid.transform(turned)


def split_creases(
    vertices: NDArray[np.float64], faces: NDArray[np.int64], degrees: float = 30.0
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Vertices (V, 3) and faces (F, 3) such that only faces which meet smoothly share a vertex.

    So that a renderer which interpolates vertex normals shades flat faces flat.
    """
    mesh = trimesh.Trimesh(vertices, faces, process=False)
    pairs = mesh.face_adjacency[mesh.face_adjacency_angles < np.radians(degrees)]
    links = coo_array((np.ones(len(pairs)), tuple(pairs.T)), shape=(len(faces), len(faces)))
    count, sheet = connected_components(links, directed=False)
    corners, index = np.unique(faces * count + sheet[:, None], return_inverse=True)
    return vertices[corners // count], index.reshape(-1, 3)


def to_arrays(parts: Parts) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64], list[str]]:
    """The union of the parts: vertices (V, 3), faces (F, 3), part of each face (F,), names of the parts.

    Where parts overlap, the surface inside is gone; each face knows the part that it comes from.
    """
    originals = [solid.as_original() for solid in parts.values()]
    number = {solid.original_id(): index for index, solid in enumerate(originals)}
    mesh = Manifold.batch_boolean(originals, OpType.Add).to_mesh64()
    faces = np.asarray(mesh.tri_verts, np.int64)
    ends = np.asarray(mesh.run_index, np.int64) // 3
    part = np.repeat(
        [number[name] for name in np.asarray(mesh.run_original_id).tolist()], ends[1:] - ends[:-1]
    )
    vertices, faces = split_creases(np.asarray(mesh.vert_properties, np.float64)[:, :3], faces)
    return vertices, faces, part.astype(np.int64), list(parts)
