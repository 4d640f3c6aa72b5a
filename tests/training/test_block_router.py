"""Per-block routers and few-step LoRA, trained through whole generations: on tiny shapes whose surface is known."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from _cli import parse
from safetensors.torch import load_file, save_file
from torch.utils.data import default_collate

from elastic3d.benchmark.controls import executed_share
from elastic3d.elastic import attach
from elastic3d.elastic.attachment import load_router_config, router_state
from elastic3d.elastic.config import ElasticConfig, RouterConfig, Scope
from elastic3d.elastic.trace import trace_share
from elastic3d.errors import UserError
from elastic3d.models.shape_dit import ShapeDiT
from elastic3d.pipelines.image_to_3d import ImageTo3DPipeline
from elastic3d.preparation.shape import encode_png
from elastic3d.training.block_router import BlockRouterConfig, BlockRouterStage, attach_block_routers
from elastic3d.training.calibration import CurvesConfig
from elastic3d.training.few_step import FewStepStage
from elastic3d.training.image import ImageBlockRouterTrainConfig
from elastic3d.training.journal import read_metrics
from elastic3d.training.latents import LatentsConfig, build_cache
from elastic3d.training.measure import SensitivityConfig
from elastic3d.training.mesh_loss import EndMeshLossConfig
from elastic3d.training.options import StageName
from elastic3d.training.routes import FREE, Sensitivity, action_flops, load_sensitivity
from elastic3d.training.shape_flow import (
    BlockRouterTrainConfig,
)
from elastic3d.training.stages import run_stage
from elastic3d.utils.files import load_json, save_json
from tests.tiny_pipeline import image
from tests.training.test_calibrate import save_tiny_routers
from tests.training.test_few_step import ROUTERS, few_step_config, routed  # noqa: F401  # a fixture
from tests.training.tiny import config_of, export_of, gradients
from tests.training.tiny import dit_config as config_for

pytestmark = pytest.mark.usefixtures("few_tries")

ROUTER = RouterConfig(scope=Scope.block, longest=1, damping=0.0, hidden=8, conditioning=8)
MESH = dict(near_queries=16, volume_queries=8, surface_points=8)


def block_config(root, blocks=None, **changes) -> BlockRouterTrainConfig:
    options = dict(model=root / "dense", rank=4, min_steps=2, max_steps=4, reference_steps=8, pairs=6, val_shapes=1,
                   val_steps=[3], val_budgets=[1.0, 0.5], random_steps=2, mesh=EndMeshLossConfig(**MESH))  # fmt: skip
    settings = dict(
        stage=StageName.block_router, name="blocks", router=ROUTER, blocks=options | (blocks or {})
    )
    return config_for(root, **(settings | changes))


def batch_of(stage: BlockRouterStage, step: int = 0, seed: int = 0):
    size = stage.config.batch
    return default_collate([stage.items.item(step * size + i, seed) for i in range(size)])


def varied_gates(stage: BlockRouterStage) -> None:
    """Routers whose gates differ between blocks and samples."""
    torch.manual_seed(3)
    for block in stage.objective.session.blocks:
        torch.nn.init.normal_(block.router.heads.weight, std=2.0)


# ------------------------------------------------------------------------------------------------------- routes


def letters() -> dict[str, torch.Tensor]:
    """Two views (see `tiny.views`) that differ from their mirror images."""
    files = []
    for size in (40, 60):
        pixels = np.zeros((64, 64, 4), np.uint8)
        pixels[64 - size :, 10:20] = (size, 200, 90, 255)  # an L
        pixels[54:, 10:50] = (size, 200, 90, 255)
        files.append(encode_png(pixels))
    offsets = torch.tensor([0, len(files[0]), len(files[0]) + len(files[1])])
    return {"views": torch.frombuffer(bytearray(b"".join(files)), dtype=torch.uint8), "view_offsets": offsets}


def test_a_true_surface_goes_with_views_of_the_same_hand(routed):  # noqa: F811
    """The last views of a mirrored cache show the mirror image, whose surface is not stored."""
    for shard in (routed / "prepared" / "balls").glob("*.safetensors"):
        tensors = load_file(shard)
        for name in [name for name in tensors if name.endswith("/views")]:
            id = name.partition("/")[0]
            tensors |= {f"{id}/{part}": tensor for part, tensor in letters().items()}
        save_file(tensors, shard)
    latents = LatentsConfig(
        vae=routed / "vae", variants=2, views=4, mirror=True, output=routed / "mirrored", batch=2
    )
    build_cache(config_for(routed, stage=StageName.cache, latents=latents, init_from=routed / "dense"))
    for weight, expected in ((0.1, {0, 1}), (0.0, {0, 1, 2, 3})):
        config = block_config(
            routed, {"mesh": EndMeshLossConfig(**MESH, weight=weight), "pairs": 40}, latents=latents
        )
        flow, used = config.flow(), set()
        for number in range(40):
            tokens = flow.cache.train.read(flow.cache.train.ids[number % 5], "tokens")
            same = (tokens == flow.pair(number, 0)["condition"]).flatten(1).all(1)
            used.add(int(same.nonzero()[0]))
        assert used == expected


@pytest.mark.parametrize("stage", ["block_router", "hunyuan3d_block_router"])
def test_the_shipped_configurations_suit_the_stage(stage):
    config = parse(BlockRouterTrainConfig, "train", [f"stage={stage}"])
    assert config.router.scope is Scope.block and config.router.longest == 3
    assert config.blocks.guidance
    parse(ImageBlockRouterTrainConfig, "train", ["stage=image_block_router", "weights=a"])


def test_every_batch_has_the_full_route_the_smallest_and_routes_between(routed):  # noqa: F811
    guided = {"guidance": True, "guided_times": [0.2, 0.6]}
    stage = BlockRouterStage(block_config(routed, guided, batch=8))
    for step in range(4):
        batch = batch_of(stage, step)
        steps, blocks = int(batch["steps"][0]), len(stage.objective.session.blocks)
        assert (batch["steps"] == steps).all() and 2 <= steps <= 4
        assert batch["routes"].shape == (8, steps, 2, blocks)
        assert batch["kind"].tolist() == [0, 1, 2, 2] * 2
        full, smallest, between = (batch["kind"] == kind for kind in range(3))
        assert (batch["routes"][full] == 4).all() and (batch["budget"][full] == 1).all()
        assert (batch["budget"][smallest] == torch.tensor(0.3)).all()
        assert ((batch["budget"][between] > 0.3) & (batch["budget"][between] < 1)).all()
        whole = stage.draw.router.guided_share(stage.flow.times(steps)[:-1].tolist())
        assert (batch["budget"][between] <= whole).all()  # a larger one would be a second full route
        random = step < 2
        assert batch["free"].tolist() == [False, not random, not random, not random] * 2
        assert (batch["routes"][~full] == FREE).all() == (not random)
        again = stage.items.item(step * 8 + 3, 0)
        assert all(torch.equal(again[name], batch[name][3]) for name in again)


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.8, 1.0])
def test_random_routes_execute_their_budget_and_leave_out_what_matters_least(routed, budget):  # noqa: F811
    stage = BlockRouterStage(block_config(routed))
    times, blocks = stage.flow.times(4), [b.name for b in stage.objective.session.blocks]
    errors = [[0.5, 0.01, 0.02]] * 3 + [[0.5, 0.3, 0.4]]
    path = routed / "table.json"
    save_json(
        {"blocks": blocks, "times": times[:-1].tolist(), "full": 0.005, "errors": errors, "measured": {}},
        path,
    )
    stage.draw.sensitivity = load_sensitivity(path, blocks)
    flops = stage.draw.blocks
    table = action_flops(flops, ROUTER.ratios)
    coarse = max(float(table[:, -1].max()), 1) / sum(b.dense for b in flops) / 4
    best = stage.draw.around(times, budget, 0.0, 0)
    assert torch.equal(best, stage.draw.around(times, budget, 0.0, 1))  # nothing random in it
    assert executed_share(best, table) == pytest.approx(budget, abs=coarse)
    if budget == 0.3:
        kept = (best[:, 0] > 0).nonzero().tolist()
        assert [0, 0] in kept and [0, 1] not in kept and [1, 1] not in kept
    drawn = torch.stack([stage.draw.around(times, budget, 1.0, seed) for seed in range(60)])
    shares = [executed_share(routes, table) for routes in drawn]
    assert np.mean(shares) == pytest.approx(budget, abs=coarse / 2)
    if budget < 1:
        kept = (drawn[:, :, 0] > 0).float().mean(0)
        assert kept[0, 0] > kept[0, 1] and kept[3, 1] > kept[0, 1]
        assert ((drawn > 0) & (drawn < 4)).any()  # some are narrow


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_routes_execute_their_budget_where_guidance_runs_both_branches_at_some_steps(routed, spread):  # noqa: F811
    """What is left out there is saved twice."""
    stage = BlockRouterStage(block_config(routed, {"guidance": True, "guided_times": [0.2, 0.6]}))
    times, blocks = stage.flow.times(4), stage.objective.session.blocks
    guided = torch.tensor([stage.draw.router.guided_at(t) for t in times[:-1].tolist()])
    assert 0 < guided.sum() < 4
    errors = torch.where(guided, 0.5, 0.01)[:, None].expand(-1, len(blocks)).tolist()
    stage.draw.sensitivity = Sensitivity([b.name for b in blocks], times[:-1].tolist(), 0.005, errors, {})
    for budget in (0.3, 0.4, 0.5):
        drawn = [stage.draw.around(times, budget, spread, seed) for seed in range(1 + 11 * int(spread))]
        shares = []
        for routes in drawn:
            stage.along(4, routes)
            shares.append(trace_share(stage.objective.session.trace).item())
        cell = 1 / (4 * len(blocks))  # of both branches, of blocks that are about alike
        assert np.mean(shares) == pytest.approx(budget, abs=cell / 2 / len(shares) ** 0.5), shares


# ----------------------------------------------------------------------------------------------------- learning


def test_micro_batches_have_the_gradients_of_their_whole(routed):  # noqa: F811
    """While routes are random: later the mean cost of a micro-batch counts."""
    stage = BlockRouterStage(block_config(routed, batch=8))
    varied_gates(stage)
    whole = gradients(stage, 1)
    assert (gradients(stage, 2) - whole).norm() < 1e-3 * whole.norm()


@pytest.mark.parametrize("guidance", [False, True])
def test_routers_and_lora_learn_from_the_end_of_a_generation(routed, guidance):  # noqa: F811
    options = {"guidance": guidance, "guided_times": [0.2, 0.6] if guidance else []}
    stage = BlockRouterStage(block_config(routed, options, batch=8))
    varied_gates(stage)
    for step in (0, 2):  # random routes, then the routers' own
        stage.objective.zero_grad()
        loss, values = stage.objective(batch_of(stage, step))
        loss.backward()
        assert loss.isfinite() and ("cost" in values) == (step == 2)
        assert {"error_full", "error_smallest", "error_between", "mesh_field", "mesh_dense"} <= set(values)
        for block in stage.objective.session.blocks:
            gate = block.router.heads.weight.grad[0]
            assert gate.isfinite().all() and gate.abs().max() > 0
        ups = [p.grad for n, p in stage.objective.named_parameters() if n.endswith(".up")]
        assert all(g.isfinite().all() for g in ups) and sum(bool(g.any()) for g in ups) > len(ups) / 2
        assert all(p.grad is None for p in stage.flow.dit.parameters())


def test_the_mesh_alone_reaches_every_gate(routed, monkeypatch):  # noqa: F811
    for only in ("field", "chamfer", "normals", "dense"):
        weights = {name: float(name == only) for name in ("field", "chamfer", "normals", "dense")}
        options = {"random_steps": 0, "cost_weight": 0.0, "imitation_weight": 0.0}
        options["mesh"] = EndMeshLossConfig(weight=1.0, **weights, **MESH)
        stage = BlockRouterStage(block_config(routed, options, batch=4))
        monkeypatch.setattr(
            "elastic3d.training.block_router.relative_errors",
            lambda found, true, weights: torch.ones(len(found)),
        )
        varied_gates(stage)
        loss, values = stage.objective(batch_of(stage))
        loss.backward()
        assert ("mesh_field" in values) == (only != "dense")
        for block in stage.objective.session.blocks:
            gate = block.router.heads.weight.grad[0]
            assert gate.isfinite().all() and gate.abs().max() > 0, only
    with pytest.raises(ValueError, match="weight is 1, expected 0"):
        EndMeshLossConfig(weight=1.0, **dict.fromkeys(weights, 0.0)).check()


def test_the_dense_generation_has_no_distance_to_itself(routed):  # noqa: F811
    stage = BlockRouterStage(
        block_config(routed, {"reference_steps": 4, "min_steps": 4, "val_steps": [4]}, batch=4)
    )
    batch = batch_of(stage)
    batch["routes"] = torch.full_like(batch["routes"], 4)
    _, values = stage.objective(batch)  # the LoRA is fresh
    assert values["error_full"] < 1e-10 and values["mesh_dense"] < 1e-6
    assert values["share"] == pytest.approx(1)


def test_checkpointing_changes_nothing(routed):  # noqa: F811
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        stage = BlockRouterStage(block_config(routed, {"random_steps": 0}, batch=4))
        varied_gates(stage)
        torch.manual_seed(1)
        stage.objective.gradient_checkpointing = recompute
        for name, p in stage.objective.named_parameters():
            if name.endswith((".up", ".down")):
                torch.nn.init.normal_(p, std=0.05)
        stage.objective(batch_of(stage))[0].backward()
        gradients.append([p.grad for p in stage.objective.parameters() if p.grad is not None])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-3, atol=1e-6)


def test_budgets_are_calibrated_where_they_were_trained(routed):  # noqa: F811
    guided = {"guidance": True, "guided_times": [0.2, 0.6], "val_steps": [2, 3]}
    stage = BlockRouterStage(block_config(routed, guided))
    varied_gates(stage)
    stage.calibrate(CurvesConfig())
    curves, router = stage.objective.session.router_config.curves, stage.draw.router
    wholes = [router.guided_share(stage.flow.times(steps)[:-1].tolist()) for steps in (2, 3)]
    assert min(wholes) < 1 and curves.requested_budgets[0] == pytest.approx(0.3 / min(wholes))
    assert curves.requested_budgets[-1] == 1 and min(curves.calibrated_budgets) >= curves.requested_budgets[0]
    stage.config.blocks.min_budget = 1.0  # the full route alone
    stage.calibrate(CurvesConfig())
    assert stage.objective.session.router_config.curves.requested_budgets[0] == pytest.approx(0.95)


# --------------------------------------------------------------------------------------------- from end to end


def test_measure_train_export_and_generate(routed):  # noqa: F811
    """Of a model whose routers decide by step: its LoRA is where the new one starts."""
    assert run_stage(few_step_config(routed, steps=2)) == 0
    model = routed / "dense"
    assert run_stage(export_of(few_step_config(routed), model)) == 0
    table = routed / "table.json"
    shared = {name: value for name, value in vars(block_config(routed)).items() if name != "blocks"}
    measure = config_of(**(shared | {"stage": StageName.sensitivity}))
    measure.blocks = SensitivityConfig(
        model=model, rank=4, steps=3, reference_steps=4, val_shapes=1, output=table
    )
    run_stage(measure)
    found = load_json(table)
    assert np.shape(found["errors"]) == (3, 3) and found["full"] < np.max(found["errors"])

    config = block_config(routed, {"sensitivity": table}, steps=4, batch=4, validate_every=4)
    assert run_stage(config) == 0
    rows = read_metrics(config.folder / "metrics.jsonl")
    assert {"val/error_3_at_0.5", "val/share_3_at_0.5", "val/table_3_at_0.5"} <= set(rows[-1])
    output = routed / "elastic"
    assert run_stage(export_of(config, output)) == 0
    pipeline = ImageTo3DPipeline.from_pretrained(output, "cpu", "float32")
    own = pipeline.session.router_config
    assert own.scope is Scope.block and own.trained_steps == [2, 4] and own.curves.requested_budgets
    both = [image(), image()]
    results = pipeline(both, [1, 2], steps=3, resolution=16, budget=0.5)
    for result, seed in zip(results, (1, 2), strict=True):
        assert len(result.metadata["routes"]["actions"]) == 3
        alone = pipeline(image(), seed, steps=3, resolution=16, budget=0.5)
        assert alone.metadata["routes"] == result.metadata["routes"]
        torch.testing.assert_close(alone.latents, result.latents, rtol=1e-3, atol=1e-4)
    for options, message in (
        ({"steps": 5}, "steps is 5, expected 2 to 4, for which these per-block routers were trained"),
        (
            {"steps": 3, "few_step": False},
            "few_step is false, expected true: these routers were trained with",
        ),
        ({"steps": 3, "budget": 0.2}, "budget is 0.2, expected a value from 0.3 to 1"),
        ({"steps": 3, "cache": "off"}, None),
    ):
        if message is not None:
            with pytest.raises(UserError, match=message):
                pipeline(image(), 0, resolution=16, **options)
    dense_run = pipeline(
        image(), 0, steps=5, resolution=16, elastic=False
    )  # dense runs in any number of steps
    assert "routes" not in dense_run.metadata
    goes_on_with_routers_and_lora(routed, output)


def goes_on_with_routers_and_lora(routed, output):  # noqa: F811
    again = block_config(routed, {"model": output}, batch=4, name="again")
    stage = BlockRouterStage(again)  # goes on with routers and LoRA
    batch = stage.flow.val_pairs()
    first = stage.objective.generate(batch, 3, ElasticConfig(budget=0.5))
    assert trace_share(stage.objective.session.trace) <= 1 and first.isfinite().all()
    weights = (
        attach(ShapeDiT.from_pretrained(output / "dit"), output / "routers").blocks[0].router.heads.weight
    )
    assert torch.equal(stage.objective.session.blocks[0].router.heads.weight, weights)
    for change, message in (
        ({"router": replace(ROUTER, widths=2)}, "router.widths is 2, but the per-block routers in .* have 4"),
        ({"blocks": {"model": output, "rank": 2}}, "rank is 2, expected at least 4, that of the LoRA in"),
    ):
        wrong = block_config(routed, name="wrong", **({"blocks": {"model": output}} | change))
        with pytest.raises(UserError, match=message):
            run_stage(wrong)
        assert not wrong.folder.exists()
    with pytest.raises(UserError, match="has per-block routers, .*: stage=block_router goes on with both"):
        FewStepStage(few_step_config(routed, {"model": output}))
    assert load_router_config(output / "routers", "ShapeDiT").few_step_rank == 4


def test_learned_guidance_runs_one_branch_at_that_scale_alone(routed):  # noqa: F811
    config = block_config(routed, {"guidance": True}, steps=2, batch=4)
    assert run_stage(config) == 0
    output = routed / "elastic"
    assert run_stage(export_of(config, output)) == 0
    pipeline = ImageTo3DPipeline.from_pretrained(output, "cpu", "float32")
    result = pipeline(image(), 0, steps=2, resolution=16)
    assert result.metadata["one_branch"] and all(
        len(step) == 1 for step in result.metadata["routes"]["actions"]
    )
    with pytest.raises(
        UserError, match="guidance is 4, expected 2.5, which the few-step LoRA .* has learned"
    ):
        pipeline(image(), 0, steps=2, resolution=16, guidance=4.0)


def test_the_bundled_lora_is_where_per_block_routers_start():
    """Its file has the names of an older version."""
    model = Path("data/pretrained/shape-small")
    dit, folder = ShapeDiT.from_pretrained(model / "dit"), model / "routers"
    options = BlockRouterConfig(rank=50, max_steps=8, min_steps=4, val_steps=[4])
    attach_block_routers(dit, options, ROUTER, folder, lambda n: torch.linspace(0, 1, n + 1), 2.0)
    first = ShapeDiT.from_pretrained(model / "dit")
    own, theirs = router_state(dit), router_state_of(first, folder)
    ups = [key for key in theirs if key.endswith(".few_step.parts.linear1.up")]
    assert len(ups) == 14 and all(torch.equal(own[key][:, :48], theirs[key]) for key in ups)
    assert all(not own[key][:, 48:].any() for key in ups)


def router_state_of(dit, folder):
    attach(dit, folder)
    return router_state(dit)


# --------------------------------------------------------------------------------------------------- bad input


def test_an_option_that_is_gone_is_no_option_of_a_test(tmp_path):
    with pytest.raises(TypeError, match="routing_weight"):
        block_config(tmp_path, {"routing_weight": 0.0})


def test_what_does_not_fit_is_said(routed):  # noqa: F811
    for options, message in (
        ({"val_steps": [11]}, "val_steps has 11, expected 2 to 10, as is trained"),
        ({"max_steps": 1}, "max_steps is 1, expected a value from 2 to 1000"),
    ):
        with pytest.raises(ValueError, match=message):
            BlockRouterConfig(**options)
    with pytest.raises(ValueError, match="batch is 6 in 1 micro-batches, expected a multiple of 4"):
        block_config(routed, batch=6)
    with pytest.raises(ValueError, match="router.scope is step, expected block: each block decides"):
        block_config(routed, router=RouterConfig(scope=Scope.step))
    with pytest.raises(
        ValueError, match=r"trained_steps is \[2, 4\], expected two numbers, of routers with scope"
    ):
        RouterConfig(scope=Scope.step, trained_steps=[2, 4])
    path = routed / "table.json"
    values = {"blocks": ["a"], "times": [0.0], "full": 0.1, "errors": [[0.2]], "measured": {}}
    save_json(values, path)
    config = block_config(routed, {"sensitivity": path})
    with pytest.raises(UserError, match="is of a model with 1 blocks, a, ..., expected the 3 of this one"):
        run_stage(config)
    assert not config.folder.exists()
    save_json({**values, "times": [0.5, 0.2]}, path)
    with pytest.raises(UserError, match="errors and times do not belong together"):
        load_sensitivity(path, ["a"])


def test_a_lora_of_a_higher_rank_is_refused_before_anything_is_written(routed):  # noqa: F811
    dit, routers = ShapeDiT.from_pretrained(routed / "dense" / "dit"), routed / "dense" / "routers"
    save_tiny_routers(dit, routers, replace(ROUTERS, few_step_rank=6))
    output, config = routed / "tables" / "table.json", block_config(routed)
    shared = {name: value for name, value in vars(config).items() if name != "blocks"}
    measure = config_of(**(shared | {"stage": StageName.sensitivity}))
    measure.blocks = SensitivityConfig(model=routed / "dense", rank=4, steps=2, val_shapes=1, output=output)
    for wrong, written in ((config, config.folder), (measure, output.parent)):
        with pytest.raises(UserError, match="rank is 4, expected at least 6, that of the LoRA in"):
            run_stage(wrong)
        assert not written.exists()
