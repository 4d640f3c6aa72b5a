"""Colours of an image on a mesh: the camera that is found, what is seen, what is guessed, and what is saved."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import trimesh
from painted import PALETTES, SIZE, Painted, look, painted, psnr

from elastic3d.geometry.cleanup import unwrap, with_smooth_normals
from elastic3d.geometry.colour import ImageColours, filled, with_texture, with_vertex_colours
from elastic3d.geometry.mesh_io import save_mesh
from elastic3d.geometry.pose import CANONICAL, Pose, find_pose

VIEWS = {"chair": (40.0, 15.0, 35.0), "sofa": (-52.0, 30.0, 36.0), "cabinet": (18.0, 16.0, 50.0)}


@cache
def found(name: str) -> tuple[Painted, np.ndarray, Pose, trimesh.Trimesh]:
    """A shape, its image, the camera found with the model's mesh of it, and that mesh coloured."""
    shape = painted(name)
    image = shape.view(shape.camera(*VIEWS[name]), seed=1)
    pose = find_pose(shape.made, image)
    return shape, image, pose, with_vertex_colours(shape.made, ImageColours(shape.made, pose.camera, image))


@pytest.mark.parametrize("name", VIEWS)
def test_the_camera_is_found(name: str) -> None:
    _, _, pose, _ = found(name)
    azimuth, elevation, fov = VIEWS[name]
    assert pose.overlap > 0.9
    assert abs(pose.azimuth_deg - azimuth) < 4 and abs(pose.elevation_deg - elevation) < 4
    assert abs(pose.camera.fov_deg - fov) < 12


@pytest.mark.parametrize("name", VIEWS)
def test_the_view_of_the_image_is_the_image(name: str) -> None:
    _, image, pose, mesh = found(name)
    colour, surface = look(mesh, pose.camera)
    both = surface & (image[..., 3] >= 250)
    assert both.sum() > 0.9 * (image[..., 3] >= 250).sum()
    assert psnr((colour - image[..., :3])[both]) >= 22


@pytest.mark.parametrize("name", VIEWS)
def test_other_views_are_nearer_than_the_mean_colour(name: str) -> None:
    shape, image, _, mesh = found(name)
    mean = image[image[..., 3] >= 250][:, :3].mean(axis=0)
    azimuth, elevation, fov = VIEWS[name]
    ours, plain = [], []
    for turned in (-120, -60, 60, 120, 180):
        camera = shape.camera(azimuth + turned, elevation, fov)
        truth = shape.view(camera, seed=1)
        colour, surface = look(mesh, camera)
        both = surface & (truth[..., 3] >= 250)
        ours.append(np.mean((colour - truth[..., :3])[both] ** 2))
        plain.append(np.mean((mean - truth[..., :3])[both] ** 2))
    assert np.sqrt(np.mean(ours)) < 0.75 * np.sqrt(np.mean(plain))


def test_no_colour_is_the_backgrounds() -> None:
    """A green screen that the mask cuts through: nothing on the mesh is green, wherever the mesh reaches."""
    shape, image, pose, _ = found("chair")
    screen = image.copy()
    screen[image[..., 3] < 255] = (0, 255, 0, 0)
    inside = image[..., 3] == 255
    edge = inside & ~np.all([np.roll(inside, step, axis) for step in (1, -1) for axis in (0, 1)], axis=0)
    screen[edge, :3] = (0, 255, 0)  # the object's outermost pixels are mixed with what is behind it
    mesh = with_vertex_colours(shape.made, ImageColours(shape.made, pose.camera, screen))
    red, green, blue = mesh.visual.vertex_colors[:, :3].T.astype(int)
    assert (green > np.maximum(red, blue) + 60).mean() < 0.002


def test_thin_parts_keep_their_own_colour() -> None:
    image = np.zeros((40, 40, 4), np.uint8)
    image[:, :] = (0, 255, 0, 0)
    image[10:30, 10:30] = (200, 0, 0, 255)
    image[20:23, 30:38] = (0, 0, 200, 255)
    assert tuple(filled(image)[21, 36]) == (0, 0, 200)
    assert (filled(image)[..., 1] == 0).all()
    with pytest.raises(ValueError, match="transparent"):
        filled(np.zeros((8, 8, 4), np.uint8))


def test_what_is_hidden_takes_the_colour_of_its_mirror_image() -> None:
    """A ball, red on top and blue below, seen from one side: the other side is red and blue too."""
    ball = trimesh.creation.icosphere(4, 0.9)
    colours = np.where(ball.triangles_center[:, 1:2] > 0, np.uint8([[200, 0, 0]]), np.uint8([[0, 0, 200]]))
    shape = Painted(ball, colours, ball)
    camera = shape.camera(60, 0, 35)
    mesh = with_vertex_colours(ball, ImageColours(ball, camera, shape.view(camera)))
    red, _, blue = mesh.visual.vertex_colors[:, :3].T.astype(int)
    high, low = ball.vertices[:, 1] > 0.2, ball.vertices[:, 1] < -0.2
    assert (red[high] > blue[high]).all() and (blue[low] > red[low]).all()


def test_a_pose_stays_in_its_range_and_bad_images_are_told() -> None:
    shape, image, pose, _ = found("chair")
    assert CANONICAL.azimuth[0] <= pose.azimuth_deg <= CANONICAL.azimuth[1]
    with pytest.raises(ValueError, match="transparent"):
        find_pose(shape.made, np.zeros((32, 32, 4), np.uint8))
    with pytest.raises(ValueError, match="expected"):
        find_pose(shape.made, image[:20])


def _coloured(folder: Path) -> dict[str, Path]:
    """A box from the front, red and blue, as vertex colours and as a texture."""
    box = with_smooth_normals(trimesh.creation.box((1.2, 1.6, 0.8)).subdivide_to_size(0.15))
    colours = np.where(box.triangles_center[:, 1:2] > 0, np.uint8([[200, 0, 0]]), np.uint8([[0, 0, 200]]))
    shape = Painted(box, colours, box)
    camera = shape.camera(30, 20, 35)
    image, files = shape.view(camera), {}
    flat = unwrap(box)
    for name, mesh in (
        ("vertices", with_vertex_colours(box, ImageColours(box, camera, image))),
        ("texture", with_texture(flat, ImageColours(flat, camera, image), 256)),
    ):
        files[name] = folder / f"{name}.glb"
        save_mesh(mesh, files[name])
    return files


def _vertex_colours(path: Path) -> np.ndarray:
    """COLOR_0 (V, 4) of a glb of one primitive; trimesh leaves it out beside a material."""
    data = path.read_bytes()
    length = struct.unpack("<I", data[12:16])[0]
    tree = json.loads(data[20 : 20 + length])
    accessor = tree["accessors"][tree["meshes"][0]["primitives"][0]["attributes"]["COLOR_0"]]
    assert (accessor["componentType"], accessor["normalized"], accessor["type"]) == (5121, True, "VEC4")
    start = 28 + length + tree["bufferViews"][accessor["bufferView"]].get("byteOffset", 0)
    return np.frombuffer(data, np.uint8, 4 * accessor["count"], start).reshape(-1, 4)


def test_files_hold_the_colours(tmp_path: Path) -> None:
    pytest.importorskip("xatlas")
    files = _coloured(tmp_path)
    plain = trimesh.load(files["vertices"], force="mesh", process=False)
    stored = _vertex_colours(files["vertices"])
    top = stored[plain.vertices[:, 1] > 0.3, :3].mean(axis=0)
    linear = 255 * ((200 / 255 + 0.055) / 1.055) ** 2.4  # as glTF has them (IEC 61966-2-1)
    assert 0.6 * linear < top[0] < 1.1 * linear and top[2] < 20
    textured = trimesh.load(files["texture"], force="mesh", process=False)
    image = np.asarray(textured.visual.material.baseColorTexture.convert("RGB")).astype(int)
    assert image.shape == (256, 256, 3)
    at = np.clip((textured.visual.uv * [1, -1] + [0, 1]) * 256, 0, 255).astype(int)
    shown = image[at[:, 1], at[:, 0]]
    high, low = textured.vertices[:, 1] > 0.2, textured.vertices[:, 1] < -0.2
    right = [(shown[high, 0] > shown[high, 2]).mean(), (shown[low, 2] > shown[low, 0]).mean()]
    assert min(right) > 0.97  # at the corner of a chart the nearest pixel may be another chart's
    ply = files["vertices"].with_suffix(".ply")
    save_mesh(trimesh.Trimesh(plain.vertices, plain.faces, vertex_colors=stored, process=False), ply)
    assert trimesh.load(ply, process=False).visual.kind == "vertex"


def test_khronos_validator_finds_nothing(tmp_path: Path) -> None:
    pytest.importorskip("xatlas")
    validator = Path(os.environ.get("GLTF_VALIDATOR", Path(__file__).parents[2]))
    if not shutil.which("node") or not (validator / "node_modules/gltf-validator").is_dir():
        pytest.skip("no npm gltf-validator: set GLTF_VALIDATOR")
    script = """
        const validator = require('gltf-validator'), fs = require('fs');
        const check = p => validator.validateBytes(new Uint8Array(fs.readFileSync(p))).then(r => r.issues);
        Promise.all(process.argv.slice(1).map(check)).then(r => console.log(JSON.stringify(r)));
    """
    files = [str(path) for path in _coloured(tmp_path).values()]
    done = subprocess.run(
        ["node", "-e", script, *files], cwd=validator, capture_output=True, text=True, check=True
    )
    for issues in json.loads(done.stdout):
        assert (issues["numErrors"], issues["numWarnings"]) == (0, 0), issues["messages"]


def test_every_palette_has_a_view_of_its_size() -> None:
    shape = painted("table")
    assert set(VIEWS) < set(PALETTES)
    assert shape.view(shape.camera(0, 20, 40)).shape == (SIZE, SIZE, 4)
