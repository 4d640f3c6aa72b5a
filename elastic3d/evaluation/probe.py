"""A linear classifier on frozen features: multinomial logistic regression."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Floats = NDArray[np.floating]


@dataclass(frozen=True)
class Probe:
    """Standardised features times `weight` (D,K), plus `bias` (K,), for K classes."""

    classes: list[str]
    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor

    def predict(self, features: Floats) -> list[str]:
        """Features (N,D) -> the likeliest class of each."""
        x = (torch.from_numpy(np.asarray(features, dtype=np.float32)) - self.mean) / self.scale
        return [self.classes[i] for i in (x @ self.weight + self.bias).argmax(dim=1).tolist()]

    def accuracy(self, features: Floats, labels: Sequence[str | None]) -> float | None:
        """Share of the rows with a label that is a class of which it is found; None where there is no such row."""
        known = [i for i, label in enumerate(labels) if label in self.classes]
        if not known:
            return None
        found = self.predict(features[known])
        return float(np.mean([labels[i] == guess for i, guess in zip(known, found, strict=True)]))


def fit_probe(features: Floats, labels: Sequence[str], decay: float = 1e-3, steps: int = 200) -> Probe:
    """Fit features (N,D) to N labels by L-BFGS; `decay` times half the squared weights is added to the mean loss.

    Deterministic: the problem is convex, and it starts at zero. ValueError with fewer than two classes, or where the
    numbers differ.
    """
    classes = sorted(set(labels))
    if len(classes) < 2 or len(labels) != len(features):
        raise ValueError(
            f"{len(features)} rows, {len(labels)} labels of {len(classes)} classes: expected 2 or more"
        )
    x = torch.from_numpy(np.asarray(features, dtype=np.float32))
    mean, scale = x.mean(dim=0), x.std(dim=0).clamp_min(1e-6)
    x = (x - mean) / scale
    y = torch.tensor([classes.index(label) for label in labels])
    weight = torch.zeros(x.shape[1], len(classes), requires_grad=True)
    bias = torch.zeros(len(classes), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(x @ weight + bias, y) + decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return Probe(classes, mean, scale, weight.detach(), bias.detach())
