"""Configurations survive a round trip through JSON and refuse what they do not know."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from elastic3d.diffusion.options import PipelineConfig
from elastic3d.elastic.config import BlockCacheConfig, CacheRule, RouterConfig
from elastic3d.errors import UserError
from elastic3d.utils.options import Bounds, Options, check_range, checked, from_dict, option, to_dict

PRETRAINED = Path(__file__).resolve().parents[2] / "data" / "pretrained"


class Kind(Enum):
    small = 1
    large = 2


@dataclass(kw_only=True)
class Inner(Options):
    x: int = 1


@dataclass(kw_only=True)
class Config(Options):
    width: int = 8
    rate: float = 0.5
    kind: Kind = Kind.small
    path: Path = Path("a")
    name: str | None = None
    means: list[float] = field(default_factory=list)
    inner: Inner = field(default_factory=Inner)

    def check(self) -> None:
        check_range("width", self.width, 1, 100)


@dataclass(kw_only=True)
class Needed(Options):
    y: int = option(..., "a number")


@dataclass(kw_only=True)
class Outer(Options):
    inner: Inner = option(..., "what is inside")
    needed: Needed = option(..., "what is needed")


def test_round_trip_through_json() -> None:
    config = Config(
        width=3, rate=2.0, kind=Kind.large, path=Path("b c"), name="x", means=[0.5], inner=Inner(x=7)
    )
    assert from_dict(Config, json.loads(json.dumps(to_dict(config))), "file") == config
    assert from_dict(Config, {}, "file") == Config()
    assert from_dict(Config, {"rate": 2, "name": None}, "file").rate == 2.0


def test_objects_take_what_files_hold() -> None:
    config = Config(kind="large", path="b", rate=2, means=(1, 2))  # type: ignore[arg-type]
    assert config == Config(kind=Kind.large, path=Path("b"), rate=2.0, means=[1.0, 2.0])
    assert type(config.rate) is float and type(config.means[0]) is float
    with pytest.raises(UserError, match="kind is 'huge', expected one of small, large"):
        Config(kind="huge")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"witdh": 3}, r"f.json: unknown field 'witdh' of Config \(did you mean width\?\)"),
        ({"width": "3"}, "f.json: width is '3', expected an integer"),
        ({"width": True}, "f.json: width is True, expected an integer"),
        ({"width": 0}, "f.json: width is 0, expected a value from 1 to 100"),
        ({"kind": "huge"}, "f.json: kind is 'huge', expected one of small, large"),
        ({"means": ["a"]}, "f.json: means is 'a', expected a number"),
        ({"inner": {"y": 1}}, "f.json: unknown field 'inner.y' of Inner"),
    ],
)
def test_wrong_values_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_dict(Config, values, "f.json")


def test_a_required_group_is_asked_for() -> None:
    """Also where all that is inside has a default; of what has none, the first is named."""
    with pytest.raises(UserError, match="f.json: inner is required: what is inside"):
        from_dict(Outer, {"needed": {"y": 1}}, "f.json")
    with pytest.raises(UserError, match="f.json: needed.y is required: a number"):
        from_dict(Outer, {"inner": {}}, "f.json")
    assert from_dict(Outer, {"inner": {}, "needed": {"y": 1}}).inner == Inner()


def test_zero_where_it_switches_something_off() -> None:
    bounds = Bounds(ge=8, le=512, zero=True)
    for value in (0, 8, 512):
        checked("side", value, int, bounds)
    for value in (-1, 4, 513):
        with pytest.raises(UserError, match=f"side is {value}, expected 0 or 8 to 512"):
            checked("side", value, int, bounds)


def test_saved_options_are_read():
    cache = {"rule": "band", "band": 0.2}
    found = from_dict(PipelineConfig, {"elastic": {"budget": 0.5, "cache": cache}}, "pipeline.json")
    assert found.elastic.cache == BlockCacheConfig(rule=CacheRule.band, band=0.2)
    with pytest.raises(UserError, match="rule is 'drift', expected one of off, band, age"):
        from_dict(BlockCacheConfig, {"rule": "drift"}, "pipeline.json")
    for file in sorted(PRETRAINED.glob("*/routers/config.json")):
        values = json.loads(file.read_text())
        values.pop("_class_name")
        assert from_dict(RouterConfig, values, str(file)).longest == 8
