"""LPIPS is used where it is installed and never downloaded."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from elastic3d.errors import UserError
from elastic3d.evaluation import views as module


class FakeNetwork(torch.nn.Module):
    """Stands for `lpips.LPIPS`, which no registry gives with its backbone's weights: mean absolute
    difference.
    """

    def __init__(self, net: str, verbose: bool) -> None:
        super().__init__()
        assert (net, verbose) == ("alex", False)

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        assert first.shape == second.shape == (1, 3, 20, 30)
        assert first.min() >= -1
        assert first.max() <= 1
        return (first - second).abs().mean()


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    module.load_lpips.cache_clear()
    yield
    module.load_lpips.cache_clear()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(UserError, match="pip install lpips"):
        module.load_lpips()


def test_missing_weights_are_named_and_used_when_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = ModuleType("lpips")
    package.LPIPS = FakeNetwork  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lpips", package)
    with pytest.raises(UserError, match=module.BACKBONE_FILE):
        module.load_lpips()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / module.BACKBONE_FILE).write_bytes(b"weights")
    distance = module.load_lpips()
    black, grey = np.zeros((20, 30, 3)), np.full((20, 30, 3), 0.25)
    assert distance(black, grey) == pytest.approx(0.5)
    assert distance(grey, grey) == 0
