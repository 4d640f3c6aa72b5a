"""Calibrations of the training-free policy: measured in a few generations, kept in a file, put on a model.

from elastic3d import disable, enable

enable(pipe, budget=0.5)  # a pipeline of diffusers; its calibration is taken where its folder has one
images = pipe("a red fox")
disable(pipe)  # the pipeline is what it was
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from elastic3d.elastic.attachment import adapter_for, attach, detach, has_routers, is_attached, session_of
from elastic3d.elastic.config import ElasticConfig
from elastic3d.elastic.session import ElasticSession
from elastic3d.elastic.training_free import (
    NO_ROUTERS,
    Array,
    Calibration,
    Schedule,
    Series,
    StepPolicy,
    relative_change,
)
from elastic3d.errors import UserError
from elastic3d.utils.files import printable
from elastic3d.utils.structured import Number, load_json, save_json

CALIBRATION_NAME = "training_free.json"
TOKENS = 64  # of each stream, spread evenly, that moments are taken of
DIGITS = 8
_ANY = Number(-1e300, 1e300)
_SHAPE = {
    "about": {"model": dict, "samples": int},
    "times": [Number(0, 1)],
    "moments": [{"span": int, "stream": int, "values": [[_ANY]]}],
    "result": [[_ANY]],
    "changes": [Number(0, 1e300)],
}

# ------------------------------------------------------------------------------------------------ on and off


def put_policy(
    model: Any, calibration: Calibration | None = None, schedule: Schedule | None = None
) -> ElasticSession:
    """Attach a training-free policy to a model, or a pipeline of diffusers, without routers: from now on the budget of
    `session.settings` holds. ValueError where it has routers, or for a schedule that needs a calibration."""
    policy = StepPolicy(calibration, schedule)
    session = attach(model, NO_ROUTERS)
    session.source = policy
    return session


def enable(pipe: Any, budget: float = 0.5, calibration: str | Path | None = None) -> ElasticSession:
    """Let a stock pipeline of diffusers run its blocks at a share `budget` of their FLOPs, from 0.3 to 1.

    Without training: some of the steps run the blocks, what these add is forecast at the others. Called again, it
    changes the budget.

    Args:
        calibration: file or folder of `elastic3d calibrate`; None: the pipeline's own folder, where it has one.

    Raises:
        ValueError: a pipeline of another family, or with routers; a budget out of range.
        UserError: a calibration that is missing, broken, empty, or of another model.
    """
    transformer = pipe.transformer
    settings = ElasticConfig(budget=budget)
    if calibration is not None:
        calibration = calibration_file(calibration)
    found = find_calibration(calibration or getattr(pipe.config, "_name_or_path", None), transformer)
    if is_attached(transformer):
        if has_routers(transformer):
            raise ValueError(
                "the pipeline has routers, which take a budget: set session.settings.budget, or detach them"
            )
        detach(pipe)
    session = put_policy(pipe, found)
    session.settings = settings
    return session


def disable(pipe: Any) -> None:
    """Take off what `enable` put on: the pipeline is what it was before. ValueError where there is nothing."""
    detach(pipe)


# -------------------------------------------------------------------------------------------------- files


def describe(model: nn.Module) -> dict[str, Any]:
    """What a calibration has to fit: the family, the number of blocks of each list, their width."""
    adapter = adapter_for(model)
    lists = [(model.get_submodule(name), kind) for name, kind in adapter.lists]
    width = lists[0][1].width(next(lists[0][0].children()))
    return {
        "family": adapter.family,
        "blocks": [len(list(blocks.children())) for blocks, _ in lists],
        "width": width,
    }


def calibration_file(place: str | Path) -> Path:
    """The file of a calibration, named by itself or by its folder; UserError where there is none."""
    path = Path(place) / CALIBRATION_NAME if Path(place).is_dir() else Path(place)
    if not path.is_file():
        raise UserError(f"there is no calibration {printable(path)}: write one with elastic3d calibrate")
    return path


def series_of(model: nn.Module) -> set[Series]:
    """What a calibration has moments of: every stream of every list of blocks, by the number of its first block."""
    found: set[Series] = set()
    start = 0
    for name, kind in adapter_for(model).lists:
        found |= {(start, number) for number in range(len(kind.stream_names))}
        start += len(list(model.get_submodule(name).children()))
    return found


def find_calibration(place: str | Path | None, model: nn.Module) -> Calibration | None:
    """The calibration in a file, or in a folder; None where there is none. UserError as `load_calibration`."""
    if not place:
        return None
    path = Path(place) / CALIBRATION_NAME if Path(place).is_dir() else Path(place)
    return load_calibration(path, model) if path.is_file() else None


def load_calibration(path: Path, model: nn.Module) -> Calibration:
    """A calibration of this model. UserError naming the file: it is broken, empty, or of another model."""
    values, source = load_json(path, _SHAPE), printable(path)
    expected = describe(model)
    if values["about"]["model"] != expected:
        raise UserError(f"{source} is of another model: {values['about']['model']}, expected {expected}")
    times = np.array(values["times"])
    steps = len(times)
    if steps < 2 or not values["moments"]:
        raise UserError(f"{source} is empty, expected at least two steps: run elastic3d calibrate again")
    if not (np.diff(times) > 0).all():
        raise UserError(f"{source}: times are {values['times']}, expected ascending ones")
    tables = [("moments", each["values"]) for each in values["moments"]] + [("result", values["result"])]
    for name, table in tables:
        if [len(row) for row in table] != [steps] * steps:
            raise UserError(f"{source}: {name} has no {steps} x {steps} numbers, one row a step")
    moments = {(each["span"], each["stream"]): np.array(each["values"]) for each in values["moments"]}
    if set(moments) != series_of(model):
        raise UserError(f"{source} has moments of {sorted(moments)}, expected {sorted(series_of(model))}")
    if len(values["changes"]) != steps:
        raise UserError(
            f"{source}: changes has {len(values['changes'])} values, expected {steps}, one a step"
        )
    return Calibration(
        times, moments, np.array(values["result"]), np.array(values["changes"]), values["about"]
    )


def save_calibration(calibration: Calibration, path: Path) -> None:
    """Write the file that `load_calibration` reads, whole or not at all."""
    rounded = np.vectorize(lambda value: float(f"{value:.{DIGITS}g}"), otypes=[float])
    moments = [
        {"span": span, "stream": stream, "values": rounded(moment).tolist()}
        for (span, stream), moment in calibration.moments.items()
    ]
    parts = {name: rounded(getattr(calibration, name)).tolist() for name in ("times", "result", "changes")}
    save_json({"about": dict(calibration.about), **parts, "moments": moments}, path)


# ---------------------------------------------------------------------------------------------- measuring


def calibrate(
    model: nn.Module,
    generate: Callable[[int], Any],
    samples: int,
    guidance: float = 1.0,
    on_sample: Callable[[int, int], None] = lambda *_: None,
) -> Calibration:
    """The calibration of a model with a session, from `samples` dense generations.

    `generate` makes the one sample of a number; `guidance` is the scale that the branches are put together with, where
    there are two; `on_sample(done, samples)` is called after each. UserError: generations of fewer than three steps, or
    values that are not finite.
    """
    times, totals, result, changes = np.zeros(0), dict[Series, Array](), np.zeros(0), np.zeros(0)
    for number in range(samples):
        with recorded(model) as notes:
            generate(number)
        on_sample(number + 1, samples)
        times = np.array(notes.times)
        moments = notes.moments()
        totals = {series: totals.get(series, 0.0) + moment / samples for series, moment in moments.items()}
        result = (result if number else 0.0) + notes.result(guidance) / samples
        changes = (changes if number else 0.0) + notes.changes() / samples
    about = {"model": describe(model), "samples": samples, "steps": len(times), "guidance": guidance}
    return Calibration(times, totals, result, changes, about)


@dataclass
class Notes:
    """What a dense generation of one sample did: for each step its time, and for each pass of it what each list added
    to its rows. The conditional branch's row comes first."""

    times: list[float] = field(default_factory=list)
    added: list[list[dict[Series, Tensor]]] = field(default_factory=list)  # (rows,d) each
    inputs: list[Tensor] = field(default_factory=list)  # of the first pass of each step (B,L,D)

    def note(self, time: float, added: dict[Series, Tensor], tokens: Tensor) -> None:
        """A pass is over."""
        if not self.times or time != self.times[-1]:
            self.times.append(time)
            self.added.append([])
            self.inputs.append(tokens)
        self.added[-1].append(added)

    def moments(self) -> dict[Series, Array]:
        """Second moments (S,S) of each series, of a sample and branch."""
        if len(self.times) < 3:
            raise UserError(
                f"a generation has {len(self.times)} steps, expected at least 3 to calibrate a policy on"
            )
        found: dict[Series, Array] = defaultdict(lambda: np.zeros((len(self.times),) * 2))
        branches = list(zip(*self.added, strict=True))  # the passes of each, whose texts may differ in length
        for passes in branches:
            for series in passes[0]:
                values = torch.stack([each[series] for each in passes])
                found[series] += second_moments(values) / len(branches)
        if not all(np.isfinite(moment).all() for moment in found.values()):
            raise UserError("a generation has values that are not finite: try dtype=float32")
        return dict(found)

    def result(self, guidance: float) -> Array:
        """Second moments (S,S) of what each list adds to its first stream, with the branches put together as guidance
        does; their sum."""
        found = np.zeros((len(self.times),) * 2)
        for series in [each for each in self.added[0][0] if each[1] == 0]:
            rows = torch.stack([torch.cat([each[series] for each in passes]) for passes in self.added])
            # of one branch alone this is the branch itself
            found += second_moments(rows[:, -1:] + guidance * (rows[:, :1] - rows[:, -1:]))
        return found

    def changes(self) -> Array:
        """Relative changes (S,) of the input."""
        before: list[Tensor | None] = [None, *self.inputs[:-1]]
        return np.array([relative_change(*pair) for pair in zip(before, self.inputs, strict=True)])


@contextmanager
def recorded(model: nn.Module) -> Iterator[Notes]:
    """While it lasts, a model with a session is the dense one, and what its lists of blocks add is noted."""
    session, adapter, notes = session_of(model), adapter_for(model), Notes()
    with session.recording() as residuals:

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            time = float(adapter.timestep(args, kwargs)[0])
            added = {
                (span, number): some(stream).flatten(1).float().cpu()
                for span, streams in residuals.items()
                for number, stream in enumerate(streams)
            }
            notes.note(time, added, some(session.entered[0][0]).float().cpu())

        handle = model.register_forward_hook(after, with_kwargs=True)
        try:
            yield notes
        finally:
            handle.remove()


def second_moments(values: Tensor) -> Array:
    """Values (S,B,d) -> (S,S), of a sample."""
    found: Array = torch.einsum("sbd,tbd->st", values.double(), values.double()).numpy() / values.shape[1]
    return found


def some(stream: Tensor, count: int = TOKENS) -> Tensor:
    """`count` tokens of a stream (B,L,D), spread evenly; all where there are fewer."""
    length = stream.shape[1]
    picked: Sequence[int] = [i * length // count for i in range(count)] if length > count else range(length)
    return stream[:, list(picked)]
