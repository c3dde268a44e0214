"""How does attention read a sequence that lies in parts on many devices?

Context parallelism: each device holds some tokens of every row, and reads all keys as they come by on a ring. What
is past or future is told by each token's place in line, its sequence_index, which travels with the keys.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from rope_jax._checks import as_int32, check_axes, check_dtype, check_integer, device_array
from rope_jax.attention.attend import check_options, checked_scores, real_number, window_size
from rope_jax.attention.mask import attention_mask

# ------------------------------------------------------------------------------------------ the sequence_index of tokens


def zigzag_sequence_index(length: int, devices: int) -> np.ndarray:
    """Which token stands in each slot, so that causal attention is the same work for every device.

    The row is cut into ``2n`` chunks for n devices, and device i holds chunks ``i`` and ``2n-1-i``: an early one,
    whose tokens read little, and a late one (Grattafiori et al. 2024, Llama 3, section 3.3.2). Put tokens, labels
    and everything else that has T in this sequence_index, divide T among the devices, and give the sequence_index itself as
    ``positions`` and as ``sequence_index``: rotation and attention need nothing else.

    Args:
      length: T, a multiple of ``2n``.
      devices: n, how many share a row.

    Returns:
      int32 ``[T]``, on the host; :func:`zigzag_inverse` is its inverse.

    Raises:
      TypeError: if an argument is not an integer.
      ValueError: if one is below 1, or the length is not a multiple of ``2n``.

    Example:
      >>> import rope_jax
      >>> rope_jax.attention.zigzag_sequence_index(8, 2).tolist()  # device 0 | device 1
      [0, 1, 6, 7, 2, 3, 4, 5]
    """
    length, devices = check_integer("length", length, 1), check_integer("devices", devices, 1)
    if length % (2 * devices):
        raise ValueError(f"length must be a multiple of 2 * devices = {2 * devices}, got {length}")
    chunks = np.arange(length, dtype=np.int32).reshape(2 * devices, -1)
    early, late = chunks[:devices], chunks[devices:]
    return np.stack([early, late[::-1]], axis=1).ravel()


def zigzag_inverse(length: int, devices: int) -> np.ndarray:
    """In which slot of :func:`zigzag_sequence_index` each token stands: what takes an answer back to the sequence_index of the text.

    Args:
      length: T, a multiple of ``2n``.
      devices: n.

    Returns:
      int32 ``[T]``, on the host.

    Raises:
      TypeError: as :func:`zigzag_sequence_index`.
      ValueError: as :func:`zigzag_sequence_index`.

    Example:
      >>> import numpy as np, rope_jax
      >>> text = np.array(list("ringring"))
      >>> "".join(text[rope_jax.attention.zigzag_sequence_index(8, 2)][rope_jax.attention.zigzag_inverse(8, 2)])
      'ringring'
    """
    return np.argsort(zigzag_sequence_index(length, devices)).astype(np.int32)


# ------------------------------------------------------------------------------------------------ the attention


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
    """:func:`attend` over the tokens of all devices along a mesh axis, none of which ever holds all of them.

    Each device keeps its queries, and passes keys, values and their sequence_index on to the next one until it has seen all
    (Liu et al. 2023, "Ring Attention with Blockwise Transformers", section 3). A block of scores is folded into a
    running maximum, sum and output in float32 (Milakov and Gimelshein 2018, section 3; Rabe and Staats 2021,
    section 2) and forgotten. The backward pass forms it again from the log of the sum, and lets the gradients of
    keys and values travel with them, in float32, until they are home. So memory per device is that of its share of
    q, k, v and their gradients, and of one block of scores, ``[B, N, block, block]``. Blocks in which no query may
    read any key are skipped: with :func:`zigzag_sequence_index`, as many on every device.

    Inside :func:`jax.shard_map` over the axis, the arrays are the device's own share. Outside, they are whole, and
    it is mapped over that one axis of the mesh in use (:func:`jax.set_mesh`); how batch and heads lie along other
    axes is left as it is. Of n devices, each sends k, v and sequence_index n - 1 times, and as often again in the backward
    pass, there beside dk and dv in float32, n + 1 times; what is sent does not depend on the work beside it.

    Args:
      q: ``[B, T, N, H]``, rotated.
      k: ``[B, T, K, H]``, rotated; N is a multiple of K.
      v: ``[B, T, K, H]``.
      sequence_index: integers ``[B or 1, T]``, each token's place in line: what ``causal`` and ``window`` go by, contiguous,
        zigzag or any other. ``[1, T]`` where all rows are alike: else devices among which a mesh divides the batch
        must agree on every block.
      axis_name: the mesh axis along which T is divided.
      causal: a query reads keys of its own place in line or an earlier one.
      window: a query reads keys less than this many places away; an integer that may be traced.
      scale: multiplies q.k; ``1/sqrt(H)`` where it is None.
      logit_cap: soft bound of the scaled scores; see :func:`attention_weights`.
      block_size: at most how many tokens' scores are formed at a time. Taken is the largest divisor of half a
        device's tokens (of all, if they are odd) that is not above it.

    Returns:
      ``[B, T, N, H]`` in q's dtype. Reverse mode only: forward mode is an error.

    Raises:
      TypeError: if q, k or v is not floating, sequence_index, window or block_size not an integer.
      ValueError: if shapes do not go together, an option is out of its range, no mesh in use has the axis, or its
        devices do not divide T.

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
    check_options(logit_cap, 0.0)
    window, scale = window_size(window), real_number("scale", scale)
    if isinstance(scale, jax.core.Tracer):
        raise TypeError("scale must be known when a ring is traced, got a traced number")
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
                f"q must have a T that the {mesh.shape[axis_name]} devices along {axis_name!r} divide, got {length}"
            )
        ring = functools.partial(
            ring_attention,
            axis_name=axis_name,
            causal=causal,
            scale=scale,
            logit_cap=logit_cap,
            block_size=block_size,
        )
        share, whole = PartitionSpec(None, axis_name), PartitionSpec()
        return jax.shard_map(
            lambda q, k, v, sequence_index, window: ring(q, k, v, sequence_index, window=window),
            in_specs=(share, share, share, share, whole),
            out_specs=share,
            axis_names={axis_name},
        )(q, k, v, sequence_index, window)

    part = length // 2 if length % 2 == 0 else length  # a block must not lie across the two chunks of zigzag
    block = next(size for size in range(min(block_size, part), 0, -1) if part % size == 0)
    rule = _Rule(axis_name, causal, head_dim**-0.5 if scale is None else scale, logit_cap, block)
    q, k, v, sequence_index = _vary_alike(q, k, v, sequence_index)
    return _ring(q, k, v, sequence_index, window, rule)


def checked_sequence_index(sequence_index, batch: int, length: int) -> jax.Array:
    """Each token's place in line as int32 ``[B or 1, T]``.

    Raises:
      TypeError: if places are not integers.
      ValueError: if their shape is another, or they are known not to fit in int32 or to lie 2^31 or more apart.
    """
    sequence_index = device_array("sequence_index", sequence_index)
    check_axes("sequence_index", sequence_index, "B T", B={1, batch}, T=length)
    check_dtype("sequence_index", sequence_index, jnp.integer, "integer")
    if not isinstance(sequence_index, jax.core.Tracer) and sequence_index.size:
        low, high = (int(end) for end in (np.asarray(sequence_index).min(), np.asarray(sequence_index).max()))
        if low < -(2**31) or high >= 2**31 or high - low >= 2**31:
            raise ValueError(f"sequence_index must fit in int32 and span less than 2^31, got {low} to {high}")
    return as_int32(sequence_index)


class _Rule(NamedTuple):
    """What is known of the attention before any array is."""

    axis_name: str
    causal: bool
    scale: float
    logit_cap: float | None
    block: int


class _Queries(NamedTuple):
    """Some rows of scores; the G = N/K query heads that read one key head are rows too, a head after the other."""

    q: jax.Array  # [B, K, GT, H]
    sequence_index: jax.Array  # [B or 1, GT]
    dout: Any = None  # [B, K, GT, H]: in the backward pass
    log_total: Any = None  # float32 [B, K, GT], of the sum of exp(scores)
    delta: Any = None  # float32 [B, K, GT], dout.out: what the softmax subtracts from the gradient of its weights


class _Keys(NamedTuple):
    """Some columns of scores: what travels."""

    k: jax.Array  # [B, K, S, H]
    v: jax.Array  # [B, K, S, H]
    sequence_index: jax.Array  # [B or 1, S]


class _Seen(NamedTuple):
    """What some queries have read so far, all float32: the softmax over the keys of the blocks that came by."""

    top: jax.Array  # [B, K, GT], the largest score, or the least number
    total: jax.Array  # [B, K, GT], sum of exp(score - top)
    out: jax.Array  # [B, K, GT, H], sum of exp(score - top) v


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _ring(q, k, v, sequence_index, window, rule: _Rule):
    return _forward(q, k, v, sequence_index, window, rule)[0]


def _forward(q, k, v, sequence_index, window, rule: _Rule):
    # Known before q is, the sequence_index would let the gradient of a scan over layers compute the masks of all blocks
    # ahead of it and keep them, T x T.
    sequence_index, _ = lax.optimization_barrier((sequence_index, q[0, 0, 0, 0]))
    queries, keys = _in_blocks(q, k, v, sequence_index, rule)

    def visit(seen, keys):
        return _each_pair(_read, queries, keys, seen, None, window, rule)

    like = functools.partial(jnp.full_like, queries.q[..., 0], dtype=jnp.float32)
    # The maximum starts finite, so that -inf less it is -inf, and not NaN, in rows that read nothing of a block.
    nothing = _Seen(like(jnp.finfo(jnp.float32).min), like(0.0), jnp.zeros_like(queries.q, jnp.float32))
    seen, _ = _around(visit, nothing, keys, None, rule.axis_name)
    out = _tokens(seen.out / seen.total[..., None], q.shape).astype(q.dtype)
    return out, (q, k, v, sequence_index, window, out, seen.top + jnp.log(seen.total))


def _backward(rule: _Rule, saved, dout):
    q, k, v, sequence_index, window, out, log_total = saved
    queries, keys = _in_blocks(q, k, v, sequence_index, rule)
    dout, out = (_blocks(x, k.shape[2], rule.block) for x in (dout, out))
    delta = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    queries = queries._replace(dout=dout, log_total=log_total, delta=delta)

    dq, dk, dv = (jnp.zeros_like(x, jnp.float32) for x in (queries.q, keys.k, keys.v))

    def visit(dq, keys):
        return _each_pair(_read_back, queries, keys, dq, (dk, dv), window, rule)

    dq, dkv = _around(visit, dq, keys, (dk, dv), rule.axis_name)
    dq, dk, dv = (_tokens(dx, x.shape).astype(x.dtype) for dx, x in zip((dq, *dkv), (q, k, v), strict=True))
    return dq, dk, dv, None, None


_ring.defvjp(_forward, _backward)


def _around(visit, own, keys: _Keys, nothing, axis_name):
    """``own, gain = visit(own, keys)`` with the keys of every device, and the sum of what one's own keys gained.

    The sum, ``nothing`` at first, travels one step behind its keys, so that whatever is sent is sent beside work.
    """
    devices = lax.axis_size(axis_name)
    to_next = [(device, (device + 1) % devices) for device in range(devices)]
    send = functools.partial(lax.ppermute, axis_name=axis_name, perm=to_next)

    def step(state, _):
        own, keys, total = state
        coming, total = send((keys, total))
        own, gain = visit(own, keys)
        return (own, coming, jax.tree.map(jnp.add, total, gain)), None

    (own, keys, total), _ = lax.scan(step, (own, keys, nothing), length=devices - 1)
    total = send(total)
    own, gain = visit(own, keys)
    return own, send(jax.tree.map(jnp.add, total, gain))


def _each_pair(work, queries: _Queries, keys: _Keys, by_query, by_key, window, rule: _Rule):
    """``by_query, by_key = work(by_query, by_key, ...)``: each block of queries with each of keys that it may read.

    All four have a leading axis of blocks.
    """

    def along_keys(by_key, row):
        queries, of_query = row

        def pair(of_query, column):
            keys, of_key = column
            return lax.cond(
                _may_read(queries.sequence_index, keys.sequence_index, window, rule.causal),
                lambda of_query, of_key: work(of_query, of_key, queries, keys, window, rule),
                lambda of_query, of_key: (of_query, of_key),
                of_query,
                of_key,
            )

        of_query, by_key = lax.scan(pair, of_query, (keys, by_key))
        return by_key, of_query

    by_key, by_query = lax.scan(along_keys, by_key, (queries, by_query))
    return by_query, by_key


def _may_read(query_order, key_order, window, causal: bool):
    """Whether a query of a block may read a key of another, by the first and the last of each: bool ``[]``."""
    most = query_order.max(axis=-1) - key_order.min(axis=-1)
    least = query_order.min(axis=-1) - key_order.max(axis=-1)
    reads = jnp.ones_like(most, bool)
    if causal:
        reads &= most >= 0
    if window is not None:
        reads &= (least < window) & (most > -window)
    return jnp.any(reads)


def _scores(queries: _Queries, keys: _Keys, window, rule: _Rule):
    """float32 ``[B, K, GT, S]``; -inf where a query may not read, and the slope of the soft cap."""
    scores = rule.scale * _product("bkth,bksh->bkts", queries.q, keys.k)
    slope = None
    if rule.logit_cap is not None:
        bounded = jnp.tanh(scores / rule.logit_cap)
        scores, slope = rule.logit_cap * bounded, 1 - bounded**2
    seen = attention_mask(queries.sequence_index, keys.sequence_index, causal=rule.causal, window=window)
    return jnp.where(seen, scores, -jnp.inf), slope


def _read(so_far: _Seen, _, queries: _Queries, keys: _Keys, window, rule: _Rule):
    """One block more of the softmax and of what it reads."""
    scores, _ = _scores(queries, keys, window, rule)
    top = jnp.maximum(so_far.top, scores.max(axis=-1))
    weights = jnp.exp(scores - top[..., None])
    kept = jnp.exp(so_far.top - top)
    total = kept * so_far.total + weights.sum(axis=-1)
    out = kept[..., None] * so_far.out + _product("bkts,bksh->bkth", weights.astype(keys.v.dtype), keys.v)
    return _Seen(top, total, out), None


def _read_back(dq, dkv, queries: _Queries, keys: _Keys, window, rule: _Rule):
    """One block more of the gradients of q, and of k and v."""
    dk, dv = dkv
    scores, slope = _scores(queries, keys, window, rule)
    weights = jnp.exp(scores - queries.log_total[..., None])
    dv += _product("bkts,bkth->bksh", weights.astype(queries.dout.dtype), queries.dout)
    dweights = _product("bkth,bksh->bkts", queries.dout, keys.v)
    dscores = rule.scale * weights * (dweights - queries.delta[..., None])
    if slope is not None:
        dscores *= slope
    dq += _product("bkts,bksh->bkth", dscores.astype(keys.k.dtype), keys.k)
    dk += _product("bkts,bkth->bksh", dscores.astype(queries.q.dtype), queries.q)
    return dq, (dk, dv)


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _vary_alike(*arrays) -> list[jax.Array]:
    """The arrays, each typed to differ along every manual mesh axis along which one of them does (shard_map)."""
    varying = [jax.typeof(array).manual_axis_type.varying for array in arrays]
    everywhere = frozenset().union(*varying)
    return [
        lax.pcast(array, tuple(everywhere - own), to="varying") if everywhere - own else array
        for array, own in zip(arrays, varying, strict=True)
    ]


# ------------------------------------------------------------------------------------------------ blocks of tokens


def _in_blocks(q, k, v, sequence_index, rule: _Rule) -> tuple[_Queries, _Keys]:
    sequence_index = sequence_index.reshape(sequence_index.shape[0], -1, rule.block).swapaxes(0, 1)
    rows = jnp.tile(sequence_index, q.shape[2] // k.shape[2])
    q, k, v = (_blocks(x, k.shape[2], rule.block) for x in (q, k, v))
    return _Queries(q, rows), _Keys(k, v, sequence_index)


def _blocks(x, kv_heads: int, block: int):
    """``[B, T, N, H]`` to ``[T/block, B, K, G block, H]``."""
    batch, length, heads, head_dim = x.shape
    x = x.reshape(batch, length // block, block, kv_heads, heads // kv_heads, head_dim)
    return x.transpose(1, 0, 3, 4, 2, 5).reshape(length // block, batch, kv_heads, -1, head_dim)


def _tokens(x, shape):
    """Back to ``[B, T, N, H]``."""
    blocks, batch, kv_heads, _, head_dim = x.shape
    x = x.reshape(blocks, batch, kv_heads, shape[2] // kv_heads, -1, head_dim)
    return x.transpose(1, 0, 4, 2, 3, 5).reshape(shape)
