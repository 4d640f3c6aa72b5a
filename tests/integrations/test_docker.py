"""Dockerfile and compose file: what they name exists, and their commands are taken by the scripts."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from _cli import parse

from elastic3d.serve.config import AppConfig, ServeConfig

httpx = pytest.importorskip("httpx")
ROOT = Path(__file__).parents[2]


def _accepted(command: list[str]) -> ServeConfig | AppConfig:
    python, script, *options = command
    assert python == "python" and (ROOT / script).is_file()
    name = Path(script).stem
    return parse(AppConfig if name == "app" else ServeConfig, name, options)


def test_the_dockerfile_copies_what_there_is_and_starts_the_server() -> None:
    text = (ROOT / "Dockerfile").read_text()
    ignored = (ROOT / ".dockerignore").read_text().split()
    for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE):
        *sources, _ = shlex.split(line)
        for source in sources:
            assert (ROOT / source).exists() and source not in ignored, source
    (torch,) = re.findall(r'"(torch==[^"]+)"', text)
    assert torch in (ROOT / "pyproject.toml").read_text()
    (extras,) = re.findall(r"\.\[([a-z,]+)\]", text)
    assert set(extras.split(",")) == {"app", "serve"}
    command = json.loads(re.findall(r"^CMD (\[.+\])$", text, re.MULTILINE)[-1])
    config = _accepted(command)
    assert config.host == "0.0.0.0" and f"EXPOSE {config.port}" in text


def test_the_dockerfile_keeps_the_rules_of_a_linter() -> None:
    """What hadolint would say (its numbers of rules), and one more: nothing runs as root."""
    lines = re.sub(r"\\\n\s*", " ", (ROOT / "Dockerfile").read_text()).splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    known = {"FROM", "ARG", "WORKDIR", "COPY", "RUN", "USER", "EXPOSE", "HEALTHCHECK", "CMD"}
    names = [name for name, _ in steps]
    assert set(names) <= known, "DL3020: COPY, not ADD; DL3002, DL4000"
    of = {name: [rest for first, rest in steps if first == name] for name in known}
    assert re.fullmatch(r"python:3\.\d+-slim", of["FROM"][0]), "DL3006, DL3007: a tag that is no `latest`"
    assert all(path.startswith("/") for path in of["WORKDIR"]), "DL3000"
    for command in of["RUN"]:
        assert "sudo" not in command and "cd " not in command, "DL3004, DL3003"
        for install in re.findall(r"pip install [^&]+", command):
            assert "--no-cache-dir" in install, "DL3042"
            assert "==" in install or '-e ".[' in install, (
                "DL3013: versions are pinned, or those of pyproject.toml"
            )
    assert len(of["CMD"]) == len(of["HEALTHCHECK"]) == 1, "DL4003, DL3012"
    assert json.loads(of["CMD"][0]) and of["HEALTHCHECK"][0].startswith("CMD ["), "DL3025: lists, not shells"
    assert of["USER"] == ["elastic3d"] and names.index("USER") < names.index("CMD")
    assert names.index("COPY") < names.index("RUN")


@pytest.mark.slow
def test_the_copied_files_are_enough_for_the_command(tmp_path: Path) -> None:
    """Its CMD and HEALTHCHECK in a folder with nothing else, the bundled model answering a request."""
    text, ignored = (ROOT / "Dockerfile").read_text(), (ROOT / ".dockerignore").read_text().split()
    for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE):
        *sources, target = shlex.split(line)
        for source in sources:
            if (ROOT / source).is_dir():
                left_out = [Path(name).name for name in ignored if Path(name).parent == Path(source)]
                shutil.copytree(
                    ROOT / source,
                    tmp_path / "app" / target,
                    ignore=shutil.ignore_patterns("__pycache__", *left_out),
                )
            else:
                (tmp_path / "app").mkdir(exist_ok=True)
                shutil.copy(ROOT / source, tmp_path / "app" / target)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = json.loads(re.findall(r"^CMD (\[.+\])$", text, re.MULTILINE)[-1])
    _, check, code = json.loads(re.findall(r"^HEALTHCHECK CMD (\[.+\])$", text, re.MULTILINE)[0])
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "app"), "ELASTIC3D_TOKEN": "secret"}
    command = [
        sys.executable,
        *(f"port={port}" if part.startswith("port=") else part for part in command[1:]),
    ]
    process = subprocess.Popen(command, cwd=tmp_path / "app", env=environment)
    try:
        healthy = [sys.executable, check, code.replace("8000", str(port))]
        deadline = time.monotonic() + 200
        while subprocess.run(healthy, capture_output=True, check=False).returncode:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(1)
        answer = httpx.post(
            f"http://127.0.0.1:{port}/v1/meshes",
            files={"image": (ROOT / "data/samples/chair.png").read_bytes()},
            data={"quality": "fast", "resolution": "32"},
            headers={"Authorization": "Bearer secret"},
            timeout=200,
        )
        assert answer.status_code == 200 and answer.content[:4] == b"glTF"
        process.terminate()
        process.wait(60)
    finally:
        process.kill()


def test_compose_serves_both_behind_a_token() -> None:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    assert services.keys() == {"api", "app"}
    for service in services.values():
        assert "?" in service["environment"]["ELASTIC3D_TOKEN"]  # compose refuses to start without one
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    port = _accepted(services["app"]["command"]).port
    assert services["app"]["ports"] == [f"127.0.0.1:{port}:{port}"]
