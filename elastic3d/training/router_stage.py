"""Training of routers on a dense shape DiT: distillation, flow matching, a compute budget, the mesh they lead to."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from elastic3d.adapters import adapter_for
from elastic3d.config.router_stage import CostLoss, TrainedParts
from elastic3d.config.routing import MIN_BUDGET, ElasticConfig
from elastic3d.config.serialize import from_dict
from elastic3d.config.train import TrainConfig, VAEStageConfig
from elastic3d.diffusion.flow import interpolate, predict_data, velocity
from elastic3d.diffusion.sampler import sample
from elastic3d.errors import UserError
from elastic3d.models.shape_dit import ShapeDiT
from elastic3d.models.shape_vae import ShapeVAE
from elastic3d.models.skip_dit import SkipDiT, load_dit
from elastic3d.models.weights import load_json
from elastic3d.routing.attach import attach, router_modules
from elastic3d.routing.cost import trace_share
from elastic3d.routing.losses import budget_loss, paper_loss, session_share
from elastic3d.routing.session import RoutingSession
from elastic3d.training.datasets import (
    Batch,
    PreparedShapes,
    item_generator,
    open_split,
    pick,
    read_split,
)
from elastic3d.training.dit_stage import STORED, LatentItems
from elastic3d.training.latents import LatentInfo
from elastic3d.training.low_rank import add_low_rank
from elastic3d.training.mesh_loss import surface_loss
from elastic3d.training.samples import contact_sheet, field_meshes, mesh_picture
from elastic3d.training.vae_stage import VAEObjective

MESH_STORED = ("surface", "near", "volume")


class RouterObjective(nn.Module):
    """Routers first, so that they are parameters (and keys of the state dict) of their own, then the base model."""

    def __init__(self, dit: ShapeDiT | SkipDiT, vae: ShapeVAE, config: TrainConfig) -> None:
        super().__init__()
        self.config = config.routing
        self.embedded = dit.config.guidance_embed
        self.paired = config.routing.guidance != 1.0 and not self.embedded
        teacher = None
        if self.config.parts is not TrainedParts.routers:
            teacher = type(dit)(dit.config).eval().requires_grad_(False)
            teacher.load_state_dict(dit.state_dict())
        self._fixed = (vae.eval().requires_grad_(False), teacher)  # no part of the state dict, nor trained
        self.field_loss = VAEObjective(vae, config.vae).field_loss
        dit.requires_grad_(self.config.parts is TrainedParts.full)
        if self.config.parts is TrainedParts.lora:
            lists = [dit.get_submodule(name) for name, _ in adapter_for(dit).block_lists(dit)]
            add_low_rank(lists, self.config.lora_rank)
        self.session: RoutingSession = attach(dit, adapter_for(dit), config.router)
        self.routers = router_modules(dit)
        self.dit = dit

    @property
    def vae(self) -> ShapeVAE:
        """The frozen VAE, where the DiT is."""
        return self._fixed[0].to(next(self.dit.parameters()).device)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """A batch of `RouterItems` -> loss and what it is made of."""
        config, paired = self.config, self.paired
        x_t = interpolate(batch["noise"], batch["latents"], batch["t"])
        inputs = self.inputs(x_t, batch)
        with torch.no_grad():
            dense = self._dense(*inputs)
        names = ("dt", "budget", "branch")
        dt, budget, branch = (batch[name].repeat(2) if paired else batch[name] for name in names)
        if paired:
            branch = torch.arange(2, device=branch.device).float().repeat_interleave(len(x_t))
        explored = batch["explored"].transpose(0, 1).flatten(0, 1) if "explored" in batch else None
        self.session.train(dt, budget, branch, explored, lockstep=torch.distributed.is_initialized())
        found = self.dit(*inputs).float()
        values: dict[str, Tensor] = {}
        values["distillation"] = (self.guided(found) - self.guided(dense)).square().mean()
        conditional = found[: len(x_t)]
        values["flow"] = (conditional - velocity(batch["noise"], batch["latents"])).square().mean()
        share = session_share(self.session)
        values["cost"] = self._cost(share.view(-1, len(x_t)).mean(0), batch["budget"])
        loss = config.distillation * values["distillation"] + config.flow * values["flow"]
        loss = loss + config.cost_weight * values["cost"]
        if config.mesh.weight and config.mesh.share:
            mesh, parts = self.mesh_loss(predict_data(x_t, conditional, batch["t"]), batch)
            loss, values = loss + config.mesh.weight * mesh, values | parts
        current = self.session.current
        assert current is not None
        values["share"] = share.mean()
        values["off_budget"] = (share.view(-1, len(x_t)).mean(0) - batch["budget"]).abs().mean()
        values["blocks_run"] = share.new_tensor(
            sum(current.ran_rows.values()) / (len(share) * len(current.ran_rows))
        )
        return loss, {name: value.detach() for name, value in values.items()}

    def inputs(self, x_t: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        """Arguments of the DiT: both branches as one batch where they are trained together."""
        t, condition = batch["t"], batch["condition"].float()
        if self.embedded:
            return x_t, t, condition, torch.full_like(t, self.config.guidance)
        if not self.paired:
            return x_t, t, condition
        return x_t.repeat(2, 1, 1), t.repeat(2), torch.cat([condition, torch.zeros_like(condition)])

    def guided(self, v: Tensor) -> Tensor:
        """The velocity that sampling follows, from those of the branches; over g, so that its scale stays."""
        if not self.paired:
            return v
        conditional, unconditional = v.float().chunk(2)
        return unconditional / self.config.guidance + (conditional - unconditional)

    def mesh_loss(self, latents: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of the shapes that predicted clean latents (B,N,C) decode to, on a share of the batch."""
        config, vae = self.config.mesh, self.vae
        count = math.ceil(config.share * len(latents))
        tokens = vae.decode(latents[:count])
        trust = batch["t"][:count] ** config.time_power
        field = vae.query(batch["points"][:count], tokens)
        by_sample = zip(field, batch["distance"][:count], strict=True)
        losses = {"mesh_field": torch.stack([self.field_loss(f[None], d[None]) for f, d in by_sample])}
        pairs = [self._surface_loss(tokens[i : i + 1], batch, i) for i in range(count)]
        losses["mesh_chamfer"], losses["mesh_normals"] = (
            torch.stack(list(x)) for x in zip(*pairs, strict=True)
        )
        means = {name: (value * trust).mean() for name, value in losses.items()}
        total = config.field * means["mesh_field"] + config.chamfer * means["mesh_chamfer"]
        return total + config.normals * means["mesh_normals"], means

    def _surface_loss(self, tokens: Tensor, batch: Batch, row: int) -> tuple[Tensor, Tensor]:
        """Chamfer distance and normal disagreement of one decoded sample (1,N,D)."""
        surface, jitter = (batch[name][row : row + 1] for name in ("surface", "jitter"))
        return surface_loss(lambda points: self.vae.query(points, tokens), surface, jitter)

    def _dense(self, *inputs: Tensor) -> Tensor:
        teacher = self._fixed[1]
        if teacher is not None:
            return teacher.to(inputs[0].device)(*inputs).float()
        with self.session.dense():
            return self.dit(*inputs).float()

    def _cost(self, share: Tensor, budget: Tensor) -> Tensor:
        if self.config.cost is CostLoss.executed:
            return budget_loss(share, budget, self.config.slack)
        current = self.session.current
        assert current is not None
        decisions = list(current.decisions.values())
        return paper_loss(
            decisions, self.session.router_config.ratios, self.config.rho_gate, self.config.rho_width
        )


class RouterItems(LatentItems):
    """Items of the DiT, at the times of a random sampler, with its step size, a budget, and the true surface."""

    def __init__(
        self,
        shapes: PreparedShapes,
        info: LatentInfo,
        config: TrainConfig,
        scale: float,
        meshes: PreparedShapes | None,
        flow: RouterObjective,
    ) -> None:
        self.routing, self.meshes, self.paired = config.routing, meshes, flow.paired
        self.blocks = len(flow.session.blocks)
        # Without the other branch beside it, half of the samples are unconditional, if the model has that branch.
        drop = 0.0 if flow.paired or flow.embedded else 0.5
        super().__init__(shapes, info, replace(config.dit, drop_condition=drop), scale)

    def item(self, position: int, seed: int) -> Batch:
        """Item `position` of the shuffled stream."""
        item, routing = super().item(position, seed), self.routing
        rng = np.random.default_rng([seed, position, 3])
        low, high = math.log(routing.min_steps), math.log(routing.max_steps + 1)
        steps = min(int(math.exp(rng.uniform(low, high))), routing.max_steps)
        item["t"] = torch.tensor(float(rng.integers(steps)) / steps)
        item["dt"] = torch.tensor(1.0 / steps)
        item["budget"] = torch.tensor(rng.uniform(routing.min_budget, 1.0)).float()
        item["branch"] = torch.tensor(float(not item["condition"].any()))
        if routing.explore < 1:
            branches = 2 if self.paired else 1
            item["explored"] = torch.from_numpy(rng.random((branches, self.blocks)) < routing.explore)
        if self.meshes is not None:
            item |= self.surface(self.shapes.ids[self._shuffle(position, seed)], rng)
        return item

    def surface(self, id: str, rng: np.random.Generator) -> Batch:
        """`points` (Q,3) with their `distance` (Q,); `surface` (S,6) and `jitter` (S,3)."""
        assert self.meshes is not None
        config, meshes = self.routing.mesh, self.meshes
        near = pick(meshes.read(id, "near"), config.near_queries, rng)
        volume = pick(meshes.read(id, "volume"), config.volume_queries, rng)
        queries = torch.cat([near, volume])
        offsets = rng.standard_normal((config.surface_points, 3), dtype=np.float32)
        return {
            "points": queries[:, :3].contiguous(),
            "distance": queries[:, 3].contiguous(),
            "surface": pick(meshes.read(id, "surface"), config.surface_points, rng),
            "jitter": config.jitter * torch.from_numpy(offsets),
        }


class RouterStage:
    """What the loop needs to train routers."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.info = info = LatentInfo.load(config.latents.output)
        self.vae = load_vae(config)
        dit = load_dit(config.routing.model / "dit")
        for name, wanted, found in (
            ("latent channels", info.latents[1], dit.config.in_channels),
            ("condition channels", info.tokens[1], dit.config.condition_channels),
        ):
            if wanted != found:
                raise UserError(f"{config.routing.model} has {found} {name}, but the cache has {wanted}")
        self.flow = RouterObjective(dit, self.vae, config)
        self.objective: nn.Module = self.flow
        train, val = read_split(config.data.train), read_split(config.data.val)
        preload = STORED if config.data.preload else ()
        self._train = PreparedShapes(config.latents.output, train, preload, config.data.limit)
        self._val = PreparedShapes(config.latents.output, val, (), config.routing.val_shapes)
        meshes = (
            open_split(config.data, config.data.train, MESH_STORED) if config.routing.mesh.weight else None
        )
        scale = self.vae.config.scale_factor
        self._items = RouterItems(self._train, info, config, scale, meshes, self.flow)
        self._val_items = LatentItems(self._val, info, config.dit, scale)

    def items(self) -> RouterItems:
        """Cached training shapes, shuffled, with what routers see."""
        return self._items

    def rate_factor(self, name: str) -> float:
        """The base model learns more slowly than its routers."""
        return 1.0 if name.startswith("routers.") else self.config.routing.base_rate

    def record(self) -> dict[str, str | int]:
        """What the run trains on."""
        return {
            "train_shapes": len(self._train),
            "train_missing": self._train.missing,
            "val_shapes": len(self._val),
            "vae_sha256": self.info.settings["vae_sha256"],
        }

    def validate(self) -> dict[str, float]:
        """Executed share and distance to the dense latents of the same seed, sampling at each budget."""
        dense, _ = self._generate(ElasticConfig(elastic=False))
        values = {}
        for budget in self.config.routing.val_budgets:
            latents, share = self._generate(ElasticConfig(budget=budget))
            values[f"val/share_at_{budget:g}"] = share.mean().item()
            values[f"val/share_spread_at_{budget:g}"] = share.std(unbiased=False).item()
            error = (latents - dense).square().mean() / dense.square().mean()
            values[f"val/error_at_{budget:g}"] = error.item()
        return values

    def samples(self) -> dict[str, np.ndarray]:
        """Rows: the dense model's shapes, then those at each validation budget, same seeds."""
        settings = [ElasticConfig(elastic=False)] + [
            ElasticConfig(budget=b) for b in self.config.routing.val_budgets
        ]
        self.vae.to(next(self.flow.dit.parameters()).device)
        rows = []
        for each in settings:
            meshes = field_meshes(self.vae, self._generate(each)[0], self.config.dit.sample_resolution)
            rows.append([mesh_picture(mesh) for mesh in meshes])
        return {"generated": contact_sheet(rows)}

    def calibrate(self, points: int = 8) -> None:
        """Measure what the validation shapes execute at `points` budgets; note in the routers' configuration what
        they have to be told so that a budget that is asked for is what is executed. The paper's have no such input."""
        session = self.flow.session
        if session.conditioner is None:
            return
        told = np.linspace(MIN_BUDGET, 1.0, points)
        session.router_config = replace(session.router_config, asked=[], told=[])
        shares = [self._generate(ElasticConfig(budget=float(budget)))[1].mean().item() for budget in told]
        found = np.maximum.accumulate(shares) + 1e-6 * np.arange(points)  # ascending, as an inverse needs
        inverse = np.interp(told, found, told)
        session.router_config = replace(session.router_config, asked=told.tolist(), told=inverse.tolist())

    def _generate(self, settings: ElasticConfig) -> tuple[Tensor, Tensor]:
        """Latents (B,N,C) of the validation shapes, and the executed share (B,)."""
        flow, count = self.flow, len(self._val)
        views = self.info.settings["views"]
        items = [
            self._val_items.draw(self._val.ids[i], 0, i % views, item_generator(0, i)) for i in range(count)
        ]
        tokens = torch.stack([item["condition"].float() for item in items])  # a CPU can't autocast fp16
        condition = tokens.to(next(flow.dit.parameters()).device)
        generators = [torch.Generator().manual_seed(i) for i in range(count)]
        before, flow.session.settings = flow.session.settings, settings
        try:
            shape = cast(tuple[int, int], tuple(self.info.latents))
            steps, guidance = self.config.routing.val_steps, self.config.dit.sample_guidance
            latents = sample(
                flow.dit,
                condition,
                shape,
                steps,
                guidance,
                generators,
                guidance_embed=flow.embedded,
                session=flow.session,
            )
            trace = flow.session.trace
            assert trace is not None
            return latents, trace_share(trace) if settings.elastic else torch.ones(count)
        finally:
            flow.session.settings = before


def load_vae(config: TrainConfig) -> ShapeVAE:
    """The VAE of the cached latents; UserError where `config.vae` is not the field loss it was trained with."""
    info = LatentInfo.load(config.latents.output)
    vae = ShapeVAE.from_pretrained(info.vae)
    vae.set_latent_statistics(info.mean, info.std)
    record = info.vae / "training.json"
    if record.is_file():
        trained = from_dict(VAEStageConfig, load_json(record)["config"]["vae"], str(record))
        for name in ("loss", "softness", "truncation"):
            wanted, found = getattr(trained, name), getattr(config.vae, name)
            if wanted != found:
                raise UserError(f"vae.{name} is {found}, but the VAE in {info.vae} was trained with {wanted}")
    return vae
