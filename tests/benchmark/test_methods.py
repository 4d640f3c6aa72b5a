"""The registry: which runs the methods ask for."""

from __future__ import annotations

import shutil
from dataclasses import replace
from enum import Enum

import pytest
import torch
from _cli import parse

from elastic3d import __version__
from elastic3d.benchmark.config import (
    ForecastName,
    ImageBenchmarkConfig,
    MeshBenchmarkConfig,
    Method,
    Phase,
)
from elastic3d.benchmark.meshes import MeshTask, load_models
from elastic3d.benchmark.methods import (
    MAIN,
    NO_CACHE,
    ON_REQUEST,
    Job,
    Planner,
    Routes,
    needed_runs,
)
from elastic3d.benchmark.methods import plan as plan_of
from elastic3d.benchmark.report import build_rows, route_panels
from elastic3d.benchmark.rivals import grid, rival_cases
from elastic3d.benchmark.run import benchmark, timed_rounds
from elastic3d.benchmark.task import Scores
from elastic3d.diffusion.options import SamplingGrid
from elastic3d.elastic import attach, detach, save_routers
from elastic3d.elastic.config import Branches, CacheRule, RouterConfig, RouterCurves, Scope
from elastic3d.errors import UserError
from elastic3d.pipelines.image_to_3d import ImageTo3DPipeline
from elastic3d.utils.devices import DeviceChoice
from elastic3d.utils.files import load_json, save_json
from tests.benchmark.conftest import config_of

CLI = ["images=photos", "output=out"]


def plan(config, models, items):
    """The planner and the cases of some models."""
    planner = Planner(config, models)
    return planner, plan_of(planner, items)


def calibrated(world, folder, **changes):
    """The tiny model with routers that forecast, have curves over time, and what `changes` say."""
    pipeline = ImageTo3DPipeline.from_pretrained(world / "model", "cpu", "float32")
    detach(pipeline.dit)
    curves = RouterCurves(
        times=[0.0, 1.0], gate_bias=[4.0, -4.0], damping_times=[0.0, 1.0], dampings=[0.5, 0.9]
    )
    torch.manual_seed(0)
    attach(pipeline.dit, RouterConfig(**dict(longest=2, head_std=3.0, curves=curves) | changes))
    pipeline.save_pretrained(folder)
    return folder


def test_methods_that_ask_for_the_same_share_a_run(world, tmp_path):
    config = config_of(world, tmp_path, budgets=[1.0, 0.5], elastic_steps=[2, 3])
    models = load_models(config)
    planner, cases = plan(config, models, items=2)
    by_method = {m: [c for c in cases if c.method == m.value] for m in Method}
    assert [(c.run.steps, c.budget) for c in by_method[Method.elastic]] == [
        (2, 1.0),
        (2, 0.5),
        (3, 1.0),
        (3, 0.5),
    ]
    assert [c.run.steps for c in by_method[Method.fewer_steps]] == [2, 4] and by_method[Method.dense][
        0
    ].run.steps == 3
    [control] = by_method[Method.random]  # none at budget 1
    assert control.run.donor == by_method[Method.elastic][3].run and control.run.routes is Routes.random
    runs = needed_runs(planner, cases)
    names = [run.name for run in runs]
    assert len(set(names)) == len(names) and names.index(control.run.donor.name) < names.index(
        control.run.name
    )
    assert planner.reference in runs and all(planner.dense(steps) in runs for steps in (2, 3, 4))
    again = plan(config_of(world, tmp_path, resolution=9), models, 2)[1]
    assert not {case.run for case in again} & set(runs)  # other options, other meshes


def test_controls_have_the_cache_of_the_routers_and_fixed_intervals_their_damping(world, tmp_path):
    config = config_of(world, tmp_path, model=str(calibrated(world, tmp_path / "model")), dampings=[0.0, 1.0])
    models = load_models(config)
    _, cases = plan(config, models, items=2)
    own = models[MAIN].session.router_config.cache()
    assert {c.method for c in cases} >= {"elastic", "random", "static", "timestep", "shuffled", "dense_cache"}
    for case in cases:
        if case.method in ("elastic", "random", "shuffled"):
            assert case.run.settings.cache == own
    notes = [case.note for case in cases if case.method == "dense_cache"]
    assert notes[:3] == [
        "every 2 steps, damping 0",
        "every 2 steps, damping 1",
        "every 2 steps, calibrated damping",
    ]
    damped = next(case.run.settings.cache for case in cases if case.note == notes[2])
    assert (damped.rule, damped.longest, damped.times, damped.dampings) == (
        CacheRule.age,
        1,
        own.times,
        own.dampings,
    )
    plain = config_of(world, tmp_path)  # whose routers forecast nothing
    assert all("calibrated" not in c.note for c in plan(plain, load_models(plain), 2)[1])


def test_ablations_leave_out_one_thing_and_have_to_be_asked_for(world, tmp_path):
    model = str(calibrated(world, tmp_path / "model"))
    config = config_of(world, tmp_path, model=model)
    models = load_models(config)
    assert not {c.method for c in plan(config, models, 2)[1]} & {m.value for m in ON_REQUEST}
    chosen = [Method.elastic, Method.elastic_no_bias, Method.elastic_no_damping]
    task = MeshTask(config_of(world, tmp_path / "out", model=model, methods=chosen, seeds=[0]))
    cases = plan_of(task.planner, 2)
    runs = {case.method: case.run for case in cases}
    assert len({run.name for run in runs.values()}) == 3
    assert (
        runs["elastic_no_damping"].settings.cache.damping == 1
        and not runs["elastic_no_damping"].settings.cache.dampings
    )
    config_before, found = task.model(runs["elastic"]).session.router_config, {}
    for name, run in runs.items():
        with task.ready(run):
            assert bool(task.model(run).session.router_config.curves.gate_bias) is (name != "elastic_no_bias")
            condition = task.condition_of(run, task.jobs[:1])
            found[name] = task.sample(run, condition, task.jobs[:1])
    assert task.model(runs["elastic"]).session.router_config is config_before
    assert not torch.equal(found["elastic"], found["elastic_no_bias"])
    with pytest.raises(UserError, match="elastic_no_bias, which can't be run: its routers have no gate bias"):
        plain = config_of(world, tmp_path, methods=[Method.elastic_no_bias])
        plan(plain, load_models(plain), 2)


def test_a_linear_forecast_of_the_dense_model_is_dense_cache(world, tmp_path):
    """The wrapper around the plain model and the cache of the routing session give the same latents."""
    model = str(calibrated(world, tmp_path / "model"))
    config = config_of(world, tmp_path, model=model, steps=[8], baseline_steps=8, elastic_steps=[8], intervals=[3],
                       forecasts=[ForecastName.linear])  # fmt: skip
    task = MeshTask(config)
    [cached, _] = [c.run for c in plan_of(task.planner, 2) if c.method == "dense_cache"]
    [rival] = [c.run for c in rival_cases(task.planner)]
    jobs, found = task.jobs[:2], []
    for run in (cached, rival):
        condition = task.condition_of(run, jobs)
        with task.ready(run, task.controls.source(run, jobs)):
            found.append(task.sample(run, condition, jobs))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[0], task.sample(task.planner.dense(8), condition, jobs))


def test_the_few_step_lora_has_rows_where_few_evaluations_are_left(world, tmp_path):
    pipeline = ImageTo3DPipeline.from_pretrained(world / "model", "cpu", "float32")
    detach(pipeline.dit)
    session = attach(pipeline.dit, RouterConfig(longest=2, few_step_rank=2, few_step_nfe=2.5))
    for block in session.blocks:
        for part in block.few_step.parts.values():
            torch.nn.init.normal_(part.up, std=0.3)
    pipeline.save_pretrained(tmp_path / "lora")
    fields = dict(model=str(tmp_path / "lora"), budgets=[1.0, 0.5], elastic_steps=[2, 4, 8], steps=[2, 3, 4])
    named = [Method.few_step_lora, Method.elastic_no_lora, Method.dense_cache, Method.fewer_steps]
    task = MeshTask(config_of(world, tmp_path, methods=named, **fields))
    cases = plan_of(task.planner, 2)
    by_method = {m: [c.run for c in cases if c.method == m.value] for m in Method}
    assert [run.steps for run in by_method[Method.few_step_lora]] == [2]
    plain = [(c.run.steps, c.budget) for c in cases if c.method == Method.elastic_no_lora.value]
    assert plain == [(2, 1.0), (2, 0.5), (4, 0.5)]
    without = (*by_method[Method.elastic_no_lora], *by_method[Method.dense_cache])
    assert not any(run.settings.few_step for run in without)
    job = [Job(world / "images/a.png", 0)]
    [dense] = task.produce(by_method[Method.fewer_steps][0], job)
    for run, same in ((by_method[Method.few_step_lora][0], False), (by_method[Method.dense_cache][0], True)):
        run = replace(run, steps=dense.metadata["steps"], settings=replace(run.settings, cache=NO_CACHE))
        with task.ready(run, task.controls.source(run, job)):
            [result] = task.produce(run, job)
        assert torch.equal(result.latents, dense.latents) is same
    own = task.planner.models[MAIN].session
    task.warm_up(by_method[Method.few_step_lora][0])
    merged = [block.adapted(own.coarseness) for block in own.blocks]
    own.source = task.controls.source(by_method[Method.few_step_lora][0], job)
    with torch.no_grad():
        own.begin(1, 2)
    again = [block.adapted(own.coarseness) for block in own.blocks]
    assert all(found and found is before for found, before in zip(again, merged, strict=True))
    own.source = None
    with pytest.raises(
        UserError, match="few_step_lora, which can't be run: its routers have no few-step LoRA"
    ):
        plain_config = config_of(world, tmp_path, methods=[Method.few_step_lora])
        plan(plain_config, load_models(plain_config), 2)


def test_where_a_step_moves_nothing_moves_are_counted(world, tmp_path):
    """By the LoRA's rule, by the control's table, and by the share of the baseline's FLOPs."""
    pipeline = ImageTo3DPipeline.from_pretrained(world / "model", "cpu", "float32")
    pipeline.config = replace(pipeline.config, grid=SamplingGrid.endpoint)
    detach(pipeline.dit)
    attach(pipeline.dit, RouterConfig(head_std=3.0, few_step_rank=2, few_step_nfe=3, few_step_max_steps=3))
    pipeline.save_pretrained(tmp_path / "model")
    named = [Method.dense, Method.fewer_steps, Method.few_step_lora, Method.random, Method.training_free]
    config = config_of(
        world, tmp_path / "out", model=str(tmp_path / "model"), methods=named, steps=[3, 4, 5], limit=1, seeds=[0],
        baseline_steps=4, reference_steps=5, control_budgets=[0.4, 0.6], caches=[],
    )  # fmt: skip
    task = MeshTask(config)
    cases = plan_of(task.planner, 1)
    assert [c.run.steps for c in cases if c.method == "few_step_lora"] == [3, 4]
    assert [c.budget for c in cases if c.method == "training_free"] == [0.6], (
        "two of three moves, not of four"
    )
    metadata = {}
    for run in {case.run for case in cases if case.method != "training_free"}:
        task.make(run, task.jobs)
        metadata[run.name] = task.record(run, task.jobs[0])["metadata"]
    whole = metadata[task.planner.baseline.name]["flops_dense"]
    rows = [row for row in build_rows(task, cases, Scores(), []) if row["executed_flops_ratio"] is not None]
    assert {row["method"] for row in rows} == {"dense", "fewer_steps", "few_step_lora", "random"}
    for row in rows:
        executed = metadata[row["run"]]["flops_executed"]
        assert row["flops_ratio_to_baseline"] == pytest.approx(executed / whole), row["method"]


def test_a_lora_with_guidance_costs_half_and_fits_its_guidance_alone(world, tmp_path):
    pipeline = ImageTo3DPipeline.from_pretrained(world / "model", "cpu", "float32")
    detach(pipeline.dit)
    attach(pipeline.dit, RouterConfig(few_step_rank=2, few_step_nfe=4, few_step_guidance=3.0))
    pipeline.save_pretrained(tmp_path / "guided")
    fields = dict(
        model=str(tmp_path / "guided"), steps=[2], methods=[Method.few_step_lora], limit=1, seeds=[0]
    )
    task = MeshTask(config_of(world, tmp_path / "meshes", guidance=3.0, **fields))
    [case] = plan_of(task.planner, 1)
    [result] = task.produced(case.run, task.jobs)
    assert result.metadata["updated"] and result.metadata["one_branch"]
    assert 2 * result.metadata["flops_executed"] == result.metadata["flops_dense"]
    session = task.model(case.run).session
    session.router_config = replace(session.router_config, guided_times=[0.2, 0.9])
    task.make(case.run, task.jobs)
    routes = task.record(case.run, task.jobs[0])["metadata"]["routes"]
    assert [len(branches) for branches in routes["actions"]] == [1, 2]
    [(title, drawn)] = route_panels(task, [case])
    assert drawn == routes and title.startswith("few_step_lora, 2 steps, seed 0:")
    other = config_of(world, tmp_path, guidance=2.0, **fields)
    assert plan(other, load_models(other), items=1)[1] == []


def test_the_command_line():
    config = parse(
        MeshBenchmarkConfig,
        "benchmark",
        [*CLI, "model=default", "budgets=[1,.5]", "seeds=[0,1,2]", "methods=[dense,elastic]", "phases=timing",
         "variants={no_mesh: a b/routers, tuned: c}", "cache=paper", "device=cpu", "forecasts=[dmd,linear]"],
    )  # fmt: skip
    assert config.budgets == [1.0, 0.5] and config.methods == [Method.dense, Method.elastic]
    assert config.phases == [Phase.timing] and config.variants == {"no_mesh": "a b/routers", "tuned": "c"}
    assert config.cache.rule is CacheRule.band and config.device is DeviceChoice.cpu
    assert config.protocol.views == 0 and not config.protocol.surface_health
    for wrong, message in (
        ("budgets=[1,0.1]", "budgets has 0.1, expected a value from 0.3"),
        ("budgets=[]", "budgets has 0 values, expected 1 to 1000"),
        ("control_budgets=[0.5,0.5]", "control_budgets is .*no value twice"),
        ("control_budgets=[0.1]", "control_budgets has 0.1, expected a value from 0.3"),
        ("seeds=[1,1]", "seeds is .*no value twice"),
        ("methods=[dens]", "expected a list such as"),
        ("steps=[0]", "steps has 0, expected a value from 1"),
        ("variants={elastic: x}", "variants has 'elastic', expected another name"),
        ("dampings=[2]", "dampings has 2"),
        ("caches=[mag_cache]", "caches has mag_cache, for models of diffusers"),
        ("task=shapes", "task=shapes: expected one of meshes, images"),
    ):
        with pytest.raises(ValueError, match=message):
            parse(MeshBenchmarkConfig, "benchmark", [*CLI, wrong])


def test_controls_and_variants_have_their_own_budgets(world, tmp_path):
    """And steps of their own, by default those of the baseline, whatever steps elastic rows have."""
    pipeline = ImageTo3DPipeline.from_pretrained(world / "model", "cpu", "float32")
    save_routers(pipeline.dit, tmp_path / "routers")
    config = config_of(world, tmp_path, budgets=[1.0, 0.5], elastic_steps=[2, 3], control_budgets=[0.4, 0.3],
                       variants={"other": str(tmp_path / "routers")})  # fmt: skip
    _, cases = plan(config, load_models(config), items=2)
    for method in ("random", "static", "timestep", "shuffled", "other"):
        assert [(c.run.steps, c.budget) for c in cases if c.method == method] == [(3, 0.4), (3, 0.3)]
    assert {c.budget for c in cases if c.method == "elastic"} == {1.0, 0.5}


def test_controls_of_per_block_routers_run_in_the_steps_of_these(world, tmp_path):
    """The baseline's are refused. Static routes are searched with the few-step LoRA that the routers run with."""
    lora = dict(few_step_rank=2, few_step_nfe=4.0, few_step_max_steps=4, trained_steps=[2, 4])
    model = calibrated(world, tmp_path / "model", **lora)
    chosen = [Method.random, Method.static, Method.timestep, Method.shuffled]
    fields = dict(model=str(model), methods=chosen, baseline_steps=5, seeds=[0], calibration_samples=1)
    task = MeshTask(config_of(world, tmp_path / "refused", **fields))
    with pytest.raises(UserError, match="steps is 5, expected 2 to 4, for which these per-block routers"):
        task.controls.source(plan_of(task.planner, 2)[0].run, task.jobs[:1])
    routers = {"other": str(model / "routers")}
    task = MeshTask(config_of(world, tmp_path / "out", control_steps=2, variants=routers, **fields))
    cases, session = plan_of(task.planner, 2), task.planner.models[MAIN].session
    assert [(c.method, c.run.steps) for c in cases] == [
        (name, 2) for name in ("random", "static", "timestep", "shuffled", "other")
    ]
    for case in cases[:-1]:
        with task.ready(case.run, task.controls.source(case.run, task.jobs[:1])):
            condition = task.condition_of(case.run, task.jobs[:1])
            assert task.sample(case.run, condition, task.jobs[:1]).isfinite().all()
    session.coarseness = None
    task.controls._error()(torch.full((len(session.blocks),), 4))
    assert session.coarseness == 1  # log2 of 4 over 2
    ablation = config_of(world, tmp_path, **fields | {"methods": [Method.elastic_no_lora]})
    with pytest.raises(UserError, match="elastic_no_lora, which can't be run: its routers were trained with"):
        plan(ablation, task.planner.models, 2)


def test_per_block_routes_are_timed_on_a_model_whose_routers_decide_once_a_step(world, tmp_path):
    """Beside all blocks with the few-step LoRA; its routers decide nothing."""
    step = dict(scope=Scope.step, branches=Branches.shared, widths=1, few_step_rank=2, few_step_nfe=4.0)
    model = calibrated(world, tmp_path / "model", **step)
    chosen = [Method.dense, Method.few_step_lora, Method.random_blocks]
    config = config_of(world, tmp_path / "out", model=str(model), methods=chosen, control_budgets=[0.5], steps=[3],
                       batches=[1, 4], timing_items=4, seeds=[0], caches=[], phases=[Phase.timing])  # fmt: skip
    results = benchmark(config)
    rows = {row["batch"]: row for row in results["rows"] if row["method"] == "random_blocks"}
    whole = {row["batch"]: row for row in results["rows"] if row["method"] == "few_step_lora"}
    assert set(rows) == set(whole) == {1, 4} and results["comparisons"] == []
    for batch, row in rows.items():
        assert row["executed_flops_ratio"] == pytest.approx(0.5, abs=0.1)
        assert row["efficiency"] == pytest.approx(row["dit_speedup"] * row["executed_flops_ratio"])
        assert whole[batch]["executed_flops_ratio"] == 1 and whole[batch]["dit_speedup"] > 0
    task = MeshTask(config)
    [run] = [case.run for case in plan_of(task.planner, 2) if case.method == "random_blocks"]
    source = task.controls.source(run, task.timing_jobs)
    assert not source.alike and not torch.equal(source.actions[:, :, 0], source.actions[:, :, 1])
    with task.ready(run, source):
        task.sample(run, task.condition_of(run, task.timing_jobs), task.timing_jobs)
    session = task.model(run).session
    assert session.coarseness is not None and torch.equal(session.trace.actions.long(), source.actions)


def test_routers_that_are_calibrated_anew_make_other_runs(world, tmp_path):
    """Their weights are the same, what they execute is not; dense runs stay."""
    config = config_of(world, tmp_path, methods=[Method.dense, Method.elastic, Method.random])
    names = []
    for calibrated in (0.5, 0.6):
        models = load_models(config)
        session = models["model"].session
        session.router_config = replace(
            session.router_config,
            curves=RouterCurves(requested_budgets=[0.3, 1.0], calibrated_budgets=[calibrated, 1.0]),
        )
        names.append({case.method: case.run.name for case in plan(config, models, 2)[1]})
    assert names[0]["dense"] == names[1]["dense"]
    assert names[0]["elastic"] != names[1]["elastic"] and names[0]["random"] != names[1]["random"]


def test_another_device_makes_other_runs(world, tmp_path):
    """So times and results of a GPU are never taken for those of the CPU beside it."""
    config = config_of(world, tmp_path, methods=[Method.dense, Method.elastic])
    models, names = load_models(config), []
    for device in ("cpu", "meta"):
        for model in models.values():
            model.dit.to(device)
        names.append({case.run.name for case in plan(config, models, 2)[1]})
    assert len(names[0]) == len(names[1]) and not names[0] & names[1]


def test_another_sampler_makes_other_runs(world, tmp_path):
    """Each decides which latents a generation ends with, or which cube is decoded."""
    config = config_of(world, tmp_path, methods=[Method.dense])
    names = []
    for change in ({}, {"grid": SamplingGrid.endpoint}, {"segments": 50}, {"box": 1.2}):
        folder = shutil.copytree(world / "model", tmp_path / f"model-{len(names)}")
        path = folder / "pipeline.json"
        values = {name: value.value if isinstance(value, Enum) else value for name, value in change.items()}
        save_json(load_json(path) | values, path)
        models = load_models(replace(config, model=str(folder)))
        names.append(plan(config, models, 2)[0].baseline.name)
    assert len(set(names)) == 4


def test_other_calibration_images_of_the_same_names_make_other_routes(world, tmp_path):
    images = shutil.copytree(world / "images", tmp_path / "images")
    config = config_of(
        world, tmp_path, methods=[Method.elastic, Method.static, Method.random], calibration=images
    )
    names = []
    for _ in range(2):
        task = MeshTask(config)
        runs = {case.method: case.run.name for case in plan_of(task.planner, len(task.items))}
        names.append((runs, task.controls._file("table")))
        shutil.copyfile(images / "c.png", images / "a.png")
    (first, table), (second, other) = names
    assert first["static"] != second["static"] and table != other
    assert first["random"] != second["random"], "they execute the share that the routers do there"
    assert first["elastic"] == second["elastic"]


def test_what_another_version_made_is_missing(world, tmp_path):
    config = config_of(world, tmp_path, phases=[Phase.quality], methods=[Method.dense], caches=[], steps=[2])
    task = MeshTask(config)
    run, job = task.planner.dense(2), task.jobs[0]
    task.make(run, [job])
    path = task.path(run, job).with_suffix(".json")
    record = load_json(path)
    assert task.record(run, job) == record and record["metadata"]["version"] == __version__
    record["metadata"]["version"] = "0.0.1"
    save_json(record, path)
    assert task.record(run, job) is None
    del record["metadata"]["version"]  # as earlier versions wrote it
    save_json(record, path)
    assert task.record(run, job) == record


def test_times_and_tables_of_another_version_are_taken_anew(world, tmp_path, monkeypatch):
    task = MeshTask(config_of(world, tmp_path, methods=[Method.dense], caches=[], steps=[2], repeats=1))
    table = task.controls._file("table")
    monkeypatch.setattr("elastic3d.benchmark.task.__version__", "0.0.1")
    assert task.controls._file("table") != table
    runs = [task.planner.dense(2)]
    assert timed_rounds(task, runs, measure=True) == timed_rounds(task, runs, measure=False) != []
    monkeypatch.setattr("elastic3d.evaluation.report.__version__", "0.0.1")
    assert timed_rounds(task, runs, measure=False) == []


def test_every_shipped_configuration_is_read_and_has_rows(world, gallery, tmp_path):
    """Both benchmarks with what they require, planned on tiny models."""
    both = [f"output={tmp_path}", "caches=[forecast]"]
    required = [f"model={world / 'model'}", f"images={world / 'images'}"]
    meshes = parse(MeshBenchmarkConfig, "benchmark", [*both, *required])
    required = [f"weights={gallery / 'model'}", "caches=[forecast,taylor_seer]"]
    images = parse(ImageBenchmarkConfig, "benchmark_images", [*both, *required])
    task = MeshTask(meshes)
    assert {case.method for case in plan_of(task.planner, 3)} >= {"dense", "fewer_steps", "elastic", "static"}
    assert len(rival_cases(task.planner)) == 10
    assert [rival.kind.value for rival in grid(images)].count("taylor_seer") == 2
    assert images.task.name == "images" and meshes.task.name == "meshes"
