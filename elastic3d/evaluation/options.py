"""Options of `scripts/evaluate.py` and `scripts/summarize.py`, and the protocol by which a mesh is scored."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from elastic3d.utils.options import Options, option


class Align(Enum):
    """How a prediction is brought to its ground truth before scoring.

    `none` keeps its frame, `bbox` matches centre and longest side of the bounding boxes (units and position),
    `icp` matches rotation, scale and position as well (axes and pose).
    """

    none = "none"
    bbox = "bbox"
    icp = "icp"


class UpAxis(Enum):
    """Which axis of a prediction points up. Ground truth is Y up."""

    y = "y"
    z = "z"


class Runner(Enum):
    """Where pairs are scored: the cores of this machine, or a Ray cluster (needs the `ray` extra)."""

    local = "local"
    ray = "ray"


@dataclass(kw_only=True)
class ProtocolConfig(Options):
    """Everything that changes a score. It is printed with every report, so that numbers can be compared."""

    name: str = option("default", "Name of the protocol, printed with the report.", lengths=(1, 200))
    points: int = option(100_000, "Area-weighted surface points sampled on each mesh.", ge=1, le=10_000_000)
    thresholds: list[float] = option(
        [0.02, 0.01, 0.005, 0.05],
        "F-score thresholds; the ground truth's longest side is 2.",
        ge=1e-9,
        le=4,
        lengths=(1, 100),
    )
    volume_points: int = option(
        100_000, "Uniform points in the common bounding box for the volume IoU; 0: none.", ge=0, le=10_000_000
    )
    near_points: int = option(
        50_000,
        "Points near the ground truth's surface for the near-surface IoU; 0: none.",
        ge=0,
        le=10_000_000,
    )
    near_sigma: float = option(
        0.02, "Standard deviation of the near-surface points' offset from the surface.", ge=1e-6, le=1
    )
    views: int = option(4, "Rendered views a mesh, on fixed rings of cameras.", choices=(0, 4, 8, 22))
    view_size: int = option(256, "Pixels a side of a view.", ge=11, le=4096)
    lpips: bool = option(
        False, "Perceptual distance of the views; needs the `lpips` package and its weights."
    )
    surface_health: bool = option(True, "Self-intersections, thin shells, winding and floaters, by rays.")
    pred_up: UpAxis = option(UpAxis.y, "Up axis of the predictions; z is turned to y, keeping x.")
    align: Align = option(Align.none, "How the prediction is brought to the ground truth before scoring.")
    max_faces: int = option(
        1_500_000, "A mesh with more faces is a failed item; bounds time and memory.", ge=1, le=100_000_000
    )
    seed: int = option(0, "Seed of every random point.", ge=0, le=2**31 - 1)


@dataclass(kw_only=True)
class EvaluateConfig(Options):
    """Options of `scripts/evaluate.py`."""

    pred: Path = option(..., "Folder of generated meshes (glb, gltf, obj, ply, stl, off).")
    gt: Path = option(..., "Folder of ground truth meshes; a pair has the same file name, suffix aside.")
    output: Path = option(..., "Report file (.json); a .csv with the rows is written beside it.")
    protocol: ProtocolConfig = option(ProtocolConfig, "How a pair is scored: a file of configs/protocol.")
    workers: int = option(0, "Processes; 0 takes one a core. The numbers do not depend on it.", ge=0, le=4096)
    runner: Runner = option(Runner.local, "Where pairs are scored; ray joins the cluster of RAY_ADDRESS.")
    resume: bool = option(
        False, "Keep the rows of an earlier run whose files, protocol and version of elastic3d are unchanged."
    )
    align: Align | None = option(None, "Overrides protocol.align.")
    pred_up: UpAxis | None = option(None, "Overrides protocol.pred_up.")
    floor: list[Path] = option(
        [], "Folders of the dense model with other seeds: the noise floor of fidelity."
    )
    baseline: list[Path] = option(
        [], "Folders of another method (one a seed): is pred better or worse than it?"
    )
    sets: bool = option(False, "Also MMD, coverage, 1-NNA and image-feature distances of the two sets.")
    gate: Path | None = option(
        None, "YAML of bounds, such as 'chamfer_l1: {max: 0.03}'; a broken one: exit code 1."
    )
    html: Path | None = option(None, "Also write a self-contained HTML report to this file.")
    html_items: int = option(
        6, "Worst and best items, each, shown with renders and in 3D in the HTML report.", ge=0, le=100
    )
    benchmark: Path | None = option(
        None, "A results.json of scripts/benchmark.py, for the HTML report's frontier."
    )
    bootstrap: int = option(2000, "Resamples behind the confidence intervals.", ge=1, le=1_000_000)

    def check(self) -> None:
        """Reports are .json and .html files."""
        for name, suffix in (("output", ".json"), ("html", ".html")):
            path = getattr(self, name)
            if path is not None and path.suffix.lower() != suffix:
                raise ValueError(f"{name} is {path}, expected a file name that ends in {suffix}")

    def effective_protocol(self) -> ProtocolConfig:
        """The protocol with the overrides of the other options."""
        return replace(
            self.protocol,
            align=self.align or self.protocol.align,
            pred_up=self.pred_up or self.protocol.pred_up,
        )


@dataclass(kw_only=True)
class SummarizeConfig(Options):
    """Which reports are put side by side: folders of them, or files named one by one."""

    folders: list[Path] = option(
        [],
        "Folders of reports (*.json), a table each: a file is a method, and seed-0.json, seed-1.json ... are"
        " the seeds of the method generated (big-seed-0.json ... of big).",
    )
    reports: dict[str, list[Path]] = option(
        {}, "In place of folders: the reports of each method, one a seed, as {mine: [a.json, b.json]}."
    )
    baseline: str | None = option("nearest", "The method that the others are compared with; null: none.")
    output: Path | None = option(None, "Folder for summary.md and summary.csv; null: only print.")
    bootstrap: int = option(2000, "Resamples behind the confidence intervals.", ge=1, le=1_000_000)

    def check(self) -> None:
        """Either folders or reports, and a name of its own for each table."""
        if bool(self.folders) == bool(self.reports):
            raise ValueError("expected either folders= or reports=, the reports of scripts/evaluate.py")
        names = [folder.resolve().name for folder in self.folders]
        if len(set(names)) < len(names):
            raise ValueError(
                f"folders are named {', '.join(names)}, expected a name of its own for each table"
            )
