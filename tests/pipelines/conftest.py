"""A tiny pipeline for every test here; nothing changes it."""

import sys
from pathlib import Path

import pytest

from elastic3d.pipelines.image_to_3d import ImageTo3DPipeline

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


@pytest.fixture(scope="session")
def pipeline() -> ImageTo3DPipeline:
    from tiny_pipeline import tiny_pipeline

    return tiny_pipeline()


@pytest.fixture(scope="session")
def saved(pipeline: ImageTo3DPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    pipeline.save_pretrained(folder)
    return folder
