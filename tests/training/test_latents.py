"""The cache of latents and image tokens that a DiT is trained on."""

import io
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from elastic3d.errors import UserError
from elastic3d.models.options import EncoderKind, ImageEncoderConfig
from elastic3d.models.shape_vae import ShapeVAE
from elastic3d.training.datasets import PreparedShapes
from elastic3d.training.dit import DiTStageConfig, LatentItems
from elastic3d.training.latents import LatentInfo, LatentsConfig, build_cache
from elastic3d.training.options import StageName
from elastic3d.training.stages import adopt_architecture, run_stage
from elastic3d.training.views import named_images, stored_views
from elastic3d.utils.files import load_json, save_json
from tests.processes import in_use_elsewhere
from tests.training.tiny import add_views, tiny_vae, views
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


def test_a_cache_is_for_one_process_at_a_time(cached):
    config = config_for(cached, stage=StageName.cache)
    first = min((cached / "latents" / "balls").glob("*.safetensors"))
    first.unlink()
    with (
        in_use_elsewhere(cached / "latents"),
        pytest.raises(UserError, match="latents is in use by another process"),
    ):
        build_cache(config)
    assert not first.exists()
    build_cache(config)
    assert first.exists()


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


def test_a_model_frames_images_as_the_cache_did(cached):
    config = config_for(cached, stage=StageName.cache)
    config.latents.output, config.latents.foreground.border = cached / "framed", 0.3
    info = build_cache(config)
    assert info.encoder.border == info.load_encoder().config.border == 0.3
    del info.settings["foreground"]["border"]
    assert info.encoder == config.latents.encoder  # that of an older cache has its own


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


def test_the_autoencoder_of_a_cache_is_the_one_that_is_named(dense, monkeypatch):
    """The given one, that of the model that the DiT goes on from, or a run's: whatever other folders are there."""
    monkeypatch.chdir(dense)
    default = Path("runs/vae/export")
    ShapeVAE(tiny_vae(width=64)).save_pretrained(default)

    def cache(name: str, **given: Any) -> LatentsConfig:
        start = given.pop("init_from", None)
        latents = LatentsConfig(output=dense / name, variants=2, views=2, batch=2, **given)
        run_stage(config_for(dense, stage=StageName.cache, latents=latents, init_from=start))
        return latents

    cache("plain")
    assert LatentInfo.load(dense / "plain").vae == default
    own = cache("own", init_from=dense / "dense")
    assert LatentInfo.load(dense / "own").vae == dense / "dense" / "vae"
    for start in (None, dense / "dense"):
        with pytest.raises(UserError, match=r"there is no folder .*typo, expected one with config\.json"):
            cache("third", vae=dense / "typo", init_from=start)
    other = cache("other", vae=default, init_from=dense / "dense")
    started = config_for(dense, init_from=dense / "dense", latents=own)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adopt_architecture(started)
    with pytest.warns(UserWarning, match="holds latents of another autoencoder than"):
        adopt_architecture(replace(started, latents=other))
    record = {"data": {"vae_sha256": LatentInfo.load(dense / "other").record["vae_sha256"]}}
    save_json(record, dense / "dense" / "dit" / "training.json")  # the model's own has another decoder since
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adopt_architecture(replace(started, latents=other))
