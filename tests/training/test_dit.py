"""A DiT trained on a cache of latents."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from elastic3d.diffusion.flow import velocity
from elastic3d.errors import UserError
from elastic3d.models.images import prepare_image
from elastic3d.models.options import DiTConfig
from elastic3d.models.shape_dit import ShapeDiT
from elastic3d.models.shape_vae import ShapeVAE
from elastic3d.pipelines.runtime import find_model
from elastic3d.training.checkpoint import load_checkpoint
from elastic3d.training.datasets import PreparedShapes, item_generator
from elastic3d.training.dit import DiTStage, FlowObjective
from elastic3d.training.export import ExportConfig, export_run
from elastic3d.training.journal import read_metrics
from elastic3d.training.latents import LatentInfo, LatentsConfig, build_cache
from elastic3d.training.options import DataConfig, Precision, StageName
from elastic3d.training.routes import WIDTHS
from elastic3d.training.stages import run_stage
from elastic3d.training.vae import TrainedPart
from elastic3d.training.views import stored_views
from elastic3d.utils.files import file_sha256, load_json, save_json
from tests.training.test_loop import start_two, wait_for_end
from tests.training.tiny import change_prepared, tiny_vae, vae_config, views
from tests.training.tiny import dit_config as config_for


def test_validation_on_training_shapes_takes_their_own_views(cached):
    """As with fewer than ten own meshes, which are in both lists; half of their cached views are mirrored."""
    (cached / "val.txt").write_text((cached / "train.txt").read_text() + (cached / "val.txt").read_text())
    options = dict(vae=cached / "vae", variants=2, views=4, mirror=True, output=cached / "mirrored")
    latents = LatentsConfig(**options)
    build_cache(config_for(cached, stage=StageName.cache, latents=latents))
    stage = DiTStage(config_for(cached, latents=latents, sample_every=1))
    own = [stage.info.settings["views"] // 2] * 5 + [4]
    for index, (id, views_of) in enumerate(zip(stage._val.ids, own, strict=True)):
        wanted = stage._val.read(id, "tokens", index % views_of)
        assert torch.equal(stage._val_items.fixed(index)["condition"], wanted.float())
    (cached / "train.txt").write_text(
        "balls/ball5\n"
    )  # which shapes have a mirror image is the cache's to say
    other = DiTStage(config_for(cached, latents=latents))
    assert [other._val_items.views_of(id) for id in other._val.ids] == own
    found = stored_views(stage._images, "balls/ball3")
    assert np.array_equal(stage._view(3), np.asarray(prepare_image(found[1], stage.info.foreground, 160)))


def test_the_objective_is_the_weighted_velocity_error():
    torch.manual_seed(0)
    dit = ShapeDiT(
        DiTConfig(in_channels=5, condition_channels=4, width=16, heads=2, double_blocks=1, single_blocks=1)
    )
    batch = {
        "latents": torch.randn(2, 3, 5), "noise": torch.randn(2, 3, 5), "t": torch.rand(2),
        "condition": torch.randn(2, 4, 4),
    }  # fmt: skip
    loss, values = FlowObjective(dit, anchor_channels=3, anchor_weight=4.0)(batch)
    target = velocity(batch["noise"], batch["latents"]).square()  # an untrained DiT says 0
    expected = (4 * target[..., :3].sum() + target[..., 3:].sum()) / (2 * 3 * (4 * 3 + 2))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(values["anchors"], target[..., :3].mean())
    torch.testing.assert_close(values["features"], target[..., 3:].mean())


def test_trains_on_the_cache_and_draws(cached):
    config = config_for(
        cached, steps=30, log_every=10, learning_rate=3e-2, validate_every=30, sample_every=30, save_every=30
    )
    assert run_stage(config) == 0
    lines = read_metrics(config.folder / "metrics.jsonl")
    assert lines[2]["loss"] < 0.9 * lines[0]["loss"]
    assert {"val/flow", "val/flow_without_image", "val/flow_middle"} <= set(lines[-1])
    assert not {"val/flow_noisy", "val/flow_clean"} & set(lines[-1]), "the one shape is seen at t = 0.5 alone"
    with Image.open(config.folder / "samples" / "generated-00000030.png") as sheet:
        assert sheet.size == (160, 480)


def test_it_is_validated_under_autocast(cached):
    changes = dict(steps=1, validate_every=1, sample_every=1, precision=Precision.bf16_autocast)
    (cached / "val.txt").write_text("balls/ball4\nballs/ball5\n")
    config = config_for(cached, **changes)
    config.dit.sample_shapes = 2
    assert run_stage(config) == 0
    assert "val/flow" in read_metrics(config.folder / "metrics.jsonl")[-1]


def test_the_cache_alone_is_enough(cached):
    """As on another machine: no prepared shapes; sample images, which show their views, need them."""
    shutil.rmtree(cached / "prepared")
    assert run_stage(config_for(cached, steps=2, validate_every=1)) == 0
    with pytest.raises(UserError, match=r"prepare_data.py makes them, and sample_every=0 trains without"):
        run_stage(config_for(cached, name="drawn", steps=2, sample_every=1))


def test_a_cached_shape_that_is_not_prepared_any_more_is_named_at_the_start(cached):
    (cached / "val.txt").write_text("balls/ball4\nballs/ball5\n")
    change_prepared(cached, "ball4", None)
    with pytest.raises(UserError, match=r"balls/ball4 is in the cache of latents, but not .* sample_every=0"):
        DiTStage(config_for(cached, sample_every=1))
    DiTStage(config_for(cached))
    change_prepared(cached, "ball5", None)
    (cached / "val.txt").write_text("balls/ball3\nballs/ball5\n")
    DiTStage(config_for(cached, sample_every=1))  # of two shapes it draws the first


def test_sample_images_show_what_conditioned(cached):
    """A shape's own images; white where it has none and was prepared with shape.views=0."""
    own = cached / "own"
    own.mkdir()
    image = Image.new("RGBA", (64, 64))
    image.paste((200, 40, 40, 255), (8, 20, 56, 44))
    image.save(own / "ball5.png")
    change_prepared(cached, "ball5", views(0))
    config = config_for(cached, stage=StageName.cache)
    latents = config.latents = replace(config.latents, output=cached / "other", images=own)
    build_cache(config)
    stage = DiTStage(config_for(cached, latents=latents, sample_every=1))
    assert np.array_equal(stage._view(0), np.asarray(prepare_image(image, stage.info.foreground, 160)))
    shutil.rmtree(own)
    stage = DiTStage(config_for(cached, latents=latents, sample_every=1))
    assert (stage.samples()["generated"][:160] == 255).all()


def test_a_moved_cache_finds_the_bundled_vae(cached):
    """The same weights only; a VAE of one's own is looked for where it was."""
    info, bundled = LatentInfo.load(cached / "latents"), find_model("shape-small") / "vae"
    info.settings |= {"vae": "/elsewhere/data/pretrained/shape-small/vae"}
    assert info.vae == Path(info.settings["vae"])
    info.settings["vae_sha256"] = file_sha256(bundled / "model.safetensors")
    assert info.vae.samefile(bundled)
    info.settings["vae"] = "runs/vae/export"
    assert info.vae == Path("runs/vae/export")


def test_two_processes_train_along_random_routes_as_one(cached):
    """One has all the full routes, the other one none, and leaves out some blocks altogether: what is recorded of them
    is of both together."""
    model = DiTConfig(width=32, heads=2, double_blocks=1, single_blocks=2)
    changes = dict(batch=8, steps=3, dit=dict(model=model, routes=dict(smallest=0.1)))
    alone, both = (config_for(cached, name=name, **changes) for name in ("alone", "both"))
    items = DiTStage(both).items
    routes = torch.stack([items.item(position, both.seed)["route"] for position in range(24)])
    second = routes.view(3, 2, 4, 3)[:, 1]
    assert (second == 0).all(1).any(), "no sample of the second process takes that block"
    processes = start_two(both)
    assert run_stage(alone) == 0
    wait_for_end(processes)
    wanted, found = (read_metrics(config.folder / "metrics.jsonl") for config in (alone, both))
    for a, b in zip(wanted, found, strict=True):
        assert {"full", "elastic"} <= a.keys() == b.keys()
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b["full"] == pytest.approx(a["full"], rel=1e-4)


def test_every_batch_along_random_routes_has_the_full_one(cached):
    model = dict(width=32, heads=2, double_blocks=1, single_blocks=3)
    options = dict(dit=dict(model=model, routes=dict(smallest=0.3)))
    items = DiTStage(config_for(cached, batch=6, **options)).items
    for first in range(0, 30, 6):
        routes = torch.stack([items.item(first + i, seed=0)["route"] for i in range(6)])
        assert (routes[0] == WIDTHS).all() and (routes[1:] < WIDTHS).any()
    with pytest.raises(UserError, match="batch is 2, expected 4 or more with dit.routes.smallest"):
        DiTStage(config_for(cached, batch=2, **options))


def test_gradient_checkpointing_changes_nothing(cached):
    found = []
    for name, recompute in (("plain", False), ("recomputed", True)):
        config = config_for(cached, name=name, gradient_checkpointing=recompute, steps=3)
        assert run_stage(config) == 0
        found.append([line["loss"] for line in read_metrics(config.folder / "metrics.jsonl")])
    assert found[0] == found[1]


def test_a_fixed_validation_batch(cached):
    stage = DiTStage(config_for(cached))
    assert stage.validate() == stage.validate()
    assert stage.dit.config.in_channels == 7
    assert stage.record["train_missing"] == 1


def test_one_row_of_a_stored_tensor(cached):
    [shard, _] = sorted((cached / "latents" / "balls").glob("*.safetensors"))
    with safe_open(shard, "pt") as file:
        whole = file.get_tensor("ball0/tokens")
    for preload in ((), ("tokens",)):
        shapes = PreparedShapes(cached / "latents", ["balls/ball0"], preload)
        assert torch.equal(shapes.read("balls/ball0", "tokens", 1), whole[1])
    assert item_generator(1, 2).random() == item_generator(1, 2).random()


def test_fine_tuning_a_model_folder(cached):
    """An exported DiT goes on with its own architecture, weights and scale of the latents."""
    run_stage(config_for(cached, steps=1, name="first"))
    export_run(
        config_for(cached, stage=StageName.export, name="first", export=ExportConfig(output=cached / "model"))
    )
    model = cached / "model"
    fresh = LatentsConfig(output=cached / "again", variants=2, views=2, batch=2)
    few = DataConfig(prepared=cached / "prepared", train=[cached / "val.txt"], val=[cached / "val.txt"])
    given = dict(latents=fresh, data=few, init_from=model)
    run_stage(config_for(cached, stage=StageName.cache, **given))
    first, second = LatentInfo.load(cached / "latents"), LatentInfo.load(cached / "again")
    assert (first.mean, first.std) == (second.mean, second.std)
    assert second.vae == model / "vae"
    tuned = config_for(cached, name="second", steps=1, learning_rate=0.0, **given)
    tuned.dit = replace(tuned.dit, model=DiTConfig(width=64, heads=2))  # the model knows better
    assert run_stage(tuned) == 0
    started = load_checkpoint(tuned.folder / "checkpoints" / "step-00000001").part("model")
    exported = ShapeDiT.from_pretrained(model / "dit").state_dict()
    assert all(torch.equal(tensor, started[f"dit.{name}"]) for name, tensor in exported.items())
    values = load_json(cached / "again" / "latents.json")
    save_json({**values, "mean": [0.0] * 7}, cached / "again" / "latents.json")
    with pytest.raises(UserError, match=r"another scale than .* stage=cache init_from="):
        run_stage(replace(tuned, name="third"))
    with pytest.raises(UserError, match="needs a model with a DiT"):
        run_stage(config_for(cached, stage=StageName.cache, init_from=model / "vae"))


def test_the_vae_of_a_model_is_fine_tuned(cached):
    config = vae_config(cached, name="tuned", steps=1, learning_rate=0.0, init_from=cached / "vae")
    config.vae.model = tiny_vae(width=64)
    run_stage(config)
    started = load_checkpoint(config.folder / "checkpoints" / "step-00000001").part("model")
    saved = ShapeVAE.from_pretrained(cached / "vae").state_dict()
    assert all(torch.equal(tensor, started[f"vae.{name}"]) for name, tensor in saved.items())


def test_the_decoder_of_a_model_learns_alone(cached):
    """What the DiT knows stays to the bit: the encoder and the scale of the latents."""
    stale = ShapeVAE.from_pretrained(cached / "vae")
    stale.set_latent_statistics([0.5] * 7, [2.0] * 7)
    stale.save_pretrained(cached / "model")
    config = vae_config(cached, name="decoder", steps=3, init_from=cached / "model")
    config.vae.trained = TrainedPart.decoder
    assert run_stage(config) == 0
    export_run(config_for(cached, stage=StageName.export, name="decoder"))
    tuned = ShapeVAE.from_pretrained(config.folder / "export")
    assert (tuned.config.latent_mean, tuned.config.latent_std) == ([0.5] * 7, [2.0] * 7)
    before, after = load_file(cached / "model/model.safetensors"), tuned.state_dict()
    changed = {
        name for name, value in before.items() if not torch.equal(value.bfloat16().float(), after[name])
    }
    assert not any(name.startswith(("encoder.", "pre_kl.")) for name in changed)
    assert {name.partition(".")[0] for name in changed} == {
        "post_kl",
        "anchor_proj",
        "transformer",
        "geo_decoder",
    }
