"""How a model is sampled."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from elastic3d.elastic.config import ElasticConfig
from elastic3d.utils.options import Options, option

MAX_ENSEMBLE = 64  # generations of one object


class SamplingGrid(Enum):
    """Where sampling times lie: `uniform`, `endpoint` (Hunyuan3D-2: n times are n - 1 moves), `consistency` (turbo),
    `late_start` (Step1X-3D: n times, of which the first moves nothing)."""

    uniform = "uniform"
    endpoint = "endpoint"
    consistency = "consistency"
    late_start = "late_start"


IDLE = SamplingGrid.endpoint, SamplingGrid.late_start  # one of N steps moves nothing, where N is above 1


class Solver(Enum):
    """How the sampler steps: by the velocity found (`euler`), or by its line through the last two (`ab2`)."""

    euler = "euler"
    ab2 = "ab2"


class Combine(Enum):
    """How several generations of an object become one mesh: by their mean shape, or by the one that fits the image."""

    mean = "mean"
    fit = "fit"


class Quality(Enum):
    """Three points of a model's dial (see `dial`): its fastest, its default, its most faithful."""

    fast = "fast"
    default = "default"
    best = "best"


@dataclass(kw_only=True)
class PipelineConfig(Options):
    """`pipeline.json` beside the components: the model's name and how it is sampled by default."""

    model: str = option("unnamed", "name of the model, for metadata", lengths=(1, 200))
    version: str = option("", "version of elastic3d that wrote the folder", lengths=(0, 200), internal=True)
    steps: int = option(25, "sampling steps", ge=1, le=1000)
    guidance: float = option(3.0, "classifier-free guidance scale; 1 or less is none", ge=0, le=100)
    resolution: int = option(256, "grid cells a side of the decoding", ge=8, le=512)
    fast_resolution: int = option(0, "that of quality=fast; 0: the same as without", ge=8, le=512, zero=True)
    best_resolution: int = option(0, "that of quality=best; 0: the same as without", ge=8, le=512, zero=True)
    box: float = option(1.01, "half side of the cube that is decoded", ge=1e-3, le=1e3)
    shift: float = option(
        1.0, "timestep shift of the sampler; above 1 spends more steps on noise", ge=1e-3, le=1e3
    )
    grid: SamplingGrid = option(SamplingGrid.uniform, "where the sampling times lie")
    solver: Solver = option(Solver.euler, "how the sampler steps: euler, ab2 (Adams-Bashforth, second order)")
    segments: int = option(100, "grid consistency: segments of the distillation", ge=1, le=1000)
    elastic: ElasticConfig = option(ElasticConfig, "how a model with routers runs")
