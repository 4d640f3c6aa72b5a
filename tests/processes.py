"""Processes of tests: forked from one that has imported what takes seconds, and has run nothing."""

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

from elastic3d.utils.claims import sole_use

CONTEXT = multiprocessing.get_context("forkserver")
# there is one such process, so that the modules of all tests are named here
CONTEXT.set_forkserver_preload(["tests.training.worker", "elastic3d.evaluation.runner"])


def _hold(folder: Path, pipe: Connection) -> None:
    with sole_use(folder):
        pipe.send("here")
        pipe.recv()


@contextmanager
def in_use_elsewhere(folder: Path) -> Iterator[None]:
    """A folder that another process has for itself inside the block."""
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=_hold, args=(folder, theirs))
    process.start()
    try:
        assert ours.poll(60) and ours.recv() == "here"
        yield
    finally:
        ours.send("leave")
        process.join()
