"""Options of the routers, of the block cache, and of running a model elastically."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from enum import Enum
from functools import partial
from typing import Any

from elastic3d.errors import UserError
from elastic3d.utils.options import Options, check_range, option

MIN_BUDGET = 0.3
BUDGET_TOLERANCE = 0.005  # of the smallest budget, which messages give in three digits


class Scope(Enum):
    """Who decides: each block's router on its block's input, or one router at the start of a step, for all blocks."""

    block = "block"
    step = "step"


class Branches(Enum):
    """Whether the branches of classifier-free guidance have routes of their own, or the unconditional one takes the
    conditional one's."""

    separate = "separate"
    shared = "shared"


class CacheRule(Enum):
    """Which executed blocks reuse an earlier residual: none, those with a gate in a band (E-DiT), all while it
    lives."""

    off = "off"
    band = "band"
    age = "age"


_internal = partial(option, internal=True)
_times = partial(_internal, [], ge=0, le=1, ascending=True)


def _check_curve(options: Options, at: str, values: str) -> None:
    if len(getattr(options, at)) != len(getattr(options, values)):
        raise ValueError(f"{at} and {values} are no ascending list and one of the same length")


@dataclass(kw_only=True)
class RouterCurves(Options):
    """What a calibration measured of trained routers. `curves.json` beside their weights."""

    damping_times: list[float] = _times("times of the dampings; empty: none")
    dampings: list[float] = _internal([], "at these times, in the place of damping", ge=-10, le=10)
    requested_budgets: list[float] = _times("requested budgets; empty: none")
    calibrated_budgets: list[float] = _internal(
        [], "the calibrated budget for each of them, which the routers are given", ge=0, le=1
    )
    times: list[float] = _times("times of the gate bias; empty: none")
    gate_bias: list[float] = _internal(
        [], "what is added to gates at these times, linear between", ge=-1e3, le=1e3
    )

    def check(self) -> None:
        """Each position has its value."""
        _check_curve(self, "damping_times", "dampings")
        _check_curve(self, "requested_budgets", "calibrated_budgets")
        _check_curve(self, "times", "gate_bias")


@dataclass(kw_only=True)
class RouterConfig(Options):
    """Architecture and initialisation of the routers. `config.json` beside their weights."""

    # What kind of router a stage trains is in its file of configs/router; sizes and initial values suit every model.
    scope: Scope = _internal(Scope.block, "decide before each block, or once a step for all of them")
    branches: Branches = _internal(
        Branches.separate, "scope step: each guidance branch for itself, or both as the conditional one"
    )
    hidden: int = _internal(32, "hidden channels of a router (H_r); the paper's code has 128", ge=1, le=4096)
    conditioning: int = _internal(
        32, "channels of the shared embedding of timestep, step size, budget and branch", ge=1, le=4096
    )
    widths: int = option(4, "nested widths of an MLP: 1/widths, 2/widths, .. 1", ge=1, le=16)
    threshold: float = _internal(0.5, "a block is kept where its gate is above this (tau)", ge=0.01, le=0.99)
    initial_keep: float = _internal(0.7, "gate of every block before training", ge=0.01, le=0.99)
    initial_width_bias: float = _internal(
        2.0, "logit of the full width before training; the others have 0", ge=0, le=20
    )
    head_std: float = _internal(1e-3, "standard deviation of the heads' initial weights", ge=0, le=100)
    longest: int = option(
        0,
        "age in steps up to which a skipped block adds its earlier residual, an input of the router; 0: never",
        ge=0,
        le=1000,
    )
    damping: float = option(
        1.0,
        "of that residual: share of its change between the last two computed that goes on, a step later",
        ge=0,
        le=1,
    )
    # What follows comes with the weights, and is no option of a command line.
    few_step_rank: int = _internal(0, "rank of the few-step LoRA of the blocks; 0: none", ge=0, le=4096)
    few_step_nfe: float = _internal(8.0, "used up to this NFE: steps times budget", ge=0.1, le=1000)
    few_step_max_steps: int | None = _internal(
        None, "and in at most N sampling steps; null: any", ge=1, le=1000
    )
    few_step_guidance: float | None = _internal(
        None, "guidance scale that it has learned, for which it runs one branch; null: none", ge=0, le=1000
    )
    guided_times: list[float] = _times("between which both branches run all the same; empty: never")
    trained_steps: list[int] = _internal(
        [], "fewest and most steps of the generations of training; empty: any", ge=1, le=1000
    )
    curves: RouterCurves = _internal(RouterCurves, "what was measured of them once they were trained")

    def check(self) -> None:
        """Options that need others."""
        if self.branches is Branches.shared and self.scope is not Scope.step:
            raise ValueError(
                "branches is shared, expected separate: only with scope=step does one branch decide for both"
            )
        if len(self.guided_times) not in (0, 2):
            raise ValueError(f"guided_times is {self.guided_times}, expected none or two, ascending")
        if self.trained_steps and (len(self.trained_steps) != 2 or self.scope is not Scope.block):
            raise ValueError(
                f"trained_steps is {self.trained_steps}, expected two numbers, of routers with scope=block"
            )

    def calibrated(self, budget: float, whole: float = 1.0) -> float:
        """The calibrated budget of a requested one, linear between those that were measured. `whole` is the share of
        the dense model's NFE in a generation that leaves out no block. ValueError out of range."""
        check_range("budget", budget, MIN_BUDGET, 1.0)
        curves, budget = self.curves, min(budget / whole, 1.0)
        if not curves.requested_budgets:
            return budget
        from numpy import interp  # which --help does without

        return float(interp(budget, curves.requested_budgets, curves.calibrated_budgets))

    def check_generation(self, steps: int, guidance: float | None, few_step: bool, idle: int = 0) -> None:
        """UserError for a generation that routers and few-step LoRA, trained through whole ones, do not cover: neither
        is any good alone. `guidance`: that of a second branch, or None; `idle`: what `steps=` counts more."""
        if not self.trained_steps:
            return
        steps, low, high = (each + idle for each in (steps, *self.trained_steps))
        if not low <= steps <= high:
            raise UserError(
                f"steps is {steps}, expected {low} to {high}, for which these per-block routers were trained"
            )
        if not few_step:
            raise UserError(
                "few_step is false, expected true: these routers were trained with their few-step LoRA"
            )
        if self.few_step_guidance not in (None, guidance):
            raise UserError(
                f"guidance is {1.0 if guidance is None else guidance:g}, expected {self.few_step_guidance:g}, which the"
                " few-step LoRA of these routers has learned"
            )

    def check_budget(self, budget: float, times: Sequence[float], idle: int = 0) -> None:
        """UserError for a budget below the smallest that per-block routers were calibrated at, in a generation with
        steps at these times: they would execute no less. `idle`: what `steps=` counts more."""
        if budget < (least := self.least_budget(times)) - BUDGET_TOLERANCE:
            raise UserError(
                f"budget is {budget:g}, expected {least:.3g} to 1, for which these per-block routers were calibrated in"
                f" {len(times) + idle} steps"
            )

    def least_budget(self, times: Sequence[float] = ()) -> float:
        """The smallest budget that per-block routers were calibrated at, in a generation with steps at these times."""
        known = self.curves.requested_budgets
        return known[0] * self.guided_share(times) if known and self.trained_steps else 0.0

    def guided_share(self, times: Sequence[float]) -> float:
        """Share of the dense model's NFE in a generation with steps at these times whose few-step LoRA has learned the
        guidance: one branch counts half. 1 where it has not."""
        if self.few_step_guidance is None or not times:
            return 1.0
        return sum(1.0 if self.guided_at(t) else 0.5 for t in times) / len(times)

    def guided_at(self, t: float) -> bool:
        """Whether both branches run at a time in [0,1] though the few-step LoRA has learned the guidance."""
        return bool(self.guided_times) and self.guided_times[0] <= t <= self.guided_times[1]

    def cache(self) -> BlockCacheConfig:
        """The cache that these routers were trained with."""
        if not self.longest:
            return BlockCacheConfig()
        return BlockCacheConfig(
            skipped_reuse=True, longest=self.longest, damping=self.damping, times=self.curves.damping_times,
            dampings=self.curves.dampings,
        )  # fmt: skip

    @property
    def ratios(self) -> tuple[float, ...]:
        """The nested widths as shares of the full one, the smallest first."""
        return tuple((i + 1) / self.widths for i in range(self.widths))


@dataclass(kw_only=True)
class BlockCacheConfig(Options):
    """Reuse of block residuals between sampling steps. Training-free."""

    rule: CacheRule = option(CacheRule.off, "which executed blocks reuse an earlier residual")
    band: float = option(
        0.1, "rule band: reuse where the gate is at most this far above its threshold", ge=0, le=1
    )
    skipped_reuse: bool = option(
        False, "a skipped block adds its earlier residual, where it has one, instead of nothing"
    )
    start: float = option(0.0, "share of the sampling steps before the first reuse", ge=0, le=1)
    longest: int = option(5, "steps that a residual lives", ge=1, le=1000)
    damping: float = option(
        0.0,
        "share of its change between the last two computed that goes on, a step later: 0 none, 1 a line",
        ge=0,
        le=1,
    )
    times: list[float] = _times("times of the dampings; empty: damping holds at all of them")
    dampings: list[float] = _internal([], "damping at these times, linear between", ge=-10, le=10)

    def check(self) -> None:
        """Each time has its damping."""
        _check_curve(self, "times", "dampings")

    @property
    def active(self) -> bool:
        """Whether anything is ever stored."""
        return self.rule is not CacheRule.off or self.skipped_reuse

    @property
    def extrapolates(self) -> bool:
        """Whether residuals go on as they changed."""
        return bool(self.damping or self.dampings)


@dataclass(kw_only=True)
class ElasticConfig(Options):
    """How a model with routers runs. `elastic=false` is the dense model, bit for bit."""

    elastic: bool = option(True, "let the routers decide; false runs the dense model")
    budget: float = option(1.0, "share of the dense blocks' FLOPs that may be executed", ge=MIN_BUDGET, le=1)
    width: bool = option(True, "let the routers narrow the MLPs")
    shared: bool = option(
        False, "samples of a batch share their routes: faster in batches, but each then depends on the others"
    )
    few_step: bool = option(
        True, "use the routers' few-step LoRA of the blocks where few model evaluations are left"
    )
    cache: BlockCacheConfig | None = option(
        None, "reuse of block residuals between steps; null: as the routers were trained"
    )


def _requested(name: str) -> Any:
    """The option of this name of `ElasticConfig`, where a caller asks for it."""
    help = ElasticConfig.__dataclass_fields__[name].metadata["help"]
    return option(None, f"{help[0].upper()}{help[1:]}; null: the model's default.")


@dataclass(kw_only=True)
class ElasticOptions(Options):
    """What a caller asks for, from the command line or Python; None is the model's default. See `ElasticConfig`."""

    elastic: bool | None = option(
        None, "Let the routers decide; false: the dense model; null: if it has any."
    )
    budget: float | None = option(
        None,
        "Share of the FLOPs of the dense model in its default steps; with steps=, of the dense model in that many;"
        " null: the model's default.",
        gt=0,
        le=1,
    )
    width: bool | None = _requested("width")
    cache: BlockCacheConfig | None = option(None, "Reuse of blocks between steps; null: the model's default.")
    shared: bool | None = _requested("shared")
    few_step: bool | None = _requested("few_step")

    @staticmethod
    def of(config: object) -> dict[str, Any]:
        """Those of a command's configuration, as arguments of a pipeline."""
        return {item.name: getattr(config, item.name) for item in fields(ElasticOptions)}

    def over(self, default: ElasticConfig, has_routers: bool, least: float = 0.0) -> ElasticConfig:
        """The model's default, with its few-step LoRA a budget of at least `least`, and what is requested. A model
        without routers takes a budget alone, which its policy keeps. UserError: a budget out of range; anything else of
        a model without routers, or that is to run dense."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        wanted = given.pop("elastic", default.elastic if has_routers else self.budget is not None)
        dense, needless = not wanted, set(given) - {"budget"}
        if dense and self.budget not in (None, 1):
            needless.add("budget")
        if needless and (dense or not has_routers):
            why = "elastic is false" if self.elastic is False or has_routers else "this model has no routers"
            raise UserError(f"{', '.join(sorted(needless))} can't be set: {why}")
        if not has_routers:
            if wanted and self.budget is None:
                raise UserError("elastic is true, but this model has no routers: set budget= too")
            default, dense = ElasticConfig(), dense or self.budget == 1
        if dense:
            return ElasticConfig(elastic=False)
        least *= given.get("few_step", default.few_step)
        return replace(default, **{"elastic": True, "budget": max(default.budget, least), **given})


def least_budget(steps: int) -> float:
    """The smallest budget that a policy without training covers in N steps: two of them are computed."""
    return min(max(MIN_BUDGET, 1.5 / steps), 1.0)
