"""Many items: the same rows over processes, over Ray, and after an interruption."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import trimesh

from elastic3d.errors import UserError
from elastic3d.evaluation import runner
from elastic3d.evaluation.items import Item, find_items, score_item
from elastic3d.evaluation.options import ProtocolConfig, Runner
from elastic3d.evaluation.runner import item_key, read_journal, score_all
from elastic3d.evaluation.statistics import Row
from tests.processes import CONTEXT

QUICK = ProtocolConfig(points=300, volume_points=300, near_points=50, views=0, surface_health=False)


@pytest.fixture
def items(tmp_path: Path) -> list[Item]:
    for index in range(5):
        for side in ("pred", "gt"):
            (tmp_path / side).mkdir(exist_ok=True)
            mesh = trimesh.creation.icosphere(1, radius=1 + 0.1 * index * (side == "pred"))
            mesh.export(tmp_path / side / f"ball{index}.ply")
    (tmp_path / "pred" / "ball3.ply").unlink()
    return find_items(tmp_path / "pred", tmp_path / "gt")


def without_time(rows: list[Row]) -> list[Row]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def cheap(item: Item, protocol: ProtocolConfig, workers: int) -> Row:
    """A row without work; one item kills its process, as a crash in a native library would."""
    if item.name == "ball2" and item.pred:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"name": item.name, "status": "ok" if item.pred else "failed", "error": None, "chamfer_l1": 1.0}


def test_processes_give_the_same_rows(items: list[Item]) -> None:
    seen: list[Row] = []
    alone = score_all(items, QUICK, workers=1)
    together = score_all(items, QUICK, workers=2, on_row=seen.append)
    assert [row["name"] for row in alone] == [f"ball{i}" for i in range(5)]
    assert [row["status"] for row in alone] == ["ok", "ok", "ok", "failed", "ok"]
    assert without_time(together) == without_time(alone)
    assert len(seen) == 5


def test_ray_gives_the_same_rows(items: list[Item]) -> None:
    pytest.importorskip("ray")
    over_ray = score_all(items, QUICK, Runner.ray, workers=2)
    assert without_time(over_ray) == without_time(score_all(items, QUICK, workers=1))


def test_a_worker_that_dies_costs_one_item(
    items: list[Item], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the pool breaks while a row is written and takes no more. It is tried again on resuming."""
    # several pools, whose processes would each import everything anew
    monkeypatch.setattr(runner, "_pool", lambda workers: ProcessPoolExecutor(workers, mp_context=CONTEXT))
    journal = tmp_path / "rows.jsonl"
    rows = score_all(
        items, QUICK, workers=2, journal=journal, score=cheap, on_row=lambda row: time.sleep(0.5)
    )
    assert [row["status"] for row in rows] == ["ok", "ok", "failed", "failed", "ok"]
    assert "died" in rows[2]["error"]
    assert rows[2]["chamfer_l1"] == 1.0  # the scores of an empty prediction
    assert len(read_journal(journal)) == 4


def test_a_run_that_was_stopped_goes_on(items: list[Item], tmp_path: Path) -> None:
    journal = tmp_path / "rows.jsonl"

    def stop(row: Row) -> None:
        if row["name"] == "ball2":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_all(items, QUICK, workers=1, journal=journal, on_row=stop)
    with journal.open("a") as file:
        file.write('{"key": "half a li')
    assert len(read_journal(journal)) == 3
    scored: list[str] = []

    def count(item: Item, protocol: ProtocolConfig, workers: int) -> Row:
        scored.append(item.name)
        return score_item(item, protocol, workers)

    rows = score_all(items, QUICK, workers=1, journal=journal, score=count)
    assert scored == ["ball3", "ball4"]
    assert without_time(rows) == without_time(score_all(items, QUICK, workers=1))


def test_what_changed_is_scored_again(
    items: list[Item], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal, scored = tmp_path / "rows.jsonl", []

    def count(item: Item, protocol: ProtocolConfig, workers: int) -> Row:
        scored.append(item.name)
        return {"name": item.name, "status": "ok"}

    score_all(items, QUICK, workers=1, journal=journal, score=count)
    trimesh.creation.icosphere(2).export(tmp_path / "pred" / "ball1.ply")
    score_all(items, QUICK, workers=1, journal=journal, score=count)
    assert scored[5:] == ["ball1"]
    score_all(items, ProtocolConfig(points=301), workers=1, journal=journal, score=count)
    assert len(scored) == 11
    monkeypatch.setattr(runner, "__version__", "another")
    score_all(items, ProtocolConfig(points=301), workers=1, journal=journal, score=count)
    assert len(scored) == 16


def test_a_changed_buffer_is_a_changed_mesh(tmp_path: Path) -> None:
    item = Item("ball", (tmp_path / "ball.gltf",), (tmp_path / "ball.gltf",))
    for name, data in trimesh.exchange.gltf.export_gltf(trimesh.Scene(trimesh.creation.icosphere(1))).items():
        (tmp_path / ("ball.gltf" if name == "model.gltf" else name)).write_bytes(data)
    before = item_key(item, QUICK)
    assert item_key(item, QUICK) == before
    buffer = next(tmp_path.glob("*.bin"))
    os.utime(buffer, ns=(0, buffer.stat().st_mtime_ns + 1))
    assert item_key(item, QUICK) != before
    item.pred[0].write_text("broken")
    assert item_key(item, QUICK)


def test_another_programs_journal_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("chapter one\n")
    with pytest.raises(UserError, match=r"rows\.jsonl is no journal"):
        read_journal(tmp_path / "rows.jsonl")
