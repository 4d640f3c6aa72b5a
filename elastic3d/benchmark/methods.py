"""The registry of methods: from a configuration to the rows of the table, and the runs behind them.

Every control is made to execute what its donor does: the routers at the same budget, with the cache they were trained
with, or none. It runs with that cache itself, so that the rows to compare are those two. `random_blocks` has
no use for routers: it executes its budget of what all blocks do, with the few-step LoRA where that is used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from torch import nn

from elastic3d.benchmark.config import BY_BATCH, BenchmarkOptions, CacheName, Method, PolicyName
from elastic3d.elastic.config import BlockCacheConfig, CacheRule, ElasticConfig, least_budget
from elastic3d.elastic.few_step import coarseness
from elastic3d.elastic.session import ElasticSession
from elastic3d.elastic.training_free import Calibration
from elastic3d.errors import UserError
from elastic3d.pipelines.training_free import calibration_file, find_calibration
from elastic3d.utils.files import file_sha256

MAIN, DENSE, EULER = "model", "dense", "euler"


@dataclass(frozen=True)
class Model:
    """A pipeline, its DiT, and what it does where nothing is asked for. `sampler` is what else decides what it makes,
    `pipe` the pipeline of diffusers, where it is one; `moves`: of the sampler, by the number of steps."""

    pipeline: Any
    dit: nn.Module
    steps: int
    guidance: float
    resolution: int
    sampler: tuple[float | str, ...]
    weights_sha256: str | None
    dense_sha256: str | None
    elastic: ElasticConfig = field(default_factory=ElasticConfig)
    moves: Callable[[int], int] = int
    pipe: Any = None

    @property
    def session(self) -> ElasticSession | None:
        """Of its routers."""
        return self.pipeline.session


class Routes(Enum):
    """Who decides: nobody (the dense model, where no policy does), the routers, or a table."""

    dense = "dense"
    routers = "routers"
    open = "open"  # every block, at full width: only the cache acts
    random = "random"
    random_blocks = "random_blocks"
    static = "static"
    timestep = "timestep"
    shuffled = "shuffled"


CALIBRATED = (Routes.static, Routes.timestep)  # found on the calibration items


@dataclass(frozen=True)
class Rival:
    """A training-free cache and its options (`elastic3d.benchmark.rivals` runs it)."""

    kind: CacheName
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def note(self) -> str:
        """The options in words."""
        return ", ".join(f"{k} {v}" if isinstance(v, str) else f"{k} {v:g}" for k, v in self.options.items())


@dataclass(frozen=True)
class Run:
    """One way to make meshes or images. Methods that ask for the same way share what it made and its times.

    `name` tells it from every other, also from the same with other weights or options. `donor` is the run whose routes
    a control is matched to; `unbiased` leaves out the routers' gate bias over time; `policy` decides in their place.
    """

    name: str
    model: str = field(compare=False)
    steps: int = field(compare=False)
    routes: Routes = field(compare=False)
    settings: ElasticConfig = field(compare=False)
    donor: Run | None = field(compare=False, default=None)
    rival: Rival | None = field(compare=False, default=None)
    unbiased: bool = field(compare=False, default=False)
    policy: PolicyName | None = field(compare=False, default=None)


@dataclass(frozen=True)
class Job:
    """One result to make by each run: an item (the file of an image, or a prompt) and a seed."""

    item: Path | str
    seed: int

    @property
    def name(self) -> str:
        """The prompt, or the name of the image without its suffix."""
        return self.item.stem if isinstance(self.item, Path) else self.item

    @cached_property
    def sha256(self) -> str:
        """Of the prompt, or of the image's file."""
        item = self.item
        return file_sha256(item) if isinstance(item, Path) else hashlib.sha256(item.encode()).hexdigest()


@dataclass(frozen=True)
class Case:
    """A row of the table, but for the batch size. `budget` is None where there is none to ask for."""

    method: str
    run: Run
    budget: float | None
    note: str = ""


NO_CACHE = BlockCacheConfig()


class Planner:
    """Makes runs out of what a configuration asks for."""

    def __init__(self, config: BenchmarkOptions, models: Mapping[str, Model]) -> None:
        self.config, self.models = config, models
        self.calibrated_on: list[tuple[str, int]] = []  # digests and seeds of a task's calibration items
        main = models[MAIN]
        self.baseline_steps = config.baseline_steps or main.steps
        self.elastic_steps = config.elastic_steps or [self.baseline_steps]
        self.control_steps = config.control_steps or self.baseline_steps
        self.control_budgets = config.control_budgets or config.budgets
        self.trained_cache = main.session.router_config.cache() if main.session else NO_CACHE
        default = config.cache or main.elastic.cache or self.trained_cache
        self.default = replace(main.elastic, cache=default)
        # the dense results that speed-ups are over, and those that all others are paired with
        self.baseline, self.reference = self.dense(self.baseline_steps), self.dense(config.reference_steps)

    def run(
        self, name: str, steps: int, routes: Routes, settings: ElasticConfig | None = None, **more: Any
    ) -> Run:
        """A run with its name; settings None: dense; `more`: its other fields."""
        run = Run("", name, steps, routes, settings or ElasticConfig(elastic=False), **more)
        model, config, elastic = self.models[name], self.config, run.settings.elastic
        kind, weight = run.rival and run.rival.kind, next(self.models[name].dit.parameters())
        measured = routes in (*CALIBRATED, Routes.random) or kind is CacheName.mag_cache
        facts = (
            run,
            model.dense_sha256 if routes is Routes.dense else model.weights_sha256,
            (weight.dtype, weight.device.type),
            self.guidance(name),
            config.resolution or model.resolution,
            model.sampler,
            (measured and self.calibrated_on, config.batched_decisions and kind in BY_BATCH),
            model.session.router_config if model.session and elastic else None,
            self.calibration_digest if run.policy else None,
        )
        digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:8]
        what = (kind or run.policy or routes).value if name in (MAIN, DENSE) else name
        budget = f"-b{run.settings.budget:g}" if elastic else ""
        return replace(run, name=f"{what}-s{steps}{budget}-{digest}")

    @cached_property
    def calibration(self) -> Calibration | None:
        """What policies go by; None where there is none. UserError for a file that is named and can't be used."""
        model, named = self.models[DENSE], self.config.policy_calibration
        return find_calibration(calibration_file(named) if named else model.pipeline.calibration, model.dit)

    @cached_property
    def calibration_digest(self) -> str:
        """Of its numbers."""
        found = self.calibration
        values = [] if found is None else [found.times, found.changes, *found.moments.values()]
        return hashlib.sha256(b"".join(value.tobytes() for value in values)).hexdigest()[:8]

    def dense(self, steps: int) -> Run:
        """The dense model in N steps."""
        return self.run(DENSE, steps, Routes.dense)

    def elastic(
        self, budget: float, steps: int, model: str = MAIN, unbiased: bool = False, **changes: Any
    ) -> Run:
        """The routers at a budget, with the default settings but for `changes`."""
        settings = replace(self.default, elastic=True, budget=budget, **changes)
        return self.run(model, steps, Routes.routers, settings, unbiased=unbiased)

    def every_block(self, steps: int, cache: BlockCacheConfig | None = None) -> Run:
        """Every block of the model with routers, at full width: a cache acts, or, without one, the few-step LoRA."""
        settings = ElasticConfig(cache=cache or NO_CACHE, few_step=cache is None)
        return self.run(MAIN, steps, Routes.open, settings)

    def has_lora(self, steps: int, budget: float) -> bool:
        """Whether a generation uses the few-step LoRA of the routers."""
        session, moves = self.models[MAIN].session, self.models[MAIN].moves(steps)
        coarse = session and coarseness(session.router_config, moves, budget, self.guidance(MAIN))
        return coarse is not None

    def guidance(self, model: str) -> float:
        """The guidance scale of a model's runs."""
        requested = self.config.guidance
        return self.models[model].guidance if requested is None else requested


ON_REQUEST = (Method.elastic_no_lora, Method.elastic_no_bias, Method.elastic_no_damping, Method.random_blocks)
WITHOUT_ROUTERS = (Method.dense, Method.fewer_steps, Method.euler_steps, Method.training_free)
FEWER = (Method.dense.value, Method.fewer_steps.value)
FAMILY = (Method.elastic.value, Method.elastic_shared.value, Method.few_step_lora.value)
CONTROLS = ("random", "random_blocks", "static", "timestep", "shuffled")


def plan(planner: Planner, items: int) -> list[Case]:
    """The cases of a benchmark of N items, images or prompts. UserError for a method that they do not allow."""
    cases: list[Case] = []
    chosen = planner.config.methods
    for method in Method:
        why = _impossible(planner, method, items)
        if method in chosen and why:
            raise UserError(f"methods has {method.value}, which can't be run: {why}")
        if method in chosen or not (chosen or why or method in ON_REQUEST):
            cases += _cases(planner, method)
    for name in planner.config.variants:
        cases += _variant_cases(planner, name)
    return cases


def _impossible(planner: Planner, method: Method, items: int) -> str:
    """Why a method has no rows; empty where it has."""
    session, cache = planner.models[MAIN].session, planner.trained_cache
    if method in WITHOUT_ROUTERS:
        known = method is not Method.euler_steps or EULER in planner.models
        return "" if known else "its sampler takes equal Euler steps anyway"
    if session is None:
        return "the model has no routers"
    router = session.router_config
    lora = "" if router.few_step_rank else "its routers have no few-step LoRA"
    trained = "its routers were trained with their few-step LoRA" if router.trained_steps else ""
    damped = cache.dampings or cache.damping not in (0, 1)
    reasons = {
        Method.few_step_lora: lora,
        Method.elastic_no_lora: lora or trained,
        Method.elastic_no_bias: "" if router.curves.gate_bias else "its routers have no gate bias over time",
        Method.elastic_no_damping: "" if damped else "the forecasts of its routers have no damping",
        Method.shuffled: "" if items > 1 else "it exchanges routes between items, and there is only one",
    }
    return reasons.get(method, "")


def _cases(planner: Planner, method: Method) -> Iterator[Case]:
    """The rows of a method."""
    config, base, name, plain = planner.config, planner.baseline_steps, method.value, planner.models[DENSE]
    if method is Method.dense:
        yield Case(name, planner.dense(base), 1.0)
    elif method is Method.fewer_steps:
        yield from (Case(name, planner.dense(steps), 1.0) for steps in config.steps if steps != base)
    elif method is Method.euler_steps:
        yield from (Case(name, planner.run(EULER, steps, Routes.dense), 1.0) for steps in config.steps)
    elif method is Method.few_step_lora:
        few = [steps for steps in config.steps if planner.has_lora(steps, 1.0)]
        yield from (Case(name, planner.every_block(steps), 1.0) for steps in few)
    elif method is Method.dense_cache:
        yield from _dense_cache(planner)
    elif method is Method.training_free:
        budgets = [each for each in planner.control_budgets if least_budget(plain.moves(base)) <= each < 1]
        policies = [each for each in config.policies if each is PolicyName.early or planner.calibration]
        for policy, budget in product(policies, budgets):
            run = planner.run(DENSE, base, Routes.dense, ElasticConfig(budget=budget), policy=policy)
            yield Case(name, run, budget, policy.value)
    elif name in CONTROLS:
        steps = planner.control_steps
        budgets = [each for each in planner.control_budgets if each < 1]  # at 1 hardly any choice is left
        for budget in budgets:
            donor = planner.elastic(budget, steps, cache=planner.trained_cache)
            if method is Method.random_blocks:  # at a share of what all blocks execute
                donor = planner.every_block(steps)
            settings = replace(donor.settings, budget=budget)
            yield Case(name, planner.run(MAIN, steps, Routes(name), settings, donor=donor), budget)
    else:  # the routers, or an ablation of them
        undamped = replace(planner.default.cache or NO_CACHE, damping=1.0, times=[], dampings=[])
        changes: dict[Method, dict[str, Any]] = {
            Method.elastic_shared: {"shared": True},
            Method.elastic_no_lora: {"few_step": False},
            Method.elastic_no_bias: {"unbiased": True},
            Method.elastic_no_damping: {"cache": undamped},
        }
        for steps, budget in product(planner.elastic_steps, config.budgets):
            if method is not Method.elastic_no_lora or planner.has_lora(steps, budget):
                yield Case(name, planner.elastic(budget, steps, **changes.get(method, {})), budget)


def _dense_cache(planner: Planner) -> Iterator[Case]:
    """A forecast at fixed intervals, without routers: with given dampings, and with the one calibrated for them."""
    config, line, own = planner.config, BlockCacheConfig(rule=CacheRule.age), planner.trained_cache
    dampings = {f"damping {each:g}": replace(line, damping=each) for each in config.dampings}
    if own.dampings or own.damping not in (0.0, *config.dampings):
        calibrated = replace(line, damping=own.damping, times=own.times, dampings=own.dampings)
        dampings["calibrated damping"] = calibrated
    for steps, interval, (note, damped) in product(planner.elastic_steps, config.intervals, dampings.items()):
        start = min(1.0, (config.warmup - 0.5) / planner.models[MAIN].moves(steps))  # rounded up to steps
        run = planner.every_block(steps, replace(damped, longest=interval - 1, start=start))
        yield Case("dense_cache", run, None, f"every {interval} steps, {note}")


def _variant_cases(planner: Planner, name: str) -> Iterator[Case]:
    session, steps = planner.models[name].session, planner.control_steps
    if session is None:
        yield Case(name, planner.run(name, steps, Routes.dense), None)
        return
    cache = planner.config.cache or session.router_config.cache()
    for budget in planner.control_budgets:
        yield Case(name, planner.elastic(budget, steps, name, cache=cache), budget)


def needed_runs(planner: Planner, cases: list[Case]) -> list[Run]:
    """Each run once: the baseline, the dense model in each number of steps that occurs, donors before controls."""
    dense = [planner.baseline, *(planner.dense(case.run.steps) for case in cases)]
    own = [run for case in cases for run in (case.run.donor, case.run) if run is not None]
    return list(dict.fromkeys(dense + own))
