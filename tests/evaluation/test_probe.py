"""The linear classifier: its gradient is zero where it ends, and it finds what is separable."""

import numpy as np
import pytest
import torch

from elastic3d.evaluation.sets import fit_probe


def blobs(count: int, seed: int) -> tuple[np.ndarray, list[str]]:
    generator = np.random.default_rng(seed)
    centres = {"bed": (3, 0, 0), "cup": (0, 3, 0), "pan": (0, 0, 3)}
    labels = [list(centres)[i % 3] for i in range(count)]
    noise = generator.standard_normal((count, 3))
    return np.array([centres[label] for label in labels]) + 0.3 * noise, labels


def test_it_learns_what_is_separable_and_tells_what_it_does_not_know():
    probe = fit_probe(*blobs(60, 0))
    features, labels = blobs(30, 1)
    assert probe.predict(features) == labels and probe.accuracy(features, labels) == 1
    wrong = ["cup" if label == "bed" else label for label in labels]
    assert probe.accuracy(features, wrong) == pytest.approx(2 / 3)
    assert probe.accuracy(features, ["sofa", None, *labels[2:]]) == 1
    assert probe.accuracy(features, [None] * 30) is None


def test_it_is_the_minimum_of_the_regularised_loss():
    features, labels = blobs(30, 2)
    probe = fit_probe(features, labels, decay=0.1)
    x = ((torch.from_numpy(features).float() - probe.mean) / probe.scale).double()
    y = torch.tensor([probe.classes.index(label) for label in labels])
    weight = probe.weight.double().requires_grad_()
    bias = probe.bias.double().requires_grad_()
    loss = -torch.log_softmax(x @ weight + bias, 1)[torch.arange(30), y].mean() + 0.05 * (weight**2).sum()
    loss.backward()
    assert weight.grad is not None and bias.grad is not None
    assert weight.grad.abs().max() < 1e-3 and bias.grad.abs().max() < 1e-3


def test_one_class_is_refused():
    with pytest.raises(ValueError, match="3 rows, 3 labels of 1 classes"):
        fit_probe(np.zeros((3, 2)), ["bed"] * 3)
