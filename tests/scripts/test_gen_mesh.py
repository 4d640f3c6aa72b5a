"""The command `gen_mesh.py`: files, folders, resume, previews, exit codes, interruption."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gen_mesh
import numpy as np
import pytest
import trimesh
from _cli import execute
from PIL import Image
from tiny_dial import save_dialled
from tiny_images import save_tiny_small
from tiny_pipeline import image, save_image, tiny_pipeline

from elastic3d.errors import UserError
from elastic3d.geometry import pose
from elastic3d.geometry.mesh_io import read_extras
from elastic3d.models.images import read_metadata
from elastic3d.pipelines import generation
from elastic3d.pipelines.options import GenerateConfig
from elastic3d.pipelines.ray_generation import Worker
from tests.processes import in_use_elsewhere

Command = Callable[..., int]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def command(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run the command in `tmp_path` with the tiny model; gives its exit code."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> int:
        defaults = [f"model={model}", "steps=1", "device=cpu", "dtype=float32"]
        return execute(gen_mesh.main, GenerateConfig, "gen_mesh", [*defaults, *arguments])

    return call


def _names(folder: str) -> list[str]:
    return sorted(path.name for path in Path(folder).glob("[!.]*"))


def test_one_image_becomes_a_mesh(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "a chair (1), x=y $HOME ä.png"
    save_image(tmp_path / name)
    assert command(f"image={name}", "output=new/chair.glb", "seed=3", "max_faces=500", "preview=true") == 0
    mesh = trimesh.load_mesh(tmp_path / "new/chair.glb")
    assert 0 < len(mesh.faces) <= 500
    extras = read_extras(tmp_path / "new/chair.glb")
    assert extras["seed"] == 3 and extras["steps"] == 1 and extras["model"] == "tiny"
    assert Image.open(tmp_path / "new/chair.png").size == (9 * 256, 256)
    assert _names("new") == ["chair.glb", "chair.png"]
    assert "new/chair.glb: " in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["ply", "obj", "stl"])
def test_other_formats(command: Command, tmp_path: Path, suffix: str) -> None:
    save_image(tmp_path / "a.png")
    assert command("image=a.png", f"output=a.{suffix}") == 0
    assert len(trimesh.load_mesh(tmp_path / f"a.{suffix}").faces) > 0


def test_the_same_seed_gives_the_same_file(command: Command, tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    for name in ("1.stl", "2.stl"):
        assert command("image=a.png", f"output={name}") == 0
    assert (tmp_path / "1.stl").read_bytes() == (tmp_path / "2.stl").read_bytes()


def test_a_folder_with_a_bad_file(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b", "d"):
        save_image(tmp_path / f"in/{name}.png", x=10 * ord(name) % 60)
    (tmp_path / "in/c.png").write_text("no image")
    assert command("image=in", "output=out", "batch_size=2", "num_samples=1") == 1
    assert _names("out") == ["a.glb", "b.glb", "d.glb", "summary.json"]
    captured = capsys.readouterr()
    assert "failed: in/c.png is no image" in captured.err and "3 ok, 1 failed, 0 skipped" in captured.out
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["counts"] == {"ok": 3, "failed": 1, "skipped": 0} and summary["not_reached"] == 0
    statuses = {Path(item["image"]).name: item["status"] for item in summary["items"]}
    assert statuses == {"a.png": "ok", "b.png": "ok", "c.png": "failed", "d.png": "ok"}

    with in_use_elsewhere(tmp_path / "out"):
        assert command("image=in", "output=out") == 2
        assert "out is in use by another process" in capsys.readouterr().err
        assert command("image=in/a.png", "output=out/x.stl") == 0, "a file of its own has no summary"
    (tmp_path / "out/x.stl").unlink()
    assert command("image=in", "output=new", "quality=fast") == 2 and not (tmp_path / "new").exists()

    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.glb")}
    (tmp_path / "out/b.glb").unlink()
    (tmp_path / "in/c.png").unlink()
    assert command("image=in/*.png", "output=out", "resume=true") == 0
    assert "1 ok, 0 failed, 2 skipped" in capsys.readouterr().out
    for name in ("a.glb", "d.glb"):
        assert (tmp_path / "out" / name).stat().st_mtime_ns == times[tmp_path / "out" / name]

    kept = (tmp_path / "out/summary.json").read_bytes()
    assert command("image=in", "output=out", "budget=0.01") == 2, "nothing is made"
    assert (tmp_path / "out/summary.json").read_bytes() == kept
    made = {item["output"]: item for item in summary["items"]}
    for _ in range(2):  # what was known of the meshes stays
        assert command("image=in", "output=./out/", "resume=true") == 0
        items = json.loads((tmp_path / "out/summary.json").read_text())["items"]
        assert [item["output"] for item in items] == ["out/a.glb", "out/b.glb", "out/d.glb"]
        for item in (items[0], items[2]):
            assert item == made[item["output"]] | {"status": "skipped"}
    for other in ('{"items": [{"name": "a"}]}', "{", "[]"):
        (tmp_path / "out/summary.json").write_text(other)
        assert command("image=in", "output=out", "resume=true") == 0
        items = json.loads((tmp_path / "out/summary.json").read_text())["items"]
        assert [(item["status"], item["faces"]) for item in items] == [("skipped", None)] * 3


@pytest.mark.parametrize("suffix", ["glb", "stl"])
def test_resume_skips_only_what_was_made_alike(
    command: Command, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    """By the mesh's own file or, of a format without metadata, by the summary."""
    save_image(tmp_path / "in/a.png")
    there = ["image=in", "output=out", f"format={suffix}", "resume=true"]
    assert command(*there) == 0
    kept = {path: path.read_bytes() for path in Path("out").iterdir()}
    shutil.copytree(model, "other")
    for other in ("seed=7", "steps=2", "resolution=8", "model=other", "up=z", "max_faces=100"):
        assert command(*there, other) == 2
        assert f"out/a.{suffix} was made with other options, or of another image" in capsys.readouterr().err
    assert kept == {path: path.read_bytes() for path in Path("out").iterdir()}
    assert (
        command(*there, "batch_size=1", f"model={os.path.relpath(model)}", f"image={tmp_path}/in/a.png") == 0
    )
    save_image(tmp_path / "in/a.png", "green")
    assert command(*there) == 2
    if suffix == "stl":  # it says nothing of how it was made
        Path("out/summary.json").unlink()
        assert command(*there, "seed=7") == 0


def test_resume_with_a_file_of_its_own_and_with_a_prompt(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from elastic3d.pipelines.text_to_image import TextToImagePipeline

    monkeypatch.setattr(TextToImagePipeline, "_image", lambda *arguments: image())
    save_image(tmp_path / "a.png")
    save_tiny_small(tmp_path / "small")
    for source in (["image=a.png"], ["prompt=a red ball", "image_model=small"]):
        made = [*source, "output=x.glb", "resume=true"]
        assert command(*made) == 0 and command(*made) == 0
        assert "1 skipped" in capsys.readouterr().out
        assert command(*made, "seed=7") == 2
        assert "x.glb was made with other options" in capsys.readouterr().err
        Path("x.glb").unlink()


def test_a_fault_of_one_mesh_is_not_its_mates(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "abcd":
        save_image(tmp_path / f"in/{name}.png")
    finish = generation.finish

    def faulty(result: Any, config: Any, suffix: str, image: Path, *others: Any) -> Any:
        if image.stem == "b":
            raise MemoryError("no memory is left")
        return finish(result, config, suffix, image, *others)

    monkeypatch.setattr(generation, "finish", faulty)
    assert command("image=in", "output=out", "batch_size=4") == 1
    assert _names("out") == ["a.glb", "c.glb", "d.glb", "summary.json"]
    captured = capsys.readouterr()
    assert "failed: in/b.png: MemoryError: no memory is left" in captured.err
    assert "3 ok, 1 failed, 0 skipped" in captured.out
    items = json.loads((tmp_path / "out/summary.json").read_text())["items"]
    assert [Path(item["image"]).stem for item in items] == ["a", "b", "c", "d"]
    with pytest.raises(MemoryError):  # with where it came from
        command("image=in/b.png", "output=b.glb")


def test_a_quality_and_a_budget_of_a_model_with_a_dial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_dialled(tmp_path / "model")
    save_image(tmp_path / "a.png")

    def command(*options: str) -> int:
        fixed = ["model=model", "image=a.png", "output=x.glb", "resolution=8", "device=cpu", "dtype=float32"]
        return execute(gen_mesh.main, GenerateConfig, "gen_mesh", [*fixed, *options])

    for option, requested, steps in (("quality=fast", "fast", 1), ("budget=0.7", 0.7, 2)):
        assert command(option) == 0
        found = read_extras(tmp_path / "x.glb")
        assert found["dial"]["requested"] == requested and found["steps"] == steps
        assert found["flops_executed"] / found["flops_dense"] == pytest.approx(found["dial"]["cost"])
    (tmp_path / "x.glb").unlink()
    for options, message in (
        (["budget=0.1"], "budget is 0.1, expected at least 0.166667"),
        (["quality=best", "steps=3"], "quality is best and steps is 3, expected one of them"),
        (["quality=good"], "quality=good"),
        (["budget=0"], "budget is 0"),
    ):
        assert command(*options) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "x.glb").exists()
    (tmp_path / "model/dial.json").write_text("{")
    assert command() == 2
    assert "model/dial.json is broken" in capsys.readouterr().err


def test_routes_of_the_dense_model_are_refused_before_anything_is_made(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a row of a dial, and where a budget leaves out nothing; also in a worker of a cluster."""
    save_dialled(tmp_path / "dialled")
    save_image(tmp_path / "in/a.png")
    options = ["image=in", "output=out", "trace=t.png", "resolution=8"]
    dialled = [*options, "model=dialled", "steps=null"]
    for dense in (dialled, [*dialled, "budget=0.7"], options, [*options, "budget=1"]):
        assert command(*dense) == 2
        assert "trace=t.png can't be drawn: the dense model runs" in capsys.readouterr().err
    worker = Worker(GenerateConfig(image="in", output="out", model="dialled", trace="t.png", resolution=8))
    with pytest.raises(UserError, match="the dense model runs"):
        worker.make(generation.plan(worker._config).jobs)
    assert _names(".") == ["dialled", "in"]
    assert command(*dialled, "quality=fast") == 0
    assert command(*options, "budget=0.8", "steps=3", "output=more") == 0
    assert {"out", "more", "t.png"} < set(_names("."))
    (tmp_path / "t.png").unlink()
    with pytest.warns(UserWarning, match="no mesh was made, so that t.png is not drawn"):
        assert command(*dialled, "quality=fast", "resume=true") == 0
    assert not (tmp_path / "t.png").exists()


def test_several_samples(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_image(tmp_path / "a.png")
    assert command("image=a.png", "output=x.glb", "num_samples=2", "seed=4") == 0
    told = capsys.readouterr()
    assert [line.partition(": ")[0] for line in told.out.splitlines()] == ["x_0.glb", "x_1.glb"]
    assert "summary.json" not in told.err, "there is none"
    assert [read_extras(tmp_path / f"x_{n}.glb")["seed"] for n in range(2)] == [4, 5]


def test_ctrl_c_leaves_whole_files_and_a_summary(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        save_image(tmp_path / f"in/{name}.png")
    original, saved = generation.save_mesh, []

    def save(mesh: trimesh.Trimesh, path: Path, **options: Any) -> None:
        if saved:
            raise KeyboardInterrupt
        original(mesh, path, **options)
        saved.append(path)

    monkeypatch.setattr(generation, "save_mesh", save)
    assert command("image=in", "output=out", "batch_size=1") == 130
    assert _names("out") == ["a.glb", "summary.json"]
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["counts"]["ok"] == 1 and summary["not_reached"] == 2


BAD_INPUT: dict[str, tuple[list[str], str]] = {
    "missing image": (["image=gone.png", "output=x.glb"], "there is no file gone.png for image="),
    "missing view": (["image=a.png", "image_back=b.png", "output=x.glb"], "no file b.png for image_back="),
    "no match": (["image=gone/*.png", "output=x"], "there is no file gone/*.png for image="),
    "empty image": (["image=empty.png", "output=x.glb"], "empty.png is empty"),
    "no image": (["image=text.png", "output=x.glb"], "text.png is no image"),
    "transparent": (["image=clear.png", "output=x.glb"], "clear.png: the image is fully transparent"),
    "no output": (["image=a.png"], "output= is missing"),
    "no arguments": ([], "image= is missing"),
    "unwritable output": (
        ["image=a.png", "output=blocked/x.glb"],
        "can't write blocked/x.glb: blocked is no",
    ),
    "unwritable trace": (
        ["image=a.png", "output=x.glb", "trace=blocked/t.png"],
        "can't write blocked/t.png: blocked",
    ),
    "wrong suffix": (["image=a.png", "output=x.fbx"], "x.fbx has .fbx, expected one of"),
    "unknown option": (["image=a.png", "output=x.glb", "step=3"], "did you mean steps"),
    "steps": (["image=a.png", "output=x.glb", "steps=0"], "steps is 0, expected a value from 1 to 1000"),
    "guidance": (["image=a.png", "output=x.glb", "guidance=-2"], "guidance is -2.0"),
    "resolution": (["image=a.png", "output=x.glb", "resolution=9999"], "resolution is 9999"),
    "text for a number": (["image=a.png", "output=x.glb", "seed=one"], "seed=one: expected an integer"),
    "missing model": (["image=a.png", "output=x.glb", "model=nowhere"], "there is no folder nowhere"),
    "device": (["image=a.png", "output=x.glb", "device=tpu"], "expected one of auto, cpu, cuda, mps"),
    "dtype": (["image=a.png", "output=x.glb", "dtype=float16"], "float16, which a CPU can't multiply"),
    "no surface": (["image=a.png", "output=x.glb"], "the field has no surface"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_sentence_and_no_file(
    command: Command,
    tmp_path: Path,
    name: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments, message = BAD_INPUT[name]
    save_image(tmp_path / "a.png")
    (tmp_path / "empty.png").touch()
    (tmp_path / "blocked").touch()
    (tmp_path / "text.png").write_text("hello")
    Image.new("RGBA", (20, 20)).save(tmp_path / "clear.png")
    if name == "no surface":
        from elastic3d.models.shape_vae import ShapeVAE

        monkeypatch.setattr(ShapeVAE, "field", lambda self, tokens: lambda points: points[..., 0] * 0 - 1)
    before = _names(".")
    assert command(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert sum(line.startswith("error: ") for line in error.splitlines()) == 1
    assert _names(".") == before


def test_as_a_process(
    model: Path, tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    """The real entry point, once, and its --help."""
    script = Path(gen_mesh.__file__)
    result = subprocess.run(
        [sys.executable, script, f"model={model}", "image=gone.png", "output=x.glb"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 2 and result.stderr.startswith("error: there is no file gone.png")
    assert command("--help") == 0
    shown = capsys.readouterr().out
    for item in ("image=", "num_samples=1", "cleanup.max_faces=40000", "same seed", "foreground.method=auto"):
        assert item.lower() in shown.lower(), item


def test_a_prompt_becomes_a_mesh(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from elastic3d.pipelines.text_to_image import TextToImagePipeline

    monkeypatch.setattr(TextToImagePipeline, "_image", lambda *arguments: image())
    small = save_tiny_small(tmp_path / "small")
    options = [f"image_model={small}", "prompt=a red ball", "num_samples=2"]
    assert command(*options, "output=x.glb", "seed=3") == 0
    for n in range(2):
        extras = read_extras(tmp_path / f"x_{n}.glb")
        assert extras["seed"] == extras["image"]["seed"] == 3 + n
        assert extras["image"]["prompt"] == "a red ball" and extras["image"]["backbone"] == "small"
        assert Image.open(tmp_path / f"x_{n}_image.png").size == (100, 80)
        assert read_metadata(tmp_path / f"x_{n}_image.png") == extras["image"]
    assert command(*options, "output=y.glb", "image=a.png") == 2
    assert "image= and prompt= are both there" in capsys.readouterr().err
    assert command(*options, "output=y.glb", "budget=0.5", "steps=20") == 2
    assert "budget is 0.5, expected at least 0.75 in 2 steps" in capsys.readouterr().err
    assert command(f"image_model={small}", "prompt=" + "ball " * 40, "output=y.glb") == 2
    assert "tokens, expected at most 12" in capsys.readouterr().err
    assert command(f"image_model={small}", "image=a.png", "output=y.glb") == 2
    assert "which is for prompt=, but image= is given" in capsys.readouterr().err
    assert not (tmp_path / "y.glb").exists()


def test_a_fault_in_the_middle_of_a_batch_of_prompts(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first mesh is told when the batch fails; it is in none of the halves."""
    from elastic3d.pipelines import image_to_3d
    from elastic3d.pipelines.text_to_image import TextToImagePipeline

    monkeypatch.setattr(TextToImagePipeline, "_image", lambda *arguments: image())
    extract, calls = image_to_3d.extract_surface, []

    def faulty(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise MemoryError("no memory is left")
        return extract(*arguments)

    monkeypatch.setattr(image_to_3d, "extract_surface", faulty)
    options = [f"image_model={save_tiny_small(tmp_path / 'small')}", "prompt=a red ball", "num_samples=3"]
    assert command(*options, "output=x.glb", "batch_size=3") == 0
    assert [line[:8] for line in capsys.readouterr().out.splitlines()] == ["x_0.glb:", "x_1.glb:", "x_2.glb:"]
    assert [name for name in _names(".") if name.endswith(".glb")] == ["x_0.glb", "x_1.glb", "x_2.glb"]
    assert len(calls) == 4


@pytest.mark.parametrize("suffix", ["glb", "ply", "obj", "stl"])
def test_real_size_and_axis_in_every_format(
    command: Command, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save_image(tmp_path / "a.png")
    assert command("image=a.png", f"output=plain.{suffix}") == 0
    assert command("image=a.png", f"output=a.{suffix}", "size_mm=120", "up=z") == 0
    plain, mesh = (trimesh.load(tmp_path / f"{name}.{suffix}", force="mesh") for name in ("plain", "a"))
    assert mesh.extents.max() == pytest.approx(0.12 if suffix == "glb" else 120, rel=1e-5)
    share = 120 / plain.extents.max() * (1e-3 if suffix == "glb" else 1)
    assert mesh.extents == pytest.approx(plain.extents[[0, 2, 1]] * share, rel=1e-4)
    assert "thinnest wall" in capsys.readouterr().out
    if suffix == "glb":
        found = read_extras(tmp_path / "a.glb")["print"]
        assert found["size_mm"] == 120 and found["pieces"] >= 1 and found["watertight"] is True


@pytest.mark.parametrize(
    "options", [["output=b.ply", "up=z"], ["output=b.glb", "uv=true", "texture_size=64"]]
)
def test_the_preview_is_in_the_images_colours(command: Command, tmp_path: Path, options: list[str]) -> None:
    save_image(tmp_path / "a.png", "maroon")
    strips = []
    for name, more in ("c", ["output=c.stl"]), ("b", ["texture=project", *options]):
        assert command("image=a.png", "preview=true", "max_faces=500", *more) == 0
        strips.append(np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int)[:, 256:])
    plain, painted = strips
    shown = (plain < 250).any(axis=-1)
    assert ((painted < 250).any(axis=-1) == shown).mean() > 0.99, "the same views, whatever is up in the file"
    assert np.ptp(plain[shown], axis=-1).max() < 20, "grey without colours"
    red = painted[shown][:, 0] > 2 * painted[shown][:, 1:].max(axis=1)
    assert red.mean() > 0.9


def test_the_images_colours_are_on_the_mesh(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pose, "_STARTS", 1)  # any camera will do
    monkeypatch.setattr(pose, "_FINE", 24)
    save_image(tmp_path / "a.png", "maroon")
    assert command("image=a.png", "output=a.ply", "texture=project", "max_faces=500") == 0
    colours = trimesh.load(tmp_path / "a.ply", process=False).visual.vertex_colors[:, :3]
    away = abs(colours.astype(int) - [128, 0, 0]).max(axis=1)
    assert (
        away.max() < 40 and (away < 12).mean() > 0.8
    )  # enlarging the image of 30 x 60 pixels rings at its outline
    assert (
        command(
            "image=a.png", "output=a.glb", "texture=project", "uv=true", "texture_size=64", "max_faces=500"
        )
        == 0
    )
    assert {"azimuth_deg", "overlap"} <= read_extras(tmp_path / "a.glb")["texture"].keys()
    capsys.readouterr()
    for options, message in (
        (["output=b.stl"], ".stl holds no colours"),
        (["output=b.ply", "uv=true"], ".ply holds no texture"),
    ):
        assert command("image=a.png", "texture=project", *options) == 2
        assert message in capsys.readouterr().err
