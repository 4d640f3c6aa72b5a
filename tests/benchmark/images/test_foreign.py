"""Caches of others: what skips nothing is the dense model, what skips is counted, and nothing stays behind."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elastic3d.adapters import adapter_for
from elastic3d.benchmark.images.foreign import ForeignCache, grid, magnitude_ratios, missing, running
from elastic3d.benchmark.images.meter import counted, metered
from elastic3d.benchmark.images.models import ImageModel, load_image_models
from elastic3d.benchmark.images.options import CacheName
from elastic3d.benchmark.methods import DENSE
from elastic3d.routing.cost import dense_flops
from tests.benchmark.images.conftest import config_of

STEPS = 6
RATIOS = [1.0] * STEPS
needs_cache_dit = pytest.mark.skipif(find_spec("cache_dit") is None, reason="cache-dit is not installed")
NOTHING = [
    ForeignCache("first_block_cache", {"threshold": 0.0}),
    ForeignCache("taylor_seer", {"interval": 2, "warmup": STEPS}),
    ForeignCache("taylor_seer_lite", {"interval": 2, "warmup": STEPS}),
    ForeignCache("mag_cache", {"threshold": -1.0}),
    pytest.param(ForeignCache("db_cache", {"threshold": 0.0, "blocks": 1}), marks=needs_cache_dit),
]
MUCH = [
    ForeignCache("first_block_cache", {"threshold": 100.0}),
    pytest.param(ForeignCache("db_cache", {"threshold": 100.0, "blocks": 1}), marks=needs_cache_dit),
]


@pytest.fixture(scope="module")
def model(gallery: Path, tmp_path_factory: pytest.TempPathFactory) -> ImageModel:
    config = config_of(gallery, tmp_path_factory.mktemp("out"))
    return load_image_models(config, gallery)[DENSE]


def generator(model: ImageModel, samples: int = 1, steps: int = STEPS) -> Callable[[], Any]:
    prompts = ["a red chair", "a bed"][:samples]
    return lambda: model.pipeline(prompts, [3, 4][:samples], steps=steps)


def test_the_plain_model_has_no_routers(model):
    assert model.session is None and not any("router" in name for name, _ in model.dit.named_parameters())


def test_the_meter_counts_the_blocks_and_what_is_around_them(model):
    [result] = generator(model)()
    with metered(model.dit) as meter:
        generator(model)()
    with metered(model.dit) as once:
        generator(model, steps=1)()
    blocks = dense_flops(model.dit, adapter_for(model.dit), [4, 12])
    config = model.dit.config
    width = config.attention_head_dim * config.num_attention_heads
    # by hand: pixels in, text in, time and pooled text, the last modulation, pixels out
    around = 2 * (4 * 192 * width + 12 * 384 * width + 256 * width + width**2 + 384 * width + width**2
                  + width * 2 * width + 4 * width * 192)  # fmt: skip
    assert meter.total == STEPS * 2 * (blocks + around) and once.total * STEPS == meter.total
    assert result.receipt["flops_dense"] == STEPS * 2 * blocks
    assert "forward" not in model.dit.__dict__


@pytest.mark.parametrize("cache", NOTHING, ids=lambda cache: cache.title)
def test_a_cache_that_skips_nothing_is_the_dense_model(model, cache):
    with metered(model.dit) as dense:
        [expected] = generator(model)()
    keys = list(model.dit.state_dict())
    with running(model.pipeline.backbone.pipe, cache, STEPS, RATIOS), metered(model.dit) as meter:
        [found] = generator(model)()
    np.testing.assert_array_equal(np.asarray(found.image), np.asarray(expected.image))
    assert meter.total == dense.total
    [after] = generator(model)()
    np.testing.assert_array_equal(np.asarray(after.image), np.asarray(expected.image))
    assert list(model.dit.state_dict()) == keys and "forward" not in model.dit.__dict__
    assert all("forward" not in vars(b) or b._diffusers_hook for b in model.dit.transformer_blocks)


@pytest.mark.parametrize("cache", MUCH, ids=lambda cache: cache.title)
def test_counted_blocks_are_the_metered_ones(model, cache):
    adapter = adapter_for(model.dit)
    with metered(model.dit) as whole:
        [dense] = generator(model)()
    around = whole.total - dense.receipt["flops_dense"]
    pipe = model.pipeline.backbone.pipe
    with (
        counted(model.dit, adapter, [4, 12]) as count,
        running(pipe, cache, STEPS),
        metered(model.dit) as meter,
    ):
        generator(model)()
    assert count.total == meter.total - around < dense.receipt["flops_dense"]
    # in every pass the first of two blocks runs, and the second in the first pass of each branch at least
    first = adapter.block_lists(model.dit)[0][1].flops(model.dit.transformer_blocks[0], [4, 12]).dense
    assert count.total >= STEPS * 2 * first + 2 * (dense.receipt["flops_dense"] // (2 * STEPS) - first)
    with counted(model.dit, adapter, [4, 12]) as count:
        generator(model)()
    assert count.total == dense.receipt["flops_dense"] and count.share == 1 and count.passes == 2 * STEPS


def test_first_block_cache_decides_for_each_branch(model):
    """With an endless threshold every later pass runs the first block alone, in both branches."""
    adapter = adapter_for(model.dit)
    pipe = model.pipeline.backbone.pipe
    with counted(model.dit, adapter, [4, 12]) as count, running(pipe, MUCH[0], STEPS):  # type: ignore[arg-type]
        generator(model)()
    lists = adapter.block_lists(model.dit)
    first = lists[0][1].flops(model.dit.transformer_blocks[0], [4, 12]).dense
    second = lists[1][1].flops(model.dit.single_transformer_blocks[0], [16]).dense
    assert count.total == 2 * STEPS * first + 2 * second


def test_scheduled_caches_do_not_depend_on_the_batch(model):
    pipe = model.pipeline.backbone.pipe
    for cache in (
        ForeignCache("taylor_seer", {"interval": 3, "warmup": 2}),
        ForeignCache("taylor_seer_lite", {"interval": 3, "warmup": 2}),
        ForeignCache("mag_cache", {"threshold": 1.0}),
    ):
        assert not cache.by_batch
        totals, pictures = [], []
        for samples in (1, 2):
            with running(pipe, cache, STEPS, RATIOS), metered(model.dit) as meter:
                pictures.append(np.asarray(generator(model, samples)()[0].image, dtype=int))
            totals.append(meter.total / samples)
        assert totals[0] == totals[1] and abs(pictures[0] - pictures[1]).max() <= 1


def test_magnitude_ratios_are_one_a_step(model, capsys):
    ratios = magnitude_ratios(model.pipeline.backbone.pipe, generator(model), STEPS)
    assert len(ratios) == STEPS and ratios[0] == 1 and all(ratio > 0 for ratio in ratios)
    assert not model.dit.is_cache_enabled and capsys.readouterr().out == ""


def test_the_grid_names_what_is_not_installed(gallery, tmp_path, monkeypatch):
    config = config_of(gallery, tmp_path, caches=list(CacheName), mag_thresholds=[0.1, 0.2])
    monkeypatch.setattr("elastic3d.benchmark.images.foreign.find_spec", lambda name: None)
    assert "cache-dit is not installed" in missing(config)["db_cache"]
    notes = [(cache.title, cache.note) for cache in grid(config)]
    assert ("mag_cache", "threshold 0.2") in notes and "db_cache" not in dict(notes)
    monkeypatch.setattr("elastic3d.benchmark.images.foreign.find_spec", lambda name: True)
    assert not missing(config) and grid(config)[-1].note == "threshold 0.9, blocks 1"
