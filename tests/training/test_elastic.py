"""From a dense DiT to trained routers, on shapes whose surface is known."""

from typing import Any

import pytest
import torch
from _cli import parse
from torch.utils.data import default_collate

from elastic3d.diffusion.flow import interpolate
from elastic3d.elastic import attach
from elastic3d.elastic.attachment import ROUTER_RECORDS, router_state
from elastic3d.elastic.block import ElasticBlock
from elastic3d.elastic.config import Branches, ElasticConfig, RouterConfig, RouterCurves, Scope
from elastic3d.errors import UserError
from elastic3d.models.options import DiTConfig
from elastic3d.models.shape_dit import ShapeDiT
from elastic3d.pipelines.image_to_3d import ImageTo3DPipeline
from elastic3d.training import calibration
from elastic3d.training.calibration import CurvesConfig
from elastic3d.training.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from elastic3d.training.export import export_run
from elastic3d.training.journal import read_metrics
from elastic3d.training.mesh_loss import MESH_TERMS
from elastic3d.training.options import StageName
from elastic3d.training.router import RouterStage, followed, threshold
from elastic3d.training.shape_flow import (
    MeshLossConfig,
    RouterStageConfig,
    RouterTrainConfig,
)
from elastic3d.training.stages import run_stage
from elastic3d.utils.devices import DeviceChoice
from elastic3d.utils.files import load_json, save_json
from tests.training.tiny import change_prepared, defaults, export_of
from tests.training.tiny import dit_config as config_for

pytestmark = pytest.mark.usefixtures("few_tries")

ONCE_A_STEP = dict(longest=3, scope=Scope.step, widths=1)


def router_config(
    root, mesh: MeshLossConfig | None = None, routing=None, stage=StageName.router, **changes
) -> Any:
    small = mesh or MeshLossConfig(near_queries=32, volume_queries=16, surface_points=16, share=0.5)
    options = dict(model=root / "dense", mesh=small, val_budgets=[0.5], val_shapes=1, val_steps=2)
    routing = defaults(stage, "routing", **options) | (routing or {})
    settings = dict(stage=stage, name="router", routing=routing, router=RouterConfig(**ONCE_A_STEP))
    return config_for(root, **(settings | changes))


def batch_of(stage: RouterStage, count: int = 4):
    return default_collate([stage.items.item(i, 0) for i in range(count)])


def test_the_shipped_router_configuration_suits_the_stage():
    for choice in ([], ["router=reuse"]):
        config = parse(RouterTrainConfig, "train", ["stage=router", *choice])
        assert config.stage is StageName.router
        assert config.router.scope is Scope.step and config.router.longest == 8


def test_a_cached_shape_without_its_true_surface_is_named_at_the_start(dense):
    change_prepared(dense, "ball1", None)
    with pytest.raises(UserError, match="balls/ball1 is in the cache of latents, but not under .*prepared"):
        RouterStage(router_config(dense))


def test_latents_of_another_scale_than_the_model_knows_are_refused(dense):
    path = dense / "latents" / "latents.json"
    info = load_json(path)
    save_json({**info, "std": [2 * value for value in info["std"]]}, path)
    with pytest.raises(
        UserError, match=r"latents of another scale than .*dense was trained on: make them with"
    ):
        RouterStage(router_config(dense))


def test_items_show_the_router_what_samplers_do(dense):
    stage = RouterStage(router_config(dense, routing={"min_steps": 4, "max_steps": 20}))
    batch = batch_of(stage, 64)
    steps = 1 / batch["dt"]
    torch.testing.assert_close(steps, steps.round())
    assert steps.min() >= 4 and steps.max() <= 20 and len(steps.unique()) > 8
    torch.testing.assert_close(batch["t"] * steps, (batch["t"] * steps).round(), atol=1e-4, rtol=0)
    assert batch["budget"].min() >= 0.3 and batch["budget"].max() <= 1
    assert batch["condition"].flatten(1).any(1).all()  # both branches are run anyway
    again = stage.items.item(3, 0)
    assert all(torch.equal(again[name], batch[name][3]) for name in again)


def test_skipped_blocks_add_what_they_remember(dense):
    """Where nothing has changed since, skipped blocks that remember stand in for the dense ones exactly."""
    stage = RouterStage(
        router_config(dense, routing={"simulated_steps": 1}, router=RouterConfig(**ONCE_A_STEP, damping=0.0))
    )
    objective, batch = stage.objective, batch_of(stage, 4)
    assert batch["ages"].shape == (4, 1) and batch["picks"].shape == (4, 2, 3)
    x_t = interpolate(batch["noise"], batch["latents"], batch["t"])

    def error(**changes) -> float:
        objective._announce(batch | changes)
        with torch.no_grad():
            skipped, executed = stage.flow.velocities(x_t, batch), objective._dense(x_t, batch)
        return (skipped - executed).square().mean().item()

    known = {"ages": torch.ones_like(batch["ages"]), "picks": torch.zeros_like(batch["picks"])}
    assert error(**known, earlier=batch["t"][:, None]) < 1e-9  # the step before was at the same time
    assert error(**known) > 1e-9
    nothing = torch.full_like(batch["picks"], -1)  # nothing to add: they pass
    assert error(**(known | {"picks": nothing}), earlier=batch["t"][:, None]) > 1e-3


def test_a_router_learns_from_the_age_of_what_it_would_reuse(dense):
    stage = RouterStage(router_config(dense, router=RouterConfig(**ONCE_A_STEP)))
    batch = batch_of(stage, 16)
    usable = (batch["ages"] > 0) & (batch["ages"] <= 3)
    for row, picks in enumerate(batch["picks"].flatten(1)):
        assert all(usable[row, pick] for pick in picks if pick >= 0)
    stage.objective(batch)[0].backward()
    moved = stage.objective.session.blocks[0].router.age.weight.grad.abs().sum(1)
    assert moved[1:].gt(0).all() and moved[0] == 0  # of nothing, no error is predicted


def test_the_skip_error_is_what_skipping_in_one_branch_does_to_the_guided_velocity(dense):
    routing = {"max_steps": 20, "min_steps": 10, "late_weight": 0.5}
    stage = RouterStage(router_config(dense, routing=routing))
    objective, batch = stage.objective, batch_of(stage, 3)
    batch["t"], batch["dt"], batch["steps"] = (
        torch.full((3,), 0.5),
        torch.full((3,), 0.1),
        torch.full((3,), 15.0),
    )
    batch["earlier"] = torch.tensor([[0.4, 0.3, 0.1]] * 3)
    batch["ages"], batch["picks"] = torch.tensor([[1, 2, 4]] * 3), torch.zeros_like(batch["picks"])
    x_t = interpolate(batch["noise"], batch["latents"], batch["t"])
    objective._announce(batch)
    with torch.no_grad():
        skipped, executed = stage.flow.velocities(x_t, batch), objective._dense(x_t, batch)
    change = (skipped - executed).flatten(1)
    assert change.abs().amax(1).min() > 1e-4
    found = objective._skip_error(skipped, executed, batch)
    share = torch.tensor(
        [1.0] * 3 + [1 / objective.flow.guidance - 1] * 3
    )  # of each branch in the guided velocity
    expected = (share[:, None] * change).square().mean(1) * 0.75 * (0.1 * 15**2 / 20) ** 2
    torch.testing.assert_close(found, expected)


def test_the_skip_error_of_a_shared_decision_is_that_of_skipping_in_both_branches(dense):
    router = RouterConfig(**ONCE_A_STEP, branches=Branches.shared)
    stage = RouterStage(router_config(dense, router=router))
    objective, batch = stage.objective, batch_of(stage, 8)
    assert torch.equal(batch["picks"][:, 0], batch["picks"][:, 1])
    count = torch.full((8,), float(objective.config.max_steps))
    batch["t"], batch["dt"], batch["steps"] = torch.zeros(8), 1 / count, count
    x_t = interpolate(batch["noise"], batch["latents"], batch["t"])
    objective._announce(batch)
    with torch.no_grad():
        skipped, executed = stage.flow.velocities(x_t, batch), objective._dense(x_t, batch)
    expected = (objective.guided(skipped) - objective.guided(executed)).square().flatten(1).mean(1)
    torch.testing.assert_close(objective._skip_error(skipped, executed, batch), expected)
    gates = objective._decision(batch).keep_prob
    known = batch["picks"][:, 0, 0] >= 0
    assert known.any() and torch.equal(gates[:8], gates[8:])
    assert gates[:8][known].unique().numel() == known.sum()  # each sample its own


def test_gates_learn_to_predict_the_skip_error_and_follow_the_threshold(dense):
    stage = RouterStage(router_config(dense, MeshLossConfig(weight=0.0), {"flow": 0.0}))
    objective, batch = stage.objective, batch_of(stage, 16)
    optimizer = torch.optim.Adam([p for p in objective.parameters() if p.requires_grad], 0.02)
    losses, generator = [], torch.Generator().manual_seed(0)
    for _ in range(30):
        batch["budget"] = torch.rand(16, generator=generator) * 0.7 + 0.3
        loss, values = objective(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0] and 0 <= values["share"] <= 1
    shares = []
    for budget in (0.3, 0.6, 1.0):
        batch["budget"] = torch.full_like(batch["budget"], budget)
        shares.append(objective(batch)[1]["share"].item())
    assert shares[0] < shares[1] < shares[2]
    assert objective.state_dict()["skip_error_moments"].abs().sum() > 0  # a resumed run goes on with them


@pytest.mark.parametrize("size", [1, 4, 16])
def test_moments_of_skip_errors_do_not_depend_on_the_size_of_micro_batches(size):
    torch.manual_seed(0)
    moments, found = torch.zeros(2), []
    for batch in (3 + 2 * torch.randn(8_000)).split(size):
        followed(moments, batch)
        found.append(moments.clone())
    mean, spread = torch.stack(found)[len(found) // 2 :].mean(0).tolist()
    assert mean == pytest.approx(3, abs=0.2) and spread == pytest.approx(2, rel=0.1)


def test_the_threshold_follows_the_budget_in_micro_batches_of_one(dense):
    """As in the shipped configurations of the large models: a shared decision, batch=8 accumulate=8."""
    router = RouterConfig(**ONCE_A_STEP, branches=Branches.shared)
    objective = (stage := RouterStage(router_config(dense, router=router))).objective
    for position in range(16):
        objective(default_collate([stage.items.item(position, 0)]))
    low, high = (threshold(objective.skip_error_moments, torch.tensor([b])) for b in (0.3, 1.0))
    assert low > high + 0.1  # a small budget needs a larger error before a step runs


def test_each_mesh_term_reaches_the_gates(dense):
    small = dict(near_queries=32, volume_queries=16, surface_points=16, weight=1.0, share=1.0)
    gradients = []
    for only in ("", *MESH_TERMS):
        torch.manual_seed(0)
        mesh = MeshLossConfig(**small, **{name: float(name == only) for name in MESH_TERMS})
        stage = RouterStage(router_config(dense, mesh, {"flow": 0.0}))
        stage.objective(batch_of(stage, 8))[0].backward()
        gradients.append(stage.objective.session.blocks[0].router.heads.weight.grad[0])
        assert gradients[-1].isfinite().all(), only
        assert all(
            p.grad is None
            for name, p in stage.objective.named_parameters()
            if not name.startswith("routers.")
        )
    for only, gradient in zip(MESH_TERMS, gradients[1:], strict=True):
        assert not torch.equal(gradient, gradients[0]), only


@pytest.mark.parametrize("router", [RouterConfig(longest=3), RouterConfig(scope=Scope.step, widths=1)])
def test_routers_that_do_not_forecast_steps_are_trained_elsewhere(dense, router):
    stage = RouterStage(router_config(dense, router=router))
    with pytest.raises(UserError, match="expected step and at least 1: stage=block_router trains"):
        stage.objective(batch_of(stage))


def count_rows(block: ElasticBlock, rows: list[int]) -> None:
    """Note how many rows the base block is called with."""
    full = block.forward

    def counting(*args, **kwargs):
        rows.append(len([*args, *kwargs.values()][0]))
        return full(*args, **kwargs)

    block.forward = counting


def test_blocks_whose_error_is_predicted_do_not_run_in_training(dense):
    stage = RouterStage(router_config(dense))
    batch, rows = batch_of(stage, 8), []
    for block in stage.objective.session.blocks:
        count_rows(block, rows)
    with torch.no_grad():
        stage.objective._dense(torch.zeros_like(batch["latents"]), batch)
    assert sum(rows) == 2 * 8 * 3  # the dense model: two branches, three blocks
    rows.clear()
    loss, _ = stage.objective(batch)
    earlier = batch["earlier"].shape[1]
    assert sum(rows) == 2 * 8 * 3 * (1 + earlier)
    loss.backward()
    gate = stage.objective.session.blocks[0].router.heads.weight.grad[0]
    assert gate.isfinite().all() and gate.abs().max() > 0


def test_trains_resumes_and_exports(dense):
    config = router_config(dense, steps=4, validate_every=4, sample_every=4)
    assert run_stage(config) == 0
    lines = read_metrics(config.folder / "metrics.jsonl")
    assert {"prediction", "flow", "share", "off_budget", "mesh_field", "mesh_chamfer"} <= set(lines[0])
    assert 0 <= lines[-1]["val/share_at_0.5"] <= 1
    assert (config.folder / "samples" / "generated-00000004.png").is_file()
    config.steps = 6
    assert run_stage(config) == 0  # goes on from its own checkpoint
    elastic = dense / "elastic"
    for part, names in (
        ("routers", ROUTER_RECORDS),
        ("dit", ROUTER_RECORDS[:2]),
        ("vae", ROUTER_RECORDS[:2]),
    ):
        (elastic / part).mkdir(parents=True)
        for name in names:
            (elastic / part / name).write_text("{}")  # of what was exported there before
    export_run(export_of(config, elastic))
    records = {path.name for path in (elastic / "routers").iterdir()} & set(ROUTER_RECORDS)
    assert records == {"training.json", "training.csv"}
    assert load_json(elastic / "routers" / "training.json")["steps"] == 6
    of_dense = load_json(dense / "dense" / "dit" / "training.json")
    assert load_json(elastic / "dit" / "training.json") == of_dense
    assert not list(elastic.glob("vae/training*")) and not (elastic / "dit" / "training.csv").exists()
    before = ImageTo3DPipeline.from_pretrained(dense / "dense", "cpu", "float32").dit.state_dict()
    after = ImageTo3DPipeline.from_pretrained(elastic, "cpu", "float32").dit
    assert all(torch.equal(before[key], value) for key, value in after.state_dict().items())
    plain = ShapeDiT.from_pretrained(elastic / "dit")
    attach(plain, elastic / "routers")
    assert any(value.abs().max() > 0 for key, value in router_state(plain).items() if "modulation" in key)


def test_an_export_calibrates_on_its_device(dense, monkeypatch):
    config, places = router_config(dense, steps=1), set()
    assert run_stage(config) == 0

    def calibrate(stage, curves):
        places.update(tensor.device.type for tensor in stage.objective.state_dict().values())
        raise UserError("seen")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="device is cuda, but PyTorch sees 0 CUDA devices"):
        export_run(export_of(config, dense / "elastic", device=DeviceChoice.cuda))
    monkeypatch.setattr(RouterStage, "calibrate", calibrate)
    monkeypatch.setattr("elastic3d.training.export.resolve_device", lambda choice: torch.device("meta"))
    with pytest.raises(UserError, match="seen"):
        export_run(export_of(config, dense / "elastic"))
    assert places == {"meta"} and not (dense / "elastic").exists()


def test_a_run_in_which_the_base_model_learned_too_is_refused(dense):
    config = router_config(dense, steps=2)
    assert run_stage(config) == 0
    path, _ = newest_checkpoint(config.folder / "checkpoints")
    checkpoint = load_checkpoint(path)
    checkpoint.values["config"]["routing"]["parts"] = "lora"  # as an earlier version wrote it
    save_checkpoint(path.parent, checkpoint, keep=1)
    with pytest.raises(UserError, match="routing.parts=lora, expected routers alone"):
        export_run(export_of(config, dense / "elastic"))


def test_calibration_makes_the_executed_cost_what_was_asked_for(dense, monkeypatch):
    stage = RouterStage(router_config(dense, routing={"val_shapes": 1, "val_steps": 2}))
    session = stage.objective.session
    stage._generate = lambda settings, count=0: (
        torch.zeros(1, 8, 7),
        torch.tensor([session.router_config.calibrated(settings.budget) ** 2]),
    )
    monkeypatch.setattr(calibration, "POINTS", 40)
    stage.calibrate(CurvesConfig())
    for budget in (0.3, 0.5, 0.9, 1.0):
        assert stage._generate(ElasticConfig(budget=budget))[1].item() == pytest.approx(budget, abs=0.01)
    session.begin(2, 1, [0.5, 1.0])
    session.step(0, 1.0, (0,))
    session.before_forward(stage.objective.dit, (), {"t": torch.zeros(2)})
    calibrated = session.current.budget
    torch.testing.assert_close(calibrated, torch.tensor([0.5**0.5, 1.0]), atol=0.01, rtol=0)
    with pytest.raises(ValueError, match="ascending"):
        RouterCurves(requested_budgets=[0.5, 0.4], calibrated_budgets=[0.5, 0.4])


def test_a_cache_of_another_model_is_refused(dense):
    ShapeDiT(DiTConfig(in_channels=9, condition_channels=768, width=32, heads=2)).save_pretrained(
        dense / "o" / "dit"
    )
    with pytest.raises(UserError, match="has 9 latent channels, but the cache has 7"):
        RouterStage(router_config(dense, routing={"model": dense / "o"}))
    with pytest.raises(ValueError, match="max_steps is 3, expected a value from 8 to 1000"):
        RouterStageConfig(max_steps=3)


def test_validation_runs_at_the_budget_that_it_says(dense):
    stage = RouterStage(router_config(dense))
    stage.objective.eval()
    with torch.no_grad():
        assert stage.validate() == stage.validate()
    assert stage.objective.session.settings == ElasticConfig()
