"""A decoder that learns from what a DiT makes, or from latents with errors; the encoder stays as it was."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from elastic3d.errors import UserError
from elastic3d.models.options import DiTConfig
from elastic3d.models.shape_vae import ShapeVAE
from elastic3d.training.checkpoint import load_checkpoint
from elastic3d.training.datasets import PreparedShapes, item_generator
from elastic3d.training.dit import DiTStageConfig
from elastic3d.training.journal import read_metrics
from elastic3d.training.latents import LatentsConfig, build_cache
from elastic3d.training.options import StageName
from elastic3d.training.rollouts import RolloutsConfig, build_rollouts
from elastic3d.training.stages import run_stage
from elastic3d.training.vae import RolloutItems, TrainedPart, VAEItems
from tests.training.test_dit import add_views
from tests.training.tiny import export_of, tiny_vae, vae_config


@pytest.fixture
def rolled(prepared):
    """A data folder with the pipeline `model` and what its DiT makes of noised latents."""
    add_views(prepared)
    torch.manual_seed(0)
    ShapeVAE(tiny_vae()).save_pretrained(prepared / "vae")
    latents = LatentsConfig(
        output=prepared / "latents", vae=prepared / "vae", variants=2, views=2, batch=2, mirror=True
    )
    build_cache(vae_config(prepared, StageName.cache, latents=latents))
    dit = DiTStageConfig(model=DiTConfig(width=32, heads=2, double_blocks=1, single_blocks=1))
    trained = vae_config(prepared, StageName.dit, name="dit", latents=latents, dit=dit, steps=2)
    assert run_stage(trained) == 0
    assert run_stage(export_of(trained, prepared / "model")) == 0
    build_rollouts(rollouts_of(prepared))
    return prepared


def rollouts_of(root, **changes):
    options = dict(output=root / "rollouts", model=root / "model", samples=3, earliest=0.2, steps=3, batch=2)
    rollouts = RolloutsConfig(**{**options, **changes})
    return vae_config(
        root, StageName.rollouts, latents=LatentsConfig(output=root / "latents"), rollouts=rollouts
    )


def decoder_config(root, **changes):
    config = vae_config(root, name="decoder", init_from=root / "model", **changes)
    config.vae.trained = TrainedPart.decoder
    return config


def test_the_later_a_rollout_starts_the_nearer_it_ends(rolled):
    shapes = PreparedShapes(rolled / "rollouts", [f"balls/ball{i}" for i in range(6)])
    found, true = (torch.stack([shapes.read(id, n).float() for id in shapes.ids]) for n in ("found", "true"))
    assert found.shape == true.shape == (6, 3, 8, 7)
    errors = (found - true).square().mean((0, 2, 3))
    assert errors[0] > errors[1] > errors[2] > 0


def test_rollouts_go_on_where_they_stopped_and_refuse_other_settings(rolled):
    first, second = sorted((rolled / "rollouts" / "balls").glob("*.safetensors"))
    before = first.stat().st_mtime_ns, second.read_bytes()
    second.unlink()
    build_rollouts(rollouts_of(rolled))
    assert (first.stat().st_mtime_ns, second.read_bytes()) == before
    with pytest.raises(UserError, match="made with another steps: delete it first"):
        build_rollouts(rollouts_of(rolled, steps=4))


def test_a_mirrored_rollout_has_mirrored_queries(rolled):
    config = vae_config(rolled).vae
    ids = [f"balls/ball{i}" for i in range(5)]
    shapes, made = PreparedShapes(rolled / "prepared", ids), PreparedShapes(rolled / "rollouts", ids)
    items, sides = RolloutItems(shapes, made, config), set()
    queries = VAEItems(shapes, config).queries(ids[0], item_generator(0, 0))
    for id in ids:
        for row, mirrored in enumerate(made.read(id, "mirrored").tolist()):
            item = items.draw(id, row, queries)
            side = torch.tensor([-1.0 if mirrored else 1.0, 1.0, 1.0])
            assert torch.equal(item["points"], side * queries[:, :3])
            sides.add(mirrored)
    assert sides == {0, 1}


@pytest.mark.parametrize("noise", [False, True])
def test_the_decoder_alone_learns(rolled, noise):
    config = decoder_config(rolled, validate_every=6)
    if noise:
        config.vae.latent_noise.anchors, config.vae.latent_noise.features = 0.05, 0.3
    else:
        config.vae.rollouts = rolled / "rollouts"
    assert run_stage(config) == 0
    before, after = (
        load_file(rolled / "model" / "vae" / "model.safetensors"),
        load_checkpoint(config.folder / "checkpoints" / "step-00000006").part("average"),
    )
    changed = {
        n for n, value in before.items() if not torch.allclose(value.float(), after[f"vae.{n}"], atol=1e-6)
    }
    assert not any(n.startswith(("encoder.", "pre_kl.")) for n in changed)
    assert {n.partition(".")[0] for n in changed} >= {"post_kl", "transformer", "geo_decoder"}
    last = read_metrics(config.folder / "metrics.jsonl")[-1]
    assert ("val/volume_iou_of_rollouts" in last) is not noise


def test_a_shipped_decoder_learns_to_move_its_anchors(rolled):
    config = decoder_config(rolled)
    config.vae.rollouts, config.vae.anchor_weight = rolled / "rollouts", 1.0
    config.vae.model.move_anchors = True
    assert run_stage(config) == 0
    assert run_stage(export_of(config, rolled / "moving")) == 0
    moving, before = (
        ShapeVAE.from_pretrained(rolled / "moving"),
        ShapeVAE.from_pretrained(rolled / "model" / "vae"),
    )
    assert moving.config.move_anchors and moving.config.latent_std == before.config.latent_std
    latents = torch.randn(1, 8, 7)
    with torch.no_grad():
        assert not torch.equal(moving.decode(latents)[..., :3], before.decode(latents)[..., :3])


def test_errors_have_the_size_that_was_asked_for(prepared):
    config = vae_config(prepared).vae
    shapes = PreparedShapes(prepared / "prepared", ["balls/ball0"])
    assert "errors" not in VAEItems(shapes, config).item(0, 0)
    config.latent_noise.anchors, config.latent_noise.features = 0.1, 0.5
    items = VAEItems(shapes, config)
    drawn = np.stack([items.errors(np.random.default_rng(i))["errors"].numpy() for i in range(400)])
    # of a size that is uniform from 0 to s the mean square is s^2 / 3
    assert np.square(drawn[..., :3]).mean() ** 0.5 == pytest.approx(0.1 / 3**0.5, rel=0.1)
    assert np.square(drawn[..., 3:]).mean() ** 0.5 == pytest.approx(0.5 / 3**0.5, rel=0.1)
    sizes = np.square(drawn).mean((1, 2)) ** 0.5
    assert sizes.max() > 5 * np.quantile(sizes, 0.1)  # of a sample, not of a token


def test_rollouts_need_a_frozen_encoder(prepared):
    config = vae_config(prepared).vae
    config.rollouts = prepared / "rollouts"
    with pytest.raises(ValueError, match="expected trained=decoder"):
        config.check()
