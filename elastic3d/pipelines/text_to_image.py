"""Text to image: a stock diffusers pipeline, elastic where it has routers, with metadata for every image."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from elastic3d import __version__
from elastic3d.diffusion.dial import IMAGES, Dial, choose, load_dial
from elastic3d.diffusion.options import PipelineConfig, Quality
from elastic3d.elastic.attachment import (
    adapter_for,
    attach,
    find_session,
    has_routers,
    holds_routers,
)
from elastic3d.elastic.config import ElasticConfig, ElasticOptions
from elastic3d.elastic.families import dense_flops
from elastic3d.elastic.few_step import least_default
from elastic3d.elastic.session import ElasticSession
from elastic3d.elastic.training_free import check_budget, put_policy
from elastic3d.errors import UserError
from elastic3d.models.weights import find_weights
from elastic3d.pipelines.backbones import BACKBONES, Backbone, Text
from elastic3d.pipelines.image_loading import (
    INDEX_NAME,
    check_index,
    first_line,
    load_transformer,
    merge_lora,
    quiet,
    weight_files,
)
from elastic3d.pipelines.options import MAX_PIXELS, MAX_PROMPT, NO_ROUTERS_NAME, BackboneName
from elastic3d.pipelines.runtime import (
    find_model,
    named_routers,
    resolve_device,
    resolve_dtype,
    routes_of,
    seeds_of,
    timed,
    turn,
)
from elastic3d.pipelines.training_free import calibration_file, find_calibration
from elastic3d.utils.devices import DeviceChoice, DTypeChoice
from elastic3d.utils.files import file_sha256, load_json
from elastic3d.utils.options import Bounds, check_range, checked, shown

ROUTERS_NAME = "routers"


@dataclass
class Settings:
    """What one call asks for, defaults filled in; `size` is width, height; `dial`: metadata of that name, empty where
    the dial is not asked."""

    steps: int
    guidance: float
    size: tuple[int, int]
    elastic: ElasticConfig
    dial: dict[str, Any] = field(default_factory=dict)


@dataclass
class ImageResult:
    """One image and its metadata: version, model, seed, steps, FLOPs, milliseconds, ..."""

    image: Image.Image
    metadata: dict[str, Any]


class TextToImagePipeline:
    """A prompt becomes an image. `backbone` knows the pipeline's family; its transformer may have routers."""

    def __init__(self, backbone: Backbone, model: str, weights_sha256: Future[str] | None = None) -> None:
        """`model` is its name, for metadata."""
        self.backbone, self.model = backbone, model
        self._digest = weights_sha256
        self.calibration: Path | None = None  # file or folder of what keeps a budget without routers
        self.dial: Dial | None = None  # what a budget becomes; None: the budget is the routers' own

    @property
    def weights_sha256(self) -> str | None:
        """Of the files it was loaded from; waits for the digest. None where it was not loaded from files."""
        return self._digest.result() if self._digest else None

    @property
    def session(self) -> ElasticSession | None:
        """Of the transformer's routers, or of its policy once a budget was set; None where it has neither."""
        return find_session(self.backbone.transformer)

    @classmethod
    @torch.inference_mode(False)  # where tensors keep no version, by which stale weights are found
    def from_pretrained(
        cls,
        backbone: BackboneName | str | Path,
        weights: str | Path | None = None,
        routers: str | Path | None = None,
        lora: str | Path | None = None,
        device: DeviceChoice | torch.device | str = "auto",
        dtype: DTypeChoice | torch.dtype | str = "auto",
        offload: bool = False,
        calibration: str | Path | None = None,
        dial: bool = True,
    ) -> TextToImagePipeline:
        """The pipeline in a folder, with routers on it if there are any.

        Args:
            backbone: family of the pipeline; without `weights` the folder of a small one, or the name of the bundled
                one: "image-small".
            weights: folder in the layout in which the pipeline is published.
            routers: folder of routers, or its name in the folder of the weights; None takes `routers` there, if there
                is one; "none" leaves them out.
            lora: a safetensors file that is merged into the weights.
            offload: parts of the pipeline wait in main memory for their turn on the GPU.
            calibration: file or folder of the calibration for a budget without routers; None: that of the weights.
            dial: False leaves out the model's dial, as for measurements; so do `routers`, `lora` and `calibration`,
                which it was not measured with.

        Raises:
            UserError: a folder that is broken or something else, routers of another model, a block that can't be
                routed, a device that is not there.
        """
        if weights is None:
            if isinstance(backbone, BackboneName):
                raise UserError(f"weights are missing: the folder of a {backbone.name} pipeline")
            weights, backbone = backbone, BackboneName.small
        elif not isinstance(backbone, BackboneName):
            backbone = backbone_named(str(backbone))
        folder, target = find_model(weights), resolve_device(device)
        if offload and target.type == "cpu":
            raise UserError("offload is true, but the pipeline runs on the CPU: expected a GPU (device=cuda)")
        dial = dial and (routers, lora, calibration) == (None, None, None)
        routers = chosen_routers(folder, routers, calibration)
        home = torch.device("cpu") if offload else target
        found = load_backbone(backbone, folder, home, resolve_dtype(dtype, target))
        files = weight_files(folder)
        if routers is not None:
            files.append(_attach(found.pipe, Path(routers), folder))
        if lora is not None:
            files.append(merge_lora(found.pipe, Path(lora)))
        if offload:
            found.pipe.enable_model_cpu_offload(device=target)
        pool = ThreadPoolExecutor(1)  # 24 GB take a while: hash them while the images are made
        digest = pool.submit(file_sha256, *files)
        pool.shutdown(wait=False)
        pipeline = cls(found, folder.resolve().name, digest)
        pipeline.calibration = Path(calibration or folder)
        if dial:
            pipeline._load_dial(folder)
        return pipeline

    def _load_dial(self, folder: Path) -> None:
        """Take the dial in the model's folder, if there is one."""
        steps, scale = self.backbone.default_sampling()
        config = self.session.router_config if self.session else None
        self.dial = load_dial(folder, PipelineConfig(steps=steps, guidance=scale), config, IMAGES)

    @torch.inference_mode(False)
    def __call__(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        quality: Quality | str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        size: tuple[int, int] | None = None,
        on_step: Callable[[int, int], None] | None = None,
        **elastic: Any,
    ) -> list[ImageResult]:
        """An image of each prompt with its seed, as one batch; a sample does not depend on its batch, unless `shared`.

        Args:
            quality: `fast`, `default` or `best`, points of the model's dial in the place of a budget.
            steps, guidance: None is the family's default; a guidance of 1 or less runs one branch. With `steps`, a
                budget is a share of that many dense steps; without, of the default ones, where the model has a dial.
            size: width and height in pixels.
            on_step: called with (steps done, steps) during sampling.
            elastic: `budget=` and whatever else `ElasticOptions` has.

        Raises:
            UserError: a prompt that is empty, too long or no text, a value out of range, or an image with values
                that are not finite.
        """
        if isinstance(prompts, str):
            raise UserError(f"prompts is {shown(prompts)}, expected a list of prompts")
        prompts = list(prompts)
        if len(prompts) != len(seeds) or not prompts:
            raise UserError(
                f"{len(seeds)} seeds for {len(prompts)} prompts, expected as many, and at least one"
            )
        seeds = seeds_of(seeds, len(prompts))
        for prompt in dict.fromkeys(prompts):
            check_prompt(prompt, self.backbone)
        settings = self.configured(ElasticOptions(**elastic), quality, steps, guidance, size)
        with turn(self.backbone.transformer):  # threads that share a model take turns
            return self._generate(prompts, seeds, settings, on_step)

    def _generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: Settings,
        on_step: Callable[[int, int], None] | None,
    ) -> list[ImageResult]:
        if (
            settings.elastic.elastic and self.session is None
        ):  # the first call with a budget brings the policy
            put_policy(self.backbone.pipe, find_calibration(self.calibration, self.backbone.transformer))
        if self.session is not None:
            self.session.settings = settings.elastic
        ms, device = dict[str, float](), self.backbone.pipe._execution_device
        with timed(ms, "condition", device):
            text = self.encode(prompts)
            rest = self.backbone.guidance_arguments(settings.guidance, len(prompts))
        with timed(ms, "dit", device):
            latents = self.sample(text, rest, seeds, settings, on_step)
        with timed(ms, "decode", device), torch.no_grad():
            images = [self._image(row[None], settings.size) for row in latents]
        self.backbone.pipe.maybe_free_model_hooks()
        metadata_list = self._metadata_list(prompts, seeds, settings, ms, latents.shape[1], text, rest)
        return [ImageResult(image, metadata) for image, metadata in zip(images, metadata_list, strict=True)]

    def settings_of(
        self, steps: int | None, guidance: float | None, size: tuple[int, int] | None
    ) -> Settings:
        """What a call asks for, defaults filled in; UserError for a value out of range."""
        backbone, (usual_steps, usual_guidance) = self.backbone, self.backbone.default_sampling()
        steps = usual_steps if steps is None else steps
        guidance = usual_guidance if guidance is None else guidance
        checked("steps", steps, int, Bounds(ge=backbone.fewest_steps, le=1000))
        check_range("guidance", guidance, 0.0, 100.0)
        size = size or (backbone.default_size,) * 2
        sides = Bounds(ge=backbone.multiple, le=MAX_PIXELS, lengths=(2, 2))
        checked("size", size, list[int], sides)
        if any(side % backbone.multiple for side in size):
            raise UserError(f"size is {size[0]}x{size[1]}, expected multiples of {backbone.multiple}")
        return Settings(steps, guidance, size, ElasticConfig())

    def configured(
        self,
        requested: ElasticOptions,
        quality: Quality | str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        size: tuple[int, int] | None = None,
    ) -> Settings:
        """What a call runs, over the model's default, by a row of the dial if there is one. UserError out of range."""
        named: Quality | None = checked("quality", quality, Quality | None)
        row, dial = choose(self.dial, requested, steps, named, guidance), dict[str, Any]()
        if row is not None:
            requested, dial = row.over(requested, named)
            steps = row.steps
        settings, routed = self.settings_of(steps, guidance, size), has_routers(self.backbone.transformer)
        least = 0.0
        if self.session is not None and routed:
            times = self.backbone.times(settings.steps, settings.size).tolist()[:-1]
            least = least_default(
                self.session.router_config, times, None
            )  # as the driver of diffusers' loops begins
        settings.dial, settings.elastic = dial, requested.over(self.backbone.default_elastic(), routed, least)
        if settings.elastic.elastic and not routed:
            check_budget(settings.elastic.budget, settings.steps)
        return settings

    def encode(self, prompts: Sequence[str]) -> Text:
        """Arguments of the stock pipeline (B, ...); each different prompt is encoded once."""
        different = list(dict.fromkeys(prompts))
        rows = torch.tensor([different.index(prompt) for prompt in prompts])
        text = self.backbone.encode_prompts(different)
        return {name: value[rows.to(value.device)] for name, value in text.items()}

    def sample(
        self,
        text: Text,
        rest: dict[str, Any],
        seeds: Sequence[int],
        settings: Settings,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """The transformer alone: latents (B,N,C), sample b from its own generator.

        `rest` are the backbone's guidance arguments; `settings.elastic` is for the caller to give to the session.
        """

        def after_step(pipe: Any, index: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
            if on_step is not None:
                on_step(index + 1, settings.steps)
            return values

        try:
            return self.backbone.pipe(
                **text,
                **rest,
                width=settings.size[0],
                height=settings.size[1],
                num_inference_steps=settings.steps,
                max_sequence_length=self.backbone.longest,  # Qwen-Image's pipeline would cut prompts at 512
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                callback_on_step_end=after_step,
                output_type="latent",
                return_dict=False,
            )[0]
        finally:
            if self.session is not None:
                self.session.end()

    def _image(self, latents: Tensor, size: tuple[int, int]) -> Image.Image:
        """Latents (1,N,C) -> RGB."""
        values = self.backbone.decode(latents, size)[0].float()
        if not values.isfinite().all():
            raise UserError("the image has values that are not finite: try dtype=float32")
        pixels = (255 * values.clamp(0, 1)).round().byte().permute(1, 2, 0)
        return Image.fromarray(pixels.cpu().numpy())

    def _metadata_list(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: Settings,
        ms: dict[str, float],
        tokens: int,
        text: Text,
        rest: dict[str, Any],
    ) -> list[dict[str, Any]]:
        elastic = settings.elastic
        lengths = [text["prompt_embeds"].shape[1]]
        if "negative_prompt_embeds" in rest:
            lengths.append(rest["negative_prompt_embeds"].shape[1])
        transformer = self.backbone.transformer
        passes = [dense_flops(transformer, adapter_for(transformer), [tokens, n]) for n in lengths]
        dense = settings.steps * sum(passes)
        default = self.backbone.default_sampling()[0] * sum(passes)
        of_default = {"flops_dense": default} if self.dial else {}  # a dial's costs are shares of it
        metadata_list = []
        routes = routes_of(self.session, elastic, len(prompts))
        for prompt, seed, route in zip(prompts, seeds, routes, strict=True):
            metadata: dict[str, Any] = {
                "version": __version__,
                "model": self.model,
                "weights_sha256": self.weights_sha256,
                "backbone": self.backbone.name.name,
                "prompt": prompt,
                "seed": seed,
                "steps": settings.steps,
                "guidance": settings.guidance,
                "resolution": list(settings.size),
                "budget": elastic.budget if elastic.elastic else 1.0,
                "flops_executed": dense,
                "flops_dense": dense,
                **settings.dial,
                **route,
                **of_default,
            }
            metadata["ms"] = {name: round(value / len(prompts), 1) for name, value in ms.items()}
            metadata_list.append(metadata)
        return metadata_list


def _attach(pipe: Any, routers: Path, folder: Path) -> Path:
    """Put routers on a pipeline -> the file of their weights. UserError where its blocks can't be routed."""
    try:
        attach(pipe, routers)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{folder} can't be routed: {error}") from error
    return find_weights(routers)


def load_backbone(
    name: BackboneName, weights: str | Path, device: torch.device, dtype: torch.dtype, encoders: bool = True
) -> Backbone:
    """The pipeline in a folder, on `device`, its progress bars off; without text encoders where they aren't needed.

    Raises:
        UserError: the folder is no pipeline, or one of another family; a file is missing, broken, a pickle, or does
            not fit. Nothing is downloaded.
    """
    folder = Path(weights)
    if name is BackboneName.small:
        with quiet():
            from elastic3d.pipelines.pixel_flux import SmallBackbone, load_pixel_flux

        return SmallBackbone(load_pixel_flux(folder, device, dtype, encoders))
    family = BACKBONES[name]
    check_index(folder, family.pipeline_class)
    try:
        with quiet():
            import diffusers

            parts: dict[str, Any] = {"transformer": load_transformer(folder, dtype)}
            if not encoders:
                names = load_json(folder / INDEX_NAME)
                parts |= {name: None for name in names if name.startswith(("text_", "tokenizer"))}
            pipe = getattr(diffusers, family.pipeline_class).from_pretrained(
                folder, **parts, torch_dtype=dtype, local_files_only=True, use_safetensors=True
            )
    except UserError:
        raise
    except Exception as error:  # loaders of broken folders raise anything
        raise UserError(
            f"{folder} can't be loaded as a {family.pipeline_class}: {first_line(error)}"
        ) from error
    pipe.set_progress_bar_config(disable=True)
    return family(pipe.to(device))


def chosen_routers(
    folder: Path, routers: str | Path | None, calibration: str | Path | None
) -> str | Path | None:
    """The folder of routers that a pipeline gets, None for none. UserError for a calibration that is missing, or beside
    routers."""
    if routers is None and holds_routers(folder / ROUTERS_NAME):
        routers = folder / ROUTERS_NAME
    elif routers == NO_ROUTERS_NAME:
        routers = None
    elif routers is not None:
        routers = named_routers(folder, routers)
    if calibration is not None:
        path = calibration_file(calibration)
        if routers is not None:
            raise UserError(f"calibration is {path}, but the pipeline has routers: expected routers=none")
    return routers


def backbone_named(name: str) -> BackboneName:
    """The family of that name; UserError where there is none."""
    if name not in BackboneName.__members__:
        raise UserError(f"backbone is {name!r}, expected one of {', '.join(BackboneName.__members__)}")
    return BackboneName[name]


def check_prompt(prompt: object, backbone: Backbone) -> None:
    """Raise UserError for a prompt that is empty, no text, or longer than the text encoder reads."""
    if not isinstance(prompt, str):
        raise UserError(f"the prompt is a {type(prompt).__name__}, expected text")
    if not prompt.strip():
        raise UserError("the prompt is empty, expected a few words")
    # Not what Unicode has not assigned: this Python may be older than an emoji.
    bad = next((c for c in prompt if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t\r"), None)
    if bad is not None:
        raise UserError(f"the prompt is no text: it has the character {ord(bad):#x} in it")
    if len(prompt) > MAX_PROMPT:
        raise UserError(f"the prompt has {len(prompt)} characters, expected at most {MAX_PROMPT}")
    count = backbone.count_tokens(prompt)
    if count > backbone.longest:
        raise UserError(f"the prompt has {count} tokens, expected at most {backbone.longest}")


def read_prompts(path: Path) -> list[str]:
    """The lines of a file, without blank ones and # comments. UserError: no file, no text, no prompt, or one twice."""
    if not path.is_file():
        raise UserError(f"prompts is {path}, which is no file: expected a text file, one prompt a line")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise UserError(f"prompts is {path}, which is no text file (UTF-8)") from error
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise UserError(f"prompts is {path}, which holds no prompt")
    for prompt in found:
        if found.count(prompt) > 1:
            raise UserError(f"{path} has the prompt {prompt!r} twice")
    return found
