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
from elastic3d.diffusion.sampler import integrate
from elastic3d.elastic.calibrating import put_policy
from elastic3d.elastic.config import MIN_BUDGET, ElasticConfig
from elastic3d.elastic.cost import trace_share
from elastic3d.elastic.session import ElasticSession
from elastic3d.evaluation.machine import machine
from elastic3d.models.options import MAX_TOKENS, MAX_WIDTH, DiTConfig, SkipDiTConfig
from elastic3d.pipelines.estimates import published
from elastic3d.pipelines.runtime import resolve_device, resolve_dtype
from elastic3d.utils.devices import DeviceChoice, DTypeChoice
from elastic3d.utils.options import Options, option
from elastic3d.utils.structured import save_json

GUIDANCE = 5.0  # two branches
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(kw_only=True)
class FullSizeConfig(Options):
    """Times of published DiTs with random weights, dense and at budgets that a training-free policy keeps."""

    output: Path = option(Path("outputs/full_size.json"), "JSON file with every measurement")
    models: list[str] = option(
        ["hunyuan3d2", "triposg", "step1x3d"], "published models", lengths=(1, 100), unique=True
    )
    budgets: list[float] = option(
        [0.65, 0.5, 0.35], "shares of the blocks' FLOPs", ge=MIN_BUDGET, le=1, lengths=(1, 100), unique=True
    )
    batches: list[int] = option([1, 4], "batch sizes", ge=1, le=4096, lengths=(1, 100), unique=True)
    steps: int = option(20, "sampling steps", ge=5, le=1000)
    rounds: int = option(3, "rounds after a warm one", ge=1, le=1000)
    width: int = option(
        0, "width of the DiTs; 0: as published. For machines that hold no more", ge=0, le=MAX_WIDTH
    )
    latents: int = option(
        0, "latent tokens, condition tokens in proportion; 0: as published", ge=0, le=MAX_TOKENS
    )
    device: DeviceChoice = option(DeviceChoice.auto, "where the models run")
    dtype: DTypeChoice = option(DTypeChoice.auto, "number format of the models")


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
    runs = 1 + len(config.budgets)
    total = len(sizes) * len(config.batches) * (1 + config.rounds) * runs
    with tqdm(total=total, desc="full size", unit="run", disable=None) as bar:
        for name, size in sizes.items():
            torch.manual_seed(0)
            with torch.device(device):
                dit = model_class(size)(size).to(dtype).eval()
            session = put_policy(dit)
            for batch in config.batches:
                rounds = [_round(dit, session, size, config, batch, bar) for _ in range(1 + config.rounds)]
                found["rows"] += _rows(name, size, batch, rounds[1:])
                save_json(found, config.output)
            del dit, session
            gc.collect()
    return found


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


def _round(
    dit: nn.Module, session: ElasticSession, size: Any, config: FullSizeConfig, batch: int, bar: tqdm
) -> dict[float, dict[str, float]]:
    """Seconds, peak memory in MB and executed share by budget; 1 is the dense model."""
    like = next(dit.parameters())
    noise = torch.randn(batch, size.num_latents, size.in_channels, device=like.device)
    condition = torch.randn(
        batch, size.condition_tokens, size.condition_channels, device=like.device, dtype=like.dtype
    )
    found = {}
    for budget in (1.0, *config.budgets):
        session.settings = ElasticConfig(elastic=budget < 1, budget=budget)
        found[budget] = _run(_Cast(dit, like.dtype), session, condition, noise, config.steps)
        found[budget]["share"] = (
            float(trace_share(session.trace).mean()) if budget < 1 and session.trace else 1.0
        )
        bar.update()
    return found


class _Cast(nn.Module):
    """A DiT in its own number format inside a sampler in fp32."""

    def __init__(self, dit: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.dit, self.dtype = dit, dtype

    def forward(
        self, latents: Tensor, t: Tensor, condition: Tensor, guidance: Tensor | None = None
    ) -> Tensor:
        """As the DiT."""
        return self.dit(latents.to(self.dtype), t, condition)


def _run(dit: Any, session: ElasticSession, condition: Tensor, noise: Tensor, steps: int) -> dict[str, float]:
    cuda = noise.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    elif CLEAR.exists():
        gc.collect()
        CLEAR.write_text("5")  # the peak of the resident set starts anew
    clock = time.perf_counter if cuda else time.process_time
    start = clock()
    with torch.no_grad():
        integrate(dit, condition, noise, steps, GUIDANCE, session=session)
    if cuda:
        torch.cuda.synchronize()
    return {"seconds": clock() - start, "peak_mb": _peak_mb(cuda)}


def _peak_mb(cuda: bool) -> float:
    """Of the device's memory, or of this process; nan where the system does not say."""
    if cuda:
        return torch.cuda.max_memory_allocated() / 2**20
    if not STATUS.exists():
        return float("nan")
    lines = [line.split() for line in STATUS.read_text().splitlines()]
    return next((float(words[1]) / 2**10 for words in lines if words[:1] == ["VmHWM:"]), float("nan"))


def _rows(
    name: str, size: Any, batch: int, rounds: Sequence[dict[float, dict[str, float]]]
) -> list[dict[str, Any]]:
    rows = []
    for budget in rounds[0]:
        seconds = statistics.median(each[budget]["seconds"] for each in rounds)
        speedup = statistics.median(each[1.0]["seconds"] / each[budget]["seconds"] for each in rounds)
        share = rounds[0][budget]["share"]
        rows.append({
            "model": name, "width": size.width, "latents": size.num_latents, "batch": batch, "budget": budget,
            "executed": share, "seconds": seconds, "speedup": speedup, "flop_speedup": 1 / share,
            "efficiency": speedup * share, "peak_mb": max(each[budget]["peak_mb"] for each in rounds),
        })  # fmt: skip
    return rows


def printed(found: dict[str, Any]) -> str:
    """The rows as Markdown."""
    titles = (
        "model",
        "width",
        "latents",
        "batch",
        "budget",
        "executed",
        "s",
        "speed-up",
        "over FLOPs",
        "peak MB",
    )
    lines = ["| " + " | ".join(titles) + " |", "| --- " * len(titles) + "|"]
    for row in found["rows"]:
        head = [str(row[name]) for name in ("model", "width", "latents", "batch", "budget")]
        head += [f"{row[n]:.2f}" for n in ("executed", "seconds", "speedup", "efficiency")]
        lines.append("| " + " | ".join([*head, f"{row['peak_mb']:.0f}"]) + " |")
    return "\n".join(lines)
