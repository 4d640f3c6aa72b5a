"""Image to mesh: reproducible, independent of the batch, saved and loaded whole, clear about failures."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_dial import load as load_dialled
from tiny_dial import save_dialled
from tiny_pipeline import CHANNELS, LATENTS, image, save_image, tiny_pipeline
from transformers import Dinov2Config, Dinov2Model

from elastic3d import __version__
from elastic3d.diffusion.options import Combine
from elastic3d.elastic import attach
from elastic3d.elastic.attachment import ROUTER_RECORDS
from elastic3d.elastic.config import RouterConfig
from elastic3d.elastic.families import dense_flops
from elastic3d.elastic.families.shape_dit import ADAPTER
from elastic3d.errors import NoSurfaceError, UserError
from elastic3d.geometry import ensemble as ensemble_of_fields
from elastic3d.geometry import pose
from elastic3d.geometry.options import CleanupConfig, DecodeConfig
from elastic3d.models.image_encoder import DinoV2, Familiarity, image_feature
from elastic3d.models.options import DiTConfig, EncoderKind, ForegroundConfig, ImageEncoderConfig
from elastic3d.models.shape_dit import ShapeDiT
from elastic3d.pipelines import ensembles, image_to_3d
from elastic3d.pipelines.assets import object_pixels
from elastic3d.pipelines.image_to_3d import ImageTo3DPipeline
from elastic3d.pipelines.runtime import find_model
from elastic3d.utils.files import file_sha256


def test_one_image(pipeline: ImageTo3DPipeline, tmp_path: Path) -> None:
    result = pipeline(save_image(tmp_path / "a.png"), seed=3)
    assert len(result.mesh.faces) > 0 and np.abs(result.mesh.vertices).max() <= 1.0101
    assert result.latents is not None and result.latents.shape == (LATENTS, CHANNELS)
    again = pipeline(image(), seed=3)
    np.testing.assert_array_equal(again.mesh.vertices, result.mesh.vertices)


def test_metadata(pipeline: ImageTo3DPipeline) -> None:
    metadata = pipeline(image(), seed=5, steps=2, guidance=1.0, resolution=12).metadata
    assert list(metadata) == [
        "version", "model", "weights_sha256", "seed", "steps", "guidance", "resolution", "budget",
        "ensemble", "flops_executed", "flops_dense", "ms",
    ]  # fmt: skip
    assert list(metadata["ms"]) == ["condition", "dit", "decode", "surface", "cleanup"]
    assert all(value >= 0 for value in metadata["ms"].values())
    flops = 2 * dense_flops(pipeline.dit, ADAPTER, [LATENTS, 4])
    expected = {
        "version": __version__,
        "model": "tiny",
        "seed": 5,
        "steps": 2,
        "guidance": 1.0,
        "resolution": 12,
    }
    expected |= {"budget": 1.0, "flops_executed": flops, "flops_dense": flops}
    assert {name: metadata[name] for name in expected} == expected
    guided = pipeline(image(), steps=2, guidance=3.0).metadata
    assert guided["flops_dense"] == 2 * flops
    json.dumps(metadata)


def test_the_default_number_format_of_a_program_changes_nothing(tmp_path: Path) -> None:
    """`torch.set_default_dtype(torch.float64)`, before a model is loaded and while it runs; also with routers."""
    folder, found = save_dialled(tmp_path / "model"), []
    try:
        for default in (torch.float32, torch.float64):
            torch.set_default_dtype(default)
            pipeline = load_dialled(folder)
            results = [pipeline(image(), quality="fast"), pipeline(image(), steps=3, budget=0.8)]
            found.append([np.asarray(result.mesh.vertices) for result in results])
    finally:
        torch.set_default_dtype(torch.float32)
    for usual, double in zip(*found, strict=True):
        assert np.array_equal(usual, double)


def test_seed_image_and_guidance_matter(pipeline: ImageTo3DPipeline) -> None:
    base = pipeline(image(), seed=0).latents
    assert base is not None
    for other in (
        pipeline(image(), seed=1),
        pipeline(image("white", x=5), seed=0),
        pipeline(image(), seed=0, guidance=9.0),
        pipeline(image(), seed=0, steps=4),
    ):
        assert other.latents is not None and (other.latents - base).abs().max() > 1e-4


def test_a_sample_does_not_depend_on_its_batch(pipeline: ImageTo3DPipeline) -> None:
    images = [image("maroon"), image("navy", 5), image("green", 60)]
    batch = pipeline(images, seed=[7, 8, 9])
    for one, seed, together in zip(images, (7, 8, 9), batch, strict=True):
        alone = pipeline(one, seed=seed)
        torch.testing.assert_close(alone.latents, together.latents, rtol=1e-4, atol=1e-5)
        assert abs(len(alone.mesh.faces) - len(together.mesh.faces)) <= 8
    assert [result.metadata["seed"] for result in batch] == [7, 8, 9]
    assert all(result.metadata["seed"] == 4 for result in pipeline(images[:2], seed=4))


def test_an_ensemble(pipeline: ImageTo3DPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first generation is the one without; the others are of the same generator, whatever else is in the batch."""
    monkeypatch.setattr(ensemble_of_fields, "_CELLS", 8)
    plain, found = pipeline(image(), seed=7), pipeline(image(), seed=7, ensemble=3)
    assert plain.latents is not None and found.latents is not None
    assert found.latents.shape == (3, *plain.latents.shape)
    torch.testing.assert_close(found.latents[0], plain.latents, rtol=1e-4, atol=1e-5)
    assert all((found.latents[i] - found.latents[j]).abs().max() > 1e-3 for i, j in ((0, 1), (0, 2), (1, 2)))
    assert plain.metadata["ensemble"] == 1 and found.metadata["ensemble"] == 3
    own = tiny_pipeline()
    for options in ({}, {"steps": 4, "budget": 0.5}):  # the dense cost is one generation's, with a plan too
        one, three = (own(image(), resolution=8, ensemble=K, **options).metadata for K in (1, 3))
        assert three["flops_executed"] == 3 * one["flops_executed"]
        assert three["flops_dense"] == one["flops_dense"] > 0

    asked: list[int] = []
    original = ensembles.mean_field
    monkeypatch.setattr(
        ensembles, "mean_field", lambda fields, *rest: asked.append(len(fields)) or original(fields, *rest)
    )
    batch = pipeline([image("navy", 5), image()], seed=[8, 7], ensemble=3)
    assert asked == [3, 3]
    torch.testing.assert_close(batch[1].latents, found.latents, rtol=1e-4, atol=1e-5)
    assert abs(len(batch[1].mesh.faces) - len(found.mesh.faces)) <= 8
    for wrong in (0, 65, 2.5):
        with pytest.raises(UserError, match=f"ensemble is {wrong}, expected"):
            pipeline(image(), ensemble=wrong)  # type: ignore[call-overload]


def test_the_generation_that_fits_the_image(
    pipeline: ImageTo3DPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its mesh is that of its latents by themselves."""
    monkeypatch.setattr(pose, "_STARTS", 1)  # where the camera is does not matter here
    monkeypatch.setattr(pose, "_FINE", 24)
    found = pipeline(image(), seed=7, ensemble=2, combine="fit")
    fits, chosen = found.metadata["ensemble_fits"], found.metadata["ensemble_chosen"]
    known = [-1 if fit is None else fit for fit in fits]
    assert len(fits) == 2 and known[chosen] == max(known) > 0
    again = pipeline(image(), seed=7, ensemble=2, combine=Combine.fit)
    assert (again.metadata["ensemble_fits"], again.metadata["ensemble_chosen"]) == (fits, chosen)
    assert found.latents is not None
    monkeypatch.setattr(pipeline, "sample_latents", lambda *_: found.latents[chosen][None])  # type: ignore[index]
    np.testing.assert_array_equal(pipeline(image()).mesh.vertices, found.mesh.vertices)
    with pytest.raises(UserError, match="combine is 'best', expected one of mean, fit"):
        pipeline(image(), combine="best")
    with pytest.raises(UserError, match="combine is fit, expected ensemble= of 2 or more"):
        pipeline(image(), combine="fit")
    seen = {"left": image(), "back": image()}
    with pytest.raises(UserError, match="combine is fit, expected an image from the front with it"):
        pipeline(seen, ensemble=2, combine="fit")
    with pytest.raises(UserError, match="there are images from left, back, expected one from the front"):
        object_pixels(seen, ForegroundConfig())


def test_a_bad_image_is_an_error_in_its_slot(pipeline: ImageTo3DPipeline, tmp_path: Path) -> None:
    results = pipeline([image(), tmp_path / "gone.png", Image.new("RGBA", (9, 9)), image()], seed=0)
    assert [result.error is None for result in results] == [True, False, False, True]
    np.testing.assert_array_equal(results[0].mesh.vertices, results[3].mesh.vertices)
    with pytest.raises(UserError, match="no file .*gone.png"):
        _ = results[1].mesh
    assert all(result.error is not None for result in pipeline([tmp_path / "gone.png"]))
    with pytest.raises(UserError, match="no file .*gone.png"):
        pipeline(tmp_path / "gone.png")


def test_a_field_without_a_surface_is_an_error_in_its_slot(
    pipeline: ImageTo3DPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    original = image_to_3d.decode_field

    def decode(*args: Any) -> Any:
        values, stats = original(*args)
        calls.append(len(calls))
        return values * 0 - 1 if len(calls) == 2 else values, stats

    monkeypatch.setattr(image_to_3d, "decode_field", decode)
    results = pipeline([image()] * 3, seed=[0, 1, 2])
    assert [result.error is None for result in results] == [True, False, True]
    assert isinstance(results[1].error, NoSurfaceError) and results[1].latents is not None
    calls[:] = [0]
    with pytest.raises(NoSurfaceError):
        pipeline(image())


def test_a_field_that_is_not_finite_is_an_error_in_its_slot(
    pipeline: ImageTo3DPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    field = pipeline.vae.field
    monkeypatch.setattr(pipeline.vae, "field", lambda tokens: lambda *args: field(tokens)(*args) * torch.nan)
    (result,) = pipeline([image()])
    assert isinstance(result.error, UserError) and "not finite" in str(result.error)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps is 0, expected a value from 1 to 1000"),
        ({"guidance": -1.0}, "guidance is -1.0, expected"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"resolution": 1024}, "resolution is 1024, expected a value from 8 to 512"),
        ({"resolution": 4}, "resolution is 4"),
        ({"max_faces": 2}, "max_faces is 2"),
        ({"seed": [1, 2]}, "seed has 2 values, expected one or 1"),
    ],
)
def test_values_out_of_range(pipeline: ImageTo3DPipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        pipeline([image()], **options)


def test_max_faces_and_cleanup(pipeline: ImageTo3DPipeline) -> None:
    assert len(pipeline(image(), max_faces=100).mesh.faces) <= 100
    assert len(pipeline(image(), cleanup=CleanupConfig(max_faces=200)).mesh.faces) <= 200


def test_steps_are_reported(pipeline: ImageTo3DPipeline) -> None:
    seen: list[tuple[int, int]] = []
    pipeline(image(), on_progress=lambda stage, *step: stage == "dit" and seen.append(step))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_save_and_load(pipeline: ImageTo3DPipeline, saved: Path) -> None:
    loaded = ImageTo3DPipeline.from_pretrained(saved, device="cpu", dtype="float32")
    assert loaded.config.version == __version__ and loaded.weights_sha256 is not None
    assert len(loaded.weights_sha256) == 64
    a, b = loaded(image(), seed=1), pipeline(image(), seed=1)
    torch.testing.assert_close(a.latents, b.latents, rtol=0, atol=0)
    np.testing.assert_array_equal(a.mesh.vertices, b.mesh.vertices)
    assert a.metadata["weights_sha256"] == loaded.weights_sha256 and b.metadata["weights_sha256"] is None


def test_the_hash_of_the_weights_covers_a_dinov2(saved: Path, tmp_path: Path) -> None:
    plain = ImageTo3DPipeline.from_pretrained(saved, "cpu")
    assert plain.weights_sha256 == file_sha256(
        *(saved / part / "model.safetensors" for part in ("vae", "dit"))
    )

    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    described = ImageEncoderConfig(kind=EncoderKind.dinov2, image_size=28, path="-")
    encoder = DinoV2(described, Dinov2Model(config))
    options = {"width": 32, "heads": 2, "double_blocks": 1, "single_blocks": 1, "num_latents": LATENTS}
    dit = ShapeDiT(DiTConfig(in_channels=CHANNELS, condition_channels=32, condition_tokens=5, **options))
    one, other = tmp_path / "one", tmp_path / "other"
    ImageTo3DPipeline(tiny_pipeline().vae, dit, encoder).save_pretrained(one)
    weights = shutil.copytree(one, other) / "image_encoder/dinov2/model.safetensors"
    state = load_file(weights)
    state["layernorm.bias"] += 1
    save_file(state, weights, {"format": "pt"})
    found = [ImageTo3DPipeline.from_pretrained(folder, "cpu") for folder in (one, other)]
    assert found[0].weights_sha256 != found[1].weights_sha256
    assert found[0].dense_sha256 != found[1].dense_sha256


def test_a_model_saved_over_another_keeps_nothing_of_it(pipeline: ImageTo3DPipeline, tmp_path: Path) -> None:
    old = tiny_pipeline()
    attach(old.dit, RouterConfig(few_step_rank=2))
    channels = old.encoder.channels
    known = torch.eye(2, channels), torch.ones(3), torch.ones(1)
    old.familiarity = Familiarity(torch.zeros(channels), *known)
    old.save_pretrained(tmp_path)
    assert ImageTo3DPipeline.from_pretrained(tmp_path, "cpu", "float32").session is not None
    for name in (*ROUTER_RECORDS, "notes.txt"):  # the last one is the user's own, and stays
        (tmp_path / "routers" / name).write_text("{}")
    (tmp_path / "familiarity.json").write_text("{}")
    pipeline.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("familiarity*"))
    loaded = ImageTo3DPipeline.from_pretrained(tmp_path, "cpu", "float32")
    assert loaded.session is None and loaded.familiarity is None
    assert [path.name for path in (tmp_path / "routers").iterdir()] == ["notes.txt"]
    assert torch.equal(loaded(image(), seed=1).latents, pipeline(image(), seed=1).latents)
    (tmp_path / "routers/notes.txt").unlink()
    pipeline.save_pretrained(tmp_path)
    assert not (tmp_path / "routers").exists()
    old.save_pretrained(tmp_path)
    (tmp_path / "routers/config.json").unlink()  # half of them
    with pytest.raises(UserError, match="no file .*routers/config.json"):
        ImageTo3DPipeline.from_pretrained(tmp_path, "cpu", "float32")


def test_bf16_gives_about_the_same(pipeline: ImageTo3DPipeline, saved: Path) -> None:
    half = ImageTo3DPipeline.from_pretrained(saved, device="cpu", dtype="bfloat16")
    a, b = half(image(), seed=1), pipeline(image(), seed=1)
    assert a.latents is not None and b.latents is not None and a.latents.dtype == torch.float32
    assert (a.latents - b.latents).norm() < 0.05 * b.latents.norm()
    assert a.mesh.area == pytest.approx(b.mesh.area, rel=0.2)


def _nan(folder: Path) -> None:
    path = folder / "dit/model.safetensors"
    state = load_file(path)
    next(iter(state.values())).fill_(torch.nan)
    save_file(state, path)


def _edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda f: shutil.rmtree(f), "there is no folder"),
    "no pipeline.json": (lambda f: (f / "pipeline.json").unlink(), "there is no file .*pipeline.json"),
    "no vae": (lambda f: shutil.rmtree(f / "vae"), "there is no folder .*vae"),
    "no encoder": (lambda f: shutil.rmtree(f / "image_encoder"), "there is no folder .*image_encoder"),
    "unknown encoder": (
        lambda f: _edit(f / "image_encoder/config.json", kind="clip"),
        "kind is 'clip', expected one of efficientnet_lite0, dinov2",
    ),
    "bad default": (lambda f: _edit(f / "pipeline.json", steps=0), "pipeline.json: steps is 0"),
    "vae as dit": (
        lambda f: shutil.copytree(f / "vae", f / "dit", dirs_exist_ok=True),
        "describes a ShapeVAE, expected a ShapeDiT",
    ),
    "nan": (_nan, "dit/model.safetensors has NaN"),
    "pickle": (
        lambda f: (f / "dit/model.safetensors").rename(f / "dit/model.ckpt"),
        "dit has model.ckpt, a pickle .* expected model.safetensors",
    ),
    "another encoder": (
        lambda f: _edit(f / "image_encoder/config.json", features="head"),
        "the DiT has 768 condition channels, but its partner has 1280",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_models_are_one_sentence(saved: Path, tmp_path: Path, name: str) -> None:
    damage, message = BROKEN[name]
    folder = shutil.copytree(saved, tmp_path / "model")
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        ImageTo3DPipeline.from_pretrained(folder, device="cpu")
    assert "\n" not in str(caught.value)


def test_arrays_are_images_and_integers_of_numpy_are_seeds(pipeline):
    drawn = image()
    right = pipeline(drawn, seed=3, resolution=12)
    for array in (np.asarray(drawn), np.asarray(drawn) / 255):
        found = pipeline(array, seed=np.int64(3), resolution=12)
        assert torch.equal(found.latents, right.latents)
        assert json.loads(json.dumps(found.metadata))["seed"] == 3
    both = pipeline(np.stack([np.asarray(drawn)] * 2), np.array([3, 3]), resolution=12)
    assert [r.error for r in both] == [None, None]
    torch.testing.assert_close(both[1].latents, right.latents, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="an array of floats, expected values from 0 to 1"):
        pipeline(np.asarray(drawn) * 1.0)
    with pytest.raises(UserError, match=r"an array of \(2, 3, 5\), expected"):
        pipeline(np.zeros((2, 3, 5), np.uint8))
    for seed, message in ((1.5, "expected an integer"), (2**64, "of 64 bits"), ([1, 2], "has 2 values")):
        with pytest.raises(UserError, match=f"seed .*{message}"):
            pipeline(drawn, seed=seed)


@pytest.mark.parametrize("images", [None, 3, b"\x89PNG", bytearray(b"GIF8")])
def test_what_is_neither_an_image_nor_a_list_is_refused(pipeline, images):
    with pytest.raises(UserError, match=f"an image is a {type(images).__name__}, expected a file"):
        pipeline(images)


def test_in_a_list_whatever_is_wrong_with_one_is_its_own_error(pipeline):
    wrong = [None, 7, "missing.png", np.zeros(3), {"left": image()}]
    results = pipeline([image(), *wrong, image()], seed=1, resolution=12)
    assert [r.error is None for r in results] == [True, *[False] * len(wrong), True]
    assert all(isinstance(r.error, UserError) for r in results[1:-1])
    assert torch.equal(results[0].latents, results[-1].latents)


def test_two_threads_on_one_pipeline_get_what_one_gets():
    pipeline = tiny_pipeline()
    attach(pipeline.dit, RouterConfig(initial_keep=0.5, head_std=3.0))
    right = [pipeline(image(), seed=s, budget=b, resolution=12) for s, b in ((0, 0.4), (1, 1.0))]

    def work(number: int):
        seed, budget = ((0, 0.4), (1, 1.0))[number]
        return [pipeline(image(), seed=seed, budget=budget, resolution=12) for _ in range(4)]

    with ThreadPoolExecutor(2) as pool:
        for wanted, found in zip(right, pool.map(work, range(2)), strict=True):
            for result in found:
                assert torch.equal(result.latents, wanted.latents)
                assert result.metadata["routes"] == wanted.metadata["routes"]


def test_bundled_models_are_found_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (find_model("shape-small") / "pipeline.json").is_file()
    (tmp_path / "shape-small").mkdir()  # a folder of one's own comes first
    assert find_model("shape-small") == Path("shape-small")
    with pytest.raises(UserError, match="there is no folder nothing"):
        ImageTo3DPipeline.from_pretrained("nothing")
    with pytest.raises(UserError, match="triposg is the name of a published model, expected the folder that"):
        ImageTo3DPipeline.from_pretrained("triposg")


def test_an_exception_in_a_callback_leaves_nothing_behind(pipeline):
    elastic = tiny_pipeline()
    session = attach(elastic.dit, RouterConfig(initial_keep=0.2, head_std=0.0, longest=5))
    right = elastic(image(), resolution=12).latents
    with pytest.raises(ZeroDivisionError):
        elastic(
            image(), seed=1, on_progress=lambda stage, done, steps: stage == "dit" and 1 / (steps - 1 - done)
        )
    assert session.cache is None
    assert torch.equal(elastic(image(), resolution=12).latents, right)


def test_progress_covers_every_stage_and_results_are_told_at_once(
    pipeline: ImageTo3DPipeline, tmp_path: Path
) -> None:
    seen: list[tuple[str, int, int]] = []
    told: list[int] = []

    def hear(number: int, result: Any) -> None:
        told.append(number)
        if number == 1:
            assert result.error is not None and not any(stage == "dit" for stage, _, _ in seen)
        else:
            assert len(result.mesh.faces) and result.metadata["ms"]["cleanup"] >= 0

    images = [image(), tmp_path / "gone.png", image(x=50)]
    decode = DecodeConfig(resolution=16, coarse_resolution=8)  # two levels
    pipeline(images, on_progress=lambda *at: seen.append(at), on_result=hear, steps=3, decode=decode)
    assert told == [1, 0, 2], "the broken image first, before any time is spent"
    assert [at for at in seen if at[0] == "condition"] == [("condition", n, 3) for n in (1, 2, 3)]
    assert [at for at in seen if at[0] == "dit"] == [("dit", n, 3) for n in (1, 2, 3)]
    assert [at for at in seen if at[0] == "decode"] == [("decode", n, 4) for n in (1, 2, 3, 4)]
    assert [at for at in seen if at[0] == "cleanup"] == [("cleanup", 1, 2), ("cleanup", 2, 2)]


def test_an_unfamiliar_image_is_told_before_anything_is_made_of_it(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    with torch.no_grad():
        views = torch.rand(40, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        known = Familiarity.fit(image_feature(pipeline.encoder(views)), 8)
    pipeline.familiarity = Familiarity(known.mean, known.components, known.scale, torch.tensor([1e-3]))
    pipeline.save_pretrained(tmp_path / "model")
    pipeline = ImageTo3DPipeline.from_pretrained(tmp_path / "model")
    seen: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_: seen.append(str(message))  # type: ignore[assignment]
        results = pipeline(
            [save_image(tmp_path / "a.png"), save_image(tmp_path / "b.png", "navy")],
            resolution=8, on_progress=lambda stage, *_: stage == "dit" and seen.append("step"),
        )  # fmt: skip
    assert [("unlike" in text, text == "step") for text in seen[:3]] == [
        (True, False),
        (True, False),
        (False, True),
    ]
    assert "a.png: the image is unlike" in seen[0]
    assert all(result.metadata["image_distance"] > 1e-3 and len(result.warnings) == 1 for result in results)
    pipeline.familiarity = Familiarity(known.mean, known.components, known.scale, torch.tensor([1e6]))
    assert pipeline(image(), resolution=8).warnings == []
