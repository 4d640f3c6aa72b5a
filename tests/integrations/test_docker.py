"""Dockerfile and compose file: what they name exists, and their commands are taken by the scripts."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import yaml
from _cli import parse

from elastic3d.serve.config import ServeConfig

ROOT = Path(__file__).parents[2]


def _accepted(command: list[str]) -> ServeConfig:
    python, script, *options = command
    assert python == "python" and (ROOT / script).is_file()
    return parse(ServeConfig, Path(script).stem, options)


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


def test_compose_serves_both_behind_a_token() -> None:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    assert services.keys() == {"api", "app"}
    for service in services.values():
        assert "?" in service["environment"]["ELASTIC3D_TOKEN"]  # compose refuses to start without one
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    port = _accepted(services["app"]["command"]).port
    assert services["app"]["ports"] == [f"127.0.0.1:{port}:{port}"]
