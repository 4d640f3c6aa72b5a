"""The registry of methods: from a configuration to the rows of the table, and the runs behind them.

Every control is made to execute what its donor does: the routers at the same budget, with the cache they were trained
with, or none. It runs with that cache itself, so that the rows to compare are those two.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial
from typing import Any, Protocol

from torch import nn

from elastic3d.benchmark.options import BenchmarkOptions, Method
from elastic3d.config.routing import BlockCacheConfig, CacheRule, ElasticConfig
from elastic3d.diffusion.options import Solver
from elastic3d.errors import UserError
from elastic3d.routing.session import RoutingSession
from elastic3d.routing.updates import coarseness
from elastic3d.utils.options import to_dict

MAIN, DENSE, EULER = "model", "dense", "euler"


class Subject(Protocol):
    """What a planner asks of a model. `config` has its defaults: steps, guidance, resolution, shift, elastic."""

    @property
    def config(self) -> Any: ...

    @property
    def dit(self) -> nn.Module: ...

    @property
    def session(self) -> RoutingSession | None: ...

    @property
    def weights_sha256(self) -> str | None: ...

    @property
    def dense_sha256(self) -> str | None: ...


class Routes(Enum):
    """Who decides: nobody (the dense model), the routers, or a table."""

    dense = "dense"
    routers = "routers"
    open = "open"  # every block, at full width: only the cache acts
    random = "random"
    static = "static"
    timestep = "timestep"
    shuffled = "shuffled"


@dataclass(frozen=True)
class Run:
    """One way to make meshes or pictures. Methods that ask for the same way share what it made and its times.

    `name` tells it from every other, also from the same with other weights or options. `donor` is the run whose
    routes a control is matched to; `foreign` a cache of others around the dense model.
    """

    name: str = field(compare=True)
    model: str = field(compare=False)
    steps: int = field(compare=False)
    routes: Routes = field(compare=False)
    settings: ElasticConfig = field(compare=False)
    donor: Run | None = field(compare=False, default=None)
    foreign: Any = field(compare=False, default=None)


@dataclass(frozen=True)
class Case:
    """A row of the table, but for the batch size. `budget` is None where there is none to ask for."""

    method: str
    run: Run
    budget: float | None
    note: str = ""


PAPER_CACHE = BlockCacheConfig(rule=CacheRule.band, band=0.1, longest=5, start=0.3)
DRIFT_CACHE = BlockCacheConfig(rule=CacheRule.drift, drift=0.1, longest=4, closed_reuse=True)
FORECAST = BlockCacheConfig(rule=CacheRule.age, longest=1, trend=1.0, closed_reuse=True)
NO_CACHE = BlockCacheConfig()


class Planner:
    """Makes runs out of what a configuration asks for."""

    def __init__(self, config: BenchmarkOptions, models: Mapping[str, Subject]) -> None:
        self.config, self.models = config, models
        main = models[MAIN]
        self.baseline_steps = config.baseline_steps or main.config.steps
        self.elastic_steps = config.elastic_steps or [self.baseline_steps]
        self.control_budgets = config.control_budgets or config.budgets
        self.trained_cache = main.session.router_config.cache() if main.session else NO_CACHE
        default = config.cache or main.config.elastic.cache or self.trained_cache
        self.default = replace(main.config.elastic, cache=default)

    def run(
        self,
        model: str,
        steps: int,
        routes: Routes,
        settings: ElasticConfig | None = None,
        donor: Run | None = None,
        foreign: Any = None,
    ) -> Run:
        """A run with its name; settings None: dense. `foreign` is a dataclass with a `title`."""
        settings = settings or ElasticConfig(elastic=False)
        pipeline, config = self.models[model], self.config
        calibration = (str(config.calibration), config.calibration_samples, config.calibration_calls)
        facts = [
            pipeline.dense_sha256 if routes is Routes.dense else pipeline.weights_sha256,
            str(next(pipeline.dit.parameters()).dtype),
            steps,
            self.guidance(model),
            config.resolution or pipeline.config.resolution,
            pipeline.config.shift,
            getattr(pipeline.config, "solver", Solver.euler).value,
            routes.value,
            to_dict(settings),
            donor.name if donor else "",
            calibration if routes in (Routes.static, Routes.timestep) else "",
            to_dict(pipeline.session.router_config) if pipeline.session and settings.elastic else "",
            *([to_dict(foreign)] if foreign else []),
        ]
        digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]
        what = foreign.title if foreign else routes.value if model in (MAIN, DENSE) else model
        budget = f"-b{settings.budget:g}" if settings.elastic else ""
        return Run(f"{what}-s{steps}{budget}-{digest}", model, steps, routes, settings, donor, foreign)

    def dense(self, steps: int) -> Run:
        """The dense model in so many steps."""
        return self.run(DENSE, steps, Routes.dense)

    def elastic(self, budget: float, steps: int, model: str = MAIN, **changes: Any) -> Run:
        """The routers at a budget, with the default settings but for `changes`."""
        settings = replace(self.default, elastic=True, budget=budget, **changes)
        return self.run(model, steps, Routes.routers, settings)

    @property
    def has_updates(self) -> bool:
        """Whether the model's routers have updates of the blocks."""
        session = self.models[MAIN].session
        return session is not None and session.router_config.updates > 0

    def updates(self, steps: int, budget: float) -> bool:
        """Whether a generation uses them."""
        session = self.models[MAIN].session
        if session is None:
            return False
        return coarseness(session.router_config, steps, budget, self.guidance(MAIN)) is not None

    def guidance(self, model: str) -> float:
        """The guidance scale of a model's runs."""
        asked = self.config.guidance
        return self.models[model].config.guidance if asked is None else asked

    def reference(self) -> Run:
        """The dense meshes that all others are paired with."""
        return self.dense(self.config.reference_steps)


def _dense(planner: Planner) -> Iterator[Case]:
    yield Case("dense", planner.dense(planner.baseline_steps), 1.0)


def _fewer_steps(planner: Planner) -> Iterator[Case]:
    for steps in planner.config.steps:
        if steps != planner.baseline_steps:
            yield Case("fewer_steps", planner.dense(steps), 1.0)


def _euler_steps(planner: Planner) -> Iterator[Case]:
    for steps in planner.config.steps:
        yield Case("euler_steps", planner.run(EULER, steps, Routes.dense), 1.0)


def _elastic(method: Method, **changes: Any) -> Callable[[Planner], Iterator[Case]]:
    def cases(planner: Planner) -> Iterator[Case]:
        for steps in planner.elastic_steps:
            for budget in planner.config.budgets:
                yield Case(method.value, planner.elastic(budget, steps, **changes), budget)

    return cases


def _dense_cache(planner: Planner) -> Iterator[Case]:
    for steps in planner.elastic_steps:
        for drift in planner.config.drifts:
            cache = replace(DRIFT_CACHE, drift=drift, closed_reuse=False)
            run = planner.run(MAIN, steps, Routes.open, ElasticConfig(cache=cache, updates=False))
            yield Case("dense_cache", run, None, f"drift {drift:g}")
        for interval in planner.config.intervals:
            cache = replace(FORECAST, longest=interval - 1, closed_reuse=False)
            run = planner.run(MAIN, steps, Routes.open, ElasticConfig(cache=cache, updates=False))
            yield Case("dense_cache", run, None, f"forecast, computed every {interval} steps")


def _no_updates(planner: Planner) -> Iterator[Case]:
    for steps in planner.elastic_steps:
        for budget in filter(partial(planner.updates, steps), planner.config.budgets):
            run = planner.elastic(budget, steps, updates=False)
            yield Case(Method.elastic_no_updates.value, run, budget)


def _updated_steps(planner: Planner) -> Iterator[Case]:
    for steps in planner.config.steps:
        if planner.updates(steps, 1.0):
            run = planner.run(MAIN, steps, Routes.open, ElasticConfig(cache=NO_CACHE))
            yield Case(Method.updated_steps.value, run, 1.0)


def _control(routes: Routes) -> Callable[[Planner], Iterator[Case]]:
    def cases(planner: Planner) -> Iterator[Case]:
        for budget in planner.control_budgets:
            if budget < 1:  # at 1 there is hardly anything left out to choose
                donor = planner.elastic(budget, planner.baseline_steps, cache=planner.trained_cache)
                run = planner.run(MAIN, planner.baseline_steps, routes, donor.settings, donor)
                yield Case(routes.value, run, budget)

    return cases


REGISTRY: dict[Method, Callable[[Planner], Iterator[Case]]] = {
    Method.dense: _dense,
    Method.fewer_steps: _fewer_steps,
    Method.euler_steps: _euler_steps,
    Method.elastic: _elastic(Method.elastic),
    Method.elastic_no_cache: _elastic(Method.elastic_no_cache, cache=NO_CACHE),
    Method.elastic_no_width: _elastic(Method.elastic_no_width, width=False),
    Method.elastic_paper_cache: _elastic(Method.elastic_paper_cache, cache=PAPER_CACHE),
    Method.elastic_drift_cache: _elastic(Method.elastic_drift_cache, cache=DRIFT_CACHE),
    Method.elastic_shared: _elastic(Method.elastic_shared, shared=True),
    Method.elastic_no_updates: _no_updates,
    Method.updated_steps: _updated_steps,
    Method.dense_cache: _dense_cache,
    Method.random: _control(Routes.random),
    Method.static: _control(Routes.static),
    Method.timestep: _control(Routes.timestep),
    Method.shuffled: _control(Routes.shuffled),
}
WITHOUT_REUSE = (Method.elastic_no_cache, Method.elastic_paper_cache)
UPDATED = (Method.elastic_no_updates, Method.updated_steps)
WITHOUT_ROUTERS = (Method.dense, Method.fewer_steps, Method.euler_steps)
FAMILY = (*(m.value for m in Method if m.name.startswith("elastic")), Method.updated_steps.value)
CONTROLS = tuple(m.value for m in (Method.random, Method.static, Method.timestep, Method.shuffled))


def plan(config: BenchmarkOptions, models: Mapping[str, Subject], items: int) -> tuple[Planner, list[Case]]:
    """The cases of a benchmark of so many items, pictures or prompts.

    Raises:
        UserError: a method that this model or these items do not allow.
    """
    planner = Planner(config, models)
    has_routers = models[MAIN].session is not None
    cases: list[Case] = []
    for method, build in REGISTRY.items():
        if config.methods and method not in config.methods:
            continue
        why = None
        if method not in WITHOUT_ROUTERS and not has_routers:
            why = "the model has no routers"
        elif method is Method.euler_steps and EULER not in models:
            why = "its sampler takes equal Euler steps anyway"
        elif method in WITHOUT_REUSE and planner.trained_cache.closed_reuse:
            why = "its routers were trained to reuse residuals"
        elif method in UPDATED and not planner.has_updates:
            why = "its routers have no updates"
        elif method is Method.shuffled and items < 2:
            why = "it exchanges routes between items, and there is only one"
        if why is None:
            cases += build(planner)
        elif config.methods:
            raise UserError(f"methods has {method.value}, which can't be run: {why}")
    for name in config.variants:
        cases += _variant_cases(planner, name)
    return planner, cases


def _variant_cases(planner: Planner, name: str) -> Iterator[Case]:
    session, steps = planner.models[name].session, planner.baseline_steps
    if session is None:
        yield Case(name, planner.run(name, steps, Routes.dense), None)
        return
    cache = planner.config.cache or session.router_config.cache()
    told = session.conditioner is not None  # the paper's routers know one budget only, that of their training
    for budget in planner.control_budgets if told else [1.0]:
        yield Case(name, planner.elastic(budget, steps, name, cache=cache), budget if told else None)


def needed_runs(planner: Planner, cases: list[Case]) -> list[Run]:
    """Each run once: the reference, the dense model in each number of steps that occurs, donors before controls."""
    runs = [planner.reference(), *(planner.dense(case.run.steps) for case in cases)]
    for case in cases:
        runs += [case.run.donor, case.run] if case.run.donor else [case.run]
    return list(dict.fromkeys(runs))
