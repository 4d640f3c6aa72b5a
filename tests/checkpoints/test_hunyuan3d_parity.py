"""The same numbers as the original program: against stored ones everywhere, against hy3dgen where it is installed."""

from __future__ import annotations

from pathlib import Path

import hunyuan_reference as original
import pytest
import torch
from hunyuan_tiny import CASES, CHANNELS, LATENTS, write_checkpoint
from safetensors.torch import load_file
from torch import Tensor

from elastic3d.checkpoints.hunyuan3d import load_hunyuan3d
from elastic3d.diffusion.sampler import sample, sampling_times

TOLERANCE = 1e-4


def ours(case: str, root: Path) -> dict[str, Tensor]:
    """What this project computes from the checkpoint of a case."""
    bundle = load_hunyuan3d(write_checkpoint(root, case))
    given = original.inputs(case)
    conditioner = bundle.conditioner
    assert conditioner is not None and not bundle.note
    guidance = given["guidance"] if case == "turbo" else None
    with torch.no_grad():
        if case == "mv":
            condition = conditioner.encode_views(given["images"], original.VIEWS)
        else:
            condition = conditioner(given["images"][:, 0])
        sampled = sample(
            bundle.dit,
            condition,
            (LATENTS, CHANNELS),
            sampling_times(bundle.config.pipeline, original.STEPS),
            original.GUIDANCE,
            [torch.Generator().manual_seed(3)],
            guidance_embed=bundle.dit.config.guidance_embed,
        )
        return {
            "velocity": bundle.dit(given["latents"], given["t"], given["condition"], guidance),
            "field": bundle.vae.query(given["points"], bundle.vae.decode(given["latents"])),
            "condition": condition,
            "sampled": sampled,
        }


def compare(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].shape == value.shape, name
        assert (found[name] - value).abs().max() / value.abs().max() < TOLERANCE, name
        assert value.std() > 0.01, f"{name} is too flat to compare"


@pytest.mark.parametrize("case", CASES)
def test_against_stored_numbers(case: str, tmp_path: Path) -> None:
    stored = load_file(original.STORED)
    compare(
        ours(case, tmp_path),
        {name.removeprefix(f"{case}."): value for name, value in stored.items() if name.startswith(case)},
    )


@pytest.mark.skipif(not original.available(), reason="the package hy3dgen is not installed")
@pytest.mark.parametrize("case", CASES)
def test_against_the_original_program(case: str, tmp_path: Path) -> None:
    compare(ours(case, tmp_path), original.reference(case))
