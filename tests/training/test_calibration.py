"""Choosing the gates' bias over time, with a real dense model and fresh routers."""

import math

import numpy as np
import pytest
import torch

from elastic3d.elastic.config import ElasticConfig, RouterConfig, Scope
from elastic3d.training import calibration
from elastic3d.training.calibration import CurvesConfig, choose_dampings, choose_gate_bias, relative_error
from elastic3d.training.router import RouterStage
from tests.training.test_elastic import router_config

STEPS = 6


@pytest.fixture
def stage(dense, monkeypatch):
    monkeypatch.setattr(calibration, "_BIAS_BUDGETS", (0.3, 0.9))
    monkeypatch.setattr(calibration, "_DAMPING_BUDGETS", (0.3, 0.9))
    router = RouterConfig(longest=3, scope=Scope.step, widths=1, head_std=0.1)
    routing = {"val_shapes": 1, "val_steps": STEPS}
    return RouterStage(router_config(dense, routing=routing, router=router))


def error_by_hand(stage, true, **curves) -> float:
    """With curves in the routers' configuration: mean logarithm of the error, linear between shares."""
    session = stage.objective.session
    calibration._draw(session, **curves)
    points = []
    for budget in calibration._BIAS_BUDGETS:
        latents, share = stage._generate(ElasticConfig(budget=budget))
        points.append((share.item(), math.log(max(relative_error(latents, true), 1e-12))))
    shares, errors = zip(*sorted(points), strict=True)
    return float(np.interp(calibration._SHARES, shares, errors).mean())


def test_the_curve_with_the_smallest_error_at_equal_cost_is_taken(stage):
    """Against every curve tried by hand: share and error at calibrated budgets, linear between."""
    session, times = stage.objective.session, torch.linspace(0, 1, STEPS + 1)
    torch.nn.init.constant_(session.blocks[0].router.heads.bias[:1], 0.0)  # within reach of every curve
    fresh = session.router_config
    true, _ = stage._generate(ElasticConfig(elastic=False))
    place, found = np.arange(1, STEPS) / (STEPS - 1), {}
    for early in calibration.EARLY:
        for late in calibration.LATE:
            curve = early * np.exp(-place / 0.2) - late * (place > 0.9)
            found[tuple(curve)] = error_by_hand(
                stage, true, times=times[1:-1].tolist(), gate_bias=curve.tolist()
            )
    assert len(set(found.values())) > 1
    session.router_config = fresh
    choose_gate_bias(session, stage._generate, times)
    assert session.router_config.curves.times == times[1:-1].tolist()
    assert found[tuple(session.router_config.curves.gate_bias)] == min(found.values())


def test_dampings_over_time_take_one_value_after_the_other(stage, monkeypatch):
    monkeypatch.setattr(calibration, "DAMPING_TIMES", (0.0, 1.0))
    monkeypatch.setattr(calibration, "DAMPING_STEPS", ((-0.9, 0.3),))
    session = stage.objective.session
    torch.nn.init.constant_(session.blocks[0].router.heads.bias[:1], -1.0)
    true, _ = stage._generate(ElasticConfig(elastic=False))

    def errors(tried):
        return {v: error_by_hand(stage, true, damping_times=[0.0, 1.0], dampings=list(v)) for v in tried}

    first = errors([(1.0, 1.0), (0.1, 1.0), (1.3, 1.0)])
    early = min(first, key=first.get)[0]
    second = errors([(early, 1.0), (early, 0.1), (early, 1.3)])
    assert len({*first.values(), *second.values()}) == 5
    choose_dampings(session, stage._generate)
    assert session.router_config.curves.damping_times == [0.0, 1.0]
    assert tuple(session.router_config.curves.dampings) == min(second, key=second.get)


def test_calibration_starts_from_nothing(stage, monkeypatch):
    monkeypatch.setattr(calibration, "DAMPING_TIMES", (0.0, 0.3, 1.0))
    monkeypatch.setattr(calibration, "DAMPING_STEPS", ((-0.6, 0.3), (0.15,)))
    monkeypatch.setattr(calibration, "POINTS", 6)
    session = stage.objective.session
    stage.calibrate(CurvesConfig())
    first = session.router_config.curves
    assert len(first.times) == STEPS - 1 and len(first.requested_budgets) == 6
    assert len(first.dampings) == len(calibration.DAMPING_TIMES)
    stage.calibrate(CurvesConfig())
    assert session.router_config.curves == first
