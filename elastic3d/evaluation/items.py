"""Two folders of meshes to item rows: pairing by file name, and one row a pair whatever happens to it."""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from elastic3d.errors import UserError
from elastic3d.evaluation.options import ProtocolConfig
from elastic3d.evaluation.protocol import evaluate_pair, failed_scores
from elastic3d.evaluation.statistics import Row
from elastic3d.geometry.gltf_data import read_tree
from elastic3d.geometry.mesh_io import READ_SUFFIXES, load_mesh
from elastic3d.utils.files import printable, visible_files

_PLY_NAMES = {"s", "t", "u", "v", "texture_u", "texture_v", "texcoord"}


@dataclass(frozen=True)
class Item:
    """One name with the files that carry it; none or several of a side make the item a failure."""

    name: str
    pred: tuple[Path, ...]
    gt: tuple[Path, ...]


def find_meshes(folder: Path) -> dict[str, list[Path]]:
    """Mesh files under `folder` by their path relative to it, suffix aside. UserError if it is no folder.

    Accents count the same however they are composed: file systems and archives change that.
    """
    if not folder.is_dir():
        expected = f"a folder of meshes ({', '.join(READ_SUFFIXES)})"
        raise UserError(f"{printable(folder)} is not a folder, expected {expected}")
    found: dict[str, list[Path]] = {}
    for path in visible_files(folder, suffixes=READ_SUFFIXES):
        name = printable(path.relative_to(folder).with_suffix("").as_posix())
        found.setdefault(unicodedata.normalize("NFC", name), []).append(path)
    return found


def find_items(pred: Path, gt: Path) -> list[Item]:
    """Every name that occurs in either folder, sorted. UserError if the ground truth folder has no mesh."""
    pred_files, gt_files = find_meshes(pred), find_meshes(gt)
    if not gt_files:
        raise UserError(f"{printable(gt)} has no mesh file, expected one of {', '.join(READ_SUFFIXES)}")
    names = sorted(pred_files.keys() | gt_files.keys())
    return [Item(name, tuple(pred_files.get(name, ())), tuple(gt_files.get(name, ()))) for name in names]


def score_item(item: Item, protocol: ProtocolConfig, workers: int = -1) -> Row:
    """The row of one item. Whatever is wrong with its files makes it a failed row with its reason, never an exception.

    A failed row whose ground truth is sound carries the scores of an empty prediction (`failed_scores`), so
    that the means count it against the method. A package that is missing is no mesh's fault: UserError.
    """
    start = time.perf_counter()
    row: Row = {"name": item.name, "status": "ok", "error": None}
    try:
        try:
            row |= _scores(item, protocol, workers)
        except ImportError:
            raise
        except Exception as error:  # a broken mesh may break anything below; the reason is kept in the row
            text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            # a file may name its parts with half a surrogate pair, which no report could be written with
            row |= {"status": "failed", "error": text.encode("utf-8", "backslashreplace").decode()}
            row |= _failure_scores(item, protocol)
    except ImportError as error:
        raise UserError(f"scoring needs {error.name}, which can't be imported: {error}") from error
    return row | {"seconds": round(time.perf_counter() - start, 3)}


def _scores(item: Item, protocol: ProtocolConfig, workers: int) -> Row:
    pred_file = _only("prediction", item.pred, item.name)
    gt_file = _only("ground truth", item.gt, item.name)
    scores = evaluate_pair(load_mesh(pred_file), load_mesh(gt_file), protocol, workers).flat()
    bad = [name for name, score in scores.items() if score is not None and not np.isfinite(score)]
    if bad:  # would break the journal, and the means of all others
        raise UserError(f"{', '.join(bad)} can't be computed: not finite")
    return scores | {"has_uv": has_uv(pred_file)}


def _failure_scores(item: Item, protocol: ProtocolConfig) -> Row:
    """Scores of an empty prediction, or nothing where the ground truth itself can't be used."""
    try:
        return failed_scores(load_mesh(_only("ground truth", item.gt, item.name)), protocol)
    except ImportError:
        raise
    except Exception:  # the ground truth's own fault is in the row's reason, or was the first of two
        return {}


def _only(role: str, files: Sequence[Path], name: str) -> Path:
    if not files:
        raise UserError(f"there is no {role} named {name}")
    if len(files) > 1:
        raise UserError(
            f"{len(files)} {role} files are named {name}: {', '.join(printable(f.name) for f in files)}"
        )
    return files[0]


def has_uv(path: Path) -> bool:
    """Whether any part of a mesh file has texture coordinates, which loading for evaluation drops. STL and OFF files
    (as read here) never do. ValueError for a glb or gltf file that is broken."""
    suffix = path.suffix.lower()
    if suffix in (".glb", ".gltf"):
        return _gltf_has_uv(read_tree(path))
    if suffix == ".obj":
        with path.open("rb") as file:
            return any(line.lstrip().startswith((b"vt ", b"vt\t")) for line in file)
    return suffix == ".ply" and _ply_has_uv(path)


def _gltf_has_uv(tree: dict[str, Any]) -> bool:
    primitives = (part for mesh in tree.get("meshes", []) for part in mesh.get("primitives", []))
    return any("TEXCOORD_0" in part.get("attributes", {}) for part in primitives)


def _ply_has_uv(path: Path) -> bool:
    with path.open("rb") as file:
        for line in file:
            words = line.split()
            if words[:1] == [b"end_header"]:
                return False
            if words[:1] == [b"property"] and words[-1].decode("latin-1") in _PLY_NAMES:
                return True
    return False


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """`count` of the items, at even distances (0, or more than there are: all)."""
    count = min(count or len(items), len(items))
    return [items[i * len(items) // count] for i in range(count)]
