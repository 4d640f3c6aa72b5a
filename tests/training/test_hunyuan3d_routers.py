"""From a published checkpoint and shapes on disk to trained routers that generate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hunyuan_tiny import (
    random_tensor,
    tiny_config,
    vae_shapes,
    write_checkpoint,
    write_checkpoint_21,
)
from safetensors.torch import save_file

from elastic3d.checkpoints.options import PRESETS, ImportConfig
from elastic3d.elastic.config import RouterConfig, Scope
from elastic3d.errors import UserError
from elastic3d.models.options import EncoderKind, ImageEncoderConfig
from elastic3d.pipelines.image_to_3d import ImageTo3DPipeline
from elastic3d.pipelines.published import import_checkpoint
from elastic3d.training.dit import LatentFlowConfig
from elastic3d.training.journal import read_metrics
from elastic3d.training.latents import CacheConfig, LatentCache, LatentInfo, LatentsConfig, build_cache
from elastic3d.training.options import Precision, StageName
from elastic3d.training.shape_flow import MeshLossConfig, RouterStageConfig, RouterTrainConfig
from elastic3d.training.stages import run_stage
from elastic3d.utils.files import load_json, save_json
from tests.tiny_pipeline import image
from tests.training.tiny import add_views, export_of, vae_config

pytestmark = pytest.mark.usefixtures("few_tries")

WITH_ENCODER = "hunyuan3d-vae-v2-0-withencoder"


def publish(root: Path, model: str) -> None:
    """The checkpoint of a model, beside it a VAE with an encoder where its own has none."""
    if model == "hunyuan3d2_1":
        write_checkpoint_21(root)
        return
    case = "turbo" if model.endswith("turbo") else "base"
    write_checkpoint(root, case, PRESETS[model].subfolder)
    config = tiny_config()["vae"]
    config["params"] |= {"num_encoder_layers": 1, "point_feats": 4}
    folder = root / WITH_ENCODER
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    shapes = vae_shapes(config["params"], encoder_layers=1)
    save_file({n: random_tensor(n, shape) for n, shape in shapes.items()}, folder / "model.fp16.safetensors")


def config_for(root: Path, **changes) -> RouterTrainConfig:
    encoder = ImageEncoderConfig(
        kind=EncoderKind.dinov2,
        image_size=28,
        prepared_size=40,
        path=str(root / "model/image_encoder/dinov2"),
    )
    options = dict(
        stage=StageName.router,
        name="router",
        steps=2,
        gradient_checkpointing=True,
        latents=LatentsConfig(
            output=root / "latents", vae=root / "model/vae", variants=1, views=2, batch=2, encoder=encoder,
            standardise=False,
        ),
        dit=LatentFlowConfig(match_channels=0),
        router=RouterConfig(scope=Scope.step, longest=3, widths=1),
        routing=RouterStageConfig(
            model=root / "model", val_budgets=[0.5],
            val_shapes=1, val_steps=2,
            mesh=MeshLossConfig(near_queries=16, volume_queries=8, surface_points=8, share=0.5),
        ),
    )  # fmt: skip
    return vae_config(root, **(options | changes))


def with_sharp_points(config: CacheConfig, model: str = "hunyuan3d2") -> CacheConfig:
    """What the VAE of a model reads, that of 2.1 none."""
    return replace(config, vae=replace(config.vae, sharp_points=0 if model == "hunyuan3d2_1" else 32))


@pytest.mark.parametrize(
    ("model", "precision"),
    [
        ("hunyuan3d2", Precision.bf16_master),
        ("hunyuan3d2_turbo", Precision.fp32),
        ("hunyuan3d2_1", Precision.bf16_autocast),
    ],
)
def test_routers_are_trained_and_generate(prepared: Path, model: str, precision: Precision) -> None:
    add_views(prepared)
    publish(prepared / "weights", model)
    vae = "" if model == "hunyuan3d2_1" else WITH_ENCODER
    told = import_checkpoint(
        ImportConfig(
            model=model, weights=str(prepared / "weights"), output=str(prepared / "model"), vae_subfolder=vae
        )
    )
    assert told.endswith("whose VAE has an encoder")
    config = config_for(prepared, precision=precision, validate_every=2)
    if vae:  # half of its latents are read from sharp edges
        with pytest.raises(UserError, match="sharp_points is 0, expected some, .* reads 3 of its 6 latents"):
            build_cache(config_for(prepared, stage=StageName.cache))
        assert not config.latents.output.exists()
    info = build_cache(with_sharp_points(config_for(prepared, stage=StageName.cache), model))
    assert info == LatentInfo.load(config.latents.output)
    assert info.mean == [0.0] * 8 and info.std == [1.0] * 8 and info.tokens == [5, 24]
    assert run_stage(config) == 0
    last = read_metrics(config.folder / "metrics.jsonl")[-1]
    assert 0 <= last["val/share_at_0.5"] <= 1
    assert run_stage(export_of(config, prepared / "elastic")) == 0
    pipeline = ImageTo3DPipeline.from_pretrained(prepared / "elastic", "cpu", "float32")
    assert pipeline.session is not None and pipeline.config.model == model
    result = pipeline([image()], steps=2, resolution=16, budget=0.5)[0]
    assert result.latents is not None and result.latents.isfinite().all()
    assert 0 <= result.metadata["flops_executed"] <= result.metadata["flops_dense"]


def test_image_tokens_of_another_encoder_than_the_models_are_refused(prepared: Path) -> None:
    """As those of one view, without its direction, for a model of several."""
    add_views(prepared)
    publish(prepared / "weights", "hunyuan3d2")
    source, output = str(prepared / "weights"), str(prepared / "model")
    import_checkpoint(
        ImportConfig(model="hunyuan3d2", weights=source, output=output, vae_subfolder=WITH_ENCODER)
    )
    own = prepared / "model/image_encoder/config.json"
    save_json(load_json(own) | {"views": 4}, own)
    build_cache(with_sharp_points(config_for(prepared, stage=StageName.cache)))
    cache = LatentCache(prepared / "latents", config_for(prepared).data, 1)
    with pytest.raises(UserError, match=r"tokens with views 1, .*/model have 4: .* latents.encoder.views=4"):
        cache.load_dense(prepared / "model")
    save_json(load_json(own) | {"views": 1, "border": 0.2}, own)
    with pytest.raises(UserError, match="tokens with border 0.15, .*/model have 0.2"):
        cache.load_dense(prepared / "model")
    save_json(load_json(own) | {"border": 0.15 + 1e-9}, own)
    cache.load_dense(prepared / "model")


def test_a_vae_without_an_encoder_says_so(prepared: Path) -> None:
    add_views(prepared)
    publish(prepared / "weights", "hunyuan3d2")
    told = import_checkpoint(
        ImportConfig(model="hunyuan3d2", weights=str(prepared / "weights"), output=str(prepared / "model"))
    )
    assert told.endswith("whose VAE has no encoder")
    config = config_for(prepared)
    with pytest.raises(UserError, match="model/vae has no encoder.* vae_subfolder="):
        build_cache(config_for(prepared, stage=StageName.cache))
    assert not config.latents.output.exists()  # it would refuse the VAE that has one
    weights = prepared / "model/image_encoder/dinov2/model.safetensors"
    assert weights.stat().st_mode == weights.with_name("config.json").stat().st_mode
