"""Other routers than the model's own, by their path or by their name in its folder."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch

from elastic3d.elastic import attach
from elastic3d.elastic.attachment import detach, save_routers
from elastic3d.elastic.config import RouterConfig, Scope
from elastic3d.errors import UserError
from elastic3d.pipelines.image_to_3d import ImageTo3DPipeline
from tests.tiny_pipeline import image, tiny_pipeline

PER_BLOCK = RouterConfig(scope=Scope.block, hidden=8, conditioning=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with routers of whole steps, and per-block ones in a folder of its own."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    pipeline = tiny_pipeline()
    attach(pipeline.dit, PER_BLOCK)
    save_routers(pipeline.dit, folder / "per_block")
    detach(pipeline.dit)
    attach(pipeline.dit, replace(PER_BLOCK, scope=Scope.step))
    pipeline.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("outside", [False, True])
def test_they_take_the_place_of_the_models_own(folder, outside):
    own = ImageTo3DPipeline.from_pretrained(folder, device="cpu")
    other = ImageTo3DPipeline.from_pretrained(
        folder, device="cpu", routers=folder / "per_block" if outside else "per_block"
    )
    assert own.session.router_config.scope is Scope.step
    assert other.session.router_config.scope is Scope.block and other.dial is None
    assert own.weights_sha256 != other.weights_sha256 and own.dense_sha256 == other.dense_sha256
    routes = other(image(), steps=2, budget=0.5).metadata["routes"]
    assert len(routes["blocks"]) == 4


def test_another_model_saved_over_theirs_takes_none_of_them(folder, tmp_path):
    """The same one, also from elsewhere, keeps them."""
    shutil.copytree(folder, tmp_path / "tiny")
    (tmp_path / "tiny/per_block/notes.txt").write_text("mine")
    for source in (tmp_path / "tiny", folder):
        ImageTo3DPipeline.from_pretrained(source, "cpu", torch.float32).save_pretrained(tmp_path / "tiny")
        ImageTo3DPipeline.from_pretrained(tmp_path / "tiny", "cpu", routers="per_block")
    other = tiny_pipeline()
    torch.nn.init.normal_(next(other.dit.parameters()))
    other.save_pretrained(tmp_path / "tiny")
    with pytest.raises(UserError, match="per_block"):
        ImageTo3DPipeline.from_pretrained(tmp_path / "tiny", "cpu", routers="per_block")
    assert [path.name for path in (tmp_path / "tiny/per_block").iterdir()] == ["notes.txt"]
    assert ImageTo3DPipeline.from_pretrained(tmp_path / "tiny", "cpu").session is None


def test_a_name_of_neither_is_an_error(folder):
    with pytest.raises(UserError, match="per_blocks"):
        ImageTo3DPipeline.from_pretrained(folder, device="cpu", routers="per_blocks")
