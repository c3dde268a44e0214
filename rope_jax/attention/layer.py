"""The Flax linen room: which parameters does rotary attention have, and in which sequence_index do things happen?"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rope_jax._checks import check_axes, check_callable, check_dtype, check_mask, device_array
from rope_jax.attention.attend import AttentionBackend, attend, attention_weights, check_options, window_size
from rope_jax.attention.bias import PositionBias, bias_of_order
from rope_jax.attention.cache import KVCache, check_cache
from rope_jax.attention.mask import default_positions, next_positions, same_segment, visible
from rope_jax.attention.norm import RMSNorm
from rope_jax.attention.ring import checked_sequence_index, ring_attention
from rope_jax.core.angles import Rotation
from rope_jax.core.angles import rotation as rotation_at
from rope_jax.core.frequencies import Frequencies
from rope_jax.core.rope import Rope

Initializer = Callable[..., Any]

# DenseGeneral makes a kernel as a matrix and shapes it then. Rules in use (flax.linen.logical_axis_rules) would be
# applied to the matrix, which has not these axes: the names are for those who place the parameters.
_named = functools.partial(nn.with_logical_partitioning, rules=())


class RotaryAttention(nn.Module, kw_only=True):
    """Self-attention whose queries and keys are rotated to their positions (RoFormer, section 3.2).

    ``x -> q, k, v -> QK-norm -> rotate q and k -> cache -> attend -> y``. Keys are rotated before they
    enter the cache, or whenever they are read, as the cache says (:func:`init_cache`). Encodings that bias the
    scores have their place too
    (``position_bias``), beside the rotation or with ``rope=None``. With ``num_kv_heads`` between 1 and
    ``num_heads`` it is multi-head, grouped-query or multi-query attention. RoPE has no parameter here unless
    ``learn_frequencies``; then ``inv_freq [R/2]`` is one, in float32.

    Kernels carry the logical axis names ``embed``, ``heads``, ``kv_heads`` and ``head_dim``
    (:func:`flax.linen.with_logical_partitioning`); :func:`flax.linen.unbox` strips them. A call with the
    collection ``intermediates`` mutable leaves the attention weights there, as ``weights [B, N, T, S]``.

    Attributes:
      num_heads: N.
      head_dim: H, even if rotated whole.
      rope: the recipe of the rotation, or None for none.
      position_bias: what is added to the scores: :class:`T5Bias`, :class:`ALiBi` or your own callable of that
        form. It goes by each token's place in line, as causality and windows do, whatever the positions.
      num_kv_heads: K, a divisor of N; N where it is None.
      causal: whether a token reads only itself and what came before.
      window: a token reads only tokens less than this many away (its own included): a sliding window.
      logit_cap: soft bound of the scores; see :func:`attend`.
      logit_scale: multiplies q.k; ``1/sqrt(H)`` where it is None.
      qk_norm: RMSNorm over H of q and of k, before the rotation.
      qk_norm_epsilon: added to the mean square there.
      qk_norm_unit_offset: whether their scales are what is added to 1 (Gemma 3).
      use_bias: whether the four projections have biases.
      use_out_bias: whether the output projection has one; as ``use_bias`` where it is None.
      dropout_rate: of the attention weights; needs the rng stream ``dropout`` unless deterministic.
      learn_frequencies: makes the rope's frequencies a parameter that starts at the schedule's.
      dtype: of the computation; where it is None, what x and the parameters promote to (under strict promotion
        they must then agree).
      param_dtype: of the parameters.
      kernel_init: of the four kernels.
      bias_init: of the biases.
      implementation: ``"xla"`` for XLA's own programs throughout, ``"cudnn"`` for that library's attention on a
        GPU; where it is None, :func:`jax.nn.dot_product_attention` and :func:`rotate` choose.
      ring_axis: the mesh axis along which T is divided, where no device is to hold all keys: attention is then
        :func:`ring_attention`, by the ``sequence_index`` of the call. Parameters do not depend on it.

    Raises:
      ValueError: if the fields, or the arguments of a call, do not go together; the message says which.

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
    learn_frequencies: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros_init()
    implementation: AttentionBackend | None = None
    ring_axis: str | None = None

    @nn.compact
    def __call__(
        self,
        x,
        positions=None,
        *,
        sequence_index=None,
        rotation: Rotation | None = None,
        key_rotation: Rotation | None = None,
        bias=None,
        mask=None,
        segment_ids=None,
        cache: KVCache | None = None,
        window: int | jax.Array | None = None,
        max_window: int | None = None,
        deterministic: bool = True,
    ):
        """Attention over x, and over what the cache holds.

        Args:
          x: floating ``[B, T, D]``.
          positions: int32 ``[B, T]`` (or ``[1, T]``; ``[..., T, A]`` if the rope has axes). Where it is None:
            the count of real tokens so far, within each segment, after those in the cache. Unused where the
            rope is None.
          sequence_index: integers ``[B or 1, T]``, each token's place in line, where they do not stand in line: tokens in
            :func:`zigzag_sequence_index`, say. Causality and windows go by it, and positions are it where they are None.
          rotation: cos and sin at the positions, in their place: compute them once for all layers. Where rotated
            keys of a cache are to be turned for another length, :meth:`KVCache.rerotate` is then yours to call.
          key_rotation: beside a rotation, that of the slots of a cache whose keys are unrotated: at
            ``cache.positions(length)`` with the row's length after these tokens.
          bias: floating ``[B or 1, N or 1, T, S]``, what is added to the scores in place of ``position_bias``:
            compute it once for all layers. S is the capacity of the cache if there is one.
          mask: bool or integer ``[B, T]``, nonzero at real tokens, on either side of the padding. Padding is
            never read and never cached; what comes out at it means nothing.
          segment_ids: integers ``[B, T]`` of packed sequences: runs of equal ids, which read only themselves.
          cache: keys and values of the tokens before x. With one, a rope whose frequencies depend on the length
            takes those for the tokens of each row so far, these included: unrotated keys are rotated so when they
            are read, and rotated ones are turned from one list of :class:`LongRope` to the other where it switches.
          window: an integer in place of the field, which may be traced: for scanned layers that differ.
          max_window: with a traced window and a cache, the most that it may be; see :meth:`KVCache.write`.
          deterministic: whether dropout is off.

        Returns:
          ``y [B, T, D]``, or ``(y, cache)`` if a cache was given. A row whose cache overflowed is NaN.
        """
        self._check_fields()
        x = jnp.asarray(x)
        check_axes("x", x, "B T D")
        batch, length, width = x.shape
        check_dtype("x", x, jnp.floating, "floating")
        mask, segment_ids = self._check_call(
            batch, length, positions, rotation, key_rotation, bias, mask, segment_ids, cache
        )
        if sequence_index is not None or self.ring_axis is not None:
            sequence_index = self._checked_sequence_index(
                sequence_index, batch, length, bias, mask, segment_ids, cache, deterministic
            )
        if window is not None and self.window is not None:
            raise ValueError(f"window must be left out where the field window={self.window} is set")
        window = window_size(self.window if window is None else window)

        if mask is not None:  # not even NaN at a padded token reaches the real ones, or their gradients
            x = jnp.where(mask[:, :, None], x, jnp.zeros_like(x))
        kv_heads = self.num_kv_heads or self.num_heads
        q = self._project("query", "heads", self.num_heads)(x)
        k = self._project("key", "kv_heads", kv_heads)(x)
        v = self._project("value", "kv_heads", kv_heads)(x)
        if self.qk_norm:
            fields = dict(
                axis="head_dim",
                epsilon=self.qk_norm_epsilon,
                unit_offset=self.qk_norm_unit_offset,
                param_dtype=self.param_dtype,
            )
            q, k = RMSNorm(name="query_norm", **fields)(q), RMSNorm(name="key_norm", **fields)(k)

        # Each row's place in line among its real tokens: what causality and windows go by.
        seen = None if cache is None else cache.num_tokens  # read before it advances
        by_index = sequence_index is None
        if sequence_index is None:
            sequence_index = next_positions((batch, length), mask, seen=seen)
        after = None if cache is None else cache.length_after(length, mask)
        if self.rope is not None:
            if rotation is None:
                if positions is None:
                    counted = default_positions(self.rope, (batch, length), mask, segment_ids, seen)
                    positions = counted if by_index else sequence_index
                elif cache is not None:
                    positions = cache.stored_positions(device_array("positions", positions), self.rope)
                rotation, key_rotation, cache = self._rotations(self.rope, positions, cache, after)
            turn = functools.partial(
                self.rope.rotate_all, implementation="xla" if self.implementation == "xla" else None
            )
            if key_rotation is None:
                q, k = turn([q, k], rotation)
            else:
                (q,) = turn([q], rotation)

        if self.position_bias is not None:
            slots = sequence_index if cache is None else cache.positions(after)
            bias = bias_of_order(self.position_bias, sequence_index, slots, self.num_heads, self.causal)

        # Rows without gaps are in sequence_index of their index: then `attend` needs flags, not a mask of T x S.
        in_line = by_index and mask is None and cache is None
        readable = None
        if segment_ids is not None:
            readable = same_segment(segment_ids)
        if cache is not None:
            cache = cache.write(k, v, mask, max_window=window if isinstance(window, int) else max_window)
            k, v = cache.read(k.dtype)
            if key_rotation is not None:
                (k,) = turn([k], key_rotation)
            readable = visible(
                sequence_index, cache.order(after), causal=True, window=window, sinks=cache.sinks or 0
            )
        elif not in_line:
            in_reach = visible(sequence_index, sequence_index, causal=self.causal, window=window)
            if mask is not None:
                in_reach &= mask[:, None, None, :]
            readable = in_reach if readable is None else readable & in_reach

        scores = dict(
            bias=bias,
            mask=readable,
            causal=in_line and self.causal,
            window=window if in_line else None,
            scale=self.logit_scale,
            logit_cap=self.logit_cap,
        )
        if self.is_mutable_collection("intermediates"):
            self.sow("intermediates", "weights", attention_weights(q, k, **scores))
        if self.ring_axis is not None:
            y = ring_attention(
                q,
                k,
                v,
                sequence_index,
                axis_name=self.ring_axis,
                causal=self.causal,
                window=window,
                scale=self.logit_scale,
                logit_cap=self.logit_cap,
            )
        else:
            y = attend(
                q,
                k,
                v,
                **scores,
                dropout_rate=0.0 if deterministic else self.dropout_rate,
                dropout_rng=None if deterministic or not self.dropout_rate else self.make_rng("dropout"),
                implementation=self.implementation,
            )
        y = nn.DenseGeneral(
            width,
            axis=(-2, -1),
            use_bias=self.use_bias if self.use_out_bias is None else self.use_out_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=_named(self.kernel_init, ("heads", "head_dim", "embed")),
            bias_init=_named(self.bias_init, ("embed",)),
            name="out",
        )(y)
        if cache is None:
            return y
        return jnp.where(cache.overflowed[:, None, None], jnp.asarray(jnp.nan, y.dtype), y), cache

    def _project(self, name, heads_axis, num_heads):
        return nn.DenseGeneral(
            (num_heads, self.head_dim),
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=_named(self.kernel_init, ("embed", heads_axis, "head_dim")),
            bias_init=_named(self.bias_init, (heads_axis, "head_dim")),
            name=name,
        )

    def _rotations(self, rope: Rope, positions, cache: KVCache | None, after):
        """The rotation of the queries, that of keys held unrotated, and the cache as these need it."""
        at: Callable[..., Rotation]
        if self.learn_frequencies:
            at = functools.partial(rotation_at, frequencies=self._learned_frequencies(rope), axes=rope.axes)
        elif not rope.needs_context_length:
            at = rope.rotation
        elif cache is None:
            raise ValueError(
                "rotation must be given, as rope.rotation(positions, context_length=...), with a rope whose "
                f"{type(rope.schedule).__name__} has no length, got None"
            )
        else:
            length = cache.context_length(after)
            at = functools.partial(rope.rotation, context_length=length)
            cache = cache.rerotate(rope, length, growing=True) if cache.rotated else cache
        held = None if cache is None or cache.rotated else at(cache.positions(after))
        return at(positions), held, cache

    def _learned_frequencies(self, rope: Rope) -> Frequencies:
        start = rope.frequencies()
        if not isinstance(start, Frequencies):
            raise ValueError(f"learn_frequencies needs a schedule of one Frequencies, got {rope.schedule}")
        inv_freq = self.param("inv_freq", lambda _: jnp.asarray(start.inv_freq, jnp.float32))
        return Frequencies(inv_freq, start.attention_factor)

    def _check_fields(self):
        if self.num_heads < 1:
            raise ValueError(f"num_heads must be at least 1, got {self.num_heads}")
        if self.num_kv_heads is not None and (self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads):
            raise ValueError(f"num_kv_heads must divide num_heads={self.num_heads}, got {self.num_kv_heads}")
        if not isinstance(self.rope, Rope | None):
            raise TypeError(f"rope must be a Rope or None, got {type(self.rope).__name__}")
        if self.rope is not None and self.rope.head_dim != self.head_dim:
            raise ValueError(f"rope.head_dim must be head_dim={self.head_dim}, got {self.rope.head_dim}")
        if self.learn_frequencies and self.rope is None:
            raise ValueError("rope must be given with learn_frequencies, got None")
        check_callable("position_bias", self.position_bias, "distance", "num_heads", "causal")
        check_options(self.logit_cap, self.dropout_rate)
        if self.ring_axis is not None and self.implementation == "cudnn":
            raise ValueError("implementation must be None or 'xla' with ring_axis, got 'cudnn'")

    def _checked_sequence_index(self, sequence_index, batch, length, bias, mask, segment_ids, cache, deterministic):
        """The sequence_index as int32, if it goes together with the other arguments and, on a ring, they with that."""
        barred = {"cache": cache, "segment_ids": segment_ids}  # these count tokens by their index
        if self.ring_axis is not None:
            barred |= {"bias": bias, "position_bias": self.position_bias, "mask": mask}
            barred |= {"dropout_rate": None if deterministic else self.dropout_rate or None}
            # A row of weights is on no device.
            barred |= {"mutable intermediates": self.is_mutable_collection("intermediates") or None}
        for name, value in barred.items():
            if value is not None:
                beside = "sequence_index" if self.ring_axis is None else "ring_axis"
                hint = ": decode with clone(ring_axis=None)" if beside == "ring_axis" and name == "cache" else ""
                raise ValueError(f"{name} must be left out with {beside}, got {type(value).__name__}{hint}")
        if sequence_index is None:
            raise ValueError(
                f"sequence_index must be given with ring_axis={self.ring_axis!r}, as zigzag_sequence_index(T, n)[None]"
            )
        return checked_sequence_index(sequence_index, batch, length)

    def _check_call(self, batch, length, positions, rotation, key_rotation, bias, mask, segment_ids, cache):
        """The mask as bool and the segment ids as an array, if the arguments go together."""
        if positions is not None and rotation is not None:
            raise ValueError("positions and rotation must not both be given: a rotation stands for its positions")
        if positions is not None and self.rope is not None:
            positions = device_array("positions", positions)
            check_axes("positions", positions, "... T" if self.rope.axes is None else "... T A", T=length)
        if rotation is not None and (self.rope is None or self.learn_frequencies):
            raise ValueError(
                "rotation must be left out where rope is None or its frequencies are learned: it would be ignored"
            )
        if bias is not None and self.position_bias is not None:
            raise ValueError("bias must be left out where the field position_bias is set: it stands for it")
        if mask is not None:
            mask = check_mask("mask", mask, "B T", B=batch, T=length)
        if segment_ids is not None:
            segment_ids = device_array("segment_ids", segment_ids)
            check_dtype("segment_ids", segment_ids, jnp.integer, "integer")
            check_axes("segment_ids", segment_ids, "B T", B=batch, T=length)
        if cache is not None:
            check_cache(cache)
            if segment_ids is not None:
                raise ValueError("segment_ids must be left out with a cache: a cached row is one sequence")
            if not self.causal:
                raise ValueError("causal must be True with a cache: earlier tokens cannot read later ones")
            kv_heads = self.num_kv_heads or self.num_heads
            axes = "B S K H" if cache.layer is None else "layers B S K H"
            check_axes("cache.key", cache.key, axes, B=batch, K=kv_heads, H=self.head_dim)
            if cache.rope is not None and cache.rope != self.rope:
                raise ValueError(
                    f"cache must hold keys of this layer's rope {self.rope}, got those of {cache.rope}"
                )
        unrotated = cache is not None and not cache.rotated and self.rope is not None
        if (key_rotation is not None) != (unrotated and rotation is not None):
            raise ValueError(
                "key_rotation must be given beside a rotation with a cache of unrotated keys, and only then"
            )
        return mask, segment_ids
