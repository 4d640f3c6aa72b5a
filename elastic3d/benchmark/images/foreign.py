"""Training-free caches of others, around the stock transformer: those of diffusers, and DBCache of `cache-dit`.

Every generation gets the cache anew. True guidance runs two passes a step: diffusers' caches keep a state for each
`cache_context` of the pipeline, DBCache is told that the passes alternate. Pyramid Attention Broadcast and FasterCache
keep one state for both, and expect the branches in one batch: FLUX pipelines do not run that way, so they are no rows.
"""

from __future__ import annotations

import ast
import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch

from elastic3d.benchmark.images.options import CacheName, ImageBenchmarkConfig
from elastic3d.pipelines.options import BackboneName

DB_CACHE_PACKAGE = "cache_dit"
BY_BATCH = (CacheName.first_block_cache, CacheName.db_cache)  # one decision for all samples of a batch
MAG_RETENTION = 0.2  # share of the first steps that MagCache computes; its authors' value
_LEFT_BEHIND = ("forward", "_is_patched")  # what cache-dit does not take off a FLUX transformer


@dataclass(frozen=True)
class ForeignCache:
    """A cache and its options."""

    title: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> CacheName:
        """Whose."""
        return CacheName(self.title)

    @property
    def note(self) -> str:
        """The options in words."""
        return ", ".join(f"{name} {value:g}" for name, value in self.options.items())

    @property
    def by_batch(self) -> bool:
        """Whether a sample's result depends on its batch mates."""
        return self.kind in BY_BATCH


def grid(config: ImageBenchmarkConfig) -> list[ForeignCache]:
    """All that a configuration asks for and that is installed (`missing` names what is not)."""
    warmup = config.taylor_warmup
    options: dict[CacheName, list[dict[str, Any]]] = {
        CacheName.first_block_cache: [{"threshold": t} for t in config.first_block_thresholds],
        CacheName.taylor_seer: [{"interval": i, "warmup": warmup} for i in config.taylor_intervals],
        CacheName.taylor_seer_lite: [{"interval": i, "warmup": warmup} for i in config.taylor_intervals],
        CacheName.mag_cache: [{"threshold": t} for t in config.mag_thresholds],
        CacheName.db_cache: [
            {"threshold": t, "blocks": b} for b in config.db_blocks for t in config.db_thresholds
        ],
    }
    absent = missing(config)
    return [
        ForeignCache(name.value, each)
        for name in config.caches
        if name.value not in absent
        for each in options[name]
    ]


def missing(config: ImageBenchmarkConfig) -> dict[str, str]:
    """Caches that were asked for and have no rows, with the reason."""
    name = CacheName.db_cache
    if name in config.caches and config.backbone is BackboneName.qwen_image:
        return {name.value: "it is set up for FLUX transformers here"}
    if name in config.caches and find_spec(DB_CACHE_PACKAGE) is None:
        return {name.value: "cache-dit is not installed: pip install 'elastic3d[bench]'"}
    return {}


@contextmanager
def running(pipe: Any, cache: ForeignCache, steps: int, ratios: Sequence[float] = ()) -> Iterator[None]:
    """While it lasts, a stock pipeline has the cache, in its initial state.

    Args:
        steps: sampling steps of the generation.
        ratios: what `magnitude_ratios` found for as many steps; for MagCache alone.
    """
    if cache.kind is CacheName.db_cache:
        with _db_cache(pipe, cache, steps):
            yield
        return
    pipe.transformer.enable_cache(_diffusers_config(cache, steps, ratios))
    try:
        yield
    finally:
        pipe.transformer.disable_cache()


def _diffusers_config(cache: ForeignCache, steps: int, ratios: Sequence[float]) -> Any:
    from diffusers import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig

    options = cache.options
    if cache.kind is CacheName.first_block_cache:
        return FirstBlockCacheConfig(threshold=options["threshold"])
    if cache.kind is CacheName.mag_cache:
        return MagCacheConfig(
            threshold=options["threshold"], num_inference_steps=steps, mag_ratios=list(ratios),
            retention_ratio=MAG_RETENTION,
        )  # fmt: skip
    return TaylorSeerCacheConfig(
        cache_interval=options["interval"], disable_cache_before_step=options["warmup"], max_order=1,
        taylor_factors_dtype=torch.float32, use_lite_mode=cache.kind is CacheName.taylor_seer_lite,
    )  # fmt: skip


def magnitude_ratios(pipe: Any, generate: Callable[[], Any], steps: int) -> list[float]:
    """MagCache's own calibration: ratios of the residuals' magnitudes, one a step, from dense generations.

    diffusers prints them, once a branch; those of the conditional one, which comes first, are taken.
    """
    from diffusers import MagCacheConfig

    pipe.transformer.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=steps))
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            generate()
    finally:
        pipe.transformer.disable_cache()
    lines = [line for line in printed.getvalue().splitlines() if line.startswith("[") and line.endswith("]")]
    found: list[float] = ast.literal_eval(lines[0])
    if len(found) != steps:
        raise ValueError(f"MagCache's calibration gave {len(found)} ratios, expected {steps}")
    return found


@contextmanager
def _db_cache(pipe: Any, cache: ForeignCache, steps: int) -> Iterator[None]:
    """DBCache with cache-dit's own description of FLUX; warm-up in proportion to its default of 8 in 28 steps."""
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")  # it reads this when it is imported
    import cache_dit
    from cache_dit.caching.block_adapters.adapters import flux_adapter

    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=cache.options["blocks"], Bn_compute_blocks=0, max_warmup_steps=max(1, steps * 8 // 28),
        residual_diff_threshold=cache.options["threshold"], num_inference_steps=steps, enable_separate_cfg=True,
    )  # fmt: skip
    own, modules = pipe.transformer.__dict__, dict(pipe.transformer._modules)
    before = {name: own[name] for name in _LEFT_BEHIND if name in own}
    adapter = flux_adapter(pipe, has_separate_cfg=True)
    cache_dit.enable_cache(adapter, cache_config=config)
    try:
        yield
    finally:
        cache_dit.disable_cache(adapter)
        for name in _LEFT_BEHIND:
            own.pop(name, None)
        own.update(before)
        pipe.transformer._modules.clear()  # they come back in another order, by which diffusers finds the first block
        pipe.transformer._modules.update(modules)
