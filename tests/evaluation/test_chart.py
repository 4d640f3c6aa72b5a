"""Charts show what they are given."""

from __future__ import annotations

import pytest

from elastic3d.evaluation.frontier import COLOURS, Series, _log_ticks, _ticks, chart


def test_ticks_are_round_and_within_the_range():
    assert _ticks(0.0, 1.0) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert _log_ticks(9, 230) == [10, 20, 50, 100, 200]
    for low, high in ((0.0131, 0.0132), (-3.0, 40.0), (1e5, 3e5)):
        ticks = _ticks(low, high)
        assert 3 <= len(ticks) <= 10 and low <= ticks[0] and ticks[-1] <= high


def test_a_chart_has_every_series_in_its_colour():
    series = [Series("one", [(10, 1.0), (100, 0.5)]), Series("two", [(20, 0.7)]), Series("none")]
    colours = {colour for _, colour in chart(series, "x", "y").getcolors(1 << 20)}
    assert {COLOURS[0], COLOURS[1]} < colours and COLOURS[2] not in colours
    chart([Series("one point", [(10, 1.0)])], "x", "y")
