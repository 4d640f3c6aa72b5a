"""What a run may start from."""

from pathlib import Path

import pytest

from elastic3d.errors import UserError
from elastic3d.training.checkpoint import find_start, model_part


def test_the_bundled_model_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = find_start(Path("shape-small"))
    assert model_part(found, "vae") == found / "vae" and model_part(found, "dit") == found / "dit"
    (tmp_path / "shape-small").mkdir()  # one's own folder of that name comes first
    assert find_start(Path("shape-small")) == Path("shape-small")
    with pytest.raises(UserError, match="init_from=nowhere does not exist, expected a checkpoint"):
        find_start(Path("nowhere"))
