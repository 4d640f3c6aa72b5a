"""Per-block routers and few-step LoRA of a frozen model, trained together through whole generations.

A batch goes from noise through all steps along hard routes to its last latents, which are compared with the dense
model's of the same noise, and decoded to what they stand for. Of every four samples one takes the full route, one has
the smallest budget, two have budgets between (the sandwich rule of slimmable networks, 1903.05134). At first routes
are random, around the error that leaving out each block was measured to cause; routers imitate them, and the
LoRA learns to do without neighbours. Then routers decide: gradients pass straight through their hard decisions
(1308.3432), and the squared distance to the budget is added.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from elastic3d.elastic import adapter_for, attach
from elastic3d.elastic.attachment import holds_routers, load_router_config, router_modules
from elastic3d.elastic.config import MIN_BUDGET, ElasticConfig, RouterConfig, Scope
from elastic3d.elastic.families import BlockFlops, block_flops
from elastic3d.elastic.trace import SKIPPED, trace_share
from elastic3d.errors import UserError
from elastic3d.pipelines.image_to_3d import ROUTERS_NAME
from elastic3d.training.calibration import CurvesConfig, as_trained, calibrate
from elastic3d.training.datasets import Batch
from elastic3d.training.few_step import (
    GenerationConfig,
    GenerationObjective,
    GenerationStage,
    attach_lora,
    relative_errors,
)
from elastic3d.training.flow import Flow
from elastic3d.training.routes import FREE, KINDS, Rollout, Sensitivity, action_flops, fill, load_sensitivity
from elastic3d.utils.options import option

FULL, SMALLEST = range(2)  # kinds of samples; those beyond are between
KIND_NAMES = ("full", "smallest", "between")
SPREAD = 1.0  # noise of random routes, in standard deviations of the table
SLACK = 0.1  # a sample's cost may differ from its budget by this, as long as the mean does not
ARCHITECTURE = ("hidden", "conditioning", "widths", "longest")


@dataclass(kw_only=True)
class BlockRouterConfig(GenerationConfig):
    """Routes and what routers learn from, whatever is generated."""

    min_steps: int = option(2, "fewest sampling steps", ge=1, le=1000)
    max_steps: int = option(10, "most of them", ge=1, le=1000)
    min_budget: float = option(
        MIN_BUDGET, "smallest budget, that of a quarter of the samples", ge=MIN_BUDGET, le=1
    )
    random_steps: int = option(
        300, "first optimizer steps, in which routes are random and routers imitate them", ge=0, le=1 << 40
    )
    sensitivity: Path | None = option(
        None, "table of stage=sensitivity that random routes are drawn around; null: all blocks are alike"
    )
    cost_weight: float = option(
        20.0, "weight of the squared distance to the budget", ge=0, le=1e6, internal=True
    )
    imitation_weight: float = option(
        1.0, "weight of imitating random routes, from which routers alone learn", ge=0, le=1e6, internal=True
    )
    router_rate: float = option(
        10.0, "learning rate of the routers over that of the LoRA", ge=0, le=1e4, advanced=True
    )
    val_steps: list[int] = option(
        [4, 6], "sampling steps to validate in", ge=1, le=1000, lengths=(1, 100), advanced=True
    )
    val_budgets: list[float] = option(
        [1.0, 0.7, 0.5], "budgets to validate at", ge=MIN_BUDGET, le=1, lengths=(1, 100), advanced=True
    )

    def check(self) -> None:
        """Validation within what is trained."""
        super().check()
        for steps in self.val_steps:
            if not self.min_steps <= steps <= self.max_steps:
                raise ValueError(
                    f"val_steps has {steps}, expected {self.min_steps} to {self.max_steps}, as is trained"
                )

    def check_run(self, router: RouterConfig, batch: int, accumulate: int) -> None:
        """ValueError for routers of another kind, or micro-batches without a sandwich."""
        if router.scope is not Scope.block:
            raise ValueError(
                "router.scope is step, expected block: each block decides for itself, at a budget"
            )
        if batch // accumulate % KINDS:
            raise ValueError(
                f"batch is {batch} in {accumulate} micro-batches, expected a multiple of {KINDS} in each:"
                " a full route, the smallest one and two between"
            )


def attach_block_routers(
    dit: nn.Module,
    config: BlockRouterConfig,
    router: RouterConfig,
    start: Path,
    times: Callable[[int], Tensor],
    guidance: float,
) -> None:
    """Put per-block routers with a few-step LoRA on a model, with what the routers in the folder `start` have of them.

    Of routers of another scope the LoRA alone is taken over. `times`: the sampler's, for a number of steps;
    `guidance`: its scale.

    Raises:
        UserError: per-block routers of another architecture, or a LoRA of a higher rank.
    """
    adapter = adapter_for(dit)
    low, high = (len(times(steps)) - 1 for steps in (config.min_steps, config.max_steps))
    learned, guided_times = config.learned_guidance(guidance)
    wanted = replace(
        router,
        few_step_rank=config.rank,
        few_step_nfe=float(high),
        few_step_max_steps=high,
        few_step_guidance=learned,
        guided_times=guided_times,
        trained_steps=[low, high],
    )
    if not holds_routers(start):
        attach(dit, wanted)
        return
    old: RouterConfig = load_router_config(start, adapter.family)
    if old.few_step_rank > config.rank:
        raise UserError(
            f"rank is {config.rank}, expected at least {old.few_step_rank}, that of the LoRA in {start}"
        )
    for name in ARCHITECTURE if old.trained_steps else ():
        if getattr(old, name) != getattr(wanted, name):
            raise UserError(
                f"router.{name} is {getattr(wanted, name)}, but the per-block routers in {start} have"
                f" {getattr(old, name)}"
            )
    attach_lora(dit, wanted, start, old)


@dataclass
class RouteDraw:
    """What a training item knows of its generation.

    times: the sampler's grid (S+1,) of a number of steps; blocks: FLOPs of each; batch: samples of an optimizer step.
    """

    config: BlockRouterConfig
    router: RouterConfig
    blocks: Sequence[BlockFlops]
    times: Callable[[int], Tensor]
    batch: int
    sensitivity: Sensitivity | None = None

    def __call__(self, position: int, seed: int) -> Batch:
        """`steps`, `kind`, `budget` (), `routes` (S,2,I) and `free` () of the item of a position."""
        config, step, kind = self.config, position // self.batch, position % KINDS
        steps = int(np.random.default_rng([seed, step, 4]).integers(config.min_steps, config.max_steps + 1))
        rng = np.random.default_rng([seed, position, 6])
        times = self.times(steps)
        whole = self.router.guided_share(times[:-1].tolist())  # a larger budget leaves nothing out
        budget = {FULL: 1.0, SMALLEST: config.min_budget}.get(kind)
        if budget is None:
            budget = float(rng.uniform(config.min_budget, max(whole, config.min_budget)))
        cells = (len(times) - 1, 2, len(self.blocks))
        free = kind != FULL and step >= config.random_steps
        if free:
            routes = torch.full(cells, FREE)
        elif kind == FULL:
            routes = torch.full(cells, self.router.widths)
        else:
            routes = self.around(times, budget, SPREAD, int(rng.integers(1 << 62)))
        return {
            "steps": torch.tensor(steps),
            "kind": torch.tensor(min(kind, len(KIND_NAMES) - 1)),
            "budget": torch.tensor(budget).float(),
            "free": torch.tensor(free),
            "routes": routes,
        }

    def around(self, times: Tensor, budget: float, spread: float, seed: int) -> Tensor:
        """Random routes (S,2,I) that execute a budget, the same in both branches: the cells that matter least by the
        measured table are skipped or narrow.

        Gumbel noise of `spread` times the table's standard deviation is added, so that routes differ: 0 gives the best
        table by timestep. With it, what is saved is divided at random between skipped blocks and narrowed MLPs.
        """
        starts, ratios = times[:-1].tolist(), self.router.ratios
        table = torch.zeros(len(starts), len(self.blocks))
        if self.sensitivity is not None:
            table = self.sensitivity.at(starts)
        passes = torch.tensor([self.router.guided_share([t]) for t in starts])
        share, generator = min(budget / passes.mean().item(), 1.0), torch.Generator().manual_seed(seed)
        chance = torch.rand((), generator=generator).item() * min(1.0, 2 * (1 - share)) * (spread > 0)
        narrow = torch.rand(table.shape, generator=generator) < chance
        width = torch.randint(1, len(ratios) + 1, table.shape, generator=generator)
        action = torch.where(narrow, width, len(ratios))
        noise = -torch.rand(table.shape, generator=generator).clamp(1e-9, 1 - 1e-7).log().neg().log()
        scale = table.std(unbiased=False).item() or 1.0
        priority = (table + spread * scale * noise - table.min() + 1e3)[:, None]
        flops = action_flops(self.blocks, ratios)
        found = fill(priority, action[:, None], passes[:, None, None, None] * flops, share)
        return found.expand(-1, 2, -1).contiguous()


class BlockRouterObjective(GenerationObjective):
    """Parameters are the routers with their few-step LoRA."""

    config: BlockRouterConfig

    def __init__(self, flow: Flow, config: BlockRouterConfig, router: RouterConfig) -> None:
        """UserError for a model that can't have routers, or whose routers are others."""
        with flow.attaching():
            start = flow.folder / ROUTERS_NAME
            attach_block_routers(flow.dit, config, router, start, flow.times, flow.guidance)
        super().__init__(flow, config)
        self.term, self.routers = flow.term, router_modules(flow.dit)
        self.routers.requires_grad_(True)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """`noise` (B,N,C), a condition, `pair` and what `RouteDraw` says -> loss, and what it is made of."""
        config = self.config
        if len(batch["kind"]) % KINDS:  # some weights would get no gradient in this process
            raise UserError(
                f"a process has {len(batch['kind'])} samples in a micro-batch, expected a multiple of {KINDS},"
                " with every kind of route"
            )
        dense, free = self.dense_results(batch), batch["free"]
        rollout = Rollout(batch["budget"], batch["routes"], straight=bool(free.any()))
        found = self.along(rollout, batch)
        losses, values = self.end_losses(found, dense, batch)
        loss = losses.mean()
        assert self.session.trace is not None
        share = rollout.share(self.session.trace)
        budget = batch["budget"]
        if self.session.guided:  # the LoRA has learned the guidance: a full route executes no more than this
            times = self.flow.times(int(batch["steps"][0]))[:-1].tolist()
            budget = budget.clamp_max(self.session.router_config.guided_share(times))
        if not free.all():
            imitation = -rollout.log_likelihood()[~free].mean()
            loss = loss + config.imitation_weight * imitation
            values["imitation"] = imitation
        if free.any():
            cost = budget_loss(share[free], budget[free], SLACK)
            loss = loss + config.cost_weight * cost
            values |= {"cost": cost, "off_budget": (share - budget)[free].abs().mean()}
        values["share"] = share.mean()
        return loss, {name: value.detach() for name, value in values.items()}

    def along(self, rollout: Rollout, batch: Batch) -> Tensor:
        """Last latents (B,N,C) of a rollout."""
        with rollout.leading(self.session):
            return self.generate(batch, int(batch["steps"][0]), ElasticConfig())

    def end_losses(self, found: Tensor, dense: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """What is lost at the end (B,): the logarithm of the latents' relative squared error to the dense ones, so that
        every number of steps counts the same, and what they decode to."""
        errors = relative_errors(found, dense, self.weights)
        losses = (errors + self.config.floor).log()
        values = {
            f"error_{name}": errors[batch["kind"] == kind].log().mean().exp()
            for kind, name in enumerate(KIND_NAMES)
        }
        if self.term.weight:
            parts = self.flow.decoded(found, batch, dense)
            losses = losses + self.term.weight * self.term.total(parts)
            values |= {name: part.mean() for name, part in parts.items()}
        return losses, values


# ---------------------------------------------------------------------------------------------- validation, calibration


class BlockRouterStage(GenerationStage):
    """What the loop needs to train per-block routers on the backbone that the configuration names."""

    objective: BlockRouterObjective

    def __init__(self, config: Any) -> None:
        options, flow = config.blocks, config.flow()
        objective = BlockRouterObjective(flow, options, config.router)
        flops = block_flops(flow.dit, adapter_for(flow.dit), flow.lengths)
        table = load_sensitivity(options.sensitivity, [block.name for block in objective.session.blocks])
        self.draw = RouteDraw(
            options, objective.session.router_config, flops, flow.times, config.batch, table
        )
        super().__init__(config, objective, self.draw)

    def rate_factor(self, name: str) -> float:
        """Routers learn faster than the LoRA."""
        return 1.0 if "/few_step." in name else self.config.blocks.router_rate

    def validate(self) -> dict[str, float]:
        """For each number of steps and budget the error to the dense results and the executed share; at that share the
        error of the best table by timestep (with the LoRA, without routers), where one was measured."""
        values = {}
        for steps in self.config.blocks.val_steps:
            for budget in self.config.blocks.val_budgets:
                found, share = self.generate(steps, budget)
                values[f"val/error_{steps}_at_{budget:g}"] = self.error(found)
                values[f"val/share_{steps}_at_{budget:g}"] = share.mean().item()
                values[f"val/share_spread_{steps}_at_{budget:g}"] = share.std(unbiased=False).item()
                if self.draw.sensitivity is not None:
                    routes = self.draw.around(self.flow.times(steps), share.mean().item(), 0.0, 0)
                    values[f"val/table_{steps}_at_{budget:g}"] = self.error(self.along(steps, routes))
        return values

    def generate(self, steps: int, budget: float) -> tuple[Tensor, Tensor]:
        """Validation latents (B,N,C) along the routers' own routes, and their executed share (B,)."""
        batch, _ = self.reference  # outside of autocast, which on a CPU stacks no fp16
        with self.as_trained(), torch.no_grad():
            found = self.objective.generate(batch, steps, ElasticConfig(budget=budget))
        trace = self.objective.session.trace
        assert trace is not None
        return found, trace_share(trace).float()

    def along(self, steps: int, routes: Tensor) -> Tensor:
        """Validation latents (B,N,C) of generations with the LoRA along routes (S,2,I)."""
        batch, count = self.reference[0], len(self.reference[1])
        rollout = Rollout(torch.ones(count), routes.to(self.objective.device).expand(count, -1, -1, -1))
        with self.as_trained(), torch.no_grad():
            return self.objective.along(rollout, {**batch, "steps": torch.full((count,), steps)})

    def as_trained(self) -> torch.autocast:
        """That of the training."""
        return as_trained(self.config.precision, self.objective.device)

    def calibrate(self, curves: CurvesConfig) -> None:
        """Make the requested share the executed one, in the mean over the validated numbers of steps."""
        options, router = self.config.blocks, self.objective.session.router_config
        wholes = [router.guided_share(self.flow.times(steps)[:-1].tolist()) for steps in options.val_steps]

        def generate(settings: ElasticConfig, _: int) -> tuple[Tensor, Tensor]:
            shares = []
            for steps, whole in zip(options.val_steps, wholes, strict=True):
                latents, share = self.generate(steps, max(settings.budget * whole, MIN_BUDGET))
                shares.append(share / whole)
            return latents, torch.stack(shares).mean(0)

        # some range also where no budget was trained but the full one
        lowest = min(options.min_budget / min(wholes), 0.95)
        times = self.flow.times(options.val_steps[0])
        calibrate(self.objective.session, generate, times, curves, lowest)

    def sensitivity(self, steps: int) -> Sensitivity:
        """What leaving out each block at each step does to the last latents, with the LoRA as it is."""
        times, blocks = self.flow.times(steps)[:-1].tolist(), self.objective.session.blocks
        full = torch.full((len(times), 2, len(blocks)), self.draw.router.widths)
        whole, errors = self.error(self.along(steps, full)), np.zeros((len(times), len(blocks)))
        for cell in tqdm(range(errors.size), desc="sensitivity", dynamic_ncols=True):
            step, block = divmod(cell, len(blocks))
            routes = full.clone()
            routes[step, :, block] = SKIPPED
            errors[step, block] = self.error(self.along(steps, routes))
        measured = {"steps": steps, "samples": len(self.reference[1]), **self.record}
        return Sensitivity([b.name for b in blocks], times, whole, errors.tolist(), measured)


def budget_loss(share: Tensor, budget: Tensor, slack: float = 0.0, groups: int = 4) -> Tensor:
    """How far the executed cost is from its budget: share, budget (B,) -> scalar.

    The squared mean difference within each of `groups` bands of the budget, so that timesteps, samples and
    branches may trade compute with each other, plus the squared difference of every sample beyond `slack`. The trade is
    within a micro-batch, so that these have other gradients than their whole.
    """
    band = (budget / (1 + 1e-6) * groups).long()
    count = torch.zeros(groups, device=share.device).index_add(0, band, torch.ones_like(share))
    total = torch.zeros(groups, device=share.device).index_add(0, band, share - budget)
    mean = (total / count.clamp_min(1)).square() * (count / count.sum())
    each = ((share - budget).abs() - slack).clamp_min(0).square().mean()
    return mean.sum() + each
