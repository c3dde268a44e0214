"""Rotary attention as a Flax linen module: project, rotate, store, attend, project."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rope_jax._checks import check_axes
from rope_jax.attention.attend import attend_by_facts, dropout_facts, fold_traced_scale
from rope_jax.attention.bias import PositionBias
from rope_jax.attention.blocks import weights
from rope_jax.attention.cache import KVCache
from rope_jax.attention.layer_checks import check_call, check_plan, check_ring
from rope_jax.attention.norm import RMSNorm
from rope_jax.attention.paths import AttentionBackend, is_long_prompt
from rope_jax.attention.plan import Plan, make_plan
from rope_jax.attention.quantized import read_layer
from rope_jax.attention.ring import ring_attention
from rope_jax.core.angles import Rotation, rotation
from rope_jax.core.frequencies import Frequencies
from rope_jax.core.named import named
from rope_jax.core.nan_rows import nan_where
from rope_jax.core.primitive import RotateBackend
from rope_jax.core.rope import Rope
from rope_jax.core.rotate import rotate_unchecked

Initializer = Callable[..., Any]

# DenseGeneral creates a kernel as a matrix and reshapes it. Rules in use would apply to the matrix, which lacks
# these axes.
_named = functools.partial(named, by_rules=False)


class RotaryAttention(nn.Module, kw_only=True):
    """Self-attention whose queries and keys are rotated to their positions (RoFormer, section 3.2).

    ``x -> q, k, v -> QK-norm -> rotate q and k -> cache -> attend -> y``.

    Example:
      >>> import jax, jax.numpy as jnp, rope_jax
      >>> rope = rope_jax.Rope(head_dim=16, schedule=rope_jax.Standard())
      >>> attention = rope_jax.RotaryAttention(num_heads=4, num_kv_heads=2, head_dim=16, rope=rope)
      >>> x = jnp.ones((2, 5, 64))  # [B, T, D]
      >>> params = attention.init(jax.random.key(0), x)
      >>> attention.apply(params, x).shape
      (2, 5, 64)
      >>> cache = rope_jax.init_cache(batch=2, capacity=8, num_kv_heads=2, head_dim=16)
      >>> y, cache = attention.apply(params, x, cache=cache)
      >>> cache.num_tokens.tolist()
      [5, 5]

    Kernels carry the logical axis names ``embed``, ``heads``, ``kv_heads`` and ``head_dim``
    (:func:`flax.linen.with_logical_partitioning`); :func:`flax.linen.unbox` strips them. A call with the collection
    ``intermediates`` mutable stores the attention weights there, as ``weights [B, N, T, S]``.

    Attributes, shape:
      num_heads: N.
      num_kv_heads: K, a divisor of N: multi-head (K = N, the default), grouped-query or multi-query (K = 1).
      head_dim: H; must be even if the whole head is rotated.

    Attributes, rotation and position:
      rope: the rotation, or None for no rotation.
      learn_frequencies: makes the frequencies a parameter ``inv_freq`` in float32, with the shape and values that
        the rope's schedule gives: ``[R/2]``, ``[A, R/2]`` or ``[N, A, R/2]`` (RoPE-Mixed: Heo et al. 2024, section
        3.2). Otherwise the rotation has no parameters.
      position_bias: added to the scores: :class:`T5Bias`, :class:`ALiBi` or a callable of the same form, beside the
        rotation or with ``rope=None``. Reads sequence indices, as causality and windows do, not positions.

    Attributes, masking:
      causal: whether a token reads only itself and earlier tokens.
      window: a token reads only tokens less than this many away, itself included: a sliding window.
      dropout_rate: of the attention weights; needs the rng stream ``dropout`` unless deterministic.
      deterministic: whether dropout is off, unless a call says otherwise: for ``nn.remat`` and ``nn.jit``, whose
        calls take no flags.

    Attributes, numerics:
      logit_scale: multiplies q.k; None is ``1/sqrt(H)``.
      logit_cap: soft bound of the scores; see :func:`rope_jax.attend`.
      learn_sinks: makes a score without a value a parameter of each head, ``sink_logits [N]`` in float32, which
        starts at 0: see :func:`rope_jax.attend`.
      qk_norm: RMSNorm over H of q and of k, before the rotation.
      qk_norm_epsilon: added to the mean square in the QK-norm.
      qk_norm_unit_offset: whether the QK-norm multiplies by 1 + scale (Gemma 3).
      use_bias: whether the four projections have biases.
      use_out_bias: whether the output projection has a bias; None is as ``use_bias``.
      dtype: of the computation; None is the promotion of x and the parameters (strict promotion demands equality).
      param_dtype: of the parameters.
      kernel_init: of the four kernels.
      bias_init: of the biases.
      implementation: of attention, see :func:`rope_jax.attend`; ``"xla"`` and ``"plain"`` are for the
        rotation too.
      attention_fn: ``attention_fn(q, k, v, facts)``, called in place of :func:`rope_jax.attend`, for a kernel of
        your own: q and the result ``[B, T, N, H]``, k and v ``[B, S, K, H]``, rotated, with the
        :class:`rope_jax.attention.Facts` of the call. With a cache, k and v are all of its slots.
      dot_general: of the projections, in place of :func:`jax.lax.dot_general`.

    Attributes, sharding:
      ring_axis: the mesh axis along which T is divided, if no device is to hold all keys: attention is then
        :func:`rope_jax.attention.ring_attention`, by the ``sequence_index`` of the call. Parameters do not change.

    Raises:
      ValueError: if the fields, or the arguments of a call, do not go together.
      TypeError: if a field or an argument is of another kind.
    """

    num_heads: int
    head_dim: int
    rope: Rope | None
    num_kv_heads: int | None = None
    position_bias: PositionBias | None = None
    causal: bool = True
    window: int | None = None
    logit_cap: float | None = None
    logit_scale: float | None = None
    qk_norm: bool = False
    qk_norm_epsilon: float = 1e-6
    qk_norm_unit_offset: bool = False
    use_bias: bool = False
    use_out_bias: bool | None = None
    dropout_rate: float = 0.0
    deterministic: bool = True
    learn_frequencies: bool = False
    learn_sinks: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros_init()
    implementation: AttentionBackend | None = None
    attention_fn: Callable[..., jax.Array] | None = None
    ring_axis: str | None = None
    dot_general: Callable[..., jax.Array] | None = None

    @nn.compact
    def __call__(
        self,
        x,
        positions=None,
        *,
        sequence_index=None,
        mask=None,
        segment_ids=None,
        cache: KVCache | None = None,
        context_length=None,
        plan: Plan | None = None,
        deterministic: bool | None = None,
    ):
        """Attention over x, and over the tokens in the cache.

        Args, tokens:
          x: floating ``[B, T, D]``.
          positions: integers or floats ``[T]`` or ``[B or 1, T]``; by default the count of real tokens so far,
            within each segment, after the tokens in the cache. For a rope of A axes ``[T, A]`` or ``[B or 1, T,
            A]``, never by default; integers ``[B or 1, T]`` of text stand on all axes.
          sequence_index: integers ``[B or 1, T]``, the rank of each token in its row, if tokens are stored out of
            order (:func:`rope_jax.attention.zigzag_sequence_index`). Causality and windows go by it; positions
            default to it.

        Args, masking:
          mask: bool or integer ``[B, T]``, nonzero at real tokens, with padding anywhere. Padding is never read and
            never cached. Outputs at padding are undefined.
          segment_ids: integers ``[B, T]`` of packed sequences: runs of equal ids read only themselves.

        Args, cache:
          cache: keys and values of the tokens before x.
          context_length: the length that the frequencies are for, if the schedule depends on it
            (:class:`DynamicNTK`, :class:`LongRope`): integers, ``[]`` or ``[B]``. By default the tokens of each row
            so far, these included, if there is a cache.

        Args, mode:
          plan: of :func:`rope_jax.attention.make_plan`, in place of ``positions``, ``sequence_index``, ``mask``,
            ``segment_ids`` and ``context_length``: make it once for many layers. The caller then prepares the cache
            by ``plan.begin(cache)``, and advances its counters by ``plan.end(cache)`` after the last layer. The
            plan must have the window and position bias of the layer; a traced window comes by the plan alone.
          deterministic: whether dropout is off; None takes the field.

        Returns:
          ``y [B, T, D]``, or ``(y, cache)`` if a cache was given. A row whose cache overflowed is NaN.
        """
        x = jnp.asarray(x)
        deterministic = self.deterministic if deterministic is None else deterministic
        arguments: dict = dict(
            positions=positions,
            sequence_index=sequence_index,
            mask=mask,
            segment_ids=segment_ids,
            context_length=context_length,
        )
        own_plan = plan is None
        if plan is None:
            check_call(self, x, cache)
            plan = _make_plan(self, x.shape[:2], cache, arguments)
            cache = None if cache is None else plan.begin(cache)
        else:
            check_plan(self, plan, x, cache, arguments)
        if self.ring_axis is not None:
            check_ring(self, plan, deterministic)

        # Not even NaN at padding may reach real tokens or their gradients.
        if plan.mask is not None:
            x = jnp.where(plan.mask[:, :, None], x, jnp.zeros_like(x))
        q, k, v = _project(self, x)
        rotation, key_rotation = self._rotations(plan)
        if rotation is not None and self.rope is not None:
            if key_rotation is None:
                q, k = self._rotate([q, k], rotation)
            else:  # the cache stores keys unrotated
                (q,) = self._rotate([q], rotation)
        stored = None
        if cache is not None:
            plain, consecutive = self.implementation == "plain", cache.slots.consecutive(plan.mask)
            cache = cache.store(k, v, plan.slots, consecutive=consecutive, plain=plain)
            if key_rotation is not None and self.rope is not None:
                k, v = cache.read(q.dtype)
                (k,) = self._rotate([k], key_rotation)
            else:
                stored = cache
        y = _attend(self, q, k, v, plan, deterministic, stored)
        y = nn.DenseGeneral(
            x.shape[-1],
            axis=(-2, -1),
            use_bias=self.use_bias if self.use_out_bias is None else self.use_out_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=_named(self.kernel_init, ("heads", "head_dim", "embed")),
            bias_init=_named(self.bias_init, ("embed",)),
            dot_general=self.dot_general,
            name="out",
        )(y)
        if cache is None:
            return y
        overflowed = cache.slots.overflowed(plan.num_tokens)
        y = nan_where(overflowed[:, None, None], y)
        return y, plan.end(cache) if own_plan else cache

    def _rotations(self, plan: Plan) -> tuple[Rotation | None, Rotation | None]:
        """The rotations of queries and of keys stored unrotated, by the plan or by learned frequencies."""
        if not self.learn_frequencies or self.rope is None:
            return plan.rotation, plan.key_rotation
        start = self.rope.frequencies()
        if not isinstance(start, Frequencies):
            raise ValueError(f"learn_frequencies needs a schedule of one Frequencies, got {self.rope.schedule}")
        inv_freq = self.param("inv_freq", lambda _: jnp.asarray(start.inv_freq, jnp.float32))
        frequencies = dataclasses.replace(start, inv_freq=inv_freq)
        rotate_to = functools.partial(rotation, frequencies=frequencies)

        return rotate_to(plan.positions), None if plan.key_positions is None else rotate_to(plan.key_positions)

    def _rotate(self, xs: list[jax.Array], rotation: Rotation) -> list[jax.Array]:
        """Arrays ``[B, T, N, H]``, rotated. Shapes follow from the plan and the fields, which are checked."""
        assert self.rope is not None
        backend: RotateBackend | None = self.implementation if self.implementation in ("xla", "plain") else None
        rope = self.rope
        return rotate_unchecked(
            xs, rotation, layout=rope.layout, start=rope.start, blocks=rope.blocks, implementation=backend
        )


def _project(layer: RotaryAttention, x) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries ``[B, T, N, H]``, keys and values ``[B, T, K, H]``, before the rotation."""

    def project(name, heads_axis, num_heads):
        return nn.DenseGeneral(
            (num_heads, layer.head_dim),
            use_bias=layer.use_bias,
            dtype=layer.dtype,
            param_dtype=layer.param_dtype,
            kernel_init=_named(layer.kernel_init, ("embed", heads_axis, "head_dim")),
            bias_init=_named(layer.bias_init, (heads_axis, "head_dim")),
            dot_general=layer.dot_general,
            name=name,
        )(x)

    kv_heads = layer.num_kv_heads or layer.num_heads
    q = project("query", "heads", layer.num_heads)
    k = project("key", "kv_heads", kv_heads)
    v = project("value", "kv_heads", kv_heads)
    if layer.qk_norm:
        norm = functools.partial(
            RMSNorm,
            axis="head_dim",
            epsilon=layer.qk_norm_epsilon,
            unit_offset=layer.qk_norm_unit_offset,
            param_dtype=layer.param_dtype,
        )
        q, k = norm(name="query_norm")(q), norm(name="key_norm")(k)
    return q, k, v


def _attend(layer: RotaryAttention, q, k, v, plan: Plan, deterministic: bool, stored: KVCache | None) -> jax.Array:
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
    options: dict = dict(scale=scale, logit_cap=layer.logit_cap)
    if layer.learn_sinks:
        zeros = _named(nn.initializers.zeros_init(), ("heads",))
        options["sink_logits"] = layer.param("sink_logits", zeros, (layer.num_heads,), jnp.float32)
    if layer.dropout_rate > 0 and not deterministic:
        if not layer.has_rng("dropout"):
            raise ValueError("rngs must have a key named 'dropout' with dropout_rate above 0: pass rngs= to apply")
        options |= dropout_facts(layer.dropout_rate, layer.make_rng("dropout"))
    # A cache of unrotated keys was read and rotated: k and v are then all of its slots.
    facts = dataclasses.replace(plan.facts(), **options)
    keys: tuple = (k, v, None) if stored is None else (stored.key, stored.value, stored.layer)
    if layer.is_mutable_collection("intermediates"):
        layer.sow("intermediates", "weights", weights(q, read_layer(keys[0], keys[2], q.dtype), facts))
    if layer.attention_fn is not None:
        k, v = (read_layer(each, keys[2], q.dtype) for each in keys[:2])
        return _checked_output(layer.attention_fn(*(x.swapaxes(1, 2) for x in (q, k, v)), facts), q)

    def attend(q, keys, facts) -> jax.Array:
        k, v, number = keys
        return attend_by_facts(q, k, v, facts, layer=number, implementation=layer.implementation)

    if stored is None or not is_long_prompt(q, stored.key) or layer.implementation is not None:
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


def _make_plan(layer: RotaryAttention, shape: tuple[int, int], cache: KVCache | None, arguments: dict) -> Plan:
    """The plan of a layer that is called alone."""
    if layer.rope is None and arguments["positions"] is not None:
        raise ValueError("positions must be left out without rope: nothing reads them")
    return make_plan(
        layer.rope,
        shape,
        causal=layer.causal,
        window=layer.window,
        position_bias=layer.position_bias,
        num_heads=layer.num_heads,
        cache=cache,
        learn_frequencies=layer.learn_frequencies,
        **arguments,
    )
