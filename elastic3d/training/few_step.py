"""The few-step LoRA of the blocks, and training through whole generations: from noise through all
steps to the last latents, which are compared with what the dense model makes of the same noise in many steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from elastic3d.diffusion.options import PipelineConfig
from elastic3d.diffusion.sampler import moves
from elastic3d.elastic import adapter_for, attach
from elastic3d.elastic.attachment import (
    holds_routers,
    load_router_config,
    load_router_state,
    router_modules,
    router_state,
    session_of,
)
from elastic3d.elastic.config import MIN_BUDGET, ElasticConfig, RouterConfig
from elastic3d.elastic.few_step import FewStepLoRA, LowRankUpdate
from elastic3d.elastic.session import ElasticSession
from elastic3d.errors import UserError
from elastic3d.models.weights import find_weights, read_weights
from elastic3d.pipelines.image_to_3d import ROUTERS_NAME
from elastic3d.pipelines.runtime import find_model
from elastic3d.training.datasets import Batch, Shuffle
from elastic3d.training.flow import Flow
from elastic3d.training.loop import Stage
from elastic3d.training.mesh_loss import FewStepMeshLossConfig
from elastic3d.utils.old_names import WEIGHTS
from elastic3d.utils.options import Options, option

VALIDATED = ((4, 1.0), (6, 1.0), (8, 0.5), (12, 0.35), (12, 0.5), (25, 0.3))  # steps, budget


@dataclass(kw_only=True)
class GenerationConfig(Options):
    """Training through whole generations."""

    rank: int = option(32, "rank of the few-step LoRA", ge=1, le=4096)
    min_steps: int = option(4, "fewest sampling steps", ge=1, le=1000)
    max_steps: int = option(25, "most of them", ge=1, le=1000)
    reference_steps: int = option(
        60, "sampling steps of the dense results that are to be reached", ge=1, le=10_000
    )
    pairs: int = option(
        8192, "pairs of a condition and noise, whose dense results are kept in memory", ge=1, le=1 << 24
    )
    floor: float = option(
        1e-3,
        "relative squared error below which little is to be gained; the loss is the logarithm of what is above",
        ge=1e-9,
        le=1,
        advanced=True,
    )
    val_shapes: int = option(
        28, "validation shapes or images that are generated", ge=1, le=1 << 16, advanced=True
    )

    def learned_guidance(self, scale: float) -> tuple[float | None, list[float]]:
        """The guidance that the LoRA learns, of a model that is sampled at `scale`, None for none, and the times at
        which both branches run all the same."""
        return None, []

    def check(self) -> None:
        """The range of steps is not empty, and the dense results are in no fewer."""
        super().check()
        for name, low, high in (
            ("max_steps", self.min_steps, 1000),
            ("reference_steps", self.max_steps, 10_000),
        ):
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a value from {low} to {high}")


@dataclass(kw_only=True)
class ShapeGenerationConfig(GenerationConfig):
    """Of shapes: guidance, and what counts."""

    guidance: bool = option(
        False, "learn the pipeline's guidance too: generations with the LoRA run the conditional branch alone"
    )
    guided_times: list[float] = option(
        [],
        "with it: first and last time between which both branches run all the same; empty: nowhere",
        ge=0,
        le=1,
        ascending=True,
    )
    anchor_weight: float = option(
        1.0,
        "weight of the anchors' channels over the others': errors there cost a mesh the most",
        ge=0,
        le=1e6,
    )

    def learned_guidance(self, scale: float) -> tuple[float | None, list[float]]:
        """The pipeline's, where the options say so."""
        return scale if self.guidance else None, self.guided_times

    def check(self) -> None:
        """Times of guidance come with guidance."""
        super().check()
        if len(self.guided_times) not in (0, 2):
            raise ValueError(f"guided_times is {self.guided_times}, expected none or two")
        if self.guided_times and not self.guidance:
            raise ValueError(f"guided_times is {self.guided_times}, expected none: guidance is false")


class GenerationObjective(nn.Module):
    """A frozen model with routers, generating. Subclasses train the routers or their few-step LoRA."""

    gradient_checkpointing = False  # set by the loop
    weights: Tensor

    def __init__(self, flow: Flow, config: GenerationConfig) -> None:
        """The flow's model has its routers already; it is no part of the state dict, nor trained."""
        super().__init__()
        self.flow, self.config = flow, config
        self.register_buffer("weights", flow.weights, persistent=False)
        self.session = session_of(flow.dit)
        flow.dit.eval().requires_grad_(False)
        for part in router_modules(flow.dit).values():
            part.requires_grad_(False)
        self._dense: dict[int, Tensor] = {}

    @property
    def device(self) -> torch.device:
        """Where it learns."""
        return next(self.parameters()).device

    def generate(self, batch: Batch, steps: int, settings: ElasticConfig) -> Tensor:
        """Latents (B,N,C) in `steps` steps, with gradients to what learns."""
        session, before, dit = self.session, self.session.settings, self.flow.dit
        if next(dit.parameters()).device != self.device:
            dit.to(self.device)
        session.settings, session.recompute = settings, self.gradient_checkpointing
        try:
            return self.flow.integrate(batch, steps)
        finally:
            session.settings, session.recompute = before, False

    def dense(self, batch: Batch) -> Tensor:
        """Latents (B,N,C) of the dense model in many steps."""
        with torch.no_grad():
            return self.generate(batch, self.config.reference_steps, ElasticConfig(elastic=False))

    def dense_results(self, batch: Batch) -> Tensor:
        """The same of `pair`s (B,); computed when they are first needed, and kept."""
        pairs = batch["pair"].tolist()
        missing = list({pair: row for row, pair in enumerate(pairs) if pair not in self._dense}.values())
        if missing:
            found = self.dense({name: value[missing] for name, value in batch.items()}).cpu()
            self._dense |= {pairs[row]: latents for row, latents in zip(missing, found, strict=True)}
        return torch.stack([self._dense[pair] for pair in pairs]).to(batch["noise"].device)


@dataclass
class PairItems:
    """`pairs` pairs of a condition and noise, in a new order each round, with what the reconstruction term needs.

    `draw` says of a position and a seed how the pair is generated: the same number of steps throughout a batch.
    """

    flow: Flow
    pairs: int
    draw: Callable[[int, int], Batch]

    def __post_init__(self) -> None:
        self._shuffle = Shuffle(self.pairs)

    def item(self, position: int, seed: int) -> Batch:
        pair = self._shuffle(position, seed)
        item = self.draw(position, seed) | self.flow.pair(pair, seed) | {"pair": torch.tensor(pair)}
        return item | self.flow.truth(pair, np.random.default_rng([seed, position, 7]))


class GenerationStage(Stage):
    """What the loop needs to train through whole generations; validation is on fixed pairs."""

    objective: GenerationObjective

    def __init__(
        self, config: Any, objective: GenerationObjective, draw: Callable[[int, int], Batch]
    ) -> None:
        self.config, self.objective, self.flow = config, objective, objective.flow
        self.frozen = self.flow.dit
        self.items = PairItems(self.flow, objective.config.pairs, draw)
        self.record = self.flow.record

    @cached_property
    def reference(self) -> tuple[Batch, Tensor]:
        """Validation samples, and what the dense model makes of them."""
        batch = {name: value.to(self.objective.device) for name, value in self.flow.val_pairs().items()}
        with self.as_trained():
            return batch, self.objective.dense(batch)

    def as_trained(self) -> AbstractContextManager[Any]:
        """The number format that the model is validated in."""
        return nullcontext()

    def error(self, found: Tensor) -> float:
        """Geometric mean of the relative squared errors of validation latents (B,N,C) to the dense ones."""
        errors = relative_errors(found, self.reference[1], self.objective.weights)
        return errors.log().mean().exp().item()


def relative_errors(found: Tensor, true: Tensor, weights: Tensor | float = 1.0) -> Tensor:
    """(B,N,C) each, weights of channels (C,) -> squared distance over the squared norm (B,)."""
    return (weights * (found - true).square()).mean((1, 2)) / (weights * true.square()).mean((1, 2))


def attach_lora(
    dit: nn.Module, router: RouterConfig, folder: Path, old: RouterConfig, keep: bool = True
) -> ElasticSession:
    """Put routers with a few-step LoRA on a model, with the weights of the `old` ones in `folder`, if these decide for
    each block as well, or neither do.

    A LoRA is taken over where it is to be kept: with fresh directions up to the new rank, at the new NFE.
    """
    session = attach(dit, router)
    fresh = router_state(dit)
    trained = {key.replace(*WEIGHTS): value for key, value in read_weights(find_weights(folder)).items()}
    lora, found = {key for key in trained if ".few_step." in key}, dict[str, Tensor]()
    if bool(old.trained_steps) == bool(router.trained_steps):
        found = {key: value for key, value in trained.items() if key not in lora}
    if keep:
        found |= {key: widened(trained[key], fresh[key]) for key in lora & fresh.keys()}
        found |= {key: trained[key] for key in lora - fresh.keys()}
    load_router_state(dit, {**fresh, **found}, str(folder))
    for block in session.blocks:
        if keep and old.few_step_rank and block.few_step is not None:
            rebase(block.few_step, router.few_step_nfe / old.few_step_nfe)
    return session


@torch.no_grad()
def rebase(lora: FewStepLoRA, factor: float) -> None:
    """Count the NFE from another `few_step_nfe`, which is `factor` times the old one: the same weights as before at
    each NFE."""
    shift = math.log2(factor)  # c + shift is the new coarseness
    for part in lora.parts.values():
        assert isinstance(part, LowRankUpdate)
        gain = 1 - shift * part.slope
        part.up.mul_(gain)
        part.slope.div_(gain)


def widened(trained: Tensor, fresh: Tensor) -> Tensor:
    """A fresh tensor of the same or a larger rank, with what was trained at its start: with fresh `up`s of zero both
    change a layer alike. As it is where it is no part of the fresh one."""
    if trained.ndim != fresh.ndim or any(a > b for a, b in zip(trained.shape, fresh.shape, strict=True)):
        return trained
    result = fresh.clone()
    result[tuple(map(slice, trained.shape))] = trained.to(fresh)
    return result


@dataclass(kw_only=True)
class ShapeFewStepConfig(ShapeGenerationConfig):
    """A few-step LoRA of a shape DiT, learned through whole generations."""

    model: Path = option(Path("data/pretrained/shape-small"), "folder of a pipeline with trained routers")
    continued: bool = option(
        False,
        "start from the few-step LoRA that the model has, instead of a fresh one; a larger rank adds directions",
    )
    min_nfe: float = option(
        3.0,
        "smallest number of model evaluations (NFE) of a generation: its steps times its budget",
        ge=1,
        le=1000,
    )
    max_nfe: float = option(8.0, "largest of them", ge=1, le=1000)
    whole: float = option(
        0.0,
        "share of the batches that run every block in each step: NFE equal to the steps, a budget of 1",
        ge=0,
        le=1,
    )
    latent_weight: float = option(
        1.0,
        "weight of the distance of the last latents to the dense ones; 0: the mesh loss alone",
        ge=0,
        le=1e6,
    )
    mesh: FewStepMeshLossConfig = option(FewStepMeshLossConfig, "mesh reconstruction loss")

    def check(self) -> None:
        """Ranges of steps and NFE that hold at least one generation, and something to learn from."""
        if self.max_nfe < self.min_nfe:
            raise ValueError(f"max_nfe is {self.max_nfe}, expected a value from {self.min_nfe} to 1000")
        super().check()
        if self.whole and not self.whole_steps:
            raise ValueError(
                f"whole is {self.whole:g}, expected 0: no number of steps is between"
                f" {max(self.min_nfe, self.min_steps):g} and {min(self.max_nfe, self.max_steps):g}"
            )
        if self.max_steps * MIN_BUDGET > self.max_nfe:
            raise ValueError(
                f"max_steps is {self.max_steps}, expected at most {int(self.max_nfe / MIN_BUDGET)}:"
                f" the smallest budget, {MIN_BUDGET:g}, has an NFE of more than {self.max_nfe:g}"
            )
        if not (self.latent_weight or self.mesh.weight):
            raise ValueError("latent_weight is 0, expected more where mesh.weight is 0")

    @property
    def whole_steps(self) -> range:
        """Numbers of steps that a generation with every block has."""
        return range(math.ceil(max(self.min_nfe, self.min_steps)), int(min(self.max_nfe, self.max_steps)) + 1)


def attach_few_step(dit: nn.Module, config: ShapeFewStepConfig, pipeline: PipelineConfig) -> ElasticSession:
    """Put the routers of `config.model` on a model, with fresh few-step LoRA in the place of what they may have,
    or with these where they are to be `continued`, and fresh directions up to the rank; `pipeline` is how the model
    is sampled."""
    folder = find_model(config.model) / ROUTERS_NAME
    old: RouterConfig = load_router_config(folder, adapter_for(dit).family)
    if old.trained_steps:
        raise UserError(
            f"{folder} has per-block routers, which were trained with their few-step LoRA: stage=block_router goes on"
            " with both"
        )
    if config.continued and not 0 < old.few_step_rank <= config.rank:
        raise UserError(
            f"few_step.rank is {config.rank}, expected at least that of {folder} to go on, which is {old.few_step_rank}"
            if old.few_step_rank
            else f"few_step.continued is true, but {folder} has no few-step LoRA"
        )
    learned, times = config.learned_guidance(pipeline.guidance)
    router = replace(
        old,
        few_step_rank=config.rank,
        few_step_nfe=config.max_nfe,
        few_step_max_steps=moves(pipeline, config.max_steps),
        few_step_guidance=learned,
        guided_times=times,
    )
    return attach_lora(dit, router, folder, old, config.continued)


class FewStepObjective(GenerationObjective):
    """Only the few-step LoRA is parameters: the model and its routers stay as they are."""

    config: ShapeFewStepConfig

    def __init__(self, flow: Any, config: ShapeFewStepConfig) -> None:
        attach_few_step(flow.dit, config, flow.pipeline)
        super().__init__(flow, config)
        self.term = flow.term
        modules = router_modules(flow.dit).items()
        self.few_step = nn.ModuleDict({name: part for name, part in modules if name.endswith("few_step")})
        self.few_step.requires_grad_(True)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """`noise` (B,N,C), `condition` (B,M,Cc), `pair` (B,), for all the first one's `steps` and `nfe`, and what the
        mesh loss needs -> loss: the mean logarithm of the relative squared errors, so that each NFE counts the same,
        and what the last latents decode to."""
        config, steps, nfe = self.config, int(batch["steps"][0]), float(batch["nfe"][0])
        dense = self.dense_results(batch) if config.latent_weight or self.term.dense else None
        budget = min(max(nfe / (len(self.flow.times(steps)) - 1), MIN_BUDGET), 1.0)
        found = self.generate(batch, steps, ElasticConfig(budget=budget))
        loss, values = found.new_zeros(()), {"nfe": batch["nfe"][0]}
        if dense is not None:
            errors = relative_errors(found, dense, self.weights)
            loss = config.latent_weight * (errors + config.floor).log().mean()
            values["error"] = errors.detach().log().mean().exp()
        if self.term.weight:
            parts = self.flow.decoded(found, batch, dense)
            loss = loss + self.term.weight * self.term.total(parts).mean()
            values |= {name: part.detach().mean() for name, part in parts.items()}
        return loss, values


@dataclass
class NFEDraw:
    """How a pair is generated: `steps` and `nfe` (), the same in all of a batch."""

    config: ShapeFewStepConfig
    batch: int

    def __call__(self, position: int, seed: int) -> Batch:
        """Of the item of a position."""
        config, rng = self.config, np.random.default_rng([seed, position // self.batch, 4])
        low, high = math.log(config.min_steps), math.log(config.max_steps + 1)
        steps = min(int(math.exp(rng.uniform(low, high))), config.max_steps)
        nfe = rng.uniform(min(config.min_nfe, steps), min(config.max_nfe, steps))
        if rng.random() < config.whole:
            nfe = steps = int(rng.choice(config.whole_steps))
        # no smaller NFE than that of the smallest budget
        return {"steps": torch.tensor(steps), "nfe": torch.tensor(max(nfe, MIN_BUDGET * steps))}


class FewStepStage(GenerationStage):
    """What the loop needs to train few-step LoRA."""

    def __init__(self, config: Any) -> None:
        options: ShapeFewStepConfig = config.few_step
        if not holds_routers(find_model(options.model) / ROUTERS_NAME):
            raise UserError(f"{options.model} has no routers, expected a folder {ROUTERS_NAME} in it")
        flow = config.flow()
        super().__init__(config, FewStepObjective(flow, options), NFEDraw(options, config.batch))

    def validate(self) -> dict[str, float]:
        """Geometric mean of the relative squared error to the dense results, with and without the few-step LoRA."""
        values = {}
        for steps, budget in self._points():
            for name, few_step in (("adapted", True), ("plain", False)):
                settings = ElasticConfig(budget=budget, few_step=few_step)
                found = self.objective.generate(self.reference[0], steps, settings)
                values[f"val/{name}_{steps}_at_{budget:g}"] = self.error(found)
        return values

    def _points(self) -> Sequence[tuple[int, float]]:
        """Steps and budgets that are validated: those of a small enough NFE."""
        options = self.config.few_step
        found = [(s, b) for s, b in VALIDATED if s * b <= options.max_nfe and s <= options.max_steps]
        return found or [(options.max_steps, max(options.max_nfe / options.max_steps, MIN_BUDGET))]
