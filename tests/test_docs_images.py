"""The estimates of docs/images.md and docs/per-block-routers.md are what the cost model says of published models."""

import re
from pathlib import Path

import pytest
import torch

from elastic3d.elastic import adapter_for, attach
from elastic3d.elastic.attachment import router_modules
from elastic3d.elastic.families import dense_flops
from elastic3d.pipelines.estimates import SUSTAINED

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE, TRAINING = (DOCS / "images.md").read_text(), (DOCS / "per-block-routers.md").read_text()
# The published configurations differ from the classes' defaults in this alone.
MODELS = {
    "FLUX.1-dev": ("FluxTransformer2DModel", {"guidance_embeds": True}, 4096, 512, 28),
    "Qwen-Image": ("QwenImageTransformer2DModel", {}, 4096, 128, 100),
}


def row(name: str) -> list[float]:
    """Numbers of a model's row in the table of estimates."""
    line = next(line for line in PAGE.splitlines() if line.startswith(f"| {name} |"))
    return [float(cell) for cell in re.findall(r"\| ([\d.]+)", line)]


@pytest.mark.parametrize("name", MODELS)
def test_estimates(name):
    import diffusers

    class_name, options, tokens, text, passes = MODELS[name]
    with torch.device("meta"):
        model = getattr(diffusers, class_name)(**options)
    parameters = sum(p.numel() for p in model.parameters())
    flops = dense_flops(model, adapter_for(model), [tokens, text])
    session = attach(model)
    routers = sum(p.numel() for p in router_modules(model).parameters())
    assert len(session.blocks) == row(name)[1]
    expected = [
        parameters / 1e9, len(session.blocks), 2 * parameters / 1e9, routers / 1e6, flops / 1e12,
        passes * flops / 1e15, passes * flops / 0.4e15, passes * flops / 2 / 0.4e15,
    ]  # fmt: skip
    assert row(name) == pytest.approx(expected, rel=0.01)
    samples, each, seconds = re.search(rf"\| {name}.* (\d+) x (\d+) \|.*\| (\d+) s \|", TRAINING).groups()
    gpus, times = 8, 4  # forward, recomputed, and twice backward
    update = int(samples) * int(each) * times * flops / (gpus * SUSTAINED)
    assert int(seconds) == pytest.approx(update, rel=0.01)
