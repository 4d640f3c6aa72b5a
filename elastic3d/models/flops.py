"""FLOPs of a dense shape DiT: matrix products and attention, two a multiply-add."""

from __future__ import annotations

from elastic3d.config.models import DiTConfig


def dit_blocks_flops(config: DiTConfig, latents: int, condition: int) -> int:
    """FLOPs of all double and single blocks in one forward pass of one sample.

    Embeddings and the final layer are left out: they are always executed, and less than a block's worth.

    Args:
        latents: latent tokens (N).
        condition: condition tokens (M).
    """
    D, hidden, tokens = config.width, int(config.width * config.mlp_ratio), latents + condition
    attention = 4 * tokens**2 * D  # scores, and their product with the values
    linear = 2 * tokens * (4 * D * D + 2 * D * hidden)  # query, key, value, output; the two halves of the MLP
    double = attention + linear + 2 * (2 * D * 6 * D)  # and the modulation of both streams, once a sample
    single = attention + linear + 2 * D * 3 * D
    return config.double_blocks * double + config.single_blocks * single
