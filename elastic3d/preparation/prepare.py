"""From a source of meshes to a folder of shards: what `scripts/prepare_data.py` does.

Shards are made in worker processes that may crash, hang or be killed at any point.
"""

from __future__ import annotations

import multiprocessing
import os
import shlex
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tqdm import tqdm

from elastic3d.errors import UserError
from elastic3d.preparation.infinigen import InfinigenSource
from elastic3d.preparation.options import PrepareConfig, SourceName
from elastic3d.preparation.primitives.catalogue import PrimitivesSource
from elastic3d.preparation.shards import (
    Recipe,
    Shard,
    drop_outdated,
    plan_shards,
    prepare_shard,
    write_manifest,
)
from elastic3d.preparation.sources import FolderSource, Source, read_list
from elastic3d.preparation.splits import Split, folder_split, read_splits, write_folder_split
from elastic3d.preparation.sweethome3d import SweetHome3DSource, find_package
from elastic3d.utils.claims import sole_use

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

    Raises:
        UserError: a shard can't be written, its process ended between items, or one was never made.
    """
    pending = deque(shard for shard in shards if not shard.done)
    jobs: list[_Job] = []
    with _one_thread_each(), source.producing() as more_to_come:
        context = _process_context()
        try:
            while pending or jobs:
                while pending and len(jobs) < workers and all(map(source.ready, pending[0].items)):
                    jobs.append(_start(context, pending.popleft(), source, recipe, {}))
                if not jobs:
                    _wait_for(pending[0], source, more_to_come())
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
    context.set_forkserver_preload([__name__])
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
        raise UserError(
            f"the worker for {job.shard.path} ended with code {job.process.exitcode} between shapes, such as for lack"
            " of memory while it wrote them: run this again with fewer workers=, a smaller shard_size= or a longer"
            " timeout="
        )
    died = (
        f"the process died with code {job.process.exitcode}" if closed else f"took more than {timeout_s:g} s"
    )
    return _start(context, job.shard, source, recipe, {**job.failures, job.current: died})


@dataclass(frozen=True)
class Summary:
    """What has become of the shapes that a run was asked for."""

    folder: Path
    prepared: int
    failures: dict[str, str]  # reason by id


def cache_folder(chosen: str) -> Path:
    """Where downloads and raw meshes are kept: `cache_dir=`, or the user's cache folder."""
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "elastic3d"


def open_source(config: PrepareConfig) -> Source:
    """The source that the options name. UserError if it can't be had."""
    cache = cache_folder(config.cache_dir)
    if config.source is SourceName.infinigen:
        environment = Path(config.infinigen_env) if config.infinigen_env else cache / "infinigen-env"
        raw = cache / "raw" / "infinigen"
        return InfinigenSource(raw, environment, config.categories, config.seeds, config.generators)
    if config.source is SourceName.sweethome3d:
        downloads = cache / "sweethome3d"
        return SweetHome3DSource(find_package(downloads, config.path), downloads)
    if config.source is SourceName.primitives:
        return PrimitivesSource(config.categories, config.shapes)
    if not config.path:
        raise UserError("source=folder needs path=, the directory with your meshes")
    return FolderSource(Path(config.path), config.name or "folder")


def prepare_data(config: PrepareConfig) -> Summary:
    """Prepare every shard that is missing and rebuild the manifest; run it again to go on where it was."""
    held_out = {name for name, split in read_splits(Path(config.splits)).items() if split is not Split.train}
    source = open_source(config)
    if config.retry and isinstance(source, InfinigenSource):
        source.forget_failures()
    items = source.items()[: config.limit or None]
    folder = Path(config.output) / (config.name or source.name)
    with sole_use(folder):
        if config.source is SourceName.folder:
            held_out |= _held_out_meshes([f"{item.source}/{item.id}" for item in items], folder, config)
        recipe = Recipe(config.shape, config.seed, frozenset(held_out))
        drop_outdated(items, folder, recipe, config.retry)
        _prepare_with_bar(plan_shards(items, folder, config.shard_size), source, recipe, config)
        _, every_failure = write_manifest(folder)
        failures = {item.id: every_failure[item.id] for item in items if item.id in every_failure}
        prepared = [f"{item.source}/{item.id}" for item in items if item.id not in failures]
        if config.source is SourceName.folder and prepared:
            write_folder_split(folder, prepared, held_out)
    return Summary(folder, len(prepared), failures)


def _held_out_meshes(names: list[str], folder: Path, config: PrepareConfig) -> set[str]:
    """Those of a user's meshes that are for validation; what the lists of the last call say of them stays."""
    paths = [folder / f"{split}.txt" for split in ("train", "val")]
    listed = [set(read_list(path)) if path.is_file() else set[str]() for path in paths]
    fresh, found = (
        set(folder_split(names, config.val_share, config.seed, *lists)[1]) for lists in ([], listed)
    )
    if found != fresh:
        count = len(found) or len(names)
        tqdm.write(
            f"meshes stay in their lists, so {count} of {len(names)} are for validation: delete {paths[0]} and"
            f" {paths[1].name} to draw all anew with val_share={config.val_share:g}",
            file=sys.stderr,
        )
    return found


def next_commands(config: PrepareConfig) -> list[str]:
    """The commands that fine-tune the bundled model on a user's prepared meshes, in their order, for a shell."""
    name, output = config.name or "folder", Path(config.output)
    given = ["init_from=shape-small", f"latents.output={output / f'latents-{name}'}"]
    if config.output != PrepareConfig().output:
        given.append(f"data.prepared={output}")
    given += [f"data.{split}={output / name / f'{split}.txt'}" for split in ("train", "val")]
    stages = [
        ["stage=cache", "latents.mirror=true", "latents.augment=true", *given],
        ["stage=dit", f"name={name}", "steps=2000", "learning_rate=5e-4", *given],
        ["stage=export", f"name={name}"],
    ]
    return [shlex.join(["python", "scripts/train.py", *options]) for options in stages]


def _prepare_with_bar(shards: list[Shard], source: Source, recipe: Recipe, config: PrepareConfig) -> None:
    seen = {item.id for shard in shards if shard.done for item in shard.items}
    with tqdm(total=sum(len(shard.items) for shard in shards), initial=len(seen), unit="shape") as bar:

        def progress(name: str, reason: str) -> None:
            if reason:
                bar.write(f"skipped {name}: {reason}", file=sys.stderr)
            if name not in seen:  # a shard that is begun again reports its first shapes twice
                seen.add(name)
                bar.update()

        workers = config.workers or os.cpu_count() or 1
        prepare(shards, source, recipe, workers, config.timeout, progress)
