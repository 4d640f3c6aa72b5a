"""The DiT's training data: latents and image tokens of every shape, computed once and kept in shards.

`<output>/<source>/shard-00012.safetensors` mirrors the prepared shard of that name: `<id>/mean` and
`<id>/logvar` (K,N,C) f16, the posterior from K random subsets of the surface points, and `<id>/tokens`
(V,M,Cc) f16, the condition views. `<output>/latents.json` holds what they were made with and the statistics
of the latents.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate
from tqdm import tqdm

from elastic3d.diffusion.options import PipelineConfig
from elastic3d.errors import UserError
from elastic3d.models.image_encoder import ImageEncoder, build_image_encoder, encoder_sha256
from elastic3d.models.images import load_image, prepare_image, to_tensor
from elastic3d.models.options import ForegroundConfig, ImageEncoderConfig
from elastic3d.models.shape_dit import ShapeDiT
from elastic3d.models.shape_vae import ShapeVAE
from elastic3d.models.skip_dit import SkipDiT
from elastic3d.models.weights import WEIGHTS_NAME, save_weights, tensor_heads
from elastic3d.pipelines.image_to_3d import PIPELINE_NAME
from elastic3d.pipelines.memory import require_memory
from elastic3d.pipelines.runtime import BUNDLED, find_model, load_dit, resolve_device
from elastic3d.training.checkpoint import check_fit, find_start, read_record, statistics_of
from elastic3d.training.datasets import (
    PreparedShapes,
    item_generator,
    nothing_prepared,
    read_split,
    record_of_shapes,
)
from elastic3d.training.options import DataConfig, Precision, SplitsConfig, StageConfig, StageName
from elastic3d.training.vae import (
    SOFTNESS,
    TRUNCATION,
    FieldLossConfig,
    SurfaceConfig,
    VAEItems,
    VAEStageConfig,
    VAETrainConfig,
    mirrored,
)
from elastic3d.training.views import augment_view, named_images, stored_views
from elastic3d.utils.claims import sole_use
from elastic3d.utils.files import Number, file_sha256, load_json, save_json
from elastic3d.utils.options import Options, from_dict, option, to_dict

INFO_NAME = "latents.json"
STORED = ("mean", "logvar", "tokens")
_COUNT = Number(0, 1 << 40, whole=True)
_INFO = {
    "settings": {"vae": str, "vae_sha256": str, "encoder": dict, "foreground": dict},
    "latents": [_COUNT],
    "tokens": [_COUNT],
    "mean": [Number()],
    "std": [Number(0)],
}
_SUMS = {"ids": [str], "count": _COUNT, "sum": [Number()], "square": [Number()]}
# Of a cached shard: which of its shapes train, what was read; absent in older caches.
_MADE_OF = ("train", "source")


@dataclass(kw_only=True)
class LatentCacheConfig(Options):
    """Where latents and image tokens are."""

    output: Path = option(Path("data/prepared/latents"), "folder of the cache")


@dataclass(kw_only=True)
class LatentsConfig(LatentCacheConfig):
    """Latents and image tokens of every shape, computed once for the DiT."""

    vae: Path | None = option(None, "folder of the shape VAE; null: of init_from, else runs/vae/export")
    variants: int = option(4, "encodings a shape, each of other surface points", ge=1, le=1 << 16)
    views: int = option(6, "condition views a shape, spread over those that were rendered", ge=1, le=1 << 16)
    images: Path | None = option(
        None, "images of the shapes, named as their meshes; a shape without one keeps its rendered views"
    )
    augment: bool = option(
        False, "training views as people give them: shadows, compression, low resolution, other exposures"
    )
    mirror: bool = option(
        False,
        "half of the encodings and views of training shapes are of the mirrored shape (both numbers even)",
    )
    batch: int = option(8, "shapes encoded at once", ge=1, le=4096)
    standardise: bool = option(
        True, "measure the latents' statistics; false for a published model, which knows its own scale"
    )
    encoder: ImageEncoderConfig = option(ImageEncoderConfig, "image encoder")
    foreground: ForegroundConfig = option(ForegroundConfig, "what happens to a view before")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mirror and (self.variants % 2 or self.views % 2):
            raise ValueError(
                f"variants is {self.variants} and views {self.views}, expected even numbers with mirror=true"
            )


@dataclass(kw_only=True)
class CacheConfig(StageConfig):
    """Everything `scripts/train.py stage=cache` takes."""

    stage: StageName = option(StageName.cache, "what to do")
    data: SplitsConfig = option(SplitsConfig, "prepared shapes")
    latents: LatentsConfig = option(LatentsConfig, "cache of latents and image tokens")
    vae: SurfaceConfig = option(SurfaceConfig, "what the VAE's encoder reads")
    init_from: Path | None = option(
        None,
        "a model, such as shape-small, whose DiT goes on from these latents: they get the scale that it knows",
    )

    @property
    def vae_folder(self) -> Path:
        """Of the VAE that encodes: the given one's, and no other in its place."""
        default = find_start(self.init_from) / "vae" if self.init_from else Path("runs/vae/export")
        return self.latents.vae or default


@dataclass
class LatentInfo:
    """What a cache holds: how it was made, the shapes of its tensors, the statistics of its latents (C,)."""

    settings: dict[str, Any]
    latents: list[int]
    tokens: list[int]
    mean: list[float]
    std: list[float]

    @classmethod
    def load(cls, folder: Path) -> LatentInfo:
        """The description of a finished cache; UserError if there is none."""
        if not (folder / INFO_NAME).is_file():
            raise UserError(f"{folder} has no {INFO_NAME}, expected a finished cache (stage=cache)")
        values = load_json(folder / INFO_NAME, _INFO)
        return cls(**{item.name: values[item.name] for item in fields(cls)})

    @property
    def record(self) -> dict[str, Any]:
        """What tells such latents from others, which fit no model that learned from these."""
        vae, encoder = self.settings["vae_sha256"], self.settings["encoder"]["kind"]
        return {"vae_sha256": vae, "encoder": encoder, "scale": [self.mean, self.std]}

    @property
    def token_counts(self) -> tuple[int, int]:
        """Of a shape's latents (N) and of an image (M)."""
        return self.latents[0], self.tokens[0]

    @property
    def vae(self) -> Path:
        """Folder of the VAE that encoded the shapes; that of the same bundled model where the cache was moved."""
        found = Path(self.settings["vae"])
        bundled = find_model(BUNDLED / found.parent.name) / found.name / WEIGHTS_NAME
        if found.exists() or not bundled.is_file() or file_sha256(bundled) != self.settings["vae_sha256"]:
            return found
        return bundled.parent

    @property
    def encoder(self) -> ImageEncoderConfig:
        """The image encoder of the tokens, with the border that its images had."""
        chosen = {k: v for k, v in self.settings["foreground"].items() if k == "border" and v is not None}
        return from_dict(ImageEncoderConfig, self.settings["encoder"] | chosen, INFO_NAME)

    @property
    def foreground(self) -> ForegroundConfig:
        """What was done to the views before."""
        return from_dict(ForegroundConfig, self.settings["foreground"], INFO_NAME)

    def load_vae(self, trained: FieldLossConfig | None = None) -> ShapeVAE:
        """The autoencoder, with the latents' statistics; UserError where its weights have changed since, or `trained`
        is not the loss that it learned with by its record, which published ones have none of."""
        vae = ShapeVAE.from_pretrained(self.vae)
        self._check_weights("VAE", self.vae, file_sha256(self.vae / WEIGHTS_NAME))
        vae.set_latent_statistics(self.mean, self.std)
        path = self.vae / "training.json"
        if trained is not None and path.is_file():
            record = load_json(path).get("config") or {}
            own = read_record(record, VAETrainConfig, path).vae.loss
            if own is not trained.loss:
                raise UserError(
                    f"vae.loss is {trained.loss.name}, but the VAE in {self.vae} was trained with {own.name}"
                )
            for name, constant in (("softness", SOFTNESS), ("truncation", TRUNCATION)):
                if (found := record["vae"].get(name, constant)) != constant:
                    raise UserError(
                        f"the VAE in {self.vae} was trained with a {name} of {found:g}, expected {constant:g}"
                    )
        return vae

    def load_encoder(self) -> ImageEncoder:
        """The image encoder; UserError where its weights have changed since."""
        self._check_weights("encoder", self.encoder.path, encoder_sha256(self.encoder))
        return build_image_encoder(self.encoder)

    def _check_weights(self, part: str, folder: str | Path, sha256: str | None) -> None:
        if self.settings.get(f"{part.lower()}_sha256", sha256) != sha256:
            raise UserError(
                f"the {part} in {folder} is another one than made the cached latents: put that back, or make them anew"
                " with stage=cache and another latents.output="
            )


def pipeline_config(model: Path) -> PipelineConfig:
    """The sampling defaults in a pipeline's folder."""
    path = model / PIPELINE_NAME
    return from_dict(PipelineConfig, load_json(path), str(path))


class LatentCache:
    """A finished cache as a training sees it: its description, the shapes of both splits, and a record of them."""

    def __init__(
        self, folder: Path, data: DataConfig, val_shapes: int, stored: Sequence[str] = STORED
    ) -> None:
        """`stored`: tensors that are read at once where `data.preload` is set."""
        self.folder, self.info = folder, LatentInfo.load(folder)
        preload = stored if data.preload else ()
        self.train = PreparedShapes(folder, read_split(data.train), preload, data.limit)
        self.val = PreparedShapes(folder, read_split(data.val), (), val_shapes)
        # shapes that trained when they were cached may be validated on; their last views are of the mirror image
        self.mirrored = frozenset(self._trained(data) if self.info.settings.get("mirror") else ())
        self.record = record_of_shapes(self.train, self.val) | self.info.record

    def _trained(self, data: DataConfig) -> Iterator[str]:
        """The training shapes of the lists that the cache was made with; of an older cache those of the run's."""
        for sidecar in sorted(self.folder.glob("*/shard-*.json")):
            found = load_json(sidecar, _SUMS)
            yield from found["train"] if "train" in found else read_split(data.train)

    def load_dense(
        self, model: Path, precision: Precision = Precision.fp32
    ) -> tuple[ShapeDiT | SkipDiT, PipelineConfig]:
        """The DiT in a pipeline's folder and its sampling defaults; UserError unless the cache has such latents, of the
        scale that it knows."""
        dit = load_dit(model / "dit", torch.bfloat16 if precision is Precision.bf16_master else None)
        for name, wanted, found in (
            ("latent channels", self.info.latents[1], dit.config.in_channels),
            ("condition channels", self.info.tokens[1], dit.config.condition_channels),
        ):
            if wanted != found:
                raise UserError(f"{model} has {found} {name}, but the cache has {wanted}")
        check_fit(self.folder, self.info.record, self.info.encoder, model)
        return dit, pipeline_config(model)


def build_cache(config: CacheConfig) -> LatentInfo:
    """Encode the training and validation shapes; what an earlier call finished stays as it is, unless its prepared
    shard, the images of its shapes or the lists have changed. A shape without a view that shows it is left out.

    Raises:
        UserError: a VAE without an encoder, or the folder is in use, or holds a cache made with another VAE, encoder or
            number of variants or views.
    """
    points = config.vae.surface_points + config.vae.sharp_points
    require_memory(28 * points * config.latents.batch, "the surface points of latents.batch shapes need")
    builder = _Builder(config)
    wanted = set(read_split([*config.data.train, *config.data.val]))
    train = set(read_split(config.data.train))
    plan = list(_plan(config.data.prepared, wanted))
    if not plan:
        raise UserError(nothing_prepared(len(wanted), config.data.prepared))
    builder.check_images(wanted)
    output, total = config.latents.output, sum(len(ids) for _, ids in plan)
    sums: list[dict[str, Any]] = []
    with sole_use(output), tqdm(total=total, desc="cache", unit="shape", dynamic_ncols=True) as bar:
        builder.claim()
        _drop_strays(output, plan)
        for shard, ids in plan:
            target = output / shard.parent.name / shard.name
            sidecar = target.with_suffix(".json")
            made_of = {"train": [id for id in ids if id in train], "source": builder.digest(shard, ids)}
            if not (target.is_file() and sidecar.is_file() and _is_made_of(sidecar, ids, made_of)):
                shapes = PreparedShapes(config.data.prepared, ids)
                builder.write(shapes, target, made_of, bar)
            else:
                bar.update(len(ids))
            sums.append(load_json(sidecar, _SUMS))
        return builder.finish(sums)


def _is_made_of(sidecar: Path, ids: list[str], made_of: Mapping[str, Any]) -> bool:
    """Whether a cached shard holds these shapes as they are now; an older cache's is taken to."""
    found = load_json(sidecar, _SUMS)
    return found["ids"] == ids and all(found.get(name, made_of[name]) == made_of[name] for name in _MADE_OF)


def _drop_strays(output: Path, plan: Sequence[tuple[Path, list[str]]]) -> None:
    """Delete cached shards whose prepared ones are gone where their shapes are in others now: they would hide these."""
    planned = {id for _, ids in plan for id in ids}
    targets = {(shard.parent.name, shard.name) for shard, _ in plan}
    for path in output.glob("*/shard-*.safetensors"):
        stored = {f"{path.parent.name}/{key.rpartition('/')[0]}" for key in tensor_heads(path)}
        if (path.parent.name, path.name) not in targets and stored & planned:
            path.unlink()
            path.with_suffix(".json").unlink(missing_ok=True)


def _plan(prepared: Path, wanted: set[str]) -> Iterator[tuple[Path, list[str]]]:
    """(prepared shard, its wanted ids as `source/id`) of every shard that has any."""
    for source in sorted({id.partition("/")[0] for id in wanted}):
        for shard in sorted((prepared / source).glob("shard-*.safetensors")):
            ids = dict.fromkeys(f"{source}/{key.rpartition('/')[0]}" for key in tensor_heads(shard))
            if found := [id for id in ids if id in wanted]:
                yield shard, found


class _Builder:
    def __init__(self, config: CacheConfig) -> None:
        self.config: LatentsConfig = config.latents
        self.device = resolve_device(config.device)
        folder = config.vae_folder
        self.vae = ShapeVAE.from_pretrained(folder, device=self.device)
        if not self.vae.config.encoder_layers:
            raise UserError(
                f"{folder} has no encoder, so meshes can't become latents; for Hunyuan3D-2, import with"
                " vae_subfolder=, the folder of a VAE that has one"
            )
        self.encoder: ImageEncoder = build_image_encoder(self.config.encoder, self.device)
        self.foreground = self.config.foreground.for_encoder(self.config.encoder)
        surface = {item.name: getattr(config.vae, item.name) for item in fields(SurfaceConfig)}
        self.points = VAEStageConfig(model=self.vae.config, **surface, near_queries=1, volume_queries=0)
        self.points.require_sharp()
        self.settings = {
            "vae": str(folder),
            "vae_sha256": file_sha256(folder / WEIGHTS_NAME),
            "encoder": to_dict(self.config.encoder),
            "encoder_sha256": encoder_sha256(self.config.encoder),
            "foreground": to_dict(self.foreground),
            "variants": self.config.variants,
            "views": self.config.views,
            "seeds": "sha256",
            **surface,
        }
        usual = {"standardise": True, "augment": False, "mirror": False}  # absent, as in older caches
        self.settings |= {k: not v for k, v in usual.items() if getattr(self.config, k) is not v}
        self.statistics: tuple[list[float], list[float]] | None = None
        if config.init_from is not None:
            self.statistics = statistics_of(config.init_from)
            self.settings["statistics_of"] = str(config.init_from)
        tqdm.write(f"latents of {folder} -> {self.config.output}", file=sys.stderr)
        self.images: dict[str, list[Path]] = {}
        if self.config.images is not None:
            self.settings["images"] = str(self.config.images)
            self.images = named_images(self.config.images)

    def claim(self) -> None:
        """Note what the cache is made with before anything else is there; refuse a folder made otherwise."""
        path = self.config.output / "settings.json"
        if path.is_file():
            # older caches have no such entry
            found = {"encoder_sha256": self.settings["encoder_sha256"]} | load_json(path)
            if "seeds" not in found:  # such a cache goes on as it began
                del self.settings["seeds"]
            for name, kind in (("encoder", ImageEncoderConfig), ("foreground", ForegroundConfig)):
                # an option that did not exist when the cache was made had its default
                found[name] = to_dict(from_dict(kind, found.get(name, {}), str(path)))
            differing = [n for n in {**self.settings, **found} if found.get(n) != self.settings.get(n)]
            if set(differing) - {"vae"}:  # the same weights may have moved
                raise UserError(f"{self.config.output} was made with another {differing[0]}: delete it first")
        else:
            save_json(self.settings, path)

    def check_images(self, wanted: set[str]) -> None:
        """Say how many shapes have images of their own; UserError if none has, though there is a folder."""
        if not self.images:
            return
        known = [id for id in sorted(wanted) if id.partition("/")[2] in self.images]
        if not known:
            name, first = min(wanted).partition("/")[2], min(self.images)
            raise UserError(
                f"no shape has an image in latents.images={self.config.images}: expected names such as {name}.png,"
                f" but the first there is {self.images[first][0].name}"
            )
        tqdm.write(f"{len(known)} of {len(wanted)} shapes have images of their own", file=sys.stderr)

    def digest(self, shard: Path, ids: list[str]) -> str:
        """SHA-256 of a prepared shard and of the images that its shapes have of their own."""
        own = [path for id in ids for path in self.images.get(id.partition("/")[2], [])]
        return file_sha256(shard, *own)

    def write(self, shapes: PreparedShapes, target: Path, made_of: Mapping[str, Any], bar: tqdm[Any]) -> None:
        """Encode the shapes of one prepared shard; the sums for the statistics go into a file beside, with what the
        shard is `made_of`."""
        train = set(made_of["train"])
        tensors, count = dict[str, Tensor](), 0
        total, square = torch.zeros(2, self.vae.config.channels, dtype=torch.float64)
        for first in range(0, len(shapes), self.config.batch):
            ids = shapes.ids[first : first + self.config.batch]
            mean, logvar = self._encode(shapes, ids, train)
            for i, id in enumerate(ids):
                own = id.partition("/")[2]
                bar.update()
                try:
                    tokens = self._look(shapes, id, id in train)
                except UserError as error:
                    bar.write(f"skipped: {error}")
                    continue
                tensors |= {f"{own}/mean": mean[i].half(), f"{own}/logvar": logvar[i].half()}
                tensors[f"{own}/tokens"] = tokens.half()
                if id in train:
                    total += mean[i].double().sum((0, 1))
                    square += (mean[i].double().square() + logvar[i].double().exp()).sum((0, 1))
                    count += mean[i].shape[0] * mean[i].shape[1]
        save_weights(tensors, target)
        sums = {"ids": shapes.ids, "count": count, "sum": total.tolist(), "square": square.tolist()}
        save_json({**sums, **made_of}, target.with_suffix(".json"))

    @torch.no_grad()
    def _encode(self, shapes: PreparedShapes, ids: list[str], train: set[str]) -> tuple[Tensor, Tensor]:
        """Posterior mean and logvar (B,K,N,C) from K subsets of the surface points; see `LatentsConfig.mirror`."""
        items = VAEItems(shapes, self.points)
        means, logvars = [], []
        for variant in range(self.config.variants):
            drawn = []
            for id in ids:
                rng = item_generator(variant, self._number(id))
                item = {**items.draw(id, rng), **items.offsets(rng)}
                if self.config.mirror and id in train and 2 * variant >= self.config.variants:
                    item = {name: mirrored(tensor) for name, tensor in item.items()}
                drawn.append(item)
            batch = {name: tensor.to(self.device) for name, tensor in default_collate(drawn).items()}
            posterior = self.vae.encode(batch["surface"], batch.get("sharp"), batch.get("offsets"))
            means.append(posterior.mean.cpu())
            logvars.append(posterior.logvar.cpu())
        return torch.stack(means, dim=1), torch.stack(logvars, dim=1)

    def _look(self, shapes: PreparedShapes, id: str, training: bool) -> Tensor:
        """Tokens (V,M,Cc) of the shape's own images or its rendered views; of some twice where there are fewer."""
        config, views = self.config, self.config.views
        found = self.images.get(id.partition("/")[2]) or stored_views(shapes, id)
        halves = 2 if config.mirror and training else 1
        places = [i * len(found) // (views // halves) for i in range(views // halves)] * halves
        chosen = [(place, halves == 2 and 2 * i >= views) for i, place in enumerate(places)]
        changed = config.augment and training
        # an augmented view is another one each time; an unchanged one is encoded once
        used = list(enumerate(chosen)) if changed else [(0, pair) for pair in sorted(set(chosen))]
        images = []
        for index, (place, flip) in used:
            view: Image.Image | Path = found[place]
            if changed:
                view = augment_view(load_image(view), np.random.default_rng([self._number(id), index, 6]))
            if flip:
                view = load_image(view).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            images.append(prepare_image(view, self.foreground, self.encoder.image_size))
        tokens = self.encoder(to_tensor(images).to(self.device)).cpu()
        return tokens if changed else tokens[[used.index((0, pair)) for pair in chosen]]

    def _number(self, id: str) -> int:
        """A number of its own for every id, the same in every process; older caches have it of the last bytes alone."""
        data = hashlib.sha256(id.encode()).digest()[:8] if "seeds" in self.settings else id.encode()
        return int.from_bytes(data, "big") % (1 << 63)

    def finish(self, sums: list[dict[str, Any]]) -> LatentInfo:
        """Write `latents.json`."""
        count = sum(row["count"] for row in sums)
        if not count:
            raise UserError("no shape of the training split was cached: the latents have no statistics")
        mean = np.sum([row["sum"] for row in sums], axis=0) / count
        variance = np.sum([row["square"] for row in sums], axis=0) / count - mean**2
        if not self.config.standardise:
            mean, variance = np.zeros_like(mean), np.ones_like(variance)
        info = LatentInfo(
            settings=self.settings,
            latents=[self.vae.config.num_latents, self.vae.config.channels],
            tokens=[self.encoder.tokens, self.encoder.channels],
            mean=mean.tolist(),
            std=np.sqrt(np.maximum(variance, 1e-12)).tolist(),
        )
        if self.statistics is not None:
            info.mean, info.std = self.statistics
        save_json(vars(info), self.config.output / INFO_NAME)
        return info
