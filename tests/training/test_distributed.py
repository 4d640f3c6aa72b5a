"""Processes that share a run wait for each other."""

from pathlib import Path

import pytest

from tests.processes import CONTEXT
from tests.training import worker
from tests.training.test_loop import group_of


@pytest.mark.parametrize("begins", ["first", "accelerator"])
def test_processes_wait_for_as_long_as_the_main_one_may_validate(tmp_path: Path, begins: str) -> None:
    environment = group_of(1) | {"RANK": "0", "LOCAL_RANK": "0", "ACCELERATE_USE_CPU": "true"}
    process = CONTEXT.Process(target=worker.wait_long, args=(begins, environment, tmp_path / "said"))
    process.start()
    process.join(60)
    assert process.exitcode == 0, (tmp_path / "said").read_text()
