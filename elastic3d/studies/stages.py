"""Stages from an image to a written mesh, cold and warm, of this checkout and of another one in turn."""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from elastic3d.errors import UserError
from elastic3d.evaluation.report import machine, markdown_table
from elastic3d.pipelines.runtime import find_model
from elastic3d.studies.config import StagesConfig
from elastic3d.utils.files import save_json

ROOT = Path(__file__).resolve().parent.parent.parent
HERE, OTHER = "this", "against"
Round = dict[str, dict[str, list[float]]]
"""By checkout and row: the measurements of one round."""


def measure_stages(config: StagesConfig) -> dict[str, Any]:
    """Run all rounds, write `config.output`, and return it: `rounds`, `table` and what machine it was.

    Raises:
        UserError: `against` is no checkout, or a process failed.
    """
    checkouts = {HERE: ROOT}
    if config.against is not None:
        if not (config.against / "elastic3d").is_dir():
            raise UserError(f"against is {config.against}, expected the root of a checkout of elastic3d")
        checkouts[OTHER] = config.against.resolve()
    rounds: list[Round] = []
    for number in tqdm(range(config.rounds), desc="stages", unit="round", disable=None):
        order = list(checkouts.items())
        if number % 2:  # whoever comes second finds a warm disk: take turns
            order.reverse()
        rounds.append({name: _process(folder, config) for name, folder in order})
        found = {"machine": machine(), "table": table(rounds), "rounds": rounds}
        save_json(found, config.output)  # after each: a long measurement may be stopped
    return found


def table(rounds: Sequence[Round]) -> list[dict[str, Any]]:
    """One entry a row: median, least and most of each checkout, and the median of the rounds' ratios.

    A ratio is that of two medians of one round, so that what else the machine does falls on both.
    """
    rows = []
    for name in rounds[0][HERE]:
        row: dict[str, Any] = {"row": name}
        for checkout in rounds[0]:
            values = [value for one in rounds for value in one[checkout].get(name, [])]
            if values:
                found = {"median": statistics.median(values), "least": min(values), "most": max(values)}
                row[checkout] = {what: round(value, 1) for what, value in found.items()}
        if OTHER in row:
            medians = [[statistics.median(one[each][name]) for each in (OTHER, HERE)] for one in rounds]
            row["ratio"] = round(statistics.median(other / max(here, 1e-3) for other, here in medians), 2)
        rows.append(row)
    return rows


def printed(rows: Sequence[dict[str, Any]]) -> str:
    """The table as Markdown; times in milliseconds, memory in megabytes."""
    both = any(OTHER in row for row in rows)
    names = [OTHER, HERE] if both else [HERE]
    ends = ["ratio"] if both else []
    lines = [[row["row"], *(_cell(row.get(n)) for n in names), *(row.get(n) for n in ends)] for row in rows]
    return markdown_table(["", *names, *ends], lines)


def _cell(found: dict[str, float] | None) -> str:
    return f"{found['median']:,.0f} ({found['least']:,.0f} to {found['most']:,.0f})" if found else ""


def _process(folder: Path, config: StagesConfig) -> dict[str, list[float]]:
    """Every row of one fresh process of a checkout, and of its commands."""
    settings = {
        "resolution": config.resolution,
        "quality": config.quality and config.quality.name,
        "budget": config.budget,
        "elastic": None if config.elastic else False,
    }  # those that differ from the pipeline's defaults: an older checkout may not know them
    settings = {name: value for name, value in settings.items() if value is not None}
    inputs = {"image": str(config.image.resolve()), "model": str(find_model(config.model).resolve())}
    names = ("repeats", "threads", "cpu", "batch", "compile")
    options = {name: getattr(config, name) for name in names} | inputs | {"settings": settings}
    worker = Path(__file__).with_name("stage_worker.py")
    found = json.loads(_run([str(worker), json.dumps(options)], folder, config)[0].splitlines()[-1])
    rows = {"import": [found["import"]], "load": [found["load"]]}
    first, warm = found["meshes"][0], found["meshes"][1:]
    rows |= {f"first mesh, {stage}": [value] for stage, value in first.items()}
    rows |= {f"warm, {stage}": [mesh[stage] for mesh in warm] for stage in first}
    for stage, value in found.get("batch", {}).items():
        rows[f"batch of {config.batch}, a mesh, {stage}"] = [value]
    rows["peak memory, MB"] = [found["peak_mb"]]
    if config.commands:
        script = str(folder / "scripts" / "gen_mesh.py")
        rows["gen_mesh.py --help"] = [_run([script, "--help"], folder, config)[1]]
        with tempfile.TemporaryDirectory() as output:
            arguments = [f"{name}={value}" for name, value in inputs.items()] + [f"output={output}/mesh.glb"]
            arguments += [f"{name}={str(value).lower()}" for name, value in settings.items()]
            arguments += ["compile=true"] if config.compile else []
            arguments += ["device=cpu"] if config.cpu else []  # as the worker
            rows["gen_mesh.py"] = [_run([script, *arguments], folder, config)[1]]
    return rows


def _run(arguments: Sequence[str], folder: Path, config: StagesConfig) -> tuple[str, float]:
    """Output of Python on these arguments with a checkout's package, and the milliseconds it took."""
    environment = os.environ | {"PYTHONPATH": str(folder)}  # with what the package has said of idle threads
    if config.threads:
        environment["OMP_NUM_THREADS"] = str(config.threads)
    start = _clock(config.cpu)
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    elapsed = 1000 * (_clock(config.cpu) - start)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{Path(arguments[0]).name} failed in {folder}: {last}")
    return done.stdout, elapsed


def _clock(cpu: bool) -> float:
    """Seconds of the clock, or those that finished child processes have spent on the processor."""
    if not cpu:
        return time.perf_counter()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
