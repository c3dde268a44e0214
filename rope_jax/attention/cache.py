"""Store and fetch the keys and values of earlier tokens."""

import dataclasses
import functools
from collections.abc import Hashable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from rope_jax._checks import (
    as_float_dtype,
    as_int32,
    check_axes,
    check_choice,
    check_dtype,
    check_integer,
    check_mask,
    device_array,
    known_any,
    known_of,
)
from rope_jax.attention.cache_write import write_slots
from rope_jax.attention.quantized import Quantized, quantize, read_layer
from rope_jax.attention.slots import Eviction, Slots, check_capacity
from rope_jax.core.explicit import by_xla, is_divisible, spec_of, without_repeats
from rope_jax.core.nan_rows import nan_where
from rope_jax.core.serialization import serializable


class CachePolicy(NamedTuple):
    """What is known of a cache before it runs; see :class:`KVCache`."""

    capacity: int
    eviction: Eviction | None
    num_sink_tokens: int
    rotated: bool


@serializable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens of each row, and the number of tokens.

    A value: :meth:`write` returns the next cache. Donate the old one to a jitted step (``donate_argnames="cache"``)
    and XLA updates it in place. The cache of a stack of layers has keys and values ``[layers, B, K, S, H]``; the
    counters ``[B]`` serve all layers, since all layers store the same tokens.

    Attributes:
      key: ``[B, K, S, H]``, or :class:`Quantized`.
      value: ``[B, K, S, H]``, or :class:`Quantized`.
      num_tokens: int32 ``[B]``, the tokens given to each row, evicted ones included; see ``overflowed``.
      context_length: int32 ``[B]``, the context length whose frequencies rotated the stored keys, if the rope's
        frequencies depend on it; 0 before the first token.
      eviction: ``"sliding"``, or None; see :func:`init_cache`.
      num_sink_tokens: tokens at the start of a row which are never evicted.
      rotated: whether keys are stored rotated, or are rotated whenever they are read.
      rope: the rope of the keys, if known: a layer with another rope raises an error.
      layer: int32 ``[]``, the layer of a stack that :meth:`store` and :meth:`read` act on.
      in_step: whether ``plan.begin`` returned it, and ``plan.end`` has not advanced its counters yet.
    """

    key: jax.Array | Quantized
    value: jax.Array | Quantized
    num_tokens: jax.Array
    context_length: jax.Array
    eviction: Eviction | None = dataclasses.field(default=None, metadata=dict(static=True))
    num_sink_tokens: int = dataclasses.field(default=0, metadata=dict(static=True))
    rotated: bool = dataclasses.field(default=True, metadata=dict(static=True))
    rope: Hashable = dataclasses.field(default=None, metadata=dict(static=True))
    layer: jax.Array | None = None
    in_step: bool = dataclasses.field(default=False, metadata=dict(static=True))

    @property
    def capacity(self) -> int:
        """S, the tokens a row can hold."""
        return self.key.shape[-2]

    @property
    def slots(self) -> Slots:
        """The rule that places tokens in slots."""
        return Slots(self.capacity, self.eviction, self.num_sink_tokens)

    @property
    def policy(self) -> CachePolicy:
        """What a plan for this cache must know."""
        return CachePolicy(self.capacity, self.eviction, self.num_sink_tokens, self.rotated)

    @property
    def overflowed(self) -> jax.Array:
        """bool ``[B]``: a row was given more tokens than fit. Attention to an overflowed row is NaN from then on.

        An evicting row overflows if several tokens at once evict keys that the first of them still needs. A row
        that overflowed may hold NaN: begin again with :func:`init_cache`.
        """
        return self.slots.overflowed(self.num_tokens)

    def write(self, key, value, mask=None, *, max_window: int | None = None, implementation=None) -> "KVCache":
        """Appends the real tokens of each row.

        Args:
          key: ``[B, T, K, H]``, rotated if ``rotated``; rounded to the cache's dtype.
          value: ``[B, T, K, H]``.
          mask: bool or integer ``[B, T]``, nonzero at real tokens; other tokens are not stored. Without a mask all
            tokens are real.
          max_window: the window of the attention that will read the cache, in tokens.
          implementation: ``"plain"`` for operations of JAX alone: see :func:`rope_jax.attention.explain`.

        Returns:
          A cache whose ``num_tokens`` grew by the real tokens of each row. A row whose tokens do not fit drops the
          excess or all of them, and is ``overflowed``: nothing is clamped, nothing older is overwritten.

          An evicting cache always takes one token at a time. It takes n tokens at once if they fit, or if it has no
          sink tokens and ``n - 1 + max_window <= S``; else the row is ``overflowed``.

        Raises:
          ValueError: if shapes do not match, tokens are known not to fit, or a step has begun and not ended.

        Example:
          >>> import jax.numpy as jnp, rope_jax
          >>> cache = rope_jax.init_cache(batch=2, capacity=8, num_kv_heads=1, head_dim=4)
          >>> kv = jnp.ones((2, 3, 1, 4))
          >>> cache.write(kv, kv, mask=jnp.array([[1, 1, 1], [0, 0, 1]])).num_tokens.tolist()
          [3, 1]
        """
        if self.layer is not None:
            raise ValueError(
                "cache.layer must be None, got a layer of a stack, whose counters all layers share: use store"
            )
        check_between_steps(self)
        check_axes("cache.key", self.key, "B K S H")
        batch, heads, _, head_dim = self.key.shape
        key, value = device_array("key", key), device_array("value", value)
        check_axes("key", key, "B T K H", B=batch, K=heads, H=head_dim)
        check_axes("value", value, "B T K H", B=batch, T=key.shape[1], K=heads, H=head_dim)
        check_dtype("key", key, jnp.floating, "floating")
        check_dtype("value", value, jnp.floating, "floating")
        max_window = None if max_window is None else check_integer("max_window", max_window, least=1)
        check_choice("implementation", implementation, ("plain",), optional=True)
        tokens = key.shape[1]
        if mask is not None:
            mask = check_mask("mask", mask, "B T", B=batch, T=tokens)
        real = jnp.ones((batch, tokens), bool) if mask is None else mask
        slots = self.slots.of_new_tokens(self.num_tokens, real)
        num_tokens = self.slots.advance("key", self.num_tokens, tokens, mask, max_window=max_window)
        consecutive = self.slots.consecutive(mask)
        cache = self.store(key, value, slots, consecutive=consecutive, plain=implementation == "plain")
        return dataclasses.replace(cache, num_tokens=num_tokens)

    def store(self, key, value, slots, *, consecutive: bool = False, plain: bool = False) -> "KVCache":
        """Writes keys and values ``[B, T, K, H]`` to slots ``[B, T]``; slot S drops a token. Counters stay.

        ``consecutive`` slots (:meth:`Slots.consecutive`) are written at once, if all tokens of a row fit. If
        ``plain``, each token is written by one scatter of JAX.
        """

        def put(stored, new):
            new = quantize(new, stored.dtype) if isinstance(stored, Quantized) else new
            options: dict = dict(layer=self.layer, consecutive=consecutive, plain=plain)
            write = functools.partial(write_slots, slots=slots, **options)
            return jax.tree.map(write, stored, new)

        return dataclasses.replace(self, key=put(self.key, key), value=put(self.value, value))

    def read(self, dtype) -> tuple[jax.Array, jax.Array]:
        """Keys and values of all slots, free ones included: ``[B, S, K, H]`` in this dtype.

        ``cache.slots.sequence_index(cache.num_tokens)`` says which token lies in each slot, int32 ``[B or 1, S]``.

        Raises:
          ValueError: if the cache is of a stack of layers, and none is chosen.

        Example:
          >>> import dataclasses, jax.numpy as jnp, rope_jax
          >>> cache = rope_jax.init_cache(batch=2, capacity=8, num_kv_heads=1, head_dim=4, num_layers=3)
          >>> dataclasses.replace(cache, layer=jnp.int32(1)).read(jnp.float32)[0].shape
          (2, 8, 1, 4)
        """
        if self.layer is None and self.key.ndim > 4:
            raise ValueError(
                "cache must be of one layer, got a stack: choose a layer by dataclasses.replace(cache, layer=...)"
            )
        dtype = as_float_dtype("dtype", dtype)
        key, value = (read_layer(stored, self.layer, dtype).swapaxes(1, 2) for stored in (self.key, self.value))
        return key, value

    def nan_if_overflowed(self, values) -> jax.Array:
        """``values [B, ...]``, but NaN in rows that overflowed: for attention in a model of your own.

        :class:`rope_jax.RotaryAttention` does so itself. :meth:`write` cannot: only the counter shows the overflow.

        Raises:
          TypeError: if values are not floating.
          ValueError: if values do not have B rows.

        Example:
          >>> import jax, jax.numpy as jnp, rope_jax
          >>> @jax.jit
          ... def decode(q, k, v, cache):  # q [B, 1, N, H], k and v [B, 1, K, H], rotated
          ...     cache = cache.write(k, v)
          ...     is_written = jnp.arange(cache.capacity) < cache.num_tokens[:, None]
          ...     y = rope_jax.attend(q, *cache.read(q.dtype), mask=is_written[:, None, None])
          ...     return cache.nan_if_overflowed(y), cache
          >>> cache = rope_jax.init_cache(batch=1, capacity=1, num_kv_heads=1, head_dim=2)
          >>> x = jnp.ones((1, 1, 1, 2))
          >>> y, cache = decode(x, x, x, cache)
          >>> decode(x, x, x, cache)[0].tolist()
          [[[[nan, nan]]]]
        """
        values, batch = device_array("values", values), self.num_tokens.shape[0]
        if values.ndim == 0 or values.shape[0] != batch:
            raise ValueError(f"values must have shape [B, ...] with B={batch}, got {values.shape}")
        check_dtype("values", values, jnp.floating, "floating")
        return nan_where(jax.lax.expand_dims(self.overflowed, range(1, values.ndim)), values)

    def truncate(self, num_tokens) -> "KVCache":
        """Each row without its tokens from number ``num_tokens`` on: for a draft that the model rejected.

        Rows with fewer tokens stay as they are, ``overflowed`` ones too. Nothing is moved; the next tokens take the
        slots. A row whose dropped slots hold NaN stays NaN, as their values are read with weight 0.

        Args:
          num_tokens: integers, ``[]`` or ``[B]``.

        Raises:
          TypeError: if num_tokens is not an integer.
          ValueError: if num_tokens is negative, or a row has evicted tokens: its slots held older tokens, which are
            lost. If only run time knows, such a row is ``overflowed`` from then on.

        Example:
          >>> import jax.numpy as jnp, rope_jax
          >>> cache = rope_jax.init_cache(batch=2, capacity=8, num_kv_heads=1, head_dim=4)
          >>> kv = jnp.ones((2, 5, 1, 4))
          >>> cache.write(kv, kv).truncate(jnp.array([3, 7])).num_tokens.tolist()
          [3, 5]
        """
        check_between_steps(self)
        given, num_tokens = num_tokens, device_array("num_tokens", num_tokens)
        check_dtype("num_tokens", num_tokens, jnp.integer, "integer")
        check_axes("num_tokens", num_tokens, "B" if num_tokens.ndim else "", B=self.num_tokens.shape[0])
        if known_of(given, lambda lengths: lengths < 0):
            raise ValueError(f"num_tokens must be 0 or more, got {np.asarray(given).tolist()}")
        shorter = jnp.minimum(self.num_tokens, as_int32(num_tokens))
        lost = (num_tokens < 0) | self.overflowed
        if self.eviction is not None:
            evicted = (self.num_tokens > self.capacity) & (shorter < self.num_tokens)
            if known_any(evicted):
                raise ValueError(
                    f"num_tokens must be at least {self.num_tokens.tolist()}, as these rows evicted tokens, "
                    f"got {num_tokens.tolist()}"
                )
            lost |= evicted
        return dataclasses.replace(self, num_tokens=jnp.where(lost, jnp.int32(self.slots.overflow_count), shorter))

    def select_rows(self, rows) -> "KVCache":
        """The cache of these rows, in this order: the beams that go on, or one prompt's row for many answers.

        Args:
          rows: integers ``[B']`` in ``[0, B)``. If only run time knows that a row is outside, it is ``overflowed``.

        Raises:
          TypeError: if rows are not integers.
          ValueError: if a row is known to be outside.

        Example:
          >>> import jax.numpy as jnp, rope_jax
          >>> cache = rope_jax.init_cache(batch=2, capacity=8, num_kv_heads=1, head_dim=4)
          >>> cache.select_rows(jnp.array([1, 1, 0])).num_tokens.shape
          (3,)
        """
        check_between_steps(self)
        given, rows = rows, device_array("rows", rows)
        check_dtype("rows", rows, jnp.integer, "integer")
        check_axes("rows", rows, "B")
        rows, batch = as_int32(rows), self.num_tokens.shape[0]
        if known_of(given, lambda rows: (rows < 0) | (rows >= batch)):
            raise ValueError(f"rows must be in [0, B={batch}), got {np.asarray(given).tolist()}")
        outside = (rows < 0) | (rows >= batch)

        def select(tree, axis=0):
            def take(leaf):
                taken = functools.partial(jnp.take, axis=axis, mode="clip")
                return by_xla(taken, _spec_of_rows(leaf, rows, axis))(leaf, rows)

            return jax.tree.map(take, tree)

        return dataclasses.replace(
            self,
            key=select(self.key, self._batch_axis),
            value=select(self.value, self._batch_axis),
            num_tokens=jnp.where(outside, jnp.int32(self.slots.overflow_count), select(self.num_tokens)),
            context_length=select(self.context_length),
        )

    def grow(self, capacity: int) -> "KVCache":
        """The same rows with room for more tokens. Another capacity is another shape: its readers compile again.

        Raises:
          ValueError: if the capacity is below S, or the cache evicts: its tokens would lie in other slots.
          TypeError: if the capacity is not an integer.

        Example:
          >>> import rope_jax
          >>> rope_jax.init_cache(batch=2, capacity=8, num_kv_heads=1, head_dim=4).grow(16).capacity
          16
        """
        check_between_steps(self)
        check_capacity(capacity)
        if self.eviction is not None:
            raise ValueError(f"capacity must stay S={self.capacity} in a cache that evicts tokens, got {capacity}")
        if capacity < self.capacity:
            raise ValueError(f"capacity must be at least S={self.capacity}, got {capacity}")
        axis, room = self._batch_axis + 2, capacity - self.capacity

        def pad(leaf):
            return jnp.pad(leaf, [(0, room if i == axis else 0) for i in range(leaf.ndim)])

        key, value = jax.tree.map(pad, (self.key, self.value))
        # The tokens that an overflowed row dropped do not come back with the room.
        num_tokens = jnp.where(self.overflowed, jnp.int32(capacity + 1), self.num_tokens)
        return dataclasses.replace(self, key=key, value=value, num_tokens=num_tokens)

    @property
    def _batch_axis(self) -> int:
        """The axis B of keys and values."""
        return self.key.ndim - 4


def _spec_of_rows(leaf, rows, axis: int) -> PartitionSpec:
    """Of the rows taken from a leaf: as the leaf, and along B as ``rows``. Rows that are not divided lie as the
    leaf's own rows, if the devices divide their number."""
    spec = list(spec_of(leaf))
    own = spec[axis] if is_divisible(rows, spec[axis]) else None
    spec[axis] = spec_of(rows)[0] or own
    return PartitionSpec(*without_repeats(*spec))


def check_between_steps(cache: KVCache) -> None:
    """Raises ValueError if a step has begun, but not ended: the counters do not count its tokens."""
    if cache.in_step:
        raise ValueError("cache must be what plan.end(cache) returned, got a cache whose step has not ended")


def check_cache(cache) -> None:
    """Raises TypeError unless the cache is a :class:`KVCache`."""
    if not isinstance(cache, KVCache):
        raise TypeError(f"cache must be a KVCache, as from init_cache, got {type(cache).__name__}")
