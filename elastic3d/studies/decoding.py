"""One set of latents decoded in several ways, compared with the decoding that evaluates every node at the surface.

The latents are sampled from images, and encoded from shapes: made ones with parts about as thin as a cell, and those of
a folder of ground truth. Shapes whose surface is known are compared with it too.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trimesh
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from elastic3d.errors import UserError
from elastic3d.evaluation.metrics import correspond, f_score, surface_distance
from elastic3d.evaluation.report import markdown_table
from elastic3d.geometry.cleanup import clean, drop_floaters, genus
from elastic3d.geometry.decode import FieldFunction, decode_field
from elastic3d.geometry.mesh_io import load_mesh
from elastic3d.geometry.options import CleanupConfig, DecodeConfig
from elastic3d.geometry.surface import extract_surface
from elastic3d.models.images import IMAGE_SUFFIXES, without_drawings
from elastic3d.models.options import VAEConfig
from elastic3d.models.shape_vae import ShapeVAE
from elastic3d.pipelines.image_to_3d import ImageTo3DPipeline
from elastic3d.studies.config import DecodingConfig
from elastic3d.utils.claims import claim_folder, sole_use
from elastic3d.utils.files import atomic_path, file_sha256, load_json, save_json, visible_files
from elastic3d.utils.options import to_dict

SURFACE_POINTS = 8192
THRESHOLD = 0.02  # of the F-score
COARSE = 64  # cells a side that the plain way evaluates in the whole cube


def compare_decoding(config: DecodingConfig) -> str:
    """Decode everything that is not done yet, write the files, return the table as Markdown.

    Raises:
        UserError: the folder has results of another model, other inputs or options, or does not say of which; two
            inputs have one name; no image can be used, or none has the name of a true mesh.
    """
    pipeline = ImageTo3DPipeline.from_pretrained(config.model, "cpu")  # times are those of the processor
    settings, truths = _settings(pipeline, config), true_shapes(config)
    with sole_use(config.output):
        begun = any((config.output / name).is_file() for name in ("latents.safetensors", "shapes.json"))
        claim_folder(config.output, settings, begun)
        shapes = _latents(pipeline, config)
        names = list(shapes)[: config.limit or None]
        path = config.output / "shapes.json"
        done: dict[str, Any] = load_json(path) if path.is_file() else {}
        for name in tqdm(names, desc="decoding", unit="shape", disable=None):
            if name not in done:
                truth = truths.get(name.partition(", ")[0])
                done[name] = decoded_ways(pipeline, shapes[name][None], config, truth)
                save_json(done, path)
        text = summary({name: done[name] for name in names})
        with atomic_path(config.output / "table.md") as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
        return text


def _settings(pipeline: ImageTo3DPipeline, config: DecodingConfig) -> dict[str, Any]:
    """What the results are of: a folder with others, which would stay, is refused."""
    options = to_dict(config)
    names = ("seeds", "reference", "resolutions", "points", "hunyuan3d_tokens")
    return {
        "model": pipeline.weights_sha256,
        "pipeline": to_dict(pipeline.config),
        "images": file_sha256(*_images(config)),
        "gt": None if config.gt is None else file_sha256(*_true_files(config)),
        **{name: options[name] for name in names},
    }


def _images(config: DecodingConfig) -> list[Path]:
    """UserError where there is none, and for two that differ in their suffix alone: results go by their stems."""
    files = visible_files(config.images, False, IMAGE_SUFFIXES)
    found = without_drawings(files, f"images={config.images}")
    for before, path in pairwise(sorted(found, key=lambda each: each.stem)):
        if before.stem == path.stem:
            raise UserError(f"{config.images} has several images named {path.stem}, expected different names")
    return found


def _true_files(config: DecodingConfig) -> list[Path]:
    """None without `gt`. UserError for one with the name of a made shape, and where no image has the name of one."""
    if config.gt is None:
        return []
    found, made, images = sorted(config.gt.glob("*.glb")), made_shapes(), _images(config)
    for path in found:
        if path.stem in made:
            raise UserError(f"{path} is named as a made shape, expected another name than {', '.join(made)}")
    if not {path.stem for path in found} & {path.stem for path in images}:
        raise UserError(
            f"gt={config.gt} has no mesh named as an image in {config.images}, expected {images[0].stem}.glb"
        )
    return found


def ways(config: DecodingConfig, max_points: int) -> dict[str, DecodeConfig]:
    """How the field is decoded by name, the reference first: `plain` in the whole cube at 64 cells, then every node at
    the surface, by `ShapeVAE.query` without anything prepared."""
    coarse = min(COARSE, config.reference)
    found = {"plain": DecodeConfig(resolution=config.reference, tolerance=0, coarse_resolution=coarse)}
    found |= {f"{cells} cells": DecodeConfig(resolution=cells) for cells in config.resolutions}
    return {name: replace(each, max_points=max_points) for name, each in found.items()}


def decoded_ways(
    pipeline: ImageTo3DPipeline, latents: Tensor, config: DecodingConfig, truth: trimesh.Trimesh | None
) -> dict[str, dict[str, Any]]:
    """Latents (1,N,C) decoded each way.

    `cpu_ms`, `mesh_ms`: processor time of the decoding, and of surface and cleanup. In cells of the reference, to its
    surface and back: `chamfer`, the sum of both mean distances, and `far`, the larger 99th percentile. `genus`:
    handles after dropping floaters. `truth_...`: of the cleaned mesh, in the shape's units (longest side 1.9), None
    where no true surface is known.
    """
    with torch.no_grad():
        tokens = pipeline.vae.decode(latents)
    fields: dict[bool, FieldFunction] = {
        True: lambda points: pipeline.vae.query(points[None], tokens)[0],
        False: pipeline.vae.field(tokens),
    }
    if config.hunyuan3d_tokens:
        large = hunyuan3d_fields(config.hunyuan3d_tokens, tokens.dtype)
        fields = {plain: costing(fields[plain], large[plain]) for plain in fields}
    rows: dict[str, dict[str, Any]] = {}
    reference: trimesh.Trimesh | None = None
    for name, way in ways(config, pipeline.max_points).items():
        start = time.process_time()
        values, stats = decode_field(fields[name == "plain"], way, pipeline.device)
        decoded = time.process_time()
        extracted = extract_surface(values)
        cleaned = clean(extracted, CleanupConfig())
        end = time.process_time()
        mesh = drop_floaters(extracted, CleanupConfig().min_component)
        reference = mesh if reference is None else reference
        cell = 2 * way.box / config.reference
        there, back = (each / cell for each in both_distances(mesh, reference, config.points))
        rows[name] = {
            "resolution": way.resolution,
            "queries": stats.queries,
            "cpu_ms": round(1000 * (decoded - start), 1),
            "mesh_ms": round(1000 * (end - decoded), 1),
            "chamfer": float(there.mean() + back.mean()),
            "far": float(max(np.quantile(there, 0.99), np.quantile(back, 0.99))),
            "genus": genus(mesh),
            **to_truth(cleaned, truth, config.points),
        }
    return rows


def to_truth(mesh: trimesh.Trimesh, truth: trimesh.Trimesh | None, points: int) -> dict[str, Any]:
    """How near a mesh is to the true surface, and the handles of that."""
    if truth is None:
        return dict.fromkeys(("truth_chamfer", "truth_f_score", "truth_genus"))
    there, back = both_distances(mesh, truth, points)
    pairs = correspond(_sampled(mesh, points), _sampled(truth, points), workers=1)
    return {
        "truth_chamfer": float(there.mean() + back.mean()),
        "truth_f_score": f_score(pairs, THRESHOLD),
        "truth_genus": genus(truth) if truth.is_watertight else None,
    }


def hunyuan3d_fields(tokens: int, dtype: torch.dtype) -> dict[bool, FieldFunction]:
    """The field decoder of Hunyuan3D-2's layout (width 1024, 16 heads, MLP ratio 4) with random weights: plain and
    prepared. Its values are of no shape; its time a query is that of the published weights."""
    torch.manual_seed(0)
    sizes = {"num_latents": tokens, "latent_channels": 64, "width": 1024, "heads": 16, "geo_mlp_ratio": 4}
    sizes |= dict.fromkeys(("encoder_layers", "decoder_layers", "neighbours_in", "neighbours_out"), 0)
    vae = ShapeVAE(VAEConfig(**sizes)).to(dtype).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        data = vae.decode(torch.randn(1, tokens, 64, dtype=dtype))
    return {True: lambda points: vae.query(points[None], data)[0], False: vae.field(data)}


def costing(field: FieldFunction, large: FieldFunction) -> FieldFunction:
    """A field with the values of one decoder and the time of a larger one."""

    def both(points: Tensor) -> Tensor:
        with torch.no_grad():
            large(points)
            return field(points)

    return both


def both_distances(
    first: trimesh.Trimesh, second: trimesh.Trimesh, points: int
) -> tuple[np.ndarray, np.ndarray]:
    """Exact distances (P,) of points of each surface, even by area, to the other surface."""
    return surface_distance(_sampled(first, points), second), surface_distance(
        _sampled(second, points), first
    )


def _sampled(mesh: trimesh.Trimesh, points: int) -> np.ndarray:
    return np.asarray(trimesh.sample.sample_surface(mesh, points, seed=0)[0])


def summary(shapes: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Means over the shapes as a Markdown table, and the worst shape; a ratio is that of sums of times."""
    columns = [
        "", "queries", "decode, CPU s", "ratio", "surface and cleanup, CPU s", "Chamfer-L1, cells", "worst shape",
        "99 % within, cells", "genus off by", "to the truth: Chamfer-L1", "F@0.02", "genus off by",
    ]  # fmt: skip
    lines, first = [], next(iter(next(iter(shapes.values()))))
    for way in next(iter(shapes.values())):
        rows, references = ([shape[name] for shape in shapes.values()] for name in (way, first))
        mean = partial(_mean, rows)
        off = [
            abs(row["genus"] - reference["genus"]) for row, reference in zip(rows, references, strict=True)
        ]
        off_truth = [abs(row["genus"] - row["truth_genus"]) for row in rows if row["truth_genus"] is not None]
        spent, least = (sum(row["cpu_ms"] for row in each) for each in (rows, references))
        lines.append([
            way, mean("queries", ",.0f"), mean("cpu_ms", ".2f", 1000), f"{least / spent:.2f}",
            mean("mesh_ms", ".2f", 1000), mean("chamfer", ".3f"), f"{max(row['chamfer'] for row in rows):.3f}",
            mean("far", ".2f"), f"{np.mean(off):.1f} ({sum(o > 0 for o in off)} of {len(off)})",
            mean("truth_chamfer", ".4f"), mean("truth_f_score", ".3f"),
            f"{np.mean(off_truth):.1f}" if off_truth else None,
        ])  # fmt: skip
    return markdown_table(columns, lines)


def _mean(rows: Sequence[dict[str, Any]], name: str, form: str, over: float = 1) -> str | None:
    known = [row[name] / over for row in rows if row[name] is not None]
    return format(np.mean(known), form) if known else None


def _latents(pipeline: ImageTo3DPipeline, config: DecodingConfig) -> dict[str, Tensor]:
    """Latents (N,C) by name, from `latents.safetensors` if it is there, else sampled and encoded, and kept there."""
    path = config.output / "latents.safetensors"
    if not path.is_file():
        images = _images(config)
        found: dict[str, Tensor] = {}
        for seed in config.seeds:
            for image, result in zip(images, pipeline(images, seed=seed, resolution=32), strict=True):
                if result.latents is None:
                    warnings.warn(f"an image is left out: {result.error}", stacklevel=1)
                else:
                    found[f"{image.stem}, seed {seed}"] = result.latents
            if not found:
                raise UserError(
                    f"images={config.images} has no image that shows an object, expected one at least"
                )
        for name, mesh in true_shapes(config).items():
            points, index = trimesh.sample.sample_surface(mesh, SURFACE_POINTS, seed=0)
            surface = torch.from_numpy(np.concatenate([points, mesh.face_normals[index]], axis=1)).float()
            with torch.no_grad():
                raw = pipeline.vae.encode(surface[None].to(pipeline.device)).mean
            found[name] = pipeline.vae.to_latents(raw)[0].cpu()
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            save_file({name: value.contiguous() for name, value in found.items()}, temporary)
    return {name: value.to(pipeline.device) for name, value in load_file(path).items()}


def true_shapes(config: DecodingConfig) -> dict[str, trimesh.Trimesh]:
    """The made shapes, and those of `config.gt` by the stems of their files."""
    return {path.stem: load_mesh(path) for path in _true_files(config)} | made_shapes()


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
