"""Splits: the committed lists, and how groups are divided."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import trimesh

from elastic3d.errors import UserError
from elastic3d.evaluation.sets import shape_points
from elastic3d.preparation.infinigen import FACTORIES, assets
from elastic3d.preparation.options import PrepareConfig, SplitsConfig
from elastic3d.preparation.primitives.catalogue import CATEGORIES, PER_ROUND, shapes
from elastic3d.preparation.splits import (
    Split,
    folder_split,
    infinigen_split,
    near_duplicate_groups,
    primitives_split,
    read_splits,
    split_groups,
    write_folder_split,
    write_splits,
)
from elastic3d.training.datasets import read_split

COMMITTED = Path(__file__).parents[2] / "data" / "splits"


def test_committed_lists_are_disjoint_and_follow_the_rule() -> None:
    splits = read_splits(COMMITTED)  # raises if a name is in two lists
    for asset in assets([], 200):
        assert splits[f"infinigen/{asset.name}"] is infinigen_split(asset.seed)


def test_the_default_prepares_every_listed_asset() -> None:
    config = PrepareConfig()
    assert config.seeds == SplitsConfig().seeds
    listed = {name for name in read_splits(COMMITTED) if name.startswith("infinigen/")}
    assert listed == {f"infinigen/{asset.name}" for asset in assets(config.categories, config.seeds)}


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
        return shape_points(mesh)

    ball, box = trimesh.creation.icosphere(3), trimesh.creation.box((1, 1, 1))
    bigger, squashed = ball.copy(), ball.copy()
    bigger.apply_scale(7)
    squashed.apply_scale((1, 0.97, 1))
    groups = near_duplicate_groups([cloud(mesh) for mesh in (ball, box, bigger, squashed)])
    assert groups[0] == groups[2] == groups[3] != groups[1]


def test_held_out_primitives_are_balanced() -> None:
    splits = read_splits(COMMITTED)
    for shape in shapes([], 4000):
        expected = primitives_split(shape.seed, PER_ROUND.get(shape.category, 1))
        assert splits[f"primitives/{shape.name}"] is expected
    held_out = Counter(
        (name.split("/")[1].rsplit("-", 1)[0], split)
        for name, split in splits.items()
        if name.startswith("primitives/")
    )
    for category in CATEGORIES:
        assert held_out[category, Split.test] == 2 * PER_ROUND.get(category, 1)
        assert held_out[category, Split.val] == 1


def test_a_users_meshes_are_split_by_name(tmp_path: Path) -> None:
    names = [f"mine/{index}" for index in range(40)]
    train, val = folder_split(names, 0.1)
    assert len(val) == 4 and sorted(train + val) == sorted(names)
    assert folder_split(names[::-1], 0.1)[1] == val[::-1]
    assert folder_split(names, 0.1, seed=1)[1] != val
    added = [f"mine/new-{index}" for index in range(40)]
    more, held_out = folder_split([*added, *names], 0.1, 0, train, val)
    assert set(train) < set(more) and set(val) < set(held_out) and len(held_out) == 8
    assert folder_split(names, 0.5, 0, train, val) == (train, val)
    both = folder_split(names[:12], 0.1, 0, names[:9], names[:9])  # fewer than ten were all trained on
    assert both[0][:9] == names[:9] and len(both[1]) == 1
    assert folder_split(names[:9], 0.1) == (names[:9], names[:9])
    assert folder_split(names, 0) == (names, names)
    write_folder_split(tmp_path, names, set(val))
    assert (tmp_path / "train.txt").read_text().split() == train
    assert (tmp_path / "val.txt").read_text().split() == val
    write_folder_split(tmp_path, names[:2], set(names))
    assert (tmp_path / "train.txt").read_text() == (tmp_path / "val.txt").read_text() == "mine/0\nmine/1\n"


def test_lists_are_read_as_training_reads_them(tmp_path: Path) -> None:
    write_splits(tmp_path, {"a/1": Split.train, "a/2": Split.test})
    (tmp_path / "val.txt").write_bytes("\ufeff# mine\r\n\r\na/Stühle \r\n".encode())
    assert read_splits(tmp_path)["a/Stühle"] is Split.val
    assert read_split([tmp_path / "val.txt"]) == ["a/Stühle"]
    (tmp_path / "val.txt").write_text("a/3\nchair\n")
    with pytest.raises(UserError, match="val.txt has the line 'chair', expected lines such as folder/chair"):
        read_splits(tmp_path)
    (tmp_path / "val.txt").write_bytes("a/Stühle".encode("latin-1"))
    with pytest.raises(UserError, match="val.txt is broken or no text, expected a list of shapes"):
        read_splits(tmp_path)


def test_a_list_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_splits(tmp_path, {"a/1": Split.train})
    with pytest.raises(UnicodeEncodeError):
        write_splits(tmp_path, {"a/1": Split.train, "a/\udcff": Split.train})
    assert read_splits(tmp_path) == {"a/1": Split.train}
