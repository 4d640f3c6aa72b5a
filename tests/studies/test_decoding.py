"""Decodings of the same latents compared: with the plain way, with each other, and with the truth."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_pipeline import save_image, tiny_pipeline

from elastic3d.errors import UserError
from elastic3d.geometry.cleanup import genus
from elastic3d.pipelines.preview import draw_routes
from elastic3d.studies import decoding
from elastic3d.studies.config import DecodingConfig
from elastic3d.studies.decoding import compare_decoding, hunyuan3d_fields, to_truth
from elastic3d.utils.files import load_json, save_json
from tests.processes import in_use_elsewhere


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DecodingConfig:
    """Of a tiny model, one image and one made shape; the made shapes' names are those of `made_shapes`."""
    tiny_pipeline().save_pretrained(tmp_path / "model")
    save_image(tmp_path / "images" / "ellipse.png")
    whole = decoding.made_shapes()
    monkeypatch.setattr(decoding, "made_shapes", lambda: {"sphere": whole["sphere"]})
    return DecodingConfig(
        model=str(tmp_path / "model"), images=tmp_path / "images", output=tmp_path / "out", seeds=[0],
        reference=16, resolutions=[8, 16], points=200,
    )  # fmt: skip


def test_every_way_is_compared_and_kept(config: DecodingConfig) -> None:
    text = compare_decoding(config)
    shapes = json.loads((config.output / "shapes.json").read_text())
    assert list(shapes) == ["ellipse, seed 0", "sphere"]
    for name, ways in shapes.items():
        assert list(ways) == ["plain", "8 cells", "16 cells"]
        assert ways["plain"]["chamfer"] < 1e-6 < ways["8 cells"]["chamfer"]
        assert ways["16 cells"]["chamfer"] < 0.2 and ways["plain"]["queries"] == 17**3
        assert (ways["plain"]["truth_chamfer"] is None) == (name != "sphere")
    assert text == (config.output / "table.md").read_text().strip() and text.count("\n") == 4
    (config.output / "table.md").unlink()
    with in_use_elsewhere(config.output), pytest.raises(UserError, match="out is in use by another process"):
        compare_decoding(config)
    assert compare_decoding(config) == text, "what is done is kept"


def test_results_of_others_are_refused(config: DecodingConfig, tmp_path: Path) -> None:
    """Their numbers would be printed for those of this model, these images and these options."""
    config = replace(config, resolutions=[8])
    compare_decoding(config)
    other = tiny_pipeline()
    torch.nn.init.normal_(next(other.vae.parameters()))
    other.save_pretrained(tmp_path / "other")
    save_image(tmp_path / "more" / "ellipse.png", "navy")
    (tmp_path / "gt").mkdir()
    decoding.made_shapes()["sphere"].export(tmp_path / "gt" / "ellipse.glb")
    others = {
        "model": str(tmp_path / "other"), "images": tmp_path / "more", "gt": tmp_path / "gt", "seeds": [1],
        "reference": 12, "resolutions": [8, 16], "points": 300, "hunyuan3d_tokens": 4,
    }  # fmt: skip
    for name, value in others.items():
        with pytest.raises(UserError, match=f"out was made with another {name}: delete it first, or give"):
            compare_decoding(replace(config, **{name: value}))
    compare_decoding(replace(config, limit=1))
    path = tmp_path / "model" / "pipeline.json"
    text = path.read_text()
    save_json(load_json(path) | {"steps": 7}, path)
    with pytest.raises(UserError, match="out was made with another pipeline: delete it first"):
        compare_decoding(config)
    path.write_text(text)
    (config.output / "settings.json").unlink()
    with pytest.raises(UserError, match="out was made with another model"):
        compare_decoding(config)


def test_inputs_of_one_name_are_refused(config: DecodingConfig, tmp_path: Path) -> None:
    """One would take the other's place without a word."""
    (tmp_path / "gt").mkdir()
    decoding.made_shapes()["sphere"].export(tmp_path / "gt" / "sphere.glb")
    with pytest.raises(
        UserError, match="sphere.glb is named as a made shape, expected another name than sphere"
    ):
        compare_decoding(replace(config, gt=tmp_path / "gt"))
    save_image(config.images / "ellipse.webp")
    with pytest.raises(UserError, match="images has several images named ellipse, expected different names"):
        compare_decoding(config)
    assert not config.output.exists()


def test_a_folder_without_images_of_the_shapes_is_refused(config: DecodingConfig, tmp_path: Path) -> None:
    """The made shapes alone would be decoded, or the true ones without a truth, and nothing said of it."""
    config = replace(config, images=tmp_path / "drawings", resolutions=[8])
    config.images.mkdir()
    with pytest.raises(UserError, match="images=.*drawings holds no image"):
        compare_decoding(config)
    draw_routes(
        [("a", {"actions": [["1."]], "blocks": ["0", "1"], "widths": [1.0]})], config.images / "a.png"
    )
    with pytest.raises(
        UserError, match="images=.*drawings holds no image but previews and drawings of routes"
    ):
        compare_decoding(config)
    assert not config.output.exists()
    Image.new("RGBA", (64, 64)).save(config.images / "empty.png")
    with (
        pytest.raises(UserError, match="images=.*drawings has no image that shows an object"),
        pytest.warns(),
    ):
        compare_decoding(config)
    save_image(config.images / "ellipse.png")
    (tmp_path / "gt").mkdir()
    with pytest.raises(UserError, match="gt=.*gt has no mesh named as an image in .*, expected ellipse.glb"):
        compare_decoding(replace(config, gt=tmp_path / "gt"))
    with pytest.warns(UserWarning, match="an image is left out: .*empty.png"):
        compare_decoding(replace(config, output=tmp_path / "other"))
    assert list(load_json(tmp_path / "other" / "shapes.json")) == ["ellipse, seed 0", "sphere"]


def test_a_shape_is_as_near_to_itself_as_its_samples() -> None:
    sphere = decoding.made_shapes()["sphere"]
    found = to_truth(sphere, sphere, 2000)
    assert found["truth_chamfer"] < 1e-6 and found["truth_f_score"] > 0.1 and found["truth_genus"] == 0
    assert genus(decoding.made_shapes()["torus"]) == 1


def test_both_fields_of_the_layout_are_the_same() -> None:
    fields = hunyuan3d_fields(4, torch.float32)
    points = torch.rand(9, 3)
    plain, prepared = (fields[way](points) for way in (True, False))
    torch.testing.assert_close(plain, prepared, rtol=1e-4, atol=1e-4)
