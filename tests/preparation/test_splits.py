"""Splits: the committed lists, and how groups are divided."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import trimesh

from elastic3d.errors import UserError
from elastic3d.preparation.duplicates import near_duplicate_groups, shape_points
from elastic3d.preparation.infinigen_source import FACTORIES, assets
from elastic3d.preparation.splits import Split, infinigen_split, read_splits, split_groups, write_splits
from elastic3d.preparation.views import RawShape

COMMITTED = Path(__file__).parents[2] / "data" / "splits"


def test_committed_lists_are_disjoint_and_follow_the_rule() -> None:
    splits = read_splits(COMMITTED)  # raises if a name is in two lists
    for asset in assets([], 200):
        assert splits[f"infinigen/{asset.name}"] is infinigen_split(asset.seed)


def test_held_out_shapes_of_every_category() -> None:
    held_out = Counter(
        (name.split("/")[1].rsplit("-", 1)[0], split)
        for name, split in read_splits(COMMITTED).items()
        if name.startswith("infinigen/")
    )
    for category in FACTORIES:
        assert held_out[category, Split.test] == 20
        assert held_out[category, Split.val] == 5


def test_real_shapes_are_in_all_splits() -> None:
    real = Counter(split for name, split in read_splits(COMMITTED).items() if name.startswith("sweethome3d/"))
    assert real[Split.test] >= 100 and real[Split.val] >= 20 and real[Split.train] >= 500


def test_groups_stay_whole_and_big_ones_train() -> None:
    groups = {f"s/{index}": min(index // 2, 40) for index in range(100)}
    splits = split_groups(groups, test=20, val=6)
    for group in set(groups.values()):
        assert len({splits[name] for name in groups if groups[name] == group}) == 1
    assert Counter(splits.values()) == {Split.test: 20, Split.val: 6, Split.train: 74}
    assert {splits[name] for name in groups if groups[name] == 40} == {Split.train}
    assert splits == split_groups(dict(reversed(groups.items())), test=20, val=6)


def test_a_name_in_two_lists(tmp_path: Path) -> None:
    write_splits(tmp_path, {"a/1": Split.train, "a/2": Split.test})
    assert read_splits(tmp_path) == {"a/1": Split.train, "a/2": Split.test}
    (tmp_path / "val.txt").write_text("a/2\n")
    with pytest.raises(UserError, match="a/2 is listed more than once"):
        read_splits(tmp_path)
    (tmp_path / "val.txt").unlink()
    with pytest.raises(UserError, match=r"val\.txt is missing"):
        read_splits(tmp_path)


def test_near_duplicates_are_found() -> None:
    def cloud(mesh: trimesh.Trimesh) -> np.ndarray:
        return shape_points(RawShape(mesh, np.zeros(len(mesh.faces), int)))

    ball, box = trimesh.creation.icosphere(3), trimesh.creation.box((1, 1, 1))
    bigger, squashed = ball.copy(), ball.copy()
    bigger.apply_scale(7)
    squashed.apply_scale((1, 0.97, 1))
    groups = near_duplicate_groups([cloud(mesh) for mesh in (ball, box, bigger, squashed)])
    assert groups[0] == groups[2] == groups[3] != groups[1]
