"""A user's folder of meshes, prepared from the Python API and the command line."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest
import trimesh
from _cli import execute, parse
from prepare_data import main
from safetensors.numpy import load_file

from elastic3d.errors import UserError
from elastic3d.preparation.options import PrepareConfig
from elastic3d.preparation.prepare import next_commands
from elastic3d.preparation.sources import FolderSource
from elastic3d.training.dit import DiTTrainConfig
from elastic3d.training.latents import CacheConfig
from tests.processes import in_use_elsewhere

TINY = [f"shape.{name}=50" for name in ("surface_points", "sharp_points", "near_points", "volume_points")]
TINY += ["shape.resolution=32", "shape.views=2", "shape.view_size=16", "workers=1"]


@pytest.fixture
def meshes(tmp_path: Path) -> Path:
    folder = tmp_path / "my meshes (2)"
    (folder / "toys").mkdir(parents=True)
    trimesh.creation.box((1, 2, 3)).export(folder / "box.glb")
    trimesh.creation.box((1, 2, 3)).export(folder / "box.stl")
    trimesh.creation.icosphere(2).export(folder / "toys" / "red_ball.ply")
    trimesh.creation.cone(1, 2).export(folder / "cone.off")
    (folder / "bad.obj").write_text("no mesh")
    (folder / "notes.txt").write_text("no mesh either")
    return folder


def prepare(*arguments: str) -> int:
    return execute(main, PrepareConfig, "prepare_data", [*arguments, *TINY])


def test_a_folder_is_prepared_by_one_process_at_a_time(
    meshes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["source=folder", f"path={meshes}", f"output={tmp_path / 'out'}", "limit=1"]
    with in_use_elsewhere(tmp_path / "out" / "folder"):
        assert prepare(*given) == 2
    assert "out/folder is in use by another process" in capsys.readouterr().err


def test_items_of_a_folder(meshes: Path) -> None:
    items = FolderSource(meshes).items()
    assert [item.id for item in items] == ["bad", "box-glb", "box-stl", "cone", "toys--red_ball"]
    assert (items[-1].category, items[-1].caption, items[-1].source_id) == (
        "toys",
        "red ball",
        "toys/red_ball.ply",
    )


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["a.glb", "a.obj", "a-obj.ply"], "a-obj.ply and a.obj, both of which would be a-obj: rename one"),
        (
            ["x/y.obj", "x--y.obj"],
            "x/y.obj and x--y.obj, both of which would be x--y-obj: rename one",
        ),
    ],
)
def test_meshes_of_one_name_are_refused(tmp_path: Path, files: list[str], message: str) -> None:
    """One would take the other's place without a word."""
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    with pytest.raises(UserError, match=message):
        FolderSource(tmp_path)


def test_folder_end_to_end(meshes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    assert prepare("source=folder", f"path={meshes}", f"output={output}", "shard_size=3") == 0
    assert "4 shapes in" in (shown := capsys.readouterr().out) and "bad.obj has no faces" in shown
    rows = [json.loads(line) for line in (output / "folder" / "manifest.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["box-glb", "box-stl", "cone", "toys--red_ball"]
    assert {row["shard"] for row in rows} == {"shard-00000.safetensors", "shard-00001.safetensors"}
    listed = [f"folder/{row['id']}" for row in rows]
    assert (
        output / "folder" / "train.txt"
    ).read_text().split() == listed  # too few to keep any from training
    assert f"latents.augment=true init_from=shape-small latents.output={output}" in shown
    arrays = load_file(output / "folder" / "shard-00001.safetensors")
    assert arrays["cone/surface"].shape == (50, 6)
    assert arrays["toys--red_ball/cameras"].shape == (2, 8)


def test_meshes_that_were_trained_on_stay_so_when_others_are_added(
    meshes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(7):
        trimesh.creation.box((1, 1, 2 + number)).export(meshes / f"{number}.obj")
    given = ("source=folder", f"path={meshes}", f"output={tmp_path / 'out'}", "val_share=0.3")

    def lists() -> list[set[str]]:
        assert prepare(*given) == 0
        files = [tmp_path / "out" / "folder" / f"{split}.txt" for split in ("train", "val")]
        return [set(file.read_text().split()) for file in files]

    train, val = lists()
    assert lists() == [train, val] and "delete" not in capsys.readouterr().err
    for number in range(7, 12):
        trimesh.creation.box((1, 1, 2 + number)).export(meshes / f"{number}.obj")
    more, held_out = lists()
    assert train < more and val < held_out and len(val) == 4 and len(held_out) == 5
    assert "meshes stay in their lists, so 5 of 17 are for validation: delete" in capsys.readouterr().err


def test_a_mended_mesh_and_a_new_one_are_prepared(
    meshes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("source=folder", f"path={meshes}", f"output={tmp_path / 'out'}", "shard_size=3")
    folder = tmp_path / "out" / "folder"

    def lists() -> list[str]:
        return (folder / "train.txt").read_text().split()

    assert prepare(*given) == 0 and "folder/bad" not in lists()
    first = (folder / "shard-00000.safetensors").stat().st_mtime_ns
    assert prepare(*given) == 0, "nothing has changed: nothing is tried again"
    assert (folder / "shard-00000.safetensors").stat().st_mtime_ns == first
    capsys.readouterr()
    trimesh.creation.box((1, 1, 2)).export(meshes / "bad.obj")
    assert prepare(*given) == 0
    assert "5 shapes in" in capsys.readouterr().out and lists()[0] == "folder/bad"
    kept = [(file, file.stat().st_mtime_ns) for file in sorted(folder.glob("*.safetensors"))]
    trimesh.creation.box((1, 1, 3)).export(meshes / "another.obj")
    (meshes / "cone.off").unlink()
    assert prepare(*given) == 0
    assert lists() == [f"folder/{id}" for id in ("another", "bad", "box-glb", "box-stl", "toys--red_ball")]
    assert [(file, file.stat().st_mtime_ns) for file, _ in kept] == kept
    assert set(load_file(folder / "shard-00002.safetensors")) >= {"another/surface"}
    before = load_file(folder / "shard-00002.safetensors")["another/surface"]
    trimesh.creation.icosphere().export(meshes / "another.obj")  # it was turned, or closed
    assert prepare(*given) == 0
    assert [(file, file.stat().st_mtime_ns) for file, _ in kept] == kept
    assert (load_file(folder / "shard-00002.safetensors")["another/surface"] != before).any()
    assert "version" not in (folder / "manifest.jsonl").read_text()


def test_a_mesh_takes_the_place_of_a_bad_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    meshes = tmp_path / "meshes"
    meshes.mkdir()
    (meshes / "bad.obj").write_text("no mesh")
    assert prepare(f"path={meshes}", f"output={tmp_path / 'out'}") == 1
    assert "mend or replace the meshes named above and run this again" in capsys.readouterr().out
    (meshes / "bad.obj").unlink()
    trimesh.creation.box((1, 1, 2)).export(meshes / "good.obj")
    assert prepare(f"path={meshes}", f"output={tmp_path / 'out'}") == 0
    assert "1 shapes in" in (shown := capsys.readouterr().out) and "0 skipped" in shown


def test_a_mesh_that_may_be_read_now_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.obj").write_text("v 0 0 0")
    (readable,) = FolderSource(tmp_path).items()
    monkeypatch.setattr("os.access", lambda *_: False)
    (unreadable,) = FolderSource(tmp_path).items()
    assert unreadable.version == "" != readable.version and "version" not in readable.row()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["source=folder"], "source=folder needs path="),
        (["path=nowhere"], "path=nowhere is no directory"),
        (["path=."], "holds no mesh, expected files ending in .glb"),
        (["path=."], "name the folder that has them with path=, or convert yours"),
        (["source=attic"], "source"),
        (["shape.resolution=7"], "shape.resolution is 7"),
        (["paht=x"], "path"),
        (["path=.", "name=my/chairs"], "name is 'my/chairs', expected a folder name"),
        (
            ["source=primitives", "name=x"],
            "name is 'x', expected none with source=primitives: training finds",
        ),
        (["source=infinigen", "categories=[car]"], "no Infinigen category 'car'"),
        (["path=.", "splits=nowhere"], "nowhere/train.txt is missing"),
        (["path=.", "splits=nowhere"], "name a folder with all three lists with splits=, or leave it out"),
    ],
)
def test_mistakes_end_in_one_sentence(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    splits = Path("data/splits").resolve()
    monkeypatch.chdir(tmp_path)
    given = (
        arguments if any("splits" in argument for argument in arguments) else [*arguments, f"splits={splits}"]
    )
    assert execute(main, PrepareConfig, "prepare_data", given) == 2
    shown = capsys.readouterr().err
    assert message in shown and "Traceback" not in shown


def test_unwritable_output(meshes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert prepare(f"path={meshes}", f"output={tmp_path / 'file'}") == 2
    assert "can't write" in capsys.readouterr().err


def test_the_next_commands_pass_through_a_shell() -> None:
    """A folder and a name that a shell, or a list of options, would divide."""
    name, output = "my chairs, $5 'new'", "out [2]/a b"
    config = PrepareConfig(name=name, output=output)
    options = [shlex.split(command)[2:] for command in next_commands(config)]
    cache = parse(CacheConfig, "train", options[0])
    dit = parse(DiTTrainConfig, "train", options[1])
    for data in (cache.data, dit.data):
        assert data.prepared == Path(output)
        assert [data.train, data.val] == [[Path(output, name, f"{which}.txt")] for which in ("train", "val")]
    assert cache.latents.output == dit.latents.output == Path(output, f"latents-{name}")
    assert dit.name == name and options[2] == ["stage=export", f"name={name}"]
    assert cache.latents.mirror and cache.latents.augment


def test_help_shows_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(main, PrepareConfig, "prepare_data", ["--help"]) == 0
    shown = capsys.readouterr().out
    for name in ("source", "cache_dir", "shape.resolution", "generators"):
        assert name in shown


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no mesh"):
        FolderSource(tmp_path)
    assert "bpy" not in sys.modules


def test_a_changed_buffer_is_another_version_of_a_gltf(tmp_path: Path) -> None:
    for name, data in trimesh.exchange.gltf.export_gltf(trimesh.Scene(trimesh.creation.box())).items():
        (tmp_path / name).write_bytes(data)
    (before,) = FolderSource(tmp_path).items()
    next(tmp_path.glob("*.bin")).touch()
    (after,) = FolderSource(tmp_path).items()
    assert before.version != after.version
