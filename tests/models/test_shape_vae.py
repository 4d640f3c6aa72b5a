import pytest
import torch

from elastic3d.models.options import VAEConfig
from elastic3d.models.shape_vae import ShapeVAE


def tiny(**changes) -> ShapeVAE:
    torch.manual_seed(0)
    defaults = {
        "num_latents": 8,
        "latent_channels": 4,
        "width": 32,
        "heads": 2,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "num_freqs": 4,
        "neighbours_in": 6,
        "neighbours_out": 4,
        "local_width": 16,
    }
    return ShapeVAE(VAEConfig(**(defaults | changes))).eval()


def cloud(batch: int = 2, points: int = 64) -> torch.Tensor:
    torch.manual_seed(1)
    normals = torch.nn.functional.normalize(torch.randn(batch, points, 3), dim=-1)
    return torch.cat([0.8 * normals, normals], dim=-1)


@pytest.mark.parametrize("anchored", [False, True])
def test_shapes_from_points_to_field(anchored):
    vae = tiny(anchored=anchored)
    posterior = vae.encode(cloud(), cloud(points=16))
    channels = 7 if anchored else 4
    assert posterior.mean.shape == posterior.logvar.shape == (2, 8, channels)
    field = vae.query(torch.rand(2, 30, 3), vae.decode(vae.to_latents(posterior.mean)))
    assert field.shape == (2, 30) and field.dtype == torch.float32
    assert posterior.kl().shape == (2,)


def test_an_anchored_latent_begins_with_a_point_of_the_surface():
    posterior = tiny(anchored=True).encode(cloud())
    distances = torch.cdist(
        posterior.mean[..., :3], cloud()[..., :3], compute_mode="donot_use_mm_for_euclid_dist"
    )
    assert distances.min(dim=-1).values.max() < 1e-6
    assert posterior.kl().isfinite().all()


def test_offsets_move_the_anchors_before_they_are_read():
    vae = tiny(anchored=True)
    offsets = 0.02 * torch.randn(2, 8, 3)
    with torch.no_grad():
        plain, moved = vae.encode(cloud()), vae.encode(cloud(), offsets=offsets)
    torch.testing.assert_close(moved.mean[..., :3], plain.mean[..., :3] + offsets)
    assert (moved.mean[..., 3:] - plain.mean[..., 3:]).abs().amax(dim=-1).min() > 1e-4


def test_a_decoder_that_moves_anchors_begins_where_they_are():
    torch.manual_seed(0)
    plain, moving = tiny(anchored=True), tiny(anchored=True, move_anchors=True)
    moving.load_state_dict(plain.state_dict(), strict=False)
    latents = torch.randn(2, 8, 7)
    torch.testing.assert_close(moving.decode(latents), plain.decode(latents))
    torch.nn.init.constant_(moving.anchor_move.bias, 0.1)
    torch.testing.assert_close(moving.decode(latents)[..., :3], plain.decode(latents)[..., :3] + 0.1)
    moving.query(cloud()[..., :3], moving.decode(latents)).square().mean().backward()
    assert moving.anchor_move.weight.grad.abs().sum() > 0


def test_sharp_stream_supplies_its_share_of_the_anchors():
    vae = tiny(anchored=True, sharp_latents=3)
    sharp = cloud(points=16)
    sharp[..., :3] *= 0.5
    radii = vae.encode(cloud(), sharp).mean[..., :3].norm(dim=-1)
    assert (radii < 0.6).sum(dim=1).tolist() == [3, 3]


def test_a_sample_does_not_depend_on_its_batch_mates():
    vae = tiny(anchored=True)
    points = torch.rand(2, 30, 3)
    with torch.no_grad():
        together, _ = vae(cloud(), None, points)
        alone, _ = vae(cloud()[1:], None, points[1:])
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-5)


def test_standardisation_is_undone_by_the_decoder():
    vae = tiny(anchored=True, scale_factor=2.0)
    raw = vae.encode(cloud()).mean
    plain = vae.decode(vae.to_latents(raw))
    vae.set_latent_statistics([0.1 * i for i in range(7)], [1.0 + i for i in range(7)])
    torch.testing.assert_close(vae.from_latents(vae.to_latents(raw)), raw, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(vae.decode(vae.to_latents(raw)), plain, rtol=1e-3, atol=1e-4)


def test_official_layout_has_the_published_decoder_keys():
    vae = tiny(encoder_layers=0, geo_downsample=2, geo_mlp_ratio=1, geo_ln_post=False)
    keys = set(vae.state_dict())
    assert {"post_kl.weight", "transformer.resblocks.0.attn.c_qkv.weight",
            "transformer.resblocks.0.attn.attention.q_norm.weight", "transformer.resblocks.0.mlp.c_fc.bias",
            "geo_decoder.query_proj.weight", "geo_decoder.cross_attn_decoder.attn.c_kv.weight",
            "geo_decoder.cross_attn_decoder.ln_3.weight", "geo_decoder.output_proj.bias"} <= keys  # fmt: skip
    assert not any(key.startswith(("encoder", "pre_kl", "geo_decoder.ln_post", "latent_")) for key in keys)
    with pytest.raises(ValueError, match="no encoder"):
        vae.encode(cloud())


def test_gradients_reach_every_parameter():
    vae = tiny(anchored=True).train()
    field, posterior = vae(cloud(), cloud(points=16), torch.rand(2, 30, 3))
    (field.square().mean() + posterior.kl().mean()).backward()
    assert [n for n, p in vae.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"width": 33}, "no multiple of heads"), ({"sharp_latents": 9}, "sharp_latents is 9"),
     ({"latent_mean": [0.0]}, "latent_mean has 1 values, expected 4")],
)  # fmt: skip
def test_impossible_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)
