"""Masked, grouped-query dot-product attention."""

import dataclasses
from typing import get_args

import jax
import jax.numpy as jnp

from rope_jax._checks import (
    check_axes,
    check_choice,
    check_dtype,
    check_flag,
    check_real,
    checked_key,
    device_array,
    shown,
)
from rope_jax._jax_internals import Tracer
from rope_jax.attention import blocks
from rope_jax.attention.facts import Facts
from rope_jax.attention.mask import window_size
from rope_jax.attention.paths import AttentionBackend, why_not_cudnn
from rope_jax.attention.primitive import attention, attention_with_log
from rope_jax.attention.quantized import read_layer
from rope_jax.core.primitive import wide_dtype


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
    sink_logits=None,
    dropout_rate: float = 0.0,
    dropout_rng=None,
    implementation: AttentionBackend | None = None,
) -> jax.Array:
    """``softmax(scale q.k + bias) v`` (Vaswani et al. 2017, section 3.2.1), with grouped heads, masks and caps.

    Memory grows with T + S, forward and backward: scores are formed in blocks and discarded, and blocks before the
    first and after the last key that a block of queries may read are skipped (Rabe and Staats 2021; Dao et al.
    2022, section 3.1). On a TPU, jax's splash kernel serves if it can: see :func:`rope_jax.attention.explain`.
    Scores and sums are float32. A query without any key gives 0, but for cuDNN. Values of masked keys must be
    finite, since their weights are 0. Every derivative of any order is supported; forward mode and second
    derivatives are computed in blocks, under every name.

    Args:
      q: ``[B, T, N, H]``.
      k: ``[B, S, K, H]``; N is a multiple of K, and query head n reads key head ``n // (N/K)``.
      v: ``[B, S, K, H]``.
      bias: floating ``[B or 1, N or 1, T or 1, S]``, added to the scaled (and capped) scores: see :class:`T5Bias`.
        cuDNN adds it in q's dtype.
      mask: bool ``[B or 1, N or 1, T or 1, S]``, True if a query may read a key: ``[B, 1, 1, S]`` for padded keys.
      causal: query t reads keys ``s <= t``, in addition to the mask.
      window: query t reads keys with ``|t - s| < window``; an integer, which may be traced.
      scale: multiplies q.k; None is ``1/sqrt(H)``. A traced scale multiplies q, which is rounded to its dtype.
      logit_cap: soft bound of the scaled scores; see :func:`attention_weights`.
      sink_logits: floating ``[N]``, a logit per head that enters the denominator of the softmax only, so that
        weights add up to less than 1 (OpenAI 2025, gpt-oss, section 2.2). It is neither scaled nor capped. The
        output is rounded once more.
      dropout_rate: share of the attention weights set to 0, in [0, 1).
      dropout_rng: a key; required if ``dropout_rate`` is above 0. It drops the same weights on every path.
      implementation: None chooses; ``"blocks"`` or ``"splash"`` by name; ``"xla"`` forms all T S scores, and
        ``"plain"`` likewise, in operations of JAX alone; ``"cudnn"`` calls :func:`jax.nn.dot_product_attention` on
        a GPU.

    Returns:
      ``[B, T, N, H]`` in q's dtype.

    Raises:
      TypeError: if q, k, v or bias is not floating, the mask not bool, or the window not an integer.
      ValueError: if shapes do not match, an option is out of range, or the requested implementation cannot
        serve: then with the reason, when the program is lowered.

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
    check_options(logit_cap, dropout_rate, implementation)
    q, facts = _facts(q, k, bias, mask, causal, window, scale, logit_cap, sink_logits)
    facts = dataclasses.replace(facts, **dropout_facts(dropout_rate, dropout_rng))
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return attend_by_facts(q, k, v, facts, implementation=implementation).swapaxes(1, 2)


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
    sink_logits=None,
) -> jax.Array:
    """The attention weights ``softmax(scale q.k + bias)``, for inspection.

    With a soft cap c the scores are ``c tanh(scale q.k / c)`` (Gemma 2, section 2). :func:`attend` returns the
    weighted sum of the values, and computes no weights of this size if it can.

    Args:
      q: ``[B, T, N, H]``, rotated.
      k: ``[B, S, K, H]``, rotated.
      bias: floating ``[B or 1, N or 1, T or 1, S]``, added to the scaled (and capped) scores.
      mask: bool ``[B or 1, N or 1, T or 1, S]``, True if a query may read a key: ``[B, 1, 1, S]`` for padded keys.
      causal: query t reads keys ``s <= t``, in addition to the mask.
      window: query t reads keys with ``|t - s| < window``; an integer, which may be traced.
      scale: multiplies q.k; None is ``1/sqrt(H)``.
      logit_cap: soft bound of the scaled scores.
      sink_logits: floating ``[N]``; see :func:`attend`.

    Returns:
      float32 ``[B, N, T, S]``; each row sums to 1, but for the share of a sink; a fully masked query has weights 0.

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
    check_options(logit_cap)
    q, facts = _facts(q, k, bias, mask, causal, window, scale, logit_cap, sink_logits)
    return blocks.weights(q.swapaxes(1, 2), k.swapaxes(1, 2), facts)


def _facts(q, k, bias, mask, causal, window, scale, logit_cap, sink_logits) -> tuple[jax.Array, Facts]:
    """The facts of a call whose tokens have the sequence indices 0, 1, 2, ...; q takes a traced scale in."""
    causal, window = check_flag("causal", causal), window_size(window)
    q, scale = fold_traced_scale(q, scale)
    sizes = q.shape[1], k.shape[1]
    if causal and sizes[0] != sizes[1]:
        # jax and torch align queries to the first key, flash-attention and a cache to the last.
        raise ValueError(
            f"causal must be False with T={sizes[0]} queries and S={sizes[1]} keys, whose order is not known: pass "
            "the mask, as jnp.tril(jnp.ones((T, S), bool), S - T)[None, None] for the last T of S tokens"
        )
    if isinstance(window, int) and all(isinstance(size, int) and size <= window for size in sizes):
        window = None
    if sink_logits is not None:
        sink_logits = device_array("sink_logits", sink_logits)
        check_axes("sink_logits", sink_logits, "N", N=q.shape[2])
        check_dtype("sink_logits", sink_logits, jnp.floating, "floating")
    facts = Facts(
        causal=causal,
        window=window,
        scale=scale,
        logit_cap=None if logit_cap is None else float(logit_cap),
        bias=bias,
        mask=mask,
        sink_logits=sink_logits,
    )
    return q, facts


def fold_traced_scale(q, scale, name: str = "scale") -> tuple[jax.Array, float | None]:
    """``(q, scale)`` with a known scale: a traced scale multiplies q, which is rounded to its dtype."""
    if scale is None:
        return q, None
    if isinstance(scale := check_real(name, scale), Tracer):
        return (q.astype(wide_dtype(q)) * scale).astype(q.dtype), 1.0
    return q, float(scale)


def attend_by_facts(
    q, k, v, facts: Facts, *, layer=None, implementation: AttentionBackend | None = None
) -> jax.Array:
    """Attention ``[B, N, T, H]`` of arrays with heads first, without checks: see :func:`attention`."""
    if 0 in q.shape or 0 in k.shape:  # no queries, or no keys to read
        return jnp.zeros_like(q)
    if implementation != "cudnn":
        if facts.sink_logits is None:
            return attention(q, k, v, facts, layer=layer, implementation=implementation)
        sinks = facts.sink_logits.astype(wide_dtype(q))[None, :, None]
        facts = dataclasses.replace(facts, sink_logits=None)
        y, log_total = attention_with_log(q, k, v, facts, layer=layer, implementation=implementation)
        # exp(log_total) / (exp(log_total) + exp(sinks)), the share of the keys
        share = jax.nn.sigmoid(log_total - sinks)[..., None]
        return (y.astype(share.dtype) * share).astype(q.dtype)
    if reason := why_not_cudnn(q, facts):
        raise ValueError(f"implementation must not be 'cudnn': {reason}")
    k, v = (read_layer(stored, layer, q.dtype) for stored in (k, v))
    # cuDNN has a causal window of a known size. Without causality its window would read the future (jax #39576).
    by_flags = facts.causal and facts.query_index is None and facts.traced_window is None
    masked = dataclasses.replace(facts, causal=False, window=None) if by_flags else facts
    bias = facts.score_bias(q.shape[2], k.shape[2])
    query, key, value = (x.swapaxes(1, 2) for x in (q, k, v))
    try:
        y = jax.nn.dot_product_attention(
            query,
            key,
            value,
            bias=None if bias is None else bias.astype(q.dtype),
            mask=masked.attention_mask(q.shape[2], k.shape[2]),
            scale=facts.scale,
            is_causal=by_flags,
            local_window_size=(facts.known_window - 1, 0) if by_flags and facts.known_window is not None else None,
            implementation="cudnn",
        )
    except RuntimeError as error:  # without cuDNN, or with one that is too old
        raise ValueError(
            f"implementation must not be 'cudnn', which serves on a GPU in float16 and bfloat16: {error}"
        ) from error
    return y.swapaxes(1, 2)


def dropout_facts(dropout_rate: float, dropout_rng) -> dict:
    """The fields of :class:`Facts` for dropout."""
    if float(dropout_rate) == 0.0:  # comparing a jax number gives a traced value inside jit
        return {}
    if dropout_rng is None:
        raise ValueError(f"dropout_rng must be given with dropout_rate {dropout_rate}, got None")
    key = checked_key("dropout_rng", dropout_rng)
    check_axes("dropout_rng", key, "")
    impl, data = str(jax.random.key_impl(key)), jnp.asarray(jax.random.key_data(key))
    return dict(dropout_rate=float(dropout_rate), dropout_key=data, dropout_impl=impl)


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
        check_axes("mask", mask, "B N T S", B={1, batch}, N={1, heads}, T={1, length}, S=kv_length)
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
    cap = None if logit_cap is None else check_real("logit_cap", logit_cap)
    if isinstance(cap, Tracer):
        raise TypeError("logit_cap must be a concrete number, got a traced number")
    if isinstance(cap, float) and not cap > 0:
        raise ValueError(f"logit_cap must be positive and finite, got {logit_cap}")
    rate = dropout_rate if type(dropout_rate) is float else check_real("dropout_rate", dropout_rate)
    if not isinstance(rate, float):
        raise TypeError(f"dropout_rate must be a concrete number, got {shown(rate)}")
    if not 0 <= rate < 1:
        raise ValueError(f"dropout_rate must be in [0, 1), got {dropout_rate}")
    check_choice("implementation", implementation, get_args(AttentionBackend), optional=True)
