"""Attention over a sequence sharded across devices.

Context parallelism: each device holds part of the tokens of every row. Keys and values travel around a ring of
devices, together with the sequence index of each token, which decides causality and windows.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from rope_jax._checks import check_axes, check_dtype, check_integer, device_array
from rope_jax.attention import blocks
from rope_jax.attention.attend import check_options, checked_scores, fold_traced_scale
from rope_jax.attention.facts import Facts
from rope_jax.attention.mask import checked_sequence_index, window_size
from rope_jax.attention.tiling import BlockSizes
from rope_jax.core.explicit import by_xla, spec_of
from rope_jax.core.primitive import unify_varying_axes, wide_dtype


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
    "Ring Attention with Blockwise Transformers", section 3). A device attends to each part in blocks, as
    :func:`attend` does, and joins the outputs in float32 by the logs of their sums. The gradients of keys and
    values travel with them, in float32, back to their device. Memory per device is its share of q, k, v and their
    gradients, and a single block of scores ``[B, N, block, block]``. Blocks that are masked for all queries are
    skipped: equally many on every device with :func:`zigzag_sequence_index`.

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
    batch, length = q.shape[:2]
    check_axes("k", k, "B T K H", T=length)
    check_axes("v", v, "B T K H", B=batch, T=length, K=k.shape[2], H=k.shape[3])
    check_dtype("v", v, jnp.floating, "floating")
    sequence_index = checked_sequence_index(sequence_index, batch, length)
    check_options(logit_cap)
    window = window_size(window)
    q, scale = fold_traced_scale(q, scale)
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
        mapped = jax.shard_map(
            lambda q, k, v, sequence_index, window: ring(q, k, v, sequence_index, window=window),
            in_specs=(sharded, sharded, sharded, sharded, replicated),
            out_specs=sharded,
            axis_names={axis_name},
        )
        rows, _, *heads = spec_of(q)
        return by_xla(mapped, PartitionSpec(rows, axis_name, *heads))(q, k, v, sequence_index, window)

    chunk = length // 2 if length % 2 == 0 else length  # a block must not straddle the two chunks of zigzag
    block = next(size for size in range(min(block_size, chunk), 0, -1) if chunk % size == 0)
    known, traced = (window, None) if isinstance(window, int) else (None, window)
    facts = Facts(causal=causal, window=known, scale=scale, logit_cap=logit_cap)
    options = _Options(axis_name, BlockSizes(block, block), facts)
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    q, k, v, sequence_index = unify_varying_axes(q, k, v, sequence_index)
    return _ring_attention(q, k, v, sequence_index, traced, options).swapaxes(1, 2)


class _Options(NamedTuple):
    """The static options of :func:`ring_attention`."""

    axis_name: str
    sizes: BlockSizes
    facts: Facts  # without arrays, and without a traced window

    def facts_of(self, query_index, key_index, window) -> Facts:
        window = self.facts.window if window is None else window
        return dataclasses.replace(self.facts, query_index=query_index, key_index=key_index, window=window)


class _Keys(NamedTuple):
    """Keys and values, which travel around the ring."""

    k: jax.Array  # [B, K, S, H]
    v: jax.Array  # [B, K, S, H]
    sequence_index: jax.Array  # [B or 1, S]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _ring_attention(q, k, v, sequence_index, window, options: _Options):
    """Attention ``[B, N, T, H]`` of arrays with heads first."""
    return _forward(q, k, v, sequence_index, window, options)[0]


def _forward(q, k, v, sequence_index, window, options: _Options):
    # Makes the masks depend on q. Otherwise the gradient of a scan over layers would compute the masks of all
    # blocks before the scan, and store them: T x T.
    sequence_index, _ = lax.optimization_barrier((sequence_index, q[0, 0, 0, 0]))

    def attend_to(state, keys: _Keys):
        out, maximum, log_sum = state
        facts = options.facts_of(sequence_index, keys.sequence_index, window)
        new = blocks.forward(q, keys.k, keys.v, None, facts, options.sizes, dtype=out.dtype)
        new_log = jnp.where(new[2] == jnp.inf, -jnp.inf, new[2])  # queries that read none of these keys
        top = jnp.maximum(maximum, new[1])
        logs = maximum - top + log_sum, new[1] - top + new_log
        both = jnp.logaddexp(*logs)
        old_share, new_share = (jnp.exp(log - both)[..., None] for log in logs)
        return (old_share * out + new_share * new[0], top, both), None

    # Each query reads its own key on its own device, so that the log of the sum is finite from then on.
    dtype = wide_dtype(q)
    numbers = functools.partial(jnp.full_like, q[..., 0], dtype=dtype)
    start = jnp.zeros_like(q, dtype), numbers(jnp.finfo(dtype).min), numbers(-jnp.inf)
    keys = _Keys(k, v, sequence_index)
    (out, maximum, log_sum), _ = _pass_keys_around_ring(attend_to, start, keys, None, options.axis_name)
    out = out.astype(q.dtype)
    return out, (q, k, v, sequence_index, window, out, maximum, log_sum)


def _backward(options: _Options, residuals, dout):
    q, k, v, sequence_index, window, out, maximum, log_sum = residuals

    def differentiate(dq, keys: _Keys):
        facts = options.facts_of(sequence_index, keys.sequence_index, window)
        operands = q, keys.k, keys.v, facts, out, maximum, log_sum, dout, None, options.sizes
        new, dk, dv, _ = blocks.backward(*operands, dtype=dq.dtype)
        return dq + new, (dk, dv)

    dq, dk, dv = (jnp.zeros_like(x, wide_dtype(x)) for x in (q, k, v))
    keys = _Keys(k, v, sequence_index)
    dq, (dk, dv) = _pass_keys_around_ring(differentiate, dq, keys, (dk, dv), options.axis_name)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None


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
