"""The text-to-image model that ships, as a user meets it."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from elastic3d.diffusion.dial import IMAGES
from elastic3d.diffusion.options import PipelineConfig
from elastic3d.errors import UserError
from elastic3d.pipelines.options import DEFAULT_IMAGE_MODEL, BackboneName
from elastic3d.pipelines.text_to_image import ImageResult, TextToImagePipeline
from elastic3d.studies.dial import dial_values
from elastic3d.utils.files import load_json

FOLDER = Path(__file__).resolve().parents[2] / DEFAULT_IMAGE_MODEL


PROMPTS, SEEDS = ["a wooden bar chair", "a blue vase"], [0, 1]


@pytest.fixture(scope="module")
def pipeline() -> TextToImagePipeline:
    return TextToImagePipeline.from_pretrained(BackboneName.small, FOLDER, device="cpu")


@pytest.fixture(scope="module")
def dense(pipeline: TextToImagePipeline) -> list[ImageResult]:
    """The prompts' images by the dense model, in as many steps as it has by default."""
    return pipeline(PROMPTS, SEEDS, elastic=False)


def test_images_show_one_object_in_the_colour_that_was_asked_for(pipeline: TextToImagePipeline) -> None:
    colours = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1)}
    results = pipeline([f"a {colour} sofa" for colour in colours], [0, 0, 0], steps=12)
    for result, wanted in zip(results, colours.values(), strict=True):
        pixels = np.asarray(result.image, float) / 255
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert np.median(border) > 0.95, "the ground is white"
        thing = pixels[pixels.min(-1) < 0.6]
        assert 0.1 < len(thing) / 64**2 < 0.8
        assert thing.mean(0).argmax() == int(np.argmax(wanted))
        assert result.metadata["flops_executed"] < 0.7 * result.metadata["flops_dense"], "elastic by default"


def test_the_bundled_dial_is_that_of_its_report_and_of_the_bundled_weights(
    pipeline: TextToImagePipeline,
) -> None:
    root, report = FOLDER.parents[2], "reports/elastic-2d/dial-results.json"
    found, (steps, guidance) = load_json(FOLDER / "dial.json"), pipeline.backbone.default_sampling()
    model = PipelineConfig(steps=steps, guidance=guidance)
    assert pipeline.session is not None
    routers = pipeline.session.router_config
    assert found == dial_values(load_json(root / report), model, routers, report, IMAGES)
    assert found["measured"]["weights_sha256"] == pipeline.weights_sha256, "measure: scripts/make_dial.py"
    lines = (root / "reports/elastic-2d/dial.md").read_text().splitlines()
    told = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| **")]
    assert len(told) == len(found["rows"])
    for cells, row in zip(told, found["rows"], strict=True):
        names = [f"`{name}`" for name, cost in found["names"].items() if cost == row["cost"]]
        wanted = [row["speedup"]["1"], row["speedup"]["4"], row["psnr"], row["ssim"]]
        assert (cells[0], cells[1], cells[3]) == (
            f"**{row['cost']:.2f}**",
            str(row["steps"]),
            ", ".join(names),
        )
        for cell, value, places in zip(cells[4:8], wanted, (2, 2, 1, 3), strict=True):
            assert float(cell) == pytest.approx(value, abs=0.51 * 10**-places)


def test_the_example_of_the_card_runs(pipeline: TextToImagePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDER.parents[2])
    monkeypatch.setattr(TextToImagePipeline, "from_pretrained", lambda name, folder: pipeline)
    [block] = re.findall(r"```python\n(.*?)```", (FOLDER / "README.md").read_text(), re.DOTALL)
    found: dict[str, Any] = {}
    exec(block, found)
    assert found["image"].size == (64, 64)


def test_prompts_are_a_list(pipeline: TextToImagePipeline) -> None:
    with pytest.raises(UserError, match="prompts is 'a red chair', expected a list of prompts"):
        pipeline("a red chair", [0])


def test_routers_keep_to_a_budget_and_to_the_dense_image(
    pipeline: TextToImagePipeline, dense: list[ImageResult]
) -> None:
    distances = []
    for budget in (0.8, 0.4):
        found = pipeline(PROMPTS[:1], SEEDS[:1], budget=budget)
        share = found[0].metadata["flops_executed"] / found[0].metadata["flops_dense"]
        assert abs(share - budget) < 0.1, "one image; on the mean over images it is closer"
        distances.append(_distance(found, dense[:1]))
    assert distances[0] < distances[1] < 0.1 * _distance(dense[::-1], dense), "of two prompts"
    size = sum(file.stat().st_size for file in (FOLDER / "routers").iterdir())
    assert size < 10e6


def _distance(found: list, dense: list) -> float:
    """Mean squared error of pixels in [0,1]."""
    pairs = zip(found, dense, strict=True)
    return float(
        np.mean([(np.asarray(a.image, float) - np.asarray(b.image, float)) ** 2 for a, b in pairs]) / 255**2
    )


def test_routers_of_each_block_run_with_few_evaluations(dense: list[ImageResult]) -> None:
    """With every block the few-step LoRA is nearer to the dense image than as many dense steps."""
    pipeline = TextToImagePipeline.from_pretrained(BackboneName.small, FOLDER, "per_block", device="cpu")
    fewer = pipeline(PROMPTS, SEEDS, steps=4, elastic=False)
    whole = pipeline(PROMPTS, SEEDS, steps=4, budget=1)
    found = pipeline(PROMPTS, SEEDS, steps=4, budget=0.7)
    assert _distance(whole, dense) < 0.8 * _distance(fewer, dense)
    for result in found:
        share = result.metadata["flops_executed"] / result.metadata["flops_dense"]
        assert abs(share - 0.7) < 0.1
    assert len({str(result.metadata["routes"]["actions"]) for result in found}) > 1
    with pytest.raises(UserError, match="steps is 25, expected 3 to 8, for which these per-block routers"):
        pipeline(PROMPTS[:1], [0])
    with pytest.raises(UserError, match=r"budget is 0.3, expected 0.4 to 1, .* calibrated in 4 steps"):
        pipeline(PROMPTS[:1], [0], steps=4, budget=0.3)


def test_the_few_step_lora_is_that_of_the_per_block_routers() -> None:
    own, other = (load_file(FOLDER / name / "model.safetensors") for name in ("routers", "per_block"))
    shared = {name for name in other if ".few_step." in name}
    assert shared and shared == {name for name in own if ".few_step." in name}
    assert all(torch.equal(own[name], other[name]) for name in shared)


def test_the_few_step_lora_is_for_few_steps(pipeline: TextToImagePipeline, dense: list[ImageResult]) -> None:
    """With every block, as by default in few steps, it is nearer to the dense image than as many dense steps. The
    model's default is without it."""
    found = pipeline(PROMPTS, SEEDS, steps=5)
    assert found[0].metadata["budget"] == 1 and found[0].metadata["updated"]
    assert not pipeline(PROMPTS[:1], [0])[0].metadata["updated"]
    assert _distance(found, dense) < 0.8 * _distance(pipeline(PROMPTS, SEEDS, steps=5, elastic=False), dense)
