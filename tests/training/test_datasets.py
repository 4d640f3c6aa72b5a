import pickle
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from _cli import parse

from elastic3d.errors import UserError
from elastic3d.training.datasets import (
    PreparedShapes,
    Shuffle,
    even_times,
    list_options,
    micro_batches,
    open_split,
    pick,
    read_split,
    use_own_lists,
)
from elastic3d.training.latents import CacheConfig
from elastic3d.training.options import DataConfig, LoopConfig
from elastic3d.training.vae import AugmentConfig, VAEItems, augment
from tests.training.tiny import vae_config


def test_validation_visits_every_time_once():
    """Also of seven items and its multiples, where steps of seven come back to the first."""
    for count in range(1, 201):
        expected = (torch.arange(count) + 0.5) / count
        assert torch.equal(even_times(count).sort().values, expected)
    assert torch.equal(even_times(128), (7 * torch.arange(128) % 128 + 0.5) / 128)


def test_split_files(tmp_path):
    (tmp_path / "a.txt").write_text("# comment\ns/1\n\ns/2\n")
    (tmp_path / "b.txt").write_text("s/2\nt/3\n")
    assert read_split([tmp_path / "a.txt", tmp_path / "b.txt"]) == ["s/1", "s/2", "t/3"]
    with pytest.raises(
        UserError, match=r"no split file .*c\.txt: name lists that are there with data\.train="
    ):
        read_split([tmp_path / "c.txt"])
    (tmp_path / "c.txt").write_text("# nothing\n")
    with pytest.raises(UserError, match=r"names no shape, .*prepare_data\.py source=folder writes them"):
        read_split([tmp_path / "c.txt"])
    (tmp_path / "c.txt").write_text("s/1\nhello\n")
    with pytest.raises(UserError, match=r"c.txt has the line 'hello', expected lines such as folder/chair"):
        read_split([tmp_path / "c.txt"])
    (tmp_path / "c.txt").write_bytes(b"\x89PNG\xff")
    with pytest.raises(UserError, match=r"c.txt is broken or no text, expected a list of shapes"):
        read_split([tmp_path / "c.txt"])


@pytest.mark.parametrize("preload", [False, True])
def test_shapes_of_a_split(prepared, preload):
    data = vae_config(prepared).data
    data.preload = preload
    shapes = open_split(data, data.train, ("near",))
    assert (len(shapes), shapes.missing) == (5, 1)
    near = shapes.read("balls/ball3", "near").float()
    torch.testing.assert_close(near[:, 3], 0.7 - near[:, :3].norm(dim=1), atol=2e-3, rtol=0)
    few = open_split(data, data.train, (), limit=2)
    assert few.ids == [shapes.ids[0], shapes.ids[2]], "spread evenly over the list, as the help says"
    again = pickle.loads(pickle.dumps(shapes))
    assert torch.equal(again.read("balls/ball3", "near").float(), near)


def test_an_empty_split_raises(prepared):
    with pytest.raises(UserError, match="none of the 1 shapes"):
        PreparedShapes(prepared / "prepared", ["balls/nothing"])


def test_shuffle_shows_each_once_an_epoch_in_another_order():
    shuffle = Shuffle(7)
    epochs = [[shuffle(7 * epoch + i, seed=5) for i in range(7)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert shuffle(0, seed=6) == Shuffle(7)(0, seed=6)


def test_pick():
    rng = np.random.default_rng(0)
    points = torch.arange(10).half()[:, None]
    assert len(pick(points, 6, rng).unique()) == 6
    for count in (10, 12, 25):
        found = pick(points, count, rng)
        assert found.shape == (count, 1) and len(found[:10].unique()) == 10, "each of them, before any again"
    assert not torch.equal(found[:10], points.float())
    alike = np.random.default_rng(3).choice(10, 7, replace=False, shuffle=False)
    assert torch.equal(pick(points, 7, np.random.default_rng(3))[:, 0], torch.from_numpy(alike).float())


def test_items_depend_on_position_and_seed_alone(prepared):
    config = vae_config(prepared)
    shapes = open_split(config.data, config.data.train, ())
    one, other = VAEItems(shapes, config.vae), VAEItems(shapes, config.vae)
    one.item(0, seed=1)
    a, b = one.item(8, seed=1), other.item(8, seed=1)
    assert {name: tuple(t.shape) for name, t in a.items()} == {
        "surface": (64, 6), "points": (64, 3), "distance": (64,), "noise": (8, 7),
    }  # fmt: skip
    assert all(torch.equal(a[name], b[name]) and a[name].dtype is torch.float32 for name in a)
    assert not torch.equal(a["noise"], one.item(8, seed=2)["noise"])


@pytest.mark.parametrize(("processes", "accumulate", "workers"), [(1, 1, 0), (2, 1, 0), (1, 2, 1), (2, 2, 0)])
def test_the_global_batch_is_the_same_however_it_is_shared(prepared, processes, accumulate, workers):
    config = vae_config(prepared)
    shapes = open_split(config.data, config.data.train, ())

    def batches(loop: LoopConfig, processes: int) -> list[torch.Tensor]:
        items = VAEItems(shapes, config.vae)
        loaders = [list(micro_batches(items, loop, 1, p, processes)) for p in range(processes)]
        return [
            torch.cat(
                [loader[step][micro]["noise"] for micro in range(loop.accumulate) for loader in loaders]
            )
            for step in range(2)
        ]

    whole = batches(LoopConfig(steps=3, batch=4), 1)
    shared = batches(LoopConfig(steps=3, batch=4, accumulate=accumulate, workers=workers), processes)
    assert all(torch.equal(a, b) for a, b in zip(whole, shared, strict=True))


def ball(radius: float) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(0)
    normals = torch.nn.functional.normalize(torch.from_numpy(rng.standard_normal((256, 3))).float(), dim=-1)
    points = torch.from_numpy(rng.uniform(-1, 1, (512, 3))).float()
    return {
        "surface": torch.cat([radius * normals + torch.tensor([0.1, 0.0, 0.0]), normals], dim=-1),
        "points": points,
        "distance": radius - (points - torch.tensor([0.1, 0.0, 0.0])).norm(dim=-1),
    }


def test_offsets_are_drawn_at_the_asked_spread(prepared):
    config = vae_config(prepared)
    shapes = open_split(config.data, config.data.train, ())
    assert "offsets" not in VAEItems(shapes, config.vae).item(0, 0)
    config.vae.anchor_spread = 0.1
    items = VAEItems(shapes, config.vae)
    drawn = torch.stack([items.item(i, 0)["offsets"] for i in range(50)])
    assert drawn.shape == (50, 8, 3)
    assert 0.09 < drawn.std() < 0.11 and drawn.mean().abs() < 0.01


def test_mirror_scale_and_rotation_keep_distances_exact():
    config = AugmentConfig(scale_min=0.6, rotate_degrees=20.0)
    sides = set()
    for seed in range(8):
        item = augment(ball(0.5), config, np.random.default_rng(seed))
        centre = torch.linalg.lstsq(
            torch.cat([2 * item["surface"][:, :3], torch.ones(256, 1)], dim=1),
            item["surface"][:, :3].square().sum(1, keepdim=True),
        ).solution[:3, 0]
        radius = (item["surface"][:, :3] - centre).norm(dim=-1)
        sides.add(bool(centre[0] > 0))
        torch.testing.assert_close(item["distance"], radius.mean() - (item["points"] - centre).norm(dim=-1))
        outward = (item["surface"][:, :3] - centre) / radius[:, None]
        torch.testing.assert_close(item["surface"][:, 3:], outward, atol=1e-4, rtol=0)
    assert sides == {True, False}


def test_a_rotation_does_not_leave_the_box():
    corner = torch.tensor([[0.95, 0.95, 0.95, 0.0, 1.0, 0.0], [-0.95, -0.95, -0.95, 0.0, -1.0, 0.0]])
    item = {"surface": corner, "points": corner[:, :3], "distance": torch.zeros(2)}
    for seed in range(8):
        moved = augment(item, AugmentConfig(scale_min=1.0, rotate_degrees=45.0), np.random.default_rng(seed))
        assert moved["surface"][:, :3].abs().max() <= 0.9501


def test_a_stretch_keeps_signs_and_normals_and_bounds_distances():
    config = AugmentConfig(mirror=False, scale_min=1.0, stretch_min=0.5)
    before = ball(0.5)
    item = augment(before, config, np.random.default_rng(1))
    assert torch.equal(item["distance"] > 0, before["distance"] > 0)
    surface, queries = item["surface"][:, :3], item["points"]
    true = torch.cdist(queries, surface).min(dim=1).values
    assert (item["distance"].abs() <= true + 1e-5).all()
    stretch = (surface / before["surface"][:, :3]).nanmedian(dim=0).values
    ellipsoid = torch.nn.functional.normalize(before["surface"][:, 3:] / stretch, dim=-1)
    torch.testing.assert_close(item["surface"][:, 3:], ellipsoid, atol=1e-4, rtol=0)


def test_a_users_own_meshes_are_found_in_any_folder(prepared, tmp_path_factory, monkeypatch):
    """Also where the default lists are those that an installed package brings."""
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    own = prepared / "prepared" / "balls" / "train.txt"
    for name in ("train", "val"):
        own.with_name(f"{name}.txt").write_text("balls/ball1\n")
    given = ["stage=cache", f"data.prepared={prepared / 'prepared'}"]
    config = parse(CacheConfig, "train", given)
    assert config.data.train[0].is_absolute()
    use_own_lists(config.data)
    assert (config.data.train, config.data.val) == ([own], [own.with_name("val.txt")])
    named = parse(CacheConfig, "train", [*given, f"data.train={own.with_name('val.txt')}"])
    use_own_lists(named.data)
    assert named.data.train == [own.with_name("val.txt")]


def test_the_lists_of_a_folder_pass_through_a_shell():
    found = shlex.split(list_options(Path("my chairs/$1")))
    assert found == ["data.train=my chairs/$1/train.txt", "data.val=my chairs/$1/val.txt"]


def test_a_users_own_meshes_are_found(prepared, monkeypatch):
    """Without options where they are all there is; else the options are in the message."""
    monkeypatch.chdir(prepared)
    (prepared / "data" / "splits").mkdir(parents=True)
    for name in ("train", "val"):
        (prepared / "data" / "splits" / f"{name}.txt").write_text("infinigen/chair-00001\n")
        (prepared / "prepared" / "balls" / f"{name}.txt").write_text("balls/ball1\n")
    own = [prepared / "prepared" / "balls" / "train.txt"]
    found = DataConfig(prepared=prepared / "prepared")
    use_own_lists(found)
    assert found.train == own and found.val == [own[0].with_name("val.txt")]
    (prepared / "prepared" / "infinigen").mkdir()
    (prepared / "prepared" / "infinigen" / "shard-00000.safetensors").touch()
    listed = DataConfig(prepared=prepared / "prepared")
    use_own_lists(listed)
    assert listed == DataConfig(prepared=prepared / "prepared")
    with pytest.raises(
        UserError, match=r"none of the 1 shapes .* data.train=\S+/balls/train.txt data.val=\S+/balls/val.txt"
    ):
        PreparedShapes(prepared / "prepared", ["sofas/1"])
    with pytest.raises(UserError, match="prepare_data.py makes them"):
        PreparedShapes(prepared / "data", ["sofas/1"])
    (prepared / "train.txt").write_text("# nothing\n")
    with pytest.raises(UserError, match="names no shape, expected lines such as"):
        read_split([prepared / "train.txt"])
