"""From prepared shapes through a VAE and a cache of latents to a trained DiT."""

import io
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from elastic3d.diffusion.flow import velocity
from elastic3d.errors import UserError
from elastic3d.models.images import prepare_image
from elastic3d.models.options import DiTConfig, EncoderKind, ImageEncoderConfig
from elastic3d.models.shape_dit import ShapeDiT
from elastic3d.models.shape_vae import ShapeVAE
from elastic3d.pipelines.runtime import find_model
from elastic3d.training.checkpoint import load_checkpoint
from elastic3d.training.datasets import PreparedShapes, item_generator
from elastic3d.training.dit import DiTStage, DiTStageConfig, FlowObjective, LatentItems
from elastic3d.training.export import ExportConfig, export_run
from elastic3d.training.journal import read_metrics
from elastic3d.training.latents import LatentInfo, LatentsConfig, build_cache
from elastic3d.training.options import DataConfig, StageName
from elastic3d.training.routes import WIDTHS
from elastic3d.training.stages import run_stage
from elastic3d.training.vae import TrainedPart
from elastic3d.training.views import named_images, stored_views
from elastic3d.utils.files import file_sha256, load_json, save_json
from tests.training.test_loop import start_two, wait_for_end
from tests.training.tiny import add_views, change_prepared, tiny_vae, vae_config, views
from tests.training.tiny import dit_config as config_for


def test_the_cache_holds_standardised_statistics(cached):
    info = LatentInfo.load(cached / "latents")
    assert (info.latents, info.tokens) == ([8, 7], [49, 768])
    shapes = PreparedShapes(cached / "latents", [f"balls/ball{i}" for i in range(6)])
    train = shapes.ids[:5]
    mean = torch.cat([shapes.read(id, "mean").float().flatten(0, 1) for id in train])
    variance = torch.cat([shapes.read(id, "logvar").float().exp().flatten(0, 1) for id in train])
    torch.testing.assert_close(torch.tensor(info.mean), mean.mean(0), atol=2e-3, rtol=0)
    std = (mean.var(0, correction=0) + variance.mean(0)).sqrt()
    torch.testing.assert_close(torch.tensor(info.std), std, atol=2e-3, rtol=1e-2)
    assert shapes.read("balls/ball0", "tokens").shape == (2, 49, 768)
    assert not torch.equal(*shapes.read("balls/ball0", "mean"))


def test_the_cache_goes_on_where_it_stopped_and_refuses_other_settings(cached):
    first, second = sorted((cached / "latents" / "balls").glob("*.safetensors"))
    before = first.stat().st_mtime_ns, second.read_bytes()
    second.unlink()
    build_cache(config_for(cached, stage=StageName.cache))
    assert (first.stat().st_mtime_ns, second.read_bytes()) == before
    settings = cached / "latents" / "settings.json"
    older = load_json(settings)
    del older["foreground"]["method"]  # as if written before there was such an option
    save_json(older, settings)
    build_cache(config_for(cached, stage=StageName.cache))
    other = config_for(cached, stage=StageName.cache)
    other.latents.variants = 1
    with pytest.raises(UserError, match="made with another variants"):
        build_cache(other)
    ShapeVAE(tiny_vae()).save_pretrained(cached / "vae")
    with pytest.raises(UserError, match="made with another vae_sha256"):
        build_cache(config_for(cached, stage=StageName.cache))


def test_what_changed_since_is_cached_again(cached):
    config = config_for(cached, stage=StageName.cache)
    first, second = sorted((cached / "latents" / "balls").glob("*.safetensors"))

    def redone() -> list[bool]:
        before = [path.stat().st_mtime_ns for path in (first, second)]
        build_cache(config)
        return [path.stat().st_mtime_ns != time for path, time in zip((first, second), before, strict=True)]

    assert redone() == [False, False]
    prepared = cached / "prepared" / "balls" / second.name  # a mesh was mended and prepared again
    tensors = load_file(prepared)
    tensors["ball4/surface"] = tensors["ball4/surface"] / 2
    save_file(tensors, prepared)
    assert redone() == [False, True]
    (cached / "train.txt").write_text("".join(f"balls/ball{i}\n" for i in range(4)))
    (cached / "val.txt").write_text("balls/ball4\nballs/ball5\n")  # ball4 no longer counts in the statistics
    before = LatentInfo.load(cached / "latents").mean
    assert redone() == [False, True] and LatentInfo.load(cached / "latents").mean != before
    sidecar = second.with_suffix(".json")
    save_json({k: v for k, v in load_json(sidecar).items() if k not in ("train", "source")}, sidecar)
    assert redone() == [False, False]  # of an older version


def test_an_own_image_that_changed_is_cached_again(cached):
    own = cached / "own"
    own.mkdir()
    image = Image.open(io.BytesIO(views(1)["views"].numpy().tobytes()))
    image.save(own / "ball1.png")
    config = config_for(cached, stage=StageName.cache)
    config.latents.output, config.latents.images = cached / "other", own

    def tokens() -> torch.Tensor:
        build_cache(config)
        return PreparedShapes(cached / "other", ["balls/ball1"]).read("balls/ball1", "tokens")

    before = tokens()
    image.rotate(30).save(own / "ball1.png")
    assert not torch.equal(tokens(), before)


def test_shapes_whose_names_end_alike_are_drawn_apart(cached):
    """As those of `<hash>/model_normalized.obj`; a cache that took such for one goes on as it began."""
    ids = [f"balls/{name}--model_normalized" for name in "ab"]
    first, second = sorted((cached / "prepared" / "balls").glob("*.safetensors"))
    second.unlink()
    ball = {key: tensor for key, tensor in load_file(first).items() if key.startswith("ball0/")}
    save_file(
        {key.replace("ball0", id[6:]): tensor.clone() for id in ids for key, tensor in ball.items()}, first
    )
    for name in ("train", "val"):
        (cached / f"{name}.txt").write_text("\n".join(ids))
    config = config_for(cached, stage=StageName.cache)

    def are_alike(output: Path) -> list[bool]:
        config.latents = replace(config.latents, output=output, augment=True)
        build_cache(config)
        shapes = PreparedShapes(output, ids)
        return [torch.equal(*(shapes.read(id, name) for id in ids)) for name in ("mean", "tokens")]

    assert are_alike(cached / "new") == [False, False]
    older = load_json(cached / "new" / "settings.json")
    del older["seeds"]
    save_json(older, cached / "old" / "settings.json")
    assert are_alike(cached / "old") == [True, True]
    assert "seeds" not in LatentInfo.load(cached / "old").settings


def test_shapes_that_are_in_another_shard_now_are_not_read_from_the_old_one(cached):
    """The folder was prepared anew, with another shard_size."""
    folder = cached / "prepared" / "balls"
    first, second = sorted(folder.glob("*.safetensors"))
    moved = {
        name: tensor / 2 if name.endswith("/surface") else tensor
        for name, tensor in load_file(second).items()
    }
    save_file(load_file(first) | moved, first)
    second.unlink()
    before = PreparedShapes(cached / "latents", ["balls/ball4"]).read("balls/ball4", "mean")
    build_cache(config_for(cached, stage=StageName.cache))
    found = PreparedShapes(cached / "latents", ["balls/ball4"])
    assert not torch.equal(found.read("balls/ball4", "mean"), before)


def test_a_vae_that_changed_since_is_refused(cached):
    """It would be exported with a DiT that knows the latents of another one."""
    info = LatentInfo.load(cached / "latents")
    info.settings["vae"] = str(cached / "vae")
    info.load_vae()
    ShapeVAE(tiny_vae()).save_pretrained(cached / "vae")
    with pytest.raises(UserError, match="is another one than made the cached latents"):
        info.load_vae()


def test_an_image_encoder_that_changed_since_is_refused(cached):
    """Its weights are in a folder, as those of a published model."""
    from transformers import Dinov2Config, Dinov2Model

    shape = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    dinov2 = Dinov2Model(Dinov2Config(**shape))
    dinov2.save_pretrained(cached / "dinov2")
    encoder = ImageEncoderConfig(kind=EncoderKind.dinov2, image_size=28, path=str(cached / "dinov2"))
    config = config_for(cached, stage=StageName.cache)
    config.latents = replace(config.latents, output=cached / "tokens", encoder=encoder)
    info = build_cache(config)
    info.load_encoder()
    dinov2.embeddings.cls_token.data += 1
    dinov2.save_pretrained(cached / "dinov2")
    with pytest.raises(
        UserError, match="the encoder in .*dinov2 is another one than made the cached latents"
    ):
        info.load_encoder()
    with pytest.raises(UserError, match="tokens was made with another encoder_sha256: delete it first"):
        build_cache(config)
    settings = cached / "tokens" / "settings.json"
    older = load_json(settings)
    del older["encoder_sha256"]  # as if written before it was noted
    save_json(older, settings)
    build_cache(config).load_encoder()


def test_own_images_replace_rendered_views(cached, capfd):
    own = cached / "own"
    own.mkdir()
    Image.new("RGBA", (40, 40)).save(own / "ball9.png")
    config = config_for(cached, stage=StageName.cache)
    config.latents.output, config.latents.images = cached / "other", own
    with pytest.raises(UserError, match=r"names such as absent.png, but the first there is ball9.png"):
        build_cache(config)
    image = Image.open(io.BytesIO(views(1)["views"].numpy().tobytes()))
    image.rotate(30).save(own / "ball1.webp", lossless=True)
    image.crop((0, 0, 32, 64)).save(own / "ball5.png")
    (own / "ball5.jpg").write_bytes(b"no image")
    assert not (cached / "other").exists()  # it would refuse the next run, with other images
    build_cache(config)
    said = "".join(capfd.readouterr())
    assert "2 of 7 shapes have images of their own" in said and "ball5.jpg is no image" in said
    before, after = (
        PreparedShapes(cached / name, [f"balls/ball{i}" for i in range(5)]) for name in ("latents", "other")
    )
    for id in after.ids:
        tokens = after.read(id, "tokens")
        assert tokens.shape == (2, 49, 768)
        assert torch.equal(tokens, before.read(id, "tokens")) == (id != "balls/ball1")
    assert torch.equal(*after.read("balls/ball1", "tokens"))  # the one image, as often as there are views
    config.latents.images = None
    with pytest.raises(UserError, match="made with another images"):
        build_cache(config)


@pytest.mark.parametrize(("make", "message"), [(False, "is no folder"), (True, "holds no image")])
def test_folders_without_images(tmp_path, make, message):
    if make:
        (tmp_path / "own").mkdir()
    with pytest.raises(UserError, match=message):
        named_images(tmp_path / "own")


def test_an_unfinished_cache_is_no_cache(tmp_path):
    with pytest.raises(UserError, match=r"no latents.json, expected a finished cache"):
        LatentInfo.load(tmp_path)


def test_views_come_back_as_rendered(cached):
    shapes = PreparedShapes(cached / "prepared", ["balls/ball0"])
    found = stored_views(shapes, "balls/ball0")
    assert [view.getbbox()[2] - view.getbbox()[0] for view in found] == [23, 25, 27]


def test_items(cached):
    config = config_for(cached, dit=DiTStageConfig(drop_condition=0.5))
    info = LatentInfo.load(cached / "latents")
    shapes = PreparedShapes(cached / "latents", [f"balls/ball{i}" for i in range(5)])
    items = LatentItems(shapes, info, config.dit)
    drawn = [items.item(position, seed=0) for position in range(200)]
    latents = torch.stack([item["latents"] for item in drawn]).flatten(0, 1)
    torch.testing.assert_close(latents.mean(0), torch.zeros(7), atol=0.1, rtol=0)
    torch.testing.assert_close(latents.std(0), torch.ones(7), atol=0.1, rtol=0)
    times = torch.stack([item["t"] for item in drawn])
    assert times.min() < 0.15
    assert times.max() > 0.85
    dropped = sum(not item["condition"].any() for item in drawn)
    assert 70 < dropped < 130
    again = LatentItems(shapes, info, config.dit).item(7, seed=0)
    assert all(torch.equal(again[name], drawn[7][name]) for name in again)


def test_a_mirrored_cache_pairs_a_shape_with_views_of_the_same_hand(prepared):
    """Points move to x > 0 and images are lit on the right, so that the hand can be read off both."""
    add_views(prepared)
    for shard in (prepared / "prepared" / "balls").glob("*.safetensors"):
        tensors = load_file(shard)
        for name in [name for name in tensors if name.endswith("/surface")]:
            tensors[name][..., 0] = tensors[name][..., 0].abs()
        save_file(tensors, shard)
    torch.manual_seed(0)
    ShapeVAE(tiny_vae()).save_pretrained(prepared / "vae")
    options = dict(vae=prepared / "vae", variants=4, views=4, batch=2, mirror=True, augment=True)
    config = config_for(
        prepared, stage=StageName.cache, latents=LatentsConfig(output=prepared / "mirrored", **options)
    )
    build_cache(config)
    info = LatentInfo.load(prepared / "mirrored")
    shapes = PreparedShapes(prepared / "mirrored", [f"balls/ball{i}" for i in range(6)])
    x = torch.stack([shapes.read(id, "mean")[..., 0].float().mean(1) for id in shapes.ids])  # of the anchors
    assert (x[:5, :2] > 0.1).all() and (x[:5, 2:] < -0.1).all()
    assert (x[5] > 0.1).all()  # validation shapes stay as they are
    items = LatentItems(shapes, info, config_for(prepared).dit)
    rng = np.random.default_rng(0)
    chosen = {items._choose(rng) for _ in range(200)}
    assert chosen == {(v, w) for v in range(4) for w in range(4) if (v < 2) == (w < 2)}
    items.mirror = False
    assert {items._choose(rng) for _ in range(100)} == {(v, w) for v in range(2) for w in range(2)}
    with pytest.raises(ValueError, match="even numbers"):
        LatentsConfig(variants=3, views=4, mirror=True)


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
        assert torch.equal(stage._val_items.fixed(index)["condition"], wanted)
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
    fresh = LatentsConfig(output=cached / "again", vae=cached / "nowhere", variants=2, views=2, batch=2)
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
