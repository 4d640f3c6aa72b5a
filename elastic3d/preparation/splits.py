"""The fixed split of every known item: `train.txt`, `val.txt` and `test.txt`, one `source/id` a line.

Infinigen is split by seed (of 200 seeds of a category, 20 are for testing and 5 for validation), so the
lists name shapes whether they were generated or not.
"""

from __future__ import annotations

from collections import Counter
from enum import Enum
from pathlib import Path

import numpy as np

from elastic3d.errors import UserError


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
    """Split by "source/id". UserError if a list is missing or an item is in two places."""
    found: list[tuple[str, Split]] = []
    for split in Split:
        path = folder / f"{split.value}.txt"
        if not path.is_file():
            raise UserError(f"{path} is missing, expected the list of shapes for {split.value}")
        found += [(line, split) for line in path.read_text().split("\n") if line]
    twice = [name for name, count in Counter(name for name, _ in found).items() if count > 1]
    if twice:
        raise UserError(f"{twice[0]} is listed more than once in {folder}, expected each shape in one split")
    return dict(found)


def write_splits(folder: Path, splits: dict[str, Split]) -> None:
    """Write the three lists, sorted."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in Split:
        names = sorted(name for name, which in splits.items() if which is split)
        (folder / f"{split.value}.txt").write_text("".join(f"{name}\n" for name in names))
