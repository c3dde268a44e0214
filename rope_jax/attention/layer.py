"""Rotary attention as a Flax linen module: project, rotate, store, attend, project."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rope_jax._checks import check_axes, check_dtype, check_flag, device_array
from rope_jax.attention.bias import PositionBias
from rope_jax.attention.cache import KVCache
from rope_jax.attention.empty_cache import init_cache
from rope_jax.attention.norm import RMSNorm
from rope_jax.attention.paths import AttentionBackend
from rope_jax.attention.plan import Plan
from rope_jax.attention.self_attention import Parts, learnable_frequencies, self_attention
from rope_jax.core.explicit import dense_options
from rope_jax.core.named import named
from rope_jax.core.rope import Rope

Initializer = Callable[..., Any]

# DenseGeneral creates a kernel as a matrix and reshapes it. Rules in use would apply to the matrix, which lacks
# these axes.
_named = functools.partial(named, by_rules=False)


class RotaryAttention(nn.Module, kw_only=True):
    """Attention whose queries and keys are rotated to their positions (RoFormer, section 3.2).

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
      >>> decoder = attention.clone(decode=True)  # with the cache in Flax's collection, of 8 tokens
      >>> state = decoder.init(jax.random.key(0), jnp.ones((2, 8, 64)))["cache"]
      >>> y, state = decoder.apply(params | {"cache": state}, x, mutable="cache")

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

    Attributes, decoding:
      decode: whether the cache lives in Flax's collection ``cache``, as in ``nn.MultiHeadDotProductAttention``:
        ``init`` with ``x [B, S, D]`` makes an empty cache of capacity S, and each ``apply(..., mutable="cache")``
        reads and extends it. All other calls take the cache as a value.

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
    decode: bool = False
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
        prefix_length=None,
        attention_mask=None,
        kv=None,
        kv_positions=None,
        kv_mask=None,
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
          prefix_length: integers, ``[]`` or ``[B]``: the first real tokens of each row read each other in both
            directions (prefix-LM: Raffel et al. 2020, section 3.2.1). With a cache, the call that reads the prefix
            must have all of it, and begin with an empty cache.
          attention_mask: bool ``[B or 1, N or 1, T or 1, S]``, True if a query may read a key, in addition to
            causality and all else. With a cache, S is its capacity, and slot n holds token n of a row. A query
            without any key gives 0. Values of masked keys must be finite.

        Args, cross-attention:
          kv: floating ``[B, S, D']``, in place of x for keys and values. The layer must have ``causal=False``. Keys
            and values are projected again with every call.
          kv_positions: of kv, as ``positions`` of x. Both are required with a rope, and in the same unit.
          kv_mask: bool or integer ``[B, S]``, nonzero at real tokens of kv.

        Args, cache:
          cache: keys and values of the tokens before x.
          context_length: the length that the frequencies are for, if the schedule depends on it
            (:class:`DynamicNTK`, :class:`LongRope`): integers, ``[]`` or ``[B]``. By default the tokens of each row
            so far, these included, if there is a cache.

        Args, mode:
          plan: of :func:`rope_jax.attention.make_plan` or :func:`rope_jax.attention.make_cross_plan`, in place of
            positions, masks, indices and lengths: make it once for many layers. The caller then prepares the
            cache by ``plan.begin(cache)``, and advances its counters by ``plan.end(cache)`` after the last layer:
            either left out is an error, and so is a second step by the same plan. The plan must have the window
            and position bias of the layer; a traced window comes by the plan alone.
          deterministic: whether dropout is off; None takes the field.

        Returns:
          ``y [B, T, D]``, or ``(y, cache)`` if a cache was given. A row whose cache overflowed is NaN.
        """
        deterministic = self.deterministic if deterministic is None else check_flag("deterministic", deterministic)
        held = None if self.decode is False else _held_cache(self, x, cache, plan)
        arguments: dict = dict(
            positions=positions,
            sequence_index=sequence_index,
            mask=mask,
            segment_ids=segment_ids,
            prefix_length=prefix_length,
            attention_mask=attention_mask,
            kv_positions=kv_positions,
            kv_mask=kv_mask,
            context_length=context_length,
        )
        sows = self.is_mutable_collection("intermediates")
        out = self_attention(
            self,
            x,
            arguments,
            kv=kv,
            cache=cache if held is None else held.value,
            plan=plan,
            deterministic=deterministic,
            parts=Parts(
                project=functools.partial(_project, self),
                out=functools.partial(_out, self),
                inv_freq=functools.partial(_inv_freq, self),
                sink_logits=functools.partial(_sink_logits, self),
                dropout_key=functools.partial(_dropout_key, self),
                sow=functools.partial(self.sow, "intermediates", "weights") if sows else None,
                sow_name="mutable intermediates",
            ),
        )
        if held is None:
            return out
        y, cache = out
        if not self.is_initializing():
            held.value = cache
        return y


def _held_cache(layer: RotaryAttention, x, cache, plan) -> nn.Variable | None:
    """The variable ``kv`` of the collection ``cache``; ``init`` makes it, with room for as many tokens as x has."""
    if not check_flag("decode", layer.decode):
        return None
    x = device_array("x", x)
    for name, value in dict(cache=cache, plan=plan).items():
        if value is not None:
            raise ValueError(f"{name} must be left out with decode=True, got {type(value).__name__}")
    if not (layer.is_initializing() or layer.has_variable("cache", "kv")):
        raise ValueError(
            "variables must have the collection 'cache' with decode=True: init with x of [B, capacity, D] makes it"
        )

    def empty() -> KVCache:
        check_axes("x", x, "B T D")
        check_dtype("x", x, jnp.floating, "floating")
        return init_cache(
            batch=x.shape[0],
            capacity=x.shape[1],
            num_kv_heads=layer.num_kv_heads or layer.num_heads,
            head_dim=layer.head_dim,
            dtype=jnp.promote_types(x.dtype, layer.param_dtype) if layer.dtype is None else layer.dtype,
            rotated=layer.rope is None or not layer.rope.needs_context_length,
            rope=layer.rope,
        )

    return layer.variable("cache", "kv", empty)


def _project(layer: RotaryAttention, x, kv=None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries ``[B, T, N, H]``, keys and values ``[B, T or S, K, H]``, before the rotation."""

    def project(x, name, heads_axis, num_heads):
        return nn.DenseGeneral(
            (num_heads, layer.head_dim),
            use_bias=layer.use_bias,
            dtype=layer.dtype,
            param_dtype=layer.param_dtype,
            kernel_init=_named(layer.kernel_init, ("embed", heads_axis, "head_dim")),
            bias_init=_named(layer.bias_init, (heads_axis, "head_dim")),
            **dense_options(layer.dot_general),
            name=name,
        )(x)

    kv, kv_heads = x if kv is None else kv, layer.num_kv_heads or layer.num_heads
    q = project(x, "query", "heads", layer.num_heads)
    k = project(kv, "key", "kv_heads", kv_heads)
    v = project(kv, "value", "kv_heads", kv_heads)
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


def _out(layer: RotaryAttention, y, features: int) -> jax.Array:
    """The output ``[B, T, D]`` of attention ``[B, T, N, H]``."""
    return nn.DenseGeneral(
        features,
        axis=(-2, -1),
        use_bias=layer.use_bias if layer.use_out_bias is None else layer.use_out_bias,
        dtype=layer.dtype,
        param_dtype=layer.param_dtype,
        kernel_init=_named(layer.kernel_init, ("heads", "head_dim", "embed")),
        bias_init=_named(layer.bias_init, ("embed",)),
        **dense_options(layer.dot_general),
        name="out",
    )(y)


def _inv_freq(layer: RotaryAttention) -> jax.Array:
    start = learnable_frequencies(layer).inv_freq
    return layer.param("inv_freq", lambda _: jnp.asarray(start, jnp.float32))


def _sink_logits(layer: RotaryAttention) -> jax.Array:
    zeros = _named(nn.initializers.zeros_init(), ("heads",))
    return layer.param("sink_logits", zeros, (layer.num_heads,), jnp.float32)


def _dropout_key(layer: RotaryAttention) -> jax.Array:
    if not layer.has_rng("dropout"):
        raise ValueError("rngs must have a key named 'dropout' with dropout_rate above 0: pass rngs= to apply")
    return layer.make_rng("dropout")
