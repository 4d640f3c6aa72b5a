"""How long published DiTs take at a budget, with random weights: time and memory do not depend on what they hold.

Dense and every budget run in turn, round after round, on the same noise; speed-ups are ratios within a round.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from elastic3d.checkpoints.bundle import model_class
from elastic3d.checkpoints.options import OPEN_MODELS, PRESETS
from elastic3d.diffusion.sampler import integrate, timestep_grid
from elastic3d.elastic.config import ElasticConfig
from elastic3d.elastic.trace import trace_share
from elastic3d.elastic.training_free import put_policy
from elastic3d.evaluation.report import machine, markdown_table
from elastic3d.models.options import DiTConfig, SkipDiTConfig, VAEConfig
from elastic3d.pipelines.runtime import resolve_device, resolve_dtype
from elastic3d.studies.config import FullSizeConfig
from elastic3d.utils.files import save_json

GUIDANCE = 5.0  # two branches, but for distilled models
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_TOKENS = 1370  # of one image


@dataclass(frozen=True)
class Published:
    """Sizes of one published model, and how many passes of its DiT make a mesh."""

    dit: DiTConfig | SkipDiTConfig
    vae: VAEConfig
    passes: int
    resolution: int = 384


def measure_full_size(config: FullSizeConfig) -> dict[str, Any]:
    """Measure, write `config.output` after each model and batch size, and return it. UserError for an unknown model."""
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    sizes = {name: sized(published(name).dit, config) for name in config.models}
    about = {
        "machine": machine(), "device": device.type, "dtype": str(dtype).removeprefix("torch."), "steps": config.steps,
        "clock": "wall" if device.type == "cuda" else "CPU time",
    }  # fmt: skip
    found: dict[str, Any] = {"about": about, "rows": []}
    budgets, count = (1.0, *config.budgets), 1 + config.rounds
    total = len(sizes) * len(config.batches) * count * len(budgets)
    with tqdm(total=total, desc="full size", unit="run", disable=None) as bar:
        for name, size in sizes.items():
            torch.manual_seed(0)
            with torch.device(device):
                plain = model_class(size)(size).to(dtype).eval()
            dit = _Cast(plain)
            for batch in config.batches:
                rounds = [_round(dit, size, budgets, config.steps, batch, bar) for _ in range(count)]
                head = {"model": name, "width": size.width, "latents": size.num_latents, "batch": batch}
                found["rows"] += [head | _row(budget, rounds[1:]) for budget in budgets]
                save_json(found, config.output)
            del dit, plain
            gc.collect()
    return found


def published(name: str) -> Published:
    """The sizes of a preset as published. KeyError for another name."""
    if name in OPEN_MODELS:
        return _open_model(name)
    latents = {"hunyuan3d2_mini": 512, "hunyuan3d2_mini_turbo": 512, "hunyuan3d2_1": 4096}.get(name, 3072)
    turbo = name.endswith("turbo")
    vae = VAEConfig(
        num_latents=latents, latent_channels=64, width=1024, heads=16, encoder_layers=0, decoder_layers=16,
        neighbours_in=0, neighbours_out=0,
    )  # fmt: skip
    passes = 5 if turbo else 2 * 49  # of 50 times, 49 move; with guidance two passes each
    if PRESETS[name].subfolder.endswith("v2-1"):
        return Published(SkipDiTConfig(), vae, passes)
    depth = 8 if "mini" in name else 16
    dit = DiTConfig(
        in_channels=64, condition_channels=1536, width=1024, heads=16, double_blocks=depth, single_blocks=2 * depth,
        guidance_embed=turbo, num_latents=latents, condition_tokens=_TOKENS * (4 if name.endswith("_mv") else 1),
    )  # fmt: skip
    return Published(dit, vae, passes)


def _open_model(name: str) -> Published:
    if name == "triposg":
        skip = SkipDiTConfig(expert_blocks=0, norm_eps=1e-5, num_latents=2048, condition_tokens=257)
        vae = VAEConfig(
            num_latents=2048, latent_channels=64, width=1024, heads=8, encoder_width=512, encoder_layers=8,
            decoder_layers=16, qk_norm=False, point_features=3, neighbours_in=0, neighbours_out=0,
        )  # fmt: skip
        return Published(skip, vae, 2 * 50, resolution=512)
    dit = DiTConfig(
        in_channels=64, condition_channels=1024, width=1280, heads=20, double_blocks=12, single_blocks=24,
        wide_time=True, num_latents=2048, condition_tokens=_TOKENS,
    )  # fmt: skip
    vae = VAEConfig(
        num_latents=2048, latent_channels=64, width=768, heads=12, encoder_layers=8, decoder_layers=16,
        qk_norm=False, point_features=3, sharp_attention=True, neighbours_in=0, neighbours_out=0,
    )  # fmt: skip
    return Published(dit, vae, 2 * 29)  # of 30 steps, the first moves nothing


def sized(size: DiTConfig | SkipDiTConfig, config: FullSizeConfig) -> DiTConfig | SkipDiTConfig:
    """A published configuration at the width and number of tokens that are asked for, with heads as wide as its own."""
    changes: dict[str, int] = {}
    if config.width:
        channels = size.width // size.heads
        heads = max(1, config.width // channels)
        changes |= {"heads": heads, "width": heads * channels}
    if config.latents:
        share = config.latents / size.num_latents
        changes |= {
            "num_latents": config.latents,
            "condition_tokens": max(1, round(share * size.condition_tokens)),
        }
    return replace(size, **changes)  # type: ignore[arg-type]


class _Cast(nn.Module):
    """A DiT that keeps a training-free budget, in its own number format inside a sampler in fp32."""

    def __init__(self, dit: nn.Module) -> None:
        super().__init__()
        self.dit, self.like = dit, next(dit.parameters())
        self.session = put_policy(dit)

    def forward(
        self, latents: Tensor, t: Tensor, condition: Tensor, guidance: Tensor | None = None
    ) -> Tensor:
        """As the DiT."""
        return self.dit(latents.to(self.like.dtype), t, condition, guidance)


def _round(
    dit: _Cast, size: Any, budgets: Sequence[float], steps: int, batch: int, bar: tqdm
) -> dict[float, dict[str, Any]]:
    """Seconds, peak memory in MB and executed share by budget; 1 is the dense model."""
    like, session, found = dit.like, dit.session, {}
    noise = torch.randn(batch, size.num_latents, size.in_channels, device=like.device)
    condition = torch.randn(
        batch, size.condition_tokens, size.condition_channels, device=like.device, dtype=like.dtype
    )
    options = {"session": session, "guidance_embed": size.guidance_embed}
    cuda = like.device.type == "cuda"
    clock = time.perf_counter if cuda else time.process_time
    for budget in budgets:
        session.settings = ElasticConfig(elastic=budget < 1, budget=budget)
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        elif CLEAR.exists():
            gc.collect()
            CLEAR.write_text("5")  # the peak of the resident set starts anew
        start = clock()
        with torch.no_grad():
            integrate(dit, condition, noise, timestep_grid(steps), GUIDANCE, **options)
        if cuda:
            torch.cuda.synchronize()
        seconds, peak = clock() - start, _peak_mb(cuda)
        share = float(trace_share(session.trace).mean()) if budget < 1 and session.trace else 1.0
        found[budget] = {"seconds": seconds, "peak_mb": peak, "share": share}
        bar.update()
    return found


def _peak_mb(cuda: bool) -> float | None:
    """Of the device's memory, or of this process; None where the system does not say."""
    if cuda:
        return torch.cuda.max_memory_allocated() / 2**20
    if not STATUS.exists():
        return None
    lines = [line.split() for line in STATUS.read_text().splitlines()]
    return next((float(words[1]) / 2**10 for words in lines if words[:1] == ["VmHWM:"]), None)


def _row(budget: float, rounds: Sequence[dict[float, dict[str, Any]]]) -> dict[str, Any]:
    """Medians over rounds; the speed-up is that over the dense model of the same round."""
    peaks = [each[budget]["peak_mb"] for each in rounds]
    share = rounds[0][budget]["share"]
    speedup = statistics.median(each[1.0]["seconds"] / each[budget]["seconds"] for each in rounds)
    return {
        "budget": budget, "executed": share, "seconds": statistics.median(each[budget]["seconds"] for each in rounds),
        "speedup": speedup, "flop_speedup": 1 / share, "efficiency": speedup * share,
        "peak_mb": None if None in peaks else max(peaks),
    }  # fmt: skip


def printed(found: dict[str, Any]) -> str:
    """The rows as Markdown."""
    forms = dict.fromkeys(("model", "width", "latents", "batch", "budget"), "") | {
        "executed": ".2f", "seconds": ".2f", "speedup": ".2f", "efficiency": ".2f", "peak_mb": ".0f",
    }  # fmt: skip
    titles = [*list(forms)[:6], "s", "speed-up", "over FLOPs", "peak MB"]
    return markdown_table(
        titles,
        (
            [None if row[n] is None else format(row[n], form) for n, form in forms.items()]
            for row in found["rows"]
        ),
    )
