"""Rotary attention as pure functions: rotate, store, attend, by a layer's fields and a plan.

The linen and the NNX layer differ in how they hold parameters. All else is here.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from rope_jax._checks import check_axes, device_array
from rope_jax.attention.attend import attend_by_facts, dropout_facts, fold_traced_scale
from rope_jax.attention.blocks import weights
from rope_jax.attention.cache import KVCache
from rope_jax.attention.cross_plan import make_cross_plan
from rope_jax.attention.layer_checks import (
    check_call,
    check_plan,
    check_ring,
    cross_arguments,
    has_dropout,
    self_arguments,
)
from rope_jax.attention.paths import is_long_prompt
from rope_jax.attention.plan import Plan, make_plan
from rope_jax.attention.quantized import read_layer
from rope_jax.attention.ring import ring_attention
from rope_jax.core.angles import Rotation, rotation
from rope_jax.core.frequencies import Frequencies
from rope_jax.core.nan_rows import nan_where
from rope_jax.core.primitive import RotateBackend
from rope_jax.core.rotate import rotate_unchecked


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """The parameters and random keys of a layer, as functions: a layer makes only those that a call needs.

    Attributes:
      project: ``x [B, T, D]`` to queries ``[B, T, N, H]``, keys and values ``[B, T, K, H]``, before the rotation.
        In cross-attention ``x`` and ``kv [B, S, D']``, which gives keys and values ``[B, S, K, H]``.
      out: attention ``[B, T, N, H]`` and D, to ``[B, T, D]``.
      inv_freq: the learned frequencies.
      sink_logits: the learned sinks ``[N]``.
      dropout_key: a random key; raises ValueError if the layer has none.
      sow: keeps the attention weights ``[B, N, T, S]``, or None.
      sow_name: how a user asks for ``sow``.
    """

    project: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]
    out: Callable[[jax.Array, int], jax.Array]
    inv_freq: Callable[[], jax.Array]
    sink_logits: Callable[[], jax.Array]
    dropout_key: Callable[[], jax.Array]
    sow: Callable[[jax.Array], object] | None
    sow_name: str


def self_attention(
    layer,
    x,
    arguments: dict,
    *,
    cache: KVCache | None,
    plan: Plan | None,
    deterministic: bool,
    parts: Parts,
    kv=None,
):
    """Attention over x and the tokens in the cache, or over kv: the call of :class:`RotaryAttention`.

    Args:
      layer: has the fields of :class:`RotaryAttention`.
      x: ``[B, T, D]``.
      arguments: those of :func:`make_plan`, by name; None if the plan is given.
      cache: see :class:`RotaryAttention`.
      plan: see :class:`RotaryAttention`.
      deterministic: whether dropout is off.
      parts: parameters and random keys.
      kv: ``[B, S, D']``, of cross-attention.

    Returns:
      ``y [B, T, D]``, or ``(y, cache)`` if a cache was given.
    """
    x, kv = device_array("x", x), None if kv is None else device_array("kv", kv)
    own_plan = plan is None
    if plan is None:
        check_call(layer, x, cache, kv)
        plan = _make_plan(layer, x.shape[:2], cache, arguments, kv)
        cache = None if cache is None else plan.begin(cache)
    else:
        check_plan(layer, plan, x, cache, arguments, kv)
    if layer.ring_axis is not None:
        check_ring(layer, plan, deterministic, {parts.sow_name: parts.sow is not None})

    # Not even NaN at padding may reach real tokens or their gradients.
    if plan.mask is not None:
        x = jnp.where(plan.mask[:, :, None], x, jnp.zeros_like(x))
    if kv is not None and plan.key_mask is not None:
        kv = jnp.where(plan.key_mask[:, :, None], kv, jnp.zeros_like(kv))
    q, k, v = parts.project(x) if kv is None else parts.project(x, kv)
    rotation, key_rotation = _rotations(layer, plan, parts)
    if rotation is not None and layer.rope is not None:
        if key_rotation is None:
            q, k = _rotate(layer, [q, k], rotation)
        else:  # keys have positions of their own, or the cache stores them unrotated
            (q,) = _rotate(layer, [q], rotation)
            if kv is not None:
                (k,) = _rotate(layer, [k], key_rotation)
    stored = None
    if cache is not None:
        plain, consecutive = layer.implementation == "plain", cache.slots.consecutive(plan.mask)
        cache = cache.store(k, v, plan.slots, consecutive=consecutive, plain=plain)
        if key_rotation is not None and layer.rope is not None:
            k, v = cache.read(q.dtype)
            (k,) = _rotate(layer, [k], key_rotation)
        else:
            stored = cache
    y = parts.out(_attend(layer, q, k, v, plan, deterministic, stored, parts), x.shape[-1])
    if cache is None:
        return y
    y = nan_where(plan.overflowed(cache)[:, None, None], y)
    return y, plan.end(cache) if own_plan else cache


def learnable_frequencies(layer) -> Frequencies:
    """The frequencies that a layer with ``learn_frequencies`` starts from."""
    start = None if layer.rope.needs_context_length else layer.rope.frequencies()
    if not isinstance(start, Frequencies):
        raise ValueError(f"learn_frequencies needs a schedule of one Frequencies, got {layer.rope.schedule}")
    return start


def _rotations(layer, plan: Plan, parts: Parts) -> tuple[Rotation | None, Rotation | None]:
    """The rotations of queries and of keys stored unrotated, by the plan or by learned frequencies."""
    if not layer.learn_frequencies or layer.rope is None:
        return plan.rotation, plan.key_rotation
    frequencies = dataclasses.replace(learnable_frequencies(layer), inv_freq=parts.inv_freq())
    rotate_to = functools.partial(rotation, frequencies=frequencies)

    return rotate_to(plan.positions), None if plan.key_positions is None else rotate_to(plan.key_positions)


def _rotate(layer, xs: list[jax.Array], rotation: Rotation) -> list[jax.Array]:
    """Arrays ``[B, T, N, H]``, rotated. Shapes follow from the plan and the fields, which are checked."""
    backend: RotateBackend | None = layer.implementation if layer.implementation in ("xla", "plain") else None
    rope = layer.rope
    return rotate_unchecked(
        xs, rotation, layout=rope.layout, start=rope.start, blocks=rope.blocks, implementation=backend
    )


def _attend(layer, q, k, v, plan: Plan, deterministic: bool, stored: KVCache | None, parts: Parts) -> jax.Array:
    """Attention ``[B, T, N, H]`` by the facts of the plan, to k and v, or to those stored in a cache."""
    q, scale = fold_traced_scale(q, layer.logit_scale, "logit_scale")
    if layer.ring_axis is not None:
        return ring_attention(
            q,
            k,
            v,
            plan.sequence_index,
            axis_name=layer.ring_axis,
            causal=layer.causal,
            window=plan.window,
            scale=scale,
            logit_cap=layer.logit_cap,
        )
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    options: dict = dict(scale=scale, logit_cap=None if layer.logit_cap is None else float(layer.logit_cap))
    if layer.learn_sinks:
        options["sink_logits"] = parts.sink_logits()
    if has_dropout(layer) and not deterministic:
        options |= dropout_facts(layer.dropout_rate, parts.dropout_key())
    # A cache of unrotated keys was read and rotated: k and v are then all of its slots.
    facts = dataclasses.replace(plan.facts(), **options)
    keys: tuple = (k, v, None) if stored is None else (stored.key, stored.value, stored.layer)
    if parts.sow is not None:
        parts.sow(weights(q, read_layer(keys[0], keys[2], q.dtype), facts))
    if layer.attention_fn is not None:
        k, v = (read_layer(each, keys[2], q.dtype) for each in keys[:2])
        return _checked_output(layer.attention_fn(*(x.swapaxes(1, 2) for x in (q, k, v)), facts), q)

    def attend(q, keys, facts) -> jax.Array:
        k, v, number = keys
        return attend_by_facts(q, k, v, facts, layer=number, implementation=layer.implementation)

    by_kernel = layer.implementation is None and plan.query_index is None and plan.attention_mask is None
    if stored is None or not by_kernel or not is_long_prompt(q, stored.key):
        return attend(q, keys, facts).swapaxes(1, 2)
    # On a TPU, the kernel serves a prompt before which the cache is empty.
    fresh = dataclasses.replace(plan.facts(fresh=True), **options)

    def prefill(q, k, v, keys, facts, fresh):
        return jax.lax.cond(
            plan.starts_empty,
            lambda: attend(q, (k, v, None), fresh),
            lambda: attend(q, keys, facts),
        )

    y = jax.lax.platform_dependent(
        q,
        k,
        v,
        keys,
        facts,
        fresh,
        tpu=prefill,
        default=lambda q, k, v, keys, facts, fresh: attend(q, keys, facts),
    )
    return y.swapaxes(1, 2)


def _checked_output(y, q) -> jax.Array:
    """The output of an ``attention_fn``, which must be as q ``[B, N, T, H]`` with tokens first."""
    batch, heads, length, head_dim = q.shape
    if not isinstance(y, jax.Array):
        raise TypeError(f"attention_fn must return an array [B, T, N, H], got {type(y).__name__}")
    check_axes("attention_fn(q, k, v, facts)", y, "B T N H", B=batch, T=length, N=heads, H=head_dim)
    if y.dtype != q.dtype:
        raise TypeError(f"attention_fn must return q's dtype {q.dtype}, got {y.dtype}")
    return y


def _make_plan(layer, shape: tuple[int, int], cache: KVCache | None, arguments: dict, kv) -> Plan:
    """The plan of a layer that is called alone."""
    options: dict = dict(num_heads=layer.num_heads, learn_frequencies=layer.learn_frequencies)
    if kv is not None:
        return make_cross_plan(layer.rope, shape, kv.shape[1], **cross_arguments(arguments), **options)
    if layer.rope is None and arguments["positions"] is not None:
        raise ValueError("positions must be left out without rope: nothing reads them")
    return make_plan(
        layer.rope,
        shape,
        causal=layer.causal,
        window=layer.window,
        position_bias=layer.position_bias,
        cache=cache,
        **options,
        **self_arguments(arguments),
    )
