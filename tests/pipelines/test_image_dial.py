"""The dial of a text-to-image model: made of a benchmark's results, what it runs and records, when it is left out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gen_image
import make_dial as make_dial_command
import numpy as np
import pytest
from _cli import execute
from tiny_dial import values as mesh_values
from tiny_image_dial import results, save_dialled, save_routed
from tiny_pipeline import tiny_pipeline

from elastic3d.diffusion.options import Quality
from elastic3d.errors import UserError
from elastic3d.models.images import read_metadata
from elastic3d.pipelines.generation import Job
from elastic3d.pipelines.options import GenerateConfig, GenerateImageConfig
from elastic3d.pipelines.text_to_3d import prompt_drawer
from elastic3d.pipelines.text_to_image import ImageResult, TextToImagePipeline
from elastic3d.studies.config import DialConfig
from elastic3d.studies.dial import make_dial
from elastic3d.utils.devices import DeviceChoice, DTypeChoice
from elastic3d.utils.files import load_json, save_json


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dialled(tmp_path_factory.mktemp("dial") / "model")


def load(folder: Path, **options: Any) -> TextToImagePipeline:
    return TextToImagePipeline.from_pretrained("small", folder, device="cpu", dtype="float32", **options)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> TextToImagePipeline:
    return load(folder)


def made(pipeline: TextToImagePipeline, **options: Any) -> ImageResult:
    return pipeline(["a chair"], [0], **options)[0]


def test_it_is_the_front_of_the_results(folder: Path) -> None:
    """Two steps without the LoRA are worse at equal cost, every block with routers than the half; no plan is a row."""
    found = load_json(folder / "dial.json")
    assert found["dense"] == {"steps": 4, "guidance": 3.0, "ssim": 1.0}
    settings = [(r["cost"], r["steps"], r["router_budget"], r["few_step_lora"]) for r in found["rows"]]
    assert settings == [(0.5, 2, 1.0, True), (0.7, 4, 0.5, False), (1.0, 4, None, False)]
    assert found["rows"][0]["psnr"] == 25.0 and found["rows"][0]["speedup"] == {"1": 1.9, "4": 1.9}
    assert found["names"] == {"fast": 0.5, "default": 0.7, "best": 1.0}, "an SSIM of 0.99 to the dense image"
    assert found["measured"]["prompts"] == 3 and found["measured"]["seeds"] == 2


def test_the_command_makes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_routed(tmp_path / "model")
    (folder / "dial.json").write_text("{")  # a broken one is in nobody's way
    arguments = [f"model={folder}", f"results={tmp_path / 'r.json'}"]
    save_json(results(folder), tmp_path / "r.json")
    assert execute(make_dial_command.main, DialConfig, "make_dial", arguments) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(
        "budget 0.50: 2 steps, every block, few-step LoRA; 1.90 times faster, psnr 25"
    )
    assert [line.split()[-1] for line in printed] == ["fast", "default", "best"]
    before = (folder / "dial.json").read_bytes()
    for change, message in (
        (lambda r: r["rows"][0].pop("ssim_dense"), r"rows\[0\] has no 'ssim_dense'"),
        (lambda r: r["about"]["models"].update(model="x"), "has measured the weights x, expected"),
        (lambda r: r["rows"][0].update(psnr_dense=None), "no dense row in 4 steps with psnr, ssim and times"),
    ):
        report = results(folder)
        change(report)
        save_json(report, tmp_path / "r.json")
        with pytest.raises(UserError, match=message):
            make_dial(DialConfig(model=folder, results=tmp_path / "r.json"))
    assert (folder / "dial.json").read_bytes() == before


def test_what_its_rows_run_and_record(pipeline: TextToImagePipeline) -> None:
    assert pipeline.dial is not None
    found = {quality: made(pipeline, quality=quality) for quality in Quality}
    for quality, row in zip(Quality, pipeline.dial.rows, strict=True):
        metadata = found[quality].metadata
        assert metadata["dial"] == {"requested": quality.name, "cost": row.cost}
        assert metadata["steps"] == row.steps and metadata["budget"] == (row.router_budget or 1.0)
        assert metadata.get("updated", False) is row.few_step_lora
    dense = made(pipeline, elastic=False)
    assert {each.metadata["flops_dense"] for each in found.values()} == {dense.metadata["flops_executed"]}
    fast = found[Quality.fast].metadata
    assert fast["flops_executed"] / fast["flops_dense"] == 0.5, "two of four steps"
    assert _same(found[Quality.best], dense) and _same(made(pipeline), found[Quality.default])
    assert _same(made(pipeline, steps=2, budget=1), found[Quality.fast])
    by_budget = made(pipeline, budget=0.6).metadata
    assert by_budget["dial"] == {"requested": 0.6, "cost": 0.5} and by_budget["steps"] == 2
    wide = made(pipeline, quality="fast", size=(32, 16)).metadata
    assert wide["dial"]["cost"] == 0.5 and wide["resolution"] == [32, 16]


def _same(a: ImageResult, b: ImageResult) -> bool:
    return np.array_equal(np.asarray(a.image), np.asarray(b.image))


def test_steps_and_the_dense_model_leave_it_out(pipeline: TextToImagePipeline, folder: Path) -> None:
    plain = load(folder, dial=False)
    for options in ({"steps": 4, "budget": 0.5}, {"steps": 2}, {"elastic": False}):
        found = made(pipeline, **options)
        assert "dial" not in found.metadata and _same(found, made(plain, **options))
    assert made(plain, steps=2).metadata["budget"] == 1.0, "every block, with the few-step LoRA"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.4}, "budget is 0.4, expected at least 0.5$"),
        ({"budget": 0.5, "few_step": False}, "at least 0.7, as these options rule out cheaper settings"),
        ({"budget": 0.1, "steps": 2}, "budget is 0.1, expected a value from 0.3 to 1"),
        ({"quality": "good"}, "quality is 'good', expected one of fast, default, best"),
        ({"quality": "fast", "steps": 2}, "quality is fast and steps is 2, expected one of them"),
    ],
)
def test_what_is_refused(pipeline: TextToImagePipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        made(pipeline, **options)


def test_what_it_was_not_measured_with_leaves_it_out(
    pipeline: TextToImagePipeline, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import elastic3d.pipelines.text_to_image as module

    monkeypatch.setattr(module, "merge_lora", lambda pipe, path: path)
    weights = folder / "routers/model.safetensors"
    for options in (
        {"routers": "none"},
        {"routers": "routers"},
        {"lora": weights},
        {"dial": False},
    ):
        assert load(folder, **options).dial is None
    assert pipeline.dial is not None
    plain = load(folder, routers="none")
    with pytest.raises(UserError, match=r"quality is best, but this model has no dial.json"):
        made(plain, quality="best")
    with pytest.raises(UserError, match="budget is 0.1, expected a value from 0.3 to 1"):
        made(plain, budget=0.1)


def test_a_file_of_another_kind_or_with_a_plan_is_refused(folder: Path, tmp_path: Path) -> None:
    own = save_routed(tmp_path / "model")
    save_json(mesh_values(), own / "dial.json")
    with pytest.raises(UserError, match=r"dial.json: dense has no 'ssim'"):
        load(own)
    found = load_json(folder / "dial.json")
    found["rows"][1]["planned"] = True
    save_json(found, own / "dial.json")
    with pytest.raises(UserError, match=r"rows\[1\]: planned is True, expected false"):
        load(own)
    found["rows"][1] |= {"planned": False, "psnr": 101}
    save_json(found, own / "dial.json")
    with pytest.raises(UserError, match=r"psnr is 101, expected a number from 0 to 100"):
        load(own)


def test_the_image_of_a_prompt_gets_a_budget_that_its_model_takes(folder: Path, tmp_path: Path) -> None:
    """Not by the dial, whose cheap rows draw thin parts away: a lower budget is raised to what routers take."""
    config = GenerateConfig(
        prompt="a chair", output="a.glb", image_model=str(folder), budget=0.1,
        device=DeviceChoice.cpu, dtype=DTypeChoice.float32,
    )  # fmt: skip
    for budget, runs in ((0.1, 0.3), (0.8, 0.8)):
        draw, _ = prompt_drawer(replace(config, budget=budget), tiny_pipeline())
        [job] = draw([Job(tmp_path, 0, tmp_path / "a.glb", "a chair")])
        assert job.drawn is not None
        metadata = job.drawn.metadata
        assert "dial" not in metadata and (metadata["budget"], metadata["steps"]) == (runs, 4)


def test_the_command_of_images(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str) -> int:
        given = ["prompt=a chair", "output=x.png", f"weights={folder}", "device=cpu", "dtype=float32"]
        return execute(gen_image.main, GenerateImageConfig, "gen_image", [*given, *arguments])

    assert command("quality=fast", "trace=t.png") == 0 and (tmp_path / "t.png").is_file()
    assert read_metadata("x.png")["dial"] == {"requested": "fast", "cost": 0.5}
    assert command("budget=0.75") == 0 and read_metadata("x.png")["dial"]["cost"] == 0.75
    for arguments, message in (
        (["quality=best", "trace=t.png"], "trace=t.png can't be drawn: the dense model runs"),
        (["quality=best", "budget=0.5"], "quality is best and budget is 0.5, expected one of them"),
        (["budget=0.1"], "budget is 0.1, expected at least 0.5"),
    ):
        assert command(*arguments) == 2 and message in capsys.readouterr().err
