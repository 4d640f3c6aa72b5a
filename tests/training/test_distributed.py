"""Processes that share a run wait for each other."""

import os
import socket
import subprocess
import sys

import pytest

WAITS = """
import sys
import torch
from elastic3d.training.distributed import PROCESS_TIMEOUT, first_process_first, make_accelerator
from elastic3d.training.options import LoopConfig
from elastic3d.utils.devices import DeviceChoice

config = LoopConfig(device=DeviceChoice.cpu)
if "first" in sys.argv:
    with first_process_first(config):
        pass
make_accelerator(config)
group = torch.distributed.distributed_c10d._get_default_group()
assert group._get_backend(torch.device("cpu")).options._timeout == PROCESS_TIMEOUT
"""


@pytest.mark.parametrize("begins", ["first", "accelerator"])
def test_processes_wait_for_as_long_as_the_main_one_may_validate(begins: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    group = dict(WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", RANK="0", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
    environment = {**os.environ, **group, "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, "-c", WAITS, begins], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
