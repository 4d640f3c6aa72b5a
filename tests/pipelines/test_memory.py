"""Estimates of memory, and parts that are on the device only while they work."""

from __future__ import annotations

import gc
import math
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from tiny_pipeline import image, tiny_pipeline

from elastic3d.elastic import attach
from elastic3d.elastic.config import RouterConfig, Scope
from elastic3d.errors import UserError
from elastic3d.geometry.mesh_io import save_mesh
from elastic3d.geometry.options import DecodeConfig
from elastic3d.models.options import VAEConfig
from elastic3d.pipelines.image_to_3d import CPU_CHUNK
from elastic3d.pipelines.memory import (
    MemoryNeed,
    free_memory,
    left_in_container,
    on_device,
    points_within,
    require,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda")
NEED = MemoryNeed({"condition": 4, "dit": 10, "decode": 2}, {"condition": 3, "dit": 5, "decode": 9})


class Heavy(torch.nn.Linear):
    """Too large for the device: it can only go back."""

    def _apply(self, fn, recurse: bool = True):
        if not fn(torch.zeros(1)).is_cpu:
            raise torch.OutOfMemoryError
        return super()._apply(fn, recurse)


def test_a_part_that_does_not_fit_goes_back_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    part, moved = torch.nn.Sequential(torch.nn.Linear(2, 2), Heavy(2, 2)), list[torch.device]()
    move = torch.nn.Module.to
    monkeypatch.setattr(part, "to", lambda device: moved.append(torch.device(device)) or move(part, device))
    # there is no copy out of the meta device: that it is tried shows that what had moved is fetched
    with pytest.raises(NotImplementedError, match="meta"), on_device(part, torch.device("meta")):
        raise AssertionError("not reached")
    assert moved == [torch.device("meta"), CPU]


def test_peak() -> None:
    assert NEED.peak(offload=False) == 16 + 9 and NEED.peak(offload=True) == 15


def test_a_refusal_names_the_numbers() -> None:
    need = MemoryNeed({"dit": 6 * 10**9}, {"dit": 3 * 10**9})
    require(need, 9 * 10**9, False, GPU)
    with pytest.raises(
        UserError, match=r"about 9.0 GB of cuda memory .*dit 6.0.*but 8.0 GB.*low_memory=true"
    ):
        require(need, 8 * 10**9, False, GPU)


def test_offloading_saves_nothing_where_everything_is_main_memory() -> None:
    require(NEED, 15, True, GPU)
    with pytest.raises(UserError):
        require(NEED, 15, True, CPU)


def test_chunks_shrink_with_the_budget() -> None:
    vae = VAEConfig(width=1024, heads=16)
    many = points_within(10**9, vae, torch.float32, 64, 65536)
    few = points_within(10**8, vae, torch.float32, 64, 65536)
    assert 256 <= few < many < 65536
    assert points_within(10**12, vae, torch.float32, 64, 65536) == 65536
    with pytest.raises(UserError, match="resolution=512 needs .* smaller resolution"):
        points_within(10**9, vae, torch.float32, 512, 65536)


def test_each_part_comes_once_for_all_meshes_and_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, moves = tiny_pipeline(), []
    pipeline.use_less_memory()
    pipeline.device = torch.device("cpu:0")
    for name in ("encoder", "dit", "vae"):
        move = partial(lambda name, device: moves.append((name, str(device))), name)
        monkeypatch.setattr(getattr(pipeline, name), "to", move)
    results = pipeline([image(), image()], seed=[1, 2], steps=2, resolution=12)
    assert all(result.mesh.faces.size for result in results)
    assert moves == [(name, at) for name in ("encoder", "dit", "vae") for at in ("cpu:0", "cpu")]


def test_free_memory_is_plausible() -> None:
    assert 10**7 < free_memory(CPU) < 10**14


@pytest.mark.parametrize("names", [("max", "current"), ("limit_in_bytes", "usage_in_bytes")])
def test_what_a_container_may_still_take(tmp_path: Path, names: tuple[str, str]) -> None:
    """By both versions of control groups. What the page cache holds is free."""
    limit, used = names
    folder = tmp_path if limit == "max" else tmp_path / "memory"
    assert left_in_container(tmp_path) == math.inf
    folder.mkdir(exist_ok=True)
    (folder / "memory.stat").write_text("anon 500\nfile 380\nshmem 30\ninactive_file 250\nactive_file 100\n")
    (folder / f"memory.{used}").write_text("900\n")
    for text, left in (("1000\n", 1000 - 900 + 250 + 100), ("max\n", math.inf)):
        (folder / f"memory.{limit}").write_text(text)
        assert left_in_container(tmp_path) == left


def test_memory_that_pytorch_holds_unused_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in {"mem_get_info": (3, 10), "memory_reserved": 6, "memory_allocated": 2}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, size=size: size)
    assert free_memory(GPU) == 3 + 6 - 2


def test_smaller_calls_of_the_field_give_the_same_mesh():
    pipeline = tiny_pipeline()
    assert pipeline.max_points == CPU_CHUNK < DecodeConfig().max_points
    one = pipeline(image(), steps=2, resolution=16)
    pipeline.max_points = 1000
    other = pipeline(image(), steps=2, resolution=16)
    assert one.mesh.vertices.shape == other.mesh.vertices.shape
    assert abs(one.mesh.vertices - other.mesh.vertices).max() < 1e-4


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_memory_stays_flat_over_200_meshes(tmp_path: Path) -> None:
    """One process that goes on making meshes, elastic ones in batches of changing size, holds no more than at first."""
    pipeline = tiny_pipeline()
    torch.manual_seed(0)
    attach(pipeline.dit, RouterConfig(scope=Scope.step))
    process, made, resident = psutil.Process(), 0, []
    while made < 200:
        batch = [image(x=10 + made % 50)] * (1 + made % 3)
        for number, result in enumerate(pipeline(batch, seed=made, resolution=16 + 8 * (made % 2))):
            save_mesh(result.mesh, tmp_path / f"{number}.glb", extras=result.metadata)
        made += len(batch)
        gc.collect()
        resident.append(process.memory_info().rss)
    third = len(resident) // 3
    first, last = max(resident[third : 2 * third]), max(resident[2 * third :])
    assert last < first + 8e6, f"from {first / 1e6:.0f} to {last / 1e6:.0f} MB"
