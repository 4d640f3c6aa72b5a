"""FLOPs of a dense shape DiT: matrix products and attention, two a multiply-add."""

from __future__ import annotations

from elastic3d.config.models import DiTConfig


def double_block_flops(width: int, hidden: int, latents: int, condition: int) -> tuple[int, int]:
    """FLOPs of one sample in a double block: all but the latents' MLP, and the latents' MLP.

    Args:
        width: channels of a token (D).
        hidden: hidden units of the MLP.
        latents: latent tokens (N).
        condition: condition tokens (M).
    """
    modulation = 2 * (2 * width * 6 * width)  # of both streams, once a sample
    mlp = 4 * width * hidden  # a token
    return modulation + _attention(width, latents + condition) + condition * mlp, latents * mlp


def single_block_flops(width: int, hidden: int, tokens: int) -> tuple[int, int]:
    """FLOPs of one sample in a single block: all but the MLP, and the MLP; `tokens` is N + M."""
    return 2 * width * 3 * width + _attention(width, tokens), tokens * 4 * width * hidden


def _attention(width: int, tokens: int) -> int:
    """Projections to queries, keys, values and output; scores, and their product with the values."""
    return 2 * tokens * 4 * width**2 + 4 * tokens**2 * width


def dit_blocks_flops(config: DiTConfig, latents: int, condition: int) -> int:
    """FLOPs of all double and single blocks in one forward pass of one sample.

    Embeddings and the final layer are left out: they are always executed, and less than a block's worth.

    Args:
        latents: latent tokens (N).
        condition: condition tokens (M).
    """
    D, hidden = config.width, int(config.width * config.mlp_ratio)
    double = sum(double_block_flops(D, hidden, latents, condition))
    return config.double_blocks * double + config.single_blocks * sum(
        single_block_flops(D, hidden, latents + condition)
    )
