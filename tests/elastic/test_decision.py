import numpy as np
import pytest
import torch

from elastic3d.elastic.config import RouterCurves
from elastic3d.elastic.router import RouteDecision, interpolated


@pytest.mark.parametrize("count", [1, 2, 5])
def test_values_between_knots_are_those_of_numpy(count):
    rng = np.random.default_rng(count)
    at, values = np.sort(rng.random(count)).tolist(), rng.standard_normal(count).tolist()
    x = torch.rand(50, generator=torch.Generator().manual_seed(0)) * 2 - 0.5
    found = interpolated(x, at, values)
    np.testing.assert_allclose(found, np.interp(x, at, values), atol=1e-5)


def test_gate_bias_is_added_to_the_gate_alone():
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    plain, biased = (RouteDecision.from_logits(logits, 0.5, extra) for extra in (None, torch.full((6,), 2.0)))
    torch.testing.assert_close(biased.keep_prob.logit(), plain.keep_prob.logit() + 2)
    assert torch.equal(biased.width_prob, plain.width_prob)


def test_times_that_do_not_ascend_are_refused():
    with pytest.raises(ValueError, match="ascending"):
        RouterCurves(times=[0.5, 0.4], gate_bias=[0.0, 1.0])
    with pytest.raises(ValueError, match="ascending"):
        RouterCurves(times=[0.5], gate_bias=[])
