"""FLOPs of a dense shape DiT: matrix products and attention, two a multiply-add."""

from __future__ import annotations

from elastic3d.models.options import DiTConfig, SkipDiTConfig


def double_block_flops(width: int, hidden: int, latents: int, condition: int) -> tuple[int, int]:
    """FLOPs of one sample in a double block: all but the latents' MLP, and the latents' MLP.

    Of width D, hidden units of the MLPs, latent tokens (N) and condition tokens (M).
    """
    modulation = 2 * (2 * width * 6 * width)  # of both streams, once a sample
    mlp = 4 * width * hidden  # a token
    return modulation + _attention(width, latents + condition) + condition * mlp, latents * mlp


def single_block_flops(width: int, hidden: int, tokens: int) -> tuple[int, int]:
    """FLOPs of one sample in a single block: all but the MLP, and the MLP; `tokens` is N + M."""
    return 2 * width * 3 * width + _attention(width, tokens), tokens * 4 * width * hidden


def skip_block_flops(
    width: int, read: int, tokens: int, condition: int, chosen: int, experts: int
) -> tuple[int, int]:
    """FLOPs of one sample in a block of `SkipDiT`, without its long skip: all but the MLP, and the MLP.

    Args:
        width: channels of a token (D).
        read: channels of a condition token.
        tokens: latents and the time token (1 + N).
        condition: condition tokens (M).
        chosen: experts that a token passes besides the shared one; 0 for an MLP. Experts count as fixed.
        experts: experts to choose from.
    """
    cross = 2 * tokens * 2 * width**2 + 2 * condition * 2 * read * width + 4 * tokens * condition * width
    attention = _attention(width, tokens) + cross
    mlp = tokens * 4 * width * 4 * width
    if not experts:
        return attention, mlp
    return attention + 2 * tokens * width * experts + (1 + chosen) * mlp, 0


def _attention(width: int, tokens: int) -> int:
    """Projections to queries, keys, values and output; scores, and their product with the values."""
    return 2 * tokens * 4 * width**2 + 4 * tokens**2 * width


def dit_blocks_flops(config: DiTConfig | SkipDiTConfig, latents: int, condition: int) -> int:
    """FLOPs of all blocks in one forward pass of one sample, of latent tokens (N) and condition tokens (M).

    Embeddings and the final layer are left out: they are always executed, and less than a block's worth.
    """
    if isinstance(config, SkipDiTConfig):
        sizes = (config.width, config.condition_channels, latents + 1, condition)
        plain = config.blocks - config.expert_blocks
        return plain * sum(skip_block_flops(*sizes, 0, 0)) + config.expert_blocks * sum(
            skip_block_flops(*sizes, config.experts_per_token, config.experts)
        )
    D, hidden = config.width, int(config.width * config.mlp_ratio)
    double = sum(double_block_flops(D, hidden, latents, condition))
    return config.double_blocks * double + config.single_blocks * sum(
        single_block_flops(D, hidden, latents + condition)
    )
