"""Attention over a sequence sharded across devices.

Context parallelism: each device holds part of the tokens of every row. Keys and values travel around a ring of
devices, together with the sequence index of each token, which decides causality and windows.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from rope_jax._checks import check_axes, check_dtype, check_integer, check_real, device_array
from rope_jax.attention.attend import check_options, checked_scores
from rope_jax.attention.mask import attention_mask, checked_sequence_index, window_size
from rope_jax.core.primitive import unify_varying_axes


def ring_attention(
    q,
    k,
    v,
    sequence_index,
    *,
    axis_name: str,
    causal: bool = False,
    window: int | jax.Array | None = None,
    scale: float | None = None,
    logit_cap: float | None = None,
    block_size: int = 512,
) -> jax.Array:
    """:func:`attend` over tokens that are sharded along a mesh axis; no device ever holds all of them.

    Each device keeps its queries, and sends keys, values and their sequence index around the ring (Liu et al. 2023,
    "Ring Attention with Blockwise Transformers", section 3). Each block of scores updates a running maximum, sum
    and output in float32 (Milakov and Gimelshein 2018, section 3; Rabe and Staats 2021, section 2) and is
    discarded. The backward pass recomputes it from the log of the sum. The gradients of keys and values travel with
    them, in float32, back to their device. Memory per device is its share of q, k, v and their gradients, and a
    single block of scores ``[B, N, block, block]``. Blocks that are masked for all queries are skipped: equally
    many on every device with :func:`zigzag_sequence_index`.

    Inside :func:`jax.shard_map` over the axis, the arrays are the device's own shard. Outside, they are global, and
    are mapped over this axis of the mesh in use (:func:`jax.set_mesh`); sharding of batch and heads along other
    axes is unchanged. Each of n devices sends k, v and sequence_index n - 1 times in the forward pass, and again in
    the backward pass, which also sends float32 dk and dv n + 1 times. No transfer depends on the computation beside
    it, so that the two can overlap.

    Args:
      q: ``[B, T, N, H]``, rotated.
      k: ``[B, T, K, H]``, rotated; N is a multiple of K.
      v: ``[B, T, K, H]``.
      sequence_index: integers ``[B or 1, T]``, for ``causal`` and ``window``: contiguous, zigzag or in any other
        order. Pass ``[1, T]`` if all rows have the same order. With ``[B, T]``, devices among which a mesh divides
        the batch must agree on which blocks to skip.
      axis_name: the mesh axis along which T is divided.
      causal: a query reads keys with its own sequence index or a lower index.
      window: a query reads keys whose sequence index differs from its own by less; an integer, which may be traced.
      scale: multiplies q.k; None is ``1/sqrt(H)``.
      logit_cap: soft bound of the scaled scores; see :func:`attention_weights`.
      block_size: the most tokens in a block of scores. The block is the largest divisor, up to ``block_size``, of
        half a device's tokens (of all its tokens if they are odd).

    Returns:
      ``[B, T, N, H]`` in q's dtype. Supports reverse-mode differentiation; forward mode is an error.

    Raises:
      TypeError: if q, k or v is not floating, or sequence_index, window or block_size is not an integer.
      ValueError: if shapes do not match, an option is out of range, the mesh in use has no such axis, or the
        devices along it do not divide T.

    Example:
      >>> import jax, jax.numpy as jnp, rope_jax
      >>> mesh = jax.make_mesh((1,), ("sequence",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> q, kv = jnp.ones((1, 8, 4, 16)), jnp.ones((1, 8, 2, 16))
      >>> sequence_index = rope_jax.attention.zigzag_sequence_index(8, 1)[None]
      >>> with jax.set_mesh(mesh):
      ...     rope_jax.attention.ring_attention(q, kv, kv, sequence_index, axis_name="sequence", causal=True).shape
      (1, 8, 4, 16)
    """
    q, k, _, _ = checked_scores(q, k, None, None)
    v = device_array("v", v)
    batch, length, _, head_dim = q.shape
    check_axes("k", k, "B T K H", T=length)
    check_axes("v", v, "B T K H", B=batch, T=length, K=k.shape[2], H=head_dim)
    check_dtype("v", v, jnp.floating, "floating")
    sequence_index = checked_sequence_index(sequence_index, batch, length)
    check_options(logit_cap)
    window, scale = window_size(window), check_real("scale", scale)
    if isinstance(scale, jax.core.Tracer):
        raise TypeError("scale must be a concrete number in ring_attention, got a traced number")
    block_size = check_integer("block_size", block_size, 1)
    if not length:
        raise ValueError(f"q must have at least one token, got shape {q.shape}")

    mesh = jax.sharding.get_abstract_mesh()
    if axis_name not in mesh.axis_names:
        raise ValueError(
            f"axis_name must be an axis of the mesh in use (jax.set_mesh), {mesh.axis_names}, got {axis_name!r}"
        )
    if axis_name not in mesh.manual_axes:
        if length % mesh.shape[axis_name]:
            raise ValueError(
                f"q must have T divisible by the {mesh.shape[axis_name]} devices along {axis_name!r}, "
                f"got T={length}"
            )
        ring = functools.partial(
            ring_attention,
            axis_name=axis_name,
            causal=causal,
            scale=scale,
            logit_cap=logit_cap,
            block_size=block_size,
        )
        sharded, replicated = PartitionSpec(None, axis_name), PartitionSpec()
        return jax.shard_map(
            lambda q, k, v, sequence_index, window: ring(q, k, v, sequence_index, window=window),
            in_specs=(sharded, sharded, sharded, sharded, replicated),
            out_specs=sharded,
            axis_names={axis_name},
        )(q, k, v, sequence_index, window)

    chunk = length // 2 if length % 2 == 0 else length  # a block must not straddle the two chunks of zigzag
    block = next(size for size in range(min(block_size, chunk), 0, -1) if chunk % size == 0)
    options = _Options(axis_name, causal, head_dim**-0.5 if scale is None else scale, logit_cap, block)
    q, k, v, sequence_index = unify_varying_axes(q, k, v, sequence_index)
    return _ring_attention(q, k, v, sequence_index, window, options)


class _Options(NamedTuple):
    """The static options of :func:`ring_attention`."""

    axis_name: str
    causal: bool
    scale: float
    logit_cap: float | None
    block: int


class _Queries(NamedTuple):
    """Blocks of queries, with the G = N/K query heads of a key head laid out along the token axis."""

    q: jax.Array  # [B, K, GT, H]
    sequence_index: jax.Array  # [B or 1, GT]
    dout: Any = None  # [B, K, GT, H]: only in the backward pass, like the rest
    log_total: Any = None  # float32 [B, K, GT], log of the sum of exp(scores)
    delta: Any = None  # float32 [B, K, GT], dout.out: the softmax subtracts it from the gradient of the weights


class _Keys(NamedTuple):
    """Blocks of keys and values, which travel around the ring."""

    k: jax.Array  # [B, K, S, H]
    v: jax.Array  # [B, K, S, H]
    sequence_index: jax.Array  # [B or 1, S]


class _RunningSoftmax(NamedTuple):
    """Softmax and output of some queries over the key blocks so far, in float32."""

    maximum: jax.Array  # [B, K, GT], the largest score; the lowest float32 before the first
    total: jax.Array  # [B, K, GT], sum of exp(score - maximum)
    out: jax.Array  # [B, K, GT, H], sum of exp(score - maximum) v


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _ring_attention(q, k, v, sequence_index, window, options: _Options):
    return _forward(q, k, v, sequence_index, window, options)[0]


def _forward(q, k, v, sequence_index, window, options: _Options):
    # Makes the masks depend on q. Otherwise the gradient of a scan over layers would compute the masks of all
    # blocks before the scan, and store them: T x T.
    sequence_index, _ = lax.optimization_barrier((sequence_index, q[0, 0, 0, 0]))
    queries, keys = _split_into_blocks(q, k, v, sequence_index, options)

    def attend_to(softmax, keys):
        return _scan_block_pairs(_accumulate_output, queries, keys, softmax, None, window, options)

    full = functools.partial(jnp.full_like, queries.q[..., 0], dtype=jnp.float32)
    # The maximum starts finite: in rows with a fully masked block, -inf - maximum must be -inf instead of NaN.
    softmax = _RunningSoftmax(full(jnp.finfo(jnp.float32).min), full(0.0), jnp.zeros_like(queries.q, jnp.float32))
    softmax, _ = _pass_keys_around_ring(attend_to, softmax, keys, None, options.axis_name)
    out = _from_blocks(softmax.out / softmax.total[..., None], q.shape).astype(q.dtype)
    return out, (q, k, v, sequence_index, window, out, softmax.maximum + jnp.log(softmax.total))


def _backward(options: _Options, residuals, dout):
    q, k, v, sequence_index, window, out, log_total = residuals
    queries, keys = _split_into_blocks(q, k, v, sequence_index, options)
    dout, out = (_to_blocks(x, k.shape[2], options.block) for x in (dout, out))
    delta = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    queries = queries._replace(dout=dout, log_total=log_total, delta=delta)

    dq, dk, dv = (jnp.zeros_like(x, jnp.float32) for x in (queries.q, keys.k, keys.v))

    def differentiate(dq, keys):
        return _scan_block_pairs(_accumulate_gradients, queries, keys, dq, (dk, dv), window, options)

    dq, dkv = _pass_keys_around_ring(differentiate, dq, keys, (dk, dv), options.axis_name)
    dq, dk, dv = (_from_blocks(dx, x.shape).astype(x.dtype) for dx, x in zip((dq, *dkv), (q, k, v), strict=True))
    return dq, dk, dv, None, None


_ring_attention.defvjp(_forward, _backward)


def _pass_keys_around_ring(compute, by_query, keys: _Keys, zeros, axis_name):
    """Applies ``by_query, by_key = compute(by_query, keys)`` to the keys of every device.

    Returns the last ``by_query``, and the sum over all devices of ``by_key`` for the device's own keys. The sum
    starts as ``zeros`` and travels a step behind its keys, so that every transfer can overlap with computation.
    """
    num_devices = lax.axis_size(axis_name)
    to_next = [(device, (device + 1) % num_devices) for device in range(num_devices)]
    send = functools.partial(lax.ppermute, axis_name=axis_name, perm=to_next)

    def step(state, _):
        by_query, keys, total = state
        next_keys, total = send((keys, total))
        by_query, by_key = compute(by_query, keys)
        return (by_query, next_keys, jax.tree.map(jnp.add, total, by_key)), None

    (by_query, keys, total), _ = lax.scan(step, (by_query, keys, zeros), length=num_devices - 1)
    total = send(total)
    by_query, by_key = compute(by_query, keys)
    return by_query, send(jax.tree.map(jnp.add, total, by_key))


def _scan_block_pairs(accumulate, queries: _Queries, keys: _Keys, by_query, by_key, window, options: _Options):
    """Applies ``by_query, by_key = accumulate(by_query, by_key, ...)`` to each visible pair of blocks.

    Queries, keys, by_query and by_key have a leading axis of blocks.
    """

    def scan_keys(by_key, query_block):
        queries, query_state = query_block

        def visit_pair(query_state, key_block):
            keys, key_state = key_block
            return lax.cond(
                _blocks_are_visible(queries.sequence_index, keys.sequence_index, window, options.causal),
                lambda query_state, key_state: accumulate(query_state, key_state, queries, keys, window, options),
                lambda query_state, key_state: (query_state, key_state),
                query_state,
                key_state,
            )

        query_state, by_key = lax.scan(visit_pair, query_state, (keys, by_key))
        return by_key, query_state

    by_key, by_query = lax.scan(scan_keys, by_key, (queries, by_query))
    return by_query, by_key


def _blocks_are_visible(query_index, key_index, window, causal: bool):
    """True if any query of a block may read any key of another, by their extreme indices: bool ``[]``.

    Conservative: a True block pair may still be fully masked.
    """
    largest = query_index.max(axis=-1) - key_index.min(axis=-1)
    smallest = query_index.min(axis=-1) - key_index.max(axis=-1)
    visible_rows = jnp.ones_like(largest, bool)
    if causal:
        visible_rows &= largest >= 0
    if window is not None:
        visible_rows &= (smallest < window) & (largest > -window)
    return jnp.any(visible_rows)


def _scores(queries: _Queries, keys: _Keys, window, options: _Options):
    """Scores, float32 ``[B, K, GT, S]`` with -inf at masked entries, and the derivative of the soft cap."""
    scores = options.scale * _product("bkth,bksh->bkts", queries.q, keys.k)
    slope = None
    if options.logit_cap is not None:
        bounded = jnp.tanh(scores / options.logit_cap)
        scores, slope = options.logit_cap * bounded, 1 - bounded**2
    allowed = attention_mask(queries.sequence_index, keys.sequence_index, causal=options.causal, window=window)
    return jnp.where(allowed, scores, -jnp.inf), slope


def _accumulate_output(softmax: _RunningSoftmax, _, queries: _Queries, keys: _Keys, window, options: _Options):
    """Adds a block of keys to the softmax and output of a block of queries."""
    scores, _ = _scores(queries, keys, window, options)
    maximum = jnp.maximum(softmax.maximum, scores.max(axis=-1))
    weights = jnp.exp(scores - maximum[..., None])
    rescale = jnp.exp(softmax.maximum - maximum)
    total = rescale * softmax.total + weights.sum(axis=-1)
    out = rescale[..., None] * softmax.out + _product("bkts,bksh->bkth", weights.astype(keys.v.dtype), keys.v)
    return _RunningSoftmax(maximum, total, out), None


def _accumulate_gradients(dq, dkv, queries: _Queries, keys: _Keys, window, options: _Options):
    """Adds the gradients of q, k and v from a pair of blocks."""
    dk, dv = dkv
    scores, slope = _scores(queries, keys, window, options)
    weights = jnp.exp(scores - queries.log_total[..., None])
    dv += _product("bkts,bkth->bksh", weights.astype(queries.dout.dtype), queries.dout)
    dweights = _product("bkth,bksh->bkts", queries.dout, keys.v)
    dscores = options.scale * weights * (dweights - queries.delta[..., None])
    if slope is not None:
        dscores *= slope
    dq += _product("bkts,bksh->bkth", dscores.astype(keys.k.dtype), keys.k)
    dk += _product("bkts,bkth->bksh", dscores.astype(queries.q.dtype), queries.q)
    return dq, (dk, dv)


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


# ------------------------------------------------------------------------------------------------ blocks of tokens


def _split_into_blocks(q, k, v, sequence_index, options: _Options) -> tuple[_Queries, _Keys]:
    """Blocks of queries and of keys, along a new leading axis."""
    key_index = sequence_index.reshape(sequence_index.shape[0], -1, options.block).swapaxes(0, 1)
    query_index = jnp.tile(key_index, q.shape[2] // k.shape[2])
    q, k, v = (_to_blocks(x, k.shape[2], options.block) for x in (q, k, v))
    return _Queries(q, query_index), _Keys(k, v, key_index)


def _to_blocks(x, kv_heads: int, block: int):
    """Reshapes ``[B, T, N, H]`` to ``[T/block, B, K, G block, H]``."""
    batch, length, heads, head_dim = x.shape
    x = x.reshape(batch, length // block, block, kv_heads, heads // kv_heads, head_dim)
    return x.transpose(1, 0, 3, 4, 2, 5).reshape(length // block, batch, kv_heads, -1, head_dim)


def _from_blocks(x, shape):
    """Reshapes ``[T/block, B, K, G block, H]`` to ``[B, T, N, H]``."""
    blocks, batch, kv_heads, _, head_dim = x.shape
    x = x.reshape(blocks, batch, kv_heads, shape[2] // kv_heads, -1, head_dim)
    return x.transpose(1, 0, 4, 2, 3, 5).reshape(shape)
