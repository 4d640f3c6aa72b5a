from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from elastic3d.errors import UserError
from elastic3d.models.image_encoder import FAMILIARITY_NAME, Familiarity, load_familiarity

C, K = 12, 3


def features(count: int = 4000, seed: int = 0) -> torch.Tensor:
    """Gaussian, three directions wide and the others narrow."""
    generator = torch.Generator().manual_seed(seed)
    widths = torch.tensor([5.0, 3.0, 2.0] + [0.5] * (C - 3))
    turn = torch.linalg.qr(torch.randn(C, C, generator=generator))[0]
    return 7 + (torch.randn(count, C, generator=generator) * widths) @ turn


def tokens_of(rows: torch.Tensor, tokens: int = 5) -> torch.Tensor:
    """Tokens (B,M,C) whose mean is `rows`."""
    noise = torch.randn(len(rows), tokens, rows.shape[1], generator=torch.Generator().manual_seed(1))
    return rows[:, None] + noise - noise.mean(dim=1, keepdim=True)


def test_it_is_the_distance_of_mahalanobis() -> None:
    rows = features()
    found = Familiarity.fit(rows, K).distance(tokens_of(rows[:50]))
    offset = (rows - rows.mean(0)).double()
    expected = (offset @ torch.linalg.inv(torch.cov(offset.T)) * offset).sum(1).div(C).sqrt()[:50]
    torch.testing.assert_close(
        found, expected.float(), rtol=0.02, atol=0.02
    )  # the rest's variances are pooled
    assert 0.98 < Familiarity.fit(rows, K).distance(rows[:, None]).square().mean() < 1.02


def test_a_shift_along_a_narrow_direction_is_farther_than_along_a_wide_one() -> None:
    rows = features()
    known = Familiarity.fit(rows, K)
    wide = known.mean + 4 * known.components[0]
    narrow = known.mean + 4 * torch.linalg.svd(rows - rows.mean(0), full_matrices=False)[2][-1]
    near, far = known.distance(tokens_of(torch.stack([wide, narrow]))).tolist()
    assert near < 0.3 and far > 2


def test_it_warns_from_the_threshold_on() -> None:
    known = Familiarity.fit(features(), K)
    assert known.warning(1e9) is None, "nothing is known of validation images yet"
    known = Familiarity(known.mean, known.components, known.scale, torch.tensor([1.5]))
    assert known.warning(1.49) is None
    assert "unlike those that the model was trained on (distance 1.50" in (known.warning(1.5) or "")


def test_files(tmp_path: Path) -> None:
    known = Familiarity.fit(features(), K)
    assert load_familiarity(tmp_path, C) is None
    known.save(tmp_path)
    again = load_familiarity(tmp_path, C)
    assert again is not None and torch.equal(again.components, known.components)
    with pytest.raises(UserError, match="mean has shape .12,., expected .13,."):
        load_familiarity(tmp_path, C + 1)
    parts = {name: getattr(known, name).contiguous() for name in ("mean", "components", "scale", "threshold")}
    for name, value, message in (
        ("scale", torch.zeros(K + 1), "0 or less"),
        ("mean", torch.full((C,), torch.nan), "mean has values that are not finite"),
        ("threshold", torch.tensor([torch.nan]), "0 or less"),
    ):
        save_file(parts | {name: value}, tmp_path / FAMILIARITY_NAME)
        with pytest.raises(UserError, match=message):
            load_familiarity(tmp_path, C)
    save_file({"mean": known.mean}, tmp_path / FAMILIARITY_NAME)
    with pytest.raises(UserError, match="no tensor 'components'"):
        load_familiarity(tmp_path, C)


@pytest.mark.parametrize("components", [0, C, 39])
def test_too_few_images_or_components(components: int) -> None:
    with pytest.raises(ValueError, match="components is"):
        Familiarity.fit(features(30), components)


def test_images_that_are_all_alike() -> None:
    with pytest.raises(ValueError, match="fewer than 4 dimensions"):
        Familiarity.fit(torch.ones(30, C), 4)
