"""Before torch is loaded: one thread a process, since the tests run side by side, and no look at a model hub."""

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_finish():
    """Take what the imports and the tests themselves are made of out of each later garbage collection."""
    gc.collect()
    gc.freeze()
