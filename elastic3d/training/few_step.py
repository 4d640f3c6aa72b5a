"""The routers' few-step LoRA (low-rank updates of the blocks): learned through whole elastic generations with few
model evaluations, held to what the dense model makes of the same noise in many steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from elastic3d.diffusion.options import PipelineConfig
from elastic3d.elastic import adapter_for, attach
from elastic3d.elastic.attachment import (
    load_router_config,
    load_router_state,
    router_modules,
    router_state,
)
from elastic3d.elastic.config import MIN_BUDGET, ElasticConfig, RouterConfig
from elastic3d.elastic.session import ElasticSession
from elastic3d.errors import UserError
from elastic3d.models.options import VAEConfig
from elastic3d.models.shape_dit import ShapeDiT
from elastic3d.models.skip_dit import SkipDiT, load_dit
from elastic3d.models.weights import find_weights, load_config
from elastic3d.pipelines.image_to_3d import ROUTERS_NAME
from elastic3d.training.datasets import Batch, PreparedShapes, Shuffle, read_split, record_of_shapes, stack
from elastic3d.training.generations import (
    GenerationObjective,
    ShapeGenerationConfig,
    channel_weights,
    draw_pair,
    integrate_shapes,
    pipeline_config,
    relative_errors,
    with_lora,
)
from elastic3d.training.latents import LatentCacheConfig, LatentInfo
from elastic3d.training.options import Precision, StageName, TrainConfig
from elastic3d.utils.options import option
from elastic3d.utils.tensors import read_weights

VALIDATED = ((4, 1.0), (6, 1.0), (8, 0.5), (12, 0.35), (12, 0.5), (25, 0.3))  # steps, budget
TOKENS = ("tokens",)


@dataclass(kw_only=True)
class FewStepStageConfig(ShapeGenerationConfig):
    """A few-step LoRA, learned through whole generations."""

    model: Path = option(Path("data/pretrained/shape-small"), "folder of a pipeline with trained routers")
    continued: bool = option(
        False,
        "start from the few-step LoRA that the model has, instead of a fresh one; a larger rank adds directions",
    )
    min_nfe: float = option(
        3.0,
        "fewest evaluations of the model (NFE) in a generation: its steps times its budget",
        ge=1,
        le=1000,
    )
    max_nfe: float = option(8.0, "most of them", ge=1, le=1000)
    whole: float = option(
        0.0,
        "share of the batches that run every block in each step: in as many steps as calls, a budget of 1",
        ge=0,
        le=1,
    )

    def check(self) -> None:
        """Ranges of steps and calls that hold at least one generation."""
        if self.max_nfe < self.min_nfe:
            raise ValueError(f"max_nfe is {self.max_nfe}, expected a value from {self.min_nfe} to 1000")
        super().check()
        if self.whole and not self.whole_steps:
            raise ValueError(
                f"whole is {self.whole:g}, expected 0: no number of steps is between {self.min_nfe:g} and"
                f" {min(self.max_nfe, self.max_steps):g}"
            )
        if self.max_steps * MIN_BUDGET > self.max_nfe:
            raise ValueError(
                f"max_steps is {self.max_steps}, expected at most {int(self.max_nfe / MIN_BUDGET)}:"
                f" the smallest budget, {MIN_BUDGET:g}, leaves more than {self.max_nfe:g} calls"
            )

    @property
    def whole_steps(self) -> range:
        """Numbers of steps that a generation with every block has."""
        return range(math.ceil(self.min_nfe), int(min(self.max_nfe, self.max_steps)) + 1)


@dataclass(kw_only=True)
class FewStepTrainConfig(TrainConfig):
    """Everything `scripts/train.py stage=few_step` takes."""

    stage: StageName = option(StageName.few_step, "what to do")
    latents: LatentCacheConfig = option(LatentCacheConfig, "cache of latents and image tokens")
    few_step: FewStepStageConfig = option(FewStepStageConfig, "training of the routers' few-step LoRA")


def attach_few_step(dit: nn.Module, config: FewStepStageConfig, guidance: float) -> ElasticSession:
    """Put the routers of `config.model` on a model, with fresh few-step LoRA in the place of what they may have,
    or with these where they are to be `continued`, and fresh directions up to the rank; `guidance` is the
    pipeline's."""
    adapter, folder = adapter_for(dit), config.model / ROUTERS_NAME
    old: RouterConfig = load_router_config(folder, adapter.family)
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
    router = replace(
        old,
        few_step_rank=config.rank,
        few_step_nfe=config.max_nfe,
        few_step_max_steps=config.max_steps,
        few_step_guidance=guidance if config.guidance else None,
        guided_times=config.guided_times,
    )
    session = attach(dit, router)
    path = find_weights(folder)
    load_router_state(dit, with_lora(router_state(dit), read_weights(path), config.continued), str(path))
    if config.continued:
        for block in session.blocks:
            assert block.few_step is not None
            block.few_step.rebase(config.max_nfe / old.few_step_nfe)
    return session


class FewStepObjective(GenerationObjective):
    """Only the few-step LoRA is parameters: the model and its routers stay as they are."""

    def __init__(
        self, dit: ShapeDiT | SkipDiT, pipeline: PipelineConfig, config: FewStepStageConfig, anchors: int
    ) -> None:
        """`anchors`: how many channels of a latent, the first ones, are where it is."""
        attach_few_step(dit, config, pipeline.guidance)
        weights = channel_weights(dit.config.in_channels, anchors, config.anchor_weight)
        super().__init__(dit, config.reference_steps, weights)
        self.config, self.pipeline = config, pipeline
        modules = router_modules(dit).items()
        self.few_step = nn.ModuleDict({name: part for name, part in modules if name.endswith("few_step")})
        self.few_step.requires_grad_(True)

    def integrate(self, batch: Batch, steps: int) -> Tensor:
        """As the pipeline samples."""
        return integrate_shapes(cast(ShapeDiT, self.dit), self.pipeline, batch, steps)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """`noise` (B,N,C), `condition` (B,M,Cc), `pair` (B,), and for all the first one's `steps` and `nfe` -> loss:
        the mean logarithm of the relative squared errors, so that each NFE counts the same."""
        steps, nfe = int(batch["steps"][0]), float(batch["nfe"][0])
        target = self.dense_results(batch)
        budget = min(max(nfe / steps, MIN_BUDGET), 1.0)
        found = self.generate(batch, steps, ElasticConfig(budget=budget))
        errors = relative_errors(found, target, self.weights)
        loss = (errors + self.config.floor).log().mean()
        return loss, {"error": errors.detach().log().mean().exp(), "nfe": batch["nfe"][0]}


@dataclass
class PairItems:
    """`pairs` pairs of a shape's view and noise, in a new order each round; a batch has one number of steps and calls.

    Items: `noise` (N,C), `condition` (M,Cc), `pair`, `steps`, `nfe` ()."""

    shapes: PreparedShapes
    info: LatentInfo
    config: FewStepStageConfig
    batch: int

    def __post_init__(self) -> None:
        self._shuffle = Shuffle(self.config.pairs)

    def __len__(self) -> int:
        return self.config.pairs

    def item(self, position: int, seed: int) -> Batch:
        """Item `position` of the stream."""
        config, rng = self.config, np.random.default_rng([seed, position // self.batch, 4])
        low, high = math.log(config.min_steps), math.log(config.max_steps + 1)
        steps = min(int(math.exp(rng.uniform(low, high))), config.max_steps)
        nfe = rng.uniform(min(config.min_nfe, steps), min(config.max_nfe, steps))
        if rng.random() < config.whole:
            nfe = steps = int(rng.choice(config.whole_steps))
        pair = self._shuffle(position, seed)
        # no fewer calls than the smallest budget leaves
        values = {"pair": pair, "steps": steps, "nfe": max(nfe, MIN_BUDGET * steps)}
        return self.draw(pair, seed) | {name: torch.tensor(value) for name, value in values.items()}

    def draw(self, pair: int, seed: int) -> Batch:
        """The noise and the view of one pair."""
        return draw_pair(self.shapes, self.info, pair, seed)


class FewStepStage:
    """What the loop needs to train few-step LoRA."""

    def __init__(self, config: FewStepTrainConfig) -> None:
        self.config, options = config, config.few_step
        self.info = LatentInfo.load(config.latents.output)
        pipeline = pipeline_config(options.model)
        if not (options.model / ROUTERS_NAME).is_dir():
            raise UserError(f"{options.model} has no routers, expected a folder {ROUTERS_NAME} in it")
        dtype = torch.bfloat16 if config.precision is Precision.bf16_master else torch.float32
        dit = load_dit(options.model / "dit", dtype)
        if self.info.tokens[1] != dit.config.condition_channels:
            expected, found = dit.config.condition_channels, self.info.tokens[1]
            raise UserError(f"{options.model} has {expected} condition channels, but the cache has {found}")
        vae: VAEConfig = load_config(options.model / "vae", VAEConfig, "ShapeVAE")
        self.flow = FewStepObjective(dit, pipeline, options, vae.channels - vae.latent_channels)
        self.objective: nn.Module = self.flow
        train, val = read_split(config.data.train), read_split(config.data.val)
        preload = TOKENS if config.data.preload else ()
        self._train = PreparedShapes(config.latents.output, train, preload, config.data.limit)
        self._val = PreparedShapes(config.latents.output, val, (), options.val_shapes)
        self._items = PairItems(self._train, self.info, options, config.batch)
        self._references: Tensor | None = None

    def items(self) -> PairItems:
        """Pairs of cached training views and noise."""
        return self._items

    def rate_factor(self, name: str) -> float:
        """Every parameter learns at the run's rate."""
        return 1.0

    def record(self) -> dict[str, str | int]:
        """What the run trains on."""
        return record_of_shapes(self._train, self._val) | {"encoder": self.info.settings["encoder"]["kind"]}

    def validate(self) -> dict[str, float]:
        """Geometric mean of the relative squared error to the dense results, with and without the few-step LoRA."""
        items = PairItems(self._val, self.info, replace(self.config.few_step, pairs=len(self._val)), 1)
        batch = stack([items.draw(pair, 0) for pair in range(len(self._val))])
        device = next(self.flow.few_step.parameters()).device
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        dense = ElasticConfig(elastic=False)
        if self._references is None:
            self._references = self.flow.generate(batch, self.config.few_step.reference_steps, dense)
        values = {}
        for steps, budget in self._points():
            for name, few_step in (("updated", True), ("plain", False)):
                found = self.flow.generate(batch, steps, ElasticConfig(budget=budget, few_step=few_step))
                errors = relative_errors(found, self._references, self.flow.weights)
                values[f"val/{name}_{steps}_at_{budget:g}"] = errors.log().mean().exp().item()
        return values

    def _points(self) -> Sequence[tuple[int, float]]:
        """Steps and budgets that are validated: those of which few enough calls are left."""
        options = self.config.few_step
        found = [(s, b) for s, b in VALIDATED if s * b <= options.max_nfe and s <= options.max_steps]
        return found or [(options.max_steps, max(options.max_nfe / options.max_steps, MIN_BUDGET))]

    def samples(self) -> dict[str, np.ndarray]:
        """None: latents alone are looked at."""
        return {}
