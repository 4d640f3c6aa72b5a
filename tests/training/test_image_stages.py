"""Training on images: the small model on views of shapes, routers for a published pipeline from a folder."""

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_images import save_tiny_flux, save_tiny_qwen
from torch.utils.data import default_collate

from elastic3d.elastic import session_of
from elastic3d.elastic.config import RouterConfig, Scope
from elastic3d.errors import UserError
from elastic3d.pipelines.options import BackboneName
from elastic3d.pipelines.pixel_flux import PixelModelConfig, PixelSamplingConfig
from elastic3d.pipelines.text_to_image import TextToImagePipeline
from elastic3d.preparation.sources import with_article
from elastic3d.training.export import export_run
from elastic3d.training.image import (
    ImageLossConfig,
    ImageRouterTrainConfig,
    ImageStage,
    image_loss,
)
from elastic3d.training.image_data import (
    ImageCache,
    ImageDataConfig,
    ImageFolder,
    ShapeViews,
    colour_name,
    noun_of,
)
from elastic3d.training.journal import read_metrics
from elastic3d.training.options import Precision, StageName
from elastic3d.training.router import RouterStage
from elastic3d.training.stages import run_stage
from elastic3d.training.views import recoloured, view_words
from elastic3d.utils.options import from_dict
from tests.processes import in_use_elsewhere
from tests.training.tiny import add_views, defaults, export_of, vae_config

pytestmark = pytest.mark.usefixtures("few_tries")

MODEL = PixelModelConfig(
    size=16,
    patch=8,
    text_length=12,
    width=32,
    heads=2,
    double_blocks=1,
    single_blocks=2,
    steps=2,
    name="tiny",
)
ROUTING = dict(val_budgets=[0.5], val_shapes=1, val_steps=2)


def image_config(root: Path, stage=StageName.image, routing=None, data=None, **image):
    small = dict(cache=root / "cache", model=MODEL, val_images=2, sample_images=2, sample_steps=2, shard=4)
    image = defaults(stage, "image", **small) | image
    router = RouterConfig(scope=Scope.step, longest=3, widths=1)
    routing = defaults(stage, "routing", **ROUTING) | (routing or {})
    given = {} if data is None else {"data": data}
    return vae_config(
        root, stage, name=stage.name, steps=2, image=image, router=router, routing=routing, **given
    )


@pytest.fixture
def views(prepared):
    """Prepared shapes with three views each, cameras and captions."""
    add_views(prepared)
    for shard in (prepared / "prepared" / "balls").glob("*.safetensors"):
        tensors = load_file(shard)
        ids = sorted({key.partition("/")[0] for key in tensors})
        camera = torch.tensor(
            [[2.0, 0, 3, 0, 0, 0, 40, 10], [0, 2, -3, 0, 0, 0, 40, 40], [3, 0, 0, 0, 0, 0, 40, 0]]
        )
        save_file(tensors | {f"{id}/cameras": camera.clone() for id in ids}, shard)
        items = [{"id": id, "caption": "an orange ball"} for id in ids]
        shard.with_suffix(".json").write_text(json.dumps({"items": items}))
    return prepared


@pytest.fixture
def folder(tmp_path):
    """Six images with captions beside them, one without, one broken."""
    images = tmp_path / "images"
    images.mkdir()
    for i in range(6):
        Image.new("RGB", (40, 30 + i), (40 * i, 10, 200)).save(images / f"{i}.png")
        (images / f"{i}.txt").write_text(f"an image of {i}\n")
    Image.new("RGB", (8, 8)).save(images / "silent.png")
    (images / "torn.png").write_bytes(b"no image")
    (images / "torn.txt").write_text("torn")
    return images


def test_captions_say_what_is_seen():
    assert noun_of("an orange ball") == "orange ball" and with_article("orange ball") == "an orange ball"
    cameras = np.array([[0.1, 0, 3], [2, 0, 2], [-3, 0, 0.1], [0.5, 0, -3]])
    words = [view_words(np.array([*eye, 0, 0, 0, 40, 10])) for eye in cameras]
    assert [w.split()[-1] for w in words] == ["front", "angle", "side", "behind"]
    assert view_words(np.array([0, 2, 2, 0, 0, 0, 40, 45.0])).endswith("from the front and above")
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[2:6, 2:6] = (30, 60, 190, 255)
    assert colour_name(pixels) == "blue" and colour_name(pixels * 0) is None
    red = recoloured(pixels, (200, 20, 20))
    assert colour_name(red) == "red" and (red[..., 3] == pixels[..., 3]).all()


def test_views_of_shapes_and_their_captions(views):
    config = ImageDataConfig(views=2, recolour=1.0, background=1.0)
    source = ShapeViews(views / "prepared", [f"balls/ball{i}" for i in range(5)], config, 0, 0)
    images = [image for i in range(5) for image in source.load(i, 16)]
    assert len(images) == 10 and all(p.image.size == (16, 16) and p.image.mode == "RGB" for p in images)
    assert all("orange ball seen" in p.captions[0] and "background" in p.captions[0] for p in images)
    assert images[0].captions[2].startswith("an orange ball, on a ")
    again = ShapeViews(views / "prepared", [f"balls/ball{i}" for i in range(5)], config, 0, 0).load(0, 16)
    assert [p.captions for p in again] == [p.captions for p in images[:2]]


def test_a_folder_of_images(folder, tmp_path):
    config = ImageDataConfig(images=folder, val_every=3)
    train, val = (ImageFolder(folder, config, validation) for validation in (False, True))
    assert (len(train), len(val)) == (4, 3)
    assert train.load(0, 16)[0].captions == ["an image of 1"] and train.load(0, 16)[0].image.size == (16, 16)
    (folder / "0.txt").write_bytes("ein Glas Kölsch".encode("latin-1"))
    with pytest.raises(UserError, match="0.txt is broken or no text, expected a caption"):
        ImageFolder(folder, config, False)
    (folder / "captions.jsonl").write_text(
        '{"file": "0.png", "caption": "x"}\n\n{"file": "1.png", "caption": "y"}\n'
    )
    assert [c for _, c in ImageFolder(folder, config, False).pairs] == ["y"]
    lines = [json.dumps({"file": f"{i}.png", "caption": f"{i} {each}"}) for each in "ab" for i in range(5)]
    (folder / "captions.jsonl").write_text("\n".join(lines))
    train, val = (
        [caption for _, caption in ImageFolder(folder, config, validation).pairs]
        for validation in (False, True)
    )
    assert (train, val) == (["1 a", "2 a", "4 a", "1 b", "2 b", "4 b"], ["0 a", "3 a", "0 b", "3 b"])
    (folder / "captions.jsonl").write_text("[]\n")
    with pytest.raises(UserError, match="captions.jsonl, line 1"):
        ImageFolder(folder, config, False)
    with pytest.raises(UserError, match="which is no folder"):
        ImageFolder(tmp_path / "gone", config, False)


def test_a_cache_goes_on_with_the_same_images_alone(folder, prepared):
    config = image_config(prepared, images=folder, val_every=3)
    path = config.image.cache / "cache.json"
    ImageStage(config)
    finished = path.read_text()
    unfinished = json.dumps(json.loads(finished) | {"counts": {}})
    path.write_text(unfinished)
    with in_use_elsewhere(config.image.cache):
        with pytest.raises(UserError, match="in use by another process"):
            ImageStage(config)
        path.write_text(finished)
        ImageStage(config)  # which reads it only
    path.write_text(unfinished)
    ImageStage(config)
    assert path.read_text() == finished
    for suffix in (".png", ".txt"):
        shutil.copy(folder / f"0{suffix}", folder / f"00{suffix}")
    with pytest.warns(UserWarning, match="made of other images or captions than there are now: delete it"):
        ImageStage(config)  # what is finished stays
    assert path.read_text() == finished
    older = json.loads(finished)
    del older["made_of"]
    path.write_text(json.dumps(older))
    with warnings.catch_warnings():  # a cache that does not say what it was made of
        warnings.simplefilter("error")
        ImageStage(config)
    path.write_text(unfinished)
    with pytest.raises(UserError, match="was made with another list of images or captions: delete it"):
        ImageStage(config)


def test_a_finished_cache_of_other_shapes_is_refused(views):
    """Each would be ignored: what a run trains on is in the cache that all runs share."""
    config = image_config(views)
    config.data.limit = 1
    assert ImageStage(config).record["train_images"] == 3
    (views / "other.txt").write_text("balls/ball3\nballs/ball4\n")
    lists = [views / "other.txt"]
    for name, value in (("limit", 0), ("train", lists), ("val", lists)):
        other = image_config(views, data=replace(config.data, **{name: value}))
        with pytest.raises(UserError, match=f"made with another data.{name}: delete it, or choose another"):
            ImageStage(other)
    config.seed += 1  # whose images these are is the first run's to say
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ImageStage(config)
    path = config.image.cache / "cache.json"
    info = json.loads(path.read_text())
    later = ("data.limit", "data.train_sha256", "data.val_sha256")
    info["settings"] = {name: value for name, value in info["settings"].items() if name not in later}
    path.write_text(json.dumps(info))  # an older cache did not note its shapes
    ImageStage(config)


def test_a_cache_of_other_encoders_is_refused(folder, prepared):
    """Weights that change in place; those of the DiT are in no cache."""
    weights = save_tiny_flux(prepared / "published")
    image = dict(backbone=BackboneName.flux, weights=weights, images=folder, size=16, text_length=16)
    config = image_config(prepared, StageName.image_router, val_every=3, **image)

    def change(part):
        (file,) = (weights / part).glob("*.safetensors")
        save_file({name: -value for name, value in load_file(file).items()}, file, {"format": "pt"})

    config.flow()
    change("transformer")
    config.flow()
    for part in ("vae", "text_encoder", "text_encoder_2"):
        change(part)
        with pytest.raises(UserError, match="was made with another encoder: delete it, or choose another"):
            config.flow()
        change(part)  # back
    config.flow()
    path = config.image.cache / "cache.json"
    info = json.loads(path.read_text())
    del info["settings"]["encoder_sha256"]
    path.write_text(json.dumps(info))
    change("vae")  # an older cache did not note its encoders
    config.flow()


def test_the_small_model_trains_exports_and_draws(views):
    config = image_config(views)
    config.validate_every = config.sample_every = config.steps = 4
    config.precision = Precision.bf16_autocast
    assert run_stage(config) == 0
    lines = read_metrics(config.folder / "metrics.jsonl")
    assert {"val/flow", "val/flow_without_caption"} <= set(lines[-1])
    with Image.open(config.folder / "samples" / "generated-00000004.png") as sheet:
        assert sheet.size == (32, 32)
    images = ImageCache(config.image.cache, "train")
    item = images.read(3, 1)
    assert item["latents"].shape == (4, 192) and item["latents"].abs().max() <= 1
    assert item["text/prompt_embeds"].shape == (12, 384) and item["text/prompt_embeds"][-1].abs().max() == 0
    stage = ImageStage(config)  # finds the cache
    first = stage.backbone.decode(item["latents"][None], (16, 16))
    assert torch.equal((first * 255).round(), first.clamp(0, 1) * 255)  # bytes come back exactly
    export_run(export_of(config, views / "small", image={"model": PixelSamplingConfig(steps=3, name="tiny")}))
    pipeline = TextToImagePipeline.from_pretrained(BackboneName.small, views / "small", device="cpu")
    result = pipeline(["a red ball"], [0])[0]
    assert result.image.size == (16, 16) and result.metadata["steps"] == 3
    with pytest.raises(UserError, match="tokens, expected at most 12"):
        pipeline(["a very long prompt " * 5], [0])
    other = image_config(views, recolour=0.0)
    with pytest.raises(UserError, match="made with another recolour"):
        ImageStage(other)
    routed = image_config(
        views, StageName.image_router, backbone=BackboneName.small, weights=views / "small", size=16
    )
    routed.image.cache = views / "routed"
    assert run_stage(routed) == 0
    (views / "small" / "dial.json").write_text("{}")  # of the model before it had these routers
    export_run(export_of(routed, views / "small"))
    pipeline = TextToImagePipeline.from_pretrained(BackboneName.small, views / "small", device="cpu")
    assert pipeline.session is not None and pipeline.dial is None


@pytest.mark.parametrize(
    "save, name", [(save_tiny_flux, BackboneName.flux), (save_tiny_qwen, BackboneName.qwen_image)]
)
def test_routers_for_a_published_pipeline(folder, prepared, save, name):
    weights = save(prepared / "published")
    image = dict(backbone=name, weights=weights, images=folder, size=16, text_length=48, val_every=3)
    config = image_config(prepared, StageName.image_router, **image)
    config.validate_every = config.sample_every = 2
    config.precision = Precision.bf16_autocast
    assert run_stage(config) == 0
    config.steps = 4
    assert run_stage(config) == 0  # goes on from its own checkpoint, with its own cache
    lines = read_metrics(config.folder / "metrics.jsonl")
    assert {"prediction", "flow", "share", "off_budget", "image"} <= set(lines[0])
    assert 0 <= next(line["val/share_at_0.5"] for line in lines if "val/share_at_0.5" in line) <= 1
    assert (config.folder / "samples" / "generated-00000002.png").is_file()
    export_run(export_of(config, prepared / "elastic"))
    assert [path.name for path in (prepared / "elastic").iterdir()] == ["routers"]
    pipeline = TextToImagePipeline.from_pretrained(
        name, weights, prepared / "elastic" / "routers", device="cpu"
    )
    result = pipeline(["a chair"], [0], steps=2, size=(16, 16), budget=0.5)[0]
    assert result.metadata["routes"]["actions"]
    assert session_of(pipeline.backbone.transformer).router_config.curves.requested_budgets


def test_prompts_and_guidance_are_those_of_the_pipeline(folder, prepared):
    """FLUX fills prompts up to 512 tokens; Qwen-Image's guided velocity is as long as its conditional one."""
    image = dict(images=folder, size=16, val_every=3)
    for save, name, tokens, guidance in (
        (save_tiny_flux, BackboneName.flux, 512, 3.5),
        (save_tiny_qwen, BackboneName.qwen_image, 256, 4.0),
    ):
        image |= dict(
            backbone=name, weights=save(prepared / name.name), cache=prepared / f"{name.name}-cache"
        )
        stage = RouterStage(image_config(prepared, StageName.image_router, **image))
        assert (stage.flow.lengths[1], stage.flow.guidance) == (tokens, guidance)
        assert stage.sampling == (ROUTING["val_steps"], guidance)
    v = torch.randn(2, 4, 16)
    guided = stage.flow.guidance * stage.objective.guided(v)
    torch.testing.assert_close(guided.norm(dim=-1), v[:1].norm(dim=-1))


def test_the_image_term_reaches_the_gates(folder, prepared):
    weights = save_tiny_flux(prepared / "published")
    image = dict(
        backbone=BackboneName.flux, weights=weights, images=folder, size=16, text_length=16, val_every=3
    )
    gradients = []
    for weight in (1.0, 0.0):
        term = ImageLossConfig(weight=weight, share=1.0, time_power=0.0)
        torch.manual_seed(0)
        stage = RouterStage(
            image_config(prepared, StageName.image_router, {"flow": 0.0, "image": term}, **image)
        )
        stage.objective(default_collate([stage.items.item(i, 0) for i in range(8)]))[0].backward()
        gradients.append(stage.objective.session.blocks[0].router.heads.weight.grad[0])
        assert all(
            p.grad is None for n, p in stage.objective.named_parameters() if not n.startswith("routers.")
        )
    assert gradients[0].isfinite().all() and not torch.equal(*gradients)
    with pytest.raises(UserError, match="image.images= is missing"):
        RouterStage(image_config(prepared, StageName.image_router, **(image | {"images": None})))
    with pytest.raises(UserError, match="image.weights is required: folder of the pipeline"):
        from_dict(ImageRouterTrainConfig, {"image": {"backbone": "flux"}})


def test_the_image_loss():
    x = torch.rand(2, 3, 8, 8)
    assert image_loss(x, x, 3).abs().max() == 0
    torch.testing.assert_close(image_loss(x + 0.1, x, 3), torch.full((2,), 0.1))
