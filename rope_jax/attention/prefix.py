"""Prefix-LM attention: tokens of a prefix read the whole prefix, later tokens read earlier ones.

Causality compares sequence indices. A query inside the prefix takes the index of the last token of the prefix, so
that it reads the whole prefix. Keys keep their indices.
"""

import jax
import jax.numpy as jnp
import numpy as np

from rope_jax._checks import as_int32, check_axes, check_dtype, device_array, known_any, known_of


def checked_prefix_length(prefix_length, batch: int) -> jax.Array:
    """The tokens of each row's prefix, int32 ``[B or 1]``.

    Raises:
      TypeError: if ``prefix_length`` is not an integer.
      ValueError: if its shape is neither ``[]`` nor ``[B]``, or it is known to be negative.
    """
    given, prefix_length = prefix_length, device_array("prefix_length", prefix_length)
    check_dtype("prefix_length", prefix_length, jnp.integer, "integer")
    check_axes("prefix_length", prefix_length, "B" if prefix_length.ndim else "", B={1, batch})
    if known_of(given, lambda lengths: lengths < 0):
        raise ValueError(f"prefix_length must be 0 or more, got {np.asarray(given).tolist()}")
    return as_int32(prefix_length).reshape(-1)


def check_beside_prefix(causal: bool, **arguments) -> None:
    """Raises ValueError if attention is not causal, or an argument is given that has no meaning with a prefix."""
    if not causal:
        raise ValueError("prefix_length must be left out with causal=False: all tokens read each other")
    for name, value in arguments.items():
        # Windows and biases would be counted from the end of the prefix.
        if value is not None:
            raise ValueError(
                f"{name} must be left out with prefix_length, got {type(value).__name__}: pass the prefix in an "
                "attention_mask, with causal=False"
            )


def prefix_query_index(prefix_length, sequence_index) -> jax.Array:
    """The sequence index up to which each query reads: int32 ``[B or 1, T]``."""
    return jnp.maximum(sequence_index, prefix_length[:, None] - 1)


def divided_prefix(prefix_length, before, after) -> jax.Array:
    """Rows whose prefix is divided between calls, whose parts would not read each other: bool ``[B]``.

    ``before`` and ``after`` are the tokens of each row in the cache, int32 ``[B or 1]``.

    Raises:
      ValueError: if a row's prefix is known to be divided.
    """
    reads_prefix = (before < prefix_length) & (after > before)
    divided = reads_prefix & ((before > 0) | (after < prefix_length))
    if known_any(divided):
        raise ValueError(
            f"prefix_length must be of tokens in a single call before which the cache is empty: got "
            f"{prefix_length.tolist()}, rows had {before.tolist()} tokens and have {after.tolist()}"
        )
    return divided
