"""Checks of a :class:`RotaryAttention`: its fields, a call, and a plan from outside."""

import jax.numpy as jnp

from rope_jax._checks import check_axes, check_callable, check_dtype, check_kinds, shown
from rope_jax.attention.attend import check_options
from rope_jax.attention.cache import check_cache
from rope_jax.attention.mask import window_size
from rope_jax.attention.plan import Plan
from rope_jax.attention.plan_arguments import check_cache_of_plan
from rope_jax.core.rope import Rope


def check_call(layer, x, cache, kv=None) -> None:
    """Raises unless fields, x, the cache and kv go together."""
    check_fields(layer)
    if cache is not None and layer.implementation == "splash":
        raise ValueError(
            "implementation must not be 'splash' with a cache: the kernel serves a prompt before an empty cache, "
            "which None takes on a TPU"
        )
    check_axes("x", x, "B T D")
    check_dtype("x", x, jnp.floating, "floating")
    if kv is not None:
        _check_cross(layer, x, cache, kv)
    if cache is not None:
        check_cache(cache)
        axes = "B K S H" if cache.layer is None else "layers B K S H"
        kv_heads = layer.num_kv_heads or layer.num_heads
        check_axes("cache.key", cache.key, axes, B=x.shape[0], K=kv_heads, H=layer.head_dim)


def _check_cross(layer, x, cache, kv) -> None:
    """Raises unless the fields, x and kv are those of a cross-attention."""
    check_axes("kv", kv, "B S D", B=x.shape[0])
    check_dtype("kv", kv, jnp.floating, "floating")
    if layer.dtype is None and kv.dtype != x.dtype:
        raise TypeError(f"kv must have x's dtype {x.dtype} in a layer without dtype=, got {kv.dtype}")
    if layer.causal:
        raise ValueError("causal must be False with kv: queries and keys have no common order")
    barred = dict(window=layer.window, position_bias=layer.position_bias, ring_axis=layer.ring_axis, cache=cache)
    for name, value in barred.items():
        if value is not None:
            raise ValueError(f"{name} must be left out with kv, got {type(value).__name__}")


_CROSS = "kv_positions", "kv_mask"  # arguments of cross-attention alone
_SELF = "sequence_index", "segment_ids", "prefix_length"  # of self-attention alone


def self_arguments(arguments: dict) -> dict:
    """The arguments of :func:`make_plan`.

    Raises:
      ValueError: if an argument is for cross-attention.
    """
    return _without(arguments, _CROSS, "without kv")


def cross_arguments(arguments: dict) -> dict:
    """The arguments of :func:`make_cross_plan`.

    Raises:
      ValueError: if an argument is for self-attention.
    """
    return _without(arguments, _SELF, "with kv")


def _without(arguments: dict, names: tuple[str, ...], condition: str) -> dict:
    for name in names:
        if (value := arguments.get(name)) is not None:
            raise ValueError(f"{name} must be left out {condition}, got {type(value).__name__}")
    return {name: value for name, value in arguments.items() if name not in names}


def check_plan(layer, plan: Plan, x, cache, arguments: dict, kv=None) -> None:
    """Raises unless the plan is for these fields and tokens, and the call leaves the rest to the plan."""
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be a Plan, as from rope_jax.attention.make_plan, got {type(plan).__name__}")
    if plan.in_stack:  # a stack checks its layers, x and the cache itself, once for all layers
        return
    check_call(layer, x, cache, kv)
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(
                f"{name} must be left out with a plan, got {type(value).__name__}: pass it to make_plan"
            )
    if plan.rope_of_layer is not None or plan.window_of_layer is not None:
        raise ValueError(
            "plan must be for one layer, got a plan for layers that differ: pass plan.of_layer(number)"
        )
    if plan.kv_length != (None if kv is None else kv.shape[1]):
        wanted = "without kv, of make_plan" if kv is None else f"for S={kv.shape[1]}, of make_cross_plan"
        raise ValueError(f"plan must be {wanted}, got a plan for S={plan.kv_length}")
    if plan.ropes != layer.rope:
        raise ValueError(f"plan must be for the rope {layer.rope} of this layer, got a plan for {plan.ropes}")
    batch, length, _ = x.shape
    with_rows = [plan.mask, plan.key_mask, plan.segments, plan.slots]
    rows = {array.shape[0] for array in with_rows if array is not None}
    rank = 2 if layer.rope is None or layer.rope.num_axes == 1 else 3  # of positions that differ between rows
    positions = [at for at in (plan.positions, plan.key_positions) if at is not None and at.ndim == rank]
    alike = [plan.sequence_index, plan.query_index, plan.attention_mask, *positions]  # with one row for all, or B
    rows |= {array.shape[0] for array in alike if array is not None} - {1}
    if plan.sequence_index.shape[1] != length or not rows <= {batch}:
        planned = f"B={max(rows, default=1)}, T={plan.sequence_index.shape[1]}"
        raise ValueError(f"plan must be for B={batch}, T={length}, as x has, got a plan for {planned}")
    if cache is not None:
        check_cache_of_plan(plan, cache, in_step=True)
    elif plan.slots is not None:
        raise ValueError("cache must be given with a plan that was made with one, got None")
    if plan.causal != layer.causal:
        raise ValueError(f"plan must be for causal={layer.causal}, got a plan for causal={plan.causal}")
    # A traced window comes by the plan alone.
    if plan.known_window != layer.window and (layer.window is not None or plan.traced_window is None):
        raise ValueError(f"plan must be for window={layer.window}, got a plan for window={plan.window}")
    if (layer.position_bias is None) != (plan.position_bias is None):
        got, has = ("none", "one") if plan.position_bias is None else ("one", "none")
        raise ValueError(f"plan must be made with the layer's position_bias, got {got}: the layer has {has}")
    if plan.position_bias is not None and plan.position_bias.num_heads != layer.num_heads:
        raise ValueError(
            f"plan must be for num_heads={layer.num_heads}, got a bias of N={plan.position_bias.num_heads} heads"
        )
    if plan.attention_mask is not None and plan.attention_mask.shape[1] not in (1, layer.num_heads):
        raise ValueError(
            f"plan must be for num_heads={layer.num_heads}, got an attention mask of N="
            f"{plan.attention_mask.shape[1]} heads"
        )
    if not layer.learn_frequencies and layer.rope is not None and plan.rotation is None:
        raise ValueError("plan must have a rotation for a layer that does not learn its frequencies, got none")


def check_ring(layer, plan: Plan, deterministic: bool, sows: dict[str, bool]) -> None:
    """Raises if the call asks for what ring attention does not do. ``sows`` names the request for weights."""
    barred = {
        "cache": plan.slots is not None,
        "segment_ids": plan.segments is not None,
        "position_bias": plan.position_bias is not None,
        "mask": plan.mask is not None,
        "attention_mask": plan.attention_mask is not None,
        "prefix_length": plan.query_index is not None,
        "learn_sinks": layer.learn_sinks,
        "dropout_rate": has_dropout(layer) and not deterministic,
        **sows,  # no device has a whole row of weights
    }
    for name, given in barred.items():
        if given:
            hint = ": decode with clone(ring_axis=None)" if name == "cache" else ""
            raise ValueError(f"{name} must be left out with ring_axis={layer.ring_axis!r}{hint}")
    if not plan.reordered:
        raise ValueError(
            f"sequence_index must be given with ring_axis={layer.ring_axis!r}, as zigzag_sequence_index(T, n)[None]"
        )


def has_dropout(layer) -> bool:
    """True if attention weights are dropped in training."""
    return float(layer.dropout_rate) > 0  # comparing a jax number gives a traced value inside jit


_FLAGS = (
    *("causal", "decode", "deterministic", "learn_frequencies", "learn_sinks", "qk_norm", "qk_norm_unit_offset"),
    *("use_bias", "use_out_bias"),
)


_KINDS: dict = dict(
    sizes=("num_heads", "head_dim", "num_kv_heads"),
    flags=_FLAGS,
    positive=("qk_norm_epsilon",),
    dtypes=("dtype", "param_dtype"),
    functions=("kernel_init", "bias_init", "dot_general"),
    optional=("num_kv_heads", "use_out_bias", "dtype", "dot_general"),
)


def check_fields(layer) -> None:
    """Raises unless the fields of a layer go together."""
    check_kinds(layer, **_KINDS)
    if layer.num_kv_heads is not None and layer.num_heads % layer.num_kv_heads:
        raise ValueError(f"num_kv_heads must divide num_heads={layer.num_heads}, got {layer.num_kv_heads}")
    if not isinstance(layer.rope, Rope | None):
        raise TypeError(f"rope must be a Rope or None, got {type(layer.rope).__name__}")
    if layer.rope is not None and layer.rope.head_dim != layer.head_dim:
        raise ValueError(f"rope.head_dim must be head_dim={layer.head_dim}, got {layer.rope.head_dim}")
    heads = None if layer.rope is None else layer.rope.num_heads
    if heads is not None and (layer.num_kv_heads or layer.num_heads) % heads:
        raise ValueError(
            f"rope must have frequencies for a divisor of K={layer.num_kv_heads or layer.num_heads} heads, "
            f"got for {heads}"
        )
    if layer.learn_frequencies and layer.rope is None:
        raise ValueError("rope must be given with learn_frequencies, got None")
    check_callable("position_bias", layer.position_bias, "distance", "num_heads", "causal")
    if layer.attention_fn is not None:
        check_callable("attention_fn", layer.attention_fn, "q", "k", "v", "facts")
        if layer.implementation is not None or layer.ring_axis is not None:
            name = "implementation" if layer.implementation is not None else "ring_axis"
            raise ValueError(f"{name} must be left out with an attention_fn, got {getattr(layer, name)!r}")
    check_options(layer.logit_cap, layer.dropout_rate, layer.implementation)
    window_size(layer.window)  # a tuple is for a stack of layers
    if not isinstance(layer.ring_axis, str | None):
        raise TypeError(f"ring_axis must be the name of a mesh axis, got {shown(layer.ring_axis)}")
    if layer.ring_axis is not None and layer.implementation not in (None, "xla", "blocks"):
        raise ValueError(
            f"implementation must be None, 'blocks' or 'xla' with ring_axis, got {layer.implementation!r}"
        )
