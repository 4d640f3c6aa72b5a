"""From a published TripoSG or Step1X-3D folder and shapes on disk to trained routers that generate."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from open_models import CONTEXT, write_folder

from elastic3d.checkpoints.options import ImportConfig
from elastic3d.elastic.config import RouterConfig, Scope
from elastic3d.models.options import EncoderKind, ImageEncoderConfig
from elastic3d.pipelines.image_to_3d import ImageTo3DPipeline
from elastic3d.pipelines.published import import_checkpoint
from elastic3d.training.dit import LatentFlowConfig
from elastic3d.training.journal import read_metrics
from elastic3d.training.latents import LatentsConfig, build_cache
from elastic3d.training.options import StageName
from elastic3d.training.shape_flow import MeshLossConfig, RouterStageConfig, RouterTrainConfig
from elastic3d.training.stages import run_stage
from tests.tiny_pipeline import image
from tests.training.tiny import add_views, export_of, vae_config

pytestmark = pytest.mark.usefixtures("few_tries")


def config_for(root: Path, model: str, stage: StageName) -> RouterTrainConfig:
    encoder = ImageEncoderConfig(
        kind=EncoderKind.dinov2, image_size=28, path=str(root / "model/image_encoder/dinov2")
    )
    published = {"prepared_size": 32, "centre_crop": True, "border": 1 / 6}
    encoder = replace(encoder, **(published if model == "triposg" else {"border": 0.05}))
    config = vae_config(
        root,
        stage=stage,
        name="router",
        steps=2,
        validate_every=2,
        gradient_checkpointing=True,
        latents=LatentsConfig(
            output=root / "latents", vae=root / "model/vae", variants=1, views=2, batch=2, encoder=encoder,
            standardise=False,
        ),
        dit=LatentFlowConfig(match_channels=0),
        router=RouterConfig(scope=Scope.step, longest=3, widths=1),
        routing=RouterStageConfig(
            model=root / "model", val_budgets=[0.5],
            val_shapes=1, val_steps=3,
            mesh=MeshLossConfig(near_queries=16, volume_queries=8, surface_points=8, share=0.5),
        ),
    )  # fmt: skip
    return replace(config, vae=replace(config.vae, sharp_points=32 if model == "step1x3d" else 0))


@pytest.mark.parametrize("model", ["triposg", "step1x3d"])
def test_routers_are_trained_and_generate(prepared: Path, model: str) -> None:
    add_views(prepared)
    weights = write_folder(prepared / "weights", model)
    told = import_checkpoint(ImportConfig(model=model, weights=str(weights), output=str(prepared / "model")))
    assert told.endswith(f"{model}, whose VAE has an encoder")
    for part in ("vae", "dit"):  # the shapes here have 512 points, TripoSG's latents are 2048
        path = prepared / "model" / part / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"num_latents": 6}))
    config = config_for(prepared, model, StageName.router)
    info = build_cache(config_for(prepared, model, StageName.cache))
    assert info.latents == [6, 8] and info.tokens == [5, CONTEXT]
    assert run_stage(config) == 0
    last = read_metrics(config.folder / "metrics.jsonl")[-1]
    assert 0 <= last["val/share_at_0.5"] <= 1
    assert run_stage(export_of(config, prepared / "elastic")) == 0
    pipeline = ImageTo3DPipeline.from_pretrained(prepared / "elastic", "cpu", "float32")
    assert pipeline.session is not None and pipeline.config.model == model
    result = pipeline([image()], steps=3, resolution=16, budget=0.5)[0]
    assert result.latents is not None and result.latents.isfinite().all()
    moves = 3 if model == "triposg" else 2
    assert result.metadata["flops_dense"] % (2 * moves) == 0
    assert 0 <= result.metadata["flops_executed"] <= result.metadata["flops_dense"]
