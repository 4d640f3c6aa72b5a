"""The command `gen_image.py`: files, metadata, and one sentence for every mistake."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import gen_image
import pytest
import torch
from _cli import execute
from PIL import Image
from tiny_images import save_tiny_flux, save_tiny_qwen, save_tiny_small

from elastic3d.elastic import attach, save_routers
from elastic3d.elastic.config import RouterConfig
from elastic3d.models.images import read_metadata
from elastic3d.pipelines.options import BackboneName, GenerateImageConfig
from elastic3d.pipelines.text_to_image import load_backbone
from elastic3d.utils.devices import DeviceChoice

Command = Callable[..., int]


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published folder with `routers` inside."""
    folder = save_tiny_flux(tmp_path_factory.mktemp("published") / "FLUX.1-tiny")
    pipe = load_backbone(BackboneName.flux, folder, torch.device("cpu"), torch.float32).pipe
    torch.manual_seed(0)
    attach(pipe, RouterConfig(initial_keep=0.5, head_std=3.0))
    save_routers(pipe.transformer, folder / "routers")
    return folder


@pytest.fixture
def command(flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run the command in `tmp_path`, by default with the tiny FLUX; gives its exit code."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> int:
        defaults = ["backbone=flux", f"weights={flux}", "steps=2", "size=16", "device=cpu", "dtype=float32"]
        return execute(gen_image.main, GenerateImageConfig, "gen_image", [*defaults, *arguments])

    return call


def test_an_image_with_its_metadata(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "a (red) chair, x=y ${HOME} ä"
    assert (
        command(f"prompt={prompt}", "output=new/a b.png", "budget=0.5", "cache=paper", "trace=routes.png")
        == 0
    )
    assert "new/a b.png: 16 x 16" in capsys.readouterr().out
    metadata = read_metadata("new/a b.png")
    assert metadata["prompt"] == prompt and metadata["budget"] == 0.5 and metadata["model"] == "FLUX.1-tiny"
    assert metadata["elastic"]["cache"]["rule"] == "band" and metadata["resolution"] == [16, 16]
    assert Image.open("routes.png").width > 0
    assert command("prompt=a chair", "output=dense.png", "elastic=false") == 0
    assert "routes" not in read_metadata("dense.png")


def test_a_prompt_that_names_nothing_known_is_warned_of(command: Command, tmp_path: Path) -> None:
    small = save_tiny_small(tmp_path / "small")
    (small / "nouns.txt").write_text("chair\n")
    options = ["output=a.png", "backbone=small", f"weights={small}"]
    with pytest.warns(UserWarning, match="names nothing that the text-to-image model knows, which is: chair"):
        assert command("prompt=a dragon", *options) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert command("prompt=a chair", *options) == 0


def test_several_samples_in_batches(command: Command) -> None:
    assert command("prompt=a chair", "output=x.png", "num_samples=3", "batch_size=2", "seed=4") == 0
    assert [read_metadata(f"x_{n}.png")["seed"] for n in range(3)] == [4, 5, 6]
    assert command("prompt=a chair", "output=y.png", "seed=6") == 0
    assert Image.open("y.png").tobytes() == Image.open("x_2.png").tobytes()


def test_qwen_image(command: Command, tmp_path: Path) -> None:
    folder = save_tiny_qwen(tmp_path / "qwen")
    assert command("prompt=a chair", "output=x.png", "backbone=qwen_image", f"weights={folder}") == 0
    assert read_metadata("x.png")["backbone"] == "qwen_image"


BAD_INPUT: dict[str, tuple[list[str], str]] = {
    "no arguments": ([], "prompt= is missing"),
    "empty prompt": (["prompt=  ", "output=x.png"], "prompt= is missing"),
    "long prompt": (["prompt=" + "chair " * 300, "output=x.png"], "tokens, expected at most 512"),
    "very long prompt": (["prompt=" + "x" * 9999, "output=x.png"], "9999 characters, expected"),
    "no text": (["prompt=a\udcff", "output=x.png"], "the prompt is no text"),
    "unknown backbone": (
        ["prompt=a", "output=x.png", "backbone=sdxl"],
        "expected one of small, flux, qwen_image",
    ),
    "no weights": (["prompt=a", "output=x.png", "weights="], "weights= is missing"),
    "no pipeline": (["prompt=a", "output=x.png", "weights=."], "is no pipeline: it has no model_index.json"),
    "another pipeline": (["prompt=a", "output=x.png", "backbone=qwen_image"], "expected a QwenImagePipeline"),
    "no routers": (["prompt=a", "output=x.png", "routers=gone"], "there is no folder gone"),
    "no lora": (["prompt=a", "output=x.png", "lora=gone.safetensors"], "lora"),
    "size": (["prompt=a", "output=x.png", "size=big"], "size is 'big', expected pixels"),
    "odd size": (["prompt=a", "output=x.png", "size=18"], "expected multiples of 8"),
    "budget": (["prompt=a", "output=x.png", "budget=0.1"], "budget is 0.1"),
    "output": (["prompt=a", "output=x.jpg"], "expected a .png file"),
    "trace": (["prompt=a", "output=x.png", "elastic=false", "trace=t.png"], "has no routes to draw"),
    "trace of all blocks": (
        ["prompt=a", "output=x.png", "routers=none", "budget=1", "trace=t.png"],
        "trace=t.png can't be drawn: the dense model runs",
    ),
    "unwritable": (["prompt=a", "output=blocked/x.png"], "can't write blocked/x.png: blocked is no folder"),
    "unwritable trace": (
        ["prompt=a", "output=x.png", "trace=blocked/t.png"],
        "can't write blocked/t.png: blocked is no",
    ),
    "offload": (
        ["prompt=a", "output=x.png", "offload=true"],
        "offload is true, but the pipeline runs on the CPU",
    ),
    "steps": (["prompt=a", "output=x.png", "steps=0"], "steps is 0"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_sentence_and_no_file(
    command: Command, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, message = BAD_INPUT[name]
    (tmp_path / "blocked").touch()
    assert command(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert sum(line.startswith("error: ") for line in error.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["blocked"]


def test_devices_are_checked() -> None:
    config = GenerateImageConfig(prompt="a", output="a.png", device=DeviceChoice.cpu)
    assert config.backbone is BackboneName.small
