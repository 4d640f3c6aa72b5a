"""Makes Infinigen assets in Blender, one a line of standard input. Runs alone, in Infinigen's own
environment.

A request is a JSON line `{"module", "factory", "seed", "output"}`. The answer, a JSON line on the
descriptor given as the only argument, is `{"faces", "seconds"}` or `{"error", "fatal"}`. The mesh goes to `output`
(npz) by a rename, so that a file with the final name is always whole:

    vertices (V,3) f32   Blender's coordinates: Z up
    faces (F,3) i32
    material (F,) u8     a number for every material slot: legs, cushions, handles

This file is a data tool that talks to Blender (GPL) and imports nothing of elastic3d.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import bpy
import numpy as np

FACE_SIZE = 0.02  # metres; what the factories that remesh aim at


def start_blender() -> None:
    """Keep Blender off the network and quiet; must run before infinigen is imported."""
    bpy.context.preferences.system.use_online_access = False
    bpy.ops.wm.read_factory_settings(use_empty=True)


def make(module: str, factory: str, seed: int) -> list[Any]:
    """The Blender objects of one asset, materials assigned."""
    bpy.ops.wm.read_factory_settings(use_empty=True)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    maker = getattr(importlib.import_module(f"infinigen.assets.objects.{module}"), factory)(seed)
    placeholder = maker.create_placeholder(i=0, loc=(0, 0, 0), rot=(0, 0, 0))
    before = {placeholder.name, *(child.name for child in placeholder.children_recursive)}
    asset = maker.create_asset(i=0, placeholder=placeholder, face_size=FACE_SIZE, distance=1, vis_distance=0)
    if not isinstance(asset, bpy.types.Object):
        raise TypeError(f"the factory returned {type(asset).__name__}")
    maker.finalize_assets(asset)
    parts = [asset, *asset.children_recursive]
    return [part for part in parts if part.type == "MESH" and (part is asset or part.name not in before)]


def triangles(parts: list[Any]) -> dict[str, np.ndarray]:
    """The triangles of all parts, modifiers applied, in world coordinates."""
    graph = bpy.context.evaluated_depsgraph_get()
    vertices, faces, material, offset, used = [], [], [], 0, 0
    for part in parts:
        evaluated = part.evaluated_get(graph)
        mesh = evaluated.to_mesh()
        mesh.calc_loop_triangles()
        points = np.empty(3 * len(mesh.vertices), np.float32)
        mesh.vertices.foreach_get("co", points)
        corner = np.empty(3 * len(mesh.loop_triangles), np.int32)
        mesh.loop_triangles.foreach_get("vertices", corner)
        index = np.empty(len(mesh.loop_triangles), np.int32)
        mesh.loop_triangles.foreach_get("material_index", index)
        world = np.array(part.matrix_world, np.float64)
        vertices.append((points.reshape(-1, 3) @ world[:3, :3].T + world[:3, 3]).astype(np.float32))
        faces.append(corner.reshape(-1, 3) + offset)
        slots = max(len(part.material_slots), 1)
        material.append(np.clip(index, 0, slots - 1) + used)
        used += slots
        offset += len(vertices[-1])
        evaluated.to_mesh_clear()
    if not faces or not sum(map(len, faces)):
        raise ValueError("the asset has no faces")
    return {
        "vertices": np.concatenate(vertices),
        "faces": np.concatenate(faces),
        "material": np.minimum(np.concatenate(material), 255).astype(np.uint8),
    }


def write(arrays: dict[str, np.ndarray], path: Path) -> None:
    """Write an npz whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with draft.open("wb") as stream:
        np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]
        stream.flush()
        os.fsync(stream.fileno())
    draft.replace(path)


def _of_machine(error: Exception) -> bool:
    """Whether a package or disk space is missing, so that the asset is not to blame."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, ImportError) or (isinstance(error, OSError) and error.errno in full)


def serve(answers: Any) -> None:
    """Say that Infinigen can be imported, then answer requests until standard input ends."""
    importlib.import_module("infinigen.core.placement.factory")
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        request = json.loads(line)
        started = time.perf_counter()
        try:
            arrays = triangles(make(request["module"], request["factory"], request["seed"]))
            write(arrays, Path(request["output"]))
            seconds = round(time.perf_counter() - started, 3)
            answer: dict[str, Any] = {"faces": len(arrays["faces"]), "seconds": seconds}
        except Exception as error:  # an asset that fails is listed by the parent, whatever the reason
            answer = {"error": f"{type(error).__name__}: {error}"[:300], "fatal": _of_machine(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    start_blender()
    with os.fdopen(int(sys.argv[1]), "w") as pipe:
        serve(pipe)
