"""Rotary attention as a Flax NNX module: it holds parameters, random keys and a cache. All else is shared."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import InitVar
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
from flax import nnx

from rope_jax._checks import check_axes, check_flag, check_function, check_integer, check_kinds
from rope_jax.attention.bias import PositionBias
from rope_jax.attention.cache import KVCache
from rope_jax.attention.empty_cache import init_cache
from rope_jax.attention.layer import Initializer
from rope_jax.attention.layer_checks import check_fields, has_dropout
from rope_jax.attention.paths import AttentionBackend
from rope_jax.attention.plan import Plan
from rope_jax.attention.self_attention import Parts, learnable_frequencies, self_attention
from rope_jax.attention.slots import Eviction
from rope_jax.core.explicit import placed_product, promoted_beside
from rope_jax.core.rope import Rope
from rope_jax.nnx.norm import RMSNorm
from rope_jax.nnx.parameters import named

KERNEL_INIT, BIAS_INIT = nnx.initializers.lecun_normal(), nnx.initializers.zeros_init()


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class RotaryAttention(nnx.Module):
    """Self-attention whose queries and keys are rotated to their positions, as :class:`rope_jax.RotaryAttention`.

    Example:
      >>> import jax.numpy as jnp, rope_jax
      >>> from flax import nnx
      >>> rope = rope_jax.Rope(head_dim=16, schedule=rope_jax.Standard())
      >>> sizes = dict(in_features=64, num_heads=4, num_kv_heads=2, head_dim=16)
      >>> attention = rope_jax.nnx.RotaryAttention(**sizes, rope=rope, rngs=nnx.Rngs(0))
      >>> x = jnp.ones((2, 5, 64))  # [B, T, D]
      >>> attention(x).shape
      (2, 5, 64)

      With a cache inside the module, or passed as a value:

      >>> attention.init_cache(batch=2, capacity=8)
      >>> y = attention(x, decode=True)
      >>> attention.cache.get_value().num_tokens.tolist()
      [5, 5]
      >>> cache = rope_jax.init_cache(batch=2, capacity=8, num_kv_heads=2, head_dim=16)
      >>> y, cache = attention(x, cache=cache)

    Kernels carry the logical axis names ``embed``, ``heads``, ``kv_heads`` and ``head_dim`` as metadata, which
    ``nnx.get_partition_spec`` reads. NNX places a kernel as it is made if a mesh is in use (``jax.set_mesh``) and
    each name has a rule (``nnx.logical_axis_rules``) or is an axis of the mesh.

    All other attributes are those of :class:`rope_jax.RotaryAttention`. ``position_bias`` may be a linen module,
    such as :class:`rope_jax.attention.T5Bias`: it becomes an NNX module.

    Attributes:
      in_features: D.
      kv_features: D' of cross-attention; None is D.
      deterministic: whether dropout is off, unless a call says otherwise; ``train()`` and ``eval()`` set it.
      decode: whether calls read and extend the cache inside the module, unless a call says otherwise.
      rngs: of the parameters, and of dropout: its stream ``dropout`` (or the default stream) is forked.
      cache: ``nnx.Cache`` of a :class:`KVCache`, made by :meth:`init_cache`; None at first.

    Raises:
      ValueError: if the fields, or the arguments of a call, do not go together.
      TypeError: if a field or an argument is of another kind.
    """

    in_features: int
    kv_features: int | None = None
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
    kernel_init: InitVar[Initializer] = KERNEL_INIT
    bias_init: InitVar[Initializer] = BIAS_INIT
    implementation: AttentionBackend | None = None
    attention_fn: Callable[..., jax.Array] | None = None
    ring_axis: str | None = None
    dot_general: Callable[..., jax.Array] | None = None
    decode: bool = False
    rngs: InitVar[nnx.Rngs]
    cache: nnx.Cache[KVCache] | None = dataclasses.field(init=False)
    dropout_stream: nnx.RngStream | None = dataclasses.field(init=False)

    def __post_init__(self, kernel_init: Initializer, bias_init: Initializer, rngs: nnx.Rngs):
        check_kinds(self, sizes=["in_features", "kv_features"], optional=["kv_features"])
        check_fields(self)
        check_function("kernel_init", kernel_init)
        check_function("bias_init", bias_init)
        if not isinstance(rngs, nnx.Rngs):
            raise TypeError(f"rngs must be nnx.Rngs, got {type(rngs).__name__}: pass nnx.Rngs(seed)")
        if not ("params" in rngs or "default" in rngs):
            raise ValueError(f"rngs must have a stream named 'params', got {sorted(rngs)}: pass nnx.Rngs(seed)")
        linear = functools.partial(
            nnx.LinearGeneral,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            dot_general=_DotGeneral(self.dot_general),
            promote_dtype=_promote_dtype,
            rngs=rngs,
        )

        def project(num_features: int, num_heads: int, axis: str) -> nnx.LinearGeneral:
            return linear(
                num_features,
                (num_heads, self.head_dim),
                use_bias=self.use_bias,
                kernel_init=named(kernel_init, ("embed", axis, "head_dim")),
                bias_init=named(bias_init, (axis, "head_dim")),
            )

        kv = self.kv_features or self.in_features, self.num_kv_heads or self.num_heads, "kv_heads"
        self.query = project(self.in_features, self.num_heads, "heads")
        self.key, self.value = project(*kv), project(*kv)
        self.out = linear(
            (self.num_heads, self.head_dim),
            self.in_features,
            axis=(-2, -1),
            use_bias=self.use_bias if self.use_out_bias is None else self.use_out_bias,
            kernel_init=named(kernel_init, ("heads", "head_dim", "embed")),
            bias_init=named(bias_init, ("embed",)),
        )
        if self.qk_norm:
            norm = functools.partial(
                RMSNorm,
                self.head_dim,
                axis="head_dim",
                epsilon=self.qk_norm_epsilon,
                unit_offset=self.qk_norm_unit_offset,
                param_dtype=self.param_dtype,
            )
            self.query_norm, self.key_norm = norm(), norm()
        if self.learn_frequencies:
            self.inv_freq = nnx.Param(jnp.asarray(learnable_frequencies(self).inv_freq, jnp.float32))
        if self.learn_sinks:
            zeros = named(nnx.initializers.zeros_init(), ("heads",))
            self.sink_logits = nnx.Param(zeros(None, (self.num_heads,), jnp.float32))
        if isinstance(self.position_bias, flax.linen.Module):
            bias = nnx.bridge.ToNNX(self.position_bias)
            sample = jnp.zeros((1, 1, 1), jnp.int32)
            self.position_bias = nnx.data(bias.lazy_init(sample, self.num_heads, self.causal, rngs=rngs))
        has_key = has_dropout(self) and ("dropout" in rngs or "default" in rngs)
        self.dropout_stream = nnx.data(rngs.dropout.fork() if has_key else None)
        self.cache = nnx.data(None)

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
        decode: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        sow_weights: bool = False,
    ):
        """Attention over x, and over the tokens in the cache. Arguments of the linen layer are the same here.

        Args:
          x: floating ``[B, T, D]``.
          positions: see :class:`rope_jax.RotaryAttention`, as for all arguments that are not named below.
          deterministic: whether dropout is off; None takes the field.
          decode: whether to read and extend the cache inside the module; None takes the field. A ``plan`` is then
            made with ``cache=layer.cache.get_value()``, and the layer calls ``plan.begin`` and ``plan.end``.
          rngs: of dropout, in place of those given to the constructor.
          sow_weights: gives the attention weights ``[B, N, T, S]`` to ``nnx.capture(..., nnx.Intermediate)``, named
            ``weights``.

        Returns:
          ``y [B, T, D]``, or ``(y, cache)`` if a cache was given. A row whose cache overflowed is NaN.
        """
        deterministic = self.deterministic if deterministic is None else check_flag("deterministic", deterministic)
        sow_weights = check_flag("sow_weights", sow_weights)
        if not isinstance(rngs, nnx.Rngs | nnx.RngStream | None):
            raise TypeError(
                f"rngs must be nnx.Rngs or a stream of these, got {type(rngs).__name__}: pass nnx.Rngs(dropout=0)"
            )
        check_axes("x", x, "B T D", D=self.in_features)
        if kv is not None:
            check_axes("kv", kv, "B S D", D=self.kv_features or self.in_features)
        elif self.kv_features not in (None, self.in_features):
            raise ValueError(f"kv must be given with kv_features={self.kv_features}, got None")
        decode, held = self.decode if decode is None else check_flag("decode", decode), self.cache
        if decode:
            if cache is not None:
                raise ValueError("cache must be left out with decode=True, which takes the cache inside the module")
            if held is None:
                raise ValueError("cache must be made before decode=True: call init_cache(batch=, capacity=)")
            if not isinstance(held, nnx.Variable):
                raise TypeError(f"cache must be an nnx.Cache, as from init_cache, got {type(held).__name__}")
            cache = held.get_value()
            cache = plan.begin(cache) if isinstance(plan, Plan) else cache
        out = self_attention(
            self,
            x,
            dict(
                positions=positions,
                sequence_index=sequence_index,
                mask=mask,
                segment_ids=segment_ids,
                prefix_length=prefix_length,
                attention_mask=attention_mask,
                kv_positions=kv_positions,
                kv_mask=kv_mask,
                context_length=context_length,
            ),
            kv=kv,
            cache=cache,
            plan=plan,
            deterministic=deterministic,
            parts=Parts(
                project=self._project,
                out=lambda y, _: self.out(y),
                inv_freq=lambda: self.inv_freq[...],
                sink_logits=lambda: self.sink_logits[...],
                dropout_key=functools.partial(_dropout_key, self.dropout_stream if rngs is None else rngs),
                sow=functools.partial(self.sow, nnx.Intermediate, "weights") if sow_weights else None,
                sow_name="sow_weights",
            ),
        )
        if not decode or held is None:
            return out
        y, cache = out
        held.set_value(cache if plan is None else plan.end(cache))
        return y

    def init_cache(
        self,
        *,
        batch: int,
        capacity: int,
        dtype=None,
        eviction: Eviction | None = None,
        num_sink_tokens: int = 0,
        rotated: bool | None = None,
    ) -> None:
        """Puts an empty cache into the module, in place of any before; see :func:`rope_jax.init_cache`.

        Args:
          batch: B.
          capacity: S.
          dtype: of stored keys and values; None is ``dtype`` of the layer, or ``param_dtype`` without one.
          eviction: what a full row does.
          num_sink_tokens: tokens at the start of a row which are never evicted.
          rotated: whether keys are stored rotated; None as in :meth:`rope_jax.Decoder.init_cache`.
        """
        num_sink_tokens = check_integer("num_sink_tokens", num_sink_tokens, least=0)
        if rotated is None:
            rotated = not num_sink_tokens and not (self.rope is not None and self.rope.needs_context_length)
        cache = init_cache(
            batch=batch,
            capacity=capacity,
            num_kv_heads=self.num_kv_heads or self.num_heads,
            head_dim=self.head_dim,
            dtype=(self.param_dtype if self.dtype is None else self.dtype) if dtype is None else dtype,
            eviction=eviction,
            num_sink_tokens=num_sink_tokens,
            rotated=rotated,
            rope=self.rope,
        )
        self.cache = nnx.Cache(cache)

    def set_view(self, deterministic: bool | None = None, decode: bool | None = None) -> None:
        """Called by ``nnx.view``.

        Args:
          deterministic: whether dropout is off.
          decode: whether calls read and extend the cache inside the module.
        """
        for name, value in dict(deterministic=deterministic, decode=decode).items():
            if value is not None:
                setattr(self, name, check_flag(name, value))

    def _project(self, x, kv=None) -> tuple[jax.Array, jax.Array, jax.Array]:
        kv = x if kv is None else kv
        q, k, v = self.query(x), self.key(kv), self.value(kv)
        return (self.query_norm(q), self.key_norm(k), v) if self.qk_norm else (q, k, v)


def _dropout_key(rngs: nnx.Rngs | nnx.RngStream | None) -> jax.Array:
    if isinstance(rngs, nnx.Rngs):
        rngs = rngs.dropout if "dropout" in rngs or "default" in rngs else None
    if not isinstance(rngs, nnx.RngStream):
        raise ValueError(
            "rngs must have a stream named 'dropout' with dropout_rate above 0: pass nnx.Rngs(dropout=seed) to the "
            "constructor or to the call"
        )
    return rngs()


@dataclasses.dataclass(frozen=True)
class _DotGeneral:
    """``dot_general`` for any mesh, as NNX calls it. Equal by value, so that equal layers compile once."""

    function: Callable[..., jax.Array] | None

    def __call__(self, *args, out_sharding=None, **options) -> jax.Array:
        return placed_product(self.function)(*args, **options)


def _promote_dtype(arrays, /, *, dtype=None, inexact=True):
    return promoted_beside(*arrays, dtype=dtype, inexact=inexact)
