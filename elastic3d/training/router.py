"""Routers that forecast whole steps, on any backbone: they learn to predict the error of a forecast, with flow matching
and a reconstruction term; validation and calibration are on what a sampler makes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from elastic3d.diffusion.flow import interpolate, predict_data, velocity
from elastic3d.elastic import attach
from elastic3d.elastic.attachment import router_modules
from elastic3d.elastic.cache import Key, ResidualCache, Streams, damped_steps
from elastic3d.elastic.config import (
    MIN_BUDGET,
    BlockCacheConfig,
    Branches,
    ElasticConfig,
    RouterConfig,
    Scope,
)
from elastic3d.elastic.context import BOTH_BRANCHES
from elastic3d.elastic.few_step import coarseness
from elastic3d.elastic.router import RouteDecision
from elastic3d.elastic.session import ElasticSession
from elastic3d.elastic.trace import trace_share
from elastic3d.errors import UserError
from elastic3d.pipelines.calibration import recording
from elastic3d.training.calibration import CurvesConfig, as_trained, calibrate, relative_error
from elastic3d.training.datasets import Batch
from elastic3d.training.flow import Flow
from elastic3d.training.loop import Stage
from elastic3d.training.routes import decision_flops, forced
from elastic3d.utils.options import Options, option

Residuals = dict[int, Streams]  # by list of blocks: outputs - inputs, each (B,L,D)
THRESHOLD_RANGE = 2.5  # standard deviations on both sides that thresholds cover


@dataclass(kw_only=True)
class RoutingConfig(Options):
    """The routers' training, whatever they route."""

    guidance: float | None = option(
        None,
        "guidance at which both branches are distilled as one batch; null: the pipeline's; 1 trains each by itself",
        ge=0,
        le=100,
    )
    min_steps: int = option(8, "fewest sampling steps whose step sizes and times are trained", ge=1, le=1000)
    max_steps: int = option(50, "most of them", ge=1, le=1000)
    late_weight: float = option(
        1.0, "weight of an error at t = 1, with 1 at t = 0, linear between", ge=0, le=1
    )
    simulated_steps: int = option(
        3, "earlier steps whose residuals the simulated cache of a batch may hold", ge=1, le=16, advanced=True
    )
    renewal: float = option(
        0.5, "of these: chance that a block was computed again at a step", ge=0.05, le=1, advanced=True
    )
    flow: float = option(0.1, "weight of flow matching", ge=0, le=1e6)
    val_budgets: list[float] = option(
        [0.9, 0.7, 0.5, 0.3], "budgets to validate at", ge=MIN_BUDGET, le=1, lengths=(0, 100)
    )
    val_shapes: int = option(
        8, "validation shapes or images that are generated at each of them", ge=1, le=1 << 16
    )
    val_steps: int = option(16, "sampling steps of it", ge=1, le=1000)

    def check(self) -> None:
        """The range of steps is not empty."""
        super().check()
        if self.max_steps < self.min_steps:
            raise ValueError(f"max_steps is {self.max_steps}, expected a value from {self.min_steps} to 1000")


@dataclass(kw_only=True)
class DecodedTermConfig(Options):
    """Which of the clean latents that the elastic velocity implies are decoded, and what they count."""

    share: float = option(0.25, "share of a micro-batch's samples that are decoded, rounded up", ge=0, le=1)
    time_power: float = option(
        2.0, "a sample counts t to this power: noisy latents imply nothing sharp", ge=0, le=20, internal=True
    )


class SimulatedCache(ResidualCache):
    """Dense passes at P earlier steps, the newest first. It stands in for every block, whatever the routers decide."""

    def __init__(self, passes: Sequence[Residuals], ages: Tensor, picks: Tensor, damping: float) -> None:
        """
        Args:
            passes: P residuals of all lists of blocks.
            ages: (B,P) long: steps since each.
            picks: (B,I) long in [-1,P): the pass that computed what a block of a row remembers, -1 nothing.
            damping: share of their change since the pass before, where there is one (age 0: there is none), that goes
                on.
        """
        super().__init__(BlockCacheConfig(skipped_reuse=True), [0.0])
        self.passes, self.row_ages, self.picks, self.damping = passes, ages, picks, damping

    def ages(self, key: Key, rows: Sequence[int], steps: Sequence[int]) -> list[int]:
        """Of each row: steps since what a block remembers was computed, 0 for nothing."""
        return [int(age) for age in self.age(key[0])[list(rows)].tolist()]

    def reuse(self, age: int, keep: bool, keep_prob: float, threshold: float) -> bool:
        return True

    def apply(self, key: Key, rows: Sequence[int], steps: Sequence[int], streams: Streams) -> Streams:
        """Streams (k,L,D) of the rows with what stands in for their residuals added."""
        added = self.residuals(key[0])
        return tuple(x + r[list(rows)].to(x.dtype) for x, r in zip(streams, added, strict=True))

    def age(self, block: int) -> Tensor:
        """Steps (B,) long since what a block remembers was computed, 0 for nothing."""
        picked = self.picks[:, block]
        return self.row_ages.gather(1, picked.clamp_min(0)[:, None])[:, 0] * (picked >= 0)

    def residuals(self, block: int) -> tuple[Tensor, ...]:
        """What stands in for the block: (B,L,D) a stream, zero for rows that remember nothing."""
        weights = self._weights(self.picks[:, block])
        streams = zip(*(residuals[block] for residuals in self.passes), strict=True)
        return tuple(
            sum((w.to(r.dtype)[:, None, None] * r for w, r in zip(weights, stream, strict=True)), start=0)
            for stream in streams
        )

    def _weights(self, picked: Tensor) -> Tensor:
        """Share (P,B) of each pass in the forecast: 1 + n / gap of the picked one, - n / gap of the one before, where n
        are the damped steps of its age."""
        passes = self.row_ages.shape[1]
        newest = F.one_hot(picked.clamp_min(0), passes).float() * (picked >= 0)[:, None]
        if not self.damping or passes == 1:
            return newest.T
        older = torch.cat([self.row_ages[:, 1:], torch.zeros_like(self.row_ages[:, :1])], dim=1)
        known = (older > self.row_ages) & (self.row_ages > 0)
        steps = torch.tensor(
            [[damped_steps(age, self.damping) for age in row] for row in self.row_ages.tolist()]
        )
        gaps = (older - self.row_ages).clamp_min(1)
        slope = torch.where(known, steps.to(gaps.device) / gaps, 0.0)  # (B,P)
        going_on = newest * slope
        before = torch.cat([torch.zeros_like(going_on[:, :1]), going_on[:, :-1]], dim=1)
        return (newest + going_on - before).T


class RouterObjective(nn.Module):
    """Routers first, so that they are parameters (and keys of the state dict) of their own, then the base model."""

    skip_error_moments: Tensor

    def __init__(self, flow: Flow, config: RoutingConfig, router: RouterConfig) -> None:
        """UserError for a model that can't have routers."""
        super().__init__()
        self.flow, self.config, self.term, self.paired = flow, config, flow.term, flow.paired
        self.register_buffer("skip_error_moments", torch.zeros(2))
        flow.dit.requires_grad_(False)
        with flow.attaching():
            self.session: ElasticSession = attach(flow.dit, router)
        self.routers = router_modules(flow.dit)
        self.dit = flow.dit

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """`latents`, `noise`, `t` and what `RouterItems` add -> loss and what it is made of.

        UserError for routers that do not forecast whole steps: they can be calibrated, but this is not how they learn.
        """
        config, router = self.config, self.session.router_config
        if router.scope is not Scope.step or not router.longest:
            raise UserError(
                f"router.scope is {router.scope.name} and router.longest {router.longest}, expected step and at"
                " least 1: stage=block_router trains routers of each block"
            )
        x_t = interpolate(batch["noise"], batch["latents"], batch["t"])
        with torch.no_grad():
            dense = self._dense(x_t, batch)
        self._announce(batch)
        skipped = self.flow.velocities(x_t, batch).float()
        decision = self._decision(batch)
        share, logits = self._share(decision), decision.keep_prob.clamp(1e-6, 1 - 1e-6).logit()
        loss = self._prediction_loss(logits, skipped, dense, batch)
        values = {"prediction": loss}
        found = torch.lerp(skipped, dense, logits.sigmoid()[:, None, None])
        conditional = found[: len(x_t)]
        values["flow"] = (conditional - velocity(batch["noise"], batch["latents"])).square().mean()
        loss = loss + config.flow * values["flow"]
        term = self.term
        if term.weight and term.share:
            count = math.ceil(term.share * len(x_t))
            data = predict_data(x_t, conditional, batch["t"])[:count]
            trust = batch["t"][:count] ** term.time_power
            parts = {name: (value * trust).mean() for name, value in self.flow.decoded(data, batch).items()}
            loss, values = loss + term.weight * term.total(parts), values | parts
        by_sample = share.view(-1, len(x_t)).mean(0)
        values |= {"share": share.mean(), "off_budget": (by_sample - batch["budget"]).abs().mean()}
        return loss, {name: value.detach() for name, value in values.items()}

    def _announce(self, batch: Batch) -> None:
        """Tell the session of a pass in which a simulated cache stands in for all blocks, and routers decide."""
        simulated, count = self._simulated(batch), len(batch["dt"])
        self.session.begin(count, 1, batch["budget"].tolist())
        branches = BOTH_BRANCHES if self.paired else BOTH_BRANCHES[:1]
        self.session.cache = simulated
        context = self.session.step(0, batch["dt"].tolist(), branches)
        if not self.paired:  # each row is of a branch of its own
            context.branch = batch["branch"]

    def _decision(self, batch: Batch) -> RouteDecision:
        """The one decision of every row for all blocks, with gradients to the routers. Rows with nothing to go on with
        run at full width whatever the router says, which learns nothing there."""
        current, nothing = self.session.current, ~_known(batch["picks"])
        assert current is not None
        routed = current.decisions[0]
        full = torch.full_like(routed.width, routed.width_prob.shape[-1] - 1)
        return forced(nothing, torch.ones_like(nothing), full, routed)

    def _share(self, decision: RouteDecision) -> Tensor:
        """Executed share (R,) of the dense blocks' FLOPs, with gradients to the routers."""
        trace = self.session.trace
        assert trace is not None
        blocks = trace.flops[0].values()
        dense = sum(block.dense for block in blocks)
        return torch.stack([decision_flops(decision, block, trace.ratios) / dense for block in blocks]).sum(0)

    @property
    def _decided(self) -> int:
        """How many routes a sample has: that of both branches, or one for each."""
        return 1 + (self.paired and self.session.router_config.branches is Branches.separate)

    def _prediction_loss(self, logits: Tensor, skipped: Tensor, dense: Tensor, batch: Batch) -> Tensor:
        """Distance of the gates' logits (R,) from the logarithm of the error that skipping makes, over its threshold.

        A step then runs where the error is above the threshold. The error is the squared distance of the guided
        velocity from the dense one where the rows of one decision are `skipped` and the others dense (both (R,N,C)).
        """
        parts = self._decided
        logits = logits[: parts * len(batch["t"])]
        skip_error = self._skip_error(skipped, dense, batch).clamp_min(1e-9).log()
        known = _known(batch["picks"][:, :parts])
        if self.training:
            followed(self.skip_error_moments, skip_error[known])
        target = skip_error - threshold(self.skip_error_moments, batch["budget"].repeat(parts))
        errors = F.smooth_l1_loss(logits, target, reduction="none")
        return (errors * known).sum() / known.sum().clamp_min(1)

    @torch.no_grad()
    def _skip_error(self, skipped: Tensor, dense: Tensor, batch: Batch) -> Tensor:
        """Error that skipping each row (R,) alone makes, or a sample's rows (B,) where its branches share a decision.

        It counts as much as it moves the latents of a sampler, times the square of the number of steps, with which the
        errors of forecasts fall: so a threshold is about the same share of the steps of any sampler.
        """
        weight = 1 + (self.config.late_weight - 1) * batch["t"]
        weight = weight * (batch["dt"] * batch["steps"].square() / self.config.max_steps).square()
        target, found = self.guided(dense), []
        size = len(skipped) // self._decided
        for part in range(self._decided):
            rows = slice(part * size, (part + 1) * size)
            mixed = dense.clone()
            mixed[rows] = skipped[rows]
            found.append((self.guided(mixed) - target).square().flatten(1).mean(1) * weight)
        return torch.cat(found)

    def guided(self, v: Tensor) -> Tensor:
        """The velocity that sampling follows, from those of the branches; over g, so that its scale stays."""
        if not self.paired:
            return v
        conditional, unconditional = v.float().chunk(2)
        guided = unconditional / self.flow.guidance + (conditional - unconditional)
        return guided * self.flow.gain(conditional, unconditional)

    def _dense(self, x_t: Tensor, batch: Batch) -> Tensor:
        with self.session.dense():
            return self.flow.velocities(x_t, batch).float()

    @torch.no_grad()
    def _simulated(self, batch: Batch) -> SimulatedCache:
        """What the dense blocks add at earlier steps of the straight path between noise and data."""
        passes, ages = [], batch["ages"]
        for t in batch["earlier"].unbind(1):
            x_t = interpolate(batch["noise"], batch["latents"], t)
            with recording(self.dit) as lists:
                self.flow.velocities(x_t, {**batch, "t": t})
            passes.append({each.first: each.added for each in lists})
        picks = batch["picks"].transpose(0, 1).flatten(0, 1)
        ages = ages.repeat(1 + self.paired, 1)
        return SimulatedCache(passes, ages, picks, self.session.router_config.damping)


def _known(picks: Tensor) -> Tensor:
    """Rows (R,) of picks (B,branches,I) that have something to go on with, those of the conditional branch first."""
    return picks.transpose(0, 1).flatten(0, 1)[:, 0] >= 0


def threshold(moments: Tensor, budget: Tensor) -> Tensor:
    """What the logarithm of a skip error has to be above at a budget (B,): a quantile of a normal distribution with the
    mean and spread (2,) that they have had."""
    mean, spread = moments
    scarcity = (1.0 - budget) / (1.0 - MIN_BUDGET)
    return mean + spread * (THRESHOLD_RANGE * (2 * scarcity - 1))


@torch.no_grad()
def followed(moments: Tensor, skip_error: Tensor, rate: float = 0.05) -> None:
    """Keep the running mean and spread (2,), in place, of logarithms of skip errors (B,).

    What they were and what is new are mixed, so that batches of any size, also of one, lead to the same spread.
    """
    if not len(skip_error):
        return
    mean, variance = skip_error.mean(), skip_error.var(correction=0)
    if moments.abs().sum() > 0:
        moved = mean - moments[0]
        mean = moments[0] + rate * moved
        variance = torch.lerp(moments[1].square(), variance, rate) + rate * (1 - rate) * moved.square()
    moments.copy_(torch.stack([mean, variance.sqrt()]))


@dataclass
class RouterItems:
    """Items of flow matching where a random sampler stands, with a budget, and what the reconstruction term needs.

    Beside those of the flow: `t`, the step size `dt` and number of `steps`, `budget` (); `earlier` steps with their
    `ages`, and the `picks` (branches,I) of those that each block remembers; `branch` (), 1 without a condition.
    """

    flow: Flow
    config: RoutingConfig
    router: RouterConfig
    blocks: int

    def __post_init__(self) -> None:
        self._stream = self.flow.stream()

    def item(self, position: int, seed: int) -> Batch:
        item, rng = self._stream.item(position, seed), np.random.default_rng([seed, position, 3])
        config, router, branches = self.config, self.router, 1 + self.flow.paired
        low, high = math.log(config.min_steps), math.log(config.max_steps + 1)
        times = self.flow.times(min(int(math.exp(rng.uniform(low, high))), config.max_steps))
        steps = len(times) - 1
        step = int(rng.integers(steps))
        item["t"], item["dt"] = times[step], times[step + 1] - times[step]
        item["steps"] = torch.tensor(float(steps))
        item["budget"] = torch.tensor(rng.uniform(MIN_BUDGET, 1.0)).float()
        ages = np.cumsum(rng.geometric(config.renewal, config.simulated_steps))
        usable = int(np.sum((ages <= step) & (ages <= router.longest)))
        # blocks that share their decision remember the same step
        shape = (1 if router.branches is Branches.shared else branches, 1)
        picks = rng.integers(usable, size=shape) if usable else np.full(shape, -1)
        item["ages"] = torch.from_numpy(np.where(ages <= step, ages, 0))
        item["earlier"] = times[torch.from_numpy(np.maximum(step - ages, 0))]
        item["picks"] = torch.from_numpy(np.broadcast_to(picks, (branches, self.blocks)).copy())
        dropped = "condition" in item and not item["condition"].any()
        item["branch"] = torch.tensor(float(dropped))
        return item | self.flow.truth(self._stream.index(position, seed), rng)


class RouterStage(Stage):
    """What the loop needs to train routers on the backbone that the configuration names."""

    objective: RouterObjective

    def __init__(self, config: Any) -> None:
        self.config, self.flow = config, (flow := config.flow())
        self.objective = RouterObjective(self.flow, config.routing, config.router)
        blocks = len(self.objective.session.blocks)
        self.items = RouterItems(self.flow, config.routing, config.router, blocks)
        by_itself = not (flow.paired or flow.embeds_guidance)  # each branch, for a pipeline that runs both
        guidance = flow.default_sampling()[1] if by_itself else flow.guidance
        self.record, self.sampling = flow.record, (config.routing.val_steps, guidance)

    def validate(self) -> dict[str, float]:
        """Executed share and distance to the dense latents of the same seed, sampling at each budget."""
        dense, _ = self._generate(ElasticConfig(elastic=False))
        values = {}
        for budget in self.config.routing.val_budgets:
            latents, share = self._generate(ElasticConfig(budget=budget))
            values[f"val/share_at_{budget:g}"] = share.mean().item()
            values[f"val/share_spread_at_{budget:g}"] = share.std(unbiased=False).item()
            values[f"val/error_at_{budget:g}"] = relative_error(latents, dense)
        return values

    def samples(self) -> dict[str, np.ndarray]:
        """Rows: what the dense model makes, then what routers do at each validation budget, same seeds."""
        budgets = self.config.routing.val_budgets
        settings = [ElasticConfig(elastic=False), *(ElasticConfig(budget=b) for b in budgets)]
        return {"generated": self.flow.sheet([self._generate(each)[0] for each in settings])}

    def calibrate(self, curves: CurvesConfig) -> None:
        """Measure on validation samples how residuals go on and the gates' bias over time, and make the requested cost
        the executed one. With a few-step LoRA that has learned the guidance a budget is spent on fewer evaluations:
        where it does not cover all budgets, it is left out."""
        (steps, guidance), router = self.sampling, self.objective.session.router_config
        times = self.flow.times(steps)
        covered = coarseness(router, len(times) - 1, 1.0, guidance) is not None
        few_step = covered or router.few_step_guidance is None
        whole = router.guided_share(times[:-1].tolist()) if covered else 1.0

        def generate(settings: ElasticConfig, count: int) -> tuple[Tensor, Tensor]:
            budget = max(settings.budget * whole, MIN_BUDGET)
            latents, share = self._generate(replace(settings, budget=budget, few_step=few_step), count)
            return self.flow.compared(latents), share / whole

        lowest = min(MIN_BUDGET / whole, 0.95)
        calibrate(self.objective.session, generate, times, curves, lowest)

    def _generate(self, settings: ElasticConfig, count: int = 0) -> tuple[Tensor, Tensor]:
        """Latents (B,N,C) of the first `count` (0: all) validation samples, and the executed share (B,)."""
        session = self.objective.session
        before, session.settings = session.settings, settings
        try:
            with as_trained(self.config.precision, next(self.flow.dit.parameters()).device):
                latents = self.flow.sampled(count, *self.sampling)
            if not settings.elastic:
                return latents, torch.ones(len(latents))
            assert session.trace is not None
            return latents, trace_share(session.trace)
        finally:
            session.settings = before
