"""The registry: which runs the methods ask for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from _cli import parse

from elastic3d.adapters import attach, detach, save_routers
from elastic3d.benchmark.execute import make
from elastic3d.benchmark.methods import (
    DRIFT_CACHE,
    FORECAST,
    NO_CACHE,
    PAPER_CACHE,
    REGISTRY,
    Routes,
    needed_runs,
    plan,
)
from elastic3d.benchmark.models import load_models
from elastic3d.benchmark.options import BenchmarkConfig, Method, Phase
from elastic3d.benchmark.quality import Workplace
from elastic3d.benchmark.rows import route_shares
from elastic3d.benchmark.store import Job, Store
from elastic3d.config.routing import CacheRule, RouterConfig
from elastic3d.errors import UserError
from elastic3d.pipelines.image_to_3d import ImageTo3DPipeline
from elastic3d.pipelines.options import GenerateConfig
from elastic3d.routing.tables import TableRoutes
from elastic3d.utils.devices import DeviceChoice
from tests.benchmark.conftest import config_of

CLI = ["images=photos", "output=out"]


def test_every_method_is_registered():
    assert list(REGISTRY) == list(Method)


def test_caches_are_those_of_the_configuration_groups():
    for name, cache in (("paper", PAPER_CACHE), ("drift", DRIFT_CACHE), ("forecast", FORECAST)):
        assert parse(GenerateConfig, "gen_mesh", ["image=a", "output=b", f"cache={name}"]).cache == cache


def test_methods_that_ask_for_the_same_share_a_run(world, tmp_path):
    config = config_of(world, tmp_path, budgets=[1.0, 0.5], elastic_steps=[2, 3])
    models = load_models(config, world)
    planner, cases = plan(config, models, items=2)
    by_method = {m: [c for c in cases if c.method == m.value] for m in Method}
    assert [c.run for c in by_method[Method.elastic]] == [c.run for c in by_method[Method.elastic_no_cache]]
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
    assert (
        control.run.donor == by_method[Method.elastic_no_cache][3].run and control.run.routes is Routes.random
    )
    runs = needed_runs(planner, cases)
    names = [run.name for run in runs]
    assert len(set(names)) == len(names) and names.index(control.run.donor.name) < names.index(
        control.run.name
    )
    assert planner.reference() in runs and all(planner.dense(steps) in runs for steps in (2, 3, 4))
    again = plan(config_of(world, tmp_path, resolution=9), models, 2)[1]
    assert not {case.run for case in again} & set(runs)  # other options, other meshes


def test_routers_that_reuse_have_no_rows_without_and_share_their_cache_with_controls(world, tmp_path):
    pipeline = ImageTo3DPipeline.from_pretrained(world / "model", "cpu", "float32")
    detach(pipeline.dit)
    attach(pipeline.dit, RouterConfig(longest=2))
    pipeline.save_pretrained(tmp_path / "reuse")
    config = config_of(world, tmp_path, model=str(tmp_path / "reuse"))
    models = load_models(config, world)
    _, cases = plan(config, models, items=2)
    methods = {case.method for case in cases}
    assert not methods & {"elastic_no_cache", "elastic_paper_cache"}
    assert methods >= {"elastic", "random", "static", "timestep", "shuffled", "dense_cache"}
    widths = models["model"].session.router_config.widths
    for case in cases:
        if case.method == "dense_cache":  # nobody asks the routers there
            source = TableRoutes(torch.full((1, 1, 1, len(models["model"].session.blocks)), widths), widths)
            [result] = make(models["model"], case.run, [Job(world / "images/a.png", 0)], config, source)
            assert result.receipt["flops_executed"] <= result.receipt["flops_dense"]
        if case.method in ("elastic", "random", "shuffled"):
            assert case.run.settings.cache == RouterConfig(longest=2).cache()
    with pytest.raises(
        UserError, match="elastic_no_cache, which can't be run: its routers were trained to reuse"
    ):
        plan(
            config_of(world, tmp_path, model=str(tmp_path / "reuse"), methods=[Method.elastic_no_cache]),
            models,
            2,
        )


def test_updates_have_rows_where_few_calls_are_left(world, tmp_path):
    pipeline = ImageTo3DPipeline.from_pretrained(world / "model", "cpu", "float32")
    detach(pipeline.dit)
    session = attach(pipeline.dit, RouterConfig(longest=2, updates=2, updates_calls=2.5))
    for block in session.blocks:
        for part in block.updates.parts.values():
            torch.nn.init.normal_(part.up, std=0.3)
    pipeline.save_pretrained(tmp_path / "updated")
    fields = dict(
        model=str(tmp_path / "updated"), budgets=[1.0, 0.5], elastic_steps=[2, 4, 8], steps=[2, 3, 4]
    )
    config = config_of(world, tmp_path, **fields)
    models = load_models(config, world)
    _, cases = plan(config, models, items=2)
    by_method = {m: [c for c in cases if c.method == m.value] for m in Method}
    assert [c.run.steps for c in by_method[Method.updated_steps]] == [2]
    plain = by_method[Method.elastic_no_updates]
    assert [(c.run.steps, c.budget) for c in plain] == [(2, 1.0), (2, 0.5), (4, 0.5)]
    assert not any(c.run.settings.updates for c in (*plain, *by_method[Method.dense_cache]))
    job = [Job(world / "images/a.png", 0)]
    [dense] = make(models["dense"], by_method[Method.fewer_steps][0].run, job, config, None)
    widths = session.router_config.widths
    for case, same in ((by_method[Method.updated_steps][0], False), (by_method[Method.dense_cache][0], True)):
        source = TableRoutes(torch.full((1, 1, 1, len(session.blocks)), widths), widths)
        run = replace(
            case.run, steps=dense.receipt["steps"], settings=replace(case.run.settings, cache=NO_CACHE)
        )
        [result] = make(models["model"], run, job, config, source)
        assert torch.equal(result.latents, dense.latents) is same
    place = Workplace(plan(config, models, 2)[0], Store(tmp_path), [job[0].image])
    own = models["model"].session
    place.ready(by_method[Method.updated_steps][0].run)
    merged = [block.running() for block in own.blocks]
    own.source = TableRoutes(torch.full((1, 1, 1, len(own.blocks)), widths), widths)
    with torch.no_grad():
        own.begin(1, 2)
    assert all(block.running() is before for block, before in zip(own.blocks, merged, strict=True))
    assert all(before is not block.narrow for block, before in zip(own.blocks, merged, strict=True))
    own.source = None
    with pytest.raises(UserError, match="updated_steps, which can't be run: its routers have no updates"):
        plain_config = config_of(world, tmp_path, methods=[Method.updated_steps])
        plan(plain_config, load_models(plain_config, world), 2)


def test_updates_with_guidance_cost_half_and_fit_their_guidance_alone(world, tmp_path):
    pipeline = ImageTo3DPipeline.from_pretrained(world / "model", "cpu", "float32")
    detach(pipeline.dit)
    attach(pipeline.dit, RouterConfig(updates=2, updates_calls=4, updates_guidance=3.0))
    pipeline.save_pretrained(tmp_path / "guided")
    fields = dict(model=str(tmp_path / "guided"), steps=[2], methods=[Method.updated_steps])
    config = config_of(world, tmp_path, guidance=3.0, **fields)
    models = load_models(config, world)
    planner, [case] = plan(config, models, items=1)
    job, widths = [Job(world / "images/a.png", 0)], models["model"].session.router_config.widths
    source = TableRoutes(torch.full((1, 1, 1, len(models["model"].session.blocks)), widths), widths)
    Workplace(planner, Store(tmp_path), [job[0].image]).ready(case.run)
    [result] = make(models["model"], case.run, job, config, source)
    receipt = result.receipt
    assert receipt["updated"] and receipt["one_branch"]
    assert 2 * receipt["flops_executed"] == receipt["flops_dense"]
    session = models["model"].session
    session.router_config = replace(session.router_config, guided_times=[0.2, 0.9])
    place = Workplace(planner, Store(tmp_path / "meshes"), [job[0].image])
    place.make(case.run, place.jobs)
    mean = route_shares(place, [case])[case.run.name]["mean"]
    assert mean[:, 0].all() and not mean[0, 1].any() and mean[1, 1].all()
    other = config_of(world, tmp_path, guidance=2.0, **fields)
    assert plan(other, load_models(other, world), items=1)[1] == []


def test_the_command_line():
    config = parse(
        BenchmarkConfig,
        "benchmark",
        [*CLI, "model=default", "budgets=[1,.5]", "seeds=[0,1,2]", "methods=[dense,elastic]", "phases=timing",
         "variants={no_mesh: a b/routers, tuned: c}", "cache=drift", "device=cpu"],
    )  # fmt: skip
    assert config.budgets == [1.0, 0.5] and config.methods == [Method.dense, Method.elastic]
    assert config.phases == [Phase.timing] and config.variants == {"no_mesh": "a b/routers", "tuned": "c"}
    assert config.cache.rule is CacheRule.drift and config.device is DeviceChoice.cpu
    assert config.protocol.views == 0 and not config.protocol.surface_health
    for wrong, message in (
        ("budgets=[1,0.1]", "budget is 0.1, expected a value from 0.3"),
        ("budgets=[]", "budgets is .*, expected at least one value"),
        ("control_budgets=[0.5,0.5]", "control_budgets is .*no value twice"),
        ("control_budgets=[0.1]", "budget is 0.1, expected a value from 0.3"),
        ("seeds=[1,1]", "seeds is .*none twice"),
        ("methods=[dens]", "expected a list such as"),
        ("steps=[0]", "steps is 0"),
        ("variants={elastic: x}", "variants has 'elastic', expected another name"),
        ("drifts=[-1]", "drifts is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            parse(BenchmarkConfig, "benchmark", [*CLI, wrong])


def test_controls_and_variants_have_their_own_budgets(world, tmp_path):
    """And the steps of the baseline, whatever steps elastic rows have."""
    pipeline = ImageTo3DPipeline.from_pretrained(world / "model", "cpu", "float32")
    save_routers(pipeline.dit, tmp_path / "routers")
    config = config_of(world, tmp_path, budgets=[1.0, 0.5], elastic_steps=[2, 3], control_budgets=[0.4, 0.3],
                       variants={"other": str(tmp_path / "routers")})  # fmt: skip
    _, cases = plan(config, load_models(config, world), items=2)
    for method in ("random", "static", "timestep", "shuffled", "other"):
        assert [(c.run.steps, c.budget) for c in cases if c.method == method] == [(3, 0.4), (3, 0.3)]
    assert {c.budget for c in cases if c.method == "elastic"} == {1.0, 0.5}


def test_routers_that_are_calibrated_anew_make_other_runs(world, tmp_path):
    """Their weights are the same, what they execute is not; dense runs stay."""
    config = config_of(world, tmp_path, methods=[Method.dense, Method.elastic, Method.random])
    names = []
    for told in (0.5, 0.6):
        models = load_models(config, world)
        session = models["model"].session
        session.router_config = replace(session.router_config, asked=[0.3, 1.0], told=[told, 1.0])
        names.append({case.method: case.run.name for case in plan(config, models, 2)[1]})
    assert names[0]["dense"] == names[1]["dense"]
    assert names[0]["elastic"] != names[1]["elastic"] and names[0]["random"] != names[1]["random"]
