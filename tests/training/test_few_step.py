"""The few-step LoRA, trained through whole generations on a tiny dense model, by the commands."""

import shutil
from dataclasses import replace

import pytest
import torch
from _cli import parse
from torch.utils.data import default_collate

from elastic3d.elastic.config import ElasticConfig, RouterConfig, Scope
from elastic3d.elastic.few_step import LowRankUpdate
from elastic3d.elastic.trace import NOT_RUN, trace_share
from elastic3d.errors import UserError
from elastic3d.models.shape_dit import ShapeDiT
from elastic3d.models.weights import read_weights
from elastic3d.pipelines import runtime
from elastic3d.pipelines.image_to_3d import ImageTo3DPipeline
from elastic3d.training.distributed import state_bytes
from elastic3d.training.export import StoredFormat
from elastic3d.training.few_step import FewStepStage, ShapeFewStepConfig, relative_errors
from elastic3d.training.journal import read_metrics
from elastic3d.training.mesh_loss import FewStepMeshLossConfig
from elastic3d.training.options import StageName
from elastic3d.training.shape_flow import FewStepTrainConfig
from elastic3d.training.stages import run_stage
from elastic3d.utils.files import load_json, save_json
from tests.training.test_calibrate import save_tiny_routers
from tests.training.tiny import dit_config as config_for
from tests.training.tiny import export_of, gradients

pytestmark = pytest.mark.usefixtures("few_tries")

ROUTERS = RouterConfig(scope=Scope.step, longest=3, widths=1, head_std=0.3)


def few_step_config(root, few_step=None, **changes) -> FewStepTrainConfig:
    options = dict(model=root / "dense", rank=4, min_nfe=2, max_nfe=3, min_steps=2, max_steps=4,
                   reference_steps=8, pairs=6, val_shapes=1)  # fmt: skip
    settings = dict(
        stage=StageName.few_step, name="few_step", few_step=ShapeFewStepConfig(**options | (few_step or {}))
    )
    return config_for(root, **(settings | changes))


@pytest.fixture
def routed(dense):
    path = dense / "dense" / "pipeline.json"
    save_json({**load_json(path), "steps": 4, "guidance": 2.5, "solver": "ab2", "shift": 2.0}, path)
    save_tiny_routers(ShapeDiT.from_pretrained(dense / "dense" / "dit"), dense / "dense" / "routers", ROUTERS)
    return dense


def test_the_shipped_configuration_suits_the_stage():
    config = parse(FewStepTrainConfig, "train", ["stage=few_step"])
    assert config.stage is StageName.few_step
    assert (config.few_step.rank, config.few_step.max_nfe, config.weight_decay) == (32, 8.0, 0.0)


def test_a_batch_has_one_number_of_steps_and_one_nfe_and_pairs_repeat(routed):
    stage = FewStepStage(few_step_config(routed, batch=3))
    items = [stage.items.item(position, 5) for position in range(30)]
    for start in range(0, 30, 3):
        batch = default_collate(items[start : start + 3])
        steps, nfe = batch["steps"][0].item(), batch["nfe"][0].item()
        assert (batch["steps"] == steps).all() and (batch["nfe"] == nfe).all()
        assert 2 <= steps <= 4 and 2 <= nfe <= min(3, steps)
    assert len({item["steps"].item() for item in items}) > 1
    known = {}
    for item in items:
        pair = item["pair"].item()
        assert 0 <= pair < 6
        assert torch.equal(known.setdefault(pair, item["noise"]), item["noise"])
    assert not torch.equal(known[0], known[1])


def test_a_share_of_the_batches_runs_every_block(routed):
    stage = FewStepStage(
        few_step_config(
            routed,
            {"whole": 0.5, "min_steps": 3, "max_steps": 9, "max_nfe": 4.5, "reference_steps": 9},
            batch=3,
        )
    )
    items = [stage.items.item(position, 5) for position in range(0, 120, 3)]
    whole = [int(item["steps"]) for item in items if item["nfe"] == item["steps"]]
    assert set(whole) == {3, 4}  # from min_steps to max_nfe
    assert 10 < len(whole) < 30
    assert any(item["steps"] > 4 for item in items)  # the others have routes
    stage = FewStepStage(few_step_config(routed, {"whole": 1.0}))
    objective, batch = stage.objective, default_collate([stage.items.item(0, 5)])
    objective(batch)
    assert len(objective.session.trace.actions) == int(batch["steps"][0])
    assert trace_share(objective.session.trace).item() == 1.0


def test_moves_of_the_sampler_are_counted(routed):
    """Where four steps are three moves, these are the most, and an NFE of three runs every block."""
    path = routed / "dense" / "pipeline.json"
    save_json({**load_json(path), "grid": "endpoint"}, path)
    stage = FewStepStage(few_step_config(routed, {"min_nfe": 3, "min_steps": 4}))
    objective = stage.objective
    objective(default_collate([stage.items.item(0, 5)]))
    assert objective.session.router_config.few_step_max_steps == 3 == len(objective.session.trace.actions)
    assert objective.session._budget.item() == 1.0 and objective.session.coarseness == 0


def test_only_the_lora_learns_and_the_error_falls(routed):
    stage = FewStepStage(few_step_config(routed, batch=4))
    objective = stage.objective
    batch = default_collate([stage.items.item(position, 0) for position in range(4)])
    trainable = {name for name, p in objective.named_parameters() if p.requires_grad}
    assert trainable == set(objective.state_dict()) and all(
        name.startswith("few_step.") for name in trainable
    )
    assert not any(
        p.requires_grad
        for p in objective.flow.dit.parameters()
        if id(p) not in set(map(id, objective.parameters()))
    )
    optimizer = torch.optim.Adam(objective.parameters(), 3e-3)
    errors = []
    for _ in range(15):
        loss, values = objective(batch)
        errors.append(values["error"].item())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.parameters())
        optimizer.step()
    assert errors[-1] < 0.8 * errors[0]


def test_the_frozen_model_counts_and_is_not_sharded(routed, monkeypatch):
    config = few_step_config(routed)
    stage = FewStepStage(config)
    lora, frozen = (sum(p.nbytes for p in m.parameters()) for m in (stage.objective, stage.flow.dit))
    assert stage.frozen is stage.flow.dit and frozen > 0
    assert state_bytes(stage.objective, config, frozen=stage.frozen) == frozen + lora // 4 * (4 + 4 + 4 + 8)
    monkeypatch.setattr("elastic3d.training.distributed.free_memory", lambda device: -frozen)
    with pytest.raises(UserError, match=r"need 0.0 GB of cpu .* are there: take precision=bf16_master$"):
        run_stage(config)
    monkeypatch.setattr("elastic3d.training.loop.wants_sharding", lambda accelerator: True)
    with pytest.raises(UserError, match="stage=few_step can't be sharded, as each process keeps its frozen"):
        run_stage(config)
    assert not config.folder.exists()


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_micro_batches_have_the_gradients_of_their_whole(routed, weight):
    mesh = FewStepMeshLossConfig(
        weight=weight, chamfer=0.0, normals=0.0
    )  # differences of nearly equal fields
    stage = FewStepStage(few_step_config(routed, {"mesh": mesh}, batch=4))
    whole = gradients(stage, 1)
    for accumulate in (2, 4):
        torch.testing.assert_close(gradients(stage, accumulate), whole, rtol=1e-4, atol=1e-5)


def test_dense_results_are_computed_once(routed, monkeypatch):
    stage = FewStepStage(few_step_config(routed, batch=3))
    objective, asked = stage.objective, []
    generate = objective.generate
    monkeypatch.setattr(
        objective, "generate", lambda b, s, c: asked.append(len(b["noise"])) or generate(b, s, c)
    )
    items = [stage.items.item(position, 0) for position in range(4)]
    first = objective.dense_results(default_collate(items[:3]))
    both = objective.dense_results(default_collate(items))
    assert asked == [3, 1] and torch.equal(first, both[:3])
    expected = generate(default_collate(items), 8, ElasticConfig(elastic=False))
    torch.testing.assert_close(both, expected, rtol=1e-4, atol=1e-5)
    assert relative_errors(2 * expected, expected).tolist() == pytest.approx([1.0] * 4)


def test_errors_of_anchors_can_count_more(routed):
    objective = FewStepStage(few_step_config(routed, {"anchor_weight": 5.0})).objective
    assert objective.weights.tolist() == [5.0] * 3 + [1.0] * 4  # xyz before the features
    true = torch.ones(1, 8, 7)
    anchors, features = true.clone(), true.clone()
    anchors[..., 0] += 1
    features[..., 6] += 1
    found = [relative_errors(x, true, objective.weights).item() for x in (anchors, features)]
    assert found == pytest.approx([5 / 19, 1 / 19])


def test_the_mesh_alone_reaches_the_lora_and_needs_no_dense_generation(routed, monkeypatch):
    options = {"latent_weight": 0.0, "mesh": FewStepMeshLossConfig(weight=1.0, dense=0.0)}
    stage = FewStepStage(few_step_config(routed, options, batch=4))
    objective = stage.objective
    batch = default_collate([stage.items.item(position, 0) for position in range(4)])
    monkeypatch.setattr(objective, "dense", lambda batch: pytest.fail("a dense generation"))
    loss, values = objective(batch)
    loss.backward()
    assert set(values) == {"nfe", "mesh_field", "mesh_chamfer", "mesh_normals"}
    expected = values["mesh_field"] + 10 * values["mesh_chamfer"] + 0.1 * values["mesh_normals"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    ups = [p.grad for name, p in objective.named_parameters() if name.endswith(".up")]
    assert all(g.isfinite().all() for g in ups) and sum(bool(g.any()) for g in ups) > len(ups) / 2
    with pytest.raises(ValueError, match="latent_weight is 0, expected more where mesh.weight is 0"):
        ShapeFewStepConfig(latent_weight=0.0).check()


def test_the_field_of_the_dense_model_is_one_of_the_terms(routed):
    only = dict.fromkeys(("field", "chamfer", "normals"), 0.0)
    options = {"mesh": FewStepMeshLossConfig(weight=1.0, dense=1.0, **only)}
    stage = FewStepStage(few_step_config(routed, options, batch=4))
    objective = stage.objective
    batch = default_collate([stage.items.item(position, 0) for position in range(4)])
    loss, values = objective(batch)
    loss.backward()
    assert values["mesh_dense"] > 0 and "mesh_field" not in values
    ups = [p.grad for name, p in objective.named_parameters() if name.endswith(".up")]
    assert all(g.isfinite().all() for g in ups) and sum(bool(g.any()) for g in ups) > len(ups) / 2
    without = FewStepStage(few_step_config(routed))
    assert without.flow.meshes is None and "points" not in without.items.item(0, 0)


def test_train_export_and_generate(routed, monkeypatch):
    monkeypatch.setattr(runtime, "_PACKAGE", routed / "elastic3d")
    (routed / "data" / "pretrained").mkdir(parents=True)
    (routed / "data" / "pretrained" / "tiny").symlink_to(routed / "dense")
    before = read_weights(routed / "dense" / "routers" / "model.safetensors")
    named = {"model": "tiny"}  # as that of a bundled model
    assert run_stage(few_step_config(routed, named, steps=3, validate_every=3)) == 0
    rows = read_metrics(routed / "runs" / "few_step" / "metrics.jsonl")
    assert any(name.startswith("val/adapted_") for row in rows for name in row)
    output = routed / "dense"
    export = export_of(few_step_config(routed, named), output)
    for _ in range(2):  # a second export finds a few-step LoRA there already
        assert run_stage(export) == 0
    after = read_weights(output / "routers" / "model.safetensors")
    assert all(torch.equal(after[key], value) for key, value in before.items())
    ups = [value for key, value in after.items() if key.endswith(".up")]
    assert ups and any(value.any() for value in ups) and all(v.dtype == torch.bfloat16 for v in ups)
    packed = export_of(
        few_step_config(routed, named), routed / "packed", export={"weights": StoredFormat.int8}
    )
    assert run_stage(packed) == 0
    smaller = read_weights(routed / "packed" / "routers" / "model.safetensors")
    assert smaller.keys() == after.keys()
    for key, value in after.items():
        step = value.float().abs().amax(-1, keepdim=True) / (127 if value.ndim == 2 else 256)
        assert ((smaller[key].float() - value.float()).abs() <= 0.51 * step).all(), key
    assert load_json(output / "routers" / "few_step.json")["steps"] == 3
    assert load_json(output / "routers" / "training.json") == {"steps": 7}  # of the routers, as before
    assert (output / "routers" / "few_step.csv").is_file()
    other = routed / "other"
    (other / "routers").mkdir(parents=True)
    (other / "routers" / "calibration.json").write_text("{}")  # of other routers
    assert run_stage(export_of(few_step_config(routed, named), other)) == 0
    assert not (other / "routers" / "calibration.json").exists()
    assert load_json(other / "routers" / "training.json") == {"steps": 7}
    pipeline = ImageTo3DPipeline.from_pretrained(output, "cpu", "float32")
    assert pipeline.session.router_config == replace(
        ROUTERS, few_step_rank=4, few_step_nfe=3, few_step_max_steps=4
    )


def test_guidance_is_learned_from_the_lora_that_is_there(routed):
    assert run_stage(few_step_config(routed, steps=2)) == 0
    output = routed / "dense"
    assert run_stage(export_of(few_step_config(routed), output)) == 0
    first = read_weights(output / "routers" / "model.safetensors")

    options = {"continued": True, "guidance": True, "max_nfe": 4}
    objective = FewStepStage(few_step_config(routed, options)).objective
    parts = {
        name: part for block in objective.session.blocks for name, part in block.few_step.named_modules()
    }
    assert all(not isinstance(part, LowRankUpdate) or part.up.any() for part in parts.values())
    batch = default_collate([FewStepStage(few_step_config(routed)).items.item(0, 0)])
    objective.generate(batch, 4, ElasticConfig())
    assert (objective.session.trace.actions[:, 1] == NOT_RUN).all()

    assert run_stage(few_step_config(routed, options, steps=2, name="guided")) == 0
    assert run_stage(export_of(few_step_config(routed, options, name="guided"), output)) == 0
    pipeline = ImageTo3DPipeline.from_pretrained(output, "cpu", "float32")
    assert pipeline.session.router_config == replace(
        ROUTERS, few_step_rank=4, few_step_nfe=4, few_step_max_steps=4, few_step_guidance=2.5
    )
    after = read_weights(output / "routers" / "model.safetensors")
    assert any(not torch.equal(after[key], value) for key, value in first.items() if key.endswith(".up"))

    with pytest.raises(
        UserError, match=r"few_step.rank is 3, expected at least that of .*routers to go on, which is 4"
    ):
        FewStepStage(few_step_config(routed, options | {"rank": 3}))


def test_a_larger_rank_goes_on_from_the_same_generations(routed):
    options = {"continued": True}
    with pytest.raises(UserError, match="few_step.continued is true, but .*routers has no few-step LoRA"):
        FewStepStage(few_step_config(routed, options))
    assert run_stage(few_step_config(routed, steps=2, learning_rate=0.03)) == 0
    assert run_stage(export_of(few_step_config(routed), routed / "dense")) == 0
    same, larger = (FewStepStage(few_step_config(routed, options | {"rank": rank})) for rank in (4, 6))
    batch = default_collate([same.items.item(0, 0)])
    fresh = FewStepStage(few_step_config(routed)).objective.generate(batch, 3, ElasticConfig())
    first, second = (stage.objective.generate(batch, 3, ElasticConfig()) for stage in (same, larger))
    torch.testing.assert_close(first, second)
    assert not torch.allclose(first, fresh, atol=1e-3)
    ups = [p for name, p in larger.objective.named_parameters() if name.endswith(".up")]
    assert all(p.shape[1] == 6 and p[:, :4].any() and not p[:, 4:].any() for p in ups)
    larger.objective(batch)[0].backward()
    assert all(p.grad[:, 4:].any() for p in ups)  # the new directions learn


def test_what_does_not_fit_is_said(routed):
    shutil.rmtree(routed / "dense" / "routers")
    with pytest.raises(UserError, match="has no routers, expected a folder routers in it"):
        FewStepStage(few_step_config(routed))
    with pytest.raises(ValueError, match="max_nfe is 1"):
        ShapeFewStepConfig(min_nfe=2, max_nfe=1)
    with pytest.raises(ValueError, match="guided_times is .*, expected none: guidance is false"):
        ShapeFewStepConfig(guided_times=[0.1, 0.3])
    with pytest.raises(ValueError, match=r"whole is 0.2, expected 0: no number of .* between 4.2 and 4.8"):
        ShapeFewStepConfig(whole=0.2, min_nfe=4.2, max_nfe=4.8)
    with pytest.raises(ValueError, match=r"whole is 0.2, expected 0: no number of .* between 9 and 8"):
        ShapeFewStepConfig(whole=0.2, min_steps=9)
    with pytest.raises(ValueError, match="max_steps is 40, expected at most 26"):
        ShapeFewStepConfig(max_steps=40)
    with pytest.raises(ValueError, match="reference_steps is 10"):
        ShapeFewStepConfig(reference_steps=10)
