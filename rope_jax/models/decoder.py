"""A small Llama-shaped model: what do experiments, notebooks and real checkpoints share?"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from rope_jax._checks import as_int32, check_axes, check_callable, check_dtype, check_mask, device_array
from rope_jax.attention.attend import window_size
from rope_jax.attention.bias import PositionBias, bias_of_order
from rope_jax.attention.cache import KVCache, check_cache, init_cache
from rope_jax.attention.layer import Initializer, RotaryAttention
from rope_jax.attention.mask import default_positions, next_positions
from rope_jax.attention.norm import RMSNorm
from rope_jax.attention.ring import checked_sequence_index
from rope_jax.core.angles import Rotation
from rope_jax.core.rope import Rope
from rope_jax.models.embedding import PositionEmbedding


class Decoder(nn.Module, kw_only=True):
    """Tokens in, logits out: pre-norm blocks of :class:`RotaryAttention` and SwiGLU (Touvron et al. 2023).

    ``x = embed(tokens)``; each layer ``x += attention(norm(x))``, ``x += down(silu(gate(n)) * up(n))`` with
    ``n = norm(x)``; logits ``unembed(norm(x))``. Layers are scanned: parameters and caches carry a leading
    axis ``layers``, one layer is compiled, and cos and sin are evaluated once for all of them. Layers may
    differ in their rope and their window, which are then data of that one layer: each distinct rotation is
    evaluated once, ``[C, B, T, R/2]``, and a layer reads its own.

    The fields from ``activation`` on make it other families: Qwen, Phi-3, SmolLM3, Gemma; see :func:`load_hf`.

    Logical axis names beside those of :class:`RotaryAttention`: ``vocab``, ``mlp``, ``layers``.

    Attributes:
      vocab_size: V.
      num_layers: how many blocks.
      width: D.
      num_heads: N.
      head_dim: H.
      mlp_dim: features inside the SwiGLU.
      rope: the recipe of every layer, or None for no position encoding; or a tuple of those, one for each layer,
        which differ by their schedule alone (Gemma 3, section 2: two bases; Yang et al. 2025, "Rope to NoPE and
        back again": layers of None).
      num_kv_heads: K, a divisor of N; N where it is None.
      position_embedding: what is added to the embeddings: :class:`Sinusoidal`, :class:`LearnedPositions`, or your
        own callable of that form. It may stand beside a rope, or with ``rope=None``, as may the next.
      position_bias: what is added to the scores of every layer, evaluated once: :class:`T5Bias`, :class:`ALiBi`;
        see :class:`RotaryAttention`.
      tie_embeddings: whether the unembedding is the embedding transposed.
      qk_norm: see :class:`RotaryAttention`.
      window: see :class:`RotaryAttention`; or a tuple, one for each layer.
      norm_epsilon: added to the mean square in every RMSNorm.
      activation: of the gate, in silu's place: ``down(activation(gate(n)) * up(n))`` (Shazeer 2020, section 2).
      qkv_bias: whether queries, keys and values have biases (Qwen 2, section 2.2).
      out_bias: whether attention's output projection has one.
      mlp_bias: whether gate, up and down have.
      logit_scale: see :class:`RotaryAttention`.
      logit_cap: see :class:`RotaryAttention`; of the scores of attention.
      output_cap: soft bound of the logits of the next token: ``c tanh(logits / c)`` (Gemma 2, section 2).
      post_norms: whether what attention and the MLP return is normed too: ``x += norm(attention(norm(x)))``
        (Gemma 2, section 2).
      norm_unit_offset: whether every norm's scale is what is added to 1; see :class:`RMSNorm`.
      embedding_scale: multiplies the embeddings, both in the computation's dtype (Gemma: ``sqrt(D)``).
      remat: recompute each block in the backward pass instead of storing what is inside it.
      dtype: of the computation; logits are summed in float32 and stay so.
      param_dtype: of the parameters.
      kernel_init: of the kernels.
      embedding_init: of the embedding.
      implementation: as in :class:`RotaryAttention`.
      ring_axis: see :class:`RotaryAttention`.
      activation_sharding: where the residual stream ``[B, T, D]`` lies on a mesh, batch and tokens; its features
        undivided. To be given where parameters are divided along ``embed`` (fully sharded): XLA would divide the
        stream so too, and have every device compute a part of every row.

    Example:
      >>> import jax, jax.numpy as jnp, rope_jax
      >>> model = rope_jax.Decoder(
      ...     vocab_size=256, num_layers=2, width=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64,
      ...     rope=rope_jax.Rope(head_dim=8, schedule=rope_jax.Standard()),
      ... )
      >>> tokens = jnp.zeros((1, 6), int)
      >>> params = model.init(jax.random.key(0), tokens)
      >>> model.apply(params, tokens).shape
      (1, 6, 256)
      >>> _, seen = model.apply(params, tokens, mutable="intermediates")  # and how much each token read of which
      >>> seen["intermediates"]["layers"]["self_attention"]["weights"][0].shape  # [layers, B, N, T, S]
      (2, 1, 4, 6, 6)
    """

    vocab_size: int
    num_layers: int
    width: int
    num_heads: int
    head_dim: int
    mlp_dim: int
    rope: Rope | tuple[Rope | None, ...] | None
    num_kv_heads: int | None = None
    position_embedding: PositionEmbedding | None = None
    position_bias: PositionBias | None = None
    tie_embeddings: bool = True
    qk_norm: bool = False
    window: int | tuple[int | None, ...] | None = None
    norm_epsilon: float = 1e-6
    activation: Callable[[jax.Array], jax.Array] = nn.silu
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    logit_scale: float | None = None
    logit_cap: float | None = None
    output_cap: float | None = None
    post_norms: bool = False
    norm_unit_offset: bool = False
    embedding_scale: float | None = None
    remat: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()
    embedding_init: Initializer = nn.initializers.normal(0.02)
    implementation: Any = None
    ring_axis: str | None = None
    activation_sharding: jax.sharding.Sharding | None = None

    def setup(self):
        windows = self._windows()
        check_callable("position_embedding", self.position_embedding, "positions", "width")
        check_callable("position_bias", self.position_bias, "distance", "num_heads", "causal")
        some = self._some_rope()
        if self.position_embedding is not None and some is not None and some.axes is not None:
            raise ValueError(
                f"position_embedding must be left out with a rope that has axes {some.axes}: it reads one position"
            )
        if self.output_cap is not None and not 0 < self.output_cap < math.inf:
            raise ValueError(f"output_cap must be positive and finite, got {self.output_cap}")
        self.embed = nn.Embed(
            self.vocab_size,
            self.width,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            embedding_init=nn.with_logical_partitioning(self.embedding_init, ("vocab", "embed")),
        )
        norm = functools.partial(
            RMSNorm,
            axis="embed",
            epsilon=self.norm_epsilon,
            unit_offset=self.norm_unit_offset,
            param_dtype=self.param_dtype,
        )
        dense = functools.partial(nn.Dense, dtype=self.dtype, param_dtype=self.param_dtype)
        attention = functools.partial(
            RotaryAttention,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            # Of unlike layers, what they share: pairs and layout; each is given its rotation and its window.
            rope=some,
            window=None if isinstance(windows, tuple) else windows,
            logit_scale=self.logit_scale,
            logit_cap=self.logit_cap,
            qk_norm=self.qk_norm,
            qk_norm_epsilon=self.norm_epsilon,
            qk_norm_unit_offset=self.norm_unit_offset,
            use_bias=self.qkv_bias,
            use_out_bias=self.out_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            implementation=self.implementation,
            ring_axis=self.ring_axis,
        )
        block = nn.remat(_Block, prevent_cse=False) if self.remat else _Block
        stack = nn.scan(
            block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(*[nn.broadcast] * 6, 0),
            length=self.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        self.layers = stack(
            attention=attention,
            norm=norm,
            dense=functools.partial(dense, use_bias=self.mlp_bias),
            mlp_dim=self.mlp_dim,
            kernel_init=self.kernel_init,
            activation=self.activation,
            post_norms=self.post_norms,
            sharding=self.activation_sharding,
            max_window=self.max_window(),
        )
        self.final_norm = norm()
        if not self.tie_embeddings:
            init = nn.with_logical_partitioning(self.kernel_init, ("embed", "vocab"))
            dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
            self.unembed_kernel = dense(self.vocab_size, use_bias=False, kernel_init=init, dot_general=dot)

    def __call__(
        self,
        tokens,
        positions=None,
        *,
        sequence_index=None,
        mask=None,
        segment_ids=None,
        cache: KVCache | None = None,
        context_length=None,
    ):
        """Logits of the next token after each one.

        Args:
          tokens: integers ``[B, T]`` in ``[0, V)``; one outside makes its row NaN, or on a ring what reads it.
          positions: see :class:`RotaryAttention`; of rope and ``position_embedding`` alike. To be left out where
            neither is there: a ``position_bias`` goes by each token's place in line.
          sequence_index: each token's place in line ``[B or 1, T]``, if not its index; see :class:`RotaryAttention`.
          mask: nonzero at real tokens ``[B, T]``; see :class:`RotaryAttention`.
          segment_ids: of packed sequences ``[B, T]``; see :class:`RotaryAttention`.
          cache: of :meth:`init_cache`, with the tokens before these.
          context_length: for schedules that depend on it; see :meth:`Rope.rotation`. With a cache and no length they take
            the tokens of each row so far. What deeper layers stored of earlier tokens was computed at the length of
            its time, as in every decoder with a cache.

        Returns:
          float32 ``[B, T, V]``, or ``(logits, cache)`` if a cache was given.
        """
        rows = dict(sequence_index=sequence_index, mask=mask, segment_ids=segment_ids, cache=cache)
        hidden = self.hidden(tokens, positions, **rows, context_length=context_length)
        if cache is None:
            return self.unembed(hidden)
        hidden, cache = hidden
        return self.unembed(hidden), cache

    def hidden(
        self,
        tokens,
        positions=None,
        *,
        sequence_index=None,
        mask=None,
        segment_ids=None,
        cache: KVCache | None = None,
        context_length=None,
    ):
        """As the call, but ``[B, T, D]`` before the unembedding: for those who need the logits of few tokens."""
        tokens = device_array("tokens", tokens)
        check_axes("tokens", tokens, "B T")
        check_dtype("tokens", tokens, jnp.integer, "integer")
        tokens = as_int32(tokens)
        known = (tokens >= 0) & (tokens < self.vocab_size)  # an embedding would read a negative one from the end
        tokens = jnp.where(known, tokens, jnp.zeros_like(tokens))
        if mask is not None:
            mask = check_mask("mask", mask, "B T", B=tokens.shape[0], T=tokens.shape[1])
            known |= ~mask  # what stands at padding is nobody's token
        if cache is not None:
            check_cache(cache)
            if cache.key.ndim != 5:
                raise ValueError(
                    "cache must be one of all layers, from model.init_cache: key [layers, B, S, K, H], "
                    f"got {cache.key.shape}"
                )
            sizes = dict(layers=self.num_layers, B=tokens.shape[0])
            check_axes("cache.key", cache.key, "layers B S K H", **sizes)
        if cache is not None and cache.rope is not None and cache.rope != self._ropes():
            raise ValueError(
                f"cache must hold keys of this model's rope {self._ropes()}, got those of {cache.rope}"
            )
        if sequence_index is not None:
            sequence_index = checked_sequence_index(sequence_index, *tokens.shape)
        one = None if cache is None else cache.with_one_count()
        seen = None if one is None else one.num_tokens
        in_line = positions is None
        if positions is None:
            self._check_length(tokens.shape[1], mask, segment_ids)
            counted = self._positions(tokens.shape, mask, segment_ids, seen)
            positions = stored = counted if sequence_index is None else sequence_index
        else:
            positions = self._checked_positions(positions, tokens.shape)
            stored = self._stored_positions(positions, one)
        after, span, key_rotation = None, None, None
        if cache is not None and one is not None:
            # It refuses what is known not to fit: inside, lengths are traced.
            one.advance("tokens", tokens.shape[1], mask, max_window=self.max_window())
            after = one.length_after(tokens.shape[1], mask)
            span = one.context_length(after)
            cache = self._switched(cache, context_length, span, in_line)
        rotation, own_rotation = self._rotations(stored, context_length, span)
        if cache is not None and not cache.rotated and rotation is not None:
            key_rotation, _ = self._rotations(cache.positions(after), context_length, span)
        x = self.embed(tokens)
        if self.embedding_scale is not None:
            x *= jnp.asarray(self.embedding_scale, self.dtype)
        if self.position_embedding is not None:
            where = positions if mask is None else jnp.where(mask, positions, jnp.zeros_like(positions))
            added = self.position_embedding(where, self.width)
            if not isinstance(added, jax.Array):
                raise TypeError(f"position_embedding must return an array, got {type(added).__name__}")
            check_dtype("position_embedding(positions)", added, jnp.floating, "floating")
            added = added[None] if added.ndim == 2 else added
            sizes = dict(B={1, x.shape[0]}, T=x.shape[1], D=self.width)
            check_axes("position_embedding(positions)", added, "B T D", **sizes)
            x += added.astype(self.dtype)
        x = _placed(jnp.where(known[..., None], x, jnp.asarray(jnp.nan, self.dtype)), self.activation_sharding)
        windows = self._windows()
        if isinstance(windows, tuple):  # no window: one that is longer than any row
            longest = jnp.iinfo(jnp.int32).max
            windows = jnp.array([longest if window is None else window for window in windows], jnp.int32)
        else:
            windows = None
        bias = None
        if self.position_bias is not None:
            places = next_positions(tokens.shape, mask, seen=seen) if sequence_index is None else sequence_index
            keys = places if cache is None else cache.positions(after)
            bias = bias_of_order(self.position_bias, places, keys, self.num_heads, True)
        own = _Own(jnp.arange(self.num_layers, dtype=jnp.int32), own_rotation, windows)
        given = cache
        if cache is not None:  # of this model, it is of each layer
            cache = dataclasses.replace(cache.with_one_count(), rope=None)
        (x, cache), lengths = self.layers(
            (x, cache), rotation, key_rotation, sequence_index, bias, mask, segment_ids, own
        )
        x = self.final_norm(x)
        if given is None:
            return x
        return x, dataclasses.replace(given, key=cache.key, value=cache.value, num_tokens=lengths)

    def unembed(self, hidden) -> jax.Array:
        """``[..., D] -> float32 [..., V]``."""
        if self.tie_embeddings:
            table = self.embed.embedding.astype(hidden.dtype)
            logits = jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)
        else:
            logits = self.unembed_kernel(hidden)
        return logits if self.output_cap is None else self.output_cap * jnp.tanh(logits / self.output_cap)

    def init_cache(
        self, *, batch: int, capacity: int, dtype=None, sinks: int | None = None, rotated: bool | None = None
    ) -> KVCache:
        """An empty cache for all layers: every leaf has a leading axis of ``num_layers``; see :func:`init_cache`.

        Where ``rotated`` is None, it is False beside sinks and where a rope's frequencies depend on the length
        (:class:`DynamicNTK`, :class:`LongRope` without one): unrotated keys are right at every length and take no
        second rounding. Elsewhere it is True: a key is rotated once.
        """
        if rotated is None:
            rotated = not sinks and not self.needs_context_length
        one = init_cache(
            batch=batch,
            capacity=capacity,
            num_kv_heads=self.num_kv_heads or self.num_heads,
            head_dim=self.head_dim,
            dtype=dtype or self.dtype,
            sinks=sinks,
            rotated=rotated,
            rope=self._ropes(),
        )
        return jax.tree.map(lambda leaf: jnp.zeros((self.num_layers, *leaf.shape), leaf.dtype), one)

    def _ropes(self):
        """The one rope of all layers, or a tuple of unlike ones."""
        ropes = _alike("rope", self.rope, self.num_layers)
        for rope in ropes if isinstance(ropes, tuple) else (ropes,):
            if not isinstance(rope, Rope | None):
                raise TypeError(f"rope must be a Rope, None, or a tuple of these, got {type(rope).__name__}")
        if isinstance(ropes, tuple):
            first, *others = filter(None, ropes)
            for other in others:
                if dataclasses.replace(other, schedule=first.schedule) != first:
                    raise ValueError(
                        f"rope must be of layers that differ by schedule alone, got {first} and {other}"
                    )
        return ropes

    @property
    def needs_context_length(self) -> bool:
        """Whether a layer's frequencies depend on a length that its schedule lacks: :attr:`Rope.needs_context_length`."""
        return any(rope is not None and rope.needs_context_length for rope in self._distinct())

    def _some_rope(self) -> Rope | None:
        """Of unlike layers, the first that has one: pairs and layout are those of all."""
        ropes = self._ropes()
        return next(filter(None, ropes), None) if isinstance(ropes, tuple) else ropes

    def max_window(self) -> int | None:
        """The longest of the layers' windows; None where one has none."""
        windows = self._windows()
        windows = windows if isinstance(windows, tuple) else (windows,)
        return None if None in windows else max(windows)

    def _windows(self):
        """The one window of all layers, or a tuple of unlike ones."""
        windows = _alike("window", self.window, self.num_layers)
        for window in windows if isinstance(windows, tuple) else (windows,):
            window_size(window)
        return windows

    def _check_length(self, length, mask, segment_ids):
        """Raises where it is known that tokens without positions of their own are too many for the embedding."""
        longest = getattr(self.position_embedding, "num_positions", None)
        known = mask is None and segment_ids is None and isinstance(length, int)
        if known and longest is not None and length > longest:
            raise ValueError(f"tokens must be at most T={longest}, what position_embedding has, got T={length}")

    def _checked_positions(self, positions, shape):
        """Positions that somebody gave, if there is somebody to read them."""
        first = self._some_rope()
        if first is None and self.position_embedding is None:
            raise ValueError("positions must be left out without rope and position_embedding: nothing reads them")
        positions = device_array("positions", positions)
        axes = "T" if first is None or first.axes is None else "T A"
        if positions.ndim > len(axes.split()):
            check_axes("positions", positions, f"B {axes}", B={1, shape[0]}, T=shape[1])
        else:
            check_axes("positions", positions, axes, T=shape[1])
        return positions

    def _stored_positions(self, positions, cache: KVCache | None):
        """Positions that somebody gave, as the cache counts them."""
        rope = self._some_rope()
        if cache is None or rope is None:
            return positions
        return cache.stored_positions(positions, rope)

    def _positions(self, shape, mask, segment_ids, seen):
        """Positions of tokens that nobody gave positions; a rope with axes refuses to guess them."""
        return default_positions(self._some_rope(), shape, mask, segment_ids, seen)

    def _distinct(self) -> tuple[Rope | None, ...]:
        ropes = self._ropes()
        return tuple(dict.fromkeys(ropes)) if isinstance(ropes, tuple) else (ropes,)

    def _switched(self, cache: KVCache, context_length, span, in_line: bool) -> KVCache:
        """The cache with rotated keys at the frequencies of this call, for a length or for what it spans."""
        distinct = self._distinct()
        takers = [rope for rope in distinct if rope is not None and hasattr(rope.schedule, "context_length")]
        if not cache.rotated or not takers:
            return cache
        needed = any(rope.needs_context_length for rope in takers)
        if len(distinct) > 1:
            if context_length is None and not needed:
                return cache
            raise ValueError(
                "cache must hold unrotated keys, init_cache(rotated=False), where layers differ in rope and the "
                "frequencies of some depend on the length"
            )
        (rope,) = takers
        if context_length is None and needed:
            return cache.rerotate(rope, span, growing=True)
        context_length = cast(Any, rope.schedule).context_length if context_length is None else context_length
        return cache.rerotate(rope, context_length, in_line=in_line)

    def _rotations(self, positions, context_length, span=None):
        """The rotation of all layers, and None; or each distinct one, stacked, and which one each layer reads.

        The length is for the schedules that depend on it; where it is None, those that have none take what a cache
        spans.
        """
        ropes, distinct = self._ropes(), self._distinct()
        real = [rope for rope in distinct if rope is not None]
        if not real:
            if context_length is not None:
                raise ValueError(
                    f"context_length must be left out without a rope that depends on it, got {context_length}"
                )
            return None, None
        # Where none depends on the length, each says so itself.
        takers = [rope for rope in real if hasattr(rope.schedule, "context_length")] or real
        turns: dict[Rope | None, Rotation] = {}
        for rope in real:
            own = context_length if rope in takers else None
            if own is None and rope.needs_context_length:
                own = span
            turns[rope] = rope.rotation(positions, context_length=own)
        if len(distinct) == 1:
            return turns[distinct[0]], None
        some = turns[real[0]]
        still = Rotation(jnp.ones_like(some.cos), jnp.zeros_like(some.sin))  # turns nothing, exactly
        parts = zip(*(turns.get(rope, still) for rope in distinct), strict=True)
        stacked = Rotation(*(jnp.stack(jnp.broadcast_arrays(*part)) for part in parts))
        return stacked, jnp.array([distinct.index(rope) for rope in ropes], jnp.int32)


def _alike(field, value, num_layers):
    """One value where all layers have the same; a tuple has an entry for each of them."""
    if not isinstance(value, tuple):
        return value
    if len(value) != num_layers:
        raise ValueError(f"{field} must have an entry for each of num_layers={num_layers}, got {len(value)}")
    return value[0] if len(set(value)) == 1 else value


class _Own(NamedTuple):
    """What one layer has to itself; None where they are alike."""

    layer: jax.Array  # its number
    rotation: jax.Array | None  # the index of its rotation
    window: jax.Array | None


class _Block(nn.Module):
    """One layer: attention and SwiGLU, each behind a norm and beside a residual."""

    attention: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    dense: Callable[..., nn.Module]
    mlp_dim: int
    kernel_init: Initializer
    activation: Callable[[jax.Array], jax.Array]
    post_norms: bool
    sharding: jax.sharding.Sharding | None
    max_window: int | None

    @nn.compact
    def __call__(
        self,
        carry,
        rotation: Rotation | None,
        key_rotation: Rotation | None,
        sequence_index,
        bias,
        mask,
        segment_ids,
        own: _Own,
    ):
        # The cache of all layers is carried, so that each writes its tokens where they belong. As what goes into a
        # layer and what comes out of it, the whole of it would be copied with every token.
        x, caches = carry
        cache = None if caches is None else dataclasses.replace(caches, layer=own.layer)

        def dense(name, features, *axes):
            init = nn.with_logical_partitioning(self.kernel_init, axes)
            bias_init = nn.with_logical_partitioning(nn.initializers.zeros_init(), axes[1:])
            return self.dense(features, kernel_init=init, bias_init=bias_init, name=name)

        if own.rotation is not None:
            rotation, key_rotation = jax.tree.map(lambda each: each[own.rotation], (rotation, key_rotation))
        y = self.attention(name="self_attention")(
            self.norm(name="attention_norm")(x),
            rotation=rotation,
            key_rotation=key_rotation,
            sequence_index=sequence_index,
            bias=bias,
            mask=mask,
            segment_ids=segment_ids,
            cache=cache,
            window=own.window,
            max_window=self.max_window,
        )
        if cache is not None:
            y, cache = y
        if self.post_norms:
            y = self.norm(name="post_attention_norm")(y)
        x += y
        n = self.norm(name="mlp_norm")(x)
        gate = dense("gate", self.mlp_dim, "embed", "mlp")(n)
        up = dense("up", self.mlp_dim, "embed", "mlp")(n)
        # Formed again in the backward pass, which keeps gate, up and their product, and not three more as large.
        inside = jax.checkpoint(lambda gate, up: self.activation(gate) * up)(gate, up)
        y = dense("down", x.shape[-1], "mlp", "embed")(inside)
        if self.post_norms:
            y = self.norm(name="post_mlp_norm")(y)
        x = _placed(x + y, self.sharding)
        if cache is None:
            return (x, None), None
        return (x, dataclasses.replace(caches, key=cache.key, value=cache.value)), cache.num_tokens


def _placed(x, sharding):
    """The residual stream where it is to lie."""
    return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)
