"""A budget without routers on a stock pipeline of diffusers, and the calibrations of such policies as files.

    from elastic3d import disable, enable

    enable(pipe, budget=0.5)  # its calibration is taken where the pipeline's folder has one
    images = pipe("a red fox")
    disable(pipe)  # the pipeline is what it was

How steps are planned and residuals forecast: `elastic.training_free`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from elastic3d.elastic.attachment import adapter_for, detach, find_session, has_routers
from elastic3d.elastic.config import ElasticConfig
from elastic3d.elastic.diffusers_loop import drive
from elastic3d.elastic.session import ElasticSession
from elastic3d.elastic.training_free import CALIBRATION_NAME, Calibration, Series, StepPolicy, put_policy
from elastic3d.errors import UserError
from elastic3d.utils.files import Number, load_json, printable, save_json

_ANY = Number(-1e300, 1e300)
_SHAPE = {
    "about": {"model": dict, "samples": int},
    "times": [Number(0, 1)],
    "moments": [{"span": int, "stream": int, "values": [[_ANY]]}],
    "result": [[_ANY]],
    "changes": [Number(0, 1e300)],
}


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
    if has_routers(transformer):
        raise ValueError(
            "the pipeline has routers, which take a budget: set session.settings.budget, or detach them"
        )
    session = find_session(transformer) or put_policy(pipe, found)
    drive(pipe, session)  # others that share the transformer are followed on
    session.source, session.settings = StepPolicy(found), settings
    return session


def disable(pipe: Any) -> None:
    """Take off what `enable` put on: the pipeline is what it was before. ValueError where there is nothing."""
    detach(pipe)


# -------------------------------------------------------------------------------------------------- files


def describe(model: nn.Module) -> dict[str, Any]:
    """What a calibration has to fit: the family, the number of blocks of each list, their width."""
    adapter = adapter_for(model)
    lists = list(adapter.block_lists(model))
    _, kind, first, _ = lists[0]
    return {
        "family": adapter.family,
        "blocks": [len(blocks) for _, _, blocks, _ in lists],
        "width": kind.width(first[0]),
    }


def calibration_file(place: str | Path) -> Path:
    """The file of a calibration, named by itself or by its folder; UserError where there is none."""
    path = Path(place) / CALIBRATION_NAME if Path(place).is_dir() else Path(place)
    if not path.is_file():
        raise UserError(f"there is no calibration {printable(path)}: write one with elastic3d calibrate")
    return path


def series_of(model: nn.Module) -> set[Series]:
    """What a calibration has moments of: every stream of every list of blocks, by the number of its first block."""
    lists = adapter_for(model).block_lists(model)
    return {(span.start, number) for _, kind, _, span in lists for number in range(len(kind.stream_names))}


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
    result, changes = np.array(values["result"]), np.array(values["changes"])
    if len(changes) != steps:
        raise UserError(f"{source}: changes has {len(changes)} values, expected {steps}, one a step")
    return Calibration(times, moments, result, changes, values["about"])


def save_calibration(calibration: Calibration, path: Path) -> None:
    """Write the file that `load_calibration` reads, whole or not at all."""
    rounded = np.vectorize(lambda value: float(f"{value:.8g}"), otypes=[float])
    moments = [
        {"span": span, "stream": stream, "values": rounded(moment).tolist()}
        for (span, stream), moment in calibration.moments.items()
    ]
    parts = {name: rounded(getattr(calibration, name)).tolist() for name in ("times", "result", "changes")}
    save_json({"about": dict(calibration.about), **parts, "moments": moments}, path)
