"""Training-free rivals: what skips nothing is the dense model, what skips is counted, and nothing stays behind."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from elastic3d.benchmark.config import BY_BATCH, CacheName
from elastic3d.benchmark.forecasting import WEIGHTS
from elastic3d.benchmark.images import load_models
from elastic3d.benchmark.methods import DENSE, Model, Rival
from elastic3d.benchmark.rivals import grid, magnitude_ratios, metered, missing, running
from elastic3d.elastic import adapter_for
from elastic3d.elastic.families import dense_flops
from tests.benchmark.conftest import image_config_of

STEPS = 6


def needs(module: str) -> Any:
    return pytest.mark.skipif(find_spec(module) is None, reason=f"{module} is not installed")


NOTHING = [
    Rival(CacheName.first_block_cache, {"threshold": 0.0}),
    Rival(CacheName.taylor_seer, {"interval": 2, "warmup": STEPS}),
    Rival(CacheName.taylor_seer_lite, {"interval": 2, "warmup": STEPS}),
    Rival(CacheName.mag_cache, {"threshold": -1.0}),
    pytest.param(Rival(CacheName.db_cache, {"threshold": 0.0, "blocks": 1}), marks=needs("cache_dit")),
    *(Rival(CacheName.forecast, {"by": name, "interval": 2, "warmup": STEPS}) for name in WEIGHTS),
    pytest.param(
        Rival(CacheName.hicache, {"by": "dmd", "interval": 2, "warmup": STEPS}), marks=needs("hicache_pp")
    ),
]
FIXED = {"interval": 3, "warmup": 2}  # runs at steps 0, 1 and 4 of six
SKIPPING = [
    *(Rival(CacheName.forecast, {"by": name} | FIXED) for name in WEIGHTS),
    *(
        pytest.param(Rival(CacheName.hicache, {"by": name} | FIXED), marks=needs("hicache_pp"))
        for name in ("hermite", "dmd")
    ),
]
DB_CACHE = {"threshold": 100.0, "blocks": 1}
MUCH = [
    Rival(CacheName.first_block_cache, {"threshold": 100.0}),
    *(
        pytest.param(Rival(CacheName.db_cache, DB_CACHE | calibrator), marks=needs("cache_dit"))
        for calibrator in ({}, {"calibrator": "taylorseer"}, {"calibrator": "dmd"})
    ),
]


@pytest.fixture(scope="module")
def model(gallery: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    config = image_config_of(gallery, tmp_path_factory.mktemp("out"))
    return load_models(config)[DENSE]


@pytest.fixture(scope="module")
def dense(model: Model) -> tuple[Any, int]:
    """What the plain model makes before any cache was around it, and what it counts for that."""
    with metered(model.dit) as passes:
        [result] = generator(model)()
    return result, sum(passes)


def around(model: Model, rival: Rival) -> Any:
    return running(model, rival, STEPS, lambda steps: [1.0] * steps)


def generator(model: Model, samples: int = 1, steps: int = STEPS) -> Callable[[], Any]:
    prompts = ["a red chair", "a bed"][:samples]
    return lambda: model.pipeline(prompts, [3, 4][:samples], steps=steps)


def test_the_plain_model_has_no_routers(model):
    assert model.session is None and not any("router" in name for name, _ in model.dit.named_parameters())


def test_the_meter_counts_the_blocks_and_what_is_around_them(model, dense):
    result, whole = dense
    with metered(model.dit) as once:
        generator(model, steps=1)()
    blocks = dense_flops(model.dit, adapter_for(model.dit), [4, 12])
    config = model.dit.config
    width = config.attention_head_dim * config.num_attention_heads
    # by hand: pixels in, text in, time and pooled text, the last modulation, pixels out
    around = 2 * (4 * 192 * width + 12 * 384 * width + 256 * width + width**2 + 384 * width + width**2
                  + width * 2 * width + 4 * width * 192)  # fmt: skip
    assert whole == STEPS * 2 * (blocks + around) and sum(once) * STEPS == whole
    assert result.metadata["flops_dense"] == STEPS * 2 * blocks
    assert "forward" not in model.dit.__dict__


@pytest.mark.parametrize("cache", NOTHING, ids=str)
def test_a_cache_that_skips_nothing_is_the_dense_model(model, dense, cache):
    expected, whole = dense
    keys = list(model.dit.state_dict())
    with around(model, cache), metered(model.dit) as passes:
        [found] = generator(model)()
    np.testing.assert_array_equal(np.asarray(found.image), np.asarray(expected.image))
    assert sum(passes) == whole
    [after] = generator(model)()
    np.testing.assert_array_equal(np.asarray(after.image), np.asarray(expected.image))
    assert list(model.dit.state_dict()) == keys and "forward" not in model.dit.__dict__
    assert all("forward" not in vars(b) or b._diffusers_hook for b in model.dit.transformer_blocks)


@pytest.mark.parametrize("cache", MUCH, ids=str)
def test_caches_that_decide_run_the_first_block_in_every_pass(model, dense, cache):
    """With an endless threshold the second of two blocks runs in the first pass of each branch, and little more."""
    result, whole = dense
    around_blocks = whole - result.metadata["flops_dense"]
    with around(model, cache), metered(model.dit) as passes:
        generator(model)()
    adapter = adapter_for(model.dit)
    (_, double), (_, single) = adapter.lists
    first = double.flops(model.dit.transformer_blocks[0], [4, 12]).dense
    second = single.flops(model.dit.single_transformer_blocks[0], [16]).dense
    assert cache.kind in BY_BATCH and sum(passes) < whole
    found = sum(passes) - around_blocks
    if cache.kind is CacheName.first_block_cache:
        assert found == 2 * STEPS * first + 2 * second
    assert found >= 2 * STEPS * first + 2 * second


@pytest.mark.parametrize("cache", SKIPPING, ids=str)
def test_fixed_intervals_run_half_of_the_steps_and_leave_the_model_as_it_was(model, dense, cache):
    expected, whole = dense
    around_blocks = whole - expected.metadata["flops_dense"]
    images = []
    for _ in range(2):  # every generation gets the cache anew
        with around(model, cache), metered(model.dit) as passes:
            images.append(np.asarray(generator(model)()[0].image))
    np.testing.assert_array_equal(images[0], images[1])
    assert not np.array_equal(images[0], np.asarray(expected.image))
    if cache.kind is CacheName.forecast and cache.options["by"] != "dmd":
        executed = (sum(passes) - around_blocks) / expected.metadata["flops_dense"]
        assert executed == pytest.approx(0.5, abs=2e-3)  # and the fit of Chebyshev polynomials
    else:  # hicache leaves out what is around the blocks too, and fits of modes are counted
        assert sum(passes) < whole
    [after] = generator(model)()
    np.testing.assert_array_equal(np.asarray(after.image), np.asarray(expected.image))


def test_scheduled_caches_do_not_depend_on_the_batch(model):
    for cache in (
        Rival(CacheName.taylor_seer, {"interval": 3, "warmup": 2}),
        Rival(CacheName.taylor_seer_lite, {"interval": 3, "warmup": 2}),
        Rival(CacheName.mag_cache, {"threshold": 1.0}),
        Rival(CacheName.forecast, {"by": "linear"} | FIXED),
    ):
        assert cache.kind not in BY_BATCH
        totals, images = [], []
        for samples in (1, 2):
            with around(model, cache), metered(model.dit) as passes:
                images.append(np.asarray(generator(model, samples)()[0].image, dtype=int))
            totals.append(sum(passes) / samples)
        assert totals[0] == totals[1] and abs(images[0] - images[1]).max() <= 1


def test_magnitude_ratios_are_one_a_step(model, capsys):
    ratios = magnitude_ratios(model.dit, generator(model), STEPS)
    assert len(ratios) == STEPS and ratios[0] == 1 and all(ratio > 0 for ratio in ratios)
    assert not model.dit.is_cache_enabled and capsys.readouterr().out == ""


def test_the_grid_names_what_is_not_installed(gallery, tmp_path, monkeypatch):
    config = image_config_of(gallery, tmp_path, caches=list(CacheName), mag_thresholds=[0.1, 0.2])
    monkeypatch.setattr("elastic3d.benchmark.rivals.find_spec", lambda name: None)
    assert "cache-dit is not installed" in missing(config)["db_cache"]
    assert "hicache-pp is not installed" in missing(config)["hicache"]
    notes = [(cache.kind.value, cache.note) for cache in grid(config)]
    assert ("mag_cache", "threshold 0.2") in notes and "db_cache" not in dict(notes)
    monkeypatch.setattr("elastic3d.benchmark.rivals.find_spec", lambda name: True)
    assert not missing(config) and grid(config)[-1].note == "threshold 0.9, blocks 1, calibrator dmd"


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return nn.functional.scaled_dot_product_attention(q, k, v)


@torch.no_grad()
def test_products_of_the_models_passes_are_counted():
    model, x = Attention().eval(), torch.randn(3, 1, 5, 8)  # B, heads, L, D
    with metered(model) as passes:
        model(x)
        nn.Linear(8, 8)(x)  # outside of the model
        model(x[:1])
    one = 2 * 5 * 8 * 24 + 2 * 2 * 5 * 5 * 8
    assert sum(passes) == 4 * one
    model(x)
    assert sum(passes) == 4 * one and "forward" not in model.__dict__
