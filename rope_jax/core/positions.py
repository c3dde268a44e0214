"""Positions from masks and segment ids."""

import jax
import jax.numpy as jnp

from rope_jax._checks import check_axes, check_dtype, check_mask, device_array


def positions_from_mask(mask, segment_ids=None) -> jax.Array:
    """Positions that count real tokens only, with padding on the left, on the right or between.

    ``position[t] = sum(mask[s] for s < t in t's segment)`` where ``mask[t]``, else 0.

    Args:
      mask: bool or integer ``[..., T]``, nonzero at real tokens.
      segment_ids: optional integers ``[..., T]``. A segment is a run of equal ids, and counting restarts
        at each change of id. By default a row is one segment.

    Returns:
      int32 ``[..., T]``, in tokens.

    Raises:
      TypeError: if ``mask`` is not bool or integer, or ``segment_ids`` is not integer.
      ValueError: if the shapes differ or the axis T is missing.

    Example:
      >>> import jax.numpy as jnp, rope_jax
      >>> rope_jax.positions_from_mask(jnp.array([0, 1, 1, 0, 1, 1]), jnp.array([1, 1, 1, 2, 2, 2])).tolist()
      [0, 0, 1, 0, 0, 1]
    """
    real = check_mask("mask", mask, "... T")
    starts = None if segment_ids is None else segment_starts(segment_ids)
    if starts is not None and starts.shape != real.shape:
        raise ValueError(f"segment_ids must have the shape of mask, [..., T] = {real.shape}, got {starts.shape}")
    return count_positions(real, starts)


def positions_from_segments(segment_ids) -> jax.Array:
    """Positions of packed sequences: counting restarts at 0 at each change of segment id.

    Args:
      segment_ids: integers ``[..., T]``. No id means padding: for padded rows use :func:`positions_from_mask`.

    Returns:
      int32 ``[..., T]``, in tokens.

    Raises:
      TypeError: if ``segment_ids`` is not integer.
      ValueError: if the axis T is missing.

    Example:
      >>> import jax.numpy as jnp, rope_jax
      >>> rope_jax.positions_from_segments(jnp.array([7, 7, 7, 9, 9])).tolist()
      [0, 1, 2, 0, 1]
    """
    starts = segment_starts(segment_ids)
    return count_positions(jnp.ones_like(starts), starts)


def count_positions(real, starts=None) -> jax.Array:
    """The count of ``real [..., T]`` tokens before each token, from 0 again where ``starts [..., T]`` is True.

    int32 ``[..., T]``; 0 at tokens that are not real.
    """
    real = real.astype(jnp.int32)
    before = jnp.cumsum(real, axis=-1, dtype=jnp.int32) - real
    if starts is not None:
        # `before` never falls, so its largest value at a segment start belongs to the latest start.
        before -= jax.lax.cummax(jnp.where(starts, before, 0), axis=before.ndim - 1)
    return before * real


def segment_starts(segment_ids) -> jax.Array:
    """True at the first token of each segment: bool ``[..., T]``."""
    segment_ids = device_array("segment_ids", segment_ids)
    check_axes("segment_ids", segment_ids, "... T")
    check_dtype("segment_ids", segment_ids, jnp.integer, "integer")
    first = jnp.ones_like(segment_ids[..., :1], bool)
    return jnp.concatenate([first, segment_ids[..., 1:] != segment_ids[..., :-1]], axis=-1)
