"""The load test of the server, small: every figure is there and nothing fails."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")
from tiny_pipeline import tiny_pipeline  # noqa: E402

from elastic3d.serve.load_test import LoadTestConfig, load_test  # noqa: E402

SERVE = Path(__file__).resolve().parents[2] / "scripts/serve.py"


@pytest.mark.slow
def test_many_clients_get_their_meshes_and_memory_stays(tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "tiny")
    config = LoadTestConfig(
        model=str(tmp_path / "tiny"), requests=500, alone=20, steps=1, resolution=16, clients=8
    )
    figures = load_test(config, SERVE)
    print(figures)
    assert figures["alone"]["errors"] == figures["together"]["errors"] == 0
    assert figures["together"]["requests"] == 500 and len(figures["memory_mib"]) == 10
    assert figures["memory_mib"][-1] < 1.1 * figures["memory_mib"][1]
