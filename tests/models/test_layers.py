import math

import pytest
import torch
from einops import rearrange

from elastic3d.models import layers
from elastic3d.models.layers import (
    DistanceBias,
    attend,
    farthest_points,
    fourier_embedding,
    timestep_embedding,
)


def test_fourier_embedding_is_point_then_sines_then_cosines_axis_major():
    point = torch.tensor([[0.3, -0.7, 0.1]])
    embedded = fourier_embedding(point, num_freqs=8)
    assert embedded.shape == (1, 51)
    expected = [*point[0].tolist()]
    expected += [math.sin(x * 2**k) for x in point[0].tolist() for k in range(8)]
    expected += [math.cos(x * 2**k) for x in point[0].tolist() for k in range(8)]
    torch.testing.assert_close(embedded[0], torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_fourier_embedding_keeps_precision_for_bf16_modules():
    assert fourier_embedding(torch.rand(4, 3).bfloat16(), 8).dtype == torch.float32


def test_timestep_embedding_uses_its_period_and_factor():
    t = torch.tensor([0.0, 0.25, 1.0])
    embedded = timestep_embedding(t, 256, max_period=1000.0, time_factor=1000.0)
    frequencies = [1000.0 ** (-k / 128) for k in range(128)]
    expected = [[math.cos(1000 * x * f) for f in frequencies] + [math.sin(1000 * x * f) for f in frequencies]
                for x in t.tolist()]  # fmt: skip
    torch.testing.assert_close(embedded, torch.tensor(expected), rtol=0, atol=2e-4)


def test_farthest_points_match_a_greedy_oracle():
    torch.manual_seed(0)
    points = torch.rand(3, 60, 3)
    chosen = farthest_points(points, 12)
    for b in range(3):
        oracle = [0]
        while len(oracle) < 12:
            nearest = [min(math.dist(points[b, i], points[b, j]) for j in oracle) for i in range(60)]
            oracle.append(nearest.index(max(nearest)))
        assert chosen[b].tolist() == oracle


def test_farthest_points_need_enough_points():
    with pytest.raises(ValueError, match="8 farthest points asked of 5"):
        farthest_points(torch.rand(1, 5, 3), 8)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_distance_bias_equals_explicit_logits(dtype, tolerance):
    """Also in bf16, where the naive inner product is off by whole units at gamma = 128."""
    torch.manual_seed(0)
    bias = DistanceBias(heads=3)
    q, k, v = torch.randn(2, 3, 50, 8), torch.randn(2, 3, 20, 8), torch.randn(2, 3, 20, 8)
    x_q, x_k = torch.rand(2, 50, 3) * 2 - 1, torch.rand(2, 20, 3) * 2 - 1
    gamma = bias.log_gamma.exp()[None, :, None, None]
    logits = q @ k.transpose(-1, -2) / 8**0.5 - gamma * torch.cdist(x_q, x_k)[:, None] ** 2
    expected = rearrange(logits.softmax(-1) @ v, "B H P d -> B P (H d)")
    longer_q, longer_k = bias.extend_queries(q.to(dtype), x_q), bias.extend_keys(k.to(dtype), x_k)
    out = attend(longer_q, longer_k, v.to(dtype), scale=1.0)
    assert ((out.float() - expected).square().mean() / expected.square().mean()).sqrt() < tolerance


def test_both_ways_of_attention_agree(monkeypatch):
    q, k, v = torch.randn(2, 3, 50, 12), torch.randn(2, 3, 20, 12), torch.randn(2, 3, 20, 8)
    fused = attend(q, k, v)
    monkeypatch.setattr(layers, "EXPLICIT_LIMIT", 0)
    torch.testing.assert_close(
        attend(q.bfloat16(), k.bfloat16(), v.bfloat16()).float(), fused, rtol=0.05, atol=0.05
    )
    monkeypatch.undo()
    torch.testing.assert_close(
        attend(q.bfloat16(), k.bfloat16(), v.bfloat16()).float(), fused, rtol=0.05, atol=0.05
    )
