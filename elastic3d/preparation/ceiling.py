"""How far the solids that we train and score on are from the meshes they were made of."""

from __future__ import annotations

from dataclasses import dataclass

from elastic3d.evaluation.metrics import chamfer_l1, correspond, f_score
from elastic3d.geometry.normalize import normalize_mesh, normalize_to
from elastic3d.geometry.sampling import sample_surface
from elastic3d.geometry.solid import solidify
from elastic3d.preparation.views import RawShape

POINTS = 100_000


@dataclass(frozen=True)
class Ceiling:
    """Scores of an outer surface against its raw mesh, in units where the raw mesh's longest side is 2."""

    chamfer_l1: float  # both directions, summed
    f_score_02: float  # at 0.02
    f_score_05: float  # at 0.05
    volume_ratio: float | None  # solid over raw; None unless the raw mesh is watertight


def measure_ceiling(raw: RawShape, resolution: int = 128) -> Ceiling:
    """The best scores against the raw mesh that a method which reproduces the solid can reach."""
    mesh, _ = normalize_mesh(raw.mesh)
    solid = solidify(mesh, resolution)
    truth, outer = normalize_to(mesh, solid.mesh)
    pairs = correspond(sample_surface(outer, POINTS, 0)[0], sample_surface(truth, POINTS, 1)[0])
    return Ceiling(
        chamfer_l1=chamfer_l1(pairs),
        f_score_02=f_score(pairs, 0.02),
        f_score_05=f_score(pairs, 0.05),
        volume_ratio=float(solid.mesh.volume / mesh.volume) if mesh.is_volume else None,
    )
