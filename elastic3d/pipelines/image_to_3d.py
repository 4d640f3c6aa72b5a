"""Image to mesh: encode the image, sample latents, decode the field, extract and clean the surface."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, overload

import torch
import trimesh
from torch import Tensor, nn

from elastic3d import __version__
from elastic3d.diffusion.dial import Dial, choose, load_dial, save_dial
from elastic3d.diffusion.flow import sampling_times
from elastic3d.diffusion.options import PipelineConfig, Quality
from elastic3d.diffusion.sampler import sample
from elastic3d.elastic import attach, is_attached, save_routers, session_of
from elastic3d.elastic.calibrating import CALIBRATION_NAME, find_calibration, has_routers, put_policy
from elastic3d.elastic.config import ElasticOptions
from elastic3d.elastic.context import Turn
from elastic3d.elastic.session import ElasticSession
from elastic3d.elastic.training_free import check_budget
from elastic3d.errors import UserError
from elastic3d.geometry.cleanup import clean
from elastic3d.geometry.decode import decode_field
from elastic3d.geometry.options import CleanupConfig, DecodeConfig
from elastic3d.geometry.surface import extract_surface, reducible
from elastic3d.models.image_encoder import (
    Familiarity,
    ImageEncoder,
    load_familiarity,
    load_image_encoder,
    save_image_encoder,
)
from elastic3d.models.options import ForegroundConfig
from elastic3d.models.shape_dit import ShapeDiT
from elastic3d.models.shape_vae import ShapeVAE
from elastic3d.models.skip_dit import SkipDiT, load_dit
from elastic3d.models.weights import find_weights
from elastic3d.pipelines.conditions import (
    ImageInput,
    Prepared,
    check_directions,
    encode,
    is_image,
    prepare,
)
from elastic3d.pipelines.memory import LOW_MEMORY_CHUNK, Placement, usual_chunk
from elastic3d.pipelines.options import check_sampling
from elastic3d.pipelines.progress import Listeners, OnProgress, OnResult, OnStep
from elastic3d.pipelines.result import Result, Settings
from elastic3d.pipelines.routes import dense_metadata, route_metadata
from elastic3d.pipelines.runtime import find_model, resolve_device, resolve_dtype, seeds_of, timed
from elastic3d.utils.devices import DeviceChoice, DTypeChoice
from elastic3d.utils.files import file_sha256, printable
from elastic3d.utils.options import from_dict, to_dict
from elastic3d.utils.structured import load_json, save_json

PIPELINE_NAME, ROUTERS_NAME = "pipeline.json", "routers"


class ImageTo3DPipeline:
    """An image of one object becomes a mesh.

    On disk: a folder with `pipeline.json`, `vae/`, `dit/` (each config.json and model.safetensors),
    `image_encoder/config.json`, `familiarity.safetensors` (which images the model knows) and, for an elastic model,
    `routers/` and `dial.json`. Without routers a budget is kept by a training-free policy, by the calibration in
    `training_free.json` where there is one.
    """

    def __init__(
        self,
        vae: ShapeVAE,
        dit: ShapeDiT | SkipDiT,
        encoder: ImageEncoder,
        config: PipelineConfig | None = None,
        weights_sha256: str | None = None,
        dense_sha256: str | None = None,
    ) -> None:
        """All parts on one device. UserError if their channels do not fit together.

        Args:
            weights_sha256: of the files they come from; None for models that were not loaded from files.
            dense_sha256: of these without the routers; None: the same.
        """
        for name, wanted, found in (
            ("latent channels", vae.config.channels, dit.config.in_channels),
            ("condition channels", encoder.channels, dit.config.condition_channels),
        ):
            if wanted != found:
                raise UserError(f"the DiT has {found} {name}, but its partner has {wanted}")
        self.vae, self.dit, self.encoder = vae.eval(), dit.eval(), encoder
        self.config = config or PipelineConfig()
        self.weights_sha256, self.dense_sha256 = weights_sha256, dense_sha256 or weights_sha256
        self.placement = Placement(next(dit.parameters()).device)
        self.max_points = usual_chunk(self.device)
        self.dial: Dial | None = None  # what a budget becomes; None: the budget is the routers' own
        self.calibration: Path | None = None  # file or folder of what keeps a budget without routers
        self.familiarity: Familiarity | None = None  # with the images the model was trained on
        self._turn = Turn()  # threads that share a pipeline take turns

    @property
    def device(self) -> torch.device:
        """Where the models work."""
        return self.placement.device

    def use_less_memory(self) -> None:
        """From now on, only the part that works is on the device, and guidance runs its branches in turn: slower."""
        self.placement.offload = True
        self.max_points = min(self.max_points, LOW_MEMORY_CHUNK)
        for part in (self.vae, self.dit, self.encoder):
            if isinstance(part, nn.Module):
                part.to("cpu")

    @property
    def session(self) -> ElasticSession | None:
        """Of the DiT's routers, or of its policy once a budget was set; None where it has neither."""
        return session_of(self.dit) if is_attached(self.dit) else None

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: DeviceChoice | torch.device | str = "auto",
        dtype: DTypeChoice | torch.dtype | str = "auto",
        dial: bool = True,
        routers: bool = True,
    ) -> ImageTo3DPipeline:
        """The pipeline saved in a folder, ready to run.

        Args:
            path: a folder, or the name of a bundled model: "shape-small".
            dtype: of the DiT and the VAE; `auto` is bf16 where it is fast, else fp32.
            dial: False leaves out the model's dial, as for measurements: a budget is then the routers' own.
            routers: False leaves out the model's routers, and its dial with them.

        Raises:
            UserError: a missing, broken or third-party file, a device that is not there.
        """
        folder = find_model(path)
        target = resolve_device(device)
        number = resolve_dtype(dtype, target)
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}, expected one with {PIPELINE_NAME}")
        config = from_dict(PipelineConfig, load_json(folder / PIPELINE_NAME), str(folder / PIPELINE_NAME))
        vae = ShapeVAE.from_pretrained(folder / "vae", number, target)
        dit = load_dit(folder / "dit", number, target)
        files = [find_weights(folder / "vae"), find_weights(folder / "dit")]
        digest = dense = file_sha256(*files)
        if routers and (folder / ROUTERS_NAME).is_dir():
            attach(dit, folder / ROUTERS_NAME)
            digest = file_sha256(*files, find_weights(folder / ROUTERS_NAME))
        pipeline = cls(vae, dit, load_image_encoder(folder / "image_encoder", target), config, digest, dense)
        pipeline.familiarity = load_familiarity(folder, pipeline.encoder.channels)
        session = pipeline.session
        if dial and routers:
            pipeline.dial = load_dial(folder, config, None if session is None else session.router_config)
        pipeline.calibration = folder
        return pipeline

    def save_pretrained(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write the folder that `from_pretrained` reads; `pipeline.json` last: half a folder is no model."""
        folder = Path(path)
        self.vae.save_pretrained(folder / "vae", dtype)
        self.dit.save_pretrained(folder / "dit", dtype)
        if has_routers(self.dit):
            save_routers(self.dit, folder / ROUTERS_NAME)
        save_image_encoder(self.encoder, folder / "image_encoder")
        if self.familiarity is not None:
            self.familiarity.save(folder)
        save_dial(self.dial, folder)
        (folder / CALIBRATION_NAME).unlink(missing_ok=True)  # measured with what was there before
        save_json({**to_dict(self.config), "version": __version__}, folder / PIPELINE_NAME)

    @overload
    def __call__(self, images: ImageInput, seed: int = 0, **options: Any) -> Result: ...

    @overload
    def __call__(
        self, images: Sequence[ImageInput], seed: int | Sequence[int] = 0, **options: Any
    ) -> list[Result]: ...

    def __call__(
        self,
        images: ImageInput | Sequence[ImageInput],
        seed: int | Sequence[int] = 0,
        *,
        quality: Quality | str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        resolution: int | None = None,
        max_faces: int | None = None,
        decode: DecodeConfig | None = None,
        cleanup: CleanupConfig | None = None,
        foreground: ForegroundConfig | None = None,
        on_step: OnStep | None = None,
        on_progress: OnProgress | None = None,
        on_result: OnResult | None = None,
        **elastic: Any,
    ) -> Result | list[Result]:
        """Mesh of an image, or of each of a list of images as one batch.

        Args:
            images: file, PIL image, array, views of one object by direction (front, left, back, right), or a list.
            seed: of the noise; one for all, or one an image. A sample depends on its own alone, not on its batch.
            quality: `fast`, `default` or `best`, points of the model's dial in the place of a budget, and a resolution.
            steps, guidance, resolution: None is the model's default. With `steps`, a budget is a share of that many
                dense steps; without, of the dense model's default ones, where the model has a dial.
            max_faces: decimate to this many faces; None is `cleanup`'s own (40,000).
            decode: how the field becomes a mesh; resolution, box and chunks are those of this call.
            on_step: called with (steps done, steps) during sampling.
            on_progress: called with (stage, done, total) in every stage: condition, dit, decode, cleanup.
            on_result: called with (number in the list, result) as soon as a result is known, failures included.
            elastic: `budget=` and whatever else `ElasticOptions` has.

        Raises:
            UserError: a value out of range; for a single image also whatever kept it from becoming a mesh.
                In a list that is the `error` of its result, and the others go on.
        """
        many = not is_image(images)
        inputs: Sequence[ImageInput] = images if many else [images]  # type: ignore[assignment, list-item]
        seeds = seeds_of(seed, len(inputs))
        requested = ElasticOptions(**elastic)
        row = choose(self.dial, requested, steps, quality, guidance)
        run = requested if row is None else row.over(requested)
        steps = steps if row is None else row.steps
        cells = self.config.resolution_of(quality) if resolution is None else resolution
        settings = self._settings(steps, guidance, cells, max_faces, decode, cleanup, foreground)
        settings.elastic = run.over(self.config.elastic, has_routers(self.dit))
        if settings.elastic.elastic and not has_routers(self.dit):
            check_budget(settings.elastic.budget, len(sampling_times(self.config, settings.steps)) - 1)
        settings.dial = None if row is None else row.metadata(requested.budget, quality)
        results = self._in_turn(inputs, seeds, settings, Listeners(on_step, on_progress, on_result))
        if many:
            return results
        if results[0].error is not None:
            raise results[0].error
        return results[0]

    def _in_turn(
        self, inputs: Sequence[ImageInput], seeds: Sequence[int], settings: Settings, listeners: Listeners
    ) -> list[Result]:
        """One call at a time; the first with a budget brings the policy of a model without routers."""
        with self._turn:
            if settings.elastic.elastic and self.session is None:
                put_policy(self.dit, find_calibration(self.calibration, self.dit))
            with self.session.turn if self.session is not None else nullcontext():
                return self._generate(inputs, seeds, settings, listeners)

    def _settings(
        self,
        steps: int | None,
        guidance: float | None,
        resolution: int,
        max_faces: int | None,
        decode: DecodeConfig | None,
        cleanup: CleanupConfig | None,
        foreground: ForegroundConfig | None,
    ) -> Settings:
        try:
            check_sampling(steps, guidance, resolution)
            cleaning = cleanup or CleanupConfig()
            cleaning = cleaning if max_faces is None else replace(cleaning, max_faces=max_faces)
            decoding = replace(
                decode or DecodeConfig(),
                resolution=resolution,
                max_points=self.max_points,
                box=self.config.box,
            )
            return Settings(
                steps=self.config.steps if steps is None else steps,
                guidance=self.config.guidance if guidance is None else guidance,
                decode=decoding,
                cleanup=cleaning,
                foreground=foreground or ForegroundConfig(),
                elastic=self.config.elastic,
            )
        except ValueError as error:
            raise UserError(str(error)) from error

    def _generate(
        self,
        images: Sequence[ImageInput],
        seeds: Sequence[int],
        settings: Settings,
        listeners: Listeners,
    ) -> list[Result]:
        results = [Result(self._metadata(seed, settings)) for seed in seeds]
        prepared: dict[int, Prepared] = {}
        batch_ms: dict[str, float] = {}
        with timed(batch_ms, "condition"):
            for i, image in enumerate(images):
                try:
                    prepared[i] = prepare(image, settings.foreground, self.encoder)
                    check_directions(prepared[i], next(iter(prepared.values())))
                    results[i].image = next(iter(prepared[i].values()))
                except UserError as error:
                    prepared.pop(i, None)
                    results[i].error = error
                    listeners.ready(i, results[i])
                listeners.at("condition", i + 1, len(images))
            if not prepared:
                return results
            with self.placement.use(self.encoder):
                condition = encode(list(prepared.values()), self.encoder, self.device)
            self._compare(condition, {i: (images[i], results[i]) for i in prepared})
        with timed(batch_ms, "dit"), self.placement.use(self.dit):
            latents = self.sample_latents(
                condition, [seeds[i] for i in prepared], settings, partial(listeners.at, "dit")
            )
        if self.placement.offload and self.session is not None:
            self.session.forget()  # copies of blocks would stay on the device
        done, moves = [results[i] for i in prepared], len(sampling_times(self.config, settings.steps)) - 1
        dense = dense_metadata(self.dit.config, moves, settings.guidance, condition.shape[1])
        routes = route_metadata(self.session, settings.elastic, len(done))
        by_default = self._dense_default(condition.shape[1])
        for result, row, route in zip(done, latents, routes, strict=True):
            result.latents = row.cpu()
            result.metadata |= dense | route | by_default
        self._decode(latents, dict(zip(prepared, done, strict=True)), settings, batch_ms, listeners)
        return results

    def _compare(self, condition: Tensor, rows: dict[int, tuple[ImageInput, Result]]) -> None:
        """Note how far the images of some samples are from the training images, and warn of those far away."""
        if self.familiarity is None:
            return
        for (image, result), distance in zip(
            rows.values(), self.familiarity.distance(condition).tolist(), strict=True
        ):
            result.metadata["image_distance"] = round(distance, 3)
            if text := self.familiarity.warning(distance):
                result.warnings.append(text)
                name = f"{printable(image)}: " if isinstance(image, (str, Path)) else ""
                warnings.warn(f"{name}{text}", stacklevel=2)

    def _decode(
        self,
        latents: Tensor,
        results: dict[int, Result],
        settings: Settings,
        batch_ms: dict[str, float],
        listeners: Listeners,
    ) -> None:
        """Latents (B,N,C) -> the meshes of `results`, or why there is none; with it all their times are known.

        `results` are by their number in the call.
        """
        count = len(results)

        def decoding(row: int, level: int, levels: int) -> None:
            listeners.at("decode", row * levels + level, count * levels)

        with ExitStack() as stack:
            with timed(batch_ms, "decode"), torch.no_grad():
                stack.enter_context(self.placement.use(self.vae))  # until the last mesh is there
                tokens = self.vae.decode(latents)
            for row, (number, result) in enumerate(results.items()):
                ms = {name: value / count for name, value in batch_ms.items()}
                try:
                    on_level = partial(decoding, row)
                    result._mesh = self._mesh_of(tokens[row : row + 1], settings, ms, on_level)
                except ValueError as error:
                    result.error = error if isinstance(error, UserError) else UserError(str(error))
                result.metadata["ms"] = {name: round(value, 1) for name, value in ms.items()}
                listeners.at("cleanup", row + 1, count)
                listeners.ready(number, result)

    def sample_latents(
        self,
        condition: Tensor,
        seeds: Sequence[int],
        settings: Settings,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Condition tokens (B,M,Cc) -> latents (B,N,C) in fp32, sample b from its own generator."""
        cfg = self.dit.config
        if self.session is not None:
            self.session.settings = settings.elastic
        return sample(
            self.dit,
            condition,
            (cfg.num_latents, cfg.in_channels),
            settings.steps,
            settings.guidance,
            [torch.Generator().manual_seed(seed) for seed in seeds],
            times=sampling_times(self.config, settings.steps),
            solver=self.config.solver,
            sequential=self.placement.offload,
            guidance_embed=cfg.guidance_embed,
            session=self.session,
            on_step=on_step,
        )

    def _mesh_of(
        self, tokens: Tensor, settings: Settings, ms: dict[str, float], on_level: OnStep
    ) -> trimesh.Trimesh:
        """Decoded tokens (1,N,D) of one sample -> clean mesh; adds its times to `ms`."""
        with timed(ms, "decode"):
            values, _ = decode_field(self.vae.field(tokens), 0, settings.decode, self.device, on_level)
        with timed(ms, "surface"):
            values = reducible(values, settings.cleanup.max_faces)
            mesh = extract_surface(values, settings.decode.box, settings.decode.surface)
        with timed(ms, "cleanup"):
            return clean(mesh, settings.cleanup)

    def _dense_default(self, condition_tokens: int) -> dict[str, int]:
        """FLOPs that a dial's costs are shares of; nothing without a dial."""
        if self.dial is None:
            return {}
        moves = len(sampling_times(self.config, self.config.steps)) - 1
        dense = dense_metadata(self.dit.config, moves, self.config.guidance, condition_tokens)
        return {"flops_dense": dense["flops_dense"]}

    def _metadata(self, seed: int, settings: Settings) -> dict[str, Any]:
        return {
            "version": __version__,
            "model": self.config.model,
            "weights_sha256": self.weights_sha256,
            "seed": seed,
            "steps": settings.steps,
            "guidance": settings.guidance,
            "resolution": settings.decode.resolution,
            "budget": settings.elastic.budget if settings.elastic.elastic else 1.0,
            **({} if settings.dial is None else {"dial": settings.dial}),
        }
