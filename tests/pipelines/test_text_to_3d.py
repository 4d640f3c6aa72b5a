"""Prompts: what the text-to-image model knows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from app import Drawer
from tiny_images import save_tiny_small
from tiny_pipeline import tiny_pipeline

from elastic3d.pipelines.options import GenerateConfig
from elastic3d.pipelines.text_to_3d import known_nouns, prompt_drawer, prompt_warning
from elastic3d.pipelines.text_to_image import TextToImagePipeline
from elastic3d.preparation.infinigen import FACTORIES
from elastic3d.serve.config import AppConfig
from elastic3d.utils.devices import DeviceChoice, DTypeChoice

BUNDLED = Path(__file__).resolve().parents[2] / "data/pretrained/image-small"


def test_the_bundled_model_knows_every_category_that_it_was_trained_on() -> None:
    nouns = known_nouns(BUNDLED)
    assert {name.replace("_", " ") for name in FACTORIES} <= set(nouns)
    assert nouns == sorted(set(nouns))


@pytest.mark.parametrize(
    "prompt", ["a red chair", "Two SHELVES, of oak", "a dining table.", "desk-lamp", "toilets"]
)
def test_a_prompt_with_a_known_noun_is_not_warned_about(prompt: str) -> None:
    assert prompt_warning(prompt, known_nouns(BUNDLED)) is None


@pytest.mark.parametrize("prompt", ["a dragon", "a chairman", "potato", "tablet"])
def test_a_prompt_without_one_is_told_what_there_is(prompt: str) -> None:
    warning = prompt_warning(prompt, known_nouns(BUNDLED))
    assert warning is not None and "armchair, bar chair" in warning


def test_a_model_without_a_list_warns_of_nothing(tmp_path: Path) -> None:
    assert prompt_warning("a dragon", known_nouns(tmp_path)) is None


def test_the_dense_model_is_kept_where_the_image_model_alone_has_routers() -> None:
    """A mesh model without routers may have a dial, whose default is not the dense model."""
    config = GenerateConfig(
        prompt="a chair", output="a.glb", elastic=False, few_step=None, device=DeviceChoice.cpu
    )
    _, left = prompt_drawer(config, tiny_pipeline())
    assert left.elastic is False
    _, left = prompt_drawer(replace(config, elastic=True, few_step=False), tiny_pipeline())
    assert left.elastic is None and left.few_step is None


def test_views_of_a_prompt_are_refused() -> None:
    with pytest.raises(ValueError, match="image_back= is for image=, but prompt= is given"):
        GenerateConfig(prompt="a chair", output="a.glb", image_back="b.png")


def test_the_image_model_has_the_number_format_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a command, and of the web app."""
    small = str(save_tiny_small(tmp_path))
    found: list[TextToImagePipeline] = []
    load = TextToImagePipeline.from_pretrained
    monkeypatch.setattr(
        TextToImagePipeline, "from_pretrained", lambda *a, **k: found.append(load(*a, **k)) or found[-1]
    )
    options = {"device": DeviceChoice.cpu, "dtype": DTypeChoice.bfloat16}
    config = GenerateConfig(prompt="a chair", output="a.glb", image_model=small, **options)
    prompt_drawer(config, tiny_pipeline())
    Drawer(AppConfig(**options), [])._load(small)
    assert [each.backbone.transformer.dtype for each in found] == [torch.bfloat16] * 2


def test_the_image_is_the_same_within_inference_mode() -> None:
    """Where tensors keep no version, by which a stale few-step LoRA is found."""
    plain, within = [], []
    for images, mode in ((plain, False), (within, True)):
        with torch.inference_mode(mode):
            pipeline = TextToImagePipeline.from_pretrained(BUNDLED, device="cpu", dtype="float32")
            images += [pipeline(["a chair"], [0], steps=steps)[0].image for steps in (3, 4)]
    np.testing.assert_array_equal(plain, within)
