"""The recipe of per-block routers on tiny models of every family: images of three pipelines, and Hunyuan3D."""

from dataclasses import replace

import pytest
import torch
from tiny_images import save_tiny_flux, save_tiny_qwen
from torch.utils.data import default_collate

from elastic3d.checkpoints.options import ImportConfig
from elastic3d.elastic.config import RouterConfig, Scope
from elastic3d.elastic.diffusers_loop import drive
from elastic3d.errors import UserError
from elastic3d.pipelines.image_to_3d import ImageTo3DPipeline
from elastic3d.pipelines.options import BackboneName
from elastic3d.pipelines.published import import_checkpoint
from elastic3d.pipelines.text_to_image import TextToImagePipeline
from elastic3d.training.block_router import BlockRouterStage
from elastic3d.training.export import export_run
from elastic3d.training.image import EndImageLossConfig
from elastic3d.training.image_data import text_of
from elastic3d.training.journal import read_metrics
from elastic3d.training.latents import build_cache
from elastic3d.training.measure import SensitivityConfig
from elastic3d.training.mesh_loss import EndMeshLossConfig
from elastic3d.training.options import Precision, StageName
from elastic3d.training.routes import load_sensitivity
from elastic3d.training.shape_flow import BlockRouterTrainConfig
from elastic3d.training.stages import run_stage
from tests.tiny_pipeline import image
from tests.training import test_hunyuan3d_routers as hunyuan
from tests.training.test_image_stages import folder, image_config, views  # noqa: F401  # fixtures
from tests.training.test_loop import start_two, wait_for_end
from tests.training.tiny import add_views, config_of, export_of, vae_config

pytestmark = pytest.mark.usefixtures("few_tries")

ROUTER = RouterConfig(scope=Scope.block, longest=1, damping=0.0, hidden=8, conditioning=8)
OPTIONS = dict(rank=2, min_steps=2, max_steps=3, reference_steps=4, pairs=4, val_shapes=1, val_steps=[2],
               val_budgets=[0.5], random_steps=1)  # fmt: skip


def block_config(root, stage, blocks, **options):
    settings = dict(name=stage.name, steps=2, batch=4, router=ROUTER, blocks=OPTIONS | blocks)
    return vae_config(root, stage, **(settings | options))


@pytest.mark.parametrize(
    ("save", "name", "guidance", "precision"),
    [
        (save_tiny_flux, BackboneName.flux, 3.5, Precision.fp32),
        (save_tiny_qwen, BackboneName.qwen_image, 2.0, Precision.bf16_master),
    ],
)
def test_published_image_pipelines(folder, prepared, save, name, guidance, precision):  # noqa: F811
    weights = save(prepared / "published")
    images = dict(backbone=name, weights=weights, images=folder, size=16, text_length=48, val_every=3,
                    cache=prepared / "cache", shard=4)  # fmt: skip
    config = block_config(
        prepared,
        StageName.image_block_router,
        {"guidance": guidance},
        image=images,
        gradient_checkpointing=True,
        precision=precision,
    )
    config.validate_every = 2
    flow = config.flow()
    assert flow.dit.dtype is (torch.bfloat16 if precision is Precision.bf16_master else torch.float32)
    assert flow.backbone.pipe.vae.dtype is torch.float32
    assert run_stage(config) == 0
    rows = read_metrics(config.folder / "metrics.jsonl")
    assert {"error_full", "error_smallest", "image", "imitation"} <= set(rows[0]) and "cost" in rows[1]
    assert 0 <= rows[-1]["val/share_2_at_0.5"] <= 1
    export_run(export_of(config, prepared / "elastic"))
    pipeline = TextToImagePipeline.from_pretrained(
        name, weights, prepared / "elastic" / "routers", device="cpu"
    )
    many = pipeline(["a chair", "a red ball"], [0, 1], steps=2, size=(16, 16), budget=0.5)
    alone = pipeline(["a red ball"], [1], steps=2, size=(16, 16), budget=0.5)[0]
    assert many[1].metadata["routes"] == alone.metadata["routes"] and many[1].metadata["updated"]
    branches = 2 if name is BackboneName.qwen_image else 1
    assert all(len(step) == branches for step in alone.metadata["routes"]["actions"])
    with pytest.raises(UserError, match="steps is 4, expected 2 to 3, for which these per-block routers"):
        pipeline(["a chair"], [0], steps=4, size=(16, 16))


def test_two_processes_train_weights_without_a_gradient_as_one(folder, prepared):  # noqa: F811
    """Nothing reads what the last block of Qwen-Image makes of the text."""
    weights = save_tiny_qwen(prepared / "published")
    images = dict(backbone=BackboneName.qwen_image, weights=weights, images=folder, size=16, text_length=48,
                  val_every=3, cache=prepared / "cache", shard=4)  # fmt: skip
    options = {"guidance": 1.0, "random_steps": 2}  # later the mean cost of a micro-batch counts
    kind = StageName.image_block_router
    config = block_config(prepared, kind, options, image=images, batch=8, gradient_checkpointing=True)
    alone, both = (replace(config, name=name) for name in ("alone", "both"))
    assert run_stage(alone) == 0
    wait_for_end(start_two(both))
    wanted, found = (read_metrics(each.folder / "metrics.jsonl") for each in (alone, both))
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in wanted], rel=1e-3)


def test_a_rollout_is_what_the_pipeline_of_images_generates(views):  # noqa: F811
    """Sampler, prompts, both branches and decoded image are the pipeline's own."""
    small = views / "small"
    run_stage(image_config(views))
    export_run(export_of(image_config(views), small))
    images = dict(backbone=BackboneName.small, weights=small, size=16, cache=views / "routed", shard=4)
    check_rollout(block_config(views, StageName.image_block_router, {"guidance": 2.0}, image=images))


@pytest.mark.parametrize(
    ("save", "name"), [(save_tiny_flux, BackboneName.flux), (save_tiny_qwen, BackboneName.qwen_image)]
)
def test_a_rollout_is_what_a_published_pipeline_generates(folder, prepared, save, name):  # noqa: F811
    """At the times of its own scheduler, which depend on the size of the image, and with its way of guidance."""
    weights = save(prepared / "published")
    images = dict(backbone=name, weights=weights, images=folder, size=16, text_length=48, val_every=3,
                  cache=prepared / "cache", shard=4)  # fmt: skip
    config = block_config(prepared, StageName.image_block_router, {}, image=images)
    stage = check_rollout(config)
    assert (
        stage.flow.guidance
        == TextToImagePipeline(stage.flow.backbone, "").settings_of(3, None, (16, 16)).guidance
    )
    times = 1 - stage.flow.backbone.pipe.scheduler.sigmas
    torch.testing.assert_close(stage.flow.times(3), times)
    assert (times - torch.linspace(0, 1, 4)).abs().max() > 0.02
    if name is BackboneName.qwen_image:
        config.blocks.min_steps = 1
        with pytest.raises(UserError, match="published can't be sampled in 1 step, expected at least 2"):
            config.flow()


def check_rollout(config) -> BlockRouterStage:
    """Latents and routes are those of the pipeline's own loop, from the same noise."""
    stage = BlockRouterStage(config)
    batch, guidance = stage.flow.val_pairs(), stage.flow.guidance
    found = stage.objective.generate(batch, 3, stage.objective.session.settings)
    actions = stage.objective.session.trace.actions
    backbone = stage.flow.backbone
    text, negative = (
        {name: value.float() if value.is_floating_point() else value for name, value in part.items()}
        for part in (text_of(batch), stage.flow.negative)
    )
    drive(backbone.pipe, stage.objective.session)
    options = backbone.guidance_arguments(guidance, len(batch["noise"]), negative)
    expected = backbone.pipe(
        **text, **options, latents=batch["noise"], width=16, height=16, num_inference_steps=3,
        output_type="latent", return_dict=False,
    )[0]  # fmt: skip
    assert stage.objective.session.coarseness is not None
    assert torch.equal(stage.objective.session.trace.actions, actions)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert actions.shape[:2] == (3, 2)
    return stage


def test_the_image_term_alone_reaches_every_gate(folder, prepared, monkeypatch):  # noqa: F811
    weights = save_tiny_flux(prepared / "published")
    images = dict(backbone=BackboneName.flux, weights=weights, images=folder, size=16, text_length=16, val_every=3,
                    cache=prepared / "cache", shard=4)  # fmt: skip
    options = {
        "random_steps": 0,
        "cost_weight": 0.0,
        "imitation_weight": 0.0,
        "image": EndImageLossConfig(weight=1.0),
    }
    stage = BlockRouterStage(block_config(prepared, StageName.image_block_router, options, image=images))
    monkeypatch.setattr(
        "elastic3d.training.block_router.relative_errors", lambda found, true, weights: torch.ones(len(found))
    )
    torch.manual_seed(3)
    for block in stage.objective.session.blocks:
        torch.nn.init.normal_(block.router.heads.weight, std=2.0)
    loss, values = stage.objective(default_collate([stage.items.item(i, 0) for i in range(4)]))
    loss.backward()
    assert values["image"] > 0
    for block in stage.objective.session.blocks:
        gate = block.router.heads.weight.grad[0]
        assert gate.isfinite().all() and gate.abs().max() > 0


@pytest.mark.parametrize(
    ("model", "precision"),
    [
        ("hunyuan3d2", Precision.bf16_master),
        ("hunyuan3d2_1", Precision.fp32),
        ("hunyuan3d2_turbo", Precision.bf16_autocast),
    ],
)
def test_hunyuan3d(prepared, model, precision):
    add_views(prepared)
    hunyuan.publish(prepared / "weights", model)
    vae = "" if model == "hunyuan3d2_1" else hunyuan.WITH_ENCODER
    source, output = str(prepared / "weights"), str(prepared / "model")
    import_checkpoint(ImportConfig(model=model, weights=source, output=output, vae_subfolder=vae))
    build_cache(hunyuan.with_sharp_points(hunyuan.config_for(prepared, stage=StageName.cache), model))
    mesh = EndMeshLossConfig(near_queries=16, volume_queries=8, surface_points=8)
    blocks = {
        "model": prepared / "model",
        "mesh": mesh,
        "guidance": model == "hunyuan3d2",
    }
    latents = hunyuan.config_for(prepared).latents
    if model == "hunyuan3d2":
        table = prepared / "table.json"
        shared = vars(block_config(prepared, StageName.block_router, blocks, latents=latents))
        measure = config_of(**(shared | {"stage": StageName.sensitivity, "blocks": {}}))
        measure.blocks = SensitivityConfig(
            model=prepared / "model", rank=2, steps=2, reference_steps=3, val_shapes=1, output=table
        )
        run_stage(measure)
        blocks["sensitivity"] = table
    config: BlockRouterTrainConfig = block_config(
        prepared, StageName.block_router, blocks, batch=4, latents=latents, precision=precision,
        gradient_checkpointing=True, validate_every=2,
    )  # fmt: skip
    assert run_stage(config) == 0
    rows = read_metrics(config.folder / "metrics.jsonl")
    assert "mesh_chamfer" in rows[0] and "cost" in rows[1] and 0 <= rows[-1]["val/share_2_at_0.5"] <= 1
    assert run_stage(export_of(config, prepared / "elastic")) == 0
    pipeline = ImageTo3DPipeline.from_pretrained(prepared / "elastic", "cpu", "float32")
    result = pipeline([image()], steps=3, resolution=16, budget=0.5)[0]
    assert result.latents is not None and result.latents.isfinite().all()
    assert 0 <= result.metadata["flops_executed"] <= result.metadata["flops_dense"]
    if "sensitivity" in blocks:
        blocks_of = [block.name for block in pipeline.session.blocks]
        assert load_sensitivity(blocks["sensitivity"], blocks_of) is not None
