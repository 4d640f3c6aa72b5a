import torch

from elastic3d.elastic.block import gated
from elastic3d.elastic.families import BlockFlops
from elastic3d.elastic.router import RouteDecision, straight_through
from elastic3d.training.block_router import budget_loss
from elastic3d.training.routes import decision_flops

RATIOS = (0.25, 0.5, 0.75, 1.0)


def decision(logits: list[list[float]]) -> RouteDecision:
    return RouteDecision.from_logits(torch.tensor(logits), 0.5)


def test_straight_through_is_hard_forward_and_soft_backward():
    p = torch.tensor([0.2, 0.7], requires_grad=True)
    hard = straight_through(p > 0.5, p)
    assert hard.tolist() == [0, 1]
    (hard * torch.tensor([3.0, 5.0])).sum().backward()
    assert p.grad.tolist() == [3, 5]


def test_gated_is_the_paper_formula_and_exact():
    """g y + (1 - g) x, g straight-through: the gate's gradient is <dL, y - x>, whether executed or skipped."""
    x, y = torch.randn(2, 3, 4), torch.randn(2, 3, 4, requires_grad=True)
    p = torch.tensor([0.4, 0.6], requires_grad=True)
    out = gated(x, y, straight_through(p > 0.5, p))
    assert torch.equal(out[0], x[0]) and torch.equal(out[1], y[1])
    weight = torch.randn(2, 3, 4)
    (out * weight).sum().backward()
    torch.testing.assert_close(p.grad, (weight * (y - x)).sum((1, 2)).detach())
    assert y.grad[0].abs().max() == 0 and torch.equal(y.grad[1], weight[1])


def test_the_gradient_of_a_gate_survives_bf16_where_a_block_changes_little():
    torch.manual_seed(0)
    x = (3 + torch.randn(4, 256, 64)).bfloat16()
    y = x + 0.1 * torch.randn(4, 256, 64).bfloat16()
    weight = (0.06 + torch.randn(4, 256, 64)).bfloat16()
    p = torch.tensor([0.4, 0.6, 0.6, 0.4], requires_grad=True)
    out = gated(x, y, straight_through(p > 0.5, p))
    assert torch.equal(out[3], x[3]) and torch.equal(out[1:3], y[1:3])
    out.backward(weight)
    exact = (weight.double() * (y.double() - x.double())).sum((1, 2))
    torch.testing.assert_close(p.grad.double(), exact, rtol=0.01, atol=0.02)  # as two products: 0 for -2.25


def test_a_decision_takes_threshold_and_argmax():
    d = decision([[-0.1, 0, 3, 0, 0], [0.1, 0, 0, 0, 2]])
    assert d.keep.tolist() == [False, True] and d.width.tolist() == [1, 3]
    assert d.hard_keep().tolist() == [0, 1] and d.hard_width().argmax(-1).tolist() == [1, 3]


def test_executed_flops_are_those_of_the_width_or_none():
    block = BlockFlops(10, 30)
    half_width, skipped = [5.0, 0, 9, 0, 0], [-5.0, 0, 0, 0, 9]
    assert decision_flops(decision([half_width, skipped]), block, RATIOS).tolist() == [25, 0]
    with torch.autocast("cpu", torch.bfloat16):
        assert decision_flops(decision([half_width]), BlockFlops(1000, 2), RATIOS).tolist() == [1001]
        third = decision_flops(decision([half_width]), block, (0.25, 1 / 3, 0.75, 1.0))
    torch.testing.assert_close(third, torch.tensor([20.0]))


def test_budget_loss_is_zero_on_budget_and_pushes_towards_it():
    budget = torch.tensor([0.3, 0.5, 0.9])
    assert budget_loss(budget, budget) == 0
    share = (budget + 0.1).requires_grad_()
    budget_loss(share, budget).backward()
    assert (share.grad > 0).all()
    swapped = torch.tensor([0.45, 0.55])  # within the slack samples of one band may trade
    assert budget_loss(swapped, torch.tensor([0.5, 0.5]), slack=0.1) < 1e-12
