"""How does a model that keeps Flax's own attention module get rotary positions?"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from rope_jax.core.rope import Rope


def rotary_attention_fn(
    rope: Rope, positions=None, *, attention_fn: Callable[..., jax.Array] = nn.dot_product_attention
) -> Callable[..., jax.Array]:
    """An ``attention_fn`` for ``flax.linen.MultiHeadDotProductAttention`` that rotates q and k first.

    For training and full forward passes. ``decode=True`` cannot work through this door, and is refused: Flax
    calls ``attention_fn`` after it has written the new key into its cache, so the keys would be stored
    unrotated, the one query of a step arrives without its position, and every step would turn it as if it
    stood at 0. :class:`RotaryAttention` rotates before it caches; use that to decode.

    Args:
      rope: the recipe; its head_dim is ``qkv_features / num_heads``.
      positions: int32 ``[..., T]`` (or ``[..., T, A]``); ``0 .. T-1`` where it is None. In a jitted
        model, build the function inside, where the positions are at hand.
      attention_fn: what is called with the rotated q and k.

    Returns:
      A function with the signature of ``attention_fn``.

    Raises:
      ValueError: when it is called with more or fewer keys than queries: in decoding, or in cross-attention.
        Cross-attention over as many keys as queries cannot be told from self-attention: do not use it there,
        queries and keys have no common line of positions.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, rope_jax
      >>> rope = rope_jax.Rope(head_dim=16, schedule=rope_jax.Standard())
      >>> module = nn.MultiHeadDotProductAttention(num_heads=4, attention_fn=rope_jax.attention.rotary_attention_fn(rope))
      >>> x = jnp.ones((2, 5, 64))
      >>> module.init_with_output(jax.random.key(0), x)[0].shape
      (2, 5, 64)
    """

    @functools.wraps(attention_fn)  # Flax passes on only the arguments that the signature names
    def rotated(query, key, value, *args, **kwargs):
        if query.shape[-3] != key.shape[-3]:
            raise ValueError(
                f"key must have as many positions as query, T={query.shape[-3]}, got S={key.shape[-3]}. Flax's "
                "decode=True caches keys before attention_fn sees them, so they cannot be rotated to their "
                "positions here: use rope_jax.RotaryAttention with cache= to decode. Cross-attention has no "
                "relative positions to rotate to."
            )
        where = jnp.arange(query.shape[-3], dtype=jnp.int32) if positions is None else positions
        query, key = rope(query, key, where)
        return attention_fn(query, key, value, *args, **kwargs)

    return rotated
