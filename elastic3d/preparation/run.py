"""Prepares the shards of a source in worker processes that may crash, hang or be killed at any point."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from elastic3d.errors import UserError
from elastic3d.preparation.shards import Recipe, Shard, prepare_shard
from elastic3d.preparation.sources import Source

Progress = Callable[[str, str], None]
"""Called with an item's id and the reason of its failure, or an empty one."""

POLL_S = 0.5
THREAD_LIMITS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "IGL_NUM_THREADS")


@dataclass
class _Job:
    """A worker process on one shard, and what it last said."""

    shard: Shard
    process: BaseProcess
    messages: Connection
    failures: dict[str, str]
    current: str = ""
    heard: float = field(default_factory=time.monotonic)


def prepare(
    shards: list[Shard],
    source: Source,
    recipe: Recipe,
    workers: int = 1,
    timeout_s: float = 300.0,
    progress: Progress = lambda name, reason: None,
) -> None:
    """Make every shard that is not on disk yet; each in a process of its own, `workers` at a time.

    An item on which its process dies, or which takes longer than `timeout_s`, is listed as a failure and
    the shard is begun again without it.
    """
    pending = deque(shard for shard in shards if not shard.done)
    jobs: list[_Job] = []
    with _one_thread_each(), source.producing() as producer:
        context = _process_context()
        try:
            while pending or jobs:
                while pending and len(jobs) < workers and all(map(source.ready, pending[0].items)):
                    jobs.append(_start(context, pending.popleft(), source, recipe, {}))
                if not jobs:
                    _wait_for(pending[0], source, producer.check())
                    continue
                wait([job.messages for job in jobs], timeout=POLL_S)
                jobs = [
                    kept
                    for job in jobs
                    if (kept := _attend(job, context, source, recipe, timeout_s, progress))
                ]
        finally:
            for job in jobs:
                job.process.kill()
                job.process.join()


def _wait_for(shard: Shard, source: Source, producing: bool) -> None:
    missing = [item.id for item in shard.items if not source.ready(item)]
    if missing and not producing:
        raise UserError(f"{missing[0]} was never made, expected its source to make it or to say why not")
    time.sleep(POLL_S)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Worker processes started within use one thread each: there are as many of them as cores."""
    before = {name: os.environ.get(name) for name in THREAD_LIMITS}
    os.environ.update(dict.fromkeys(THREAD_LIMITS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def _process_context() -> Any:
    """Fresh processes that have imported everything already, where the system can do that."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["elastic3d.preparation.shards"])
    return context


def _start(context: Any, shard: Shard, source: Source, recipe: Recipe, failures: dict[str, str]) -> _Job:
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(shard, source, recipe, failures, sender), daemon=True)
    process.start()
    sender.close()
    return _Job(shard, process, receiver, failures)


def _work(shard: Shard, source: Source, recipe: Recipe, failures: dict[str, str], sender: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        prepare_shard(shard, source, recipe, failures, lambda *message: sender.send(message))
    except UserError as error:  # nothing to do with one shape: the shard can't be written
        with suppress(BrokenPipeError):
            sender.send(("error", "", str(error)))
    except BrokenPipeError:  # the parent was killed: there is nobody to work for
        pass


def _attend(
    job: _Job, context: Any, source: Source, recipe: Recipe, timeout_s: float, progress: Progress
) -> _Job | None:
    """Read what a worker said; the job that goes on (this or its replacement), or None if it is done."""
    closed = False
    try:
        while job.messages.poll():
            event, name, reason = job.messages.recv()
            if event == "error":
                raise UserError(reason)
            job.current, job.heard = (name if event == "start" else ""), time.monotonic()
            if event != "start":
                progress(name, reason)
    except EOFError:
        closed = True
    if not closed and time.monotonic() - job.heard <= timeout_s:
        return job
    if not closed:
        job.process.kill()
    job.process.join()
    job.messages.close()
    if job.shard.done:
        return None
    if not job.current:
        raise RuntimeError(
            f"the worker for {job.shard.path} ended with code {job.process.exitcode} between shapes"
        )
    died = (
        f"the process died with code {job.process.exitcode}" if closed else f"took more than {timeout_s:g} s"
    )
    return _start(context, job.shard, source, recipe, {**job.failures, job.current: died})
