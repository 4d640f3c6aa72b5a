import pytest
import torch

from elastic3d.models import shape_vae
from elastic3d.models.options import VAEConfig
from elastic3d.models.shape_vae import ShapeVAE


def vae_of(**changes):
    torch.manual_seed(0)
    config = {"num_latents": 20, "latent_channels": 4, "width": 32, "heads": 2, "encoder_layers": 0,
              "decoder_layers": 1, "anchored": True, "neighbours_out": 4, "local_width": 16}  # fmt: skip
    return ShapeVAE(VAEConfig(**(config | changes))).eval()


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_freqs": 6}, {"include_pi": True}, {"neighbours_out": 0}, {"neighbours_out": 1},
     {"anchored": False}, {"anchored": False, "geo_downsample": 2}, {"geo_downsample": 2}, {"qk_norm": False}],
)  # fmt: skip
def test_the_field_equals_query(changes, monkeypatch):
    monkeypatch.setattr(shape_vae, "_ROWS", 64)
    vae = vae_of(**changes)
    points = torch.rand(1, 300, 3) * 2 - 1
    with torch.no_grad():
        tokens = vae.decode(torch.randn(2, 20, vae.config.channels))
        for one in tokens.split(1):
            found, expected = vae.field(one)(points[0]), vae.query(points, one)[0]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_half_precision_is_as_near_to_full_precision_as_the_modules_themselves():
    half = vae_of().bfloat16()
    full = vae_of()
    full.load_state_dict(half.state_dict())
    points, latents = torch.rand(1, 2000, 3) * 2 - 1, torch.randn(1, 20, 7)
    with torch.no_grad():
        tokens = half.decode(latents)
        exact = full.query(points, tokens)
        found, plain = half.field(tokens)(points[0])[None], half.query(points, tokens)
    assert (found - exact).abs().mean() <= 1.05 * (plain - exact).abs().mean()
    assert (found - exact).abs().max() <= 1.5 * (plain - exact).abs().max()


def test_a_point_on_an_anchor_and_one_far_away():
    vae = vae_of()
    with torch.no_grad():
        tokens = vae.decode(torch.randn(1, 20, 7))
        points = torch.cat([tokens[0, :3, :3], torch.full((1, 3), 50.0)])[None]
        found, expected = vae.field(tokens)(points[0])[None], vae.query(points, tokens)
    torch.testing.assert_close(found[:, :3], expected[:, :3], rtol=1e-4, atol=1e-4)
    assert found.isfinite().all()


def test_a_call_depends_on_no_other_point():
    vae = vae_of()
    points = torch.rand(400, 3)
    with torch.no_grad():
        field = vae.field(vae.decode(torch.randn(1, 20, 7)))
        whole, first = field(points), field(points[:100])
    torch.testing.assert_close(whole[:100], first, rtol=1e-5, atol=1e-5)
