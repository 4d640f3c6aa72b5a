"""The dial: what a budget or a quality becomes, what a file may hold, and what the pipeline then runs and records."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_dial import ROUTERS, load, row, save_dialled, values
from tiny_pipeline import image, tiny_pipeline

from elastic3d.diffusion.dial import F_SCORES, choose, load_dial, parse_dial, resolution_of, save_dial
from elastic3d.diffusion.options import PipelineConfig, Quality, SamplingGrid
from elastic3d.elastic import attach
from elastic3d.elastic.config import ElasticOptions, RouterConfig, RouterCurves
from elastic3d.elastic.training_free import Calibration
from elastic3d.errors import UserError
from elastic3d.pipelines.call import Result
from elastic3d.pipelines.image_to_3d import ImageTo3DPipeline
from elastic3d.pipelines.training_free import describe, save_calibration, series_of
from elastic3d.utils.files import save_json
from elastic3d.utils.options import checked

DIAL = parse_dial(values(), "dial.json")


def chosen(
    steps: int | None = None, quality: Any = None, guidance: float | None = None, **requested: Any
) -> int | None:
    quality = checked("quality", quality, Quality | None)  # as the pipeline does
    found = choose(DIAL, ElasticOptions(**requested), steps, quality, guidance)
    return None if found is None else DIAL.rows.index(found)


def test_a_budget_buys_the_best_row_that_it_pays_for() -> None:
    budgets = [0.17, 0.3, 0.66, 0.67, 0.99, 1, 1.0]
    found = [chosen(budget=budget) for budget in budgets]
    for budget, index in zip(budgets, found, strict=True):
        slow = max((r.fidelity, i) for i, r in enumerate(DIAL.rows) if r.cost <= budget)[1]
        assert index == slow
    speeds = [DIAL.rows[index].speedup["1"] for index in found if index is not None]
    assert speeds == sorted(speeds, reverse=True) and len(set(speeds)) == 3


def test_routers_of_whole_steps_keep_every_budget_between_their_rows() -> None:
    rows = [
        row(0.1, 2, 1.0, True, 6.0, 0.6, 0.5),
        row(0.2, 2, None, False, 5.0, 0.7, 0.5),
        row(0.3, 3, 0.28, False, 4.0, 0.8, 0.5),
        row(0.5, 3, 0.48, False, 3.0, 0.9, 0.5),
        row(1.0, 3, None, False, 1.0, 1.0, 0.5),
    ]
    dial = parse_dial(values() | {"rows": rows, "names": {"fast": 0.1, "default": 0.1, "best": 1.0}}, "d")
    wanted = {
        0.15: (0.1, 2, 1.0),  # the few-step LoRA runs every block, and a dense step is a whole one
        0.25: (0.2, 2, None),
        0.3: (0.3, 3, 0.28),
        0.4: (0.4, 3, 0.38),
        0.5: (0.5, 3, 0.48),
        0.75: (0.75, 3, 0.74),  # the dense model executes all
        1.0: (1.0, 3, None),
    }
    for budget, (cost, steps, of_routers) in wanted.items():
        found = choose(dial, ElasticOptions(budget=budget), None, None, None)
        assert found is not None and (found.cost, found.steps) == (cost, steps)
        assert found.router_budget == (None if of_routers is None else pytest.approx(of_routers))
        if (
            of_routers is not None and cost > 0.2
        ):  # an option of the routers rules out the dense row, not its budget
            assert choose(dial, ElasticOptions(budget=budget, shared=True), None, None, None) == found
    found = choose(dial, ElasticOptions(budget=1.0, shared=True), None, None, None)
    assert found is not None and found.router_budget == pytest.approx(1.0)
    plan = {**rows[2], "planned": True}
    dial = parse_dial({**dial.values, "rows": [*rows[:2], plan, *rows[3:]]}, "d")
    found = choose(dial, ElasticOptions(budget=0.4), None, None, None)
    assert found is not None and found.router_budget == 0.28, "a plan has the budgets that were measured"


def test_names_are_points_of_the_table() -> None:
    assert [chosen(quality=q) for q in Quality] == [0, 1, 2] == [chosen(quality=q.name) for q in Quality]
    assert chosen() == 1, "the default"
    allowed = [r for r in DIAL.rows if min(r.scores) >= 0.99 * 0.5]
    assert DIAL.named(Quality.default) is max(allowed, key=lambda r: r.speedup["1"])


def test_either_f_score_may_lose_one_percent() -> None:
    for name in F_SCORES:
        changed = values()
        changed["rows"][1][name] = 0.4949
        changed["names"]["default"] = 1.0
        assert parse_dial(changed, "x").named(Quality.default).steps == 3
        changed["rows"][1][name], changed["names"]["default"] = 0.4951, 2 / 3
        assert parse_dial(changed, "x").named(Quality.default).steps == 2


def test_steps_and_the_dense_model_leave_the_dial_out() -> None:
    assert chosen(steps=3, budget=0.5) is None and chosen(steps=3) is None
    assert chosen(elastic=False) is None and chosen(elastic=False, budget=1) is None
    assert choose(None, ElasticOptions(budget=0.1), None, None, None) is None


def test_rows_that_a_call_can_not_run_as_measured_are_left_out() -> None:
    assert chosen(quality="fast", guidance=2.0) == 0
    assert (
        chosen(quality="fast", guidance=3.0) == chosen(quality="fast", few_step=False, elastic=None) - 1 == 1
    )
    assert chosen(quality="fast", few_step=False) == 2, "neither the LoRA nor the dense model"
    assert chosen(quality="default", width=True, guidance=1.0) == 2, "the last, where none is close enough"
    with pytest.raises(
        UserError, match=r"budget is 0.5, expected at least 0.666667, as these options rule out"
    ):
        chosen(budget=0.5, guidance=3.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.1}, "budget is 0.1, expected at least 0.166667$"),
        ({"budget": 0}, "budget is 0, expected a value above 0 and at most 1"),
        ({"budget": 1.01}, "budget is 1.01, expected"),
        ({"budget": float("nan")}, "budget is nan, expected"),
        ({"budget": "half"}, "budget is 'half', expected a number"),
        ({"quality": "good"}, "quality is 'good', expected one of fast, default, best"),
        ({"quality": 3}, "quality is 3, expected one of"),
        ({"quality": "fast", "budget": 0.5}, "quality is fast and budget is 0.5, expected one of them"),
        ({"quality": Quality.best, "steps": 5}, "quality is best and steps is 5, expected one of them"),
        ({"quality": "best", "elastic": False}, "quality is best, but elastic is false"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        chosen(**options)


def test_a_quality_needs_a_dial() -> None:
    with pytest.raises(
        UserError, match="quality is best, but this model has no dial.json: set budget= or steps="
    ):
        choose(None, ElasticOptions(), None, Quality.best, None)


def _set(*path: Any) -> Callable[[dict[str, Any]], None]:
    *names, last, value = path

    def change(found: Any) -> None:
        for name in names:
            found = found[name]
        found[last] = value

    return change


FAULTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no rows": (_set("rows", []), "rows is empty"),
    "missing": (lambda v: v["rows"][1].pop("iou"), r"rows\[1\] has no 'iou'"),
    "cost above 1": (
        _set("rows", 2, "cost", 1.2),
        r"rows\[2\]: cost is 1.2, expected a number from 0.0001 to 1",
    ),
    "budget": (
        _set("rows", 0, "router_budget", 0.1),
        "router_budget is 0.1, expected a number from 0.3 to 1",
    ),
    "steps": (_set("rows", 0, "steps", 1.5), "steps is 1.5, expected an integer"),
    "same cost": (_set("rows", 1, "cost", 1 / 6), r"rows\[1\]: cost is 0.166667, expected above 0.166667"),
    "falling cost": (lambda v: v["rows"].reverse(), r"rows\[1\]: cost is 0.666667, expected above 1"),
    "worse than cheaper": (_set("rows", 2, "iou", 0.7), r"rows\[2\]: iou is 0.7, expected above 0.8"),
    "cheaper but slower": (
        _set("rows", 0, "speedup", {"1": 1.0, "4": 9.0}),
        "in batches of 1 is 1.4, expected at most 1,",
    ),
    "slower in fours": (
        _set("rows", 0, "speedup", {"1": 9.0, "4": 1.0}),
        "in batches of 4 is 1.4, expected at most 1,",
    ),
    "batches": (_set("rows", 1, "speedup", {"1": 1.4}), r"rows\[1\]: speedup has batches of 1, expected"),
    "no batch of 1": (
        _set("rows", 0, "speedup", {"4": 1.4}),
        r"rows\[0\]: speedup has batches of 4, expected 1",
    ),
    "dense with LoRA": (_set("rows", 1, "few_step_lora", True), "expected false for the dense model"),
    "another default": (_set("names", "default", 1.0), "names: default is 1, expected 0.666667"),
    "no default": (
        lambda v: [r.update({"f_score@0.05": 0.1}) for r in v["rows"]],
        "no row has f_score@0.02 and f_score@0.05 within 1 %",
    ),
    "other steps": (_set("dense", "steps", 4), "dense: steps is 4, expected 3, the model's default"),
    "other guidance": (_set("dense", "guidance", 3.0), "dense: guidance is 3, expected 2"),
    "LoRA not covering": (
        _set("rows", 2, "few_step_lora", True),
        r"rows\[2\]: few_step_lora is true, but 3 steps run without",
    ),
    "planned without a calibration": (
        _set("rows", 1, row(2 / 3, 3, 2 / 3, False, 1.4, 0.8, 0.496) | {"planned": True}),
        r"rows\[1\]: planned is true, but there is no training_free.json here",
    ),
    "planned is no bool": (_set("rows", 0, "planned", 1), r"rows\[0\]: planned is 1, expected true or false"),
    "planned with LoRA": (
        _set("rows", 0, "planned", True),
        r"rows\[0\]: few_step_lora is true, expected false",
    ),
    "planned dense": (
        _set("rows", 1, "planned", True),
        r"rows\[1\]: planned is true, but router_budget is null",
    ),
    "other scope": (
        _set("rows", 2, "scope", "step"),
        r"rows\[2\]: scope is 'step', expected block, that of this model's routers",
    ),
    "LoRA unsaid": (
        _set("rows", 0, "few_step_lora", False),
        r"rows\[0\]: few_step_lora is false, but 1 steps run with",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dialled(tmp_path_factory.mktemp("dial") / "model")


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> ImageTo3DPipeline:
    return load(folder)


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_file_is_named_in_one_sentence(
    pipeline: ImageTo3DPipeline, tmp_path: Path, name: str
) -> None:
    change, message = FAULTS[name]
    found = copy.deepcopy(values())
    change(found)
    (tmp_path / "dial.json").write_text(json.dumps(found))
    assert pipeline.session is not None
    with pytest.raises(UserError, match=message) as error:
        load_dial(tmp_path, pipeline.config, pipeline.session.router_config)
    assert str(error.value).startswith(str(tmp_path / "dial.json")) and "\n" not in str(error.value)


def test_a_dial_may_name_per_block_routers_within_the_steps_of_their_lora(tmp_path: Path) -> None:
    routers = RouterConfig(few_step_rank=2, few_step_nfe=4.0, few_step_max_steps=4, trained_steps=[2, 4])
    found = values()
    found["rows"][0] |= {"steps": 2, "router_budget": 0.5, "scope": "block"}
    found["rows"][2] |= {"few_step_lora": True, "scope": "block"}
    model, path = PipelineConfig(steps=3, guidance=2.0), tmp_path / "dial.json"
    path.write_text(json.dumps(found))
    dial = load_dial(tmp_path, model, routers)
    assert dial is not None and dial.rows[0].scope == "block" and dial.rows[1].scope is None
    found["rows"][0]["steps"] = 1
    path.write_text(json.dumps(found))
    with pytest.raises(UserError, match=r"rows\[0\]: steps is 1, expected 2 to 4, for which these per-block"):
        load_dial(tmp_path, model, routers)
    routers.curves = RouterCurves(requested_budgets=[0.6, 1.0], calibrated_budgets=[0.6, 1.0])
    found["rows"][0]["steps"] = 2
    path.write_text(json.dumps(found))
    message = (
        r"rows\[0\]: budget is 0.5, expected 0.6 to 1, for which these per-block routers were calibrated in 2"
    )
    with pytest.raises(UserError, match=message):
        load_dial(tmp_path, model, routers)
    for scope in ("step", None):  # None: of bundled models' dials, which name none
        found["rows"][0] |= {"steps": 2, "scope": scope}
        path.write_text(json.dumps(found))
        message = rf"rows\[0\]: scope is {scope!r}, expected block, that of this model's"
        with pytest.raises(UserError, match=message):
            load_dial(tmp_path, model, routers)


@pytest.mark.parametrize("grid", [SamplingGrid.endpoint, SamplingGrid.late_start])
def test_a_row_is_accepted_where_its_generation_is(tmp_path: Path, grid: SamplingGrid) -> None:
    """In these grids N steps are N - 1 moves, which is what routers and LoRA were trained for."""
    pipeline = tiny_pipeline()
    pipeline.config = replace(pipeline.config, grid=grid)
    routers = RouterConfig(few_step_rank=2, few_step_nfe=3.0, few_step_max_steps=3, trained_steps=[2, 3])
    attach(pipeline.dit, routers)
    for steps in range(2, 7):
        found = values()
        found["rows"][1:] = [row(2 / 3, steps, 0.5, True, 1.4, 0.8, 0.5) | {"scope": "block"}]
        found["rows"][0] = row(1 / 6, 2, None, False, 5.5, 0.6, 0.4)
        found["names"] |= {"default": 2 / 3, "best": 2 / 3}
        save_json(found, tmp_path / "dial.json")
        if steps in (3, 4):
            assert load_dial(tmp_path, pipeline.config, routers) is not None
            metadata = made(pipeline, steps=steps, budget=0.5).metadata
            assert metadata["updated"] and len(metadata["routes"]["actions"]) == steps - 1
            continue
        message = f"steps is {steps}, expected 3 to 4, for which these per-block routers were trained"
        with pytest.raises(UserError, match=rf"rows\[1\]: {message}"):
            load_dial(tmp_path, pipeline.config, routers)
        with pytest.raises(UserError, match=f"^{message}"):
            made(pipeline, steps=steps, budget=0.5)


def test_the_lora_and_the_plan_of_a_row_count_moves(tmp_path: Path) -> None:
    model, found = PipelineConfig(steps=3, guidance=2.0, grid=SamplingGrid.endpoint), values()
    found["rows"][0]["steps"] = 2  # one move, as many as the LoRA is used in
    save_json(found, tmp_path / "dial.json")
    assert load_dial(tmp_path, model, ROUTERS) is not None
    (tmp_path / "training_free.json").write_text("{}")
    found["rows"][1] = row(2 / 3, 3, 2 / 3, False, 1.4, 0.8, 0.496) | {"planned": True}
    save_json(found, tmp_path / "dial.json")
    with pytest.raises(UserError, match=r"rows\[1\]: router_budget is 0.666667, expected at least 0.75"):
        load_dial(tmp_path, model, ROUTERS)
    pipeline = tiny_pipeline()
    pipeline.config = model
    with pytest.raises(UserError, match="budget is 0.7, expected at least 0.75 in 3 steps"):
        made(pipeline, steps=3, budget=0.7)


def test_a_dial_of_routers_needs_routers(tmp_path: Path) -> None:
    (tmp_path / "dial.json").write_text(json.dumps(values()))
    model = PipelineConfig(steps=3, guidance=2.0)
    with pytest.raises(
        UserError, match=r"dial.json: rows\[0\]: router_budget is 1, but this model has no routers"
    ):
        load_dial(tmp_path, model, None)
    plain = values()
    plain["rows"] = [row(1 / 3, 1, None, False, 3, 0.5, 0.5), row(1.0, 3, None, False, 1, 0.9, 0.5)]
    plain["names"] = {"fast": 1 / 3, "default": 1 / 3, "best": 1.0}
    (tmp_path / "dial.json").write_text(json.dumps(plain))
    assert load_dial(tmp_path, model, None) is not None, "fewer dense steps are a dial too"


# ------------------------------------------------------------------------------------------------ in a pipeline


def made(pipeline: ImageTo3DPipeline, **options: Any) -> Result:
    return pipeline(image(), seed=3, resolution=8, **options)


def test_executed_over_dense_is_what_the_dial_says(pipeline: ImageTo3DPipeline) -> None:
    wholes = set()
    for quality, found in zip(Quality, DIAL.rows, strict=True):
        metadata = made(pipeline, quality=quality.name).metadata
        wholes.add(metadata["flops_dense"])
        assert metadata["flops_executed"] / metadata["flops_dense"] == pytest.approx(found.cost)
        assert metadata["steps"] == found.steps and metadata["budget"] == 1.0
        assert metadata["dial"] == {"requested": quality.name, "cost": found.cost}
        assert metadata.get("updated", False) is found.few_step_lora
    by_steps = made(pipeline, steps=2, budget=1.0).metadata
    dense = made(pipeline, elastic=False).metadata
    assert wholes == {by_steps["flops_dense"]} == {dense["flops_dense"]} == {dense["flops_executed"]}
    assert by_steps["flops_executed"] / by_steps["flops_dense"] == pytest.approx(2 / 3)
    assert "dial" not in by_steps and "dial" not in dense
    assert made(pipeline, budget=0.2).metadata["dial"] == {"requested": 0.2, "cost": 1 / 6}
    assert made(pipeline).metadata["dial"]["requested"] == "default"


def test_steps_override_with_todays_meaning_of_a_budget(pipeline: ImageTo3DPipeline, folder: Path) -> None:
    plain = load(folder, dial=False)
    assert plain.dial is None
    for options in (
        {"steps": 1, "budget": 1.0},
        {"steps": 3, "budget": 0.5},
        {"steps": 2},
        {"elastic": False},
    ):
        found, expected = made(pipeline, **options), made(plain, **options)
        assert torch.equal(found.latents, expected.latents)
        whole = {"flops_dense", "ms"}
        assert {k: v for k, v in found.metadata.items() if k not in whole} == {
            k: v for k, v in expected.metadata.items() if k not in whole
        }
    assert torch.equal(made(pipeline, quality="fast").latents, made(plain, steps=1, budget=1.0).latents)
    with pytest.raises(UserError, match="budget is 0.2, expected a value from 0.3 to 1"):
        made(pipeline, steps=3, budget=0.2)
    with pytest.raises(UserError, match="budget is 0.2, expected a value from 0.3 to 1"):
        made(plain, budget=0.2)


def test_few_steps_run_every_block_by_default(folder: Path) -> None:
    """Where the few-step LoRA covers them; a budget, and `few_step=False`, are followed."""
    pipeline = load(folder, dial=False)
    pipeline.config.elastic = replace(pipeline.config.elastic, budget=0.5)
    wanted = {
        1.0: [{"steps": 1}, {"steps": 1, "width": False}, {"steps": 1, "guidance": 2.0}],
        0.5: [{"steps": 1, "few_step": False}, {"steps": 2}, {}, {"steps": 1, "guidance": 3.0}],
        0.7: [{"steps": 1, "budget": 0.7}],
    }
    for budget, calls in wanted.items():
        for options in calls:
            given = {name: options.pop(name) for name in ("steps", "guidance") if name in options}
            _, config, _ = pipeline.configured(ElasticOptions(**options), **given)
            assert config.elastic.budget == budget, (given, options)
    pipeline.config.elastic = replace(pipeline.config.elastic, few_step=False)
    assert pipeline.configured(ElasticOptions(), steps=1)[1].elastic.budget == 0.5
    assert made(pipeline, steps=1, few_step=True).metadata["budget"] == 1.0


def test_a_sample_is_the_same_in_a_batch(pipeline: ImageTo3DPipeline) -> None:
    batch = pipeline([image("navy"), image()], seed=[1, 3], resolution=8, budget=0.2)
    alone = made(pipeline, budget=0.2)
    assert torch.allclose(batch[1].latents, alone.latents, atol=1e-5)
    assert batch[1].metadata["flops_executed"] == alone.metadata["flops_executed"]


def test_an_ensemble_costs_its_rows(pipeline: ImageTo3DPipeline) -> None:
    """Executed FLOPs are those of all generations, over those of one dense one."""
    plain, found = made(pipeline, budget=0.2).metadata, made(pipeline, budget=0.2, ensemble=3).metadata
    assert found["flops_executed"] == 3 * plain["flops_executed"]
    assert found["flops_dense"] == plain["flops_dense"] and found["routes"] == plain["routes"]


def test_a_dial_is_saved_with_its_model_and_goes_with_it(pipeline: ImageTo3DPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "copy")
    again = load(tmp_path / "copy")
    assert again.dial == pipeline.dial
    load(tmp_path / "copy", dial=False).save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy/dial.json").exists(), "it may have been measured with other weights"
    save_dial(None, tmp_path / "nowhere")


def test_a_planned_row_runs_as_a_model_without_routers_does(tmp_path: Path) -> None:
    folder, found = save_dialled(tmp_path / "model"), values()
    found["rows"][1] = row(2 / 3, 3, 2 / 3, False, 1.4, 0.8, 0.496) | {"planned": True}
    save_json(found, folder / "dial.json")
    dit = load(folder, routers=False).dit
    moment = np.eye(3) + 1
    about = {"model": describe(dit), "samples": 1}
    calibration = Calibration(
        np.arange(3) / 3, dict.fromkeys(series_of(dit), moment), moment, np.ones(3), about
    )
    save_calibration(calibration, folder / "training_free.json")

    pipeline, plain = load(folder), load(folder, routers=False)
    keys = set(pipeline.dit.state_dict())
    mixed = [made(pipeline, quality=name) for name in ("fast", "default", "best", "default", "fast")]
    alone = made(plain, steps=3, budget=2 / 3)
    for result in (mixed[1], mixed[3]):
        assert torch.equal(result.latents, alone.latents), "no trace of what ran before"
        for name in ("flops_executed", "flops_dense", "routes", "policy", "budget"):
            assert result.metadata[name] == alone.metadata[name]
        assert result.metadata["weights_sha256"] == pipeline.weights_sha256
        assert result.metadata["dial"] == {"requested": "default", "cost": 2 / 3}
    assert torch.equal(mixed[0].latents, mixed[4].latents) and "policy" not in mixed[2].metadata
    assert not torch.equal(mixed[0].latents, mixed[1].latents)
    assert set(pipeline.dit.state_dict()) == keys
    twin = pipeline._without_routers().dit
    assert all(a is b for a, b in zip(twin.parameters(), pipeline.dit.parameters(), strict=True))

    assert pipeline.dial is not None
    assert choose(pipeline.dial, ElasticOptions(width=False), None, None, None) is pipeline.dial.rows[2]
    pipeline.save_pretrained(tmp_path / "copy")
    assert torch.equal(made(load(tmp_path / "copy")).latents, alone.latents)


def test_a_quality_brings_its_resolution(tmp_path: Path) -> None:
    save_dialled(tmp_path)
    pipeline = load(tmp_path)
    pipeline.config.fast_resolution, pipeline.config.best_resolution = 8, 24
    found = {
        quality: pipeline(image(), quality=quality).metadata["resolution"] for quality in (None, *Quality)
    }
    usual = pipeline.config.resolution
    assert found == {None: usual, Quality.fast: 8, Quality.default: usual, Quality.best: 24}
    assert pipeline(image(), quality="best", resolution=12).metadata["resolution"] == 12
    pipeline.config.best_resolution = 0
    assert resolution_of(pipeline.config, Quality.best) == usual
    with pytest.raises(ValueError, match="fast_resolution is 4, expected 0 or 8 to 512"):
        PipelineConfig(fast_resolution=4)
