from collections import Counter

import numpy as np
import pytest
import trimesh

from elastic3d.geometry.cleanup import is_closed, mesh_health
from elastic3d.geometry.sheets import _without_double_edges, separate_sheets


def merged(*meshes: trimesh.Trimesh) -> trimesh.Trimesh:
    """Meshes as one whose equal vertices are merged, degenerate faces kept."""
    whole = trimesh.util.concatenate(meshes)
    _, index, inverse = np.unique(whole.vertices.round(9), axis=0, return_index=True, return_inverse=True)
    return trimesh.Trimesh(whole.vertices[index], inverse[whole.faces], process=False)


def edge_counts(mesh: trimesh.Trimesh) -> Counter[int]:
    return Counter(Counter(map(tuple, np.sort(mesh.edges, axis=1).tolist())).values())


def box(low: list[float], high: list[float]) -> trimesh.Trimesh:
    return trimesh.creation.box(bounds=[low, high])


def test_bodies_that_touch_along_an_edge_are_two_bodies() -> None:
    mesh = merged(box([0, 0, 0], [1, 1, 1]), box([1, 1, 0], [2, 2, 1]))
    assert edge_counts(mesh)[4] == 1 and len(mesh.vertices) == 14
    apart = separate_sheets(mesh)
    assert apart is not None and len(apart.vertices) == 16 and set(edge_counts(apart)) == {2}
    assert apart.body_count == 2 and apart.volume == pytest.approx(2)


def test_a_tip_that_touches_a_vertex_gets_its_own() -> None:
    mesh = merged(box([0, 0, 0], [1, 1, 1]), box([1, 1, 1], [2, 2, 2]))
    apart = separate_sheets(mesh)
    assert (
        apart is not None and len(mesh.vertices) == 15 and len(apart.vertices) == 16 and apart.body_count == 2
    )


def test_a_squeezed_plate_keeps_its_two_sides() -> None:
    """A plate whose sides met along a line in its middle is one plate with two sides, not two halves."""
    x = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2], float)
    y = np.repeat([0, 1, 0, 1], 3).astype(float)
    z = np.repeat([0.1, 0.1, -0.1, -0.1], 3) * (x != 1)  # top 0-5, bottom 6-11, both at height 0 where x = 1
    quads = [(0, 1, 4, 3), (1, 2, 5, 4), (7, 6, 9, 10), (8, 7, 10, 11)]
    rim = [(6, 0, 3, 9), (2, 8, 11, 5)]
    ends = [(6, 7, 0), (0, 7, 1), (7, 8, 1), (1, 8, 2), (3, 4, 9), (4, 10, 9), (4, 5, 10), (5, 11, 10)]
    faces = [f for a, b, c, d in quads + rim for f in ((a, b, c), (a, c, d))] + ends
    glued = merged(trimesh.Trimesh(np.stack([x, y, z], axis=1), faces, process=False))
    glued = trimesh.Trimesh(glued.vertices, [f for f in glued.faces if len(set(f)) == 3], process=False)
    assert edge_counts(glued)[4] == 1
    apart = separate_sheets(glued)
    assert apart is not None and set(edge_counts(apart)) == {2} and apart.body_count == 1
    assert apart.volume == pytest.approx(glued.volume)


def test_cancelling_faces_go_and_a_clean_surface_stays() -> None:
    ball = trimesh.creation.icosphere(2)
    same = separate_sheets(ball)
    assert same is not None and len(same.vertices) == len(ball.vertices)
    np.testing.assert_array_equal(same.triangles, ball.triangles)
    a, b, _ = ball.faces[0]
    fin = [[a, b, len(ball.vertices)], [b, a, len(ball.vertices)]]
    spiked = trimesh.Trimesh(np.vstack([ball.vertices, [0, 0, 3]]), [*ball.faces, *fin], process=False)
    plain = separate_sheets(spiked)
    assert (
        plain is not None and len(plain.faces) == len(ball.faces) and plain.bounds[1, 2] == pytest.approx(1)
    )


def test_two_edges_between_two_vertices_become_different_ones() -> None:
    """A body of two tetrahedra that share one edge's ends but not the edge: one edge gets a vertex halfway."""
    right = np.array([[0, 1, 2], [0, 2, 3], [0, 3, 1], [1, 3, 2]])
    faces = np.concatenate([right, np.array([0, 1, 4, 5])[right]])
    vertices = np.array([[0, 0, 0], [0, 0, 1], [1, 0, 0.5], [1, 1, 0.5], [-1, 0, 0.5], [-1, -1, 0.5]], float)
    tail, head = faces.ravel(), np.roll(faces, -1, axis=1).ravel()
    body = np.arange(24) // 12
    half_edge = {side: i for i, side in enumerate(zip(body, tail, head, strict=True))}
    partner = np.array([half_edge[of, b, a] for of, a, b in zip(body, tail, head, strict=True)])
    found, split = _without_double_edges(vertices, faces, partner)
    before, after = (trimesh.Trimesh(v, f, process=False) for v, f in ((vertices, faces), (found, split)))
    assert edge_counts(before)[4] == 1 and set(edge_counts(after)) == {2} and len(split) == len(faces) + 2
    assert after.volume == pytest.approx(before.volume) and after.area == pytest.approx(before.area)


def test_open_surfaces_are_told() -> None:
    ball = trimesh.creation.icosphere(1)
    assert separate_sheets(trimesh.Trimesh(ball.vertices, ball.faces[1:], process=False)) is None
    turned = np.array(ball.faces)
    turned[0] = turned[0, ::-1]
    assert separate_sheets(trimesh.Trimesh(ball.vertices, turned, process=False)) is None
    assert is_closed(ball) and mesh_health(ball).watertight
