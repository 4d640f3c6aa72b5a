import pytest
import torch
from torch import nn

from elastic3d.models.initialise import without_random_weights
from elastic3d.models.options import VAEConfig
from elastic3d.models.shape_vae import ShapeVAE
from elastic3d.models.weights import all_finite


def test_a_model_from_a_file_draws_no_random_numbers(tmp_path):
    config = {
        "num_latents": 8,
        "width": 32,
        "heads": 2,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "anchored": True,
    }
    saved = ShapeVAE(VAEConfig(**config, latent_channels=2, latent_mean=[0.5] * 5))
    saved.save_pretrained(tmp_path)
    before = torch.get_rng_state()
    loaded = ShapeVAE.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(loaded.latent_mean, torch.full((5,), 0.5))
    for name, value in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_constants_are_set_and_fresh_models_are_random():
    with without_random_weights():
        assert torch.equal(nn.LayerNorm(4).weight, torch.ones(4))
        assert torch.randn(2, 3, generator=torch.Generator()).shape == (2, 3)
    assert nn.Linear(50, 50).weight.std() > 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64])
def test_finite_values(dtype):
    values = torch.arange(100).to(dtype)
    assert all_finite(values) and all_finite(values[:0])
    if dtype.is_floating_point:
        for bad in (torch.nan, torch.inf, -torch.inf):
            for place in (0, 37, 99):
                broken = values.clone()
                broken[place] = bad
                assert not all_finite(broken)
