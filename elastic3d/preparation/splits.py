"""The fixed split of every known item: `train.txt`, `val.txt` and `test.txt`, one `source/id` a line; and groups of
nearly equal shapes, which have to stay on one side of it.

Infinigen is split by seed (of the first 200 seeds of a category 20 are for testing and 5 for validation, later ones
for training), so the lists name shapes whether they were generated or not.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection
from enum import Enum
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from elastic3d.errors import UserError
from elastic3d.preparation.sources import read_list
from elastic3d.utils.files import atomic_path

# meshes of a user's folder; fewer all train, and validation shows how well they are fitted
FEWEST_TO_SPLIT = 10


class Split(Enum):
    """What a shape may be used for."""

    train = "train"
    val = "val"
    test = "test"


def infinigen_split(seed: int) -> Split:
    """Seeds 9, 19 ... 199 are for testing; 8, 48, 88, 128 and 168 for validation."""
    if seed < 200 and seed % 10 == 9:
        return Split.test
    return Split.val if seed < 200 and seed % 40 == 8 else Split.train


def primitives_split(seed: int, per_round: int = 1) -> Split:
    """Seeds 9 and 19 are for testing, 29, 39 ... too where a round holds several seeds; 8 is for validation."""
    if seed < 20 * per_round and seed % 10 == 9:
        return Split.test
    return Split.val if seed == 8 else Split.train


def split_groups(groups: dict[str, int], test: int, val: int, seed: int = 0) -> dict[str, Split]:
    """Split of every name such that a group stays whole: at least `test` and `val` names, the rest for
    training.

    Groups of more than 3 go to training: they are the sockets and doors that say least about a method.
    """
    members: dict[int, list[str]] = {}
    for name in sorted(groups):
        members.setdefault(groups[name], []).append(name)
    ordered = sorted(members.values())
    found = dict.fromkeys(groups, Split.train)
    for index in np.random.default_rng(seed).permutation(len(ordered)):
        names = ordered[index]
        if len(names) <= 3 and test > 0:
            found |= dict.fromkeys(names, Split.test)
            test -= len(names)
        elif len(names) <= 3 and val > 0:
            found |= dict.fromkeys(names, Split.val)
            val -= len(names)
    return found


def read_splits(folder: Path) -> dict[str, Split]:
    """Split by "source/id". UserError if a list is missing or broken or an item is in two places."""
    found: list[tuple[str, Split]] = []
    for split in Split:
        path = folder / f"{split.value}.txt"
        if not path.is_file():
            raise UserError(
                f"{path} is missing, expected the list of shapes for {split.value}: name a folder with all three"
                " lists with splits=, or leave it out for those of the repository"
            )
        found += [(name, split) for name in read_list(path)]
    twice = [name for name, count in Counter(name for name, _ in found).items() if count > 1]
    if twice:
        raise UserError(f"{twice[0]} is listed more than once in {folder}, expected each shape in one split")
    return dict(found)


def write_splits(folder: Path, splits: dict[str, Split]) -> None:
    """Write the three lists, sorted."""
    for split in Split:
        names = sorted(name for name, which in splits.items() if which is split)
        _write_list(folder / f"{split.value}.txt", names)


def folder_split(
    names: list[str], share: float, seed: int = 0, train: Collection[str] = (), val: Collection[str] = ()
) -> tuple[list[str], list[str]]:
    """(train, val) of a user's meshes: those in the lists `train` and `val` of an earlier split stay there, of the
    others each name's hash decides.

    At least one of ten or more is for validation unless `share` is 0 or all were trained on: then, and of fewer than
    ten, all are in both.
    """
    if len(names) < FEWEST_TO_SPLIT or share == 0:
        return names, names
    kept = {name for name in names if name in val and name not in train}
    new = [name for name in names if name not in train and name not in val]
    new.sort(key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())
    val = kept.union(new[: max(0, max(1, round(share * len(names))) - len(kept))])
    return [name for name in names if name not in val], [name for name in names if name in val]


def write_folder_split(folder: Path, names: list[str], held_out: set[str]) -> None:
    """Write `train.txt` and `val.txt` beside a user's prepared meshes; where nothing else is left, both name all."""
    train = [name for name in names if name not in held_out] or names
    val = [name for name in names if name in held_out] or names
    for name, listed in (("train", train), ("val", val)):
        _write_list(folder / f"{name}.txt", listed)


def _write_list(path: Path, names: list[str]) -> None:
    with atomic_path(path) as draft:
        draft.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


def near_duplicate_groups(clouds: list[NDArray[np.float32]], threshold: float = 0.05) -> NDArray[np.int32]:
    """Group number of every point cloud (P, 3); two are in one group if a chain of close pairs joins them.

    Close: the mean distance to the nearest point, averaged over both directions, is below `threshold`.
    Sampling alone accounts for about 0.02 of it at 2048 points.
    """
    trees = [cKDTree(cloud) for cloud in clouds]
    extents = np.stack([np.ptp(cloud, axis=0) for cloud in clouds])
    # A box that differs by 4 thresholds can't hold nearly the same surface, save for a few stray points.
    alike = np.abs(extents[:, None] - extents[None]).max(axis=-1) < 4 * threshold
    pairs = np.argwhere(np.triu(alike, k=1))
    close = [
        (first, second)
        for first, second in pairs
        if _distance(clouds[first], trees[second], clouds[second], trees[first], threshold) < threshold
    ]
    rows, columns = np.array(close, np.int64).reshape(-1, 2).T
    graph = coo_array((np.ones(len(rows)), (rows, columns)), shape=(len(clouds), len(clouds)))
    return connected_components(graph, directed=False)[1]


def _distance(
    first: NDArray[np.float32],
    second_tree: cKDTree,
    second: NDArray[np.float32],
    first_tree: cKDTree,
    threshold: float,
) -> float:
    rough = second_tree.query(first[::16])[0].mean()
    if rough > 3 * threshold:
        return float("inf")
    there, back = second_tree.query(first)[0], first_tree.query(second)[0]
    return float(there.mean() + back.mean()) / 2
