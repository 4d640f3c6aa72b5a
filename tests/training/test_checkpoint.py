import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from elastic3d.errors import UserError
from elastic3d.models.weights import save_weights
from elastic3d.training import checkpoint
from elastic3d.training.checkpoint import (
    Checkpoint,
    clear_unfinished,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)


def some_checkpoint(step: int) -> Checkpoint:
    parts = {name: {"w": torch.full((2,), float(step))} for name in ("model", "average", "optimizer")}
    return Checkpoint(step, parts, {"data": {"shapes": 3}})


def test_round_trip(tmp_path):
    path = save_checkpoint(tmp_path, some_checkpoint(7), keep=2)
    assert path == tmp_path / "step-00000007"
    found = load_checkpoint(path)
    assert found.step == 7
    assert found.values == {"data": {"shapes": 3}}
    assert torch.equal(found.tensors["model"]["w"], torch.full((2,), 7.0))


def test_keeps_the_newest(tmp_path):
    for step in (1, 2, 3, 10):
        save_checkpoint(tmp_path, some_checkpoint(step), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000010"]
    assert newest_checkpoint(tmp_path) == (tmp_path / "step-00000010", [])


def test_a_broken_newer_one_does_not_crowd_out_what_is_whole(tmp_path):
    """A run goes on from the newest whole checkpoint; what was passed over counts for none."""
    save_checkpoint(tmp_path, some_checkpoint(5), keep=1)
    broken = save_checkpoint(tmp_path, some_checkpoint(10), keep=9)
    (broken / "state.json").unlink()
    path = save_checkpoint(tmp_path, some_checkpoint(7), keep=1)
    assert newest_checkpoint(tmp_path)[0] == path
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000007", "step-00000010"]


def test_the_same_step_again_replaces(tmp_path):
    save_checkpoint(tmp_path, replace(some_checkpoint(5), step=1), keep=2)
    path = save_checkpoint(tmp_path, some_checkpoint(1), keep=2)
    assert load_checkpoint(path).tensors["model"]["w"].tolist() == [1.0, 1.0]


def test_half_written_ones_are_refused_and_passed_over(tmp_path):
    good = save_checkpoint(tmp_path, some_checkpoint(1), keep=9)
    no_manifest = save_checkpoint(tmp_path, some_checkpoint(2), keep=9)
    (no_manifest / "manifest.json").unlink()
    truncated = save_checkpoint(tmp_path, some_checkpoint(3), keep=9)
    weights = truncated / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    missing = save_checkpoint(tmp_path, some_checkpoint(4), keep=9)
    (missing / "state.json").unlink()
    parts = some_checkpoint(6).tensors
    del parts["average"]
    partial = save_checkpoint(tmp_path, Checkpoint(6, parts), keep=9)
    unfinished = tmp_path / ".step-00000005.unfinished"
    shutil.copytree(good, unfinished)
    for path, message in (
        (no_manifest, "has no manifest.json"),
        (truncated, "model.safetensors differs"),
        (missing, "state.json is missing"),
        (partial, "manifest.json does not list average.safetensors"),
        (tmp_path / "step-00000009", "no checkpoint folder"),
    ):
        with pytest.raises(UserError, match=message):
            load_checkpoint(path)
    newest, reasons = newest_checkpoint(tmp_path)
    assert newest == good
    assert len(reasons) == 4
    clear_unfinished(tmp_path)
    assert not unfinished.exists()


def test_a_file_that_goes_while_others_are_written_ends_in_no_checkpoint(tmp_path, monkeypatch):
    """As where two processes were in one run: the manifest listed what was left."""

    def losing(tensors: object, path: Path) -> None:
        save_weights(tensors, path)
        (path.parent / "model.safetensors").unlink()

    monkeypatch.setattr(checkpoint, "save_weights", losing)
    with pytest.raises(UserError, match="can't write .*step-00000001: .*"):
        save_checkpoint(tmp_path, Checkpoint(1, {"model": {"w": torch.ones(1)}}), keep=2)
    assert list(tmp_path.iterdir()) == []


def test_nothing_there(tmp_path):
    assert newest_checkpoint(tmp_path / "absent") == (None, [])


def test_files_that_the_manifest_does_not_list_are_not_read(tmp_path):
    path = save_checkpoint(tmp_path, some_checkpoint(1), keep=2)
    shutil.copy(path / "model.safetensors", path / "stranger.safetensors")
    found = load_checkpoint(path)
    assert set(found.tensors) == {"model", "average", "optimizer"}
    with pytest.raises(UserError, match="step-00000001 has no stranger.safetensors"):
        found.part("stranger")
