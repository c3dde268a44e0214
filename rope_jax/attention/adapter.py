"""Rotary positions for Flax's own attention module."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from rope_jax.core.rope import Rope


def rotary_attention_fn(
    rope: Rope, positions=None, *, attention_fn: Callable[..., jax.Array] = nn.dot_product_attention
) -> Callable[..., jax.Array]:
    """An ``attention_fn`` for ``flax.linen.MultiHeadDotProductAttention``: rotates q and k, then attends.

    Supports training and full forward passes, but not ``decode=True``, which raises an error. Flax caches the new
    key before calling ``attention_fn``: keys would be stored unrotated, and every query would be rotated as if at
    position 0. To decode, use :class:`RotaryAttention`, which rotates keys before caching.

    Args:
      rope: a :class:`Rope` with head_dim ``qkv_features / num_heads``.
      positions: int32 ``[..., T]`` (or ``[..., T, A]``); None is ``0 .. T-1``. In a jitted model, call
        :func:`rotary_attention_fn` inside the model, to use its positions.
      attention_fn: called with the rotated q and k.

    Returns:
      A function with the signature of ``attention_fn``.

    Raises:
      ValueError: in the returned function, if the numbers of keys and queries differ, as in decoding or
        cross-attention. Do not use cross-attention with equally many keys and queries: the error cannot be
        detected, but queries and keys share no positions. :class:`RotaryAttention` serves both.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, rope_jax
      >>> rope = rope_jax.Rope(head_dim=16, schedule=rope_jax.Standard())
      >>> attention_fn = rope_jax.attention.rotary_attention_fn(rope)
      >>> module = nn.MultiHeadDotProductAttention(num_heads=4, attention_fn=attention_fn)
      >>> x = jnp.ones((2, 5, 64))
      >>> module.init_with_output(jax.random.key(0), x)[0].shape
      (2, 5, 64)
    """

    @functools.wraps(attention_fn)  # Flax passes only the arguments named in the signature
    def rotated(query, key, value, *args, **kwargs):
        if query.shape[-3] != key.shape[-3]:
            raise ValueError(
                f"key must have as many positions as query, T={query.shape[-3]}, got S={key.shape[-3]}. Flax's "
                "decode=True caches keys before attention_fn gets them, so their positions are unknown: to "
                "decode, use rope_jax.RotaryAttention with cache= or decode=True; for cross-attention, kv= and "
                "kv_positions="
            )
        token_positions = jnp.arange(query.shape[-3], dtype=jnp.int32) if positions is None else positions
        query, key = rope(query, key, token_positions)
        return attention_fn(query, key, value, *args, **kwargs)

    return rotated
