"""Broken and hostile mesh files of every kind: a mesh, or one sentence with the file's name, soon."""

import json
import os
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trimesh
from geometry.gltf_samples import Gltf, solid
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elastic3d.errors import UserError
from elastic3d.geometry.mesh_io import load_mesh

QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
DEEP = settings(QUICK, max_examples=1000)
ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    7,
    2**31,
    2**70,
    1e300,
    "",
    "x",
    [],
    [0],
    [[]],
    {},
    {"a": 0},
    [None] * 3,
]


def ply(order: str) -> bytes:
    """A PLY of a ball whose faces carry a list and a byte; `order` is <, > or a for text."""
    mesh = solid()
    kind = {"<": "binary_little_endian", ">": "binary_big_endian", "a": "ascii"}[order]
    head = f"ply\nformat {kind} 1.0\ncomment x\nelement vertex {len(mesh.vertices)}\n"
    head += "property float x\nproperty float y\nproperty float z\n"
    head += f"element face {len(mesh.faces)}\nproperty list uchar int vertex_indices\nproperty uchar red\nend_header\n"
    if order == "a":
        rows = [" ".join(map(str, row)) for row in mesh.vertices.tolist()]
        rows += [f"3 {a} {b} {c} 9" for a, b, c in mesh.faces.tolist()]
        return (head + "\n".join(rows) + "\n").encode()
    vertices = mesh.vertices.astype(f"{order}f4").tobytes()
    faces = b"".join(b"\3" + np.array(f, f"{order}i4").tobytes() + b"\t" for f in mesh.faces)
    return head.encode() + vertices + faces


def contents() -> dict[str, bytes]:
    mesh = solid()
    rows = "\n".join(" ".join(map(str, row)) for row in mesh.vertices.tolist())
    faces = mesh.faces.tolist()
    return {
        "a.glb": Gltf().glb(),
        "a.obj": trimesh.exchange.obj.export_obj(mesh).encode(),
        "a.off": f"OFF\n{len(rows.splitlines())} {len(faces)} 0\n{rows}\n".encode()
        + "\n".join(f"3 {a} {b} {c}" for a, b, c in faces).encode(),
        "a.stl": trimesh.exchange.stl.export_stl(mesh),
        "text.stl": trimesh.exchange.stl.export_stl_ascii(mesh).encode(),
        "little.ply": ply("<"),
        "big.ply": ply(">"),
        "text.ply": ply("a"),
    }


FILES = contents()


def answers(path: Path, data: bytes) -> trimesh.Trimesh | None:
    """The mesh, or None where the file was refused in one sentence with its name, within seconds."""
    path.write_bytes(data)
    start = time.process_time()
    try:
        mesh = load_mesh(path)
    except UserError as error:
        assert path.name in str(error) and "\n" not in str(error) and len(str(error)) < 1000
        return None
    finally:
        assert time.process_time() - start < 10
    assert np.isfinite(mesh.vertices).all() and 0 <= mesh.faces.min() <= mesh.faces.max() < len(mesh.vertices)
    return mesh


@pytest.mark.parametrize("name", FILES)
def test_whole_files_are_read_and_cut_ones_refused(tmp_path: Path, name: str) -> None:
    data, wanted = FILES[name], solid()
    whole = answers(tmp_path / name, data)
    assert whole is not None and whole.is_watertight and len(whole.faces) == len(wanted.faces)
    np.testing.assert_allclose(whole.triangles, wanted.triangles, atol=1e-5)
    for end in range(0, len(data) - 30, max(97, len(data) // 40)):
        mesh = answers(tmp_path / name, data[:end])
        # An .obj announces nothing: what is left of it may be a mesh.
        assert mesh is None or (name == "a.obj" and len(mesh.faces) < len(wanted.faces)), f"cut at {end}"


def _damaged(data: bytes, seed: int, count: int) -> bytes:
    generator = random.Random(seed)
    broken = bytearray(data)
    for _ in range(count):
        at = generator.randrange(min(len(broken), generator.choice([100, 400, len(broken)])))
        broken[at] = generator.choice([0, 255, ord("-"), ord("9"), ord("\n"), generator.randrange(256)])
    return bytes(broken)


def _swapped(tree: Any, generator: random.Random) -> Any:
    """The tree with one of its entries dropped or replaced by a value of another type."""
    tree = json.loads(json.dumps(tree))
    places = list[tuple[Any, Any]]()

    def visit(node: Any) -> None:
        keys = node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            places.append((node, key))
            visit(node[key])

    visit(tree)
    node, key = generator.choice(places)
    if generator.random() < 0.3:
        del node[key]
    else:
        node[key] = generator.choice(ODD)
    return tree


def _check_bytes(folder: Path, name: str, seed: int, count: int) -> None:
    answers(folder / name, _damaged(FILES[name], seed, count))


def _check_json(folder: Path, seed: int) -> None:
    file, generator = Gltf(), random.Random(seed)
    file.tree["buffers"] = [{"byteLength": len(file.binary)}]
    file.tree["nodes"] = [
        {"children": [1], "rotation": [0, 0, 0, 1]},
        {"mesh": 0, "skin": 0, "scale": [1, 1, 1], "weights": [0.5]},
        {"matrix": np.eye(4).ravel().tolist()},
    ]
    count = len(solid().vertices)
    file.primitive["attributes"]["JOINTS_0"] = file.add(np.zeros((count, 4)), "u1")
    file.primitive["attributes"]["WEIGHTS_0"] = file.add(np.tile([1, 0, 0, 0], (count, 1)), "f4")
    file.primitive["targets"] = [{"POSITION": 0}]
    file.tree["skins"] = [{"joints": [2], "inverseBindMatrices": file.add(np.eye(4).reshape(1, 16), "f4")}]
    for _ in range(generator.choice([1, 1, 1, 3])):
        file.tree = _swapped(file.tree, generator)
    answers(folder / "swapped.glb", file.glb() if isinstance(file.tree, dict) else b"{}")


@QUICK
@given(name=st.sampled_from(sorted(FILES)), seed=st.integers(0, 10**6), count=st.integers(1, 8))
def test_damaged_bytes(tmp_path: Path, name: str, seed: int, count: int) -> None:
    _check_bytes(tmp_path, name, seed, count)


@QUICK
@given(seed=st.integers(0, 10**6))
def test_json_with_keys_dropped_and_types_swapped(tmp_path: Path, seed: int) -> None:
    _check_json(tmp_path, seed)


@pytest.mark.slow
@DEEP
@given(name=st.sampled_from(sorted(FILES)), seed=st.integers(0, 10**9), count=st.integers(1, 30))
def test_damaged_bytes_at_length(tmp_path: Path, name: str, seed: int, count: int) -> None:
    _check_bytes(tmp_path, name, seed, count)


@pytest.mark.slow
@DEEP
@given(seed=st.integers(0, 10**9))
def test_json_at_length(tmp_path: Path, seed: int) -> None:
    _check_json(tmp_path, seed)


PLY = b"ply\nformat ascii 1.0\n"
HOSTILE = {
    "deep.gltf": (b'{"asset":' + b"[" * 10**6, "JSON is broken"),
    "list.gltf": (b"[1, 2]", "is a list, expected an object"),
    "many.ply": (PLY + b"element vertex 99999999999\nend_header\n", "99,999,999,999 vertex, expected"),
    "none.ply": (PLY + b"element vertex 49999999\nproperty float x\nend_header\n1\n", "no property y"),
    "cut.ply": (PLY + b"element face 49999999\nproperty list char int vertex_indices\nend_header\n0\n", "cut off"),
    "strips.ply": (PLY + b"element tristrips 1\nproperty list int int vertex_indices\nend_header\n", "tristrips"),
    "many.off": (b"OFF 40000000 1 0\n0 0 0\n", "cut off: 40,000,000 vertices"),
    "four.off": (b"4OFF\n1 0 0\n0 0 0 1\n", "three dimensions"),
    "binary.off": (b"OFF BINARY\n\0\0", "binary OFF"),
    "zero.obj": (b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 0 1 2\n", "refers to vertex 0"),
    "before.obj": (b"v 0 0 0\nf -1 -2 -3\n", "refers to vertex -2"),
    "short.obj": (b"v 0 0\n", "vertex 1 has 2 coordinates"),
    "word.obj": (b"v 0 0 x\n", "a coordinate is no number"),
    "long.obj": (b"v 0 0 0\nf 1 1 " + b"9" * 10**6, "expected an integer"),
    "cut.stl": (b"solid a\nfacet normal 0 0 1\nouter loop\nvertex 0 0 0\n", "broken: it has 1 facets"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_content_is_told_with_its_reason(tmp_path: Path, name: str) -> None:
    data, message = HOSTILE[name]
    (tmp_path / name).write_bytes(data)
    start = time.process_time()
    with pytest.raises(UserError, match=message) as caught:
        load_mesh(tmp_path / name)
    assert name in str(caught.value) and len(str(caught.value)) < 500 and time.process_time() - start < 10


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_pipes_and_devices_do_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.glb")
    (tmp_path / "zero.stl").symlink_to("/dev/zero")
    file = Gltf()
    file.tree["buffers"] = [{"byteLength": len(file.binary), "uri": "pipe.glb"}]
    (tmp_path / "a.gltf").write_text(json.dumps(file.tree))
    for name, message in (
        ("pipe.glb", "a pipe or a device"),
        ("zero.stl", "a pipe or a device"),
        ("a.gltf", "pipe.glb' is missing"),
    ):
        with pytest.raises(UserError, match=message):
            load_mesh(tmp_path / name)


def test_text_formats_in_their_variants(tmp_path: Path) -> None:
    mesh = trimesh.creation.box()
    quads = [[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]]
    corners = [[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)]
    rows = [" ".join(map(str, row)) for row in corners]
    obj = "\n".join(f"v\t{row} 1.0 # corner" for row in rows) + "\nl 1 2\nvn 0 0 1\n"
    positive = "\n".join("f " + " ".join(f"{i + 1}//1" for i in q) for q in quads)
    negative = "\n".join("f\t" + "\t".join(f"{i - 8}/" for i in q) for q in quads)
    broken = positive.replace(" 2//1", " \\\n 2//1")
    off = "\n".join(rows) + "\n" + "\n".join(f"4 {a} {b} {c} {d} 255 0 0" for a, b, c, d in quads) + "\n"
    for name, text in {
        "a.obj": obj + positive, "b.obj": obj + negative, "c.obj": (obj + broken).replace("\n", "\r\n"),
        "a.off": "OFF\n8 6 12\n" + off, "b.off": "OFF8 6 12\n" + off, "c.off": "# a box\n8 6 12 # counts\n\n" + off,
        "a.stl": str(trimesh.exchange.stl.export_stl_ascii(mesh)),
        "a.ply": trimesh.exchange.ply.export_ply(mesh, encoding="ascii").decode(),
    }.items():  # fmt: skip
        for encoding in ("utf-8", "utf-8-sig"):
            (tmp_path / name).write_bytes(text.encode(encoding))
            found = load_mesh(tmp_path / name)
            assert found.is_watertight and abs(found.volume) == pytest.approx(mesh.volume), name
