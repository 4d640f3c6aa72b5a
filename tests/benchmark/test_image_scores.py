"""PSNR, SSIM and feature distance of images against slow, direct computations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from elastic3d.benchmark.images import compare_images, feature_maps
from elastic3d.models.image_encoder import EfficientNetLite
from elastic3d.models.options import ImageEncoderConfig


@pytest.fixture(scope="module")
def network() -> EfficientNetLite:
    return EfficientNetLite(ImageEncoderConfig(image_size=32))


def slow_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004, window by window: a Gaussian of 11 x 11 pixels and sigma 1.5."""
    offsets = np.arange(-5, 6)
    line = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    values = []
    for y in range(5, a.shape[0] - 5):
        for x in range(5, a.shape[1] - 5):
            for channel in range(3):
                p = a[y - 5 : y + 6, x - 5 : x + 6, channel]
                q = b[y - 5 : y + 6, x - 5 : x + 6, channel]
                m, n = (window * p).sum(), (window * q).sum()
                vp, vq = (window * (p - m) ** 2).sum(), (window * (q - n) ** 2).sum()
                cov = (window * (p - m) * (q - n)).sum()
                c1, c2 = 0.01**2, 0.03**2
                values.append((2 * m * n + c1) * (2 * cov + c2) / ((m * m + n * n + c1) * (vp + vq + c2)))
    return float(np.mean(values))


def test_scores_equal_the_formulas(network):
    generator = np.random.default_rng(0)
    first = generator.integers(256, size=(3, 14, 14, 3), dtype=np.uint8)
    noise = generator.integers(-40, 40, size=first.shape)
    second = np.clip(first + noise, 0, 255).astype(np.uint8)
    second[2] = first[2]
    maps = feature_maps(network, first)[0], feature_maps(network, second)[0]
    found = compare_images(first, second, maps)
    for row in range(2):
        a, b = first[row] / 255, second[row] / 255
        mse = sum(float(d) ** 2 for d in (a - b).ravel()) / a.size
        assert found["psnr"][row] == pytest.approx(-10 * math.log10(mse))
        assert found["ssim"][row] == pytest.approx(slow_ssim(a, b), abs=1e-9)
        distance = 0.0
        for x, y in zip(maps[0], maps[1], strict=True):
            u, v = x[row].float().numpy(), y[row].float().numpy()
            places = [
                np.square(
                    u[:, i, j] / np.linalg.norm(u[:, i, j]) - v[:, i, j] / np.linalg.norm(v[:, i, j])
                ).sum()
                for i in range(u.shape[1])
                for j in range(u.shape[2])
            ]
            distance += float(np.mean(places)) / len(maps[0])
        assert found["feature"][row] == pytest.approx(distance, rel=1e-4)
    assert found["psnr"][2] == 100 and found["ssim"][2] == pytest.approx(1) and found["feature"][2] == 0


def test_images_smaller_than_the_window_have_no_ssim(network):
    small = np.zeros((1, 8, 8, 3), np.uint8)
    maps = feature_maps(network, small)[0]
    assert np.isnan(compare_images(small, small, (maps, maps))["ssim"]).all()


def test_maps_are_one_a_resolution_and_pooled_is_the_encoders(network):
    images = np.random.default_rng(1).integers(256, size=(2, 32, 32, 3), dtype=np.uint8)
    maps, pooled = feature_maps(network, images)
    assert [each.shape[-1] for each in maps] == [16, 8, 4, 2, 1] and maps[-1].shape[1] == 320
    images = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    np.testing.assert_allclose(pooled, network.pooled(images).numpy(), rtol=1e-4, atol=1e-5)
