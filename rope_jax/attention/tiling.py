"""Cuts queries, keys and the facts between them into blocks, and puts blocks together again.

A block of queries is ``[B, K, G, t, H]``, where the G = N/K query heads of a key head lie together, a block of keys
``[B, K, s, H]``, and a block of scores ``[B, K, G, t, s]``.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rope_jax.attention.facts import Facts
from rope_jax.attention.mask import attention_mask, distances
from rope_jax.attention.memory_order import in_order
from rope_jax.core.primitive import wide_dtype


class BlockSizes(NamedTuple):
    """How attention is cut into blocks.

    Attributes:
      queries: tokens of a block.
      keys: tokens of a block.
      guard_cache: whether to keep XLA from reading the whole cache before the loop over blocks. XLA for CPUs
        otherwise copies a cache of narrow floats to float32.
      by_reduction: whether to multiply and add instead of taking a matrix product. XLA for GPUs then reads a block
        of the cache in place, which it copies for a matrix product.
    """

    queries: int
    keys: int
    guard_cache: bool = False
    by_reduction: bool = False


class Extras(NamedTuple):
    """Differentiable operands beside q, k and v, or their gradients."""

    bias: Any = None  # [B or 1, N or 1, T or 1, S]
    params: Any = None  # of the position bias


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Cuts operands into blocks, by the number i of a block of queries and j of a block of keys.

    The last block begins early enough to be whole. It repeats tokens of the block before, which are masked.
    """

    q: jax.Array
    k: Any
    v: Any
    layer: jax.Array | None
    facts: Facts
    sizes: BlockSizes
    differentiable: bool = False

    @property
    def dtype(self):
        return wide_dtype(self.q)

    def product(self, subscripts: str, a, b) -> jax.Array:
        """An einsum, summed in the dtype of scores.

        The axes G and t are one axis of the product: XLA for CPUs is slow at products of a single token otherwise.
        """
        operands, result = subscripts.split("->")
        sizes = dict(zip(operands.split(",")[0], a.shape, strict=True))

        def merge(x, letters):
            return x.reshape(*x.shape[:2], -1, x.shape[4]) if "gt" in letters else x

        merged = [merge(x, letters) for x, letters in zip((a, b), operands.split(","), strict=True)]
        if self.sizes.by_reduction and (operands, result) in _REDUCTIONS:
            out = _reduced(merged[0], merged[1], _REDUCTIONS[operands, result], self.dtype)
            return out.reshape(*out.shape[:2], sizes["g"], sizes["t"], out.shape[-1])
        out = jnp.einsum(subscripts.replace("gt", "r"), *merged, preferred_element_type=self.dtype)
        return out.reshape(*out.shape[:2], sizes["g"], sizes["t"], out.shape[-1]) if "gt" in result else out

    @property
    def length(self):
        return self.q.shape[2]

    @property
    def kv_length(self):
        return self.k.shape[-2]

    @property
    def kv_heads(self) -> int:
        return self.k.shape[-3]

    @property
    def group(self) -> int:
        """G, the query heads of a key head."""
        return self.q.shape[1] // self.kv_heads

    @property
    def num_queries(self):
        """Blocks of queries."""
        return -(-self.length // self.sizes.queries)

    @property
    def num_keys(self):
        """Blocks of keys."""
        return -(-self.kv_length // self.sizes.keys)

    def over_queries(self, body: Callable, zeros):
        """``body(i, carry)`` for each block of queries, from a carry of zeros."""
        if self.num_queries == 1:
            return body(0, zeros)
        if self.differentiable:
            step = jax.checkpoint(lambda carry, i: (body(i, carry), None), prevent_cse=False)
            return lax.scan(step, zeros, jnp.arange(self.num_queries, dtype=jnp.int32))[0]
        return lax.fori_loop(jnp.int32(0), jnp.int32(self.num_queries), body, zeros)

    def over_keys(self, i, visit: Callable, state):
        """``visit(j, state)`` for each block of keys that block i of queries may read."""
        if self.num_keys == 1:
            return visit(0, state)
        first, end = self._key_range(i)
        if not self.differentiable:
            return lax.fori_loop(first, end, visit, state)

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def step(state, j):
            seen = (j >= first) & (j < end)
            return lax.cond(seen, lambda state: visit(j, state), lambda state: state, state), None

        return lax.scan(step, state, jnp.arange(self.num_keys, dtype=jnp.int32))[0]

    def _key_range(self, i):
        """The first block of keys that block i of queries may read, and the end of the last: int32 ``[]``."""
        facts = self.facts
        starts = jnp.minimum(
            jnp.arange(self.num_keys, dtype=jnp.int32) * self.sizes.keys, self.kv_length - self.sizes.keys
        )
        slots = starts[:, None] + jnp.arange(self.sizes.keys, dtype=jnp.int32)

        def extremes(of_queries, of_keys):
            """Lowest and highest of a block of queries ``[B or 1, 1]`` and of all blocks of keys."""
            of_keys = of_keys[:, slots]
            lows = of_queries.min(axis=-1, keepdims=True), of_keys.min(axis=-1)
            return *lows, of_queries.max(axis=-1, keepdims=True), of_keys.max(axis=-1)

        visible = jnp.ones((1, self.num_keys), bool)
        if facts.causal or facts.window is not None:
            low, key_low, high, key_high = extremes(self.query_index(i), facts.key_indices(self.kv_length))
            if facts.causal:
                visible &= high >= key_low
            if facts.window is not None:
                near = (low - key_high < facts.window) & (high - key_low > -facts.window)
                visible &= near | (key_low < facts.num_sink_tokens) if facts.num_sink_tokens else near
        if facts.segments is not None:
            segments = self._cut(facts.segments, i, self.sizes.queries, 1)
            low, key_low, high, key_high = extremes(segments, facts.segments)
            visible &= (low <= key_high) & (high >= key_low)
        visible = visible.any(axis=0)
        first = jnp.argmax(visible).astype(jnp.int32)
        end = self.num_keys - jnp.argmax(visible[::-1]).astype(jnp.int32)
        return first, jnp.where(visible.any(), end, first)

    # ------------------------------------------------------------------------------------------ cutting operands

    def _start(self, number, size, length):
        """The first token of a block."""
        return 0 if size == length else jnp.minimum(number * size, length - size)

    def _cut(self, x, number, size, axis):
        """Block ``number`` of x along an axis."""
        length = x.shape[axis]
        return x if size == length else lax.dynamic_slice_in_dim(x, self._start(number, size, length), size, axis)

    def queries(self, x, i):
        """Block i of ``[B, N, T, ...]``, as ``[B, K, G, t, ...]``."""
        block = self._cut(x, i, self.sizes.queries, 2)
        return block.reshape(block.shape[0], self.kv_heads, self.group, *block.shape[2:])

    def keys(self, x, j):
        """Block j of keys or values, ``[B, K, s, H]`` in q's dtype."""
        axis = 2 if self.layer is None else 3
        if self.layer is not None and self.sizes.guard_cache:
            x, j = lax.optimization_barrier((x, j))

        def cut(leaf):
            if self.layer is None:
                return self._cut(leaf, j, self.sizes.keys, axis)
            start = jnp.asarray(self._start(j, self.sizes.keys, leaf.shape[axis]), jnp.int32)
            starts = [self.layer] + [start if a == axis else jnp.int32(0) for a in range(1, leaf.ndim)]
            shape = [1] + [self.sizes.keys if a == axis else leaf.shape[a] for a in range(1, leaf.ndim)]
            return lax.dynamic_slice(leaf, starts, shape)[0]

        return jax.tree.map(cut, x).astype(self.q.dtype)

    def query_index(self, i):
        """Sequence indices of block i of queries, int32 ``[B or 1, t]``."""
        return self._index(self.facts.query_index, i, self.sizes.queries, self.length)

    def key_index(self, j):
        """Sequence indices of block j of keys, int32 ``[B or 1, s]``."""
        return self._index(self.facts.key_index, j, self.sizes.keys, self.kv_length)

    def _bias_key_index(self, j):
        index = self.facts.bias_key_index
        return self.key_index(j) if index is None else self._cut(index, j, self.sizes.keys, 1)

    def _index(self, index, number, size, length):
        if index is None:
            return (self._start(number, size, length) + jnp.arange(size, dtype=jnp.int32))[None]
        return self._cut(index, number, size, 1)

    def _pair(self, x, i, j):
        """Block i, j of ``[B or 1, N or 1, T or 1, S]``."""
        x = self._cut(x, i, self.sizes.queries, 2) if x.shape[2] != 1 else x
        return self._cut(x, j, self.sizes.keys, 3)

    def _grouped(self, x):
        """``[B or 1, N or 1, t or 1, s]`` as ``[B or 1, K or 1, G or 1, t or 1, s]``."""
        heads = (1, 1) if x.shape[1] == 1 else (self.kv_heads, self.group)
        return x.reshape(x.shape[0], *heads, *x.shape[2:])

    # ----------------------------------------------------------------------------------------------------- scores

    def extras(self, i, j, extras: Extras | None = None) -> Extras:
        """Block i, j of the bias, and the parameters of the position bias, by default those of the facts."""
        if extras is None:
            position_bias = self.facts.position_bias
            extras = Extras(self.facts.bias, None if position_bias is None else position_bias.params)
        return extras._replace(bias=None if extras.bias is None else self._pair(extras.bias, i, j))

    def scores(self, i, j) -> Callable[[jax.Array, Extras], jax.Array]:
        """A function of q.k and extras: the scores, -inf at masked entries."""
        facts = self.facts
        scale = self.q.shape[-1] ** -0.5 if facts.scale is None else facts.scale
        allowed = self._allowed(i, j)

        def finish(raw, extras: Extras):
            scores = raw * jnp.asarray(scale, raw.dtype)
            if facts.logit_cap is not None:
                cap = jnp.asarray(facts.logit_cap, raw.dtype)
                scores = cap * jnp.tanh(scores / cap)
            if extras.bias is not None:
                scores += self._grouped(extras.bias).astype(raw.dtype)
            if facts.position_bias is not None:
                bias = dataclasses.replace(facts.position_bias, params=extras.params)
                distance = distances(self.query_index(i), self._bias_key_index(j))
                scores += self._grouped(bias(distance)).astype(raw.dtype)
            return scores if allowed is None else jnp.where(allowed, scores, -jnp.inf)

        return finish

    def _allowed(self, i, j):
        """The mask of a pair of blocks, bool ``[B or 1, K or 1, G or 1, t, s]``; None if all is visible."""
        facts, conditions = self.facts, []
        if facts.causal or facts.window is not None:
            conditions.append(
                attention_mask(
                    self.query_index(i),
                    self.key_index(j),
                    causal=facts.causal,
                    window=facts.window,
                    num_sink_tokens=facts.num_sink_tokens,
                )
            )
        if facts.segments is not None:
            queries = self._cut(facts.segments, i, self.sizes.queries, 1)
            keys = self._cut(facts.segments, j, self.sizes.keys, 1)
            conditions.append((queries[:, :, None] == keys[:, None, :])[:, None])
        if facts.mask is not None:
            conditions.append(self._pair(facts.mask, i, j))
        for number, size, length, axis in (
            (i, self.sizes.queries, self.length, 2),
            (j, self.sizes.keys, self.kv_length, 3),
        ):
            if (new := self._new(number, size, length)) is not None:
                conditions.append(lax.expand_dims(new, [a for a in range(4) if a != axis]))
        return functools.reduce(jnp.logical_and, map(self._grouped, conditions)) if conditions else None

    def _new(self, number, size, length):
        """Which tokens of a block are not in the block before, bool ``[size]``; None if all are new."""
        if length % size == 0:
            return None
        return self._start(number, size, length) + jnp.arange(size, dtype=jnp.int32) >= number * size

    def drop(self, weights, i, j):
        """Dropout of weights ``[B, K, G, t, s]``: the same tokens in each block, whatever its size."""
        facts = self.facts
        if facts.dropout_key is None:
            return weights
        starts = (
            self._start(i, self.sizes.queries, self.length),
            self._start(j, self.sizes.keys, self.kv_length),
        )
        keep = 1.0 - facts.dropout_rate
        kept = _random_bits(facts, weights.shape, starts) < jnp.uint32(int(keep * 2.0**32))
        return jnp.where(kept, weights / jnp.asarray(keep, weights.dtype), 0)

    # ---------------------------------------------------------------------------------------------------- results

    def put(self, totals, i, blocks):
        """Adds blocks ``[B, K, G, t, ...]`` to totals of zeros ``[B, N, T, ...]``; repeated queries add nothing."""
        new = self._new(i, self.sizes.queries, self.length)

        def put(total, block):
            block = block.reshape(*total.shape[:2], *block.shape[3:])
            if self.num_queries == 1:
                return block
            start = self._start(i, self.sizes.queries, self.length)
            if new is not None:
                new_rows = lax.expand_dims(new, [0, 1, *range(3, block.ndim)])
                block = jnp.where(new_rows, block, lax.dynamic_slice_in_dim(total, start, block.shape[2], 2))
            return lax.dynamic_update_slice_in_dim(total, block, start, 2)

        return jax.tree.map(put, totals, blocks)

    def add_keys(self, total, j, block):
        """Adds a block of keys, whose repeated keys are 0."""
        return _add(total, block, {2: self._start(j, self.sizes.keys, self.kv_length)})

    def add_extras(self, total: Extras, i, j, block: Extras) -> Extras:
        """Adds the gradients of extras from one pair of blocks."""
        params = jax.tree.map(lambda a, b: a + b.astype(a.dtype), total.params, block.params)
        if total.bias is None:
            return Extras(None, params)
        starts = {3: self._start(j, self.sizes.keys, self.kv_length)}
        if total.bias.shape[2] != 1:
            starts[2] = self._start(i, self.sizes.queries, self.length)
        return Extras(_add(total.bias, block.bias, starts), params)


# The axis that a product sums over, of [b, k, gt, s, h].
_REDUCTIONS = {("bkgth,bksh", "bkgts"): 4, ("bkgts,bksh", "bkgth"): 3}


def _random_bits(facts: Facts, shape, starts) -> jax.Array:
    """uint32 ``[B, K, G, t, s]``, each from the number of its head, query and key."""
    assert facts.dropout_key is not None
    key = jax.random.wrap_key_data(facts.dropout_key, impl=facts.dropout_impl)
    # Threefry, since other generators are slow for a key of each entry.
    key = jax.random.wrap_key_data(jax.random.bits(key, (2,), jnp.uint32), impl="threefry2x32")
    for start, size in zip((0, *starts), (math.prod(shape[:3]), *shape[3:]), strict=True):
        key = _fold_in_each(key, start + jnp.arange(size, dtype=jnp.int32))
    return jax.random.key_data(key)[..., 0].reshape(shape)


def _fold_in_each(keys, numbers) -> jax.Array:
    """Folds each of the numbers ``[n]`` in each of the keys ``[...]``: keys ``[..., n]``."""
    fold = jax.random.fold_in if keys.ndim == 0 else _fold_in_each
    return jax.vmap(fold, (None, 0) if keys.ndim == 0 else (0, None))(keys, numbers)


def _reduced(a, b, axis: int, dtype) -> jax.Array:
    """The product of ``a [b, k, gt, h or s]`` and ``b [b, k, s, h]``, summed over h (axis 4) or s (axis 3)."""
    product = jnp.expand_dims(a.astype(dtype), 7 - axis) * b[:, :, None].astype(dtype)
    # Sums over s would otherwise be given the transposed cache.
    return in_order(product).sum(axis)


def _add(total, block, starts: dict) -> jax.Array:
    """Adds a block to a larger array; ``starts`` by axis, 0 if left out."""
    block = block.astype(total.dtype)
    if total.shape == block.shape:
        return total + block
    index = [jnp.asarray(starts.get(axis, 0), jnp.int32) for axis in range(total.ndim)]
    old = lax.dynamic_slice(total, index, block.shape)
    return lax.dynamic_update_slice(total, old + block, index)
