"""Image to mesh: encode the image, sample latents, decode the field, extract and clean the surface."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor, nn

from elastic3d import __version__
from elastic3d.checkpoints.folders import INDEX_NAME, refuse
from elastic3d.diffusion.dial import Dial, choose, load_dial, resolution_of, save_dial
from elastic3d.diffusion.options import IDLE, MAX_ENSEMBLE, Combine, PipelineConfig, Quality
from elastic3d.diffusion.sampler import sample, sampling_times
from elastic3d.elastic.attachment import (
    attach,
    find_session,
    has_routers,
    holds_routers,
    named_router_folders,
    remove_routers,
    save_routers,
)
from elastic3d.elastic.config import ElasticConfig, ElasticOptions, RouterConfig
from elastic3d.elastic.few_step import least_default
from elastic3d.elastic.session import ElasticSession
from elastic3d.elastic.training_free import CALIBRATION_NAME, check_budget, put_policy
from elastic3d.errors import UserError
from elastic3d.geometry.cleanup import clean
from elastic3d.geometry.decode import decode_field, reducible, resolutions_of
from elastic3d.geometry.options import CleanupConfig, DecodeConfig
from elastic3d.geometry.surface import extract_surface
from elastic3d.models.image_encoder import (
    FAMILIARITY_NAME,
    FAMILIARITY_RECORD,
    DinoV2,
    Familiarity,
    ImageEncoder,
    encoder_files,
    load_familiarity,
    load_image_encoder,
    save_image_encoder,
)
from elastic3d.models.images import ImageInput, Prepared, prepare, to_tensor
from elastic3d.models.options import ForegroundConfig
from elastic3d.models.shape_dit import ShapeDiT
from elastic3d.models.shape_vae import ShapeVAE
from elastic3d.models.skip_dit import SkipDiT
from elastic3d.models.weights import WEIGHTS_NAME, find_weights, plain_twin
from elastic3d.pipelines.call import Call, OnProgress, OnResult, OnStep, Result
from elastic3d.pipelines.ensembles import combined
from elastic3d.pipelines.memory import LOW_MEMORY_CHUNK, on_device
from elastic3d.pipelines.runtime import (
    dense_flops,
    find_model,
    load_dit,
    named_routers,
    resolve_device,
    resolve_dtype,
    routes_of,
    seeds_of,
    timed,
    turn,
)
from elastic3d.pipelines.static import CompiledDiT, StaticDiT
from elastic3d.pipelines.training_free import find_calibration, save_calibration
from elastic3d.utils.devices import DeviceChoice, DTypeChoice
from elastic3d.utils.files import file_sha256, load_json, printable, save_json
from elastic3d.utils.options import Bounds, checked, from_dict, to_dict

PIPELINE_NAME, ROUTERS_NAME = "pipeline.json", "routers"
# Points in one call of the field on a CPU. Blocks of over 32 MB are mapped anew by glibc each time, and every page of
# them faults in again: with more points decoding takes 1.6 times as long.
CPU_CHUNK = 1 << 14


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
    ) -> None:
        """All parts on one device. UserError if their channels do not fit together.

        `weights_sha256` is of the files they come from; None for models that were not loaded from files.
        """
        for name, wanted, found in (
            ("latent channels", vae.config.channels, dit.config.in_channels),
            ("condition channels", encoder.channels, dit.config.condition_channels),
        ):
            if wanted != found:
                raise UserError(f"the DiT has {found} {name}, but its partner has {wanted}")
        self.vae, self.dit, self.encoder = vae.eval(), dit.eval(), encoder
        self.config, self.weights_sha256 = config or PipelineConfig(), weights_sha256
        self.dense_files: Sequence[Path] = ()  # what it was loaded from, without the routers
        self.device, self.offload = next(dit.parameters()).device, False  # offload: see `use_less_memory`
        self._working: Callable[[Any], AbstractContextManager[Any]] = nullcontext  # around the work of a part
        self.max_points = CPU_CHUNK if self.device.type == "cpu" else DecodeConfig.max_points
        self.fit: Callable[[PipelineConfig, int], int] | None = None  # max_points of a batch, if it fits
        self.dial: Dial | None = None  # what a budget becomes; None: the budget is the routers' own
        self.calibration: Path | None = None  # file or folder of what keeps a budget without routers
        self.familiarity: Familiarity | None = None  # with the images the model was trained on
        self.static: StaticDiT | None = StaticDiT(dit)  # runs where every block does
        self._plain: ShapeDiT | SkipDiT | None = None  # see `_without_routers`

    def use_less_memory(self) -> None:
        """From now on, only the part that works is on the device, and guidance runs its branches in turn: slower."""
        self.offload, self.static = True, None  # its weights would have to stay on the device
        self._working = lambda part: on_device(part, self.device)
        self.max_points = min(self.max_points, LOW_MEMORY_CHUNK)
        for part in (self.vae, self.dit, self.encoder):
            if isinstance(part, nn.Module):
                part.to("cpu")

    def compile(self, **arguments: Any) -> None:
        """From now on, where every block of the DiT runs, a pass is one graph, on a GPU a CUDA graph (see `static`).

        The first passes of each batch size compile it: minutes. `arguments` are of `torch.compile`, over the defaults.
        UserError where that does not work, and after `use_less_memory`, which moves the weights.
        """
        if self.offload:
            raise UserError("low_memory moves the weights, expected compile=false with it")
        self.static = CompiledDiT(self.dit, arguments)

    @property
    def dense_sha256(self) -> str | None:
        """As `weights_sha256`, without the routers: what a result of the dense model depends on."""
        return file_sha256(*self.dense_files) if self.dense_files else self.weights_sha256

    @property
    def session(self) -> ElasticSession | None:
        """Of the DiT's routers, or of its policy once a budget was set; None where it has neither."""
        return find_session(self.dit)

    @classmethod
    @torch.inference_mode(False)  # where tensors keep no version, by which stale weights are found
    def from_pretrained(
        cls,
        path: str | Path,
        device: DeviceChoice | torch.device | str = "auto",
        dtype: DTypeChoice | torch.dtype | str = "auto",
        dial: bool = True,
        routers: bool | str | Path = True,
    ) -> ImageTo3DPipeline:
        """The pipeline saved in a folder, ready to run.

        Args:
            path: a folder, or the name of a bundled model: "shape-small".
            dtype: of the DiT and the VAE; `auto` is bf16 where it is fast, else fp32.
            dial: False leaves out the model's dial, as for measurements: a budget is then the routers' own.
            routers: False leaves out the model's routers, and its dial with them; so does a folder of other routers,
                by its path or by its name in the model's folder, which take their place.

        Raises:
            UserError: a missing, broken or third-party file, a device that is not there.
        """
        folder, target = find_model(path), resolve_device(device)
        number = resolve_dtype(dtype, target)
        if not (folder / PIPELINE_NAME).is_file() or (folder / INDEX_NAME).is_file():
            refuse(folder)
        config = from_dict(PipelineConfig, load_json(folder / PIPELINE_NAME), str(folder / PIPELINE_NAME))
        vae = ShapeVAE.from_pretrained(folder / "vae", number, target)
        dit = load_dit(folder / "dit", number, target)
        pipeline = cls(vae, dit, load_image_encoder(folder / "image_encoder", target), config)
        files = [find_weights(folder / part) for part in ("vae", "dit")]
        files += encoder_files(pipeline.encoder.config)
        pipeline.dense_files, pipeline.calibration = files, folder
        pipeline.familiarity = load_familiarity(folder, pipeline.encoder.channels)
        own = folder / ROUTERS_NAME
        chosen = own if isinstance(routers, bool) else named_routers(folder, routers)
        if routers is not False and (chosen is not own or holds_routers(own)):
            attach(dit, chosen)
            files = [*files, find_weights(chosen)]
        pipeline.weights_sha256 = file_sha256(*files)
        if dial and routers is True:
            session = pipeline.session
            pipeline.dial = load_dial(folder, config, session.router_config if session else None)
        return pipeline

    def save_pretrained(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write the folder that `from_pretrained` reads; `pipeline.json` last: half a folder is no model.

        `routers/` and statistics of another model that was there before go, and so do folders of other routers, such as
        `per_block/`, where the DiT is another one now. `dtype` as `save_weights` takes it; in 8 bits is the DiT alone.
        """
        folder = Path(path)
        own = any(folder.resolve() in path.resolve().parents for path in self.dense_files)
        weights = folder / "dit" / WEIGHTS_NAME
        before = file_sha256(weights) if weights.is_file() and not own else None
        named = named_router_folders(folder) if before else []
        self.vae.save_pretrained(folder / "vae", torch.bfloat16 if dtype is torch.int8 else dtype)
        self.dit.save_pretrained(folder / "dit", dtype)
        for routers in named if before != file_sha256(weights) else ():
            remove_routers(routers)
        if has_routers(self.dit):
            save_routers(self.dit, folder / ROUTERS_NAME)
        elif not own:
            remove_routers(folder / ROUTERS_NAME)
        save_image_encoder(self.encoder, folder / "image_encoder")
        if self.familiarity is not None:
            self.familiarity.save(folder)
        else:
            for name in (FAMILIARITY_NAME, FAMILIARITY_RECORD):
                (folder / name).unlink(missing_ok=True)
        save_dial(self.dial, folder)
        if (calibration := find_calibration(self.calibration, self.dit)) is None:
            (folder / CALIBRATION_NAME).unlink(missing_ok=True)  # measured with what was there before
        else:
            save_calibration(calibration, folder / CALIBRATION_NAME)
        save_json({**to_dict(self.config), "version": __version__}, folder / PIPELINE_NAME)

    @overload
    def __call__(self, images: ImageInput, seed: int = 0, **options: Any) -> Result: ...

    @overload
    def __call__(
        self, images: Sequence[ImageInput], seed: int | Sequence[int] = 0, **options: Any
    ) -> list[Result]: ...

    @torch.inference_mode(False)
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
        ensemble: int = 1,
        combine: Combine | str = Combine.mean,
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
            ensemble: generations of each object, K; the first is the one that is made without.
            combine: the mesh is their mean shape, or that of the one which fits the image (`geometry.ensemble`).
            on_progress: called with (stage, done, total) of every stage.
            on_result: called with (number in the list, result) as soon as a result is known, failures included.
            elastic: `budget=` and whatever else `ElasticOptions` has.

        Raises:
            UserError: a value out of range, too little memory; for a single image also whatever kept it from a mesh.
                In a list that is the `error` of its result, and the others go on.
        """
        stacked = isinstance(images, np.ndarray) and images.ndim == 4
        many = stacked or (isinstance(images, Sequence) and not isinstance(images, (str, bytes, bytearray)))
        inputs: Sequence[ImageInput] = images if many else [images]  # type: ignore[assignment, list-item]
        seeds = seeds_of(seed, len(inputs))
        ensemble = checked("ensemble", ensemble, int, Bounds(ge=1, le=MAX_ENSEMBLE))
        given = {"steps": steps, "guidance": guidance, "resolution": resolution}
        model, config, dial = self.configured(ElasticOptions(**elastic), quality, **given)
        if max_faces is not None:
            cleanup = replace(cleanup or CleanupConfig(), max_faces=max_faces)
        parts = decode or DecodeConfig(), cleanup or CleanupConfig(), foreground or ForegroundConfig()
        told = on_progress or (lambda *_: None), on_result or (lambda *_: None)
        rule: Combine = checked("combine", combine, Combine)
        with turn(self.dit):  # threads that share a model take turns
            results = model._generate(Call(inputs, seeds, config, *parts, ensemble, rule, dial, *told))
        if not many and results[0].error is not None:
            raise results[0].error
        return results if many else results[0]

    def configured(
        self, requested: ElasticOptions, quality: Quality | str | None = None, **given: Any
    ) -> tuple[ImageTo3DPipeline, PipelineConfig, dict[str, Any]]:
        """What a call runs: this pipeline, or its twin without routers; its sampling, with what is `given` of steps,
        guidance and resolution, by a row of the dial if there is one; the metadata of that. UserError out of range."""
        named: Quality | None = checked("quality", quality, Quality | None)
        model, dial = self, dict[str, Any]()
        row = choose(self.dial, requested, given.get("steps"), named, given.get("guidance"))
        if row is not None:
            requested, dial = row.over(requested, named)
            given = given | {"steps": row.steps}
            model = self._without_routers() if row.planned else self
        given, routed = {name: x for name, x in given.items() if x is not None}, has_routers(model.dit)
        config = replace(self.config, **{"resolution": resolution_of(self.config, named), **given})
        times = sampling_times(config, config.steps).tolist()[:-1]
        routers = model.session.router_config if model.session is not None else RouterConfig()
        least = least_default(routers, times, config.guidance)
        config.elastic = requested.over(self.config.elastic, routed, least)
        if config.elastic.elastic and not routed:
            check_budget(config.elastic.budget, len(times), config.steps)
        return model, config, dial

    def _without_routers(self) -> ImageTo3DPipeline:
        """This pipeline with a twin of the DiT that shares its weights: a plan keeps its budgets."""
        if self._plain is None:
            self._plain = plain_twin(self.dit)
        twin = copy(self)
        twin.dit, twin.static = self._plain, None
        return twin

    def _generate(self, call: Call) -> list[Result]:
        config, K, ms, device = call.config, call.ensemble, dict[str, float](), self.device
        most = self.fit(config, len(call.images) * K) if self.fit else self.max_points
        if config.elastic.elastic and self.session is None:  # the first call with a budget brings the policy
            put_policy(self.dit, find_calibration(self.calibration, self.dit))
        metadata = {
            "version": __version__,
            "model": config.model,
            "weights_sha256": self.weights_sha256,
            "seed": 0,
            "steps": config.steps,
            "guidance": config.guidance,
            "resolution": config.resolution,
            "budget": config.elastic.budget if config.elastic.elastic else 1.0,
            "ensemble": K,
            **call.dial,
        }
        results = [Result({**metadata, "seed": seed}) for seed in call.seeds]
        with timed(ms, "condition", device):
            prepared = self._prepare(call, results)
            if not prepared:
                return results
            condition = self.encode(list(prepared.values()))
            made = {i: results[i] for i in prepared}
            self._compare(condition, made, call.images)
        with timed(ms, "dit", device):
            seeds, on_step = [call.seeds[i] for i in made], partial(call.on_progress, "dit")
            latents = self.sample_latents(
                condition, seeds, config.steps, config.guidance, config.elastic, on_step, K
            ).unflatten(0, (-1, K))
        dense, default = (dense_flops(self.dit, c, condition.shape[1]) for c in (config, self.config))
        of_default = {"flops_dense": default} if self.dial else {}  # a dial's costs are shares of it
        routes = routes_of(self.session, config.elastic, len(made))
        for result, rows, route in zip(made.values(), latents, routes, strict=True):
            result.latents = rows.squeeze(0).cpu()
            result.metadata |= {"flops_executed": K * dense, "flops_dense": dense, **route, **of_default}
        self._decode(call, latents, made, ms, min(most, self.max_points))
        return results

    def _prepare(self, call: Call, results: list[Result]) -> dict[int, Prepared]:
        """The usable images, by their number in the call; what is wrong with another one is the error of its result."""
        found: dict[int, Prepared] = {}
        for i, image in enumerate(call.images):
            try:
                views = prepare(image, call.foreground, self.encoder)
                if any(views.keys() != others.keys() for others in found.values()):
                    raise UserError(
                        "the objects of one batch are seen from different directions: give one at a time"
                    )
                found[i], results[i].image = views, next(iter(views.values()))
            except UserError as error:
                results[i].error = error
                call.on_result(i, results[i])
            call.on_progress("condition", i + 1, len(call.images))
        return found

    def encode(self, prepared: Sequence[Prepared]) -> Tensor:
        """Condition tokens (B,M,Cc) of prepared images, all from the same directions."""
        images = torch.stack([to_tensor(list(each.values())) for each in prepared]).to(self.device)
        with self._working(self.encoder):
            if isinstance(self.encoder, DinoV2) and self.encoder.config.views > 1:
                return self.encoder.encode_views(images, list(prepared[0]))
            return self.encoder(images[:, 0])

    def _compare(self, condition: Tensor, made: dict[int, Result], images: Sequence[ImageInput]) -> None:
        """Note how far images are from the training images, and warn of those far away."""
        if (known := self.familiarity) is None:
            return
        for (i, result), distance in zip(made.items(), known.distance(condition).tolist(), strict=True):
            result.metadata["image_distance"] = round(distance, 3)
            if text := known.warning(distance):
                result.warnings.append(text)
                name = f"{printable(image)}: " if isinstance(image := images[i], (str, Path)) else ""
                warnings.warn(f"{name}{text}", stacklevel=2)

    def sample_latents(
        self,
        condition: Tensor,
        seeds: Sequence[int],
        steps: int,
        guidance: float,
        elastic: ElasticConfig,
        on_step: OnStep | None = None,
        ensemble: int = 1,
    ) -> Tensor:
        """Condition tokens (B,M,Cc) -> latents (BK,N,C) in fp32, with K of an `ensemble` for each sample one after the
        other, from the sample's own generator."""
        cfg, session = self.dit.config, self.session
        condition = condition.repeat_interleave(ensemble, 0)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        if session is not None:
            session.settings, session.idle = elastic, int(self.config.grid in IDLE)
        times = sampling_times(self.config, steps)
        static = self.static and self.static.begin(condition, times, guidance)
        with self._working(self.dit):
            latents = sample(
                static or self.dit,
                condition,
                (cfg.num_latents, cfg.in_channels),
                times,
                guidance,
                [generator for generator in generators for _ in range(ensemble)],
                solver=self.config.solver,
                sequential=self.offload,
                guidance_embed=cfg.guidance_embed,
                session=None if static else session,
                one_branch=None if session is None else session.one_branch,
                on_step=on_step,
            )
        if self.offload and session is not None:
            session.forget()  # copies of blocks would stay on the device
        return latents

    def _decode(
        self, call: Call, latents: Tensor, made: dict[int, Result], ms: dict[str, float], max_points: int
    ) -> None:
        """Latents (B,K,N,C) -> the meshes of `made`, by their number in the call, or why there is none. `ms` is what
        the batch has taken so far; now all times of its results are known."""
        count, device = len(made), self.device
        box, resolution = self.config.box, call.config.resolution
        decode = replace(call.decode, resolution=resolution, box=box, max_points=max_points)
        others = call.ensemble if call.ensemble > 1 else 0  # fields that are combined first
        parts = others + len(resolutions_of(decode))

        def on_part(before: int, done: int, _: int) -> None:
            call.on_progress("decode", before + done, count * parts)

        with self._working(self.vae):
            with timed(ms, "decode", device), torch.no_grad():
                tokens = self.vae.decode(latents.flatten(0, 1)).split(call.ensemble)
            for row, (number, result) in enumerate(made.items()):
                tell, on_level = (partial(on_part, row * parts + before) for before in (0, others))
                took = {name: value / count for name, value in ms.items()}
                try:
                    with timed(took, "decode", device):
                        fields = [self.vae.field(each[None]) for each in tokens[row]]
                        args = call.images[number], call.foreground, decode, device, tell
                        field, found = combined(fields, call.combine, *args) if others else (fields[0], {})
                        result.metadata |= found
                        values, _ = decode_field(field, decode, device, on_level)
                    with timed(took, "surface", device):
                        values = reducible(values, call.cleanup.max_faces)
                        result.metadata["resolution"] = len(values) - 1
                        mesh = extract_surface(values, decode.box, decode.surface)
                    with timed(took, "cleanup", device):
                        result._mesh = clean(mesh, call.cleanup)
                except ValueError as error:
                    result.error = error if isinstance(error, UserError) else UserError(str(error))
                result.metadata["ms"] = {name: round(value, 1) for name, value in took.items()}
                call.on_progress("cleanup", row + 1, count)
                call.on_result(number, result)
