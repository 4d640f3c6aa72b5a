"""Statistics of training images are measured, written beside the weights, and tell other images apart."""

import json
from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image
from tiny_pipeline import save_image, tiny_pipeline

from elastic3d.errors import UserError
from elastic3d.models.image_encoder import load_familiarity
from elastic3d.preparation.options import PrepareConfig, ShapeConfig, SourceName
from elastic3d.preparation.prepare import prepare_data
from elastic3d.training.familiarity import RECORD_NAME, FamiliarityConfig, measure_familiarity


def test_the_threshold_lets_validation_images_pass(tmp_path: Path) -> None:
    meshes, splits = tmp_path / "meshes", tmp_path / "splits"
    meshes.mkdir(), splits.mkdir()
    for number in range(4):
        trimesh.creation.box((1.0, 0.5 + 0.05 * number, 0.8)).export(meshes / f"box{number}.stl")
    splits.joinpath("train.txt").write_text("folder/box0\nfolder/box1\nfolder/box2\n")
    splits.joinpath("val.txt").write_text("folder/box3\n")
    splits.joinpath("test.txt").write_text("")
    points = dict.fromkeys(("surface_points", "sharp_points", "near_points", "volume_points"), 32)
    prepare_data(
        PrepareConfig(
            source=SourceName.folder, path=str(meshes), output=str(tmp_path / "prepared"), splits=str(splits),
            workers=1, shape=ShapeConfig(resolution=32, views=6, view_size=64, **points),
        )
    )  # fmt: skip
    probe = tmp_path / "probe"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 4), dtype=np.uint8)
    noise[..., 3] = 255
    noise[:8, :, 3] = 0
    probe.mkdir()
    Image.fromarray(noise).save(probe / "noise.png")
    Image.new("RGBA", (64, 64)).save(probe / "empty.png")
    save_image(probe / "ellipse.png")
    tiny_pipeline().save_pretrained(tmp_path / "model")
    config = FamiliarityConfig(
        model=tmp_path / "model", prepared=tmp_path / "prepared", train=[splits / "train.txt"],
        val=[splits / "val.txt"], sources=["folder"], views=6, components=4, false_alarms=0.2, probe=[probe],
    )  # fmt: skip
    record = measure_familiarity(config)
    assert (record["train_images"], record["val_images"]) == (18, 6)
    assert record["val_false_alarms"] <= 0.2 and record["threshold"] <= record["val_distance"]["most"] * 1.001
    assert record["probes"]["probe"]["images"] == 2 and record["probes"]["probe"]["without_object"] == 1
    assert json.loads((tmp_path / "model" / RECORD_NAME).read_text()) == record
    pipeline = tiny_pipeline()
    known = load_familiarity(tmp_path / "model", pipeline.encoder.channels)
    assert known is not None and float(known.threshold) == pytest.approx(record["threshold"])
    config.components = 18
    with pytest.raises(UserError, match="components is 18, expected 1 to 16 of 18 images"):
        measure_familiarity(config)
