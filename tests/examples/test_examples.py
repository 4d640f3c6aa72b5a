"""The examples and the notebook, run at tiny size."""

from __future__ import annotations

import json
import runpy
import shlex
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import trimesh
from PIL import Image
from tiny_images import save_tiny_flux
from tiny_pipeline import save_image, tiny_pipeline

from elastic3d.elastic import attach
from elastic3d.evaluation.options import ProtocolConfig
from elastic3d.geometry.mesh_io import read_extras, save_mesh
from elastic3d.preparation.options import PrepareConfig
from elastic3d.preparation.prepare import next_commands

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


def example(name: str) -> ModuleType:
    spec = spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    pipeline = tiny_pipeline()
    attach(pipeline.dit)
    pipeline.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_without_arguments_there_is_a_usage_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments in ([], ["a"] * 6):
        monkeypatch.setattr(sys, "argv", [str(path), *arguments])
        with pytest.raises(SystemExit, match=f"^usage: python examples/{path.name} "):
            runpy.run_path(str(path), run_name="__main__")


def test_generate(model: str, tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    example("generate").main(str(tmp_path / "a.png"), str(tmp_path / "a.glb"), model, seed=2)
    assert read_extras(tmp_path / "a.glb")["seed"] == 2


def test_batch_with_budget(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "ab":
        save_image(tmp_path / f"in/{name}.png")
    (tmp_path / "in/c.png").write_text("no image")
    example("batch_with_budget").main(str(tmp_path / "in"), str(tmp_path / "out"), model, budget=0.6)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.glb", "b.glb"]
    assert read_extras(tmp_path / "out/a.glb")["budget"] == 0.6
    assert "c.png: " in capsys.readouterr().out


def test_evaluate_folders(tmp_path: Path) -> None:
    ball = trimesh.creation.icosphere(3, 0.9)
    save_mesh(ball, tmp_path / "pred/a.glb")
    save_mesh(ball, tmp_path / "truth/a.stl")
    save_mesh(trimesh.creation.box((1, 1, 2)), tmp_path / "pred/b.glb")
    save_mesh(ball, tmp_path / "truth/b.stl")
    few = ProtocolConfig(points=2000, volume_points=200, near_points=200, views=0)
    same, other = example("evaluate_folders").main(
        str(tmp_path / "pred"), str(tmp_path / "truth"), protocol=few
    )
    assert same > 0.99 > other


def test_routers_on_diffusers(tmp_path: Path) -> None:
    weights, output = save_tiny_flux(tmp_path / "flux"), tmp_path / "fox.png"
    executed = example("routers_on_diffusers").main(
        str(weights), None, "a red fox", str(output), num_inference_steps=2, height=16, width=16
    )
    assert 0 < executed <= 1 and Image.open(output).size == (16, 16)


def test_the_page_and_the_example_have_the_commands_that_are_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    printed = next_commands(PrepareConfig(name="mine"))
    page = (ROOT / "docs/train.md").read_text().splitlines()
    assert all(command in page for command in printed)
    assert all("latents.mirror=true latents.augment=true" in c for c in printed if "stage=cache" in c)
    ran: list[list[str]] = []
    monkeypatch.setattr("subprocess.run", lambda command, check: ran.append(command[3:]))
    example("train_on_your_meshes").main("MESHES")
    assert ran[1:] == [["train", *shlex.split(command)[2:]] for command in printed]


@pytest.mark.slow
def test_train_on_your_meshes(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands as they are, with few points and steps."""
    monkeypatch.chdir(tmp_path)
    for n in range(3):
        save_mesh(trimesh.creation.box((1, 1 + n, 2)), tmp_path / f"meshes/box{n}.stl")
    points = [f"shape.{kind}_points=512" for kind in ("surface", "sharp", "near", "volume")]
    example("train_on_your_meshes").main(
        str(tmp_path / "meshes"),
        {
            "prepare": ["shape.resolution=32", "shape.views=2", "shape.view_size=64", *points],
            "cache": ["device=cpu"],
            "dit": ["steps=1", "batch=2", "device=cpu", "validate_every=0", "sample_every=0"],
        },
    )
    assert (tmp_path / "runs/mine/export/pipeline.json").is_file()


def test_notebook(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every code cell, in order, with the tiny model in place of the bundled one."""
    cells = json.loads((EXAMPLES / "image_to_mesh.ipynb").read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert all(not cell.get("outputs") for cell in cells)
    save_image(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    first = f'MODEL, IMAGE, OPTIONS = {model!r}, "a.png", {{"steps": 2}}'
    line = next(line for line in sources[0].splitlines() if line.startswith("MODEL"))
    space: dict[str, object] = {}
    for source in [sources[0].replace(line, first), *sources[1:]]:
        exec(compile(source, "image_to_mesh.ipynb", "exec"), space)
    assert read_extras(tmp_path / "chair.glb")["print"]["size_mm"] == 120


def test_every_example_is_in_the_documentation() -> None:
    page = (ROOT / "docs/generate.md").read_text()
    for path in EXAMPLES.iterdir():
        if path.suffix in (".py", ".ipynb"):
            assert f"`examples/{path.name}`" in page, path.name
