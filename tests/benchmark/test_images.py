"""A whole benchmark of a tiny text-to-image model."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_images import save_tiny_qwen

from elastic3d.benchmark.config import CacheName, ImageBenchmarkConfig, Method, Phase
from elastic3d.benchmark.controls import executed_share
from elastic3d.benchmark.images import ImageTask, kept
from elastic3d.benchmark.methods import ON_REQUEST
from elastic3d.benchmark.methods import plan as plan_of
from elastic3d.benchmark.rivals import rival_cases
from elastic3d.benchmark.run import benchmark
from elastic3d.elastic import attach, save_routers
from elastic3d.elastic.config import BlockCacheConfig, Branches, CacheRule, RouterConfig
from elastic3d.errors import UserError
from elastic3d.models.images import read_metadata
from elastic3d.pipelines.options import BackboneName
from elastic3d.pipelines.text_to_image import TextToImagePipeline
from tests.benchmark.conftest import INSTALLED, PROMPTS, image_config_of
from tests.processes import in_use_elsewhere

ROOT = Path(__file__).resolve().parents[2]
WANTED = {
    "method", "note", "budget", "steps", "batch", "executed_flops_ratio", "flop_speedup", "efficiency", "share_std",
    "dit_ms_median", "dit_ms_q25", "dit_ms_q75", "dit_speedup", "dit_speedup_same_steps", "end_to_end_speedup",
    "psnr_dense", "ssim_dense", "feature_dense", "psnr_reference", "ssim_reference", "feature_reference",
    "psnr_dense_floor", "ssim_reference_floor", "feature_dense_floor", "feature_dense_low", "frechet", "kernel",
    "category_accuracy", "images", "failed", "run",
}  # fmt: skip
# not asked for here; of a static mask of two blocks that may skip both
ABSENT = {"budget", "end_to_end_speedup", "category_accuracy", "flop_speedup"}


@pytest.fixture(scope="module")
def done(gallery: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Every method, the caches of diffusers, and other routers."""
    output = tmp_path_factory.mktemp("benchmark")
    variants = {"same": str(gallery / "model" / "routers")}
    cache = BlockCacheConfig(rule=CacheRule.band, band=0.2)
    config = image_config_of(gallery, output, variants=variants, cache=cache, batch_size=4, limit=2)
    return output, benchmark(config, "python scripts/benchmark.py")


def row_of(results: dict[str, Any], method: str, **fields: Any) -> dict[str, Any]:
    [row] = [
        row
        for row in results["rows"]
        if row["method"] == method and all(row[k] == v for k, v in fields.items())
    ]
    return row


def test_every_method_is_a_row_with_every_number(done):
    output, results = done
    assert json.loads((output / "results.json").read_text()) == json.loads(json.dumps(results))
    rows = results["rows"]
    # its sampler takes no other steps, its routers have no LoRA, and alone there is nobody to share routes with
    absent = {Method.euler_steps, Method.elastic_shared, Method.few_step_lora, *ON_REQUEST}
    methods = {*Method.__members__} - {method.name for method in absent}
    assert {row["method"] for row in rows} == {*methods, *(c.name for c in INSTALLED), "same"}
    for row in rows:
        assert set(row) >= WANTED
        assert not {name for name in WANTED if row[name] is None} - ABSENT, row
        assert row["images"] == 4 and row["failed"] == 0 and row["rounds"] == 1
    with (output / "results.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    for name in ("pareto", "blocks", "sheet"):
        with Image.open(output / f"{name}.png") as image:
            assert image.width > 100 and len(image.getcolors(1 << 20)) > 2
    assert results["about"]["real_images"] == 3 and results["about"]["left_out"] == {}


def test_dense_rows_are_what_they_must_be(done):
    _, results = done
    dense = row_of(results, "dense")
    assert (
        dense["psnr_dense"] == 100 and dense["feature_dense"] == 0 and dense["ssim_dense"] == pytest.approx(1)
    )
    assert dense["dit_speedup"] == 1 and dense["executed_flops_ratio"] == 1 and dense["feature_reference"] > 0
    assert dense["feature_dense_floor"] > 0 and dense["psnr_dense_floor"] < 100
    fewer = row_of(results, "fewer_steps", steps=2)
    assert fewer["flops_ratio_to_baseline"] == 0.5 and fewer["feature_dense"] > 0


def test_routers_and_rivals_execute_what_they_should(done):
    _, results = done
    routers = row_of(results, "elastic")
    assert 0 < routers["executed_flops_ratio"] < 1
    same, elastic = row_of(results, "same"), row_of(results, "elastic")
    assert same["feature_dense"] == pytest.approx(elastic["feature_dense"])
    assert row_of(results, "static")["share_std"] == 0
    lite = row_of(results, "taylor_seer_lite")
    # TaylorSeer computes steps 0 and 2 of four here, in both branches
    assert lite["executed_flops_ratio"] == pytest.approx(0.5, abs=0.05) and lite["share_std"] == 0
    assert lite["efficiency"] == pytest.approx(lite["dit_speedup"] * lite["executed_flops_ratio"])
    forecast = row_of(results, "forecast")  # steps 0 and 2 of four
    assert forecast["executed_flops_ratio"] == pytest.approx(0.5, abs=1e-3)
    assert forecast["share_std"] < 1e-4  # the fit of the polynomials is one a batch
    attention_alone = row_of(results, "taylor_seer")
    assert lite["executed_flops_ratio"] < attention_alone["executed_flops_ratio"] < 1


def test_the_summary_puts_every_family_beside_the_elastic_one(done):
    _, results = done
    families = results["summary"]["frontiers"]["1"]
    assert list(families)[0] == "fewer_steps"
    assert set(families) == {
        "fewer_steps",
        "dense_cache",
        "same",
        "training_free",
        *(c.name for c in INSTALLED),
    }
    front = families["first_block_cache"]["feature_dense"]
    assert front["front"] and front["other"]
    targets = results["summary"]["targets"]
    answers = {name.split(":")[0]: target["met"] for name, target in targets.items()}
    assert answers["speed"] is not None
    assert answers["budgets"] is True, "of plans; the routers have another cache than in their training"
    assert {c["matched"] for c in results["comparisons"]} >= {"equal FLOPs", "equal budget"}
    rivals = {c["rival_method"] for c in results["comparisons"]}
    assert rivals >= {"random", "static", "timestep", "shuffled"}


def test_controls_count_the_flops_of_both_branches(tmp_path):
    """Of Qwen-Image, each of which is as long as its prompt."""
    save_tiny_qwen(tmp_path / "model")
    backbone = TextToImagePipeline.from_pretrained(
        BackboneName.qwen_image, tmp_path / "model", device="cpu"
    ).backbone
    torch.manual_seed(0)
    attach(backbone.pipe, RouterConfig(branches=Branches.separate, initial_keep=0.6, head_std=3.0))
    save_routers(backbone.pipe.transformer, tmp_path / "model" / "routers")
    (tmp_path / "prompts.txt").write_text("a red chair " * 20)
    config = image_config_of(
        tmp_path, tmp_path / "out", backbone=BackboneName.qwen_image, references=None, resolution=16, seeds=[0],
        steps=[8], baseline_steps=8, reference_steps=8, methods=[Method.random, Method.timestep], caches=[],
    )  # fmt: skip
    task = ImageTask(config)
    runs = {case.method: case.run for case in plan_of(task.planner, 1)}
    [donor] = {run.donor for run in runs.values()}
    true, *found = (
        result.metadata["flops_executed"] / result.metadata["flops_dense"]
        for run in (donor, *runs.values())
        for result in task.produced(run, task.jobs)
    )
    actions, costs, _ = task.controls._calibrated(runs["random"])
    conditional, unconditional = costs[0, :, 0, -1].tolist()
    assert conditional > 1.5 * unconditional and not torch.equal(actions[:, 0], actions[:, 1])
    assert executed_share(actions, costs[:, :, None]) == pytest.approx(true, rel=1e-6)
    assert found == pytest.approx([true, true], abs=0.05)


def test_a_second_run_makes_nothing_again(done, gallery, monkeypatch):
    output, results = done

    def never(*arguments: Any, **named: Any) -> None:
        raise AssertionError("this was made already")

    monkeypatch.setattr(TextToImagePipeline, "__call__", never)
    monkeypatch.setattr("elastic3d.models.image_encoder.EfficientNetLite.pyramid", never)
    cache = BlockCacheConfig(rule=CacheRule.band, band=0.2)
    config = image_config_of(
        gallery, output, cache=cache, phases=[Phase.quality], methods=[Method.elastic], caches=[], limit=2
    )
    with in_use_elsewhere(output), pytest.raises(UserError, match="is in use by another process"):
        benchmark(config)
    again = benchmark(config)
    before, after = row_of(results, "elastic"), row_of(again, "elastic")
    assert after["feature_dense"] == before["feature_dense"] and after["frechet"] == before["frechet"]
    assert after["dit_ms_median"] is None


def test_an_interrupted_run_keeps_what_it_has(gallery, tmp_path, monkeypatch):
    config = image_config_of(
        gallery, tmp_path, methods=[Method.dense], caches=[], seeds=[0], phases=[Phase.quality]
    )
    real, made = ImageTask.produced, list[str]()

    def counted(self: Any, run: Any, jobs: Any) -> Any:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.extend(job.name for job in jobs)
        return real(self, run, jobs)

    monkeypatch.setattr(ImageTask, "produced", counted)
    with pytest.raises(KeyboardInterrupt):
        benchmark(config)
    kept = list(tmp_path.rglob("seed-0/*.png"))
    assert len(kept) == 2 and {read_metadata(path)["prompt"] for path in kept} == set(made)
    made.clear()
    monkeypatch.setattr(
        ImageTask,
        "produced",
        lambda s, r, jobs: made.extend(j.name for j in jobs) or real(s, r, jobs),
    )
    results = benchmark(config)
    assert made == [PROMPTS[2], *PROMPTS] and row_of(results, "dense")["images"] == 3
    assert row_of(results, "dense")["psnr_dense_floor"] is None  # one seed only


def test_an_image_that_cannot_be_made_counts_against_the_method(gallery, tmp_path, monkeypatch):
    real = TextToImagePipeline.__call__

    def broken(self: Any, prompts: Any, seeds: Any, **options: Any) -> Any:
        if options["steps"] == 2 and "a bed" in prompts:
            raise UserError("the image has values that are not finite")
        return real(self, prompts, seeds, **options)

    monkeypatch.setattr(TextToImagePipeline, "__call__", broken)
    config = image_config_of(gallery, tmp_path, methods=[Method.dense, Method.fewer_steps], caches=[], seeds=[0],
                       steps=[2], phases=[Phase.quality])  # fmt: skip
    row = row_of(benchmark(config), "fewer_steps")
    assert row["failed"] == 1 and row["images"] == 3
    [folder] = (tmp_path / "runs").glob("dense-s2-*/seed-0")
    [failed] = [path for path in folder.glob("*.json") if json.loads(path.read_text())["status"] == "failed"]
    assert json.loads(failed.read_text())["error"].endswith("not finite")
    with Image.open(failed.with_suffix(".png")) as image:
        assert image.getcolors() == [(256, (128, 128, 128))]


def test_the_command_writes_its_results(gallery, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import benchmark as command
    from _cli import execute

    options = [
        "task=images", f"weights={gallery / 'model'}", f"prompts={gallery / 'prompts.txt'}", f"output={tmp_path}",
        "seeds=[0,1]", "budgets=[1,.5]", "steps=[1]", "baseline_steps=2", "reference_steps=3", "batches=[1]",
        "methods=[dense,fewer_steps,elastic]", "caches=[first_block_cache,db_cache]", "db_thresholds=[0.1]",
        "first_block_thresholds=[0.1]", "repeats=1", "end_to_end_repeats=1", "timing_items=1",
        f"references={gallery / 'real'}", "feature_size=32", "limit=2", "device=cpu",
    ]  # fmt: skip
    monkeypatch.setattr("elastic3d.benchmark.rivals.find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *options])
    assert execute(command.main, ImageBenchmarkConfig, "benchmark_images", options) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    methods = [row["method"] for row in results["rows"]]
    assert methods == ["dense", "fewer_steps", "elastic", "elastic", "first_block_cache"]
    assert all(row["end_to_end_speedup"] > 0 and row["images"] == 4 for row in results["rows"])
    assert results["about"]["command"].startswith("python benchmark.py task=images")
    printed = capsys.readouterr().out
    assert "no rows of db_cache: cache-dit is not installed" in printed and "first_block_cache" in printed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": Path("nowhere.txt")}, "prompts is nowhere.txt, which is no file"),
        ({"weights": "nowhere"}, "weights is nowhere, which does not exist"),
        ({"references": Path("nowhere")}, "images is nowhere, which is no folder"),
        ({"methods": [Method.shuffled], "limit": 1}, "methods has shuffled, which can't be run: .*only one"),
    ],
)
def test_what_is_refused(gallery, tmp_path, changes, message):
    base = {"methods": [Method.dense], "caches": [], "phases": [Phase.quality], "seeds": [0]}
    with pytest.raises(UserError, match=message):
        benchmark(image_config_of(gallery, tmp_path, **base | changes))


def test_options_are_checked():
    with pytest.raises(ValueError, match="weights= is missing"):
        ImageBenchmarkConfig(output=Path("x"), backbone=next(b for b in _backbones() if b.name == "flux"))
    with pytest.raises(ValueError, match="feature_size is 100"):
        ImageBenchmarkConfig(output=Path("x"), feature_size=100)
    with pytest.raises(ValueError, match="variants has 'mag_cache', expected another name"):
        ImageBenchmarkConfig(output=Path("x"), variants={CacheName.mag_cache.name: "y"})


def test_what_decides_in_batches_and_what_it_goes_by_make_other_runs(gallery, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a grey table\n")
    names = []
    for changes in ({}, {"batched_decisions": True}, {"calibration": prompts}):
        task = ImageTask(image_config_of(gallery, tmp_path, methods=[Method.dense], **changes))
        names.append({case.method: case.run.name for case in rival_cases(task.planner)})
    plain, batched, other = names
    differ = [{name for name in plain if plain[name] != found[name]} for found in (batched, other)]
    assert differ == [{CacheName.first_block_cache.value}, {CacheName.mag_cache.value}]


def test_scores_of_another_version_are_computed_anew(tmp_path, monkeypatch):
    path = tmp_path / "scores.npz"

    def scored(value: int) -> int:
        return int(kept(path, ("facts",), lambda: {"psnr": np.array(value)})["psnr"])

    assert [scored(1), scored(2)] == [1, 1]
    monkeypatch.setattr("elastic3d.benchmark.images.__version__", "0.0.1")
    assert [scored(3), scored(4)] == [3, 3]


def _backbones() -> Any:
    from elastic3d.pipelines.options import BackboneName

    return BackboneName


def test_dense_images_may_be_the_reference_too(gallery, tmp_path):
    config = image_config_of(
        gallery, tmp_path, methods=[Method.dense], caches=[], phases=[Phase.quality], reference_steps=4
    )
    row = row_of(benchmark(config, ""), "dense")
    assert row["psnr_reference"] == row["psnr_dense"] == 100
    assert row["psnr_reference_floor"] == row["psnr_dense_floor"] < 100
