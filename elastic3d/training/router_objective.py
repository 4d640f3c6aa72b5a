"""Training of routers, whatever they route: distillation, flow matching, a compute budget, a reconstruction term."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from elastic3d.adapters import adapter_for
from elastic3d.config.router_stage import CostLoss, RouterStageConfig, TrainedParts
from elastic3d.config.routing import MIN_BUDGET, ElasticConfig, RouterConfig
from elastic3d.diffusion.flow import interpolate, predict_data, velocity
from elastic3d.routing.attach import attach, router_modules
from elastic3d.routing.losses import budget_loss, paper_loss, session_share
from elastic3d.routing.session import RoutingSession
from elastic3d.training.datasets import Batch
from elastic3d.training.low_rank import add_low_rank

Generate = Callable[[ElasticConfig], tuple[Tensor, Tensor]]  # -> latents (B,N,C), executed share (B,)


class RouterObjective(nn.Module, ABC):
    """Routers first, so that they are parameters (and keys of the state dict) of their own, then the base model.

    Subclasses say how the base model is called and what else its output is held to.
    """

    def __init__(self, dit: nn.Module, config: RouterStageConfig, router: RouterConfig, paired: bool) -> None:
        """`paired`: both branches of guidance run as one batch and are distilled together."""
        super().__init__()
        self.config, self.paired = config, paired
        teacher = None
        if config.parts is not TrainedParts.routers:
            teacher = copy.deepcopy(dit).eval().requires_grad_(False)
        self._teacher = (teacher,)  # in a tuple: no part of the state dict, nor trained
        dit.requires_grad_(config.parts is TrainedParts.full)
        adapter = adapter_for(dit)
        if config.parts is TrainedParts.lora:
            add_low_rank([dit.get_submodule(name) for name, _ in adapter.block_lists(dit)], config.lora_rank)
        self.session: RoutingSession = attach(dit, adapter, router)
        self.routers = router_modules(dit)
        self.dit = dit

    @abstractmethod
    def velocities(self, dit: nn.Module, x_t: Tensor, batch: Batch) -> Tensor:
        """Velocity (B,N,C), or (2B,N,C) of both branches where they are paired."""

    @abstractmethod
    def reconstruction(self, data: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]] | None:
        """Weighted loss of what predicted clean latents (B,N,C) decode to, and its parts; None without one."""

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """`latents`, `noise`, `t` and what `add_route` draws -> loss and what it is made of."""
        config = self.config
        x_t = interpolate(batch["noise"], batch["latents"], batch["t"])
        with torch.no_grad():
            dense = self._dense(x_t, batch)
        names = ("dt", "budget", "branch")
        dt, budget, branch = (batch[name].repeat(2) if self.paired else batch[name] for name in names)
        if self.paired:
            branch = torch.arange(2, device=branch.device).float().repeat_interleave(len(x_t))
        explored = batch["explored"].transpose(0, 1).flatten(0, 1) if "explored" in batch else None
        several = torch.distributed.is_initialized()  # they share weights or gradients
        self.session.train(dt, budget, branch, explored, lockstep=several)
        found = self.velocities(self.dit, x_t, batch).float()
        values: dict[str, Tensor] = {}
        values["distillation"] = (self.guided(found) - self.guided(dense)).square().mean()
        conditional = found[: len(x_t)]
        values["flow"] = (conditional - velocity(batch["noise"], batch["latents"])).square().mean()
        share = session_share(self.session)
        values["cost"] = self._cost(share.view(-1, len(x_t)).mean(0), batch["budget"])
        loss = config.distillation * values["distillation"] + config.flow * values["flow"]
        loss = loss + config.cost_weight * values["cost"]
        rebuilt = self.reconstruction(predict_data(x_t, conditional, batch["t"]), batch)
        if rebuilt is not None:
            loss, values = loss + rebuilt[0], values | rebuilt[1]
        current = self.session.current
        assert current is not None
        values["share"] = share.mean()
        values["off_budget"] = (share.view(-1, len(x_t)).mean(0) - batch["budget"]).abs().mean()
        values["blocks_run"] = share.new_tensor(
            sum(current.ran_rows.values()) / (len(share) * len(current.ran_rows))
        )
        return loss, {name: value.detach() for name, value in values.items()}

    def guided(self, v: Tensor) -> Tensor:
        """The velocity that sampling follows, from those of the branches; over g, so that its scale stays."""
        if not self.paired:
            return v
        conditional, unconditional = v.float().chunk(2)
        return unconditional / self.config.guidance + (conditional - unconditional)

    def _dense(self, x_t: Tensor, batch: Batch) -> Tensor:
        teacher = self._teacher[0]
        if teacher is not None:
            return self.velocities(teacher.to(x_t.device), x_t, batch).float()
        with self.session.dense():
            return self.velocities(self.dit, x_t, batch).float()

    def _cost(self, share: Tensor, budget: Tensor) -> Tensor:
        if self.config.cost is CostLoss.executed:
            return budget_loss(share, budget, self.config.slack)
        current = self.session.current
        assert current is not None
        decisions = list(current.decisions.values())
        return paper_loss(
            decisions, self.session.router_config.ratios, self.config.rho_gate, self.config.rho_width
        )


def add_route(
    item: Batch, routing: RouterStageConfig, blocks: int, paired: bool, rng: np.random.Generator
) -> None:
    """Give an item a time of a random sampler, with its step size, a budget, and the blocks to explore."""
    low, high = math.log(routing.min_steps), math.log(routing.max_steps + 1)
    steps = min(int(math.exp(rng.uniform(low, high))), routing.max_steps)
    item["t"] = torch.tensor(float(rng.integers(steps)) / steps)
    item["dt"] = torch.tensor(1.0 / steps)
    item["budget"] = torch.tensor(rng.uniform(routing.min_budget, 1.0)).float()
    if routing.explore < 1:
        item["explored"] = torch.from_numpy(rng.random((1 + paired, blocks)) < routing.explore)


def compare_budgets(generate: Generate, budgets: list[float]) -> dict[str, float]:
    """Executed share and distance to the dense latents of the same seed, sampling at each budget."""
    dense, _ = generate(ElasticConfig(elastic=False))
    values = {}
    for budget in budgets:
        latents, share = generate(ElasticConfig(budget=budget))
        values[f"val/share_at_{budget:g}"] = share.mean().item()
        values[f"val/share_spread_at_{budget:g}"] = share.std(unbiased=False).item()
        error = (latents - dense).square().mean() / dense.square().mean()
        values[f"val/error_at_{budget:g}"] = error.item()
    return values


def calibrate(session: RoutingSession, generate: Generate, points: int = 8) -> None:
    """Measure what is executed at `points` budgets; note in the routers' configuration what they have to be told so
    that a budget that is asked for is what is executed. The paper's have no such input."""
    if session.conditioner is None:
        return
    told = np.linspace(MIN_BUDGET, 1.0, points)
    session.router_config = replace(session.router_config, asked=[], told=[])
    shares = [generate(ElasticConfig(budget=float(budget)))[1].mean().item() for budget in told]
    found = np.maximum.accumulate(shares) + 1e-6 * np.arange(points)  # ascending, as an inverse needs
    inverse = np.interp(told, found, told)
    session.router_config = replace(session.router_config, asked=told.tolist(), told=inverse.tolist())
