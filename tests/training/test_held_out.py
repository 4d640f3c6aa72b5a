"""Held-out shapes through the bundled model, and the nearest training shape beside them."""

import shutil
from dataclasses import replace
from pathlib import Path

import evaluate
import pytest
import summarize
import torch
import trimesh
from _cli import execute

from elastic3d.errors import UserError
from elastic3d.evaluation.options import EvaluateConfig, SummarizeConfig
from elastic3d.geometry.mesh_io import load_mesh, read_extras
from elastic3d.models.shape_vae import ShapeVAE
from elastic3d.pipelines.options import DEFAULT_MODEL
from elastic3d.preparation.options import PrepareConfig, ShapeConfig, SourceName
from elastic3d.preparation.prepare import prepare_data
from elastic3d.training.held_out import build_held_out
from elastic3d.training.options import HeldOutConfig
from elastic3d.utils.files import load_json, save_json
from tests.processes import in_use_elsewhere

ROOT = Path(__file__).resolve().parents[2]


def test_a_folder_without_its_path_is_refused() -> None:
    for path in ("", "nowhere"):
        with pytest.raises(
            UserError, match=f"data.path is '{path}', expected the directory with your meshes"
        ):
            build_held_out(
                HeldOutConfig(output=Path("out"), data=PrepareConfig(source=SourceName.folder, path=path))
            )


@pytest.fixture(scope="module")
def prepared_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two training shapes, and a held-out one that is like one of them."""
    tmp_path = tmp_path_factory.mktemp("held_out")
    meshes = tmp_path / "meshes"
    meshes.mkdir()
    trimesh.creation.box((1.0, 0.6, 0.8)).export(meshes / "box.stl")
    trimesh.creation.box((1.0, 0.65, 0.8)).export(meshes / "crate.stl")
    trimesh.creation.icosphere(3).export(meshes / "ball.stl")
    splits = tmp_path / "splits"
    splits.mkdir()
    splits.joinpath("train.txt").write_text("mine/crate\nmine/ball\n")
    splits.joinpath("val.txt").write_text("")
    splits.joinpath("test.txt").write_text("mine/box\n")
    assert prepare_data(data_in(tmp_path)).prepared == 3
    return tmp_path


def data_in(root: Path) -> PrepareConfig:
    points = {"surface_points": 2048, "sharp_points": 64, "near_points": 64, "volume_points": 64}
    return PrepareConfig(
        source=SourceName.folder,
        name="mine",
        path=str(root / "meshes"),
        output=str(root / "prepared"),
        splits=str(root / "splits"),
        workers=1,
        shape=ShapeConfig(resolution=32, views=2, view_size=96, **points),
    )


@pytest.fixture
def config(prepared_once: Path, tmp_path: Path) -> HeldOutConfig:
    """Of a copy of them."""
    splits = shutil.copytree(prepared_once, tmp_path, dirs_exist_ok=True) / "splits"
    return HeldOutConfig(
        model=str(ROOT / DEFAULT_MODEL),
        output=tmp_path / "out",
        split=splits / "test.txt",
        train=splits / "train.txt",
        data=data_in(tmp_path),
        seeds=[0],
        steps=2,
        resolution=16,
        bank_views=2,
    )


def table_of(folder: Path, methods: list[str]) -> str:
    """As docs/evaluation.md has it: a report of each method beside the meshes, then the table of that folder."""
    quick = ["protocol.points=200", "protocol.volume_points=50", "protocol.views=0", "bootstrap=10"]
    for name in methods:
        given = [f"pred={folder}/{name}", f"gt={folder}/gt", f"output={folder}/{name}.json", "workers=1"]
        assert execute(evaluate.main, EvaluateConfig, "evaluate", given + quick) == 0
    given = [f"folders={folder}", f"output={folder}", "bootstrap=10"]
    assert execute(summarize.main, SummarizeConfig, "summarize", given) == 0
    return (folder / "summary.md").read_text()


def test_every_folder_is_written_and_the_nearest_shape_is_the_alike_one(config: HeldOutConfig) -> None:
    ids = build_held_out(config)
    stem = ids[0].rpartition("/")[2]
    for folder in ("gt", "reconstruction", "seed-0", "nearest"):
        assert len(load_mesh(config.output / folder / f"{stem}.glb").faces) > 0
    assert "crate" in read_extras(config.output / "nearest" / f"{stem}.glb")["nearest"]
    assert (config.output / "sheet.png").is_file()
    assert "| generated | " in table_of(config.output, ["seed-0", "nearest"])

    with in_use_elsewhere(config.output), pytest.raises(UserError, match="is in use by another process"):
        build_held_out(config)
    assert build_held_out(config) == ids  # goes on
    with pytest.raises(
        UserError, match="was made with another steps: delete it first, or give another output="
    ):
        build_held_out(replace(config, steps=3))
    other = replace(config, output=config.output.with_name("other"), seeds=[])
    with pytest.raises(UserError, match="view is 7, expected at most 1: mine/box has 2 views"):
        build_held_out(replace(other, view=7))
    later = config.split.with_name("later.txt")  # a shape that was not held out when it was prepared
    later.write_text("mine/ball\n")
    build_held_out(replace(other, split=later))
    assert load_mesh(other.output / "gt" / "ball.glb").is_watertight


def test_reconstructions_of_a_vae_that_reads_sharp_edges(config: HeldOutConfig, tmp_path: Path) -> None:
    model = Path(shutil.copytree(config.model, tmp_path / "model"))
    whole = load_json(model / "vae/config.json")
    save_json(whole | {"sharp_latents": whole["num_latents"] // 2}, model / "vae/config.json")
    read: list[torch.Tensor | None] = []
    with pytest.MonkeyPatch.context() as patch:
        encode = ShapeVAE.encode
        patch.setattr(ShapeVAE, "encode", lambda *args: read.append(args[2]) or encode(*args))
        build_held_out(replace(config, model=str(model), seeds=[]))
    assert [points.shape for points in read] == [(1, 2048, 6)]


def test_meshes_of_another_model_or_of_other_prepared_shapes_are_refused(
    config: HeldOutConfig, tmp_path: Path
) -> None:
    """How the model samples by default, and the shapes themselves: both would stay as they were."""
    config, data = replace(config, seeds=[]), config.data
    ids = build_held_out(config)
    others = config.split.with_name("others.txt")  # the same folder goes on with other shapes, or with more
    others.write_text("mine/crate\nmine/ball\n")
    for limit, found in ((1, ["mine/crate"]), (2, ["mine/crate", "mine/ball"])):
        assert build_held_out(replace(config, split=others, limit=limit)) == found
    assert sorted(path.stem for path in (config.output / "gt").iterdir()) == ["ball", "box", "crate"]
    model = Path(shutil.copytree(config.model, tmp_path / "model"))
    save_json(load_json(model / "pipeline.json") | {"shift": 3.0}, model / "pipeline.json")
    for name, changed in (
        ("pipeline", replace(config, model=str(model))),
        (
            "data.shape.resolution",
            replace(config, data=replace(data, shape=replace(data.shape, resolution=64))),
        ),
    ):
        with pytest.raises(UserError, match=f"was made with another {name}: delete it first"):
            build_held_out(changed)
    trimesh.creation.box((1.0, 0.5, 0.8)).export(Path(data.path) / "box.stl")
    assert prepare_data(data).prepared == 3
    with pytest.raises(UserError, match="was made with another preparation of mine/box: delete it first"):
        build_held_out(config)
    settings = load_json(config.output / "settings.json")
    for name in ("pipeline", "preparation of mine/box", "data.shape.resolution"):
        del settings[name]
    save_json(settings, config.output / "settings.json")
    assert build_held_out(config) == ids  # an older folder did not note them
