"""Running a run: the pipeline with its settings, and with routes from a table where it has one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from elastic3d.benchmark.methods import MAIN, NO_CACHE, Planner, Routes, Run
from elastic3d.benchmark.options import BenchmarkConfig
from elastic3d.benchmark.store import Job
from elastic3d.config.routing import ElasticConfig
from elastic3d.diffusion.flow import interpolate
from elastic3d.diffusion.sampler import initial_noise
from elastic3d.geometry.options import CleanupConfig, DecodeConfig
from elastic3d.models.foreground import prepare_picture, to_tensor
from elastic3d.models.options import ForegroundConfig
from elastic3d.pipelines.image_to_3d import ImageTo3DPipeline, Result, Settings
from elastic3d.routing.passes import BOTH_BRANCHES, Branch, RouteSource
from elastic3d.routing.session import RoutingSession
from elastic3d.routing.tables import TableRoutes


@contextmanager
def following(session: RoutingSession | None, source: RouteSource | None) -> Iterator[None]:
    """While it lasts, `source` decides instead of the routers; None leaves them to it."""
    if session is None:
        yield
        return
    session.source = source
    try:
        yield
    finally:
        session.source = None


def elastic_options(session: RoutingSession | None, run: Run) -> dict[str, Any]:
    """The run's settings as arguments of a pipeline."""
    if session is None:
        return {}
    if not run.settings.elastic:
        return {"elastic": False}
    return {"elastic": True} | {
        name: getattr(run.settings, name) for name in ("budget", "width", "cache", "shared", "updates")
    }


def make(
    pipeline: ImageTo3DPipeline,
    run: Run,
    jobs: Sequence[Job],
    config: BenchmarkConfig,
    source: RouteSource | None,
    on_step: Callable[[int, int], None] | None = None,
) -> list[Result]:
    """Meshes of the jobs as one batch, from picture to clean surface."""
    with following(pipeline.session, source):
        return pipeline(
            [job.image for job in jobs],
            [job.seed for job in jobs],
            steps=run.steps,
            guidance=config.guidance,
            resolution=config.resolution,
            on_step=on_step,
            **elastic_options(pipeline.session, run),
        )


def condition_of(pipeline: ImageTo3DPipeline, jobs: Sequence[Job]) -> Tensor:
    """Condition tokens (B,M,Cc) of the jobs' pictures. UserError where one can't be used."""
    size, foreground = pipeline.encoder.image_size, ForegroundConfig()
    pictures = [prepare_picture(job.image, foreground, size) for job in jobs]
    return pipeline.encoder(to_tensor(pictures).to(pipeline.device))


def sample_latents(
    pipeline: ImageTo3DPipeline,
    run: Run,
    condition: Tensor,
    seeds: Sequence[int],
    config: BenchmarkConfig,
    source: RouteSource | None,
) -> Tensor:
    """The DiT alone: condition (B,M,Cc) -> latents (B,N,C); returns when a GPU is done."""
    guidance = pipeline.config.guidance if config.guidance is None else config.guidance
    settings = Settings(
        run.steps, guidance, DecodeConfig(), CleanupConfig(), ForegroundConfig(), run.settings
    )
    with following(pipeline.session, source):
        latents = pipeline.sample_latents(condition, seeds, settings)
    if pipeline.device.type == "cuda":
        torch.cuda.synchronize()
    return latents


@torch.no_grad()
def velocity_error(
    pipeline: ImageTo3DPipeline, planner: Planner, jobs: Sequence[Job], config: BenchmarkConfig
) -> Callable[[Tensor], float]:
    """Fixed routes (I,) -> relative squared error of the guided velocity, on calls between noise and data."""
    cfg, guidance = (
        pipeline.dit.config,
        pipeline.config.guidance if config.guidance is None else config.guidance,
    )
    condition = condition_of(pipeline, jobs)
    seeds = [job.seed for job in jobs]
    dense = planner.run(MAIN, planner.baseline_steps, Routes.dense)
    data = sample_latents(pipeline, dense, condition, seeds, config, None)
    noise = initial_noise(
        (cfg.num_latents, cfg.in_channels), [torch.Generator().manual_seed(s) for s in seeds], data.device
    )
    calls = config.calibration_calls
    t = torch.rand(len(data) * calls, generator=torch.Generator().manual_seed(0)).to(data.device)
    x = interpolate(noise.repeat(calls, 1, 1), data.repeat(calls, 1, 1), t)
    condition = condition.repeat(calls, 1, 1)
    two = guidance != 1.0 and not cfg.guidance_embed
    branches = BOTH_BRANCHES if two else (Branch.conditional,)
    scale = torch.full((len(x),), guidance, device=x.device) if cfg.guidance_embed else None
    session = pipeline.session
    assert session is not None

    @torch.no_grad()
    def velocity(settings: ElasticConfig, routes: RouteSource | None) -> Tensor:
        session.settings = settings
        with following(session, routes):
            session.begin(len(x), 1)
            session.step(0, 1 / planner.baseline_steps, branches)
            if not two:
                return pipeline.dit(x, t, condition, scale).float()
            both = torch.cat([condition, torch.zeros_like(condition)])
            v, v_uncond = pipeline.dit(x.repeat(2, 1, 1), t.repeat(2), both).float().chunk(2)
            return v_uncond + guidance * (v - v_uncond)

    return error_of_routes(velocity, session.router_config.widths)


def error_of_routes(
    velocity: Callable[[ElasticConfig, RouteSource | None], Tensor], widths: int
) -> Callable[[Tensor], float]:
    """Fixed routes (I,) -> relative squared error of a model's velocity; closed blocks add nothing."""
    true = velocity(ElasticConfig(elastic=False), None)

    def error(routes: Tensor) -> float:
        # without a cache: routers that reuse would run every block of a first step
        without = ElasticConfig(cache=NO_CACHE, updates=False)
        found = velocity(without, TableRoutes(routes[None, None, None], widths))
        return float((found - true).square().mean() / true.square().mean())

    return error
