import base64
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import trimesh
from geometry.gltf_samples import Gltf, Tree, solid

from elastic3d.errors import UserError
from elastic3d.geometry import gltf
from elastic3d.geometry.mesh_io import load_mesh


def assert_same(path: Path, wanted: trimesh.Trimesh | None = None, tolerance: float = 1e-6) -> None:
    found, wanted = load_mesh(path), wanted or solid()
    assert len(found.faces) == len(wanted.faces) and found.is_watertight
    np.testing.assert_allclose(found.triangles, wanted.triangles, atol=tolerance)


def test_plain(tmp_path: Path) -> None:
    assert_same(Gltf().write(tmp_path / "a.glb"))


@pytest.mark.parametrize(
    ("code", "normalized"), [("i1", True), ("i2", True), ("u1", True), ("u2", True), ("i2", False)]
)
def test_quantised_positions(tmp_path: Path, code: str, normalized: bool) -> None:
    mesh = solid()
    low, size = mesh.bounds[0], np.ptp(mesh.bounds, axis=0).max()
    largest = np.iinfo(code).max
    signed = code[0] == "i"
    unit = (mesh.vertices - low) / size  # [0, 1]
    stored = np.round((2 * unit - 1 if signed else unit) * largest)
    padded = np.pad(stored, ((0, 0), (0, 1))).astype(f"<{code}")
    file = Gltf()
    accessor = file.tree["accessors"][0]
    view = file.add_view(padded.tobytes(), byteStride=padded.strides[0])
    accessor |= {"bufferView": view, "componentType": {"i1": 5120, "u1": 5121, "i2": 5122, "u2": 5123}[code]}
    accessor["normalized"] = normalized
    scale = (size / 2 if signed else size) / (1 if normalized else largest)
    offset = low + (size / 2 if signed else 0)
    file.tree["nodes"][0] |= {"scale": [scale] * 3, "translation": offset.tolist()}
    file.tree["extensionsRequired"] = file.tree["extensionsUsed"] = ["KHR_mesh_quantization"]
    assert_same(file.write(tmp_path / "a.glb"), tolerance=2 * size / largest)


def test_node_transforms_instances_and_mirrors(tmp_path: Path) -> None:
    rotation = trimesh.transformations.quaternion_matrix([0.5, 0.1, -0.7, 0.3])
    half = np.sqrt(np.square([0.5, 0.1, -0.7, 0.3]).sum())
    x, y, z, w = np.array([0.1, -0.7, 0.3, 0.5]) / half
    outer = np.eye(4)
    outer[:3, :3] = [[0, 2, 0], [1, 0, 0], [0, 0, 1]]  # a mirror
    outer[:3, 3] = [500_000, 0, 7]
    inner = np.eye(4)
    inner[:3, :3] = rotation[:3, :3] @ np.diag([1, 2, 3])
    inner[:3, 3] = [1, 2, 3]
    file = Gltf()
    file.tree["scenes"] = [{"nodes": []}, {"nodes": [0, 3]}]
    file.tree["scene"] = 1
    file.tree["nodes"] = [
        {"children": [1], "matrix": outer.T.ravel().tolist()},
        {"mesh": 0, "rotation": [x, y, z, w], "scale": [1, 2, 3], "translation": [1, 2, 3]},
        {"mesh": 0, "translation": [9, 9, 9]},  # in no scene
        {"mesh": 0},
    ]
    found = load_mesh(file.write(tmp_path / "a.glb"))
    placed = solid().apply_transform(outer @ inner)
    count = len(placed.faces)
    corners = np.sort(found.triangles[:count], axis=1)
    np.testing.assert_allclose(corners, np.sort(placed.triangles, axis=1), atol=1e-6)
    first, second = (
        trimesh.Trimesh(t.reshape(-1, 3) - t[0, 0], np.arange(3 * count).reshape(-1, 3), process=False)
        for t in (found.triangles[:count], found.triangles[count:])
    )
    assert first.volume == pytest.approx(12 * solid().volume) and second.volume == pytest.approx(
        solid().volume
    )


def test_strips_fans_lines_and_primitives_without_indices(tmp_path: Path) -> None:
    mesh = solid()
    file = Gltf(mesh)
    file.tree["meshes"][0]["primitives"] = []
    half = len(mesh.faces) // 2
    soup = file.add(mesh.triangles[half:].reshape(-1, 3), "f4")
    file.add_primitive(POSITION=soup)
    for number, face in enumerate(mesh.faces[:half]):  # strips with jumps, and fans of one face
        mode, corners = (5, [*face, face[2], face[2]]) if number % 2 else (6, face)
        primitive = file.add_primitive(POSITION=0)
        primitive |= {"mode": mode, "indices": file.add(corners, "u1")}
    for mode in (0, 1, 2, 3):
        file.add_primitive(POSITION=soup)["mode"] = mode
    file.add_primitive(NORMAL=0)
    found = load_mesh(file.write(tmp_path / "a.glb"))
    assert found.is_watertight and len(found.faces) == len(mesh.faces)
    assert found.volume == pytest.approx(mesh.volume) and found.area == pytest.approx(mesh.area)


def test_sparse_accessors(tmp_path: Path) -> None:
    mesh = solid()
    for base in (True, False):
        file = Gltf(mesh)
        wrong = np.array(mesh.vertices)
        places = np.arange(0, len(wrong), 3) if base else np.arange(len(wrong))
        wrong[places] = 99
        position = file.add(wrong, "f4")
        indices, values = file.add(places, "u2"), file.add(mesh.vertices[places], "f4")
        accessor = file.tree["accessors"][position]
        accessor["sparse"] = {
            "count": len(places),
            "indices": {"bufferView": file.tree["accessors"][indices]["bufferView"], "componentType": 5123},
            "values": {"bufferView": file.tree["accessors"][values]["bufferView"]},
        }
        if not base:
            del accessor["bufferView"]
        file.primitive["attributes"]["POSITION"] = position
        assert_same(file.write(tmp_path / "a.glb"))


def test_skins_and_morph_targets_at_the_files_pose(tmp_path: Path) -> None:
    mesh = solid()
    file = Gltf(mesh)
    count = len(mesh.vertices)
    bind = np.eye(4)
    bind[:3, 3] = [0, -1, 0]
    inverse = file.add(np.stack([bind.T.ravel(), np.eye(4).ravel()]), "f4")
    file.primitive["attributes"]["JOINTS_0"] = file.add(np.tile([0, 1, 0, 0], (count, 1)), "u1")
    weights = np.tile([192, 63, 0, 0], (count, 1))
    file.primitive["attributes"]["WEIGHTS_0"] = file.add(weights, "u1", normalized=True)
    file.primitive["targets"] = [{"POSITION": file.add(np.tile([1, 0, 0], (count, 1)), "f4")}, {"NORMAL": 0}]
    file.tree["meshes"][0]["weights"] = [0.5, 1]
    file.tree["skins"] = [{"joints": [1, 2], "inverseBindMatrices": inverse}]
    file.tree["nodes"] = [
        {"mesh": 0, "skin": 0, "scale": [100, 100, 100]},  # has no effect on a skinned mesh
        {"translation": [0, 4, 0], "children": [2]},
        {"translation": [0, 0, 2]},
    ]
    file.tree["scenes"] = [{"nodes": [0, 1]}]
    share = np.array([192, 63])[:, None] / 255
    moved = mesh.vertices + [0.5, 0, 0] + (share * [[0, 3, 0], [0, 4, 2]]).sum(axis=0)
    assert_same(file.write(tmp_path / "a.glb"), trimesh.Trimesh(moved, mesh.faces, process=False))


def test_buffers_in_files_and_data(tmp_path: Path) -> None:
    file = Gltf()
    (tmp_path / "my möbel.bin").write_bytes(file.binary)
    encoded = base64.b64encode(file.binary).decode()
    for uri in (
        "my%20m%C3%B6bel.bin",
        "my möbel.bin",
        f"data:application/octet-stream;base64,{encoded}",
        f"data:application/octet-stream,{quote(file.binary)}",
    ):
        file.tree["buffers"] = [{"byteLength": len(file.binary), "uri": uri}]
        (tmp_path / "a.gltf").write_text(json.dumps(file.tree))
        assert_same(tmp_path / "a.gltf")


def _set(*keys: Any) -> Callable[[Tree], object]:
    """A change of the JSON: keys down to an entry, and its new value."""
    *way, last, value = keys

    def change(tree: Any) -> None:
        for key in way:
            tree = tree[key]
        tree[last] = value

    return change


PRIMITIVE = ("meshes", 0, "primitives", 0)
DRACO = {"KHR_draco_mesh_compression": {"bufferView": 1, "attributes": {"POSITION": 0}}}
REFUSED = [
    (_set("extensionsRequired", ["KHR_draco_mesh_compression"]), "requires the extension KHR_draco_mesh_compression"),
    (_set("extensionsRequired", ["EXT_new", "KHR_materials_unlit"]), "extension EXT_new, which"),
    (_set("extensionsRequired", "KHR"), "extensionsRequired is 'KHR'"),
    (_set("accessors", 0, {"count": 9, "componentType": 5126, "type": "VEC3"}), "positions are missing"),
    (lambda t: (t["accessors"][0].pop("bufferView"), _set(*PRIMITIVE, "extensions", DRACO)(t)), "KHR_draco"),
    (lambda t: t["accessors"][1].pop("bufferView"), "indices are missing"),
    (_set("bufferViews", 0, "extensions", {"EXT_meshopt_compression": {}}), "EXT_meshopt_compression"),
    (_set("nodes", 0, "extensions", {"EXT_mesh_gpu_instancing": {}}), "EXT_mesh_gpu_instancing"),
    (_set("asset", {"version": "1.0"}), "version '1.0'"),
    (_set("asset", {"version": "2.0", "minVersion": "3.0"}), "version '3.0'"),
    (_set("scene", 4), "number 4 of 1 scenes"),
    (_set("nodes", 0, "mesh", "0"), "number '0' of 1 meshes"),
    (_set("nodes", [{"children": [1]}, {"children": [0]}]), "circle"),
    (_set("nodes", [{"children": [2]}, {"children": [2]}, {}]), "two parents"),
    (_set("nodes", 0, "rotation", [0, 0, 0, 0]), "rotation of node 0 is zero"),
    (_set("nodes", 0, "matrix", [1, 2]), "expected 16 numbers"),
    (_set(*PRIMITIVE, "mode", 7), "mode of a primitive is 7"),
    (_set(*PRIMITIVE, "indices", 0), "expected SCALAR"),
    (_set(*PRIMITIVE, "attributes", "POSITION", 1), "expected VEC3"),
    (_set("accessors", 1, "componentType", 5126), "cut off|no unsigned integers"),
    (_set("accessors", 0, "count", 10**6), "cut off: an accessor needs 12,000,000 bytes"),
    (_set("accessors", 0, "count", 3), "a vertex that does not exist"),
    (_set("accessors", 0, "count", -1), "expected a whole number"),
    (_set("accessors", 1, "count", 4), "expected three a triangle"),
    (_set("bufferViews", 0, "byteStride", 4), "byteStride is 4"),
    (_set("buffers", [{"byteLength": 10**9}]), "buffer 0 is cut off"),
    (_set("buffers", [{"byteLength": 10, "uri": "../a.bin"}]), "not in the file's own folder"),
    (_set("buffers", [{"byteLength": 10, "uri": "%2e%2e/a.bin"}]), "not in the file's own folder"),
    (_set("buffers", [{"byteLength": 10, "uri": "/etc/passwd"}]), "not in the file's own folder"),
    (_set("buffers", [{"byteLength": 10, "uri": "https://a.b/c"}]), "not in the file's own folder"),
    (_set("buffers", [{"byteLength": 10, "uri": "gone.bin"}]), "'gone.bin' is missing"),
    (_set("buffers", [{"byteLength": 10, "uri": "data:;base64,???"}]), "no base64"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_what_is_not_read_right_is_named(
    tmp_path: Path, change: Callable[[Tree], object], message: str
) -> None:
    with pytest.raises(UserError, match=f"(?i){message}") as caught:
        load_mesh(Gltf().write(tmp_path / "a.glb", change))
    assert "a.glb" in str(caught.value) and "\n" not in str(caught.value)


def test_appearance_alone_may_be_unknown(tmp_path: Path) -> None:
    names = ["KHR_materials_transmission", "KHR_texture_basisu", "EXT_texture_webp", "KHR_lights_punctual"]
    assert_same(Gltf().write(tmp_path / "a.glb", _set("extensionsRequired", names)))


def test_hostile_sizes_answer_at_once(tmp_path: Path) -> None:
    def chain(tree: Tree) -> None:
        tree["nodes"] = [{"children": [i + 1], "translation": [1, 0, 0]} for i in range(20_000)] + [
            {"mesh": 0}
        ]

    start = time.process_time()
    moved = load_mesh(Gltf().write(tmp_path / "chain.glb", chain))
    np.testing.assert_allclose(moved.bounds, solid().bounds + [20_000, 0, 0], atol=1e-5)
    for name, change in {
        "sparse": lambda t: (
            t["accessors"][0].pop("bufferView"),
            t["accessors"][0].update(count=200_000_000, sparse={"count": 0}),
        ),
        "empty": lambda t: (t["accessors"][0].pop("bufferView"), t["accessors"][0].update(count=200_000_000)),
        "instances": lambda t: t.update(
            nodes=[{"mesh": 0}] * 120_000, scenes=[{"nodes": list(range(120_000))}]
        ),
        "doubling": lambda t: t.update(nodes=[{"children": [i + 1] * 2} for i in range(60)] + [{"mesh": 0}]),
    }.items():
        with pytest.raises(UserError, match=name):
            load_mesh(Gltf().write(tmp_path / f"{name}.glb", change))
    assert time.process_time() - start < 10


@pytest.mark.parametrize(("nodes", "primitives"), [(100_001, 1), (2, 60_000), (20_000, 6)])
def test_a_scene_of_too_many_primitives_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nodes: int, primitives: int
) -> None:
    def crowd(tree: dict[str, Any]) -> None:
        tree["meshes"][0]["primitives"] *= primitives
        tree.update(nodes=[{"mesh": 0, "scale": [1, 1, 2]}] * nodes, scenes=[{"nodes": list(range(nodes))}])

    path = Gltf().write(tmp_path / "crowd.glb", crowd)
    monkeypatch.setattr(gltf._Scene, "_local", None)  # no transform is computed
    monkeypatch.setattr(gltf._Scene, "_parts", None)
    with pytest.raises(UserError, match="its scene draws more than 100,000 primitives"):
        load_mesh(path)
