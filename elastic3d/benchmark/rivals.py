"""Training-free rivals: caches around a dense transformer, and policies to compare the planned one with.

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
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from elastic3d.benchmark.config import BenchmarkOptions, CacheName, ImageBenchmarkConfig, PolicyName
from elastic3d.benchmark.forecasting import HISTORY, Clock, forecasting, replaced
from elastic3d.benchmark.methods import DENSE, Case, Model, Planner, Rival, Routes
from elastic3d.elastic.cache import Forecast
from elastic3d.elastic.context import StepContext
from elastic3d.elastic.router import RouteDecision
from elastic3d.elastic.training_free import Array, Calibration, StepPolicy, all_or_none
from elastic3d.pipelines.calibration import relative_change
from elastic3d.pipelines.options import BackboneName

PACKAGES = {CacheName.db_cache: ("cache_dit", "cache-dit"), CacheName.hicache: ("hicache_pp", "hicache-pp")}
MAG_RETENTION = 0.2  # share of the first steps that MagCache computes; its authors' value
CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # which PyTorch's registry lacks
Ratios = Callable[[int], list[float]]  # of magnitudes, by the number of steps
_LEFT_BEHIND = ("forward", "_is_patched")  # what cache-dit does not take off a FLUX transformer


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
                {"threshold": t, "blocks": blocks} | ({} if c.value == "none" else {"calibrator": c.value})
                for c, blocks, t in product(config.db_calibrators, config.db_blocks, config.db_thresholds)
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


def running(model: Model, rival: Rival, steps: int, ratios: Ratios) -> AbstractContextManager[None]:
    """For one generation of N steps, a plain model has the cache, in its initial state; `ratios`: what
    `magnitude_ratios` found for as many steps, which MagCache asks for."""
    if rival.kind is CacheName.forecast:
        return forecasting(model.dit, **rival.options)
    if rival.kind is CacheName.hicache:
        return _hicache(model.dit, rival.options, model.moves(steps))
    if rival.kind is CacheName.db_cache:
        return _db_cache(model.pipe, rival.options, steps)
    return _enabled(model.dit, _cache_config(rival, steps, ratios))


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


@contextmanager
def _enabled(transformer: Any, config: Any) -> Iterator[None]:
    transformer.enable_cache(config)
    try:
        yield
    finally:
        transformer.disable_cache()


def _cache_config(rival: Rival, steps: int, ratios: Ratios) -> Any:
    """What diffusers enables."""
    from diffusers import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig

    options: dict[str, Any] = rival.options
    if rival.kind is CacheName.first_block_cache:
        return FirstBlockCacheConfig(**options)
    if rival.kind is CacheName.mag_cache:
        return MagCacheConfig(
            **options, num_inference_steps=steps, mag_ratios=ratios(steps), retention_ratio=MAG_RETENTION
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


def policy_named(name: PolicyName, calibration: Calibration | None) -> StepPolicy:
    """The policy of a name; all but `early` need a calibration."""
    kinds = {PolicyName.fitted: FittedPolicy, PolicyName.online: OnlinePolicy}
    return kinds.get(name, StepPolicy)(None if name is PolicyName.early else calibration)


class FittedPolicy(StepPolicy):
    """Fitted forecasts at the steps of a model without a calibration."""

    planned = False


class OnlinePolicy(StepPolicy):
    """Each sample by itself: predicted errors, scaled by how fast its own input changes, add up until they pass a
    threshold, as in TeaCache (2411.19108) and EasyCache (2507.02860)."""

    schedule = "online"

    def begin(self, steps: int, times: Sequence[float], budgets: Sequence[float]) -> Forecast | None:
        """A generation begins -> how residuals go on in it."""
        forecast = super().begin(steps, times, budgets)
        assert self._here is not None
        counts, errors = [len(computed) for computed in self._computed], self._here.errors
        levels = {count: threshold(errors, count) for count in set(counts)}
        self._samples = [_Online(errors, levels[count]) for count in counts]
        return forecast

    def decide(self, context: StepContext, block: int, routed: RouteDecision | None) -> RouteDecision:
        """Whether the blocks run, for every row of a pass."""
        assert self._here is not None
        inputs, usual = context.entered[0][0], self._here.changes  # of the model's first block
        moments = enumerate(zip(context.steps, context.rows, strict=True))
        keep = [self._samples[s].runs(step, inputs[i], usual) for i, (step, (_, s)) in moments]
        return all_or_none(keep, context)


class _Online:
    """The decisions of one sample, each taken once: by its first row, for those of all branches and blocks."""

    def __init__(self, errors: Array, threshold: float) -> None:
        self.errors, self.threshold = errors, threshold
        self.computed, self.spent = (0, 0), 0.0  # the last two steps, the same while there is one
        self.decided: dict[int, bool] = {}
        self._input: Tensor | None = None

    def runs(self, step: int, tokens: Tensor, usual: Array) -> bool:
        """Whether the blocks run at a step, whose first one is given `tokens` (L,D); `usual` are changes (S,) of it."""
        if step not in self.decided:
            change = relative_change(self._input, tokens) / max(float(usual[step]), 1e-12)
            self.decided[step] = self.take(step, change)
            self._input = tokens
        return self.decided[step]

    def take(self, step: int, change: float = 1.0) -> bool:
        """Whether the blocks run at the next step, whose input changes by `change` times what is usual."""
        if step == 0:
            return True
        self.spent += float(self.errors[(*self.computed, step)]) * change
        if self.spent <= self.threshold:
            return False
        self.computed, self.spent = (self.computed[1], step), 0.0
        return True


def threshold(errors: Array, count: int) -> float:
    """The one at which a sample like those of the calibration computes as near to `count` steps as can be."""
    low, high = 0.0, float(errors.max(axis=(0, 1)).sum()) + 1e-30
    for _ in range(60):
        middle = (low + high) / 2
        usual = _Online(errors, middle)
        computed = sum(usual.take(step) for step in range(len(errors)))
        low, high = (middle, high) if computed > count else (low, middle)
    return high
