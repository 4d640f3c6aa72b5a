"""No output of a command is one of its inputs or another output, whatever the two are called; each can be written."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest

from elastic3d.errors import UserError
from elastic3d.utils.files import check_paths

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def test_inputs_and_outputs_of_their_own_are_fine(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    check_paths(
        {"image": [tmp_path / "a.png", tmp_path / "a.png"], "folder": tmp_path, "none": None, "empty": ""},
        {
            "output": [tmp_path / "a.glb", tmp_path / "b.glb"],
            "trace": "",
            "preview": tmp_path / "new" / "a.png",
        },
    )


def _same(tmp_path: Path, name: str) -> Path:
    """Another name of `tmp_path`/a.png."""
    image = tmp_path / "a.png"
    image.touch()
    (tmp_path / "folder").mkdir()
    other = tmp_path / {"case": "A.PNG", "plain": "a.png", "around": "folder/../a.png"}.get(
        name, f"{name}.png"
    )
    if name == "link":
        other.symlink_to(image)
    elif name == "hard":
        os.link(image, other)
    elif name == "through":
        (tmp_path / "way").symlink_to(tmp_path)
        other = tmp_path / "way" / "a.png"
    return other


@pytest.mark.parametrize("name", ["plain", "case", "around", "link", "hard", "through"])
def test_an_output_over_an_input_is_refused(tmp_path: Path, name: str) -> None:
    other = _same(tmp_path, name)
    with pytest.raises(UserError, match=r"preview would be written to .*a.png \(image, which is read\)"):
        check_paths({"image": [tmp_path / "a.png"]}, {"preview": [tmp_path / "b.png", other]})


def test_two_outputs_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "new.png")  # to a file that is not there yet
    for one, two in (("new.png", "NEW.png"), ("ü.png", "u\u0308.png"), ("new.png", "link"), ("x", "./x")):
        with pytest.raises(UserError, match="trace would be written to"):
            check_paths({}, {"output": tmp_path / one, "trace": os.path.join(tmp_path, two)})  # noqa: PTH118


@pytest.mark.parametrize("name", ["trace.png", "deep/er/trace.png"])
def test_an_output_below_a_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.txt").touch()
    with pytest.raises(UserError, match=r"can't write .*trace.png: .*a.txt is no folder"):
        check_paths({}, {"output": tmp_path / "a.glb", "trace": tmp_path / "a.txt" / name})
    assert not (tmp_path / "a.glb").exists()


def test_a_file_in_the_place_of_a_folder_is_refused_and_the_other_way_round(tmp_path: Path) -> None:
    (tmp_path / "a.json").touch()
    with pytest.raises(UserError, match=r"can't write .*a.json: .*a.json is no folder to write to"):
        check_paths({}, {}, {"output": tmp_path / "a.json"})
    with pytest.raises(UserError, match=r"can't write .*: it is a folder, expected a file"):
        check_paths({}, {"output": tmp_path})
    check_paths(
        {"data": tmp_path / "a.json"}, {"trace": tmp_path / "t.png"}, {"output": [tmp_path, tmp_path / "new"]}
    )
    with pytest.raises(UserError, match="output would be written to"):
        check_paths({"weights": tmp_path}, {}, {"output": tmp_path / "."})


def test_every_script_that_writes_asks() -> None:
    silent = []
    for script in sorted(SCRIPTS.glob("[a-z]*.py")):
        calls = {node.func for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.Call)}
        names = {getattr(call, "id", getattr(call, "attr", "")) for call in calls}
        if not names & {"check_paths", "plan"}:  # `generation.plan` asks for gen_mesh
            silent.append(script.stem)
    assert silent == ["app", "describe_data", "serve"], "they answer, or call one that asks"
