"""The environment that Infinigen runs in: Python 3.11, Blender's module and old numerical libraries."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from elastic3d.errors import UserError

PYTHON_VERSION = (3, 11)
NO_DEPENDENCIES = ("infinigen==1.15.5", "bpy==4.2.0")
REQUIREMENTS = (
    "numpy==1.26.4",
    "gin_config==0.5.0",
    "imageio==2.31.6",
    "matplotlib==3.11.2",
    "networkx==3.6.1",
    "opencv-python-headless==4.8.1.78",
    "pandas==3.0.6",
    "psutil==7.2.2",
    "scikit-image==0.22.0",
    "scikit-learn==1.9.1",
    "scipy==1.17.1",
    "shapely==2.0.5",
    "tqdm==4.70.1",
    "trimesh==5.2.0",
    "geomdl==5.4.0",
    "rtree==1.4.1",
    "python-fcl==0.7.0.11",
    "coacd==1.0.14",
    "submitit==1.5.4",
    "OpenEXR==3.5.3",
)


def find_environment(folder: Path) -> Path:
    """The Python interpreter of an Infinigen environment in `folder`, which is created there when it is
    missing.

    About 2.2 GB, a few minutes. UserError if no Python 3.11 is found or pip fails.
    """
    python = folder / "bin" / "python"
    if not (folder / ".complete").exists() and not _has_infinigen(python):
        shutil.rmtree(folder, ignore_errors=True)
        _run([_python_311(), "-m", "venv", str(folder)])
        _run([str(python), "-m", "pip", "install", "--no-deps", *NO_DEPENDENCIES])
        _run([str(python), "-m", "pip", "install", *REQUIREMENTS])
        (folder / ".complete").touch()
    return python


def _has_infinigen(python: Path) -> bool:
    code = (
        "import importlib.util as u; raise SystemExit(not (u.find_spec('bpy') and u.find_spec('infinigen')))"
    )
    return python.exists() and subprocess.run([str(python), "-c", code], check=False).returncode == 0


def _python_311() -> str:
    if sys.version_info[:2] == PYTHON_VERSION:
        return sys.executable
    found = shutil.which("python3.11")
    if found is None:
        raise UserError(
            "Infinigen runs on Python 3.11 only and no python3.11 is on the PATH: install it, "
            "or name an existing environment with infinigen_env="
        )
    return found


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise UserError(
            f"setting up Infinigen failed at `{' '.join(command[:6])} ...`: {done.stderr.strip()[-300:]}"
        )
