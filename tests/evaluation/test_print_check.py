"""The print check against shapes whose walls, pieces and holes are known."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import trimesh

from elastic3d.evaluation.health import print_check


def hollow(wall: float) -> trimesh.Trimesh:
    """A closed box of side 1 with a cavity, walls of `wall`; two surfaces, one solid."""
    inner = trimesh.creation.box((1 - 2 * wall,) * 3)
    inner.invert()
    return trimesh.util.concatenate([trimesh.creation.box((1, 1, 1)), inner])


def test_a_plate_of_a_known_thickness() -> None:
    plate = trimesh.creation.box((2, 0.02, 1))
    check = print_check(plate, size_mm=100)
    assert (check.watertight, check.components, check.genus, check.faces) == (True, 1, 0, 12)
    assert check.thinnest_wall == pytest.approx(0.01, rel=0.02) and check.thinnest_mm == pytest.approx(
        1, rel=0.02
    )
    assert check.warnings() == [] and check.summary() == "watertight, 1 piece, genus 0, thinnest wall 1 mm"
    thin = print_check(plate, size_mm=50)
    assert len(thin.warnings()) == 1 and "size_mm=80 on" in thin.warnings()[0]
    assert "% of the longest side" in print_check(plate).summary() and print_check(plate).warnings() == []


@pytest.mark.parametrize("wall", [1e-4, 4e-5, 1e-5])
def test_a_wall_that_no_ray_starts_in_is_warned_of(wall: float) -> None:
    (warning,) = print_check(trimesh.creation.box((1, 1, wall)), size_mm=100).warnings()
    assert warning.startswith(f"walls of {100 * wall:g} mm") and f"size_mm={0.8 / wall:.0f} on" in warning


@pytest.mark.parametrize(
    ("wall", "size", "least", "said"),
    [
        (0.3, 1, 0.4, "walls of 0.3 mm, thinner than min_wall_mm=0.4: they print from size_mm=1.34 on"),
        (0.3, 0.1, 0.1, "walls of 0.03 mm, thinner than min_wall_mm=0.1: they print from size_mm=0.334 on"),
        (
            0.00123,
            100,
            1.7,
            "walls of 0.123 mm, thinner than min_wall_mm=1.7: they print from size_mm=1390 on",
        ),
        (0.15, 1000, 1000, "walls of 150 mm, thinner than min_wall_mm=1000: they print from size_mm=6670 on"),
    ],
)
def test_the_size_that_a_warning_names_is_large_enough(
    wall: float, size: float, least: float, said: str
) -> None:
    box = trimesh.creation.box((1, 1, wall))
    check = print_check(box, size, least)
    assert check.warnings() == [said]
    named = check.as_dict()["printable_from_mm"]
    assert f"size_mm={named:g} on" in said and print_check(box, named, least).warnings() == []
    assert print_check(box, named * 0.99, least).warnings() != []
    assert f"thinnest wall {round(1000 * wall, 2):g} mm" in print_check(box, 1000).summary()


def test_a_wall_without_thickness_prints_at_no_size() -> None:
    sheet = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [0, 1, 0]], [[0, 1, 2], [0, 2, 1]], process=False)
    check = print_check(sheet, size_mm=100)
    assert check.warnings() == ["walls of 0 mm, thinner than min_wall_mm=0.8"]
    assert check.as_dict()["printable_from_mm"] is None


def test_a_torus_has_a_hole_and_two_balls_are_two_pieces() -> None:
    assert print_check(trimesh.creation.torus(1, 0.3)).genus == 1
    perforated = replace(print_check(trimesh.creation.torus(1, 0.3)), genus=52)
    assert [w for w in perforated.warnings() if w.startswith("genus 52: walls have see-through holes")]
    balls = [trimesh.creation.icosphere(3), trimesh.creation.icosphere(3).apply_translation([3, 0, 0])]
    check = print_check(trimesh.util.concatenate(balls))
    assert check.components == 2 and "2 pieces" in check.summary() and "2 pieces" in check.warnings()[0]


def test_the_wall_of_a_hollow_box() -> None:
    check = print_check(hollow(0.03), size_mm=100)
    assert (check.components, check.pieces) == (2, 1) and check.warnings() == []
    assert "1 piece," in check.summary() and check.as_dict()["pieces"] == 1
    two = [hollow(0.03).apply_translation([far, 0, 0]) for far in (1e6, 1e6 + 2)]
    assert print_check(trimesh.util.concatenate(two)).pieces == 2
    assert check.thinnest_mm == pytest.approx(3, rel=0.05)
    beside = trimesh.creation.box((0.5, 0.5, 0.5)).apply_translation([3, 0, 0])
    beside.invert()
    assert print_check(trimesh.util.concatenate([hollow(0.03), beside])).pieces == 2, (
        "inside out, but no cavity"
    )


def test_an_open_mesh_is_told_and_has_no_wall() -> None:
    box = trimesh.creation.box()
    check = print_check(trimesh.Trimesh(box.vertices, box.faces[:-1], process=False), size_mm=10)
    assert not check.watertight and check.genus is None and check.thinnest_wall is None
    assert "3 edges have no two faces" in check.warnings()[0]


def test_the_check_is_json_and_does_not_depend_on_where_the_mesh_lies() -> None:
    box = trimesh.creation.box((1, 0.1, 1))
    there = print_check(box.copy().apply_scale(7).apply_translation([100, 0, 0]), size_mm=30)
    assert json.loads(json.dumps(there.as_dict())) == print_check(box, size_mm=30).as_dict()
