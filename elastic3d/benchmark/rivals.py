"""Training-free caches around a dense transformer: forecasts of what its blocks add, and caches of other packages.

`forecast` (of `forecasting`) and `hicache` (of `hicache-pp`) run on every model of a known family; the
caches of diffusers and DBCache of `cache-dit` on those of diffusers. Every generation gets its cache anew.

True guidance of diffusers runs two passes a step: its caches keep a state for each `cache_context` of the pipeline,
DBCache is told that the passes alternate. Pyramid Attention Broadcast and FasterCache keep one state for both, and
expect the branches in one batch: FLUX pipelines do not run that way, so they are no rows.
"""

from __future__ import annotations

import ast
import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from elastic3d.benchmark.config import BenchmarkOptions, CacheName, ImageBenchmarkConfig
from elastic3d.benchmark.forecasting import HISTORY, Clock, forecasting, replaced
from elastic3d.benchmark.methods import DENSE, Case, Model, Planner, Rival, Routes
from elastic3d.pipelines.options import BackboneName

PACKAGES = {CacheName.db_cache: ("cache_dit", "cache-dit"), CacheName.hicache: ("hicache_pp", "hicache-pp")}
MAG_RETENTION = 0.2  # share of the first steps that MagCache computes; its authors' value
CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # which PyTorch's registry lacks
_LEFT_BEHIND = ("forward", "_is_patched")  # what cache-dit does not take off a FLUX transformer


def by_batch(rival: Rival) -> bool:
    """Whether a sample's result depends on its batch mates: one decision, or one fit, for all of them."""
    return rival.kind in (CacheName.first_block_cache, CacheName.db_cache, CacheName.hicache)


def rival_cases(planner: Planner) -> list[Case]:
    """A row for each rival of a configuration that is installed, and each point of its grid."""
    config = planner.config
    return [
        Case(rival.kind.value, planner.run(DENSE, steps, Routes.dense, rival=rival), None, rival.note)
        for steps in config.cache_steps or [planner.baseline_steps]
        for rival in grid(config)
    ]


def grid(config: BenchmarkOptions) -> list[Rival]:
    """All that a configuration asks for and that is installed (`missing` names what is not)."""
    fixed = [{"interval": interval, "warmup": config.warmup} for interval in config.intervals]
    options: dict[CacheName, list[dict[str, Any]]] = {
        CacheName.forecast: [{"by": name.value} | each for name in config.forecasts for each in fixed],
        CacheName.hicache: [{"by": name} | each for name in ("hermite", "dmd") for each in fixed],
    }
    if isinstance(config, ImageBenchmarkConfig):
        options |= {
            CacheName.first_block_cache: [{"threshold": t} for t in config.first_block_thresholds],
            CacheName.taylor_seer: fixed,
            CacheName.taylor_seer_lite: fixed,
            CacheName.mag_cache: [{"threshold": t} for t in config.mag_thresholds],
            CacheName.db_cache: [
                {"threshold": threshold, "blocks": blocks}
                | ({} if calibrator.value == "none" else {"calibrator": calibrator.value})
                for calibrator in config.db_calibrators
                for blocks in config.db_blocks
                for threshold in config.db_thresholds
            ],
        }
    absent = missing(config)
    return [Rival(n, each) for n in config.caches if n.value not in absent for each in options[n]]


def missing(config: BenchmarkOptions) -> dict[str, str]:
    """Rivals that were asked for and have no rows, with the reason."""
    found = {
        name.value: f"{package} is not installed: pip install 'elastic3d[bench]'"
        for name, (module, package) in PACKAGES.items()
        if name in config.caches and find_spec(module) is None
    }
    is_qwen = isinstance(config, ImageBenchmarkConfig) and config.backbone is BackboneName.qwen_image
    if is_qwen and CacheName.db_cache in config.caches:
        found[CacheName.db_cache.value] = "it is set up for FLUX transformers here"
    return found


def running(
    model: Model, rival: Rival, steps: int, ratios: Sequence[float] = ()
) -> AbstractContextManager[None]:
    """For one generation of N steps, a plain model has the cache, in its initial state; `ratios`: what
    `magnitude_ratios` found for as many steps, for MagCache alone."""
    if rival.kind is CacheName.forecast:
        return forecasting(model.dit, **rival.options)
    if rival.kind is CacheName.hicache:
        return _hicache(model.dit, rival.options, steps)
    if rival.kind is CacheName.db_cache:
        return _db_cache(model.pipe, rival.options, steps)
    return _enabled(model.dit, _cache_config(rival, steps, ratios))


# ---------------------------------------------------------------------------------------- what they execute


@contextmanager
def metered(transformer: nn.Module) -> Iterator[list[int]]:
    """While it lasts, the FLOPs of every forward pass of `transformer` are put on a list; those of nothing else are."""
    passes: list[int] = []
    attention = {CPU_ATTENTION: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}  # of their shapes

    def counted(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with FlopCounterMode(display=False, custom_mapping=attention) as counter:
            out = forward(*args, **kwargs)
        passes.append(counter.get_total_flops())
        return out

    with replaced(transformer, counted):
        yield passes


# ---------------------------------------------------------------------------------------- on every model


@contextmanager
def _hicache(transformer: nn.Module, options: dict[str, Any], steps: int) -> Iterator[None]:
    """HiCache++ as published: the model's output is forecast, a state for each branch that runs by itself."""
    import hicache_pp

    clock = Clock(transformer)
    states: dict[int, dict[str, Any]] = {}
    forecast = {"hermite": hicache_pp.hicache_forecast, "dmd": hicache_pp.dmd_forecast_state}[options["by"]]

    def run(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if clock.branch not in states:
            states[clock.branch] = hicache_pp.hicache_init(
                steps, options["interval"], first_enhance=options["warmup"], backend=options["by"], history=HISTORY
            )  # fmt: skip
        state = states[clock.branch]
        state["step"] = clock.step
        if hicache_pp.hicache_decide(state) == "forecast":
            found = forecast(state)
            return found if not state["packed"] else (found,)
        out = forward(*args, **kwargs)
        state["packed"] = isinstance(out, tuple)
        value = (out[0] if state["packed"] else out).detach()
        hicache_pp.hicache_update_derivatives(state, value)
        hicache_pp.dmd_update_snapshots(state, value, HISTORY)
        return out

    with clock.ticking(), replaced(transformer, run):
        yield


# ---------------------------------------------------------------------------------------- on models of diffusers


@contextmanager
def _enabled(transformer: Any, config: Any) -> Iterator[None]:
    transformer.enable_cache(config)
    try:
        yield
    finally:
        transformer.disable_cache()


def _cache_config(rival: Rival, steps: int, ratios: Sequence[float]) -> Any:
    """What diffusers enables."""
    from diffusers import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig

    options: dict[str, Any] = rival.options
    if rival.kind is CacheName.first_block_cache:
        return FirstBlockCacheConfig(**options)
    if rival.kind is CacheName.mag_cache:
        return MagCacheConfig(
            **options, num_inference_steps=steps, mag_ratios=list(ratios), retention_ratio=MAG_RETENTION
        )
    return TaylorSeerCacheConfig(
        cache_interval=options["interval"], disable_cache_before_step=options["warmup"], max_order=1,
        taylor_factors_dtype=torch.float32, use_lite_mode=rival.kind is CacheName.taylor_seer_lite,
    )  # fmt: skip


def magnitude_ratios(transformer: Any, generate: Callable[[], Any], steps: int) -> list[float]:
    """MagCache's own calibration: ratios of the residuals' magnitudes, one a step, from dense generations.

    diffusers prints them, once a branch; those of the conditional one, which comes first, are taken.
    """
    from diffusers import MagCacheConfig

    config = MagCacheConfig(calibrate=True, num_inference_steps=steps)
    with _enabled(transformer, config), redirect_stdout(io.StringIO()) as printed:
        generate()
    lines = [line for line in printed.getvalue().splitlines() if line.startswith("[") and line.endswith("]")]
    found: list[float] = ast.literal_eval(lines[0])
    if len(found) != steps:
        raise ValueError(f"MagCache's calibration gave {len(found)} ratios, expected {steps}")
    return found


@contextmanager
def _db_cache(pipe: Any, options: dict[str, Any], steps: int) -> Iterator[None]:
    """DBCache with cache-dit's own description of FLUX; warm-up in proportion to its default of 8 in 28 steps."""
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")  # it reads this when it is imported
    import cache_dit
    from cache_dit.caching.block_adapters.adapters import flux_adapter

    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=options["blocks"], Bn_compute_blocks=0, max_warmup_steps=max(1, steps * 8 // 28),
        residual_diff_threshold=options["threshold"], num_inference_steps=steps, enable_separate_cfg=True,
    )  # fmt: skip
    calibrators = {"taylorseer": cache_dit.TaylorSeerCalibratorConfig, "dmd": cache_dit.DMDCalibratorConfig}
    calibrator = options.get("calibrator")
    own, modules = pipe.transformer.__dict__, dict(pipe.transformer._modules)
    before = {name: own[name] for name in _LEFT_BEHIND if name in own}
    adapter = flux_adapter(pipe, has_separate_cfg=True)
    cache_dit.enable_cache(
        adapter, cache_config=config, calibrator_config=calibrators[calibrator]() if calibrator else None
    )
    try:
        yield
    finally:
        cache_dit.disable_cache(adapter)
        for name in _LEFT_BEHIND:
            own.pop(name, None)
        own.update(before)
        pipe.transformer._modules.clear()  # they come back in another order, by which diffusers finds the first block
        pipe.transformer._modules.update(modules)
