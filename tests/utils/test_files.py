"""Ordinary files alone are read, whole files alone are written, and folders are walked as people fill them."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest

from elastic3d.errors import UserError
from elastic3d.utils.files import (
    atomic_path,
    check_file,
    matching_files,
    name_key,
    printable,
    read_text,
    visible_files,
)


def test_what_is_no_ordinary_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").touch()
    (tmp_path / "long").write_text("x" * 9)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path, message in (
        (tmp_path / "pipe", "pipe is a pipe or a device, expected an image"),
        (Path("/dev/zero"), "/dev/zero is a pipe or a device"),
        (tmp_path, "is a folder, expected an image"),
        (tmp_path / "empty", "empty is empty"),
        (tmp_path / "long", "has 9 bytes, expected an image of at most 8"),
        (tmp_path / "gone", "there is no file .*gone"),
        (tmp_path / "loop", "can't read .*loop"),
        (tmp_path / "long" / "x", "can't read .*x"),
        (Path("a\0b"), "can't read"),
        (tmp_path / ("n" * 300), "can't read"),
    ):
        with pytest.raises(UserError, match=message):
            check_file(path, "an image", 8)
    (tmp_path / "long").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="long is broken or no text"):
        read_text(tmp_path / "long")


@pytest.mark.parametrize("name", ["椅" * 82 + ".glb", "a" * 251 + ".glb", "ü" * 125 + ".json"])
def test_names_may_be_as_long_as_the_file_system_takes(tmp_path: Path, name: str) -> None:
    with atomic_path(tmp_path / name) as temporary:
        temporary.write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_name_that_is_no_utf8(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/m\xf6bel.glb"))
    with atomic_path(path) as temporary:
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert printable(path.name) == r"m\xf6bel.glb" and printable("椅 ü") == "椅 ü"


def test_text_of_an_editor_that_marks_the_byte_order(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8-sig")
    assert read_text(tmp_path / "config.json") == "{}"


def test_walking_follows_links_but_not_in_circles_and_skips_hidden_files(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    (inside / "sub" / ".git").mkdir(parents=True)
    outside.mkdir()
    for path in (inside / "b.png", inside / "._b.png", inside / "sub" / "a.png", outside / "c.png"):
        path.touch()
    (inside / "sub" / ".git" / "d.png").touch()
    (inside / "link").symlink_to(outside)
    (inside / "circle").symlink_to(inside)
    (inside / "sub" / "up").symlink_to(tmp_path)
    (inside / "gone").symlink_to(tmp_path / "nowhere")
    names = [path.relative_to(inside).as_posix() for path in visible_files(inside)]
    assert names == ["b.png", "link/c.png", "sub/a.png", "sub/up/out/c.png"]
    assert [path.name for path in visible_files(inside, recursive=False)] == ["b.png"]


def test_files_of_some_kinds_are_found_whatever_the_case_of_their_suffix(tmp_path: Path) -> None:
    for name in ("a.png", "b.JPG", "c.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in visible_files(tmp_path, suffixes=(".png", ".jpg"))] == ["a.png", "b.JPG"]


def test_brackets_of_a_folder_are_no_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "photos [old] *" / "a"
    folder.mkdir(parents=True)
    for name in ("x.png", "y[1].png", ".hidden.png", "z.jpg"):
        (folder / name).touch()
    assert [path.name for path in matching_files(f"{folder}/*.png")] == ["x.png", "y[1].png"]
    assert [path.name for path in matching_files(f"{folder.parent}/**/[xz].*")] == ["x.png", "z.jpg"]
    monkeypatch.chdir(folder)
    assert matching_files("*.jpg") == [Path("z.jpg")]
    assert matching_files("nothing/*.jpg") == []


def test_names_that_some_file_system_takes_for_one() -> None:
    decomposed = unicodedata.normalize("NFD", "Stühle.GLB")
    assert name_key(decomposed) == name_key("stühle.glb") != name_key("stuhle.glb")
