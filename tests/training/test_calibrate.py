"""Routers that were exported are calibrated anew: by the command, on tiny dense models."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_images import save_tiny_qwen

from elastic3d.elastic import attach, load_routers, save_routers
from elastic3d.elastic.attachment import load_router_config
from elastic3d.elastic.config import ElasticConfig, RouterConfig, RouterCurves, Scope
from elastic3d.errors import UserError
from elastic3d.models.shape_dit import ShapeDiT
from elastic3d.pipelines.backbones import QwenImageBackbone
from elastic3d.pipelines.image_loading import load_transformer
from elastic3d.pipelines.options import BackboneName
from elastic3d.training import calibration, router
from elastic3d.training.calibration import Curve, CurvesConfig
from elastic3d.training.measure import _router_stage
from elastic3d.training.options import DataConfig, StageName
from elastic3d.training.router import RouterStage
from elastic3d.training.stages import run_stage
from elastic3d.utils.files import load_json, save_json
from tests.training.test_elastic import router_config
from tests.training.test_image_stages import folder, image_config  # noqa: F401  # a fixture

STEPS, TIMES, CURVE = 8, [0.2, 0.8], [0.3, -0.2]
ROUTERS = RouterConfig(
    scope=Scope.step, longest=3, widths=1, head_std=0.3,
    curves=RouterCurves(
        requested_budgets=[0.3, 1.0], calibrated_budgets=[0.9, 1.0], times=TIMES, gate_bias=CURVE
    ),
)  # fmt: skip


def with_budgets_of(found: RouterConfig, given: RouterConfig) -> RouterConfig:
    """`given` with the budgets that were calibrated for `found`."""
    budgets = {name: getattr(found.curves, name) for name in ("requested_budgets", "calibrated_budgets")}
    return replace(given, curves=replace(given.curves, **budgets))


def save_tiny_routers(dit: torch.nn.Module, folder: Path, config: RouterConfig = ROUTERS) -> Path:  # noqa: F811
    """Routers whose gates rise with the budget, and differ between samples and times."""
    torch.manual_seed(0)
    session = attach(dit, config)
    if session.conditioner is not None:
        embed, modulation = session.conditioner.embed, session.conditioner.modulation
        with torch.no_grad():
            for layer in (embed[0], embed[2]):
                layer.weight.zero_()
                layer.bias.zero_()
            embed[0].weight[0, 12] = embed[2].weight[0, 0] = 4.0  # the budget is the 13th feature
            modulation.weight[2 * config.hidden, 0] = 0.5  # the gate's offset
            modulation.bias[2 * config.hidden] = -5.0
    save_routers(dit, folder)
    save_json({"steps": 7}, folder / "training.json")
    return folder


@pytest.fixture
def routers(dense):
    """The folder of the dense shape model's routers; it samples in `STEPS` steps."""
    path = dense / "dense" / "pipeline.json"
    save_json({**load_json(path), "steps": STEPS, "guidance": 2.5}, path)
    return save_tiny_routers(ShapeDiT.from_pretrained(dense / "dense" / "dit"), dense / "dense" / "routers")


def shape_config(root: Path, routing=None, **changes):
    """Calibration on all shapes but one."""
    data = DataConfig(prepared=root / "no meshes", train=[root / "train.txt"], val=[root / "train.txt"])
    routing = {"val_shapes": 5} | (routing or {})
    return router_config(root, routing=routing, stage=StageName.calibrate, data=data, **changes)


def check_executed(stage, folder: Path, budgets=(0.45, 0.6, 0.8)) -> None:  # noqa: F811
    """What is asked for is executed, within a step of one sample or two."""
    load_routers(stage.flow.dit, folder)
    for budget in budgets:
        _, share = stage._generate(ElasticConfig(budget=budget))
        assert share.mean().item() == pytest.approx(budget, abs=0.05)


@pytest.mark.parametrize("anchored", [True, False])
def test_curves_are_chosen_by_the_anchors_of_anchored_latents(dense, monkeypatch, anchored):
    stage = RouterStage(router_config(dense))
    latents, share = stage._generate(ElasticConfig())
    if not anchored:
        monkeypatch.setattr(stage.flow, "anchors", 0)
    seen = []
    monkeypatch.setattr(
        router,
        "calibrate",
        lambda session, generate, *rest: seen.append(generate(ElasticConfig(), 0)),
    )
    stage.calibrate(CurvesConfig())
    [(found, shares)] = seen
    assert torch.equal(found, latents[..., :3] if anchored else latents) and torch.equal(shares, share)


def test_budgets_are_what_is_executed_and_weights_stay(dense, routers, request):
    save_json({"steps": 3}, routers / "few_step.json")
    before = {path.name: path.read_bytes() for path in routers.iterdir()}
    config = shape_config(dense, {"dampings": Curve.keep, "gate_bias": Curve.keep})
    dial = routers.parent / "dial.json"
    dial.write_text("{}")
    assert run_stage(config) == 0
    assert not dial.exists(), "it was measured with the earlier calibration"
    after = {path.name: path.read_bytes() for path in routers.iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"curves.json"}
    found = load_router_config(routers, "ShapeDiT")
    assert found == with_budgets_of(found, ROUTERS) and len(found.curves.requested_budgets) == 24
    note = load_json(routers / "calibration.json")
    assert (note["steps"], note["guidance"], note["gate_bias"]) == (STEPS, 2.5, "keep")
    assert note["data"]["val_shapes"] == 5 and "train_shapes" not in note["data"]

    routing = {"val_shapes": 5, "val_steps": STEPS}
    trained = router_config(dense, routing=routing, router=found, data=config.data)
    trained.data.prepared = dense / "prepared"
    stage = RouterStage(trained)
    assert stage.flow.guidance == 2.5 and stage.sampling == (STEPS, 2.5)  # the pipeline's
    check_executed(stage, routers)
    for guidance, sampled in (
        (4.0, 4.0),
        (1.0, 2.5),
    ):  # branches that learn each by itself are sampled together
        trained.routing.guidance = guidance
        stage = RouterStage(trained)
        assert (stage.flow.guidance, stage.sampling[1]) == (guidance, sampled)

    request.getfixturevalue("few_tries")
    path = dense / "dense" / "pipeline.json"
    save_json({**load_json(path), "steps": 4}, path)
    config = shape_config(dense, export={"output": dense / "other"})
    (dense / "other" / "routers").mkdir(parents=True)
    (dense / "other" / "routers" / "few_step.csv").touch()  # of what was there before
    assert run_stage(config) == 0
    assert {path.name: path.read_bytes() for path in routers.iterdir()} == after
    other = dense / "other" / "routers"
    for name in ("model.safetensors", "training.json", "few_step.json"):
        assert (other / name).read_bytes() == before[name]
    assert not (other / "few_step.csv").exists()
    chosen = load_router_config(other, "ShapeDiT")  # anew
    assert len(chosen.curves.gate_bias) == 4 - 1
    assert chosen.curves.damping_times == list(calibration.DAMPING_TIMES)


@pytest.mark.parametrize(
    ("nfe", "budgets"),
    [(STEPS, (0.32, 0.4, 0.47)), (4, (0.3, 0.45, 0.6))],
    ids=["at every budget", "at the smallest"],
)
def test_a_lora_with_learned_guidance_has_its_budgets_too(dense, nfe, budgets):
    """It runs one branch: half of the evaluations, on which a budget is spent."""
    path = dense / "dense" / "pipeline.json"
    save_json({**load_json(path), "steps": STEPS, "guidance": 2.5}, path)
    lora = replace(ROUTERS, few_step_rank=2, few_step_nfe=nfe, few_step_guidance=2.5)
    dit = ShapeDiT.from_pretrained(dense / "dense" / "dit")
    routers = save_tiny_routers(dit, dense / "dense" / "routers", lora)
    config = shape_config(dense, {"dampings": Curve.keep, "gate_bias": Curve.keep})
    assert run_stage(config) == 0
    trained = router_config(
        dense,
        routing={"val_shapes": 5, "val_steps": STEPS},
        router=load_router_config(routers, "ShapeDiT"),
        data=config.data,
    )
    trained.data.prepared = dense / "prepared"
    check_executed(RouterStage(trained), routers, budgets)


def test_images(folder, prepared, monkeypatch):  # noqa: F811
    monkeypatch.setattr(QwenImageBackbone, "default_sampling", lambda backbone: (STEPS, 4.0))  # of 50 steps
    weights = save_tiny_qwen(prepared / "published")
    given = replace(ROUTERS, head_std=3.0)  # else their share jumps with the budget
    routers = save_tiny_routers(load_transformer(weights, torch.float32), weights / "routers", given)
    before = (routers / "model.safetensors").read_bytes()
    image = dict(
        backbone=BackboneName.qwen_image, weights=weights, images=folder, size=16, text_length=48, val_every=2
    )
    kept = {"dampings": Curve.keep, "gate_bias": Curve.keep}
    config = image_config(prepared, StageName.calibrate, {**kept, "val_shapes": 3}, **image)
    assert run_stage(config) == 0
    assert (routers / "model.safetensors").read_bytes() == before
    found = load_router_config(routers, "QwenImageTransformer2DModel")
    assert found == with_budgets_of(found, given)
    assert found.curves.calibrated_budgets != given.curves.calibrated_budgets
    note = load_json(routers / "calibration.json")
    assert (note["steps"], note["guidance"], note["data"]["val_images"]) == (STEPS, 4.0, 3)
    routing = {"val_shapes": 3, "val_steps": note["steps"]}
    trained = image_config(prepared, StageName.image_router, routing, **image)
    trained.router = found
    check_executed(RouterStage(trained), routers)


def test_what_cannot_be_calibrated(dense):
    config = shape_config(dense)
    with pytest.raises(UserError, match="dense has no routers to calibrate: there is no folder"):
        run_stage(config)
    dit = ShapeDiT.from_pretrained(dense / "dense" / "dit")
    _router_stage(config, RouterConfig())  # those of each block can, though stage=router does not train them
    routers = save_tiny_routers(dit, dense / "dense" / "routers")
    other = ShapeDiT(replace(dit.config, single_blocks=4, width=64))
    save_tiny_routers(other, routers)
    with pytest.raises(UserError, match="model.safetensors does not fit Routers: "):
        run_stage(config)
    config_of_routers = load_json(routers / "config.json")
    save_json({**config_of_routers, "scope": "block", "trained_steps": [4, 6]}, routers / "config.json")
    message = "routers has per-block routers for few steps, .*: stage=export of the run that trained them"
    with pytest.raises(UserError, match=message):
        run_stage(config)
    third_party = {**config_of_routers, "_class_name": "FluxTransformer2DModelRouters"}
    save_json(third_party, routers / "config.json")
    with pytest.raises(UserError, match="a FluxTransformer2DModelRouters, expected a ShapeDiTRouters"):
        run_stage(config)
