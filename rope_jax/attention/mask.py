"""Attention masks, built from sequence indices and segments where a form of attention needs a mask."""

import jax
import jax.numpy as jnp

from rope_jax.core.positions import positions_from_mask, positions_from_segments, segment_starts


def distances(query_order, key_order) -> jax.Array:
    """How many tokens each query stands after each key, by their order in the row: integers ``[B, T, S]``."""
    return query_order[:, :, None] - key_order[:, None, :]


def visible(
    query_order, key_order, *, causal: bool, window: int | jax.Array | None = None, sinks: int = 0
) -> jax.Array:
    """Which keys each query may read, by their order in the row: bool ``[B, 1, T, S]``.

    Order counts real tokens, so that padding and the slots of a cache neither widen a window nor narrow it.

    Args:
      query_order: integers ``[B, T]``.
      key_order: integers ``[B, S]``.
      causal: whether a key must not be later than the query.
      window: how many tokens away a key must be less than, if it must; the number may be traced.
      sinks: so many tokens at the start of a row are inside every window.

    Example:
      >>> import jax.numpy as jnp
      >>> order = jnp.arange(4)[None]
      >>> visible(order, order, causal=True, window=2)[0, 0].astype(int).tolist()
      [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    """
    distance = distances(query_order, key_order)[:, None]
    seen = jnp.ones_like(distance, bool)
    if causal:
        seen &= distance >= 0
    if window is not None:
        seen &= (abs(distance) < window) | (key_order < sinks)[:, None, None, :]
    return seen


def same_segment(segment_ids) -> jax.Array:
    """Which tokens stand in one run of equal ids: bool ``[B, 1, T, T]``. An id that comes back starts a new run."""
    run = jnp.cumsum(segment_starts(segment_ids), axis=-1, dtype=jnp.int32)
    return run[:, None, :, None] == run[:, None, None, :]


def next_positions(shape: tuple[int, int], mask=None, segment_ids=None, seen=None) -> jax.Array:
    """Positions of tokens ``[B, T]`` that nobody gave positions: counted on from the ``seen [B]`` before them.

    int32 ``[B, T]``, or ``[1, T]`` where all rows are alike, so that their rotation is computed once.
    """
    if mask is None and segment_ids is None:
        positions = jnp.arange(shape[1], dtype=jnp.int32)[None]
    elif mask is None:
        positions = positions_from_segments(segment_ids)
    else:
        positions = positions_from_mask(mask, segment_ids)
    return positions if seen is None else positions + seen[:, None]


def default_positions(rope, shape: tuple[int, int], mask=None, segment_ids=None, seen=None) -> jax.Array:
    """:func:`next_positions`, unless the rope has several position axes: then only the caller knows."""
    if rope is not None and rope.axes is not None:
        raise ValueError(f"positions [..., T, A] must be given to a rope with axes {rope.axes}, got None")
    return next_positions(shape, mask, segment_ids, seen)
