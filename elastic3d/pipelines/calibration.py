"""Calibrates the training-free policy of a model on a handful of images, or of prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from elastic3d.elastic.calibrating import CALIBRATION_NAME, calibrate, put_policy, save_calibration
from elastic3d.elastic.config import ElasticConfig
from elastic3d.elastic.training_free import Calibration
from elastic3d.geometry.options import CleanupConfig, DecodeConfig
from elastic3d.models.options import ForegroundConfig
from elastic3d.pipelines.conditions import encode, prepare
from elastic3d.pipelines.generation import find_images
from elastic3d.pipelines.options import (
    DEFAULT_IMAGE_MODEL,
    DEFAULT_MODEL,
    NO_ROUTERS_NAME,
    CalibratePolicyConfig,
    GenerateConfig,
    parse_size,
)
from elastic3d.pipelines.published import calibration_home, load_pipeline
from elastic3d.pipelines.result import Settings
from elastic3d.pipelines.text_to_image import TextToImagePipeline, check_prompt, read_prompts

DENSE = ElasticConfig(elastic=False)


def calibrate_policy(
    config: CalibratePolicyConfig, repository: Path, on_sample: Callable[[int, int], None] = lambda *_: None
) -> tuple[Path, Calibration]:
    """Generate the samples densely and write what was found -> its file, and the calibration.

    `repository` is where the bundled models are; `on_sample(done, samples)` is called with each.

    Raises:
        UserError: no image, no prompt, a model that can't be loaded, generations of fewer than three steps.
    """
    made = _of_images if config.prompts else _of_meshes
    return made(config, repository, on_sample)


def target_file(config: CalibratePolicyConfig, repository: Path) -> Path:
    """The file that is written."""
    if config.output.endswith(".json"):
        return Path(config.output)
    if config.output:
        return Path(config.output) / CALIBRATION_NAME
    if config.prompts:
        return Path(config.weights or repository / DEFAULT_IMAGE_MODEL) / CALIBRATION_NAME
    return calibration_home(_mesh_options(config), repository / DEFAULT_MODEL) / CALIBRATION_NAME


def _of_meshes(
    config: CalibratePolicyConfig, repository: Path, on_sample: Callable[[int, int], None]
) -> tuple[Path, Calibration]:
    images = _spread(find_images(config.image), config.samples)
    pipeline = load_pipeline(_mesh_options(config), repository / DEFAULT_MODEL, 1)
    steps = pipeline.config.steps if config.steps is None else config.steps
    guidance = pipeline.config.guidance if config.guidance is None else config.guidance
    settings = Settings(steps, guidance, DecodeConfig(), CleanupConfig(), ForegroundConfig(), DENSE)
    inputs = [prepare(image, settings.foreground, pipeline.encoder) for image in images]
    with pipeline.placement.use(pipeline.encoder):
        condition = encode(inputs, pipeline.encoder, pipeline.device)
    put_policy(pipeline.dit)

    def generate(number: int) -> Tensor:
        return pipeline.sample_latents(condition[number : number + 1], [config.seed + number], settings)

    with pipeline.placement.use(pipeline.dit):
        found = calibrate(pipeline.dit, generate, len(images), guidance, on_sample)
    path = target_file(config, repository)
    save_calibration(found, path)
    return path, found


def _of_images(
    config: CalibratePolicyConfig, repository: Path, on_sample: Callable[[int, int], None]
) -> tuple[Path, Calibration]:
    prompts = _spread(read_prompts(Path(config.prompts)), config.samples)
    pipeline = TextToImagePipeline.from_pretrained(
        config.backbone, config.weights or repository / DEFAULT_IMAGE_MODEL, NO_ROUTERS_NAME,
        device=config.device, dtype=config.dtype, offload=config.offload,
    )  # fmt: skip
    for prompt in prompts:
        check_prompt(prompt, pipeline.backbone)
    settings = pipeline.settings_of(config.steps, config.guidance, parse_size(config.size))
    session = put_policy(pipeline.backbone.pipe)
    session.settings = DENSE

    def generate(number: int) -> Tensor:
        text = pipeline.encode(prompts[number : number + 1])
        rest = pipeline.backbone.guidance_arguments(settings.guidance, 1)
        return pipeline.sample(text, rest, [config.seed + number], settings)

    found = calibrate(pipeline.backbone.transformer, generate, len(prompts), settings.guidance, on_sample)
    path = target_file(config, repository)
    save_calibration(found, path)
    return path, found


def _mesh_options(config: CalibratePolicyConfig) -> GenerateConfig:
    """The model's options as a generation has them, without routers and without a calibration of earlier."""
    names = (
        "image",
        "model",
        "weights",
        "subfolder",
        "vae_subfolder",
        "dinov2",
        "device",
        "dtype",
        "low_memory",
    )
    given = {name: getattr(config, name) for name in names}
    return GenerateConfig(**given, output="-", routers=NO_ROUTERS_NAME)


def _spread(items: list[Any], count: int) -> list[Any]:
    """At most `count` of the items, at even distances."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]
