"""Chooses the program of an attention: blocks of plain JAX, or a kernel."""

from typing import Literal

import jax

from rope_jax.attention.blocks import BlockSizes
from rope_jax.attention.facts import Facts
from rope_jax.attention.kernels import splash
from rope_jax.attention.quantized import Quantized

AttentionBackend = Literal["xla", "blocks", "splash", "cudnn"]
"""The programs of attention; see :func:`rope_jax.attention.explain`."""

# Queries and keys of a block, by measurement on CPUs (benchmarks/attention.py); elsewhere large matrix products.
BLOCKS = {"cpu": BlockSizes(256, 256), "gpu": BlockSizes(512, 1024), "tpu": BlockSizes(512, 1024)}
SYMBOLIC_BLOCK = 128  # of lengths that are not known when a program is exported


def block_sizes(q, k, implementation: AttentionBackend | None, platform: str) -> BlockSizes:
    """The queries and keys of a block, for q ``[B, N, T, H]`` and k ``[..., B, K, S, H]``."""
    length, kv_length = q.shape[2], k.shape[-2]
    if implementation == "xla":
        return BlockSizes(length, kv_length)
    most = BLOCKS[platform]
    return BlockSizes(_block(length, most.queries), _block(kv_length, most.keys))


def _block(length, most: int):
    """A block of at most so many tokens, such that all blocks are about as long."""
    if not isinstance(length, int):
        return jax.core.min_dim(length, SYMBOLIC_BLOCK)
    count = -(-length // most)
    return -(-length // count)


def choose_path(
    q, k, layer, facts: Facts, implementation: AttentionBackend | None, *, platform: str, divided: bool
) -> AttentionBackend:
    """The program that serves q ``[B, N, T, H]`` and k ``[..., B, K, S, H]`` on a platform.

    Raises:
      ValueError: if the implementation was asked for by name and cannot serve, with the reason.
    """
    if implementation in ("xla", "blocks"):
        return implementation
    reason = why_not_splash(q, k, layer, facts, platform=platform, divided=divided)
    if reason is None:
        return "splash" if implementation == "splash" or q.shape[2] > BLOCKS["tpu"].queries else "blocks"
    if implementation == "splash":
        raise ValueError(f"implementation must be None, 'blocks' or 'xla', got 'splash': {reason}")
    return "blocks"


def why_not_splash(q, k, layer, facts: Facts, *, platform: str, divided: bool) -> str | None:
    """The reason why the splash kernel cannot serve; None if it can."""
    if platform != "tpu":
        return f"the kernel is for a TPU, not for a {platform.upper()}"
    if divided:
        return "XLA divides the program among devices, but no kernel: call attention inside shard_map"
    if layer is not None or isinstance(k, Quantized) or facts.query_index is not None:
        return "queries and keys must lie in the order of their sequence indices 0, 1, 2, ..., outside a cache"
    given = {
        "a traced window": facts.traced_window,
        "an attention mask": facts.mask,
        "a bias": facts.bias,
        "a position bias": facts.position_bias,
        "dropout": facts.dropout_key,
    }
    if used := [name for name, value in given.items() if value is not None]:
        return f"the kernel has no {used[0].removeprefix('an ').removeprefix('a ')}"
    return splash.unsupported(q, k, window=facts.window)
