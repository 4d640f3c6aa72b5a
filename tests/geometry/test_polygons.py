import numpy as np
import pytest
import trimesh
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic3d.geometry.polygons import fan, strip, triangulate


def area(points: np.ndarray, faces: np.ndarray) -> float:
    a, b, c = points[faces].transpose(1, 0, 2)
    return float(np.linalg.norm(np.cross(b - a, c - a), axis=1).sum() / 2)


def shoelace(ring: np.ndarray) -> float:
    x, y = ring.T
    return float(abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2)


def one(points: np.ndarray) -> np.ndarray:
    return triangulate(points, np.array([len(points)]), np.arange(len(points)))


@settings(max_examples=60, deadline=None)
@given(
    radii=st.lists(st.floats(0.1, 1), min_size=3, max_size=30),
    turn=st.tuples(*[st.floats(0, 6)] * 3),
    far=st.sampled_from([0.0, 1e6]),
)
def test_stars_of_any_outline_keep_area_winding_and_outline(
    radii: list[float], turn: tuple[float, ...], far: float
) -> None:
    angle = 2 * np.pi * np.arange(len(radii)) / len(radii)
    ring = np.stack([np.cos(angle), np.sin(angle)], axis=1) * np.array(radii)[:, None]
    rotation = trimesh.transformations.euler_matrix(*turn)[:3, :3]
    points = np.pad(ring, ((0, 0), (0, 1))) @ rotation.T
    faces = one(points + far)
    assert len(faces) == len(ring) - 2 and set(faces.ravel()) == set(range(len(ring)))
    assert area(points, faces) == pytest.approx(shoelace(ring), rel=1e-5)
    normals = np.cross(points[faces[:, 1]] - points[faces[:, 0]], points[faces[:, 2]] - points[faces[:, 0]])
    assert (normals @ rotation[:, 2] > -1e-6).all()
    sides = {(int(a), int(b)) for face in faces for a, b in zip(face, np.roll(face, -1), strict=True)}
    assert {(i, (i + 1) % len(ring)) for i in range(len(ring))} <= sides, "neighbours still share their edges"


def test_corners_on_a_straight_line_are_kept() -> None:
    """An arrow whose straight sides have extra corners: ear clipping alone would leave them out."""
    ring = np.array(
        [[0, 0], [1, 0], [2, 0], [3, 0], [3, 1], [3, 2], [1.5, 0.5], [0, 2], [0, 1.5], [0, 1]], float
    )
    faces = one(np.pad(ring, ((0, 0), (0, 1))))
    assert len(faces) == len(ring) - 2 and set(faces.ravel()) == set(range(len(ring)))
    assert area(np.pad(ring, ((0, 0), (0, 1))), faces) == pytest.approx(shoelace(ring))


def test_order_and_sizes() -> None:
    square = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], float)
    dart = np.array([[0, 0, 0], [2, -1, 0], [0, 2, 0], [-2, -1, 0]], float) + [0, 0, 5]
    points = np.concatenate([square, dart])
    corners = np.array([0, 1, 2, 3, 4, 5, 0, 1, 2, 5, 6, 7, 4])
    faces = triangulate(points, np.array([3, 1, 2, 3, 4]), corners)
    assert faces[:2].tolist() == [[0, 1, 2], [0, 1, 2]] and len(faces) == 4
    assert area(points, faces[2:]) == pytest.approx(shoelace(dart[:, :2])), "not the fan that leaves the dart"
    assert triangulate(points, np.array([1, 2]), np.array([0, 1, 2])).shape == (0, 3)


@pytest.mark.parametrize(
    "points",
    [
        np.zeros((5, 3)),
        np.outer(np.arange(6.0), [1, 2, 3]),
        np.array([[0, 0, 0], [1, 1, 0], [1, 0, 0], [0, 1, 0]], float),  # crosses itself
        np.array([[0, 0, 0], [1, 0, 0], [1, 0, 0], [0.2, 0.2, 0], [0, 1, 0]], float),  # a corner twice
        np.full((5, 3), np.nan),
    ],
)
def test_degenerate_polygons_still_give_their_triangles(points: np.ndarray) -> None:
    faces = one(points)
    assert faces.shape == (len(points) - 2, 3) and set(faces.ravel()) == set(range(len(points)))


def test_strips_and_fans() -> None:
    assert strip(np.array([0, 1, 2, 3, 4])).tolist() == [[0, 1, 2], [1, 3, 2], [2, 3, 4]]
    assert strip(np.array([0, 1, 2, 2, 3, 3, 4, 5])).tolist() == [[0, 1, 2], [3, 5, 4]]
    assert fan(np.array([7, 1, 2, 3])).tolist() == [[1, 2, 7], [2, 3, 7]]
    assert strip(np.array([0, 1])).shape == fan(np.array([], int)).shape == (0, 3)
