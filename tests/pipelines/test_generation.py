"""Plans of many images: names, folders, globs, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import trimesh
from PIL import Image
from tiny_pipeline import save_image, tiny_pipeline

from elastic3d.errors import UserError
from elastic3d.models import images as models_images
from elastic3d.models.images import images_in
from elastic3d.pipelines import published
from elastic3d.pipelines.call import Result
from elastic3d.pipelines.generation import Job, Outcome, _saved, batches, generate, load_pipeline, plan
from elastic3d.pipelines.options import AssetConfig, GenerateConfig, MeshFormat, Texture
from elastic3d.pipelines.preview import draw_routes, turntable
from elastic3d.pipelines.ray_generation import Worker, _spread
from elastic3d.training.views import named_images


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in ("b (1).png", "a.PNG", "notes.txt", "c, d.jpg"):
        (tmp_path / "photos" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "photos" / name).touch()
    return tmp_path / "photos"


def _plan(image: object, output: object, **options: Any) -> list[Job]:
    return plan(GenerateConfig(image=str(image), output=str(output), **options)).jobs


def test_a_single_image(tmp_path: Path) -> None:
    image = save_image(tmp_path / "chair.png")
    assert _plan(image, tmp_path / "x.GLB") == [Job(image, 0, tmp_path / "x.GLB")]
    assert _plan(image, tmp_path) == [Job(image, 0, tmp_path / "chair.glb")]
    assert _plan(image, f"{tmp_path}/new/") == [Job(image, 0, tmp_path / "new/chair.glb")]
    jobs = _plan(image, tmp_path / "x.ply", num_samples=2, seed=5)
    assert jobs == [Job(image, 5, tmp_path / "x_0.ply"), Job(image, 6, tmp_path / "x_1.ply")]


def test_folders_and_globs(photos: Path, tmp_path: Path) -> None:
    names = ["a.glb", "b (1).glb", "c, d.glb"]
    assert [job.output.name for job in _plan(photos, tmp_path / "out")] == names
    assert [job.output.name for job in _plan(photos / "*.png", tmp_path / "out")] == ["b (1).glb"]
    assert len(_plan(f"{tmp_path}/**/*.jpg", tmp_path / "out")) == 1
    (photos / "[x].png").touch()
    assert [job.image.name for job in _plan(photos / "[x].png", tmp_path / "x.glb")] == ["[x].png"]


def test_what_a_command_draws_is_no_image_of_a_folder(tmp_path: Path) -> None:
    """Previews and routes, also beside images whose names only differ in the suffix."""
    image = save_image(tmp_path / "a.webp")
    config = GenerateConfig(image=str(image), output=str(tmp_path / "a.glb"), preview=True)
    assert (
        _saved(plan(config).jobs[0], Result({"model": "tiny"}, _mesh=trimesh.creation.box()), config).status
        == "ok"
    )
    routes = {"actions": [["1."]], "blocks": ["0", "1"], "widths": [1.0]}
    draw_routes([("a", routes)], tmp_path / "routes.png")
    made = save_image(tmp_path / "b.png")
    models_images.save_image(Image.open(made), made, {"prompt": "a chair"})
    for folder in (tmp_path, f"{tmp_path}/*.png", f"{tmp_path}/*.webp"):
        found = {job.image for job in _plan(folder, tmp_path)}
        assert found <= {image, made} and found
    assert images_in(tmp_path) == [image, made] and {"a.png", "routes.png"} < {
        p.name for p in tmp_path.iterdir()
    }
    assert named_images(tmp_path) == {"a": [image], "b": [made]}
    assert len(_plan(tmp_path / "a.png", tmp_path / "c.glb")) == 1, "it is asked for by its name"
    for path in (image, made):
        path.unlink()
    left_out = "holds no image but previews and drawings of routes, which are left out"
    with pytest.raises(UserError, match=f"^image is {tmp_path}, which {left_out}"):
        _plan(tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match=f"^latents.images={tmp_path} {left_out}"):
        named_images(tmp_path)


def test_equal_stems_keep_their_suffix(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg", "b.png"):
        save_image(tmp_path / "in" / name.replace(".jpg", ".webp"))
    names = [job.output.name for job in _plan(tmp_path / "in", tmp_path / "out")]
    assert names == ["a_png.glb", "a_webp.glb", "b.glb"]
    save_image(tmp_path / "in/deeper/b.png")
    with pytest.raises(UserError, match="several images named b_png"):
        _plan(f"{tmp_path}/in/**/*.png", tmp_path / "out")


@pytest.mark.parametrize("model", ["triposg", "shape-small"])
def test_colours_come_from_where_the_image_shows_the_mesh(tmp_path: Path, model: str) -> None:
    """Published models too have meshes that face +Z. The image fits the box seen from the side alone."""
    result = Result({"model": model}, _mesh=trimesh.creation.box((1.8, 1.8, 0.3)))
    seen = Image.fromarray(np.pad(np.full((180, 30, 4), 255, np.uint8), ((10, 10), (85, 85), (0, 0))))
    asset = AssetConfig(texture=Texture.project)
    config = GenerateConfig(image="a.png", output="a.glb", model="models/imported", asset=asset)
    seen.save(tmp_path / "a.png")
    outcome = _saved(Job(tmp_path / "a.png", 0, tmp_path / "a.glb"), result, config)
    assert abs(outcome.metadata["texture"]["azimuth_deg"]) > 60


def test_a_mesh_whose_preview_could_not_be_written_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "out/a.png").mkdir(parents=True)
    config = GenerateConfig(image="a.png", output="out/a.glb", preview=True, resume=True)
    job = Job(save_image(tmp_path / "a.png"), 0, tmp_path / "out/a.glb")
    result = Result({"model": "tiny"}, _mesh=trimesh.creation.box())
    for status in ("failed", "ok"):
        assert batches([job], config, lambda _: None) == [[job]]
        assert _saved(job, result, config).status == status
        if status == "failed":
            (tmp_path / "out/a.png").rmdir()
    assert Image.open(tmp_path / "out/a.png").height == 256 and job.output.is_file()
    assert batches([job], config, lambda _: None) == []


def test_a_worker_takes_relative_paths_as_its_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It starts in the folder of its cluster, and goes on there where its machine has not the caller's."""
    (tmp_path / "cluster").mkdir()
    tiny_pipeline().save_pretrained(tmp_path / "tiny")
    save_image(tmp_path / "a.png")
    config = GenerateConfig(image="a.png", output="out/a.stl", model="tiny", steps=1, resolution=16)
    monkeypatch.chdir(tmp_path)
    jobs = plan(config).jobs
    monkeypatch.chdir(tmp_path / "cluster")
    Worker(config, tmp_path / "gone")
    (outcome,) = Worker(config, tmp_path).make(jobs)
    assert outcome.status == "ok" and (tmp_path / "out/a.stl").is_file()
    assert outcome.output == "out/a.stl", "as it is told"


def test_a_fault_of_a_batch_of_one_is_an_outcome(tmp_path: Path) -> None:
    """In a worker of a cluster, whose batch is a part of the folder."""

    def faulty(*_: Any, **__: Any) -> None:
        raise MemoryError("no memory is left")

    for name in "ab":
        save_image(tmp_path / f"{name}.png")
    config = GenerateConfig(image=str(tmp_path), output=str(tmp_path / "out"), batch_size=1)
    worker = Worker(config)
    worker._pipeline = faulty  # type: ignore[assignment]
    job = plan(config).jobs[0]
    (outcome,) = worker.make([job])
    assert (outcome.status, outcome.error) == ("failed", f"{tmp_path}/a.png: MemoryError: no memory is left")
    (outcome,) = worker.make([replace(job, image=Path(), prompt="a red ball")])
    assert outcome.error == "a red ball: MemoryError: no memory is left"
    with pytest.raises(MemoryError):
        generate(faulty, [job], config, lambda _: None, alone=True)  # type: ignore[arg-type]


def test_the_format_of_a_single_file(photos: Path, tmp_path: Path) -> None:
    """It is that of its name, which gets a suffix where it has none."""
    single, stl = photos / "a.PNG", {"format": MeshFormat.stl}
    for name, made in (("x", "x.stl"), ("x.STL", "x.STL"), ("new/", "new/a.stl")):
        (job,) = _plan(single, f"{tmp_path}/{name}", **stl)
        assert job.output == tmp_path / made
    for name in ("x.glb", "x.v2"):
        with pytest.raises(
            UserError, match=rf"format is stl, but output is .*{name}: expected it to end in .stl"
        ):
            _plan(single, tmp_path / name, **stl)
    assert {job.output.suffix for job in _plan(photos, tmp_path / "out", **stl)} == {".stl"}


def test_what_is_refused(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    cases = [
        (photos, "x.glb", "output is x.glb, expected a folder, as image is a folder or a glob"),
        (photos, tmp_path / "file", "output is .*file, a file, expected a folder"),
        (tmp_path / "empty", "out", r"empty, which holds no image \(.png"),
        (tmp_path / "*.tiff", "out", "which holds no image"),
        (photos / "a.PNG", "chair.fbx", "chair.fbx has .fbx, expected one of .glb"),
        (photos / "a.PNG", "chair", "chair has no suffix, expected one of .glb"),
    ]
    for image, output, message in cases:
        with pytest.raises(UserError, match=message):
            _plan(image, output)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": ""}, "image= is missing, for example image=chair.png"),
        ({"output": ""}, "output= is missing, for example output=chair.glb"),
        ({"steps": 1001}, "steps is 1001, expected a value from 1 to 1000"),
        ({"guidance": -1.0}, "guidance is -1.0"),
        ({"resolution": 7}, "resolution is 7"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerateConfig(**{"image": "a.png", "output": "a.glb", **options})


def test_generations_of_an_ensemble_count_for_the_batch() -> None:
    config = {"image": "a.png", "output": "a.glb", "batch_size": 8}
    assert [GenerateConfig(**config, ensemble=k).rows for k in (1, 3, 8, 20)] == [8, 2, 1, 1]
    with pytest.raises(ValueError, match="ensemble is 65, expected a value from 1 to 64"):
        GenerateConfig(**config, ensemble=65)


def test_memory_is_asked_for_all_generations_of_an_ensemble(monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []
    monkeypatch.setattr(published, "published_pipeline", lambda config, batch: batches.append(batch))
    for ensemble, meshes in ((1, 20), (4, 1), (3, 20)):
        config = {"image": "a.png", "output": "a.glb", "model": "hunyuan3d2", "ensemble": ensemble}
        load_pipeline(GenerateConfig(**config), meshes)
    assert batches == [8, 4, 6]


def test_turntable_shows_the_mesh_from_all_sides() -> None:
    mesh = trimesh.creation.box((0.2, 0.1, 0.6))
    mesh.apply_translation((5, 0, 0))
    strip = np.asarray(turntable(mesh, views=4, size=48))
    assert strip.shape == (48, 4 * 48, 3)
    covered = [(strip[:, i * 48 : (i + 1) * 48] < 250).any(axis=-1).mean() for i in range(4)]
    assert min(covered) > 0.02 and covered[1] > 1.2 * covered[0]
    cube = np.asarray(turntable(trimesh.creation.box(), views=8, size=48))
    assert (cube[[0, -1]] > 250).all() and (cube[:, ::48] > 250).all(), "nothing is cut off"


def test_no_output_replaces_an_input_or_another_output(tmp_path: Path) -> None:
    image = save_image(tmp_path / "a.png")
    save_image(tmp_path / "b.png")
    for options in (
        {"output": tmp_path / "a.glb", "preview": True},
        {"output": tmp_path / "A.glb", "preview": True},
        {"output": tmp_path / "c.glb", "trace": str(image)},
        {"output": tmp_path / "c.glb", "preview": True, "trace": str(tmp_path / "c.png")},
        {"output": tmp_path / "b.glb", "preview": True, "image_back": str(tmp_path / "b.png")},
    ):
        with pytest.raises(UserError, match="would be written to .* which is the same file as"):
            _plan(image, **options)
    with pytest.raises(UserError, match="preview would be written"):
        _plan(tmp_path, tmp_path, preview=True)
    assert len(_plan(tmp_path, tmp_path)) == 2, "meshes beside their images are fine"
    assert len(_plan(image, tmp_path / "c.glb", preview=True, trace=str(tmp_path / "t.png"))) == 1


def test_folders_as_cameras_and_phones_fill_them(tmp_path: Path) -> None:
    photos = tmp_path / "photos [1]"
    photos.mkdir()
    for name in ("a.png", "._a.png", "b.jfif", "c.jp2", "d.heic", "e.avif", "f.JPE", "notes.txt"):
        (photos / name).touch()
    (photos / "g.png").symlink_to(tmp_path)
    assert [job.image.name for job in _plan(photos, tmp_path / "out")] == [
        *("a.png", "b.jfif", "c.jp2", "d.heic", "e.avif", "f.JPE")
    ]
    assert [job.image.name for job in _plan(photos / "*.jp2", tmp_path / "out")] == ["c.jp2"]


class StandIn:
    """In the place of the module `ray`, which not every environment has: its calls run here, when they are asked for.
    The exceptions have the bases that they have there."""

    class exceptions:  # noqa: N801
        RayTaskError, RayActorError, OutOfMemoryError, NodeDiedError = (
            type(name, (Exception,), {})
            for name in ("RayTaskError", "RayActorError", "OutOfMemoryError", "NodeDiedError")
        )

    def __init__(self, make: Callable[[Sequence[Job]], list[Outcome]]) -> None:
        self.started, self.make = 0, make

    def remote(self, *arguments: object) -> SimpleNamespace:
        self.started += 1
        return SimpleNamespace(make=SimpleNamespace(remote=lambda batch: partial(self.make, batch)))

    def wait(self, running: list[Any], num_returns: int) -> tuple[list[Any], list[Any]]:
        return running[:num_returns], running[num_returns:]

    def get(self, call: Callable[[], list[Outcome]]) -> list[Outcome]:
        return call()


@pytest.mark.parametrize("death", ["RayActorError", "OutOfMemoryError", "NodeDiedError"])
def test_a_worker_of_a_cluster_that_dies_costs_its_batch(death: str, tmp_path: Path) -> None:
    jobs = [Job(Path(f"{name}.png"), 0, tmp_path / f"{name}.glb") for name in "abc"]

    def make(batch: Sequence[Job]) -> list[Outcome]:
        if batch[0] is jobs[1]:
            raise getattr(StandIn.exceptions, death)
        return [Outcome.of(job, "ok") for job in batch]

    ray, config = StandIn(make), GenerateConfig(image="in", output="out", workers=1)
    found = list(_spread(ray, ray, [[job] for job in jobs], config))
    assert [outcome.status for outcome in found] == ["ok", "failed", "ok"] and ray.started == 2
    assert "the process that made it died (out of memory" in (found[1].error or "")
