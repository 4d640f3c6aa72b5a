"""A whole benchmark of a tiny image-to-mesh model."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from elastic3d.benchmark import meshes
from elastic3d.benchmark import run as running
from elastic3d.benchmark.config import Method, Phase
from elastic3d.benchmark.meshes import MeshTask
from elastic3d.benchmark.methods import ON_REQUEST
from elastic3d.benchmark.run import benchmark
from elastic3d.elastic import save_routers, session_of
from elastic3d.elastic.config import BlockCacheConfig, CacheRule
from elastic3d.errors import UserError
from elastic3d.evaluation.html import load_frontier
from elastic3d.pipelines.image_to_3d import ImageTo3DPipeline
from elastic3d.studies.dial import SHAPE
from elastic3d.utils.files import load_json
from tests.benchmark.conftest import config_of

WANTED = {
    "method", "budget", "steps", "batch", "executed_flops_ratio", "dit_ms_median", "dit_ms_q25", "dit_ms_q75",
    "dit_speedup", "end_to_end_speedup", "chamfer_l1_paired", "chamfer_l1_seed_floor", "f_score@0.02",
    "f_score@0.05", "iou_paired", "flop_speedup", "efficiency", "share_std",
}  # fmt: skip


@pytest.fixture(scope="module")
def done(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Every method and three variants."""
    output = tmp_path_factory.mktemp("benchmark")
    pipeline = ImageTo3DPipeline.from_pretrained(world / "model", "cpu", "float32")
    save_routers(pipeline.dit, world / "routers")
    assert session_of(pipeline.dit)
    variants = {
        "no_mesh": str(world / "routers"),
        "finetuned": str(world / "model/dit"),
        "whole": str(world / "model"),
    }
    cache = BlockCacheConfig(rule=CacheRule.band, band=0.2)
    options = {"variants": variants, "cache": cache, "calibration": world / "images", "batch_size": 4}
    config = config_of(world, output, **options)
    return output, benchmark(config, "python scripts/benchmark.py")


def row_of(results: dict[str, Any], method: str, **fields: Any) -> dict[str, Any]:
    [row] = [
        row
        for row in results["rows"]
        if row["method"] == method and row["batch"] == 1 and all(row[k] == v for k, v in fields.items())
    ]
    return row


def test_every_method_is_a_row_with_every_number(done):
    output, results = done
    assert json.loads((output / "results.json").read_text()) == json.loads(json.dumps(results))
    rows = results["rows"]
    # alone, there is nobody to share with; these routers have no few-step LoRA; ablations are asked for by name
    absent = (Method.elastic_shared, Method.few_step_lora, *ON_REQUEST)
    methods = {*Method.__members__} - {method.name for method in absent}
    assert {row["method"] for row in rows} == {*methods, "no_mesh", "finetuned", "whole", "forecast"}
    euler, own = (row_of(results, method, steps=2) for method in ("euler_steps", "fewer_steps"))
    assert euler["run"] != own["run"] and euler["chamfer_l1_paired"] != own["chamfer_l1_paired"]
    assert "euler_steps" in results["summary"]["frontiers"]["1"]
    for row in rows:
        assert set(row) >= WANTED
        absent = {name for name in WANTED if row[name] is None} - {
            "budget",
            "iou_paired",
            "end_to_end_speedup",
        }
        assert not absent, row
        assert row["meshes"] == 4 and row["failed"] == 0 and row["rounds"] == 1
        assert row["dit_ms_q25"] <= row["dit_ms_median"] <= row["dit_ms_q75"]
    assert load_frontier(output / "results.json") == rows
    assert load_json(output / "results.json", SHAPE)["about"]["images"] == 2  # what a dial is made of
    with (output / "results.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    for name in ("pareto", "blocks", "sheet"):
        with Image.open(output / f"{name}.png") as image:
            assert image.width > 100 and len(image.getcolors(1 << 20)) > 2
    machine = results["about"]["machine"]
    assert machine["torch"] and machine["processor"] and machine["threads"] >= 1


def test_dense_rows_are_what_they_must_be(done):
    _, results = done
    dense = row_of(results, "dense")
    assert dense["steps"] == 3 and dense["dit_speedup"] == 1 and dense["executed_flops_ratio"] == 1
    assert (
        dense["efficiency"] == 1 and dense["chamfer_l1_same_steps"] == 0 and dense["f_score@0.02_drop"] == 0
    )
    assert dense["chamfer_l1_paired"] > 0 and dense["chamfer_l1_seed_floor"] > 0
    reference = row_of(results, "fewer_steps", steps=4)
    assert reference["chamfer_l1_paired"] == 0 and reference["iou_paired"] == 1
    assert reference["flops_ratio_to_baseline"] == pytest.approx(4 / 3)
    assert (
        row_of(results, "finetuned")["chamfer_l1_paired"] == dense["chamfer_l1_paired"]
    )  # the same weights here


def test_routers_and_controls_execute_what_they_should(done):
    _, results = done
    routers = row_of(results, "elastic", budget=0.5)
    assert 0 < routers["executed_flops_ratio"] < 1 and routers["router_flops_ratio"] > 0
    for control in ("random", "static", "timestep", "shuffled"):
        row = row_of(results, control, budget=0.5)
        assert row["executed_flops_ratio"] == pytest.approx(routers["executed_flops_ratio"], abs=0.2), control
    assert row_of(results, "static")["share_std"] == 0
    cached = row_of(results, "dense_cache", note="every 2 steps, damping 1")
    assert cached["budget"] is None
    assert cached["executed_flops_ratio"] == pytest.approx(2 / 3)  # of three steps the second is forecast
    forecast = row_of(results, "forecast", note="by dmd, interval 2, warmup 1")
    assert forecast["executed_flops_ratio"] == pytest.approx(2 / 3, abs=1e-3) and forecast["share_std"] == 0
    # with as short a history both go on with what was added last
    assert forecast["chamfer_l1_paired"] == pytest.approx(cached["chamfer_l1_paired"], rel=1e-3)
    # routers of the same weights make the same meshes
    for variant in ("no_mesh", "whole"):
        assert row_of(results, variant, budget=0.5)["chamfer_l1_paired"] == pytest.approx(
            row_of(results, "elastic", budget=0.5)["chamfer_l1_paired"]
        )


def test_the_summary_answers_every_question(done):
    _, results = done
    summary = results["summary"]
    assert set(summary["frontiers"]) == {"1"}
    front = summary["frontiers"]["1"]["fewer_steps"]["chamfer_l1_paired"]
    assert front["front"] and front["other"] and all(loss > 0 for _, loss in front["other"])
    answers = {name.split(":")[0]: target["met"] for name, target in summary["targets"].items()}
    assert answers["speed"] is not None and {"efficiency", "budgets"} < set(answers)
    rivals = {c["rival_method"] for c in results["comparisons"]}
    assert rivals >= {"random", "static", "timestep", "shuffled", "no_mesh"}
    assert {c["matched"] for c in results["comparisons"]} >= {"equal FLOPs", "equal budget"}


def test_a_second_run_makes_nothing_again(done, world, monkeypatch):
    output, results = done

    def never(*arguments: Any, **named: Any) -> None:
        raise AssertionError("this was made already")

    monkeypatch.setattr(MeshTask, "produce", never)
    monkeypatch.setattr(MeshTask, "sample", never)
    monkeypatch.setattr(meshes, "score_all", _from_journal_only)
    cache = BlockCacheConfig(rule=CacheRule.band, band=0.2)
    config = config_of(
        world,
        output,
        cache=cache,
        calibration=world / "images",
        phases=[Phase.quality],
        methods=[Method.elastic, Method.static],
        caches=[],
    )
    again = benchmark(config)
    row, before = row_of(again, "static"), row_of(results, "static")
    assert (
        row["chamfer_l1_paired"] == before["chamfer_l1_paired"]
        and row["f_score@0.02"] == before["f_score@0.02"]
    )
    assert row["dit_ms_median"] is None
    assert all(
        t["met"] is None for name, t in again["summary"]["targets"].items() if name.startswith("speed")
    )


def _from_journal_only(items: Any, protocol: Any, **options: Any) -> Any:
    from elastic3d.evaluation.runner import score_all

    def never(*arguments: Any) -> Any:
        raise AssertionError("this was scored already")

    return score_all(items, protocol, **options, score=never)


def test_an_interrupted_run_goes_on(world, tmp_path, monkeypatch):
    config = config_of(world, tmp_path, methods=[Method.dense, Method.fewer_steps], seeds=[0], batches=[1, 2],
                       repeats=2, end_to_end_repeats=1, caches=[])  # fmt: skip
    made: list[int] = []
    real = MeshTask.produced

    def counted(self: Any, run: Any, jobs: Any, *rest: Any) -> Any:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(len(jobs))
        return real(self, run, jobs, *rest)

    monkeypatch.setattr(MeshTask, "produced", counted)
    with pytest.raises(KeyboardInterrupt):
        benchmark(config)
    assert len(list(tmp_path.rglob("seed-0/*.glb"))) == 4 and not list(tmp_path.rglob("*.tmp*"))
    monkeypatch.setattr(
        MeshTask, "produced", lambda t, r, jobs, *rest: made.append(len(jobs)) or real(t, r, jobs, *rest)
    )
    rounds: list[Any] = []
    real_round = running._round

    def interrupted(task: Any, runs: Any, what: str, batch: int, number: int, bar: Any) -> Any:
        if bar is not None:
            rounds.append((what, batch, number))
        if len(rounds) == 3:
            raise KeyboardInterrupt
        return real_round(task, runs, what, batch, number, bar)

    monkeypatch.setattr(running, "_round", interrupted)
    with pytest.raises(KeyboardInterrupt):
        benchmark(config)
    assert sum(made) == 3 * 2  # three runs of two images, each once
    rounds.clear()
    monkeypatch.setattr(
        running, "_round", lambda *a: (rounds.append(a[2:5]) if a[5] is not None else None) or real_round(*a)
    )
    results = benchmark(config)
    assert rounds == [("end_to_end", 1, 0), ("dit", 2, 0), ("dit", 2, 1), ("end_to_end", 2, 0)]
    assert all(row["rounds"] == 2 and row["end_to_end_speedup"] > 0 for row in results["rows"])
    assert row_of(results, "dense")["end_to_end_speedup"] == 1 and (tmp_path / "pareto-batch-2.png").is_file()
    assert row_of(results, "dense")["chamfer_l1_seed_floor"] is None  # one seed only
    [speed] = [t for name, t in results["summary"]["targets"].items() if name.startswith("speed")]
    assert speed["met"] is None


def test_failed_meshes_count_against_the_method(world, tmp_path, monkeypatch):
    real = MeshTask.produce

    def broken(self: Any, run: Any, jobs: Any, *rest: Any) -> Any:
        results = real(self, run, jobs, *rest)
        if run.steps == 2:
            results[0].error, results[0]._mesh = UserError("no surface"), None
        return results

    monkeypatch.setattr(MeshTask, "produce", broken)
    config = config_of(
        world,
        tmp_path,
        methods=[Method.dense, Method.fewer_steps],
        seeds=[0],
        phases=[Phase.quality],
        caches=[],
    )
    results = benchmark(config)
    row = row_of(results, "fewer_steps", steps=2)
    assert row["failed"] == 1 and row["meshes"] == 2
    assert row["chamfer_l1_paired"] > 0.3 and row["f_score@0.05"] < row_of(results, "dense")["f_score@0.05"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": Path("nowhere")}, "nowhere is no folder"),
        ({"gt": None, "variants": {"x": "nowhere"}}, "nowhere has neither pipeline.json nor config.json"),
        ({"methods": [Method.shuffled], "limit": 1}, "methods has shuffled, which can't be run: .*only one"),
        ({"dense": "nowhere"}, "there is no folder nowhere"),
    ],
)
def test_what_is_refused(world, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        benchmark(config_of(world, tmp_path, **changes))


def test_images_need_their_ground_truth(world, tmp_path):
    (tmp_path / "gt").mkdir()
    (world / "gt" / "a.ply").rename(tmp_path / "gt" / "a.ply")
    try:
        with pytest.raises(UserError, match="has 0 meshes named b, expected one"):
            benchmark(config_of(world, tmp_path, gt=tmp_path / "gt"))
    finally:
        (tmp_path / "gt" / "a.ply").rename(world / "gt" / "a.ply")


@pytest.mark.parametrize(
    ("changes", "timed"),
    [
        # of three steps of the baseline and four of the reference
        ({"methods": [Method.dense, Method.elastic], "elastic_steps": [3, 4]}, {3, 4}),
        ({"methods": [Method.elastic], "elastic_steps": [2]}, {2, 3}),
    ],
)
def test_every_row_has_its_dense_times(world, tmp_path, changes, timed):
    """Speed-ups are over the baseline and over the dense model in as many steps, whatever the methods are."""
    results = benchmark(config_of(world, tmp_path, limit=1, seeds=[0], gt=None, caches=[], **changes))
    assert all(row["dit_speedup"] and row["dit_speedup_same_steps"] for row in results["rows"])
    [measured] = [done["runs"] for done in load_json(tmp_path / "timing.json")["rounds"]]
    assert {int(name.split("-s")[1][0]) for name in measured} == timed


def test_without_routers_only_the_dense_model_is_measured(world, tmp_path):
    import shutil

    shutil.copytree(world / "model", tmp_path / "plain")
    shutil.rmtree(tmp_path / "plain" / "routers")
    config = config_of(
        world,
        tmp_path / "out",
        model=str(tmp_path / "plain"),
        gt=None,
        seeds=[0],
        limit=1,
        phases=[Phase.quality],
        caches=[],
    )
    results = benchmark(config)
    assert {row["method"] for row in results["rows"]} == {
        "dense",
        "fewer_steps",
        "euler_steps",
        "training_free",
    }
    assert all(row["f_score@0.02"] is None for row in results["rows"])
    config.methods = [Method.elastic]
    with pytest.raises(UserError, match="methods has elastic, which can't be run: .* has no routers"):
        benchmark(config)


def test_shared_routes_are_a_row_of_batches_alone_and_count_for_no_budget(world, tmp_path):
    config = config_of(world, tmp_path, methods=[Method.dense, Method.elastic, Method.elastic_shared], seeds=[0],
                       batches=[1, 2], end_to_end_repeats=0, caches=[])  # fmt: skip
    rows = benchmark(config)["rows"]
    shared = [row for row in rows if row["method"] == "elastic_shared"]
    assert {row["batch"] for row in shared} == {2} and not any(row["as_trained"] for row in shared)
    assert {row["batch"] for row in rows if row["method"] == "elastic"} == {1, 2}
    assert all(row["rounds"] == 1 and row["chamfer_l1_paired"] is not None for row in shared)
