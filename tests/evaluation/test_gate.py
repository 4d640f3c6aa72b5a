"""The regression gate."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic3d.errors import UserError
from elastic3d.evaluation.report import load_gate, violations

MEANS = {"f_score@0.02": 0.9, "chamfer_l1": 0.03}


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_bounds_hold_or_are_named(tmp_path: Path) -> None:
    gate = load_gate(
        write(tmp_path / "gate.yaml", "f_score@0.02: {min: 0.9, max: 1}\nchamfer_l1: {max: 0.03}\n")
    )
    assert violations(gate, MEANS) == []
    assert violations(gate, {"f_score@0.02": 0.8, "chamfer_l1": 0.04}) == [
        "f_score@0.02: 0.8 is below min 0.9",
        "chamfer_l1: 0.04 is above max 0.03",
    ]


def test_a_metric_that_was_not_measured_breaks_its_bound() -> None:
    assert violations({"f_score@0.20": {"min": 0.5}}, MEANS) == [
        "f_score@0.20: not measured (did you mean f_score@0.02?)"
    ]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "- 3",
        "f: 3",
        "f: {}",
        "f: {low: 3}",
        "f: {min: high}",
        "f: {min: .nan}",
        "f: {min: [",
        "f: {max: true}",
    ],
)
def test_broken_gates_raise(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"gate\.yaml"):
        load_gate(write(tmp_path / "gate.yaml", text))


def test_a_missing_gate_raises(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml"):
        load_gate(tmp_path / "none.yaml")
