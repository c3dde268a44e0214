"""Which keys and values were seen?"""

import dataclasses

import jax
import jax.numpy as jnp

from rope_jax._checks import check_axes, check_dtype, check_mask


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys, already rotated, and values, row by row without gaps: token number s of a row lies in slot s.

    A value: :meth:`write` returns the next one. Donate the old one to a jitted step
    (``donate_argnames="cache"``) and the update happens in place.

    Attributes:
      key: ``[B, S, K, H]``, rotated.
      value: ``[B, S, K, H]``.
      length: int32 ``[B]``, the tokens each row has been given. Beyond S they were dropped: see ``overflowed``.
        A row that overflowed may hold NaN from the layers below it: begin anew with :func:`init_cache`.
    """

    key: jax.Array
    value: jax.Array
    length: jax.Array

    @property
    def capacity(self) -> int:
        """S, the tokens a row can hold."""
        return self.key.shape[-3]

    @property
    def overflowed(self) -> jax.Array:
        """bool ``[B]``: more tokens came than the row can hold, and attention to it is NaN from then on."""
        return self.length > self.capacity

    def write(self, key, value, mask=None) -> "KVCache":
        """The cache after each row's real tokens, in order, were put behind those it has.

        Args:
          key: ``[B, T, K, H]``, rotated; rounded to the cache's dtype.
          value: ``[B, T, K, H]``.
          mask: bool or integer ``[B, T]``, nonzero at real tokens; the others are not stored. All are real
            without it.

        Returns:
          A cache whose ``length`` grew by each row's real tokens. A row whose tokens do not fit drops the
          excess and is ``overflowed``: nothing is clamped, nothing older is overwritten.

        Raises:
          ValueError: if the shapes do not match the cache, or the tokens are known at trace time not to fit:
            T is over S, or the lengths are concrete and too long.

        Example:
          >>> import jax.numpy as jnp, rope_jax
          >>> cache = rope_jax.init_cache(batch=2, capacity=8, num_kv_heads=1, head_dim=4)
          >>> kv = jnp.ones((2, 3, 1, 4))
          >>> cache.write(kv, kv, mask=jnp.array([[1, 1, 1], [0, 0, 1]])).length.tolist()
          [3, 1]
        """
        check_axes("cache.key", self.key, "B S K H")
        batch, capacity, heads, head_dim = self.key.shape
        check_axes("key", key, "B T K H", B=batch, K=heads, H=head_dim)
        check_axes("value", value, "B T K H", B=batch, T=key.shape[1], K=heads, H=head_dim)
        tokens = key.shape[1]
        if mask is None:
            real = jnp.ones((batch, tokens), bool)
        else:
            real = check_mask("mask", mask, "B T", B=batch, T=tokens)
        count = jnp.cumsum(real, axis=1, dtype=jnp.int32)
        length = self.length + jnp.sum(real, axis=1, dtype=jnp.int32)
        self._refuse_known_overflow(tokens, mask, length)

        slots = jnp.where(real, self.length[:, None] + count - 1, capacity)  # slot S does not exist: dropped
        rows = jnp.arange(batch, dtype=jnp.int32)[:, None]
        return KVCache(
            key=self.key.at[rows, slots].set(key.astype(self.key.dtype), mode="drop"),
            value=self.value.at[rows, slots].set(value.astype(self.value.dtype), mode="drop"),
            length=length,
        )

    def _refuse_known_overflow(self, tokens, mask, length):
        # A symbolic T (jax.export) cannot be compared; it is left to run time like a traced length.
        known = not isinstance(length, jax.core.Tracer) and bool(jnp.any(length > self.capacity))
        if known or (mask is None and isinstance(tokens, int) and tokens > self.capacity):
            have = "" if isinstance(length, jax.core.Tracer) else f", rows would hold {length.tolist()}"
            raise ValueError(
                f"key must fit in the cache: T={tokens} tokens were given, capacity S={self.capacity}{have}"
            )


def init_cache(*, batch: int, capacity: int, num_kv_heads: int, head_dim: int, dtype=jnp.float32) -> KVCache:
    """An empty cache.

    Args:
      batch: B.
      capacity: S, the most tokens a row can hold, prompt and answer together.
      num_kv_heads: K.
      head_dim: H.
      dtype: floating; what keys and values are stored in.

    Returns:
      :class:`KVCache` of zeros ``[B, S, K, H]``, and length 0.

    Raises:
      ValueError: if a size is below 1.
      TypeError: if the dtype is not floating.

    Example:
      >>> import rope_jax
      >>> rope_jax.init_cache(batch=1, capacity=16, num_kv_heads=2, head_dim=64).key.shape
      (1, 16, 2, 64)
    """
    sizes = {"batch": batch, "capacity": capacity, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    for name, size in sizes.items():
        if isinstance(size, int) and size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    shape = (batch, capacity, num_kv_heads, head_dim)
    key = jnp.zeros(shape, dtype)
    check_dtype("dtype", key, jnp.floating, "floating")
    # Two buffers, not one twice: a donated buffer must not be donated again.
    return KVCache(key, jnp.zeros(shape, dtype), jnp.zeros((batch,), jnp.int32))
