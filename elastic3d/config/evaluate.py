"""Options of `scripts/evaluate.py` and the protocol by which a mesh is scored."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

from elastic3d.config.base import check_choice, check_range, option
from elastic3d.errors import UserError


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
class ProtocolConfig:
    """Everything that changes a score. It is printed with every report, so that numbers can be compared."""

    name: str = option("default", "Name of the protocol, printed with the report.")
    points: int = option(100_000, "Area-weighted surface points sampled on each mesh.")
    thresholds: list[float] = option(
        [0.02, 0.01, 0.005, 0.05], "F-score thresholds; the ground truth's longest side is 2."
    )
    volume_points: int = option(
        100_000, "Uniform points in the common bounding box for the volume IoU; 0: none."
    )
    near_points: int = option(
        50_000, "Points near the ground truth's surface for the near-surface IoU; 0: none."
    )
    near_sigma: float = option(
        0.02, "Standard deviation of the near-surface points' offset from the surface."
    )
    views: int = option(4, "Rendered views a mesh: 0, 4, 8 or 22, on fixed rings of cameras.")
    view_size: int = option(256, "Pixels a side of a view.")
    lpips: bool = option(
        False, "Perceptual distance of the views; needs the `lpips` package and its weights."
    )
    surface_health: bool = option(True, "Self-intersections, thin shells, winding and floaters, by rays.")
    pred_up: UpAxis = option(UpAxis.y, "Up axis of the predictions; z is turned to y, keeping x.")
    align: Align = option(Align.none, "How the prediction is brought to the ground truth before scoring.")
    max_faces: int = option(1_500_000, "A mesh with more faces is a failed item; bounds time and memory.")
    seed: int = option(0, "Seed of every random point.")

    def __post_init__(self) -> None:
        check_range("points", self.points, 1, 10_000_000)
        check_range("volume_points", self.volume_points, 0, 10_000_000)
        check_range("near_points", self.near_points, 0, 10_000_000)
        check_range("near_sigma", self.near_sigma, 1e-6, 1)
        check_choice("views", self.views, (0, 4, 8, 22))
        check_range("view_size", self.view_size, 11, 4096)
        check_range("max_faces", self.max_faces, 1, 100_000_000)
        check_range("seed", self.seed, 0, 2**31 - 1)
        if not self.thresholds:
            raise ValueError("thresholds is empty, expected at least one number above 0")
        for threshold in self.thresholds:
            check_range("thresholds", threshold, 1e-9, 4)

    def as_dict(self) -> dict[str, Any]:
        """The protocol as plain JSON data."""
        return {key: value.value if isinstance(value, Enum) else value for key, value in asdict(self).items()}


@dataclass(kw_only=True)
class EvaluateConfig:
    """Options of `scripts/evaluate.py`."""

    pred: Path = field(metadata={"help": "Folder of generated meshes (glb, gltf, obj, ply, stl, off)."})
    gt: Path = field(
        metadata={"help": "Folder of ground truth meshes; a pair has the same file name, suffix aside."}
    )
    output: Path = field(metadata={"help": "Report file (.json); a .csv with the rows is written beside it."})
    protocol: ProtocolConfig = option(ProtocolConfig, "How a pair is scored: a file of configs/protocol.")
    workers: int = option(0, "Processes; 0 takes one a core. The numbers do not depend on it.")
    runner: Runner = option(Runner.local, "Where pairs are scored; ray joins the cluster of RAY_ADDRESS.")
    resume: bool = option(False, "Keep the rows of an earlier run whose files and protocol are unchanged.")
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
        6, "Worst and best items, each, shown with renders and in 3D in the HTML report."
    )
    benchmark: Path | None = option(
        None, "A results.json of scripts/benchmark.py, for the HTML report's frontier."
    )
    bootstrap: int = option(2000, "Resamples behind the confidence intervals.")

    def __post_init__(self) -> None:
        check_range("bootstrap", self.bootstrap, 1, 1_000_000)
        check_range("workers", self.workers, 0, 4096)
        check_range("html_items", self.html_items, 0, 100)
        for name, suffix in (("output", ".json"), ("html", ".html")):
            path = getattr(self, name)
            if path is not None and path.suffix.lower() != suffix:
                raise UserError(f"{name}={path}: expected a file name that ends in {suffix}")

    def effective_protocol(self) -> ProtocolConfig:
        """The protocol with the overrides of the other options."""
        return replace(
            self.protocol,
            align=self.align or self.protocol.align,
            pred_up=self.pred_up or self.protocol.pred_up,
        )
