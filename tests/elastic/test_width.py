import pytest
import torch
from torch import nn

from elastic3d.elastic.families import MLPSite
from elastic3d.elastic.width import NarrowBlocks, masked, prefix_mask

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
    with masked(block, (SITE,), torch.eye(4), RATIOS):
        out = block(x)
    torch.testing.assert_close(out, naive(block, x, (2, 4, 6, 8)))
    narrow = NarrowBlocks(block, block.forward, (SITE,), RATIOS)
    for width in range(4):
        torch.testing.assert_close(narrow.at(width)(x[width : width + 1]), out[width : width + 1])
    assert narrow.at(3) == block.forward
    torch.testing.assert_close(block(x), naive(block, x, [8] * 4))  # the hook is gone


def test_the_mask_passes_gradients_to_every_width_that_holds_a_unit():
    width = torch.eye(4)[[1]].requires_grad_()
    mask = prefix_mask(width, 8, RATIOS)
    assert mask.tolist() == [[1, 1, 1, 1, 0, 0, 0, 0]]
    mask[0, 3].backward()
    assert width.grad.tolist() == [[0, 1, 1, 1]]


def test_narrow_copies_own_nothing_and_follow_the_weights():
    block, x = Block(), torch.randn(2, 5, 3)
    narrow = NarrowBlocks(block, block.forward, (SITE,), RATIOS)
    with torch.no_grad():
        first, again = narrow.at(0), narrow.at(0)
    assert first.__self__.mlp[0].weight.data_ptr() == block.mlp[0].weight.data_ptr()
    assert first == again and [n for n, _ in block.named_parameters()][0] == "mlp.0.weight"
    with torch.no_grad():
        block.mlp[0].weight.mul_(2)  # an optimizer's step
        torch.testing.assert_close(narrow.at(0)(x), naive(block, x, (2, 2)))
        block.double()
        torch.testing.assert_close(narrow.at(0)(x.double()), naive(block, x.double(), (2, 2)))
    narrow.at(0)(x.double()).sum().backward()  # with gradients a copy is of one pass alone
    assert block.mlp[0].weight.grad[:2].any() and not block.mlp[0].weight.grad[2:].any()
    assert block.mlp[0].bias.grad[:2].any() and block.mlp[2].bias.grad.any()


def test_what_can_not_be_sliced_raises():
    block = Block()
    block.mlp[2] = nn.Sequential(block.mlp[2])  # say, an adapter around the layer
    with pytest.raises(ValueError, match="mlp.2 is a Sequential, expected nn.Linear"):
        NarrowBlocks(block, block.forward, (SITE,), RATIOS).at(0)
    hooked = Block()
    hooked.mlp.forward = hooked.mlp.forward
    with pytest.raises(ValueError, match="a hook replaced the forward of Sequential"):
        NarrowBlocks(hooked, hooked.forward, (SITE,), RATIOS).at(0)
