"""Attention in blocks of queries and keys, in plain JAX: memory grows with T + S, not with T S.

A running maximum, sum and output in float32 take in one block of keys after another (Milakov and Gimelshein 2018,
section 3; Rabe and Staats 2021, section 2). The backward pass computes the weights again from the log of the sum
(Dao et al. 2022, section 3.1). Blocks that no query may read are skipped.

Queries are ``[B, N, T, H]``, keys and values ``[B, K, S, H]``; the blocks of both are those of :class:`Tiling`.
"""

import functools

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from rope_jax.attention.facts import Facts
from rope_jax.attention.tiling import BlockSizes, Extras, Tiling
from rope_jax.core.explicit import by_xla, spec_of
from rope_jax.core.primitive import wide_dtype


def forward(q, k, v, layer, facts: Facts, sizes: BlockSizes, *, dtype=None) -> tuple[jax.Array, ...]:
    """The output ``[B, N, T, H]``, the maximum m of scores, and the log of the sum of exp(scores - m).

    Maximum and log are float32 ``[B, N, T]``, apart since their sum would lose the log beside large scores. A query
    without any key has output 0, and a log of +inf, so that its weights are 0 in the backward pass.

    Args:
      q: ``[B, N, T, H]``.
      k: ``[B, K, S, H]``, or ``[layers, B, K, S, H]`` with a layer; an array or :class:`Quantized`.
      v: likewise.
      layer: int32 ``[]``, which layer of k and v to read, or None.
      facts: which keys a query reads.
      sizes: of the tiles.
      dtype: of the output; q's if None.
    """
    tiles, dtype = Tiling(q, k, v, layer, facts, sizes), dtype or q.dtype

    def attend_to_all(i, carry):
        queries = tiles.queries(q, i)

        def visit(j, softmax):
            keys, values = tiles.keys(k, j), tiles.keys(v, j)
            scores = tiles.scores(i, j)(tiles.product("bkgth,bksh->bkgts", queries, keys), tiles.extras(i, j))
            # The maximum starts finite: with a fully masked block, -inf - maximum must be -inf instead of NaN.
            top = jnp.maximum(scores.max(axis=-1), jnp.finfo(scores.dtype).min)
            maximum = top if softmax is None else jnp.maximum(softmax[0], top)
            weights = jnp.exp(scores - maximum[..., None])
            total = weights.sum(axis=-1)
            weights = tiles.drop(weights, i, j).astype(values.dtype)
            out = tiles.product("bkgts,bksh->bkgth", weights, values)
            if softmax is not None:
                rescale = jnp.exp(softmax[0] - maximum)
                total += rescale * softmax[1]
                out += rescale[..., None] * softmax[2]
            return maximum, total, out

        zeros = jnp.zeros_like(queries, tiles.dtype)
        lowest = jnp.full_like(zeros[..., 0], jnp.finfo(tiles.dtype).min)
        start = None if tiles.num_keys == 1 else (lowest, zeros[..., 0], zeros)
        maximum, total, out = tiles.over_keys(i, visit, start)
        empty = total == 0
        out = (out / jnp.where(empty, 1, total)[..., None]).astype(dtype)
        log_sum = jnp.where(empty, jnp.inf, jnp.log(jnp.where(empty, 1, total)))
        return tiles.put(carry, i, (out, maximum, log_sum))

    zeros = jnp.zeros_like(q[..., 0], tiles.dtype)
    results = tiles.over_queries(attend_to_all, (jnp.zeros_like(q, dtype), zeros, zeros))
    chex.assert_equal_shape((results[0], q))
    return results


def weights(q, k, facts: Facts) -> jax.Array:
    """The attention weights, float32 ``[B, N, T, S]``; 0 in the row of a query without any key."""
    return by_xla(_weights, PartitionSpec(*spec_of(q)[:3], None))(q, k, facts)


def _weights(q, k, facts: Facts) -> jax.Array:
    tiles = Tiling(q, k, k, None, facts, BlockSizes(q.shape[2], k.shape[2]))
    raw = tiles.product("bkgth,bksh->bkgts", tiles.queries(q, 0), tiles.keys(k, 0))
    scores = tiles.scores(0, 0)(raw, tiles.extras(0, 0))
    maximum = jnp.maximum(scores.max(axis=-1, keepdims=True, initial=-jnp.inf), jnp.finfo(scores.dtype).min)
    weights = jnp.exp(scores - lax.stop_gradient(maximum))
    total = weights.sum(axis=-1, keepdims=True)
    if facts.sink_logits is not None:
        sinks = facts.sink_logits.astype(scores.dtype).reshape(*scores.shape[1:3], 1, 1)
        total += jnp.exp(sinks - lax.stop_gradient(maximum))
    return (weights / jnp.where(total == 0, 1, total)).reshape(*q.shape[:3], k.shape[2])


def tangent(
    q, k, v, facts: Facts, out, maximum, log_sum, dq, dk, dv, dextras: Extras, sizes, *, differentiable=False
):
    """The derivative of :func:`forward` along dq, dk, dv and dextras; None is zero.

    Of the output, and of the log of the sum of exp(scores), which is maximum and log together.

    If ``differentiable``, JAX may differentiate the result: a condition in a scan then skips blocks, instead of a
    loop with a traced number of steps.
    """
    tiles = Tiling(q, k, v, None, facts, sizes, differentiable)

    def along_keys(i, carry):
        queries = tiles.queries(q, i)
        dqueries = None if dq is None else tiles.queries(dq, i)
        top, log = (tiles.queries(x, i)[..., None] for x in (maximum, log_sum))

        def visit(j, state):
            keys, values = tiles.keys(k, j), tiles.keys(v, j)
            raw = tiles.product("bkgth,bksh->bkgts", queries, keys)
            draw = jnp.zeros_like(raw)
            if dqueries is not None:
                draw += tiles.product("bkgth,bksh->bkgts", dqueries, keys)
            if dk is not None:
                draw += tiles.product("bkgth,bksh->bkgts", queries, tiles.keys(dk, j))
            extras = tiles.extras(i, j)
            dextra = _zeros_where_none(tiles.extras(i, j, dextras), extras)
            scores, dscores = jax.jvp(tiles.scores(i, j), (raw, extras), (draw, dextra))
            weights = jnp.exp(scores - top - log)
            dweights = weights * dscores
            dmean, dout = state
            dout += tiles.product("bkgts,bksh->bkgth", tiles.drop(dweights, i, j).astype(values.dtype), values)
            if dv is not None:
                dropped = tiles.drop(weights, i, j).astype(values.dtype)
                dout += tiles.product("bkgts,bksh->bkgth", dropped, tiles.keys(dv, j))
            return dmean + dweights.sum(axis=-1), dout

        zeros = jnp.zeros_like(queries, tiles.dtype)
        dmean, dout = tiles.over_keys(i, visit, (zeros[..., 0], zeros))
        dout -= dmean[..., None] * tiles.queries(out, i).astype(tiles.dtype)
        return tiles.put(carry, i, (dout.astype(q.dtype), dmean))

    return tiles.over_queries(along_keys, (jnp.zeros_like(q), jnp.zeros_like(q[..., 0], tiles.dtype)))


def backward(
    q, k, v, facts: Facts, out, maximum, log_sum, dout, dlog_total, sizes, *, differentiable=False, dtype=None
):
    """The gradients of q, k, v and :class:`Extras`, from those of the output and of the log of the sum.

    They have the dtypes of their operands, or ``dtype``.
    """
    tiles = Tiling(q, k, v, None, facts, sizes, differentiable)
    delta = jnp.sum(dout.astype(tiles.dtype) * out.astype(tiles.dtype), axis=-1)
    if dlog_total is not None:
        delta -= dlog_total.astype(tiles.dtype)

    def along_keys(i, carry):
        dq, rest = carry
        queries, douts = tiles.queries(q, i), tiles.queries(dout, i)
        top, log, deltas = (tiles.queries(x, i)[..., None] for x in (maximum, log_sum, delta))

        def visit(j, state):
            dqueries, (dk, dv, dextras) = state
            keys, values = tiles.keys(k, j), tiles.keys(v, j)
            raw = tiles.product("bkgth,bksh->bkgts", queries, keys)
            scores, pull_back = jax.vjp(tiles.scores(i, j), raw, tiles.extras(i, j))
            weights = jnp.exp(scores - top - log)
            dropped = tiles.drop(weights, i, j).astype(douts.dtype)
            dvalues = tiles.product("bkgts,bkgth->bksh", dropped, douts)
            dweights = tiles.drop(tiles.product("bkgth,bksh->bkgts", douts, values), i, j)
            draw, dextra = pull_back(weights * (dweights - deltas))
            dqueries += tiles.product("bkgts,bksh->bkgth", draw.astype(keys.dtype), keys)
            dkeys = tiles.product("bkgts,bkgth->bksh", draw.astype(queries.dtype), queries)
            dk, dv = tiles.add_keys(dk, j, dkeys), tiles.add_keys(dv, j, dvalues)
            return dqueries, (dk, dv, tiles.add_extras(dextras, i, j, dextra))

        dqueries, rest = tiles.over_keys(i, visit, (jnp.zeros_like(queries, tiles.dtype), rest))
        return tiles.put(dq, i, dqueries.astype(dtype or q.dtype)), rest

    zeros = functools.partial(jax.tree.map, lambda x: jnp.zeros_like(x, wide_dtype(x)))
    extras = Extras(facts.bias, None if facts.position_bias is None else facts.position_bias.params)
    dq, (dk, dv, dextras) = tiles.over_queries(along_keys, (jnp.zeros_like(q, dtype), zeros((k, v, extras))))
    narrow = functools.partial(jax.tree.map, lambda dx, x: dx.astype(dtype or x.dtype))
    return dq, *narrow((dk, dv, dextras), (k, v, extras))


def _zeros_where_none(tangents: Extras, primals: Extras) -> Extras:
    """Tangents of all extras, 0 where None is given."""
    return Extras(
        *(
            jax.tree.map(jnp.zeros_like, primal) if tangent is None else tangent
            for tangent, primal in zip(tangents, primals, strict=True)
        )
    )
