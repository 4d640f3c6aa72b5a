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


def test_a_folder_of_something_else_stays(tmp_path: Path) -> None:
    """`infinigen_env=` may name the wrong folder."""
    photo = tmp_path / "photo.jpg"
    photo.write_text("dear")
    with pytest.raises(UserError, match="has no Infinigen, expected an environment that has it"):
        find_environment(tmp_path)
    assert photo.exists()
