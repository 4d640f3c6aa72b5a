"""Where the routes of controls come from: calibration items, other items, chance."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from elastic3d.benchmark.methods import MAIN, Routes, Run
from elastic3d.benchmark.place import Job, Place
from elastic3d.config.routing import Branches, RouterConfig
from elastic3d.routing.controls import (
    as_one,
    executed_share,
    greedy_static,
    nearest_share,
    random_routes,
    timestep_routes,
)
from elastic3d.routing.passes import RouteSource
from elastic3d.routing.protocol import BlockFlops
from elastic3d.routing.router import looks_ahead
from elastic3d.routing.tables import TableRoutes
from elastic3d.routing.trace import parse_actions
from elastic3d.utils.structured import load_json, save_json


class Controls:
    """Route tables for the runs that have one. What is computed is kept in `<output>/tables`."""

    def __init__(self, place: Place) -> None:
        self.place, self.planner, self.config = place, place.planner, place.config
        self.session = self.planner.models[MAIN].session
        self.calibration = place.calibration_jobs()
        self.folder = self.config.output / "tables"
        self._tables: dict[str, Tensor] = {}

    def source(self, run: Run, jobs: Sequence[Job]) -> RouteSource | None:
        """What decides for a batch of jobs; None: the routers, or nobody."""
        session = self.session
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
        seed = zlib.crc32(f"{run.name}/{job.seed}/{job.name}".encode())
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
        """What the routers did for the next item, at the same seed."""
        assert run.donor is not None
        routes = self.place.routes_of(run.donor, self.place.neighbour(job))
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
        session = self.session
        assert session is not None
        return session.router_config

    @property
    def ratios(self) -> tuple[float, ...]:
        """Nested widths of the routers."""
        return self._router_config.ratios

    # ------------------------------------------------------------------------------------------- calibration

    def _calibrated(self, run: Run) -> dict[str, Any]:
        """`share`, `actions` (S,2,C,I) and `blocks` (FLOPs) of a control's donor on the calibration items."""
        donor = run.donor
        assert donor is not None
        path = self.folder / f"{donor.name}-{self._calibration_key():08x}.json"
        if not path.is_file():
            save_json(self._record(donor), path)
        stored = load_json(path, {"flops": [[int]], "samples": [[[str]]]})
        blocks = [BlockFlops(fixed, mlp) for fixed, mlp in stored["flops"]]
        actions = torch.stack([parse_actions(sample, len(blocks)) for sample in stored["samples"]], dim=2)
        return {"actions": actions, "blocks": blocks, "share": executed_share(actions, blocks, self.ratios)}

    def _record(self, donor: Run) -> dict[str, Any]:
        samples: list[list[list[str]]] = []
        flops: list[list[int]] = []
        for start in range(0, len(self.calibration), self.config.batch_size):
            jobs = self.calibration[start : start + self.config.batch_size]
            self.place.sample(donor, self.place.condition_of(donor, jobs), jobs, None)
            session = self.session
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
            [(job.label, job.seed) for job in self.calibration],
            config.calibration_calls,
        )
        return zlib.crc32(repr(facts).encode())

    def _static_path(self, run: Run, share: float) -> list[tuple[float, list[int]]]:
        """The greedy path of fixed routes, down to `share` at least; one for every budget."""
        file = self.folder / f"static-{self._calibration_key():08x}.json"
        path: list[tuple[float, list[int]]] = (
            load_json(file, {"path": [list]})["path"] if file.is_file() else []
        )
        if not path or path[-1][0] > share:
            lowest = min(share, 0.9 * min(self.planner.control_budgets))
            blocks = self._calibrated(run)["blocks"]
            with tqdm(desc="static routes", unit="change", dynamic_ncols=True) as bar:

                def on_change(executed: float) -> None:
                    bar.set_postfix_str(f"{executed:.2f} of the FLOPs, down to {lowest:.2f}", refresh=False)
                    bar.update()

                found = greedy_static(
                    self.place.velocity_error(self.calibration), blocks, self.ratios, lowest, on_change
                )
            path = [(executed, routes.tolist()) for executed, routes in found]
            save_json({"path": path}, file)
        return path
