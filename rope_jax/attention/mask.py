"""Attention masks, from the sequence index and the segment of each token."""

import jax
import jax.numpy as jnp
import numpy as np

from rope_jax._checks import as_int32, check_axes, check_dtype, check_integer, device_array, is_concrete, shown
from rope_jax._jax_internals import Tracer


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
        near = abs(distance) < window
        if num_sink_tokens:  # sequence indices may be negative without a cache
            near |= (key_index < num_sink_tokens)[:, None, None, :]
        mask &= near
    return mask


def window_size(window) -> int | jax.Array | None:
    """A window as an int if it is concrete, as int32 ``[]`` if it is traced.

    Raises:
      TypeError: if ``window`` is not an integer.
      ValueError: if ``window`` has axes, or is concrete and not in ``[1, 2^31)``.
    """
    if window is None:
        return None
    if isinstance(window, np.ndarray | jax.Array) and window.ndim:
        raise ValueError(f"window must have shape [], got {window.shape}")
    if isinstance(window, Tracer):
        check_dtype("window", window, jnp.integer, "an integer")
        return as_int32(window)  # saturates: a window of 2^31 or more covers all keys anyway
    window = check_integer("window", window)
    if window < 1:
        raise ValueError(f"window must be at least 1 token, got {window}")
    if window >= 2**31:
        raise ValueError(f"window must be below 2^31 tokens, got {shown(window)}")
    return window


def checked_sequence_index(sequence_index, batch: int, length: int) -> jax.Array:
    """Checks a sequence index and returns it as int32 ``[B or 1, T]``.

    Raises:
      TypeError: if ``sequence_index`` is not integer.
      ValueError: if its shape is wrong, or concrete values do not fit in int32 or differ by 2^31 or more.
    """
    sequence_index = device_array("sequence_index", sequence_index)
    check_axes("sequence_index", sequence_index, "B T", B={1, batch}, T=length)
    check_dtype("sequence_index", sequence_index, jnp.integer, "integer")
    if is_concrete(sequence_index) and sequence_index.size:
        low, high = (int(end) for end in (np.asarray(sequence_index).min(), np.asarray(sequence_index).max()))
        if low < -(2**31) or high >= 2**31 or high - low >= 2**31:
            raise ValueError(f"sequence_index must fit in int32 and span less than 2^31, got {low} to {high}")
    return as_int32(sequence_index)
