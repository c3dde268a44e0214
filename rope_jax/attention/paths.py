"""Chooses the program of an attention: one block, many blocks, or a kernel."""

from typing import Literal

from rope_jax.attention.blocks import BlockSizes

AttentionBackend = Literal["xla", "blocks", "splash", "cudnn"]
"""The programs of attention; see :func:`rope_jax.attention.explain`."""


def block_sizes(q, k, implementation: AttentionBackend | None, platform: str) -> BlockSizes:
    """The queries and keys of a block, for q ``[B, N, T, H]`` and k ``[..., B, K, S, H]``."""
    length, kv_length = q.shape[2], k.shape[-2]
    if implementation == "xla":
        return BlockSizes(length, kv_length)
    return BlockSizes(_block(length, 256), _block(kv_length, 256))


def _block(length, most: int):
    """A block of at most so many tokens, such that all blocks are about as long."""
    if not isinstance(length, int):  # symbolic: the least block that is worth its loop
        import jax

        return jax.core.min_dim(length, 128)
    count = -(-length // most)
    return -(-length // count)


def choose_path(q, k, layer, facts, implementation, platform: str, divided: bool) -> str:
    return "blocks"
