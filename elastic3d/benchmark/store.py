"""What a benchmark made so far: meshes and records on disk, each whole or not at all, so that a kill loses nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from elastic3d.benchmark.methods import Run
from elastic3d.errors import UserError
from elastic3d.geometry.mesh_io import save_mesh
from elastic3d.models.pictures import PICTURE_SUFFIXES
from elastic3d.pipelines.image_to_3d import Result
from elastic3d.utils.files import file_sha256, visible_files
from elastic3d.utils.structured import Maybe, load_json, save_json


@dataclass(frozen=True)
class Job:
    """One mesh to make by each run."""

    image: Path
    seed: int

    @property
    def name(self) -> str:
        """The picture's, without its suffix."""
        return self.image.stem

    @property
    def label(self) -> str:
        """The picture's, with it."""
        return self.image.name


def find_pictures(folder: Path, limit: int = 0) -> list[Path]:
    """Pictures of a folder by name, `limit` of them spread evenly (0: all).

    Raises:
        UserError: no folder, no picture in it, or two that differ in nothing but their suffix.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder, expected one of pictures ({', '.join(PICTURE_SUFFIXES)})")
    files = visible_files(folder, recursive=False)
    found = [path for path in files if path.suffix.lower() in PICTURE_SUFFIXES]
    if not found:
        raise UserError(f"{folder} holds no picture ({', '.join(PICTURE_SUFFIXES)})")
    stems = [path.stem for path in found]
    for stem in stems:
        if stems.count(stem) > 1:
            raise UserError(f"{folder} has several pictures named {stem}, expected different names")
    return spread(found, limit)


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """`count` of the items, at even distances (0, or more than there are: all)."""
    count = min(count or len(items), len(items))
    return [items[i * len(items) // count] for i in range(count)]


_RECORD = {"status": str, "error": Maybe(str), "image_sha256": str, "receipt": dict}


class Store:
    """Meshes and records under `folder`/runs, by run, seed and name of the picture."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def mesh(self, run: Run, job: Job) -> Path:
        """Where a mesh is, or would be."""
        return self.folder / "runs" / run.name / f"seed-{job.seed}" / f"{job.image.stem}.glb"

    def record(self, run: Run, job: Job) -> dict[str, Any] | None:
        """What was noted of a mesh; None where it is still to be made, from this very picture."""
        path = self.mesh(run, job)
        if not path.with_suffix(".json").is_file():
            return None
        record: dict[str, Any] = load_json(path.with_suffix(".json"), _RECORD)
        is_whole = record["status"] == "failed" or path.is_file()
        return record if is_whole and record["image_sha256"] == _sha256(job.image) else None

    def save(self, run: Run, job: Job, result: Result) -> dict[str, Any]:
        """Keep the mesh, or the reason why there is none; the record is written last."""
        path = self.mesh(run, job)
        record = {
            "status": "ok" if result.error is None else "failed",
            "error": None if result.error is None else str(result.error),
            "image_sha256": _sha256(job.image),
            "receipt": result.receipt,
        }
        if result.error is None:
            save_mesh(result.mesh, path, extras=result.receipt, name=job.image.stem)
        else:
            path.unlink(missing_ok=True)
        save_json(record, path.with_suffix(".json"))
        return record


@cache
def _sha256(path: Path) -> str:
    return file_sha256(path)
