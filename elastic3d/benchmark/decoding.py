"""One set of latents decoded in several ways, compared with the mesh of a field that is evaluated everywhere.

The latents are sampled from images, and encoded from made shapes with parts about as thin as a cell.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import trimesh
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from elastic3d.benchmark.stages_options import DecodingConfig
from elastic3d.geometry.cleanup import drop_floaters
from elastic3d.geometry.decode import decode_field
from elastic3d.geometry.options import CleanupConfig, DecodeConfig
from elastic3d.geometry.surface import extract_surface
from elastic3d.models.images import IMAGE_SUFFIXES
from elastic3d.pipelines.image_to_3d import ImageTo3DPipeline
from elastic3d.utils.files import atomic_path
from elastic3d.utils.structured import load_json, save_json

SURFACE_POINTS = 8192


@dataclass(kw_only=True)
class Decoded:
    """One shape decoded one way. Distances in cells of the reference."""

    resolution: int
    queries: int
    cpu_ms: float
    """Processor time of decoding, without the surface."""
    chamfer: float
    """Chamfer-L1: mean distance to the reference's surface plus mean distance from it."""
    far: float
    """99th percentile of the distances, the larger of both directions."""
    genus: int
    """Handles, after dropping floaters."""


def compare_decoding(config: DecodingConfig) -> str:
    """Decode everything that is not done yet, write the files, return the table as Markdown."""
    pipeline = ImageTo3DPipeline.from_pretrained(config.model)
    shapes = _latents(pipeline, config)
    names = list(shapes)[: config.limit or None]
    path = config.output / "shapes.json"
    done: dict[str, Any] = load_json(path) if path.is_file() else {}
    for name in tqdm(names, desc="decoding", unit="shape", disable=None):
        if name not in done:
            rows = decoded_ways(pipeline, shapes[name][None], config)
            done[name] = {way: asdict(row) for way, row in rows.items()}
            save_json(done, path)
    text = summary({name: done[name] for name in names})
    with atomic_path(config.output / "table.md") as temporary:
        temporary.write_text(text + "\n")
    return text


def decoded_ways(pipeline: ImageTo3DPipeline, latents: Tensor, config: DecodingConfig) -> dict[str, Decoded]:
    """By name of the way: the reference, and every resolution by default ways, of latents (1,N,C)."""
    with torch.no_grad():
        field = pipeline.vae.field(pipeline.vae.decode(latents))
    ways = {"reference": DecodeConfig(resolution=config.reference, tolerance=0)}
    ways |= {f"{cells} cells": DecodeConfig(resolution=cells) for cells in config.resolutions}
    rows: dict[str, Decoded] = {}
    reference: trimesh.Trimesh | None = None
    for name, decoding in ways.items():
        decoding.max_points = pipeline.max_points
        start = time.process_time()
        values, stats = decode_field(field, 0, decoding, pipeline.device)
        spent = 1000 * (time.process_time() - start)
        mesh = drop_floaters(extract_surface(values), CleanupConfig().min_component)
        reference = mesh if reference is None else reference
        cell = 2 * decoding.box / config.reference
        there = distances(mesh, reference, config.points) / cell
        back = distances(reference, mesh, config.points) / cell
        rows[name] = Decoded(
            resolution=decoding.resolution,
            queries=stats.queries,
            cpu_ms=round(spent, 1),
            chamfer=float(there.mean() + back.mean()),
            far=float(max(np.quantile(there, 0.99), np.quantile(back, 0.99))),
            genus=genus(mesh),
        )
    return rows


def distances(source: trimesh.Trimesh, target: trimesh.Trimesh, points: int) -> np.ndarray:
    """Exact distances (P,) of points of one surface, even by area, to another surface."""
    import igl

    sampled = np.asarray(trimesh.sample.sample_surface(source, points, seed=0)[0], np.float64)
    faces = np.ascontiguousarray(target.faces, np.int64)
    squared = igl.point_mesh_squared_distance(
        sampled, np.ascontiguousarray(target.vertices, np.float64), faces
    )
    return np.sqrt(squared[0])


def genus(mesh: trimesh.Trimesh) -> int:
    """Handles of all components of a closed mesh together, by Euler's formula."""
    used = len(np.unique(mesh.faces))
    return mesh.body_count - (used - len(mesh.faces) // 2) // 2


def summary(shapes: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Means over the shapes as a Markdown table; the worst shape where a mean would hide it."""
    lines = [
        "| | queries | CPU s | Chamfer-L1, cells | worst shape | 99 % within, cells | another genus | genus off by |",
        "| --- |" + " --- |" * 7,
    ]
    for way in next(iter(shapes.values())):
        rows = [shape[way] for shape in shapes.values()]
        off = [abs(shape[way]["genus"] - shape["reference"]["genus"]) for shape in shapes.values()]
        chamfer = [row["chamfer"] for row in rows]
        cells = [
            f"{np.mean([row['queries'] for row in rows]):,.0f}",
            f"{np.mean([row['cpu_ms'] for row in rows]) / 1000:.2f}",
            f"{np.mean(chamfer):.3f}",
            f"{max(chamfer):.3f}",
            f"{np.mean([row['far'] for row in rows]):.2f}",
            f"{sum(o > 0 for o in off)} of {len(off)}",
            f"{np.mean(off):.1f}",
        ]
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _latents(pipeline: ImageTo3DPipeline, config: DecodingConfig) -> dict[str, Tensor]:
    """Latents (N,C) by name, from `latents.safetensors` if it is there, else sampled and encoded, and kept there."""
    path = config.output / "latents.safetensors"
    if not path.is_file():
        images = sorted(p for p in config.images.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        found: dict[str, Tensor] = {}
        for seed in config.seeds:
            for image, result in zip(images, pipeline(images, seed=seed, resolution=32), strict=True):
                if result.latents is not None:
                    found[f"{image.stem}, seed {seed}"] = result.latents
        for name, mesh in made_shapes().items():
            points, index = trimesh.sample.sample_surface(mesh, SURFACE_POINTS, seed=0)
            surface = torch.from_numpy(np.concatenate([points, mesh.face_normals[index]], axis=1)).float()
            with torch.no_grad():
                raw = pipeline.vae.encode(surface[None].to(pipeline.device)).mean
            found[name] = pipeline.vae.to_latents(raw)[0].cpu()
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            save_file({name: value.contiguous() for name, value in found.items()}, temporary)
    return {name: value.to(pipeline.device) for name, value in load_file(path).items()}


def made_shapes() -> dict[str, trimesh.Trimesh]:
    """Shapes with parts about as thick as a cell of 128, and two without."""
    turn = trimesh.transformations.rotation_matrix(0.5, [1, 2, 3])
    plate = _slab([1.6, 1.2, 0.024])
    plate.apply_transform(turn)
    legs = [_slab([0.04, 1.0, 0.04], [x, 0, z]) for x in (-0.77, 0.77) for z in (-0.57, 0.57)]
    walls = [_slab([0.02, 1.4, 1.4], [x, 0, 0]) for x in (-0.7, 0.7)]
    walls += [_slab([1.4, 1.4, 0.02], [0, 0, z]) for z in (-0.7, 0.7)]
    rods = [[[-0.9, -0.8, 0.1], [0.7, 0.9, -0.6]], [[0.9, 0, -0.8], [-0.3, -0.9, 0.8]]]
    return {
        "plate": _slab([1.8, 1.4, 0.02]),
        "turned plate": plate,
        "torus": trimesh.creation.torus(0.7, 0.2),
        "wire": trimesh.creation.torus(0.8, 0.015),
        "table": _joined([_slab([1.6, 0.04, 1.2], [0, 0.5, 0]), *legs]),
        "rods": _joined([trimesh.creation.cylinder(0.02, segment=ends) for ends in rods]),
        "open box": _joined([_slab([1.4, 0.02, 1.4], [0, -0.7, 0]), *walls]),
        "sphere": trimesh.creation.icosphere(4, 0.8),
    }


def _slab(sides: Sequence[float], centre: Sequence[float] = (0, 0, 0)) -> trimesh.Trimesh:
    mesh = trimesh.creation.box(sides)
    mesh.apply_translation(centre)
    return mesh


def _joined(parts: Sequence[trimesh.Trimesh]) -> trimesh.Trimesh:
    mesh = trimesh.util.concatenate(list(parts))
    assert isinstance(mesh, trimesh.Trimesh)
    return mesh
