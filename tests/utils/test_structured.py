"""JSON and YAML: what they have to look like is checked, and nothing in them can run away."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from elastic3d.errors import UserError
from elastic3d.utils.files import (
    Maybe,
    Number,
    check_shape,
    load_json,
    load_json_lines,
    load_yaml,
    parse_yaml,
    save_json,
)

BROKEN_JSON = {
    "": "is empty, expected a JSON file",
    "{": "is broken",
    "[" * 100_000: "is broken: it is nested too deeply",
    '{"a": ' * 50_000 + "1" + "}" * 50_000: "is broken: it is nested too deeply",
    '{"a": NaN}': "holds NaN, expected finite numbers",
    '{"a": -Infinity}': "holds -Infinity",
    '{"a": 1e999}': "holds 1e999",
    "[1]": "is a list, expected a JSON object",
    "null": "is null, expected a JSON object",
    "1" * 5000: "is broken",
}


@pytest.mark.parametrize("text", BROKEN_JSON, ids=lambda text: text[:8])
def test_broken_json_is_told_with_the_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=BROKEN_JSON[text]) as caught:
        load_json(tmp_path / "x.json")
    assert "x.json" in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


SHAPES: list[tuple[Any, Any, str]] = [
    ({"a": 1}, {"a": str}, "x: a is 1, expected text"),
    ({"a": True}, {"a": int}, "x: a is true, expected an integer"),
    ({}, {"a": int, "b": int}, "x has no 'a', expected a, b"),
    ({"a": [1, "2"]}, {"a": [int]}, r'x: a\[1\] is "2", expected an integer'),
    ({"a": {"b": -1}}, {"a": {str: Number(0, 3)}}, "x: a: b is -1, expected a number from 0 to 3"),
    ({"a": 1.5}, {"a": Number(0, whole=True)}, "a is 1.5, expected an integer of at least 0"),
    ({"a": True}, {"a": Number()}, "a is true, expected a number"),
    ({"a": {}}, {"a": Maybe(str)}, "a is a JSON object, expected text"),
    ("q" * 999, {"a": int}, r"x is \"q+\.\.\., expected a JSON object"),
]


@pytest.mark.parametrize(("value", "shape", "message"), SHAPES)
def test_shapes(value: Any, shape: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_shape(value, shape, "x")


def test_what_fits_is_taken(tmp_path: Path) -> None:
    value = {"a": [1, 2.5], "b": None, "c": {"d": "e"}, "f": True, "more": 1}
    save_json(value, tmp_path / "x.json")
    shape = {"a": [float], "b": Maybe(int), "c": {str: str}, "f": bool}
    assert load_json(tmp_path / "x.json", shape) == value
    with pytest.raises(ValueError):
        save_json({"a": float("nan")}, tmp_path / "x.json")
    assert load_json(tmp_path / "x.json") == value, "a failed write leaves the old file"


def test_lines_name_themselves_and_a_torn_one_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n{"a": ')
    assert list(load_json_lines(path, {"a": int}, torn=True)) == [{"a": 1}, {"a": 2}]
    with pytest.raises(UserError, match="x.jsonl, line 4, is broken"):
        list(load_json_lines(path))
    path.write_text('{"a": NaN}\n')
    assert len(list(load_json_lines(path, finite=False))) == 1


def test_a_yaml_bomb_is_refused_and_an_alias_of_a_number_is_not(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    with pytest.raises(
        UserError, match="bomb.yaml is broken: an alias of a list or mapping is not supported"
    ):
        load_yaml(tmp_path / "bomb.yaml")
    (tmp_path / "fine.yaml").write_text("width: &w 64\nheads: *w\n")
    assert load_yaml(tmp_path / "fine.yaml") == {"width": 64, "heads": 64}
    for text in ("[" * 20_000, "{a: [", "a: *b", "!!python/object:os.system x", "2020-99-99", "{[1]: 2}"):
        with pytest.raises(UserError, match="the value is broken") as caught:
            parse_yaml(text)
        assert "\n" not in str(caught.value)
    (tmp_path / "long.yaml").write_text("a: " + "x" * (1 << 20))
    with pytest.raises(UserError, match="long.yaml has 1,048,579 bytes, expected a YAML file of at most"):
        load_yaml(tmp_path / "long.yaml")
    (tmp_path / "list.yaml").write_text("[1]")
    with pytest.raises(UserError, match="list.yaml holds a list, expected a mapping"):
        load_yaml(tmp_path / "list.yaml")
    assert json.loads(json.dumps(parse_yaml("{a: [1, b]}"))) == {"a": [1, "b"]}
