"""Shards on disk: one safetensors file with the arrays of its shapes and one JSON file that describes them.

The JSON file is written first and the safetensors file renamed into place last, so a shard whose
safetensors file exists is whole.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from elastic3d.errors import UserError
from elastic3d.preparation.options import ShapeConfig
from elastic3d.preparation.shape import item_seed, prepare_shape
from elastic3d.preparation.sources import Item, Source
from elastic3d.utils.files import atomic_path, load_json

_LACKING = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
Report = Callable[[str, str, str], None]
_SIDECAR = {
    "settings": dict,
    "items": [{"id": str, "source": str, "category": str, "licence": str}],
    "failures": [{"id": str, "reason": str}],
}


@dataclass(frozen=True)
class Shard:
    """A planned shard: its file and the items that belong in it."""

    path: Path
    items: list[Item]

    @property
    def sidecar(self) -> Path:
        """The JSON file beside the safetensors file."""
        return self.path.with_suffix(".json")

    @property
    def done(self) -> bool:
        """Whether the whole shard is on disk."""
        return self.path.exists()


@dataclass(frozen=True)
class Recipe:
    """All that decides the content of a shard besides its items."""

    shape: ShapeConfig
    seed: int
    held_out: frozenset[str]  # items that keep their solid, as "source/id"

    def settings(self) -> dict[str, Any]:
        """As the sidecar keeps it, to notice a run that resumes with other options."""
        return {**asdict(self.shape), "seed": self.seed}


def plan_shards(items: list[Item], folder: Path, size: int) -> list[Shard]:
    """The finished shards with the items that they hold or failed on, then new ones: `size` of the others in each."""
    place: dict[str, Path] = {}
    for name, described in finished_sidecars(folder):
        place |= dict.fromkeys(
            (row["id"] for row in described["items"] + described["failures"]), folder / name
        )
    held: dict[Path, list[Item]] = {path: [] for path in place.values()}
    for item in items:
        if item.id in place:
            held[place[item.id]].append(item)
    others = [item for item in items if item.id not in place]
    unused = (path for n in count() if not (path := folder / f"shard-{n:05d}.safetensors").exists())
    new = [Shard(next(unused), others[start : start + size]) for start in range(0, len(others), size)]
    return [Shard(path, found) for path, found in held.items() if found] + new


def drop_outdated(items: list[Item], folder: Path, recipe: Recipe, retry: bool = False) -> None:
    """Delete finished shards with an item whose file has changed since; with `retry`, those in which any failed.

    UserError if a shard was made with other settings than are asked for.
    """
    version = {item.id: item.version for item in items}
    for name, described in finished_sidecars(folder):
        differing = [
            key for key, value in recipe.settings().items() if described["settings"].get(key) != value
        ]
        if differing:
            raise UserError(
                f"{folder / name} was prepared with another {', '.join(differing)}, expected the same settings:"
                " choose another output or delete that folder"
            )
        failed = [row for row in described["failures"] if row["id"] in version]
        changed = any(row.get("version", "") != version[row["id"]] for row in failed)
        for row in described["items"]:
            # older shards do not say; of a file that can't be read there is no version
            then, now = row.get("version"), version.get(row["id"])
            changed |= bool(then and now and then != now)
        if changed or (retry and failed):
            (folder / name).unlink()


def prepare_shard(
    shard: Shard, source: Source, recipe: Recipe, known_failures: dict[str, str], report: Report
) -> None:
    """Prepare the items one after another and write the shard.

    `report(event, id, reason)` is called with "start" and then "done" or "failed" for every item. An item in
    `known_failures` isn't tried. UserError, and no shard, for a fault of the machine and not of a shape.
    """
    arrays: dict[str, NDArray[Any]] = {}
    rows: list[dict[str, Any]] = []
    failures = []
    for item in shard.items:
        report("start", item.id, "")
        reason = known_failures.get(item.id, "")
        if not reason:
            try:
                row, found = _prepare_item(item, source, recipe)
            except Exception as error:  # a bad mesh may raise anything; it is listed and the others go on
                if fault := _fault_of_machine(error):
                    raise UserError(f"{item.id} can't be prepared here: {fault}") from error
                name = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
                reason = f"{name}{error}".splitlines()[0][:300]
            else:
                rows.append(row)
                arrays |= found
        if reason:
            failures.append({"id": item.id, "reason": reason, "version": item.version})
        report("failed" if reason else "done", item.id, reason)
    write_shard(shard, arrays, {"settings": recipe.settings(), "items": rows, "failures": failures})


def _fault_of_machine(error: BaseException | None) -> str:
    """What the machine lacks, where that is the cause of an error: a package, disk space, file handles."""
    while error is not None:
        if isinstance(error, ImportError):
            return f"{error}; install it and run this again"
        if isinstance(error, OSError) and error.errno in _LACKING:
            return f"{error.strerror}; make room and run this again"
        error = error.__cause__
    return ""


def _prepare_item(
    item: Item, source: Source, recipe: Recipe
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    raw = source.load(item)
    seed = item_seed(item.source, item.id, recipe.seed)
    found = prepare_shape(raw, recipe.shape, seed, f"{item.source}/{item.id}" in recipe.held_out)
    row = {**item.row(), "faces": len(raw.mesh.faces), "seed": seed}
    if item.version:
        row["version"] = item.version
    return row, {f"{item.id}/{key}": np.ascontiguousarray(value) for key, value in found.items()}


def write_shard(shard: Shard, arrays: dict[str, NDArray[Any]], description: dict[str, Any]) -> None:
    """Put both files in place, each whole or not at all, the safetensors file last."""
    with atomic_path(shard.sidecar) as draft:
        draft.write_text(json.dumps(description, indent=1))
    with atomic_path(shard.path) as draft:
        draft.write_bytes(save(arrays))


def read_sidecar(path: Path) -> dict[str, Any]:
    """The description of a shard. UserError if the file is missing or broken."""
    try:
        described: dict[str, Any] = load_json(path, _SIDECAR)
    except UserError as error:
        raise UserError(
            f"{path} describes no shard ({error}): delete {path.stem}.* there and prepare again"
        ) from error
    return described


def finished_sidecars(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file name, description) of every finished shard in a folder."""
    for path in sorted(folder.glob("shard-*.safetensors")):
        yield path.name, read_sidecar(path.with_suffix(".json"))


def write_manifest(folder: Path) -> tuple[int, dict[str, str]]:
    """Rebuild `manifest.jsonl` from the finished shards; the number of items, and reasons by failed id."""
    lines: list[str] = []
    failures: dict[str, str] = {}
    for name, described in finished_sidecars(folder):
        rows = ({k: v for k, v in row.items() if k != "version"} for row in described["items"])
        lines += [json.dumps({**row, "shard": name}) for row in rows]
        failures |= {row["id"]: row["reason"] for row in described["failures"]}
    with atomic_path(folder / "manifest.jsonl") as draft:
        draft.write_text("".join(line + "\n" for line in lines))
    return len(lines), failures
