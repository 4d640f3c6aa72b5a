"""The model that ships, as a user meets it."""

from pathlib import Path

from elastic3d.config.generate import DEFAULT_MODEL
from elastic3d.pipelines.image_to_3d import ImageTo3DPipeline

ROOT = Path(__file__).resolve().parents[2]


def test_the_bundled_model_makes_a_watertight_mesh_of_a_sample_picture() -> None:
    pipeline = ImageTo3DPipeline.from_pretrained(ROOT / DEFAULT_MODEL)
    result = pipeline(ROOT / "data/samples/table.png", seed=0, steps=8, resolution=64)
    assert result.mesh.is_watertight
    width, height, _ = result.mesh.extents
    assert width > height, "the picture shows a low table"
    assert result.receipt["flops_executed"] == result.receipt["flops_dense"] > 0


def test_the_bundled_models_stay_small() -> None:
    files = [path for path in (ROOT / "data/pretrained").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 100e6
