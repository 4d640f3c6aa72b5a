"""Calibrates the training-free policy of a model on a handful of images, or of prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from elastic3d.elastic.calibrating import CALIBRATION_NAME, calibrate, put_policy, save_calibration
from elastic3d.elastic.config import ElasticConfig
from elastic3d.elastic.training_free import Calibration
from elastic3d.models.images import prepare
from elastic3d.models.options import ForegroundConfig
from elastic3d.pipelines.generation import find_images, load_pipeline
from elastic3d.pipelines.options import (
    DEFAULT_IMAGE_MODEL,
    NO_ROUTERS_NAME,
    CalibratePolicyConfig,
    GenerateConfig,
    parse_size,
)
from elastic3d.pipelines.published import calibration_home
from elastic3d.pipelines.runtime import find_model
from elastic3d.pipelines.text_to_image import TextToImagePipeline, check_prompt, read_prompts

DENSE = ElasticConfig(elastic=False)


def calibrate_policy(
    config: CalibratePolicyConfig, on_sample: Callable[[int, int], None] = lambda *_: None
) -> tuple[Path, Calibration]:
    """Generate the samples densely and write what was found -> its file, and the calibration.

    `on_sample(done, samples)` is called with each.

    Raises:
        UserError: no image, no prompt, a model that can't be loaded, generations of fewer than three steps.
    """
    found = (_of_images if config.prompts else _of_meshes)(config, on_sample)
    path = target_file(config)
    save_calibration(found, path)
    return path, found


def target_file(config: CalibratePolicyConfig) -> Path:
    """The file that is written."""
    if config.output.endswith(".json"):
        return Path(config.output)
    if config.output:
        return Path(config.output) / CALIBRATION_NAME
    if config.prompts:
        return find_model(config.weights or DEFAULT_IMAGE_MODEL) / CALIBRATION_NAME
    return calibration_home(_mesh_options(config)) / CALIBRATION_NAME


def _of_meshes(config: CalibratePolicyConfig, on_sample: Callable[[int, int], None]) -> Calibration:
    images = _spread(find_images(config.image), config.samples)
    pipeline = load_pipeline(_mesh_options(config))
    steps = pipeline.config.steps if config.steps is None else config.steps
    guidance = pipeline.config.guidance if config.guidance is None else config.guidance
    condition = pipeline.encode([prepare(image, ForegroundConfig(), pipeline.encoder) for image in images])
    put_policy(pipeline.dit)

    def generate(number: int) -> Tensor:
        one, seeds = condition[number : number + 1], [config.seed + number]
        return pipeline.sample_latents(one, seeds, steps, guidance, DENSE)

    return calibrate(pipeline.dit, generate, len(images), guidance, on_sample)


def _of_images(config: CalibratePolicyConfig, on_sample: Callable[[int, int], None]) -> Calibration:
    prompts = _spread(read_prompts(Path(config.prompts)), config.samples)
    pipeline = TextToImagePipeline.from_pretrained(
        config.backbone, config.weights or DEFAULT_IMAGE_MODEL, NO_ROUTERS_NAME,
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

    return calibrate(pipeline.backbone.transformer, generate, len(prompts), settings.guidance, on_sample)


def _mesh_options(config: CalibratePolicyConfig) -> GenerateConfig:
    """The model's options as a generation has them, without routers and without a calibration of earlier."""
    names = [
        "image",
        "model",
        "weights",
        "subfolder",
        "vae_subfolder",
        "dinov2",
        "device",
        "dtype",
        "low_memory",
    ]
    given = {name: getattr(config, name) for name in names}
    return GenerateConfig(**given, output="-", routers=NO_ROUTERS_NAME)


def _spread(items: list[Any], count: int) -> list[Any]:
    """At most `count` of the items, at even distances."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]
