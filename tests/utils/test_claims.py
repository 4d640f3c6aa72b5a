from pathlib import Path

import pytest

from elastic3d.errors import UserError
from elastic3d.utils.claims import sole_use


def test_a_folder_that_cannot_be_made_is_told_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="can't write to .*file/folder: Not a directory"),
        sole_use(tmp_path / "file" / "folder"),
    ):
        pass
