"""Texture coordinates are found in every format that can hold them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import trimesh

from elastic3d.evaluation.items import has_uv


def ball(with_uv: bool) -> trimesh.Trimesh:
    mesh = trimesh.creation.icosphere(1)
    if with_uv:
        mesh.visual = trimesh.visual.TextureVisuals(uv=np.asarray(mesh.vertices)[:, :2])
    return mesh


@pytest.mark.parametrize("suffix", ["glb", "obj"])
@pytest.mark.parametrize("with_uv", [True, False])
def test_glb_and_obj(tmp_path: Path, suffix: str, with_uv: bool) -> None:
    path = tmp_path / f"ball.{suffix}"
    ball(with_uv).export(path)
    assert has_uv(path) is with_uv


def test_any_space_after_the_word_of_an_obj_line(tmp_path: Path) -> None:
    (tmp_path / "a.obj").write_text("v 0 0 0\nv 1 0 0\nv 0 1 0\n vt\t0 0\nf 1/1 2/1 3/1\n")
    assert has_uv(tmp_path / "a.obj")


def test_gltf(tmp_path: Path) -> None:
    path = tmp_path / "ball.gltf"
    path.write_text('{"meshes": [{"primitives": [{"attributes": {"POSITION": 0, "TEXCOORD_0": 1}}]}]}')
    assert has_uv(path)
    path.write_text('{"meshes": [{"primitives": [{"attributes": {"POSITION": 0}}]}]}')
    assert not has_uv(path)


def test_ply(tmp_path: Path) -> None:
    path = tmp_path / "ball.ply"
    ball(False).export(path)
    assert not has_uv(path)
    path.write_bytes(
        path.read_bytes().replace(b"property float z\n", b"property float z\nproperty float s\n")
    )
    assert has_uv(path)


def test_the_binary_part_of_a_glb_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "ball.glb"
    ball(True).export(path)
    data = path.read_bytes()
    path.write_bytes(data[: 20 + int.from_bytes(data[12:16], "little")])
    assert has_uv(path)


@pytest.mark.parametrize("suffix", ["stl", "off"])
def test_formats_without(tmp_path: Path, suffix: str) -> None:
    ball(False).export(tmp_path / f"ball.{suffix}")
    assert not has_uv(tmp_path / f"ball.{suffix}")
