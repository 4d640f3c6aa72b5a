"""Statistics of training images are measured, written beside the weights, and tell other images apart."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_pipeline import save_image, tiny_pipeline

from elastic3d.errors import UserError
from elastic3d.models.image_encoder import FAMILIARITY_RECORD, image_feature, load_familiarity
from elastic3d.models.images import prepare
from elastic3d.models.options import ForegroundConfig
from elastic3d.pipelines import runtime
from elastic3d.pipelines.image_to_3d import ImageTo3DPipeline
from elastic3d.preparation.options import PrepareConfig, ShapeConfig, SourceName
from elastic3d.preparation.prepare import prepare_data
from elastic3d.training.datasets import PreparedShapes
from elastic3d.training.familiarity import measure_familiarity
from elastic3d.training.options import FamiliarityConfig
from elastic3d.training.views import stored_views
from elastic3d.utils.files import load_json, save_json


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> FamiliarityConfig:
    """Of three shapes for training and one for validation, with six views each; its model is still to come."""
    root = tmp_path_factory.mktemp("boxes")
    meshes, splits = root / "meshes", root / "splits"
    meshes.mkdir(), splits.mkdir()
    for number in range(4):
        trimesh.creation.box((1.0, 0.5 + 0.05 * number, 0.8)).export(meshes / f"box{number}.stl")
    splits.joinpath("train.txt").write_text("folder/box0\nfolder/box1\nfolder/box2\n")
    splits.joinpath("val.txt").write_text("folder/box3\n")
    splits.joinpath("test.txt").write_text("")
    points = dict.fromkeys(("surface_points", "sharp_points", "near_points", "volume_points"), 32)
    prepare_data(
        PrepareConfig(
            source=SourceName.folder, path=str(meshes), output=str(root / "prepared"), splits=str(splits),
            workers=1, shape=ShapeConfig(resolution=32, views=6, view_size=64, **points),
        )
    )  # fmt: skip
    return FamiliarityConfig(
        prepared=root / "prepared",
        train=[splits / "train.txt"],
        val=[splits / "val.txt"],
        sources=["folder"],
        views=6,
    )


def test_the_threshold_lets_validation_images_pass(prepared: FamiliarityConfig, tmp_path: Path) -> None:
    probe = tmp_path / "probe"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 4), dtype=np.uint8)
    noise[..., 3] = 255
    noise[:8, :, 3] = 0
    probe.mkdir()
    Image.fromarray(noise).save(probe / "noise.png")
    Image.new("RGBA", (64, 64)).save(probe / "empty.png")
    save_image(probe / "ellipse.png")
    tiny_pipeline().save_pretrained(tmp_path / "model")
    config = replace(prepared, model=tmp_path / "model", components=4, false_alarms=0.2, probe=[probe])
    record = measure_familiarity(config)
    assert (record["train_images"], record["val_images"]) == (18, 6)
    assert record["val_false_alarms"] <= 0.2 and record["threshold"] <= record["val_distance"]["most"] * 1.001
    assert record["probes"]["probe"]["images"] == 2 and record["probes"]["probe"]["without_object"] == 1
    assert json.loads((tmp_path / "model" / FAMILIARITY_RECORD).read_text()) == record
    pipeline = tiny_pipeline()
    known = load_familiarity(tmp_path / "model", pipeline.encoder.channels)
    assert known is not None and float(known.threshold) == pytest.approx(record["threshold"])
    with pytest.raises(UserError, match="probe has folders named probe, probe, expected different names"):
        replace(config, probe=[probe, tmp_path / "more" / "probe"])
    config.components = 18
    with pytest.raises(UserError, match="components is 18, expected 1 to 16 of 18 images"):
        measure_familiarity(config)


def test_images_are_framed_as_the_pipeline_frames_them(
    prepared: FamiliarityConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By a bundled model's name, with a border of its own, and a shape that no view shows among the others."""
    monkeypatch.setattr(runtime, "_PACKAGE", tmp_path / "elastic3d")
    folder = tmp_path / "data" / "pretrained" / "mine"
    tiny_pipeline().save_pretrained(folder)
    path = folder / "image_encoder" / "config.json"
    save_json(load_json(path) | {"border": 0.5}, path)
    hide(shutil.copytree(prepared.prepared, tmp_path / "prepared"), "box1")
    config = replace(prepared, model=Path("mine"), prepared=tmp_path / "prepared", views=1, components=1)
    config.train = [*prepared.train, *prepared.val]
    record = measure_familiarity(config)
    assert record["train_images"] == 3
    assert "skipped: folder/box1 has no condition view that shows it" in capsys.readouterr().out
    pipeline = ImageTo3DPipeline.from_pretrained(folder, "cpu", "float32")
    shapes = PreparedShapes(prepared.prepared, [f"folder/box{number}" for number in (0, 2, 3)])
    views = [prepare(stored_views(shapes, id)[0], ForegroundConfig(), pipeline.encoder) for id in shapes.ids]
    assert pipeline.familiarity is not None
    torch.testing.assert_close(pipeline.familiarity.mean, image_feature(pipeline.encode(views)).mean(dim=0))
    hide(config.prepared, "box3")
    with pytest.raises(UserError, match="no shape of val in .*prepared has a view that shows it"):
        measure_familiarity(config)


def test_what_is_not_there_is_told_before_any_shape_is_encoded(
    prepared: FamiliarityConfig, tmp_path: Path
) -> None:
    """Before the error of shapes that no view shows, which comes when they are read."""
    tiny_pipeline().save_pretrained(tmp_path / "model")
    (tmp_path / "probe").mkdir()
    views = shutil.copytree(prepared.prepared, tmp_path / "prepared")
    for number in range(4):
        hide(views, f"box{number}")
    config = replace(prepared, model=tmp_path / "model", prepared=views, probe=[tmp_path / "probe"])
    with pytest.raises(UserError, match="probe=.*probe holds no image"):
        measure_familiarity(config)
    Image.new("RGBA", (64, 64)).save(tmp_path / "probe" / "empty.png")
    with pytest.raises(UserError, match="probe=.*probe has no image that shows an object"):
        measure_familiarity(config)
    with pytest.raises(UserError, match="can't read .*gone"):
        measure_familiarity(replace(config, probe=[tmp_path / "gone"]))
    (tmp_path / "val.txt").write_text("folder/box9\n")
    with pytest.raises(UserError, match="none of the 1 shapes"):
        measure_familiarity(replace(config, probe=[], val=[tmp_path / "val.txt"]))


def hide(prepared: Path, name: str) -> None:
    """Leave the views of a shape empty, as those of a sheet that is seen from its edge."""
    (shard,) = prepared.glob("folder/*.safetensors")
    stored, buffer = load_file(shard), io.BytesIO()
    Image.new("RGBA", (64, 64)).save(buffer, "PNG")
    stored[f"{name}/views"] = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
    stored[f"{name}/view_offsets"] = torch.tensor([0, len(buffer.getvalue())])
    save_file(stored, shard)
