"""Which keys and values were seen?

Token number s of a row lies in slot s. Where a cache has ``sinks``, a row that is full evicts: its first tokens
stay, and the rest is a ring in which each new token takes the place of the oldest.
"""

import dataclasses
import functools
from collections.abc import Hashable

import jax
import jax.numpy as jnp
import numpy as np

from rope_jax._checks import as_int32, check_axes, check_dtype, check_integer, check_mask, device_array, known_any
from rope_jax.attention.quantized import Quantized, is_narrow, quantize
from rope_jax.core.frequencies import FrequencyChoice
from rope_jax.core.rope import Rope

LATER = np.iinfo(np.int32).max  # the order of a token that has not come yet
LOST = -1  # the length of a row that evicted what it still had to read


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens of each row, and how many there were.

    A value: :meth:`write` returns the next one. Donate the old one to a jitted step
    (``donate_argnames="cache"``) and the update happens in place. Leaves may have leading axes: those of a stack of
    layers are ``[layers, B, S, K, H]`` and ``[layers, B]``.

    Attributes:
      key: ``[B, S, K, H]``, or :class:`Quantized`.
      value: ``[B, S, K, H]``, or :class:`Quantized`.
      num_tokens: int32 ``[B]``, the tokens each row has been given; see ``overflowed``. A row that overflowed may hold
        NaN from the layers below it: begin anew with :func:`init_cache`.
      shifted: int32 ``[B]``, by how many positions :meth:`shift` moved each row.
      turned: int32 ``[B]``, for how many tokens the frequencies were that rotated keys are turned by, where these
        depend on it; 0 before any is there.
      sinks: where it is not None, a full row evicts its oldest token but for the first ``sinks`` (Xiao et al. 2023,
        section 3.2); 0 is a sliding window.
      rotated: whether keys are stored rotated; else as they are, and rotated whenever they are read.
      rope: the recipe that its keys are of, where it is known: no other may write or read them.
      layer: int32 ``[]``, of a stack of layers with one length ``[B]``: which of them is written and read.
    """

    key: jax.Array | Quantized
    value: jax.Array | Quantized
    num_tokens: jax.Array
    shifted: jax.Array
    turned: jax.Array
    sinks: int | None = dataclasses.field(default=None, metadata=dict(static=True))
    rotated: bool = dataclasses.field(default=True, metadata=dict(static=True))
    rope: Hashable = dataclasses.field(default=None, metadata=dict(static=True))
    layer: jax.Array | None = None

    @property
    def capacity(self) -> int:
        """S, the tokens a row can hold."""
        return self.key.shape[-3]

    @property
    def overflowed(self) -> jax.Array:
        """bool ``[B]``: a row was given more tokens than it can hold, and attention to it is NaN from then on.

        Where tokens are evicted, that is a row which was given several tokens at once and evicted what the first of
        them had to read.
        """
        return self.num_tokens > self.capacity if self.sinks is None else self.num_tokens < 0

    @property
    def _too_long(self) -> jax.Array:
        """int32 ``[]``: the length of a row that is ``overflowed``."""
        return jnp.int32(self.capacity + 1 if self.sinks is None else LOST)

    def with_one_count(self) -> "KVCache":
        """A stack's keys and values as they are, and the counters ``[B]`` of one layer: those of all are alike."""
        return dataclasses.replace(
            self, num_tokens=self.num_tokens[0], shifted=self.shifted[0], turned=self.turned[0]
        )

    def order(self, length) -> jax.Array:
        """Which token of its row each slot holds, after ``length [B]`` tokens: int32 ``[B or 1, S]``.

        A slot that is free holds a token that is later than any.
        """
        slot = jnp.arange(self.capacity, dtype=jnp.int32)[None]
        if self.sinks is None:
            return slot
        last = length[:, None] - 1
        latest = last - (last - slot) % (self.capacity - self.sinks)  # of the tokens that take this slot in turn
        held = jnp.where(slot < self.sinks, slot, latest)
        return jnp.where((slot <= last) & (held >= slot), held, jnp.int32(LATER))

    def positions(self, length) -> jax.Array:
        """Where each slot's key stands, after ``length [B]`` tokens: int32 ``[B or 1, S]``.

        Sinks stand right before the oldest recent token: they move by one with each token that is evicted.
        """
        order = self.order(length)
        if not self.sinks:
            return order
        evicted = jnp.maximum(length[:, None] - self.capacity, 0)
        return order + jnp.where(order < self.sinks, evicted, 0)

    def length_after(self, tokens: int, mask=None) -> jax.Array:
        """int32 ``[B]``: how many tokens a row will have been given, after T more or those of the mask."""
        return self.num_tokens + (tokens if mask is None else jnp.sum(mask, axis=-1, dtype=jnp.int32))

    def advance(self, argument: str, tokens: int, mask=None, *, max_window: int | None = None) -> jax.Array:
        """As :meth:`length_after`, but that of a row which is ``overflowed`` by then; see :meth:`write`.

        Raises:
          ValueError: if one is known to be.
        """
        length = given = self.length_after(tokens, mask)
        if self.sinks is not None:
            count = length - self.num_tokens
            lost = (length > self.capacity) & (count > 1)
            if self.sinks == 0 and max_window is not None:
                lost &= count - 1 + max_window > self.capacity
            length = jnp.where(lost | (self.num_tokens < 0), LOST, length)
        # A symbolic T (jax.export) cannot be compared; it is left to run time like a traced length.
        too_many = mask is None and isinstance(tokens, int) and tokens > self.capacity
        if too_many or known_any(dataclasses.replace(self, num_tokens=length).overflowed):
            have = "" if isinstance(given, jax.core.Tracer) else f", rows would hold {given.tolist()}"
            hint = "" if self.sinks is None else ": several at once would evict what the first of them reads"
            raise ValueError(
                f"{argument} must fit in the cache: T={tokens} tokens were given, capacity S={self.capacity}"
                f"{have}{hint}"
            )
        return length

    def context_length(self, length) -> jax.Array:
        """int32 ``[B]``: for how many tokens frequencies are, if they depend on it, after ``length [B]`` tokens.

        At least 1; where positions are those inside the cache, no more than it holds.
        """
        return jnp.clip(length, 1, self.capacity if self.sinks else None)

    def stored_positions(self, positions, rope: Rope) -> jax.Array:
        """Positions ``[..., T]``, or ``[..., T, A]``, that somebody gave, as a row that was shifted stores them.

        Raises:
          ValueError: if keys are turned, or turned on, to their place in line: then there is no other.
        """
        if not self.rotated or rope.needs_context_length:
            kind = "unrotated keys" if not self.rotated else "keys whose frequencies depend on the length"
            raise ValueError(f"positions must be left out with a cache of {kind}: they go by place in line")
        if jnp.issubdtype(positions.dtype, jnp.integer) and positions.dtype.itemsize <= 4:
            positions = as_int32(positions)  # narrow ones would wrap around
        shifted = self.shifted[:, None] if rope.axes is None else self.shifted[:, None, None]
        return positions - shifted.astype(positions.dtype)

    def write(self, key, value, mask=None, *, max_window: int | None = None) -> "KVCache":
        """The cache after each row's real tokens, in order, were put behind those it has.

        Args:
          key: ``[B, T, K, H]``, rotated if ``rotated``; rounded to the cache's dtype.
          value: ``[B, T, K, H]``.
          mask: bool or integer ``[B, T]``, nonzero at real tokens; the others are not stored. All are real
            without it.
          max_window: the window of the attention that will read it: a token reads only tokens less than this many away.

        Returns:
          A cache whose ``length`` grew by each row's real tokens. A row whose tokens do not fit drops the
          excess and is ``overflowed``: nothing is clamped, nothing older is overwritten.

          With ``sinks``, one token at a time is always taken. Several real ones at once, n, must not evict what the
          first of them reads: they fit, or there are no sinks and ``n - 1 + max_window`` is at most S. Else the row is
          ``overflowed``.

        Raises:
          ValueError: if the shapes do not match the cache, or the tokens are known at trace time not to fit:
            T is over S, or the lengths are concrete and too long.

        Example:
          >>> import jax.numpy as jnp, rope_jax
          >>> cache = rope_jax.init_cache(batch=2, capacity=8, num_kv_heads=1, head_dim=4)
          >>> kv = jnp.ones((2, 3, 1, 4))
          >>> cache.write(kv, kv, mask=jnp.array([[1, 1, 1], [0, 0, 1]])).num_tokens.tolist()
          [3, 1]
        """
        check_axes("cache.key", self.key, "B S K H" if self.layer is None else "layers B S K H")
        batch, capacity, heads, head_dim = self.key.shape[-4:]
        check_axes("key", key, "B T K H", B=batch, K=heads, H=head_dim)
        check_axes("value", value, "B T K H", B=batch, T=key.shape[1], K=heads, H=head_dim)
        check_dtype("key", key, jnp.floating, "floating")
        check_dtype("value", value, jnp.floating, "floating")
        max_window = None if max_window is None else check_integer("max_window", max_window, least=1)
        tokens = key.shape[1]
        if mask is None:
            real = jnp.ones((batch, tokens), bool)
        else:
            real = check_mask("mask", mask, "B T", B=batch, T=tokens)
        slots = self.num_tokens[:, None] + jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1
        if self.sinks is not None:
            recent = capacity - self.sinks
            slots = jnp.where(slots < self.sinks, slots, self.sinks + (slots - self.sinks) % recent)
        after = dataclasses.replace(
            self, num_tokens=self.advance("key", tokens, None if mask is None else real, max_window=max_window)
        )

        slots = jnp.where(real, slots, capacity)  # slot S does not exist: dropped
        where: tuple[jax.Array, ...] = jnp.arange(batch, dtype=jnp.int32)[:, None], slots
        where = where if self.layer is None else (self.layer, *where)

        def put(kept, new):
            new = quantize(new, kept.dtype) if isinstance(kept, Quantized) else new
            return jax.tree.map(lambda a, b: a.at[where].set(b.astype(a.dtype), mode="drop"), kept, new)

        return dataclasses.replace(after, key=put(self.key, key), value=put(self.value, value))

    def read(self, dtype) -> tuple[jax.Array, jax.Array]:
        """Keys and values ``[B, S, K, H]`` in this dtype, those of free slots among them."""
        held = self.key, self.value
        if self.layer is not None:
            held = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, self.layer, keepdims=False), held)
        key, value = (each.astype(dtype) for each in held)
        return key, value

    def rerotate(self, rope: Rope, length, *, growing: bool = False, in_line: bool = True) -> "KVCache":
        """Rotated keys, as if turned by the frequencies for ``length`` tokens, where these depend on it.

        It is :meth:`Rope.rerotate` of every key, which stands at its place in line, from the frequencies that it is
        turned by. A step at which no row switches costs nothing. Leaves may have a leading axis of layers, all of
        this rope.

        Args:
          rope: of the keys.
          length: integers, ``[]`` or ``[B]``, at least 1.
          growing: whether it changes with every token, so that only a choice among fixed frequencies will do.
          in_line: whether keys stand at their place in line; others do not move.

        Raises:
          ValueError: if keys are stored in eight bits, or the frequencies are not a choice among fixed ones
            (:class:`DynamicNTK`) and the length is another than before. Where only run time knows that, such a row
            is ``overflowed`` from then on.
        """
        if isinstance(self.key, Quantized):
            raise ValueError(
                "rotated must be False where eight bits are stored and frequencies depend on the length, "
                "got a cache of rotated ones"
            )
        many = self.num_tokens.ndim == 2
        one = self.with_one_count() if many else self
        length = device_array("length", length)
        check_dtype("length", length, jnp.integer, "integer")
        check_axes("length", length, "B" if length.ndim else "", B=one.turned.shape[0])
        new = jnp.broadcast_to(as_int32(length), one.turned.shape)
        old = jnp.where(one.turned == 0, new, one.turned)
        after = dataclasses.replace(self, turned=jnp.broadcast_to(new, self.turned.shape))
        before, now = rope.frequencies(old), rope.frequencies(new)
        if in_line and isinstance(before, FrequencyChoice) and isinstance(now, FrequencyChoice):
            places = one.order(one.num_tokens)
            turn = functools.partial(rope.rerotate, positions=places, old_length=old, new_length=new)
            switched = jnp.any(before.index != now.index)
            key = jax.lax.cond(switched, jax.vmap(turn) if many else turn, lambda key: key, self.key)
            return dataclasses.replace(after, key=key)
        if growing:
            raise ValueError(
                "keys must be stored unrotated, init_cache(rotated=False), with a schedule that is no choice "
                f"among fixed frequencies, got {type(rope.schedule).__name__}"
            )
        if known_any(old != new):
            raise ValueError(
                f"length must stay {old.tolist()} where keys are stored rotated by the frequencies of "
                f"{type(rope.schedule).__name__}{'' if in_line else ' to positions that were given'}, "
                f"got {new.tolist()}: see init_cache(rotated=False)"
            )
        return dataclasses.replace(after, num_tokens=jnp.where(old != new, self._too_long, self.num_tokens))

    def shift(self, by) -> "KVCache":
        """Every token of a row, ``by`` positions later (on every axis): for those who give positions of their own.

        Nothing is turned: only ``m - n`` counts, and ``(m - by) - n = m - (n + by)``, so that queries stand ``by``
        earlier instead. However many shifts, the keys are what they were, to the bit. Where positions are counted,
        what comes next moves along, and a shift changes nothing.

        Args:
          by: integers, ``[]`` or ``[B]``; negative is earlier.

        Example:
          >>> import jax.numpy as jnp, rope_jax
          >>> cache = rope_jax.init_cache(batch=2, capacity=8, num_kv_heads=1, head_dim=4)
          >>> cache.shift(-3).shift(jnp.array([0, 1])).shifted.tolist()
          [-3, -2]
        """
        by = device_array("by", by)
        check_dtype("by", by, jnp.integer, "integer")
        if known_any(as_int32(by).astype(by.dtype) != by):
            raise ValueError(f"by must fit in int32, got {by.tolist()}")
        check_axes("by", by, "B" if by.ndim else "", B=self.num_tokens.shape[-1])
        return dataclasses.replace(self, shifted=self.shifted + as_int32(by))

    def truncate(self, length) -> "KVCache":
        """Each row without the tokens from number ``length`` on: what a draft wrote and the model rejected.

        Rows that have fewer stay as they are, ``overflowed`` ones too. Nothing is moved: what comes next takes the
        slots. If one of them holds NaN, the row is NaN still, as its values are read with weight 0.

        Args:
          length: integers, ``[]`` or ``[B]``.

        Raises:
          TypeError: if the length is not an integer.
          ValueError: if it is negative, or if rows have evicted tokens: what they held in these slots before is
            gone. Where only run time knows that, such a row is ``overflowed`` from then on.

        Example:
          >>> import jax.numpy as jnp, rope_jax
          >>> cache = rope_jax.init_cache(batch=2, capacity=8, num_kv_heads=1, head_dim=4)
          >>> kv = jnp.ones((2, 5, 1, 4))
          >>> cache.write(kv, kv).truncate(jnp.array([3, 7])).num_tokens.tolist()
          [3, 5]
        """
        length = device_array("length", length)
        check_dtype("length", length, jnp.integer, "integer")
        check_axes("length", length, "B" if length.ndim else "", B=self.num_tokens.shape[-1])
        if known_any(length < 0):
            raise ValueError(f"length must be 0 or more, got {length.tolist()}")
        shorter = jnp.minimum(self.num_tokens, as_int32(length))
        lost = (length < 0) | self.overflowed
        if self.sinks is not None:
            evicted = (self.num_tokens > self.capacity) & (shorter < self.num_tokens)
            if known_any(evicted):
                raise ValueError(
                    f"length must keep what rows that evicted tokens hold, {self.num_tokens.tolist()}, "
                    f"got {length.tolist()}"
                )
            lost |= evicted
        return dataclasses.replace(self, num_tokens=jnp.where(lost, self._too_long, shorter))

    def select_rows(self, rows) -> "KVCache":
        """The cache of these rows, in this order: of the beams that go on, or one prompt's for many answers.

        Args:
          rows: integers ``[B']`` in ``[0, B)``. One outside, where only run time knows it, gives a row of NaN.

        Raises:
          TypeError: if they are not integers.
          ValueError: if one is known to be outside.

        Example:
          >>> import jax.numpy as jnp, rope_jax
          >>> cache = rope_jax.init_cache(batch=2, capacity=8, num_kv_heads=1, head_dim=4)
          >>> cache.select_rows(jnp.array([1, 1, 0])).num_tokens.shape
          (3,)
        """
        rows = device_array("rows", rows)
        check_dtype("rows", rows, jnp.integer, "integer")
        check_axes("rows", rows, "B")
        rows, batch = as_int32(rows), self.num_tokens.shape[-1]
        outside = (rows < 0) | (rows >= batch)
        if known_any(outside):
            raise ValueError(f"rows must be in [0, B={batch}), got {rows.tolist()}")
        axis = self.num_tokens.ndim - 1
        taken = jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=axis, mode="clip"), self)
        return dataclasses.replace(taken, num_tokens=jnp.where(outside, self._too_long, taken.num_tokens))

    def grow(self, capacity: int) -> "KVCache":
        """The same rows with room for more tokens. Another capacity is another shape: what reads it compiles again.

        Raises:
          ValueError: if the capacity is below S, or the cache evicts: its tokens would lie in other slots.
          TypeError: if it is not an integer.

        Example:
          >>> import rope_jax
          >>> rope_jax.init_cache(batch=2, capacity=8, num_kv_heads=1, head_dim=4).grow(16).capacity
          16
        """
        if not jax.export.is_symbolic_dim(capacity):
            check_integer("capacity", capacity)
        if self.sinks is not None:
            raise ValueError(f"capacity must stay S={self.capacity} where tokens are evicted, got {capacity}")
        if capacity < self.capacity:
            raise ValueError(f"capacity must be at least S={self.capacity}, got {capacity}")
        axis, room = self.num_tokens.ndim, capacity - self.capacity

        def padded(leaf):
            return jnp.pad(leaf, [(0, room if i == axis else 0) for i in range(leaf.ndim)])

        key, value = jax.tree.map(padded, (self.key, self.value))
        # What was dropped does not come back.
        length = jnp.where(self.overflowed, jnp.int32(capacity + 1), self.num_tokens)
        return dataclasses.replace(self, key=key, value=value, num_tokens=length)


def check_cache(cache) -> None:
    """Raises TypeError unless it is one."""
    if not isinstance(cache, KVCache):
        raise TypeError(f"cache must be a KVCache, of init_cache, got {type(cache).__name__}")


def init_cache(
    *,
    batch: int,
    capacity: int,
    num_kv_heads: int,
    head_dim: int,
    dtype=jnp.float32,
    sinks: int | None = None,
    rotated: bool = True,
    rope: Hashable = None,
) -> KVCache:
    """An empty cache.

    Args:
      batch: B.
      capacity: S, the most tokens a row can hold, prompt and answer together.
      num_kv_heads: K.
      head_dim: H.
      dtype: what keys and values are stored in: floating, or int8 with a scale for each head and token; see
        :func:`quantize` for the error of eight bits.
      sinks: a full row evicts its oldest token, but for this many at its start; None for a row that overflows.
        With 0 it is a ring: a sliding window of S tokens. More are attention sinks (Xiao et al. 2023): positions
        are then those inside the cache, so that keys must be stored unrotated.
      rotated: whether keys are stored rotated, as suits a rope whose frequencies do not depend on the length: a
        key is rotated once. Else they are rotated whenever they are read, at the frequencies and the position of
        the moment.
      rope: the recipe of the keys: layers of another one refuse the cache.

    Returns:
      :class:`KVCache` of zeros ``[B, S, K, H]``, and length 0.

    Raises:
      ValueError: if a size is below 1, the sinks leave no room, or keys are rotated beside sinks.
      TypeError: if a size is not an integer, or the dtype is neither a float of 16 bits or more nor one that
        :func:`quantize` takes.

    Example:
      >>> import rope_jax
      >>> rope_jax.init_cache(batch=1, capacity=16, num_kv_heads=2, head_dim=64).key.shape
      (1, 16, 2, 64)
    """
    sizes = {"batch": batch, "capacity": capacity, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    for name, size in sizes.items():
        if not jax.export.is_symbolic_dim(size):
            check_integer(name, size, least=1)
    if sinks is not None:
        sinks = check_integer("sinks", sinks, least=0)
        if not jax.export.is_symbolic_dim(capacity) and sinks >= capacity:
            raise ValueError(f"sinks must be below the capacity S={capacity}, got {sinks}")
    if not isinstance(rotated, bool):
        raise TypeError(f"rotated must be True or False, got {rotated!r}")
    if sinks and rotated:
        raise ValueError(f"rotated must be False with sinks, which move with the window, got True with {sinks}")
    shape = (batch, capacity, num_kv_heads, head_dim)

    def empty():  # a buffer each: a donated buffer must not be donated again
        if is_narrow(dtype):
            return Quantized(jnp.zeros(shape, dtype), jnp.zeros(shape[:-1], jnp.float32))
        zeros = jnp.zeros(shape, dtype)
        check_dtype("dtype", zeros, jnp.floating, "floating or int8")
        return zeros

    length, shifted, turned = (jnp.zeros((batch,), jnp.int32) for _ in range(3))
    return KVCache(empty(), empty(), length, shifted, turned, sinks, rotated, rope)
