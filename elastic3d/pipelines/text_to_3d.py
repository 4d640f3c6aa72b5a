"""Text to mesh: an image of the prompt, then a mesh of the image, both under one budget."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from elastic3d.elastic.config import MIN_BUDGET, ElasticOptions
from elastic3d.models.images import save_image
from elastic3d.pipelines.generation import Draw, Job
from elastic3d.pipelines.image_to_3d import ImageTo3DPipeline
from elastic3d.pipelines.options import DEFAULT_IMAGE_MODEL, GenerateConfig
from elastic3d.pipelines.runtime import find_model
from elastic3d.pipelines.text_to_image import TextToImagePipeline, check_prompt
from elastic3d.utils.files import read_text

NOUNS_NAME = "nouns.txt"


def prompt_drawer(config: GenerateConfig, pipeline: ImageTo3DPipeline) -> tuple[Draw, GenerateConfig]:
    """What draws the prompt of a job, and the options that are left for the mesh's own model.

    Both models follow the elastic options; beside one that has routers, one without keeps the budget alone. The image's
    model takes no budget below 0.3, and `quality=` is the mesh's alone. Warns of a prompt that it does not know.

    Raises:
        UserError: `image_model` is no small text-to-image model, or the prompt is none.
    """
    weights = config.image_model or DEFAULT_IMAGE_MODEL
    # without its dial: a budget at which a mesh is good is one at which thin parts of the image are gone
    images = TextToImagePipeline.from_pretrained(
        weights, device=config.device, dtype=config.dtype, dial=False
    )
    check_prompt(config.prompt, images.backbone)
    if text := prompt_warning(config.prompt, known_nouns(weights)):
        warnings.warn(text, stacklevel=1)  # named by its sentence alone
    wanted = ElasticOptions.of(config)
    if config.budget is not None:  # the mesh's model may have a dial, which goes lower than routers do
        wanted["budget"] = max(config.budget, MIN_BUDGET)
    options = wanted
    if images.session is not None and pipeline.session is None:
        dense = False if config.elastic is False else None
        config = replace(config, elastic=dense, width=None, cache=None, shared=None, few_step=None)
    elif images.session is None and pipeline.session is not None:
        options = {"budget": wanted["budget"]}

    def draw(jobs: Sequence[Job]) -> list[Job]:
        results = images([job.prompt for job in jobs], [job.seed for job in jobs], **options)
        for job, result in zip(jobs, results, strict=True):
            save_image(result.image, job.drawing, result.metadata)
        return [replace(job, drawn=result) for job, result in zip(jobs, results, strict=True)]

    return draw, config


def known_nouns(weights: str | Path = DEFAULT_IMAGE_MODEL) -> list[str]:
    """What a model's training captions name, one a line in `nouns.txt` beside it; empty where there is no such file."""
    path = find_model(weights) / NOUNS_NAME
    if not path.is_file():
        return []
    return [line.strip() for line in read_text(path, "a list of nouns").splitlines() if line.strip()]


def prompt_warning(prompt: str, nouns: Sequence[str]) -> str | None:
    """One sentence for a prompt that names nothing that the model was trained on; None where it does."""
    words = " " + " ".join(re.findall(r"[a-z]+", prompt.lower())) + " "
    if not nouns or any(f" {form} " in words for noun in nouns for form in _forms(noun)):
        return None
    return f"the prompt names nothing that the text-to-image model knows, which is: {', '.join(nouns)}"


def _forms(noun: str) -> tuple[str, ...]:
    """A noun and its plural."""
    plural = f"{noun[:-1]}ves" if noun.endswith("f") else f"{noun}es" if noun.endswith("h") else f"{noun}s"
    return noun, plural
