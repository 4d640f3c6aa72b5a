"""TripoSG and Step1X-3D against their arithmetic written out a second time, at tiny size; sizes as published."""

from __future__ import annotations

import math
from pathlib import Path

import open_oracles as oracle
import pytest
import torch
from open_models import (
    CONTEXT,
    states,
    step1x_dit,
    step1x_vae,
    triposg_dit,
    triposg_vae,
    write_folder,
)
from torch import Tensor

from elastic3d.checkpoints.bundle import Bundle, on_meta, parameter_count
from elastic3d.checkpoints.step1x3d import dit_rows as step1x_rows
from elastic3d.checkpoints.step1x3d import load_step1x3d
from elastic3d.checkpoints.step1x3d import vae_rows as step1x_vae_rows
from elastic3d.checkpoints.triposg import dit_rows, load_triposg, vae_rows
from elastic3d.diffusion.sampler import late_start_grid
from elastic3d.models.skip_dit import SkipDiT
from elastic3d.studies.full_size import published

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def triposg(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return load_triposg(write_folder(tmp_path_factory.mktemp("triposg"), "triposg"))


@pytest.fixture(scope="module")
def step1x(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return load_step1x3d(write_folder(tmp_path_factory.mktemp("step1x"), "step1x3d"))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def triposg_velocity(x: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
    return oracle.triposg_output(states("triposg")[0], 2, 5, x, 1000 * sigma, condition)


def step1x_velocity(x: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
    """noise - data, the original's own direction."""
    return oracle.step1x_output(states("step1x3d")[0], 2, 2, 2, x, 1000 * sigma, condition)


@torch.no_grad()
def test_velocities(triposg: Bundle, step1x: Bundle) -> None:
    x, condition, t = normal(2, 7, 8), normal(2, 5, CONTEXT, seed=1), torch.tensor([0.0, 0.37])
    torch.testing.assert_close(triposg.dit(x, t, condition), triposg_velocity(x, 1 - t, condition), **CLOSE)
    torch.testing.assert_close(step1x.dit(x, t, condition), -step1x_velocity(x, 1 - t, condition), **CLOSE)


@torch.no_grad()
def test_fields_are_positive_inside(triposg: Bundle, step1x: Bundle) -> None:
    latents, points = normal(2, 6, 8), 2 * torch.rand(2, 40, 3) - 1
    field = triposg.vae.query(points, triposg.vae.decode(latents))
    torch.testing.assert_close(
        field, -oracle.triposg_field(states("triposg")[1], 2, 2, latents, points), **CLOSE
    )
    field = step1x.vae.query(points, step1x.vae.decode(latents))
    wanted = oracle.step1x_field(states("step1x3d")[1], 2, 2, 0.9, latents, points)
    torch.testing.assert_close(field, wanted, **CLOSE)


@torch.no_grad()
def test_encoders(triposg: Bundle, step1x: Bundle) -> None:
    """Which query points are drawn is this project's choice; what becomes of them is the original's."""
    surface, sharp = normal(1, 30, 6, seed=2), normal(1, 20, 6, seed=3)
    triposg.vae.encoder.config.num_latents = 5
    triposg.vae.encoder.config.query_pool = 12
    chosen = oracle.farthest(surface[0, :12, :3], 5)
    moments = oracle.triposg_moments(states("triposg")[1], 2, 2, surface, chosen)
    found = triposg.vae.encode(surface)
    torch.testing.assert_close(torch.cat([found.mean, found.logvar], -1), moments, **CLOSE)

    both = (oracle.farthest(surface[0, :, :3], 3), oracle.farthest(sharp[0, :, :3], 3))
    moments = oracle.step1x_moments(states("step1x3d")[1], 2, 2, surface, sharp, both)
    found = step1x.vae.encode(surface, sharp)
    torch.testing.assert_close(torch.cat([found.mean, found.logvar], -1), moments, **CLOSE)
    with pytest.raises(ValueError, match="needs sharp-edge points"):
        step1x.vae.encode(surface)


def guided(velocity, x: Tensor, sigma: float, condition: Tensor, scale: float) -> Tensor:  # type: ignore[no-untyped-def]
    sigmas = torch.full((len(x),), sigma)
    with_image = velocity(x, sigmas, condition)
    if scale <= 1:
        return with_image
    without = velocity(x, sigmas, torch.zeros_like(condition))
    return without + scale * (with_image - without)


@torch.no_grad()
@pytest.mark.parametrize("scale", [7.0, 1.0, 0.0])
def test_sampling_of_triposg(triposg: Bundle, scale: float) -> None:
    x, condition, steps = normal(2, 6, 8), normal(2, 5, CONTEXT, seed=1), 4
    found = triposg.sample(condition, x, steps, scale)
    sigmas = [1 - i / steps for i in range(steps)] + [0.0]
    for now, after in zip(sigmas, sigmas[1:], strict=False):
        x = x + (now - after) * guided(triposg_velocity, x, now, condition, scale)
    torch.testing.assert_close(found, x, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_sampling_of_step1x(step1x: Bundle) -> None:
    """The original computes a velocity at its first step and multiplies it by nothing."""
    x, condition, steps, scale = normal(2, 6, 8), normal(2, 5, CONTEXT, seed=1), 5, 7.5
    found = step1x.sample(condition, x, steps, scale)
    sigmas = [1 + (0.001 - 1) * i / (steps - 1) for i in range(steps)] + [0.0]
    for i, (now, after) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
        out = guided(step1x_velocity, x, now, condition, scale) * (0.0 if i == 0 else 1.0)
        x = x + (after - now) * out
    torch.testing.assert_close(found, x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_times_of_step1x_are_those_of_the_scheduler(shift: float) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    scheduler.set_timesteps(30)
    torch.testing.assert_close(late_start_grid(30, shift), 1 - scheduler.sigmas[1:])


def test_image_tokens(triposg: Bundle, step1x: Bundle) -> None:
    """TripoSG reads the middle of a larger image; Step1X-3D's register tokens are dropped."""
    assert triposg.conditioner is not None and step1x.conditioner is not None
    image = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    pixels = (image[..., 2:30, 2:30] - mean) / std
    wanted = triposg.conditioner.network(pixels).last_hidden_state
    torch.testing.assert_close(triposg.conditioner(image), wanted)
    assert wanted.shape == (2, 5, CONTEXT) and triposg.dit.config.condition_tokens == 5
    assert (
        triposg.conditioner.config.border == pytest.approx(1 / 6) and step1x.conditioner.config.border == 0.05
    )

    image = image[..., :28, :28]
    whole = step1x.conditioner.network((image - mean) / std).last_hidden_state
    assert whole.shape == (2, 9, CONTEXT)  # class token, four registers, patches
    torch.testing.assert_close(step1x.conditioner(image), torch.cat([whole[:, :1], whole[:, 5:]], dim=1))


def test_published_sizes() -> None:
    """Parameters and tensors of the published files."""
    full = {
        "triposg": {
            "width": 2048, "num_layers": 21, "num_attention_heads": 16, "in_channels": 64,
            "cross_attention_dim": 1024,
        },
        "step1x3d": {
            "width": 1280, "layers": 12, "num_single_layers": 24, "num_heads": 20, "input_channels": 64,
            "condition_dim": 1024,
        },
    }  # fmt: skip
    vaes = {
        "triposg": {
            "width_encoder": 512, "width_decoder": 1024, "num_layers_encoder": 8, "num_layers_decoder": 16,
            "latent_channels": 64,
        },
        "step1x3d": {
            "width": 768, "num_encoder_layers": 8, "num_decoder_layers": 16, "embed_dim": 64,
        },
    }  # fmt: skip
    for name, dit, dit_tensors, vae, vae_tensors, layouts in (
        ("triposg", 1_439_556_160, 554, 242_662_017, 356, (triposg_dit, triposg_vae)),
        ("step1x3d", 1_316_287_808, 732, 191_591_553, 322, (step1x_dit, step1x_vae)),
    ):
        model = published(name)
        assert parameter_count(model.dit) == dit and parameter_count(model.vae) == vae
        shapes = (layouts[0](full[name]), layouts[1](vaes[name]))
        rows = (dit_rows, vae_rows) if name == "triposg" else (step1x_rows, step1x_vae_rows)
        for written, found, count, total in zip(
            shapes, rows, (dit_tensors, vae_tensors), (dit, vae), strict=True
        ):
            config = model.dit if total == dit else model.vae
            names = {theirs for row in found(config) for theirs in row.theirs}  # type: ignore[operator]
            assert names == set(written) and len(names) == count
            assert sum(math.prod(shape) for shape in written.values()) == total


def test_half_precision_and_classes(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", "triposg")
    bundle = load_triposg(folder, dtype=torch.bfloat16)
    assert isinstance(bundle.dit, SkipDiT) and bundle.dit.x_embedder.weight.dtype == torch.bfloat16
    assert isinstance(on_meta(published("step1x3d").dit).time_in.mlp[0], torch.nn.Linear)
    latents = bundle.sample(normal(1, 5, CONTEXT), normal(1, 6, 8), 2, 7.0)
    assert latents.dtype == torch.float32 and latents.isfinite().all()
