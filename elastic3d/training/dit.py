"""The shape DiT: flow matching on cached latents."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import default_collate

from elastic3d.diffusion.flow import interpolate, match_noise, sample_timesteps, timesteps_at, velocity
from elastic3d.diffusion.sampler import sample, timestep_grid
from elastic3d.errors import UserError
from elastic3d.models.images import prepare_image
from elastic3d.models.options import DiTConfig
from elastic3d.models.shape_dit import ShapeDiT
from elastic3d.training.datasets import Batch, PreparedShapes, Shuffle, even_times, item_generator, open_split
from elastic3d.training.journal import contact_sheet, mesh_image, mesh_row
from elastic3d.training.latents import INFO_NAME, LatentCache, LatentCacheConfig, LatentInfo
from elastic3d.training.loop import Stage
from elastic3d.training.options import DataConfig, StageName, TrainConfig
from elastic3d.training.routes import KINDS, WIDTHS, RandomRoutes, RandomRoutesConfig, draw
from elastic3d.training.views import named_images, stored_views
from elastic3d.utils.options import Options, option


@dataclass(kw_only=True)
class LatentFlowConfig(Options):
    """What every training on cached latents has, that of routers too."""

    match_channels: int = option(
        3,
        "pair noise with the nearest latents by the first N channels (3: the anchor's xyz); 0 pairs at random",
        ge=0,
        le=1 << 16,
    )
    sample_resolution: int = option(64, "grid cells a side of the sample images", ge=8, le=512)


@dataclass(kw_only=True)
class DiTStageConfig(LatentFlowConfig):
    """The shape DiT's training."""

    model: DiTConfig = option(DiTConfig, "architecture; channel and token counts come from the cache")
    drop_condition: float = option(
        0.1, "share of samples that see no image (classifier-free guidance)", ge=0, le=1
    )
    anchor_weight: float = option(
        1.0, "weight of an anchor channel's loss over that of a feature channel", ge=0, le=1e3
    )
    routes: RandomRoutesConfig = option(RandomRoutesConfig, "random routes: an elastic base from the start")
    val_shapes: int = option(128, "shapes to validate on", ge=1, le=1 << 16)
    sample_shapes: int = option(8, "shapes of the sample images", ge=1, le=1 << 16)
    sample_steps: int = option(25, "sampling steps of the sample images", ge=1, le=1000)
    sample_guidance: float = option(3.0, "guidance of the sample images", ge=0, le=100)


@dataclass(kw_only=True)
class DiTTrainConfig(TrainConfig):
    """Everything `scripts/train.py stage=dit` takes."""

    stage: StageName = option(StageName.dit, "what to do")
    data: DataConfig = option(DataConfig, "prepared shapes")
    latents: LatentCacheConfig = option(LatentCacheConfig, "cache of latents and image tokens")
    dit: DiTStageConfig = option(DiTStageConfig, "shape DiT")

    def network(self) -> nn.Module:
        """The DiT; its numbers of channels come from the cache."""
        return ShapeDiT(self.dit.model)

    def sample_bytes(self) -> int:
        """The latents' and the condition's tokens in every block; both counts come from the cache."""
        model, cache = self.dit.model, self.latents.output
        tokens = sum(LatentInfo.load(cache).token_counts) if (cache / INFO_NAME).is_file() else 1
        return 2 * model.width * tokens * (model.double_blocks + model.single_blocks)


def channel_weights(channels: int, anchors: int, weight: float) -> Tensor:
    """(C,): `weight` for the anchors' channels, which come first, 1 for the others."""
    weights = torch.ones(channels)
    weights[:anchors] = weight
    return weights


class FlowObjective(nn.Module):
    """Flow matching: mean squared error of the velocity (2210.02747)."""

    weight: Tensor

    def __init__(
        self, dit: ShapeDiT, anchor_channels: int, anchor_weight: float, routes: RandomRoutes | None = None
    ) -> None:
        """`routes`: on `dit`, for batches with a `route` (B,I)."""
        super().__init__()
        self.dit, self.anchors, self.routes = dit, anchor_channels, routes
        weight = channel_weights(dit.config.in_channels, anchor_channels, anchor_weight)
        self.register_buffer("weight", weight / weight.mean(), persistent=False)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """`latents`, `noise` (B,N,C), `t` (B,), `condition` (B,M,Cc) -> loss and what it is made of."""
        error = self.squared_error(batch)
        loss = (error * self.weight).mean()
        values = {"features": error[..., self.anchors :].detach().mean()}
        if "route" in batch:
            values |= _by_route(error.detach().mean((1, 2)), batch["route"])
        if self.anchors:
            values["anchors"] = error[..., : self.anchors].detach().mean()
        return loss, values

    def squared_error(self, batch: Batch) -> Tensor:
        """Of the predicted velocity, (B,N,C) fp32."""
        x_t = interpolate(batch["noise"], batch["latents"], batch["t"])
        if self.routes is not None:
            if self.training and "route" in batch:
                self.routes.announce(batch["route"])
            else:
                self.routes.leave()
        found = self.dit(x_t, batch["t"], batch["condition"]).float()
        return (found - velocity(batch["noise"], batch["latents"])).square()


def _by_route(error: Tensor, route: Tensor) -> dict[str, Tensor]:
    """Errors (B,) of samples with the full route and with a shorter one, and the share of the blocks that ran."""
    full = (route == WIDTHS).all(1)
    values = {"executed": (route > 0).float().mean()}
    for name, rows in (("full", full), ("elastic", ~full)):
        if rows.any():
            values[name] = error[rows].mean()
    return values


@dataclass
class LatentItems:
    """Items of the DiT: `latents`, `noise` (N,C), `t` (), `condition` (M,Cc), zero where it is dropped, `route` (I,).

    The last one only where routes are drawn (`RandomRoutesConfig`).
    """

    shapes: PreparedShapes
    info: LatentInfo
    config: DiTStageConfig
    scale: float = 1.0
    batch: int = KINDS  # samples of an optimizer step, for random routes
    mirror: bool = True  # take mirrored shapes too, where the cache has them
    mirrored: Container[str] = ()  # of these shapes half of the views are of the mirror image

    def __post_init__(self) -> None:
        self.index = Shuffle(len(self.shapes))
        self._mean, self._std = torch.tensor(self.info.mean), torch.tensor(self.info.std)

    def item(self, position: int, seed: int) -> Batch:
        rng = item_generator(seed, position)
        id = self.shapes.ids[self.index(position, seed)]
        item = self.draw(id, *self._choose(rng), rng)
        if rng.random() < self.config.drop_condition:
            item["condition"] = torch.zeros_like(item["condition"])
        generator = torch.Generator().manual_seed(int(rng.integers(1 << 62)))
        if self.config.routes.active:
            blocks = self.config.model.double_blocks + self.config.model.single_blocks
            quantile, route = draw(self.config.routes, blocks, self.batch, position, seed, rng)
            item["t"] = timesteps_at(torch.tensor([quantile]))[0]
            item["route"] = torch.from_numpy(route)
            return item
        item["t"] = sample_timesteps(1, generator)[0]
        return item

    def _choose(self, rng: np.random.Generator) -> tuple[int, int]:
        """An encoding and a view: any two of the shape, or any two of its mirror image (`LatentsConfig.mirror`)."""
        settings = self.info.settings
        counts = (settings["variants"], settings["views"])
        if not settings.get("mirror"):
            return int(rng.integers(counts[0])), int(rng.integers(counts[1]))
        half = int(rng.integers(2)) if self.mirror else 0
        first, second = (count // 2 for count in counts)
        return half * first + int(rng.integers(first)), half * second + int(rng.integers(second))

    def draw(self, id: str, variant: int, view: int, rng: np.random.Generator) -> Batch:
        """A standardised posterior sample of one encoding, noise, and one view's tokens."""
        mean, logvar = (self.shapes.read(id, name, variant).float() for name in ("mean", "logvar"))
        raw = mean + self._normal(rng) * (0.5 * logvar).exp()
        latents = (raw - self._mean) / self._std * self.scale
        noise = self._normal(rng)
        if self.config.match_channels:
            noise = match_noise(noise, latents, self.config.match_channels)
        return {"latents": latents, "noise": noise, "condition": self.shapes.read(id, "tokens", view)}

    def fixed(self, index: int) -> Batch:
        """Shape number `index` with the same noise every time, and one of its views."""
        id = self.shapes.ids[index]
        item = self.draw(id, 0, index % self.views_of(id), item_generator(0, index))
        return item | {"condition": item["condition"].float()}  # autocast on a CPU stacks no fp16

    def views_of(self, id: str) -> int:
        """How many views are of a shape itself; others are of its mirror image."""
        views: int = self.info.settings["views"]
        return views // 2 if id in self.mirrored else views

    def _normal(self, rng: np.random.Generator) -> Tensor:
        count, channels = self.info.latents
        return torch.from_numpy(rng.standard_normal((count, channels), dtype=np.float32))


def _open_images(data: DataConfig, ids: Sequence[str]) -> PreparedShapes:
    """The prepared validation shapes, whose views the sample images show: the cache has their tokens alone.

    UserError unless all of `ids` are there.
    """
    try:
        found = open_split(data, data.val, ())
        found.require(ids)
    except UserError as error:
        raise UserError(f"{error}, and sample_every=0 trains without sample images") from error
    return found


def _own_images(info: LatentInfo) -> dict[str, list[Path]]:
    """Images of the shapes' own that the cache was made with, as far as they are still there."""
    folder = info.settings.get("images")
    try:
        return named_images(Path(folder)) if folder else {}
    except UserError:
        return {}


class DiTStage(Stage):
    """What the loop needs to train a `ShapeDiT` on a cache of latents."""

    objective: FlowObjective

    def __init__(self, config: DiTTrainConfig) -> None:
        """UserError: no finished cache, no images to draw samples beside, or a batch too small for random routes."""
        self.config = config.dit
        if config.dit.routes.active and config.batch < KINDS:
            raise UserError(
                f"batch is {config.batch}, expected {KINDS} or more with dit.routes.smallest: a full route, a smallest"
                " one and two between"
            )
        cache = LatentCache(config.latents.output, config.data, config.dit.val_shapes)
        self.info = info = cache.info
        self.record = cache.record
        model = config.dit.model
        model.num_latents, model.in_channels = info.latents
        model.condition_tokens, model.condition_channels = info.tokens
        self.vae = info.load_vae()
        self.dit = ShapeDiT(model)
        anchor_channels = self.vae.config.channels - self.vae.config.latent_channels
        routes = RandomRoutes(self.dit) if config.dit.routes.active else None
        self.objective = FlowObjective(self.dit, anchor_channels, config.dit.anchor_weight, routes)
        self._val = cache.val
        drawn = cache.val.ids[: config.dit.sample_shapes]
        self._images = _open_images(config.data, drawn) if config.sample_every else None
        self._own = _own_images(info) if config.sample_every else {}
        scale = self.vae.config.scale_factor
        self.items = LatentItems(cache.train, info, config.dit, scale, config.batch)
        self._val_items = LatentItems(self._val, info, config.dit, scale, mirrored=cache.mirrored)

    def validate(self, batch: int = 16) -> dict[str, float]:
        """Velocity error on validation shapes at fixed noise and even times, with and without image; by thirds of the
        times, where a shape is in them."""
        device = next(self.dit.parameters()).device
        count = len(self._val)
        errors, times = [], even_times(count)
        for first in range(0, count, batch):
            indices = range(first, min(first + batch, count))
            items = default_collate([self._val_items.fixed(i) for i in indices])
            items["t"] = times[first : first + batch]
            items = {name: tensor.to(device) for name, tensor in items.items()}
            blind = {**items, "condition": torch.zeros_like(items["condition"])}
            pair = [self.objective.squared_error(b).mean((1, 2)).cpu() for b in (items, blind)]
            errors.append(torch.stack([*pair, items["t"].cpu()]))
        seen, unseen, t = torch.cat(errors, dim=1)
        values = {"val/flow": seen.mean(), "val/flow_without_image": unseen.mean()}
        for name, low in (("noisy", 0.0), ("middle", 1 / 3), ("clean", 2 / 3)):
            inside = (t >= low) & (t < low + 1 / 3)
            if inside.any():
                values[f"val/flow_{name}"] = seen[inside].mean()
        return {name: value.item() for name, value in values.items()}

    def samples(self) -> dict[str, np.ndarray]:
        """Rows of validation shapes: the view, what is generated from it, the VAE's reconstruction."""
        device = next(self.dit.parameters()).device
        indices = range(min(self.config.sample_shapes, len(self._val)))
        items = default_collate([self._val_items.fixed(i) for i in indices])
        generators = [torch.Generator().manual_seed(i) for i in indices]
        count, channels = self.info.latents
        condition = items["condition"].to(device).float()
        times, guidance = timestep_grid(self.config.sample_steps), self.config.sample_guidance
        latents = sample(self.dit, condition, (count, channels), times, guidance, generators)
        self.vae.to(device)
        rows = [[self._view(i) for i in indices]]
        for found in (latents, items["latents"].to(device)):
            rows.append(mesh_row(self.vae, found, self.config.sample_resolution))
        return {"generated": contact_sheet(rows)}

    def _view(self, index: int, size: int = 160) -> np.ndarray:
        """The view whose tokens `fixed` gives; white where none shows the shape."""
        assert self._images is not None
        id = self._val.ids[index]
        views = self._val_items.views_of(id)
        try:
            found = self._own.get(id.partition("/")[2]) or stored_views(self._images, id)
            view: Image.Image | Path = found[(index % views) * len(found) // views]
            return np.asarray(prepare_image(view, self.info.foreground, size))
        except UserError:
            return mesh_image(None, size)
