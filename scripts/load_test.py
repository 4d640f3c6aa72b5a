"""Measure the server: requests a second alone and together, p95, errors, memory.

    python scripts/load_test.py
    python scripts/load_test.py requests=100 clients=16 quality=default resolution=128 output=load.json

Starts scripts/serve.py on a free port of this machine, and stops it.
"""

from __future__ import annotations

import json
from pathlib import Path

from _cli import run

from elastic3d.serve.load_test import LoadTestConfig, load_test
from elastic3d.utils.files import check_paths, save_json


def main(config: LoadTestConfig) -> int:
    """1 if a request failed."""
    check_paths({"model": Path(config.model) if config.model else None}, {"output": config.output})
    figures = load_test(config, Path(__file__).with_name("serve.py"))
    print(json.dumps(figures, indent=1))
    if config.output is not None:
        save_json(figures, config.output)
    return int(figures["alone"]["errors"] + figures["together"]["errors"] > 0)


if __name__ == "__main__":
    run(main, LoadTestConfig, "load_test")
