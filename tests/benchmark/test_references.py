"""Real images and the classifier that learns from them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from elastic3d.benchmark import images
from elastic3d.benchmark.images import References, load_references
from elastic3d.errors import UserError
from elastic3d.models.image_encoder import EfficientNetLite
from elastic3d.models.options import ImageEncoderConfig
from elastic3d.training.image_data import Captioned
from tests.benchmark.conftest import image_config_of

COLOURS = {"bed": "red", "cup": "blue"}


@pytest.fixture(scope="module")
def network() -> EfficientNetLite:
    return EfficientNetLite(ImageEncoderConfig(image_size=32))


class Coloured:
    """Red beds and blue cups, one image in five of which can't be read."""

    missing = 0

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed

    def __len__(self) -> int:
        return self.count

    def made_of(self) -> list[Any]:
        return [self.count, self.seed]

    def load(self, index: int, size: int) -> list[Captioned]:
        if index % 5 == 4:
            raise UserError("broken")
        noun = ("bed", "cup")[index % 2]
        base = np.asarray(Image.new("RGB", (size, size), COLOURS[noun])).astype(int)
        noise = np.random.default_rng([self.seed, index]).integers(-60, 60, base.shape)
        image = Image.fromarray(np.clip(base + noise, 0, 255).astype(np.uint8))
        return [Captioned(image, [f"a green {noun} seen from behind", f"a {noun}"])]


def test_the_classifier_learns_and_is_kept(gallery, tmp_path, monkeypatch, network):
    config = image_config_of(gallery, tmp_path, references=None, prepared=tmp_path)
    monkeypatch.setattr(images, "_sources", lambda *_: {"real": Coloured(20, 0), "train": Coloured(60, 1)})
    found = load_references(config, network, 16)
    assert found is not None and found.features.shape == (16, 1280) and found.trained_on == 48
    assert found.accuracy is not None and found.accuracy > 0.9
    assert found.about()["classifier"]["classes"] == 2
    scores = found.scores(found.features, ["a grey bed", "a cup"] * 8)
    assert scores["category_accuracy"] is not None and scores["frechet"] == pytest.approx(0, abs=1e-3)
    assert References(found.features).scores(found.features, ["a bed"] * 16)["category_accuracy"] is None

    def never(*arguments: Any) -> None:
        raise AssertionError("this was computed already")

    monkeypatch.setattr(EfficientNetLite, "pyramid", never)
    again = load_references(config, network, 16)
    assert again is not None and again.accuracy == found.accuracy


def test_without_real_images_there_are_no_references(gallery, tmp_path, network, monkeypatch):
    """None in the folder where they are looked for by themselves; one that was named has to have some."""
    monkeypatch.chdir(tmp_path)
    config = image_config_of(gallery, tmp_path, references=None, prepared=None)
    assert load_references(config, network, 16) is None
    for name in ("train", "val", "test"):
        (tmp_path / f"{name}.txt").write_text("balls/ball0\n")
    config = image_config_of(gallery, tmp_path, references=None, prepared=Path("typo"), splits=tmp_path)
    with pytest.raises(UserError, match="none of the 1 shapes that the lists name is under typo"):
        load_references(config, network, 16)


def test_a_folder_of_images_has_no_classifier(gallery: Path, tmp_path: Path, network: EfficientNetLite):
    found = load_references(image_config_of(gallery, tmp_path), network, 16)
    assert found is not None and len(found.features) == 3 and found.probe is None
    with pytest.raises(UserError, match="no folder"):
        load_references(image_config_of(gallery, tmp_path, references=Path("nowhere")), network, 16)


def test_images_that_were_added_count(gallery: Path, tmp_path: Path, network: EfficientNetLite):
    real = Path(shutil.copytree(gallery / "real", tmp_path / "real"))
    config = image_config_of(gallery, tmp_path / "out", references=real)
    counts = []
    for name in ("0", "more"):
        shutil.copyfile(gallery / "real" / "0.png", real / f"{name}.png")
        (real / f"{name}.txt").write_text("a bed")
        found = load_references(config, network, 16)
        counts.append(found and len(found.features))
    assert counts == [3, 4]
