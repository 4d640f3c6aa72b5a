"""Setting up the environment for Infinigen."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from elastic3d.errors import UserError
from elastic3d.preparation.infinigen import find_environment


def test_no_python_311(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 12, 0, "final", 0))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"no python3\.11 is on the PATH"):
        find_environment(tmp_path / "env")
