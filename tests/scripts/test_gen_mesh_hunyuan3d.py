"""`gen_mesh.py model=hunyuan3d2...` on tiny checkpoints in the published layout, end to end."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gen_mesh
import pytest
import torch
import train
import trimesh
from _cli import execute, parse
from hunyuan_tiny import DINOV2, write_checkpoint, write_checkpoint_21
from tiny_pipeline import save_image

from elastic3d.checkpoints.dinov2 import build_network
from elastic3d.checkpoints.hunyuan3d import load_hunyuan3d
from elastic3d.checkpoints.options import PRESETS, ImportConfig
from elastic3d.elastic import attach, detach, save_routers
from elastic3d.elastic.config import RouterConfig
from elastic3d.errors import UserError
from elastic3d.evaluation.options import EvaluateConfig
from elastic3d.geometry.mesh_io import read_extras
from elastic3d.pipelines import published
from elastic3d.pipelines.memory import MemoryNeed
from elastic3d.pipelines.options import CalibratePolicyConfig, GenerateConfig
from elastic3d.preparation.options import PrepareConfig
from elastic3d.training.options import TrainConfig
from elastic3d.training.stages import stage_config
from elastic3d.utils.devices import DeviceChoice, DTypeChoice

Command = Callable[..., int]
CONFIGS: dict[str, tuple[str, Any]] = {
    "gen_mesh": ("gen_mesh", GenerateConfig),
    "evaluate": ("evaluate", EvaluateConfig),
    "prepare_data": ("prepare_data", PrepareConfig),
    "train": ("train", TrainConfig),
    "import_weights": ("import_weights", ImportConfig),
    "calibrate": ("calibrate", CalibratePolicyConfig),
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder with a checkpoint of each kind."""
    root = tmp_path_factory.mktemp("weights")
    for case, name in (("base", "hunyuan3d2"), ("turbo", "hunyuan3d2_turbo"), ("mv", "hunyuan3d2_mv")):
        write_checkpoint(root, case, PRESETS[name].subfolder)
    write_checkpoint_21(root)
    return root


@pytest.fixture
def command(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.chdir(tmp_path)
    for name in ("chair", "left", "back"):
        save_image(tmp_path / f"{name}.png", x=10 * len(name) - 30)

    def call(*arguments: str) -> int:
        defaults = [f"weights={weights}", "image=chair.png", "output=chair.glb", "resolution=16"]
        defaults += ["steps=3", "device=cpu", "dtype=float32"]
        return execute(gen_mesh.main, GenerateConfig, "gen_mesh", [*defaults, *arguments])

    return call


def extras(path: str = "chair.glb") -> dict[str, Any]:
    return read_extras(Path(path))


@pytest.mark.parametrize(
    ("model", "moves"),
    [("hunyuan3d2", 2), ("hunyuan3d2_turbo", 3), ("hunyuan3d2_mv", 2), ("hunyuan3d2_1", 2)],
)
def test_an_image_becomes_a_mesh(command: Command, model: str, moves: int) -> None:
    assert command(f"model={model}") == 0
    mesh = trimesh.load_mesh("chair.glb")
    assert len(mesh.faces) > 0 and abs(mesh.bounds).max() <= 1.01 + 1e-6
    found = extras()
    assert found["model"] == model and found["guidance"] == 5.0
    branches = 1 if model.endswith("turbo") else 2
    assert found["flops_executed"] % (moves * branches) == 0


def test_several_views(command: Command) -> None:
    assert command("model=hunyuan3d2_mv", "output=one.stl") == 0
    assert (
        command("model=hunyuan3d2_mv", "image_back=back.png", "image_left=left.png", "output=three.stl") == 0
    )
    assert Path("one.stl").read_bytes() != Path("three.stl").read_bytes()


def test_views_of_a_model_of_one(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("model=hunyuan3d2", "image_back=back.png") == 2
    assert "image_back= is for a multi-view model" in capsys.readouterr().err


def test_routers_and_a_budget(command: Command, weights: Path, tmp_path: Path) -> None:
    dit = load_hunyuan3d(weights).dit
    before = set(dit.state_dict())
    torch.manual_seed(0)
    attach(dit, RouterConfig(initial_keep=0.5, initial_width_bias=0, head_std=3.0))
    save_routers(dit, tmp_path / "routers")
    assert set(dit.state_dict()) == before
    detach(dit)
    assert command("model=hunyuan3d2", "routers=routers", "budget=0.5", "trace=routes.png") == 0
    found = extras()
    assert 0 < found["flops_executed"] < found["flops_dense"] and found["budget"] == 0.5
    assert Path("routes.png").is_file()
    assert command("model=hunyuan3d2", "routers=routers", "budget=0.5", "low_memory=true") == 0
    assert extras()["routes"] == found["routes"]  # the branches in turn decide as they do side by side
    assert command("model=hunyuan3d2", "budget=0.5") == 2


@pytest.mark.parametrize(
    ("model", "steps"),
    [("hunyuan3d2", 13), ("hunyuan3d2_turbo", 12), ("hunyuan3d2_mv", 13), ("hunyuan3d2_1", 13)],
)
def test_a_budget_without_routers(command: Command, model: str, steps: int) -> None:
    """In 12 moves; the first number counts the grid's last point, at which nothing is computed."""
    assert command(f"model={model}", f"steps={steps}", "budget=0.5") == 0
    found = extras()
    assert 0.47 <= found["flops_executed"] / found["flops_dense"] <= 0.53
    assert found["policy"] == {"schedule": "early", "samples": 0}


def test_low_memory_gives_the_same_mesh(command: Command) -> None:
    assert command("model=hunyuan3d2", "output=a.ply") == 0
    assert command("model=hunyuan3d2", "output=b.ply", "low_memory=true") == 0
    a, b = trimesh.load_mesh("a.ply"), trimesh.load_mesh("b.ply")
    assert abs(a.volume - b.volume) < 1e-3 * abs(a.volume)


def test_too_little_memory_is_told_before_the_weights_are_read(
    command: Command, weights: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elastic3d.pipelines.published.load_hunyuan3d", None)
    assert command("model=hunyuan3d2", "resolution=512", "memory_budget=0.5") == 2
    told = capsys.readouterr().err
    assert "needs about" in told and "0.5 GB" in told and "low_memory=true" in told


@pytest.mark.parametrize("case", ["", "_1"])
def test_the_copy_of_weights_that_a_few_step_lora_makes_counts(
    command: Command, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    config = GenerateConfig(
        image="chair.png", output="chair.glb", model=f"hunyuan3d2{case}", weights=str(weights),
        device=DeviceChoice.cpu, dtype=DTypeChoice.float32,
    )  # fmt: skip
    dense = published.published_pipeline(config, 1)
    session = attach(dense.dit, RouterConfig(few_step_rank=2))
    save_routers(dense.dit, tmp_path / "routers")
    copied = sum(w.nbytes for block in session.blocks for w in block.adapted(1.0).values())
    needs: list[MemoryNeed] = []
    monkeypatch.setattr(published, "require", lambda need, *_: needs.append(need))
    monkeypatch.setattr(published, "_load", lambda *_: dense)  # which are estimated before
    detach(dense.dit)
    for config.routers in ("", "routers"):
        published.published_pipeline(config, 1)
    without, with_lora = (need.weights["dit"] for need in needs)
    assert copied > without / 5 and with_lora == without + copied


def test_a_memory_budget_bounds_the_chunks(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("model=hunyuan3d2", "resolution=32", "memory_budget=0.1") == 0


def test_missing_image_encoder(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path / "bare", conditioner=False)
    monkeypatch.setattr("elastic3d.pipelines.published.load_hunyuan3d", None)  # it is not even read
    assert command("model=hunyuan3d2", "weights=bare") == 2
    assert "holds no image encoder" in capsys.readouterr().err


def test_a_pointer_instead_of_weights(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_checkpoint(tmp_path / "cloned") / "hunyuan3d-dit-v2-0"
    (folder / "model.fp16.safetensors").write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n")
    assert command("model=hunyuan3d2", "weights=cloned") == 2
    assert "model.fp16.safetensors is a Git LFS pointer" in capsys.readouterr().err


def test_parts_from_elsewhere_count_for_the_memory(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "bare", conditioner=False)
    network = build_network({**DINOV2, "hidden_size": 512}, "test")
    network.save_pretrained(tmp_path / "dinov2")
    size = 4 * sum(p.numel() for p in network.parameters())
    assert command("model=hunyuan3d2", "weights=bare", "dinov2=dinov2", "memory_budget=0.02") == 2
    assert f"weights: condition {size / 1e9:.1f}," in capsys.readouterr().err


def test_missing_routers_are_named_before_the_weights_are_read(
    command: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elastic3d.pipelines.published.load_hunyuan3d", None)
    assert command("model=hunyuan3d2", "routers=nowhere") == 2
    assert "there is no folder nowhere" in capsys.readouterr().err


def test_low_memory_loads_into_main_memory(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device never has to hold all weights at a time, not even while they are read."""
    devices = []

    def load(folder: str, subfolder: str, dtype: torch.dtype, device: torch.device, *rest: Any) -> None:
        devices.append(device.type)
        raise UserError("far enough")

    monkeypatch.setattr("elastic3d.pipelines.published.load_hunyuan3d", load)
    monkeypatch.setattr("elastic3d.pipelines.published.resolve_device", lambda _: torch.device("meta"))
    assert command("model=hunyuan3d2") == command("model=hunyuan3d2", "low_memory=true") == 2
    assert devices == ["meta", "cpu"]


def test_options_of_other_models(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("model=somewhere") == 2
    assert "weights= is for model=hunyuan3d2" in capsys.readouterr().err


def test_wrong_subfolder(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("model=hunyuan3d2", "subfolder=hunyuan3d-dit-v3") == 2
    assert "has no folder hunyuan3d-dit-v3, it has hunyuan3d-dit-v2-0" in capsys.readouterr().err


def test_a_folder_of_images(command: Command, tmp_path: Path) -> None:
    for name in "ab":
        save_image(tmp_path / f"in/{name}.png", x=20)
    assert command("model=hunyuan3d2", "image=in", "output=out", "low_memory=true") == 0
    assert json.loads(Path("out/summary.json").read_text())["counts"]["ok"] == 2


def test_commands_of_the_documentation_are_understood() -> None:
    text = (Path(gen_mesh.__file__).parents[1] / "docs" / "hunyuan3d.md").read_text()
    commands = re.findall(r"^python scripts/(\w+)\.py (.*)$", text, re.MULTILINE)
    assert len(commands) > 8
    for script, arguments in commands:
        given = shlex.split(arguments)
        name, config_class = CONFIGS[script]
        if script == "train":
            given = train.with_own_stage(given)
            config_class = stage_config(train.chosen_stage(given))
        assert isinstance(parse(config_class, name, given), config_class), arguments
