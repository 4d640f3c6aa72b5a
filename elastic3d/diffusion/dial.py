"""The dial of a model: a budget becomes steps, and a budget of its routers or of its plan without training, by a table
that was measured with the model.

`dial.json` lies beside `pipeline.json`. A row is one way to run the model: its cost, which is the share of the dense
default generation's FLOPs that it executes, its settings, and what was measured with them. Costs ascend. A row has a
higher fidelity than every cheaper one (meshes: IoU to the reference; images: PSNR to the dense default's), and is not
faster: a smaller budget is never slower, and no row is worse than another of the same or lower cost.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from elastic3d.diffusion.options import IDLE, PipelineConfig, Quality
from elastic3d.diffusion.sampler import sampling_times
from elastic3d.elastic.config import MIN_BUDGET, ElasticOptions, RouterConfig, least_budget
from elastic3d.elastic.few_step import coarseness
from elastic3d.elastic.training_free import CALIBRATION_NAME
from elastic3d.errors import UserError
from elastic3d.utils.files import Maybe, Number, load_json, printable, save_json

DIAL_NAME = "dial.json"
Routers = RouterConfig | None  # of a model; None: it has none
F_SCORES = ("f_score@0.02", "f_score@0.05")
TOLERANCE = 0.01  # what scores of the default may lose, of those of the dense default generation

_F_SCORES, _SSIM = dict.fromkeys(F_SCORES, Number(0, 1)), {"ssim": Number(-1, 1)}
_DENSE = {"steps": Number(1, 1000, whole=True), "guidance": Number(0, 100)}
_ROW = {
    "cost": Number(1e-4, 1),
    "steps": Number(1, 1000, whole=True),
    "router_budget": Maybe(Number(MIN_BUDGET, 1)),
    "few_step_lora": bool,
    "speedup": {str: Number(1e-3, 1e6)},
}
_REST = {"names": dict.fromkeys(Quality.__members__, Number(0, 1)), "measured": dict}


@dataclass(frozen=True, eq=False)
class Kind:
    """What the dials of meshes, or of images, measure.

    fidelity: the name of the score that rises with the cost; scores: those of which the default row keeps 99 %; shape:
    of a file; plans: whether a row may be the plan without training.
    """

    fidelity: str
    scores: tuple[str, ...]
    shape: Mapping[str, Any]
    plans: bool


MESHES = Kind(
    "iou",
    F_SCORES,
    {"dense": _DENSE | _F_SCORES, "rows": [_ROW | {"iou": Number(0, 1)} | _F_SCORES], **_REST},
    True,
)
IMAGES = Kind(  # PSNR and SSIM beside the dense default generation's images, in dB at most 100
    "psnr",
    ("ssim",),
    {"dense": _DENSE | _SSIM, "rows": [_ROW | {"psnr": Number(0, 100)} | _SSIM], **_REST},
    False,
)


@dataclass(frozen=True)
class Row:
    """One way to run a model, and what was measured with it.

    cost: share of the dense default generation's FLOPs; router_budget: share of the FLOPs of `steps` dense steps that
    the routers may execute, None for the dense model; planned: the calibrated plan without training keeps that budget,
    in the place of the routers; few_step_lora: whether the few-step LoRA is merged, with which
    the second guidance branch runs in some of the steps alone; speedup: of the DiT over the dense default, by batch
    size; fidelity, scores: as the `Kind` names them; scope: that of the routers (`block` or `step`), None in files that
    do not name it, which are none of per-block routers for few steps.
    """

    cost: float
    steps: int
    router_budget: float | None
    few_step_lora: bool
    speedup: Mapping[str, float]
    fidelity: float
    scores: tuple[float, ...]
    scope: str | None = None
    planned: bool = False

    @classmethod
    def of(cls, values: Mapping[str, Any], kind: Kind) -> Row:
        """A row as the file holds it."""
        known = {item.name: values[item.name] for item in fields(cls) if item.name in values}
        scores = tuple(values[name] for name in kind.scores)
        return cls(**known | {"fidelity": values[kind.fidelity], "scores": scores})

    def towards(self, rows: Sequence[Row], cost: float) -> Row:
        """This row at a cost of at most the next one's of all rows: routers of whole steps keep budgets in between."""
        after = next((row for row in rows if row.cost >= cost and row is not self), None)
        if after is None or self.router_budget is None or self.planned or self.few_step_lora:
            return self
        if after.planned or after.steps != self.steps:
            return self
        share = (cost - self.cost) / (after.cost - self.cost)
        most = 1.0 if after.router_budget is None else after.router_budget
        budget = self.router_budget + share * (most - self.router_budget)
        return replace(self, cost=cost, router_budget=budget)

    def over(self, call: ElasticOptions, quality: Quality | None) -> tuple[ElasticOptions, dict[str, Any]]:
        """What a caller asks for, with the settings of this row in the place of its budget; what was requested, and
        what it costs, for metadata."""
        name = (quality or Quality.default).name if call.budget is None else float(call.budget)
        elastic = call.elastic if self.router_budget is not None else False
        found = replace(call, elastic=elastic, budget=self.router_budget)
        return found, {"dial": {"requested": name, "cost": self.cost}}


@dataclass(frozen=True)
class Dial:
    """The rows of a model, cheapest first, and the dense default generation that they are measured against.

    `values` is what the file holds.
    """

    rows: tuple[Row, ...]
    steps: int
    guidance: float
    scores: tuple[float, ...]
    values: Mapping[str, Any]
    kind: Kind = MESHES

    def named(self, quality: Quality) -> Row:
        """The row of a name; `parse_dial` has seen to it that there is one."""
        row = named_row(self.rows, quality, self.scores)
        assert row is not None
        return row


def named_row(rows: Sequence[Row], quality: Quality, dense: Sequence[float]) -> Row | None:
    """`fast` is the cheapest of some rows in ascending order, `best` the last one, and `default` the fastest whose
    scores are within 1 % of the dense default generation's; None where no row's are."""
    if quality is not Quality.default:
        return rows[0 if quality is Quality.fast else -1]
    least = [(1 - TOLERANCE) * score for score in dense]
    return next((row for row in rows if all(map(operator.ge, row.scores, least))), None)


def choose(
    dial: Dial | None,
    requested: ElasticOptions,
    steps: int | None,
    quality: Quality | None,
    guidance: float | None,
) -> Row | None:
    """The row that a call runs; None where the dial is not used: by `steps`, by a dense call, by a model without one.
    With another `guidance` than was measured (None: the model's), or `few_step=False`, none of the few-step LoRA.
    UserError: a budget below the cheapest row; a quality without a dial, or with another choice of speed."""
    if quality is not None:
        _check(dial, requested, steps, quality)
    if dial is None or steps is not None or requested.elastic is False:
        return None
    lora = guidance in (None, dial.guidance) and requested.few_step is not False
    routed = any(value is not None for name, value in vars(requested).items() if name != "budget")
    rows = [row for row in dial.rows if lora or not row.few_step_lora]
    rows = [row for row in rows if not routed or (row.router_budget is not None and not row.planned)]
    if not rows:
        raise UserError(f"no row of {DIAL_NAME} can run with these options, expected steps= with them")
    if requested.budget is not None:
        affordable = [row for row in rows if row.cost <= requested.budget]
        if not affordable:
            why = "" if len(rows) == len(dial.rows) else ", as these options rule out cheaper settings"
            raise UserError(f"budget is {requested.budget:g}, expected at least {rows[0].cost:g}{why}")
        return affordable[-1].towards(dial.rows, requested.budget)
    return named_row(rows, quality or Quality.default, dial.scores) or rows[-1]


def resolution_of(model: PipelineConfig, quality: Quality | None) -> int:
    """Grid cells a side of the decoding, for a quality or for none."""
    own = 0 if quality is None else getattr(model, f"{quality.name}_resolution", 0)
    return own or model.resolution


def _check(dial: Dial | None, requested: ElasticOptions, steps: int | None, quality: Quality) -> None:
    """UserError as `choose`, of a quality."""
    name = quality.name
    for other, given in (("budget", requested.budget), ("steps", steps)):
        if given is not None:
            raise UserError(f"quality is {name} and {other} is {given}, expected one of them")
    if requested.elastic is False:
        raise UserError(f"quality is {name}, but elastic is false")
    if dial is None:
        raise UserError(f"quality is {name}, but this model has no {DIAL_NAME}: set budget= or steps=")


def load_dial(folder: Path, model: PipelineConfig, routers: Routers, kind: Kind = MESHES) -> Dial | None:
    """The dial in a model's folder; None where there is none. `model`: steps, guidance and grid of its dense default
    generation. UserError, naming the file: it is broken, its rows do not go up in cost and fidelity and down in speed,
    its names are not those of the rule, or it is the table of a model that runs otherwise."""
    path = folder / DIAL_NAME
    if not path.exists():
        return None
    dial = parse_dial(load_json(path, kind.shape), printable(path), kind)
    check_dial(dial, folder, model, routers)
    return dial


def check_dial(dial: Dial, folder: Path, model: PipelineConfig, routers: Routers) -> None:
    """UserError, as `load_dial`, unless a dial is of the model in a folder."""
    source = printable(folder / DIAL_NAME)
    for name, found in (("steps", dial.steps), ("guidance", dial.guidance)):
        if found != (wanted := getattr(model, name)):
            raise UserError(f"{source}: dense: {name} is {found:g}, expected {wanted:g}, the model's default")
    for number, row in enumerate(dial.rows):
        if fault := _misfit(row, model, routers, folder):
            raise UserError(f"{source}: rows[{number}]: {fault}")


def save_dial(dial: Dial | None, folder: Path) -> None:
    """Write `dial.json`; without a dial, remove what is there: it was measured with another model."""
    if dial is None:
        (folder / DIAL_NAME).unlink(missing_ok=True)
    else:
        save_json(dial.values, folder / DIAL_NAME)


def parse_dial(values: Mapping[str, Any], source: str, kind: Kind = MESHES) -> Dial:
    """The dial of a JSON object of the kind's shape; UserError naming `source` for rows that are no dial."""
    rows, dense = tuple(Row.of(each, kind) for each in values["rows"]), values["dense"]
    scores = tuple(dense[name] for name in kind.scores)
    dial = Dial(rows, dense["steps"], dense["guidance"], scores, values, kind)
    if not rows:
        raise UserError(f"{source}: rows is empty, expected at least one")
    for number, row in enumerate(rows):
        if fault := _disorder(row, rows[max(number - 1, 0)], set(rows[0].speedup), kind):
            raise UserError(f"{source}: rows[{number}]: {fault}")
    for name, quality in Quality.__members__.items():
        if (named := named_row(rows, quality, scores)) is None:
            wanted = " and ".join(kind.scores)
            raise UserError(f"{source}: no row has {wanted} within 1 % of the dense default's")
        if (found := values["names"][name]) != named.cost:
            raise UserError(f"{source}: names: {name} is {found:g}, expected {named.cost:g}, its row's cost")
    return dial


def _disorder(row: Row, cheaper: Row, batches: set[str], kind: Kind) -> str | None:
    """What is wrong with a row after the `cheaper` one before it, which is itself for the first; None: nothing."""
    if "1" not in row.speedup or set(row.speedup) != batches:
        return f"speedup has batches of {', '.join(row.speedup)}, expected 1 and those of all rows"
    if not isinstance(row.planned, bool) or row.planned > kind.plans:  # no shape has it: files may lack it
        return f"planned is {row.planned!r}, expected {'true or false' if kind.plans else 'false'}"
    if row.few_step_lora and (row.router_budget is None or row.planned):
        return "few_step_lora is true, expected false for the dense model and its plan"
    if row.planned and row.router_budget is None:
        return "planned is true, but router_budget is null"
    if row is cheaper:
        return None
    if row.cost <= cheaper.cost:
        return f"cost is {row.cost:g}, expected above {cheaper.cost:g}, that of the row before"
    if row.fidelity <= cheaper.fidelity:
        return (
            f"{kind.fidelity} is {row.fidelity:g}, expected above {cheaper.fidelity:g}, that of a cheaper row"
        )
    for batch, most in sorted(cheaper.speedup.items()):
        if row.speedup[batch] > most:
            found = f"speedup in batches of {batch} is {row.speedup[batch]:g}"
            return f"{found}, expected at most {most:g}, that of a cheaper row"
    return None


def _misfit(row: Row, model: PipelineConfig, routers: Routers, folder: Path) -> str | None:
    """Why a row is none of the model in a folder, with these routers; None where it is."""
    if (budget := row.router_budget) is None:
        return None
    times = sampling_times(model, row.steps).tolist()[:-1]
    steps, idle = len(times), int(model.grid in IDLE)
    if row.planned:
        if not (folder / CALIBRATION_NAME).is_file():
            return f"planned is true, but there is no {CALIBRATION_NAME} here"
        short = budget < (least := least_budget(steps))
        return f"router_budget is {budget:g}, expected at least {least:.2f}" if short else None
    if routers is None:
        return f"router_budget is {budget:g}, but this model has no routers"
    if row.scope != routers.scope.name and (row.scope is not None or routers.trained_steps):
        return f"scope is {row.scope!r}, expected {routers.scope.name}, that of this model's routers"
    try:
        routers.check_generation(steps, model.guidance, True, idle)
        routers.check_budget(budget, times, idle)
    except UserError as error:
        return str(error)
    lora = coarseness(routers, steps, budget, model.guidance) is not None
    if lora is row.few_step_lora:
        return None
    runs = f"{row.steps} steps run {'with' if lora else 'without'} the few-step LoRA of these routers"
    return f"few_step_lora is {str(row.few_step_lora).lower()}, but {runs}"
