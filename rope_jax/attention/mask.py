"""Attention masks and default positions, from the sequence index of each token."""

import jax
import jax.numpy as jnp

from rope_jax.core.positions import positions_from_mask, positions_from_segments


def distances(query_index, key_index) -> jax.Array:
    """Tokens from each key to each query, by their sequence indices: integers ``[B, T, S]``."""
    return query_index[:, :, None] - key_index[:, None, :]


def attention_mask(
    query_index, key_index, *, causal: bool, window: int | jax.Array | None = None, num_sink_tokens: int = 0
) -> jax.Array:
    """True if a query may read a key, by their sequence indices: bool ``[B, 1, T, S]``.

    Sequence indices count real tokens, so that padding and the slots of a cache do not change a window.

    Args:
      query_index: integers ``[B, T]``.
      key_index: integers ``[B, S]``.
      causal: whether a query reads only keys of its own index or an earlier one.
      window: a query reads only keys less than this many tokens away; may be traced.
      num_sink_tokens: tokens at the start of a row which every window includes.

    Example:
      >>> import jax.numpy as jnp
      >>> index = jnp.arange(4)[None]
      >>> attention_mask(index, index, causal=True, window=2)[0, 0].astype(int).tolist()
      [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    """
    distance = distances(query_index, key_index)[:, None]
    mask = jnp.ones_like(distance, bool)
    if causal:
        mask &= distance >= 0
    if window is not None:
        mask &= (abs(distance) < window) | (key_index < num_sink_tokens)[:, None, None, :]
    return mask


def same_segment(segments) -> jax.Array:
    """True if two tokens have the same segment number ``[B, T]``: bool ``[B, 1, T, T]``."""
    return segments[:, None, :, None] == segments[:, None, None, :]


def next_positions(shape: tuple[int, int], mask=None, segment_ids=None, seen=None) -> jax.Array:
    """Default positions of tokens ``[B, T]``: the count of real tokens after the ``seen [B]`` before them.

    int32 ``[B, T]``, or ``[1, T]`` if all rows are alike, so that their rotation is computed once.
    """
    if mask is None and segment_ids is None:
        positions = jnp.arange(shape[1], dtype=jnp.int32)[None]
    elif mask is None:
        positions = positions_from_segments(segment_ids)
    else:
        positions = positions_from_mask(mask, segment_ids)
    return positions if seen is None else positions + seen[:, None]
