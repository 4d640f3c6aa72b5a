"""Surface health on whole meshes and on meshes broken on purpose, one for each defect."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
import trimesh
from hypothesis import given, settings
from hypothesis import strategies as st
from trimesh.transformations import random_rotation_matrix, rotation_matrix

from elastic3d.evaluation.health import (
    SurfaceHealth,
    count_floaters,
    inconsistent_edges,
    is_manifold,
    self_intersections,
    surface_health,
    thinnest_wall,
)
from elastic3d.geometry.cleanup import mesh_health

SOUND = SurfaceHealth(True, 0.0, 0.0, 0.0, 0, 0)


def sphere(subdivisions: int = 3) -> trimesh.Trimesh:
    return trimesh.creation.icosphere(subdivisions)


def moved(mesh: trimesh.Trimesh, *shift: float) -> trimesh.Trimesh:
    return mesh.copy().apply_translation(shift)


def joined(*meshes: trimesh.Trimesh) -> trimesh.Trimesh:
    return trimesh.util.concatenate(meshes)


WHOLE = {
    "sphere": sphere(),
    "box": trimesh.creation.box(),
    "fine box": trimesh.creation.box().subdivide().subdivide(),  # many faces in one plane
    "torus": trimesh.creation.torus(1, 0.3),
    "hollow ball": joined(sphere(), trimesh.Trimesh(0.5 * sphere().vertices, sphere().faces[:, ::-1])),
    "two balls": joined(sphere(), moved(sphere(), 3, 0, 0)),
    "huge": sphere().apply_scale(1e6).apply_translation([1e7, 0, 0]),
    "cylinder": trimesh.creation.cylinder(0.5, 2),
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_meshes_are_sound(name: str) -> None:
    assert surface_health(WHOLE[name]) == SOUND


def flipped(share: float) -> trimesh.Trimesh:
    mesh = sphere()
    faces = mesh.faces.copy()
    cut = int(share * len(faces))
    faces[:cut] = faces[:cut, ::-1]
    return trimesh.Trimesh(mesh.vertices, faces, process=False)


DEFECTS = {
    "self_intersection_share": (
        joined(trimesh.creation.box(), moved(trimesh.creation.box(), 0.3, 0.4, 0.5)),
        0.5,
    ),
    "thin_shell_share": (trimesh.creation.box((2, 2, 0.008)), 0.992),
    "inverted_share": (trimesh.Trimesh(sphere().vertices, sphere().faces[:, ::-1], process=False), 1.0),
    "floaters": (joined(sphere(), moved(sphere().apply_scale(0.02), 1.5, 0, 0)), 1),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_each_defect_is_found_and_no_other_is_reported(name: str) -> None:
    mesh, value = DEFECTS[name]
    found = asdict(surface_health(mesh))
    assert found.pop(name) == pytest.approx(value, abs=0.005)
    assert found == {key: other for key, other in asdict(SOUND).items() if key != name}


def test_flipped_faces_are_measured_by_area() -> None:
    found = surface_health(flipped(0.2))
    assert found.inverted_share == pytest.approx(0.2, abs=0.03)
    assert found.inconsistent_edges > 20
    assert found.self_intersection_share == 0


def test_edges_with_other_than_two_faces_have_no_sense() -> None:
    box = trimesh.creation.box()
    vertices = np.vstack([box.vertices, [2, 2, 2]])
    for faces in (box.faces, np.vstack([box.faces, [*box.faces[0][:2], 8]]), box.faces[:5]):
        assert inconsistent_edges(trimesh.Trimesh(vertices, faces, process=False)) == 0


def test_manifold() -> None:
    box = np.asarray(trimesh.creation.box().faces)
    assert is_manifold(box)
    assert is_manifold(box[:-1])  # a hole is no harm
    assert is_manifold(box + 5)  # neither are vertices without faces
    assert not is_manifold(np.vstack([box, [*box[0][:2], 8]]))  # three faces on one edge
    tips = np.where(box == 0, 0, box + 8)
    assert not is_manifold(np.vstack([box, tips]))  # two boxes that touch in one corner


def brute_force_crossings(mesh: trimesh.Trimesh) -> np.ndarray:
    """Every edge of every face against every other face: solve a + t (b - a) = p + u e1 + v e2."""
    marked = np.zeros(len(mesh.faces), bool)
    triangles = mesh.triangles
    for i, first in enumerate(mesh.faces):
        for j, second in enumerate(mesh.faces):
            for k in range(3):
                if {first[k], first[(k + 1) % 3]} & set(second):
                    continue
                a, b = triangles[i][k], triangles[i][(k + 1) % 3]
                p, q, r = triangles[j]
                system = np.stack([a - b, q - p, r - p], axis=1)
                if abs(np.linalg.det(system)) < 1e-12:
                    continue
                t, u, v = np.linalg.solve(system, a - p)
                if 0 < t < 1 and u > 0 and v > 0 and u + v < 1:
                    marked[[i, j]] = True
    return marked


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10_000))
def test_crossings_equal_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = trimesh.creation.box((1, 1, 1)), trimesh.creation.icosphere(0, 0.7)
    for mesh in (first, second):
        mesh.apply_transform(random_rotation_matrix(rng.random(3))).apply_translation(0.5 * rng.random(3))
    both = joined(first, second)
    assert (self_intersections(both) == brute_force_crossings(both)).all()


def test_many_layers_are_all_crossed() -> None:
    """One long triangle through six plates marks all of them."""
    plates = [moved(trimesh.creation.box((2, 2, 0.05)), 0, 0, height) for height in np.arange(6) * 0.3]
    needle = trimesh.Trimesh([[0.1, 0.2, -1], [0.11, 0.25, 3], [0.12, 0.1, 3]], [[0, 1, 2]], process=False)
    mesh = joined(*plates, needle)
    marked = self_intersections(mesh)
    assert marked[-1]
    for index in range(3):  # each layer is a top and a bottom; an edge is followed through the first eight
        assert marked[12 * index : 12 * index + 12].any()


def test_touching_and_coplanar_faces_do_not_cross() -> None:
    box = trimesh.creation.box()
    for shift in ((1, 0, 0), (0.5, 0, 1), (0, 1, 0)):  # side by side, sharing a wall or a part of one
        assert not self_intersections(joined(box, moved(box, *shift))).any()


def test_shares_do_not_depend_on_pose_and_tessellation() -> None:
    mesh = DEFECTS["thin_shell_share"][0]
    turned = mesh.subdivide().apply_transform(rotation_matrix(0.7, [1, 2, 3])).apply_scale(50)
    assert surface_health(turned).thin_shell_share == pytest.approx(0.992, abs=0.005)


@pytest.mark.parametrize("wall", [1e-3, 1e-4, 6e-5, 4e-5, 1e-5, 1e-6, 0])
def test_however_thin_a_wall_is_it_is_one(wall: float) -> None:
    plate = trimesh.creation.box((1, 1, wall))
    assert surface_health(plate).thin_shell_share == pytest.approx(1, abs=0.005)
    assert thinnest_wall(plate) == pytest.approx(wall, rel=1e-3)


def test_what_touches_or_is_open_is_no_thin_wall() -> None:
    box = trimesh.creation.box()
    for shift in (1, 1 + 1e-5, 0.5):
        assert surface_health(joined(box, moved(box, 0, 0, shift))).thin_shell_share == 0
    front = trimesh.Trimesh(sphere().vertices, sphere().faces[:200], process=False)
    assert surface_health(front).thin_shell_share == 0
    both = trimesh.Trimesh(front.vertices, np.vstack([front.faces, front.faces[:, ::-1]]), process=False)
    assert surface_health(both).thin_shell_share == 1


def test_floaters_are_judged_by_area() -> None:
    assert count_floaters(WHOLE["two balls"]) == 0
    crumbs = [moved(sphere(0).apply_scale(0.01), 1.2, 0.1 * i, 0) for i in range(5)]
    assert count_floaters(joined(sphere(), *crumbs)) == 5
    box = trimesh.creation.box()
    fan = np.vstack([box.faces, [[*box.faces[0][:2], 8], [0, 8, 9]]])  # an edge with three faces joins them
    tiny = trimesh.Trimesh(
        np.vstack([box.vertices, [[0.5, 0.5, 0.51], [0.5, 0.51, 0.51]]]), fan, process=False
    )
    assert count_floaters(tiny) == 0


def test_what_a_mesh_without_collapsed_faces_has_is_all_that_counts() -> None:
    ball = sphere()
    vertices = np.vstack([ball.vertices, [[2, 0, 0]] * 3, ball.vertices[:1]])
    strays = [[642, 643, 644], [0, 645, 1]]  # three corners at one place, two at one
    mesh = trimesh.Trimesh(vertices, np.vstack([ball.faces, strays]), process=False)
    assert surface_health(mesh) == SOUND
    found = mesh_health(mesh)
    assert (found.watertight, found.components, found.non_manifold_edges) == (True, 1, 0)


def test_nothing_raises_valueerror() -> None:
    with pytest.raises(ValueError, match="no faces"):
        surface_health(trimesh.Trimesh())


def test_thinnest_wall_of_known_shapes() -> None:
    plate = trimesh.creation.box((2, 1, 0.05))
    assert thinnest_wall(plate) == pytest.approx(0.05, rel=1e-3)
    assert thinnest_wall(plate.copy().apply_scale(30).apply_translation([9e5, 0, 0])) == pytest.approx(
        1.5, rel=1e-3
    )
    leg = trimesh.creation.box(bounds=[[1, 0, 0], [3, 0.02, 0.02]])
    table = trimesh.util.concatenate([trimesh.creation.box((1, 1, 1)), leg])
    assert thinnest_wall(table) == pytest.approx(0.02, rel=1e-2), (
        "a thin leg counts although it is little area"
    )
    shell = trimesh.creation.icosphere(4)
    inner = trimesh.creation.icosphere(4, 0.9)
    inner.invert()
    assert thinnest_wall(trimesh.util.concatenate([shell, inner])) == pytest.approx(0.1, rel=0.02)
    sheet = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [0, 1, 0]], [[0, 1, 2]], process=False)
    assert thinnest_wall(sheet) is None
    with pytest.raises(ValueError, match="no faces"):
        thinnest_wall(trimesh.Trimesh())
