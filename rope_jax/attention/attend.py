"""Masked, grouped-query dot-product attention."""

import functools
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from rope_jax._checks import check_axes, check_dtype, check_real, device_array
from rope_jax.attention.mask import attention_mask, window_size

AttentionBackend = Literal["xla", "cudnn"]


def attend(
    q,
    k,
    v,
    *,
    bias=None,
    mask=None,
    causal: bool = False,
    window: int | jax.Array | None = None,
    scale: float | None = None,
    logit_cap: float | None = None,
    dropout_rate: float = 0.0,
    dropout_rng=None,
    implementation: AttentionBackend | None = None,
) -> jax.Array:
    """``softmax(scale q.k + bias) v`` (Vaswani et al. 2017, section 3.2.1), with grouped heads, masks and caps.

    Calls :func:`jax.nn.dot_product_attention` if possible. Computes the weights itself, in float32
    (:func:`attention_weights`), for a soft cap or dropout, for float16, and for bfloat16 under strict promotion.

    The backward pass stores q, k, v, bias and mask, but no scores of size N T S: it recomputes the weights (Chen et
    al. 2016, section 4; Dao et al. 2022, section 3.1).

    Args:
      q: ``[B, T, N, H]``.
      k: ``[B, S, K, H]``; N is a multiple of K, and query head n reads key head ``n // (N/K)``.
      v: ``[B, S, K, H]``.
      bias: floating ``[B or 1, N or 1, T or 1, S]``, added to the scaled (and capped) scores: see :class:`T5Bias`.
        cuDNN adds it in q's dtype. A row of -inf gives NaN.
      mask: bool ``[B or 1, N or 1, T, S]``, True if a query may read a key.
      causal: query t reads keys ``s <= t``, in addition to the mask.
      window: query t reads keys with ``|t - s| < window``; an integer, which may be traced.
      scale: multiplies q.k; None is ``1/sqrt(H)``.
      logit_cap: soft bound of the scaled scores; see :func:`attention_weights`.
      dropout_rate: share of the attention weights set to 0, in [0, 1).
      dropout_rng: a key; required if ``dropout_rate`` is above 0.
      implementation: passed to :func:`jax.nn.dot_product_attention`; None lets JAX choose.

    Returns:
      ``[B, T, N, H]`` in q's dtype.

    Raises:
      TypeError: if q, k, v or bias is not floating, the mask not bool, or the window not an integer.
      ValueError: if shapes do not match, an option is out of range, or the requested implementation supports no cap
        or dropout.

    Example:
      >>> import jax.numpy as jnp, rope_jax
      >>> q, kv = jnp.ones((1, 3, 4, 8)), jnp.ones((1, 3, 2, 8))
      >>> rope_jax.attend(q, kv, kv, causal=True).shape
      (1, 3, 4, 8)
    """
    q, k, bias, mask = checked_scores(q, k, bias, mask)
    v = device_array("v", v)
    check_axes("v", v, "B S K H", **dict(zip("BSKH", k.shape, strict=True)))
    check_dtype("v", v, jnp.floating, "floating")
    window = window_size(window)
    scale = check_real("scale", scale)
    check_options(logit_cap, dropout_rate, implementation)
    options = dict(causal=causal, window=window, scale=scale, logit_cap=logit_cap)
    dropout = dict(dropout_rate=dropout_rate, dropout_rng=dropout_rng)
    return attend_unchecked(q, k, v, bias=bias, mask=mask, **options, **dropout, implementation=implementation)


def attention_weights(
    q,
    k,
    *,
    bias=None,
    mask=None,
    causal: bool = False,
    window: int | jax.Array | None = None,
    scale: float | None = None,
    logit_cap: float | None = None,
) -> jax.Array:
    """The attention weights ``softmax(scale q.k + bias)``, for inspection.

    With a soft cap c the scores are ``c tanh(scale q.k / c)`` (Gemma 2, section 2). :func:`attend` returns the
    weighted sum of the values, and computes no weights of this size if it can.

    Args:
      q: ``[B, T, N, H]``, rotated.
      k: ``[B, S, K, H]``, rotated.
      bias: floating ``[B or 1, N or 1, T or 1, S]``, added to the scaled (and capped) scores.
      mask: bool ``[B or 1, N or 1, T, S]``, True if a query may read a key.
      causal: query t reads keys ``s <= t``, in addition to the mask.
      window: query t reads keys with ``|t - s| < window``; an integer, which may be traced.
      scale: multiplies q.k; None is ``1/sqrt(H)``.
      logit_cap: soft bound of the scaled scores.

    Returns:
      float32 ``[B, N, T, S]``; each row sums to 1. A fully masked query attends to all keys uniformly.

    Raises:
      TypeError: if q, k or bias is not floating, the mask not bool, or the window not an integer.
      ValueError: if shapes do not match, or an option is out of range.

    Example:
      >>> import jax.numpy as jnp, rope_jax
      >>> ones = jnp.ones((1, 3, 1, 4))
      >>> rope_jax.attention.attention_weights(ones, ones, causal=True)[0, 0, 1].tolist()
      [0.5, 0.5, 0.0]
    """
    q, k, bias, mask = checked_scores(q, k, bias, mask)
    window = window_size(window)
    check_options(logit_cap)
    scale = check_real("scale", scale)
    options = dict(causal=causal, window=window, scale=scale, logit_cap=logit_cap)
    return attention_weights_unchecked(q, k, bias=bias, mask=mask, **options)


def attend_unchecked(
    q, k, v, *, bias, mask, causal, window, scale, logit_cap, dropout_rate, dropout_rng, implementation
) -> jax.Array:
    """:func:`attend` for arguments that are checked already: by :func:`attend`, or once a step by a plan."""
    batch, length, heads, _ = q.shape
    kv_heads = k.shape[2]
    if isinstance(window, int) and isinstance(length, int) and isinstance(k.shape[1], int):
        # jax.nn's window overflows near 2^31, so a window over all keys is dropped.
        window = None if window >= max(length, k.shape[1]) else window
    # jax.nn casts narrow scores to float32 by implicit promotion, which strict promotion forbids.
    promotion = jax.config.jax_numpy_dtype_promotion  # type: ignore[attr-defined]
    unsupported = promotion == "strict" and q.dtype != jnp.float32
    unsupported |= q.dtype == jnp.float16  # not every CPU multiplies float16 into float32
    if logit_cap is None and dropout_rate == 0.0 and (implementation == "cudnn" or not unsupported):
        # jax.nn takes neither a traced window, nor a window with symbolic lengths.
        if window is not None and (isinstance(window, jax.Array) or not isinstance(length, int)):
            in_window, window = _visible_by_index(length, k.shape[1], causal=False, window=window), None
            mask = in_window if mask is None else in_window & mask
        if bias is not None:  # jax.nn adds the bias to scores of this dtype
            bias = bias.astype(q.dtype if implementation == "cudnn" else jnp.promote_types(q.dtype, jnp.float32))
        attention = functools.partial(
            jax.nn.dot_product_attention,
            scale=scale,
            is_causal=causal,
            # Keys before and after the query. cuDNN requires 0 keys after the query if causal.
            local_window_size=None if window is None else (window - 1, 0 if causal else window - 1),
            implementation=implementation,
        )
        if implementation == "cudnn":  # stores no scores either, so recomputation would only cost time
            return attention(q, k, v, bias=bias, mask=mask)
        return jax.checkpoint(lambda q, k, v, bias, mask: attention(q, k, v, bias=bias, mask=mask))(
            q, k, v, bias, mask
        )
    if implementation == "cudnn":
        raise ValueError("implementation must be None or 'xla' with a logit_cap or dropout, got 'cudnn'")
    if dropout_rate > 0.0 and dropout_rng is None:
        raise ValueError(f"dropout_rng must be given with dropout_rate {dropout_rate}, got None")

    @jax.checkpoint
    def weighted_sum(q, k, v, bias, mask, dropout_rng):
        options = dict(causal=causal, window=window, scale=scale, logit_cap=logit_cap)
        weights = attention_weights_unchecked(q, k, bias=bias, mask=mask, **options)
        if dropout_rate > 0.0:
            kept = jax.random.bernoulli(dropout_rng, 1.0 - dropout_rate, weights.shape)
            weights = jnp.where(kept, weights / (1.0 - dropout_rate), 0.0)
        weights = weights.astype(v.dtype).reshape(batch, kv_heads, heads // kv_heads, length, k.shape[1])
        return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(q.shape).astype(q.dtype)

    return weighted_sum(q, k, v, bias, mask, dropout_rng)


def attention_weights_unchecked(q, k, *, bias, mask, causal, window, scale, logit_cap) -> jax.Array:
    """:func:`attention_weights` for arguments that are checked already."""
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    logits = jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32)
    logits *= jnp.asarray(1.0 / math.sqrt(head_dim) if scale is None else scale, jnp.float32)
    if logit_cap is not None:
        cap = jnp.asarray(logit_cap, jnp.float32)
        logits = cap * jnp.tanh(logits / cap)
    logits = logits.reshape(batch, heads, length, k.shape[1])
    if bias is not None:
        logits += bias.astype(jnp.float32)
    allowed = _visible_by_index(length, k.shape[1], causal=causal, window=window)
    allowed = allowed if mask is None else allowed & mask
    # A finite number, so that a fully masked row gives a mean instead of NaN, as in jax.nn.dot_product_attention.
    logits = jnp.where(allowed, logits, 0.7 * jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(logits, axis=-1)


def checked_scores(q, k, bias, mask):
    """Checks queries, keys, bias and mask, and returns them as arrays.

    Raises:
      TypeError: if a dtype is wrong.
      ValueError: if shapes do not match.
    """
    q, k = device_array("q", q), device_array("k", k)
    check_axes("q", q, "B T N H")
    batch, length, heads, head_dim = q.shape
    check_axes("k", k, "B S K H", B=batch, H=head_dim)
    for name, array in (("q", q), ("k", k)):
        check_dtype(name, array, jnp.floating, "floating")
    kv_length, kv_heads = k.shape[1:3]
    if not (heads and kv_heads and head_dim):
        raise ValueError(f"q and k must have heads and features, got N={heads}, K={kv_heads}, H={head_dim}")
    if heads % kv_heads:
        raise ValueError(f"q must have a multiple of K={kv_heads} heads, got N={heads}")
    if mask is not None:
        mask = device_array("mask", mask)
        check_axes("mask", mask, "B N T S", B={1, batch}, N={1, heads}, T=length, S=kv_length)
        check_dtype("mask", mask, jnp.bool, "bool")
    if bias is not None:
        bias = device_array("bias", bias)
        check_axes("bias", bias, "B N T S", B={1, batch}, N={1, heads}, T={1, length}, S=kv_length)
        check_dtype("bias", bias, jnp.floating, "floating")
    return q, k, bias, mask


def check_options(
    logit_cap: float | None, dropout_rate: float = 0.0, implementation: AttentionBackend | None = None
) -> None:
    """Raises TypeError or ValueError if an option of :func:`attend` is no real number, out of range or unknown."""
    cap = check_real("logit_cap", logit_cap)
    if isinstance(cap, float) and not cap > 0:
        raise ValueError(f"logit_cap must be positive and finite, got {logit_cap}")
    rate = check_real("dropout_rate", dropout_rate)
    if isinstance(rate, float) and not 0 <= rate < 1:
        raise ValueError(f"dropout_rate must be in [0, 1), got {dropout_rate}")
    if implementation not in (None, *get_args(AttentionBackend)):
        raise ValueError(
            f"implementation must be None or one of {get_args(AttentionBackend)}, got {implementation!r}"
        )


def _visible_by_index(length, kv_length, *, causal: bool, window: int | jax.Array | None) -> jax.Array:
    """The attention mask of queries and keys with sequence indices 0, 1, 2, ...: bool ``[1, 1, T, S]``."""
    queries, keys = (jnp.arange(size, dtype=jnp.int32)[None] for size in (length, kv_length))
    return attention_mask(queries, keys, causal=causal, window=window)
