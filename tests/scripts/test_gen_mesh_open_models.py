"""`gen_mesh.py model=triposg` and `model=step1x3d` on tiny published folders, end to end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import calibrate
import gen_mesh
import make_tiny_weights
import pytest
import torch
import trimesh
from _cli import execute
from hunyuan_tiny import write_checkpoint_21
from open_models import write_folder
from tiny_pipeline import save_image

from elastic3d.checkpoints import tiny, triposg
from elastic3d.checkpoints.options import TinyWeightsConfig
from elastic3d.checkpoints.step1x3d import load_step1x3d
from elastic3d.checkpoints.triposg import load_triposg
from elastic3d.elastic import attach, save_routers
from elastic3d.elastic.config import RouterConfig
from elastic3d.elastic.training_free import CALIBRATION_NAME
from elastic3d.geometry.mesh_io import read_extras
from elastic3d.pipelines.options import CalibratePolicyConfig, GenerateConfig
from elastic3d.pipelines.runtime import pass_flops

IMAGE_MODEL = Path(__file__).parents[2] / "data" / "pretrained" / "image-small"

Command = Callable[..., int]
BOXES = {"triposg": 1.005, "step1x3d": 1.05}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """As the command writes them, but for smaller images; with fewer latents than TripoSG has by default, whose weights
    fit any number."""
    root = tmp_path_factory.mktemp("weights")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triposg, "_LATENTS", 128)
        patch.setitem(tiny._STEP1X["visual_encoder"], "image_size", 224)
        for model in BOXES:
            make_tiny_weights.main(TinyWeightsConfig(model=model, output=str(root / model)))
        yield {model: root / model for model in BOXES}


@pytest.fixture
def command(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.chdir(tmp_path)
    save_image(tmp_path / "chair.png", x=20)

    def call(model: str, *arguments: str) -> int:
        defaults = [
            f"model={model}",
            f"weights={folders.get(model, '')}",
            "image=chair.png",
            "output=chair.glb",
        ]
        defaults += ["resolution=16", "steps=3", "device=cpu", "dtype=float32"]
        return execute(gen_mesh.main, GenerateConfig, "gen_mesh", [*defaults, *arguments])

    return call


def extras() -> dict[str, Any]:
    return read_extras(Path("chair.glb"))


@pytest.mark.parametrize(("model", "moves", "guidance"), [("triposg", 3, 7.0), ("step1x3d", 2, 7.5)])
def test_an_image_becomes_a_mesh(
    command: Command, folders: dict[str, Path], model: str, moves: int, guidance: float
) -> None:
    assert command(model) == 0
    mesh, found = trimesh.load_mesh("chair.glb"), extras()
    assert mesh.is_watertight and 0.5 < abs(mesh.bounds).max() <= BOXES[model]
    assert found["model"] == model and found["guidance"] == guidance
    dit = (load_triposg if model == "triposg" else load_step1x3d)(folders[model]).dit
    flops = pass_flops(dit, dit.config.condition_tokens)
    one_pass = sum(block.dense for block in flops)
    assert found["flops_dense"] == found["flops_executed"] == 2 * moves * one_pass


def test_routers_and_a_budget(command: Command, folders: dict[str, Path], tmp_path: Path) -> None:
    for model, load in (("triposg", load_triposg), ("step1x3d", load_step1x3d)):
        dit = load(folders[model]).dit
        torch.manual_seed(0)
        attach(dit, RouterConfig(initial_keep=0.5, initial_width_bias=0, head_std=3.0))
        save_routers(dit, tmp_path / model)
        assert command(model, f"routers={model}", "budget=0.5") == 0
        found = extras()
        assert 0 < found["flops_executed"] < found["flops_dense"] and found["budget"] == 0.5
        assert command(model, f"routers={model}", "budget=0.5", "low_memory=true") == 0
        assert extras()["routes"] == found["routes"]


@pytest.mark.parametrize(("model", "steps"), [("triposg", 10), ("step1x3d", 11)])
def test_a_budget_without_routers(
    command: Command,
    folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    model: str,
    steps: int,
) -> None:
    """Early steps; then, once the model is calibrated, the plan that lies beside the weights."""
    assert command(model, f"steps={steps}", "budget=0.5") == 0
    assert extras()["policy"] == {"schedule": "early", "samples": 0}
    assert extras()["flops_executed"] / extras()["flops_dense"] == pytest.approx(0.5, abs=0.03)
    asked = [f"model={model}", f"weights={folders[model]}", "image=*.png", f"steps={steps}", "dtype=float32"]
    assert execute(calibrate.main, CalibratePolicyConfig, "calibrate", [*asked, "device=cpu"]) == 0
    assert f"{CALIBRATION_NAME}: 1 generations of" in capsys.readouterr().out
    assert command(model, f"steps={steps}", "budget=0.5", "low_memory=true") == 0
    (folders[model] / CALIBRATION_NAME).rename(tmp_path / CALIBRATION_NAME)
    assert extras()["policy"] == {"schedule": "planned", "samples": 1}
    assert extras()["flops_executed"] / extras()["flops_dense"] == pytest.approx(0.5, abs=0.03)
    other = "step1x3d" if model == "triposg" else "triposg"
    for wanted, arguments, told in (
        (model, ["budget=0.2", "steps=20"], "budget is 0.2, expected a value from 0.3 to 1"),
        (model, ["budget=0.3", "steps=4"], "budget is 0.3, expected at least"),
        (model, ["budget=0.5", "calibration=gone"], "there is no calibration gone"),
        (other, ["budget=0.5", "steps=10", "calibration=."], "is of another model"),
    ):
        assert command(wanted, *arguments) == 2
        assert told in capsys.readouterr().err


@pytest.mark.parametrize("model", BOXES)
def test_low_memory_gives_the_same_mesh(command: Command, model: str) -> None:
    assert command(model, "output=a.ply") == command(model, "output=b.ply", "low_memory=true") == 0
    a, b = trimesh.load_mesh("a.ply"), trimesh.load_mesh("b.ply")
    assert abs(a.volume - b.volume) < 1e-3 * abs(a.volume)


def test_what_is_wrong_is_told_before_the_weights_are_read(
    command: Command,
    folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("elastic3d.pipelines.published._load", None)
    write_checkpoint_21(tmp_path / "hunyuan")
    write_folder(tmp_path / "bare", "triposg", encoder=False)
    for model, arguments, told in (
        ("triposg", ["weights=hunyuan"], "this is Hunyuan3D-2.1, say model=hunyuan3d2_1"),
        ("triposg", ["weights=bare"], "holds no image encoder (image_encoder_dinov2)"),
        ("triposg", ["vae_subfolder=a"], "vae_subfolder= is for Hunyuan3D-2, but model is triposg"),
        ("triposg", ["image_back=chair.png"], "image_back= is for a multi-view model, but model is triposg"),
        ("triposg", ["memory_budget=0.01"], "needs about"),
        (str(folders["step1x3d"]), [], "this is Step1X-3D, say model=step1x3d weights="),
        (str(IMAGE_MODEL), [], "this is a text-to-image model (PixelFluxPipeline)"),
        ("tripoSG", [], "there is no folder tripoSG, expected one with pipeline.json, or one of hunyuan3d2,"),
    ):
        assert command(model, *arguments) == 2
        assert told in capsys.readouterr().err
