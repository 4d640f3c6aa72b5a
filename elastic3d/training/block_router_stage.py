"""What the loop needs of per-block routers, whatever they generate: validation, calibration, the measured table."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from elastic3d.elastic.config import MIN_BUDGET, ElasticConfig
from elastic3d.elastic.cost import trace_share
from elastic3d.elastic.rollout import Rollout
from elastic3d.elastic.trace import SKIPPED
from elastic3d.training.block_router import BlockRouterObjective, RouteDraw
from elastic3d.training.calibration import Curve, CurvesConfig, as_trained, calibrate
from elastic3d.training.datasets import Batch
from elastic3d.training.generations import relative_errors
from elastic3d.training.sensitivity import Sensitivity


class BlockRouterStage(ABC):
    """A stage of the loop; subclasses bring the data."""

    def __init__(self, config: Any, flow: BlockRouterObjective, draw: RouteDraw) -> None:
        self.config, self.flow, self.draw = config, flow, draw
        self.objective: nn.Module = flow
        self._references: tuple[Batch, Tensor] | None = None

    @abstractmethod
    def val_batch(self, count: int) -> Batch:
        """Noise and conditions of at most `count` validation samples, the same every time."""

    def rate_factor(self, name: str) -> float:
        """Routers learn faster than the LoRA."""
        return 1.0 if "/few_step." in name else self.config.blocks.router_rate

    def samples(self) -> dict[str, np.ndarray]:
        """None: latents alone are looked at."""
        return {}

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
        batch, _ = self._reference()
        with as_trained(self.config.precision, batch["noise"].device), torch.no_grad():
            found = self.flow.generate(batch, steps, ElasticConfig(budget=budget))
        trace = self.flow.session.trace
        assert trace is not None
        return found, trace_share(trace).float()

    def along(self, steps: int, routes: Tensor) -> Tensor:
        """Validation latents (B,N,C) of generations with the LoRA along routes (S,2,I)."""
        batch, _ = self._reference()
        count = len(batch["noise"])
        forced = routes.to(batch["noise"].device).expand(count, -1, -1, -1)
        rollout = Rollout(torch.ones(count), forced)
        with as_trained(self.config.precision, batch["noise"].device), torch.no_grad():
            return self.flow.along(rollout, {**batch, "steps": torch.full((count,), steps)})

    def error(self, found: Tensor) -> float:
        """Geometric mean of the relative squared errors to the dense results."""
        errors = relative_errors(found, self._reference()[1], self.flow.weights)
        return errors.log().mean().exp().item()

    def calibrate(self, points: int = 24) -> None:
        """Make the requested share the executed one, in the mean over the validated numbers of steps."""

        def generate(settings: ElasticConfig, count: int) -> tuple[Tensor, Tensor]:
            shares = []
            for steps in self.config.blocks.val_steps:
                whole = self.flow.session.router_config.guided_share(self.flow.times(steps)[:-1].tolist())
                latents, share = self.generate(steps, max(settings.budget * whole, MIN_BUDGET))
                shares.append(share / whole)
            return latents, torch.stack(shares).mean(0)

        none = CurvesConfig(dampings=Curve.keep, gate_bias=Curve.keep)  # of forecasts and gates over time
        calibrate(self.flow.session, generate, self.flow.times(self.config.blocks.val_steps[0]), none, points)

    def sensitivity(self, steps: int) -> Sensitivity:
        """What leaving out each block at each step does to the last latents, with the LoRA as it is."""
        times, blocks = self.flow.times(steps)[:-1].tolist(), self.flow.session.blocks
        full = torch.full((len(times), 2, len(blocks)), self.draw.router.widths)
        whole, errors = self.error(self.along(steps, full)), np.zeros((len(times), len(blocks)))
        for cell in tqdm(range(errors.size), desc="sensitivity", dynamic_ncols=True):
            step, block = divmod(cell, len(blocks))
            routes = full.clone()
            routes[step, :, block] = SKIPPED
            errors[step, block] = self.error(self.along(steps, routes))
        measured = {"steps": steps, "samples": len(self._reference()[1]), **self.record()}
        return Sensitivity([b.name for b in blocks], times, whole, errors.tolist(), measured)

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """What the run trains on."""

    def _reference(self) -> tuple[Batch, Tensor]:
        """Validation samples, and what the dense model makes of them."""
        if self._references is None:
            device = next(self.flow.routers.parameters()).device
            drawn = self.val_batch(self.config.blocks.val_shapes)
            batch = {name: value.to(device) for name, value in drawn.items()}
            dense = ElasticConfig(elastic=False)
            with as_trained(self.config.precision, device), torch.no_grad():
                found = self.flow.generate(batch, self.config.blocks.reference_steps, dense)
            self._references = batch, found
        return self._references
