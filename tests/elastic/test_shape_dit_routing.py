"""The shape DiT with routers at its default size, and under the sampler."""

from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from elastic3d.benchmark.controls import TableRoutes
from elastic3d.diffusion.sampler import sample, timestep_grid
from elastic3d.elastic import attach, detach, load_routers, save_routers
from elastic3d.elastic.attachment import router_modules
from elastic3d.elastic.config import BlockCacheConfig, CacheRule, ElasticConfig, RouterConfig
from elastic3d.elastic.families import dense_flops
from elastic3d.elastic.trace import trace_dense_flops, trace_router_flops, trace_share
from elastic3d.errors import UserError
from elastic3d.models.options import DiTConfig
from elastic3d.models.shape_dit import ShapeDiT
from elastic3d.utils.options import from_dict

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def tiny(**changes) -> ShapeDiT:
    torch.manual_seed(0)
    defaults = {"in_channels": 4, "condition_channels": 6, "width": 32, "heads": 2, "double_blocks": 1,
                "single_blocks": 2}  # fmt: skip
    model = ShapeDiT(DiTConfig(**(defaults | changes))).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    return model


def generate(model: ShapeDiT, session=None, seeds=(0, 1), guidance: float = 2.0, steps: int = 6):
    condition = torch.stack(
        [torch.randn(5, 6, generator=torch.Generator().manual_seed(7 + s)) for s in seeds]
    )
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return sample(model, condition, (10, 4), timestep_grid(steps), guidance, generators, session=session)


def test_routers_are_light_at_the_default_size():
    """Under 3 % of the parameters and under 2 % of the dense FLOPs."""
    config = DiTConfig(double_blocks=2, single_blocks=14, width=256, num_latents=128, condition_tokens=49)
    model = ShapeDiT(config)
    base = sum(p.numel() for p in model.parameters())
    session = attach(model)
    assert sum(p.numel() for p in router_modules(model).parameters()) < 0.03 * base
    session.begin(1, 1)
    session.step(0, 0.1)
    with torch.no_grad():
        model(torch.randn(2, 128, 19), torch.zeros(2), torch.randn(2, 49, 768))
    dense = trace_dense_flops(session.trace).sum().item()
    assert dense == 2 * dense_flops(model, session.adapter, [128, 49])
    assert trace_router_flops(session.trace).sum() < 0.02 * dense
    assert trace_share(session.trace).tolist() == [1.0]


def test_sampling_with_every_block_or_not_elastic_is_the_dense_generation_bit_for_bit():
    model = tiny()
    dense = generate(model)
    session = attach(model)
    assert torch.equal(generate(model, session), dense)
    assert session.trace.actions.unique().tolist() == [4]
    session.settings = ElasticConfig(elastic=False)
    assert torch.equal(generate(model, session), dense)
    detach(model)
    assert torch.equal(generate(model), dense)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_generated_sample_does_not_depend_on_its_batch_mates(guidance):
    model = tiny()
    session = attach(model, RouterConfig(initial_keep=0.5, initial_width_bias=0, head_std=3.0))
    session.settings = ElasticConfig(
        cache=BlockCacheConfig(rule=CacheRule.band, band=0.3, skipped_reuse=True)
    )
    together = generate(model, session, (0, 1, 2), guidance)
    actions, shares = session.trace.actions, trace_share(session.trace)
    assert (actions == -1).any() and (actions[:, 1] == -2).all() == (guidance == 1.0)
    for seed in (0, 1, 2):
        alone = generate(model, session, (seed,), guidance)
        assert torch.equal(session.trace.actions[:, :, 0], actions[:, :, seed])
        torch.testing.assert_close(alone[0], together[seed], rtol=1e-3, atol=1e-4)
        assert trace_share(session.trace)[0] == shares[seed]


def test_a_generation_can_be_replayed_from_its_trace():
    model = tiny()
    session = attach(model, RouterConfig(initial_keep=0.5, initial_width_bias=0, head_std=3.0))
    first = generate(model, session)
    session.source = TableRoutes(session.trace.actions.clamp_min(0), len(session.trace.ratios))
    assert torch.equal(generate(model, session), first)
    with pytest.raises(ValueError, match="actions from 0 to 7, expected 0 to 4"):
        TableRoutes(torch.full((1, 1, 1, 2), 7) * torch.tensor([0, 1]), 4)


def test_caches_are_freed_and_budgets_checked():
    model = tiny()
    session = attach(model)
    generate(model, session)
    assert session.cache is None and session.current is None
    with pytest.raises(ValueError, match="3 budgets for 2 samples"):
        session.begin(2, 4, [0.5, 0.5, 0.5])
    with pytest.raises(ValueError, match="budget is 0.2, expected a value from 0.3 to 1"):
        session.begin(2, 4, [0.5, 0.2])


def test_the_budget_reaches_the_routers_for_each_sample():
    model = tiny()
    session = attach(model)
    session.begin(2, 4, [0.5, 1.0])
    session.step(0, 0.25)
    session.before_forward(model, (), {"t": torch.zeros(4)})
    assert session.current.budget.tolist() == [0.5, 1.0, 0.5, 1.0]
    assert session.current.branch.tolist() == [0, 0, 1, 1]


def test_routers_of_another_model_or_broken_ones_are_refused_and_nothing_changes(tmp_path):
    model, other = tiny(), tiny(single_blocks=3)
    attach(model)
    save_routers(model, tmp_path)
    keys = [name for name, _ in other.named_parameters()]
    with pytest.raises(UserError, match="missing"):
        attach(other, tmp_path)
    assert [name for name, _ in other.named_parameters()] == keys
    with pytest.raises(UserError, match="no folder"):
        attach(other, tmp_path / "nowhere")
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="truncated"):
        load_routers(model, tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "FluxRouters"}')
    with pytest.raises(UserError, match="describes a FluxRouters, expected a ShapeDiTRouters"):
        attach(other, tmp_path)


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("cache/*.yaml")) + sorted(CONFIGS.glob("router/*.yaml")))
def test_shipped_configurations_build(file):
    kind = BlockCacheConfig if file.parent.name == "cache" else RouterConfig
    from_dict(kind, yaml.safe_load(file.read_text()), str(file))
