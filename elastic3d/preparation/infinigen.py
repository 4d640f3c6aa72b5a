"""The `infinigen` source: seeded furniture and tableware from Princeton's procedural generator.

Infinigen (BSD-3) needs Blender's Python module (GPL), Python 3.11 and old numerical libraries. So it lives
in an environment of its own and answers one request at a time in a process of its own
(`infinigen_worker.py`), which is replaced when it dies, hangs or grows old. Seeds are interleaved over the
categories: any prefix is balanced.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import trimesh
from numpy.typing import NDArray

from elastic3d.errors import UserError
from elastic3d.preparation.shape import RawShape
from elastic3d.preparation.sources import Item, Source, with_article
from elastic3d.utils.files import parse_json

MAX_SPIKE = 5.0  # how far single vertices may reach, over the rest
_FAILURES = "failures.jsonl"
WORKER = Path(__file__).with_name("infinigen_worker.py")
# category: (module under infinigen.assets.objects, factory). Looked at: clean, recognisable, under 2 s.
FACTORIES = {
    "chair": ("seating.chairs", "ChairFactory"),
    "dining_table": ("tables", "TableDiningFactory"),
    "floor_lamp": ("lamp", "FloorLampFactory"),
    "cup": ("tableware", "CupFactory"),
    "sofa": ("seating", "SofaFactory"),
    "toilet": ("bathroom", "ToiletFactory"),
    "vase": ("table_decorations", "VaseFactory"),
    "bookcase": ("shelves", "SimpleBookcaseFactory"),
    "office_chair": ("seating.chairs", "OfficeChairFactory"),
    "coffee_table": ("tables", "CoffeeTableFactory"),
    "bottle": ("tableware", "BottleFactory"),
    "bathtub": ("bathroom", "BathtubFactory"),
    "armchair": ("seating", "ArmChairFactory"),
    "bowl": ("tableware", "BowlFactory"),
    "desk_lamp": ("lamp", "DeskLampFactory"),
    "bed": ("seating", "BedFrameFactory"),
    "bar_chair": ("seating.chairs", "BarChairFactory"),
    "side_table": ("tables", "SideTableFactory"),
    "wineglass": ("tableware", "WineglassFactory"),
    "shelf": ("shelves", "LargeShelfFactory"),
    "pan": ("tableware", "PanFactory"),
    "sink": ("bathroom", "StandingSinkFactory"),
    "cocktail_table": ("tables", "TableCocktailFactory"),
    "cabinet": ("shelves", "SingleCabinetFactory"),
    "pot": ("tableware", "PotFactory"),
    "desk": ("shelves", "SimpleDeskFactory"),
    "corner_shelf": ("shelves", "TriangleShelfFactory"),
    "monitor": ("appliances", "MonitorFactory"),
}


@dataclass(frozen=True)
class Asset:
    """One procedural shape; the same (category, seed) is the same mesh."""

    category: str
    seed: int

    @property
    def name(self) -> str:
        """Identifier within the source, also part of file names."""
        return f"{self.category}-{self.seed:05d}"

    def path(self, folder: Path) -> Path:
        """Where the raw mesh is kept."""
        return folder / self.category / f"{self.seed}.npz"


def assets(categories: list[str], seeds: int) -> list[Asset]:
    """Every asset asked for, categories interleaved. UserError for an unknown category."""
    unknown = [name for name in categories if name not in FACTORIES]
    if unknown:
        raise UserError(f"no Infinigen category {unknown[0]!r}, expected one of {', '.join(FACTORIES)}")
    chosen = categories or list(FACTORIES)
    return [Asset(category, seed) for seed in range(seeds) for category in chosen]


class Worker:
    """A Blender process that makes assets; use as a context manager."""

    def __init__(self, python: Path, timeout_s: float, log: Path, lifetime: int = 300) -> None:
        self._python, self._timeout_s, self._log, self._lifetime = python, timeout_s, log, lifetime
        self._process: subprocess.Popen[str] | None = None
        self._answers: IO[str] | None = None
        self._served = 0

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        self._stop()

    def make(self, asset: Asset, output: Path) -> dict[str, Any]:
        """Write the raw mesh of an asset; the answer holds `faces` and `seconds`, or `error` (and `fatal`)."""
        if self._process is None or self._served >= self._lifetime:
            self._stop()
            self._start()
        assert self._process is not None and self._process.stdin is not None and self._answers is not None
        module, factory = FACTORIES[asset.category]
        request = {"module": module, "factory": factory, "seed": asset.seed, "output": str(output)}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        self._served += 1
        if not select.select([self._answers], [], [], self._timeout_s)[0]:
            self._stop()
            return {"error": f"took more than {self._timeout_s:g} s"}
        line = self._answers.readline()
        if not line:
            self._stop()
            return {"error": "Blender crashed"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _start(self) -> None:
        reader, writer = os.pipe()
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                [str(self._python), str(WORKER), str(writer)],
                env={**os.environ, "PYTHONSAFEPATH": "1"},  # our files must not shadow Infinigen's
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=[writer],
                text=True,
                start_new_session=True,  # a signal to all of us must not look like a crash of Blender's
            )
        os.close(writer)
        self._answers = os.fdopen(reader)
        self._served = 0
        if self._answers.readline().strip() != "ready":
            self._stop()
            raise UserError(f"Infinigen does not start in {self._python}, see {self._log}")

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._answers is not None:
            self._answers.close()
        self._process, self._answers = None, None


def generate(
    wanted: list[Asset], folder: Path, python: Path, timeout_s: float = 60
) -> Iterator[tuple[Asset, str]]:
    """Make the raw meshes that are missing, in order; yields (asset, error or "").

    Failures are appended to `folder/failures.jsonl`; an asset listed there isn't tried again. UserError if the
    machine and not the asset is at fault.
    """
    failures = folder / _FAILURES
    failed = read_failures(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with Worker(python, timeout_s, folder / "blender.log") as worker:
        for asset in wanted:
            if asset.name in failed or asset.path(folder).exists():
                continue
            answer = worker.make(asset, asset.path(folder))
            error = answer.get("error", "")
            if answer.get("fatal"):
                raise UserError(f"Infinigen can't make {asset.name}: {error}; mend that and run this again")
            if error:
                row = {"id": asset.name, "reason": error, "time": round(time.time())}
                with failures.open("a") as stream:
                    stream.write(json.dumps(row) + "\n")
            yield asset, error


class InfinigenSource(Source):
    """Made in the background while shards are prepared; `generators` Blender processes share the work."""

    name = "infinigen"

    def __init__(
        self, folder: Path, environment: Path, categories: list[str], seeds: int, generators: int = 1
    ) -> None:
        self._assets = {asset.name: asset for asset in assets(categories, seeds)}
        self._folder, self._environment, self._generators = folder, environment, generators

    def items(self) -> list[Item]:
        """Seeds interleaved over the categories."""
        return [
            Item(
                id=asset.name,
                source=self.name,
                category=asset.category,
                caption=with_article(asset.category.replace("_", " ")),
                licence="BSD-3-Clause",
                creator="Infinigen, Princeton Vision & Learning Lab",
                source_id=f"{'.'.join(FACTORIES[asset.category])}({asset.seed})",
            )
            for asset in self._assets.values()
        ]

    def forget_failures(self) -> None:
        """Let every asset that could not be made be tried again."""
        (self._folder / _FAILURES).unlink(missing_ok=True)

    def ready(self, item: Item) -> bool:
        """Whether the raw mesh is there, or listed as impossible."""
        return self._assets[item.id].path(self._folder).exists() or item.id in read_failures(self._folder)

    def load(self, item: Item) -> RawShape:
        """The raw mesh turned from Blender's axes (Z up, front +X). UserError if it could not be made or has spikes."""
        failed = read_failures(self._folder)
        if item.id in failed:
            raise UserError(failed[item.id])
        with np.load(self._assets[item.id].path(self._folder)) as raw:
            vertices = raw["vertices"][:, [1, 2, 0]]
            check_spikes(vertices)
            return RawShape(trimesh.Trimesh(vertices, raw["faces"], process=False), raw["material"])

    @contextmanager
    def producing(self) -> Iterator[Callable[[], bool]]:
        """Generate what is missing, in processes of their own."""
        missing = [item for item in self.items() if not self.ready(item)]
        wanted = [self._assets[item.id] for item in missing]
        python = find_environment(self._environment) if wanted else self._environment
        context = multiprocessing.get_context("spawn")
        processes = [
            context.Process(target=_generate_all, args=(share, self._folder, python), daemon=True)
            for start in range(self._generators)
            if (share := wanted[start :: self._generators])
        ]
        for process in processes:
            process.start()
        try:
            yield lambda: _still_run(processes)
        finally:
            for process in processes:
                process.terminate()
                process.join()


def check_spikes(vertices: NDArray[np.floating]) -> None:
    """UserError if single vertices (V, 3) lie far outside the rest, as the generator leaves them in some beds."""
    extent = np.ptp(vertices, axis=0).max()
    bulk = np.ptp(np.percentile(vertices, [1, 99], axis=0), axis=0).max()
    if extent > MAX_SPIKE * bulk:
        raise UserError(
            f"single vertices reach {extent / bulk:.0f} times as far as the rest, expected at most {MAX_SPIKE:g}"
        )


def _still_run(processes: Sequence[BaseProcess]) -> bool:
    """Whether any process that makes raw meshes still runs. UserError if one ended badly."""
    for process in processes:
        if process.exitcode:
            raise UserError(f"generating Infinigen meshes ended with code {process.exitcode}, see above")
    return any(process.is_alive() for process in processes)


def _generate_all(wanted: list[Asset], folder: Path, python: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end)
    parent = multiprocessing.parent_process()
    try:
        for _ in generate(wanted, folder, python):
            if parent is not None and not parent.is_alive():  # it was killed: don't go on behind its back
                break
    except UserError as error:
        sys.exit(f"error: {error}")


def _end(*_: object) -> None:
    """Leave by an exception, so that Blender is stopped too; a second signal must not interrupt that."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(0)


def read_failures(folder: Path) -> dict[str, str]:
    """Reason by asset name, of assets that could not be made."""
    path = folder / _FAILURES
    if not path.exists():
        return {}
    found = {}
    for line in path.read_text(errors="replace").splitlines():
        with suppress(UserError):  # a line that a kill tore: its asset is tried again
            row = parse_json(line, {"id": str, "reason": str}, str(path))
            found[row["id"]] = row["reason"]
    return found


# -------------------------------------------------------------------------------------------- its environment

PYTHON_VERSION = (3, 11)
NO_DEPENDENCIES = ("infinigen==1.15.5", "bpy==4.2.0")
REQUIREMENTS = (
    "numpy==1.26.4",
    "gin_config==0.5.0",
    "imageio==2.31.6",
    "matplotlib==3.11.2",
    "networkx==3.6.1",
    "opencv-python-headless==4.8.1.78",
    "pandas==3.0.6",
    "psutil==7.2.2",
    "scikit-image==0.22.0",
    "scikit-learn==1.9.1",
    "scipy==1.17.1",
    "shapely==2.0.5",
    "tqdm==4.70.1",
    "trimesh==5.2.0",
    "geomdl==5.4.0",
    "rtree==1.4.1",
    "python-fcl==0.7.0.11",
    "coacd==1.0.14",
    "submitit==1.5.4",
    "OpenEXR==3.5.3",
)


def find_environment(folder: Path) -> Path:
    """The Python interpreter of an Infinigen environment in `folder`, which is created there when it is
    missing.

    About 2.2 GB, a few minutes. UserError if no Python 3.11 is found, pip fails, or the folder holds something else.
    """
    python, begun = folder / "bin" / "python", folder / ".begun"
    if (folder / ".complete").exists() or _has_infinigen(python):
        return python
    if folder.exists() and any(folder.iterdir()) and not begun.exists():
        raise UserError(
            f"{folder} has no Infinigen, expected an environment that has it, or a folder that is not there yet:"
            " delete it or name another with infinigen_env="
        )
    interpreter = _python_311()
    shutil.rmtree(folder, ignore_errors=True)  # what a kill left of it
    folder.mkdir(parents=True)
    begun.touch()
    _run([interpreter, "-m", "venv", str(folder)])
    _run([str(python), "-m", "pip", "install", "--no-deps", *NO_DEPENDENCIES])
    _run([str(python), "-m", "pip", "install", *REQUIREMENTS])
    (folder / ".complete").touch()
    return python


def _has_infinigen(python: Path) -> bool:
    code = (
        "import importlib.util as u; raise SystemExit(not (u.find_spec('bpy') and u.find_spec('infinigen')))"
    )
    return python.exists() and subprocess.run([str(python), "-c", code], check=False).returncode == 0


def _python_311() -> str:
    if sys.version_info[:2] == PYTHON_VERSION:
        return sys.executable
    found = shutil.which("python3.11")
    if found is None:
        raise UserError(
            "Infinigen runs on Python 3.11 only and no python3.11 is on the PATH: install it, "
            "or name an existing environment with infinigen_env="
        )
    return found


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise UserError(
            f"setting up Infinigen failed at `{' '.join(command[:6])} ...`: {done.stderr.strip()[-300:]}"
        )
