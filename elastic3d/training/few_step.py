"""The few-step LoRA of the blocks, and training through whole generations: from noise through all
steps to the last latents, which are compared with what the dense model makes of the same noise in many steps."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from elastic3d.diffusion.options import PipelineConfig
from elastic3d.diffusion.sampler import integrate, sampling_times
from elastic3d.elastic import adapter_for, attach
from elastic3d.elastic.attachment import (
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
from elastic3d.models.options import VAEConfig
from elastic3d.models.shape_dit import ShapeDiT
from elastic3d.models.skip_dit import SkipDiT
from elastic3d.models.weights import find_weights, load_config, read_weights
from elastic3d.pipelines.image_to_3d import ROUTERS_NAME
from elastic3d.training.datasets import Batch, PreparedShapes, Shuffle, item_generator, stack
from elastic3d.training.latents import LatentCache, LatentCacheConfig, LatentInfo
from elastic3d.training.loop import Stage
from elastic3d.training.mesh_loss import MeshReconstruction
from elastic3d.training.options import DataConfig, GenerationTrainConfig, StageName
from elastic3d.utils.old_names import WEIGHTS
from elastic3d.utils.options import Options, option

VALIDATED = ((4, 1.0), (6, 1.0), (8, 0.5), (12, 0.35), (12, 0.5), (25, 0.3))  # steps, budget
TOKENS = ("tokens",)
VOLUME_POINTS = 128  # of a sample, anywhere in the box, at which decoded fields are compared


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

    def check(self) -> None:
        """Times of guidance come with guidance."""
        super().check()
        if len(self.guided_times) not in (0, 2):
            raise ValueError(f"guided_times is {self.guided_times}, expected none or two")
        if self.guided_times and not self.guidance:
            raise ValueError(f"guided_times is {self.guided_times}, expected none: guidance is false")


class GenerationObjective(nn.Module, ABC):
    """A frozen model with routers, generating. Subclasses say how, and train the routers or their few-step LoRA."""

    gradient_checkpointing = False  # set by the loop
    weights: Tensor

    def __init__(self, dit: nn.Module, reference_steps: int, weights: Tensor) -> None:
        """`weights` (C,): how much an error of each channel counts."""
        super().__init__()
        self.reference_steps = reference_steps
        self.register_buffer("weights", weights, persistent=False)
        self.session = session_of(dit)
        dit.requires_grad_(False)
        for part in router_modules(dit).values():
            part.requires_grad_(False)
        self._dit = (dit.eval(),)  # in a tuple: no part of the state dict, nor trained
        self._dense: dict[int, Tensor] = {}

    @property
    def dit(self) -> nn.Module:
        """The model with its routers, where these are."""
        dit, device = self._dit[0], next(self.parameters()).device
        return dit if next(dit.parameters()).device == device else dit.to(device)

    @abstractmethod
    def integrate(self, batch: Batch, steps: int) -> Tensor:
        """`noise` (B,N,C) and a condition -> latents (B,N,C) in `steps` steps, as the session's settings say."""

    def generate(self, batch: Batch, steps: int, settings: ElasticConfig) -> Tensor:
        """Latents (B,N,C) in `steps` steps, with gradients to what learns."""
        session, before = self.session, self.session.settings
        session.settings, session.recompute = settings, self.gradient_checkpointing
        try:
            return self.integrate(batch, steps)
        finally:
            session.settings, session.recompute = before, False

    @torch.no_grad()
    def dense_results(self, batch: Batch) -> Tensor:
        """Latents (B,N,C) of the dense model in many steps; computed when they are first needed, and kept."""
        pairs = batch["pair"].tolist()
        missing = list({pair: row for row, pair in enumerate(pairs) if pair not in self._dense}.values())
        if missing:
            part = {name: value[missing] for name, value in batch.items()}
            found = self.generate(part, self.reference_steps, ElasticConfig(elastic=False)).cpu()
            self._dense |= {pairs[row]: latents for row, latents in zip(missing, found, strict=True)}
        return torch.stack([self._dense[pair] for pair in pairs]).to(batch["noise"].device)


def integrate_shapes(dit: ShapeDiT | SkipDiT, pipeline: PipelineConfig, batch: Batch, steps: int) -> Tensor:
    """`noise` (B,N,C), `condition` (B,M,Cc) -> latents (B,N,C), as a pipeline samples shapes, with gradients."""
    return integrate(
        dit,
        batch["condition"].float(),
        batch["noise"],
        sampling_times(pipeline, steps),
        pipeline.guidance,
        solver=pipeline.solver,
        guidance_embed=dit.config.guidance_embed,
        session=session_of(dit),
    )


def draw_pair(shapes: PreparedShapes, info: LatentInfo, pair: int, seed: int) -> Batch:
    """`noise` (N,C) and `condition` (M,Cc), one view of a shape: the same for the same number of a pair."""
    rng = item_generator(seed, pair)
    view = int(rng.integers(info.settings["views"]))
    noise = rng.standard_normal(tuple(info.latents), dtype=np.float32)
    id = shapes.ids[pair % len(shapes)]
    return {"noise": torch.from_numpy(noise), "condition": shapes.read(id, "tokens", view)}


def val_pairs(cache: LatentCache) -> Batch:
    """Pairs of the validation shapes, the same every time."""
    items = [draw_pair(cache.val, cache.info, pair, 0) for pair in range(len(cache.val))]
    # autocast stacks no fp16
    return stack([item | {"condition": item["condition"].float()} for item in items])


def relative_errors(found: Tensor, true: Tensor, weights: Tensor | float = 1.0) -> Tensor:
    """(B,N,C) each, weights of channels (C,) -> squared distance over the squared norm (B,)."""
    return (weights * (found - true).square()).mean((1, 2)) / (weights * true.square()).mean((1, 2))


def channel_weights(channels: int, anchors: int, weight: float) -> Tensor:
    """(C,): `weight` for the anchors' channels, which come first, 1 for the others."""
    weights = torch.ones(channels)
    weights[:anchors] = weight
    return weights


def attach_lora(
    dit: nn.Module,
    router: RouterConfig,
    folder: Path,
    old: RouterConfig,
    trained: Mapping[str, Tensor],
    keep: bool,
) -> ElasticSession:
    """Put routers with a few-step LoRA on a model, with the weights `trained` of the `old` ones in `folder`.

    A LoRA is taken over where it is to be kept: with fresh directions up to the new rank, at the new NFE.
    """
    session = attach(dit, router)
    fresh, trained = router_state(dit), {key.replace(*WEIGHTS): value for key, value in trained.items()}
    lora = {key for key in trained if ".few_step." in key}
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
class FewStepStageConfig(ShapeGenerationConfig):
    """A few-step LoRA, learned through whole generations."""

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
    field_weight: float = option(
        0.0,
        "weight of the distance between the fields that the last latents and the dense ones decode to; 0: none",
        ge=0,
        le=1e6,
    )

    def check(self) -> None:
        """Ranges of steps and NFE that hold at least one generation."""
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
                f" the smallest budget, {MIN_BUDGET:g}, has an NFE of more than {self.max_nfe:g}"
            )

    @property
    def whole_steps(self) -> range:
        """Numbers of steps that a generation with every block has."""
        return range(math.ceil(self.min_nfe), int(min(self.max_nfe, self.max_steps)) + 1)


@dataclass(kw_only=True)
class FewStepTrainConfig(GenerationTrainConfig):
    """Everything `scripts/train.py stage=few_step` takes."""

    stage: StageName = option(StageName.few_step, "what to do")
    data: DataConfig = option(DataConfig, "prepared shapes")
    latents: LatentCacheConfig = option(LatentCacheConfig, "cache of latents and image tokens")
    few_step: FewStepStageConfig = option(FewStepStageConfig, "training of the routers' few-step LoRA")


def attach_few_step(dit: nn.Module, config: FewStepStageConfig, guidance: float) -> ElasticSession:
    """Put the routers of `config.model` on a model, with fresh few-step LoRA in the place of what they may have,
    or with these where they are to be `continued`, and fresh directions up to the rank; `guidance` is the
    pipeline's."""
    folder = config.model / ROUTERS_NAME
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
    router = replace(
        old,
        few_step_rank=config.rank,
        few_step_nfe=config.max_nfe,
        few_step_max_steps=config.max_steps,
        few_step_guidance=guidance if config.guidance else None,
        guided_times=config.guided_times,
    )
    return attach_lora(dit, router, folder, old, read_weights(find_weights(folder)), config.continued)


class FewStepObjective(GenerationObjective):
    """Only the few-step LoRA is parameters: the model and its routers stay as they are."""

    def __init__(
        self,
        dit: ShapeDiT | SkipDiT,
        pipeline: PipelineConfig,
        config: FewStepStageConfig,
        anchors: int,
        meshes: MeshReconstruction | None = None,
    ) -> None:
        """`anchors`: how many channels of a latent, the first ones, are where it is; `meshes`: compares fields, which
        items bring offsets and points for."""
        attach_few_step(dit, config, pipeline.guidance)
        weights = channel_weights(dit.config.in_channels, anchors, config.anchor_weight)
        super().__init__(dit, config.reference_steps, weights)
        self.config, self.pipeline, self.meshes = config, pipeline, meshes
        modules = router_modules(dit).items()
        self.few_step = nn.ModuleDict({name: part for name, part in modules if name.endswith("few_step")})
        self.few_step.requires_grad_(True)

    def integrate(self, batch: Batch, steps: int) -> Tensor:
        """As the pipeline samples."""
        return integrate_shapes(cast(ShapeDiT, self.dit), self.pipeline, batch, steps)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """`noise` (B,N,C), `condition` (B,M,Cc), `pair` (B,), and for all the first one's `steps` and `nfe` -> loss:
        the mean logarithm of the relative squared errors, so that each NFE counts the same, and the distance between
        the decoded fields."""
        steps, nfe = int(batch["steps"][0]), float(batch["nfe"][0])
        target = self.dense_results(batch)
        budget = min(max(nfe / steps, MIN_BUDGET), 1.0)
        found = self.generate(batch, steps, ElasticConfig(budget=budget))
        errors = relative_errors(found, target, self.weights)
        loss = (errors + self.config.floor).log().mean()
        values = {"error": errors.detach().log().mean().exp(), "nfe": batch["nfe"][0]}
        if self.meshes is not None:
            points = self.meshes.points_around(target, batch["offsets"], batch["points"])
            field = self.meshes.distance(found, target, points).mean()
            loss = loss + self.config.field_weight * field
            values["field"] = field.detach()
        return loss, values


@dataclass
class PairItems:
    """`pairs` pairs of a shape's view and noise, in a new order each round; a batch has one number of steps and NFE.

    Items: `noise` (N,C), `condition` (M,Cc), `pair`, `steps`, `nfe` (), and where fields are compared `offsets` (N,3)
    of points from the anchors and `points` (P,3) in the whole box."""

    shapes: PreparedShapes
    info: LatentInfo
    config: FewStepStageConfig
    batch: int

    def __post_init__(self) -> None:
        self._shuffle = Shuffle(self.config.pairs)

    def item(self, position: int, seed: int) -> Batch:
        """Item `position` of the stream."""
        config, rng = self.config, np.random.default_rng([seed, position // self.batch, 4])
        low, high = math.log(config.min_steps), math.log(config.max_steps + 1)
        steps = min(int(math.exp(rng.uniform(low, high))), config.max_steps)
        nfe = rng.uniform(min(config.min_nfe, steps), min(config.max_nfe, steps))
        if rng.random() < config.whole:
            nfe = steps = int(rng.choice(config.whole_steps))
        pair = self._shuffle(position, seed)
        # no smaller NFE than that of the smallest budget
        values = {"pair": pair, "steps": steps, "nfe": max(nfe, MIN_BUDGET * steps)}
        item = draw_pair(self.shapes, self.info, pair, seed)
        if config.field_weight:
            own = np.random.default_rng([seed, position, 5])
            offsets = own.standard_normal((len(item["noise"]), 3), dtype=np.float32)
            points = own.uniform(-1, 1, (VOLUME_POINTS, 3)).astype(np.float32)
            item |= {"offsets": torch.from_numpy(offsets), "points": torch.from_numpy(points)}
        return item | {name: torch.tensor(value) for name, value in values.items()}


class FewStepStage(Stage):
    """What the loop needs to train few-step LoRA."""

    def __init__(self, config: FewStepTrainConfig) -> None:
        self.config, options = config, config.few_step
        self.cache = cache = LatentCache(config.latents.output, config.data, options.val_shapes, TOKENS)
        if not (options.model / ROUTERS_NAME).is_dir():
            raise UserError(f"{options.model} has no routers, expected a folder {ROUTERS_NAME} in it")
        dit, pipeline = cache.load_dense(options.model, config.precision)
        vae: VAEConfig = load_config(options.model / "vae", VAEConfig, "ShapeVAE")
        meshes = None
        if options.field_weight:
            trained = cache.info.field_loss()
            meshes = MeshReconstruction(cache.info.load_vae(trained), trained)
        anchors = vae.channels - vae.latent_channels
        self.flow = FewStepObjective(dit, pipeline, options, anchors, meshes)
        self.objective, self.record = self.flow, cache.record
        self.items = PairItems(cache.train, cache.info, options, config.batch)
        self._references: Tensor | None = None

    def validate(self) -> dict[str, float]:
        """Geometric mean of the relative squared error to the dense results, with and without the few-step LoRA."""
        device = next(self.flow.few_step.parameters()).device
        batch = {name: tensor.to(device) for name, tensor in val_pairs(self.cache).items()}
        if self._references is None:
            dense = ElasticConfig(elastic=False)
            self._references = self.flow.generate(batch, self.config.few_step.reference_steps, dense)
        values = {}
        for steps, budget in self._points():
            for name, few_step in (("adapted", True), ("plain", False)):
                found = self.flow.generate(batch, steps, ElasticConfig(budget=budget, few_step=few_step))
                errors = relative_errors(found, self._references, self.flow.weights)
                values[f"val/{name}_{steps}_at_{budget:g}"] = errors.log().mean().exp().item()
        return values

    def _points(self) -> Sequence[tuple[int, float]]:
        """Steps and budgets that are validated: those of a small enough NFE."""
        options = self.config.few_step
        found = [(s, b) for s, b in VALIDATED if s * b <= options.max_nfe and s <= options.max_steps]
        return found or [(options.max_steps, max(options.max_nfe / options.max_steps, MIN_BUDGET))]
