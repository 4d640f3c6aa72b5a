import pytest
import torch
from torch import nn

from elastic3d.elastic.families import MLPSite
from elastic3d.elastic.width import masked, prefix_mask, sliced

RATIOS = (0.25, 0.5, 0.75, 1.0)
SITE = MLPSite("mlp.0", "mlp.2", 8)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 3))

    def forward(self, x):
        return x + self.mlp(x)


def naive(block: Block, x, units):
    """Zero the hidden units beyond the prefix, one sample after the other."""
    rows = []
    for row, count in zip(x, units, strict=True):
        hidden = nn.functional.gelu(block.mlp[0](row))
        hidden[:, count:] = 0
        rows.append(row + block.mlp[2](hidden))
    return torch.stack(rows)


@torch.no_grad()
def test_masked_and_sliced_are_the_naive_prefix():
    block, x = Block(), torch.randn(4, 5, 3)
    with masked(block, SITE, torch.eye(4), RATIOS):
        out = block(x)
    torch.testing.assert_close(out, naive(block, x, (2, 4, 6, 8)))
    for width, ratio in enumerate(RATIOS):
        with sliced(block, SITE, ratio):
            torch.testing.assert_close(block(x[width : width + 1]), out[width : width + 1])
    torch.testing.assert_close(block(x), naive(block, x, [8] * 4))  # hook and slices are gone


def test_the_mask_passes_gradients_to_every_width_that_holds_a_unit():
    width = torch.eye(4)[[1]].requires_grad_()
    mask = prefix_mask(width, 8, RATIOS)
    assert mask.tolist() == [[1, 1, 1, 1, 0, 0, 0, 0]]
    mask[0, 3].backward()
    assert width.grad.tolist() == [[0, 1, 1, 1]]


def test_slices_own_nothing_and_follow_the_weights():
    block, x = Block(), torch.randn(2, 5, 3)
    own = dict(block.named_parameters())
    with torch.no_grad(), sliced(block, SITE, 0.25):
        assert block.mlp[0].weight.data_ptr() == own["mlp.0.weight"].data_ptr()
        assert block.mlp[0].weight.shape == (2, 3) and block.mlp[2].weight.shape == (3, 2)
    assert all(parameter is own[name] for name, parameter in block.named_parameters())
    with torch.no_grad():
        block.mlp[0].weight.mul_(2)  # an optimizer's step
        expected = naive(block, x, (2, 2))
        with sliced(block, SITE, 0.25):
            torch.testing.assert_close(block(x), expected)
        block.double()
        expected = naive(block, x.double(), (2, 2))
    with sliced(block, SITE, 0.25):
        found = block(x.double())
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert block.mlp[0].weight.grad[:2].any() and not block.mlp[0].weight.grad[2:].any()
    assert block.mlp[0].bias.grad[:2].any() and block.mlp[2].bias.grad.any()


def test_what_can_not_be_sliced_raises():
    block = Block()
    block.mlp[2] = nn.Sequential(block.mlp[2])  # say, an adapter around the layer
    with (
        pytest.raises(ValueError, match="mlp.2 is a Sequential, expected nn.Linear"),
        sliced(block, SITE, 0.5),
    ):
        pass
    hooked = Block()
    hooked.mlp[0].forward = hooked.mlp[0].forward  # say, one that casts the weights
    with (
        pytest.raises(ValueError, match="a hook replaced the forward of Linear"),
        sliced(hooked, SITE, 0.5),
    ):
        pass


@torch.no_grad()
def test_an_error_in_the_block_leaves_it_whole():
    block = Block()
    own = dict(block.named_parameters())
    with pytest.raises(RuntimeError), sliced(block, SITE, 0.5):
        block(torch.randn(1, 5, 4))
    assert all(parameter is own[name] for name, parameter in block.named_parameters())
