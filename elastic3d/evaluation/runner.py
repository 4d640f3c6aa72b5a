"""Score many items: over the cores of this machine or over a Ray cluster, resumable, with bounded memory.

The numbers do not depend on the runner, the number of workers, or what was resumed. Only a few items a worker
are in flight at a time, whatever their number. A worker that dies (killed, crashed in a native library) costs
the item that killed it, as a failed row, and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from elastic3d import __version__
from elastic3d.errors import UserError
from elastic3d.evaluation.items import Item, score_item
from elastic3d.evaluation.options import ProtocolConfig, Runner
from elastic3d.evaluation.statistics import Row
from elastic3d.geometry.gltf_data import with_buffers
from elastic3d.utils.clusters import join_cluster, work_in
from elastic3d.utils.files import atomic_path, load_json_lines, printable
from elastic3d.utils.options import to_dict

Score = Callable[[Item, ProtocolConfig, int], Row]  # item, protocol, threads; must be a module's function

_AHEAD = 2  # items in flight a worker
_DIED = "the process that scored it died (out of memory, or a crash in a native library)"


def score_all(
    items: Sequence[Item],
    protocol: ProtocolConfig,
    runner: Runner = Runner.local,
    workers: int = 0,
    journal: Path | None = None,
    on_row: Callable[[Row], None] = lambda row: None,
    score: Score = score_item,
) -> list[Row]:
    """The rows of `items`, in their order.

    Args:
        workers: processes; 0 takes one a core. With one, everything runs in this process.
        journal: rows are appended to this file as they come, and those found there are not scored again, unless
            their files, the protocol or the version of elastic3d have changed.
        on_row: called once for every row, resumed ones included, for a progress bar.
        score: what makes the row of an item.
    """
    done = read_journal(journal) if journal else {}
    keys = {item: item_key(item, protocol) for item in items} if journal else {}
    rows: dict[str, Row] = {item.name: done[keys[item]] for item in items if keys.get(item) in done}
    for row in rows.values():
        on_row(row)
    todo = [item for item in items if item.name not in rows]
    with journal.open("a") if journal else nullcontext() as file:
        for item, row in _stream(todo, protocol, runner, workers or usable_cores(), score):
            rows[item.name] = row
            if file:
                file.write(json.dumps({"key": keys[item], "row": row}, allow_nan=False) + "\n")
                file.flush()
            on_row(row)
    return [rows[item.name] for item in items]


def usable_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def item_key(item: Item, protocol: ProtocolConfig) -> str:
    """Changes when the version of elastic3d or the protocol does, or a file's name, size or time of change, or those
    of a glTF's buffers."""
    paths = [path for mesh in (*item.pred, *item.gt) for path in with_buffers(mesh)]
    files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    text = json.dumps([__version__, to_dict(protocol), item.name, len(item.pred), files])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def read_journal(path: Path) -> dict[str, Row]:
    """Rows by key, without those of processes that died, as of memory that others took.

    A last line cut short by a kill is dropped from the file. UserError for anything else broken.
    """
    if not path.exists() or not path.stat().st_size:
        return {}
    shape = {"key": str, "row": {"name": str, "status": str}}
    try:
        entries = list(load_json_lines(path, shape, torn=True))
    except UserError as error:
        raise UserError(
            f"{printable(path)} is no journal of rows ({error}): remove it or choose another output"
        ) from error
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return {entry["key"]: entry["row"] for entry in entries if entry["row"].get("error") != _DIED}


def _stream(
    items: Sequence[Item], protocol: ProtocolConfig, runner: Runner, workers: int, score: Score
) -> Iterator[tuple[Item, Row]]:
    if runner is Runner.ray:
        return _over_ray(items, protocol, workers, score)
    if workers == 1 or len(items) < 2:
        return ((item, score(item, protocol, -1)) for item in items)
    return _over_processes(items, protocol, workers, score)


def _over_processes(
    items: Sequence[Item], protocol: ProtocolConfig, workers: int, score: Score
) -> Iterator[tuple[Item, Row]]:
    """Rows as they are ready. When a worker dies, what was in flight runs again, each item in a process of its own."""
    waiting = deque(items)
    suspects: list[Item] = []
    while True:
        running: dict[Future[Row], Item] = {}
        with _pool(workers) as pool:
            try:
                while waiting:
                    future = pool.submit(score, waiting[0], protocol, 1)  # a broken pool takes none
                    running[future] = waiting.popleft()
                    if len(running) >= _AHEAD * workers:
                        yield from _collect(running)
                while running:
                    yield from _collect(running)
                return
            except BrokenProcessPool:
                suspects = list(running.values())
        for item in suspects:
            yield item, _alone(item, protocol, score)


def _collect(running: dict[Future[Row], Item]) -> Iterator[tuple[Item, Row]]:
    """Wait for at least one result. An item leaves `running` only once it has its row."""
    finished, _ = wait(running, return_when=FIRST_COMPLETED)
    for future in finished:
        row = future.result()
        yield running.pop(future), row


def _alone(item: Item, protocol: ProtocolConfig, score: Score) -> Row:
    try:
        with _pool(1) as pool:
            return pool.submit(score, item, protocol, 1).result()
    except BrokenProcessPool:
        return _died(item, lambda rest: _alone(rest, protocol, score))


def _died(item: Item, score: Callable[[Item], Row]) -> Row:
    """The row of an item that killed its process: the scores of an empty prediction, if the rest can be scored."""
    row = score(replace(item, pred=())) if item.pred else {"name": item.name, "status": "failed"}
    return row | {"error": _DIED}


def _pool(workers: int) -> ProcessPoolExecutor:
    # spawn: a forked child would share the locks of this process' threads
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))


def _over_ray(
    items: Sequence[Item], protocol: ProtocolConfig, workers: int, score: Score
) -> Iterator[tuple[Item, Row]]:
    """The same over a Ray cluster: the one `ray.init` finds (RAY_ADDRESS), or a local one of `workers` workers."""
    ray, started = join_cluster(workers)
    folder = Path.cwd()

    def scored(*given: Any) -> Row:
        work_in(folder)
        return score(*given)

    task = ray.remote(num_cpus=1, max_retries=1)(scored)

    def alone(item: Item) -> Row:
        try:
            return ray.get(task.remote(item, protocol, 1))
        except ray.exceptions.RayError:
            return _died(item, alone)

    waiting = iter(items)
    running: dict[Any, Item] = {}
    try:
        while True:
            for item in islice(waiting, _AHEAD * workers - len(running)):
                running[task.remote(item, protocol, 1)] = item
            if not running:
                return
            finished, _ = ray.wait(list(running), num_returns=1)
            item = running.pop(finished[0])
            try:
                row = ray.get(finished[0])
            except ray.exceptions.RayError:
                row = _died(item, alone)
            yield item, row
    finally:
        if started:
            ray.shutdown()
