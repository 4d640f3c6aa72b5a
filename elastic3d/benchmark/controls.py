"""Where the routes of controls come from: calibration pictures, other pictures, chance."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from elastic3d.benchmark.execute import condition_of, following, sample_latents
from elastic3d.benchmark.methods import Planner, Routes, Run
from elastic3d.benchmark.models import MAIN
from elastic3d.benchmark.store import Job, find_pictures
from elastic3d.config.routing import Branches, ElasticConfig, RouterConfig
from elastic3d.diffusion.flow import interpolate
from elastic3d.diffusion.sampler import initial_noise
from elastic3d.models.weights import load_json, save_json
from elastic3d.routing.controls import (
    as_one,
    executed_share,
    greedy_static,
    nearest_share,
    random_routes,
    timestep_routes,
)
from elastic3d.routing.passes import BOTH_BRANCHES, Branch, RouteSource
from elastic3d.routing.protocol import BlockFlops
from elastic3d.routing.router import looks_ahead
from elastic3d.routing.tables import TableRoutes
from elastic3d.routing.trace import parse_actions

Recorded = Callable[[Run, Job], dict[str, Any]]  # a job of a run -> the `routes` of its receipt


class Controls:
    """Route tables for the runs that have one. What is computed is kept in `<output>/tables`."""

    def __init__(self, planner: Planner, images: Sequence[Path], recorded: Recorded) -> None:
        """`recorded` gives the routes that a donor run took for a job, by making its mesh where need be."""
        self.planner, self.config = planner, planner.config
        self.images, self.recorded = list(images), recorded
        self.pipeline = planner.models[MAIN]
        found = find_pictures(self.config.calibration) if self.config.calibration else self.images
        chosen = found[: self.config.calibration_samples]
        seeds = self.config.seeds
        self.calibration = [Job(image, seeds[i % len(seeds)]) for i, image in enumerate(chosen)]
        self.folder = self.config.output / "tables"
        self._tables: dict[str, Tensor] = {}

    def source(self, run: Run, jobs: Sequence[Job]) -> RouteSource | None:
        """What decides for a batch of jobs; None: the routers, or nobody."""
        session = self.pipeline.session
        if run.routes in (Routes.dense, Routes.routers) or session is None:
            return None
        widths = session.router_config.widths
        if run.routes is Routes.open:
            return TableRoutes(torch.full((1, 1, 1, len(session.blocks)), widths), widths)
        if run.routes is Routes.random:
            return TableRoutes(torch.stack([self._random(run, job) for job in jobs], dim=2), widths)
        if run.routes is Routes.shuffled:
            return TableRoutes(torch.stack([self._of_another(run, job) for job in jobs], dim=2), widths)
        if run.name not in self._tables:
            found = self._static(run) if run.routes is Routes.static else self._timestep(run)
            self._tables[run.name] = found
        return TableRoutes(self._tables[run.name], widths)

    def _random(self, run: Run, job: Job) -> Tensor:
        calibrated = self._calibrated(run)
        seed = zlib.crc32(f"{run.name}/{job.seed}/{job.image.stem}".encode())
        branches = int((calibrated["actions"][:, :, 0, 0] >= -1).any(dim=0).sum())
        generator = torch.Generator().manual_seed(seed)
        blocks, decided = calibrated["blocks"], self._decided(calibrated["blocks"])
        together = self._router_config.branches is Branches.together
        routes = random_routes(
            decided, self.ratios, run.steps, 1 if together else branches, calibrated["share"], generator
        )
        if together:
            routes[:, 1:branches] = routes[:, :1]
        return routes.expand(-1, -1, len(blocks))

    def _of_another(self, run: Run, job: Job) -> Tensor:
        """What the routers did for the next picture, at the same seed."""
        assert run.donor is not None
        other = self.images[(self.images.index(job.image) + 1) % len(self.images)]
        routes = self.recorded(run.donor, Job(other, job.seed))
        return parse_actions(routes["actions"], len(routes["blocks"])).clamp_min(0)

    def _timestep(self, run: Run) -> Tensor:
        found = self._calibrated(run)
        decided = self._decided(found["blocks"])
        actions = found["actions"][..., : len(decided)]
        routes = timestep_routes(actions, decided, self.ratios, found["share"])
        return routes.expand(-1, -1, len(found["blocks"]))[:, :, None]

    def _decided(self, blocks: list[BlockFlops]) -> list[BlockFlops]:
        """What controls choose among: blocks, or all of them as one where the routers decide for all."""
        return [as_one(blocks)] if looks_ahead(self._router_config) else blocks

    def _static(self, run: Run) -> Tensor:
        share = self._calibrated(run)["share"]
        path = [(found, torch.tensor(routes)) for found, routes in self._static_path(run, share)]
        return nearest_share(path, share)[None, None, None]

    @property
    def _router_config(self) -> RouterConfig:
        session = self.pipeline.session
        assert session is not None
        return session.router_config

    @property
    def ratios(self) -> tuple[float, ...]:
        """Nested widths of the routers."""
        return self._router_config.ratios

    # ------------------------------------------------------------------------------------------- calibration

    def _calibrated(self, run: Run) -> dict[str, Any]:
        """`share`, `actions` (S,2,C,I) and `blocks` (FLOPs) of a control's donor on the calibration pictures."""
        donor = run.donor
        assert donor is not None
        path = self.folder / f"{donor.name}-{self._calibration_key():08x}.json"
        if not path.is_file():
            save_json(self._record(donor), path)
        stored = load_json(path)
        blocks = [BlockFlops(fixed, mlp) for fixed, mlp in stored["flops"]]
        actions = torch.stack([parse_actions(sample, len(blocks)) for sample in stored["samples"]], dim=2)
        return {"actions": actions, "blocks": blocks, "share": executed_share(actions, blocks, self.ratios)}

    def _record(self, donor: Run) -> dict[str, Any]:
        samples: list[list[list[str]]] = []
        flops: list[list[int]] = []
        for start in range(0, len(self.calibration), self.config.batch_size):
            jobs = self.calibration[start : start + self.config.batch_size]
            condition = condition_of(self.pipeline, jobs)
            sample_latents(self.pipeline, donor, condition, [job.seed for job in jobs], self.config, None)
            session = self.pipeline.session
            assert session is not None and session.trace is not None
            trace = session.trace
            samples += [trace.sample(row) for row in range(len(jobs))]
            flops = [[trace.flops[i].fixed, trace.flops[i].mlp] for i in range(len(trace.blocks))]
        return {"samples": samples, "flops": flops}

    def _calibration_key(self) -> int:
        config = self.config
        facts = (
            self.planner.reference().name,  # the model, guidance, resolution
            self.planner.baseline_steps,
            [(job.image.name, job.seed) for job in self.calibration],
            config.calibration_calls,
        )
        return zlib.crc32(repr(facts).encode())

    def _static_path(self, run: Run, share: float) -> list[tuple[float, list[int]]]:
        """The greedy path of fixed routes, down to `share` at least; one for every budget."""
        file = self.folder / f"static-{self._calibration_key():08x}.json"
        path: list[tuple[float, list[int]]] = load_json(file)["path"] if file.is_file() else []
        if not path or path[-1][0] > share:
            lowest = min(share, 0.9 * min(self.config.budgets))
            blocks = self._calibrated(run)["blocks"]
            with tqdm(desc="static routes", unit="change", dynamic_ncols=True) as bar:

                def on_change(executed: float) -> None:
                    bar.set_postfix_str(f"{executed:.2f} of the FLOPs, down to {lowest:.2f}", refresh=False)
                    bar.update()

                found = greedy_static(self._velocity_error(), blocks, self.ratios, lowest, on_change)
            path = [(executed, routes.tolist()) for executed, routes in found]
            save_json({"path": path}, file)
        return path

    @torch.no_grad()
    def _velocity_error(self) -> Callable[[Tensor], float]:
        """Fixed routes (I,) -> relative squared error of the guided velocity, on calls between noise and data."""
        planner, pipeline, config = self.planner, self.pipeline, self.config
        cfg, guidance = (
            pipeline.dit.config,
            pipeline.config.guidance if config.guidance is None else config.guidance,
        )
        condition = condition_of(pipeline, self.calibration)
        seeds = [job.seed for job in self.calibration]
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
            session.begin(len(x), 1)
            session.step(0, 1 / planner.baseline_steps, branches)
            with following(session, routes):
                if not two:
                    return pipeline.dit(x, t, condition, scale).float()
                both = torch.cat([condition, torch.zeros_like(condition)])
                v, v_uncond = pipeline.dit(x.repeat(2, 1, 1), t.repeat(2), both).float().chunk(2)
                return v_uncond + guidance * (v - v_uncond)

        true = velocity(ElasticConfig(elastic=False), None)
        widths = session.router_config.widths

        def error(routes: Tensor) -> float:
            found = velocity(ElasticConfig(), TableRoutes(routes[None, None, None], widths))
            return float((found - true).square().mean() / true.square().mean())

        return error
