"""Folders whose files go on from an earlier call, all made with the same settings."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from elastic3d.errors import UserError
from elastic3d.utils.files import load_json, save_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SETTINGS_NAME, LOCK_NAME = "settings.json", ".lock"


@contextmanager
def sole_use(folder: Path) -> Iterator[None]:
    """Make a folder, and let no other process in here with it inside the block; UserError if one is, or if the folder
    can't be written.

    A lock by `lockf` ends with the process, whatever ended it: processes that it forked have no part in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK_NAME).open("a")
    except OSError as error:
        raise UserError(f"can't write to {folder}: {error.strerror}, choose another folder") from error
    with file:
        try:
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise UserError(
                f"{folder} is in use by another process: wait until that has ended, or stop it"
            ) from error
        except OSError:  # a file system without locks
            pass
        yield


def claim_folder(folder: Path, settings: Mapping[str, Any], begun: bool, later: Collection[str] = ()) -> None:
    """Note in `settings.json` what the files of a folder are made with, before any is there.

    Args:
        settings: plain values by the names of their options.
        begun: whether the folder has files already, which would stay.
        later: those of the settings that the folder need not have noted; noted ones that are not asked for stay.

    Raises:
        UserError: it was begun with other settings, or with unknown ones.
    """
    path = folder / SETTINGS_NAME
    found = load_json(path) if begun and path.is_file() else {}
    if begun:
        known = [name for name in settings if name in found or name not in later]
        if differing := [name for name in known if found.get(name) != settings[name]]:
            raise UserError(
                f"{folder} was made with another {differing[0]}: delete it first, or give another output="
            )
    save_json({**found, **settings}, path)
