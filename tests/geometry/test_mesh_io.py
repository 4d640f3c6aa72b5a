import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image

from elastic3d.errors import UserError
from elastic3d.evaluation import evaluate_pair
from elastic3d.evaluation.options import ProtocolConfig
from elastic3d.geometry.mesh_io import load_mesh, read_extras, save_mesh
from elastic3d.geometry.normalize import normalize_mesh
from elastic3d.utils.files import atomic_path

EXTRAS = {"version": "0.1.0", "seed": 7, "ms": {"dit": 12.5}}


@pytest.fixture
def mesh() -> trimesh.Trimesh:
    return trimesh.creation.torus(0.6, 0.2, major_sections=24, minor_sections=12)


@pytest.mark.parametrize("suffix", [".glb", ".GLB", ".ply", ".obj", ".stl"])
def test_round_trip(tmp_path: Path, mesh: trimesh.Trimesh, suffix: str) -> None:
    path = tmp_path / "new" / f"a mesh{suffix}"
    save_mesh(mesh, path, extras=EXTRAS)
    loaded = load_mesh(path)
    assert loaded.is_watertight and len(loaded.faces) == len(mesh.faces)
    assert loaded.volume == pytest.approx(mesh.volume, rel=1e-5)
    np.testing.assert_allclose(loaded.bounds, mesh.bounds, atol=1e-6)
    assert list(path.parent.iterdir()) == [path]


def test_an_obj_names_no_material_file_that_is_not_there(tmp_path: Path, mesh: trimesh.Trimesh) -> None:
    mesh.visual = trimesh.visual.TextureVisuals(uv=mesh.vertices[:, :2])
    save_mesh(mesh, tmp_path / "a.obj")
    text = (tmp_path / "a.obj").read_text()
    assert "mtl" not in text and text.count("\nvt ") == len(mesh.vertices)
    assert load_mesh(tmp_path / "a.obj").is_watertight


def test_glb_content(tmp_path: Path, mesh: trimesh.Trimesh) -> None:
    path = tmp_path / "chair.glb"
    save_mesh(mesh, path, extras=EXTRAS, name="chair")
    assert read_extras(path) == EXTRAS
    data = path.read_bytes()
    tree = json.loads(data[20 : 20 + int.from_bytes(data[12:16], "little")])
    assert [m["name"] for m in tree["meshes"]] == ["chair"] and len(tree["materials"]) == 1
    assert set(tree["meshes"][0]["primitives"][0]["attributes"]) == {"POSITION", "NORMAL"}
    assert tree["asset"]["generator"].startswith("elastic3d ")
    save_mesh(mesh, path)
    assert read_extras(path) == {}


def test_normals_are_kept(tmp_path: Path, mesh: trimesh.Trimesh) -> None:
    given = np.roll(mesh.vertex_normals, 1, axis=1)
    custom = trimesh.Trimesh(mesh.vertices, mesh.faces, vertex_normals=given, process=False)
    save_mesh(custom, tmp_path / "a.glb")
    scene = trimesh.load_scene(tmp_path / "a.glb", process=False)
    np.testing.assert_allclose(next(iter(scene.geometry.values())).vertex_normals, given, atol=1e-6)


def test_scene_is_flattened_with_transforms(tmp_path: Path) -> None:
    scene = trimesh.Scene()
    mirror = np.diag([-1.0, 1, 1, 1])
    mirror[0, 3] = 5
    scene.add_geometry(trimesh.creation.box((1, 2, 3)), transform=mirror)
    scene.add_geometry(trimesh.creation.icosphere(), transform=trimesh.transformations.scale_matrix(2))
    scene.add_geometry(trimesh.PointCloud(np.full((3, 3), 9.0)))
    scene.export(tmp_path / "scene.glb")
    loaded = load_mesh(tmp_path / "scene.glb")
    np.testing.assert_allclose(loaded.bounds, [[-2, -2, -2], [5.5, 2, 2]], atol=1e-6)
    assert loaded.is_watertight and loaded.body_count == 2
    assert all(part.volume > 0 for part in loaded.split())


def test_split_vertices_are_merged_at_any_scale(tmp_path: Path) -> None:
    for scale in (1e-7, 1, 1e6):
        box = trimesh.creation.box().apply_scale(scale)
        flat = trimesh.Trimesh(box.triangles.reshape(-1, 3), np.arange(36).reshape(-1, 3), process=False)
        save_mesh(flat, tmp_path / "box.glb")
        loaded = load_mesh(tmp_path / "box.glb")
        assert len(loaded.vertices) == 8 and loaded.is_watertight


@pytest.mark.parametrize("far", [1e3, 5e5, 1e8])
def test_far_from_the_origin_nothing_is_rounded(tmp_path: Path, mesh: trimesh.Trimesh, far: float) -> None:
    """In map coordinates a float32 is a multiple of centimetres, or of metres."""
    shift = np.array([far, -far, 3.0])
    rows = "".join(f"v {x:.9f} {y:.9f} {z:.9f}\n" for x, y, z in mesh.triangles.reshape(-1, 3) + shift)
    faces = "".join(f"f {i} {i + 1} {i + 2}\n" for i in range(1, 3 * len(mesh.faces), 3))
    (tmp_path / "far.obj").write_text(rows + faces)
    loaded = load_mesh(tmp_path / "far.obj")
    assert loaded.is_watertight and len(loaded.vertices) == len(mesh.vertices)
    np.testing.assert_allclose(loaded.triangles - shift, mesh.triangles, atol=1e-7)
    normal, _ = normalize_mesh(loaded)
    np.testing.assert_allclose(normal.triangles, normalize_mesh(mesh)[0].triangles, atol=1e-6)
    scores = evaluate_pair(
        loaded, loaded, ProtocolConfig(views=0, points=2000, near_points=0, surface_health=False)
    )
    assert scores.points["f_score@0.02"] == 1 and scores.health.watertight


def test_textures_are_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quad = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [0, 1, 0]], [[0, 1, 2]], process=False)
    image = Image.new("RGB", (64, 64))
    material = trimesh.visual.material.PBRMaterial(baseColorTexture=image)
    quad.visual = trimesh.visual.TextureVisuals(uv=np.zeros((3, 2)), material=material)
    for name in ("textured.glb", "textured.obj", "textured.gltf"):
        quad.export(tmp_path / name)

    def bomb(*args: object, **kwargs: object) -> None:
        raise Image.DecompressionBombError("an image was opened")

    monkeypatch.setattr(Image, "open", bomb)
    for name in ("textured.glb", "textured.obj", "textured.gltf"):
        assert len(load_mesh(tmp_path / name).faces) == 1


PLY = "ply\nformat ascii 1.0\nelement vertex 3\n" + "".join(f"property float {axis}\n" for axis in "xyz")
LIST = "element face 1\nproperty list uchar int vertex_indices\nend_header\n"
RANGE = PLY + LIST + "0 0 0\n1 0 0\n0 1 0\n3 0 1 9\n"
NAN = "v 0 0 nan\nv 1 0 0\nv 0 1 0\nf 1 2 3\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.glb", None, "there is no file"),
        ("empty.glb", b"", "is empty"),
        ("image.png", b"123", "expected one of .glb"),
        ("bare", b"123", "no suffix"),
        ("junk.glb", b"\x89PNG\r\n\x1a\n" + bytes(100), "can't read"),
        ("cut.glb", b"glTF\x02\x00\x00\x00\xff\xff\x00\x00\xff\xff\x00\x00JSON{", "can't read"),
        ("junk.stl", bytes(range(256)), "cut off: 1,397,903,696 faces are announced, 3 are there"),
        ("junk.ply", b"ply\nformat binary_little_endian 1.0\nelement vertex 99999999999\n", "can't read"),
        ("junk.obj", b"\x00\xff\xfe", "junk.obj"),
        ("words.off", b"hello there", "can't read"),
        ("points.obj", b"v 0 0 0\nv 1 0 0\nv 0 1 0\n", "no faces"),
        ("points.ply", (PLY + "end_header\n0 0 0\n1 0 0\n0 1 0\n").encode(), "no faces"),
        ("nan.obj", NAN.encode(), "1 of 3 vertices that are not finite"),
        ("range.ply", RANGE.encode(), "a vertex that does not exist"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_mesh(path)
    assert name in str(caught.value)


def test_truncated_files(tmp_path: Path, mesh: trimesh.Trimesh) -> None:
    for suffix in (".glb", ".ply", ".stl"):
        path = tmp_path / f"a{suffix}"
        save_mesh(mesh, path)
        path.write_bytes(path.read_bytes()[:-2000])
        with pytest.raises(UserError, match="a.*"):
            load_mesh(path)


def test_read_extras_of_bad_files(tmp_path: Path) -> None:
    path = tmp_path / "a.glb"
    with pytest.raises(UserError, match="no file"):
        read_extras(path)
    path.write_bytes(b"not a glb at all, but long enough")
    with pytest.raises(UserError, match="is not a glb"):
        read_extras(path)
    path.write_text('{"asset": {"extras": {"elastic3d": [1]}}}')
    with pytest.raises(UserError, match=r"is not a glb file: elastic3d is \[1\], expected an object"):
        read_extras(path)


def test_bad_outputs(tmp_path: Path, mesh: trimesh.Trimesh) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.glb").mkdir()
    for place, message in [
        ("file/a.glb", "can't write"),
        ("folder.glb", "is a folder"),
        ("a.fbx", "expected one of"),
        ("/proc/nothing/a.glb", "can't write"),
        ("x" * 300 + ".glb", "can't write"),
    ]:
        with pytest.raises(UserError, match=message):
            save_mesh(mesh, tmp_path / place)
    with pytest.raises(ValueError, match="JSON"):
        save_mesh(mesh, tmp_path / "a.glb", extras={"loss": float("nan")})
    with pytest.raises(ValueError, match="no faces"):
        save_mesh(trimesh.Trimesh(), tmp_path / "a.glb")
    with pytest.raises(ValueError, match="not finite"):
        vertices = [[0, 0, np.nan], [1, 0, 0], [0, 1, 0]]
        save_mesh(trimesh.Trimesh(vertices, [[0, 1, 2]], process=False), tmp_path / "a.glb")
    assert {p.name for p in tmp_path.iterdir()} == {"file", "folder.glb"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_atomic_path_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")

    def interrupted() -> None:
        with atomic_path(path) as temporary:
            assert temporary.suffix == ".json" and temporary.parent == path.parent
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        interrupted()
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with atomic_path(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def validator_folder() -> Path | None:
    """The folder with node_modules/gltf-validator: $GLTF_VALIDATOR, or the repository after npm install."""
    folder = Path(os.environ.get("GLTF_VALIDATOR", Path(__file__).parents[2]))
    return folder if shutil.which("node") and (folder / "node_modules/gltf-validator").is_dir() else None


@pytest.mark.skipif(validator_folder() is None, reason="no npm gltf-validator: set GLTF_VALIDATOR")
def test_khronos_validator_finds_nothing(tmp_path: Path, mesh: trimesh.Trimesh) -> None:
    from elastic3d.geometry.cleanup import unwrap

    broken = trimesh.Trimesh(mesh.vertices, [*mesh.faces, [0, 0, 1]], process=False)
    save_mesh(mesh, tmp_path / "plain.glb", extras=EXTRAS)
    save_mesh(broken, tmp_path / "degenerate.glb")
    save_mesh(unwrap(mesh), tmp_path / "uv.glb")
    script = """
        const validator = require('gltf-validator'), fs = require('fs');
        const check = p => validator.validateBytes(new Uint8Array(fs.readFileSync(p))).then(r => r.issues);
        Promise.all(process.argv.slice(1).map(check)).then(r => console.log(JSON.stringify(r)));
    """
    files = [str(tmp_path / f"{name}.glb") for name in ("plain", "degenerate", "uv")]
    done = subprocess.run(
        ["node", "-e", script, *files], cwd=validator_folder(), capture_output=True, text=True, check=True
    )
    for issues in json.loads(done.stdout):
        assert (issues["numErrors"], issues["numWarnings"]) == (0, 0), issues["messages"]
