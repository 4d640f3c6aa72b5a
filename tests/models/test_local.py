import pytest
import torch

from elastic3d.models.layers import (
    OFFSET_FREQS,
    OFFSET_SCALE,
    LocalFeatures,
    fade_weights,
    fourier_embedding,
    nearest_neighbours,
)


def test_neighbours_match_brute_force():
    torch.manual_seed(0)
    x_q, x_k = torch.rand(2, 30, 3), torch.rand(2, 20, 3)
    expected = (x_q[:, :, None] - x_k[:, None]).norm(dim=-1).argsort(dim=-1)[..., :5]
    assert torch.equal(nearest_neighbours(x_q, x_k, 5), expected)


@pytest.mark.parametrize("pool", ["max", "fade"])
def test_local_features_equal_a_loop_over_points(pool):
    torch.manual_seed(0)
    local = LocalFeatures(features=4, width=6, hidden=8, neighbours=3, pool=pool)
    x_q, x_k, features = torch.rand(2, 5, 3), torch.rand(2, 9, 3), torch.randn(2, 9, 4)
    out = local(x_q, x_k, features)
    gelu = torch.nn.functional.gelu
    for b in range(2):
        for p in range(5):
            offsets = x_q[b, p] - x_k[b]
            near = offsets.norm(dim=-1).argsort()[:3]
            rows = []
            for n in near:
                plus, times = local.offset_proj(
                    fourier_embedding(OFFSET_SCALE * offsets[n], OFFSET_FREQS)
                ).chunk(2)
                shift, gain = local.feature_proj(features[b, n]).chunk(2)
                rows.append(local.hidden_proj(gelu(shift + plus + gain * times)))
            if pool == "max":
                pooled = torch.stack(rows).amax(0)
            else:
                weights = fade_weights(offsets[near].square().sum(-1)[None, None])[0, 0]
                pooled = (weights[:, None] * gelu(torch.stack(rows))).sum(0)
            torch.testing.assert_close(out[b, p], local.out_proj(pooled), rtol=1e-4, atol=1e-5)


def test_faded_features_are_continuous_where_neighbours_change():
    torch.manual_seed(0)
    local = LocalFeatures(features=4, width=6, hidden=8, neighbours=3, pool="fade")
    x_k, features = torch.rand(1, 40, 3), torch.randn(1, 40, 4)
    line = torch.lerp(
        torch.tensor([0.0, 0.2, 0.9]), torch.tensor([1.0, 0.7, 0.1]), torch.linspace(0, 1, 20001)[:, None]
    )
    with torch.no_grad():
        steps = local(line[None], x_k, features)[0].diff(dim=0).abs().amax(dim=-1)
    changes = (nearest_neighbours(line[None], x_k, 3)[0].sort(dim=-1).values.diff(dim=0) != 0).any(dim=-1)
    assert changes.sum() > 10 and steps[changes].max() < 0.01


def test_fade_weights_sum_to_one_and_drop_the_farthest():
    weights = fade_weights(torch.tensor([[[0.0, 0.1, 0.4]]]))
    assert weights.sum() == 1 and weights[0, 0, -1] == 0 and weights[0, 0, 0] > weights[0, 0, 1] > 0
