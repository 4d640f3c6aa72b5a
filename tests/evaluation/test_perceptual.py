"""The feature distance by a loop over positions (tests/benchmark/images has it on real maps)."""

import pytest
import torch

from elastic3d.evaluation.views import feature_distance


def test_the_length_of_features_does_not_matter_their_direction_does():
    a = torch.zeros(2, 2, 1, 2)
    a[:, 0] = 1
    b = a.clone()
    b[1, :, 0, 0] = torch.tensor([0.0, 5.0])  # at one of two positions at a right angle: squared distance 2
    assert feature_distance([a, a], [3 * b, b]).tolist() == pytest.approx([0, 1])


def test_maps_must_match():
    with pytest.raises(ValueError, match="expected the same"):
        feature_distance([torch.zeros(1, 2, 3, 3)], [torch.zeros(1, 2, 4, 4)])
    with pytest.raises(ValueError, match="at least one"):
        feature_distance([], [])
