"""Shards survive crashes, hangs and kills, and come out the same."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from box_source import RECIPE, TINY, Boxes, plan
from safetensors.numpy import load_file

from elastic3d.errors import UserError
from elastic3d.preparation.prepare import prepare
from elastic3d.preparation.shape import RawShape
from elastic3d.preparation.shards import Recipe, drop_outdated, plan_shards, prepare_shard, write_manifest
from elastic3d.preparation.sources import Item


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_bad_shapes_are_listed_and_the_rest_goes_on(tmp_path: Path) -> None:
    shards, source = plan(["b0", "broken", "crash", "b1", "hang", "b2"], tmp_path, size=3)
    seen: list[tuple[str, str]] = []
    prepare(shards, source, RECIPE, workers=2, timeout_s=4, progress=lambda *row: seen.append(row))
    count, failures = write_manifest(tmp_path)
    assert count == 3
    assert failures == {
        "broken": "no such mesh",
        "crash": "the process died with code -9",
        "hang": "took more than 4 s",
    }
    rows = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["b0", "b1", "b2"]
    assert rows[0]["licence"] == "none" and rows[0]["faces"] == 12
    assert {name for name, _ in seen} == {"b0", "broken", "crash", "b1", "hang", "b2"}


def test_held_out_items_keep_their_solid(tmp_path: Path) -> None:
    shards, source = plan(["b0", "b1"], tmp_path)
    prepare(shards, source, RECIPE)
    names = set(load_file(shards[0].path))
    assert "b1/solid_faces" in names and "b0/solid_faces" not in names
    assert {
        "b0/surface",
        "b0/sharp",
        "b0/near",
        "b0/volume",
        "b0/views",
        "b0/view_offsets",
        "b0/cameras",
    } <= names


SCRIPT = """
import sys
from pathlib import Path
from box_source import RECIPE, plan
from elastic3d.preparation.prepare import prepare
if __name__ == "__main__":
    shards, source = plan([f"b{i}" for i in range(6)], Path(sys.argv[1]))
    print("ready", flush=True)
    prepare(shards, source, RECIPE, progress=lambda *row: print(*row, flush=True))
"""


def test_killed_in_the_middle_and_resumed_gives_the_same_files(tmp_path: Path) -> None:
    script = tmp_path / "go.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, str(script), str(tmp_path / "killed")]
    running = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None
    for line in running.stdout:
        if line.startswith("b3"):  # one shard is done, the next one isn't written
            break
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    running.stdout.close()
    assert not (tmp_path / "killed" / "shard-00002.safetensors").exists()
    for name in ("killed", "whole"):
        shards, source = plan([f"b{i}" for i in range(6)], tmp_path / name)
        prepare(shards, source, RECIPE, workers=2)
    whole, resumed = contents(tmp_path / "whole"), contents(tmp_path / "killed")
    assert {name: data for name, data in resumed.items() if not name.startswith(".")} == whole


TERMINATED = """
import sys
from pathlib import Path
import _cli
from box_source import RECIPE, plan
from elastic3d.preparation.options import PrepareConfig
from elastic3d.preparation.prepare import prepare

def main(config):
    shards, source = plan([f"b{i}" for i in range(400)], Path(config.output), size=200)
    assert "torch" not in sys.modules, "it takes seconds to import, in every process"
    print("ready", flush=True)
    prepare(shards, source, RECIPE, workers=2, progress=lambda *row: print(*row, flush=True))

if __name__ == "__main__":
    _cli.run(main, PrepareConfig, "prepare_data")
"""


@pytest.mark.parametrize("how", ["terminated", "group terminated", "killed"])
def test_workers_end_quietly_with_the_command(tmp_path: Path, how: str) -> None:
    script, tests = tmp_path / "go.py", Path(__file__).parents[1]
    script.write_text(TERMINATED)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (tests, tests.parent / "scripts", tests.parent))),
    }
    command = [sys.executable, str(script), f"output={tmp_path / 'out'}"]
    with (tmp_path / "err").open("w") as err:
        running = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=err, text=True, start_new_session=True
        )
        assert running.stdout is not None
        for line in running.stdout:
            if line.startswith("b"):
                break
        if how == "group terminated":
            os.killpg(running.pid, signal.SIGTERM)
        else:
            running.send_signal(signal.SIGTERM if how == "terminated" else signal.SIGKILL)
        running.stdout.read()  # to its end: no worker holds it any longer
        running.wait()
        running.stdout.close()
    assert running.returncode == (-9 if how == "killed" else 143)
    assert (tmp_path / "err").read_text() == ("" if how == "killed" else "terminated\n")
    assert not list((tmp_path / "out").glob("**/*.safetensors"))


def test_nothing_to_do_does_nothing(tmp_path: Path) -> None:
    shards, source = plan(["b0"], tmp_path)
    prepare(shards, source, RECIPE)
    before = shards[0].path.stat().st_mtime_ns
    prepare(shards, source, RECIPE)
    assert shards[0].path.stat().st_mtime_ns == before


def test_another_list_keeps_what_is_prepared(tmp_path: Path) -> None:
    """A longer one, one in another order, another size of shards, fewer shapes."""

    def planned(names: list[str], size: int = 2) -> list[tuple[str, list[str], bool]]:
        shards, source = plan(names, tmp_path, size)
        drop_outdated(source.items(), tmp_path, RECIPE)
        return [(shard.path.stem[-1], [item.id for item in shard.items], shard.done) for shard in shards]

    shards, source = plan(["b1", "b3", "b5"], tmp_path)
    prepare(shards, source, RECIPE)
    kept = [("0", ["b1", "b3"], True), ("1", ["b5"], True)]
    assert planned(["b0", "b1", "b2", "b3", "b4", "b5"]) == [
        *kept,
        ("2", ["b0", "b2"], False),
        ("3", ["b4"], False),
    ]
    assert planned(["b5", "b3", "b1"], size=1) == [("0", ["b3", "b1"], True), ("1", ["b5"], True)]
    assert planned(["b1"]) == [("0", ["b1"], True)]
    assert planned(["b7"]) == [("2", ["b7"], False)]
    shards[0].path.unlink()  # as after a kill: the number is free
    assert planned(["b1", "b3", "b5"]) == [("1", ["b5"], True), ("0", ["b1", "b3"], False)]


def test_a_failed_shape_is_tried_again_if_told_so_or_changed(tmp_path: Path) -> None:
    shards, source = plan(["b0", "broken", "b1"], tmp_path)
    prepare(shards, source, RECIPE)
    items = source.items()
    drop_outdated(items, tmp_path, RECIPE)
    assert [shard.done for shard in shards] == [True, True]
    drop_outdated([items[0], items[2]], tmp_path, RECIPE, retry=True)  # what failed is not wanted any more
    assert [shard.done for shard in shards] == [True, True]
    drop_outdated([replace(item, version="2") for item in items], tmp_path, RECIPE)
    assert [shard.done for shard in shards] == [False, True]
    prepare(shards, source, RECIPE)
    drop_outdated(items, tmp_path, RECIPE, retry=True)
    assert [shard.done for shard in shards] == [False, True]


def test_other_settings_are_refused(tmp_path: Path) -> None:
    shards, source = plan(["b0", "b1"], tmp_path)
    prepare(shards, source, RECIPE)
    with pytest.raises(UserError, match="another seed, expected the same settings"):
        drop_outdated(source.items(), tmp_path, Recipe(TINY, 1, frozenset()))


class Bare(Boxes):
    """On a machine that lacks something; as the reader of meshes tells it."""

    def __init__(self, lacking: Exception) -> None:
        super().__init__(["b0"])
        self.lacking = lacking

    def load(self, item: Item) -> RawShape:
        raise UserError("can't read b0") from self.lacking


@pytest.mark.parametrize(
    ("lacking", "message"),
    [
        (
            ModuleNotFoundError("No module named 'lib'"),
            "b0 can't be prepared here: No module named 'lib'; inst",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; make room"),
    ],
)
def test_what_the_machine_lacks_is_no_failure_of_a_shape(
    tmp_path: Path, lacking: Exception, message: str
) -> None:
    source = Bare(lacking)
    shards = plan_shards(source.items(), tmp_path, 1)
    with pytest.raises(UserError, match=message):
        prepare_shard(shards[0], source, RECIPE, {}, lambda *_: None)
    assert not shards[0].done


class Deadly(Recipe):
    """What is written of it is the last that a worker does: as where memory runs out."""

    def settings(self) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGKILL)
        return {}


def test_a_worker_that_is_killed_while_it_writes_its_shard_is_told(tmp_path: Path) -> None:
    shards, source = plan(["b0"], tmp_path)
    message = "ended with code -9 between shapes.* fewer workers=, a smaller shard_size= or a longer timeout="
    with pytest.raises(UserError, match=message):
        prepare(shards, source, Deadly(RECIPE.shape, RECIPE.seed, RECIPE.held_out))


class Stuck(Boxes):
    def ready(self, item: Item) -> bool:
        return item.id != "b1"


def test_source_that_stops_producing_is_an_error(tmp_path: Path) -> None:
    source = Stuck(["b0", "b1"])
    with pytest.raises(UserError, match="b1 was never made"):
        prepare(plan_shards(source.items(), tmp_path, 2), source, RECIPE)


def test_unwritable_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    shards, source = plan(["b0"], tmp_path / "file" / "sub")
    with pytest.raises(UserError):
        prepare(shards, source, RECIPE)
