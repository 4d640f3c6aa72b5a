"""The estimates of the documentation are what the cost model says of published models: FLOPs and memory by shape, time
by an assumed speed."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch

from elastic3d.checkpoints.bundle import on_meta, parameter_count
from elastic3d.checkpoints.options import OPEN_MODELS, PRESETS
from elastic3d.elastic import adapter_for, attach
from elastic3d.elastic.attachment import router_modules
from elastic3d.elastic.families import dense_flops
from elastic3d.pipelines.memory import GB, LOW_MEMORY_CHUNK, memory_need
from elastic3d.pipelines.runtime import pass_flops
from elastic3d.studies.full_size import published

SUSTAINED = 150e12
"""Assumed FLOPs a second in half precision: about what a large data-centre GPU reaches in such models."""
BUDGETS = (1.0, 0.7, 0.5, 0.3)
DINOV2 = {1536: 1_136_480_768, 1024: 304_368_640}  # parameters by width: giant, large
DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE, TRAINING = (DOCS / "images.md").read_text(), (DOCS / "per-block-routers.md").read_text()
# The published configurations differ from the classes' defaults in this alone.
MODELS = {
    "FLUX.1-dev": ("FluxTransformer2DModel", {"guidance_embeds": True}, 4096, 512, 28),
    "Qwen-Image": ("QwenImageTransformer2DModel", {}, 4096, 128, 100),
}


@dataclass(frozen=True)
class Estimate:
    """One mesh: FLOPs of the DiT's blocks, their seconds at `SUSTAINED`, and bytes at the worst moment."""

    flops: float
    seconds: float
    memory: int
    low_memory: int


def estimate(name: str, budget: float) -> Estimate:
    """What one mesh of a preset costs at a budget, in half precision. Routers, embeddings and decoding are left out."""
    flops, *memory = whole(name)
    return Estimate(budget * flops, budget * flops / SUSTAINED, *memory)


@cache
def whole(name: str) -> tuple[float, int, int]:
    """FLOPs of one mesh at the full budget, and bytes with and without all parts in memory."""
    model = published(name)
    dit = model.dit
    one_pass = sum(block.dense for block in pass_flops(on_meta(dit), dit.condition_tokens))
    parameters = {
        "condition": DINOV2[dit.condition_channels],
        "dit": parameter_count(dit),
        "decode": parameter_count(model.vae),
    }

    def peak(low: bool) -> int:
        need = memory_need(
            dit,
            model.vae,
            parameters,
            torch.bfloat16,
            rows=1 if low or dit.guidance_embed else 2,
            resolution=model.resolution,
            max_points=LOW_MEMORY_CHUNK if low else 65536,
            encoder_width=dit.condition_channels,
            encoder_tokens=dit.condition_tokens,
        )
        return need.peak(offload=low)

    return model.passes * one_pass, peak(False), peak(True)


def table(names: Sequence[str]) -> str:
    """The estimates of some presets at every budget, in Markdown."""
    lines = [
        "| model | budget | DiT, PFLOP a mesh | DiT, s a mesh | memory, GB | with `low_memory=true`, GB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in names:
        for budget in BUDGETS:
            e = estimate(name, budget)
            memory = f"{e.memory / GB:.1f} | {e.low_memory / GB:.1f}"
            lines.append(f"| {name} | {budget:g} | {e.flops / 1e15:.3f} | {e.seconds:.2f} | {memory} |")
    return "\n".join(lines)


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


def test_budgets_scale_the_cost() -> None:
    full, half = estimate("hunyuan3d2", 1.0), estimate("hunyuan3d2", 0.5)
    assert half.flops == full.flops / 2 and half.memory == full.memory > full.low_memory
    assert full.flops == pytest.approx(98 * 9.25e12, rel=0.05)
    assert published("hunyuan3d2_turbo").passes == 5


@pytest.mark.parametrize("page", ["hunyuan3d", "open-models"])
def test_tables_of_published_models(page: str) -> None:
    names = [name for name in PRESETS if (name in OPEN_MODELS) == (page == "open-models")]
    found = (DOCS / f"{page}.md").read_text()
    assert table(names) in found, f"docs/{page}.md needs this table:\n{table(names)}"
