"""Folders whose files go on from an earlier call, all made with the same settings."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from elastic3d.errors import UserError
from elastic3d.utils.files import load_json, save_json

SETTINGS_NAME = "settings.json"


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
