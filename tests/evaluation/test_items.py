"""Folders to rows: pairing, and every way in which an item can be broken."""

from __future__ import annotations

import json
import os
import re
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import trimesh

from elastic3d.errors import UserError
from elastic3d.evaluation.items import find_items, score_item
from elastic3d.evaluation.options import ProtocolConfig
from elastic3d.evaluation.report import write_csv

QUICK = ProtocolConfig(points=500, volume_points=500, near_points=100, views=0, max_faces=1500)


def sphere() -> trimesh.Trimesh:
    return trimesh.creation.icosphere(2)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for side in ("pred", "gt"):
        (tmp_path / side).mkdir()
        sphere().export(tmp_path / side / "ball.glb")
    return tmp_path / "pred", tmp_path / "gt"


def row_of(name: str, folders: tuple[Path, Path]) -> dict:
    (item,) = [item for item in find_items(*folders) if item.name == name]
    return score_item(item, QUICK)


@pytest.mark.parametrize("suffix", ["glb", "obj", "ply", "stl", "off", "STL"])
def test_any_format_pairs_by_stem(folders: tuple[Path, Path], suffix: str) -> None:
    (folders[0] / "ball.glb").unlink()
    sphere().export(folders[0] / f"ball.{suffix}", file_type=suffix.lower())
    row = row_of("ball", folders)
    assert (row["status"], row["error"]) == ("ok", None)
    assert row["chamfer_l1"] < 1e-6
    assert row["volume_iou"] == 1


def test_scenes_are_flattened_with_their_transforms(folders: tuple[Path, Path]) -> None:
    scene = trimesh.Scene()
    for shift in (-2.0, 2.0):
        scene.add_geometry(sphere(), transform=trimesh.transformations.translation_matrix([shift, 0, 0]))
    scene.export(folders[0] / "pair.glb")
    left, right = (sphere().apply_translation([shift, 0, 0]) for shift in (-2, 2))
    trimesh.util.concatenate([left, right]).export(folders[1] / "pair.ply")
    row = row_of("pair", folders)
    assert row["chamfer_l1"] < 0.1
    assert row["components"] == 2


def test_names_keep_their_folder_and_their_dots(folders: tuple[Path, Path]) -> None:
    for side in folders:
        (side / "seed 1").mkdir()
        sphere().export(side / "seed 1" / "ball v1.2 (copy).glb")
    (folders[0] / "notes.txt").write_text("not a mesh")
    (folders[0] / "._ball.glb").write_text("left by another system")
    assert [item.name for item in find_items(*folders)] == ["ball", "seed 1/ball v1.2 (copy)"]


def png_bomb() -> bytes:
    """A PNG file of a few kB that unpacks to 30,000 x 30,000 grey pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(30_001)) for _ in range(300)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_textures_are_never_unpacked(folders: tuple[Path, Path]) -> None:
    folder = folders[0]
    (folder / "bomb.png").write_bytes(png_bomb())
    (folder / "bomb.mtl").write_text("newmtl m\nmap_Kd bomb.png\n")
    lines = ["mtllib bomb.mtl", *(f"v {x} {y} {z}" for x, y, z in sphere().vertices), "vt 0 0", "usemtl m"]
    lines += [f"f {a + 1}/1 {b + 1}/1 {c + 1}/1" for a, b, c in sphere().faces]
    (folder / "bomb.obj").write_text("\n".join(lines))
    sphere().export(folders[1] / "bomb.glb")
    assert row_of("bomb", folders)["status"] == "ok"


def test_a_texture_inside_a_glb_is_never_unpacked(folders: tuple[Path, Path]) -> None:
    data = (folders[0] / "ball.glb").read_bytes()
    length = struct.unpack("<I", data[12:16])[0]
    tree, binary = json.loads(data[20 : 20 + length]), data[28 + length :] + png_bomb()
    binary += bytes(-len(binary) % 4)
    tree["bufferViews"].append(
        {"buffer": 0, "byteOffset": len(data) - 28 - length, "byteLength": len(png_bomb())}
    )
    tree["images"] = [{"mimeType": "image/png", "bufferView": len(tree["bufferViews"]) - 1}]
    tree["textures"] = [{"source": 0}]
    tree["materials"] = [{"pbrMetallicRoughness": {"baseColorTexture": {"index": 0}}}]
    tree["meshes"][0]["primitives"][0]["material"] = 0
    tree["buffers"][0]["byteLength"] = len(binary)
    text = json.dumps(tree).encode()
    text += b" " * (-len(text) % 4)
    chunks = (
        struct.pack("<I4s", len(text), b"JSON") + text + struct.pack("<I4s", len(binary), b"BIN\0") + binary
    )
    (folders[0] / "ball.glb").write_bytes(struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks)
    row = row_of("ball", folders)
    assert (row["status"], row["error"]) == ("ok", None)


def write_broken(kind: str, folder: Path) -> str:
    """Write a broken `x` into the folder and return what its row must say."""
    path, ball = folder / "x.ply", sphere()
    if kind == "truncated":
        data = (folder / "ball.glb").read_bytes()
        (folder / "x.glb").write_bytes(data[: len(data) // 2])
        return "x.glb"
    if kind == "duplicate":
        ball.export(path)
        ball.export(folder / "x.obj")
        return "2 .* files are named x: x.obj, x.ply"
    if kind == "empty file":
        path.write_bytes(b"")
        return "is empty"
    if kind == "text":
        path.write_text("hello")
        return "x.ply"
    if kind == "no faces":
        trimesh.PointCloud(ball.vertices).export(path)
        return "x.ply"
    if kind == "nan":
        ball.vertices[5] = np.nan
        ball.export(path)
        return "not finite"
    if kind == "zero area":
        ball.vertices[:, 1:] = 0
        ball.export(path)
        return "no surface area"
    assert kind == "too many faces"
    ball.subdivide().subdivide().export(path)
    return "5,120 faces, expected at most max_faces=1,500"


KINDS = ["truncated", "duplicate", "empty file", "text", "no faces", "nan", "zero area", "too many faces"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_prediction_is_a_failed_row_that_counts(folders: tuple[Path, Path], kind: str) -> None:
    reason = write_broken(kind, folders[0])
    sphere().export(folders[1] / "x.glb")
    row = row_of("x", folders)
    assert row["status"] == "failed"
    assert re.search(reason, row["error"])
    assert (row["f_score@0.02"], row["volume_iou"], row["watertight"]) == (0, 0, False)
    assert row["chamfer_l1"] == pytest.approx(2, abs=0.1)
    assert "\n" not in row["error"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_an_error_is_text_that_a_report_can_be_written_with(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """Neither a file's name nor what it holds may keep the report of all others from being written."""
    for side in folders:
        sphere().export(side / "x.glb")
        (side / "x.glb").rename(os.fsdecode(os.fsencode(side) + b"/st\xfchl.glb"))
    os.truncate(os.fsdecode(os.fsencode(folders[0]) + b"/st\xfchl.glb"), 100)
    view = {"byteLength": 9, "extensions": {"\ud800": {}}}
    mesh = {"primitives": [{"attributes": {"POSITION": 0}}]}
    accessor = {"bufferView": 0, "componentType": 5126, "count": 3, "type": "VEC3"}
    tree = {"asset": {"version": "2.0"}, "scenes": [{"nodes": [0]}], "nodes": [{"mesh": 0}], "meshes": [mesh]}
    tree |= {"accessors": [accessor], "bufferViews": [view]}
    (folders[0] / "half.gltf").write_text(json.dumps(tree))
    sphere().export(folders[1] / "half.glb")
    rows = [score_item(item, QUICK) for item in find_items(*folders)]
    assert [row["name"] for row in rows] == ["ball", "half", r"st\xfchl"]
    assert r"extension \ud800" in rows[1]["error"] and r"st\xfchl.glb" in rows[2]["error"]
    write_csv(rows, tmp_path / "rows.csv")


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_ground_truth_is_a_failed_row_without_scores(folders: tuple[Path, Path], kind: str) -> None:
    reason = write_broken(kind, folders[1])
    sphere().export(folders[0] / "x.glb")
    row = row_of("x", folders)
    assert row["status"] == "failed"
    assert re.search(reason, row["error"])
    assert "chamfer_l1" not in row


@pytest.mark.parametrize("scale", [1e20, 1e40])
def test_a_prediction_in_absurd_units_breaks_no_other_row(folders: tuple[Path, Path], scale: float) -> None:
    """A score that is not finite would be no JSON, and end the run."""
    sphere().export(folders[1] / "huge.glb")
    lines = [f"v {x} {y} {z}" for x, y, z in sphere().vertices * scale]
    lines += [f"f {a} {b} {c}" for a, b, c in sphere().faces + 1]
    (folders[0] / "huge.obj").write_text("\n".join(lines))
    row = row_of("huge", folders)
    json.dumps(row, allow_nan=False)
    assert row["f_score@0.02"] == 0
    assert "too large" in row["error"]


def test_a_missing_side_is_a_failed_row(folders: tuple[Path, Path]) -> None:
    sphere().export(folders[1] / "only gt.glb")
    sphere().export(folders[0] / "only pred.glb")
    assert row_of("only gt", folders)["error"] == "there is no prediction named only gt"
    assert row_of("only gt", folders)["f_score@0.05"] == 0
    assert row_of("only pred", folders)["error"] == "there is no ground truth named only pred"


def test_folders_must_exist_and_hold_meshes(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere is not a folder"):
        find_items(tmp_path / "nowhere", folders[1])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty has no mesh file"):
        find_items(folders[0], tmp_path / "empty")
    assert [item.pred for item in find_items(tmp_path / "empty", folders[1])] == [()]


def test_a_missing_package_is_no_failed_mesh(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a broken installation would look like a broken method: every mesh with the scores of an empty one."""
    [item] = find_items(*folders)
    assert score_item(item, QUICK)["status"] == "ok"
    monkeypatch.setitem(sys.modules, "igl", None)
    with pytest.raises(UserError, match="scoring needs igl, which can't be imported"):
        score_item(item, QUICK)
