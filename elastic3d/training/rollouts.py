"""Latents as a DiT makes them, for the decoder to learn from: true ones, noised to some time and denoised again.

`<output>/<source>/shard-00012.safetensors` mirrors the cache's shard of that name: `<id>/found` and `<id>/true`
(K,N,C) f16, standardised latents, and `<id>/mirrored` (K,) u8. A rollout from a late time keeps the shape and has the
DiT's small errors, one from an early time is the DiT's own guess of the image.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from elastic3d.diffusion.flow import interpolate, sampling_times
from elastic3d.diffusion.options import PipelineConfig
from elastic3d.diffusion.sampler import integrate
from elastic3d.errors import UserError
from elastic3d.models.skip_dit import load_dit
from elastic3d.models.weights import WEIGHTS_NAME
from elastic3d.pipelines.image_to_3d import PIPELINE_NAME
from elastic3d.pipelines.runtime import resolve_device
from elastic3d.training.datasets import (
    Batch,
    PreparedShapes,
    item_generator,
    nothing_prepared,
    read_split,
    stack,
)
from elastic3d.training.dit import DiTStageConfig, LatentItems
from elastic3d.training.latents import LatentCacheConfig, LatentInfo, shape_number
from elastic3d.training.options import DataConfig, StageConfig, StageName
from elastic3d.training.vae import ROLLOUTS
from elastic3d.utils.files import file_sha256
from elastic3d.utils.options import Options, from_dict, option
from elastic3d.utils.structured import load_json, save_json
from elastic3d.utils.tensors import save_weights, tensor_heads


@dataclass(kw_only=True)
class RolloutsConfig(Options):
    """Latents that a DiT makes of noised true ones."""

    output: Path = option(Path("data/prepared/rollouts"), "folder of the rollouts")
    model: Path = option(Path("data/pretrained/shape-small"), "folder of the pipeline whose DiT makes them")
    samples: int = option(8, "rollouts a shape, of even times", ge=1, le=1 << 16)
    earliest: float = option(
        0.0, "earliest time they start from; 0 is noise alone, 1 true latents", ge=0, le=1
    )
    steps: int = option(
        10, "sampling steps of a whole generation; a rollout has those after its start", ge=1, le=1000
    )
    batch: int = option(16, "shapes at once", ge=1, le=4096)


@dataclass(kw_only=True)
class RolloutsStageConfig(StageConfig):
    """Everything `scripts/train.py stage=rollouts` takes."""

    stage: StageName = option(StageName.rollouts, "what to do")
    data: DataConfig = option(DataConfig, "prepared shapes")
    latents: LatentCacheConfig = option(LatentCacheConfig, "cache of latents and image tokens")
    rollouts: RolloutsConfig = option(RolloutsConfig, "latents that a DiT makes of noised true ones")


def build_rollouts(config: RolloutsStageConfig) -> None:
    """Make the rollouts of all cached training and validation shapes; shards that are there already stay.

    Raises:
        UserError: nothing is cached, or the folder holds rollouts that were made otherwise.
    """
    builder = _Builder(config)
    wanted = set(read_split([*config.data.train, *config.data.val]))
    plan = list(_plan(config.latents.output, wanted))
    if not plan:
        raise UserError(nothing_prepared(len(wanted), config.latents.output))
    builder.claim()
    total = sum(len(ids) for _, ids in plan)
    with tqdm(total=total, desc="rollouts", unit="shape", dynamic_ncols=True, file=sys.stderr) as bar:
        for shard, ids in plan:
            target = config.rollouts.output / shard.parent.name / shard.name
            if not target.is_file():
                save_weights(builder.make(ids), target)
            bar.update(len(ids))


def _plan(cache: Path, wanted: set[str]) -> Iterator[tuple[Path, list[str]]]:
    """(cached shard, its wanted ids as `source/id`) of every shard that has any."""
    for source in sorted({id.partition("/")[0] for id in wanted}):
        for shard in sorted((cache / source).glob("shard-*.safetensors")):
            ids = dict.fromkeys(f"{source}/{key.rpartition('/')[0]}" for key in tensor_heads(shard))
            if found := [id for id in ids if id in wanted]:
                yield shard, found


class _Builder:
    def __init__(self, config: RolloutsStageConfig) -> None:
        self.config, self.options = config, config.rollouts
        self.device = resolve_device(config.device)
        self.info = LatentInfo.load(config.latents.output)
        path = self.options.model / PIPELINE_NAME
        self.pipeline: PipelineConfig = from_dict(PipelineConfig, load_json(path), str(path))
        self.dit = load_dit(self.options.model / "dit", torch.float32, self.device)
        self.settings = {
            "dit_sha256": file_sha256(self.options.model / "dit" / WEIGHTS_NAME),
            "vae_sha256": self.info.settings["vae_sha256"],
            **{name: getattr(self.options, name) for name in ("samples", "earliest", "steps")},
            "seed": config.seed,
        }

    def claim(self) -> None:
        """Note how the rollouts are made; refuse a folder whose ones were made otherwise."""
        path = self.options.output / "settings.json"
        if not path.is_file():
            save_json(self.settings, path)
        elif differing := [n for n, value in self.settings.items() if load_json(path).get(n) != value]:
            raise UserError(f"{self.options.output} was made with another {differing[0]}: delete it first")

    def make(self, ids: Sequence[str]) -> dict[str, Tensor]:
        """What is stored of some shapes of one cached shard."""
        items = LatentItems(PreparedShapes(self.config.latents.output, ids), self.info, DiTStageConfig())
        size, found = self.options.batch, dict[str, Tensor]()
        for first in range(0, len(ids), size):
            part = items.shapes.ids[first : first + size]
            rows = [self._roll(items, part, sample) for sample in range(self.options.samples)]
            whole = {name: torch.stack([row[name] for row in rows], dim=1) for name in ROLLOUTS}
            found |= {
                f"{id.partition('/')[2]}/{n}": whole[n][i] for i, id in enumerate(part) for n in ROLLOUTS
            }
        return found

    def _roll(self, items: LatentItems, ids: Sequence[str], sample: int) -> Batch:
        """Rollout number `sample` of some shapes, all from one time: `found`, `true` (B,N,C), `mirrored` (B,)."""
        earliest, rng = self.options.earliest, item_generator(self.config.seed, sample)
        start = earliest + (1 - earliest) * (sample + rng.random()) / self.options.samples
        drawn, mirrored = [], []
        for id in ids:
            rng = np.random.default_rng([self.config.seed, sample, shape_number(id), 7])
            variant, view = items.choose(rng)
            mirrored.append(items.is_mirrored(variant))
            drawn.append(items.draw(id, variant, view, rng))
        batch = {name: tensor.to(self.device) for name, tensor in stack(drawn).items()}
        grid = sampling_times(self.pipeline, self.options.steps)
        times = torch.cat([grid.new_tensor([start]), grid[grid > start]])
        t = times[:1].expand(len(ids)).to(self.device)
        with torch.no_grad():
            found = integrate(
                self.dit,
                batch["condition"].float(),
                interpolate(batch["noise"], batch["latents"], t),
                len(times) - 1,
                self.pipeline.guidance,
                times=times,
                solver=self.pipeline.solver,
                guidance_embed=self.dit.config.guidance_embed,
            )
        marks = torch.tensor(mirrored, dtype=torch.uint8)
        return {"found": found.cpu().half(), "true": batch["latents"].cpu().half(), "mirrored": marks}
