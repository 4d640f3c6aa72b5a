import copy
import json
import random
import shutil

import numpy as np
import pytest
import torch

from elastic3d.errors import UserError
from elastic3d.training.checkpoint import (
    Checkpoint,
    checkpoint_path,
    clear_unfinished,
    load_checkpoint,
    load_random_state,
    newest_checkpoint,
    random_state,
    save_checkpoint,
    set_random_state,
    write_part,
)


def some_checkpoint(step: int) -> Checkpoint:
    return Checkpoint(step, {"model": {"w": torch.full((2,), float(step))}}, {"data": {"shapes": 3}})


def test_round_trip(tmp_path):
    write_part(tmp_path, 7, "random-00000.json", {"a": 1})
    path = save_checkpoint(tmp_path, some_checkpoint(7), keep=2)
    assert path == tmp_path / "step-00000007"
    found = load_checkpoint(path)
    assert found.step == 7
    assert found.values == {"data": {"shapes": 3}}
    assert torch.equal(found.tensors["model"]["w"], torch.full((2,), 7.0))
    assert (path / "random-00000.json").is_file()


def test_keeps_the_newest(tmp_path):
    for step in (1, 2, 3, 10):
        save_checkpoint(tmp_path, some_checkpoint(step), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000010"]
    assert newest_checkpoint(tmp_path) == (checkpoint_path(tmp_path, 10), [])


def test_the_same_step_again_replaces(tmp_path):
    save_checkpoint(tmp_path, Checkpoint(1, {"model": {"w": torch.zeros(1)}}), keep=2)
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
    unfinished = tmp_path / ".step-00000005.unfinished"
    shutil.copytree(good, unfinished)
    for path, message in (
        (no_manifest, "has no manifest.json"),
        (truncated, "model.safetensors differs"),
        (missing, "state.json is missing"),
        (tmp_path / "step-00000009", "no checkpoint folder"),
    ):
        with pytest.raises(UserError, match=message):
            load_checkpoint(path)
    newest, reasons = newest_checkpoint(tmp_path)
    assert newest == good
    assert len(reasons) == 3
    clear_unfinished(tmp_path)
    assert not unfinished.exists()


def test_nothing_there(tmp_path):
    assert newest_checkpoint(tmp_path / "absent") == (None, [])


def test_random_state_round_trip():
    state = random_state()

    def draw() -> tuple[float, float, float]:
        return random.random(), np.random.rand(), torch.rand(()).item()

    first = draw()
    assert draw() != first
    set_random_state(state)
    assert draw() == first


def test_files_that_the_manifest_does_not_list_are_not_read(tmp_path):
    path = save_checkpoint(tmp_path, some_checkpoint(1), keep=2)
    shutil.copy(path / "model.safetensors", path / "stranger.safetensors")
    found = load_checkpoint(path)
    assert set(found.tensors) == {"model"}
    with pytest.raises(UserError, match="step-00000001 has no average.safetensors"):
        found.part("average")


def test_a_random_state_that_points_outside_of_its_words_is_refused(tmp_path):
    good = json.loads(json.dumps(random_state()))
    path = tmp_path / "random-00000.json"
    for place, value in (
        ("pos", 1 << 30),
        ("pos", -1),
        ("key", [1, 2]),
        ("key", [-1] * 624),
        ("key", ["a"] * 624),
    ):
        state = copy.deepcopy(good)
        state["numpy"]["state"][place] = value
        path.write_text(json.dumps(state))
        with pytest.raises(UserError, match="random-00000.json"):
            load_random_state(path)
    path.write_text(json.dumps({**good, "torch": good["torch"][:40]}))
    with pytest.raises(UserError, match="random-00000.json holds no state of the random generators"):
        load_random_state(path)
    path.write_text(json.dumps(good))
    load_random_state(path)
    assert json.loads(json.dumps(random_state())) == good
