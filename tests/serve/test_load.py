"""The load test of the server, small: every figure is there and nothing fails."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")
from tiny_pipeline import tiny_pipeline  # noqa: E402

from elastic3d.errors import UserError  # noqa: E402
from elastic3d.serve.load_test import LoadTestConfig, _ready, load_test  # noqa: E402

SERVE = Path(__file__).resolve().parents[2] / "scripts/serve.py"

CLOSES = """
import os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(401 if os.environ.get("ELASTIC3D_TOKEN") else 200)
        self.end_headers()
    def do_POST(self):
        self.close_connection = True
port = next(int(text[5:]) for text in sys.argv if text.startswith("port="))
HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def test_requests_without_an_answer_are_errors_and_nobody_needs_a_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ELASTIC3D_TOKEN", "secret")
    (tmp_path / "closes.py").write_text(CLOSES)
    figures = load_test(LoadTestConfig(requests=10, alone=5, clients=2), tmp_path / "closes.py")
    assert (figures["alone"]["errors"], figures["together"]["errors"]) == (5, 10)


SLOW = CLOSES.replace(
    "        self.close_connection = True",
    """        print("asked", file=open(__file__ + ".log", "a"), flush=True)
        __import__("time").sleep(0.1)
        self.send_response(200)
        self.end_headers()""",
)


@pytest.mark.parametrize(
    ("stays", "stop_s"), [("", 60), ("signal.signal(signal.SIGTERM, signal.SIG_IGN)", 0.1)]
)
def test_who_stops_the_test_waits_for_no_further_requests_and_no_server(
    tmp_path: Path, stays: str, stop_s: float
) -> None:
    script, log = tmp_path / "slow.py", tmp_path / "slow.py.log"
    script.write_text(f"import signal\n{stays}\n{SLOW}")
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "  # a job in the background has none
        "from pathlib import Path; from elastic3d.serve import load_test as tested; "
        f"tested.STOP_S = {stop_s}; config = tested.LoadTestConfig(requests=1000, alone=5, clients=2); "
        f"tested.load_test(config, Path({str(script)!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    while not log.is_file() or len(log.read_text().splitlines()) < 12:  # those of the clients together
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=20)  # 100 s of requests are left
    assert told.splitlines()[-1] == "KeyboardInterrupt"


def test_what_the_server_refuses_is_no_figure(tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "tiny")  # without a dial
    config = LoadTestConfig(model=str(tmp_path / "tiny"), requests=10, alone=5, clients=2)
    with pytest.raises(UserError, match="the server refuses such requests: .*quality"):
        load_test(config, SERVE)


def test_a_server_that_ends_at_once_is_said_to_have_ended() -> None:
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    process.wait()
    with pytest.raises(UserError, match="ended with exit code 3 before it answered"):
        _ready(None, process)


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
    # until then oneDNN still caches kernels of batch sizes that are new
    assert figures["memory_mib"][-1] < 1.1 * figures["memory_mib"][4]
