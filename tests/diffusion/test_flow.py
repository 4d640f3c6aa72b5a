from itertools import permutations

import torch

from elastic3d.diffusion.flow import interpolate, match_noise, predict_data, sample_timesteps, velocity


def test_time_runs_from_noise_to_data():
    noise, data = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    torch.testing.assert_close(interpolate(noise, data, torch.zeros(2)), noise)
    torch.testing.assert_close(interpolate(noise, data, torch.ones(2)), data)


def test_velocity_is_the_derivative_of_the_path():
    noise, data = torch.randn(2, 5, 3, dtype=torch.float64), torch.randn(2, 5, 3, dtype=torch.float64)
    t, h = torch.tensor([0.2, 0.9], dtype=torch.float64), 1e-4
    slope = (interpolate(noise, data, t + h) - interpolate(noise, data, t - h)) / (2 * h)
    torch.testing.assert_close(slope, velocity(noise, data), rtol=1e-6, atol=1e-6)


def test_the_true_velocity_predicts_the_data():
    noise, data, t = torch.randn(4, 5, 3), torch.randn(4, 5, 3), torch.rand(4)
    x_t = interpolate(noise, data, t)
    torch.testing.assert_close(predict_data(x_t, velocity(noise, data), t), data, rtol=1e-4, atol=1e-5)


def test_timesteps_reproduce_and_follow_their_law():
    draw = [sample_timesteps(20000, torch.Generator().manual_seed(0)) for _ in range(2)]
    assert torch.equal(*draw)
    assert abs(draw[0].mean() - 0.5) < 0.01 and abs(draw[0].logit().std() - 1) < 0.02
    uniform = sample_timesteps(20000, torch.Generator().manual_seed(0), logit_normal=False)
    assert abs(uniform.var() - 1 / 12) < 0.002


def test_matched_noise_is_the_permutation_of_least_cost():
    torch.manual_seed(0)
    noise, data = torch.randn(6, 5), torch.randn(6, 5)
    matched = match_noise(noise, data, channels=3)
    cost = (data[:, None, :3] - noise[None, :, :3]).square().sum(-1)
    best = min(permutations(range(6)), key=lambda order: sum(cost[i, j] for i, j in enumerate(order)))
    assert torch.equal(matched, noise[list(best)])
