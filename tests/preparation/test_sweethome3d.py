"""The SweetHome3D source on a catalogue of three made-up models."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import trimesh

from elastic3d.errors import UserError
from elastic3d.preparation.sweethome3d import SweetHome3DSource, find_package

CATALOGUE = """
id#1=Scopia#Red Box
name#1=Caf\\u00e9 box
category#1=Kitchen
model#1=/scopia/box/box.obj
modelRotation#1=1 0 0 0 0 -1 0 1 0
creator#1=Somebody
id#2=Scopia#plate
name#2=Plate
category#2=Kitchen
model#2=/scopia/plate/plate.obj
creator#2=Somebody
id#3=Scopia#phone
name#3=Apple iPhone
category#3=Office
model#3=/scopia/box/box.obj
creator#3=Somebody
"""


def obj(mesh: trimesh.Trimesh) -> str:
    lines = ["mtllib box.mtl", *("v {:f} {:f} {:f}".format(*vertex) for vertex in mesh.vertices)]
    faces = ["f {} {} {}".format(*(face + 1)) for face in mesh.faces]
    return "\n".join([*lines, "usemtl red", *faces[:4], "usemtl blue", *faces[4:]])


@pytest.fixture
def source(tmp_path: Path) -> SweetHome3DSource:
    with zipfile.ZipFile(tmp_path / "Scopia.sh3f", "w") as archive:
        archive.writestr("PluginFurnitureCatalog.properties", CATALOGUE.encode("latin-1"))
        archive.writestr("scopia/box/box.obj", obj(trimesh.creation.box((1, 2, 3))))
        archive.writestr("scopia/box/box.mtl", "newmtl red\nKd 1 0 0\nnewmtl blue\nKd 0 0 1\n")
        archive.writestr("scopia/plate/plate.obj", obj(trimesh.creation.box((1, 0.01, 1))))
    return SweetHome3DSource(find_package(tmp_path, str(tmp_path)), tmp_path / "cache")


def test_catalogue(source: SweetHome3DSource) -> None:
    items = {item.id: item for item in source.items()}
    assert set(items) == {"scopia-red-box", "scopia-plate"}, "brands are left out"
    box = items["scopia-red-box"]
    assert (box.caption, box.category, box.creator) == ("a café box", "kitchen", "Somebody")
    assert (box.licence, box.source_id) == ("CC-BY-3.0", "Scopia#Red Box")


def test_rotation_parts_and_colours(source: SweetHome3DSource) -> None:
    shape = source.load(next(item for item in source.items() if item.id == "scopia-red-box"))
    np.testing.assert_allclose(shape.mesh.extents, (1, 3, 2))
    assert len(shape.mesh.vertices) == 8, "vertices on part borders are merged"
    assert shape.mesh.is_watertight
    assert shape.colours is not None
    found = {
        tuple(colour): count for colour, count in zip(shape.colours, np.bincount(shape.part), strict=True)
    }
    assert found == {(255, 0, 0): 4, (0, 0, 255): 8}


def test_flat_model(source: SweetHome3DSource) -> None:
    with pytest.raises(UserError, match=r"flat: its shortest side is 0\.010"):
        source.load(next(item for item in source.items() if item.id == "scopia-plate"))


def test_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"holds no \.sh3f library"):
        find_package(tmp_path, str(tmp_path / "nowhere"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no apt-get here"):
        find_package(tmp_path / "cache")
